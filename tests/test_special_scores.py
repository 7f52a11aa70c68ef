"""Sinks and biases that are infinite or NaN: the same in every kernel, and as the equations say.

A sink of +inf has all of the weight: out 0, lse +inf, no gradient but dsink, which is the sum of dlse. A sink of -inf is none,
NaN makes the rows of its head NaN. A bias of +inf or NaN makes its row NaN, whatever the sink, and no other one.
"""

import numpy as np
import pytest

import flashgqa
from flashgqa import reference

INF, NAN = np.inf, np.nan
SHAPES = {"few rows": (3, 40, 16), "rows": (150, 200, 64), "no keys": (5, 0, 16)}
OPTIONS = {
    "plain": lambda rng, sq, sk: {},
    "causal": lambda rng, sq, sk: {"causal": True},
    "mask": lambda rng, sq, sk: {"mask": rng.random((2, 1, sq, sk)) < 0.5},
    "softcap": lambda rng, sq, sk: {"softcap": 2.0, "alibi_slopes": np.array([0.1, 0, 0.2, 0.3], np.float32)},
    "bias": lambda rng, sq, sk: {"bias": rng.standard_normal((1, 4, sq, sk)).astype(np.float32)},
    "lengths": lambda rng, sq, sk: {"q_lens": np.array([sq, sq // 2], np.int32), "kv_lens": np.array([0, sk // 2], np.int32)},
}  # fmt: skip


def tensors(rng, sq, sk, d, dtype=np.float32):
    return [rng.standard_normal((2, h, s, d)).astype(dtype) for h, s in ((4, sq), (2, sk), (2, sk), (4, sq))]


def results(module, arrays, options, dlse):
    """out, lse and all gradients."""
    q, k, v, dout = arrays
    out, lse = module.attention(q, k, v, **options, return_lse=True)
    return [out, lse, *module.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)]


def check(backend, arrays, options, dlse):
    """What is not finite is the same as in the oracle, all else near it."""
    got = results(backend, arrays, options, dlse)
    atol = 2e-2 if arrays[0].dtype == np.float16 else 2e-4
    exact = results(reference, [x.astype(np.float64) for x in arrays], options, dlse)
    for name, x, want in zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsink"), got, exact, strict=True):
        assert (x is None) == (want is None), name
        if x is not None:
            np.testing.assert_allclose(np.asarray(x, np.float64), want, rtol=1e-3, atol=atol, err_msg=name)
    return got


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_sinks(dtype, how, shape, rng, backend):
    sq, sk, d = SHAPES[shape]
    arrays = tensors(rng, sq, sk, d, dtype)
    dlse = rng.integers(-4, 5, (2, 4, sq)).astype(np.float32)
    options = OPTIONS[how](rng, sq, sk) | {"sink": np.array([INF, 0.5, -INF, NAN], np.float32)}
    out, lse, dq, _, _, dbias, dsink = check(backend, arrays, options, dlse)
    rows = options.get("q_lens", (sq, sq))
    for n in range(2):
        assert (out[n, 0] == 0).all() and (dq[n, 0] == 0).all()
        assert (lse[n, 0, : rows[n]] == INF).all() and (lse[n, :, rows[n] :] == -INF).all()
        assert np.isnan(lse[n, 3, : rows[n]]).all() and np.isnan(out[n, 3, : rows[n]]).all()
    assert how != "bias" or (dbias[:, 0] == 0).all()
    assert dsink[0] == sum(dlse[n, 0, : rows[n]].sum() for n in range(2)) and dsink[2] == 0


@pytest.mark.parametrize("shape", [(1, 9000, 128), (3, 4000, 64), (64, 5000, 128)], ids=str)
def test_sinks_where_keys_are_shared_out(shape, rng, backend):
    """Parts of a row's keys in several blocks of a GPU, or tasks of the CPU, merged behind them."""
    sq, sk, d = shape
    arrays = tensors(rng, sq, sk, d, np.float16)
    check(backend, arrays, {"sink": np.array([INF, 0.5, -INF, NAN], np.float32)}, np.ones((2, 4, sq), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [INF, NAN], ids=str)
@pytest.mark.parametrize("sink", [None, INF, 0.5], ids=str)
@pytest.mark.parametrize("shape", ["few rows", "rows"])
def test_a_bias_that_is_not_finite_makes_its_row_nan(shape, sink, value, dtype, rng, backend):
    sq, sk, d = SHAPES[shape]
    arrays = tensors(rng, sq, sk, d, dtype)
    bias = rng.standard_normal((2, 4, sq, sk)).astype(np.float32)
    bias[1, 2, 1, sk // 2] = value
    options = {"bias": bias} | ({} if sink is None else {"sink": np.full(4, sink, np.float32)})
    out, lse, dq, dk, dv, _, _ = check(backend, arrays, options, np.ones((2, 4, sq), np.float32))
    poisoned = np.zeros((2, 4, sq), bool)
    poisoned[1, 2, 1] = True
    assert (np.isnan(lse) == poisoned).all()
    assert all((np.isnan(x) == poisoned[..., None]).all() for x in (out, dq))
    of_head = np.zeros((2, 2), bool)
    of_head[1, 1] = True
    assert all((np.isnan(x) == of_head[..., None, None]).all() for x in (dk, dv))


@pytest.mark.parametrize("how", ["rows", "keys"])
def test_weights_beside_sinks(how, rng, backend):
    q, k, _, _ = tensors(rng, 20, 30, 16)
    which = {"rows": [0, 7, 19]} if how == "rows" else {"reduce": "keys"}
    options = {"sink": np.array([INF, 0.5, -INF, NAN], np.float32), **which}
    got = backend.attention_weights(q, k, **options)
    assert (got[:, 0] == 0).all() and np.isnan(got[:, 3]).all()
    np.testing.assert_allclose(got, reference.attention_weights(q, k, **options), rtol=1e-5, atol=1e-6)


def test_merged_parts_of_which_one_has_an_infinite_sink(rng):
    q, k, v, _ = tensors(rng, 6, 40, 16)
    sink = np.array([INF, 0.5, -INF, 2.0], np.float32)
    halves = [k[:, :, :20], v[:, :, :20]], [k[:, :, 20:], v[:, :, 20:]]
    for module in (flashgqa, reference):
        parts = [module.attention(q, *half, sink=s, return_lse=True) for half, s in zip(halves, (sink, None), strict=True)]
        out, lse = module.merge(*zip(*parts, strict=True))
        assert (out[:, 0] == 0).all() and (lse[:, 0] == INF).all()
        want = reference.attention(q, k, v, sink=sink, return_lse=True)
        np.testing.assert_allclose(out, want[0], atol=1e-5)
        np.testing.assert_allclose(lse[:, 1:], want[1][:, 1:], rtol=1e-5)


def test_gradients_of_parts_of_which_one_has_an_infinite_sink():
    torch = pytest.importorskip("torch")
    import flashgqa.torch as fg

    q, k, v = (torch.randn(1, h, s, 16, requires_grad=True) for h, s in ((2, 5), (1, 30), (1, 30)))
    sink = torch.tensor([torch.inf, 0.5], requires_grad=True)
    first = fg.attention(q, k[:, :, :12], v[:, :, :12], sink=sink, return_lse=True)
    out, lse = fg.merge(*zip(first, fg.attention(q, k[:, :, 12:], v[:, :, 12:], return_lse=True), strict=True))
    assert (out[:, 0] == 0).all() and (lse[:, 0] == torch.inf).all()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), (q, k, v, sink), (dout, dlse))
    whole = fg.attention(q, k, v, sink=sink, return_lse=True)
    for x, y in zip(got, torch.autograd.grad(whole, (q, k, v, sink), (dout, dlse)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
