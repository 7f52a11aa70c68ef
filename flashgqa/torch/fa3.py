"""The functions of FlashAttention-3 (hopper/flash_attn_interface) under their own names, with its signatures and return values.

qv and the descales of float8 raise NotImplementedError; num_splits, pack_gqa and sm_margin choose between kernels there and
change nothing here. The log-sum-exp is returned by return_attn_probs, float32 [b, hq, sq], or [hq, total_q].
"""

from typing import Any

import torch

from .._torch_attention import attention, bounds
from .._torch_attention import merge as _merge
from .._torch_kvcache import packed_again, padded_rows, with_kvcache
from .._torch_packing import check_lengths, packed_rows, split_qkv, unpacked_rows
from .._torch_rotary import rotary_tables

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def _refuse(qv=None, **scales):
    for name, value in {"qv": qv, **scales}.items():
        if value is not None:
            what = "second query" if name == "qv" else "float8"
            raise NotImplementedError(f"{name} is given: there is no {what} here, and it must be None")


def _run(q, k, v, softmax_scale, causal, window_size, attention_chunk, softcap, deterministic, **more):
    return attention(
        q, k, v,
        scale=softmax_scale,
        causal=causal,
        window=bounds(window_size),
        chunk=attention_chunk or None,
        softcap=softcap or None,
        deterministic=deterministic,
        return_lse=True,
        **more,
    )  # fmt: skip


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
) -> Any:  # fmt: skip
    """FlashAttention-3's flash_attn_func: q [b, sq, hq, d], k [b, sk, hk, d], v [b, sk, hk, dv], gradients of all three.

    attention_chunk: row i sees only keys of its own chunk of that many, 0 for none. softmax_scale, causal, window_size, softcap,
    deterministic and errors are those of `flashgqa.torch.flash_attn_func`; there is neither dropout nor ALiBi.

    Returns out [b, sq, hq, dv], or (out, lse [b, hq, sq]) with return_attn_probs.
    """
    _refuse(qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    result = _run(q, k, v, softmax_scale, causal, window_size, attention_chunk, softcap, deterministic, layout="bshd")
    return result if return_attn_probs else result[0]


def flash_attn_qkvpacked_func(
    qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False,
) -> Any:  # fmt: skip
    """`flash_attn_func` with qkv [b, s, 3, h, d], or [b, s, hq + 2 hk, d] with num_heads_q = hq."""
    q, k, v = split_qkv(qkv, num_heads_q)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
) -> Any:  # fmt: skip
    """q [total_q, hq, d], k [total_k, hk, d], v [total_k, hk, dv], cu_seqlens int32 [b + 1]: out, or (out, lse [hq, total_q]).

    seqused_q, seqused_k: int32 [b], how many rows of each sequence count, its first; others are moved out of the way, which
    copies. Query rows that do not count have out 0 and lse -inf.
    """
    _refuse(qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    total, starts = q.shape[0], cu_seqlens_q[:-1]
    for name, used, cu_seqlens in (("seqused_q", seqused_q, cu_seqlens_q), ("seqused_k", seqused_k, cu_seqlens_k)):
        if used is not None:
            check_lengths(name, used, cu_seqlens)
    if seqused_k is not None:
        rows = [packed_rows(x, cu_seqlens_k[:-1], seqused_k) for x in (k, v)]
        (k, cu_seqlens_k), (v, _) = rows
    if seqused_q is not None:
        q, cu_seqlens_q = packed_rows(q, starts, seqused_q)
    out, lse = _run(
        q, k, v, softmax_scale, causal, window_size, attention_chunk, softcap, deterministic,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k, max_q=max_seqlen_q, max_kv=max_seqlen_k,
    )  # fmt: skip
    if seqused_q is not None:
        out = unpacked_rows(out, cu_seqlens_q, starts, total, 0)
        lse = unpacked_rows(lse.T, cu_seqlens_q, starts, total, -torch.inf).T
    return (out, lse) if return_attn_probs else out


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """out_partial [splits, b, s, h, d] and lse_partial [splits, b, s, h] over disjoint keys: out [b, s, h, d], lse [b, s, h]."""
    merged, lse = _merge(tuple(out_partial), tuple(lse_partial.transpose(-1, -2)), layout="bshd")
    merged = merged.to(out_partial.dtype if out_dtype is None else out_dtype)
    return merged if out is None else out.copy_(merged), lse.transpose(-1, -2)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
    return_softmax_lse=False,
) -> Any:  # fmt: skip
    """`flashgqa.torch.flash_attn_with_kvcache` with FlashAttention-3's arguments.

    cu_seqlens_q int32 [b + 1] with max_seqlen_q: q is [total_q, hq, d]; cu_seqlens_k_new: k and v are [total_new, hk, d].
    rotary_seqlens int32 [b]: positions of the first new tokens instead of cache_seqlens. scheduler_metadata changes nothing.

    Returns out, or with return_softmax_lse (out, lse [b, hq, sq] or [hq, total_q], empty, empty), as there. There is no backward.
    """
    _refuse(qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    total, q_lens, new_lens = q.shape[0], None, None
    if cu_seqlens_q is not None:
        if max_seqlen_q is None:
            raise ValueError("cu_seqlens_q is given without max_seqlen_q: it must say how long the longest sequence is")
        q, q_lens = padded_rows(q, cu_seqlens_q, max_seqlen_q, "cu_seqlens_q", "q"), cu_seqlens_q.diff()
    if cu_seqlens_k_new is not None and k is not None:
        new_lens = cu_seqlens_k_new.diff()
        longest = int(new_lens.max()) if new_lens.numel() else 0
        k, v = (padded_rows(x, cu_seqlens_k_new, longest, "cu_seqlens_k_new", name) for x, name in ((k, "k"), (v, "v")))
    out, lse = with_kvcache(
        q, k_cache, v_cache, k, v, cache_lens=cache_seqlens, new_lens=new_lens, q_lens=q_lens, batch_index=cache_batch_idx,
        left_pad=cache_leftpad, page_table=page_table, rotary=rotary_tables(rotary_cos, rotary_sin, rotary_seqlens),
        rotary_interleaved=rotary_interleaved, rotary_offsets=rotary_seqlens, causal=causal, window=window_size,
        chunk=attention_chunk or None, scale=softmax_scale, softcap=softcap or None,
    )  # fmt: skip
    if cu_seqlens_q is not None:
        out, lse = packed_again(out, cu_seqlens_q, total), packed_again(lse.transpose(1, 2), cu_seqlens_q, total).T
    return (out, lse, out.new_empty(0), out.new_empty(0)) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype=torch.bfloat16,
    headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0,
    causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    """None: what FlashAttention-3 precomputes here, flashgqa's plan makes in the call. Functions take scheduler_metadata=None."""
