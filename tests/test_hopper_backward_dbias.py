"""The gradient of a bias in the backward kernels for Hopper beside a soft cap, ALiBi, mask tensors and dropout, of float32 or of
q's dtype, shared or not, of any number of keys: against the oracle under the error rule, and beside general kernels."""

import dataclasses
import itertools

import pytest
import torch
from cases import Case
from gpu import assert_alike
from test_hopper import DTYPES, MASKS, inputs, random
from test_hopper_alibi import all_pairs_of_lengths
from test_hopper_backward import ROWS, backward_row
from test_hopper_backward_any_bias import TOGETHER
from test_hopper_backward_bias import bools, dbias_of
from test_hopper_softcap import check_backward_row, extents

import flashgqa

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
DIMS = 64, 128, 256
OF = ("dq", "dk", "dv", "dbias")
# Of biases whose gradient is theirs: neither rows nor keys share them.
OTHERS = ({}, {}, {"sk": 256}, {"bias": "11qk"}, {"sk": 408, "bias": "1hqk"}, {"bias": "1hqk"})
CASES = [
    *(dataclasses.replace(case, **other) for case, other in zip(TOGETHER, OTHERS, strict=True)),
    Case(b=2, sq=152, sk=199, causal=True, bias="1hqk", sink=True),
    Case(b=2, sq=70, sk=45, bias="bhqk", mask="b11k"),
]
BESIDE = {"softcap": 4.0, "alibi_slopes": True, "mask": True, "dropout_p": 0.2}


def beside(names, b, hq, sq, sk):
    """Options of these names."""
    made = {"alibi_slopes": lambda: 2.0 ** -torch.arange(hq, device="cuda"), "mask": lambda: bools(b, 1, sq, sk)}
    options = {name: made[name]() if name in made else BESIDE[name] for name in names}
    return options | ({"seed": 3} if "dropout_p" in names else {})


def assert_gradients(got, expected, dtype):
    """Of a float32 bias to the digits that P and dP have."""
    if got.dbias.dtype == torch.float32:
        torch.testing.assert_close(got.dbias, expected.dbias, rtol=0, atol=2e-5 * expected.dbias.abs().max().item())
        got, expected = got[:3], expected[:3]
    assert_alike(got[:4], expected[:4], OF[: len(got[:4])], dtype=dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_within_the_error_rule(name, case, wide):
    check_backward_row(dataclasses.replace(case, bias_dtype="float32" if wide else extents(name)[0]), name)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_beside_whatever_else(d, dtype, wide, options):
    """However it is shared; what nobody sees is 0, whatever was in the memory; twice the same bits."""
    shapes = (2, 4, 2, 300, 520), (2, 8, 1, 40, 301), (1, 4, 1, 30, 1203), (3, 5, 5, 33, 7)
    mixes = [*itertools.chain.from_iterable(itertools.combinations(BESIDE, n) for n in range(5))]
    for (i, (b, hq, hk, sq, sk)), (j, shared) in itertools.product(enumerate(shapes), enumerate(("", "b", "h", "bh"))):
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias = random(1 if "b" in shared else b, 1 if "h" in shared else hq, sq, sk, dtype=torch.float32 if wide else dtype)
        bias.masked_fill_(bias > 2, -torch.inf)
        for names in mixes[(i + j) % 2 :: 2]:
            more = {**beside(names, b, hq, sq, sk), **MASKS[options]}
            nan = torch.full_like(bias, torch.nan)
            del nan                                        # the memory of dbias
            got, again, expected = (dbias_of(x, bias, arch, **more) for arch in (90, 90, 80))
            assert_gradients(got, expected, dtype)
            assert all(torch.equal(one, other) for one, other in zip(got[:4], again[:4], strict=True))
            assert got.dbias.dtype == bias.dtype and (got.dbias[bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("more", ["softcap", "alibi_slopes", "mask"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("d", DIMS)
def test_all_pairs_of_lengths(d, mask, wide, more):
    queries, keys, starts, packed = all_pairs_of_lengths(d)
    b, dtype = len(queries), torch.float16
    packing = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=300, max_kv=400)
    padded = inputs(b, 4, 2, 300, 400, d)
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    for shape in ((b, 4), (1, 4)):
        bias = random(*shape, 300, 400, dtype=torch.float32 if wide else dtype)
        for tensors, lengths in ((packed, packing), (padded, {"q_lens": queries, "kv_lens": keys})):
            options = {**beside([more], b, 4, 300, 400), **MASKS[mask], **lengths}
            got, expected = (dbias_of(tensors, bias, arch, **options) for arch in (90, 80))
            assert_gradients(got, expected, dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("more", ["softcap", "alibi_slopes", "mask", "odd keys"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("d", DIMS)
def test_what_is_not_finite(d, wide, more, value):
    """What the bias or the mask hides changes no bit; what is seen is not finite where general kernels say so."""
    sk = 389 if more == "odd keys" else 392
    x = [*inputs(2, 4, 2, 300, sk, d), random(2, 4, 300, d, dtype=torch.float16, seed=8)]
    options = {} if more == "odd keys" else beside([more], 2, 4, 300, sk)
    bias = random(1, 4, 300, sk, dtype=torch.float32 if wide else torch.float16)
    bias[:, :, :100, 200] = bias[:, :, 120] = bias[:, :, :, 250] = -torch.inf
    clean = dbias_of(x[:3], bias, 90, dout=x[3], **options)
    for which, at in itertools.product(range(4), (120, 200, 250)):
        odd = [y.clone() for y in x]
        odd[which][1, 1, at, 5] = value
        got, expected = (dbias_of(odd[:3], bias, arch, dout=odd[3], **options).dbias for arch in (90, 80))
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite), (which, at)
        assert_alike([got.where(finite, 0)], [expected.where(finite, 0)], ["dbias"], dtype=torch.float16)
        if (at == 250 and which in (1, 2)) or (at == 120 and which in (0, 3)):
            assert torch.equal(got, clean.dbias)


@pytest.mark.parametrize("size", [1e3, 3e4, 1e6])
@pytest.mark.parametrize("more", ["softcap", "alibi_slopes", "odd keys"])
@pytest.mark.parametrize("d", DIMS)
def test_large_biases(d, more, size):
    """LSEs that hold no digits of the sum."""
    sk = 261 if more == "odd keys" else 264
    x = inputs(2, 4, 2, 200, sk, d, dtype=torch.bfloat16)
    options = {} if more == "odd keys" else beside([more], 2, 4, 200, sk)
    bias = (random(1, 4, 200, sk, dtype=torch.float32) > 0.5).to(torch.bfloat16) * size
    for of in (bias, bias - size):
        assert_alike(*(dbias_of(x, of, arch, **options)[:4] for arch in (90, 80)), OF, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_plan(d, dtype):
    x = inputs(2, 8, 2, 300, 303, d - 8, dtype=dtype)
    bias, mask = random(1, 8, 300, 303, dtype=dtype), bools(300, 303)
    more = {}, {"softcap": 5.0}, {"alibi_slopes": torch.rand(8, device="cuda")}, {"mask": mask}, {"dropout_p": 0.5, "seed": 1}
    for of, options in itertools.product((bias, bias.float(), bias.repeat(2, 1, 1, 1), bias[0, 0]), more):
        assert flashgqa.explain(*x, backward=True, bias=of, **options)["kernel"] == backward_row(dtype, d)
