"""Tensors that repeat or interleave in memory, in every kernel for Hopper: TMA reads them where they lie. What it cannot read,
and what `explain` says of it."""

import pytest
import torch
from test_hopper import DTYPES, ROWS, inputs, random, row_for
from test_hopper_backward import backward_row, gradients

import flashgqa

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
B, HQ, HK = 3, 4, 2
AXES = {"batch": 0, "heads": 1, "rows": 2}
FLOAT8 = torch.float8_e4m3fn


def repeat(x, axis):
    """Its first entry along an axis, as often as it was long, with stride 0."""
    return x.narrow(axis, 0, 1).expand(x.shape)


def packed(b, heads, s, d, dtype, beyond=0):
    """q, k, v as views of one projection [b, s, 3, h, d], of which rows are `beyond` elements longer."""
    rows = random(b, s, 3 * heads * d + beyond, dtype=dtype)[..., : 3 * heads * d]
    return [x.transpose(1, 2) for x in rows.unflatten(-1, (3, heads, d)).unbind(2)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_repeated_q_k_and_v(d, axis, dtype):
    """The bits of their copies, from the same row."""
    names = [row["name"] for row in flashgqa.kernels() if row["name"].startswith(f"fwd_sm90_{DTYPES[dtype]}_d{d}_dv{d}_")]
    for name in (name for name in names if "decode" not in name):
        options = {"dropout_p": 0.3, "seed": 5} if name.endswith("dropout") else {"causal": True}
        for sk in (60, 300):
            x = [repeat(y, AXES[axis]) for y in inputs(B, HQ, HK, 200, sk, d, dtype=dtype)]
            copies = [y.contiguous() for y in x]
            got, expected = (flashgqa.attention(*y, **options, return_lse=True, kernel=name) for y in (x, copies))
            assert same(got, expected), (name, sk)
            assert got[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_of_repeated_tensors(d, axis, dtype):
    """Of a sum over rows dout is such a tensor, too."""
    q, k, v = inputs(B, HQ, HK, 200, 300, d, dtype=dtype)
    dout = random(*q.shape, dtype=dtype, seed=9)
    x = [repeat(y, AXES[axis]) for y in (q, k, v, dout)]
    copies = [y.contiguous() for y in x]
    got = gradients(*x[:3], dout=x[3], causal=True)
    assert same(got, gradients(*copies[:3], dout=copies[3], causal=True))
    assert all(y.isfinite().all() for y in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("sq", [1, 10])
def test_decode_over_repeated_keys(sq, d, axis, dtype):
    q, *kv = inputs(B, 16, HK, sq, 1000, d, dtype=dtype)
    k, v = (repeat(x, AXES[axis]) for x in kv)
    kind = "decode" if sq == 1 else "decodewide"
    assert flashgqa.explain(q, k, v)["kernel"] == row_for(dtype, d, d, variant=kind)
    out = flashgqa.attention(q, k, v)
    assert torch.equal(out, flashgqa.attention(q, k.contiguous(), v.contiguous()))
    narrow = [x.to(FLOAT8) for x in kv]
    k, v = (repeat(x.view(torch.uint8), AXES[axis]).view(FLOAT8) for x in narrow)
    lens = torch.tensor([1000, 1, 999], dtype=torch.int32, device="cuda")
    wanted = row_for(dtype, d, d, variant=kind + "f8")
    assert flashgqa.explain_with_kvcache(q, k, v, cache_lens=lens)["kernel"] == wanted
    copies = [x.view(torch.uint8).contiguous().view(FLOAT8) for x in (k, v)]
    got = flashgqa.attention_with_kvcache(q, k, v, cache_lens=lens)
    assert torch.equal(got, flashgqa.attention_with_kvcache(q, *copies, cache_lens=lens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_for_expanded_sequences(dtype):
    """A prompt that a batch shares, read once: the rows that serve its copies."""
    q, k, v = inputs(8, 16, 16, 512, 512, 128, dtype=dtype)
    for sq in (512, 100, 1):
        for backward in (False, True) if sq == 512 else (False,):
            for options in ({}, {"causal": True}, {"softcap": 8.0}, {"alibi_slopes": torch.rand(16, device="cuda")}):
                x = q[:, :, :sq], k, v
                plan = flashgqa.explain(*x, backward=backward, **options)
                assert "sm90" in plan["kernel"]
                shared = q[:, :, :sq], k[:1].expand(k.shape), v[:1].expand(v.shape)
                assert flashgqa.explain(*shared, backward=backward, **options)["kernel"] == plan["kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [40, 64, 72, 80, 128])
def test_views_of_one_projection(d, dtype):
    """[b, s, 3, h, d]; rows that are longer, on 16 bytes; one sequence of one row, whose strides nobody takes."""
    for beyond, b, s in ((0, 2, 300), (8, 2, 300), (3, 1, 1)):
        x = packed(b, 4, s, d, dtype, beyond)
        copies = [y.contiguous() for y in x]
        plan = flashgqa.explain(*x, causal=True)
        assert plan["kernel"] == flashgqa.explain(*copies, causal=True)["kernel"] and ("sm90" in plan["kernel"] or s == 1)
        assert torch.equal(flashgqa.attention(*x, causal=True), flashgqa.attention(*copies, causal=True))
        if s > 1:
            assert same(gradients(*x, causal=True), gradients(*copies, causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cannot_be_read_says_which_and_why(dtype):
    def reasons(*x, backward=False, **options):
        plan = flashgqa.explain(*x, backward=backward, **options)
        assert "sm80" in plan["kernel"]
        return dict(plan["refused"])[row_for(dtype, 128, 128, which="bwd" if backward else "fwd")]

    q, k, v = inputs(2, 4, 4, 512, 512, 128, dtype=dtype)
    odd = random(2, 4, 512, 136, dtype=dtype)
    assert reasons(q, odd[..., 4:132], v) == "k: rows must start on 16 bytes"
    assert reasons(q, k, random(2, 4, 512, 132, dtype=dtype)[..., :128], backward=True) == "v: rows must start on 16 bytes"
    assert reasons(*packed(2, 4, 512, 128, dtype, beyond=3)) == "q: rows must start on 16 bytes"
    assert reasons(*(x[..., :100] for x in (q, k, v))) == "head dims must be multiples of 8"
    assert backward_row(dtype, 128) not in dict(flashgqa.explain(q, odd[..., 8:], v, backward=True)["refused"])
