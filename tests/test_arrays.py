"""NumPy arrays in and out: dtypes, layouts of memory, who owns what, and that nothing leaks."""

import gc
import os
import resource
import sys

import ml_dtypes
import numpy
import pytest
from capsules import Producer, inputs

import flashgqa

Q, K, V = inputs("float64")
EXPECTED = flashgqa.attention(Q, K, V)
DTYPES = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


def dtype_of(name):
    return numpy.dtype(getattr(ml_dtypes, name, name))


# ---- results ----


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_in_dtype_out(name):
    q, k, v = (x.astype(dtype_of(name)) for x in (Q, K, V))
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is numpy.ndarray
    assert out.dtype == dtype_of(name) and lse.dtype == ("float64" if name == "float64" else "float32")
    assert out.shape == (4, 3, 8) and lse.shape == (4, 3)
    assert numpy.allclose(out.astype("float64"), EXPECTED, atol=DTYPES[name], rtol=DTYPES[name])
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse)
    assert [g.dtype for g in gradients[:3]] == [q.dtype] * 3
    assert [g.shape for g in gradients[:3]] == [q.shape, k.shape, v.shape]
    assert gradients.dbias is None and gradients.dsink is None


def test_results_are_aligned_writable_and_own_their_memory():
    results = [flashgqa.attention(Q[:, :n], K, V, return_lse=True) for n in (1, 2, 3)]
    for array in (x for pair in results for x in pair):
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
        references = sys.getrefcount(array.base)  # of the capsule that owns the block: the array's, and getrefcount's own
        assert references == 2
    addresses = {array.ctypes.data for pair in results for array in pair}
    assert len(addresses) == 6


def test_result_outlives_everything_else():
    view = flashgqa.attention(*inputs("float64"))[1:, ::2]
    gc.collect()
    junk = [numpy.ones((4, 3, 8)) for _ in range(100)]
    assert numpy.array_equal(view, EXPECTED[1:, ::2]) and junk


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layout(layout):
    q, k, v = ((x[None].transpose(0, 2, 1, 3).copy() if layout == "bshd" else x[None]) for x in (Q, K, V))
    out, lse = flashgqa.attention(q, k, v, layout=layout, return_lse=True)
    assert out.flags.c_contiguous and out.shape == (q.shape[0], *q.shape[1:3], 8) and lse.shape == (1, 4, 3)
    assert numpy.array_equal(out.transpose(0, 2, 1, 3) if layout == "bshd" else out, EXPECTED[None])
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse, layout=layout)
    assert [g.shape for g in gradients[:3]] == [q.shape, k.shape, v.shape]


# ---- out= ----


def test_out_is_returned_and_filled():
    out = numpy.full_like(EXPECTED, numpy.nan)
    assert flashgqa.attention(Q, K, V, out=out) is out and numpy.array_equal(out, EXPECTED)
    again, lse = flashgqa.attention(Q, K, V, out=out, return_lse=True)
    assert again is out and lse.shape == (4, 3)


@pytest.mark.parametrize("shape", [(2, 4, 0, 8), (0, 4, 3, 8)])
def test_out_may_be_empty(shape):
    b = shape[0]
    q, out = numpy.zeros(shape), numpy.empty(shape)
    k = v = numpy.zeros((b, 2, 5, 8))
    assert flashgqa.attention(q, k, v, out=out) is out


def test_out_may_be_strided():
    room = numpy.full((6, 3, 2, 20), numpy.nan)
    out = room[4:0:-1, :, 1, 5:13]
    assert flashgqa.attention(Q, K, V, out=out) is out and numpy.array_equal(out, EXPECTED)
    out[...] = numpy.nan
    assert numpy.isnan(room).all()  # nothing beside it was touched


def test_refused_out_is_untouched():
    read_only = numpy.full_like(EXPECTED, 7)
    read_only.setflags(write=False)
    swapped = numpy.full_like(EXPECTED, 7).astype(">f8")
    unaligned = numpy.zeros(EXPECTED.nbytes + 1, "uint8")[1:].view("float64").reshape(EXPECTED.shape)
    unaligned[...] = 7
    for out, text in (
        (read_only, "out is read-only"),
        (swapped, "out is byte-swapped"),
        (unaligned, "out is not aligned"),
        (numpy.full((3, 4, 8), 7.0), "out has shape"),
        (numpy.full((4, 3, 16), 7.0)[..., ::2], "last axis"),
        (numpy.full((4, 3, 1), 7.0).repeat(1).reshape(4, 3, 1), "out has shape"),
    ):
        with pytest.raises(ValueError, match=text):
            flashgqa.attention(Q, K, V, out=out)
        assert (out == 7).all()


# ---- memory of inputs ----


def unaligned(x):
    y = numpy.zeros(x.nbytes + 1, "uint8")[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    assert not y.flags.aligned
    return y


def field(x):
    y = numpy.zeros(x.shape, [("x", x.dtype), ("y", "int8")])
    y["x"] = x
    return y["x"]


def frozen(x):
    y = x.copy()
    y.setflags(write=False)
    return y


MEMORY = {
    "read-only": frozen,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": unaligned,
    "field of a structure": field,
    "Fortran order": numpy.asfortranarray,
    "reversed": lambda x: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "every other": lambda x: x.repeat(2, 0).repeat(2, 1).repeat(2, 2)[::2, ::2, ::2],
    "other axes first": lambda x: x.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    "memory map": lambda x: x.view(numpy.memmap),
}


@pytest.mark.parametrize("name", ["float64", "float32", "float16"])
@pytest.mark.parametrize("memory", MEMORY)
def test_memory_of_inputs_does_not_matter(memory, name):
    plain = [x.astype(name) for x in (Q, K, V)]
    made = [MEMORY[memory](x) for x in plain]
    out, lse = flashgqa.attention(*plain, return_lse=True)
    assert numpy.array_equal(flashgqa.attention(*made), out)
    expected = flashgqa.attention_backward(out, *plain, out, lse)
    got = flashgqa.attention_backward(MEMORY[memory](out), *made, MEMORY[memory](out), lse)
    assert all(numpy.array_equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def test_bfloat16_memory():
    plain = [x.astype(ml_dtypes.bfloat16) for x in (Q, K, V)]
    out = flashgqa.attention(*plain)
    for memory in ("read-only", "unaligned", "reversed", "every other"):
        assert numpy.array_equal(flashgqa.attention(*[MEMORY[memory](x) for x in plain]), out)


def test_lengths_may_be_strided():
    lens = numpy.array([5, 9, 3, 9], "int32")[::2]
    q, k, v = (x[None].repeat(2, 0) for x in (Q, K, V))
    assert numpy.array_equal(flashgqa.attention(q, k, v, kv_lens=lens), flashgqa.attention(q, k, v, kv_lens=lens.copy()))
    rows = numpy.array([2, 9, 0], "int64")[::2]
    expected = flashgqa.attention_weights(Q, K, rows=[2, 0])
    assert numpy.array_equal(flashgqa.attention_weights(Q, K, rows=rows), expected)


@pytest.mark.parametrize("name", ["i", "l", "q"])
def test_integer_types_of_one_size_are_one(name):
    """C has two names for one of the sizes, and NumPy a type number for each."""
    size = numpy.dtype(name).itemsize
    if size == 4:
        assert flashgqa.attention(Q[None], K[None], V[None], kv_lens=numpy.array([5], name)).shape == (1, 4, 3, 8)
    else:
        assert numpy.array_equal(
            flashgqa.dropout_mask(1, 1, 2, 9, 0.5, numpy.array([3, 0], name)), flashgqa.dropout_mask(1, 1, 2, 9, 0.5, 3)
        )


def test_huge_views_are_not_copied():
    """A terabyte of keys in one row of memory: planned at once, as nothing is expanded."""
    keys = numpy.broadcast_to(numpy.ones((1, 1, 1, 256), "float32"), (1, 8, 2**27, 256))
    plan = flashgqa.explain(numpy.ones((1, 8, 1, 256), "float32"), keys, keys)
    assert plan["sk"] == 2**27 and plan["workspace_bytes"] < 2**30
    mask = numpy.broadcast_to(numpy.array(True), (1, 8, 1, 2**27))
    bias = numpy.broadcast_to(numpy.float32(0), (1, 8, 1, 2**27))
    assert flashgqa.explain(numpy.ones((1, 8, 1, 256), "float32"), keys, keys, mask=mask, bias=bias)["sk"] == 2**27


def test_masked_arrays_are_refused_by_name():
    with pytest.raises(TypeError, match=r"k is a numpy.ma.MaskedArray.*k\.filled\(value\)"):
        flashgqa.attention(Q, numpy.ma.array(K), V)


def test_subclasses_are_read_as_arrays():
    class Sub(numpy.ndarray):
        pass

    out = flashgqa.attention(Q.view(Sub), K, V)
    assert type(out) is numpy.ndarray and numpy.array_equal(out, EXPECTED)


# ---- nothing leaks ----


def calls():
    """One of every kind of call, failing ones too."""
    q, k, v = inputs("float32")
    strided, swapped = q.repeat(2, 2)[..., ::2], k.astype(">f4")
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    lens = numpy.array([3], "int32")
    producers = [Producer(x) for x in (q, k, v)]

    def failing(error, **options):
        try:
            flashgqa.attention(strided, swapped, v, **options)
        except error:
            return
        raise AssertionError

    return [
        lambda: flashgqa.attention(strided, swapped, v, return_lse=True),
        lambda: flashgqa.attention(q, k, v, out=out),
        lambda: flashgqa.attention(q[None], k[None], v[None], kv_lens=lens, sink=numpy.ones(4, "float32"), causal=True),
        lambda: flashgqa.attention_backward(out, q, k, v, out, lse, bias=numpy.ones((3, 5), "float32")),
        lambda: flashgqa.attention_weights(q, k, rows=[0, 2]),
        lambda: flashgqa.attention_weights(q, k, reduce="keys"),
        lambda: flashgqa.merge([out, out], [lse, lse]),
        lambda: flashgqa.dropout_mask(1, 4, 3, 5, 0.5, 1),
        lambda: flashgqa.explain(q, k, v, backward=True),
        lambda: flashgqa.attention(*producers),
        lambda: failing(ValueError, window=(-1, 0)),
        lambda: failing(TypeError, window=(0, "0")),
        lambda: failing(ValueError, kernel="none"),
        lambda: failing(TypeError, mask=[1]),
        lambda: failing(ValueError, mask=numpy.ones((7, 7), bool)),
        lambda: failing((NotImplementedError, ValueError), device="cuda:4096"),
    ]


def test_references_return_to_where_they_were():
    q, k, v = inputs("float32")
    bias, lens = numpy.ones((3, 5), "float32"), numpy.array([3], "int32")
    watched = [q, k, v, bias, lens, None, True, flashgqa.Tensor]
    before = [sys.getrefcount(x) for x in watched[:5]]
    for _ in range(20):
        out, lse = flashgqa.attention(q[None], k[None], v[None], bias=bias, kv_lens=lens, return_lse=True)
        flashgqa.attention_backward(out, q[None], k[None], v[None], out, lse, bias=bias, kv_lens=lens)
        with pytest.raises(ValueError):
            flashgqa.attention(q, k, v, bias=bias, softcap=-1)
    del out, lse
    assert [sys.getrefcount(x) for x in watched[:5]] == before


def test_descriptors_do_not_leak():
    """NumPy functions steal references to dtypes; one too many or too few shows in their count."""
    q = Q.astype(ml_dtypes.bfloat16)
    for x in (Q, q, Q.astype(">f8")):
        flashgqa.attention(x, x, x)
        before = sys.getrefcount(x.dtype)
        kept = [flashgqa.attention(x, x, x) for _ in range(50)]
        grown = sys.getrefcount(x.dtype) - before
        assert 0 <= grown <= 51
        del kept
        assert abs(sys.getrefcount(x.dtype) - before) <= 1


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timing
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("n", range(len(calls())))
def test_memory_reaches_a_plateau(n):
    call = calls()[n]
    repeats = 300 if n == 9 else 3000  # a ctypes producer keeps its capsules
    for _ in range(repeats):
        call()
    before = resident()
    for _ in range(repeats):
        call()
    assert resident() - before < 600_000


@pytest.mark.timing
def test_large_results_are_given_back():
    q = numpy.zeros((64, 4096, 16), "float32")
    k = q[:1, :1]
    flashgqa.attention(q, k, k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        flashgqa.attention(q, k, k)  # 16 MiB each
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000
