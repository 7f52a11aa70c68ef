"""Every CUDA kernel once, forward and backward, on tiny arrays: what NVIDIA's compute-sanitizer is run over.

    for tool in memcheck synccheck initcheck racecheck; do
        compute-sanitizer --tool $tool python benchmarks/sanitize.py [TEXT]      TEXT: only kernels whose name contains it
    done

Arrays are NumPy's, so that no kernel but ours runs and every byte that they read was copied or written under the tool's eyes.
Each row of kernels.def runs at its largest head dims, general ones with every option. What the tools report on a clean tree, and
why that is no fault, is in csrc/README.md.
"""
import sys

import ml_dtypes
import numpy as np

import flashgqa

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
B, HQ, HK, SQ, SK = 1, 4, 2, 140, 200
FEW_ROWS = {"decode": 3, "decodewide": 20}      # query rows, of which a KV head has twice as many


def options_of(variant, rng):
    if variant != "general":
        return {"causal": True, "sink": np.linspace(-1, 1, HQ, dtype=np.float32)}
    return {"softcap": 8.0, "dropout_p": 0.2, "seed": 7, "window": (150, 20), "sink": np.linspace(-1, 1, HQ, dtype=np.float32),
            "bias": rng.standard_normal((1, 1, SQ, SK), np.float32), "alibi_slopes": np.linspace(0.01, 0.5, HQ, dtype=np.float32),
            "mask": rng.random((B, 1, 1, SK)) < 0.9}


def run_row(name):
    """One row of kernels.def; the backward ones take what a float32 forward pass on the CPU left."""
    which, _, dtype, d, dv, variant = name.split("_")
    rng = np.random.default_rng(0)
    sq = FEW_ROWS.get(variant, SQ)
    extents = ((B, HQ, sq, int(d[1:])), (B, HK, SK, int(d[1:])), (B, HK, SK, int(dv[2:])), (B, HQ, sq, int(dv[2:])))
    q, k, v, dout = (rng.standard_normal(e, np.float32).astype(DTYPES[dtype]) for e in extents)
    options = options_of(variant, rng)
    if which == "fwd":
        return flashgqa.attention(q, k, v, **options, return_lse=True, device="cuda", kernel=name)
    out, lse = flashgqa.attention(q, k, v, **options, return_lse=True)
    return [flashgqa.attention_backward(dout, q, k, v, out, lse, **options, deterministic=order, device="cuda", kernel=name)
            for order in (True, False)][0]


def run_other(name):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((B, HQ, SQ, 40), np.float32), rng.standard_normal((B, HK, SK, 40), np.float32)
    options = options_of("general", rng)
    del options["dropout_p"], options["seed"]
    which = {"reduce": "keys"} if name.startswith("keysum") else {"rows": [0, 139, 70]}
    return [flashgqa.attention_weights(q, k, **which, **options, device="cuda", kernel=name)]


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = [row for row in flashgqa.kernels() if row["device"] == "cuda" and wanted in row["name"]]
    for row in rows:
        if not row["available"]:
            print(f"{row['name']}: not run: {row['reason']}")
            continue
        results = (run_row if row["pass"] in ("forward", "backward") else run_other)(row["name"])
        finite = all(np.isfinite(x.astype(np.float32)).all() for x in results if x is not None)
        print(f"{row['name']}: {'ran' if finite else 'NOT FINITE'}", flush=True)
        if not finite:
            sys.exit(1)


if __name__ == "__main__":
    main()
