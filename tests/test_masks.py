"""Which keys a row sees, exactly; and that what it does not see cannot reach it."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import FLOATS, Case, built
from checking import DTYPES, same_bits

from flashgqa import reference

RULES = [
    {"causal": causal, "window": window, "chunk": chunk, "align": align}
    for causal, window, chunk, align in itertools.product(
        (False, True),
        (None, (0, None), (None, 0), (0, 0), (2, 1), (33, 70), (None, 5)),
        (None, 1, 7, 32),
        ("bottom-right", "top-left"),
    )
]


def rule_id(rule):
    return "-".join(f"{name}={value}".replace(" ", "") for name, value in rule.items() if value)


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
def test_seen_keys_are_those_of_the_definition(rule, rng, backend):
    """With the identity as V, out[i, j] is the weight of key j: positive if seen, else exactly 0. Backward likewise."""
    for sq, sk in ((1, 1), (1, 40), (40, 1), (9, 9), (33, 70), (70, 33), (130, 131)):
        q = rng.standard_normal((1, sq, 8)).astype(np.float32)
        k = rng.standard_normal((1, sk, 8)).astype(np.float32)
        v = np.eye(sk, dtype=np.float32)[None]
        seen = reference.visible(sq, sk, **rule)
        out, lse = backend.attention(q, k, v, **rule, return_lse=True)
        assert ((out[0] > 0) == seen).all(), (sq, sk)
        assert ((lse[0] == -np.inf) == ~seen.any(axis=1)).all(), (sq, sk)
        np.testing.assert_allclose(out[0].sum(axis=1), seen.any(axis=1), rtol=1e-5)
        v = rng.standard_normal((1, sk, sq)).astype(np.float32)
        out, lse = backend.attention(q, k, v, **rule, return_lse=True)
        dv = backend.attention_backward(np.eye(sq, dtype=np.float32)[None], q, k, v, out, lse, **rule).dv
        assert ((dv[0].T > 0) == seen).all(), (sq, sk)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", RULES[::5], ids=rule_id)
def test_gradients_of_integers_are_exact(rule, dtype, rng, backend):
    """q and k are orthogonal and the lse handed over is 0, so that every weight is 1 and all sums are of small integers."""
    sq, sk, g = 37, 29, 3
    integers = [rng.integers(-1, 2, (2, h, s, 10)) for h, s in ((2 * g, sq), (2, sk), (2, sk), (2 * g, sq), (2 * g, sq))]
    q, k, v, dout, out = (x.astype(DTYPES[dtype]) for x in integers)
    q[..., 5:] = 0
    k[..., :5] = 0
    lse = np.zeros((2, 2 * g, sq), np.float64 if dtype == "float64" else np.float32)
    mask = rng.random((2, 1, sq, sk)) < 0.8
    options = {"scale": 1.0, "mask": mask, **rule}
    bias = np.zeros((1, 2 * g, 1, sk), DTYPES[dtype])
    expected = reference.attention_backward(dout, q, k, v, out, lse, bias=bias, **options)
    got = backend.attention_backward(dout, q, k, v, out, lse, bias=bias, **options)
    for name in ("dq", "dk", "dv", "dbias"):
        assert np.abs(getattr(expected, name)).max() > 0, name
        exact = getattr(expected, name).astype(DTYPES[dtype])
        np.testing.assert_array_equal(getattr(got, name).astype(np.float64), exact.astype(np.float64), name)


# ---- rows that see nothing ----

NOTHING_SEEN = {
    "mask": lambda sq, sk: {"mask": np.zeros((sq, sk), bool)},
    "mask_of_padding": lambda sq, sk: {"mask": np.zeros((2, 1, 1, sk), bool)},
    "bias": lambda sq, sk: {"bias": np.full((1, 1, sq, sk), -np.inf, np.float32)},
    "kv_lens": lambda sq, sk: {"kv_lens": np.zeros(2, np.int32)},
    "mask_and_window": lambda sq, sk: {"window": (0, 0), "mask": ~reference.visible(sq, sk, window=(0, 0))},
}


@pytest.mark.parametrize("how", NOTHING_SEEN)
@pytest.mark.parametrize("sink", [False, True])
def test_row_that_sees_nothing_is_zero_with_lse_of_the_sink(how, sink, rng, backend):
    sq, sk = 5, 40
    q, dout = (rng.standard_normal((2, 4, sq, 16)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((2, 2, sk, 16)).astype(np.float32) for _ in range(2))
    options = NOTHING_SEEN[how](sq, sk)
    if sink:
        options["sink"] = rng.standard_normal(4).astype(np.float32)
    out, lse = backend.attention(q, k, v, **options, return_lse=True)
    assert (out == 0).all()
    expected = np.broadcast_to(options["sink"][:, None] if sink else -np.inf, lse.shape)
    np.testing.assert_allclose(lse, expected, rtol=3e-7)
    dlse = rng.integers(-4, 5, lse.shape).astype(np.float32)
    got = backend.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    assert all((x == 0).all() for x in (got.dq, got.dk, got.dv))
    assert got.dbias is None or (got.dbias == 0).all()
    if sink:
        np.testing.assert_allclose(got.dsink, dlse.sum(axis=(0, 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", NOTHING_SEEN)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_poison_in_dout_of_rows_that_see_nothing_reaches_no_gradient(dtype, poison, how, rng, backend):
    """dsink is the only one that such rows have, of dlse alone. Their out is 0, of which a norm's gradient is NaN."""
    sq, sk, dtype = 5, 40, DTYPES[dtype]
    q, k, v, dout = (rng.standard_normal((2, heads, n, 16)).astype(dtype) for heads, n in ((4, sq), (2, sk), (2, sk), (4, sq)))
    options = NOTHING_SEEN[how](sq, sk) | {"sink": rng.standard_normal(4).astype(dtype)}
    out, lse = backend.attention(q, k, v, **options, return_lse=True)
    dlse = rng.integers(-4, 5, lse.shape).astype(lse.dtype)
    results = []
    for value in (0, poison):
        dout[:, 1::2, 2:] = value
        results.append(backend.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options))
    for name, clean, poisoned in zip(results[0]._fields, *results, strict=True):
        assert clean is None or same_bits(clean, poisoned), name
    oracle = reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
    np.testing.assert_allclose(results[1].dsink.astype(np.float64), oracle.dsink, rtol=1e-6)


@pytest.mark.parametrize("sq, sk", [(40, 7), (129, 1), (3, 0)])
def test_causal_rows_before_the_first_key_see_nothing(sq, sk, rng, backend):
    q, dout = (rng.standard_normal((1, 2, sq, 8)) for _ in range(2))
    k, v = (rng.standard_normal((1, 2, sk, 8)) for _ in range(2))
    out, lse = backend.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, : sq - sk] == 0).all() and (lse[:, :, : sq - sk] == -np.inf).all()
    assert np.isfinite(lse[:, :, sq - sk :]).all()
    got = backend.attention_backward(dout, q, k, v, out, lse, causal=True)
    assert (got.dq[:, :, : sq - sk] == 0).all() and all(np.isfinite(x).all() for x in got[:3])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_padded_rows_are_zero_with_lse_minus_infinity_even_with_a_sink(layout, rng, backend):
    case = Case(b=3, layout=layout, q_lens=(0, 20, 33), kv_lens=(33, 0, 10), sink=True)
    call, _ = built(case)
    out, lse = backend.attention(*call.inputs, **call.options, return_lse=True)
    got = backend.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **call.options)
    bhsd = [x if layout == "bhsd" else x.swapaxes(1, 2) for x in (out, got.dq, got.dk, got.dv)]
    for n, (rows, keys) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        assert (lse[n, :, rows:] == -np.inf).all() and np.isfinite(lse[n, :, :rows]).all()
        assert (bhsd[0][n, :, rows:] == 0).all() and (bhsd[1][n, :, rows:] == 0).all()
        assert (bhsd[2][n, :, keys:] == 0).all() and (bhsd[3][n, :, keys:] == 0).all()


# ---- poison ----


def hide(how, sq, sk, dtype):
    """Options that hide some keys from all rows, and which ones."""
    hidden = np.zeros(sk, bool)
    if how == "kv_lens":
        hidden[sk - 9 :] = True
        return {"kv_lens": np.array([sk - 9] * 2, np.int32)}, hidden
    if how == "window":
        hidden[: sk - sq - 3] = True
        return {"window": (3, None)}, hidden
    if how == "top-left causal":
        hidden[sq:] = True
        return {"causal": True, "align": "top-left"}, hidden
    hidden[[0, 17, 18, sk - 1]] = True
    if how == "mask":
        return {"mask": np.broadcast_to(~hidden, (sq, sk))}, hidden
    return {"bias": np.where(hidden, -np.inf, np.linspace(-1, 1, sk)).astype(dtype)[None, None, None]}, hidden


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", ["mask", "bias", "kv_lens", "window", "top-left causal"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sq", [21, 25])  # 25: two packed rows are left over by panels of 24 and 48
def test_poison_in_unseen_keys_changes_no_bit(sq, how, poison, dtype, rng, backend):
    sk = 150
    q, dout = (rng.standard_normal((2, 4, sq, 24)).astype(DTYPES[dtype]) for _ in range(2))
    k, v = (rng.standard_normal((2, 2, sk, 24)).astype(DTYPES[dtype]) for _ in range(2))
    options, hidden = hide(how, sq, sk, DTYPES[dtype])
    results = []
    for value in (0, poison):
        k[:, :, hidden] = value
        v[:, :, hidden] = value
        out, lse = backend.attention(q, k, v, **options, return_lse=True)
        results.append((out, lse, *backend.attention_backward(dout, q, k, v, out, lse, **options)))
    for name, clean, poisoned in zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsink"), *results, strict=True):
        assert same_bits(clean, poisoned), name
        assert clean is None or np.isfinite(clean.astype(np.float64)).all(), name
    assert (results[0][3][:, :, hidden] == 0).all() and (results[0][4][:, :, hidden] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bias_of_nan_or_plus_infinity_poisons_its_row_only(value, rng, backend):
    sq, sk = 20, 140
    q, dout = (rng.standard_normal((1, 2, sq, 16)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((1, 1, sk, 16)).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal((1, 2, sq, sk)).astype(np.float32)
    clean = backend.attention(q, k, v, bias=bias, return_lse=True)
    bias[0, 1, 7, 130] = value
    out, lse = backend.attention(q, k, v, bias=bias, return_lse=True)
    assert np.isnan(out[0, 1, 7]).all() and not np.isfinite(lse[0, 1, 7])
    dq = backend.attention_backward(dout, q, k, v, out, lse, bias=bias).dq
    assert np.isnan(dq[0, 1, 7]).all()
    others = np.ones((1, 2, sq), bool)
    others[0, 1, 7] = False
    assert same_bits(out[others], clean[0][others]) and same_bits(lse[others], clean[1][others])
    assert np.isfinite(dq[others]).all()


def test_nan_key_poisons_the_rows_that_see_it_only(rng, backend):
    q, k, v = (rng.standard_normal((1, 1, 80, 16)).astype(np.float32) for _ in range(3))
    clean = backend.attention(q, k, v, causal=True)
    k[0, 0, 50] = np.nan
    out = backend.attention(q, k, v, causal=True)
    assert same_bits(out[:, :, :50], clean[:, :, :50]) and np.isnan(out[:, :, 50:]).all()
    bias = np.zeros((80, 80), np.float32)
    bias[60, 50] = -np.inf
    out = backend.attention(q, k, v, causal=True, bias=bias)
    assert np.isfinite(out[:, :, 60]).all() and np.isnan(out[:, :, [59, 61]]).all()


def test_nan_in_one_row_or_sequence_stays_there(rng, backend):
    q, k, v = (rng.standard_normal((3, 2, 40, 16)).astype(np.float32) for _ in range(3))
    clean = backend.attention(q, k, v)
    q[1, 1, 7] = np.nan
    k[2, 0] = np.nan
    out = backend.attention(q, k, v)
    poisoned = np.zeros((3, 2, 40), bool)
    poisoned[1, 1, 7] = poisoned[2, 0] = True
    assert np.isnan(out[poisoned]).all() and same_bits(out[~poisoned], clean[~poisoned])


def nothing_seen(how, sq, sk):
    """Options with which some rows see no key, and which ones."""
    if how.startswith("causal"):
        sink = {"sink": np.linspace(-1, 1, 4).astype(np.float32)} if "sink" in how else {}
        return {"causal": True, **sink}, np.arange(sq - sk)
    rows = np.array([0, 17, 18, sq - 1])
    mask = np.ones((sq, sk), bool)
    mask[rows] = False
    return {"mask": mask, "softcap": 3.0} if "softcap" in how else {"mask": mask}, rows


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", ["causal", "causal sink", "mask", "mask softcap"])
@pytest.mark.parametrize("where", ["q", "dout"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_rows_that_see_nothing_reaches_no_key(poison, where, how, dtype, rng, backend):
    sq, sk = 150, 90
    q, dout = (rng.standard_normal((2, 4, sq, 24)).astype(DTYPES[dtype]) for _ in range(2))
    k, v = (rng.standard_normal((2, 2, sk, 24)).astype(DTYPES[dtype]) for _ in range(2))
    options, rows = nothing_seen(how, sq, sk)
    results = []
    for value in (0, poison):
        (q if where == "q" else dout)[:, :, rows] = value
        out, lse = backend.attention(q, k, v, **options, return_lse=True)
        results.append(backend.attention_backward(dout, q, k, v, out, lse, **options))
    for name, clean, poisoned in zip(("dq", "dk", "dv"), *(r[:3] for r in results), strict=True):
        assert same_bits(clean, poisoned), name
        assert np.isfinite(clean.astype(np.float64)).all(), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("where", ["q", "dout"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_a_row_reaches_the_keys_it_sees_only(poison, where, dtype, rng, backend):
    q, k, v, dout = (rng.standard_normal((1, 2, 150, 24)).astype(DTYPES[dtype]) for _ in range(4))
    results = []
    for value in (0, poison):
        (q if where == "q" else dout)[0, 1, 40, 3] = value
        out, lse = backend.attention(q, k, v, causal=True, return_lse=True)
        results.append(backend.attention_backward(dout, q, k, v, out, lse, causal=True))
    for name, clean, poisoned in zip(("dq", "dk", "dv"), *(r[:3] for r in results), strict=True):
        hit = np.zeros((1, 2, 150), bool)
        hit[0, 1, 40 if name == "dq" else slice(0, 41)] = True
        assert same_bits(clean[~hit], poisoned[~hit]), name
        assert not np.isfinite(poisoned[hit].astype(np.float64)).all(), name
    dv = results[1].dv[0, 1, :41].astype(np.float64)
    if where == "dout":      # its element stays in its column
        assert not np.isfinite(dv[:, 3]).any() and np.isfinite(np.delete(dv, 3, axis=1)).all()


INFINITE = {                # tensor, head, row, column, value
    "k": [("k", 1, 70, 5, np.inf), ("k", 0, 3, 7, -np.inf)],
    "q": [("q", 1, 60, 5, np.inf), ("q", 3, 97, 7, -np.inf)],
    "q and k": [("q", 1, 60, 5, np.inf), ("k", 0, 50, 6, np.inf)],
    "k and NaN": [("k", 1, 70, 5, np.inf), ("q", 3, 80, 5, np.nan)],
    "q and dout": [("q", 2, 60, 5, -np.inf), ("dout", 2, 70, 3, np.inf)],
    "k and v": [("k", 1, 30, 5, -np.inf), ("v", 1, 90, 3, np.inf)],
}
AROUND = {
    "full": lambda rng: {},
    "causal": lambda rng: {"causal": True},
    "window": lambda rng: {"window": (30, 9)},
    "mask": lambda rng: {"mask": rng.random((99, 130)) < 0.8, "causal": True},
    "sink": lambda rng: {"sink": np.ones(4, np.float32)},
    "bias": lambda rng: {"bias": np.where(rng.random((1, 4, 99, 130)) < 0.9, 0.5, -np.inf).astype(np.float32)},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("how", INFINITE)
def test_infinite_scores_under_a_soft_cap(how, around, dtype, rng, backend):
    """They are the cap: their weights are finite, and their gradients are 0, which times what is infinite is NaN."""
    q, dout = (rng.standard_normal((1, 4, 99, 24)).astype(DTYPES[dtype]) for _ in range(2))
    k, v = (rng.standard_normal((1, 2, 130, 24)).astype(DTYPES[dtype]) for _ in range(2))
    options = {"softcap": 3.0, **AROUND[around](rng)}
    for which, head, row, column, value in INFINITE[how]:
        {"q": q, "k": k, "v": v, "dout": dout}[which][0, head, row, column] = value
    out, lse = backend.attention(q, k, v, **options, return_lse=True)
    got = out, lse, *backend.attention_backward(dout, q, k, v, out, lse, **options)[:3]
    expected = *reference.attention(q, k, v, **options, return_lse=True), *reference.attention_backward(dout, q, k, v, **options)
    for name, x, want in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=False):
        x, finite = x.astype(np.float64), np.isfinite(want)
        assert (np.isfinite(x) == finite).all(), name
        bound = max(8 * float(ml_dtypes.finfo(DTYPES[dtype]).eps), 1e-12 if dtype == "float64" else 1e-5)
        assert np.abs(x[finite] - want[finite]).max() <= bound * np.abs(want[finite]).max(), name


# ---- empty ----


@pytest.mark.parametrize("b, sq, sk", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_empty_tensors(b, sq, sk, layout, backend):
    q, k, v = np.ones((b, 4, sq, 8)), np.ones((b, 2, sk, 8)), np.ones((b, 2, sk, 3))
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bshd" else x for x in (q, k, v))
    out, lse = backend.attention(q, k, v, layout=layout, return_lse=True)
    assert out.shape == (*q.shape[:-1], 3) and lse.shape == (b, 4, sq)
    assert (out == 0).all() and (lse == -np.inf).all()
    got = backend.attention_backward(np.ones_like(out), q, k, v, out, lse, layout=layout)
    for gradient, x in zip(got[:3], (q, k, v), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_zero_length_sequences_change_no_bit_of_the_others(backend):
    """Sequences without rows or keys at the start, in the middle and at the end, against the same tensors without them."""
    call, _ = built(Case(packed=((0, 4), (7, 7), (0, 0), (30, 55), (5, 0), (0, 0)), causal=True, d=24))
    own_keys = slice(4, 4 + 7 + 55)
    results = []
    for keys, cu in (
        (slice(None), {}),
        (own_keys, {"cu_seqlens_q": np.int32([0, 7, 37, 42]), "cu_seqlens_kv": np.int32([0, 7, 62, 62])}),
    ):
        options = call.options | cu
        k, v = call.k[keys], call.v[keys]
        out, lse = backend.attention(call.q, k, v, **options, return_lse=True)
        got = backend.attention_backward(call.dout, call.q, k, v, out, lse, **options)
        results.append((out, lse, got.dq, got.dk, got.dv))
    (out, lse, dq, dk, dv), short = results
    dk_dv = [x[own_keys] for x in (dk, dv)]
    assert all(same_bits(a, b) for a, b in zip((out, lse, dq, *dk_dv), short, strict=True))
    assert (dk[:4] == 0).all() and (dv[:4] == 0).all()
    assert (out[37:] == 0).all() and (lse[:, 37:] == -np.inf).all() and (dq[37:] == 0).all()


# ---- masks written as very low biases ----


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("lowest", [1.0, 0.5])
def test_keys_with_the_lowest_float_as_bias_weigh_nothing(dtype, lowest, rng, backend):
    """As many models mask. A row that sees another key ignores them; one whose keys all carry it weighs all alike."""
    sq, sk = 20, 64
    q, dout = (rng.standard_normal((1, 2, sq, 16)).astype(DTYPES[dtype]) for _ in range(2))
    k, v = (rng.standard_normal((1, 2, sk, 16)).astype(DTYPES[dtype]) for _ in range(2))
    mask = rng.random((sq, sk)) < 0.5
    mask[3] = mask[11] = False
    low = lowest * float(ml_dtypes.finfo(DTYPES[dtype]).min)
    bias = np.where(mask, 0, low).astype(DTYPES[dtype])
    some = mask.any(axis=1)
    out, lse = backend.attention(q, k, v, bias=bias, return_lse=True)
    by_mask = backend.attention(q, k, v, mask=mask)
    wide = out.astype(np.float64)
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(wide[:, :, some], by_mask.astype(np.float64)[:, :, some], rtol=0, atol=tolerance)
    mean = v.astype(np.float64).mean(axis=2, keepdims=True)
    np.testing.assert_allclose(wide[:, :, ~some], np.repeat(mean, 2, axis=2), rtol=0, atol=tolerance)
    got = backend.attention_backward(dout, q, k, v, out, lse, bias=bias)
    wide_inputs = [x.astype(np.float64) for x in (dout, q, k, v)]
    expected = reference.attention_backward(*wide_inputs, mask=mask)
    # What the rows that see nothing add under the bias: weights 1/sk each.
    alike = reference.attention_backward(wide_inputs[0][:, :, ~some], wide_inputs[1][:, :, ~some] * 0, *wide_inputs[2:])
    np.testing.assert_allclose(got.dv.astype(np.float64), expected.dv + alike.dv, rtol=0, atol=50 * tolerance)
    np.testing.assert_allclose(got.dq.astype(np.float64)[:, :, some], expected.dq[:, :, some], rtol=0, atol=50 * tolerance)
    np.testing.assert_allclose(got.dq.astype(np.float64)[:, :, ~some], alike.dq, rtol=0, atol=50 * tolerance)
