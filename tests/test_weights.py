"""attention_weights against the oracle, and the other ways to the same numbers."""

import numpy as np
import pytest
from cases import EDGES, SMOKE, built, reference_options
from checking import accumulator, assert_within, exact, memory_bytes, naive_weights

from flashgqa import reference

CASES = [case for case in SMOKE + EDGES if not case.dropout]


def check_weights(case, backend, rows):
    call, _ = built(case)
    q, k = call.q, call.k
    which = {"reduce": "keys"} if rows is None else {"rows": rows}
    before = memory_bytes(q, k)
    got = backend.attention_weights(q, k, **which, **call.options)
    assert memory_bytes(q, k) == before, "an input was written"
    assert got.dtype == accumulator(call.dtype)
    expected = reference.attention_weights(exact(q, call.dtype), exact(k, call.dtype), **which, **reference_options(call))
    assert_within("weights", got, expected, naive_weights(q, k, rows, **call.options), got.dtype, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chosen_rows_within_the_error_rule(case, backend):
    longest = max((n for n, _ in case.packed), default=0) if case.packed is not None else case.sq
    rows = np.int64([longest - 1, 0, longest // 2, 0]) if longest else np.zeros(0, np.int64)
    check_weights(case, backend, rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_by_key_within_the_error_rule(case, backend):
    check_weights(case, backend, None)


def test_rows_sum_to_one_less_the_sink(rng, backend):
    q, k = rng.standard_normal((2, 4, 30, 16)), rng.standard_normal((2, 2, 50, 16))
    p = backend.attention_weights(q, k, rows=range(30), causal=True)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-14)
    np.testing.assert_allclose(backend.attention_weights(q, k, reduce="keys", causal=True), p.sum(axis=2), rtol=1e-13)
    sink = np.float64([0.5, -1, 2, 0])
    _, lse = backend.attention(q, k, rng.standard_normal((2, 2, 50, 16)), sink=sink, return_lse=True)
    p = backend.attention_weights(q, k, rows=list(range(30)), sink=sink)
    np.testing.assert_allclose(p.sum(axis=-1), 1 - np.exp(sink[:, None] - lse), rtol=1e-13)


def test_weights_times_values_is_out(rng, backend):
    q, k, v = rng.standard_normal((4, 9, 16)), rng.standard_normal((2, 70, 16)), rng.standard_normal((2, 70, 5))
    options = {"window": (40, 3), "softcap": 2.0}
    p = backend.attention_weights(q, k, rows=range(9), **options)
    np.testing.assert_allclose(p @ np.repeat(v, 2, axis=0), backend.attention(q, k, v, **options), atol=1e-14)


def test_unseen_keys_weigh_exactly_nothing(rng, backend):
    q, k = rng.standard_normal((1, 2, 40, 16)).astype(np.float32), rng.standard_normal((1, 2, 70, 16)).astype(np.float32)
    k[:, :, 60:] = np.nan
    options = {"kv_lens": np.int32([60]), "window": (5, 5)}
    p = backend.attention_weights(q, k, rows=range(40), **options)
    seen = reference.visible(40, 60, window=(5, 5))
    assert ((p[0, 0, :, :60] > 0) == seen).all() and (p[..., 60:] == 0).all()
    assert (backend.attention_weights(q, k, reduce="keys", **options)[..., 60:] == 0).all()
