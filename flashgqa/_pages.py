"""The pages of keys and values that caches of one family share, and who has them."""

from threading import RLock

import numpy


class Pool:
    """Pages of keys and values that caches share: each counts the sequences that have it."""

    def __init__(self, pages, page_size, num_kv_heads, dims, dtype, library, device, layout):
        shape = (pages, page_size, num_kv_heads) if layout == "bshd" else (pages, num_kv_heads, page_size)
        zeros = _zeros_of(library, dtype, device)
        self.k, self.v = (zeros((*shape, dim)) for dim in dims)
        self.slot_axis = 0 if layout == "bshd" else 1       # of one page
        self.on_gpu = getattr(self.k, "is_cuda", False)
        self.references = numpy.zeros(pages, numpy.int64)
        # Caches of one pool may be used by as many threads, and one that is collected gives back its pages at any time.
        self.lock = RLock()
        self.page_bytes = (self.k.nbytes + self.v.nbytes) // max(pages, 1)

    def beside(self, numbers):
        """An array of the host where the pool is, without waiting for it."""
        if numbers is None or not self.on_gpu:
            return numbers
        import torch

        return torch.from_numpy(numpy.ascontiguousarray(numbers, numpy.int32)).to(self.k.device, non_blocking=True)

    def read(self, pages, length):
        """Copies of the keys and of the values in the first slots of these pages."""
        return tuple(_joined(x, pages, self.slot_axis, length) for x in (self.k, self.v))

    def take(self, count):
        """Page numbers, lowest first, each with one reference."""
        with self.lock:
            free = numpy.flatnonzero(self.references == 0)
            if count <= len(free):
                self.references[free[:count]] = 1
                return free[:count]
        raise MemoryError(
            f"the KV cache is full: {count} more pages are needed and {len(free)} of {len(self.references)} are free; crop "
            "or drop sequences, or allocate it with more pages"
        )

    def add(self, table, change):
        """One reference more or less for each page in a table, whose empty places are -1."""
        with self.lock:
            numpy.add.at(self.references, table[table >= 0], change)

    def is_own(self, pages):
        """Of each page, whether one sequence alone has it; -1 is none."""
        if not len(self.references):
            return numpy.zeros(pages.shape, bool)
        return (pages >= 0) & (self.references.take(pages, mode="clip") == 1)

    def __getstate__(self):
        """Of a deep copy or a pickle: each cache that is in it, too, counts its own pages again."""
        return self.__dict__ | {"references": numpy.zeros_like(self.references), "lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, lock=RLock())


def _joined(x, pages, axis, length):
    parts = [x[page] for page in pages] or [x[:0].reshape(*x.shape[1 : axis + 1], 0, *x.shape[axis + 2 :])]
    if isinstance(x, numpy.ndarray):
        whole = numpy.concatenate(parts, axis)
    else:
        import torch

        whole = torch.cat(parts, axis)
    return whole[:length] if axis == 0 else whole[:, :length]


def _zeros_of(library, dtype, device):
    """A function from a shape to an array of the library."""
    name = dtype if isinstance(dtype, str) else dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    name = "float8_e4m3fn" if name == "float8_e4m3" else name
    if name not in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn"):
        raise TypeError(f"dtype is {dtype!r}: it must be float64, float32, float16, bfloat16 or float8_e4m3")
    if not isinstance(library, str) or library not in ("numpy", "torch"):
        raise ValueError(f'library is {library!r}: it must be "numpy" or "torch"')
    if library == "numpy" and not (device is None or isinstance(device, str) and device == "cpu"):
        raise ValueError(f'device is {device!r}: NumPy arrays are on the CPU; give library="torch", or leave device out')
    if library == "numpy":
        if name in ("bfloat16", "float8_e4m3fn"):
            try:
                import ml_dtypes
            except ImportError:
                fix = 'NumPy has it by ml_dtypes; pip install ml_dtypes, or give library="torch"'
                raise ImportError(f"dtype is {dtype!r}: {fix}") from None
            name = getattr(ml_dtypes, name)
        return lambda shape: numpy.zeros(shape, name)
    import torch

    return lambda shape: torch.zeros(shape, dtype=getattr(torch, name), device=device)
