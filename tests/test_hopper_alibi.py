"""ALiBi in the forward kernels for Hopper: each row that has it forced, against the oracle under the error rule, and what is
theirs alone: distances as a line, slopes that only the careful pass takes."""

import itertools

import pytest
import torch
from cases import Case
from gpu import assert_alike
from test_hopper import DTYPES, MASKS, ROWS, inputs, random, row_for
from test_hopper_softcap import check_forward_row, extents, general

import flashgqa

NAMES = [name for name in ROWS if extents(name)[1] in (64, 128)]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
CASES = [
    Case(b=2, sq=150, sk=200, causal=True, alibi="h", sink=True),
    Case(b=2, sq=140, sk=210, window=(70, 9), alibi="bh", data="large", q_lens=(140, 0), kv_lens=(210, 33)),
    Case(sq=70, sk=256, hq=3, hk=1, scale=0.9, alibi="h"),
    Case(sq=300, sk=140, align="top-left", alibi="h", data="shift"),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, alibi="bh", sink=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case):
    check_forward_row(case, name)


def slopes(*shape):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda") ** 4


def both(q, k, v, variant="plain", **options):
    names = row_for(q.dtype, q.shape[-1], q.shape[-1], variant=variant), general("fwd", q.dtype, q.shape[-1])
    got, expected = (flashgqa.attention(q, k, v, return_lse=True, kernel=name, **options) for name in names)
    return got, expected


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "variant"), [(64, "plain"), (64, "tall"), (128, "plain"), (128, "tall")])
def test_heads_and_keys_are_shared(d, variant, dtype, mask):
    """Groups that share tiles, parts of the keys, long rows."""
    for b, hq, hk, sq, sk in ((2, 32, 1, 40, 300), (1, 4, 1, 30, 3000), (1, 6, 2, 700, 900)):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        for of in (slopes(hq), slopes(b, hq)):
            assert_alike(*both(q, k, v, variant, alibi_slopes=of, **MASKS[mask]))


@pytest.mark.parametrize("variant", ["plain", "tall"])
def test_any_slope(variant):
    """Negative and enormous slopes, and those that are no number, leave the other heads alone."""
    q, k, v = inputs(2, 8, 8, 300, 300, 128)
    of = slopes(8)
    clean = flashgqa.attention(q, k, v, alibi_slopes=of, causal=True, kernel=row_for(q.dtype, 128, 128, variant=variant))
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


@pytest.mark.parametrize(("d", "variant"), [(64, "plain"), (64, "tall"), (128, "plain"), (128, "tall")])
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
    """Prompts behind a cache, paged; softcap beside ALiBi, and other head dims, run general rows."""
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
    refused = dict(flashgqa.explain(q, k_new, v_new, alibi_slopes=slopes(8), softcap=5.0)["refused"])
    assert "alibi_slopes with softcap" in refused[name]
    wide = inputs(1, 8, 2, 200, 200, 256)
    plan = flashgqa.explain(*wide, alibi_slopes=slopes(8))
    assert plan["kernel"] == general("fwd", q.dtype, 256) and "alibi_slopes" in dict(plan["refused"])[row_for(q.dtype, 256, 256)]
