"""precision="bf16x3", and float16 on tiles: two bfloat16 numbers a number."""

import ml_dtypes
import numpy as np
import pytest
from cases import EDGES, SMOKE, SWEEP, build, built, gradients
from checking import Naive, assert_within, same_bits
from conftest import Backend, cpu_isas

import flashgqa
from flashgqa import _bounds, reference

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
        with pytest.raises(NotImplementedError, match=r'fwd_(avx\w*|neon\w*|portable): precision="bf16x3" needs a CPU with AMX'):
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
    dout = np.random.default_rng(1).standard_normal(out.shape).astype(np.float16)
    exact = reference.attention_backward(*(x.astype(np.float64) for x in (dout, q, k, v)), causal=True)
    plain = flashgqa.attention_backward(dout, q, k, v, plain, plain_lse, causal=True, kernel="bwd_portable")
    got = flashgqa.attention_backward(dout, q, k, v, out, lse, causal=True)
    for name in ("dq", "dk", "dv"):
        assert_within(name, getattr(got, name), getattr(exact, name), [getattr(plain, name)], out.dtype, 2)


class InParts(_bounds.Narrow):
    """The naive computation with each product as three products of parts; in all orders but the first of numbers in other units,
    which split elsewhere.
    """

    def matmul(self, a, b, start=0):
        if not self.order:
            return start + three_products(a, b)
        rows, columns = (self.rng.uniform(1, 2, shape).astype(np.float32) for shape in ((a.shape[0], 1), (1, b.shape[1])))
        return start + three_products(a * rows, b * columns) / (rows * columns)


def in_parts(compute, *arguments):
    return Naive([lambda arithmetic: compute(InParts(arithmetic.dtype, arithmetic.order), *arguments)], np.dtype(np.float32))


def check_case(case):
    """Results and gradients under the error rule, the naive computation being one of three products. Without tiles: refused."""
    if not ON_TILES:
        call = build(case)
        for backward in (False, True):
            with pytest.raises(NotImplementedError, match=r'_(avx\w*|neon\w*|portable): precision="bf16x3" needs a CPU with AMX'):
                flashgqa.explain(*call.inputs, **call.options, precision="bf16x3", backward=backward)
        return
    call, answer = built(case)
    backend = Backend("amx")
    options = call.options | {"precision": "bf16x3"}
    out, lse = backend.attention(*call.inputs, **options, return_lse=True)
    naive = list(in_parts(_bounds._narrow_forward, *call.inputs, call.options))
    assert_within("out", out, answer.out, (x[0] for x in naive), out.dtype, _bounds.FORWARD_FACTOR)
    assert_within("lse", lse, answer.lse, (x[1] for x in naive), lse.dtype, _bounds.FORWARD_FACTOR)
    got = backend.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **options)
    naive = in_parts(_bounds._narrow_backward, call.dout, *call.inputs, call.dlse, None, call.options)
    for name in got._fields:
        gradient = getattr(got, name)
        if gradient is not None:
            wanted = getattr(gradients(case).exact, name)
            assert_within(name, gradient, wanted, (getattr(x, name) for x in naive), gradient.dtype, _bounds.BACKWARD_FACTOR)


@pytest.mark.parametrize("case", [case for case in SMOKE + EDGES[::3] if case.dtype == "float32"], ids=str)
def test_every_option_has_the_error_of_three_products(case):
    check_case(case)


@pytest.mark.sweep
@pytest.mark.parametrize("case", [case for case in EDGES + SWEEP if case.dtype == "float32"], ids=str)
def test_combined_options_have_the_error_of_three_products(case):
    check_case(case)


def test_kernels_without_tiles_refuse():
    q, k, v = inputs(SHAPES[0], np.float32)
    for backward in (False, True):
        name = "bwd" if backward else "fwd"
        with pytest.raises(NotImplementedError, match=f"{name}_(avx|portable)"):
            flashgqa.explain(q, k, v, precision="bf16x3", backward=backward, kernel=f"{name}_{cpu_isas()[-1]}")
        if ON_TILES:
            plan = flashgqa.explain(q, k, v, precision="bf16x3", backward=backward)
            assert plan["kernel"] == f"{name}_amx" and "precision bf16x3" in str(plan)


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, options", IN_PARTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, LARGE], ids=str)
@pytest.mark.parametrize("argument", ["q", "k", "v", "dout"])
def test_what_has_no_low_part_in_gradients(argument, value, dtype, options, causal):
    """The same entries of them are not finite as elsewhere. No score is -inf: its weight of 0 times infinity may be 0 or NaN."""
    options = options | {"causal": causal}
    q, k, v = inputs((4, 2, 130, 150, 32, 48), dtype)
    dout = np.random.default_rng(1).standard_normal((2, 4, 130, 48)).astype(dtype)
    largest = value == LARGE
    if largest and dtype == "float16":
        value = float(np.finfo(np.float16).max)
    {"q": q, "k": k, "v": v, "dout": dout}[argument][:, 1, 17, 5] = value
    other = {"q": k, "k": q}.get(argument)
    if other is not None:
        other[..., 5] = np.copysign(other[..., 5], value)
    if largest:
        options["scale"] = 2.0**-120 if dtype == "float32" else 2.0**-8
        v *= np.asarray(2.0**-10, v.dtype)
        dout *= np.asarray(2.0**-10, dout.dtype)
    out, lse = flashgqa.attention(q, k, v, **options, return_lse=True)
    got = flashgqa.attention_backward(dout, q, k, v, out, lse, **options)
    options.pop("precision", None)
    want = flashgqa.attention_backward(dout, q, k, v, out, lse, **options, kernel=f"bwd_{cpu_isas()[-1]}")
    for name in ("dq", "dk", "dv"):
        a, b = getattr(got, name), getattr(want, name)
        assert np.isfinite(b).any(), name
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(a), test(b), name)
        seen = np.isfinite(b)
        near = 1e-3 if dtype == "float32" else 4e-3
        np.testing.assert_allclose(a[seen].astype(np.float64), b[seen], rtol=near, atol=near * float(np.abs(b[seen]).max()))


@pytest.mark.parametrize("dtype, options", IN_PARTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("argument", ["q", "dout"])
def test_poison_that_sees_nothing_changes_no_bit(argument, dtype, options, rng):
    """Not even how the scores of the rows beside it are computed."""
    q, k, v = inputs((4, 2, 150, 90, 32, 48), dtype)
    dout = rng.standard_normal((2, 4, 150, 48)).astype(dtype)
    results = []
    for value in (0, np.inf):
        {"q": q, "dout": dout}[argument][:, :, :60] = value
        out, lse = flashgqa.attention(q, k, v, causal=True, return_lse=True, **options)
        results.append(flashgqa.attention_backward(dout, q, k, v, out, lse, causal=True, **options)[:3])
    assert all(same_bits(clean, poisoned) for clean, poisoned in zip(*results, strict=True))


def test_gradients_do_not_depend_on_threads_or_batch(rng):
    """Bits."""
    options = {"causal": True, "batch_invariant": True} | ({"precision": "bf16x3"} if ON_TILES else {})
    q, k, v, dout = (rng.standard_normal((3, h, 200, 64)).astype(np.float32) for h in (4, 2, 2, 4))
    before = flashgqa.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            flashgqa.set_num_threads(threads)
            out, lse = flashgqa.attention(q, k, v, **options, return_lse=True)
            results.append(flashgqa.attention_backward(dout, q, k, v, out, lse, **options))
    finally:
        flashgqa.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(results[0][:3], results[1][:3], strict=True))
    one = flashgqa.attention_backward(*(x[1:2] for x in (dout, q, k, v, out, lse)), **options)
    assert all(same_bits(a, b[1:2]) for a, b in zip(one[:3], results[0][:3], strict=True))
