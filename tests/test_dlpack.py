"""DLPack: capsules and their deleters, hostile producers, torch and JAX in and out."""

import ctypes
import gc
import subprocess
import sys

import numpy
import pytest
from capsules import READ_ONLY, DLTensor, Forged, Producer, inputs, new_capsule

import flashgqa

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Q, K, V = inputs()
EXPECTED = flashgqa.attention(Q, K, V)


def attend(q, **options):
    return flashgqa.attention(q, K, V, **options)


# ---- well-behaved producers ----


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_capsule_is_consumed_and_deleted_once(versioned, legacy):
    producers = [Producer(x, versioned=versioned, legacy=legacy) for x in (Q, K, V)]
    out = flashgqa.attention(*producers)
    assert numpy.array_equal(numpy.asarray(out), EXPECTED)
    assert all(producer.arrived() for producer in producers)


def test_null_deleter_is_not_called():
    for versioned in (True, False):
        producer = Producer(Q, versioned=versioned, deleter=False)
        assert numpy.array_equal(numpy.asarray(attend(producer)), EXPECTED)
        assert (producer.exported, producer.deleted) == (1, 0)


def test_null_strides_mean_contiguous():
    assert numpy.array_equal(numpy.asarray(attend(Producer(Q, strides=None))), EXPECTED)


def test_strides_that_do_not_matter_may_be_anything():
    q = Producer(Q[:, :1], strides=(24, -(2**63), 1))
    assert numpy.array_equal(numpy.asarray(attend(q)), flashgqa.attention(Q[:, :1], K, V))
    nothing = Producer(Q, shape=(4, 0, 8), strides=(2**62, -(2**63), 2**62), data=None)
    assert attend(nothing).shape == (4, 0, 8)


def test_byte_offset_is_added():
    room = numpy.full(Q.size + 16, numpy.nan, Q.dtype)
    room[16:] = Q.ravel()
    moved = Producer(Q, data=room.ctypes.data, byte_offset=16 * Q.itemsize)
    assert numpy.array_equal(numpy.asarray(attend(moved)), EXPECTED)


@pytest.mark.parametrize("view", ["reversed", "every other", "transposed", "broadcast"])
def test_strides_are_respected(view):
    wide = numpy.zeros((8, 6, 16), Q.dtype)
    array = {
        "reversed": Q[::-1, ::-1, ::-1],
        "every other": wide[::2, ::2, ::2],
        "transposed": Q.transpose(1, 0, 2)[:, :2].transpose(1, 0, 2),
        "broadcast": numpy.broadcast_to(Q[:1, :1], (4, 3, 8)),
    }[view]
    k, v = K[: max(1, array.shape[0] // 2)], V[: max(1, array.shape[0] // 2)]
    producer = Producer(array)
    expected = flashgqa.attention(numpy.ascontiguousarray(array), k, v)
    assert numpy.array_equal(numpy.asarray(flashgqa.attention(producer, k, v)), expected)
    assert producer.arrived()


def test_failing_call_deletes_what_it_consumed():
    producers = [Producer(Q), Producer(K), Producer(V[:1])]
    with pytest.raises(ValueError, match="v has head count 1"):
        flashgqa.attention(*producers)
    assert all(producer.arrived() for producer in producers)


def test_result_of_unknown_library_is_a_flashgqa_tensor():
    out, lse = attend(Producer(Q), return_lse=True)
    assert type(out) is type(lse) is flashgqa.Tensor
    assert (out.shape, out.ndim, out.dtype, out.device) == ((4, 3, 8), 3, "float32", "cpu")
    assert repr(out) == "flashgqa.Tensor(shape=(4, 3, 8), dtype=float32, device=cpu)"
    assert out.__dlpack_device__() == (1, 0)


def test_flashgqa_tensor_shares_its_memory():
    out = attend(Producer(Q))
    views = [numpy.asarray(out), numpy.from_dlpack(out)]
    assert views[0].ctypes.data == views[1].ctypes.data and views[0].ctypes.data % 64 == 0
    del out
    gc.collect()
    views[0][0, 0, 0] = 7
    assert views[1][0, 0, 0] == 7
    copy = numpy.array(attend(Producer(Q)), dtype="float64")
    assert copy.dtype == "float64"
    with pytest.raises(ValueError, match="needs a copy"):
        attend(Producer(Q)).__array__("float64", copy=False)


def test_flashgqa_tensor_as_input_and_out():
    out = attend(Producer(Q))
    again = flashgqa.attention(out, out, out)
    assert type(again) is flashgqa.Tensor
    assert flashgqa.attention(out, out, out, out=again) is again
    assert numpy.array_equal(numpy.asarray(again), flashgqa.attention(*[numpy.asarray(out)] * 3))


def test_flashgqa_tensor_exports():
    out = attend(Producer(Q))
    assert '"dltensor"' in repr(out.__dlpack__())
    assert '"dltensor_versioned"' in repr(out.__dlpack__(max_version=(1, 0)))
    copy = numpy.from_dlpack(out, copy=True)
    assert copy.ctypes.data != numpy.asarray(out).ctypes.data and numpy.array_equal(copy, EXPECTED)
    with pytest.raises(BufferError, match="stream is 1"):
        out.__dlpack__(stream=1)
    with pytest.raises(BufferError, match=r"dl_device is \(2, 0\)"):
        out.__dlpack__(dl_device=(2, 0))
    with pytest.raises(TypeError, match="max_version"):
        out.__dlpack__(max_version=1)


# ---- hostile producers: the exception, its text, and no deleter called twice or forgotten ----

FAR = 2**62
HOSTILE = {
    "negative extent": (dict(shape=(4, -3, 8)), BufferError, "extent -3 in axis 1"),
    "negative ndim": (dict(ndim=-1), BufferError, "ndim -1"),
    "no shape": (dict(shape=None), BufferError, "ndim 3 and no shape"),
    "five axes": (dict(ndim=5, shape=(1, 1, 4, 3, 8), strides=None), ValueError, "q has 5 dimensions: at most 4"),
    "huge ndim": (dict(ndim=2**31 - 1), ValueError, "at most 4"),
    "stride beyond memory": (dict(strides=(FAR, 8, 1)), BufferError, "beyond the address space"),
    "negative stride beyond memory": (dict(strides=(-FAR, 8, 1)), BufferError, "beyond the address space"),
    "stride below address 0": (dict(strides=(-(2**56), 8, 1)), BufferError, "beyond the address space"),
    "lowest stride": (dict(strides=(8, -(2**63), 1), shape=(4, 2, 8)), BufferError, "beyond the address space"),
    "lowest address": (dict(strides=(8, -(2**61), 1), shape=(4, 2, 8)), BufferError, "beyond the address space"),
    "extents overflow": (dict(shape=(FAR, FAR, 8), strides=None), BufferError, "beyond the address space"),
    "offset beyond memory": (dict(byte_offset=2**64 - 64), BufferError, "beyond the address space|not aligned"),
    "no memory": (dict(data=None), BufferError, "data is NULL"),
    "unaligned": (dict(byte_offset=2), BufferError, "not aligned"),
    "complex": (dict(code=5, bits=64), TypeError, "q has dtype complex64: it must be float16"),
    "uint8": (dict(code=1, bits=8), TypeError, "q has dtype uint8"),
    "int4": (dict(code=0, bits=4), TypeError, "q has dtype int4"),
    "float8 e5m2": (dict(code=12, bits=8), TypeError, r"code 12, bits 8"),
    "unknown code": (dict(code=99, bits=32), TypeError, r"DLPack dtype \(code 99, bits 32, lanes 1\)"),
    "lanes": (dict(lanes=4), TypeError, "q has dtype float32x4"),
    "no lanes": (dict(lanes=0), TypeError, "q has dtype float32x0"),
    "device of the tensor": (dict(device_type=2), (NotImplementedError, ValueError), "q is on (CUDA device |cuda:)0"),
}


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensor(case, versioned):
    fields, error, text = HOSTILE[case]
    producer = Producer(Q, versioned=versioned, **fields)
    with pytest.raises(error, match=text):
        attend(producer)
    assert producer.arrived()


def test_foreign_major_version_only_calls_the_deleter():
    producer = Producer(Q, major=2, data=8, ndim=2**30, shape=None, strides=None)
    with pytest.raises(BufferError, match="version 2.3: this build reads version 1"):
        attend(producer)
    assert producer.arrived()


@pytest.mark.parametrize("name", ["dltensorx", "tensor", "used_dltensor_v"])
def test_wrong_capsule_name(name):
    producer = Producer(Q, name=name)
    with pytest.raises(BufferError, match=f'capsule named "{name}": it must be "dltensor"'):
        attend(producer)
    assert (producer.deleted, producer.capsule_name()) == (0, name)


@pytest.mark.parametrize("versioned", [True, False])
def test_capsule_consumed_twice(versioned):
    producer = Producer(Q, versioned=versioned)
    attend(producer)
    forged = Forged(Q, producer.capsules[0])
    with pytest.raises(BufferError, match="has been consumed already"):
        attend(forged)
    assert producer.deleted == 1


@pytest.mark.parametrize("result", [None, 3, "dltensor"])
def test_no_capsule(result):
    with pytest.raises(BufferError, match="instead of a capsule"):
        attend(Forged(Q, result))


@pytest.mark.parametrize("error", [ValueError("no\nmore"), TypeError("no"), RuntimeError("no"), AttributeError("no")])
def test_failing_producer_is_the_cause(error):
    with pytest.raises(BufferError, match="q: its __dlpack__ failed: no$") as caught:
        attend(Forged(Q, error))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_some_exceptions_pass_through(error):
    with pytest.raises(error):
        attend(Forged(Q, error()))


@pytest.mark.parametrize("device", [(2, 0), (13, 0), (8, 0), (1,), None, ("cpu", 0)])
def test_device_is_asked_before_anything_is_exported(device):
    producer = Producer(Q)
    producer.device = device
    real = isinstance(device, tuple) and device[0] in (2, 8, 13)
    with pytest.raises(NotImplementedError if real else BufferError, match="device"):
        attend(producer)
    assert producer.exported == 0


def test_pinned_memory_is_cpu_memory():
    assert numpy.array_equal(numpy.asarray(attend(Producer(Q, device=(3, 0)))), EXPECTED)


def test_deleter_that_fails_leaves_no_exception():
    class Raises(Producer):
        def _on_delete(self, managed):
            self.deleted += 1
            numpy.zeros(3)[7]

    producer = Raises(Q)
    hook, sys.unraisablehook = sys.unraisablehook, lambda *_: None  # ctypes reports it there
    try:
        assert numpy.array_equal(numpy.asarray(attend(producer)), EXPECTED)
    finally:
        sys.unraisablehook = hook
    assert producer.deleted == 1


def test_read_only_is_an_input_but_no_out():
    assert numpy.array_equal(numpy.asarray(attend(Producer(Q, flags=READ_ONLY))), EXPECTED)
    for producer, text in (
        (Producer(numpy.empty_like(Q), flags=READ_ONLY), "out is read-only"),
        (Producer(numpy.empty_like(Q), versioned=False), "unversioned DLPack capsule"),
    ):
        with pytest.raises(ValueError, match=text):
            attend(Q, out=producer)
        assert producer.arrived()
    writable = Producer(numpy.zeros_like(Q))
    assert attend(Q, out=writable) is writable
    assert numpy.array_equal(writable.array, EXPECTED) and writable.arrived()


def test_0_dim_and_raw_capsule():
    scalar = Producer(numpy.array(1.0, "float32"), shape=None, strides=None)
    with pytest.raises(ValueError, match="q has 0 dimensions"):
        attend(scalar)
    assert scalar.arrived()
    with pytest.raises(TypeError, match="q is PyCapsule"):
        attend(Producer(Q).__dlpack__())


# ---- the C exchange table, by ctypes ----


def exchange_type(borrowing=True, allocating=True, major=1):
    """A producer type with an exchange table; its calls are counted in `type.calls`."""
    calls = dict(borrowed=0, owned=0, allocated=0, returned=0)
    alive = {}

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    def allocate(prototype, out, context, set_error):
        if not allocating:
            return -1
        calls["allocated"] += 1
        wanted = DLTensor.from_address(prototype)
        made = kind(numpy.zeros(wanted.shape[: wanted.ndim], "float32"))
        alive[ctypes.addressof(made.managed)] = made
        ctypes.c_void_p.from_address(out).value = ctypes.addressof(made.managed)
        return 0

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
    def own(producer, out):
        calls["owned"] += 1
        ctypes.c_void_p.from_address(out).value = ctypes.addressof(producer.managed)
        return 0

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def give(managed, out):
        calls["returned"] += 1
        made = alive.pop(managed)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        ctypes.c_void_p.from_address(out).value = id(made)
        return 0

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
    def borrow(producer, out):
        calls["borrowed"] += 1
        ctypes.memmove(out, ctypes.addressof(producer.managed.tensor), ctypes.sizeof(DLTensor))
        return 0

    functions = [ctypes.cast(f, ctypes.c_void_p).value for f in (allocate, own, give, borrow)]
    table = (ctypes.c_uint64 * 7)(major | 3 << 32, 0, *functions[:3], functions[3] if borrowing else 0, 0)
    name = ctypes.c_char_p(b"dlpack_exchange_api")
    capsule = new_capsule(ctypes.addressof(table), name, None)
    kind = type("Exchanged", (Producer,), {"__dlpack_c_exchange_api__": capsule, "calls": calls, "alive": alive})
    kind.keep = table, name, allocate, own, give, borrow
    return kind


@pytest.mark.parametrize("borrowing", [True, False])
def test_exchange_table(borrowing):
    kind = exchange_type(borrowing)
    q = kind(Q)
    out, lse = attend(q, return_lse=True)
    assert type(out) is type(lse) is kind and numpy.array_equal(out.array, EXPECTED)
    assert kind.calls == dict(borrowed=borrowing, owned=not borrowing, allocated=2, returned=2)
    assert (q.exported, q.deleted) == (0, 0 if borrowing else 1)
    assert (out.deleted, lse.deleted) == (0, 0)


def test_exchange_table_without_memory():
    kind = exchange_type(allocating=False)
    with pytest.raises(RuntimeError, match="allocating a result failed"):
        attend(kind(Q))


def test_exchange_table_of_another_major_version_is_not_used():
    kind = exchange_type(major=2)
    q = kind(Q)
    assert type(attend(q)) is flashgqa.Tensor and q.arrived()


def test_inherited_exchange_table_is_not_used():
    """A table of a base class says nothing of what a subclass means by its memory."""
    kind = exchange_type()
    q = type("Derived", (kind,), {})(Q)
    assert type(attend(q)) is flashgqa.Tensor and q.arrived() and kind.calls["borrowed"] == 0


# ---- torch ----

torch = pytest.importorskip("torch")


def torch_inputs(dtype=torch.float32):
    return [torch.from_numpy(x).to(dtype) for x in (Q, K, V)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out(dtype):
    q, k, v = torch_inputs(dtype)
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is torch.Tensor
    assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == (4, 3, 8) and lse.shape == (4, 3) and out.is_contiguous() and not out.requires_grad
    assert out.data_ptr() % 64 == 0
    assert torch.allclose(out.float(), torch.from_numpy(EXPECTED), atol=2e-2)
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse)
    assert [g.dtype for g in gradients[:3]] == [dtype] * 3 and gradients.dbias is None


def test_torch_out_is_written_in_place():
    q, k, v = torch_inputs()
    out = torch.empty(4, 3, 8)
    address = out.data_ptr()
    assert flashgqa.attention(q, k, v, out=out) is out
    assert out.data_ptr() == address and numpy.array_equal(out.numpy(), EXPECTED)


def test_torch_results_are_torchs_own_memory():
    """Memory that came back through DLPack could not be resized, nor recorded on streams."""
    out = flashgqa.attention(*torch_inputs())
    assert out.untyped_storage().resizable()


def test_torch_views_in_place():
    wide = torch.randn(4, 3, 2, 8)
    q = wide[:, :, 1]
    assert torch.equal(flashgqa.attention(q, q, q), flashgqa.attention(*[q.contiguous()] * 3))
    expanded = torch.randn(1, 3, 8).expand(4, 3, 8)
    assert torch.equal(flashgqa.attention(expanded, expanded, expanded), flashgqa.attention(*[expanded.contiguous()] * 3))


def test_torch_references_do_not_leak():
    tensors = torch_inputs()
    before = [sys.getrefcount(x) for x in tensors]
    for _ in range(10):
        flashgqa.attention(*tensors)
        with pytest.raises(ValueError):
            flashgqa.attention(*tensors, chunk=0)
    assert [sys.getrefcount(x) for x in tensors] == before


def test_torch_grad_mode():
    q, k, v = torch_inputs()
    for leaf in (q.clone().requires_grad_(), torch.nn.Parameter(q)):
        with pytest.raises(BufferError, match=r"q requires grad.*detach\(\) it or run under torch.no_grad\(\)"):
            flashgqa.attention(leaf, k, v)
        with torch.no_grad():
            assert numpy.array_equal(flashgqa.attention(leaf, k, v).numpy(), EXPECTED)
        assert numpy.array_equal(flashgqa.attention(leaf.detach(), k, v).numpy(), EXPECTED)
    with torch.inference_mode():
        assert numpy.array_equal(flashgqa.attention(q.clone(), k, v).numpy(), EXPECTED)


def wrappers():
    def fake():
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            return torch.empty(4, 3, 8)

    class Sub(torch.Tensor):
        pass

    q = torch.from_numpy(Q)
    freed = q.clone()
    freed.untyped_storage().resize_(0)
    return {
        "fake": (fake, TypeError, "torch.Tensor subclass, FakeTensor"),
        "subclass": (lambda: q.as_subclass(Sub), TypeError, "torch.Tensor subclass, Sub"),
        "functional": (lambda: torch._to_functional_tensor(q), BufferError, "q"),
        "sparse": (q.to_sparse, BufferError, "memory cannot be read"),
        "mkldnn": (q.to_mkldnn, BufferError, "memory cannot be read"),
        "meta": (lambda: q.to("meta"), BufferError, "meta"),
        "negative bit": (lambda: torch.view_as_complex(torch.ones(4, 3, 8, 2)).conj().imag, BufferError, r"resolve_neg\(\)"),
        "complex": (lambda: q.to(torch.complex64), TypeError, "complex64"),
        "freed": (lambda: freed, BufferError, "no memory"),
        "nested": (lambda: torch.nested.nested_tensor([q[0], q[1]]), BufferError, "q"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(wrappers()))
def test_torch_tensor_that_is_not_its_memory(case):
    make, error, text = wrappers()[case]
    with pytest.raises(error, match=text):
        attend(make())


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_is_refused(transform):
    q, k, v = torch_inputs()
    call = {
        "vmap": lambda: torch.vmap(lambda x: flashgqa.attention(x, k, v))(torch.stack([q, q])),
        "grad": lambda: torch.func.grad(lambda x: flashgqa.attention(x, k, v).sum())(q),
        "jvp": lambda: torch.func.jvp(lambda x: flashgqa.attention(x, k, v), (q,), (q,)),
    }[transform]
    with pytest.raises(BufferError, match="q"):
        call()


def test_torch_modes_that_fake_results():
    """A real q under a mode whose new tensors have no memory: refused, and nothing is written anywhere."""
    from torch._subclasses import FakeTensorMode

    q, k, v = torch_inputs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(BufferError, match="q: its memory|no memory for a result"):
            flashgqa.attention(q, k, v)
    with torch.device("meta"):
        assert numpy.array_equal(flashgqa.attention(q, k, v).numpy(), EXPECTED)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_torch_compile_runs_the_function_outside_of_its_graph():
    q, k, v = torch_inputs()
    compiled = torch.compile(lambda x: 2 * flashgqa.attention(x + 0, k, v), backend="eager")
    assert torch.equal(compiled(q), 2 * flashgqa.attention(q, k, v))


def test_torch_empty_tensors():
    q = torch.empty(2, 4, 0, 8)
    assert flashgqa.attention(q, torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)).shape == (2, 4, 0, 8)
    out = flashgqa.attention(torch.ones(2, 4, 3, 8), torch.empty(2, 2, 0, 8), torch.empty(2, 2, 0, 8))
    assert torch.equal(out, torch.zeros(2, 4, 3, 8))


# ---- JAX ----

jax = pytest.importorskip("jax")
jnp = jax.numpy


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
    subprocess.run([sys.executable, "-c", code], check=True)


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
