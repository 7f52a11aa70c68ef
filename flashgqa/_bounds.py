"""How far from the truth a result may be: the error rule of the tests, of ``python -m flashgqa verify`` and of the demo.

The largest error is at most 2x (gradients 3x) that of a naive computation in the same dtype, plus 2 ulp of the dtype at the
largest reference value, both against the float64 equations. No constants to tune: where the dtype makes the plain algorithm
inexact, so may ours be.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from . import reference

# Of outputs and of gradients: times the naive error.
FORWARD_FACTOR, BACKWARD_FACTOR = 2, 3

# Distance of 1 to the next number.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# The least an ulp can be: numbers below the smallest normal one of the accumulator may become zero; float16 has subnormals.
FLOOR = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


def accumulator(dtype):
    """What sums are kept in, and the LSE is returned in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def exact(x, dtype):
    """x as the oracle takes it: more precise than any dtype under test."""
    return None if x is None else np.asarray(x).astype(np.longdouble if dtype == np.float64 else np.float64)


# ---- the naive computation ----


class Narrow(reference.Arithmetic):
    """Inputs in their dtype, sums in the accumulator's, weights and score gradients rounded to the dtype.

    order None: sums by NumPy. 0: term after term as a plain loop does. More: shuffled, every time anew, and scores, sums and
    lse may end one unit in the last place off, as they may for anybody who computes them by another formula (base 2, fused
    multiply-adds): without that, a row that sees one key would have a weight of exactly 1 and no error at all. Odd orders
    leave weights unrounded: out, once rounded, and delta = dout.out then differ from the others in all bits that rounding made.
    Even ones round the weights of each row in a unit of their own, as whoever rounds exp(x - max) and divides by the sum
    later: still rounded once, each to half an ulp of itself, but the errors of a row cancel in other places.
    """

    def __init__(self, dtype, order):
        self.dtype = dtype
        self.accumulator = accumulator(dtype)
        self.order = order
        self.rng = np.random.default_rng(order)

    def store(self, x):
        if self.order and self.order % 2 == 1:
            return x
        if not self.order or self.dtype == self.accumulator:
            return x.astype(self.dtype).astype(self.accumulator)
        unit = self.rng.uniform(1, 2, (x.shape[0], 1)).astype(self.accumulator)
        return (x * unit).astype(self.dtype).astype(self.accumulator) / unit

    def save(self, x):
        if not self.order:
            return x
        away = np.nextafter(x, np.where(self.rng.random(x.shape) < 0.5, -np.inf, np.inf).astype(x.dtype))
        return np.where(np.isfinite(x) & (x != 0), away, x)

    def matmul(self, a, b, start=0):
        if self.order is None:
            return super().matmul(a, b, start)
        total = np.zeros((a.shape[0], b.shape[1]), self.accumulator) + start
        for n in self._terms(b.shape[0]):
            total += a[:, n, None] * b[n]
        return total

    def sum(self, x, axis):
        if self.order is None or x.shape[axis] == 0:
            return super().sum(x, axis)
        running = np.cumsum(x.take(self._terms(x.shape[axis]), axis), axis)
        return self.save(running.take([-1], axis))

    def _terms(self, count):
        terms = np.arange(count)
        if self.order > 0:
            self.rng.shuffle(terms)
        return terms


class Naive:
    """Results of the naive computation in several orders of summation, each computed when first asked for.

    Rounding is luck: where few numbers decide, one order may be ten times better than the next. The naive error is the
    largest among these; most comparisons are settled by the first. `computes`: one computation, or several that differ in
    which inputs they round, if those were not numbers of the dtype.
    """

    ORDERS = (None, *range(24))

    def __init__(self, computes, dtype):
        self.runs = [(compute, order) for order in self.ORDERS for compute in computes]
        self.dtype, self.results = dtype, []

    def __iter__(self):
        for n, (compute, order) in enumerate(self.runs):
            if n == len(self.results):
                with np.errstate(all="ignore"):
                    self.results.append(compute(Narrow(self.dtype, order)))
            yield self.results[n]


def _narrow_heads(call, acc):
    for head in call.heads():
        arrays = {f.name: getattr(head, f.name) for f in dataclasses.fields(head)}
        arrays = {n: x.astype(acc) for n, x in arrays.items() if isinstance(x, np.ndarray) and x.dtype != bool}
        yield dataclasses.replace(head, scale=acc.type(head.scale), sink=acc.type(head.sink), **arrays)


def _narrow_forward(arithmetic, q, k, v, options):
    acc = arithmetic.accumulator
    call = reference.Call(q, k, v, reference.Options(**options))
    out, lse = np.zeros(call.like_q(v.shape[-1]), acc), np.full(call.lse_shape(), -np.inf, acc)
    for head in _narrow_heads(call, acc):
        o_head, lse_head = reference.forward_head(head, arithmetic)
        call.rows(out, head.n, head.h, call.q_lens)[...] = o_head
        call.row_values(lse, head.n, head.h)[...] = lse_head
    return out.astype(q.dtype), lse


def _narrow_backward(arithmetic, dout, q, k, v, dlse, saved, options):
    acc = arithmetic.accumulator
    out, lse = _narrow_forward(arithmetic, q, k, v, options) if saved is None else saved
    call = reference.Call(q, k, v, reference.Options(**options))
    dlse = np.zeros_like(lse) if dlse is None else dlse.astype(acc)
    dq, dk, dv = (np.zeros(x.shape, acc) for x in (q, k, v))
    bias, sink = options.get("bias"), options.get("sink")
    dbias = None if bias is None else np.zeros(bias.shape, acc)
    dsink = None if sink is None else np.zeros(sink.shape, acc)
    for head in _narrow_heads(call, acc):
        n, h = head.n, head.h
        dk_rows, dv_rows = (call.rows(t, n, head.kv, call.k_lens) for t in (dk, dv))
        dq_head, dk_rows[...], dv_rows[...], dx, dsink_head = reference.backward_head(
            head,
            call.rows(dout, n, h, call.q_lens).astype(acc),
            call.rows(out, n, h, call.q_lens).astype(acc),
            call.row_values(lse, n, h),
            call.row_values(dlse, n, h),
            dk_rows,
            dv_rows,
            arithmetic,
        )
        call.rows(dq, n, h, call.q_lens)[...] = dq_head
        if dbias is not None:
            reference.add_dbias(dbias, n, h, dx, arithmetic)
        if dsink is not None:
            dsink[h] += dsink_head
    return reference.Gradients(
        dq.astype(q.dtype),
        dk.astype(q.dtype),
        dv.astype(q.dtype),
        None if bias is None else dbias.astype(bias.dtype),
        None if sink is None else dsink.astype(sink.dtype),
    )


def _narrow_weights(arithmetic, q, k, rows, options):
    acc = arithmetic.accumulator
    call = reference.Call(q, k, None, reference.Options(**options))
    p = np.zeros((call.b, call.hq, call.sq, call.sk), acc)
    for head in _narrow_heads(call, acc):
        sq, sk = head.seen.shape
        p[head.n, head.h, :sq, :sk] = reference.weights_head(head, arithmetic)
    p = arithmetic.sum(p, 2)[:, :, 0] if rows is None else p[:, :, rows]
    return p if call.rank == 4 or call.varlen else p[0]


def naive_weights(q, k, rows, **options):
    """Naive weights of rows, or sums by key for rows=None, in the accumulator's dtype."""
    return Naive([lambda arithmetic: _narrow_weights(arithmetic, q, k, rows, options)], q.dtype)


def naive_forward(q, k, v, *, unrounded=None, **options):
    """Naive (out, lse). unrounded: (k, v) of which those given are roundings, if a computation need not round them.

    A float8 cache's numbers are of the dtype, times their scale they are not: whoever scales scores and results instead has
    the error of q alone, which that of k in the other computation may happen to cancel.
    """
    inputs = [(k, v)] if unrounded is None else [(k, v), unrounded]
    return Naive([lambda arithmetic, kv=kv: _narrow_forward(arithmetic, q, *kv, options) for kv in inputs], q.dtype)


def naive_backward(dout, q, k, v, dlse=None, saved=None, **options):
    """Naive Gradients, from the naive out and lse, or from `saved`, those of an attention over more keys than these."""
    return Naive([lambda arithmetic: _narrow_backward(arithmetic, dout, q, k, v, dlse, saved, options)], q.dtype)


# ---- the error rule ----


class Verdict(NamedTuple):
    """error: largest; bound: largest allowed, as far as it had to be computed; problem: None, or what is wrong in words."""

    error: float
    bound: float
    problem: str | None


def allowed(naive_error, largest, dtype, factor):
    """The largest error of a result by the rule. largest: of the reference values; dtype: its name."""
    ulp = EPSILON[dtype] * 2.0 ** np.floor(np.log2(largest)) if largest > 0 else 0.0
    return factor * naive_error + 2 * max(ulp, FLOOR[dtype])


def judge(got, expected, naive, dtype, factor):
    """The error rule for one result, `naive` being that of each naive arithmetic; NaN and infinities must match."""
    got = np.asarray(got)
    if got.shape != expected.shape:
        return Verdict(np.inf, 0.0, f"shape {got.shape}, expected {expected.shape}")
    got = got.astype(expected.dtype)
    wrong = np.isnan(got) != np.isnan(expected)
    if wrong.any():
        return Verdict(np.inf, 0.0, f"NaN is where it should not be, or missing, at {np.argwhere(wrong)[:5].tolist()}")
    finite = np.isfinite(expected)
    infinite = ~finite & ~np.isnan(expected)
    wrong = (infinite & (got != expected)) | (finite & ~np.isfinite(got))
    if wrong.any():
        return Verdict(np.inf, 0.0, f"infinities differ at {np.argwhere(wrong)[:5].tolist()}")
    if not finite.any():
        return Verdict(0.0, 0.0, None)
    error = np.where(finite, np.abs(got - np.where(finite, expected, 0)), 0)
    worst = error.max()
    largest = np.abs(expected[finite]).max()
    naive_error = bound = 0
    for x in naive:
        naive_error = max(naive_error, np.abs(x.astype(expected.dtype)[finite] - expected[finite]).max())
        bound = allowed(naive_error, largest, dtype.name, factor)
        if worst <= bound:
            return Verdict(worst, bound, None)
    at = [int(n) for n in np.unravel_index(error.argmax(), error.shape)]
    return Verdict(
        worst,
        bound,
        f"error {worst:.3g} at {at} exceeds {bound:.3g} = {factor} * naive error {naive_error:.3g} + 2 ulp of the largest "
        f"reference value, {largest:.3g}",
    )
