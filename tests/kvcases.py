"""Calls of attention_with_kvcache to test: a CacheCase is its fields, its id those that differ from the defaults."""

import dataclasses
import zlib
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from checking import DTYPES, exact, naive_forward, place

from flashgqa import reference

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class CacheCase:
    b: int = 3
    hk: int = 2
    g: int = 4
    sq: int = 1
    new: int | None = 1  # None: nothing is appended
    lens: tuple = (5, 0, 70)
    slots: int = 80  # of a contiguous cache; a paged one has columns for as many
    d: int = 16
    dv: int | None = None
    dtype: str = "float32"
    float8: bool = False
    scales: str = ""  # "", "h" or "bh"
    pages: int | None = None  # page size; None: contiguous
    indexed: bool = False  # a contiguous cache of more rows than sequences
    left_pad: tuple | None = None
    new_lens: tuple | None = None
    q_lens: tuple | None = None
    pairs: int = 0  # rotary
    interleaved: bool = False
    offsets: tuple | None = None
    causal: bool = True
    window: tuple | None = None
    chunk: int | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str = ""
    sink: bool = False
    layout: str | None = None
    storage: str | tuple = "contiguous"  # of every array, as checking.place takes it

    def __str__(self):
        changed = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{name}={value}".replace(" ", "") for name, value in changed) or "default"


def angles(positions, pairs, dtype=np.float32):
    phase = np.arange(positions)[:, None] * 10000.0 ** -(np.arange(pairs) / max(pairs, 1))
    return np.cos(phase).astype(dtype), np.sin(phase).astype(dtype)


def build(case):
    """(tensors, options): q, k_cache, v_cache, k_new, v_new in poisoned storage; every slot that holds no key is NaN."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    dtype = DTYPES[case.dtype]
    dv, hq, new = case.dv or case.d, case.hk * case.g, case.new or 0
    stored = FLOAT8 if case.float8 else dtype
    options = {"cache_lens": np.array(case.lens, np.int32)}
    if case.pages is None:
        rows, slots = case.b + 2 * case.indexed, case.slots
        table = rng.permutation(rows)[: case.b, None] if case.indexed else np.arange(case.b)[:, None]
        if case.indexed:
            options["batch_index"] = table[:, 0].astype(np.int32)
    else:
        columns = -(-case.slots // case.pages)
        rows, slots = case.b * columns + 2, case.pages
        table = rng.permutation(rows)[: case.b * columns].reshape(case.b, columns)
    k_cache, v_cache = (np.full((rows, case.hk, slots, n), np.nan) for n in (case.d, dv))
    pad = case.left_pad or [0] * case.b
    used = np.zeros(table.shape, bool)
    added = case.new_lens or [new] * case.b
    for n, length in enumerate(case.lens):
        s = np.arange(pad[n], length)
        k_cache[table[n, s // slots], :, s % slots] = rng.standard_normal((len(s), case.hk, case.d))
        v_cache[table[n, s // slots], :, s % slots] = rng.standard_normal((len(s), case.hk, dv))
        used[n, np.arange(min(pad[n], length), length + added[n]) // slots] = True
    if case.pages is not None:
        options["page_table"] = np.where(used, table, -7).astype(np.int32)
    q = rng.standard_normal((case.b, hq, case.sq, case.d))
    k_new, v_new = (rng.standard_normal((case.b, case.hk, new, n)) for n in (case.d, dv))
    for n, rows_of in enumerate(case.q_lens or ()):
        q[n, :, rows_of:] = np.nan
    for n, rows_of in enumerate(case.new_lens or ()):
        k_new[n, :, rows_of:] = v_new[n, :, rows_of:] = np.nan
    for name in ("left_pad", "new_lens", "q_lens"):
        if getattr(case, name) is not None:
            options[name] = np.array(getattr(case, name), np.int32)
    for name in ("causal", "window", "chunk", "scale", "softcap", "layout"):
        if getattr(case, name) not in (None, False):
            options[name] = getattr(case, name)
    if case.pairs:
        options["rotary"] = angles(case.slots + 40, case.pairs, np.float64 if case.dtype == "float64" else np.float32)
        options["rotary_interleaved"] = case.interleaved
        if case.offsets is not None:
            options["rotary_offsets"] = np.array(case.offsets, np.int32)
    if case.alibi:
        slopes = np.float32(2.0 ** (-8 * (np.arange(hq) + 1) / hq))
        options["alibi_slopes"] = slopes if case.alibi == "h" else slopes / (np.arange(case.b, dtype=np.float32)[:, None] + 1)
    if case.sink:
        options["sink"] = rng.standard_normal(hq).astype(dtype)
    for name in ("k_scale", "v_scale") if case.scales else ():
        options[name] = rng.uniform(0.01, 3, (case.b, case.hk)[2 - len(case.scales) :]).astype(np.float32)
    swap = (lambda x: x.swapaxes(1, 2)) if case.layout == "bshd" else (lambda x: x)
    arrays = [(q, dtype), (k_cache, stored), (v_cache, stored), (k_new, dtype), (v_new, dtype)]
    arrays = [place(swap(x).astype(t), case.storage) for x, t in arrays]
    return arrays if case.new is not None else [*arrays[:3], None, None], options


def expected(case, tensors, options):
    """Of each sequence (out, lse, naive) by the oracle; appends to the caches in `tensors`, which are copies."""
    dtype, options = DTYPES[case.dtype], dict(options)
    names = ("causal", "window", "chunk", "scale", "softcap", "sink", "alibi_slopes")
    scores = {name: options.pop(name) for name in names if name in options}
    if "rotary" in options:
        options["rotary"] = [exact(x, dtype) for x in options["rotary"]]
    q, k_cache, v_cache, k_new, v_new = tensors
    inputs = exact(q, dtype), k_cache, v_cache, exact(k_new, dtype), exact(v_new, dtype)
    for n, sequence in enumerate(reference.cached_sequences(*inputs, **options)):
        own = dict(scores)
        if np.ndim(own.get("alibi_slopes")) == 2:
            own["alibi_slopes"] = own["alibi_slopes"][n]
        wide = {**own, "sink": exact(own["sink"], dtype)} if "sink" in own else own
        out, lse = reference.attention(*(exact(x, dtype) for x in sequence), **wide, return_lse=True)
        unrounded = sequence[1:] if case.scales else None
        yield out, lse, naive_forward(*(x.astype(dtype) for x in sequence), unrounded=unrounded, **own)


def _each(name, values, **more):
    return [CacheCase(**{name: value}, **more) for value in values]


CASES = [
    *_each("dtype", DTYPES),
    *_each("dtype", DTYPES, pages=16, pairs=8, sq=4, new=4),
    *_each("g", (1, 2, 3, 5, 7, 8, 16, 71)),
    *_each("g", (1, 3, 8, 71), pages=7, sq=3, new=3),
    *_each("sq", (2, 4, 9, 16, 40), new=9),
    *_each("pages", (1, 2, 7, 16, 64, 128, 200)),
    *_each("pages", (1, 7, 16, 128), sq=9, new=9),
    *_each("d", (1, 3, 33, 64, 128, 256), dv=24, pages=16),
    *_each("window", ((3, 0), (None, 2), (0, 0), (20, 5)), pages=16, sq=3, new=3),
    *_each("pairs", (1, 5, 8), interleaved=True),
    *_each("pairs", (1, 5, 8), offsets=(0, 33, 7), sq=2, new=2),
    CacheCase(indexed=True),
    CacheCase(indexed=True, new=None, lens=(5, 0, 80)),
    CacheCase(new=None, sq=2),
    CacheCase(new=None, pages=16, pairs=8),
    CacheCase(new=0, pages=16),
    CacheCase(sq=0, new=5, pages=7),
    CacheCase(b=0, lens=()),
    CacheCase(causal=False, sq=3, new=3),
    CacheCase(chunk=7, sq=3, new=3, left_pad=(2, 0, 11)),
    CacheCase(softcap=2.0, scale=-0.7),
    CacheCase(alibi="h", sq=2, new=2),
    CacheCase(alibi="bh", sink=True, pages=16),
    CacheCase(sink=True, new=None),
    CacheCase(left_pad=(5, 0, 63)),
    CacheCase(left_pad=(2, 3, 40), pages=16, sq=4, new=4, pairs=4, window=(9, None)),
    CacheCase(left_pad=(6, 1, 71)),
    CacheCase(sq=4, new=6, new_lens=(6, 0, 2), q_lens=(4, 0, 1), pages=7, pairs=8),
    CacheCase(sq=3, new=3, q_lens=(1, 3, 2), new_lens=(3, 3, 0), alibi="bh"),
    CacheCase(layout="bshd", sq=2, new=2, pages=16, pairs=8),
    CacheCase(layout="bshd", indexed=True, left_pad=(1, 0, 2)),
    CacheCase(storage="sliced", sq=2, new=2),
    CacheCase(storage="negative", pages=16),
    CacheCase(storage="transposed", pages=7, layout="bshd"),
    CacheCase(storage="gaps", pages=7, pairs=4),
    CacheCase(b=1, lens=(2100,), slots=2200, d=32),
    CacheCase(b=2, lens=(1900, 700), slots=2200, d=32, pages=48, g=3, sq=4, new=4),
    CacheCase(b=1, lens=(900,), slots=1000, d=40, dv=72, pages=16, g=20, window=(500, 0), left_pad=(9,)),
    CacheCase(b=1, lens=(900,), slots=1000, d=72, dv=40, pages=24, g=20, storage="sliced"),
    CacheCase(b=1, lens=(1900,), slots=2200, d=32, pages=16, dtype="bfloat16", sq=2, new=2, left_pad=(77,)),
]
FLOAT8_CASES = [
    *_each("dtype", DTYPES, float8=True, scales="h"),
    *_each("dtype", DTYPES, float8=True, pages=16, scales="bh", sq=9, new=9),
    CacheCase(float8=True),
    CacheCase(float8=True, pairs=8, scales="bh", pages=7, sq=3, new=3),
    CacheCase(float8=True, new=None, scales="h", storage="sliced"),
]
