"""Bytes: measured, and in words."""

import sys

import numpy

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory():
    """Most bytes of memory that this process has had, or None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def gib(count):
    return f"{count / 2**30:6.2f} GiB"


_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e4m3fn": 1}


def element_bytes(dtype):
    """Of a dtype of NumPy or torch, its name, or a number, which is those bytes."""
    if isinstance(dtype, int) and not isinstance(dtype, bool):
        return dtype
    if isinstance(dtype, str) and dtype in _BYTES:
        return _BYTES[dtype]
    if str(dtype).startswith("torch."):
        return dtype.itemsize
    try:
        if dtype is not None:  # which is float64 to NumPy
            return numpy.dtype(dtype).itemsize
    except TypeError:
        pass
    raise TypeError(f'dtype is {dtype!r}: it must be a dtype, its name, as "float16", or the bytes of one element')
