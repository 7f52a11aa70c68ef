"""Calls that repeat earlier ones in all but the addresses and contents of their arrays, whose problem and plan are kept, and
calls that differ in just one thing, which must not be taken for them.
"""

import gc
import sys

import numpy
import pytest

import flashgqa
from flashgqa import reference

SHAPE, KEYS = (2, 4, 9, 16), (2, 2, 12, 16)


def arrays(seed, dtype=numpy.float32):
    rng = numpy.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in (SHAPE, KEYS, KEYS)]


def expected(q, k, v, **options):
    return reference.attention(*(x.astype(numpy.float64) for x in (q, k, v)), **options)


def near(x, y):
    numpy.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_contents_change():
    for seed in range(4):
        q, k, v = arrays(seed)
        out, lse = flashgqa.attention(q, k, v, causal=True, return_lse=True)
        right, right_lse = expected(q, k, v, causal=True, return_lse=True)
        near(out, right)
        near(lse, right_lse)
        dq, dk, dv = flashgqa.attention_backward(out, q, k, v, out, lse, causal=True)[:3]
        right_gradients = reference.attention_backward(out, q, k, v, out, lse, causal=True)[:3]
        for x, y in zip((dq, dk, dv), right_gradients, strict=True):
            near(x, y)


def test_results_are_new_ones():
    q, k, v = arrays(0)
    first, second = (flashgqa.attention(q, k, v) for _ in range(2))
    assert not numpy.shares_memory(first, second)


OPTIONS = [
    {}, {"causal": True}, {"window": (2, None)}, {"window": (2, 1)}, {"window": (3, 1)}, {"chunk": 4},
    {"align": "top-left", "causal": True}, {"scale": 0.5}, {"scale": 0.25}, {"scale": 1}, {"softcap": 2.0}, {"softcap": 3.0},
]  # fmt: skip


def test_values_of_options_count_and_not_their_objects():
    q, k, v = arrays(1)
    for _ in range(2):
        for options in OPTIONS:
            near(flashgqa.attention(q, k, v, **options), expected(q, k, v, **options))
    for n in range(20):
        near(flashgqa.attention(q, k, v, scale=float(f"0.{n + 1}")), expected(q, k, v, scale=float(f"0.{n + 1}")))


def test_every_change_of_an_array_counts():
    """Extents, strides, dtypes, addresses within a cache line, ranks, and no batch at all."""
    q, k, v = arrays(2)
    rows = numpy.zeros(q.size + 16, numpy.float32)
    shifted = rows[3 : 3 + q.size].reshape(SHAPE)
    shifted[:] = q
    turned = numpy.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2)
    calls = [
        (q, k, v), (shifted, k, v), (turned, k, v), (q[:, :, :5], k, v), (q, k[:, :, :7], v[:, :, :7]), (q, k[:, :1], v[:, :1]),
        (q, k, v[..., :8]), (q[::-1], k, v), (q[0], k[0], v[0]), (q[:1], k[:1], v[:1]), (q[..., ::2], k[..., ::2], v),
    ]  # fmt: skip
    for _ in range(2):
        for call in calls:
            near(flashgqa.attention(*call), expected(*call))
        assert flashgqa.attention(q[:0], k[:0], v[:0]).shape == (0, *SHAPE[1:])
        double = flashgqa.attention(*(x.astype(numpy.float64) for x in (q, k, v)))
        assert double.dtype == numpy.float64
        numpy.testing.assert_allclose(double, expected(q, k, v), rtol=1e-12, atol=1e-12)
        swapped = flashgqa.attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), layout="bshd")
        near(swapped.swapaxes(1, 2), expected(q, k, v))


BAD = [
    ({"causal": 1}, TypeError, "causal"), ({"scale": float("nan")}, ValueError, "scale"), ({"chunk": 0}, ValueError, "chunk"),
    ({"layout": "sbhd"}, ValueError, "layout"), ({"window": (1, 2)[:1]}, TypeError, "window"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"stream": 5}, ValueError, "stream"), ({"kernel": "no"}, ValueError, "kernel"), ({"dropout_p": 0.5}, ValueError, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "name"), BAD)
def test_errors_stay_what_they_are(options, error, name):
    q, k, v = arrays(3)
    flashgqa.attention(q, k, v)
    for _ in range(2):
        with pytest.raises(error, match=name):
            flashgqa.attention(q, k, v, **options)
        with pytest.raises(ValueError, match="k has"):
            flashgqa.attention(q, k[..., :8], v)
        near(flashgqa.attention(q, k, v), expected(q, k, v))


def test_arrays_among_the_options_and_given_results():
    q, k, v = arrays(4)
    for keys in ((12, 12), (3, 5), (1, 12)):
        lens = numpy.array(keys, numpy.int32)
        near(flashgqa.attention(q, k, v, kv_lens=lens), expected(q, k, v, kv_lens=lens))
    out = numpy.full(SHAPE, numpy.nan, numpy.float32)
    flashgqa.attention(q, k, v)
    assert flashgqa.attention(q, k, v, out=out) is out
    near(out, expected(q, k, v))
    with pytest.raises(ValueError, match="out overlaps q"):
        flashgqa.attention(q, k, v, out=q)


def test_seeds_are_read_every_time():
    q, k, v = arrays(5)
    drawn = [flashgqa.attention(q, k, v, dropout_p=0.5, seed=seed) for seed in (1, 2, 1)]
    assert numpy.array_equal(drawn[0], drawn[2]) and not numpy.array_equal(drawn[0], drawn[1])


def test_nothing_is_kept_of_arrays_and_little_of_options():
    q, k, v = arrays(6)
    scale = float("0.125") * 3
    before = [sys.getrefcount(x) for x in (q, k, v)]
    for n in range(50):
        flashgqa.attention(q, k, v, scale=scale)
        flashgqa.attention(q, k, v, scale=float(n + 1) / 7)
    gc.collect()
    assert [sys.getrefcount(x) for x in (q, k, v)] == before
    assert sys.getrefcount(scale) < 30


def test_the_plan_is_still_explained():
    q, k, v = arrays(7)
    before = flashgqa.explain(q, k, v)
    flashgqa.attention(q, k, v)
    assert str(flashgqa.explain(q, k, v)) == str(before)
