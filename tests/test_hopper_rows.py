"""Every training row of the benchmark (benchmarks/shapes.py) under the error rule of flashgqa/_bounds.py: one KV head of a row,
with all its query heads, against the equations in float64."""

import sys
from pathlib import Path

import pytest
import torch
from gpu import equations, within
from test_hopper import ROWS, random

import flashgqa

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import shapes  # noqa: E402

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
NAMES = ("out", "dq", "dk", "dv")


@pytest.mark.parametrize("row", shapes.GPU_TRAIN, ids=lambda row: row.label.partition(" ")[2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_row(row, dtype):
    extents = [(row.b, heads, row.s, row.d) for heads in (row.hq, row.hk, row.hk, row.hq)]
    q, k, v, dout = (random(*extent, dtype=dtype, seed=n) for n, extent in enumerate(extents))
    out, lse = flashgqa.attention(q, k, v, causal=row.causal, return_lse=True)
    saved = dout, q, k, v, out, lse
    ordered, free = (flashgqa.attention_backward(*saved, causal=row.causal, deterministic=x) for x in (True, False))
    g, n, h = row.hq // row.hk, row.b - 1, row.hk // 2
    group = slice(h * g, (h + 1) * g)
    given = dout[n, group], q[n, group], k[n, h], v[n, h]
    exact, naive = (equations(*given, row.causal, rounds) for rounds in (False, True))
    for which, gradients in (("in order", ordered), ("in any order", free)):
        got = out[n, group], gradients.dq[n, group], gradients.dk[n, h], gradients.dv[n, h]
        for name, x, want, plain in zip(NAMES, got, exact, naive, strict=True):
            assert within(x, want, plain, backward=name != "out"), (name, which)
    torch.cuda.empty_cache()        # up to 5 GB, of which other test processes want their part
