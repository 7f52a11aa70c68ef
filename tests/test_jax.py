"""JAX arrays of the CPU in and out, and in one call with NumPy, torch and other producers."""

import os
import subprocess
import sys

import numpy
import pytest
from capsules import Producer

import flashgqa

jax = pytest.importorskip("jax")
jnp = jax.numpy

torch = pytest.importorskip("torch")

from test_frameworks import EXPECTED, K, Q, V, attend, torch_inputs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Also where JAX would take a GPU by default."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def jax_inputs(dtype="float32"):
    return [jnp.asarray(x, dtype) for x in (Q, K, V)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_in_jax_out(dtype):
    q, k, v = jax_inputs(dtype)
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    assert (out.dtype, lse.dtype, out.shape, lse.shape) == (dtype, "float32", (4, 3, 8), (4, 3))
    assert numpy.allclose(out.astype("float32"), EXPECTED, atol=2e-2)
    assert flashgqa.attention_backward(out, q, k, v, out, lse).dq.dtype == dtype


def test_jax_result_is_not_copied():
    """JAX copies silently what is not 64-byte aligned: its array must lie where the kernel wrote."""
    code = """
import numpy, jax, jax.numpy as jnp, jax.dlpack, flashgqa
original, seen = jax.dlpack.from_dlpack, []
def from_dlpack(tensor):
    seen.append(numpy.asarray(tensor).ctypes.data)
    return original(tensor)
jax.dlpack.from_dlpack = from_dlpack
x = jnp.ones((4, 33, 7))
results = [flashgqa.attention(x, x, x) for _ in range(20)]
assert [r.unsafe_buffer_pointer() for r in results] == seen and len(set(seen)) == 20
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_jax_arrays_are_never_written():
    q, k, v = jax_inputs()
    target = jnp.zeros((4, 3, 8))
    with pytest.raises(ValueError, match="out is"):
        flashgqa.attention(q, k, v, out=target)
    assert not target.any()


def test_jax_waits_for_asynchronous_inputs():
    big = jnp.ones((1500, 1500))
    for _ in range(3):
        product = big @ big
        q = product[:12, :8].reshape(4, 3, 8)
        expected = numpy.asarray(flashgqa.attention(numpy.full((4, 3, 8), 1500, "float32"), K, V))
        assert numpy.array_equal(numpy.asarray(attend(q)), expected)


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_jax_tracers_are_refused(transform):
    q, k, v = jax_inputs()
    call = {
        "jit": lambda: jax.jit(lambda x: flashgqa.attention(x, k, v))(q),
        "grad": lambda: jax.grad(lambda x: flashgqa.attention(x, k, v).sum())(q),
        "vmap": lambda: jax.vmap(lambda x: flashgqa.attention(x, k, v))(jnp.stack([q, q])),
    }[transform]
    with pytest.raises(TypeError, match="q is a JAX tracer"):
        call()


def test_jax_without_64_bit_integers_says_what_to_give():
    """Indices and seeds are int64, which JAX has with jax_enable_x64 alone; Python's integers do as well."""
    q, k, v = jax_inputs()
    fix = r"must be int64.*or give Python's integers \(JAX has int64 with jax_enable_x64 alone\)"
    with pytest.raises(TypeError, match="rows has dtype int32: it " + fix):
        flashgqa.attention_weights(q, k, rows=jnp.array([0, 1]))
    with pytest.raises(TypeError, match="seed has dtype int32: it " + fix):
        flashgqa.attention(q, k, v, dropout_p=0.5, seed=jnp.array([1, 2]))
    assert isinstance(flashgqa.attention_weights(q, k, rows=[0, 1]), jax.Array)
    assert isinstance(flashgqa.attention(q, k, v, dropout_p=0.5, seed=1), jax.Array)


def test_jax_deleted_array():
    q = jnp.array(Q)
    q.delete()
    with pytest.raises(BufferError, match="q: its __dlpack"):
        attend(q)


# ---- several libraries in one call ----


def test_result_type_follows_q():
    (tq, tk, _), (jq, jk, jv) = torch_inputs(), jax_inputs()
    assert isinstance(flashgqa.attention(Q, tk, jv), numpy.ndarray)
    assert isinstance(flashgqa.attention(tq, K, jv), torch.Tensor)
    assert isinstance(flashgqa.attention(jq, tk, V), jax.Array)
    assert isinstance(flashgqa.attention(Producer(Q), tk, jv), flashgqa.Tensor)
    out = numpy.empty_like(Q)
    assert flashgqa.attention(tq, jk, V, out=out) is out and numpy.array_equal(out, EXPECTED)


def test_lengths_and_masks_from_other_libraries():
    q, k, v = (x[None] for x in (Q, K, V))
    expected = flashgqa.attention(q, k, v, kv_lens=numpy.array([3], "int32"), mask=numpy.tri(3, 5, 1, dtype=bool))
    got = flashgqa.attention(
        q, k, v, kv_lens=torch.tensor([3], dtype=torch.int32), mask=jnp.asarray(numpy.tri(3, 5, 1, dtype=bool))
    )
    assert numpy.array_equal(got, expected)
