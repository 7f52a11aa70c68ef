"""NVIDIA's compute-sanitizer over every CUDA kernel, forward and backward, on small arrays.

    python benchmarks/sanitize.py [--rows TEXT] [--tools memcheck,..] [--logs FOLDER] [--write]
    python benchmarks/sanitize.py --again FOLDER [--write]          the verdict once more over the logs of a run
    python benchmarks/sanitize.py --call ROW ..                     the calls alone, which is what the tools are run over
    python benchmarks/sanitize.py --kernels                         kernels of the module that no call launches: an error

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
import os
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

PROCESSES = {"memcheck": 4, "initcheck": 9, "synccheck": 5, "racecheck": 14}      # at once: the slower the tool, the more
LIMITS = {"memcheck": 150, "initcheck": 200, "synccheck": 150, "racecheck": 230}    # seconds of a process
PROFILED = 6            # processes at once, of those that note what is launched
# About the seconds of a row under racecheck, 25 processes on an H100, by the first pattern that fits: a second a call, of which
# backward rows for Hopper have some 30, and longer where tiles are small.
WEIGHTS = {r"bwd_sm90_.*_d(64|128)_": 33, r"bwd_.*_d256_": 28, r"bwd_": 10, r"fwd_sm90_.*_(plain|tall|dropout|decodewide)": 10,
           r"": 2}

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
B, HQ, HK, SQ, SK = 1, 4, 2, 140, 200
WIDE, MANY = 208, 4000                          # keys whose masks TMA can address; so many that they are shared out
MANY_ROWS = 144 * 128 // HQ                     # a tile for each multiprocessor of the largest GPU of Hopper's
CAPPED = {"causal": True, "softcap": 8.0}      # kernels of their own in rows of arch 90
ALIBI_HEAD_DIMS = 64, 128                       # with ALiBi, plain ones with a bias and a mask; backward a bias by TMA
ALL_HEAD_DIMS = 64, 128, 256                    # of plain rows that have a bias and a mask by TMA, and all together
SCALED_HEAD_DIMS = {"plain": (64, 128, 256), "tall": (64,)}
KNOWN_LENGTHS = {("tall", 128)}                # rows with a kernel for lengths that the host knows
# query rows, of which a KV head has twice as many
FEW_ROWS = {"decode": (3,), "decodef8": (3,), "decodewide": (7, 14, 20, 50), "decodewidef8": (7, 14, 20, 50)}


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


def run_cached(q, k, v, options, put, where, stored, scaled=False):
    """Pages of 16 slots of dtype `stored`, 3 new keys and values behind those in use."""
    pages, new = -(-SK // 16), 3
    rng = np.random.default_rng(1)
    cut = [np.concatenate([x, x[:, :, : pages * 16 - SK]], 2).reshape(B, HK, pages, 16, -1) for x in (k, v)]
    caches = [put(np.ascontiguousarray(x.swapaxes(1, 2).reshape(B * pages, HK, 16, -1)).astype(stored)) for x in cut]
    table = rng.permutation(B * pages).astype(np.int32).reshape(B, pages)
    added = [put(np.ascontiguousarray(x[:, :, :new])) for x in (k, v)]
    if scaled:
        scale = put(np.ones(HK, np.float32))
        where = {**where, "k_scale": scale, "v_scale": scale}
    return flashgqa.attention_with_kvcache(
        put(q), *caches, *added, cache_lens=put(np.full(B, SK - new, np.int32)), page_table=put(table),
        **options | {"sink": put(options["sink"])}, return_lse=True, check=True, **where,
    )


def attention_beside_inf(q, k, v, options):
    """A tile of which few rows see an inf in V: done twice."""
    poisoned = v + 0
    poisoned[..., v.shape[2] - 1, :] = float("inf")
    return flashgqa.attention(q, k, poisoned, causal=True, **options)[:, :, : SQ - 1]


def repeated(x, rows):
    """So many rows, the same ones over and over."""
    return x[:, :, np.arange(rows) % x.shape[2]]


def run_hopper_forward(q, k, v, slopes, bias, variant, put, where):
    """Each of the kernels that a row has. bias: for WIDE keys."""
    d, own = q.shape[-1], variant in ("plain", "dropout") and q.shape[-1] == v.shape[-1]
    few_keys, wide_keys, many_keys = ((k, v), *((repeated(k, rows), repeated(v, rows)) for rows in (WIDE, MANY)))
    calls = [(few_keys, {})]
    if variant == "short":                      # whole in a tile: a kernel for each of these numbers
        masked = {90: {"causal": True, "align": "top-left"}}     # of fewer keys than rows the last ones only would see any
        calls += [((k[:, :, :rows], v[:, :, :rows]), masked.get(rows, {})) for rows in (30, 60, 70, 90, 100, 120)]
    else:
        calls.append((few_keys, CAPPED))
    if variant != "short" and d in ALIBI_HEAD_DIMS:
        calls.append((few_keys, {"causal": True, "alibi_slopes": slopes}))
    if d in ALL_HEAD_DIMS and own:              # by TMA, and wherever elements lie
        calls += [(wide_keys, {"bias": bias}), (wide_keys, {"mask": bias > -1}), (wide_keys, {"bias": bias, "mask": bias > -1})]
        calls.append((few_keys, {"bias": bias[..., :1], "mask": bias[..., :SK] > -1}))
        calls.append((wide_keys, {**CAPPED, "alibi_slopes": slopes, "bias": bias, "mask": bias > -1}))
        terms = {"alibi_slopes": slopes, "bias": bias[..., :SK], "mask": bias[..., :SK] > -1}
        calls.append((few_keys, {**CAPPED, **terms}))
        odd_keys = [x[:, :, 1:] for x in many_keys]              # whose mask is copied to rows on 16 bytes
        calls.append((odd_keys, {"mask": (odd_keys[0][:, :1, None, :, 0] > -1) & (q[:, :1, :, None, 0] > -9)}))
    results = [x for keys, options in calls for x in flashgqa.attention(q, *keys, **options, return_lse=True, **where)]
    if variant in ("plain", "tall"):            # keys in parts
        results += flashgqa.attention(q[:, :, :70], *many_keys, return_lse=True, **where)
    if (variant, d) == ("plain", 256):          # blocks in pairs: a tile for each multiprocessor, of one call on the device
        arrays = [put(x) if isinstance(x, np.ndarray) else x for x in (repeated(q, MANY_ROWS), *many_keys)]
        results += flashgqa.attention(*arrays, return_lse=True, kernel=where.get("kernel"))
    if variant == "short":
        results.append(attention_beside_inf(q, k[:, :, :70], v[:, :, :70], where))
    if (variant, d) in KNOWN_LENGTHS:           # the other one
        lengths = np.full(B, SK, np.int32)
        lengths = lengths if isinstance(q, np.ndarray) else put(lengths)
        results.append(attention_beside_inf(q, k, v, {"kv_lens": lengths, **where}))
    return [*results, attention_beside_inf(q, k, v, where)]


def run_forward(q, k, v, options, slopes, bias, variant, arch, put, where):
    if variant == "dropout":
        where = {"dropout_p": 0.2, "seed": 7, **where}
    results = list(flashgqa.attention(q, k, v, **options, return_lse=True, **where))
    if variant == "general":                    # keys in parts, rows that start anywhere
        results += flashgqa.attention(q[:, :, :5], repeated(k, MANY), repeated(v, MANY)[..., :-1], return_lse=True, **where)
    if variant in FEW_ROWS:                     # merged by a kernel of its own
        results += flashgqa.attention(q, k, v, **options, return_lse=True, batch_invariant=True, **where)
        many_keys = (repeated(x, 8 * MANY) for x in (k, v))         # too many for clusters to join
        results += flashgqa.attention(q, *many_keys, return_lse=True, **where)
    elif arch == "sm90":
        results += run_hopper_forward(q, k, v, slopes, bias, variant, put, where)
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
            if variant in FEW_ROWS:             # chunks of keys
                results += run_cached(q, k, v, options, put, {"kernel": where.get("kernel"), "batch_invariant": True}, dtypes[0])
            if arch == "sm90" and variant not in FEW_ROWS and int(d[1:]) in SCALED_HEAD_DIMS[variant]:
                results += run_cached(q, k, v, options, put, {"kernel": where.get("kernel")}, FLOAT8, True)
        if which == "fwd" and not variant.endswith(("cache", "f8")):
            moved = {key: everything(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
            slopes = everything(np.linspace(0.05, 0.5, HQ, dtype=np.float32))
            bias = everything(rng.standard_normal((1, 1, SQ, WIDE), np.float32))
            results += run_forward(*map(everything, (q, k, v)), moved, slopes, bias, variant, arch, put, where)
    if (which, variant) == ("bwd", "short"):
        return run_short_backward(dout, q, k, v, everything, where)
    passes = [options, {}, CAPPED] if which == "bwd" else []
    if passes:
        slopes = np.linspace(0.05, 0.5, HQ, dtype=np.float32)
        shown, drops = rng.random((B, 1, SQ, SK)) < 0.9, {"dropout_p": 0.2, "seed": 7}
        passes += [{"causal": True, "alibi_slopes": slopes}, {**CAPPED, "alibi_slopes": slopes}]
        passes += [drops, {"causal": True, "mask": shown}, {"mask": shown, **drops}]
        passes += [{"alibi_slopes": slopes, "mask": shown, **drops}, {**CAPPED, "mask": shown, **drops}]
    if passes and int(d[1:]) in ALIBI_HEAD_DIMS:
        bias = rng.standard_normal((B, HQ, SQ, SK), np.float32).astype(DTYPES[dtype])
        passes += [{"bias": bias}, {"bias": bias[:, :1]}, {"causal": True, "bias": bias, "mask": shown}]
        passes += [{"bias": bias[:, :1], **drops}, {"causal": True, "bias": bias, "mask": shown, **drops}]
        wide = bias.astype(np.float32)
        passes += [{"bias": wide[:, :1]}, {"causal": True, "bias": wide}, {"bias": wide[:, :1], **drops}]
        passes += [{"bias": wide, "mask": shown}, {"bias": wide, **CAPPED}]
    if passes and int(d[1:]) in ALL_HEAD_DIMS:
        bias = rng.standard_normal((1, HQ, SQ, SK), np.float32).astype(DTYPES[dtype])
        passes += [{"bias": bias, **CAPPED}, {"bias": bias, "alibi_slopes": slopes, "mask": shown, **drops}]
    for given in passes:
        out, lse = flashgqa.attention(q, k, v, **given, return_lse=True)
        moved = {key: everything(x) if isinstance(x, np.ndarray) else x for key, x in given.items()}
        for order in (True, False):
            arrays = map(everything, (dout, q, k, v, out, lse))
            results += flashgqa.attention_backward(*arrays, **moved, deterministic=order, **where)
        if given is options:                    # rows in parts, and each sees all of whole tiles
            rows = [everything(repeated(x, MANY)) for x in (dout, q, out, lse)]
            keys = [everything(x[:, :, :128]) for x in (k, v)]
            results += flashgqa.attention_backward(*rows[:2], *keys, *rows[2:], **where)
        if arch != "sm90":
            break
        if given is CAPPED:
            results += gradients_beside_inf(dout, q, k, v, everything, where)
    return results


def run_short_backward(dout, q, k, v, everything, where):
    """Each of its kernels, a key of the last head being inf where rows do not see it; of the other heads."""
    results = []
    k, v = (x[:, np.arange(HQ) % HK] for x in (k, v))
    for rows, keys in ((60, 50), (120, 100)) + (((SQ, SK),) if q.shape[-1] <= 64 else ()):
        given = [x[:, :, :n] + 0 for x, n in ((dout, rows), (q, rows), (k, keys), (v, keys))]
        for poison in (0.0, float("inf")):
            given[2][:, HQ - 1, keys - 1] += poison
            for options in ({}, {"causal": True}):
                out, lse = flashgqa.attention(*given[1:], **options, return_lse=True)
                found = flashgqa.attention_backward(*map(everything, (*given, out, lse)), **options, **where)[:3]
                results += [x[:, : HQ - 1] for x in found]
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


def run_other(name, where, put):
    """Weights of each dtype; with those of rows, what has no row: copies of arguments, merges."""
    rng = np.random.default_rng(0)
    options = options_of("general", rng)
    del options["dropout_p"], options["seed"]
    which = {"reduce": "keys"} if name.startswith("keysum") else {"rows": [0, 139, 70]}
    results = []
    for dtype in DTYPES.values():
        q, k = (rng.standard_normal((B, h, s, 40), np.float32).astype(dtype) for h, s in ((HQ, SQ), (HK, SK)))
        results.append(flashgqa.attention_weights(q, k, **which, **options, **where))
        if name.startswith("rows"):
            q, k, back = put(q), put(k), put(np.ascontiguousarray(q.swapaxes(2, 3))).swapaxes(2, 3)
            parts = [flashgqa.attention(x, k, k, return_lse=True) for x in (q, back)]
            results += flashgqa.merge(*zip(*parts, strict=True))
            results.append(flashgqa.attention(q, k, k, dropout_p=0.2, seed=put(np.array([7, 0, 3]))[::2]))
    return results


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
            results = run_other(name, where, on_gpu) if name.endswith("_any") else run_row(name, where, on_gpu, everything)
        finite = are_finite(results)
        time.sleep(0.05)        # the tool's lines come from another process
        print(f"{'ran' if finite else 'NOT FINITE'} {name}", flush=True)


# ---- which kernels the calls launch ----

# Decode's own merge, where not all blocks of a launch are resident or streams are very many.
RARE = r"fgqa_fwd_sm90_\w+_decode\w*_combine"


def base_name(kernel):
    """bwd_kernel<true, (score_kind)5> of void bwd_kernel<true, (score_kind)5>(bwd_params)."""
    return re.match(r"(?:[^(<]|<(?:[^<>]|<[^<>]*>)*>)*", kernel.removeprefix("void "))[0].strip()


def module_kernels():
    """{kernel: how many objects of the module have one of this name}, from what nvcc makes for the host of each."""
    listed = subprocess.run(["nm", flashgqa._C.__file__], capture_output=True, text=True, check=True).stdout
    of_templates = re.findall(r" _ZZL(\d+)(__device_stub_\w+)E8__handle$", listed, re.M)
    names = [name[: int(length)] for length, name in of_templates]
    names += {name[: int(length)] for length, name in re.findall(r" t _ZL?(\d+)(__device_stub_\w+)$", listed, re.M)} - set(names)
    mangled = "\n".join(name.removeprefix("__device_stub_") for name in names)
    kernels = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
    return collections.Counter(map(base_name, kernels.splitlines()))


def print_launched(names):
    """The kernels that the calls of each row launch, as torch's profiler has them, a line each."""
    from torch.profiler import ProfilerActivity, profile
    for name in names:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call([name], False)
        for kernel in sorted({base_name(event.name) for event in seen.events()}):
            print(f"launched {kernel}", flush=True)


def missed_kernels(rows):
    """Kernels of the module that these rows' calls launch in fewer rows than have one of the name."""
    def launched(some):
        command = [sys.executable, __file__, "--launched", *some]
        return re.findall(r"^launched (.*)$", subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout, re.M)

    groups = [rows[n::PROFILED] for n in range(PROFILED) if rows[n::PROFILED]]
    with ThreadPoolExecutor(PROFILED) as pool:
        counts = collections.Counter(kernel for found in pool.map(launched, groups) for kernel in found)
    missed = [kernel for kernel, count in module_kernels().items() if counts[kernel] < count]
    return sorted(kernel for kernel in missed if not re.fullmatch(RARE, kernel))


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


def deal(names, count):
    """The rows in so many lists, or fewer, of like weight: the heaviest row first, each to the list that has the least so far."""
    def weight(name):
        return next(seconds for pattern, seconds in WEIGHTS.items() if re.match(pattern, name))

    lists = [[] for _ in range(min(count, len(names)))]
    for name in sorted(names, key=weight, reverse=True):
        min(lists, key=lambda held: sum(map(weight, held))).append(name)
    return lists


def run_tool(tool, names, filled, logs):
    """Logs of these rows; a row that ends its process is followed by a process for those behind it. When all was done."""
    rest, end = list(names), time.monotonic() + LIMITS[tool]
    while rest and end - time.monotonic() > 5:
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "2000", sys.executable, __file__, "--call", *rest]
        command += ["--filled"] if filled else []
        one_thread = os.environ | {"FLASHGQA_NUM_THREADS": "1"}        # of the forward passes on the CPU: processes are many
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "check": False, "env": one_thread}
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
    return time.monotonic()


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
            each = -(-PROCESSES[tool] * len(group) // len(names))
            jobs += [(tool, rows, filled, logs) for rows in deal(group, each)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        ends = list(pool.map(lambda job: run_tool(*job), jobs))
    seconds = {tool: round(max(end for end, job in zip(ends, jobs, strict=True) if job[0] == tool) - start) for tool in tools}
    print(*(f"{tool} took {took} s" for tool, took in seconds.items()), sep=", ")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=False).stdout
    about = {
        "sources_sha256": evidence.tree_hash(), "date": time.strftime("%Y-%m-%d"), "seconds": seconds,
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
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--launched", nargs="+", metavar="ROW", help="what --kernels starts")
    parser.add_argument("--filled", action="store_true", help="with --call: torch tensors, whose memory has been written")
    parser.add_argument("--rows", default="", metavar="TEXT")
    parser.add_argument("--tools", default=",".join(PROCESSES))
    parser.add_argument("--logs", type=Path, default=Path("sanitizer_logs"))
    parser.add_argument("--again", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.call:
        return call(args.call, args.filled)
    if args.launched:
        return print_launched(args.launched)
    if args.kernels:
        missed = missed_kernels([row["name"] for row in flashgqa.kernels() if row["device"] == "cuda" and row["available"]])
        print(*missed, sep="\n")
        return int(bool(missed))
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
