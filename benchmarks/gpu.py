"""bench.py gpu: attention on one NVIDIA GPU against torch's cuDNN and FlashAttention-2 backends.

The training rows (shapes.GPU_TRAIN) and those with one thing different (shapes.GPU_MORE): ten launches back to back, dQ added in
any order, float16, packed sequences, a window, a part of a long prompt; and those of gpu_decode.py. The best peer of a training
row is that of peers.py's table, at its ratio there to cuDNN. Each row is checked against FlashAttention-2 first. A time is the
median over launches between two CUDA events, queued behind a kernel that spins, so that the host's time is hidden; the
contestants take turns. The record, results/gpu.json, carries the hash of the kernel sources (evidence.py), the count of the GPU
tests of the same build and the ceilings of the same run.
"""
import json
import statistics
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import counting
import evidence
import gpu_decode
import peers
import shapes
from timing import repeated

ROUNDS, QUICK_ROUNDS = 9, 3
TOLERANCE = 2e-2


def queued(call):
    """Seconds of one call on the GPU."""
    import torch
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turn(calls, rounds=ROUNDS):
    """Median seconds of each named call over as many rounds, in alternating order."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for n in range(rounds):
        for name in list(calls)[:: 1 if n % 2 == 0 else -1]:
            times[name].append(queued(calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def contestants():
    from torch.nn.attention import SDPBackend
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {"flashgqa": peers.OnGpu()} | {name: peers.Sdpa(backend) for name, backend in backends.items()}


def difference(got, want):
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, want, strict=True))


def ceilings():
    """Matrix product (TFLOP/s) and read rate (TB/s) of this card in this run."""
    import torch
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randint(0, 9, (1 << 29,), device="cuda", dtype=torch.int32)
    times = in_turn({"matmul": lambda: a @ b, "read": big.amax})
    return {"matmul_tflops": 2 * n**3 / times["matmul"] / 1e12, "read_tbs": 4 * big.numel() / times["read"] / 1e12}


def tensors(row):
    """q, k, v, dout; [total, h, d] of packed sequences."""
    import torch
    torch.manual_seed(0)

    def normal(heads, length):
        shape = (sum(row.lengths), heads, row.d) if getattr(row, "lengths", ()) else (row.b, heads, length, row.d)
        return torch.randn(shape, device="cuda", dtype=getattr(torch, row.dtype))

    return normal(row.hq, row.sq), normal(row.hk, row.s), normal(row.hk, row.s), normal(row.hq, row.sq)


def timed(row, calls, which, rounds, launches=1):
    """A record of one pass. The results of ours are held against FlashAttention-2's before."""
    results = {name: call() for name, call in calls.items()}
    got, want = (x if isinstance(x, tuple) else [x] for x in (results["flashgqa"], results["fa2"]))
    error = difference(got, want)
    if not error < TOLERANCE:
        raise SystemExit(f"{row.label} {which}: relative difference {error:.3g} to FlashAttention-2; not timed")
    del results, got, want
    times = in_turn({name: repeated(call, launches) for name, call in calls.items()}, rounds)
    rate = launches * counting.flops(row, which) / 1e12
    fields = {name: value for name, value in row._asdict().items() if name not in ("lengths", "passes")}
    return dict(fields, which=which, difference=error, **{f"{name}_tflops": rate / t for name, t in times.items()})


def measure(row, rivals, passes, rounds):
    inputs = tensors(row)
    calls = {name: peer.calls(row, *inputs) for name, peer in rivals.items()}
    for n, which in enumerate(("forward", "backward")):
        if which in passes:
            record = timed(row, {name: both[n] for name, both in calls.items()}, which, rounds)
            record["best_peer"], record["best_tflops"] = peers.best_peer(row, which, record["cudnn_tflops"])
            yield record


def measure_more(row, rivals, passes, rounds):
    """A row of shapes.GPU_MORE against those who can do it."""
    import torch
    offsets = torch.tensor([0, *row.lengths], device="cuda").cumsum(0).to(torch.int32) if row.lengths else None
    inputs = tensors(row)
    if row.kind in ("packed", "window", "prefill", "few tiles", "cached"):
        rivals = {"flashgqa": peers.OnGpu(), "fa2": peers.FlashAttention2()}
        calls = {name: peer.calls(row, *inputs, offsets) for name, peer in rivals.items()}
    else:
        calls = {name: peer.calls(row, *inputs) for name, peer in rivals.items()}
    if row.kind == "any order":
        calls["ordered"] = calls["flashgqa"]
        calls["flashgqa"] = peers.OnGpu(deterministic=False).calls(row, *inputs)
    for n, which in enumerate(("forward", "backward")):
        if which in passes and which in row.passes:
            of_pass = {name: both[n] for name, both in calls.items()}
            yield timed(row, of_pass, which, QUICK_ROUNDS if row.launches > 1 else rounds, row.launches)


def show(record, row):
    ours = record["flashgqa_tflops"]
    names = {"fa2": "FA2", "cudnn": "cuDNN", "ordered": "in order", "best": f"best ({record.get('best_peer')})"}
    rates = {text: record[f"{name}_tflops"] for name, text in names.items() if f"{name}_tflops" in record}
    text = "   ".join(f"{name} {rate:5.0f} ({ours / rate:.2f}x)" for name, rate in rates.items())
    print(f"{row.label:50s} b {row.b:3d} {record['which']:8s} {ours:5.0f} TFLOP/s   {text}", flush=True)


def test_counts(reports):
    """Passed, failed and skipped GPU tests of pytest's JUnit reports; zeros without any."""
    cases = [case for report in reports for case in xml.parse(report).iter("testcase")]
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - bad - skipped, "failed": bad, "skipped": skipped}


def run(options):
    import torch

    import flashgqa
    rivals, records, limit = contestants(), [], ceilings()
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: matmul {limit['matmul_tflops']:.0f} TFLOP/s, "
          f"read {limit['read_tbs']:.2f} TB/s")
    rows = [row for row in shapes.GPU_TRAIN + shapes.GPU_MORE if options.rows in row.label and row.dtype in options.dtype]
    for row in rows:
        of_row = measure if isinstance(row, shapes.Row) else measure_more
        for record in of_row(row, rivals, options.which, rounds):
            records.append(record)
            show(record, row)
        torch.cuda.empty_cache()
    result = {
        "sources_sha256": evidence.tree_hash(), "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "toolkit": f"CUDA runtime {flashgqa.show_config()['cuda_runtime']}", "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(), "tests": test_counts(options.junit), "ceilings": limit, "rows": records,
        "decode": gpu_decode.run(options),
    }
    whole = 2 * len(shapes.GPU_TRAIN) + sum(len(row.passes) for row in shapes.GPU_MORE)
    out = options.out or (evidence.RESULT if len(records) == whole and options.junit and not options.quick else None)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
        print("wrote", out)
