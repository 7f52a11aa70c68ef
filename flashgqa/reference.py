"""Exact attention in NumPy, straight from the equations: the second opinion on everything the compiled code computes.

Float64 throughout (``longdouble`` inputs stay ``longdouble``), one dense score matrix a head, no speed. The functions take
the keyword arguments of :mod:`flashgqa.api`; options that steer only how a result is computed (``kernel``, ``stream``,
``deterministic``, ...) are accepted and mean nothing here. Written from the definition, not from the C code.

For query head h, KV head ``h // g``, row i, key j::

    x[i,j] = scale * q[i].k[j]         then softcap * tanh(x / softcap), + bias[i,j], - slope * |diag(i) - j|
    p[i,j] = exp(x[i,j] - lse[i])      lse[i] = log(sum over seen j of exp(x[i,j]) + exp(sink))
    o[i]   = sum over seen j of keep[i,j] * f * p[i,j] * v[j]          f = 65536 / (65536 - t), dropout only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "attention",
    "attention_backward",
    "attention_weights",
    "attention_with_kvcache",
    "dropout_mask",
    "merge",
    "philox4x32",
    "rotate",
    "visible",
]


class Gradients(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None
    dsink: np.ndarray | None


@dataclass
class Options:
    """Every option that gives a call its meaning, with its default; then those that do not change the result."""

    causal: bool = False
    window: tuple | None = None
    align: str = "bottom-right"
    chunk: int | None = None
    scale: float | None = None
    softcap: float | None = None
    mask: object = None
    bias: object = None
    alibi_slopes: object = None
    sink: object = None
    q_lens: object = None
    kv_lens: object = None
    cu_seqlens_q: object = None
    cu_seqlens_kv: object = None
    max_q: int | None = None
    max_kv: int | None = None
    dropout_p: float = 0.0
    seed: object = None
    layout: str | None = None

    stream: object = None
    deterministic: bool = True
    batch_invariant: bool = False
    precision: str | None = None
    check: bool = False
    device: object = None
    kernel: str | None = None


def _real(x):
    x = np.asarray(x)
    return x if x.dtype == np.longdouble else x.astype(np.float64)


# ---- masks and dropout ----


def visible(sq, sk, *, causal=False, window=None, chunk=None, align="bottom-right"):
    """Bool [sq, sk]: whether row i of a sequence sees key j."""
    i = np.arange(sq)[:, None]
    j = np.arange(sk)[None, :]
    diag = i + (sk - sq) if align == "bottom-right" else i
    left, right = window if window is not None else (None, None)
    seen = np.ones((sq, sk), bool)
    if causal:
        seen &= j <= diag
    if left is not None:
        seen &= j >= diag - left
    if right is not None:
        seen &= j <= diag + right
    if chunk is not None:
        seen &= j // chunk == diag // chunk
    return seen


def philox4x32(key, counter, rounds=10):
    """Philox4x32 of Salmon et al. (SC 2011): uint32 [..., 4] of a counter uint32 [..., 4] and a 64-bit key."""
    low = np.uint64(0xFFFFFFFF)
    c = [x.astype(np.uint64) for x in np.moveaxis(np.asarray(counter, np.uint32), -1, 0)]
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            product0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1).astype(np.uint32)


def _seed_and_offset(seed):
    """One int, or (seed, offset)."""
    if np.ndim(seed) == 0:
        return int(seed) & (2**64 - 1), 0
    seed, offset = (int(x) for x in np.asarray(seed))
    return seed & (2**64 - 1), offset


def _threshold(dropout_p):
    return round(65536 * dropout_p)


def dropout_mask(b, hq, sq, sk, dropout_p, seed):
    """Bool [b, hq, sq, sk]: True where a weight survives."""
    if dropout_p > 0 and seed is None:
        raise ValueError("dropout_p > 0 needs a seed")
    if _threshold(dropout_p) == 0:
        return np.ones((b, hq, sq, sk), bool)
    seed, offset = _seed_and_offset(seed)
    blocks = -(-sk // 8)
    counter = np.empty((b * hq, sq, blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = np.arange(sq)[:, None]
    counter[..., 2] = np.arange(b * hq)[:, None, None]
    counter[..., 3] = offset
    words = philox4x32(seed, counter)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1)  # word w decides keys 2w (low half) and 2w + 1 (high half)
    return (halves.reshape(b, hq, sq, 8 * blocks) >= _threshold(dropout_p))[..., :sk]


# ---- from a call to its heads ----


@dataclass
class Head:
    """One query head of one sequence: what the equations need, and where its rows lie in the tensors of the call."""

    n: int
    h: int
    kv: int
    q: np.ndarray  # [sq, d]
    k: np.ndarray  # [sk, d]
    v: np.ndarray | None  # [sk, dv]
    scale: float
    softcap: float | None
    bias: np.ndarray | None  # [sq, sk]
    distance: np.ndarray | None  # slope * |diag(i) - j|, [sq, sk]
    seen: np.ndarray  # bool [sq, sk]; false where the bias is -inf
    sink: float  # -inf: none
    keep: np.ndarray | None  # [sq, sk], 0 or f; None without dropout


class Call:
    """The tensors of a call, addressed by sequence n and head h whatever the rank, layout or packing."""

    def __init__(self, q, k, v, options):
        self.o = o = options
        self.q, self.k = _real(q), _real(k)
        self.v = None if v is None else _real(v)
        self.varlen = o.cu_seqlens_q is not None
        self.rank = self.q.ndim
        self.heads_last = self.varlen or o.layout == "bshd"
        self.hq, self.hk = (x.shape[-2 if self.heads_last else -3] for x in (self.q, self.k))
        if self.hk == 0 or self.hq % self.hk != 0:
            raise ValueError(f"k has {self.hk} heads but q has {self.hq}: query heads must be a multiple of KV heads")
        self.d = self.q.shape[-1]
        if self.varlen:
            self.cu_q, self.cu_k = np.asarray(o.cu_seqlens_q), np.asarray(o.cu_seqlens_kv)
            self.b = len(self.cu_q) - 1
            self.q_lens, self.k_lens = np.diff(self.cu_q), np.diff(self.cu_k)
            self.sq = int(max(self.q_lens, default=0)) if o.max_q is None else o.max_q
            self.sk = int(max(self.k_lens, default=0)) if o.max_kv is None else o.max_kv
        else:
            self.b = self.q.shape[0] if self.rank == 4 else 1
            self.sq, self.sk = (x.shape[-3 if self.heads_last else -2] for x in (self.q, self.k))
            self.q_lens = np.full(self.b, self.sq) if o.q_lens is None else np.asarray(o.q_lens)
            self.k_lens = np.full(self.b, self.sk) if o.kv_lens is None else np.asarray(o.kv_lens)

    def rows(self, t, n, h, lengths):
        """View [s, d] of one head of one sequence, real rows only."""
        if self.varlen:
            cu = self.cu_q if lengths is self.q_lens else self.cu_k
            return t[cu[n] : cu[n + 1], h]
        t = t if self.rank == 4 else t[None]
        t = t[n, :, h] if self.heads_last else t[n, h]
        return t[: lengths[n]]

    def row_values(self, t, n, h):
        """View [sq] of an LSE-like tensor."""
        if self.varlen:
            return t[h, self.cu_q[n] : self.cu_q[n + 1]]
        return (t if self.rank == 4 else t[None])[n, h, : self.q_lens[n]]

    def like_q(self, width):
        return (*self.q.shape[:-1], width)

    def lse_shape(self):
        lead = (self.b,) if self.rank == 4 else ()
        return (self.hq, self.q.shape[0]) if self.varlen else (*lead, self.hq, self.sq)

    def scores_of(self, t, n, h):
        """[sq, sk] of a mask or bias that broadcasts to [b, hq, sq, sk]."""
        full = np.broadcast_to(t, (self.b, self.hq, self.sq, self.sk))
        return full[n, h, : self.q_lens[n], : self.k_lens[n]]

    def heads(self):
        o = self.o
        keep = None
        if o.dropout_p > 0:
            t = _threshold(o.dropout_p)
            factor = 65536 / self.q.dtype.type(65536 - t) if t < 65536 else 0
            keep = factor * dropout_mask(self.b, self.hq, self.sq, self.sk, o.dropout_p, o.seed)
        bias = None if o.bias is None else _real(o.bias)
        sink = None if o.sink is None else _real(o.sink)
        slopes = None if o.alibi_slopes is None else np.broadcast_to(_real(o.alibi_slopes), (self.b, self.hq))
        scale = 1 / np.sqrt(self.q.dtype.type(self.d)) if o.scale is None else o.scale
        for n in range(self.b):
            sq, sk = int(self.q_lens[n]), int(self.k_lens[n])
            rule = visible(sq, sk, causal=o.causal, window=o.window, chunk=o.chunk, align=o.align)
            diag = np.arange(sq)[:, None] + (sk - sq if o.align == "bottom-right" else 0)
            for h in range(self.hq):
                kv = h // (self.hq // self.hk)
                seen = rule.copy()
                if o.mask is not None:
                    seen &= self.scores_of(np.asarray(o.mask), n, h)
                added = None if bias is None else self.scores_of(bias, n, h)
                if added is not None:
                    seen &= added != -np.inf
                yield Head(
                    n=n,
                    h=h,
                    kv=kv,
                    q=self.rows(self.q, n, h, self.q_lens),
                    k=self.rows(self.k, n, kv, self.k_lens),
                    v=None if self.v is None else self.rows(self.v, n, kv, self.k_lens),
                    scale=scale,
                    softcap=o.softcap,
                    bias=added,
                    distance=None if slopes is None else slopes[n, h] * np.abs(diag - np.arange(sk)),
                    seen=seen,
                    sink=-np.inf if sink is None else sink[h],
                    keep=None if keep is None else keep[n, h, :sq, :sk],
                )


# ---- the equations ----


class Arithmetic:
    """How sums are taken, weights stored and scores, sums and lse kept: as the arrays allow. _bounds.py has poorer ones."""

    def matmul(self, a, b, start=0):
        return start + a @ b

    def sum(self, x, axis):
        return x.sum(axis=axis, keepdims=True)

    def store(self, x):
        return x

    def save(self, x):
        return x


EXACT = Arithmetic()


def _sum_seen(weights, seen, x, arithmetic, start=0):
    """start + sum over the seen j of weights[i,j] * x[j]. Weights of unseen j are 0; 0 * NaN is not part of the sum."""
    finite = np.isfinite(x)
    total = arithmetic.matmul(weights, np.where(finite, x, 0), start)
    for j in np.flatnonzero(~finite.all(axis=1)):
        total += np.where(seen[:, j, None], weights[:, j, None] * np.where(finite[j], 0, x[j]), 0)
    return total


def _scores(head, arithmetic):
    """x [sq, sk], -inf where unseen; and dx/d(scale * q.k), the slope of the soft cap."""
    x = head.scale * arithmetic.matmul(head.q, head.k.T)
    slope = 1.0
    if head.softcap is not None:
        tanh = arithmetic.save(np.tanh(x / head.softcap))
        x, slope = head.softcap * tanh, 1 - tanh**2
    if head.bias is not None:
        x = x + head.bias
    if head.distance is not None:
        x = x - head.distance
    return np.where(head.seen, arithmetic.save(x), -np.inf), slope


def _exp_less(x, most):
    """exp(x - most), x <= most: where both are +inf its limit, 1. So a sink of +inf takes all of the weight."""
    return np.where(x == most, 1, np.exp(x - most))


def _lse(x, sink, arithmetic):
    top = np.maximum(np.max(x, axis=1, initial=-np.inf), sink)
    shift = np.where(top == -np.inf, 0, top)
    total = arithmetic.sum(np.exp(x - shift[:, None]), 1)[:, 0] + _exp_less(sink, shift)
    return arithmetic.save(shift + np.log(total))


def _weights(x, lse):
    return np.where(x == -np.inf, 0, np.exp(x - lse[:, None]))


def forward_head(head, arithmetic):
    """o [sq, dv], lse [sq]."""
    x, _ = _scores(head, arithmetic)
    lse = _lse(x, head.sink, arithmetic)
    p = _weights(x, lse)
    p = arithmetic.store(p if head.keep is None else p * head.keep)
    o = _sum_seen(p, head.seen, head.v, arithmetic)
    o[np.isnan(lse)] = np.nan  # of a row that sees nothing, too, beside a sink that is NaN: 0 over NaN
    return o, lse


def weights_head(head, arithmetic):
    """p [sq, sk]."""
    x, _ = _scores(head, arithmetic)
    return _weights(x, _lse(x, head.sink, arithmetic))


def backward_head(head, do, o, lse, dlse, dk, dv, arithmetic):
    """dq [sq, d], dk [sk, d], dv [sk, dv], dx [sq, sk] (the gradient of the bias), dsink, of one head.

    dk and dv go in as the sums over earlier heads of the group, and come out with this head added.
    o and lse are the saved results of the forward pass; where they come from other keys too (a part of a split), p and
    the gradients are those of the whole.
    """
    x, slope = _scores(head, arithmetic)
    p = _weights(x, lse)
    dropped = arithmetic.store(p if head.keep is None else p * head.keep)
    dv = _sum_seen(dropped.T, head.seen.T, do, arithmetic, dv)
    dp = arithmetic.matmul(do, head.v.T)
    if head.keep is not None:
        dp = dp * head.keep
    # d lse / d x = p, so dlse enters beside delta = sum over j of p dp = do.o; of a row whose o is 0 whatever do is
    delta = np.where((o != 0).any(axis=1), arithmetic.sum(do * o, 1)[:, 0], 0) - dlse
    dx = np.where(head.seen, p * (dp - delta[:, None]), 0)
    ds = arithmetic.store(np.where(head.seen, head.scale * dx * slope, 0))
    p_sink = np.where(head.sink == -np.inf, 0, _exp_less(head.sink, lse))
    dsink = -arithmetic.sum(np.where(p_sink == 0, 0, p_sink * delta), 0)[0]
    dq = _sum_seen(ds, head.seen, head.k, arithmetic)
    dk = _sum_seen(ds.T, head.seen.T, head.q, arithmetic, dk)
    return dq, dk, dv, dx, dsink


# ---- public functions ----


def attention(q, k, v, *, return_lse=False, out=None, **options) -> Any:
    """out, or (out, lse) with ``return_lse=True``."""
    call = Call(q, k, v, Options(**options))
    o = np.zeros(call.like_q(call.v.shape[-1]), call.q.dtype)
    lse = np.full(call.lse_shape(), -np.inf, call.q.dtype)
    with np.errstate(all="ignore"):
        for head in call.heads():
            o_head, lse_head = forward_head(head, EXACT)
            call.rows(o, head.n, head.h, call.q_lens)[...] = o_head
            call.row_values(lse, head.n, head.h)[...] = lse_head
    if out is not None:
        out[...] = o
        o = out
    return (o, lse) if return_lse else o


def attention_backward(dout, q, k, v, out=None, lse=None, *, dlse=None, **options):
    """Gradients(dq, dk, dv, dbias, dsink). ``out`` and ``lse`` left out are computed."""
    call = Call(q, k, v, Options(**options))
    o = call.o
    if out is None or lse is None:
        out, lse = attention(q, k, v, return_lse=True, **options)
    dout, out, lse = _real(dout), _real(out), _real(lse)
    dlse = np.zeros_like(lse) if dlse is None else _real(dlse)
    dq, dk, dv = np.zeros_like(call.q), np.zeros_like(call.k), np.zeros_like(call.v)
    dsink = None if o.sink is None else np.zeros(call.hq, call.q.dtype)
    dbias = None if o.bias is None else np.zeros(np.shape(o.bias), call.q.dtype)
    with np.errstate(all="ignore"):
        for head in call.heads():
            n, h = head.n, head.h
            dk_rows, dv_rows = (call.rows(t, n, head.kv, call.k_lens) for t in (dk, dv))
            dq_head, dk_rows[...], dv_rows[...], dx, dsink_head = backward_head(
                head,
                call.rows(dout, n, h, call.q_lens),
                call.rows(out, n, h, call.q_lens),
                call.row_values(lse, n, h),
                call.row_values(dlse, n, h),
                dk_rows,
                dv_rows,
                EXACT,
            )
            call.rows(dq, n, h, call.q_lens)[...] = dq_head
            if dsink is not None:
                dsink[h] += dsink_head
            if dbias is not None:
                add_dbias(dbias, n, h, dx, EXACT)
    return Gradients(dq, dk, dv, dbias, dsink)


def add_dbias(dbias, n, h, dx, arithmetic):
    """Adds dx [sq, sk] of one head, summed over the axes in which the bias is broadcast."""
    full = dbias.reshape((1,) * (4 - dbias.ndim) + dbias.shape)
    of_head = full[min(n, full.shape[0] - 1), min(h, full.shape[1] - 1)]
    dx = dx if of_head.shape[0] != 1 else arithmetic.sum(dx, 0)
    dx = dx if of_head.shape[1] != 1 else arithmetic.sum(dx, 1)
    of_head[: dx.shape[0], : dx.shape[1]] += dx


def attention_weights(q, k, *, rows=None, reduce=None, **options):
    """Weights p [b, hq, rows, sk] of the chosen query rows, or ``reduce="keys"``: summed over query rows, [b, hq, sk].

    With a sink the weights of a row sum to less than 1; rows that see nothing are 0. No dropout.
    """
    if (rows is None) == (reduce is None):
        raise ValueError('give either rows=<indices> or reduce="keys"')
    call = Call(q, k, None, Options(**options))
    p = np.zeros((call.b, call.hq, call.sq, call.sk), call.q.dtype)
    with np.errstate(all="ignore"):
        for head in call.heads():
            sq, sk = head.seen.shape
            p[head.n, head.h, :sq, :sk] = weights_head(head, EXACT)
    p = p[:, :, np.asarray(rows, np.int64)] if reduce is None else p.sum(axis=2)
    return p if call.rank == 4 or call.varlen else p[0]


def merge(outs, lses, *, layout=None):
    """(out, lse) of attention over the union of disjoint sets of keys, from the (out, lse) of each set.

    ``layout="bshd"``: outs are [b, s, h, d], [s, h, d] or packed [total, h, d]; lses are [..., h, s] always.
    """
    outs, lses = np.stack([_real(x) for x in outs]), np.stack([_real(x) for x in lses])
    with np.errstate(all="ignore"):
        top = lses.max(axis=0)
        shift = np.where(top == -np.inf, 0, top)
        weights = _exp_less(lses, shift)
        total = weights.sum(axis=0)
        lse = shift + np.log(total)
        weights = np.where(lses == -np.inf, 0, weights / total)
        if layout == "bshd":
            weights = np.moveaxis(weights, -1, -2)
        parts = np.where(weights[..., None] == 0, 0, weights[..., None] * outs)
    return parts.sum(axis=0), lse


# ---- KV caches ----


def rotate(x, cos, sin, positions, interleaved=False):
    """x [..., s, d] with row i turned by the angles of positions[i]: pair n is (n, n + pairs), or (2n, 2n + 1)."""
    x, cos, sin = _real(x), _real(cos)[positions], _real(sin)[positions]
    n = np.arange(cos.shape[-1])
    first, second = (2 * n, 2 * n + 1) if interleaved else (n, n + len(n))
    turned = x.copy()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., first] * sin + x[..., second] * cos
    return turned


def _stored(x, scale, dtype):
    """x as a cache of this dtype keeps it."""
    if str(dtype).startswith("float8"):
        x = np.clip(x / _real(scale)[..., None, None], -448, 448)
    return x.astype(dtype) if dtype.itemsize > 2 else _for_one_rounding(x).astype(dtype)


def _for_one_rounding(x):
    """x as float32 whose last bit is set where it leaves something out: ml_dtypes narrows by way of float32, and rounds that."""
    near = x.astype(np.float32)
    size, near_size = np.abs(x), np.abs(near).astype(x.dtype)
    bits = near.view(np.uint32) - (size < near_size).astype(np.uint32)
    return (bits | (size != near_size) & (x == x)).view(np.float32)


def cached_sequences(
    q,
    k_cache,
    v_cache,
    k_new=None,
    v_new=None,
    *,
    cache_lens=None,
    new_lens=None,
    q_lens=None,
    page_table=None,
    batch_index=None,
    left_pad=None,
    rotary=None,
    rotary_interleaved=False,
    rotary_offsets=None,
    k_scale=None,
    v_scale=None,
    layout=None,
):
    """Appends to the cache, in place; then yields of each sequence q [hq, rows, d], k [hk, keys, d] and v [hk, keys, dv]."""
    if layout == "bshd":
        q, k_cache, v_cache = (x.swapaxes(1, 2) for x in (q, k_cache, v_cache))
        k_new, v_new = (None if x is None else x.swapaxes(1, 2) for x in (k_new, v_new))
    b, hk, page_size = q.shape[0], k_cache.shape[1], k_cache.shape[2]
    table = np.arange(b)[:, None] if page_table is None else np.asarray(page_table)
    table = table if batch_index is None else np.asarray(batch_index)[:, None]
    before = np.broadcast_to(page_size if cache_lens is None else cache_lens, b)
    added = np.broadcast_to((0 if k_new is None else k_new.shape[2]) if new_lens is None else new_lens, b)
    pad = np.broadcast_to(0 if left_pad is None else left_pad, b)
    rows = np.broadcast_to(q.shape[2] if q_lens is None else q_lens, b)
    scales = [np.broadcast_to(1 if x is None else x, (b, hk)) for x in (k_scale, v_scale)]
    shift = 0 if rotary_offsets is None else np.asarray(rotary_offsets) - before
    shift = np.broadcast_to(shift, b)
    for n in range(b):
        slots = np.arange(before[n], before[n] + added[n])
        for cache, new, scale, turns in ((k_cache, k_new, scales[0], rotary), (v_cache, v_new, scales[1], None)):
            if new is not None:
                x = _real(new[n, :, : added[n]])
                x = rotate(x, *rotary, slots + shift[n], rotary_interleaved) if turns is not None else x
                cache[table[n, slots // page_size], :, slots % page_size] = _stored(x, scale[n], cache.dtype).swapaxes(0, 1)
    for n in range(b):
        end = before[n] + added[n]
        slots = np.arange(pad[n], end)
        k, v = (
            _real(cache[table[n, slots // page_size], :, slots % page_size]).swapaxes(0, 1) * _real(scale[n])[:, None, None]
            for cache, scale in ((k_cache, scales[0]), (v_cache, scales[1]))
        )
        turned = _real(q[n, :, : rows[n]])
        if rotary is not None:
            turned = rotate(turned, *rotary, np.arange(end - rows[n], end) + shift[n], rotary_interleaved)
        yield turned, k, v


def attention_with_kvcache(
    q, k_cache, v_cache, k_new=None, v_new=None, *, return_lse=False, out=None, alibi_slopes=None, **options
) -> Any:
    """out, or (out, lse) with ``return_lse=True``; k_new and v_new are written into the caches, NumPy arrays of any dtype."""
    scores = {name: options.pop(name) for name in ("causal", "window", "chunk", "scale", "softcap", "sink") if name in options}
    no_meaning = ("stream", "batch_invariant", "check", "device", "kernel")
    options = {name: x for name, x in options.items() if name not in no_meaning}
    swap = (lambda x: x.swapaxes(1, 2)) if options.get("layout") == "bshd" else (lambda x: x)
    b, hq, sq = swap(q).shape[:3]
    o, lse = np.zeros((b, hq, sq, v_cache.shape[-1])), np.full((b, hq, sq), -np.inf)
    for n, (q_n, k_n, v_n) in enumerate(cached_sequences(q, k_cache, v_cache, k_new, v_new, **options)):
        slopes = alibi_slopes if alibi_slopes is None or np.ndim(alibi_slopes) == 1 else alibi_slopes[n]
        rows = q_n.shape[1]
        o[n, :, :rows], lse[n, :, :rows] = attention(q_n, k_n, v_n, return_lse=True, alibi_slopes=slopes, **scores)
    o = swap(o)
    if out is not None:
        out[...] = o
        o = out
    return (o, lse) if return_lse else o
