"""attention_backward against the oracle under the error rule, and exactly where the right answer is exact."""

import numpy as np
import pytest
from cases import EDGES, FLOATS, SMOKE, SWEEP, Case, built, gradients
from checking import DTYPES, assert_within, memory_bytes, same_bits
from test_forward import far_strides, sparse

from flashgqa import reference


def check_backward(case, backend):
    call, _ = built(case)
    answer = gradients(case)
    out, lse = backend.attention(*call.inputs, **call.options, return_lse=True)
    arrays = [call.dout, *call.inputs, call.dlse, out, lse, *(x for x in call.options.values() if isinstance(x, np.ndarray))]
    before = memory_bytes(*arrays)
    got = backend.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **call.options)
    assert memory_bytes(*arrays) == before, "an input was written"
    originals = {"dq": call.q, "dk": call.k, "dv": call.v, "dbias": call.options.get("bias"), "dsink": call.options.get("sink")}
    for name, original in originals.items():
        gradient = getattr(got, name)
        if original is None:
            assert gradient is None
            continue
        assert gradient.dtype == original.dtype, name
        naive = (getattr(result, name) for result in answer.naive)
        assert_within(name, gradient, getattr(answer.exact, name), naive, original.dtype, 3)


@pytest.mark.parametrize("case", SMOKE + EDGES, ids=str)
def test_backward_within_the_error_rule(case, backend):
    check_backward(case, backend)


# A bias of every row and key: its gradient is dS itself, summed where the batch shares it. With padding, unseen keys, several
# blocks of keys.
OWN_BIAS = [
    Case(b=2, hq=4, hk=2, sq=45, sk=150, bias="bhqk", causal=True, q_lens=(45, 20), kv_lens=(140, 150), dtype="bfloat16"),
    Case(b=2, hq=4, hk=2, sq=45, sk=150, bias="bhqk", window=(30, 5), mask="b11k", dropout=0.3, dtype="bfloat16", layout="bshd"),
    Case(b=3, hq=16, hk=8, sq=37, sk=140, bias="1hqk", q_lens=(5, 37, 20), kv_lens=(140, 70, 0)),
    Case(b=2, hq=8, hk=8, sq=130, sk=33, bias="1hqk", mask="b1qk", dropout=0.3, dtype="float64"),
    Case(b=2, hq=8, hk=8, sq=20, sk=33, bias="1hqk", dtype="bfloat16"),
    Case(hq=8, hk=8, packed=((20, 33), (0, 5), (41, 140)), bounds=True, bias="1hqk", causal=True),
    Case(hq=4, hk=2, packed=((20, 33), (0, 5), (41, 140)), bias="bhqk", alibi="h"),
    Case(b=2, hq=8, hk=8, sq=20, sk=33, bias="1hqk", bias_dtype="float32", dtype="float16"),
    Case(bias="bhqk", bias_dtype="float32", dtype="bfloat16", data="shift", sink=True, softcap=30.0),
    Case(b=2, hq=8, hk=8, sq=20, sk=33, bias="bhqk", softcap=5.0),
    Case(b=5, hq=4, hk=2, sq=37, sk=140, bias="1hqk", q_lens=(5, 37, 0, 20, 36), kv_lens=(140, 70, 9, 0, 140)),
    Case(b=5, hq=4, hk=2, sq=37, sk=140, bias="1hqk", kv_lens=(140, 70, 9, 0, 140), dtype="bfloat16", layout="bshd"),
    Case(b=3, hq=4, hk=2, sq=45, sk=150, bias="b1qk", causal=True, dropout=0.3, dtype="bfloat16"),
    Case(b=3, hq=4, hk=4, sq=45, sk=50, bias="11qk", mask="b11k", dtype="float16"),
    Case(hq=4, hk=2, packed=((20, 33), (0, 5), (41, 140)), bias="11qk", dtype="bfloat16"),
]


@pytest.mark.parametrize("case", OWN_BIAS, ids=str)
def test_gradient_of_a_bias_of_every_row_and_key(case, backend):
    check_backward(case, backend)


@pytest.mark.sweep
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_backward_of_combined_options_within_the_error_rule(case, backend):
    check_backward(case, backend)


@pytest.mark.parametrize("dtype", FLOATS)
def test_saved_results_of_the_whole_give_the_gradients_of_a_part(dtype, rng, backend):
    """out and lse of all keys with some of the keys: what context parallelism does. Parts add up to the whole."""
    q, dout = (rng.standard_normal((2, 4, 40, 16)).astype(DTYPES[dtype]) for _ in range(2))
    k, v = (rng.standard_normal((2, 2, 70, 16)).astype(DTYPES[dtype]) for _ in range(2))
    out, lse = backend.attention(q, k, v, return_lse=True)
    whole = backend.attention_backward(dout, q, k, v, out, lse)
    parts = [backend.attention_backward(dout, q, k[:, :, s], v[:, :, s], out, lse) for s in (slice(0, 33), slice(33, 70))]
    tolerance = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    wide = [[x.astype(np.float64) for x in g[:3]] for g in (whole, *parts)]
    np.testing.assert_allclose(wide[1][0] + wide[2][0], wide[0][0], rtol=0, atol=tolerance)
    for n in (1, 2):
        np.testing.assert_allclose(np.concatenate([wide[1][n], wide[2][n]], axis=2), wide[0][n], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_where_one_number_cannot_hold_the_lse(dtype, backend):
    """Scores so large that exp(x - lse) is right only if max and sum are known apart, which a part of the keys does not."""
    size = DTYPES[dtype].type({"float32": 2.0**10, "float64": 2.0**23}[dtype])
    q = np.full((1, 2, 3, 4), size)
    k = size * np.array([1, 0.5, 1, 0.25], DTYPES[dtype])[None, None, :, None] * np.ones((1, 1, 1, 4), DTYPES[dtype])
    v = np.arange(16, dtype=DTYPES[dtype]).reshape(1, 1, 4, 4)
    q[:, :, 1] *= DTYPES[dtype].type(1e-6) / size  # its neighbours are rows of ordinary size
    dout = np.ones((1, 2, 3, 4), DTYPES[dtype])
    out, lse = backend.attention(q, k, v, scale=1.0, return_lse=True)
    whole = backend.attention_backward(dout, q, k, v, out, lse, scale=1.0).dv
    expected = reference.attention_backward(*(x.astype(np.longdouble) for x in (dout, q, k, v)), scale=1.0).dv
    np.testing.assert_allclose(whole, expected, rtol=1e-4)
    for part in (slice(0, 1), slice(1, 2), slice(3, 4)):
        dv = backend.attention_backward(dout, q, k[:, :, part], v[:, :, part], out, lse, scale=1.0).dv
        # Of the keys that share the largest score a part has all or nothing, as far as its lse tells.
        assert ((dv >= expected[:, :, part] * 0.999) & (dv <= expected[:, :, part] * 2.001)).all(), part


def test_gradients_that_no_input_asks_for_are_none(rng, backend):
    q, k, v = (rng.standard_normal((2, 5, 8)) for _ in range(3))
    out, lse = backend.attention(q, k, v, return_lse=True)
    got = backend.attention_backward(out, q, k, v, out, lse)
    assert got.dbias is None and got.dsink is None
    assert [x.shape for x in got[:3]] == [(2, 5, 8)] * 3


@far_strides
def test_elements_more_than_2_31_apart(strides, rng, backend):
    """All inputs span more than 2^31 elements; float16 and strides in elements, as in the forward test."""
    b, h, s, d = 2, 3, 5, 24
    q, k, v, dout = (rng.standard_normal((b, h, s, d)).astype(np.float16) for _ in range(4))
    bias = rng.standard_normal((b, h, s, s)).astype(np.float16)
    out, lse = backend.attention(q, k, v, bias=bias, return_lse=True)
    far = []
    for x in (dout, q, k, v, out, bias):
        far.append(sparse(x.shape, strides, np.float16))
        far[-1][...] = x
    far_lse = sparse(lse.shape, strides[:3], np.float32)
    far_lse[...] = lse
    expected = backend.attention_backward(dout, q, k, v, out, lse, bias=bias, dlse=lse)
    got = backend.attention_backward(*far[:5], far_lse, bias=far[5], dlse=far_lse)
    assert all(same_bits(a, b) for a, b in zip(got[:4], expected[:4], strict=True))
