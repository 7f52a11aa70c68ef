"""softcap in the kernels for Hopper, forward and backward: each row forced, against the oracle under the error rule, and what is
theirs alone: scores in units of the cap, a short way for warps whose scores are all small."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from cases import Case, built, gradients
from checking import accumulator, assert_within
from gpu import CudaBackend, assert_alike
from test_hopper import DTYPES, MASKS, inputs, random, row_for, rows_for
from test_hopper import ROWS as FORWARD_ROWS
from test_hopper_backward import ROWS as BACKWARD_ROWS

import flashgqa

pytestmark = pytest.mark.skipif(not FORWARD_ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
ALIGNED = ((0, 1, 2, 3), (1, 0, 2, 0), (False,) * 4)  # rows on 16 bytes, NaN around the heads
CASES = [
    Case(b=2, sq=150, sk=200, causal=True, softcap=20.0, sink=True),
    Case(b=2, sq=140, sk=210, window=(70, 9), softcap=50.0, data="large", q_lens=(140, 0), kv_lens=(210, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, softcap=0.7, scale=0.9, sink=True),
    Case(sq=128, sk=128, chunk=48, softcap=1e9, data="shift"),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, softcap=5.0, sink=True),
]


def extents(name):
    """dtype, d, dv of a row."""
    _, _, dtype, d, dv, _ = name.split("_")
    return {"bf16": "bfloat16", "f16": "float16"}[dtype], int(d[1:]), int(dv[2:])


def of_row(case, name):
    dtype, d, dv = extents(name)
    storage = ((0, 1, 2), (2, 0, 0), (False,) * 3) if case.packed else ALIGNED
    return dataclasses.replace(case, dtype=dtype, d=d, dv=None if d == dv else dv, storage=storage)


class Forced(CudaBackend):
    def __init__(self, **rows):
        super().__init__("plain")
        self.rows = rows

    def kernel(self, which, dtype, d, dv):
        return self.rows.get(which)


def general(which, dtype, d):
    width = next(n for n in (64, 128, 256) if n >= d)
    return f"{which}_sm80_{DTYPES[dtype]}_d{width}_dv{width}_general"


def check_forward_row(case, name):
    """The row, forced, under the error rule."""
    call, answer = built(of_row(case, name))
    out, lse = Forced(fwd=name).attention(*call.inputs, **call.options, return_lse=True)
    assert_within("out", out, answer.out, (out for out, _ in answer.naive), call.dtype, 2)
    assert lse.dtype == accumulator(call.dtype)
    assert_within("lse", lse, answer.lse, (lse for _, lse in answer.naive), lse.dtype, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORWARD_ROWS)
def test_forward_within_the_error_rule(name, case):
    check_forward_row(case, name)


def check_backward_row(case, name):
    """Behind whichever forward kernel the plan takes."""
    case = of_row(case, name)
    call, _ = built(case)
    answer = gradients(case)
    forced = Forced(bwd=name)
    out, lse = forced.attention(*call.inputs, **call.options, return_lse=True)
    got = forced.attention_backward(call.dout, *call.inputs, out, lse, dlse=call.dlse, **call.options)
    for gradient in ("dq", "dk", "dv", "dbias", "dsink"):
        if getattr(got, gradient) is not None:
            naive = (getattr(result, gradient) for result in answer.naive)
            assert_within(gradient, getattr(got, gradient), getattr(answer.exact, gradient), naive, call.dtype, 3)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BACKWARD_ROWS)
def test_backward_within_the_error_rule(name, case):
    check_backward_row(case, name)


def both(q, k, v, dout=None, **options):
    """Results and gradients by the rows for Hopper, and by those that run on every card."""
    results = []
    backward = q.shape[-1] == v.shape[-1] and q.shape[-1] in (64, 128, 256)
    for arch in (90, 80):
        own = arch == 90
        widths = q.shape[-1], v.shape[-1]
        forward = rows_for(q.dtype, *widths)[0] if own else general("fwd", q.dtype, max(widths))
        out, lse = flashgqa.attention(q, k, v, return_lse=True, kernel=forward, **options)
        results.append([out, lse])
        if backward:
            row = row_for(q.dtype, q.shape[-1], v.shape[-1], which="bwd") if own else general("bwd", q.dtype, q.shape[-1])
            dout = random(*out.shape, dtype=q.dtype, seed=9) if dout is None else dout
            results[-1] += flashgqa.attention_backward(dout, q, k, v, *results[0][:2], kernel=row, **options)[:3]
    return results


def assert_both_alike(q, k, v, **options):
    got, expected = both(q, k, v, **options)
    assert_alike(got, expected, ("out", "lse", "dq", "dk", "dv")[: len(got)])
    return got


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", FORWARD_ROWS)
def test_many_pairs_of_lengths(name, mask):
    dtype, d, dv = extents(name)
    grid = torch.meshgrid(torch.arange(1, 200, 33), torch.arange(1, 401, 57), indexing="ij")
    queries, keys = (x.reshape(-1).int().cuda() for x in grid)
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys)]
    packed = [x[0].transpose(0, 1) for x in inputs(1, 4, 2, *(int(s[-1]) for s in starts), d, dv, getattr(torch, dtype))]
    assert_both_alike(*packed, cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=200, max_kv=401, softcap=2.0, **MASKS[mask])
    padded = inputs(len(queries), 2, 1, 200, 401, d, dv, getattr(torch, dtype))
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    assert_both_alike(*padded, q_lens=queries, kv_lens=keys, softcap=2.0, **MASKS[mask])


@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_scores_far_beyond_the_cap(d):
    """Their weights differ by exp(2 softcap) at most, and their gradients are 0."""
    q, k, v = inputs(2, 4, 2, 300, 400, d, dtype=torch.bfloat16)
    q *= 1e9
    got = assert_both_alike(q, k, v, softcap=3.0, causal=True)
    assert all(torch.isfinite(x).all() for x in got)
    assert len(got) == 2 or not (got[2].any() or got[3].any())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize(("d", "variant"), [(64, "plain"), (64, "tall"), (128, "plain"), (128, "tall"), (256, "plain")])
def test_poison_reaches_those_who_see_it_and_nobody_else(d, variant, which, value):
    x = dict(zip("qkv", inputs(2, 4, 2, 500, 500, d), strict=True))
    options = {"window": (60, 10), "softcap": 4.0, "kernel": row_for(torch.float16, d, d, variant=variant)}
    clean = flashgqa.attention(*x.values(), **options)
    x[which][1, 1, 400, 5] = value
    out = flashgqa.attention(*x.values(), **options)
    seen = torch.zeros_like(out, dtype=torch.bool)
    seen[1, 1 if which == "q" else slice(2, 4), 400 if which == "q" else slice(390, 461)] = True
    assert torch.equal(out[~seen], clean[~seen])
    if which == "v":
        assert not out[1, 2:, 390:461, 5].isfinite().any()
    elif value != value:
        assert out[seen].isnan().all()
    else:      # an infinite score is the cap itself; inf - inf and 0 * inf are NaN
        assert (out[seen].isnan() | (out[seen].abs() < 10)).all()


@pytest.mark.parametrize("d", [64, 128, 256])
def test_bits_do_not_depend_on_the_scores_of_other_rows(d):
    """A warp whose scores are all small takes a shorter way to the same numbers."""
    q, k, v = inputs(1, 2, 1, 256, 512, d)
    q *= 0.02
    options = {"softcap": 1.0, "kernel": row_for(q.dtype, d, d)}
    quiet, quiet_lse = flashgqa.attention(q, k, v, return_lse=True, **options)
    loud = q.clone()
    loud[:, :, ::8] *= 400
    out, lse = flashgqa.attention(loud, k, v, return_lse=True, **options)
    others = torch.arange(256, device="cuda") % 8 != 0
    assert torch.equal(out[:, :, others], quiet[:, :, others]) and torch.equal(lse[..., others], quiet_lse[..., others])
    assert not torch.equal(out, quiet)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_same_bits_in_any_batch_and_every_time(d):
    q, k, v = inputs(5, 8, 2, 300, 300, d, dtype=torch.bfloat16)
    options = {"window": (200, 0), "softcap": 10.0, "batch_invariant": True}

    def run(*x):
        forward, backward = (row_for(q.dtype, d, d, which=which) for which in ("fwd", "bwd"))
        out, lse = flashgqa.attention(*x, return_lse=True, kernel=forward, **options)
        return out, lse, *flashgqa.attention_backward(out, *x, out, lse, kernel=backward, **options)[:3]

    expected = run(q, k, v)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(q, k, v), expected, strict=True))
    for n in range(5):
        assert all(torch.equal(a, b[n : n + 1]) for a, b in zip(run(*(x[n : n + 1] for x in (q, k, v))), expected, strict=True))


@pytest.mark.parametrize("page", [None, 48, 128])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_kv_caches(d, page):
    b, slots, dtype = 2, 600, torch.bfloat16
    for g, sq, options in itertools.product((1, 4), (70, 200), ({}, {"causal": True}, {"window": (90, 0)})):
        q, k_new, v_new = inputs(b, 2 * g, 2, sq, sq, d, dtype=dtype)
        lens = torch.tensor([slots - sq, 33], dtype=torch.int32, device="cuda")
        more = {"cache_lens": lens, "softcap": 1.5, **options}
        shape = (b, 2, slots, d)
        if page:
            columns = -(-slots // page)
            pages = torch.randperm(b * columns, generator=torch.Generator().manual_seed(0))
            more["page_table"] = pages.view(b, columns).int().cuda()
            shape = (b * columns, 2, page, d)
        caches = [random(*shape, dtype=dtype, seed=n) for n in (5, 6)]
        wide = 128 if d <= 128 else 256
        results = []
        for name in (rows_for(dtype, d, d)[0], f"fwd_sm80_bf16_d{wide}_dv{wide}_cache"):
            call = q, *(x.clone() for x in caches), k_new, v_new
            results.append(flashgqa.attention_with_kvcache(*call, return_lse=True, kernel=name, **more))
        assert_alike(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_plan_takes_it_and_says_why_not(d, dtype):
    x = inputs(2, 16, 8, 2048, 2048, d, dtype=dtype)
    options = {"softcap": 50.0, "window": (1023, 0)}
    for which in ("fwd", "bwd"):
        plan, name = flashgqa.explain(*x, backward=which == "bwd", **options), row_for(dtype, d, d, which=which)
        assert plan["kernel"] in (name, name.replace("plain", "tall"))
        far = flashgqa.explain(*x, backward=which == "bwd", softcap=1e-15, scale=1e30)
        assert "ratio to the scale" in dict(far["refused"])[name] and far["kernel"].endswith("general")


def test_same_numbers_as_the_cpu():
    q, k, v = inputs(1, 4, 2, 160, 192, 64)
    options = {"causal": True, "softcap": 6.0}
    out, lse = flashgqa.attention(q, k, v, return_lse=True, kernel=row_for(q.dtype, 64, 64), **options)
    expected, expected_lse = flashgqa.attention(*(x.float().cpu().numpy() for x in (q, k, v)), return_lse=True, **options)
    np.testing.assert_allclose(out.float().cpu().numpy(), expected, rtol=0, atol=2e-3)
    np.testing.assert_allclose(lse.cpu().numpy(), expected_lse, rtol=0, atol=1e-5)
