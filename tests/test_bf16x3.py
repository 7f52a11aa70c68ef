"""precision="bf16x3", and float16 on tiles: two bfloat16 numbers a number."""

import ml_dtypes
import numpy as np
import pytest
from checking import assert_within, same_bits
from conftest import cpu_isas

import flashgqa
from flashgqa import reference

ON_TILES = "amx" in cpu_isas()
# As many packed rows as float16 needs to be split, too.
SHAPES = [(4, 2, 130, 70, 64, 64), (8, 1, 33, 300, 128, 40), (2, 2, 257, 129, 16, 96), (2, 1, 128, 257, 256, 33)]


def parts(x):
    high = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    return high, (x - high).astype(ml_dtypes.bfloat16).astype(np.float32)


def three_products(a, b):
    (a_high, a_low), (b_high, b_low) = parts(a), parts(b)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def naive(q, k, v):
    """Dense attention, causal from the end, by three products of parts each."""
    k, v = (x.repeat(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = three_products(q, k.swapaxes(-1, -2)) * np.float32(q.shape[-1] ** -0.5)
    i, j = np.ogrid[: s.shape[-2], : s.shape[-1]]
    s[..., j > i + s.shape[-1] - s.shape[-2]] = -np.inf
    top = s.max(-1, keepdims=True, initial=-1e30)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    out = three_products(p, v) / np.where(total == 0, 1, total)
    return out, (np.log(total, where=total > 0, out=np.full_like(total, -np.inf)) + top)[..., 0]


def inputs(shape, dtype, seed=0, factor=1.0):
    hq, hk, sq, sk, d, dv = shape
    rng = np.random.default_rng(seed)
    return [(factor * rng.standard_normal((2, h, s, n))).astype(dtype) for h, s, n in ((hq, sq, d), (hk, sk, d), (hk, sk, dv))]


def check_error(shape, factor):
    q, k, v = inputs(shape, np.float32, factor=factor)
    out, lse = flashgqa.attention(q, k, v, causal=True, precision="bf16x3", return_lse=True)
    expected, expected_lse = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=True, return_lse=True)
    plain, plain_lse = naive(q, k, v)
    assert_within("out", out, expected, [plain], out.dtype, 2)
    assert_within("lse", lse, expected_lse, [plain_lse], lse.dtype, 2)
    assert not same_bits(out, flashgqa.attention(q, k, v, causal=True))


@pytest.mark.parametrize("factor", [1, 1e-3, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_three_products_or_there_is_none(shape, factor):
    """Without tiles the precision is refused, by a call and by its plan, with the reason; never something else instead."""
    if ON_TILES:
        check_error(shape, factor)
        return
    for call in (flashgqa.attention, flashgqa.explain):
        with pytest.raises(NotImplementedError, match='fwd_portable: precision="bf16x3" needs a CPU with AMX'):
            call(*inputs(shape, np.float32), precision="bf16x3")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16_loses_nothing_by_being_split(shape):
    """At most twice the error of the row that computes in float32 without any vectors."""
    q, k, v = inputs(shape, np.float16)
    expected, expected_lse = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=True, return_lse=True)
    plain, plain_lse = flashgqa.attention(q, k, v, causal=True, return_lse=True, kernel="fwd_portable")
    out, lse = flashgqa.attention(q, k, v, causal=True, return_lse=True)
    assert_within("out", out, expected, [plain], out.dtype, 2)
    assert_within("lse", lse, expected_lse, [plain_lse], lse.dtype, 2)


def test_backward_and_weights_have_no_such_kernels():
    q, k, v = inputs(SHAPES[0], np.float32)
    with pytest.raises(NotImplementedError, match='precision="bf16x3"'):
        flashgqa.explain(q, k, v, precision="bf16x3", backward=True)
    with pytest.raises(NotImplementedError, match=r'fwd_avx|fwd_portable'):
        flashgqa.explain(q, k, v, precision="bf16x3", kernel=f"fwd_{cpu_isas()[-1]}")


LARGE = float(np.finfo(np.float32).max)
IN_PARTS = [("float16", {}), *([("float32", {"precision": "bf16x3"})] if ON_TILES else [])]


@pytest.mark.parametrize("dtype, options", IN_PARTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, LARGE], ids=str)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_what_has_no_low_part_means_what_it_does_elsewhere(argument, value, dtype, options):
    """Infinities, NaN and numbers that rounding up would make infinite: the same entries of the results are not finite."""
    if value == LARGE and dtype == "float16":
        value = float(np.finfo(np.float16).max)
    q, k, v = inputs((4, 2, 130, 150, 32, 48), dtype)
    {"q": q, "k": k, "v": v}[argument][:, 1, 17, 5] = value
    if value == LARGE:
        options = options | {"scale": 2.0**-120}       # scores of some size
        v *= np.asarray(2.0**-10, v.dtype)             # weights may be as large as 2^8 while they are added up
    for causal in (False, True):
        want = flashgqa.attention(q, k, v, causal=causal, kernel=f"fwd_{cpu_isas()[-1]}", scale=options.get("scale"))
        out = flashgqa.attention(q, k, v, causal=causal, **options)
        assert np.isfinite(want).any()
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(out), test(want))
        seen = np.isfinite(want)
        np.testing.assert_allclose(out[seen].astype(np.float64), want[seen], rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_scale_at_all(dtype, isa):
    """Uniform weights, also where keys do not fill the last tile."""
    q, k, v = inputs((4, 2, 40, 150, 32, 48), np.float32)
    q, k, v = (x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for x in (q, k, v))
    out = np.asarray(flashgqa.attention(q, k, v, scale=0.0, kernel=f"fwd_{isa}")).astype(np.float64)
    mean = v.astype(np.float64).mean(2, keepdims=True).repeat(2, 1)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-2, atol=1e-3)
