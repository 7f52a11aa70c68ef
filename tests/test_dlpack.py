"""DLPack: capsules and their deleters, hostile producers, exchange tables. Needs no framework."""

import ctypes
import gc
import sys

import numpy
import pytest
from capsules import READ_ONLY, DLTensor, Forged, Producer, inputs, new_capsule

import flashgqa

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
