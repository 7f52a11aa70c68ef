"""A bias tensor in the backward kernels for Hopper: each row that has it forced, against the oracle under the error rule, and
what is theirs alone: tiles by TMA, one buffer of dQ, rows whose LSE holds no sum, keys that a bias of -inf hides."""

import dataclasses
import itertools

import pytest
import torch
from cases import Case
from checking import assert_within, exact, naive_backward
from gpu import assert_alike, backward_without_dbias, get
from test_hopper import DTYPES, MASKS, inputs, random
from test_hopper_alibi import all_pairs_of_lengths, gradients
from test_hopper_backward import ROWS, assert_gradients_alike, assert_poison_alike, backward_row
from test_hopper_softcap import ALIGNED, check_backward_row, extents, general
from test_hopper_terms import at_offset

import flashgqa
from flashgqa import reference

NAMES = [name for name in ROWS if extents(name)[1] in (64, 128)]
DIMS = 64, 128, 256                             # 256 without gradients of the bias: test_hopper_backward_any_bias.py
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
CASES = [
    Case(b=2, sq=152, sk=200, causal=True, bias="bhqk", sink=True),
    Case(b=2, sq=140, sk=264, bias="1hqk", q_lens=(140, 0), kv_lens=(264, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, bias="bhqk", sink=True),
    Case(b=2, sq=300, sk=408, window=(70, 9), align="top-left", bias="b11k", data="shift"),
    Case(b=2, sq=130, sk=304, bias="1h1k", data="large"),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, bias="bhqk", sink=True),
    Case(packed=((130, 256), (3, 304)), bias="1hqk", window=(60, 0)),
    Case(b=2, sq=152, sk=200, causal=True, bias="bhqk", sink=True, dropout=0.1),
    Case(b=2, sq=140, sk=264, bias="1hqk", q_lens=(140, 0), kv_lens=(264, 33), dropout=0.5, seed_offset=3),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, bias="bhqk", mask="b1qk", dropout=0.2),
    Case(b=2, sq=300, sk=408, window=(70, 9), align="top-left", bias="b11k", mask="b1qk", data="shift", dropout=0.1),
    Case(b=2, sq=130, sk=304, bias="1hqk", data="large", dropout=0.97),
    Case(b=2, sq=40, sk=104, bias="1hqk", dropout=1.0),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, bias="bhqk", sink=True, dropout=0.3),
    Case(packed=((130, 256), (3, 304)), bias="1hqk", dropout=0.1),
]
SHAPES = {"1hqk": (1, 8, 300, 520), "b1qk": (2, 1, 300, 520), "bhqk": (2, 8, 300, 520), "b11k": (2, 1, 1, 520), "qk": (300, 520)}


def assert_within_the_rule(x, got, bias, **options):
    """Against float64, for the dout and dlse of gradients() and dbias_of(). The last digit of an LSE of -65504 is 2^-8: general
    kernels, which take weights from it up to 2^17, make all of such a row up to two epsilons of float16 too large or too small,
    and are no measure. These count from the bias (bwd_delta_tiled.cu)."""
    dout, dlse = random(*x[0].shape, dtype=bias.dtype, seed=8), random(*x[0].shape[:-1], dtype=torch.float32, seed=7)
    dout, dlse, bias, *x = map(get, (dout, dlse, bias, *x))
    options = {name: get(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    naive = naive_backward(dout, *x, dlse=dlse, bias=bias, **options)
    true_dout, true_dlse, true_bias, *true_x = (exact(y, bias.dtype) for y in (dout, dlse, bias, *x))
    truth = reference.attention_backward(true_dout, *true_x, dlse=true_dlse, bias=true_bias, **options)
    for name, one in zip(("dq", "dk", "dv", "dbias"), got, strict=False):
        assert_within(name, get(one), getattr(truth, name), (getattr(result, name) for result in naive), bias.dtype, 3)


@pytest.fixture
def without_dbias(monkeypatch):
    monkeypatch.setattr(flashgqa, "attention_backward", backward_without_dbias)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case, request):
    if "q" not in case.bias:                               # whose gradient the general kernels make
        request.getfixturevalue("without_dbias")
    check_backward_row(dataclasses.replace(case, bias_dtype=extents(name)[0], score_storage=ALIGNED), name)


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_every_way_of_sharing(d, dtype, options):
    """Extents of 1, groups, split walks, one key tile and many; twice the same bits."""
    x = inputs(2, 8, 2, 300, 520, d, dtype=dtype)
    for name in SHAPES:
        got, again, expected = gradients(*x, rows=(90, 90, 80), bias=random(*SHAPES[name], dtype=dtype), **MASKS[options])
        assert_gradients_alike(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    shapes = (2, 32, 1, 40, 304), (1, 4, 1, 30, 3000), (1, 6, 2, 700, 904), (3, 5, 5, 33, 8), (1, 8, 8, 900, 264)
    for b, hq, hk, sq, sk in shapes:
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias = random(b, hq, sq, sk, dtype=dtype)
        for deterministic in (True, False):
            assert_gradients_alike(*gradients(*x, bias=bias, deterministic=deterministic, **MASKS[options]))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", DIMS)
def test_all_pairs_of_lengths(d, mask):
    """Packed, and padded with NaN, in the bias, too."""
    queries, keys, starts, packed = all_pairs_of_lengths(d)
    bias = random(len(queries), 4, 300, 400, dtype=torch.float16)
    bias.masked_fill_((torch.arange(300, device="cuda") >= queries[:, None])[:, None, :, None], float("nan"))
    bias.masked_fill_((torch.arange(400, device="cuda") >= keys[:, None])[:, None, None, :], float("nan"))
    options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=300, max_kv=400, bias=bias)
    for extra in ({}, {"deterministic": False}):
        assert_gradients_alike(*gradients(*packed, **options, **MASKS[mask], **extra))
    padded = inputs(len(queries), 4, 2, 300, 400, d)
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    assert_gradients_alike(*gradients(*padded, q_lens=queries, kv_lens=keys, bias=bias, **MASKS[mask]))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("d", DIMS)
def test_long_passes(d):
    """The folded order and its parts; windows, walked head by head."""
    causal, left = {"causal": True}, {"window": (500, 0)}
    for b, hq, hk, s, options in ((1, 32, 8, 2048, causal), (1, 4, 1, 8336, causal), (2, 8, 2, 1504, left), (1, 4, 4, 5000, {})):
        x = inputs(b, hq, hk, s, s, d, dtype=torch.bfloat16)
        bias = random(1, hq, s, s, dtype=torch.bfloat16)
        assert_gradients_alike(*gradients(*x, bias=bias, **options))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("d", DIMS)
def test_the_same_bits_wherever_elements_lie(d):
    x = inputs(2, 4, 2, 200, 392, d, dtype=torch.bfloat16)
    bias = random(2, 4, 200, 392, dtype=torch.bfloat16)
    apart = torch.full((2, 4, 201, 400), torch.nan, dtype=bias.dtype, device="cuda")[:, :, :200, :392].copy_(bias)
    swapped = bias.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    first, *others = (gradients(*x, rows=(90,), bias=of)[0] for of in (bias, apart, swapped))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    places = (0, 393), (3, 394), (1, 396), (5, 400), (2, 407)            # copied here; the forward pass reads them as they are
    off, *others = (gradients(*x, rows=(90,), bias=at_offset(bias, *place))[0] for place in places)
    assert_gradients_alike(off, first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(off, other, strict=True))
    row = random(1, 1, 1, 392, dtype=torch.bfloat16)
    first, *others = (gradients(*x, rows=(90,), bias=of)[0] for of in (row, row.expand(2, 4, 200, 392), row.repeat(2, 4, 200, 1)))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("low", [-1e4, -3e4, -6e4, -1e9, "min", -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_a_bias_as_a_mask(d, dtype, low):
    """Causal, with padding in front: rows that see nothing but the low number count all of it."""
    value = torch.finfo(dtype).min if low == "min" else max(low, torch.finfo(dtype).min) if low != -torch.inf else low
    x = inputs(2, 4, 2, 424, 424, d, dtype=dtype)
    shown = torch.ones(424, 424, dtype=torch.bool, device="cuda").tril().repeat(2, 1, 1, 1)
    shown[1, :, :, :77] = False
    bias = torch.zeros(2, 1, 424, 424, dtype=dtype, device="cuda").masked_fill_(~shown, value)
    got, expected = gradients(*x, bias=bias)
    assert all(a.isfinite().all() for a in got)
    if dtype == torch.float16 and -torch.inf < value < -(2**15):
        assert_within_the_rule(x, got, bias)
    else:
        assert_gradients_alike(got, expected)
    if low == -torch.inf:
        assert (got[0][1, :, :77] == 0).all() and all((a[1, :, :77] == 0).all() for a in got[1:])


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("size", [1e3, 3e4, 1e6, 1e30])
@pytest.mark.parametrize("d", DIMS)
def test_large_biases(d, size):
    """LSEs that hold no digits of the sum: rows whose largest biases are equal, here or everywhere, with a sink, too."""
    x = inputs(2, 4, 2, 200, 264, d, dtype=torch.bfloat16)
    bias = (random(2, 4, 200, 264, dtype=torch.float32) > 0.5).to(torch.bfloat16) * size
    for options in ({"bias": bias}, {"bias": -bias}, {"bias": bias - size}, {"bias": bias, "causal": True}):
        assert_gradients_alike(*gradients(*x, **options))
        assert_gradients_alike(*gradients(*x, **options, sink=torch.linspace(-3.0, 3.0, 4, device="cuda")))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("d", DIMS)
def test_poison_stays_where_it_is_seen(d, which):
    """NaN in q, k, v or dO reach the gradients that the general kernel says, and leave the bits of all others."""
    x = [*inputs(2, 4, 2, 300, 392, d), random(2, 4, 300, d, dtype=torch.float16, seed=8)]
    bias = random(2, 1, 300, 392, dtype=torch.float16)
    bias[:, :, :100, 200] = -torch.inf
    bias[:, :, 120] = -torch.inf
    bias[:, :, :, 250] = -torch.inf
    options = {"bias": bias}
    clean, _ = gradients(*x[:3], dout=x[3], **options)
    for at in (120, 200, 250):
        poisoned = [y.clone() for y in x]
        poisoned[which][1, 1, at, 5] = torch.nan
        got, expected = gradients(*poisoned[:3], dout=poisoned[3], **options)
        assert_poison_alike(got, expected, clean)
        if at == 250 and which in (1, 2):                  # a key that nobody sees
            assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("d", DIMS)
def test_a_bias_that_is_not_finite(d, value):
    x = inputs(2, 8, 2, 260, 392, d, dtype=torch.bfloat16)
    bias = random(2, 8, 260, 392, dtype=torch.bfloat16)
    bias[1, 3, 7, 300:] = -torch.inf
    bias[1, 3, 7, 200] = value
    bias[1, 3, 9, 390] = value
    causal = {"causal": True, "align": "top-left"}
    got, expected = gradients(*x, bias=bias)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert_alike([a.nan_to_num(0.0)], [b.nan_to_num(0.0)], ["dq"])
    hidden, clean = (gradients(*x, rows=(90,), bias=of, **causal)[0] for of in (bias, bias.nan_to_num(0.0, 0.0, -torch.inf)))
    assert all(torch.equal(a, b) for a, b in zip(hidden, clean, strict=True))


@pytest.mark.usefixtures("without_dbias")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_plan(d, dtype):
    x = inputs(2, 8, 2, 304, 304, d - 8, dtype=dtype)
    name = backward_row(dtype, d)
    bias = random(1, 8, 304, 304, dtype=dtype)
    assert_gradients_alike(*gradients(*x, bias=bias))
    odd = random(1, 8, 304, 305, dtype=dtype)[..., :304]
    for of, drops in itertools.product((bias, bias.repeat(2, 1, 1, 1), bias[0, 0]), ({}, {"dropout_p": 0.5, "seed": 1})):
        assert flashgqa.explain(*x, backward=True, bias=of, **drops)["kernel"] == name
    for options, reason in (
        ({"bias": bias[:, :, :1]}, "query rows or keys share"), ({"bias": bias.double()}, "neither float32 nor of q's dtype"),
    ):
        plan = flashgqa.explain(*x, backward=True, **{"bias": bias, **options})
        assert plan["kernel"] == general("bwd", dtype, d) and reason in dict(plan["refused"])[name]
    assert flashgqa.explain(*x, backward=True, bias=odd)["kernel"] == name
    plan = flashgqa.explain(*x, backward=True, bias=bias.mT)
    assert plan["kernel"] == backward_row(dtype, 256) and "side by side" in dict(plan["refused"])[name]
    assert_gradients_alike(*gradients(*x, bias=odd))
    with pytest.raises(NotImplementedError, match="16 bytes"):
        gradients(*x, bias=odd, batch_invariant=True)


def dbias_of(x, bias, arch, dout=None, **options):
    q, k, v = x
    out, lse = flashgqa.attention(q, k, v, bias=bias, return_lse=True, **options)
    dout = random(*out.shape, dtype=q.dtype, seed=8) if dout is None else dout
    dlse = random(*lse.shape, dtype=torch.float32, seed=7)
    name = backward_row(q.dtype, q.shape[-1]) if arch == 90 else general("bwd", q.dtype, q.shape[-1])
    return flashgqa.attention_backward(dout, q, k, v, out, lse, dlse=dlse, bias=bias, kernel=name, **options)


def assert_all_alike(got, expected):
    assert_alike(got[:4], expected[:4], ("dq", "dk", "dv", "dbias"))


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_of_the_bias(d, dtype, options):
    """What nobody sees is 0, whatever was in the memory; twice the same bits."""
    shapes = (2, 8, 2, 300, 520), (2, 32, 1, 40, 304), (1, 4, 1, 30, 3000), (3, 5, 5, 33, 8), (1, 8, 8, 900, 264)
    for (b, hq, hk, sq, sk), shared in itertools.product(shapes, ("", "b", "h", "bh")):
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias = random(1 if "b" in shared else b, 1 if "h" in shared else hq, sq, sk, dtype=dtype)
        bias.masked_fill_(bias > 2, -torch.inf)
        nan = torch.full_like(bias, torch.nan)
        del nan                                            # the memory of dbias
        got, again, expected = (dbias_of(x, bias, arch, **MASKS[options]) for arch in (90, 90, 80))
        assert_all_alike(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(got[:4], again[:4], strict=True))
        assert (got.dbias[bias == -torch.inf] == 0).all()


def bools(*shape, rate=0.7):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda") < rate


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_beside_a_mask(d, dtype, options):
    """Rows whose LSE holds no sum, NaN that only the mask or only the bias hides, keys that both hide from different rows."""
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 520), (2, 32, 1, 40, 304), (1, 6, 2, 700, 904)):
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias, mask = random(b, hq, sq, sk, dtype=dtype), bools(b, 1, sq, sk)
        assert_all_alike(*(dbias_of(x, bias, arch, mask=mask, **MASKS[options]) for arch in (90, 80)))
    x = inputs(2, 4, 2, 200, 264, d, dtype=dtype)
    bias, mask = random(2, 4, 200, 264, dtype=dtype), bools(2, 1, 200, 264)
    bias[:, :, ::2, 200], mask[:, :, 1::2, 200], mask[:, :, ::2, 200] = -torch.inf, False, True
    bias[:, :, :, 30], mask[:, :, :, 40] = -torch.inf, False
    clean = dbias_of(x, bias, 90, mask=mask, **MASKS[options])
    odd = [x[0], *(y.index_fill(2, torch.tensor([30, 40, 200], device="cuda"), torch.nan) for y in x[1:])]
    poisoned = dbias_of(odd, bias, 90, mask=mask, **MASKS[options])
    assert all(torch.equal(a, b) for a, b in zip(poisoned[:4], clean[:4], strict=True))
    odd = [x[0], x[1].index_fill(2, torch.tensor([90], device="cuda"), torch.nan), x[2]]
    poisoned, expected = (dbias_of(odd, bias, arch, mask=mask, **MASKS[options]).dbias for arch in (90, 80))
    assert torch.equal(poisoned.isfinite(), expected.isfinite())
    low = torch.where(mask, torch.finfo(dtype).min, bias)
    if dtype == torch.float16:
        assert_within_the_rule(x, dbias_of(x, low, 90, mask=mask, **MASKS[options])[:4], low, mask=mask, **MASKS[options])
    else:
        assert_all_alike(*(dbias_of(x, low, arch, mask=mask, **MASKS[options]) for arch in (90, 80)))


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_beside_dropout(d, dtype, options):
    """However heads and sequences share the bias; beside a mask, too; twice the same bits."""
    more = {"dropout_p": 0.3, "seed": torch.tensor([123, 9], device="cuda"), **MASKS[options]}
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 520), (2, 32, 1, 40, 304), (1, 4, 1, 30, 3000), (3, 5, 5, 33, 8)):
        x = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        for shared in ("", "b", "h", "bh"):
            bias = random(1 if "b" in shared else b, 1 if "h" in shared else hq, sq, sk, dtype=dtype)
            bias.masked_fill_(bias > 2, -torch.inf)
            got, again, expected = (dbias_of(x, bias, arch, **more) for arch in (90, 90, 80))
            assert_all_alike(got, expected)
            assert all(torch.equal(a, b) for a, b in zip(got[:4], again[:4], strict=True))
            assert (got.dbias[bias == -torch.inf] == 0).all()
        bias, mask = random(b, hq, sq, sk, dtype=dtype), bools(b, 1, sq, sk)
        assert_all_alike(*(dbias_of(x, bias, arch, mask=mask, **more) for arch in (90, 80)))


@pytest.mark.parametrize("beside", ["nothing", "mask", "shared"])
@pytest.mark.parametrize("d", [64, 128])
def test_poison_beside_dropout(d, beside):
    """NaN in q, k, v or dO that the bias hides changes no bit; where it is seen, what the general kernel says is not finite."""
    x = [*inputs(2, 4, 2, 300, 392, d), random(2, 4, 300, d, dtype=torch.float16, seed=8)]
    bias = random(2, 1 if beside == "shared" else 4, 300, 392, dtype=torch.float16)
    bias[:, :, :100, 200] = bias[:, :, 120] = bias[:, :, :, 250] = -torch.inf
    options = {"dropout_p": 0.4, "seed": 5} | ({"mask": bools(2, 1, 300, 392)} if beside == "mask" else {})
    clean = dbias_of(x[:3], bias, 90, dout=x[3], **options)
    for which, at in itertools.product(range(4), (120, 200, 250)):
        odd = [y.clone() for y in x]
        odd[which][1, 1, at, 5] = torch.nan
        got, expected = (dbias_of(odd[:3], bias, arch, dout=odd[3], **options) for arch in (90, 80))
        for name, a, b in zip(("dq", "dk", "dv", "dbias"), got, expected, strict=False):
            finite = b.isfinite()
            assert torch.equal(a.isfinite(), finite), (name, which, at)
            assert_alike([a.where(finite, 0)], [b.where(finite, 0)], [name])
        if (at == 250 and which in (1, 2)) or (at == 120 and which in (0, 3)):
            assert all(torch.equal(a, b) for a, b in zip(got[:4], clean[:4], strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_of_the_bias_of_all_pairs_of_lengths(d, mask):
    queries, keys, starts, packed = all_pairs_of_lengths(d)
    biases = [random(*shape, 300, 400, dtype=torch.float16) for shape in ((len(queries), 4), (1, 4))]
    options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=300, max_kv=400)
    for bias in biases:
        assert_all_alike(*(dbias_of(packed, bias, arch, **options, **MASKS[mask]) for arch in (90, 80)))
    padded = inputs(len(queries), 4, 2, 300, 400, d)
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    for bias in biases:
        assert_all_alike(*(dbias_of(padded, bias, arch, q_lens=queries, kv_lens=keys, **MASKS[mask]) for arch in (90, 80)))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1)])
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_of_odd_biases(d, shape):
    """Rows whose LSE holds no sum; NaN in q, k, v or dO, hidden and seen; causal ones of many tiles."""
    x = inputs(2, 4, 2, 200, 264, d, dtype=torch.bfloat16)
    bias = (random(*shape, 200, 264, dtype=torch.float32) > 0.5).to(torch.bfloat16) * -1e6
    assert_all_alike(*(dbias_of(x, bias - 1e6, arch) for arch in (90, 80)))
    hidden = random(*shape, 200, 264, dtype=torch.bfloat16)
    hidden[:, :, :, 200] = hidden[:, :, 120] = -torch.inf
    clean = dbias_of(x, hidden, 90)
    for which, at, nobody in ((0, 120, True), (0, 195, False), (1, 200, True), (1, 195, False), (2, 200, True), (2, 195, False)):
        odd = [y.clone() for y in x]
        odd[which][1, 1, at, 5] = torch.nan
        got, expected = (dbias_of(odd, hidden, arch).dbias for arch in (90, 80))
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert not nobody or torch.equal(got, clean.dbias)
    x = inputs(2, 4, 2, 1300, 1304, d, dtype=torch.bfloat16)
    bias = random(*shape, 1300, 1304, dtype=torch.bfloat16)
    assert_all_alike(*(dbias_of(x, bias, arch, causal=True) for arch in (90, 80)))
