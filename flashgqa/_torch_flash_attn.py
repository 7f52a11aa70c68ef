"""The functions of FlashAttention 2.8 under their own names, with its signatures, shapes and return values.

Here the log-sum-exp of a row that sees no key is -inf (there it is inf), and S_dmask is always None.
"""

from typing import Any

import torch

from ._torch_attention import bounds, draw_seed, whole
from ._torch_eager import attend
from ._torch_kvcache import gathered_pages, packed_again, padded_rows, with_kvcache
from ._torch_packing import unbound
from ._torch_rotary import rotary_tables


def _run(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, layout=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    if isinstance(alibi_slopes, torch.Tensor):
        alibi_slopes = alibi_slopes.detach()    # flash_attn gives them no gradient without a word
    options = (
        causal, bounds(window_size), "bottom-right", None, softmax_scale,
        softcap if softcap != 0 else None, None, None, alibi_slopes, None, None, None, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, None if dropout_p == 0 else draw_seed(q.device), layout, None,
        deterministic or torch.are_deterministic_algorithms_enabled(), False, None, False, None, None,
    )  # fmt: skip
    given = not (alibi_slopes is cu_seqlens_q is None and dropout_p == 0)
    result = attend(q, k, v, return_attn_probs, options, given)
    return (*result, None) if return_attn_probs else result


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_func: same arguments, same meaning, gradients of q, k and v.

    Parameters
    ----------
    q : torch.Tensor, [b, sq, hq, d]
        float16, bfloat16 or float32; float64 on the CPU. Any strides with the last axis contiguous are read in place.
    k, v : torch.Tensor, [b, sk, hk, d]
        Of q's dtype; query head h reads KV head h // (hq / hk).
    dropout_p : float
        Probability with which a weight is dropped; 0 for evaluation. Seeded from torch's generator of q's device.
    softmax_scale : float, optional
        Factor of the scores, default 1 / sqrt(d).
    causal : bool
        Row i sees keys up to i + sk - sq.
    window_size : (left, right)
        Row i sees keys from i + sk - sq - left to i + sk - sq + right; -1 or None: no bound.
    softcap : float
        Scores become softcap * tanh(score / softcap); 0: none.
    alibi_slopes : torch.Tensor, [hq] or [b, hq], float32, optional
        -slope * |i + sk - sq - j| is added to the score of row i and key j. No gradient.
    deterministic : bool
        False lets the order of additions to q's gradient be free; torch.use_deterministic_algorithms(True) forces True.
    return_attn_probs : bool
        Whether lse is returned.

    Returns
    -------
    out : torch.Tensor, [b, sq, hq, d]
        A row that sees no key is 0. With return_attn_probs (out, lse, None): lse [b, hq, sq] float32, -inf for such a row.

    Raises
    ------
    TypeError, ValueError
        What an argument must be, under the name that it has in `flashgqa.torch.attention`: scale, window, cu_seqlens_kv, max_q.
    NotImplementedError
        No kernel serves the request, such as float64 on a GPU; or a second or forward-mode derivative.

    Notes
    -----
    Dao, "FlashAttention-2" (arXiv:2307.08691).
    """
    return _run(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, "bshd"
    )


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_kvpacked_func: `flash_attn_func` of q [b, sq, hq, d] with k and v in kv [b, sk, 2, hk, d], which gets
    their gradient as one.
    """
    k, v = unbound(kv, 2, "kv")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_qkvpacked_func: `flash_attn_func` of qkv [b, s, 3, h, d]; out [b, s, h, d]. One gradient, qkv's."""
    q, k, v = unbound(qkv, 3, "qkv")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_varlen_func: `flash_attn_func` of b sequences that lie one after the other, of any lengths, also 0.

    Parameters
    ----------
    q : torch.Tensor, [total_q, hq, d]
    k, v : torch.Tensor, [total_k, hk, d]
        Or pages [pages, page_size, hk, d], of any page size, with block_table.
    cu_seqlens_q, cu_seqlens_k : torch.Tensor, int32 [b + 1]
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1]; causal and windows count in each by itself.
    max_seqlen_q, max_seqlen_k : int, or int tensor of one element
        At least the longest length. A tensor on a GPU is read with block_table alone, which waits for it.
    block_table : torch.Tensor, int32 [b, columns], optional
        The pages of each sequence in their order: read where they are without gradients and dropout, copied together otherwise,
        with gradients.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `flash_attn_func`.

    Returns
    -------
    out : torch.Tensor, [total_q, hq, d]
        With return_attn_probs (out, lse [hq, total_q], None).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flash_attn_func`. On the CPU also for a max_seqlen that is too small, but for max_seqlen_k where pages are read in
        place (lengths come from cu_seqlens_k there), for offsets that do not divide all rows, and for pages that do not exist.
    """
    if block_table is not None:
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if not recorded and dropout_p == 0:
            out, lse = with_kvcache(
                padded_rows(q, cu_seqlens_q, max_seqlen_q, "cu_seqlens_q", "q"), k, v,
                cache_lens=cu_seqlens_k.diff(), q_lens=cu_seqlens_q.diff(), page_table=block_table, scale=softmax_scale,
                causal=causal, window=window_size, softcap=softcap if softcap != 0 else None, alibi_slopes=alibi_slopes,
            )  # fmt: skip
            out, lse = (packed_again(x, cu_seqlens_q, q.shape[0]) for x in (out, lse.transpose(1, 2)))
            return (out, lse.T, None) if return_attn_probs else out
        k, v = (gathered_pages(x, block_table, cu_seqlens_k, max_seqlen_k) for x in (k, v))
    return _run(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        None, cu_seqlens_q, cu_seqlens_k, whole(max_seqlen_q), whole(max_seqlen_k),
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_varlen_kvpacked_func: `flash_attn_varlen_func` of q [total_q, hq, d] and kv [total_k, 2, hk, d]."""
    k, v = unbound(kv, 2, "kv")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_varlen_qkvpacked_func: `flash_attn_varlen_func` of qkv [total, 3, h, d], cu_seqlens int32 [b + 1]."""
    q, k, v = unbound(qkv, 3, "qkv")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_with_kvcache: puts k and v [b, new, hk, d] behind what the cache holds, in place, and attends to all.

    Parameters
    ----------
    q : torch.Tensor, [b, sq, hq, d]
    k_cache, v_cache : torch.Tensor, [rows, slots, hk, d]
        Or pages [pages, page_size, hk, d], of any page size, with block_table. Written where k and v go, nowhere else.
    k, v : torch.Tensor, [b, new, hk, d], optional
        Go to slots cache_seqlens on.
    rotary_cos, rotary_sin : torch.Tensor, [positions, r], optional
        Tables of a rotary embedding of k and q, which stand at positions cache_seqlens on; without causal or a window all rows of
        q stand at the first. rotary_interleaved: elements 2 n and 2 n + 1 are a pair, or n and n + r.
    cache_seqlens : int, or torch.Tensor, int32 [b], optional
        Slots in use before; not changed. Default: all.
    cache_batch_idx : torch.Tensor, int32 [b], optional
        The row of the cache of each sequence; default its own number.
    cache_leftpad : torch.Tensor, int32 [b], optional
        The first slot that holds a token.
    block_table : torch.Tensor, int32 [b, columns], optional
        The pages of each sequence in their order.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`; the last row of q stands at the last key.
    num_splits
        Changes nothing.
    return_softmax_lse : bool
        Whether lse is returned.

    Returns
    -------
    out : torch.Tensor, [b, sq, hq, d]
        With return_softmax_lse (out, lse [b, hq, sq]). There is no backward: an attempt is a NotImplementedError.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flashgqa.attention_with_kvcache`; nothing is written then.
    """
    out, lse = with_kvcache(
        q, k_cache, v_cache, k, v, cache_lens=cache_seqlens, batch_index=cache_batch_idx, left_pad=cache_leftpad,
        page_table=block_table, rotary=rotary_tables(rotary_cos, rotary_sin),
        rotary_interleaved=rotary_interleaved, causal=causal, window=window_size, scale=softmax_scale,
        softcap=softcap if softcap != 0 else None, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
