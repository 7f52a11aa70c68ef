"""The dropout mask: that of the definition, and the one that attention uses."""

import numpy as np
import pytest
from checking import same_bits

import flashgqa
from flashgqa import reference

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 33, 257), (3, 1, 130, 64), (2, 2, 4, 0), (0, 1, 2, 3)]


@pytest.mark.parametrize("b, hq, sq, sk", SHAPES)
@pytest.mark.parametrize("p", [0.0, 7e-6, 1e-5, 0.1, 0.5, 1.0])
def test_mask_is_that_of_the_definition(b, hq, sq, sk, p):
    seed = 2**63 + 12345
    mask = flashgqa.dropout_mask(b, hq, sq, sk, p, seed)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, reference.dropout_mask(b, hq, sq, sk, p, seed))


def test_seed_and_offset():
    plain = flashgqa.dropout_mask(2, 2, 9, 30, 0.5, 17)
    assert (plain == flashgqa.dropout_mask(2, 2, 9, 30, 0.5, np.int64([17, 0]))).all()
    moved = flashgqa.dropout_mask(2, 2, 9, 30, 0.5, np.int64([17, 3]))
    assert (moved != plain).any()
    np.testing.assert_array_equal(moved, reference.dropout_mask(2, 2, 9, 30, 0.5, (17, 3)))
    np.testing.assert_array_equal(
        flashgqa.dropout_mask(1, 1, 9, 30, 0.5, np.int64([-5, 2**32 - 1])),
        reference.dropout_mask(1, 1, 9, 30, 0.5, (-5, 2**32 - 1)),
    )


def kept_weights(backend, q, k, **options):
    """Weights after dropout [..., sq, sk]: the output with the identity as V."""
    v = np.broadcast_to(np.eye(k.shape[-2], dtype=q.dtype), (*k.shape[:-1], k.shape[-2]))
    return backend.attention(q, k, v, **options)


@pytest.mark.parametrize("sq, sk", [(1, 200), (3, 17), (70, 130), (130, 129)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_drops_what_the_mask_says_and_scales_the_rest(sq, sk, dtype, rng, backend):
    q, k = rng.standard_normal((2, 6, sq, 16)).astype(dtype), rng.standard_normal((2, 2, sk, 16)).astype(dtype)
    p, seed = 0.3, 99
    plain, dropped = kept_weights(backend, q, k), kept_weights(backend, q, k, dropout_p=p, seed=seed)
    keep = flashgqa.dropout_mask(2, 6, sq, sk, p, seed)
    assert ((dropped > 0) == keep).all()
    factor = 65536 / (65536 - round(65536 * p))
    np.testing.assert_allclose(dropped, plain * keep * factor, rtol=4 * np.finfo(dtype).eps)


def test_survivors_of_equal_weights_are_exact(backend):
    q, k = np.zeros((1, 2, 9, 8), np.float32), np.ones((1, 1, 64, 8), np.float32)
    dropped = kept_weights(backend, q, k, dropout_p=0.5, seed=4)
    assert (dropped == flashgqa.dropout_mask(1, 2, 9, 64, 0.5, 4) * np.float32(2 / 64)).all()


def test_packed_sequences_count_their_own_rows_and_keys(rng, backend):
    lens = [(5, 9), (0, 3), (33, 70)]
    q, k = rng.standard_normal((38, 4, 8)).astype(np.float32), rng.standard_normal((82, 2, 8)).astype(np.float32)
    cu = {"cu_seqlens_q": np.int32([0, 5, 5, 38]), "cu_seqlens_kv": np.int32([0, 9, 12, 82])}
    v = np.zeros((82, 2, 70), np.float32)
    for n, (_, sk) in enumerate(lens):
        v[cu["cu_seqlens_kv"][n] : cu["cu_seqlens_kv"][n + 1], :, :sk] = np.eye(sk, dtype=np.float32)[:, None]
    out = backend.attention(q, k, v, **cu, dropout_p=0.4, seed=8)
    keep = flashgqa.dropout_mask(3, 4, 33, 70, 0.4, 8)
    for n, (sq, sk) in enumerate(lens):
        rows = out[cu["cu_seqlens_q"][n] : cu["cu_seqlens_q"][n + 1], :, :sk].swapaxes(0, 1)
        assert ((rows > 0) == keep[n, :, :sq, :sk]).all()


def test_lse_is_that_without_dropout_and_p_of_one_gives_zero(rng, backend):
    q, k, v = (rng.standard_normal((1, 2, 40, 16)).astype(np.float32) for _ in range(3))
    _, lse = backend.attention(q, k, v, return_lse=True)
    for p in (0.2, 0.9999, 1.0):
        out, dropped_lse = backend.attention(q, k, v, dropout_p=p, seed=1, return_lse=True)
        assert same_bits(lse, dropped_lse)
    assert (out == 0).all()
    got = backend.attention_backward(out, q, k, v, out, lse, dropout_p=1.0, seed=1)
    assert all((x == 0).all() for x in got[:3])


def test_p_too_small_to_drop_anything_changes_no_bit(rng, backend):
    q, k, v = (rng.standard_normal((1, 2, 40, 16)).astype(np.float32) for _ in range(3))
    assert same_bits(backend.attention(q, k, v, dropout_p=7e-6, seed=3), backend.attention(q, k, v))


def test_the_seed_array_is_the_seed(rng, backend):
    q, k, v = (rng.standard_normal((1, 2, 40, 16)).astype(np.float32) for _ in range(3))
    of_int = backend.attention(q, k, v, dropout_p=0.5, seed=77)
    assert same_bits(of_int, backend.attention(q, k, v, dropout_p=0.5, seed=np.int64([77, 0])))
    assert not same_bits(of_int, backend.attention(q, k, v, dropout_p=0.5, seed=np.int64([77, 1])))


def test_fraction_kept_and_independence_of_neighbours():
    keep = flashgqa.dropout_mask(4, 8, 128, 128, 0.25, 5)
    n = keep.size
    assert abs(keep.mean() - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5
    for a, b in ((keep[..., 1:], keep[..., :-1]), (keep[:, :, 1:], keep[:, :, :-1]), (keep[:, 1:], keep[:, :-1])):
        assert abs((a & b).mean() - 0.75**2) < 5 * (0.25 / a.size) ** 0.5
