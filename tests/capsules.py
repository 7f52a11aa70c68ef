"""A DLPack producer made of ctypes whose every field can be set wrong, and which counts what happens to its capsules."""

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    py_object,
)

import numpy


class DLTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


DELETER = CFUNCTYPE(None, c_void_p)


class Versioned(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", DLTensor),
    ]


class Unversioned(Structure):
    _fields_ = [("tensor", DLTensor), ("context", c_void_p), ("deleter", c_void_p)]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = c_char_p, [py_object]

CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
READ_ONLY = 1


class Producer:
    """``__dlpack__`` of a NumPy array, with overrides.

    tensor: fields of DLTensor to replace (shape and strides as tuples, or None). major, flags, name, deleter=False: what
    the managed tensor and its capsule say. legacy: as a producer before 2023, without max_version.
    """

    def __init__(
        self, array, *, versioned=True, major=1, flags=0, name=None, deleter=True, legacy=False, device=(1, 0), **tensor
    ):
        self.array, self.versioned, self.legacy, self.device = array, versioned, legacy, device
        self.deleted = self.exported = 0
        self.names = [name.encode()] if name else [b"dltensor_versioned" if versioned else b"dltensor"]
        self.capsules = []
        fields = {
            "data": array.ctypes.data, "device_type": device[0], "device_id": device[1], "ndim": array.ndim,
            "code": CODES[array.dtype.kind], "bits": 8 * array.itemsize, "lanes": 1, "shape": array.shape,
            "strides": tuple(n // array.itemsize for n in array.strides), "byte_offset": 0,
        }  # fmt: skip
        fields.update(tensor)
        for which in ("shape", "strides"):
            values = fields[which]
            fields[which] = None if values is None else (c_int64 * max(1, len(values)))(*values)
        self.arrays = fields["shape"], fields["strides"]
        for which in ("shape", "strides"):
            if fields[which] is not None:
                fields[which] = ctypes.cast(fields[which], POINTER(c_int64))
        self.on_delete = DELETER(self._on_delete)
        address = ctypes.cast(self.on_delete, c_void_p) if deleter else None
        if versioned:
            self.managed = Versioned(major, 3, None, address, flags, DLTensor(**fields))
        else:
            self.managed = Unversioned(DLTensor(**fields), None, address)

    def _on_delete(self, managed):
        assert managed == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if self.legacy and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.exported += 1
        self.capsules.append(new_capsule(ctypes.cast(byref(self.managed), c_void_p), self.names[0], None))
        return self.capsules[-1]

    def capsule_name(self):
        return _name(self.capsules[-1]).decode()

    def arrived(self):
        """Whether the one capsule was consumed and its deleter called once."""
        used = "used_dltensor_versioned" if self.versioned else "used_dltensor"
        return (self.exported, self.deleted, self.capsule_name()) == (1, 1, used)


class Forged(Producer):
    """Returns whatever it is told to."""

    def __init__(self, array, result):
        super().__init__(array)
        self.result = result

    def __dlpack__(self, **options):
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def inputs(dtype="float32", seed=0):
    """q [4, 3, 8], k and v [2, 5, 8] of small numbers."""
    draw = numpy.random.default_rng(seed)
    return [draw.standard_normal(shape).astype(dtype) for shape in ((4, 3, 8), (2, 5, 8), (2, 5, 8))]
