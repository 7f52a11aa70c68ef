"""Bytes: measured, counted, and in words."""

import sys

import numpy

from ._counts import count

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


def gib(n):
    return f"{n / 2**30:6.2f} GiB"


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


def kv_cache_bytes(num_layers, num_kv_heads, head_dim, dtype, tokens=1, batch=1):
    """Bytes of a KV cache: 2 * num_layers * num_kv_heads * head_dim * element size * tokens * batch.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
        Of the model. Grouped heads shrink the cache by g = query heads / KV heads.
    dtype : str, dtype or int
        Of the cache: a name such as "float16", anything NumPy takes as a dtype, or the bytes of one element.
    tokens, batch : int
        Tokens in each sequence, and sequences.

    Returns
    -------
    int

    Raises
    ------
    TypeError, ValueError
        Not an integer, or a negative one; not a dtype.

    Examples
    --------
    Llama 2 7B in float16, with its 32 KV heads and with one:

    >>> import flashgqa
    >>> flashgqa.kv_cache_bytes(32, 32, 128, "float16")
    524288
    >>> flashgqa.kv_cache_bytes(32, 1, 128, "float16")
    16384
    """
    size = element_bytes(dtype)
    counts = dict(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=size, tokens=tokens, batch=batch)
    total = 2
    for name, given in counts.items():
        total *= count(name, given)
    return total
