"""Every CUDA kernel once, forward and backward, on tiny arrays: what NVIDIA's compute-sanitizer is run over.

    for tool in memcheck synccheck initcheck racecheck; do
        compute-sanitizer --tool $tool python benchmarks/sanitize.py [TEXT]      TEXT: only kernels whose name contains it
    done

Arrays are NumPy's (those of a cache: torch tensors copied to the GPU), so that no kernel but ours runs and every byte that they
read was copied or written under the tool's eyes.
Each row of kernels.def runs at its largest head dims, general ones with every option. What the tools report on a clean tree, and
why that is no fault, is in csrc/README.md.
"""
import sys

import ml_dtypes
import numpy as np

import flashgqa

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
B, HQ, HK, SQ, SK = 1, 4, 2, 140, 200
FEW_ROWS = {"decode": 3, "decodef8": 3, "decodewide": 20}      # query rows, of which a KV head has twice as many


def options_of(variant, rng):
    if variant != "general":
        return {"causal": True, "sink": np.linspace(-1, 1, HQ, dtype=np.float32)}
    return {"softcap": 8.0, "dropout_p": 0.2, "seed": 7, "window": (150, 20), "sink": np.linspace(-1, 1, HQ, dtype=np.float32),
            "bias": rng.standard_normal((1, 1, SQ, SK), np.float32), "alibi_slopes": np.linspace(0.01, 0.5, HQ, dtype=np.float32),
            "mask": rng.random((B, 1, 1, SK)) < 0.9}


def on_gpu(x):
    """As a torch tensor, which alone can be a cache there."""
    import torch
    if x.dtype == DTYPES["bf16"]:
        return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16)
    if x.dtype == FLOAT8:
        return torch.from_numpy(x.view(np.uint8)).cuda().view(torch.float8_e4m3fn)
    return torch.from_numpy(x).cuda()


def run_cached(q, k, v, options, put, where, stored):
    """Pages of 16 slots of dtype `stored`, 3 new keys and values behind those in use."""
    pages, new = -(-SK // 16), 3
    rng = np.random.default_rng(1)
    cut = [np.concatenate([x, x[:, :, : pages * 16 - SK]], 2).reshape(B, HK, pages, 16, -1) for x in (k, v)]
    caches = [put(np.ascontiguousarray(x.swapaxes(1, 2).reshape(B * pages, HK, 16, -1)).astype(stored)) for x in cut]
    table = rng.permutation(B * pages).astype(np.int32).reshape(B, pages)
    added = [put(np.ascontiguousarray(x[:, :, :new])) for x in (k, v)]
    return flashgqa.attention_with_kvcache(
        put(q), *caches, *added, cache_lens=put(np.full(B, SK - new, np.int32)), page_table=put(table),
        **options | {"sink": put(options["sink"])}, return_lse=True, **where,
    )


def run_row(name, where, put):
    """Results of one row of kernels.def; the backward ones take what a float32 forward pass on the CPU left. where: the options
    that say so."""
    which, _, dtype, d, dv, variant = name.split("_")
    rng = np.random.default_rng(0)
    sq = FEW_ROWS.get(variant, SQ)
    extents = ((B, HQ, sq, int(d[1:])), (B, HK, SK, int(d[1:])), (B, HK, SK, int(dv[2:])), (B, HQ, sq, int(dv[2:])))
    q, k, v, dout = (rng.standard_normal(e, np.float32).astype(DTYPES[dtype]) for e in extents)
    options = options_of(variant, rng)
    if variant == "cache" or variant.endswith("f8"):
        return run_cached(q, k, v, options, put, {"kernel": where.get("kernel")}, FLOAT8 if variant.endswith("f8") else q.dtype)
    if which == "fwd":
        return flashgqa.attention(q, k, v, **options, return_lse=True, **where)
    out, lse = flashgqa.attention(q, k, v, **options, return_lse=True)
    return [x for order in (True, False)
            for x in flashgqa.attention_backward(dout, q, k, v, out, lse, **options, deterministic=order, **where)]


def run_other(name, where):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((B, HQ, SQ, 40), np.float32), rng.standard_normal((B, HK, SK, 40), np.float32)
    options = options_of("general", rng)
    del options["dropout_p"], options["seed"]
    which = {"reduce": "keys"} if name.startswith("keysum") else {"rows": [0, 139, 70]}
    return [flashgqa.attention_weights(q, k, **which, **options, **where)]


def are_finite(results):
    return all(np.isfinite(x.astype(np.float32) if isinstance(x, np.ndarray) else x.float().cpu().numpy()).all()
               for x in results if x is not None)


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = [row for row in flashgqa.kernels() if row["device"] == "cuda" and wanted in row["name"]]
    for row in rows:
        if not row["available"]:
            print(f"{row['name']}: not run: {row['reason']}")
            continue
        where = {"device": "cuda", "kernel": row["name"]}
        training = row["pass"] in ("forward", "backward")
        finite = are_finite(run_row(row["name"], where, on_gpu) if training else run_other(row["name"], where))
        print(f"{row['name']}: {'ran' if finite else 'NOT FINITE'}", flush=True)
        if not finite:
            sys.exit(1)


if __name__ == "__main__":
    main()
