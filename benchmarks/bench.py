"""The one benchmark: every row against PyTorch in alternating calls, ceilings of the same run, JSON and a plot.

    python benchmarks/bench.py cpu [--threads 2] [--pass forward backward decode] [--dtype float32] [--rows TEXT] [--quick]
    python benchmarks/bench.py cpu --lengths              lengths 1 to 4,096 against plain attention, see lengths.py
    python benchmarks/bench.py kvcache [the same but --pass]     decode through attention_with_kvcache, see kvcache.py
    python benchmarks/bench.py gpu [--section training decode options short] [--pass forward backward] [--dtype bfloat16 float16]
                                   [--rows TEXT] [--quick] [--junit FILE ...]     one NVIDIA GPU, see gpu.py

A row is checked before it is timed. ratio = PyTorch's time / ours, the median over alternating pairs with its quartiles;
above 1 we are faster. A whole run is written to benchmarks/results/cpu.json, from which benchmarks/report.py makes README's
tables and the figure.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import counting
import fma_peak
import gpu
import kvcache
import lengths
import shapes
from peers import FlashGQA, TorchSDPA
from timing import alternate, once

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def ceilings(torch):
    """float32 multiply-adds in registers and a large matrix product by torch (GFLOP/s), on its threads, and the read rate of a
    buffer beyond all caches (GB/s)."""
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    out = torch.empty(n, n)
    matmul = min(once(lambda: torch.matmul(a, b, out=out)) for _ in range(5))
    big = torch.ones(1 << 28)
    read = min(once(big.sum) for _ in range(5))
    return {"fma_gflops": fma_peak.gflops(torch.get_num_threads()), "matmul_gflops": 2 * n**3 / matmul / 1e9,
            "read_gbs": big.numel() * 4 / read / 1e9}


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def measure(ours, theirs, row, which, seconds):
    q, k, v, dout = theirs.inputs(row)
    if which == "backward":
        mine, other = ours.backward(row, q, k, v, dout), theirs.backward(row, q, k, v, dout)
        pairs = list(zip(mine(), other(), strict=True))
    else:
        mine, other = ours.forward(row, q, k, v), theirs.forward(row, q, k, v)
        pairs = [(mine(), other())]
    error = max(relative_error(a, b) for a, b in pairs)
    if not error < TOLERANCE[row.dtype]:
        raise SystemExit(f"{row.label} {which}: relative difference {error:.3g} to {theirs.version}; not timed")
    t, t_other, ratio = alternate(mine, other, seconds)
    rate = counting.flops(row, which) / 1e9
    record = dict(row._asdict(), which=which, ms=t * 1e3, torch_ms=t_other * 1e3, ratio=ratio[0], ratio_quartiles=ratio[1:],
                  gflops=rate / t, torch_gflops=rate / t_other, difference=error)
    if row.queries:
        record["gbs"] = counting.kv_bytes(row) / t / 1e9
    return record


def show(record, row):
    unit = f"{record['gbs']:7.1f} GB/s    " if row.queries else f"{record['gflops']:7.1f} GFLOP/s "
    low, high = record["ratio_quartiles"]
    print(f"{row.label:40s} {record['which']:8s} {record['ms']:9.3f} ms {unit} torch {record['torch_ms']:9.3f} ms   "
          f"ratio {record['ratio']:6.2f} ({low:.2f}-{high:.2f})", flush=True)


def cpu(options):
    theirs, ours = TorchSDPA(options.threads), FlashGQA(options.threads)
    print(f"{ours.version} ({ours.module.show_config()['isa']}) against {theirs.version}, {options.threads} threads")
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), "threads": options.threads,
               "flashgqa": ours.version, "torch": theirs.version, "isa": ours.module.show_config()["isa"],
               "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    limit = ceilings(theirs.torch)
    fma = f"float32 FMA {limit['fma_gflops']:.0f} GFLOP/s, " if limit["fma_gflops"] else ""
    print(f"ceilings: {fma}float32 matmul {limit['matmul_gflops']:.0f} GFLOP/s, read {limit['read_gbs']:.1f} GB/s")
    rows = []
    for row in shapes.CPU_TRAIN + shapes.CPU_DECODE:
        passes = ["decode"] if row.queries else ["forward", "backward"]
        for which in passes:
            if which in options.which and row.dtype in options.dtype and options.rows in row.label:
                record = measure(ours, theirs, row, "forward" if which == "decode" else which, 0.5 if options.quick else 3.0)
                rows.append(record)
                show(record, row)
    result = {"machine": machine, "ceilings": limit, "rows": rows}
    whole = len(rows) == len(shapes.CPU_DECODE) + 2 * len(shapes.CPU_TRAIN) and not options.quick
    out = options.out or (RESULTS / "cpu.json" if whole else None)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
        print("wrote", out)
    slow = [r for r in rows if r["ratio"] < 1]
    print(f"{len(rows)} rows, {len(slow)} slower than torch")


def commit():
    """The commit that is measured, "+" if files differ from it; None outside a checkout."""
    ran = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True,
                         check=False)
    return ran.stdout.strip() or None if ran.returncode == 0 else None


def processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# What each device reads: the choices of an option (the default is all), or just its name.
CHOICES = {
    "cpu": {"threads": 2, "which": ("forward", "backward", "decode"), "dtype": ("float32", "bfloat16")},
    "kvcache": {"threads": 2, "dtype": ("float32", "bfloat16")},
    "gpu": {"which": ("forward", "backward"), "dtype": ("bfloat16", "float16"), "junit": (),
            "section": ("training", "decode", "options", "short")},
}


def read_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=list(CHOICES))
    parser.add_argument("--threads", type=int, help="of the CPU; 2 by default")
    parser.add_argument("--pass", dest="which", nargs="+", metavar="PASS", help="forward, backward; cpu: decode, too")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="float32, bfloat16; gpu: bfloat16, float16")
    parser.add_argument("--rows", default="", help="only rows whose label contains this text")
    parser.add_argument("--quick", action="store_true", help="half a second a row instead of three; gpu: 3 launches instead of 9")
    parser.add_argument("--out", help="JSON file; by default that in results/ if all rows are measured at full length, else none")
    parser.add_argument("--junit", nargs="*", help="gpu: pytest's JUnit reports of the same build, to be counted")
    parser.add_argument("--section", nargs="+", help="gpu: training, decode, options, short; all of them by default")
    parser.add_argument("--lengths", action="store_true", help="cpu: short and odd lengths against plain attention")
    options = parser.parse_args(arguments)
    if options.lengths and options.device != "cpu":
        parser.error(f"{options.device} has no --lengths")
    choices = CHOICES[options.device]
    for name, flag in (("threads", "--threads"), ("which", "--pass"), ("dtype", "--dtype"), ("junit", "--junit"),
                       ("section", "--section")):
        given, known = getattr(options, name), choices.get(name)
        if name not in choices and given is not None:
            parser.error(f"{options.device} has no {flag}")
        if given is None:
            setattr(options, name, known)
        elif name in ("which", "dtype", "section") and not set(given) <= set(known):
            parser.error(f"{flag} of {options.device}: choose from {', '.join(known)}")
    return options


def main():
    options = read_options()
    if options.lengths:
        os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
        lengths.run(options, FlashGQA(options.threads), TorchSDPA(options.threads), sys.modules[__name__])
    elif options.device == "cpu":
        cpu(options)
    elif options.device == "kvcache":
        kvcache.run(options, FlashGQA(options.threads), TorchSDPA(options.threads), sys.modules[__name__])
    else:
        gpu.run(options)


if __name__ == "__main__":
    main()
