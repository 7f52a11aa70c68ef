"""A bias tensor of head dim 256 in the backward kernels for Hopper, which read it wherever its elements lie and beside whatever
else there is: against the oracle under the error rule, and beside the general kernels."""

import dataclasses
import itertools

import pytest
import torch
from cases import Case
from gpu import assert_alike, backward_without_dbias
from test_hopper import DTYPES, MASKS, inputs, random
from test_hopper_alibi import gradients
from test_hopper_backward import ROWS, assert_gradients_alike, backward_row
from test_hopper_backward_bias import CASES, bools
from test_hopper_poison import OPTIONS, POISON, VALUES, arrays, check, poisoned
from test_hopper_softcap import check_backward_row, extents, general
from test_hopper_terms import at_offset

import flashgqa

D = 256
NAMES = [name for name in ROWS if extents(name)[1] == D]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
TOGETHER = [
    Case(b=2, sq=152, sk=199, causal=True, bias="bhqk", softcap=20.0, sink=True),
    Case(b=2, sq=140, sk=265, bias="1hqk", alibi="h", q_lens=(140, 0), kv_lens=(265, 33)),
    Case(sq=70, sk=255, hq=3, hk=1, scale=0.9, bias="bhqk", mask="b1qk", softcap=3.0, alibi="bh"),
    Case(b=2, sq=130, sk=301, bias="11q1", mask="b11k", softcap=50.0, data="large", dropout=0.1),
    Case(b=2, sq=300, sk=407, window=(70, 9), align="top-left", bias="b11k", alibi="h", data="shift", dropout=0.3),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, softcap=5.0, alibi="bh", bias="bhqk", mask="b1qk"),
]
INF = float("inf")
WITH_DBIAS = flashgqa.attention_backward


@pytest.fixture(autouse=True)
def without_dbias(monkeypatch):
    monkeypatch.setattr(flashgqa, "attention_backward", backward_without_dbias)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", [*CASES, *TOGETHER], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case, wide):
    check_backward_row(dataclasses.replace(case, bias_dtype="float32" if wide else extents(name)[0]), name)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_all_that_there_is(d, dtype, options):
    """Softcap, ALiBi, a mask and dropout beside a bias, in any mix; split walks; twice the same bits."""
    odd = d == D
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 520), (1, 32, 1, 40, 304 - odd), (1, 4, 1, 30, 3000 + odd)):
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias, mask, slopes = random(1, hq, sq, sk, dtype=dtype), bools(b, 1, sq, sk), 2.0 ** -torch.arange(hq, device="cuda")
        given = {"softcap": 4.0, "alibi_slopes": slopes, "mask": mask, "dropout_p": 0.2}
        for names in itertools.chain.from_iterable(itertools.combinations(given, n) for n in range(5)):
            more = {name: given[name] for name in names} | ({"seed": 3} if "dropout_p" in names else {})
            got, again, expected = gradients(*x, rows=(90, 90, 80), bias=bias, **more, **MASKS[options])
            assert_gradients_alike(got, expected)
            assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_wherever_elements_lie(dtype, wide):
    """Alone and behind other elements, rows of any length, keys apart; the float32 copy of a bias gives its bits."""
    x = inputs(2, 4, 2, 200, 390, D, dtype=dtype)

    def of(bias, *others):
        out, lse = flashgqa.attention(*x, bias=bias, return_lse=True)
        dout = random(*out.shape, dtype=dtype, seed=8)
        name = backward_row(dtype, D)
        return [flashgqa.attention_backward(dout, *x, out, lse, bias=one, kernel=name)[:3] for one in (bias, *others)]

    bias = random(2, 4, 200, 390, dtype=dtype)
    given = bias.float() if wide else bias
    apart = torch.empty(2, 4, 200, 390, 3, dtype=given.dtype, device="cuda")[..., 1].copy_(given)
    turned = given.transpose(2, 3).contiguous().transpose(2, 3)
    places = (given, at_offset(given, 1), at_offset(given, 16, 391), at_offset(given, 16, 400), apart, turned)
    first, *others = of(bias, *places)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for shape in ((1, 4, 200, 390), (2, 1, 200, 390), (2, 1, 1, 390), (200, 390), (1, 4, 200, 1)):
        narrow = random(*shape, dtype=dtype)
        first, other = of(narrow.broadcast_to(2, 4, 200, 390).contiguous(), narrow.float() if wide else narrow)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [1e3, 3e4, 1e6])
@pytest.mark.parametrize("more", ["softcap", "alibi_slopes", "both"])
def test_large_biases(more, size):
    """LSEs that hold no digits of the sum, beside a soft cap and ALiBi."""
    x = inputs(2, 4, 2, 200, 264, D, dtype=torch.bfloat16)
    bias = (random(2, 4, 200, 264, dtype=torch.float32) > 0.5).to(torch.bfloat16) * size
    given = {"softcap": 3.0, "alibi_slopes": torch.linspace(0.01, 2.0, 4, device="cuda")}
    given = given if more == "both" else {more: given[more]}
    for options in ({"bias": bias}, {"bias": bias - size}, {"bias": bias, "causal": True}):
        assert_gradients_alike(*gradients(*x, **options, **given))


@pytest.mark.parametrize("how", POISON)
@pytest.mark.parametrize("more", ["nothing", "alibi", "mask"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_poison_under_a_soft_cap(d, wide, more, how):
    bias = torch.linspace(-1, 1, 260, device="cuda").expand(2, 1, 200, 260).clone()
    bias[:, :, :100, 150] = bias[:, :, 101, 30] = -INF
    options = {"softcap": 3.0, "bias": at_offset(bias if wide else bias.bfloat16(), 0, 264)}
    if more == "alibi":
        options["alibi_slopes"] = torch.linspace(0.01, 0.2, 4, device="cuda")
    if more == "mask":
        options["mask"] = bools(2, 1, 200, 260)
    clean = arrays(d, torch.bfloat16)
    got, before = check(poisoned(clean, how), options), check(clean, options)
    for x, y in zip(got, before, strict=True):
        assert torch.equal(x[0], y[0])


@pytest.mark.parametrize("how", VALUES)
@pytest.mark.parametrize("asked", [name for name in OPTIONS if "bias" in name and "dropout" not in name] + ["alibi bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(dtype, asked, how):
    """As general kernels have them."""
    tensors = arrays(D, dtype)
    options = OPTIONS["bias"](dtype) | OPTIONS["alibi"](dtype) if asked == "alibi bias" else OPTIONS[asked](dtype)
    for which, head, row, column, value in VALUES[how]:
        tensors[which][1, head, row, column] = value
    q, k, v, dout = tensors.values()
    got, expected = gradients(q, k, v, dout=dout, **options)
    for name, x, want in zip(("dq", "dk", "dv"), got, expected, strict=True):
        finite = want.isfinite()
        wrong = ~x.isfinite() & finite if name == "dv" else x.isfinite() != finite
        assert not wrong.any(), (name, int(wrong.sum()))
        assert_alike([x.where(finite, 0)], [want.where(finite, 0)], [name], factor=8, dtype=dtype)


def all_gradients(x, bias, dout=None, **options):
    """dbias, too, by the row for Hopper, twice, and by general ones."""
    forward = {name: value for name, value in options.items() if name != "deterministic"}
    out, lse = flashgqa.attention(*x, bias=bias, return_lse=True, **forward)
    dout = random(*out.shape, dtype=out.dtype, seed=8) if dout is None else dout
    own, other = backward_row(out.dtype, D), general("bwd", out.dtype, D)
    return [WITH_DBIAS(dout, *x, out, lse, bias=bias, kernel=name, **options)[:4] for name in (own, own, other)]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_bias(dtype, wide, options):
    """What nobody sees is 0, whatever was in the memory; rows of any length; beside whatever has no part in it."""
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 520), (1, 4, 1, 30, 301), (2, 2, 2, 130, 65)):
        x = inputs(b, hq, hk, sq, sk, D, dtype=dtype)
        bias, slopes = random(b, hq, sq, sk, dtype=torch.float32 if wide else dtype), torch.linspace(0.01, 0.5, hq, device="cuda")
        nan = torch.full_like(bias, torch.nan)
        del nan  # the memory of dbias
        for more in ({}, {"mask": bools(b, 1, sq, sk), "dropout_p": 0.3, "seed": 4}, {"alibi_slopes": slopes}):
            got, again, expected = all_gradients(x, bias, **more, **MASKS[options])
            assert_alike(got[:3], expected[:3], ("dq", "dk", "dv"))
            assert got[3].dtype == bias.dtype
            if wide:  # not rounded
                torch.testing.assert_close(got[3], expected[3], rtol=0, atol=1e-5 * expected[3].abs().max().item())
            else:
                assert_alike(got[3:], expected[3:], ["dbias"])
            assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize("how", VALUES)
@pytest.mark.parametrize("wide", [False, True])
def test_gradients_of_a_bias_beside_what_is_not_finite(wide, how):
    tensors = arrays(D, torch.bfloat16)
    bias = torch.where(bools(2, 4, 200, 260), random(2, 4, 200, 260, dtype=torch.float32), -INF)
    for which, head, row, column, value in VALUES[how]:
        tensors[which][1, head, row, column] = value
    *x, dout = tensors.values()
    got, _, expected = all_gradients(x, bias if wide else bias.bfloat16(), dout)
    finite = expected[3].isfinite()
    assert torch.equal(got[3].isfinite(), finite)
    assert_alike([got[3].where(finite, 0)], [expected[3].where(finite, 0)], ["dbias"], dtype=torch.bfloat16)


def test_gradients_of_a_bias_of_lengths():
    x = inputs(3, 4, 2, 200, 260, D, dtype=torch.bfloat16)
    lengths = {"q_lens": torch.tensor([130, 0, 200]), "kv_lens": torch.tensor([260, 33, 7])}
    lengths = {name: n.int().cuda() for name, n in lengths.items()}
    got, _, expected = all_gradients(x, random(3, 4, 200, 260, dtype=torch.bfloat16), causal=True, **lengths)
    assert_alike(got, expected, ("dq", "dk", "dv", "dbias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plan(dtype):
    x = inputs(2, 8, 2, 300, 303, D - 24, dtype=dtype)
    bias, mask = random(1, 8, 300, 303, dtype=dtype), bools(300, 303)
    name = backward_row(dtype, D)
    more = {"softcap": 5.0}, {"alibi_slopes": torch.rand(8, device="cuda")}, {"mask": mask}, {"dropout_p": 0.5, "seed": 1}
    for of in (bias, bias.float(), bias.mT.contiguous().mT, bias[0, 0, :1]):
        assert_gradients_alike(*gradients(*x, bias=of))
        for options in more:
            assert_gradients_alike(*gradients(*x, bias=of, **options))
    full = bias.repeat(2, 1, 1, 1)
    for of, options in itertools.product((bias, full), ({}, *more)):
        assert flashgqa.explain(*x, backward=True, bias=of, **options)["kernel"] == name
    for given, more, reason in (
        (full[:, :, :1], {}, "query rows or keys share"),
        (full.double(), {}, "neither float32 nor of q's dtype"),
    ):
        plan = flashgqa.explain(*x, backward=True, bias=given, **more)
        assert plan["kernel"] == general("bwd", dtype, D) and reason in dict(plan["refused"])[name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_fewer_dims(dtype):
    """The rows of their own head dim take no bias whose keys are not side by side. This one sums dQ in registers."""
    x = inputs(1, 8, 1, 505, 1138, 64, dtype=dtype)
    for more in ({}, {"causal": True}):
        options = {"bias": random(1, 8, 1138, 505, dtype=torch.float32).mT} | more
        out, lse = flashgqa.attention(*x, return_lse=True, **options)
        saved = random(*out.shape, dtype=dtype, seed=9), *x, out, lse
        expected = flashgqa.attention_backward(*saved, kernel=general("bwd", dtype, 64), **options)[:3]
        for name in (None, backward_row(dtype, D)):
            ordered, free = (
                flashgqa.attention_backward(*saved, kernel=name, deterministic=n == 0, **options)[:3] for n in range(2)
            )
            assert_gradients_alike(ordered, expected)
            assert all(torch.equal(a, b) for a, b in zip(free, ordered, strict=True))
