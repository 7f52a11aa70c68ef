"""attention against the oracle under the error rule, and exactly where the right answer is exact."""

import mmap
import sys

import numpy as np
import pytest
from cases import EDGES, FLOATS, SMOKE, SWEEP, built
from checking import DTYPES, Guarded, accumulator, assert_within, memory_bytes, place, same_bits

import flashgqa
from flashgqa import reference

RESULT_STORAGE = ("contiguous", "sliced", "negative", "transposed")


def check_forward(case, backend):
    call, answer = built(case)
    storage = case.storage if case.storage in RESULT_STORAGE else "contiguous"
    guarded = Guarded(answer.out.shape, call.dtype, storage)
    arrays = [*call.inputs, *(x for x in call.options.values() if isinstance(x, np.ndarray))]
    before = memory_bytes(*arrays)
    out, lse = backend.attention(*call.inputs, **call.options, return_lse=True, out=guarded.array)
    assert out is guarded.array
    guarded.check()
    assert memory_bytes(*arrays) == before, "an input was written"
    assert lse.dtype == accumulator(call.dtype)
    assert_within("out", out, answer.out, (out for out, _ in answer.naive), call.dtype, 2)
    assert_within("lse", lse, answer.lse, (lse for _, lse in answer.naive), lse.dtype, 2)


@pytest.mark.parametrize("case", SMOKE + EDGES, ids=str)
def test_forward_within_the_error_rule(case, backend):
    check_forward(case, backend)


@pytest.mark.sweep
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_forward_of_combined_options_within_the_error_rule(case, backend):
    check_forward(case, backend)


def test_equals_a_plain_loop_over_heads_to_1e_12(backend):
    np.random.seed(0)
    q, k, v = np.random.randn(4, 3, 4), np.random.randn(2, 3, 4), np.random.randn(2, 3, 4)
    expected = np.empty((4, 3, 4))
    for h in range(4):
        kv = h // 2
        scores = q[h] @ k[kv].T / np.sqrt(4)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected[h] = weights / weights.sum(axis=1, keepdims=True) @ v[kv]
    for out in (flashgqa.attention(q, k, v), backend.attention(q, k, v)):
        assert type(out) is np.ndarray and out.dtype == np.float64 and out.shape == (4, 3, 4)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("g", [1, 3])
def test_one_hot_scores_copy_a_value_row_exactly(dtype, g, rng, backend):
    """Row i scores 4096 with key pick[i] and 0 with all others: its weight is exactly 1, theirs exactly 0."""
    sk, d = 45, 45
    pick = rng.integers(0, sk, (2, 2 * g, 70))
    q = 64 * (pick[..., None] == np.arange(d))
    k = np.broadcast_to(64 * np.eye(sk, d), (2, 2, sk, d))
    v = rng.standard_normal((2, 2, sk, 19)).astype(DTYPES[dtype])
    out, lse = backend.attention(q.astype(DTYPES[dtype]), k.astype(DTYPES[dtype]), v, scale=1.0, return_lse=True)
    expected = np.take_along_axis(np.repeat(v, g, axis=1), pick[..., None], axis=2)
    if backend.device == "cuda" and dtype == "float32":     # products of three TF32 terms keep 22 of the 24 bits of a value
        assert np.allclose(out, expected, rtol=2.0**-21, atol=0)
    else:
        assert same_bits(out, expected)
    assert (lse == 4096).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_scores_average_a_power_of_two_of_integers_exactly(dtype, rng, backend):
    v = rng.integers(-8, 9, (1, 2, 64, 40)).astype(DTYPES[dtype])
    q, k = np.zeros((1, 4, 5, 24), DTYPES[dtype]), rng.standard_normal((1, 2, 64, 24)).astype(DTYPES[dtype])
    out = backend.attention(q, k, v)
    expected = v.astype(np.float64).mean(axis=2, keepdims=True).astype(DTYPES[dtype])
    assert (out == np.repeat(expected, 2, axis=1)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_out_given_or_not_has_the_same_bits(dtype, backend):
    case = next(c for c in SMOKE if c.dtype == dtype and c.causal)
    call, answer = built(case)
    out = backend.attention(*call.inputs, **call.options)
    given = Guarded(answer.out.shape, call.dtype, "negative")
    backend.attention(*call.inputs, **call.options, out=given.array)
    assert out.dtype == call.dtype and same_bits(out, given.array)
    assert not np.shares_memory(out, call.q)


# ---- index arithmetic ----


def sparse(shape, strides, dtype):
    """An array whose elements lie far apart in address space that is reserved but not backed by memory; zeros at first."""
    dtype = np.dtype(dtype)
    low = sum(min(0, s * (n - 1)) for s, n in zip(strides, shape, strict=True))
    high = sum(max(0, s * (n - 1)) for s, n in zip(strides, shape, strict=True))
    size = (high - low + 1) * dtype.itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve), np.uint8)
    return np.ndarray(shape, dtype, memory, -low * dtype.itemsize, [s * dtype.itemsize for s in strides])


FAR = 2**31 + 64

# Of arrays with up to 64 extents a head and 64 elements a row: which of four axes goes far.
FAR_STRIDES = {
    "first": (FAR, 4096, 64, 1),
    "second": (4096, FAR, 64, 1),
    "third": (8192, 1024, FAR // 2, 1),
    "backwards": (-FAR, -4096, -64, 1),
}
far_strides = pytest.mark.parametrize("strides", FAR_STRIDES.values(), ids=FAR_STRIDES)


@far_strides
def test_elements_more_than_2_31_apart(strides, rng, backend):
    """q, k, v, bias and out each span more than 2^31 elements (float16: 4 GiB of address space, a few pages of memory)."""
    b, h, s, d = 2, 3, 5, 24
    arrays = [rng.standard_normal((b, h, s, d)).astype(np.float16) for _ in range(3)]
    bias = rng.standard_normal((b, h, s, s)).astype(np.float16)
    far = []
    for x in (*arrays, bias):
        far.append(sparse(x.shape, strides, np.float16))
        far[-1][...] = x
    out = sparse((b, h, s, d), strides, np.float16)
    expected = backend.attention(*arrays, bias=bias, causal=True)
    backend.attention(*far[:3], bias=far[3], causal=True, out=out)
    assert same_bits(out.copy(), expected)


def test_mask_strides_beyond_2_31(rng, backend):
    q, k, v = (rng.standard_normal((2, 2, 6, 8)).astype(np.float32) for _ in range(3))
    mask = rng.random((2, 2, 6, 6)) < 0.6
    for strides in ((FAR, 64, 6, 1), (1024, 64, 6, FAR), (64, 32, -FAR, 1)):
        far = sparse(mask.shape, strides, bool)
        far[...] = mask
        assert same_bits(backend.attention(q, k, v, mask=far), backend.attention(q, k, v, mask=mask))


def test_reference_and_kernels_take_the_same_arguments():
    """Every option of attention is an option of the oracle, with the same default."""
    import dataclasses
    import inspect

    for name in ("attention", "attention_backward"):
        given = inspect.signature(getattr(flashgqa, name)).parameters
        options = {f.name: f.default for f in dataclasses.fields(reference.Options)}
        own = inspect.signature(getattr(reference, name)).parameters
        for p in given.values():
            if p.kind is p.KEYWORD_ONLY:
                assert options.get(p.name, getattr(own.get(p.name), "default", options)) == p.default, p.name


def test_inputs_may_share_memory_and_be_read_only(rng, backend):
    x = place(rng.standard_normal((2, 4, 20, 16)))
    x.flags.writeable = False
    assert same_bits(backend.attention(x, x, x), backend.attention(x.copy(), x.copy(), x.copy()))
