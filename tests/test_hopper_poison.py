"""inf and NaN under a soft cap in the backward pass on a GPU (csrc/cuda/any/bwd_poison.cu; add_poison() of sm80/bwd.cu), against
the float64 oracle: which entries of the gradients are not finite, and the values of all others. An infinite score is the cap."""

import itertools

import numpy as np
import pytest
import torch
from gpu import assert_alike
from test_hopper import DTYPES, inputs, random
from test_hopper_backward import ROWS, backward_row

import flashgqa
from flashgqa import reference

pytestmark = pytest.mark.skipif(not ROWS, reason="needs a GPU of compute capability 9.0 and code for it")
INF, NAN = float("inf"), float("nan")
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": (90, 20)}}
# (tensor, KV head or query head, row, column, value): what is put into batch entry 1
POISON = {
    "k inf": [("k", 1, 150, 5, INF)],
    "k -inf": [("k", 0, 3, 7, -INF)],
    "k twice": [("k", 1, 150, 5, INF), ("k", 1, 150, 6, -INF)],
    "keys": [("k", 1, 150, 5, INF), ("k", 1, 151, 9, -INF), ("k", 1, 259, 2, INF), ("k", 0, 17, 3, INF)],
    "k nan": [("k", 1, 150, 5, NAN)],
    "k inf nan": [("k", 1, 150, 5, INF), ("k", 1, 100, 5, NAN)],
    "q inf": [("q", 1, 100, 5, INF)],
    "q -inf": [("q", 3, 199, 7, -INF)],
    "q twice": [("q", 2, 100, 5, INF), ("q", 2, 100, 6, INF)],
    "q rows": [("q", 2, 100, 5, INF), ("q", 2, 101, 9, -INF), ("q", 3, 5, 2, INF), ("q", 0, 150, 3, INF)],
    "q nan": [("q", 2, 100, 5, NAN)],
    "q inf nan": [("q", 2, 100, 5, INF), ("q", 2, 102, 5, NAN), ("q", 3, 180, 9, -INF)],
    "q k": [("q", 2, 100, 5, INF), ("k", 1, 150, 9, -INF), ("k", 1, 30, 5, INF)],
    "v inf": [("v", 1, 150, 5, INF)],
    "v nan": [("v", 1, 150, 5, NAN)],
    "v k": [("v", 1, 150, 5, INF), ("k", 1, 20, 9, -INF)],
    "dout inf": [("dout", 2, 100, 5, INF)],
    "dout nan": [("dout", 2, 100, 5, NAN)],
    "dout q": [("dout", 2, 100, 5, INF), ("q", 2, 101, 9, INF), ("q", 2, 30, 9, INF)],
    "dout k": [("dout", 2, 100, 5, -INF), ("k", 1, 60, 9, INF)],
}


def gradients(tensors, options, kernel=None):
    """By the row for Hopper, unless another one is named."""
    q, k, v, dout = tensors.values()
    kernel = kernel or backward_row(q.dtype, q.shape[-1])
    forward = {name: x for name, x in options.items() if name != "deterministic"}
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **forward)
    return flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=kernel, **options)[:3]


def to_numpy(x):
    if not torch.is_tensor(x):
        return x
    return (x.double() if x.is_floating_point() else x).cpu().numpy()


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def exact(tensors, options):
    q, k, v, dout = (to_numpy(x) for x in tensors.values())
    options = {name: to_numpy(x) for name, x in options.items() if name not in ("deterministic", "batch_invariant")}
    found = reference.attention_backward(dout, q, k, v, **options)
    return [torch.from_numpy(np.asarray(x)).cuda() for x in found[:3]]


def check(tensors, options, kernel=None):
    """Against the oracle; what was computed."""
    got = gradients(tensors, options, kernel)
    for name, x, want in zip(("dq", "dk", "dv"), got, exact(tensors, options), strict=True):
        finite = want.isfinite()
        wrong = (x.isfinite() != finite).nonzero().tolist()
        assert not wrong, f"{name}: {len(wrong)} entries, {wrong[:1]} to {wrong[-1:]}; {int(finite.sum())} should be finite"
        factor = 8 if x.dtype == torch.float32 else 2          # exponentials are good to 4 units of float32
        assert_alike([x.where(finite, 0)], [want.where(finite, 0)], [name], factor=factor, dtype=x.dtype)
    return got


def poisoned(tensors, how):
    tensors = {name: x.clone() for name, x in tensors.items()}
    for which, head, row, column, value in POISON[how]:
        tensors[which][1, head, row, column] = value
    return tensors


def arrays(d, dtype, b=2, hq=4, hk=2, sq=200, sk=260):
    q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=dtype)
    return {"q": q, "k": k, "v": v, "dout": random(b, hq, sq, d, dtype=dtype, seed=8)}


@pytest.mark.parametrize("how", POISON)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_are_those_of_the_equations(d, dtype, alibi, mask, how):
    options = {"softcap": 3.0, **MASKS[mask]}
    if alibi:
        options["alibi_slopes"] = torch.linspace(0.01, 0.2, 4, device="cuda")
    clean = arrays(d, dtype)
    tensors = poisoned(clean, how)
    got, before = check(tensors, options), gradients(clean, options)
    for x, y in zip(got, before, strict=True):
        assert torch.equal(x[0], y[0])      # of another sequence


@pytest.mark.parametrize("how", POISON)
@pytest.mark.parametrize("more", ["mask", "dropout", "both"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_beside_a_mask_and_dropout(d, more, how):
    """What the mask hides. Of a dO that is not finite, and of rows whose weights are NaN, dropout leaves nothing of dV, where
    0 * NaN is NaN in the oracle."""
    if more != "mask" and ("dout" in how or how in ("q nan", "q inf nan", "q twice", "q k")):
        pytest.skip("the oracle multiplies with dropout's zeros: test_hopper_backward_bits.py has these")
    mask = torch.rand(2, 1, 200, 260, generator=torch.Generator("cuda").manual_seed(4), device="cuda") < 0.7
    mask[:, :, :100, 150] = mask[:, :, 101, 30] = False
    options = {"softcap": 3.0} | ({} if more == "dropout" else {"mask": mask})
    if more != "mask":
        options |= {"dropout_p": 0.3, "seed": 5}
    clean = arrays(d, torch.bfloat16)
    got, before = check(poisoned(clean, how), options), gradients(clean, options)
    for x, y in zip(got, before, strict=True):
        assert torch.equal(x[0], y[0])


@pytest.mark.parametrize("how", POISON)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_general_rows_say_the_same(d, dtype, how):
    tensors = poisoned(arrays(d, {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]), how)
    for options in MASKS.values():
        check(tensors, {"softcap": 3.0, **options}, f"bwd_sm80_{dtype}_d{d}_dv{d}_general")


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_bits_of_what_sees_no_infinity(d, dtype, value):
    """dQ of rows that do not see the key; dV of keys that the row does not see, dK but for the column of an infinite query."""
    clean, options = arrays(d, dtype, sq=500, sk=500), {"softcap": 2.0, "window": (60, 10)}
    dq, dk, dv = gradients(clean, options)
    tensors = {name: x.clone() for name, x in clean.items()}
    tensors["k"][1, 1, 400, 5] = value
    got = check(tensors, options)
    rows = torch.ones_like(dq, dtype=torch.bool)
    rows[1, 2:, 390:461] = False
    assert torch.equal(got[0][rows], dq[rows]) and torch.equal(got[1][0], dk[0]) and torch.equal(got[2][0], dv[0])
    assert not got[1][1, 1, 400].any() and got[2][1, 1, 400].isfinite().all()
    assert got[0][1, 2:, 390:461, 5].isnan().all() and got[0].isnan().sum() == 2 * 71
    tensors = {name: x.clone() for name, x in clean.items()}
    tensors["q"][1, 3, 400, 5] = value
    got = check(tensors, options)
    assert not got[0][1, 3, 400].any() and got[1][1, 1, 340:411, 5].isnan().all() and got[1].isnan().sum() == 71
    keys = torch.ones(500, dtype=torch.bool, device="cuda")
    keys[340:411] = False
    columns = torch.arange(d, device="cuda") != 5
    assert torch.equal(got[1][1, 1][keys][:, columns], dk[1, 1][keys][:, columns])
    assert torch.equal(got[2][1, 1][keys], dv[1, 1][keys])


@pytest.mark.parametrize("how", ["keys", "q rows", "q k", "q inf nan", "dout q"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_lengths_parts_and_orders(d, how):
    """Padding of NaN, a sequence without keys, a sink; a large group, whose rows are shared out; packed sequences; any order."""
    dtype = torch.bfloat16
    tensors = poisoned(arrays(d, dtype, b=3), how)
    lengths = {"q_lens": ints(130, 200, 7), "kv_lens": ints(0, 260, 90)}
    for name in ("q", "dout"):
        tensors[name][0, :, 130:] = tensors[name][2, :, 7:] = NAN
    for name in ("k", "v"):
        tensors[name][0] = tensors[name][2, :, 90:] = NAN
    check(tensors, {"softcap": 3.0, "causal": True, **lengths})
    check(tensors, {"softcap": 3.0, "sink": torch.linspace(-1, 1, 4, device="cuda"), **lengths})
    large = poisoned(arrays(d, dtype, b=2, hq=16, hk=2, sq=700), how)
    assert flashgqa.explain(*list(large.values())[:3], backward=True, softcap=3.0)["splits"] > 1
    for more in ({}, {"deterministic": False}, {"batch_invariant": True}):
        check(large, {"softcap": 3.0, **more})
    one = poisoned(arrays(d, dtype), how)
    packed = {name: torch.cat([x[0, :, :70], x[1], x[0, :, 100:101]], 1).transpose(0, 1).contiguous() for name, x in one.items()}
    starts = {"cu_seqlens_q": ints(0, 70, 70, 270, 271), "cu_seqlens_kv": ints(0, 70, 70, 330, 331)}
    check(packed, {"softcap": 3.0, "causal": True, **starts})


@pytest.mark.parametrize("d", [64, 128, 256])
def test_in_a_graph_and_again(d):
    """A graph of a call that met nothing finds what is infinite later; the same bits every time."""
    clean, options = arrays(d, torch.float16), {"softcap": 3.0, "causal": True}
    q, k, v, dout = clean.values()
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **options)

    def run():
        return flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=backward_row(q.dtype, d), **options)[:3]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    for how in ("k inf", "q rows", "keys"):
        for to, x in zip((q, k, v, dout), poisoned(arrays(d, torch.float16), how).values(), strict=True):
            to.copy_(x)
        for to, x in zip((out, lse), flashgqa.attention(q, k, v, return_lse=True, **options), strict=True):
            to.copy_(x)
        expected = run()
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(held, expected, strict=True))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_narrower_heads(d):
    """Head dims below the row's, of arrays and of views."""
    for how, contiguous in itertools.product(("keys", "q rows"), (True, False)):
        tensors = {name: x[..., : d - 24] for name, x in poisoned(arrays(d, torch.float16), how).items()}
        check({name: x.contiguous() if contiguous else x for name, x in tensors.items()}, {"softcap": 3.0, "causal": True})


# ---- without a soft cap, and beside all other options ----


def bools(*shape):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda") < 0.8


def with_holes(sq, sk):
    """A mask of which row 60 sees nothing and nobody sees key 77."""
    mask = bools(2, 1, sq, sk)
    mask[:, :, 60] = mask[..., 77] = False
    return mask


def as_bias(mask, dtype):
    return torch.linspace(-1, 1, mask.shape[-1], device="cuda").expand(mask.shape).masked_fill(~mask, -INF).to(dtype)


def slopes():
    return torch.linspace(0.01, 0.2, 4, device="cuda")


# of 200 rows and 260 keys, in a dtype
OPTIONS = {
    "mask": lambda dtype: {"mask": with_holes(200, 260)},
    "mask causal": lambda dtype: {"mask": with_holes(200, 260), "causal": True},
    "bias": lambda dtype: {"bias": as_bias(with_holes(200, 260), dtype)},
    "bias mask": lambda dtype: {"bias": as_bias(bools(1, 4, 200, 260), torch.float32), "mask": with_holes(200, 260)},
    "alibi": lambda dtype: {"alibi_slopes": slopes(), "window": (90, 20)},
    "alibi mask": lambda dtype: {"alibi_slopes": slopes(), "mask": with_holes(200, 260)},
    "softcap bias": lambda dtype: {"softcap": 3.0, "bias": as_bias(with_holes(200, 260), dtype)},
    "all": lambda dtype: OPTIONS["softcap bias"](dtype) | {"alibi_slopes": slopes(), "mask": bools(1, 1, 200, 260)},
    "dropout": lambda dtype: {"dropout_p": 0.2, "seed": 7, "causal": True},
    "dropout mask": lambda dtype: {"dropout_p": 0.2, "seed": 7, "mask": with_holes(200, 260)},
    "dropout bias": lambda dtype: {"dropout_p": 0.2, "seed": 7, "bias": as_bias(with_holes(200, 260), dtype)},
    "lengths": lambda dtype: {"q_lens": ints(0, 200), "kv_lens": ints(0, 260), "sink": torch.ones(4, device="cuda")},
    "rows without keys": lambda dtype: {"q_lens": ints(200, 170), "kv_lens": ints(0, 160), "causal": True},
}
# as POISON; key 77 and row 60 are those of with_holes()
VALUES = {
    "none": [],
    "k nan": [("k", 1, 150, 5, NAN), ("k", 0, 77, 5, NAN)],
    "q nan": [("q", 2, 100, 5, NAN), ("q", 1, 60, 5, NAN)],
    "v nan": [("v", 1, 150, 5, NAN), ("v", 0, 77, 6, NAN)],
    "v inf": [("v", 1, 150, 5, INF), ("v", 0, 77, 6, -INF)],
    "unseen": [("k", 1, 77, 5, NAN), ("q", 3, 60, 5, NAN), ("v", 1, 77, 5, INF), ("dout", 3, 60, 5, INF)],
    "dout": [("dout", 2, 100, 5, INF), ("dout", 1, 60, 5, NAN)],
}


@pytest.mark.parametrize("how", VALUES)
@pytest.mark.parametrize("asked", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_values_that_are_not_finite(d, dtype, asked, how):
    """By the kernels that the plan takes and by general ones. A weight of 0 times what is not finite may be 0 or NaN: no score is
    -inf here, but weights are dropped or too small for float16, so that dv may lack it."""
    tensors = arrays(d, dtype)
    options = OPTIONS[asked](dtype)
    for which, head, row, column, value in VALUES[how]:
        tensors[which][1, head, row, column] = value
    q, k, v, dout = tensors.values()
    of_numpy = {name: to_numpy(x) for name, x in options.items()}
    expected = [torch.from_numpy(x).cuda() for x in reference.attention(*map(to_numpy, (q, k, v)), return_lse=True, **of_numpy)]
    expected += exact(tensors, options)
    general = f"_sm80_{DTYPES[dtype]}_d{d}_dv{d}_general"
    for kernels in ((None, None), (f"fwd{general}", f"bwd{general}")):
        out, lse = flashgqa.attention(q, k, v, return_lse=True, kernel=kernels[0], **options)
        got = [out, lse, *flashgqa.attention_backward(dout, q, k, v, out, lse, kernel=kernels[1], **options)[:3]]
        for name, x, want in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            finite = want.isfinite()
            wrong = ~x.isfinite() & finite if name == "dv" else x.isfinite() != finite
            assert not wrong.any(), (name, kernels, int(wrong.sum()))
            if name == "lse":
                assert torch.equal(x.isneginf(), want.isneginf())
            assert_alike([x.where(finite, 0)], [want.where(finite, 0)], [name], factor=8, dtype=dtype)
