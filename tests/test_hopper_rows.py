"""Every training row of the benchmark (benchmarks/shapes.py) under the error rule of flashgqa/_bounds.py: one KV head of a row,
with all its query heads, against the equations in float64; the same bits twice. And which kernels the benchmark's rows run on."""

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
    again = flashgqa.attention(q, k, v, causal=row.causal), *flashgqa.attention_backward(*saved, causal=row.causal)[:3]
    assert all(torch.equal(x, y) for x, y in zip(again, (out, *ordered[:3]), strict=True))
    del again
    g, n, h = row.hq // row.hk, row.b - 1, row.hk // 2
    group = slice(h * g, (h + 1) * g)
    given = dout[n, group], q[n, group], k[n, h], v[n, h]
    exact, naive = (equations(*given, row.causal, rounds) for rounds in (False, True))
    for which, gradients in (("in order", ordered), ("in any order", free)):
        got = out[n, group], gradients.dq[n, group], gradients.dk[n, h], gradients.dv[n, h]
        for name, x, want, plain in zip(NAMES, got, exact, naive, strict=True):
            assert within(x, want, plain, backward=name != "out"), (name, which)
    torch.cuda.empty_cache()        # up to 5 GB, of which other test processes want their part


@pytest.mark.parametrize("row", shapes.GPU_TRAIN + shapes.GPU_MORE, ids=lambda row: row.label)
def test_plans(row):
    """Each runs on a kernel for Hopper, and of every other one that stands before it `explain` says why it does not serve."""
    packed, paged = getattr(row, "lengths", ()), getattr(row, "page", 0)
    dtype, window = getattr(torch, row.dtype), getattr(row, "window", 0)
    extents = ((sum(packed), h, row.d) if packed else (row.b, h, n, row.d) for h, n in ((row.hq, row.sq), (row.hk, row.s)))
    q, k = (torch.empty(extent, device="cuda", dtype=dtype) for extent in extents)
    options = {"causal": row.causal, "window": (window - 1, 0) if window else None}
    if packed:
        starts = torch.tensor([0, *packed], device="cuda").cumsum(0).int()
        options |= {"cu_seqlens_q": starts, "cu_seqlens_kv": starts}
    for which in ("forward", "backward") if isinstance(row, shapes.Row) else row.passes:
        if paged:
            pages = k.view(-1, row.hk, row.page, row.d)
            table = torch.arange(len(pages), device="cuda").int().view(row.b, -1)
            plan = flashgqa.explain_with_kvcache(q, pages, pages, cache_lens=row.s, page_table=table, **options)
        else:
            plan = flashgqa.explain(q, k, k, backward=which == "backward", **options)
        assert plan["kernel"].startswith("fwd_sm90_" if which == "forward" else "bwd_sm90_")
        refused = dict(plan["refused"])
        names = [x["name"] for x in flashgqa.kernels() if x["device"] == "cuda" and x["pass"] == which]
        assert all(refused[name] for name in names[: names.index(plan["kernel"])])
    torch.cuda.empty_cache()
