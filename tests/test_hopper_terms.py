"""A bias and a mask tensor in the forward kernels for Hopper, alone and beside softcap and ALiBi: each row that has them forced,
against the oracle under the error rule, and what is theirs alone: pairs and single elements, blocks that end in the middle,
numbers that are as low as masks are."""

import dataclasses
import itertools

import pytest
import torch
from cases import Case
from gpu import assert_alike
from test_hopper import DTYPES, MASKS, ROWS, inputs, random, row_for
from test_hopper_softcap import check_forward_row, extents, general

import flashgqa

DIMS = 64, 128, 256
NAMES = [name for name in ROWS if extents(name)[1] in DIMS and name.endswith("plain")]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
CASES = [
    Case(b=2, sq=150, sk=200, causal=True, bias="bhqk", sink=True),
    Case(b=2, sq=140, sk=264, bias="1hqk", bias_dtype="float32", mask="b1qk", q_lens=(140, 0), kv_lens=(264, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, mask="bhqk", sink=True),
    Case(b=2, sq=300, sk=401, window=(70, 9), align="top-left", bias="b11k", data="shift"),
    Case(b=2, sq=130, sk=300, bias="11q1", mask="b11k", data="large"),
    Case(b=2, sq=90, sk=256, bias="1hqk", mask="1hqk", score_storage="sliced"),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, bounds=True, bias="bhqk", mask="b1qk", sink=True),
    Case(packed=((130, 256), (3, 300)), bias="1h1k", bias_dtype="float32"),
]
TOGETHER = [
    Case(b=2, sq=150, sk=200, causal=True, softcap=20.0, alibi="h", sink=True),
    Case(b=2, sq=140, sk=264, softcap=3.0, mask="b1qk", q_lens=(140, 0), kv_lens=(264, 33), data="large"),
    Case(sq=70, sk=256, hq=3, hk=1, softcap=50.0, bias="bhqk", window=(90, 30)),
    Case(b=2, sq=300, sk=140, align="top-left", alibi="bh", mask="b11k", scale=0.9, sink=True),
    Case(sq=130, sk=300, alibi="h", bias="1hqk", bias_dtype="float32", data="shift"),
    Case(sq=150, sk=150, alibi=100.0, mask="qk", data="large"),
    Case(packed=((130, 200), (0, 5), (65, 64)), causal=True, bounds=True, softcap=5.0, alibi="bh", bias="bhqk", mask="b1qk"),
]
SHAPES = {
    "1hqk": (1, 8, 300, 520), "b1qk": (2, 1, 300, 520), "bhqk": (2, 8, 300, 520), "b11k": (2, 1, 1, 520), "qk": (300, 520),
    "1hq1": (1, 8, 300, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *TOGETHER], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case):
    if case.bias and case.bias_dtype is None:
        case = dataclasses.replace(case, bias_dtype=extents(name)[0])
    check_forward_row(case, name)


def both(q, k, v, **options):
    names = row_for(q.dtype, q.shape[-1], q.shape[-1]), general("fwd", q.dtype, q.shape[-1])
    return [flashgqa.attention(q, k, v, return_lse=True, kernel=name, **options) for name in names]


def bools(*shape, rate=0.7):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda") < rate


def at_offset(x, elements, row=None):
    """x at an address that many elements behind an aligned one, with rows of `row` elements, NaN or True between them."""
    fill = True if x.dtype is torch.bool else float("nan")
    stride = row or x.shape[-1]
    rows = x.numel() // x.shape[-1]
    flat = torch.full((elements + rows * stride,), fill, dtype=x.dtype, device=x.device)
    strides = [x.stride(n) // x.shape[-1] * stride for n in range(x.dim() - 1)] + [1]
    place = flat.as_strided(x.shape, strides, elements)
    return place.copy_(x)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_every_way_of_sharing(d, dtype, options):
    """Heads that share a tile, parts of the keys, extents of 1; all dtypes of a bias."""
    q, k, v = inputs(2, 8, 2, 300, 520, d, dtype=dtype)
    for name, wide in itertools.product(SHAPES, (False, True)):
        bias = random(*SHAPES[name], dtype=torch.float32 if wide else dtype)
        for more in ({"bias": bias}, {"mask": bools(*SHAPES[name])}, {"bias": bias, "mask": bools(*SHAPES["b1qk"], rate=0.9)}):
            assert_alike(*both(q, k, v, **more, **MASKS[options]))
    for b, hq, hk, sq, sk in ((2, 32, 1, 40, 300), (1, 4, 1, 30, 3000), (1, 6, 2, 700, 900), (3, 5, 5, 33, 1)):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        for more in ({"bias": random(b, hq, sq, sk, dtype=dtype)}, {"mask": bools(b, hq, sq, sk)}):
            assert_alike(*both(q, k, v, **more, **MASKS[options]))


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize(
    "extents", [(2, 8, 2, 300, 527), (2, 6, 6, 700, 1040), (1, 32, 1, 40, 304), (3, 6, 2, 33, 5), (1, 4, 1, 9, 3000)], ids=str
)
@pytest.mark.parametrize("d", DIMS)
def test_tiles_by_tma(d, extents, options):
    """Rows on 16 bytes, NaN or True between them: every way of sharing, alone and together, few chunks a block and many."""
    b, hq, hk, sq, sk = extents
    q, k, v = inputs(b, hq, hk, sq, sk, d)
    row = sk + 31 & -16
    for shape in ((b, hq, sq, sk), (1, hq, sq, sk), (b, 1, sq, sk), (b, hq, 1, sk), (b, 1, 1, sk), (1, 1, 1, sk), (1, 1, sq, sk)):
        bias, wide, mask = random(*shape, dtype=q.dtype), random(*shape, dtype=torch.float32), bools(*shape)
        steep = torch.zeros_like(wide).masked_fill_(~mask, -3e4) + wide * 20
        for given in (
            {"bias": bias},
            {"bias": wide},
            {"mask": mask},
            {"bias": bias, "mask": mask},
            {"bias": wide, "mask": mask},
            {"bias": steep},
        ):
            assert_alike(*both(q, k, v, **{what: at_offset(x, 16, row) for what, x in given.items()}, **MASKS[options]))


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("extents", [(176, 176), (64, 304), (20, 144), (200, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_warpgroups_that_skip_blocks_between_tiles(d, dtype, extents, options):
    """More tiles than multiprocessors, of few blocks, of which warpgroups with few rows or none hand back all but one; more
    chunks of a block than there is room for. Fails by never coming back: what skips would wait for what waits for it."""
    q, k, v = inputs(32, 6, 2, *extents, d, dtype=dtype)
    bias, wide, mask = random(*extents, dtype=dtype), random(*extents, dtype=torch.float32), bools(32, 1, *extents)
    for given in ({"bias": bias, "mask": mask}, {"bias": wide}, {"bias": wide, "mask": mask}, {"bias": wide, "softcap": 9.0}):
        assert_alike(*both(q, k, v, **given, **MASKS[options]))


# Elements in front of the tensor, and how much longer than a multiple of 16 its rows are.
OFF_16_BYTES = (0, 1), (3, 2), (8, 4), (1, 8), (5, 16), (2, 15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 700, 1037), (4, 1, 700, 1037), (4, 8, 1, 1037), (1, 1, 1, 1037), (700, 1037)], ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_copies_of_rows_off_16_bytes(d, shape, dtype):
    """The same bits as of rows on 16 bytes, NaN or True between them; a copy is memory that the plan tells of."""
    q, k, v = inputs(4, 8, 2, 700, 1037, d, dtype=dtype)
    kernel = row_for(dtype, d, d)
    bias, wide, mask = random(*shape, dtype=dtype), random(*shape, dtype=torch.float32), bools(*shape)
    for given in ({"bias": bias}, {"bias": wide}, {"mask": mask}, {"bias": bias, "mask": mask}):
        places = ((elements, 1040 + longer) for elements, longer in ((16, 16), *OFF_16_BYTES))
        first, *others = ({what: at_offset(x, *place) for what, x in given.items()} for place in places)
        expected = flashgqa.attention(q, k, v, return_lse=True, kernel=kernel, **first)
        memory = flashgqa.explain(q, k, v, kernel=kernel, **first)["workspace_bytes"]
        for other in others:
            copied = flashgqa.explain(q, k, v, kernel=kernel, **other)["workspace_bytes"] - memory
            got = flashgqa.attention(q, k, v, return_lse=True, kernel=kernel, **other)
            assert_alike(got, expected)
            if copied and len(given) == 1:
                assert copied >= sum(x.numel() * x.element_size() for x in given.values())
                assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
            plans = (flashgqa.explain(q, k, v, kernel=kernel, batch_invariant=True, **x) for x in (first, other))
            assert len({plan["workspace_bytes"] for plan in plans}) == 1
        assert "mask" not in given or copied


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_tiles_by_tma_of_packed_sequences(d, dtype):
    """Rows and keys of a bias or a mask count from where a sequence begins; some sequences have none."""
    for hq, hk in ((8, 2), (3, 3), (32, 1)):
        starts = [torch.tensor(at, dtype=torch.int32, device="cuda") for at in ((0, 130, 131, 131, 196), (0, 700, 770, 775, 839))]
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in inputs(1, hq, hk, 196, 839, d, dtype=dtype))
        options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=130, max_kv=700, causal=True)
        bias, mask = random(4, hq, 130, 704, dtype=dtype)[..., :700], bools(4, 1, 130, 704)[..., :700]
        odd = at_offset(mask, 3, 705)
        for more in ({"bias": bias}, {"bias": bias[:1].float(), "mask": mask}, {"mask": mask[:, :, :1]}, {"mask": odd}):
            assert_alike(*both(q, k, v, **more, **options, sink=random(hq, dtype=torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_the_same_bits_wherever_elements_lie(d, dtype):
    q, k, v = inputs(2, 4, 2, 200, 390, d, dtype=dtype)
    name = row_for(dtype, d, d)
    extents = 2, 4, 200, 390
    given = ("bias", random(*extents, dtype=dtype)), ("bias", random(*extents, dtype=torch.float32)), ("mask", bools(*extents))
    for what, x in given:
        first = flashgqa.attention(q, k, v, return_lse=True, kernel=name, **{what: x})
        apart = torch.empty(*extents, 3, dtype=x.dtype, device="cuda")[..., 1].copy_(x)
        turned = x.transpose(2, 3).contiguous().transpose(2, 3)
        for other in (x, at_offset(x, 1), at_offset(x, 16, 391), at_offset(x, 2, 396), apart, turned):
            again = flashgqa.attention(q, k, v, return_lse=True, kernel=name, **{what: other})
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        by_tma = [
            flashgqa.attention(q, k, v, return_lse=True, kernel=name, **{what: at_offset(x, *place)})
            for place in ((0, 400), (16, 416))
        ]
        assert torch.equal(by_tma[0][0], by_tma[1][0]) and torch.equal(by_tma[0][1], by_tma[1][1])
        assert_alike(by_tma[0], first)
    assert_alike(*both(q, k, v, mask=bools(2, 4, 200, 390).to(torch.uint8).mul(6).view(torch.bool)))


@pytest.mark.parametrize("low", [-1e4, -1e9, "min", -torch.inf])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_a_bias_as_a_mask(d, dtype, wide, low):
    """Causal, with padding in front: the blocks that come first are hidden, some rows whole."""
    of = torch.float32 if wide else dtype
    value = torch.finfo(of).min if low == "min" else max(low, torch.finfo(of).min) if low != -torch.inf else low
    q, k, v = inputs(2, 8, 2, 420, 420, d, dtype=dtype)
    shown = torch.ones(420, 420, dtype=torch.bool, device="cuda").tril().repeat(2, 1, 1, 1)
    shown[1, :, :, :77] = False
    bias = torch.zeros(2, 1, 420, 420, dtype=of, device="cuda").masked_fill_(~shown, value)
    got, expected = both(q, k, v, bias=bias)
    rows = shown.any(-1, keepdim=True)
    assert_alike(got[:1], expected[:1], ["out"])
    torch.testing.assert_close(got[1], expected[1])
    if low == -torch.inf:
        assert (got[0][1, :, :77] == 0).all() and (got[1][1, :, :77] == -torch.inf).all()
    masked = flashgqa.attention(q, k, v, mask=shown, kernel=row_for(dtype, d, d))
    assert_alike([masked * rows], [got[0] * rows], ["out"])


@pytest.mark.parametrize("extents", [(2, 8, 2, 200, 390), (1, 4, 1, 30, 3000)], ids=["whole", "parts"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("d", DIMS)
def test_a_sink_beside_the_least_number(d, wide, extents):
    """Rows whose keys all have it, with sinks that add nothing, and with some that take all."""
    b, hq, hk, sq, sk = extents
    q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=torch.bfloat16)
    bias = torch.zeros(b, 1, sq, sk, dtype=torch.float32 if wide else q.dtype, device="cuda")
    lowest = torch.finfo(bias.dtype).min
    bias[-1, :, :13] = lowest
    sink = torch.tensor([-torch.inf, 1.5], device="cuda").repeat_interleave(hq // 2)
    got, expected = both(q, k, v, bias=bias, sink=sink)
    assert_alike(got[:1], expected[:1], ["out"])
    torch.testing.assert_close(got[1], expected[1])
    for heads, lse in ((slice(hq // 2), lowest), (slice(hq // 2, None), 1.5)):
        torch.testing.assert_close(got[1][-1, heads, :13], torch.full((hq // 2, 13), lse, device="cuda"))


@pytest.mark.parametrize("d", DIMS)
def test_poison_stays_where_it_is_seen(d):
    q, k, v = inputs(2, 8, 2, 260, 390, d)
    name = row_for(q.dtype, d, d)
    shown = bools(2, 1, 260, 390)
    shown[:, :, :100, 200] = False
    shown[:, :, 100:, 200] = True
    bias = torch.zeros(2, 1, 260, 390, dtype=q.dtype, device="cuda").masked_fill_(~shown, -torch.inf)
    for options in ({"mask": shown}, {"bias": bias}):
        clean = flashgqa.attention(q, k, v, return_lse=True, kernel=name, **options)
        bad_k, bad_v = k.clone(), v.clone()
        bad_v[:, 1, 200, 5] = float("nan")
        bad_k[:, 1, 200] = float("nan")
        of_v, of_k = (flashgqa.attention(q, *kv, return_lse=True, kernel=name, **options) for kv in ((k, bad_v), (bad_k, v)))
        for out in (of_v[0], of_k[0]):
            assert torch.equal(out[:, :, :100], clean[0][:, :, :100]) and torch.equal(out[:, :4], clean[0][:, :4])
        assert of_v[0][:, 4:, 100:, 5].isnan().all() and torch.equal(of_v[1], clean[1]) and of_k[0][:, 4:, 100:].isnan().all()
    for value in (torch.nan, torch.inf):
        odd = random(2, 8, 260, 390, dtype=q.dtype)
        before = flashgqa.attention(q, k, v, bias=odd, kernel=name)
        odd[1, 3, 7, 300] = value
        out = flashgqa.attention(q, k, v, bias=odd, kernel=name)
        assert out[1, 3, 7].isnan().all()
        out[1, 3, 7] = before[1, 3, 7]
        assert torch.equal(out, before)
        before_it = {"causal": True, "align": "top-left", "kernel": name}
        hidden = (flashgqa.attention(q, k, v, bias=x, **before_it) for x in (odd, odd.nan_to_num(posinf=0.0)))
        assert torch.equal(*hidden)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_all_that_there_is(d, dtype, options):
    """Softcap, ALiBi, bias and mask, by twos and more; heads that share a tile, parts of the keys."""
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 520), (2, 32, 1, 40, 300), (1, 4, 1, 30, 3000)):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias, mask, slopes = random(1, hq, sq, sk, dtype=dtype), bools(b, 1, sq, sk), 2.0 ** -torch.arange(hq, device="cuda")
        given = {"softcap": 4.0, "alibi_slopes": slopes, "bias": bias, "mask": mask}
        for count in (2, 3, 4):
            for names in itertools.combinations(given, count):
                assert_alike(*both(q, k, v, **{name: given[name] for name in names}, **MASKS[options]))


@pytest.mark.parametrize("d", DIMS)
def test_any_slope_beside_hidden_keys(d):
    """Keys that a bias of -inf hides stay hidden, whatever the slope; those of the least number do not."""
    q, k, v = inputs(2, 8, 8, 300, 300, d)
    for low, value in itertools.product((-torch.inf, torch.finfo(q.dtype).min), (-0.3, 50.0, -50.0, 1e20, -1e20)):
        bias = torch.zeros(300, 300, dtype=q.dtype, device="cuda").masked_fill_(~bools(300, 300), low)
        slopes = torch.full((8,), value, device="cuda")
        assert_alike(*both(q, k, v, bias=bias, alibi_slopes=slopes, causal=True))


def test_plan():
    for d in DIMS:
        q, k, v = inputs(2, 8, 2, 300, 300, d)
        bias, mask, slopes = random(300, 300, dtype=q.dtype), bools(300, 300), torch.rand(8, device="cuda")
        name, fallback = row_for(q.dtype, d, d), general("fwd", q.dtype, d)
        alibi, capped = {"alibi_slopes": slopes}, {"softcap": 5.0}
        for options in (
            {"bias": bias},
            {"mask": mask},
            {"bias": bias.float(), "mask": mask, "causal": True},
            {"mask": mask, **capped},
            {"bias": bias, **alibi},
            {**alibi, **capped},
            {"bias": bias, "mask": mask, **alibi, **capped},
        ):
            assert flashgqa.explain(q, k, v, **options)["kernel"] == name
        assert flashgqa.explain(*inputs(2, 8, 2, 300, 300, d - d // 4), bias=bias)["kernel"] == name
        plan = flashgqa.explain(q, k, v, bias=bias.bfloat16())
        assert plan["kernel"] == fallback and "of q's dtype" in dict(plan["refused"])[name]
