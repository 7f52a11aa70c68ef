"""ALiBi in the kernels for Hopper, forward and backward: each row that has it forced, against the oracle under the error rule,
and what is theirs alone: slopes of any size, those that only the careful pass takes, LSEs that hold no sum."""

import itertools

import pytest
import torch
from cases import Case
from gpu import assert_alike
from test_hopper import DTYPES, MASKS, ROWS, inputs, random, row_for
from test_hopper_backward import ROWS as BACKWARD_ROWS
from test_hopper_backward import assert_gradients_alike, assert_poison_alike, backward_row
from test_hopper_softcap import check_backward_row, check_forward_row, extents, general

import flashgqa

NAMES = [name for name in ROWS if extents(name)[1] in (64, 128, 256)]
BACKWARD_NAMES = [name for name in BACKWARD_ROWS if extents(name)[1] in (64, 128)]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
CASES = [
    Case(b=2, sq=150, sk=200, causal=True, alibi="h", sink=True),
    Case(b=2, sq=140, sk=210, window=(70, 9), alibi="bh", data="large", q_lens=(140, 0), kv_lens=(210, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, alibi="h"),
    Case(sq=300, sk=140, align="top-left", alibi="h", data="shift"),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, alibi="bh", sink=True),
]
CAPPED = [
    Case(b=2, sq=150, sk=200, causal=True, alibi="h", softcap=20.0, sink=True),
    Case(b=2, sq=140, sk=210, window=(70, 9), alibi="bh", softcap=5.0, data="large", q_lens=(140, 0), kv_lens=(210, 33)),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, alibi="bh", softcap=50.0, sink=True),
    Case(sq=150, sk=150, hq=2, hk=1, alibi=1e4, softcap=5.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case):
    check_forward_row(case, name)


@pytest.mark.parametrize("case", [*CASES, *CAPPED], ids=str)
@pytest.mark.parametrize("name", BACKWARD_NAMES)
def test_backward_within_the_error_rule(name, case):
    check_backward_row(case, name)


STEEP = [
    Case(**shape, hq=2, hk=1, alibi=slope)
    for slope in (8.0, 9.0, 100.0, 1e4, 1e6)
    for shape in (
        {"sq": 150, "sk": 150, "sink": True},
        {"sq": 70, "sk": 300, "causal": True},
        {"sq": 140, "sk": 90, "align": "top-left"},
    )
]


@pytest.mark.parametrize("case", STEEP, ids=str)
@pytest.mark.parametrize("name", [*NAMES, *BACKWARD_NAMES])
def test_steep_slopes(name, case):
    """The diagonal is at a distance of exactly 0, wherever it lies in a block: there the score keeps its digits beside those of
    slope times the block's width."""
    (check_backward_row if name in BACKWARD_NAMES else check_forward_row)(case, name)


def slopes(*shape):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda") ** 4


def both(q, k, v, variant="plain", **options):
    names = row_for(q.dtype, q.shape[-1], q.shape[-1], variant=variant), general("fwd", q.dtype, q.shape[-1])
    got, expected = (flashgqa.attention(q, k, v, return_lse=True, kernel=name, **options) for name in names)
    return got, expected


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "variant"), [(64, "plain"), (64, "tall"), (128, "plain"), (128, "tall"), (256, "plain")])
def test_heads_and_keys_are_shared(d, variant, dtype, mask):
    """Groups that share tiles, parts of the keys, long rows."""
    for b, hq, hk, sq, sk in ((2, 32, 1, 40, 300), (1, 4, 1, 30, 3000), (1, 6, 2, 700, 900)):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        for of in (slopes(hq), slopes(b, hq)):
            assert_alike(*both(q, k, v, variant, alibi_slopes=of, **MASKS[mask]))


@pytest.mark.parametrize(("d", "variant"), [(128, "plain"), (128, "tall"), (256, "plain")])
def test_any_slope(d, variant):
    """Negative and enormous slopes, and those that are no number, leave the other heads alone."""
    q, k, v = inputs(2, 8, 8, 300, 300, d)
    of = slopes(8)
    clean = flashgqa.attention(q, k, v, alibi_slopes=of, causal=True, kernel=row_for(q.dtype, d, d, variant=variant))
    for value, causal in itertools.product((-0.3, -1e-3, 1e20, -1e20, -torch.inf, torch.inf, torch.nan), (True, False)):
        odd = of.clone()
        odd[3] = value
        got, expected = both(q, k, v, variant, alibi_slopes=odd, causal=causal)
        others = torch.arange(8, device="cuda") != 3
        if causal:
            assert torch.equal(got[0][:, others], clean[:, others])
        assert_alike([x[:, others] for x in got], [x[:, others] for x in expected])
        if abs(value) < torch.inf:
            assert_alike(got, expected)
        else:
            assert got[0][:, 3].isnan().all() and expected[0][:, 3].isnan().all()


@pytest.mark.parametrize(("d", "variant"), [(64, "plain"), (64, "tall"), (128, "plain"), (128, "tall"), (256, "plain")])
def test_what_is_done_again_has_the_same_bits(d, variant):
    """NaN in V that later rows alone see; heads of a group share tiles."""
    q, k, v = inputs(2, 8, 2, 260, 260, d)
    options = {"alibi_slopes": slopes(8), "causal": True, "return_lse": True, "kernel": row_for(q.dtype, d, d, variant=variant)}
    clean, clean_lse = flashgqa.attention(q, k, v, **options)
    v[:, 1, 200, 5] = float("nan")
    out, lse = flashgqa.attention(q, k, v, **options)
    assert torch.equal(out[:, :, :200], clean[:, :, :200]) and torch.equal(lse, clean_lse)
    assert torch.equal(out[:, :4], clean[:, :4]) and out[:, 4:, 200:, 5].isnan().all()


def test_plan_and_caches():
    """Prompts behind a cache, paged; softcap beside it; head dims above 128."""
    q, k_new, v_new = inputs(3, 8, 2, 200, 200, 128)
    caches = [random(60, 2, 32, 128, dtype=q.dtype, seed=n) for n in (4, 5)]
    table = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(3, 20).int().cuda()
    lens = torch.tensor([300, 0, 440], dtype=torch.int32, device="cuda")
    options = {"cache_lens": lens, "page_table": table, "alibi_slopes": slopes(8), "causal": True}
    name = row_for(q.dtype, 128, 128)
    assert flashgqa.explain_with_kvcache(q, *caches, k_new, v_new, **options)["kernel"] == name
    got, expected = (
        flashgqa.attention_with_kvcache(q, *(x.clone() for x in caches), k_new, v_new, return_lse=True, kernel=kernel, **options)
        for kernel in (name, "fwd_sm80_f16_d128_dv128_cache")
    )
    assert_alike(got, expected)
    plan = flashgqa.explain(q, k_new, v_new, alibi_slopes=slopes(8), softcap=5.0)
    assert plan["kernel"] == name and "alibi_slopes with softcap" in dict(plan["refused"])[name.replace("plain", "tall")]
    wide = inputs(1, 8, 2, 200, 200, 256)
    assert flashgqa.explain(*wide, alibi_slopes=slopes(8))["kernel"] == row_for(q.dtype, 256, 256)
    assert flashgqa.explain(*wide, alibi_slopes=slopes(8), backward=True)["kernel"] == backward_row(q.dtype, 256)


def gradients(q, k, v, dout=None, rows=(90, 80), **options):
    """By each of these rows, from the results of one forward kernel."""
    forward = {key: value for key, value in options.items() if key != "deterministic"}
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **forward)
    dout = random(*out.shape, dtype=q.dtype, seed=8) if dout is None else dout
    options["dlse"] = random(*lse.shape, dtype=torch.float32, seed=7)
    width = next(n for n in (64, 128, 256) if n >= q.shape[-1])
    names = (backward_row(q.dtype, width) if arch == 90 else general("bwd", q.dtype, width) for arch in rows)
    return [flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=name, **options)[:3] for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_backward_runs_where_the_forward_does(d, dtype):
    x = inputs(2, 16, 8, 500, 500, d - 8, dtype=dtype)
    sink = torch.zeros(16, dtype=dtype, device="cuda")
    for options in ({}, {"causal": True}, {"window": (100, 0)}, {"deterministic": False}, {"sink": sink}):
        options["alibi_slopes"] = slopes(16)
        assert flashgqa.explain(*x, backward=True, **options)["kernel"] == backward_row(dtype, d)
        assert flashgqa.explain(*x, backward=True, softcap=3.0, **options)["kernel"] == backward_row(dtype, d)
    for options in ({}, {"softcap": 3.0}):
        assert_gradients_alike(*gradients(*x, alibi_slopes=slopes(2, 16), **options))


@pytest.mark.parametrize("group", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}], ids=["", "capped"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_of_groups(d, more, mask, group):
    """Rows and keys of several tiles, more queries than keys and more keys than queries; twice the same bits."""
    for b, sq, sk in ((2, 300, 300), (1, 900, 260), (1, 200, 1100)):
        x = inputs(b, 32, 32 // group, sq, sk, d, dtype=torch.bfloat16)
        for of in (slopes(32), slopes(b, 32)):
            options = {"alibi_slopes": of, **MASKS[mask], **more}
            got, again, expected = gradients(*x, rows=(90, 90, 80), **options)
            assert_gradients_alike(got, expected)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        assert_gradients_alike(*gradients(*x, **options, deterministic=False))


def all_pairs_of_lengths(d):
    """Lengths of queries and of keys, their cu_seqlens, and packed q, k and v of 4 heads on 2."""
    grid = torch.meshgrid(torch.arange(1, 301, 33), torch.arange(1, 401, 39), indexing="ij")
    queries, keys = (x.reshape(-1).int().cuda() for x in grid)
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys)]
    packed = [x[0].transpose(0, 1) for x in inputs(1, 4, 2, *(int(s[-1]) for s in starts), d)]
    return queries, keys, starts, packed


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_of_all_pairs_of_lengths(d, mask):
    """Packed, and padded with NaN."""
    queries, keys, starts, packed = all_pairs_of_lengths(d)
    options = dict(cu_seqlens_q=starts[0], cu_seqlens_kv=starts[1], max_q=300, max_kv=400, alibi_slopes=slopes(len(queries), 4))
    for extra in ({}, {"deterministic": False}):
        assert_gradients_alike(*gradients(*packed, **options, **MASKS[mask], **extra))
    padded = inputs(len(queries), 4, 2, 300, 400, d)
    for x, lengths in zip(padded, (queries, keys, keys), strict=True):
        x.masked_fill_((torch.arange(x.shape[2], device="cuda") >= lengths[:, None])[:, None, :, None], float("nan"))
    assert_gradients_alike(*gradients(*padded, q_lens=queries, kv_lens=keys, alibi_slopes=slopes(4), **MASKS[mask]))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_of_long_passes(d):
    """The folded order and its parts; windows, walked head by head."""
    causal, left = {"causal": True}, {"window": (500, 0)}
    for b, hq, hk, s, options in ((1, 32, 8, 2048, causal), (1, 16, 1, 8330, causal), (2, 8, 2, 1500, left), (1, 4, 4, 5000, {})):
        x = inputs(b, hq, hk, s, s, d, dtype=torch.bfloat16)
        assert_gradients_alike(*gradients(*x, alibi_slopes=slopes(hq), **options))


@pytest.mark.parametrize(("sq", "sk"), [(300, 300), (300, 140), (140, 300)])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}], ids=["", "capped"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_of_any_slope(d, more, sq, sk):
    """The same as those of the general kernel, and the other heads' as if nothing had happened. LSEs of up to 1e22 hold neither
    the products q.k nor a sum. Rows that see no key at a distance of 0 are left out where a slope is infinite."""
    for group, causal in itertools.product((1, 4), (True, False)):
        x = inputs(2, 8, 8 // group, sq, sk, d)
        options = {"causal": causal, "rows": (90, 80), **more}
        clean, _ = gradients(*x, alibi_slopes=slopes(8), **options)
        others = torch.arange(8, device="cuda") != 3
        other_keys = torch.arange(8 // group, device="cuda") != 3 // group
        for value in (-0.3, -1e-3, 50.0, -50.0, 1e6, -1e6, 1e20, -1e20, -torch.inf, torch.inf, torch.nan):
            if abs(value) == torch.inf and sq > sk:
                continue
            odd = slopes(8)
            odd[3] = value
            got, expected = gradients(*x, alibi_slopes=odd, **options)
            assert_gradients_alike(got, expected)
            assert torch.equal(got[0][:, others], clean[0][:, others])
            assert all(torch.equal(a[:, other_keys], b[:, other_keys]) for a, b in zip(got[1:], clean[1:], strict=True))
            assert abs(value) < torch.inf or not got[0][:, 3, -1].isfinite().any()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("d", [64, 128, 256])
def test_poisoned_gradients(d, which):
    """NaN in q, k, v or dO reach the gradients that the general kernel says, and leave the bits of all others."""
    x = [*inputs(2, 4, 2, 500, 500, d), random(2, 4, 500, d, dtype=torch.float16, seed=8)]
    options = {"window": (60, 10), "alibi_slopes": slopes(4)}
    clean, _ = gradients(*x[:3], dout=x[3], **options)
    x[which][1, 1, 400, 5] = torch.nan
    got, expected = gradients(*x[:3], dout=x[3], **options)
    assert_poison_alike(got, expected, clean)
