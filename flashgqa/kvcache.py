"""Attention over a KV cache: contiguous or paged, with new keys and values appended in place.

All checks and all arithmetic are in ``flashgqa._C``. Letters as in `flashgqa.api`; a slot is the place of one key and value.
"""

from operator import index

import numpy

from . import _C

__all__ = ["attention_with_kvcache"]

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

    Parameters
    ----------
    q : array, [b, hq, sq, d]
        Queries: NumPy array or any tensor with ``__dlpack__`` on the CPU; float64, float32, float16 or bfloat16.
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
        As in `attention`. The bits of a sequence never depend on the rest of the batch, nor on pages and threads.

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
        would write or that another one reads, and a cache that cannot be written. NotImplementedError on a GPU.

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
    cos, sin = _cos_sin(rotary)
    if hasattr(cache_lens, "__index__") and not hasattr(cache_lens, "__dlpack__"):
        cache_lens = numpy.full(q.shape[0], index(cache_lens), numpy.int32)
    if rotary_interleaved and rotary is None:
        raise ValueError("rotary_interleaved is given without rotary: give rotary=(cos, sin), or leave it out")
    return _attention(
        q, k_cache, v_cache, k_new, v_new, cache_lens, new_lens, page_table, batch_index, left_pad, cos, sin, rotary_offsets,
        k_scale, v_scale, rotary_interleaved, return_lse, out,
        causal, window, "bottom-right", chunk, scale, softcap, None, None, alibi_slopes, sink, q_lens, None,
        None, None, None, None, 0.0, None, layout, stream, True, batch_invariant,
        None, check, device, kernel,
    )  # fmt: skip


def _cos_sin(rotary):
    if rotary is None:
        return None, None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or any(x is None for x in rotary):
        raise TypeError(f"rotary is {type(rotary).__name__}: it must be None or a pair of arrays (cos, sin), [positions, pairs]")
    return rotary
