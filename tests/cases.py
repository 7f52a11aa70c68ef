"""Attention calls to test: a Case is its fields, its id is the fields that differ from the defaults.

Nothing here knows a device or a kernel: `build` gives NumPy arrays and options, a backend (conftest.py) runs them.
"""

import dataclasses
import functools
import itertools
import zlib
from dataclasses import dataclass

import numpy as np
from checking import DTYPES, Naive, exact, naive_backward, naive_forward, place

from flashgqa import reference


@dataclass(frozen=True)
class Case:
    b: int = 1
    hq: int = 4
    hk: int = 2
    sq: int = 33
    sk: int = 33
    d: int = 16
    dv: int | None = None  # None: d
    dtype: str = "float32"
    layout: str | None = None
    rank: int = 4
    causal: bool = False
    window: tuple | None = None
    align: str | None = None
    chunk: int | None = None
    scale: float | None = None
    softcap: float | None = None
    mask: str = ""  # which axes of [b, hq, sq, sk] are full: "bhqk", "b11k", "11q1"; "qk", "hqk" for lower ranks
    bias: str = ""
    bias_dtype: str | None = None  # None: dtype
    score_storage: str | tuple = "contiguous"  # of mask and bias: as checking.place takes it, or "zero": expanded with stride 0
    alibi: str | float = ""  # "h" or "bh": the usual slopes of so many heads; a number: that of all
    sink: bool = False
    dropout: float = 0.0
    seed_offset: int | None = None
    q_lens: tuple | None = None
    kv_lens: tuple | None = None
    packed: tuple | None = None  # ((sq, sk) of each sequence): cu_seqlens
    bounds: bool = False  # give max_q and max_kv, larger than needed
    storage: str | tuple = "contiguous"  # of q, k, v, dout: as checking.place takes it
    data: str = "normal"  # normal | large (logits x30) | shift (logits - 120) | equal (all keys of a head the same)
    dlse: bool = True

    def __str__(self):
        changed = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{name}={value}".replace(" ", "") for name, value in changed) or "default"


@dataclass
class Call:
    """What to hand to attention and attention_backward, as NumPy arrays in poisoned storage."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray | None
    options: dict

    @property
    def dtype(self):
        return self.q.dtype

    @property
    def inputs(self):
        return self.q, self.k, self.v


@dataclass
class Answer:
    """What a call must give: the oracle's results, and those of the naive computation to judge by."""

    out: np.ndarray
    lse: np.ndarray
    naive: Naive


@dataclass
class Gradients:
    exact: reference.Gradients
    naive: Naive


def lengths(case):
    """(q_lens, kv_lens) of the sequences of a batch."""
    if case.packed is not None:
        return [n for n, _ in case.packed], [m for _, m in case.packed]
    return case.q_lens or [case.sq] * case.b, case.kv_lens or [case.sk] * case.b


def _bhsd(case, rng):
    """q, k, v, dout as float64 [b, h, s, d], padded to the longest sequence."""
    dv = case.d if case.dv is None else case.dv
    b, sq, sk = score_extents(case)
    q, k = rng.standard_normal((b, case.hq, sq, case.d)), rng.standard_normal((b, case.hk, sk, case.d))
    v, dout = rng.standard_normal((b, case.hk, sk, dv)), rng.standard_normal((b, case.hq, sq, dv))
    if case.data == "large":
        q *= 30
    elif case.data == "shift":
        q[..., 0], k[..., 0] = -12 * case.d**0.25, 10 * case.d**0.25
    elif case.data == "equal":
        k[...] = k[:, :, :1]
    return q, k, v, dout


def score_extents(case):
    if case.packed is None:
        return case.b, case.sq, case.sk
    q_lens, kv_lens = lengths(case)
    extra = 3 if case.bounds else 0
    return len(case.packed), max(q_lens, default=0) + extra, max(kv_lens, default=0) + extra


def _to_layout(case, x, lens):
    """[b, h, s, d] in the case's rank and layout; NaN in padded rows."""
    if case.packed is not None:
        rows = [x[n, :, :length].swapaxes(0, 1) for n, length in enumerate(lens)]
        return np.concatenate([np.empty((0, x.shape[1], x.shape[3])), *rows])
    for n, length in enumerate(lens):
        x[n, :, length:] = np.nan
    x = x.swapaxes(1, 2) if case.layout == "bshd" else x
    return x[0] if case.rank == 3 else x


def _row_values(case, x, lens):
    """[b, h, s] as the LSE is."""
    if case.packed is not None:
        return np.concatenate([np.empty((x.shape[1], 0)), *(x[n, :, :length] for n, length in enumerate(lens))], axis=1)
    for n, length in enumerate(lens):
        x[n, :, length:] = np.nan
    return x[0] if case.rank == 3 else x


def _score_tensor(case, spec, values, extents):
    """values (at least [b, hq, sq, sk]) cut to the axes that `spec` keeps, in the case's storage."""
    x = values[tuple(slice(n if letter in spec else 1) for letter, n in zip("bhqk", extents, strict=True))]
    x = x.reshape(x.shape[4 - len(spec) :])
    if case.score_storage == "zero":
        return np.broadcast_to(place(x), extents[4 - len(spec) :])
    return place(x, case.score_storage)


def build(case):
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    dtype = DTYPES[case.dtype]
    q_lens, kv_lens = lengths(case)
    b, sq, sk = score_extents(case)
    q, k, v, dout = _bhsd(case, rng)
    arrays = [(q, q_lens), (k, kv_lens), (v, kv_lens), (dout, q_lens)]
    q, k, v, dout = (place(_to_layout(case, x, lens).astype(dtype), case.storage) for x, lens in arrays)
    options = {}
    for name in ("causal", "window", "align", "chunk", "scale", "softcap", "layout"):
        if getattr(case, name) is not None and getattr(case, name) is not False:
            options[name] = getattr(case, name)
    scores = (b, case.hq, sq, sk)
    at_least_one = [max(1, n) for n in scores]
    if case.mask:
        keep = rng.random(at_least_one) < 0.7
        keep[:, :, 1:2] = False
        if sq > 1 and "q" in case.mask:
            keep[:, :, 0, : sk // 2] = False
        options["mask"] = _score_tensor(case, case.mask, keep, scores)
    if case.bias:
        bias = rng.standard_normal(at_least_one) * 2
        if "q" in case.bias and "k" in case.bias:
            bias[rng.random(at_least_one) < 0.1] = -np.inf
            bias[:, :, 2:3] = -np.inf
        options["bias"] = _score_tensor(case, case.bias, bias.astype(DTYPES[case.bias_dtype or case.dtype]), scores)
    if case.alibi:
        slopes = np.float32(2.0 ** (-8 * (np.arange(case.hq) + 1) / case.hq))
        of_sequences = slopes / (np.arange(b, dtype=np.float32)[:, None] + 1)
        named = {"h": slopes, "bh": of_sequences}
        options["alibi_slopes"] = named[case.alibi] if case.alibi in named else np.full(case.hq, case.alibi, np.float32)
    if case.sink:
        options["sink"] = rng.standard_normal(case.hq).astype(dtype)
    if case.dropout:
        seed = int(rng.integers(2**62))
        options |= {"dropout_p": case.dropout, "seed": seed}
        if case.seed_offset is not None:
            options["seed"] = np.array([seed, case.seed_offset], np.int64)
    for name in ("q_lens", "kv_lens"):
        if getattr(case, name) is not None:
            options[name] = np.array(getattr(case, name), np.int32)
    if case.packed is not None:
        options["cu_seqlens_q"] = np.cumsum([0, *q_lens], dtype=np.int32)
        options["cu_seqlens_kv"] = np.cumsum([0, *kv_lens], dtype=np.int32)
        if case.bounds:
            options |= {"max_q": sq, "max_kv": sk}
    dlse = None
    if case.dlse:
        lse_dtype = np.float64 if case.dtype == "float64" else np.float32
        dlse = place(_row_values(case, rng.standard_normal((b, case.hq, sq)), q_lens).astype(lse_dtype))
    return Call(q, k, v, dout, dlse, options)


def reference_options(call):
    """The options as the oracle takes them: floating-point ones exact."""
    return {n: exact(x, call.dtype) if n in ("bias", "sink") else x for n, x in call.options.items()}


@functools.lru_cache(maxsize=8)
def built(case):
    """The call and what it must give; kept while the kernels under test take their turns."""
    call = build(case)
    inputs = [exact(x, call.dtype) for x in call.inputs]
    out, lse = reference.attention(*inputs, return_lse=True, **reference_options(call))
    return call, Answer(out, lse, naive_forward(*call.inputs, **call.options))


@functools.lru_cache(maxsize=8)
def gradients(case):
    call, _ = built(case)
    inputs = [exact(x, call.dtype) for x in (call.dout, *call.inputs)]
    dlse = exact(call.dlse, call.dtype)
    return Gradients(
        reference.attention_backward(*inputs, dlse=dlse, **reference_options(call)),
        naive_backward(call.dout, *call.inputs, dlse=call.dlse, **call.options),
    )


# ---- lists ----

FLOATS = ("float64", "float32", "float16", "bfloat16")

SMOKE = [
    *(Case(dtype=dtype, causal=causal) for dtype in FLOATS for causal in (False, True)),
    Case(b=2, hq=8, hk=1, sq=129, sk=257, d=64, causal=True),
    Case(hq=8, hk=8, sq=1, sk=300, d=128),
    Case(b=2, layout="bshd", window=(7, 0), softcap=10.0, sink=True, dropout=0.2, bias="bhqk"),
]

LENGTHS = (0, 1, 2, 31, 33, 64, 127, 128, 129, 257)
DIMS = (1, 7, 16, 33, 40, 64, 80, 96, 111, 128, 160, 192, 255, 256)
RATIOS = ((1, 1), (4, 2), (3, 1), (10, 2), (7, 1), (8, 8), (16, 2), (32, 2), (71, 1), (71, 71), (9, 3))


def _edges():
    for sq, sk in itertools.product(LENGTHS, LENGTHS):
        # All pairs, but the causal diagonal only where the two differ by little or one is short.
        yield Case(sq=sq, sk=sk, hq=3, hk=1, d=8, causal=(LENGTHS.index(sq) + LENGTHS.index(sk)) % 3 != 0)
    for sq, sk in ((5, 9), (9, 5), (33, 64), (64, 33), (129, 128)):
        yield Case(sq=sq, sk=sk, causal=True, align="top-left")
    for d in DIMS:
        yield Case(d=d, sq=9, sk=70, causal=True)
        yield Case(d=d, dv=DIMS[(DIMS.index(d) + 5) % len(DIMS)], sq=66, sk=35, dtype="float64")
    for d, dv in ((1, 256), (256, 1), (192, 128), (33, 7), (64, 65)):
        yield Case(d=d, dv=dv, sq=20, sk=40, dtype="bfloat16")
    for hq, hk in RATIOS:
        yield Case(hq=hq, hk=hk, b=2, sq=5, sk=37, causal=True)
        yield Case(hq=hq, hk=hk, sq=1, sk=130, d=33)
    s = 33
    for side in (0, 1, 2, s - 1, s, s + 1):
        yield Case(window=(side, None))
        yield Case(window=(None, side))
        yield Case(window=(side, side), sq=s, sk=s + 20)
        yield Case(window=(side, 0), causal=True, sq=s + 20, sk=s)
        yield Case(window=(side, 2), align="top-left", sq=s, sk=2 * s)
    for chunk in (1, 2, 16, 32, 33, 34, 1000):
        yield Case(chunk=chunk, causal=True)
        yield Case(chunk=chunk, sq=70, sk=50)
        yield Case(chunk=chunk, sq=20, sk=90, align="top-left", window=(5, 3))
    for cap in (1.0, 10.0, 50.0):
        yield Case(softcap=cap)
        yield Case(softcap=cap, data="large", dtype="float64")
    for dtype in FLOATS:
        for data in ("large", "shift", "equal"):
            yield Case(dtype=dtype, data=data, causal=True, sk=70)
        for storage in ("sliced", "negative", "transposed", "broadcast", "gaps"):
            yield Case(dtype=dtype, storage=storage, b=3, sq=19, sk=40, d=40, dv=24)
            yield Case(dtype=dtype, storage=storage, b=2, sq=19, sk=40, d=7, layout="bshd", causal=True)
        yield Case(dtype=dtype, sq=70, sk=150, d=64, b=2, hq=8, hk=2, causal=True)
    for axes in ("bhqk", "b1qk", "1hqk", "11qk", "b11k", "11q1", "bh11", "1111", "qk"):
        for storage in ("contiguous", "sliced", "negative", "transposed", "broadcast", "gaps", "zero"):
            yield Case(b=2, sq=21, sk=45, mask=axes, score_storage=storage)
            yield Case(b=2, sq=21, sk=45, bias=axes, score_storage=storage, causal=storage == "sliced")
    for axes in ("hqk", "1qk", "h1k", "qk"):
        yield Case(rank=3, mask=axes, sk=50)
        yield Case(rank=3, bias=axes, sk=50, layout="bshd")
    for dtype, bias_dtype in itertools.product(FLOATS, FLOATS):
        yield Case(dtype=dtype, bias_dtype=bias_dtype, bias="1hqk", sink=True)
    for alibi in ("h", "bh"):
        for align in (None, "top-left"):
            yield Case(b=2, alibi=alibi, align=align, sq=20, sk=50, causal=True)
            yield Case(b=2, alibi=alibi, align=align, sq=50, sk=20)
    for dtype in FLOATS:
        yield Case(b=2, sink=True, dtype=dtype, sq=40, sk=20, causal=True)
    for p in (1e-5, 0.1, 0.5, 0.9, 1.0):
        yield Case(b=2, dropout=p, causal=True, sk=70)
        yield Case(b=2, dropout=p, seed_offset=3, hq=7, hk=1, sink=True)
    for lens in ((0, 33), (33, 0), (1, 17), (33, 33)):
        yield Case(b=2, kv_lens=lens, causal=True)
        yield Case(b=2, q_lens=lens, alibi="h")
        yield Case(b=2, q_lens=lens, kv_lens=lens[::-1], window=(9, 0), sink=True)
        yield Case(b=2, q_lens=lens, kv_lens=lens, causal=True, mask="b11k", bias="bhqk", layout="bshd", dropout=0.3)
    yield Case(b=1, rank=3, q_lens=(20,), kv_lens=(11,), causal=True)
    for packed in (
        (),
        ((0, 0),),
        ((5, 9),),
        ((0, 0), (7, 7), (33, 64)),
        ((12, 12), (0, 5), (0, 0), (9, 0), (40, 70)),
        ((70, 33), (1, 1), (0, 0)),
    ):
        yield Case(packed=packed, causal=True)
        yield Case(packed=packed, causal=True, bounds=True, mask="b1qk", bias="1h1k", dropout=0.2, alibi="bh", sink=True)
        yield Case(packed=packed, window=(3, 4), align="top-left", dtype="bfloat16", storage="sliced")
    # Few rows, many keys: decode.
    for (hq, hk), sq, dtype in itertools.product(((8, 8), (8, 2), (8, 1), (71, 1)), (1, 2, 5), FLOATS):
        yield Case(hq=hq, hk=hk, sq=sq, sk=530, d=64, dtype=dtype, causal=True)
    for sq, d in itertools.product((1, 3), (7, 33, 80, 128, 255)):
        yield Case(b=2, hq=6, hk=2, sq=sq, sk=300, d=d, dv=d // 2 + 1, sink=True, kv_lens=(300, 131))
        yield Case(b=2, hq=6, hk=2, sq=sq, sk=300, d=d, softcap=10.0, alibi="bh", bias="1hqk", mask="b11k", layout="bshd")
        yield Case(hq=6, hk=2, d=d, packed=((sq, 300), (1, 1), (sq, 260)), causal=True, window=(200, 0), dropout=0.3)
        yield Case(b=2, hq=6, hk=2, sq=sq, sk=300, d=d, dtype="bfloat16", storage="transposed", data="large", chunk=90)
    # A few rows left over by panels of 24 and 48 packed rows.
    for sq, dtype in itertools.product((17, 49), FLOATS):
        yield Case(b=2, hq=6, hk=2, sq=sq, sk=150, d=40, dv=24, dtype=dtype, causal=True, sink=True, kv_lens=(150, 61))
        yield Case(hq=3, hk=3, sq=sq, sk=sq, d=33, dtype=dtype, bias="1hqk", mask="b11k", alibi="bh", softcap=10.0, layout="bshd")
        yield Case(b=3, hq=3, hk=3, sq=sq, sk=sq, d=32, dtype=dtype, bias="1hqk", mask="b1qk")
        packed = ((sq, 300), (1, 1), (sq + 1, 49))
        yield Case(hq=6, hk=2, d=64, dtype=dtype, packed=packed, window=(100, 20), dropout=0.3, data="large")
    for rank, layout in itertools.product((3, 4), ("bhsd", "bshd")):
        yield Case(rank=rank, layout=layout, causal=True, dv=24)
        yield Case(rank=rank, layout=layout, sink=True, softcap=5.0, storage="negative", dtype="float64")
    for b, sq, sk in ((0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)):
        yield Case(b=b, sq=sq, sk=sk, sink=True, bias="bhqk", alibi="bh", dropout=0.5, causal=True)
    for sq in (33, 3, 1):
        yield Case(scale=0.0, sq=sq)
        yield Case(scale=1e-42, sq=sq, sk=70, d=64, dtype="bfloat16")
    yield Case(scale=-0.25, causal=True)
    yield Case(scale=2.0, softcap=3.0, dtype="float64")
    yield Case(dlse=False, causal=True)


def _sweep(count=240):
    """Every option drawn at random, many at a time; the same cases on every run."""
    rng = np.random.default_rng(20)

    def pick(*choices):
        return choices[int(rng.integers(len(choices)))]

    def rarely(x, default, p=0.25):
        return x if rng.random() < p else default

    for _ in range(count):
        rank = pick(4, 4, 3)
        packed = rarely(tuple((int(n), int(m)) for n, m in rng.integers(0, 60, (int(rng.integers(1, 5)), 2))), None)
        b = len(packed) if packed else 1 if rank == 3 else pick(1, 2, 3)
        sq, sk = pick(*LENGTHS[1:]), pick(*LENGTHS[1:])
        hq, hk = pick(*RATIOS[:7])
        score_axes = pick("bhqk", "b11k", "1hqk", "qk", "b1q1") if rank == 4 or packed else pick("hqk", "qk", "11k")
        padded = packed is None and rng.random() < 0.3
        yield Case(
            b=b,
            hq=hq,
            hk=hk,
            sq=sq if packed is None else 33,
            sk=sk if packed is None else 33,
            d=pick(*DIMS[:9]),
            dv=rarely(pick(*DIMS[:9]), None, 0.4),
            dtype=pick("float32", "float32", "float64", "float16", "bfloat16"),
            layout=None if packed else pick(None, "bhsd", "bshd"),
            rank=4 if packed else rank,
            causal=bool(rng.random() < 0.5),
            window=rarely((pick(None, 0, 3, 40), pick(None, 0, 5, 100)), None),
            align=pick(None, None, "top-left"),
            chunk=rarely(pick(1, 8, 50), None, 0.15),
            scale=rarely(pick(0.05, 1.0), None),
            softcap=rarely(pick(1.0, 10.0, 50.0), None),
            mask=rarely(score_axes, ""),
            bias=rarely(score_axes, ""),
            bias_dtype=rarely(pick(*FLOATS), None),
            score_storage=pick("contiguous", "sliced", "negative", "transposed", "zero"),
            alibi=rarely(pick("h", "bh"), "", 0.2),
            sink=bool(rng.random() < 0.3),
            dropout=rarely(pick(0.1, 0.5), 0.0),
            q_lens=tuple(int(n) for n in rng.integers(0, sq + 1, b)) if padded and rng.random() < 0.6 else None,
            kv_lens=tuple(int(n) for n in rng.integers(0, sk + 1, b)) if padded else None,
            packed=packed,
            bounds=packed is not None and bool(rng.random() < 0.5),
            storage=pick("contiguous", "sliced", "negative", "transposed", "gaps"),
            data=pick("normal", "normal", "normal", "large", "shift"),
            dlse=bool(rng.random() < 0.7),
        )


EDGES = list(dict.fromkeys(_edges()))
SWEEP = list(dict.fromkeys(_sweep()))
