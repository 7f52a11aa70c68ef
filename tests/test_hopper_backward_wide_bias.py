"""A float32 bias in the backward kernels for Hopper: against the oracle under the error rule, and, where its numbers are those
of a bias of q's dtype, what comes of that one, to the bit or to how sums round, whatever is beside it."""

import dataclasses
import itertools

import pytest
import torch
from gpu import assert_alike, backward_without_dbias
from test_hopper import DTYPES, MASKS, inputs, random
from test_hopper_alibi import all_pairs_of_lengths
from test_hopper_backward import backward_row
from test_hopper_backward_bias import CASES, NAMES, SHAPES, bools
from test_hopper_softcap import ALIGNED, check_backward_row, extents, general
from test_hopper_terms import at_offset

import flashgqa

pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
NAMES_OF_ALL = ("dq", "dk", "dv", "dbias")
DROPS = {"dropout_p": 0.3, "seed": 5}
BESIDE = {"nothing": {}, "mask": {"mask": True}, "dropout": DROPS, "both": {"mask": True, **DROPS}}


def both(x, bias, dout=None, dbias=True, wide=None, **options):
    """Gradients by the row for Hopper, of a bias and of its float32 copy."""
    q, k, v = x
    forward = {key: value for key, value in options.items() if key != "deterministic"}
    out, lse = flashgqa.attention(q, k, v, bias=bias, return_lse=True, **forward)
    dout = random(*out.shape, dtype=q.dtype, seed=8) if dout is None else dout
    dlse = random(*lse.shape, dtype=torch.float32, seed=7)
    backward, count = (flashgqa.attention_backward, 4) if dbias else (backward_without_dbias, 3)
    keywords = {"dlse": dlse, "kernel": backward_row(q.dtype, q.shape[-1]), **options}
    biases = bias, bias.float() if wide is None else wide
    return [backward(dout, q, k, v, out, lse, bias=of, **keywords)[:count] for of in biases]


def assert_same(narrow, wide, beside, stored):
    """Bits, but where one kernel has what two have of a bias of q's dtype: beside a mask, and where that of a narrow bias stores
    dbias (`stored`: it is not shared), dS is rounded in another order; and dbias beside dropout has its factor before it is
    rounded, not between two roundings."""
    drops = "dropout_p" in beside
    for name, a, b in zip(NAMES_OF_ALL, narrow, wide, strict=False):
        assert b.dtype == (torch.float32 if name == "dbias" else a.dtype)
        if name == "dbias" and drops or not drops and (stored or "mask" in beside):
            assert_alike([b], [a], [name], dtype=a.dtype)
        else:
            b = b.to(a.dtype)
            assert torch.equal(a.isnan(), b.isnan()), name
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case, monkeypatch):
    if "q" not in case.bias:                               # whose gradient the general kernels make
        monkeypatch.setattr(flashgqa, "attention_backward", backward_without_dbias)
    check_backward_row(dataclasses.replace(case, dtype=extents(name)[0], bias_dtype="float32", score_storage=ALIGNED), name)


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_as_of_a_narrow_bias(d, dtype, options, beside):
    """However it is shared, with its gradient where there is one; keys that it hides; one tile and many; twice the same bits."""
    shapes = (2, 8, 2, 300, 520), (2, 32, 1, 40, 304), (1, 4, 1, 30, 3000), (3, 5, 5, 33, 8), (1, 8, 8, 900, 264)
    for (b, hq, hk, sq, sk), (by_batch, by_head) in itertools.product(shapes, itertools.product((0, 1), repeat=2)):
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias = random(1 if by_batch else b, 1 if by_head else hq, sq, sk, dtype=dtype)
        bias.masked_fill_(bias > 2, -torch.inf)
        more = {**BESIDE[beside], **MASKS[options]}
        if "mask" in more:
            more["mask"] = bools(b, 1, sq, sk)
        dbias = "mask" not in more
        narrow, wide = both(x, bias, dbias=dbias, **more)
        assert_same(narrow, wide, more, dbias and bias.shape[:2] == (b, hq))
        again = both(x, bias, dbias=dbias, **more)[1]
        assert all(torch.equal(a, b) for a, b in zip(wide, again, strict=True))
        assert not dbias or (wide[3][bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("beside", ["nothing", "dropout"])
@pytest.mark.parametrize("d", [64, 128])
def test_the_same_wherever_elements_lie(d, beside):
    x = inputs(2, 8, 2, 300, 520, d, dtype=torch.bfloat16)
    for shape in SHAPES.values():
        bias = random(*shape, dtype=torch.bfloat16)
        storage = torch.full((*shape[:-1], 528), torch.nan, dtype=torch.float32, device="cuda")[..., :520]
        for wide in (None, storage.copy_(bias), *(at_offset(bias.float(), n, 520 + n) for n in (1, 2, 4, 7))):
            assert_same(*both(x, bias, dbias=False, wide=wide, **BESIDE[beside]), BESIDE[beside], False)


@pytest.mark.parametrize("beside", ["nothing", "both"])
@pytest.mark.parametrize("d", [64, 128])
def test_long_passes(d, beside):
    """The folded order and its parts; windows, walked head by head."""
    causal, left = {"causal": True}, {"window": (500, 0)}
    for b, hq, hk, s, options in ((1, 32, 8, 2048, causal), (1, 4, 1, 4208, causal), (2, 8, 2, 1504, left), (1, 4, 4, 2504, {})):
        x = inputs(b, hq, hk, s, s, d, dtype=torch.bfloat16)
        bias = random(1, hq, s, s, dtype=torch.bfloat16)
        more = {key: bools(1, 1, s, s) if key == "mask" else value for key, value in BESIDE[beside].items()}
        assert_same(*both(x, bias, dbias=beside == "nothing", **options, **more), more, b == 1)


@pytest.mark.parametrize("shared", ["", "b"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 128])
def test_all_pairs_of_lengths(d, mask, shared):
    queries, keys, starts, packed = all_pairs_of_lengths(d)
    bias = random(1 if shared else len(queries), 4, 300, 400, dtype=torch.float16)
    options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=300, max_kv=400)
    assert_same(*both(packed, bias, **options, **MASKS[mask]), {}, not shared)
    padded = inputs(len(queries), 4, 2, 300, 400, d)
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    assert_same(*both(padded, bias, q_lens=queries, kv_lens=keys, **MASKS[mask]), {}, not shared)


@pytest.mark.parametrize("shape", [(2, 8), (1, 8), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_gradient_is_not_rounded(d, dtype, shape):
    """A row that sees one key: its output is that value, dP is delta, and dbias is dLSE, to float32's digits."""
    q, k, v = inputs(2, 8, 2, 300, 300, d, dtype=dtype)
    bias, options = random(*shape, 300, 300, dtype=torch.float32), {"window": (0, 0)}
    out, lse = flashgqa.attention(q, k, v, bias=bias, return_lse=True, **options)
    dout, dlse = random(*out.shape, dtype=dtype, seed=8), random(*lse.shape, dtype=torch.float32, seed=7)
    kernel = backward_row(dtype, d)
    dbias = flashgqa.attention_backward(dout, q, k, v, out, lse, dlse=dlse, bias=bias, kernel=kernel, **options).dbias
    for n in range(2):
        dlse = dlse.sum(n, keepdim=True) if shape[n] == 1 else dlse
    expected = torch.diag_embed(dlse)
    assert (dbias - expected).abs().max() < 1e-4


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("d", [64, 128])
def test_where_numbers_are_not_finite(d, beside):
    """NaN and inf in q, k, v, dO or the bias, that the bias hides or not; rows whose LSE holds no sum."""
    x = [*inputs(2, 4, 2, 300, 392, d), random(2, 4, 300, d, dtype=torch.float16, seed=8)]
    more = {key: bools(2, 1, 300, 392) if key == "mask" else value for key, value in BESIDE[beside].items()}
    dbias = "mask" not in more
    bias = random(2, 4, 300, 392, dtype=torch.float16)
    bias[:, :, :100, 200] = bias[:, :, 120] = bias[:, :, :, 250] = -torch.inf
    for which, at, value in itertools.product(range(4), (120, 200, 250), (torch.nan, torch.inf)):
        odd = [y.clone() for y in x]
        odd[which][1, 1, at, 5] = value
        narrow, wide = map(list, both(odd[:3], bias, dout=odd[3], dbias=dbias, **more))
        if dbias and value == torch.inf:  # a narrow dbias is NaN for all that see the key, those with scores of -inf, too
            finite = narrow[3].isfinite()
            assert wide[3][finite].isfinite().all()
            narrow[3], wide[3] = (y[3].masked_fill(~finite, 0.0) for y in (narrow, wide))
        assert_same(narrow, wide, more, True)
    for value in (torch.nan, torch.inf):
        odd = bias.clone()
        odd[1, 3, 7, 200] = odd[1, 3, 9, 390] = value
        assert_same(*both(x[:3], odd, dbias=dbias, **more), more, True)
    for low in (-3e4, -65504.0):
        far = torch.where(bools(2, 4, 300, 392, rate=0.5), low, bias)
        assert_same(*both(x[:3], far, dbias=dbias, **more), more, True)
        assert_same(*both(x[:3], torch.full_like(bias, low), dbias=dbias, **more), more, True)


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_a_bias_as_a_mask(d, dtype, low):
    """Numbers that float16 does not have: rows that see nothing but them count all; beside others they are a mask."""
    x = inputs(2, 4, 2, 424, 424, d, dtype=dtype)
    shown = torch.ones(424, 424, dtype=torch.bool, device="cuda").tril()
    bias = torch.zeros(2, 1, 424, 424, device="cuda").masked_fill_(~shown, low)
    got, causal = of_rows(x, bias, (90,))[0], of_rows(x, None, (90,), causal=True)[0]
    assert_alike(got[:3], causal[:3], NAMES_OF_ALL[:3])
    bias[1, :, :, :77] = low
    assert_alike(*of_rows(x, bias, (90, 80)), NAMES_OF_ALL, dtype=dtype)


def of_rows(x, bias, archs, **options):
    """Gradients by these rows, from the results of one forward kernel."""
    q, k, v = x
    out, lse = flashgqa.attention(q, k, v, bias=bias, return_lse=True, **options)
    dout = random(*out.shape, dtype=q.dtype, seed=8)
    names = (backward_row(q.dtype, q.shape[-1]) if arch == 90 else general("bwd", q.dtype, q.shape[-1]) for arch in archs)
    results = (flashgqa.attention_backward(dout, q, k, v, out, lse, bias=bias, kernel=name, **options) for name in names)
    return [x[: 3 if bias is None else 4] for x in results]


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1)])
@pytest.mark.parametrize("d", [64, 128])
def test_keys_that_are_no_multiple_of_eight(d, shape):
    """Whose gradient is stored word by word: next to it nothing is."""
    x = inputs(2, 4, 2, 200, 260, d, dtype=torch.bfloat16)
    got, expected = of_rows(x, random(*shape, 200, 260, dtype=torch.float32), (90, 80))
    assert_alike(got, expected, NAMES_OF_ALL, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_plan(d, dtype):
    x = inputs(2, 8, 2, 304, 304, d - 8, dtype=dtype)
    name = backward_row(dtype, d)
    bias = random(1, 8, 304, 304, dtype=torch.float32)
    odd = random(1, 8, 304, 306, dtype=torch.float32)[..., :304]
    for of, drops in itertools.product((bias, bias.repeat(2, 1, 1, 1), bias[0, 0]), ({}, {"dropout_p": 0.5, "seed": 1})):
        assert flashgqa.explain(*x, backward=True, bias=of, **drops)["kernel"] == name
    assert flashgqa.explain(*x, backward=True, bias=odd)["kernel"] == name
    for options, kernel, reason in (
        ({"bias": bias.double()}, general("bwd", dtype, d), "neither float32 nor of q's dtype"),
        ({"bias": odd, "batch_invariant": True}, backward_row(dtype, 256), "16 bytes"),
    ):
        plan = flashgqa.explain(*x, backward=True, **{"bias": bias, **options})
        assert plan["kernel"] == kernel and reason in dict(plan["refused"])[name]
