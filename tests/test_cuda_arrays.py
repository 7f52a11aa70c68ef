"""Arrays of several libraries on a GPU: copies of NumPy arrays there and back, results for JAX, CuPy and any DLPack producer."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import Case, build
from gpu import assert_alike, get, put
from test_cuda import NAMES, assert_same, close, qkv, whole

import flashgqa

# ---- NumPy arrays ----

STAGED = [
    Case(b=2, hq=8, hk=2, sq=70, sk=130, d=64, causal=True),
    Case(dtype="float16", layout="bshd", storage="sliced", sink=True),
    Case(dtype="bfloat16", storage="negative", softcap=4.0, bias="11qk", dropout=0.25),
    Case(storage="gaps", mask="b11k", alibi="h", b=2, kv_lens=(20, 33), q_lens=(33, 5)),
    Case(storage="broadcast", b=2),
    Case(packed=((5, 9), (0, 3), (40, 40)), causal=True),
]


@pytest.mark.parametrize("case", STAGED, ids=str)
def test_numpy_arrays_give_the_bits_of_torch_tensors(case):
    call = build(case)
    tensors = [put(x) for x in (*call.inputs, call.dout)]
    options = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()}
    out, lse = flashgqa.attention(*call.inputs, **call.options, return_lse=True, device="cuda")
    assert type(out) is np.ndarray and out.dtype == call.dtype
    theirs, their_lse = flashgqa.attention(*tensors[:3], **options, return_lse=True)
    factor = 16 if case.dtype == "float32" else 1
    assert_alike((put(out), put(lse)), (theirs, their_lse), factor=factor)      # alignment may choose another kernel
    got = flashgqa.attention_backward(call.dout, *call.inputs, out, lse, **call.options, device="cuda")
    expected = flashgqa.attention_backward(tensors[3], *tensors[:3], theirs, their_lse, **options)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert type(a) is np.ndarray
            assert_alike([put(a)], [b], [name], factor)


@pytest.mark.parametrize("shape", [(9, 8, 2), (1, 8, 8), (1, 8, 2), (3, 8, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"mask": True, "kv_lens": True, "alibi": True}], ids=["plain", "more"])
def test_numpy_arrays_in_parts(shape, options):
    """Large enough to be cut by batch or by head, with copies of one part beside the computation of another."""
    (b, hq, hk), rng = shape, np.random.default_rng(0)
    s = 9000 // b
    q = rng.standard_normal((b, hq, s, 64), dtype=np.float32)
    k, v = (rng.standard_normal((b, s + 3, hk, 64), dtype=np.float32).swapaxes(1, 2) for _ in range(2))
    options = dict(options, causal=True)
    if options.pop("mask", None):
        options["mask"] = rng.random((b, hq, 1, s + 3)) < 0.9
    if options.pop("kv_lens", None):
        options["kv_lens"] = rng.integers(s // 2, s, b).astype(np.int32)
    if options.pop("alibi", None):
        options["alibi_slopes"] = np.linspace(0.001, 0.1, hq, dtype=np.float32)
    on_gpu = {n: put(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    theirs = whole(*map(put, (q, k, v)), **on_gpu)
    out, lse = flashgqa.attention(q, k, v, **options, return_lse=True, device="cuda")
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse, **options, device="cuda")
    results = (out, lse, *gradients[:3])
    assert all(type(x) is np.ndarray for x in results)
    assert_alike([put(x) for x in results], theirs, NAMES, factor=64)
    given = np.zeros((b, s, hq, 64), np.float32).swapaxes(1, 2)
    assert flashgqa.attention(q, k, v, **options, out=given, device="cuda") is given
    np.testing.assert_allclose(given, out, rtol=0, atol=1e-5)


def test_numpy_arrays_from_many_threads():
    rng = np.random.default_rng(1)
    inputs = [[rng.standard_normal((1, 8, 1500, 64), dtype=np.float32) for _ in range(3)] for _ in range(6)]
    expected = [flashgqa.attention(*x, device="cuda") for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for got, want in zip(pool.map(lambda x: flashgqa.attention(*x, device="cuda"), inputs), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_numpy_out_and_errors():
    x = np.random.default_rng(0).standard_normal((2, 4, 9, 16)).astype(np.float32)
    out = np.full((2, 4, 9, 20), 7.0, np.float32)[..., :16]
    assert flashgqa.attention(x, x, x, out=out, device="cuda:0") is out
    close(out, flashgqa.attention(x, x, x), 1e-5)
    assert (out.base[..., 16:] == 7.0).all()
    with pytest.raises(ValueError, match=r"kv_lens\[0\] is 10"):
        flashgqa.attention(x, x, x, kv_lens=np.int32([10, 3]), device="cuda")
    with pytest.raises(ValueError, match="cuda:99"):
        flashgqa.attention(x, x, x, device="cuda:99")
    with pytest.raises(NotImplementedError, match="float64"):
        flashgqa.attention(*[x.astype(float)] * 3, device="cuda")


# ---- other libraries ----


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    q, k, v = qkv(dtype=torch.float32)
    expected = whole(q, k, v)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        arrays = [cupy.array(get(x)) for x in (q, k, v)]
        got = whole(*arrays)
        assert all(type(x) is cupy.ndarray for x in got)
        stream.synchronize()
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert (cupy.asnumpy(a) == get(b)).all(), name
    side = cupy.cuda.Stream(non_blocking=True)
    out = flashgqa.attention(*arrays, stream=side)
    side.synchronize()
    assert (cupy.asnumpy(out) == get(expected[0])).all()


@pytest.fixture(scope="module")
def jax_gpu():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    try:
        return jax, jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX has no GPU here")


@pytest.mark.parametrize("sk", [130, 5000], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_jax_arrays(dtype, sk, jax_gpu):
    """Results are JAX arrays over memory of ours; JAX may use them at once, and after their inputs are gone."""
    jax, device = jax_gpu
    q, k, v = qkv(sk=sk, dtype=dtype)
    expected = whole(q, k, v)
    arrays = [jax.device_put(get(x), device) for x in (q, k, v)]
    got = whole(*arrays)
    assert all(isinstance(x, jax.Array) and x.devices() == {device} for x in got)
    doubled = [jax.numpy.asarray(x) * 2 for x in got]
    del arrays
    for name, a, b, twice in zip(NAMES, got, expected, doubled, strict=True):
        wide = get(b).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), wide, name)
        np.testing.assert_array_equal(np.asarray(twice).astype(np.float32), 2 * wide, name)


def test_jax_results_follow_a_given_stream_and_come_back_as_memory_is_reused(jax_gpu):
    jax, device = jax_gpu
    q, k, v = qkv(dtype=torch.float32)
    expected = get(flashgqa.attention(q, k, v))
    arrays = [jax.device_put(get(x), device) for x in (q, k, v)]
    side = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)
        out = flashgqa.attention(*arrays, stream=side.cuda_stream)
        result = jax.numpy.asarray(out) + 1
        del out
        np.testing.assert_array_equal(np.asarray(result), expected + 1)


class Producer:
    """A library with DLPack and no way to make arrays."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)


def test_results_for_a_library_that_cannot_make_arrays():
    q, k, v = qkv(dtype=torch.float32)
    expected = flashgqa.attention(q, k, v)
    out = flashgqa.attention(*map(Producer, (q, k, v)))
    assert type(out) is flashgqa.Tensor and out.device == "cuda:0" and out.__dlpack_device__() == (2, 0)
    assert "device=cuda:0" in repr(out)
    assert_same([torch.from_dlpack(out)], [expected])
    again = flashgqa.attention(out, Producer(k), Producer(v))
    assert_same([torch.from_dlpack(again)], [flashgqa.attention(expected, k, v)])
    with pytest.raises(TypeError, match="NumPy cannot read it"):
        np.asarray(out)
    with pytest.raises(BufferError, match="exported where it is"):
        out.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="without a copy"):
        out.__dlpack__(copy=True)
    with pytest.raises(TypeError, match="stream is 'x'"):
        out.__dlpack__(stream="x")


def test_explain_of_what_is_copied_says_what_runs():
    """Elements two apart, from an odd address: the copy's rows begin on 16 bytes."""
    x = torch.randn(1, 2, 300, 129, dtype=torch.float16, device="cuda")[..., 1::2]
    assert flashgqa.explain(x, x, x)["kernel"] == flashgqa.explain(*[x.contiguous()] * 3)["kernel"]
