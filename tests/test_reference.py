"""The oracle, tested by itself: known answers, finite differences of every gradient, and PyTorch where it has the option."""

import numpy as np
import pytest

from flashgqa import reference

RNG = np.random.default_rng(7)


def randn(*shape):
    return RNG.standard_normal(shape)


def plain_loop(q, k, v):
    """The textbook, for [h, s, d]: no options."""
    g = q.shape[0] // k.shape[0]
    out = np.empty((*q.shape[:2], v.shape[2]))
    for h in range(q.shape[0]):
        scores = q[h] @ k[h // g].T / np.sqrt(q.shape[2])
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[h] = p / p.sum(axis=1, keepdims=True) @ v[h // g]
    return out


def test_equals_the_plain_loop():
    q, k, v = randn(4, 3, 4), randn(2, 3, 4), randn(2, 3, 4)
    np.testing.assert_allclose(reference.attention(q, k, v), plain_loop(q, k, v), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "key, counter, expected",
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    assert tuple(reference.philox4x32(key, np.array(counter, np.uint32))) == expected


def test_dropout_mask_counts_and_indices():
    keep = reference.dropout_mask(2, 3, 40, 53, 0.3, 11)
    assert keep.shape == (2, 3, 40, 53)
    assert abs(keep.mean() - 0.7) < 0.02
    words = reference.philox4x32(11, np.array([4, 39, 1 * 3 + 2, 0], np.uint32))
    halves = [int(words[m // 2]) >> (16 * (m % 2)) & 0xFFFF for m in range(8)]
    assert [bool(x) for x in keep[1, 2, 39, 32:40]] == [x >= round(65536 * 0.3) for x in halves]
    assert (reference.dropout_mask(2, 3, 40, 20, 0.3, 11) == keep[..., :20]).all()
    assert (reference.dropout_mask(2, 3, 40, 53, 0.3, (11, 0)) == keep).all()
    assert (reference.dropout_mask(2, 3, 40, 53, 0.3, (11, 1)) != keep).any()
    assert reference.dropout_mask(1, 1, 5, 5, 0.0, 1).all() and not reference.dropout_mask(1, 1, 5, 5, 1.0, 1).any()


@pytest.mark.parametrize(
    "options, rows",
    [
        (dict(causal=True), ["110", "111"]),
        (dict(causal=True, align="top-left"), ["100", "110"]),
        (dict(window=(0, 0)), ["010", "001"]),
        (dict(window=(1, None)), ["111", "011"]),
        (dict(window=(None, 1), align="top-left"), ["110", "111"]),
        (dict(window=(1, 5), causal=True), ["110", "011"]),
        (dict(chunk=2), ["110", "001"]),
        (dict(chunk=2, align="top-left"), ["110", "110"]),
    ],
)
def test_visible_by_hand(options, rows):
    assert ["".join("01"[x] for x in row) for row in reference.visible(2, 3, **options).astype(int)] == rows


def test_rows_before_the_first_chunk_see_nothing():
    # diag = -2, -1, 0, 1: the floor of a negative diagonal is a negative chunk.
    assert reference.visible(4, 2, chunk=2).tolist() == [[False] * 2] * 2 + [[True] * 2] * 2


GRADIENT_OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "top_left": dict(causal=True, align="top-left", window=(2, None)),
    "chunk": dict(chunk=3),
    "softcap": dict(softcap=1.5, scale=0.7),
    "sink": dict(sink=randn(4)),
    "sink_and_empty_rows": dict(sink=randn(4), window=(0, 0), align="top-left"),
    "dropout": dict(dropout_p=0.4, seed=(3, 5)),
    "alibi": dict(alibi_slopes=np.float32([0.5, 0.25, 0.1, 1])),
    "bias_full": dict(bias=randn(2, 4, 5, 7)),
    "bias_head": dict(bias=randn(1, 4, 1, 7), softcap=2.0),
    "bias_rows": dict(bias=randn(5, 7)),
    "bias_scalar": dict(bias=randn(2, 1, 5, 1)),
    "mask": dict(mask=RNG.random((2, 1, 5, 7)) < 0.6),
    "lens": dict(q_lens=np.int32([3, 5]), kv_lens=np.int32([7, 2]), causal=True, sink=randn(4), bias=randn(4, 5, 7)[None]),
    "all": dict(
        causal=True, window=(3, None), softcap=3.0, bias=randn(2, 4, 1, 7), sink=randn(4), dropout_p=0.25, seed=9,
        alibi_slopes=randn(2, 4).astype(np.float32) ** 2, kv_lens=np.int32([6, 7]), mask=RNG.random((1, 4, 5, 7)) < 0.8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENT_OPTIONS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients_by_central_differences(name, layout):
    """d/dt of sum(out * dout) + sum(lse * dlse) along a random direction of each input, against the gradients."""
    options = dict(GRADIENT_OPTIONS[name], layout=layout)
    q, k, v, dout = randn(2, 4, 5, 3), randn(2, 2, 7, 3), randn(2, 2, 7, 6), randn(2, 4, 5, 6)
    if layout == "bshd":
        q, k, v, dout = (x.swapaxes(1, 2) for x in (q, k, v, dout))
    check_gradients(dict(q=q, k=k, v=v), dout, options)


def test_gradients_by_central_differences_packed():
    options = dict(cu_seqlens_q=np.int32([0, 0, 4, 9, 9]), cu_seqlens_kv=np.int32([0, 2, 2, 8, 11]), causal=True)
    options |= dict(bias=randn(4, 1, 5, 6), sink=randn(4), alibi_slopes=np.float32([1, 2, 3, 4]) / 8, dropout_p=0.3, seed=1)
    check_gradients(dict(q=randn(9, 4, 3), k=randn(11, 2, 3), v=randn(11, 2, 6)), randn(9, 4, 6), options)


def check_gradients(tensors, dout, options):
    inputs = tensors | {name: options[name] for name in ("bias", "sink") if name in options}
    fixed = {name: x for name, x in options.items() if name not in inputs}
    _, lse = reference.attention(**inputs, **fixed, return_lse=True)
    # The LSE of a row that sees nothing is the constant -inf.
    dlse = np.where(lse == -np.inf, 0, RNG.standard_normal(lse.shape))

    def loss(values):
        out, lse = reference.attention(**values, **fixed, return_lse=True)
        return (out * dout).sum() + (np.where(lse == -np.inf, 0, lse) * dlse).sum()

    gradients = reference.attention_backward(dout, **inputs, **fixed, dlse=dlse)
    for name, x in inputs.items():
        direction = RNG.standard_normal(x.shape)
        step = 1e-5
        expected = (loss(inputs | {name: x + step * direction}) - loss(inputs | {name: x - step * direction})) / (2 * step)
        gradient = getattr(gradients, "d" + name)
        assert gradient.shape == x.shape
        assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-7, abs=1e-8), name


def test_saved_out_and_lse_of_the_whole_give_the_gradients_of_a_part():
    q, k, v, dout = randn(1, 2, 5, 4), randn(1, 1, 6, 4), randn(1, 1, 6, 4), randn(1, 2, 5, 4)
    out, lse = reference.attention(q, k, v, return_lse=True)
    whole = reference.attention_backward(dout, q, k, v)
    parts = [reference.attention_backward(dout, q, k[:, :, s], v[:, :, s], out, lse) for s in (slice(0, 2), slice(2, 6))]
    np.testing.assert_allclose(sum(p.dq for p in parts), whole.dq, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([p.dk for p in parts], axis=2), whole.dk, atol=1e-13)


def test_merge_of_parts_is_the_whole():
    q, k, v = randn(2, 4, 5, 3), randn(2, 2, 9, 3), randn(2, 2, 9, 3)
    parts = [reference.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 4), slice(4, 4), slice(4, 9))]
    out, lse = reference.merge(*zip(*parts, strict=True))
    expected = reference.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, expected[0], atol=1e-14)
    np.testing.assert_allclose(lse, expected[1], atol=1e-14)


def test_weights_times_values_is_out():
    q, k, v = randn(2, 4, 5, 3), randn(2, 2, 9, 3), randn(2, 2, 9, 3)
    options = dict(causal=True, softcap=2.0, kv_lens=np.int32([9, 4]))
    p = reference.attention_weights(q, k, rows=range(5), **options)
    np.testing.assert_allclose(p @ np.repeat(v, 2, axis=1), reference.attention(q, k, v, **options), atol=1e-14)
    np.testing.assert_allclose(reference.attention_weights(q, k, reduce="keys", **options), p.sum(axis=2), atol=1e-14)


def test_unseen_poison_does_not_leak_and_bias_poisons_its_row_only():
    q, k, v, dout = randn(1, 2, 4, 3), randn(1, 1, 6, 3), randn(1, 1, 6, 3), randn(1, 2, 4, 3)
    mask = np.ones((4, 6), bool)
    mask[:, 4] = False
    clean = reference.attention_backward(dout, q, k, v, mask=mask)
    k[0, 0, 4], v[0, 0, 4] = np.nan, np.inf
    poisoned = reference.attention_backward(dout, q, k, v, mask=mask)
    for a, b in zip(clean[:3], poisoned[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    bias = np.where(mask, 0, -np.inf)
    np.testing.assert_array_equal(reference.attention(q, k, v, mask=mask), reference.attention(q, k, v, bias=bias))
    bias[2, 1] = np.inf
    bias[3, 1] = np.nan
    out, lse = reference.attention(q, k, v, bias=bias, return_lse=True)
    assert np.isnan(out[:, :, 2:]).all() and np.isfinite(out[:, :, :2]).all() and np.isfinite(lse[:, :, :2]).all()


def test_longdouble_inputs_stay_longdouble():
    q = randn(1, 1, 3, 4).astype(np.longdouble)
    assert reference.attention(q, q, q).dtype == np.longdouble
    assert reference.attention(q.astype(np.float32), q, q).dtype == np.float64


TORCH_CASES = {
    "plain": {},
    "causal": dict(causal=True, align="top-left"),
    "scale": dict(scale=0.3),
    "mask": dict(mask=RNG.random((2, 1, 6, 9)) < 0.7),
    "bias": dict(bias=randn(1, 6, 6, 9)),
}


@pytest.mark.parametrize("name", TORCH_CASES)
def test_agrees_with_torch_autograd(name):
    torch = pytest.importorskip("torch")
    options = TORCH_CASES[name]
    arrays = dict(q=randn(2, 6, 6, 5), k=randn(2, 2, 9, 5), v=randn(2, 2, 9, 4))
    dout = randn(2, 6, 6, 4)
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arrays.items()}
    bias = options.get("bias")
    attn_mask = options.get("mask") if bias is None else bias
    if attn_mask is not None:
        attn_mask = torch.tensor(attn_mask, requires_grad=bias is not None)
    out = torch.nn.functional.scaled_dot_product_attention(
        *given.values(), attn_mask=attn_mask, is_causal=options.get("causal", False), scale=options.get("scale"), enable_gqa=True
    )
    out.backward(torch.tensor(dout))
    np.testing.assert_allclose(reference.attention(**arrays, **options), out.detach().numpy(), atol=1e-12)
    gradients = reference.attention_backward(dout, **arrays, **options)
    for n, x in given.items():
        np.testing.assert_allclose(getattr(gradients, "d" + n), x.grad.numpy(), atol=1e-12)
    if bias is not None:
        np.testing.assert_allclose(gradients.dbias, attn_mask.grad.numpy(), atol=1e-12)


def test_softcap_alibi_sink_and_dropout_agree_with_torch_autograd():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(randn(2, 4, 6, 5), requires_grad=True) for _ in range(3))
    sink = torch.tensor(randn(4), requires_grad=True)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    dout, dlse = torch.tensor(randn(2, 4, 6, 5)), torch.tensor(randn(2, 4, 6))
    keep = torch.tensor(reference.dropout_mask(2, 4, 6, 6, 0.25, 42))
    i = torch.arange(6, dtype=torch.float64)
    x = 1.3 * torch.tanh(q @ k.mT / 5**0.5 / 1.3) - slopes[:, None, None] * (i[:, None] - i).abs()
    x = torch.cat([x, sink[:, None, None].expand(2, 4, 6, 1)], dim=-1)
    lse = torch.logsumexp(x, -1)
    out = (torch.softmax(x, -1)[..., :-1] * keep / 0.75) @ v
    torch.autograd.backward([out, lse], [dout, dlse])
    options = dict(softcap=1.3, alibi_slopes=slopes.numpy().astype(np.float32), dropout_p=0.25, seed=42)
    arrays = [t.detach().numpy() for t in (q, k, v)]
    gradients = reference.attention_backward(
        dout.numpy(), *arrays, dlse=dlse.numpy(), sink=sink.detach().numpy(), **options
    )
    for got, expected in zip((gradients.dq, gradients.dk, gradients.dv, gradients.dsink), (q, k, v, sink), strict=True):
        np.testing.assert_allclose(got, expected.grad.numpy(), atol=1e-12)
