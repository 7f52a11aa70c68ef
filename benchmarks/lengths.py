"""Short and odd lengths: ours beside two matrix products and a softmax, as they are written by hand in NumPy and in PyTorch.

Self-attention, 8 heads, d 128, float32. The plain forms hold all scores; at short lengths what counts is what a call costs
before it computes. NumPy's BLAS takes its threads from the environment, which bench.py sets before the import.

A run of all lengths is written to benchmarks/results/lengths.json.
"""
import json
import time
from pathlib import Path

import counting
from shapes import Row
from timing import alternate, once, repeated

RESULT = Path(__file__).resolve().parent / "results" / "lengths.json"

LENGTHS = sorted([2**n for n in range(13)] + [13, 127, 1021])
HEADS, D = 8, 128
LEAST = 0.95    # lower ratios are named at the end
SAMPLE = 1e-3   # seconds of calls in a row that are timed together
LONG = 0.1      # seconds from which on a call is timed three times, not five


def plain_numpy(numpy, q, k, v):
    def call():
        s = q @ k.swapaxes(-1, -2)
        s *= D**-0.5
        s -= s.max(-1, keepdims=True)
        numpy.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        return s @ v
    return call


def plain_torch(torch, q, k, v):
    def call():
        with torch.no_grad():
            return torch.softmax((q @ k.transpose(-1, -2)) * D**-0.5, -1) @ v
    return call


def run(options, ours, theirs, bench):
    """Called by bench.py, which knows the machine."""
    import numpy
    torch = theirs.torch
    print(f"{ours.version} against plain attention in NumPy {numpy.__version__} and {theirs.version}, {options.threads} threads, "
          f"float32, {HEADS} heads, d {D}")
    records = []
    for s in [s for s in LENGTHS if options.rows in str(s)]:
        row = Row("float32", 1, HEADS, HEADS, s, D)
        tensors = theirs.inputs(row)[:3]
        for name, make, library, inputs in (("NumPy", plain_numpy, numpy, [x.numpy() for x in tensors]),
                                            ("PyTorch", plain_torch, torch, tensors)):
            mine, plain = ours.forward(row, *inputs), make(library, *inputs)
            difference = abs(mine() - plain()).max()
            if not difference < 1e-4:
                raise SystemExit(f"length {s}: off by {difference:.3g} from plain attention in {name}; not timed")
            took = once(mine)
            took = took if took > LONG else min(took, *(once(mine) for _ in range(5)))
            n = 1 + int(SAMPLE / took)
            t, t_plain, (ratio, low, high) = alternate(repeated(mine, n), repeated(plain, n), 0.4 if options.quick else 2.0,
                                                       3 if took > LONG else 5)
            rate = n * counting.flops(row, "forward") / t / 1e9
            records.append({"length": s, "library": name, "us": t / n * 1e6, "plain_us": t_plain / n * 1e6, "ratio": ratio,
                            "ratio_quartiles": [low, high], "gflops": rate})
            print(f"length {s:5d} {t / n * 1e6:11.1f} us {rate:7.1f} GFLOP/s   {name:8s}{t_plain / n * 1e6:11.1f} us   "
                  f"ratio {ratio:6.2f} ({low:.2f}-{high:.2f})", flush=True)
    slow = [f"{r['ratio']:.2f} at {r['length']} ({r['library']})" for r in records if r["ratio"] < LEAST]
    lowest = min(records, key=lambda r: r["ratio"])
    print(f"lowest ratio {lowest['ratio']:.2f}, at length {lowest['length']} against {lowest['library']}; "
          f"below {LEAST}: {', '.join(slow) or 'none'}")
    out = options.out or (RESULT if len(records) == 2 * len(LENGTHS) else None)
    if out:
        machine = {"processor": bench.processor(), "threads": options.threads, "flashgqa": ours.version, "torch": theirs.version,
                   "numpy": f"NumPy {numpy.__version__}", "isa": ours.module.show_config()["isa"],
                   "date": time.strftime("%Y-%m-%d"), "commit": bench.commit()}
        Path(out).write_text(json.dumps({"machine": machine, "rows": records}, indent=1) + "\n", encoding="utf-8")
        print("wrote", out)
