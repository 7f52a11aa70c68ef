"""``python -m flashgqa bench``: a small table of this machine, ours in turn with NumPy's two products and PyTorch's SDPA.

Calls alternate, so that whatever else the machine does hits all contestants; times are medians. Every contestant's result is
compared with ours before it is timed. The project's full tables come from benchmarks/bench.py.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np

import flashgqa

LEAST, MOST = 3, 100  # rounds a row
TOLERANCE = {"float32": 1e-4, "float64": 1e-12}  # relative, of norms


class Row(NamedTuple):
    which: str  # forward | backward | decode
    hq: int
    hk: int
    d: int
    sq: int
    sk: int
    causal: bool

    @property
    def label(self):
        kind = "causal" if self.causal else "dense"
        return f"{self.which:<8}  {f'{self.hq}/{self.hk}':>5}  {self.d:>3}  {self.sq:>6}  {self.sk:>6}  {kind:<6}"


HEADER = f"{'pass':<8}  {'heads':>5}  {'d':>3}  {'sq':>6}  {'sk':>6}  {'mask':<6}"


# ---- contestants: each gives a call without arguments that returns a tuple of arrays ----


def _ours(row, dout, q, k, v):
    if row.which == "backward":
        out, lse = flashgqa.attention(q, k, v, causal=row.causal, return_lse=True)
        return lambda: flashgqa.attention_backward(dout, q, k, v, out, lse, causal=row.causal)[:3]
    return lambda: (flashgqa.attention(q, k, v, causal=row.causal),)


def _softmax(scores, hidden):
    if hidden is not None:
        scores[..., hidden] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _numpy(row, dout, q, k, v):
    """Two matrix products and a softmax, as one writes it; backward from the saved weights."""
    g, scale = row.hq // row.hk, q.dtype.type(1 / np.sqrt(row.d))
    hidden = ~np.tri(row.sq, row.sk, row.sk - row.sq, dtype=bool) if row.causal else None

    def forward():
        keys, values = k.repeat(g, axis=1), v.repeat(g, axis=1)
        return (_softmax(scale * (q @ keys.swapaxes(-1, -2)), hidden) @ values,)

    if row.which != "backward":
        return forward
    weights = _softmax(scale * (q @ k.repeat(g, axis=1).swapaxes(-1, -2)), hidden)

    def backward():
        keys, values = k.repeat(g, axis=1), v.repeat(g, axis=1)
        ds = dout @ values.swapaxes(-1, -2)
        ds -= (ds * weights).sum(axis=-1, keepdims=True)
        ds *= weights
        ds *= scale
        dk, dv = ds.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dout
        shape = (1, row.hk, g, row.sk, row.d)
        return ds @ keys, dk.reshape(shape).sum(axis=2), dv.reshape(shape).sum(axis=2)

    return backward


def _torch(row, *arrays):
    import torch

    torch.set_num_threads(flashgqa.get_num_threads())
    dout, *leaves = (torch.from_numpy(x) for x in arrays)
    if row.which == "backward":
        leaves = [x.requires_grad_() for x in leaves]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def forward():
        return (sdpa(*leaves, is_causal=row.causal, enable_gqa=row.hq != row.hk),)

    if row.which != "backward":
        return forward
    (out,) = forward()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def contestants():
    """{name with version: maker of its call}; ours first, and PyTorch if it is installed."""
    found = {f"flashgqa {flashgqa.__version__}": _ours, f"numpy {np.__version__}": _numpy}
    try:
        import torch
    except ImportError:
        print("torch is not installed: compared with NumPy only")
        return found
    return found | {f"torch {torch.__version__}": _torch}


# ---- measurement ----


def _differ(ours, theirs, dtype):
    """The largest relative difference, if it is one that the dtype does not explain."""
    worst = max(np.linalg.norm(np.asarray(b) - a) / np.linalg.norm(a) for a, b in zip(ours, theirs, strict=True))
    return worst if worst > TOLERANCE[dtype] else None


def _once(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _alternate(calls, seconds):
    """Times [round][call]. The order turns from round to round."""
    times, start = [], time.perf_counter()
    while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - start < seconds):
        order = range(len(calls)) if len(times) % 2 == 0 else reversed(range(len(calls)))
        taken = {n: _once(calls[n]) for n in order}
        times.append([taken[n] for n in range(len(calls))])
    return times


def _arrays(row, dtype):
    """dout, q, k, v."""
    rng = np.random.default_rng(0)
    heads = ((row.hq, row.sq), (row.hq, row.sq), (row.hk, row.sk), (row.hk, row.sk))
    return [rng.standard_normal((1, h, s, row.d)).astype(dtype) for h, s in heads]


def measure(row, makers, dtype, seconds):
    """(FLOPs of a call, seconds of each contestant, times that each took longer than ours)."""
    arrays = _arrays(row, dtype)
    calls = [maker(row, *arrays) for maker in makers.values()]
    ours, *others = (call() for call in calls)
    for name, theirs in zip(list(makers)[1:], others, strict=True):
        worst = _differ(ours, theirs, dtype)
        if worst is not None:
            raise ValueError(f"{row.label}: {name} and flashgqa differ by {worst:.3g}, relative; nothing was timed")
    times = _alternate(calls, seconds)
    plan = flashgqa.explain(*arrays[1:], causal=row.causal, backward=row.which == "backward")
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [statistics.median(t[n] / t[0] for t in times) for n in range(len(calls))]
    return plan["flops"], medians, ratios


def rows(tokens, heads, d, cache):
    hq, hk = heads
    training = [Row(which, hq, hk, d, s, s, True) for s in tokens for which in ("forward", "backward")]
    return training + [Row("decode", hq, hk, d, 1, n, False) for n in cache]


def bench(tokens, heads, d, cache, dtype, seconds, plot=None):
    figure_class = _figure_class() if plot else None
    makers = contestants()
    threads = flashgqa.get_num_threads()
    print(f"{', '.join(makers)}; {dtype}, {threads} thread{'s' * (threads > 1)}, {flashgqa.show_config()['isa']}")
    names = [name.split()[0] for name in makers]
    columns = [f"{names[0] + ' ms':>11}  {'GFLOP/s':>8}", *(f"{name + ' ms':>9}  {'faster':>8}" for name in names[1:])]
    print("  ".join([HEADER, *columns]))
    results = []
    for row in rows(tokens, heads, d, cache):
        flops, medians, ratios = measure(row, makers, dtype, seconds)
        parts = [f"{1e3 * medians[0]:11.3f}  {flops / medians[0] / 1e9:8.1f}"]
        parts += [f"{1e3 * t:9.3f}  {100 * (r - 1):+6.0f} %" for t, r in zip(medians[1:], ratios[1:], strict=True)]
        print("  ".join([row.label, *parts]), flush=True)
        results.append((row, [flops / t / 1e9 for t in medians]))
    print("faster: how much longer the other takes than flashgqa, median of calls in turn; NumPy's BLAS has its own threads")
    if plot:
        figure = figure_class(figsize=(9, 1.5 + 0.6 * len(results)), layout="constrained")
        _plot(results, list(makers), dtype, figure)
        figure.savefig(plot, dpi=150)
        print(f"wrote {plot}")
    return 0


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    return Figure


def _plot(results, names, dtype, figure):
    axes = figure.subplots()
    height = 0.8 / len(names)
    for n, name in enumerate(names):
        bars = axes.barh([y + n * height for y in range(len(results))], [rates[n] for _, rates in results], height, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_yticks(
        [y + height * (len(names) - 1) / 2 for y in range(len(results))],
        [f"{row.which} {row.hq}/{row.hk}, d {row.d}, {row.sq} x {row.sk}" for row, _ in results],
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"GFLOP/s of visible scores, {dtype}, {flashgqa.get_num_threads()} threads")
    figure.legend(loc="outside upper center", ncols=len(names))
