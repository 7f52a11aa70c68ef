"""Short and odd lengths: ours beside two matrix products and a softmax, as they are written by hand in NumPy and in PyTorch.

Self-attention, 8 heads, d 128, float32. The plain forms hold all scores; at short lengths what counts is what a call costs
before it computes. NumPy's BLAS takes its threads from the environment, which bench.py sets before the import.
"""
import counting
from shapes import Row
from timing import alternate, once, repeated

LENGTHS = sorted([2**n for n in range(13)] + [13, 127, 1021])
HEADS, D = 8, 128
LEAST = 0.95    # lower ratios are named at the end
SAMPLE = 1e-3   # seconds of calls in a row that are timed together


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


def run(options, ours, theirs):
    import numpy
    torch = theirs.torch
    print(f"{ours.version} against plain attention in NumPy {numpy.__version__} and {theirs.version}, {options.threads} threads, "
          f"float32, {HEADS} heads, d {D}")
    lowest = []
    for s in [s for s in LENGTHS if options.rows in str(s)]:
        row = Row("float32", 1, HEADS, HEADS, s, D)
        tensors = theirs.inputs(row)[:3]
        for name, make, library, inputs in (("NumPy", plain_numpy, numpy, [x.numpy() for x in tensors]),
                                            ("PyTorch", plain_torch, torch, tensors)):
            mine, plain = ours.forward(row, *inputs), make(library, *inputs)
            difference = abs(mine() - plain()).max()
            if not difference < 1e-4:
                raise SystemExit(f"length {s}: off by {difference:.3g} from plain attention in {name}; not timed")
            n = 1 + int(SAMPLE / min(once(mine) for _ in range(5)))
            t, t_plain, (ratio, low, high) = alternate(repeated(mine, n), repeated(plain, n), 0.4 if options.quick else 2.0)
            lowest.append((ratio, s, name))
            rate = n * counting.flops(row, "forward") / t / 1e9
            print(f"length {s:5d} {t / n * 1e6:11.1f} us {rate:7.1f} GFLOP/s   {name:8s}{t_plain / n * 1e6:11.1f} us   "
                  f"ratio {ratio:6.2f} ({low:.2f}-{high:.2f})", flush=True)
    slow = [f"{ratio:.2f} at {s} ({name})" for ratio, s, name in sorted(lowest) if ratio < LEAST]
    ratio, s, name = min(lowest)
    print(f"lowest ratio {ratio:.2f}, at length {s} against {name}; below {LEAST}: {', '.join(slow) or 'none'}")
