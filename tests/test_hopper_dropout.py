"""Dropout in the forward kernels for Hopper, rows of their own: each forced, against the oracle under the error rule; its bits
are those of dropout_mask(), wherever a row and a key lie in their tiles; LSEs are those without."""

import itertools

import numpy as np
import pytest
import torch
from cases import Case
from gpu import assert_alike
from test_hopper import DTYPES, MASKS, inputs, random, row_for
from test_hopper_softcap import check_forward_row, extents, general
from test_hopper_terms import at_offset, bools

import flashgqa

NAMES = [row["name"] for row in flashgqa.kernels()
         if row["name"].startswith("fwd_sm90") and row["name"].endswith("dropout") and row["available"]]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs a GPU of compute capability 9.0 and code for it")
CASES = [
    Case(b=2, sq=150, sk=200, causal=True, sink=True, dropout=0.1),
    Case(b=2, sq=140, sk=264, window=(70, 9), data="large", q_lens=(140, 0), kv_lens=(264, 33), dropout=0.5, seed_offset=3),
    Case(sq=70, sk=257, hq=3, hk=1, scale=0.9, dropout=0.9),
    Case(sq=300, sk=140, align="top-left", causal=True, data="shift", dropout=0.3),
    Case(b=2, sq=33, sk=129, hq=8, hk=1, chunk=48, dropout=1.0),
    Case(packed=((130, 200), (1, 70), (0, 5), (65, 64)), causal=True, sink=True, dropout=0.25),
    Case(b=2, sq=130, sk=300, mask="b11k", dropout=0.1),
    Case(b=2, sq=140, sk=264, bias="1hqk", bias_dtype="float32", mask="b1qk", sink=True, dropout=0.2),
    Case(packed=((130, 256), (3, 300)), bounds=True, mask="bhqk", causal=True, dropout=0.5),
    Case(b=2, sq=150, sk=200, causal=True, softcap=20.0, sink=True, dropout=0.1),
    Case(b=2, sq=140, sk=264, window=(70, 9), alibi="bh", data="large", q_lens=(140, 0), kv_lens=(264, 33), dropout=0.4),
    Case(sq=70, sk=257, hq=3, hk=1, scale=0.9, softcap=3.0, alibi="h", dropout=0.9),
    Case(sq=150, sk=150, alibi=100.0, mask="qk", data="large", dropout=0.3),
    Case(b=2, sq=130, sk=300, softcap=50.0, bias="1hqk", bias_dtype="float32", data="shift", dropout=0.2),
    Case(packed=((130, 200), (0, 5), (65, 64)), causal=True, bounds=True, softcap=5.0, alibi="bh", mask="b1qk", dropout=0.5),
]  # fmt: skip
DIMS = 64, 128, 256
SHAPES = (2, 32, 1, 40, 300), (1, 4, 1, 30, 3000), (1, 6, 2, 700, 900), (3, 5, 5, 33, 1), (2, 8, 2, 257, 255), (1, 64, 1, 5, 600)


def drops(dtype, d):
    return row_for(dtype, d, d, variant="dropout")


def both(q, k, v, **options):
    names = drops(q.dtype, q.shape[-1]), general("fwd", q.dtype, q.shape[-1])
    return [flashgqa.attention(q, k, v, return_lse=True, kernel=name, **options) for name in names]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_error_rule(name, case):
    check_forward_row(case, name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_heads_and_keys_are_shared(d, dtype, mask):
    """Groups that share tiles, parts of the keys, keys that end anywhere; the seed on the device."""
    seed = torch.tensor([-5, 2**32 - 2], device="cuda")
    for (b, hq, hk, sq, sk), p in itertools.product(SHAPES, (0.1, 0.6)):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        got, expected = both(q, k, v, dropout_p=p, seed=seed, **MASKS[mask])
        assert_alike(got, expected)
        plain = flashgqa.attention(q, k, v, return_lse=True, kernel=row_for(dtype, d, d), **MASKS[mask])
        torch.testing.assert_close(got[1], plain[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", ["softcap", "alibi_slopes", "softcap alibi_slopes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_beside_softcap_and_alibi(d, dtype, options):
    """Groups that share tiles and parts of the keys."""
    for (b, hq, hk, sq, sk), mask in itertools.product(SHAPES, ("full", "causal", "window")):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        given = {"softcap": 4.0, "alibi_slopes": torch.rand(b, hq, device="cuda") ** 4}
        chosen = {name: given[name] for name in options.split()} | MASKS[mask]
        got, expected = both(q, k, v, dropout_p=0.25, seed=3, **chosen)
        assert_alike(got, expected)
        plain = flashgqa.attention(q, k, v, return_lse=True, kernel=general("fwd", dtype, d), **chosen)
        assert_alike(got[1:], plain[1:], names=("lse",))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_bias_and_mask_by_tma_or_not(d, dtype, mask):
    """Rows on 16 bytes and others, NaN or True between them."""
    for b, hq, hk, sq, sk in ((2, 8, 2, 300, 527), (2, 6, 6, 200, 1040), (1, 32, 1, 40, 304), (1, 4, 1, 9, 3000)):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
        bias, wide, hidden = random(1, hq, sq, sk, dtype=dtype), random(b, 1, sq, sk, dtype=torch.float32), bools(b, 1, sq, sk)
        for row in (sk + 31 & -16, sk | 1):
            for given in ({"bias": bias}, {"bias": wide}, {"mask": hidden}, {"bias": wide, "mask": bools(b, 1, 1, sk)}):
                placed = {what: at_offset(x, 16, row) for what, x in given.items()}
                assert_alike(*both(q, k, v, dropout_p=0.3, seed=5, **placed, **MASKS[mask]))


@pytest.mark.parametrize("p", [0.5, 0.1, 1 / 65536, 65535 / 65536, 0.999, 1.0])
@pytest.mark.parametrize("d", DIMS)
def test_the_mask_bit_by_bit(d, p):
    """Equal weights, and values that pick a key each: results are kept or 0, everywhere in a tile, in each kernel."""
    b, hq, hk, sq, sk, seed = 2, 4, 2, 140, 530, (2**63 - 9, 77)
    q, k = (torch.zeros(b, heads, s, d, device="cuda", dtype=torch.bfloat16) for heads, s in ((hq, sq), (hk, sk)))
    options = {"dropout_p": p, "seed": torch.tensor(seed, device="cuda"), "kernel": drops(q.dtype, d)}
    expected = torch.from_numpy(flashgqa.dropout_mask(b, hq, sq, sk, p, np.int64(seed)))
    cap, bias = {"softcap": 3.0}, {"bias": torch.zeros(1, sk, device="cuda")}
    slopes = {"alibi_slopes": torch.zeros(hq, device="cuda")}
    for first, more in itertools.product(range(0, sk, d), ({}, cap, bias, slopes, cap | bias)):
        v = torch.zeros(sk, d, device="cuda", dtype=torch.bfloat16)
        count = min(d, sk - first)
        v[first : first + count, :count].fill_diagonal_(1)
        out = flashgqa.attention(q, k, v.expand(b, hk, sk, d).contiguous(), **options, **more)
        assert torch.equal((out[..., :count] > 0).cpu(), expected[..., first : first + count]) and (out[..., count:] == 0).all()


@pytest.mark.parametrize("d", DIMS)
def test_far_rows_heads_and_sequences(d):
    """Every word of the counter counts: rows and keys behind many others, packed sequences, many heads."""
    q, k, v = inputs(3, 40, 40, 130, 2100, d)
    assert_alike(*both(q, k, v, dropout_p=0.5, seed=2**64 - 1))
    q, k, v = (random(n, heads, d, dtype=torch.bfloat16) for n, heads in ((3001, 8), (3500, 2), (3500, 2)))
    of_q, of_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ((0, 0, 77, 2500, 3001), (0, 100, 300, 2999, 3500)))
    for options in ({}, {"causal": True}):
        assert_alike(*both(q, k, v, cu_seqlens_q=of_q, cu_seqlens_kv=of_k, dropout_p=0.3, seed=8, **options))


@pytest.mark.parametrize("d", DIMS)
def test_a_seed_says_what_is_dropped(d):
    """The same bits each time, others with another seed or offset; a probability that rounds to 0 drops nothing."""
    q, k, v = inputs(2, 8, 2, 300, 520, d)
    first = flashgqa.attention(q, k, v, causal=True, dropout_p=0.2, seed=5, return_lse=True)
    for _ in range(20):
        again = flashgqa.attention(q, k, v, causal=True, dropout_p=0.2, seed=torch.tensor([5, 0], device="cuda"), return_lse=True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for seed in (6, torch.tensor([5, 1], device="cuda")):
        assert not torch.equal(first[0], flashgqa.attention(q, k, v, causal=True, dropout_p=0.2, seed=seed))
    assert torch.equal(flashgqa.attention(q, k, v, dropout_p=7e-6, seed=5), flashgqa.attention(q, k, v))


@pytest.mark.parametrize("d", DIMS)
def test_poison_stays_where_it_is_seen(d):
    """NaN and inf in keys and values that a row does not see, with or without a mask tensor."""
    q, k, v = inputs(2, 8, 2, 260, 390, d)
    options = {"dropout_p": 0.3, "seed": 9, "return_lse": True, "kernel": drops(q.dtype, d)}
    shown = torch.ones(2, 1, 260, 390, dtype=torch.bool, device="cuda")
    shown[:, :, :100, 200] = False
    masks = ({"mask": shown}, 100), ({"causal": True, "align": "top-left"}, 200)
    chains = {}, {"softcap": 9.0}, {"alibi_slopes": torch.rand(8, device="cuda")}
    for (mask, rows), chain in itertools.product(masks, chains):
        chosen = options | mask | chain
        clean = flashgqa.attention(q, k, v, **chosen)
        for bad in (torch.nan, torch.inf):
            other = v.clone()
            other[:, 1, 200, 5] = bad
            out, lse = flashgqa.attention(q, k, other, **chosen)
            assert torch.equal(out[:, :, :rows], clean[0][:, :, :rows]) and torch.equal(out[:, :4], clean[0][:, :4])
            assert torch.equal(lse, clean[1]) and not out[:, 4:, rows:, 5].isfinite().any()
            out[:, 4:, rows:, 5] = clean[0][:, 4:, rows:, 5]
            assert torch.equal(out, clean[0])


def test_plan():
    q, k, v = inputs(2, 8, 2, 300, 300, 128)
    options = {"dropout_p": 0.1, "seed": 1}
    name, fallback = drops(q.dtype, 128), general("fwd", q.dtype, 128)
    mask, slopes = torch.ones(300, 300, dtype=torch.bool, device="cuda"), torch.rand(8, device="cuda")
    together = {"softcap": 5.0, "alibi_slopes": slopes, "mask": mask}
    for more in ({}, {"causal": True}, {"mask": mask}, {"bias": random(300, 300, dtype=q.dtype)}, {"softcap": 5.0}, together):
        assert flashgqa.explain(q, k, v, **options, **more)["kernel"] == name
    assert "for dropout only" in dict(flashgqa.explain(q, k, v)["refused"])[name]
    assert flashgqa.explain(*inputs(2, 8, 2, 300, 300, 96), **options)["kernel"] == name
    assert flashgqa.explain(*inputs(2, 8, 2, 300, 300, 40), **options)["kernel"] == drops(q.dtype, 64)
    assert flashgqa.explain(*inputs(8, 14, 2, 4, 128, 128), **options)["kernel"] == name
    assert flashgqa.explain(*inputs(2, 8, 2, 300, 300, 192), **options)["kernel"] == drops(q.dtype, 256)
    assert flashgqa.explain(*inputs(2, 8, 2, 300, 300, 192, 128), **options, **together)["kernel"] == drops(q.dtype, 256)
    plan = flashgqa.explain(q, k, v, **options, bias=random(300, 300, dtype=torch.bfloat16))
    assert plan["kernel"] == fallback and "neither float32 nor" in dict(plan["refused"])[name]
    assert extents(name)[1] == 128
