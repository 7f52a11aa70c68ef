"""Keys of which several tiles are taken at once (bfloat16: spans of 256 or 512), whole and in part; no LSE is asked."""

import ml_dtypes
import numpy as np
import pytest
from checking import assert_within, naive_forward, same_bits
from conftest import cpu_isas

import flashgqa
from flashgqa import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
# hq, hk, sq, sk, d, dv: spans of 256 keys (on tiles with d + dv up to 128: 512) and panels of 32 packed rows, whole and in part.
SHAPES = [
    (1, 1, 64, 128, 64, 64),
    (4, 1, 24, 300, 128, 128),
    (2, 2, 96, 512, 40, 72),
    (8, 2, 33, 260, 16, 256),
    (3, 1, 43, 385, 200, 24),
    (2, 1, 70, 1100, 64, 64),
    (2, 2, 64, 1024, 32, 64),
    (8, 1, 80, 640, 33, 40),      # several tasks a KV head, which share their packed keys
]


def inputs(shape, rng, factor=1.0, dtype=BF16):
    hq, hk, sq, sk, d, dv = shape
    parts = (hq, sq, d, factor), (hk, sk, d, 1), (hk, sk, dv, 1)
    return [(f * rng.standard_normal((1, h, s, n))).astype(dtype) for h, s, n, f in parts]


def check(backend, q, k, v, **options):
    expected = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), **options)
    with np.errstate(all="ignore"):
        got, naive = backend.attention(q, k, v, **options), naive_forward(q, k, v, **options)
        assert_within("out", got, expected, (out for out, _ in naive), q.dtype, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("factor", [1e-3, 1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_rule(shape, factor, causal, rng, backend):
    check(backend, *inputs(shape, rng, factor), causal=causal)


def test_packed_sequences_whose_spans_are_shared(rng, backend):
    """Several tasks a KV head share the packed keys of sequences that begin and end anywhere."""
    lens = (700, 0, 513, 100, 1024)
    ends = np.cumsum((0, *lens)).astype(np.int32)
    q, k, v = (rng.standard_normal((ends[-1], h, d)).astype(BF16) for h, d in ((4, 64), (2, 64), (2, 48)))
    out = backend.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, causal=True)
    for a, e in zip(ends[:-1], ends[1:], strict=True):
        alone = [np.ascontiguousarray(x[a:e].transpose(1, 0, 2))[None] for x in (q, k, v)]
        if a < e:
            expected = reference.attention(*(x.astype(np.float64) for x in alone), causal=True)
            naive = (out for out, _ in naive_forward(*alone, causal=True))
            assert_within("out", out[a:e].transpose(1, 0, 2)[None], expected, naive, BF16, 2)


@pytest.mark.parametrize("order", ["rising", "falling", "one tall key"])
@pytest.mark.parametrize("dtype", [BF16, np.float16], ids=str)
def test_scores_that_rise_within_a_span(order, dtype, rng, backend):
    """Weights of earlier keys are scaled down when the maximum grows by more than 2^8, several times in a span of 256 keys."""
    q, k, v = inputs((2, 1, 64, 384, 32, 32), rng, 0.1, dtype)
    ramp = np.linspace(0, 600, 384) if order != "one tall key" else 600.0 * (np.arange(384) == 77)
    q[..., 0] = 1
    k[..., 0] = (ramp[::-1] if order == "falling" else ramp).astype(dtype)
    check(backend, q, k, v, scale=0.5)


def test_weights_scaled_down_keep_their_digits(rng, backend):
    """A maximum that grows by 2^9 in the middle of a span: what was before it has weight 2^-9 a key, of 64 keys."""
    q, k, v = inputs((1, 1, 32, 256, 32, 32), rng, 0.0)
    q[..., 0] = 1
    k[..., 0] = np.where(np.arange(256) == 100, 9.5, 0).astype(BF16)
    v[:, :, :64] += 50
    check(backend, q, k, v, scale=float(np.log(2)))


def test_a_row_that_sees_one_key_is_its_value(rng, backend):
    q, k, v = inputs((2, 1, 256, 256, 64, 64), rng)
    np.testing.assert_array_equal(backend.attention(q, k, v, causal=True)[:, :, 0], np.repeat(v[:, :, 0], 2, axis=1))


def test_weights_far_below_the_largest_vanish(rng, backend):
    q, k, v = inputs((1, 1, 32, 256, 32, 16), rng)
    k[:, :, :200, 0], q[..., 0] = -30000, 1
    v[:, :, :200] = 1000
    check(backend, q, k, v)


@pytest.mark.parametrize("size", [1e10, 1e16, 1e25])
def test_large_inputs(size, rng, backend):
    """Scores up to 1e28."""
    q, k, v = inputs((2, 1, 48, 256, 32, 32), rng)
    check(backend, (q.astype(np.float64) * size).astype(BF16), k, v)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_stays_where_it_belongs(name, value, rng, backend):
    arrays = dict(zip("qkv", inputs((2, 1, 64, 256, 64, 64), rng), strict=True))
    arrays[name][0, 0, 5, 3] = value
    expected = reference.attention(*(x.astype(np.float64) for x in arrays.values()))
    with np.errstate(all="ignore"):
        out = backend.attention(*arrays.values()).astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(out[finite], expected[finite], rtol=0.02, atol=0.02)


# hk, sq, sk, d, dv and rows: so few that on tiles a KV head has one task, where those of sq have several.
SHARED = [(isa, BF16, (3, 500, 700, 16, 24, 64)) for isa in cpu_isas()]
SHARED += [("amx", np.float16, (32, 400, 260, 256, 256, 256))] if "amx" in cpu_isas() else []


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("isa, dtype, shape", SHARED, ids=str)
def test_keys_packed_once_give_the_same_bits(isa, dtype, shape, options):
    """Where a KV head has several tasks, its keys are packed for all of them at once; rows that see NaN and those that do not."""
    hk, sq, sk, d, dv, rows = shape
    q, k, v = inputs((hk, hk, sq, sk, d, dv), np.random.default_rng(3), 1.0, dtype)
    k[:, 0, 13, 5], v[:, 1, sk // 2 + 1, 7], v[:, 1, sk - 1, 1] = np.nan, np.inf, np.nan
    options = options | {"align": "top-left", "kernel": f"fwd_{isa}"}
    tasks, one_each = (flashgqa.explain(x, k, v, **options)["tasks"] for x in (q, q[:, :, :rows]))
    assert tasks > hk and (isa not in ("amx", "avx512bf16") or one_each == hk)
    with np.errstate(all="ignore"):
        out, lse = flashgqa.attention(q, k, v, return_lse=True, **options)
        alone, lse_alone = flashgqa.attention(q[:, :, :rows], k, v, return_lse=True, **options)
    assert same_bits(out[:, :, :rows], alone) and same_bits(lse[:, :, :rows], lse_alone)
    assert np.isnan(alone).any() and np.isfinite(alone).any()


@pytest.mark.parametrize("dtype", [BF16, np.float16], ids=str)
def test_packed_sequences_share_keys(dtype, rng, backend):
    """Spans of sequences of all lengths, empty ones among them, one after another."""
    lengths = [300, 0, 1, 256, 257, 700, 31, 512]
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    q, k, v = (rng.standard_normal((ends[-1], h, 32)).astype(dtype) for h in (4, 2, 2))
    whole = backend.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, causal=True)
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        part = np.array([0, end - begin], np.int32)
        alone = backend.attention(q[begin:end], k[begin:end], v[begin:end], cu_seqlens_q=part, cu_seqlens_kv=part, causal=True)
        if backend.device == "cpu":
            assert same_bits(whole[begin:end], alone)
        else:                                   # how keys are shared out there depends on the batch
            close = whole[begin:end].astype(np.float64), alone.astype(np.float64)
            np.testing.assert_allclose(*close, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [BF16, np.float32], ids=str)
def test_a_call_finds_nothing_of_the_one_before(dtype, rng, backend):
    """Workspaces are kept for the next call: here one full of NaN, larger than what the next one asks for."""
    q, k, v = inputs((4, 2, 400, 280, 32, 48), rng, 1.0, dtype)
    out, lse = backend.attention(q, k, v, return_lse=True)
    first = backend.attention_backward(out, q, k, v, out, lse)
    large = [np.full((1, h, s, 64), np.nan, dtype) for h, s in ((4, 600), (2, 300), (2, 300))]
    with np.errstate(all="ignore"):
        other, other_lse = backend.attention(*large, return_lse=True)
        backend.attention_backward(other, *large, other, other_lse)
    again, lse_again = backend.attention(q, k, v, return_lse=True)
    assert same_bits(again, out) and same_bits(lse_again, lse)
    for a, b in zip(first[:3], backend.attention_backward(out, q, k, v, out, lse)[:3], strict=True):
        assert same_bits(a, b)
