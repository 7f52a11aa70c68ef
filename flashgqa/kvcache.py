"""Attention over a KV cache: contiguous or paged, with new keys and values appended in place.

All checks and all arithmetic are in ``flashgqa._C``. Letters as in `flashgqa.api`; a slot is the place of one key and value.
"""

from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from operator import index

import numpy

from . import _C
from ._counts import count, whole
from ._pages import Pool
from .api import Plan

__all__ = ["KVCache", "attention_with_kvcache", "explain_with_kvcache"]

_attention = _C.attention_with_kvcache


def attention_with_kvcache(
    q,
    k_cache,
    v_cache,
    k_new=None,
    v_new=None,
    *,
    cache_lens=None,
    new_lens=None,
    q_lens=None,
    page_table=None,
    batch_index=None,
    left_pad=None,
    rotary=None,
    rotary_interleaved=False,
    rotary_offsets=None,
    k_scale=None,
    v_scale=None,
    causal=False,
    window=None,
    chunk=None,
    scale=None,
    softcap=None,
    alibi_slopes=None,
    sink=None,
    layout=None,
    return_lse=False,
    out=None,
    stream=None,
    batch_invariant=False,
    check=False,
    device=None,
    kernel=None,
):
    """Append new keys and values to a cache, in place, and attend to all that it then holds.

    Sequence n has ``cache_lens[n]`` slots in use. Row i of ``k_new[n]`` and ``v_new[n]`` goes into slot cache_lens[n] + i; the
    sequence then has L = cache_lens[n] + new_lens[n] slots, and its last query row sits at the last of them: row i at slot
    L - sq + i, which is diag(i) of `attention` (bottom-right). One token a call, a handful (speculative decoding) and
    chunks of a prompt are all the same call. The arguments are checked completely before anything is written, and a call
    that fails leaves the cache as it was. ``cache_lens`` itself is not changed: add the new lengths to it.

    On a GPU nothing waits: lengths, tables and offsets are read on the device when the kernels run, so that one captured CUDA
    graph serves every step of a generation whose ``cache_lens`` grow in place. What they say is looked at with ``check=True``
    alone, which waits for the GPU. Without it, wrong values are limited to what exists, and memory outside the arrays is never
    touched: slots beyond the cache and pages that do not exist are not written, and such pages read as zeros.

    Parameters
    ----------
    q : array, [b, hq, sq, d]
        Queries: NumPy array or any tensor with ``__dlpack__``, on the CPU or a GPU, where all other arrays are then, too;
        float32, float16, bfloat16, or (CPU) float64.
    k_cache : array, [b, hk, slots, d]; paged: [pages, hk, page_size, d]
        Of the dtype of q, or float8 e4m3. Any strides. Only slots that hold keys are ever read.
    v_cache : array, [b, hk, slots, dv]; paged: [pages, hk, page_size, dv]
        Of the dtype of k_cache.
    k_new, v_new : array, [b, hk, new, d] and [b, hk, new, dv], optional
        What is appended, of the dtype of q. The cache must then be writable (a JAX array is not).
    cache_lens : int32 array, [b], or int
        Slots in use before the append; an int counts for every sequence. May be left out where nothing is appended to a
        contiguous cache: all its slots are in use.
    new_lens : int32 array, [b], optional
        How many rows of k_new and v_new each sequence appends; default: all.
    q_lens : int32 array, [b], optional
        How many rows of q each sequence has; rows behind have out = 0 and lse = -inf.
    page_table : int32 array, [b, columns], optional
        Slot s of sequence n is slot s % page_size of page ``page_table[n, s // page_size]``. Any page size from 1 on.
        Entries for slots that are not used may hold anything. Sequences may share pages, but not one that is appended to.
    batch_index : int32 array, [b], optional
        Which row of a contiguous cache each sequence has; then the cache may have any number of rows.
    left_pad : int32 array, [b], optional
        Slots at the beginning of each sequence that hold padding: never seen, whatever they hold.
    rotary : (cos, sin), arrays [positions, pairs], optional
        Rotary embedding of q and k_new, d >= 2 * pairs; elements from 2 * pairs on stay as they are. The keys that the cache
        holds already are taken as rotated. A token's position is its slot, left_pad included.
    rotary_interleaved : bool
        Pairs are neighbours (2n, 2n + 1) instead of the halves (n, n + pairs).
    rotary_offsets : int32 array, [b], optional
        Position of each sequence's first new token instead of cache_lens.
    k_scale, v_scale : float32 array, [hk] or [b, hk], optional
        Of a float8 cache: value = element * scale, default 1. New values are divided by it, limited to +-448 and rounded.
    causal, window, chunk, scale, softcap, alibi_slopes, sink
        As in `attention`; keys count from the first slot behind left_pad.
    layout : {"bhsd", "bshd"}, optional
        Order of the axes of q, cache, new keys and out; "bshd": k_cache [b, slots, hk, d] or [pages, page_size, hk, d].
    return_lse, out, stream, batch_invariant, check, device, kernel
        As in `attention`, but ``device``: a cache stays where it is. On the CPU the bits of a sequence never depend on the rest
        of the batch, nor on pages and threads; on a GPU with ``batch_invariant`` not on the rest of the batch.

    Returns
    -------
    out : array, [b, hq, sq, dv] in the layout of q
        Of q's array type and dtype, or the object given as ``out``.
    lse : array, [b, hq, sq], float32 (float64 for float64)
        With ``return_lse``.

    Raises
    ------
    TypeError, ValueError, BufferError, NotImplementedError
        As `attention`. ValueError also for lengths beyond the cache, page numbers that do not exist, slots that two sequences
        would write or that another one reads (on a GPU: with ``check=True``), and a cache that cannot be written.

    Notes
    -----
    Paged caches after Kwon et al., "PagedAttention" (arXiv:2309.06180); rotary embedding after Su et al., "RoFormer"
    (arXiv:2104.09864).

    Examples
    --------
    One decoding step of two sequences with 5 and 9 tokens:

    >>> import numpy, flashgqa
    >>> k_cache, v_cache = numpy.zeros((2, 2, 16, 64)), numpy.zeros((2, 2, 16, 64))
    >>> q, k_new = numpy.random.randn(2, 8, 1, 64), numpy.random.randn(2, 2, 1, 64)
    >>> lens = numpy.array([5, 9], numpy.int32)
    >>> flashgqa.attention_with_kvcache(q, k_cache, v_cache, k_new, k_new, cache_lens=lens, causal=True).shape
    (2, 8, 1, 64)
    >>> bool((k_cache[1, :, 9] == k_new[1, :, 0]).all())
    True
    """
    cos, sin = _cos_sin(rotary, rotary_interleaved)
    cache_lens = _lengths(q, cache_lens, stream)
    return _attention(
        q, k_cache, v_cache, k_new, v_new, cache_lens, new_lens, page_table, batch_index, left_pad, cos, sin, rotary_offsets,
        k_scale, v_scale, rotary_interleaved, return_lse, out,
        causal, window, "bottom-right", chunk, scale, softcap, None, None, alibi_slopes, sink, q_lens, None,
        None, None, None, None, 0.0, None, layout, stream, True, batch_invariant,
        None, check, device, kernel,
    )  # fmt: skip


# The arguments of _C.attention_with_kvcache before its options.
_ARGUMENTS = (
    "q", "k_cache", "v_cache", "k_new", "v_new", "cache_lens", "new_lens", "page_table", "batch_index", "left_pad", "rotary_cos",
    "rotary_sin", "rotary_offsets", "k_scale", "v_scale", "rotary_interleaved", "return_lse", "out",
)  # fmt: skip


def explain_with_kvcache(*tensors, **options):
    """Which kernel a call of `attention_with_kvcache` would run, and why others do not serve it. Nothing is written or computed.

    Parameters
    ----------
    *tensors, **options
        As there. On a GPU the plan is that of the largest lengths the cache can have: those on the device are not read.

    Returns
    -------
    Plan
        As `explain` returns it.

    Raises
    ------
    TypeError, ValueError, BufferError, NotImplementedError
        What the call itself would raise before it runs.
    """
    given = signature(attention_with_kvcache).bind(*tensors, **options)
    given.apply_defaults()
    values = {"align": "bottom-right", "dropout_p": 0.0, "deterministic": True} | given.arguments
    values["rotary_cos"], values["rotary_sin"] = _cos_sin(values["rotary"], values["rotary_interleaved"])
    values["cache_lens"] = _lengths(values["q"], values["cache_lens"], values["stream"])
    return Plan(_C.explain_with_kvcache(*(values.get(name) for name in _ARGUMENTS + _C.OPTIONS)))


def _in_order_of(stream, library, device):
    """A context in which the library's own work for a call goes where the call does: to its stream."""
    if stream is None:
        return nullcontext()
    cuda = import_module(library).cuda
    if library == "cupy":
        return cuda.ExternalStream(_C.stream_address(stream))
    return cuda.stream(cuda.ExternalStream(_C.stream_address(stream), device))


def _lengths(q, given, stream):
    """cache_lens; of an int, as many int32 as there are sequences, where q is (C says so if q is no array)."""
    if not hasattr(given, "__index__") or hasattr(given, "__dlpack__") or isinstance(given, bool):
        return given
    length, (count, *_) = index(given), getattr(q, "shape", None) or (1,)
    if not 0 <= length < 2**31:
        raise ValueError(f"cache_lens is {length}: it must be 0 to 2**31 - 1 slots in use, or an array of them")
    library = type(q).__module__.partition(".")[0]
    if library == "torch" and q.is_cuda:
        import torch

        with _in_order_of(stream, library, q.device):
            return torch.full((count,), length, dtype=torch.int32, device=q.device)
    if library == "cupy":
        import cupy

        with q.device, _in_order_of(stream, library, q.device):
            return cupy.full(count, length, cupy.int32)
    lengths = numpy.full(count, length, numpy.int32)
    if library in ("jax", "jaxlib") and next(iter(q.devices())).platform != "cpu":
        import jax

        return jax.device_put(lengths, next(iter(q.devices())))
    return lengths


def _cos_sin(rotary, interleaved):
    if rotary is None:
        if isinstance(interleaved, bool | numpy.bool) and interleaved:
            raise ValueError("rotary_interleaved is given without rotary: give rotary=(cos, sin), or leave it out")
        return None, None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or any(x is None for x in rotary):
        raise TypeError(f"rotary is {type(rotary).__name__}: it must be None or a pair of arrays (cos, sin), [positions, pairs]")
    return rotary


# Slots, sequences and pages are counted in int32.
_MOST = 2**31 - 1

# Options of attention_with_kvcache that a KVCache gives itself.
_ANSWERED = frozenset(("cache_lens", "page_table", "layout", "k_scale", "v_scale"))


def _dtype_name(x):
    dtype = getattr(x, "dtype", "")
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


class KVCache:
    """Keys and values of a batch of sequences, in pages, with the bookkeeping that `attention_with_kvcache` leaves to its caller.

    Pages are taken from a pool as sequences grow. Sequences that begin alike share pages (`reorder`, `fork`); one that is
    about to be written by one of them is copied first. ``copy.copy`` is `fork`; deep copies and pickles have a pool of their own.
    Several threads may each use a cache of their own in one pool.

    Parameters
    ----------
    batch : int
        Number of sequences, all empty at first.
    num_kv_heads, head_dim : int
        hk and d.
    capacity : int
        Most slots that a sequence can have.
    value_dim : int, optional
        dv; default d.
    dtype : str or dtype
        "float32", "float16", "bfloat16", "float64" or "float8_e4m3"; NumPy needs ml_dtypes for bfloat16 and float8.
    page_size : int
        Slots of a page.
    pages : int, optional
        Of the pool; default: enough for ``batch`` full sequences that share nothing.
    layout : {"bhsd", "bshd"}
        Of q, new keys and values, results, and the pool.
    library : {"numpy", "torch"}
        Whose arrays the pool is made of. q and new keys may be of any library.
    device : str or torch.device, optional
        Of a pool of torch tensors, as "cuda". The bookkeeping stays on the host, and nothing waits for the GPU.
    k_scale, v_scale : float32 array, [hk] or [b, hk], optional
        Of a float8 cache.

    Attributes
    ----------
    k, v : array
        The pool, [pages, hk, page_size, d] and [.., dv] ("bshd": [pages, page_size, hk, d]).
    page_table : numpy.ndarray, int32 [batch, columns]
        Pages of each sequence; -1 where it has none.
    lens : numpy.ndarray, int32 [batch]
        Slots in use.
    bytes_used, bytes_allocated : int
        Of pages that some sequence has, those of forks included and shared ones once; of the pool.

    Raises
    ------
    TypeError, ValueError
        Counts that are none; a dtype, layout or library that is none of these.
    MemoryError
        A call that needs more pages than are free. It leaves the cache as it was.

    Examples
    --------
    >>> import numpy, flashgqa
    >>> cache = flashgqa.KVCache(2, 2, 64, capacity=1000)
    >>> q, k = numpy.random.randn(2, 8, 5, 64).astype("f4"), numpy.random.randn(2, 2, 5, 64).astype("f4")
    >>> cache.attention(q, k, k, causal=True).shape, cache.lens
    ((2, 8, 5, 64), array([5, 5], dtype=int32))
    >>> cache.reorder([1, 1])
    >>> cache.bytes_used // 1024
    128
    """

    def __init__(
        self,
        batch,
        num_kv_heads,
        head_dim,
        *,
        capacity,
        value_dim=None,
        dtype="float32",
        page_size=128,
        pages=None,
        layout="bhsd",
        library="numpy",
        device=None,
        k_scale=None,
        v_scale=None,
    ):
        batch, capacity = count("batch", batch, 0, _MOST), count("capacity", capacity, 0, _MOST)
        page_size, heads = count("page_size", page_size, 1, _MOST), count("num_kv_heads", num_kv_heads, 1, _MOST)
        dims = count("head_dim", head_dim, 1, _MOST), count("value_dim", head_dim if value_dim is None else value_dim, 1, _MOST)
        columns = -(-capacity // page_size)
        pages = count("pages", batch * columns if pages is None else pages, 0, _MOST)
        if not isinstance(layout, str) or layout not in ("bhsd", "bshd"):
            raise ValueError(f'layout is {layout!r}: it must be "bhsd" or "bshd"')
        self._pool = Pool(pages, page_size, heads, dims, dtype, library, device, layout)
        self.capacity, self.page_size, self.layout = capacity, page_size, layout
        self._scales = {"k_scale": k_scale, "v_scale": v_scale}
        for name, scale in self._scales.items():
            if scale is not None and not hasattr(scale, "ndim"):
                raise TypeError(f"{name} is {type(scale).__name__}: it must be a float32 array, [hk] or [b, hk]")
        self._lens = numpy.zeros(batch, numpy.int32)
        self._room = 0      # rows that each sequence can append, at least, to a page that it alone has
        self._uploaded = None
        self._table = numpy.full((batch, columns), -1, numpy.int32)

    def __del__(self):
        if hasattr(self, "_table"):
            self._pool.add(self._table, -1)

    def __getstate__(self):
        return self.__dict__ | {"_uploaded": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._pool.add(self._table, 1)

    def __repr__(self):
        return f"<KVCache of {len(self)} sequences, {self.bytes_used:,} of {self.bytes_allocated:,} bytes used>"

    def __len__(self):
        return len(self._lens)

    @property
    def k(self):
        return self._pool.k

    @property
    def v(self):
        return self._pool.v

    @property
    def page_table(self):
        return self._table.copy()

    @property
    def lens(self):
        return self._lens.copy()

    @property
    def bytes_used(self):
        return int((self._pool.references > 0).sum()) * self._pool.page_bytes

    @property
    def bytes_allocated(self):
        return len(self._pool.references) * self._pool.page_bytes

    def attention(self, q, k_new=None, v_new=None, *, new_lens=None, **options):
        """Append k_new and v_new, if given, and attend to all that the sequences then hold: see `attention_with_kvcache`.

        Parameters
        ----------
        q, k_new, v_new
            As there.
        new_lens : int or integers, one for each sequence, on the host, optional
            How many rows of k_new and v_new each sequence appends; default: all.
        **options
            Its options but for those that the cache itself answers (cache_lens, page_table, layout, scales).

        Returns
        -------
        out, or (out, lse)
            As there. A call that fails leaves the cache as it was.

        Raises
        ------
        MemoryError
            No page is free.
        ValueError
            A sequence would have more than ``capacity`` slots; and what `attention_with_kvcache` raises.
        """
        if not _ANSWERED.isdisjoint(options):
            raise TypeError(f"{sorted(_ANSWERED.intersection(options))[0]} is what the cache itself says: leave it out")
        stream = options.get("stream") if self._pool.on_gpu else None
        if stream is None:
            return self._append_and_attend(q, k_new, v_new, new_lens, options)
        with _in_order_of(stream, "torch", self.k.device):
            return self._append_and_attend(q, k_new, v_new, new_lens, options)

    def append(self, k_new, v_new, *, new_lens=None, **options):
        """Append without attending. ``options``: rotary, rotary_interleaved, rotary_offsets."""
        shape, wanted, axis = getattr(k_new, "shape", None), [len(self), *self.k.shape[1:]], 1 if self.layout == "bshd" else 2
        if shape is None:
            raise TypeError(f"k_new is {type(k_new).__name__}: it must be a NumPy array or any tensor with __dlpack__")
        wanted[axis] = shape[axis] if len(shape) == 4 else "new"
        if list(shape) != wanted:
            raise ValueError(f"k_new has shape {tuple(shape)}: in this cache, {self.layout}, it must be {wanted}")
        given, own = _dtype_name(k_new), _dtype_name(self.k)
        if given and given != own and "float8" not in own:
            raise TypeError(f"k_new has dtype {given}: in this cache it must be {own}; convert it")
        no_rows = k_new[:, :0] if self.layout == "bshd" else k_new[:, :, :0]
        no_rows = no_rows.detach() if hasattr(no_rows, "detach") else no_rows   # k_new itself is what may require grad
        self.attention(no_rows, k_new, v_new, new_lens=new_lens, **options)

    def crop(self, lens):
        """Forget all slots from ``lens`` on (an int, or one for each sequence) and give back pages that are no longer needed."""
        lens = numpy.minimum(self._lens, self._per_sequence("lens", lens))
        left = -(-lens // self.page_size)
        if (left < -(-self._lens // self.page_size)).any():
            keep = numpy.arange(self._table.shape[1]) < left[:, None]
            self._pool.add(self._table[~keep], -1)
            self._table = numpy.where(keep, self._table, numpy.int32(-1))
        self._lens, self._room = lens, 0

    def reorder(self, sequences):
        """Sequence n becomes what sequence ``sequences[n]`` was, as in a beam search; the batch gets as long as ``sequences``."""
        sequences = self._sequences(sequences)
        table = self._table[sequences]
        self._pool.add(table, 1)
        self._pool.add(self._table, -1)
        self._table, self._lens, self._room = table, self._lens[sequences], 0
        self._scales = self._scales_of(sequences)

    def fork(self, sequences=None):
        """Another KVCache with these sequences (default: all), in the same pool. They share pages until one is written."""
        sequences = numpy.arange(len(self)) if sequences is None else self._sequences(sequences)
        other = object.__new__(type(self))
        other.__dict__.update({name: x for name, x in self.__dict__.items() if name != "_table"})
        other._lens, other._scales = self._lens[sequences], self._scales_of(sequences)
        other._table = self._table[sequences]
        other._room = self._room = 0
        self._pool.add(other._table, 1)
        return other

    __copy__ = fork

    def sequence(self, n):
        """Copies of what sequence n holds, [hk, slots, d] and [hk, slots, dv] ("bshd": [slots, hk, d]), elements of the cache."""
        if not -len(self) <= whole("n", n) < len(self):
            raise IndexError(f"n is {n}: the cache has {len(self)} sequences")
        length = self._lens[n]
        return self._pool.read(self._table[n, : -(-length // self.page_size)].tolist(), length)

    # ---- bookkeeping ----

    def _per_sequence(self, name, value):
        """int32 [batch] of an int or of one for each sequence, limited to what int32 holds."""
        numbers = numpy.asarray(value)
        fits = (numbers.dtype.kind in "iu" or not numbers.size) and numbers.shape in ((), (len(self),))
        if not fits or (numbers < 0).any():
            raise ValueError(f"{name} is {value!r}: it must be an integer of 0 or more, or one for each of {len(self)} sequences")
        return numpy.full(len(self), numpy.minimum(numbers, numpy.int64(_MOST)), numpy.int32)

    def _sequences(self, sequences):
        numbers = numpy.asarray(sequences)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(f"sequences is {sequences!r}: it must be a list of integers")
        numbers = numbers.astype(numpy.int64)
        if ((numbers < 0) | (numbers >= len(self))).any():
            raise ValueError(f"sequences is {sequences!r}: the cache has sequences 0 to {len(self) - 1}")
        return numbers

    def _scales_of(self, sequences):
        return {name: x if x is None or x.ndim == 1 else x[sequences] for name, x in self._scales.items()}

    def _append_and_attend(self, q, k_new, v_new, new_lens, options):
        rows = _rows(k_new, self.layout)
        if new_lens is None and self._has_room(rows):
            result = self._attend(q, k_new, v_new, None, self._table, options)
            self._room -= rows
            self._lens = self._lens + numpy.int32(rows)
            return result
        if new_lens is not None:
            new_lens = self._per_sequence("new_lens", new_lens)
        added = self._added(rows, new_lens)
        table, old, taken = self._grow(added)
        try:
            for pool in (self.k, self.v):
                for page, shared in zip(taken.tolist(), old.tolist(), strict=True):
                    if shared >= 0:
                        pool[page] = pool[shared]
            result = self._attend(q, k_new, v_new, new_lens, table, options)
        except BaseException:
            self._pool.add(taken, -1)
            raise
        self._pool.add(old, -1)
        self._table = table
        self._lens, self._room = self._lens + added, 0
        return result

    def _attend(self, q, k_new, v_new, new_lens, table, options):
        pool = self._pool
        try:
            return attention_with_kvcache(
                q, pool.k, pool.v, k_new, v_new, cache_lens=pool.beside(self._lens), new_lens=pool.beside(new_lens),
                page_table=self._near(table), layout=self.layout, **self._scales, **options,
            )  # fmt: skip
        except ValueError:
            if len(q.shape) == 4 and q.shape[0] != len(self):
                text = f"q has batch size {q.shape[0]} but the cache has {len(self)} sequences: give each of them rows"
                raise ValueError(text) from None
            raise

    def _near(self, table):
        """The table where the pool is. On a GPU it stays there from call to call while neither it nor the stream changes."""
        if not self._pool.on_gpu:
            return table
        import torch

        stream = torch.cuda.current_stream(self.k.device)
        if self._uploaded is None or self._uploaded[0] is not table or self._uploaded[1] != stream:
            self._uploaded = table, stream, self._pool.beside(table)
        return self._uploaded[2]

    def _added(self, rows, new_lens):
        """int32 [batch]: how many rows each sequence appends."""
        added = numpy.full(len(self), rows, numpy.int32) if new_lens is None else new_lens
        if (added > rows).any():
            raise ValueError(f"new_lens is {added.tolist()} but k_new has {rows} rows: lengths must be 0 to {rows}")
        totals = self._lens.astype(numpy.int64) + added
        if (totals > self.capacity).any():
            n = int(totals.argmax())
            raise ValueError(
                f"sequence {n} has {self._lens[n]} slots in use and {added[n]} new keys are appended: {totals[n]} exceed the "
                f"capacity of {self.capacity}; allocate the cache with a larger one, or crop it"
            )
        return added

    def _last_pages(self, sequences):
        return self._table[sequences, (self._lens[sequences] - 1) // self.page_size]

    def _grow(self, added):
        """(table, old, new): a table with pages for the new slots; what its changed places held, -1 for none; what they hold."""
        held, wanted = -(-self._lens // self.page_size), -(-(self._lens + added) // self.page_size)
        places = [(n, column) for n in numpy.flatnonzero(wanted > held).tolist() for column in range(held[n], wanted[n])]
        old = [-1] * len(places)
        begun = numpy.flatnonzero((added > 0) & (self._lens % self.page_size > 0))
        pages = self._last_pages(begun)
        shared = ~self._pool.is_own(pages)
        for n, page in zip(begun[shared].tolist(), pages[shared].tolist(), strict=True):
            # Of the sequences that share a page and leave it, the last one keeps it.
            if self._pool.references[page] - old.count(page) > 1:
                places.append((n, held[n] - 1))
                old.append(page)
        if not places:
            return self._table, numpy.empty(0, int), numpy.empty(0, int)
        new, table = self._pool.take(len(places)), self._table.copy()
        table[tuple(zip(*places, strict=True))] = new
        return table, numpy.array(old), new

    def _has_room(self, rows):
        """Whether every sequence can append so many rows to a page that it alone has."""
        if rows > self._room:
            used = self._lens % self.page_size
            if not used.all() or not self._pool.is_own(self._last_pages(slice(None))).all():
                return False
            self._room = min(self.page_size - int(used.max(initial=0)), self.capacity - int(self._lens.max(initial=0)))
        return rows <= self._room


def _rows(k_new, layout):
    """Rows of k_new; 0 if C is to say what is wrong with it."""
    shape = getattr(k_new, "shape", ())
    return shape[1 if layout == "bshd" else 2] if len(shape) == 4 else 0
