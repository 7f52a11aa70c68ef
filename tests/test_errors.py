"""Bad calls: each raises its exception with a sentence that names the argument, what was got, what is allowed and the fix;
and leaves inputs and out= as they were.
"""

import re

import numpy as np
import pytest

import flashgqa

# q [b, hq, sq, d], k and v of 3 heads and 7 keys, dv 4. CHANGES of a case replace or add arguments; None as array: leave out.
B, HQ, HK, SQ, SK, D, DV = 2, 6, 3, 5, 7, 8, 4


def f32(*shape):
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def i32(*values):
    return np.array(values, dtype=np.int32)


def forward_arguments():
    return {"q": f32(B, HQ, SQ, D), "k": f32(B, HK, SK, D), "v": f32(B, HK, SK, DV)}


def packed_arguments():
    return {
        "q": f32(5, HQ, D),
        "k": f32(7, HK, D),
        "v": f32(7, HK, DV),
        "cu_seqlens_q": i32(0, 2, 2, 5),
        "cu_seqlens_kv": i32(0, 1, 5, 7),
    }


def backward_arguments():
    arrays = forward_arguments()
    out, lse = flashgqa.attention(**arrays, return_lse=True)
    return {"dout": f32(B, HQ, SQ, DV), **arrays, "out": out, "lse": lse}


def weights_arguments():
    arrays = forward_arguments()
    return {"q": arrays["q"], "k": arrays["k"], "rows": np.array([0, 4])}


CALLS = {
    "forward": (flashgqa.attention, forward_arguments),
    "packed": (flashgqa.attention, packed_arguments),
    "backward": (flashgqa.attention_backward, backward_arguments),
    "weights": (flashgqa.attention_weights, weights_arguments),
}
CASES = []


def case(call, name, exception, *patterns, **changes):
    """patterns: what was got, what is allowed and the fix, all found in the message, in this order."""
    CASES.append(pytest.param(call, changes, exception, patterns, id=f"{call}-{name}"))


def self_overlapping(*shape):
    return np.lib.stride_tricks.as_strided(f32(64), shape, (16, 4, 4, 4), writeable=True)


def unaligned(*shape):
    size = 4 * int(np.prod(shape))
    return np.zeros(size + 1, np.uint8)[1:].view(np.float32).reshape(shape)


def read_only(array):
    array.flags.writeable = False
    return array


T, V, N = TypeError, ValueError, NotImplementedError

# fmt: off
# ---- q, k, v: kind, rank, dtype, shape ----
case("forward", "q-list", T, "q is list", "NumPy array or any tensor with __dlpack__", r"numpy\.asarray\(q, dtype", q=[[1.0]])
case("forward", "k-none", T, "k is None", "pass a NumPy array", k=None)
case("forward", "q-scalar", V, r"q has 0 dimensions, shape \(\)", r"4, \[b, h, s, d\], or 3, \[h, s, d\]", "add or merge axes",
     q=np.array(1, np.float32))
case("forward", "q-rank-2", V, r"q has 2 dimensions, shape \(5, 8\)", r"4, \[b, h, s, d\], or 3", "add or merge axes",
     q=f32(5, 8))
case("forward", "q-rank-2-bshd", V, r"q has 2 dimensions", r"4, \[b, s, h, d\], or 3, \[s, h, d\]", "add", q=f32(5, 8),
     layout="bshd")
case("forward", "q-rank-5", V, "q has 5 dimensions", "at most 4", "reshape", q=f32(1, 2, 6, 5, 8))
case("forward", "k-rank", V, r"k has 3 dimensions, shape \(3, 7, 8\), but q has 4", "same number", r"bring k to \[b, h, s, d\]",
     k=f32(3, 7, 8))
case("forward", "v-rank", V, r"v has 3 dimensions, shape \(3, 7, 4\), but q has 4", "same number", r"bring v to \[b, h, s, d\]",
     v=f32(3, 7, 4))
case("forward", "q-int64", T, "q has dtype int64", "float16, bfloat16, float32 or float64", "convert",
     q=np.ones((B, HQ, SQ, D), np.int64))
case("forward", "q-bool", T, "q has dtype bool", "float16, bfloat16, float32 or float64", "convert",
     q=np.ones((B, HQ, SQ, D), bool))
case("forward", "q-complex", T, "q has dtype complex64", "float16, bfloat16, float32 or float64", "convert",
     q=np.ones((B, HQ, SQ, D), np.complex64))
case("forward", "q-longdouble", T, "q has dtype (longdouble|float128)", "float64", "convert",
     q=np.ones((B, HQ, SQ, D), np.longdouble))
case("forward", "q-masked", T, r"q is a numpy\.ma\.MaskedArray", "ignored", r"pass q\.filled",
     q=np.ma.masked_less(f32(B, HQ, SQ, D), 0))
case("forward", "q-object", T, "q has dtype object", "float64", "convert", q=np.ones((B, HQ, SQ, D), object))
case("forward", "k-dtype", T, "k has dtype float64 but q has float32", "one dtype", "convert k to float32",
     k=f32(B, HK, SK, D).astype(np.float64))
case("forward", "v-dtype", T, "v has dtype float16 but q has float32", "one dtype", "convert v to float32",
     v=f32(B, HK, SK, DV).astype(np.float16))
case("forward", "heads-do-not-divide", V, "k has 4 heads but q has 6", "query heads must be a multiple of KV heads",
     r"\(q heads 6 % k heads 4 != 0\); repeat or drop heads", k=f32(B, 4, SK, D), v=f32(B, 4, SK, DV))
case("forward", "more-kv-heads", V, "k has 12 heads but q has 6", "multiple", "repeat or drop heads", k=f32(B, 12, SK, D),
     v=f32(B, 12, SK, DV))
case("forward", "heads-after-sequence", V, "k has 7 heads but q has 6", "multiple", 'or say layout="bshd"', q=f32(B, 6, 4, D),
     k=f32(B, 7, 2, D), v=f32(B, 7, 2, DV))
case("forward", "bshd-of-bhsd", V, "k has 4 heads but q has 5", "multiple", 'or say layout="bhsd"', layout="bshd",
     k=f32(B, 3, 4, D), v=f32(B, 3, 4, DV))
case("forward", "no-heads", V, "q has 0 heads", "at least 1", r"read as \[b, h, s, d\]", q=f32(B, 0, SQ, D))
case("forward", "no-kv-heads", V, "k has 0 heads", "at least 1", r"read as \[b, h, s, d\]", k=f32(B, 0, SK, D),
     v=f32(B, 0, SK, DV))
case("forward", "batch", V, "k has batch size 3 but q has 2", "must be equal",
     r"k \(3, 3, 7, 8\) and q \(2, 6, 5, 8\), read as \[b, h, s, d\]", k=f32(3, HK, SK, D))
case("forward", "v-batch", V, "v has batch size 1 but k has 2", "must be equal", r"v \(1, 3, 7, 4\)", v=f32(1, HK, SK, DV))
case("forward", "head-dim", V, "k has head dim 9 but q has 8", "must be equal", r"k \(2, 3, 7, 9\)", k=f32(B, HK, SK, 9))
case("forward", "v-heads", V, "v has head count 6 but k has 3", "must be equal", r"v \(2, 6, 7, 4\)", v=f32(B, 6, SK, DV))
case("forward", "v-length", V, "v has length 8 but k has 7", "must be equal", r"v \(2, 3, 8, 4\)", v=f32(B, HK, 8, DV))
case("forward", "d-0", V, "q has head dim d = 0", "1 to 256", "is the last axis the head dim", q=f32(B, HQ, SQ, 0),
     k=f32(B, HK, SK, 0))
case("forward", "d-257", N, "q has head dim d = 257", "1 to 256", "split or project", q=f32(B, HQ, SQ, 257),
     k=f32(B, HK, SK, 257))
case("forward", "dv-512", N, "v has head dim dv = 512", "1 to 256", "split or project", v=f32(B, HK, SK, 512))

# ---- scalar options ----
case("forward", "causal-int", T, "causal is 1", "True or False", causal=1)
case("forward", "window-minus-1", V, r"window\[0\] is -1", "0 or more", "use None for a side without bound", window=(-1, 0))
case("forward", "window-minus-5", V, r"window\[1\] is -5", "0 or more", "use None", window=(None, -5))
case("forward", "window-int", T, "window is 3", r"pair \(left, right\)", window=3)
case("forward", "window-float", T, r"window\[0\] is 1\.5", "integer", window=(1.5, 0))
case("forward", "window-triple", T, r"window is \(1, 2, 3\)", r"pair \(left, right\)", window=(1, 2, 3))
case("forward", "align", V, "align is 'left'", '"bottom-right" or "top-left"', align="left")
case("forward", "chunk-0", V, "chunk is 0", "1 or more", "use None for no chunks", chunk=0)
case("forward", "chunk-negative", V, "chunk is -4", "1 or more", "use None", chunk=-4)
case("forward", "chunk-float", T, r"chunk is 2\.5", "integer", chunk=2.5)
case("forward", "scale-nan", V, "scale is nan", "finite float32", r"None for 1/sqrt\(d\)", scale=float("nan"))
case("forward", "scale-inf", V, "scale is inf", "finite", "None", scale=float("inf"))
case("forward", "scale-beyond-float32", V, r"scale is 1e\+60", "finite float32", "None", scale=1e60)
case("forward", "scale-beyond-float64", V, "scale is 1000", "finite number", scale=10**400)
case("forward", "softcap-tiny", V, "softcap is 1e-310", "1/softcap", "float", softcap=1e-310)
case("forward", "scale-text", T, "scale is '1'", "number", scale="1")
case("forward", "softcap-0", V, "softcap is 0", "greater than 0", "use None for no cap", softcap=0.0)
case("forward", "softcap-negative", V, "softcap is -50", "greater than 0", "use None", softcap=-50.0)
case("forward", "softcap-nan", V, "softcap is nan", "greater than 0", "use None", softcap=float("nan"))
case("forward", "softcap-inf", V, "softcap is inf", "finite", "use None", softcap=float("inf"))
case("forward", "dropout-negative", V, r"dropout_p is -0\.1", "from 0 to 1", dropout_p=-0.1, seed=1)
case("forward", "dropout-above-1", V, r"dropout_p is 1\.5", "from 0 to 1", dropout_p=1.5, seed=1)
case("forward", "dropout-nan", V, "dropout_p is nan", "from 0 to 1", dropout_p=float("nan"), seed=1)
case("forward", "dropout-without-seed", V, r"dropout_p is 0\.1 but seed is missing", "seed alone", "pass seed=<int>",
     dropout_p=0.1)
case("forward", "seed-float", T, r"seed is 1\.5", "integer or an int64 array", dropout_p=0.1, seed=1.5)
case("forward", "seed-too-large", V, "seed is 18446744073709551616", r"0 to 2\*\*64 - 1", dropout_p=0.1, seed=2**64)
case("forward", "seed-int32", T, "seed has dtype int32", "must be int64", "convert", dropout_p=0.1, seed=i32(1, 2))
case("forward", "seed-shape", V, r"seed has shape \(3,\)", r"\[2\] = \(2,\)", r"give \[seed, offset\]", dropout_p=0.1,
     seed=np.zeros(3, np.int64))
case("forward", "seed-offset", V, "seed has offset 4294967296", r"0 to 2\^32 - 1", "more bits into the seed", dropout_p=0.1,
     seed=np.array([1, 2**32]))
case("forward", "layout", V, "layout is 'bsd'", '"bhsd" or "bshd"', layout="bsd")
case("forward", "precision-float64", V, 'precision is "bf16x3" but q has dtype float64', "float32 numbers only",
     "leave precision out", precision="bf16x3", q=np.zeros((B, HQ, SQ, D)), k=np.zeros((B, HK, SK, D)),
     v=np.zeros((B, HK, SK, DV)), out=None)
case("forward", "precision", V, "precision is 'tf32'", "bf16x3", precision="tf32")
case("forward", "scale-array", T, r"scale is array\(0.5\): it must be a number",
     r"float\(scale\) makes one of an array of one element", scale=np.array(0.5))
case("forward", "scale-text", T, "scale is '0.5': it must be a number$", scale="0.5")
case("forward", "kernel-unknown", V, 'kernel is "fwd_magic"', "choose one of fwd_", "or None", kernel="fwd_magic")
case("forward", "kernel-number", T, "kernel is 3", "name", kernel=3)
case("forward", "device", V, "device is 'tpu'", '"cpu", "cuda"', device="tpu")
case("forward", "stream-on-cpu", V, "stream is 5 but q is on cpu", "only GPU tensors have streams", "leave it out", stream=5)
case("forward", "unknown-option", T, "windows", windows=(3, 0))
case("forward", "return-lse-int", T, "return_lse is 1", "True or False", return_lse=1)

# ---- mask, bias, ALiBi, sink ----
case("forward", "mask-float", T, "mask has dtype float32", r"bool \(True = may attend\)", "bias=", mask=f32(SQ, SK))
case("forward", "mask-int", T, "mask has dtype int32", "bool", mask=np.ones((SQ, SK), np.int32))
case("forward", "mask-uint8", T, "mask has dtype uint8", "bool", mask=np.ones((SQ, SK), np.uint8))
case("forward", "mask-rank-1", V, r"mask has 1 dimension, shape \(7,\)", r"2 \(\[sq, sk\]\), 4 \(\[b, hq, sq, sk\]\)",
     r"key padding is written \[b, 1, 1, sk\]", mask=np.ones(SK, bool))
case("forward", "mask-rank-3", V, r"mask has 3 dimensions, shape \(2, 5, 7\)", "not clear", r"mask\[:, None\] for \[b, sq, sk\]",
     mask=np.ones((B, SQ, SK), bool))
case("forward", "mask-keys", V, r"mask has shape \(5, 8\)",
     r"\[b, hq, sq, sk\] = \(2, 6, 5, 7\), but axis 1 has extent 8 where 1 or 7", "slice or expand it to sk",
     mask=np.ones((SQ, 8), bool))
case("forward", "mask-key-padding", V, r"mask has shape \(2, 7\)", "axis 0 has extent 2 where 1 or 5 is allowed",
     r"write key padding \[b, sk\] as \[b, 1, 1, sk\], by \[:, None, None\]", mask=np.ones((B, SK), bool))
case("forward", "mask-transposed", V, r"mask has shape \(2, 1, 7, 5\)", "axis 2 has extent 7 where 1 or 5 is allowed",
     "query rows, then keys: swap them", mask=np.ones((B, 1, SK, SQ), bool))
case("forward", "mask-heads", V, r"mask has shape \(1, 3, 5, 7\)", "axis 1 has extent 3 where 1 or 6", "expand it to hq",
     mask=np.ones((1, 3, SQ, SK), bool))
case("forward", "bias-bool", T, "bias has dtype bool", "float16, bfloat16, float32 or float64", "mask=",
     bias=np.ones((SQ, SK), bool))
case("forward", "bias-int", T, "bias has dtype int64", "float32", "convert", bias=np.ones((SQ, SK), np.int64))
case("forward", "bias-shape", V, r"bias has shape \(2, 6, 5, 5\)", r"= \(2, 6, 5, 7\), but axis 3 has extent 5",
     "expand it to sk", bias=f32(B, HQ, SQ, 5))
case("forward", "alibi-dtype", T, "alibi_slopes has dtype float64", "must be float32", "convert", alibi_slopes=np.ones(HQ))
case("forward", "alibi-kv-heads", V, r"alibi_slopes has shape \(3,\)", r"\[hq\] = \(6,\) or \[b, hq\] = \(2, 6\)",
     "one slope a query head", alibi_slopes=f32(HK))
case("forward", "alibi-rank", V, r"alibi_slopes has shape \(2, 6, 1\)", r"\[hq\] = \(6,\)", "one slope",
     alibi_slopes=f32(B, HQ, 1))
case("forward", "sink-dtype", T, "sink has dtype int32", "float32", "convert", sink=np.ones(HQ, np.int32))
case("forward", "sink-shape", V, r"sink has shape \(3,\)", r"\[hq\] = \(6,\)", "one logit a query head", sink=f32(HK))

# ---- lengths ----
case("forward", "kv-lens-int64", T, "kv_lens has dtype int64", "must be int32", "convert it to int32", kv_lens=np.array([7, 7]))
case("forward", "kv-lens-list", T, "kv_lens is list", "NumPy array", r"numpy\.asarray", kv_lens=[7, 7])
case("forward", "kv-lens-shape", V, r"kv_lens has shape \(3,\)", r"\[b\] = \(2,\)", "one length a sequence",
     kv_lens=i32(7, 7, 7))
case("forward", "kv-lens-too-long", V, r"kv_lens\[1\] is 8 but k has length 7", "0 to 7", "clip it, or pad k", kv_lens=i32(7, 8))
case("forward", "kv-lens-negative", V, r"kv_lens\[0\] is -1 but k has length 7", "0 to 7", "clip it", kv_lens=i32(-1, 7))
case("forward", "q-lens-too-long", V, r"q_lens\[0\] is 6 but q has length 5", "0 to 5", "pad q", q_lens=i32(6, 5))
case("forward", "max-q-alone", V, "max_q is 5 but cu_seqlens are not given", "packed sequences", "leave it out", max_q=5)
case("packed", "one-cu", V, "cu_seqlens_q is given without cu_seqlens_kv", "both, or neither", "give both", cu_seqlens_kv=None)
case("packed", "other-cu", V, "cu_seqlens_kv is given without cu_seqlens_q", "both, or neither", "give both", cu_seqlens_q=None)
case("packed", "and-kv-lens", V, "kv_lens is given together with cu_seqlens", "carry their lengths", "leave it out",
     kv_lens=i32(1, 4, 2))
case("packed", "rank-4", V, r"q has 4 dimensions, shape \(1, 5, 6, 8\)", r"\[total, h, d\]", "join the sequences",
     q=f32(1, 5, HQ, D))
case("packed", "layout", V, 'layout is "bshd" but cu_seqlens are given', r"\[total, h, d\]", "leave layout out", layout="bshd")
case("packed", "cu-int64", T, "cu_seqlens_q has dtype int64", "must be int32", "convert", cu_seqlens_q=np.array([0, 2, 2, 5]))
case("packed", "cu-empty", V, "cu_seqlens_q is empty", r"b \+ 1 offsets", r"\[0\] for no sequence", cu_seqlens_q=i32())
case("packed", "cu-rank", V, r"cu_seqlens_q has shape \(2, 2\)", r"1 dimension, \[b \+ 1\]", "running sums",
     cu_seqlens_q=i32(0, 2, 2, 5).reshape(2, 2))
case("packed", "cu-start", V, r"cu_seqlens_q\[0\] is 1", "start at 0", "prepend a 0", cu_seqlens_q=i32(1, 2, 2, 5))
case("packed", "cu-decreases", V, r"cu_seqlens_q\[2\] is 1, less than cu_seqlens_q\[1\] = 2", "must not decrease",
     "running sums", cu_seqlens_q=i32(0, 2, 1, 5))
case("packed", "cu-end", V, "cu_seqlens_kv ends at 6 but k has 7 rows", "last offset", "slice k or fix",
     cu_seqlens_kv=i32(0, 1, 5, 6))
case("packed", "cu-beyond", V, "cu_seqlens_q ends at 9 but q has 5 rows", "last offset", "slice q or fix",
     cu_seqlens_q=i32(0, 2, 2, 9))
case("packed", "cu-lengths", V, r"cu_seqlens_kv has shape \(3,\)", r"\[b \+ 1\] = \(4,\)", "as many offsets as cu_seqlens_q",
     cu_seqlens_kv=i32(0, 1, 7))
case("packed", "max-q", V, "max_q is 2 but the longest sequence of cu_seqlens_q has 3 rows", "upper bound",
     "pass 3 or leave it out", max_q=2)
case("packed", "max-kv", V, "max_kv is 3 but the longest sequence of cu_seqlens_kv has 4 rows", "upper bound", "pass 4",
     max_kv=3)
case("packed", "max-kv-float", T, r"max_kv is 4\.0", "integer", max_kv=4.0)
case("packed", "mask", V, r"mask has shape \(5, 7\)", r"\[b, hq, max_q, max_kv\] = \(3, 6, 3, 4\)", "give max_q and max_kv",
     mask=np.ones((5, 7), bool))

# ---- out= ----
case("forward", "out-shape", V, r"out has shape \(2, 6, 5, 8\)", r"\[b, hq, sq, dv\] = \(2, 6, 5, 4\)", "or leave it out",
     out=f32(B, HQ, SQ, D))
case("forward", "out-rank", V, r"out has shape \(6, 5, 4\)", r"\[b, hq, sq, dv\] = \(2, 6, 5, 4\)", "or leave it out",
     out=f32(HQ, SQ, DV))
case("forward", "out-dtype", T, "out has dtype float64", "must be float32", "allocate it as float32",
     out=np.zeros((B, HQ, SQ, DV)))
case("forward", "out-read-only", V, "out is read-only", "results are written", "writable", out=read_only(f32(B, HQ, SQ, DV)))
case("forward", "out-strided", V, "out has stride 2 in its last axis", "1 element", "contiguous in its last axis",
     out=f32(B, HQ, SQ, 2 * DV)[..., ::2])
case("forward", "out-overlaps-itself", V, "out has overlapping elements", "memory of its own", "copy",
     out=self_overlapping(B, HQ, SQ, DV))
case("forward", "out-byte-swapped", V, "out is byte-swapped", "in place", "native byte order",
     out=f32(B, HQ, SQ, DV).astype(">f4"))
case("forward", "out-unaligned", V, "out is not aligned", "in place", "aligned array", out=unaligned(B, HQ, SQ, DV))
case("forward", "out-list", T, "out is list", "NumPy array", out=[1.0])

# ---- backward ----
case("backward", "dout-shape", V, r"dout has shape \(2, 6, 5, 8\)", r"\[b, hq, sq, dv\] = \(2, 6, 5, 4\)", "same forward call",
     dout=f32(B, HQ, SQ, D))
case("backward", "dout-dtype", T, "dout has dtype float64", "must be float32", "convert it to float32",
     dout=np.zeros((B, HQ, SQ, DV)))
case("backward", "out-shape", V, r"out has shape \(2, 6, 4, 4\)", r"= \(2, 6, 5, 4\)", "same forward call",
     out=f32(B, HQ, 4, DV))
case("backward", "lse-shape", V, r"lse has shape \(2, 5, 6\)", r"\[b, hq, sq\] = \(2, 6, 5\)", "same forward call",
     lse=f32(B, SQ, HQ))
case("backward", "lse-dtype", T, "lse has dtype float16", "must be float32", "convert", lse=f32(B, HQ, SQ).astype(np.float16))
case("backward", "lse-none", T, "lse is None", "NumPy array", lse=None)
case("backward", "dlse-shape", V, r"dlse has shape \(2, 6\)", r"\[b, hq, sq\] = \(2, 6, 5\)", "same forward call",
     dlse=f32(B, HQ))
case("backward", "dlse-dtype", T, "dlse has dtype float64", "must be float32", "convert", dlse=np.zeros((B, HQ, SQ)))
case("backward", "dropout-without-seed", V, r"dropout_p is 0\.5 but seed is missing", "seed alone", "pass seed", dropout_p=0.5)
case("backward", "forward-kernel", V, 'kernel is "fwd_portable"', "no backward kernel", "choose one of bwd",
     kernel="fwd_portable")

# ---- weights ----
case("weights", "row-beyond", V, r"rows\[1\] is 5 but q has 5 rows", "0 to 4", rows=np.array([0, 5]))
case("weights", "row-negative", V, r"rows\[0\] is -1 but q has 5 rows", "0 to 4", "negative ones do not count from the end",
     rows=np.array([-1]))
case("weights", "rows-float", T, "rows has dtype float64", "int64", "convert", rows=np.array([0.0]))
case("weights", "rows-bool", T, "rows has dtype bool", "int64, numbers and no mask", "flatnonzero", rows=np.array([True, False]))
case("weights", "rows-rank", V, r"rows has shape \(1, 2\)", r"1 dimension, \[rows\]", "indices of query rows",
     rows=np.array([[0, 1]]))
case("weights", "heads", V, "k has 4 heads but q has 6", "multiple", "repeat or drop heads", k=f32(B, 4, SK, D))


# ---- the smaller functions ----
PART = (f32(HQ, SQ, DV), f32(HQ, SQ))
TOOLS = [
    pytest.param(lambda: flashgqa.merge([], []), V, "outs has 0 parts and lses has 0.*as many of both, and at least one",
        id="merge-nothing"),
    pytest.param(lambda: flashgqa.merge([PART[0]], [PART[1]] * 2), V, "outs has 1 parts and lses has 2.*as many",
        id="merge-counts"),
    pytest.param(lambda: flashgqa.merge([PART[1]], [PART[1]]), V, r"outs\[0\] has 2 dimensions.*3 or 4", id="merge-rank"),
    pytest.param(lambda: flashgqa.merge([PART[0], PART[0][:, 1:]], [PART[1]] * 2), V,
        r"outs\[1\] has .*\(6, 4, 4\).*\(6, 5, 4\)", id="merge-shape"),
    pytest.param(lambda: flashgqa.merge([PART[0]], [PART[1].astype(np.float64)]), T, r"lses\[0\] has dtype float64.*float32",
        id="merge-lse-dtype"),
    pytest.param(lambda: flashgqa.merge([PART[0]], [PART[1]], layout="sbhd"), V, "layout is 'sbhd'.*\"bhsd\" or \"bshd\"",
        id="merge-layout"),
    pytest.param(lambda: flashgqa.dropout_mask(-1, 2, 3, 4, 0.5, 1), V, r"b is -1.*0 to 2\*\*31 - 1", id="dropout-mask-b"),
    pytest.param(lambda: flashgqa.dropout_mask(1, 2, 3, 2**31, 0.5, 1), V, "sk is 2147483648.*0 to", id="dropout-mask-sk"),
    pytest.param(lambda: flashgqa.dropout_mask(1, 2, 3.0, 4, 0.5, 1), T, r"sq is 3\.0.*integer", id="dropout-mask-sq"),
    pytest.param(lambda: flashgqa.dropout_mask(1, 2, 3, 4, 1.01, 1), V, r"dropout_p is 1\.01.*0 to 1", id="dropout-mask-p"),
    pytest.param(lambda: flashgqa.dropout_mask(1, 2, 3, 4, 0.5, None), V, "seed is None", id="dropout-mask-seed"),
    pytest.param(lambda: flashgqa.dropout_mask(1, 2, 3, 4, 0.5, -1), V, r"seed is -1.*0 to 2\*\*64 - 1",
        id="dropout-mask-seed-negative"),
    pytest.param(lambda: flashgqa.set_num_threads(0), V, "n is 0.*1 to 1024, or None", id="threads-0"),
    pytest.param(lambda: flashgqa.set_num_threads(1025), V, "n is 1025.*1 to 1024, or None", id="threads-1025"),
    pytest.param(lambda: flashgqa.set_num_threads(1.5), T, r"n is 1\.5.*integer", id="threads-float"),
    pytest.param(lambda: flashgqa.kv_cache_bytes(-1, 8, 128, "float16"), V, "num_layers is -1.*0 or more", id="kv-cache-layers"),
    pytest.param(lambda: flashgqa.kv_cache_bytes(1, 8.0, 128, "float16"), T, r"num_kv_heads is 8\.0.*integer",
        id="kv-cache-heads"),
    pytest.param(lambda: flashgqa.kv_cache_bytes(1, 8, np.zeros(2), "float16"), T, r"head_dim is array.*integer",
        id="kv-cache-array"),
    pytest.param(lambda: flashgqa.merge(None, [PART[1]]), T, "outs is NoneType: it must be a sequence", id="merge-none"),
    pytest.param(lambda: flashgqa.merge([PART[0]], 1.5), T, "lses is float: it must be a sequence", id="merge-number"),
    pytest.param(lambda: flashgqa.mean_pool_kv_heads(f32(1, 4, 3, 8), "2"), T, "num_kv_heads is '2'.*integer", id="pool-text"),
    pytest.param(lambda: flashgqa.mean_pool_kv_heads(f32(1, 4, 3, 8), np.zeros(2)), T, "num_kv_heads is array.*integer",
        id="pool-array"),
    pytest.param(lambda: flashgqa.mean_pool_kv_heads(f32(1, 4, 3, 8), 2, axis=1.0), T, r"axis is 1\.0.*integer", id="pool-axis"),
    pytest.param(lambda: flashgqa.mean_pool_kv_heads(f32(1, 4, 3, 8), 2, axis=4), V, "axis is 4 and source has 4 axes",
        id="pool-axis-4"),
    pytest.param(lambda: flashgqa.attention_weights(f32(HQ, SQ, D), f32(HK, SK, D)), V, "exactly one must be given.*pass rows=",
        id="weights-neither"),
    pytest.param(lambda: flashgqa.attention_weights(f32(HQ, SQ, D), f32(HK, SK, D), reduce="rows"), V,
        "reduce is 'rows'.*\"keys\"", id="weights-reduce"),
    pytest.param(lambda: flashgqa.attention_weights(f32(HQ, SQ, D), f32(HK, SK, D), rows=[True, False]), T,
        r"rows is \[True, False\].*sequence of integers.*flatnonzero", id="weights-rows-mask"),
    pytest.param(lambda: flashgqa.explain(f32(HQ, SQ, D), f32(4, SK, D), f32(4, SK, D)), V,
        "k has 4 heads but q has 6.*repeat or drop heads", id="explain-heads"),
]
# fmt: on


@pytest.mark.parametrize(("call", "exception", "pattern"), TOOLS)
def test_bad_tool_call(call, exception, pattern):
    with pytest.raises(exception, match=pattern) as caught:
        call()
    assert type(caught.value) is exception


def test_there_are_at_least_sixty():
    assert len(CASES) >= 60


def copies(arguments):
    return {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize(("call", "changes", "exception", "patterns"), CASES)
def test_bad_call(call, changes, exception, patterns):
    function, make = CALLS[call]
    arguments = make()
    if call == "forward":
        arguments["out"] = np.full((B, HQ, SQ, DV), 7, np.float32)
    for name, value in changes.items():
        if value is None and name not in ("q", "k", "v", "lse"):
            arguments.pop(name, None)
        else:
            arguments[name] = value
    before = copies(arguments)
    with pytest.raises(exception, match=r"(?s)" + ".*".join(patterns)) as caught:
        function(**arguments)
    assert type(caught.value) is exception
    for name, array in before.items():
        assert arguments[name].tobytes() == array.tobytes(), f"{name} was changed by a failed call"
    # One sentence, of one line but for the list of reasons of a plan.
    assert "\n" not in str(caught.value)
    assert not re.search(r"%|\(null\)|None None", re.sub(r"heads \d+ % k", "", str(caught.value)))


def test_out_may_not_overlap_inputs():
    memory = np.zeros(4096, np.float32)
    q = memory[: B * HQ * SQ * D].reshape(B, HQ, SQ, D)
    k, v = f32(B, HK, SK, D), f32(B, HK, SK, D)
    for out in (q, memory[1 : 1 + q.size].reshape(q.shape), memory[q.size - 1 : 2 * q.size - 1].reshape(q.shape)):
        with pytest.raises(ValueError, match="out overlaps q .*memory of its own"):
            flashgqa.attention(q, k, v, out=out)
    assert not memory.any()
    beside = memory[q.size : 2 * q.size].reshape(q.shape)
    assert flashgqa.attention(q, k, v, out=beside) is beside


def test_a_copy_that_does_not_fit_says_of_what():
    """2^48 bytes, more than there are addresses, all of one element; the last axis is not contiguous, so it would be copied."""
    q, k = np.broadcast_to(np.float32(1), (1, 1, 2**40, 64)), np.zeros((1, 1, 1, 64), np.float32)
    with pytest.raises(MemoryError, match="q is not contiguous, and a copy of it does not fit"):
        flashgqa.attention(q, k, k)


def test_float8_is_not_taken_yet():
    float8 = pytest.importorskip("ml_dtypes").float8_e4m3fn
    arrays = {name: array.astype(float8) for name, array in forward_arguments().items()}
    pattern = "q has dtype float8_e4m3: attention takes float16, bfloat16.*convert it to bfloat16"
    with pytest.raises(NotImplementedError, match=pattern):
        flashgqa.attention(**arrays)


def test_read_only_inputs_are_fine():
    arrays = {name: read_only(array) for name, array in forward_arguments().items()}
    assert flashgqa.attention(**arrays).shape == (B, HQ, SQ, DV)
