"""bench.py gpu: attention on one NVIDIA GPU against torch's cuDNN and FlashAttention-2 backends.

Its sections: the training rows (shapes.GPU_TRAIN) and those with one thing different (shapes.GPU_MORE): ten launches back to
back, dQ added in any order, float16, packed sequences and equal ones of as many FLOPs, a window, a part of a long prompt;
decode (gpu_decode.py); options (gpu_options.py); short sequences (shapes.GPU_SHORT). The best peer of a training row is that of
peers.py's table, at its ratio there to cuDNN. Each row is checked against FlashAttention-2 first. A time is the median over
launches between two CUDA events, queued behind a kernel that spins, so that the host's time is hidden; the contestants take
turns. The record, results/gpu.json, carries the hash of the kernel sources (evidence.py), the count of the GPU tests of the
same build and the ceilings of the same run. Options and short sequences, which take half a minute, say themselves where they
were measured: a run of these sections alone puts them into the record that --out names.
"""
import json
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import counting
import evidence
import gpu_decode
import gpu_options
import peers
import shapes
from timing import in_turn, repeated

ROUNDS, QUICK_ROUNDS = 9, 3
TOLERANCE = 2e-2


def contestants():
    from torch.nn.attention import SDPBackend
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {"flashgqa": peers.OnGpu()} | {name: peers.Sdpa(backend) for name, backend in backends.items()}


def ceilings():
    """Matrix product (TFLOP/s) and read rate (TB/s) of this card in this run."""
    import torch
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randint(0, 9, (1 << 29,), device="cuda", dtype=torch.int32)
    times = in_turn({"matmul": lambda: a @ b, "read": big.amax}, ROUNDS)
    return {"matmul_tflops": 2 * n**3 / times["matmul"] / 1e12, "read_tbs": 4 * big.numel() / times["read"] / 1e12}


def timed(row, calls, which, rounds, launches=1):
    """What a record of one pass says of the row, and the seconds of each. The results of ours are held against FlashAttention-2's
    before."""
    results = {name: call() for name, call in calls.items()}
    got, want = (x if isinstance(x, tuple) else [x] for x in (results["flashgqa"], results["fa2"]))
    error = peers.difference(got, want)
    if not error < TOLERANCE:
        raise RuntimeError(f"{row.label} {which}: relative difference {error:.3g} to FlashAttention-2; not timed")
    del results, got, want
    times = in_turn({name: repeated(call, launches) for name, call in calls.items()}, rounds)
    fields = {name: value for name, value in row._asdict().items() if name not in ("lengths", "passes")}
    return dict(fields, which=which, difference=error), times


def rates(row, which, times, launches=1):
    """TFLOP/s of each."""
    work = launches * counting.flops(row, which) / 1e12
    return {f"{name}_tflops": work / t for name, t in times.items()}


def measure(row, rivals, passes, rounds):
    inputs = peers.tensors(row)
    calls = {name: peer.calls(row, *inputs) for name, peer in rivals.items()}
    for n, which in enumerate(("forward", "backward")):
        if which in passes:
            record, times = timed(row, {name: both[n] for name, both in calls.items()}, which, rounds)
            record |= rates(row, which, times)
            record["best_peer"], record["best_tflops"] = peers.best_peer(row, which, record["cudnn_tflops"])
            yield record


def measure_more(row, rivals, passes, rounds):
    """Records and times of a row with a kind, against those who can do it."""
    import torch
    offsets = torch.tensor([0, *row.lengths], device="cuda").cumsum(0).to(torch.int32) if row.lengths else None
    inputs = peers.tensors(row)
    if row.lengths or row.kind in ("even", "window", "prefill", "few tiles", "cached"):
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


def training(options, rivals, rounds):
    """Records of the training rows that the options name, and of those with one thing different."""
    import torch
    records = []
    for row in shapes.GPU_TRAIN + shapes.GPU_MORE:
        if options.rows not in row.label or row.dtype not in options.dtype:
            continue
        if isinstance(row, shapes.Row):
            of_row = measure(row, rivals, options.which, rounds)
        else:
            of_row = (record | rates(row, record["which"], times, row.launches)
                      for record, times in measure_more(row, rivals, options.which, rounds))
        for record in of_row:
            records.append(record)
            show(record, row)
        torch.cuda.empty_cache()
    return records


def short(options, rivals, rounds):
    """Records of the short sequences that the options name, times in microseconds."""
    records, start = [], time.perf_counter()
    for row in shapes.GPU_SHORT:
        if options.rows not in row.label or row.dtype not in options.dtype:
            continue
        try:
            for record, times in measure_more(row, rivals, options.which, rounds):
                micros = {name: 1e6 * t for name, t in times.items()}
                records.append(record | {f"{name}_us": t for name, t in micros.items()})
                text = "   ".join(f"{name} {t:.1f}" for name, t in micros.items())
                print(f"{row.label:50s} b {row.b:4d}   {text} us", flush=True)
        except (RuntimeError, NotImplementedError, ValueError) as error:       # the other rows stand
            records.append({name: getattr(row, name) for name in ("kind", "b", "hq", "hk", "s", "d", "causal")}
                           | {"error": str(error)[:200]})
            print(f"{row.label}: {error}", flush=True)
    print(f"short sequences: {time.perf_counter() - start:.0f} s", flush=True)
    return records


def measured_here():
    """Of which kernels a figure is, and on what."""
    import torch

    import flashgqa
    return {"sources_sha256": evidence.tree_hash(), "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
            "toolkit": f"CUDA runtime {flashgqa.show_config()['cuda_runtime']}", "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version()}


def write(path, record):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def run(options):
    here, rivals = measured_here(), contestants()
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    print(f"{here['device']}, torch {here['torch']}")
    if set(options.section) <= set(evidence.OWN_PLACE):
        result = json.loads(Path(options.out).read_text()) if options.out and Path(options.out).exists() else {}
    else:
        result = here | {"tests": test_counts(options.junit), "ceilings": ceilings(), "rows": [], "decode": []}
        print(f"matmul {result['ceilings']['matmul_tflops']:.0f} TFLOP/s, read {result['ceilings']['read_tbs']:.2f} TB/s")
    sections = {
        "training": lambda: {"rows": training(options, rivals, rounds)},
        "decode": lambda: {"decode": gpu_decode.run(options)},
        "short": lambda: {"short": here | {"rows": short(options, rivals, rounds)}},
        "options": lambda: {"options": here | {"rows": gpu_options.run(options, QUICK_ROUNDS)}},
    }
    for name, of_section in sections.items():
        if name in options.section:
            result |= of_section()
            if options.out:
                write(options.out, result)      # what is measured stays, whatever becomes of the rest
    whole = len(result.get("rows", ())) == 2 * len(shapes.GPU_TRAIN) + sum(len(row.passes) for row in shapes.GPU_MORE)
    if not options.out and whole and set(options.section) == set(sections) and options.junit and not options.quick:
        write(evidence.RESULT, result)
        print("wrote", evidence.RESULT)
