"""What flash_attn_with_kvcache and block tables are made of: `flashgqa.attention_with_kvcache`, which reads pages where they are,
with flash_attn's meaning of rotary embeddings; and packed rows as padded ones.
"""

import torch

from ._torch_attention import bounds
from ._torch_eager import as_autocast
from ._torch_packing import check_offsets, is_readable
from ._torch_rotary import apply_rotary_emb
from .kvcache import attention_with_kvcache


class _NoBackward(torch.autograd.Function):
    """Its outputs remember that gradients were asked for."""

    @staticmethod
    def forward(ctx, function, *tensors):
        return function(*tensors)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "flashgqa: attention over a KV cache that is written in place has no gradient; use flash_attn_func or attention"
        )


def with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, cache_lens=None, new_lens=None, q_lens=None, page_table=None, batch_index=None,
    left_pad=None, rotary=None, rotary_interleaved=False, rotary_offsets=None, causal=False, window=(-1, -1), chunk=None,
    scale=None, softcap=None, alibi_slopes=None,
):  # fmt: skip
    """out [b, sq, hq, dv] and lse [b, hq, sq], with flash_attn's meaning of rotary, window (-1: unbounded) and cache_lens.

    All tensors are [b, s, h, d], pages [pages, page_size, hk, d]. An int for cache_lens counts for all sequences.
    """
    if (k is None) != (v is None):
        raise ValueError("k and v: both must be given, or none")
    if k is not None and cache_lens is None:
        raise ValueError("k and v are given without cache_seqlens: it says where in the cache they go")
    if rotary is not None and k is None:
        raise ValueError("rotary_cos is given without k and v: rotary embeddings are for keys that are added to the cache")
    if cache_lens is None and page_table is not None:
        cache_lens = page_table.shape[1] * k_cache.shape[1]
    if isinstance(cache_lens, int):
        cache_lens = torch.full((q.shape[0],), cache_lens, dtype=torch.int32, device=q.device)
    options = dict(causal=causal, window=bounds(window), chunk=chunk, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
    more = dict(
        cache_lens=cache_lens, new_lens=new_lens, q_lens=q_lens, page_table=page_table, batch_index=batch_index, left_pad=left_pad
    )
    if rotary is not None:
        q, k, rotary = _turned(q, k, rotary, rotary_interleaved, rotary_offsets, options, more)
        if rotary is not None:
            more.update(rotary=rotary, rotary_interleaved=rotary_interleaved, rotary_offsets=rotary_offsets)
    q, k, v = as_autocast(q, k, v)

    def run(q, k, v):
        caches = k_cache.detach(), v_cache.detach()
        try:
            with torch.no_grad():
                return attention_with_kvcache(q, *caches, k, v, layout="bshd", return_lse=True, **more, **options)
        except MemoryError as error:
            raise torch.OutOfMemoryError(str(error)) from error

    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v))
    return _NoBackward.apply(run, q, k, v) if recorded else run(q, k, v)


def _turned(q, k, rotary, interleaved, offsets, options, more):
    """q and k after the rotary embedding, and what of it is left to the kernel, which knows only one kind: rows of q at the
    positions of the last new keys.
    """
    moves = options["causal"] or options["window"] != (None, None)
    simple = more["q_lens"] is None and more["new_lens"] is None and q.shape[1] == k.shape[1]
    if simple and (moves or q.shape[1] == 1):
        return q, k, rotary
    start = more["cache_lens"] if offsets is None else offsets
    k = apply_rotary_emb(k, *rotary, interleaved, seqlen_offsets=start)
    if moves:
        return apply_rotary_emb(q, *rotary, interleaved, seqlen_offsets=start), k, None
    # Without a diagonal all rows of q stand at the first new position: as heads of one row.
    b, sq, hq, d = q.shape
    q = apply_rotary_emb(q.reshape(b, 1, sq * hq, d), *rotary, interleaved, seqlen_offsets=start)
    return q.view(b, sq, hq, d), k, None


# ---- packed queries ----


def padded_rows(x, cu_seqlens, longest, name, of):
    """x [total, ...] as [sequences, longest, ...]; behind the end of a sequence any rows. name: of cu_seqlens; of: of x."""
    check_offsets(name, cu_seqlens, of, x.shape[0])
    rows = cu_seqlens[:-1, None] + torch.arange(longest, device=x.device)
    if x.shape[0] == 0:
        return x.new_zeros(cu_seqlens.shape[0] - 1, longest, *x.shape[1:])
    return x[rows.clamp(max=x.shape[0] - 1)]


def packed_again(x, cu_seqlens, total):
    """The inverse: x [sequences, longest, ...] as [total, ...]."""
    row = torch.arange(total, device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=x.shape[0] - 1)
    return x[sequence, (row - cu_seqlens[sequence]).clamp(max=x.shape[1] - 1)]


def gathered_pages(cache, page_table, cu_seqlens, longest):
    """Slots of pages [pages, page_size, hk, d] as [total, hk, d]: those of the sequences, of cu_seqlens' lengths. With gradients.

    On a GPU, where total is not known here, there are as many rows as there can be.
    """
    page_size, sequences = cache.shape[1], page_table.shape[0]
    total = int(cu_seqlens[-1]) if cache.device.type == "cpu" else sequences * longest
    row = torch.arange(total, device=cache.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=max(sequences - 1, 0))
    slot = (row - cu_seqlens[sequence]).clamp(max=page_table.shape[1] * page_size - 1)
    page = page_table[sequence, slot // page_size]
    if is_readable(page):
        _check_pages(page, page_table, cu_seqlens, cache.shape[:2])
    return cache[page.clamp(0, cache.shape[0] - 1), slot % page_size]


def _check_pages(used, page_table, cu_seqlens, shape):
    """What the kernel for pages checks on the CPU: that there are pages for all slots, and that they exist."""
    (pages, page_size), longest = shape, int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    if longest > page_table.shape[1] * page_size:
        raise ValueError(
            f"block_table is {list(page_table.shape)}, with pages of {page_size} slots, and a sequence of cu_seqlens_k has "
            f"{longest} keys: it must have columns for all of them"
        )
    wrong = used[(used < 0) | (used >= pages)]
    if wrong.numel():
        raise ValueError(
            f"block_table has page {int(wrong[0])} and the cache {pages} pages: entries for slots in use must be 0 to {pages - 1}"
        )
