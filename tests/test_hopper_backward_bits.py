"""A boolean mask tensor and dropout, beside ALiBi, too, in the backward kernels for Hopper: each row forced, against the oracle
under the error rule, and what is theirs alone: eight bytes at once and single ones, tiles that end in the middle, Philox blocks
of other lanes' keys, what is hidden or dropped of numbers that are not finite."""

import itertools

import pytest
import torch
from cases import Case
from gpu import assert_alike
from test_hopper import DTYPES, MASKS, inputs, random
from test_hopper_backward import ROWS, assert_gradients_alike, backward_row
from test_hopper_softcap import check_backward_row, general
from test_hopper_terms import at_offset, bools

import flashgqa

NAMES = ROWS
DIMS = 64, 128, 256
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
CASES = [
    Case(b=2, sq=150, sk=200, causal=True, mask="b1qk", sink=True),
    Case(b=2, sq=140, sk=264, mask="bhqk", q_lens=(140, 0), kv_lens=(264, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, mask="1hqk", sink=True),
    Case(b=2, sq=300, sk=401, window=(70, 9), align="top-left", mask="b11k", data="shift"),
    Case(b=2, sq=130, sk=300, mask="11q1", data="large"),
    Case(b=2, sq=90, sk=256, mask="1hqk", score_storage="sliced"),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, bounds=True, mask="b1qk", sink=True),
    Case(packed=((130, 256), (3, 300)), mask="1h1k"),
    Case(b=2, sq=150, sk=200, causal=True, dropout=0.1, sink=True),
    Case(b=2, sq=140, sk=264, dropout=0.5, seed_offset=3, q_lens=(140, 0), kv_lens=(264, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, mask="1hqk", dropout=0.1),
    Case(b=2, sq=300, sk=401, window=(70, 9), align="top-left", dropout=0.97, data="shift"),
    Case(b=2, sq=130, sk=300, mask="b11k", dropout=0.2, data="large"),
    Case(sq=40, sk=100, dropout=1.0),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, dropout=0.3, sink=True),
    Case(packed=((130, 256), (3, 300)), mask="b1qk", dropout=0.1),
    Case(b=2, sq=150, sk=200, causal=True, alibi="h", mask="b1qk", sink=True),
    Case(b=2, sq=140, sk=264, alibi="bh", dropout=0.5, seed_offset=3, q_lens=(140, 0), kv_lens=(264, 33), data="large"),
    Case(sq=70, sk=257, hq=3, hk=1, scale=0.9, alibi="h", mask="1hqk", dropout=0.2),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, alibi="bh", dropout=0.3, sink=True),
    Case(b=2, sq=150, sk=200, causal=True, softcap=20.0, mask="b1qk", sink=True),
    Case(b=2, sq=140, sk=264, softcap=3.0, dropout=0.5, seed_offset=3, q_lens=(140, 0), kv_lens=(264, 33), data="large"),
    Case(sq=70, sk=257, hq=3, hk=1, scale=0.9, softcap=1.0, alibi="h", mask="1hqk", dropout=0.2),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, softcap=30.0, alibi="bh", dropout=0.3, sink=True),
]
EXTENTS = (2, 32, 1, 40, 300), (1, 4, 1, 3000, 30), (1, 6, 2, 700, 900), (3, 5, 5, 33, 1), (8, 16, 16, 1100, 1100)
SHAPES = {
    "1hqk": (1, 8, 300, 520), "b1qk": (2, 1, 300, 520), "bhqk": (2, 8, 300, 520), "b11k": (2, 1, 1, 520), "qk": (300, 520),
    "1hq1": (1, 8, 300, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case):
    check_backward_row(case, name)


def gradients(q, k, v, dout=None, rows=(90, 80), **options):
    """By each of these rows, from the results of the general forward row."""
    width = next(n for n in DIMS if n >= q.shape[-1])
    forward = {key: value for key, value in options.items() if key != "deterministic"}
    options["seed"] = forward["seed"] = options.pop("seed", 77)
    out, lse = flashgqa.attention(q, k, v, return_lse=True, kernel=general("fwd", q.dtype, width), **forward)
    dout = random(*out.shape, dtype=q.dtype, seed=8) if dout is None else dout
    options["dlse"] = random(*lse.shape, dtype=torch.float32, seed=7)
    names = (backward_row(q.dtype, width) if arch == 90 else general("bwd", q.dtype, width) for arch in rows)
    return [flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=name, **options)[:3] for name in names]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_every_way_of_sharing(d, dtype, options):
    """Groups of heads, parts of a group, extents of 1, rows that see nothing; any order of the key tiles."""
    q, k, v = inputs(2, 8, 2, 300, 520, d, dtype=dtype)
    for shape, free in itertools.product(SHAPES.values(), (False, True)):
        mask = bools(*shape)
        if shape[-2] == 300:
            mask[..., 70:90, :] = False
        for dropout in (0.0, 0.2):
            assert_gradients_alike(*gradients(q, k, v, mask=mask, deterministic=not free, dropout_p=dropout, **MASKS[options]))
    for b, hq, hk, sq, sk in EXTENTS:
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        for more in ({"mask": bools(b, hq, sq, sk)}, {"dropout_p": 0.3}):
            assert_gradients_alike(*gradients(q, k, v, **more, **MASKS[options]))


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_beside_alibi_and_softcap(d, dtype, options, softcap):
    """A mask, dropout and both; twice the same bits. Slopes whose LSEs hold no sum: of keys that the mask shows, no two are
    equally far, as float32 could not tell their scores from each other."""
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 520), *EXTENTS[:4]):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        slopes = torch.rand(b, hq, device="cuda") ** 4
        for more in ({"mask": bools(b, hq, sq, sk)}, {"dropout_p": 0.3}, {"mask": bools(b, 1, 1, sk), "dropout_p": 0.3}):
            more |= {"softcap": softcap} if softcap else {}
            got, again, expected = gradients(q, k, v, rows=(90, 90, 80), alibi_slopes=slopes, **more, **MASKS[options])
            assert_gradients_alike(got, expected)
            assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
            if softcap:
                assert_gradients_alike(*gradients(q, k, v, **more, **MASKS[options]))
    q, k, v = inputs(2, 4, 2, 300, 300, d, dtype=dtype)
    mask = bools(2, 1, 300, 300).tril()
    for slope in (50.0, -50.0, 1e6, -1e6):
        odd = torch.tensor([0.1, slope, 0.01, 0.0], device="cuda")
        more = {"softcap": softcap} if softcap else {}
        assert_gradients_alike(*gradients(q, k, v, alibi_slopes=odd, mask=mask, dropout_p=0.2, **more, **MASKS[options]))


@pytest.mark.parametrize("d", DIMS)
def test_the_same_bits_wherever_elements_lie(d):
    q, k, v = inputs(2, 4, 2, 200, 392, d)
    mask = bools(2, 4, 200, 392)
    (first,) = gradients(q, k, v, mask=mask, rows=(90,))
    apart = torch.empty(2, 4, 200, 392, 3, dtype=torch.bool, device="cuda")[..., 1].copy_(mask)
    turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
    sixes = mask.to(torch.uint8).mul(6).view(torch.bool)
    places = (at_offset(mask, *place) for place in ((1,), (0, 400), (8, 393), (2, 396)))
    for other in (mask, *places, apart, turned, sixes):
        (again,) = gradients(q, k, v, mask=other, rows=(90,))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("d", DIMS)
def test_masks_that_say_what_options_say(d):
    """The same bits as by options: causal with lengths."""
    q, k, v = inputs(2, 8, 2, 420, 420, d)
    lens = torch.tensor([420, 333], dtype=torch.int32, device="cuda")
    mask = torch.arange(420, device="cuda") < lens[:, None, None, None]
    seen = mask & torch.ones(420, 420, dtype=torch.bool, device="cuda").tril()
    (by_tensor,) = gradients(q, k, v, mask=seen, rows=(90,), batch_invariant=True)
    (by_both,) = gradients(q, k, v, mask=mask, causal=True, rows=(90,), batch_invariant=True)
    (by_options,) = gradients(q, k, v, kv_lens=lens, causal=True, align="top-left", rows=(90,), batch_invariant=True)
    assert_gradients_alike(by_tensor, by_options)
    assert_gradients_alike(by_both, by_options)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("d", DIMS)
def test_poison_stays_where_it_is_seen(d, dropout):
    q, k, v = inputs(2, 8, 2, 260, 390, d)
    shown = bools(2, 1, 260, 390)
    shown[:, :, :100, 200] = False
    shown[:, :, 100:, 200] = True
    shown[:, :, :, 300] = False
    shown[:, :, 40] = False
    dout = random(2, 8, 260, d, dtype=q.dtype, seed=8)
    options = {"mask": shown, "dropout_p": dropout}
    (clean,) = gradients(q, k, v, dout, rows=(90,), **options)
    nan = float("nan")
    for of, (x, row) in itertools.product((q, k, v, dout), ((nan, 40), (nan, 300), (float("inf"), 200), (nan, 200), (nan, 250))):
        if row >= of.shape[2]:
            continue
        bad = of.clone()
        bad[:, -1, row, 5] = x
        tensors = [bad if y is of else y for y in (q, k, v, dout)]
        got, expected = gradients(*tensors[:3], tensors[3], **options)
        for name, grad, other, untouched in zip(("dq", "dk", "dv"), got, expected, clean, strict=True):
            finite = other.isfinite()
            assert torch.equal(grad.isfinite(), finite), (name, x, row)
            assert_alike([grad.where(finite, 0)], [other.where(finite, 0)], [name])
            if row == (40 if of is q or of is dout else 300):
                assert torch.equal(grad, untouched)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_which_weights_are_dropped(d, dtype, p):
    """Those of dropout_mask(): Q = 0 makes all weights equal, and dV of a dO with a single 1 is a column of the mask."""
    b, hq, hk, sq, sk = 2, 4, 2, 150, 300
    q, k, v = (torch.zeros(b, h, s, d, dtype=dtype, device="cuda") for h, s in ((hq, sq), (hk, sk), (hk, sk)))
    keep = torch.from_numpy(flashgqa.dropout_mask(b, hq, sq, sk, p, 5)).cuda()
    out, lse = flashgqa.attention(q, k, v, dropout_p=p, seed=5, return_lse=True)
    dout = torch.zeros_like(q)
    rows = torch.arange(sq, device="cuda")
    for first in range(0, sq, d):
        dout.zero_()
        some = rows[first : first + d]
        dout[:, ::2, some, some - first] = 1.0
        dv = flashgqa.attention_backward(dout, q, k, v, out, lse, dropout_p=p, seed=5, kernel=backward_row(dtype, d))[2]
        assert torch.equal(dv[..., : len(some)] != 0, keep[:, ::2, some].transpose(2, 3))


@pytest.mark.parametrize("d", DIMS)
def test_seeds_on_the_device_and_runs(d):
    """The same bits by a seed as a number, on the device, and again; others by another one."""
    q, k, v = inputs(2, 8, 2, 260, 390, d)
    tensor = torch.tensor([123, 0], device="cuda")
    for more in ({}, {"mask": bools(2, 1, 260, 390)}, {"causal": True}):
        (first,) = gradients(q, k, v, rows=(90,), dropout_p=0.2, seed=tensor, **more)
        for seed in (123, tensor, tensor):
            (other,) = gradients(q, k, v, rows=(90,), dropout_p=0.2, seed=seed, **more)
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
        (other,) = gradients(q, k, v, rows=(90,), dropout_p=0.2, seed=124, **more)
        assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_plan():
    """What runs here, and what not: a bias beside the mask that query rows share and that asks for a gradient."""
    q, k, v = inputs(2, 8, 2, 200, 200, 128)
    mask = bools(2, 1, 200, 200)
    drops = {"dropout_p": 0.1, "seed": 1}
    for options in ({"mask": mask}, drops, {"mask": mask, **drops}):
        name = backward_row(q.dtype, 128)
        assert flashgqa.explain(q, k, v, backward=True, **options)["kernel"] == name
        slopes, wide = {"alibi_slopes": torch.rand(8, device="cuda")}, inputs(2, 8, 2, 200, 200, 192)
        for more in ({}, slopes, {"softcap": 5.0}, {"softcap": 5.0, **slopes}):
            assert flashgqa.explain(q, k, v, backward=True, **options, **more)["kernel"] == name
            assert flashgqa.explain(*wide, backward=True, **options, **more)["kernel"] == backward_row(q.dtype, 256)
        if "mask" in options:
            assert flashgqa.explain(q, k, v, backward=True, **options, bias=bools(200, 200).half())["kernel"] == name
            plan = flashgqa.explain(q, k, v, backward=True, **options, bias=bools(1, 200).half())
            assert plan["kernel"] == general("bwd", q.dtype, 128) and "bias" in dict(plan["refused"])[name]
