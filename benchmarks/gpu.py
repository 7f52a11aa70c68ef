"""bench.py gpu: the training rows against torch's cuDNN and FlashAttention-2 backends on one NVIDIA GPU.

Each row is checked against FlashAttention-2 first. A time is the median over launches between two CUDA events, queued behind
a kernel that spins, so that the host's time is hidden; the contestants take turns. The record, results/gpu.json, carries the
hash of the kernel sources (evidence.py), the count of the GPU tests of the same build and the ceilings of the same run.
"""
import json
import statistics
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import counting
import evidence
import shapes

LAUNCHES = 9
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


def in_turn(calls):
    """Median seconds of each named call over LAUNCHES rounds in alternating order."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for n in range(LAUNCHES):
        for name in list(calls)[:: 1 if n % 2 == 0 else -1]:
            times[name].append(queued(calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


class Sdpa:
    """One backend of torch's scaled_dot_product_attention."""

    def __init__(self, backend):
        self.backend = backend

    def forward(self, row, q, k, v):
        import torch
        from torch.nn.attention import sdpa_kernel
        with sdpa_kernel(self.backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=row.causal, enable_gqa=row.hq != row.hk)

    def calls(self, row, q, k, v, dout):
        import torch

        def forward():
            with torch.no_grad():
                return self.forward(row, q, k, v)

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = self.forward(row, *leaves)
        return forward, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


class Ours:
    def calls(self, row, q, k, v, dout):
        import flashgqa
        out, lse = flashgqa.attention(q, k, v, causal=row.causal, return_lse=True)
        return (lambda: flashgqa.attention(q, k, v, causal=row.causal),
                lambda: flashgqa.attention_backward(dout, q, k, v, out, lse, causal=row.causal)[:3])


def contestants():
    from torch.nn.attention import SDPBackend
    return {"flashgqa": Ours(), "fa2": Sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": Sdpa(SDPBackend.CUDNN_ATTENTION)}


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


def measure(row, peers, passes):
    import torch
    torch.manual_seed(0)
    shape = {h: (row.b, h, row.s, row.d) for h in (row.hq, row.hk)}
    q, k, v, dout = (torch.randn(shape[h], device="cuda", dtype=torch.bfloat16) for h in (row.hq, row.hk, row.hk, row.hq))
    calls = {name: peer.calls(row, q, k, v, dout) for name, peer in peers.items()}
    records = []
    for n, which in enumerate(("forward", "backward")):
        if which not in passes:
            continue
        results = {name: both[n]() for name, both in calls.items()}
        want = results["fa2"] if n else [results["fa2"]]
        error = difference(results["flashgqa"] if n else [results["flashgqa"]], want)
        if not error < TOLERANCE:
            raise SystemExit(f"{row.label} {which}: relative difference {error:.3g} to FlashAttention-2; not timed")
        del results, want
        times = in_turn({name: both[n] for name, both in calls.items()})
        rate = counting.flops(row, which) / 1e12
        rates = {f"{name}_tflops": rate / t for name, t in times.items()}
        records.append(dict(row._asdict(), which=which, difference=error, **rates))
    return records


def show(record, row):
    ours, fa2, cudnn = (record[f"{name}_tflops"] for name in ("flashgqa", "fa2", "cudnn"))
    print(f"{row.label:42s} b {row.b:2d} {record['which']:8s} {ours:6.0f} TFLOP/s   fa2 {fa2:6.0f} ({ours / fa2:.2f}x)   "
          f"cudnn {cudnn:6.0f} ({ours / cudnn:.2f}x)", flush=True)


def test_counts(reports):
    """Passed, failed and skipped GPU tests of pytest's JUnit reports; zeros without any."""
    cases = [case for report in reports for case in xml.parse(report).iter("testcase")]
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - bad - skipped, "failed": bad, "skipped": skipped}


def run(options):
    import torch

    import flashgqa
    peers, rows, limit = contestants(), [], ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: matmul {limit['matmul_tflops']:.0f} TFLOP/s, "
          f"read {limit['read_tbs']:.2f} TB/s")
    for row in shapes.GPU_TRAIN:
        if options.rows in row.label:
            for record in measure(row, peers, options.which):
                rows.append(record)
                show(record, row)
            torch.cuda.empty_cache()
    record = {
        "sources_sha256": evidence.tree_hash(), "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "toolkit": f"CUDA runtime {flashgqa.show_config()['cuda_runtime']}", "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(), "tests": test_counts(options.junit), "ceilings": limit, "rows": rows,
    }
    out = options.out or (evidence.RESULT if len(rows) == 2 * len(shapes.GPU_TRAIN) and options.junit else None)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(record, indent=1) + "\n")
        print("wrote", out)
