"""Forward kernels for Hopper weigh a block by the largest score of a row's first block, until the sum of its weights says that
scores have grown (csrc/cuda/sm90/warpgroup.cuh). Blocks come last first: here scores grow towards key 0. Under the error rule."""

import numpy as np
import pytest
import torch
from checking import DTYPES, assert_within, naive_forward
from test_hopper import ROWS, SHORT
from test_hopper_softcap import extents

import flashgqa
from flashgqa import reference

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
QUERIES, KEYS = 200, 700
# Powers of two a block of 128 keys. 3: no maximum but the first; 12: a new one every other block; 300: weights leave float32.
RISES = [3, 12, 40, 300, 720]
KINDS = {"causal": {"causal": True}, "dense": {}, "window": {"window": (511, 0)}, "left": {"window": (50, None)}}


def rising(name, bits, rows=slice(1, None, 2)):
    """q, k, v; scores of the rows named grow: in head 0 with every key, in head 1 with every 64 keys and more from row to row."""
    dtype, d, dv = extents(name)
    rng = np.random.default_rng(bits)
    q, k, v = (rng.standard_normal((1, h, s, width)) for h, s, width in ((2, QUERIES, d), (1, KEYS, d), (1, KEYS, dv)))
    q[..., :2] = 0
    q[:, 0, rows, 0] = 16
    q[:, 1, rows, 1] = np.linspace(0, 16, QUERIES)[rows]
    for column, step in enumerate((1, 64)):
        k[..., column] = bits * np.log(2) / 128 * np.sqrt(d) / 16 * step * (np.arange(KEYS, 0, -1) // step)
    return [x.astype(DTYPES[dtype]) for x in (q, k, v)]


def on_gpu(x):
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[x.dtype.name]
    return torch.from_numpy(x.astype(np.float32)).to("cuda", kind)


def forward(name, arrays, **options):
    out, lse = flashgqa.attention(*(on_gpu(x) for x in arrays), return_lse=True, kernel=name, **options)
    return out.float().cpu().numpy().astype(arrays[0].dtype), lse.cpu().numpy()


@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("bits", RISES)
@pytest.mark.parametrize("name", ROWS + SHORT)
def test_scores_that_grow(name, bits, mask):
    arrays, options = rising(name, bits), KINDS[mask]
    out, lse = forward(name, arrays, **options)
    expected = reference.attention(*(x.astype(np.float64) for x in arrays), return_lse=True, **options)
    naive = naive_forward(*arrays, **options)
    assert_within("out", out, expected[0], (x for x, _ in naive), out.dtype, 2)
    assert_within("lse", lse, expected[1], (x for _, x in naive), lse.dtype, 2)


@pytest.mark.parametrize("bits", RISES)
@pytest.mark.parametrize("name", ROWS + SHORT)
def test_each_row_for_itself(name, bits):
    """Rows whose scores do not grow have the same bits beside rows whose scores do; and all in a tile done again for a NaN."""
    growing, steady = rising(name, bits), rising(name, bits, rows=slice(0, 0))
    poisoned = [*growing[:2], growing[2].copy()]
    poisoned[2][..., -1, :] = np.nan                # seen by the last query alone
    expected, got, again = (forward(name, arrays, causal=True) for arrays in (steady, growing, poisoned))
    for n in range(2):
        assert got[n][:, :, ::2].tobytes() == expected[n][:, :, ::2].tobytes()
        assert again[n][:, :, :-1].tobytes() == got[n][:, :, :-1].tobytes()
    assert np.isnan(again[0][:, :, -1].astype(np.float32)).all()
