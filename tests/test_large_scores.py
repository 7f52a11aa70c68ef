"""Scores whose largest, rounded, is off by more than exp(x) can bear: weights are those of the rounded scores, as in the
plain formula."""

import numpy as np
import pytest
from checking import DTYPES, assert_within, naive_backward, naive_forward
from conftest import cpu_isas

import flashgqa
from flashgqa import reference
from flashgqa._bounds import accumulator

# Factors of q and k: scores beyond the accumulator's digits, beyond its exponents' range in digits, and of all keys far below 0.
CASES = [("float32", 1e5, 1e5), ("float32", 1e16, 1), ("float32", 1e25, 1e8), ("float64", 1e25, 1), ("float64", 1e100, 1e100),
         ("bfloat16", 1e10, 1), ("bfloat16", 1e20, 1e10), ("float16", 1e4, 1e4)]


@pytest.mark.parametrize("below", [False, True], ids=["around 0", "below 0"])
@pytest.mark.parametrize("shape", [(2, 1, 48, 256, 32), (1, 1, 1, 130, 16), (8, 1, 1, 300, 64), (4, 2, 70, 70, 40)], ids=str)
@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype, q_size, k_size", CASES)
def test_large_scores(dtype, q_size, k_size, shape, below, isa):
    rng = np.random.default_rng(0)
    hq, hk, sq, sk, d = shape
    sizes = ((hq, sq, q_size), (hk, sk, k_size), (hk, sk, 1), (hq, sq, 1))
    q, k, v, dout = ((size * rng.standard_normal((1, h, s, d))).astype(DTYPES[dtype]) for h, s, size in sizes)
    if below:
        q, k = np.abs(q), -np.abs(k)
    exact = [x.astype(np.longdouble if dtype == "float64" else np.float64) for x in (dout, q, k, v)]
    with np.errstate(all="ignore"):
        out, lse = flashgqa.attention(q, k, v, return_lse=True, kernel=f"fwd_{isa}")
        got = flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=f"bwd_{isa}")
        expected = reference.attention(*exact[1:], return_lse=True)
        naive = naive_forward(q, k, v)
        assert_within("out", out, expected[0], (x for x, _ in naive), q.dtype, 2)
        assert_within("lse", lse, expected[1], (x for _, x in naive), accumulator(q.dtype), 2)
        gradient = reference.attention_backward(*exact)
        assert_within("dv", got.dv, gradient.dv, (x.dv for x in naive_backward(dout, q, k, v)), q.dtype, 3)
    assert np.isfinite(got.dq).all() and np.isfinite(got.dk).all()   # nearly equal numbers subtracted, times q or k


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("order", ["rising", "falling", "one key", "some rows"])
def test_scores_that_grow_along_the_keys(order, dtype, isa):
    """Running maxima that are found late: by factors of 2^20 and more from one 32 keys to the next, at one key, in a few rows."""
    rng = np.random.default_rng(1)
    hq, hk, sq, sk, d = 4, 2, 33, 700, 64
    q, v = (rng.standard_normal((1, h, s, d)) for h, s in ((hq, sq), (hk, sk)))
    k = 0.1 * rng.standard_normal((1, hk, sk, d))
    steps = {"rising": np.arange(sk) // 32, "falling": -(np.arange(sk) // 32), "one key": 9.0 * (np.arange(sk) == 430)}
    q[..., 0] = 40.0
    if order == "some rows":
        q[:, :, ::5, 0] *= -1
    k[..., 0] = 3.0 * steps.get(order, steps["rising"])
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    out, lse = flashgqa.attention(q, k, v, return_lse=True, kernel=f"fwd_{isa}")
    expected = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), return_lse=True)
    naive = naive_forward(q, k, v)
    assert_within("out", out, expected[0], (x for x, _ in naive), q.dtype, 2)
    assert_within("lse", lse, expected[1], (x for _, x in naive), accumulator(q.dtype), 2)
