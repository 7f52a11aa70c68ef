"""NVIDIA's compute-sanitizer over every CUDA kernel, forward and backward, on small arrays.

    python benchmarks/sanitize.py [--rows TEXT] [--tools memcheck,..] [--logs FOLDER] [--write]
    python benchmarks/sanitize.py --again FOLDER [--write]          the verdict once more over the logs of a run
    python benchmarks/sanitize.py --call ROW ..                     the calls alone, which is what the tools are run over

Every row of kernels.def and the kernels of weights run under the four tools, several processes side by side. A report that no
entry of sanitizer_reports.py explains, or a row that does not come to its end, is an error. --write puts the outcome, with the
hash of the kernels' sources, into results/sanitizers.json, which evidence.py compares with the tree. Entries name functions,
which the tools know where the module was built with NVCC_APPEND_FLAGS=-lineinfo; that changes no instruction.

Arrays are NumPy's (those of a cache: torch tensors copied to the GPU), so that no kernel but ours runs and every byte that they
read was copied or written under the tool's eyes. Each row runs at its largest head dims, general ones with every option.
"""
import argparse
import collections
import contextlib
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evidence
import ml_dtypes
import numpy as np
import sanitizer_reports

import flashgqa

TOOLS = {"memcheck": 4, "initcheck": 6, "synccheck": 5, "racecheck": 10}       # processes at once: the slower, the more
LIMIT = 60              # seconds a process may take

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
B, HQ, HK, SQ, SK = 1, 4, 2, 140, 200
CAPPED = {"causal": True, "softcap": 8.0}      # kernels of their own in rows of arch 90
ALIBI_HEAD_DIMS = 64, 128                       # with ALiBi, plain ones with a bias and a mask; backward with a bias
ALL_HEAD_DIMS = 64, 128, 256                    # of plain rows that have one for all of that together
# query rows, of which a KV head has twice as many
FEW_ROWS = {"decode": (3,), "decodef8": (3,), "decodewide": (20, 50), "decodewidef8": (20, 50)}


# ---- the calls ----

def options_of(variant, rng):
    if variant != "general":
        return {"causal": True, "sink": np.linspace(-1, 1, HQ, dtype=np.float32)}
    return {"softcap": 8.0, "dropout_p": 0.2, "seed": 7, "window": (150, 20), "sink": np.linspace(-1, 1, HQ, dtype=np.float32),
            "bias": rng.standard_normal((1, 1, SQ, SK), np.float32), "alibi_slopes": np.linspace(0.01, 0.5, HQ, dtype=np.float32),
            "mask": rng.random((B, 1, 1, SK)) < 0.9}


def on_gpu(x):
    """As a torch tensor."""
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
        **options | {"sink": put(options["sink"])}, return_lse=True, check=True, **where,
    )


def run_dropout(q, k, v, options, bias, where):
    drops = {"dropout_p": 0.2, "seed": 7, **where}
    results = list(flashgqa.attention(q, k, v, **options, **drops, return_lse=True))
    results += flashgqa.attention(q, k, v, **drops, return_lse=True)
    results += flashgqa.attention(q, k, v, bias=bias, mask=bias > -1, **drops, return_lse=True)
    return [*results, attention_beside_inf(q, k, v, drops)]


def attention_beside_inf(q, k, v, options):
    """A tile of which few rows see an inf in V: done twice."""
    poisoned = v + 0
    poisoned[..., SK - 1, :] = float("inf")
    return flashgqa.attention(q, k, poisoned, causal=True, **options)[:, :, : SQ - 1]


def run_forward(q, k, v, options, slopes, bias, variant, arch, where):
    if variant == "dropout":
        return run_dropout(q, k, v, options, bias, where)
    results = list(flashgqa.attention(q, k, v, **options, return_lse=True, **where))
    if variant in FEW_ROWS:                     # merged by a kernel of its own
        results += flashgqa.attention(q, k, v, **options, return_lse=True, batch_invariant=True, **where)
    elif arch == "sm90":
        results += flashgqa.attention(q, k, v, return_lse=True, **where)
        if variant != "short":
            results += flashgqa.attention(q, k, v, **CAPPED, return_lse=True, **where)
        if variant != "short" and q.shape[-1] in ALIBI_HEAD_DIMS:
            results += flashgqa.attention(q, k, v, causal=True, alibi_slopes=slopes, return_lse=True, **where)
            if variant == "plain" and q.shape[-1] == v.shape[-1]:
                results += flashgqa.attention(q, k, v, bias=bias, return_lse=True, **where)
                results += flashgqa.attention(q, k, v, bias=bias[..., :1], mask=bias > -1, return_lse=True, **where)
        if variant == "plain" and q.shape[-1] == v.shape[-1] and q.shape[-1] in ALL_HEAD_DIMS:
            terms = {"alibi_slopes": slopes, "bias": bias, "mask": bias > -1}
            results += flashgqa.attention(q, k, v, **CAPPED, **terms, return_lse=True, **where)
        results.append(attention_beside_inf(q, k, v, where))
    return results


def run_row(name, where, put, everything=lambda x: x):
    """Results of one row of kernels.def; the backward ones take what a float32 forward pass on the CPU left. where: the options
    that say so; put: what takes a cache to its device, everything: what takes all other arrays there."""
    which, arch, dtype, d, dv, variant = name.split("_")
    rng = np.random.default_rng(0)
    results = []
    for sq in FEW_ROWS.get(variant, (SQ,)):
        extents = ((B, HQ, sq, int(d[1:])), (B, HK, SK, int(d[1:])), (B, HK, SK, int(dv[2:])), (B, HQ, sq, int(dv[2:])))
        q, k, v, dout = (rng.standard_normal(e, np.float32).astype(DTYPES[dtype]) for e in extents)
        options = options_of(variant, rng)
        if variant == "cache" or ((which, arch) == ("fwd", "sm90") and variant not in ("dropout", "short")):
            dtypes = [FLOAT8] if variant.endswith("f8") else [q.dtype] if variant in (*FEW_ROWS, "cache") else [q.dtype, FLOAT8]
            for stored in dtypes:               # of float8 a copy, if the row is not for it
                results += run_cached(q, k, v, options, put, {"kernel": where.get("kernel")}, stored)
        if which == "fwd" and not variant.endswith(("cache", "f8")):
            moved = {key: everything(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
            slopes = everything(np.linspace(0.05, 0.5, HQ, dtype=np.float32))
            bias = everything(rng.standard_normal((1, 1, SQ, SK), np.float32))
            results += run_forward(*map(everything, (q, k, v)), moved, slopes, bias, variant, arch, where)
    passes = [options, {}, CAPPED] if which == "bwd" else []
    if passes:
        slopes = np.linspace(0.05, 0.5, HQ, dtype=np.float32)
        shown, drops = rng.random((B, 1, SQ, SK)) < 0.9, {"dropout_p": 0.2, "seed": 7}
        passes += [{"causal": True, "alibi_slopes": slopes}, {**CAPPED, "alibi_slopes": slopes}]
        passes += [{"causal": True, "mask": shown}, {"mask": shown, **drops}]
        passes += [{"alibi_slopes": slopes, "mask": shown, **drops}, {**CAPPED, "mask": shown, **drops}]
    if passes and int(d[1:]) in ALIBI_HEAD_DIMS:
        bias = rng.standard_normal((B, HQ, SQ, SK), np.float32).astype(DTYPES[dtype])
        passes += [{"bias": bias}, {"causal": True, "bias": bias, "mask": shown}]
        passes += [{"bias": bias[:, :1], **drops}, {"causal": True, "bias": bias, "mask": shown, **drops}]
    for given in passes:
        out, lse = flashgqa.attention(q, k, v, **given, return_lse=True)
        moved = {key: everything(x) if isinstance(x, np.ndarray) else x for key, x in given.items()}
        for order in (True, False):
            arrays = map(everything, (dout, q, k, v, out, lse))
            results += flashgqa.attention_backward(*arrays, **moved, deterministic=order, **where)
        if arch != "sm90":
            break
        if given is CAPPED:
            results += gradients_beside_inf(dout, q, k, v, everything, where)
    return results


def gradients_beside_inf(dout, q, k, v, everything, where):
    """Under a soft cap, what is finite of the gradients where a key or a query is inf: a kernel of its own makes them."""
    results = []
    for tensor, those in ((k, (1, 2)), (q, (0, 2))):
        inf = tensor + 0
        inf[0, 1, SQ // 2, 3] = float("inf")
        arrays = inf if tensor is q else q, inf if tensor is k else k, v
        out, lse = flashgqa.attention(*arrays, **CAPPED, return_lse=True)
        gradients = flashgqa.attention_backward(*map(everything, (dout, *arrays, out, lse)), **CAPPED, **where)
        results += [gradients[n] for n in those]
    return results


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


def written_memory():
    """A mode in which new torch tensors, a call's workspace among them, hold NaN that a kernel has written: the tool does not see
    what TMA stores and bulk reductions write. What is read before it was written shows in the results. Under any mode the module
    allocates by functions that torch's flag reaches."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Plain(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return Plain()


def call(names, filled):
    """A line before and after each row, between which the tool's reports on it stand."""
    for name in names:
        print(f"row {name}", flush=True)
        where = {"kernel": name} | ({} if filled else {"device": "cuda"})
        everything = on_gpu if filled else lambda x: x
        with written_memory() if filled else contextlib.nullcontext():
            results = run_other(name, where) if name.endswith("_any") else run_row(name, where, on_gpu, everything)
        finite = are_finite(results)
        time.sleep(0.05)        # the tool's lines come from another process
        print(f"{'ran' if finite else 'NOT FINITE'} {name}", flush=True)


# ---- what the tools say ----

def cut_by_row(text):
    """{row: [line, ..]} of a process's output."""
    found, row = collections.defaultdict(list), None
    for line in text.splitlines():
        if match := re.match(r"row (\w+)$", line):
            row = match[1]
        if row:
            found[row].append(line)
    return found


def reports_in(lines):
    """A report is [what, place, ..], without addresses and counts: of a race the first place is in what is said first."""
    reports, inside = [], False
    for line in lines:
        text = re.sub(r"\+?0x[0-9a-f]+|\[[\d ,]+hazards?\]", "", line[10:]).strip()
        if not line.startswith("========="):
            continue
        if re.match(r"========= [^ ]", line):
            inside = not re.match(r"COMPUTE-SANITIZER|\w+ SUMMARY", text)
            if inside:
                reports.append([text])
        elif inside and re.match(r"(at|and|Device Frame:) ", text):
            reports[-1].append(text)
        elif inside and not text:
            inside = False
    return reports


def run_tool(tool, names, filled, logs):
    """Logs of these rows, one each; a row that ends its process is followed by a process for those behind it."""
    rest, end = list(names), time.monotonic() + LIMIT
    while rest and end - time.monotonic() > 5:
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "2000", sys.executable, __file__, "--call", *rest]
        command += ["--filled"] if filled else []
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "check": False}
        try:
            output = subprocess.run(command, timeout=end - time.monotonic(), **options).stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
        rows = cut_by_row(output.decode(errors="replace"))
        for row, lines in rows.items():
            (logs / f"{tool}.{row}.txt").write_text("\n".join(lines) + "\n")
        if not rows:
            (logs / f"{tool}.failed.{rest[0]}.txt").write_bytes(output)
        rest = rest[rest.index(list(rows)[-1]) + 1 :] if rows else []


def run_tools(tools, names, logs):
    """All of it; about.json says of what."""
    logs.mkdir(parents=True, exist_ok=True)
    blind = [name for name in names if "_sm90_" in name and name.endswith(("plain", "tall", "short", "dropout"))]
    jobs, start = [], time.monotonic()
    for tool in tools:
        groups = [(names, False)]
        if tool == "initcheck":
            groups = [([name for name in names if name not in blind], False), (blind, True)]
        for group, filled in groups:
            each = -(-TOOLS[tool] * len(group) // len(names))
            jobs += [(tool, group[n::each], filled, logs) for n in range(each) if group[n::each]]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: run_tool(*job), jobs))
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=False).stdout
    about = {
        "sources_sha256": evidence.tree_hash(), "date": time.strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - start),
        "device": subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0],
        "toolkit": " ".join(re.findall(r"Version.*", version)), "tools": tools, "kernels": names,
    }
    (logs / "about.json").write_text(json.dumps(about))


def verdict(logs):
    """The record, and the reports that nothing explains, {(tool, row): {text: count}}."""
    record, unexplained = json.loads((logs / "about.json").read_text()), {}
    record["rows"] = []
    for tool in record["tools"]:
        for name in record["kernels"]:
            path = logs / f"{tool}.{name}.txt"
            lines = path.read_text().splitlines() if path.exists() else []
            reports = reports_in(lines)
            left = [report for report in reports if not sanitizer_reports.explains(tool, name, report)]
            ran = f"ran {name}" in lines
            if left or not ran:
                texts = ["did not come to its end"] * (not ran) + [" | ".join(report) for report in left]
                unexplained[tool, name] = collections.Counter(texts)
            record["rows"].append({"tool": tool, "row": name, "reports": len(reports), "suppressed": len(reports) - len(left),
                                   "clean": ran and not left})
    return record, unexplained


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", nargs="+", metavar="ROW")
    parser.add_argument("--filled", action="store_true", help="with --call: torch tensors, whose memory has been written")
    parser.add_argument("--rows", default="", metavar="TEXT")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--logs", type=Path, default=Path("sanitizer_logs"))
    parser.add_argument("--again", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.call:
        return call(args.call, args.filled)
    if not args.again:
        kernels = [row for row in flashgqa.kernels() if row["device"] == "cuda" and args.rows in row["name"]]
        for row in kernels:
            if not row["available"]:
                print(f"{row['name']}: not run: {row['reason']}")
        run_tools(args.tools.split(","), [row["name"] for row in kernels if row["available"]], args.logs)
    record, unexplained = verdict(args.again or args.logs)
    for tool in record["tools"]:
        rows = [row for row in record["rows"] if row["tool"] == tool]
        clean, reports, explained = (sum(row[key] for row in rows) for key in ("clean", "reports", "suppressed"))
        print(f"{tool}: {clean} of {len(rows)} rows clean, {reports} reports, {explained} of them explained")
    for (tool, name), texts in unexplained.items():
        for text, count in texts.items():
            print(f"{tool} {name}: {count}x {text}")
    if args.write:
        evidence.SANITIZERS.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
