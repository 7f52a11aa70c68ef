"""Pairs of blocks that bring keys for both (csrc/cuda/sm90/fwd_pair.cuh): the same bits as of heads that share no keys, which
blocks walk alone."""

import pytest
import torch
from test_hopper import DTYPES, ROWS, compare, inputs, row_for

import flashgqa

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
SHAPE = (3, 8, 2, 1000, 2304)       # b, hq, hk, sq, sk: 192 tiles, the last of each head with rows that do not exist
OPTIONS = {
    "full": {}, "causal": {"causal": True}, "top-left": {"causal": True, "align": "top-left"}, "right": {"window": (None, 700)},
}


def assert_bits(q, k, v, **options):
    """Three calls, each of which leaves the counter of tiles as it was. The results."""
    name = row_for(q.dtype, q.shape[-1], v.shape[-1])
    alone = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
    expected = flashgqa.attention(q, *alone, return_lse=True, kernel=name, **options)
    for _ in range(3):
        got = flashgqa.attention(q, k, v, return_lse=True, kernel=name, **options)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return got


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("d", [256, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype, d, options):
    x = inputs(*SHAPE, d, dtype=dtype)
    assert_bits(*x, **options)
    assert_bits(*x, sink=torch.linspace(-2, 2, SHAPE[1], device="cuda", dtype=dtype), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_right(options):
    compare(*inputs(*SHAPE, 256, dtype=torch.bfloat16), names=[row_for(torch.bfloat16, 256, 256)], **options)


@pytest.mark.parametrize("hq", [6, 10, 20])
def test_groups(hq):
    """With 3, 5 and 10 heads of a group, of which the last alone pair."""
    assert_bits(*inputs(1, hq, 2, 8400, 2304, 256, dtype=torch.bfloat16), causal=True, align="top-left")


def test_lengths():
    """Tiles that see nothing, of both blocks at once; sequences without keys and rows."""
    q, k, v = inputs(6, 4, 2, 1000, 3000, 256, dtype=torch.bfloat16)
    lens = [1000, 0, 1, 1000, 130, 100], [3000, 3000, 300, 0, 129, 2900]
    rows, keys = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in lens)
    k[2, :, 300:] = v[4, :, 129:] = float("nan")
    for options in OPTIONS.values():
        assert_bits(q, k, v, q_lens=rows, kv_lens=keys, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tiles_that_are_done_again(value):
    """Some of one block's, of both, and of most pairs none: the second pass has the barriers as the first one leaves them."""
    q, k, v = inputs(*SHAPE, 256, dtype=torch.bfloat16)
    q[0, 1, 900:] *= 1000
    q[2, 4, :64] *= 1000
    for options in OPTIONS.values():
        assert_bits(q, k, v, **options)
    v[1, 0, 500, 5] = value
    for options in OPTIONS.values():
        out, _ = assert_bits(q, k, v, **options)
        assert not torch.isfinite(out[1, :4, :, 5]).all() and torch.isfinite(out[[0, 2]]).all()
