"""flash_attn.modules.mha under flashgqa.torch: MHA, FlashSelfAttention and FlashCrossAttention, with flash_attn's arguments,
shapes and parameter names. On any device; mask True means keep.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..._torch_attention import attention, bounds
from ..._torch_flash_attn import flash_attn_with_kvcache
from ..._torch_modules import alibi_slopes as _alibi_slopes
from ..._torch_modules import check_input, fill_slopes
from ..._torch_packing import unbound
from ..._torch_rotary import RotaryEmbedding

__all__ = [
    "FlashCrossAttention",
    "FlashSelfAttention",
    "MHA",
    "get_alibi_slopes",
]


def get_alibi_slopes(nheads):
    """The slopes of ALiBi as a list."""
    return _alibi_slopes(nheads).tolist()


def _attend(module, q, k, v, causal, lengths, key_padding_mask):
    slopes = module.alibi_slopes
    return attention(
        q, k, v,
        causal=module.causal if causal is None else causal,
        window=bounds(module.window_size),
        scale=module.softmax_scale,
        alibi_slopes=None if slopes is None else slopes.float(),
        mask=None if key_padding_mask is None else key_padding_mask[:, None, None].bool(),
        dropout_p=module.drop.p if module.training else 0.0,
        deterministic=module.deterministic,
        **(lengths or {"layout": "bshd"}),
    )  # fmt: skip


class FlashSelfAttention(nn.Module):
    """Attention of qkv [batch, seq, 3, heads, d], or [total, 3, heads, d] with cu_seqlens and max_seqlen; out without the 3."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), alibi_slopes=None,
        deterministic=False,
    ):  # fmt: skip
        super().__init__()
        self.causal, self.softmax_scale, self.drop = causal, softmax_scale, nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None, key_padding_mask=None):
        lengths = cu_seqlens is not None and dict(
            cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_q=max_seqlen, max_kv=max_seqlen
        )
        return _attend(self, *unbound(qkv, 3, "qkv"), causal, lengths, key_padding_mask)


class FlashCrossAttention(nn.Module):
    """Attention of q [batch, sq, heads, d] to kv [batch, sk, 2, KV heads, d], or of [total, ...] with cu_seqlens and so on."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1, -1),
        deterministic=False,
    ):  # fmt: skip
        super().__init__()
        self.causal, self.softmax_scale, self.drop = causal, softmax_scale, nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def forward(
        self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, max_seqlen_k=None, key_padding_mask=None
    ):
        lengths = cu_seqlens is not None and dict(
            cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens_k, max_q=max_seqlen, max_kv=max_seqlen_k
        )
        return _attend(self, q, *unbound(kv, 2, "kv"), causal, lengths, key_padding_mask)


class MHA(nn.Module):
    """flash_attn's MHA: its arguments, its parameters (Wqkv, or Wq and Wkv with cross_attn; out_proj), its forward.

    use_flash_attn and fused_bias_fc choose between implementations there, and change nothing here: window, ALiBi, cu_seqlens and
    key_padding_mask go with all. layer_idx is needed for inference_params.
    """

    def __init__(
        self, embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True, dropout=0.0,
        softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0, rotary_emb_base=10000.0,
        rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1), fused_bias_fc=False,
        use_flash_attn=False, return_residual=False, checkpointing=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads < 1 or num_heads_kv < 1 or num_heads % num_heads_kv != 0 or embed_dim % num_heads != 0:
            raise ValueError(
                f"embed_dim is {embed_dim}, num_heads {num_heads} and num_heads_kv {num_heads_kv}: each must be a multiple of "
                "the next"
            )
        if rotary_emb_dim > 0 and cross_attn:
            raise ValueError("rotary_emb_dim and cross_attn are given: rotary embeddings are for attention of x to itself")
        self.embed_dim, self.num_heads, self.num_heads_kv, self.head_dim = (
            embed_dim, num_heads, num_heads_kv, embed_dim // num_heads,
        )  # fmt: skip
        self.cross_attn, self.causal, self.layer_idx, self.dwconv = cross_attn, causal, layer_idx, dwconv
        self.rotary_emb_dim, self.use_flash_attn = rotary_emb_dim, use_flash_attn
        self.return_residual, self.checkpointing = return_residual, checkpointing
        options = dict(device=device, dtype=dtype)
        kv_dim = 2 * self.head_dim * num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **options)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **options)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **options)
        if dwconv:
            self._make_convolutions(embed_dim, kv_dim, options)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        inner = dict(
            causal=causal, softmax_scale=softmax_scale, attention_dropout=dropout, window_size=window_size,
            alibi_slopes=_alibi_slopes(num_heads, device) if use_alibi else None,
        )  # fmt: skip
        self.inner_attn, self.inner_cross_attn = FlashSelfAttention(**inner), FlashCrossAttention(**inner)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **options)

    def _apply(self, fn, recurse=True):
        inner = (self.inner_attn, self.inner_cross_attn)
        fill_slopes(inner, self.num_heads, lambda: super(MHA, self)._apply(fn, recurse))
        return self

    def _make_convolutions(self, embed_dim, kv_dim, options):
        names = {"dwconv_q": embed_dim, "dwconv_kv": kv_dim}
        if self.num_heads == self.num_heads_kv and not self.cross_attn:
            names = {"dwconv_qkv": embed_dim + kv_dim}
        for name, width in names.items():
            setattr(self, name, nn.Conv1d(width, width, kernel_size=3, padding=2, groups=width, **options))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        """kv [batch, max_seqlen, 2, KV heads, d] for inference_params.key_value_memory_dict[layer_idx]."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device)

    def _project(self, x, x_kv, mixer_subset):
        """q [..., heads, d] and kv [..., 2, KV heads, d]."""
        if self.cross_attn:
            q, kv = self.Wq(x if mixer_subset is None else x[:, mixer_subset]), self.Wkv(x if x_kv is None else x_kv)
        elif x_kv is not None or mixer_subset is not None:
            raise ValueError("x_kv or mixer_subset is given: they are for cross_attn=True")
        else:
            qkv = self.Wqkv(x)
            if self.dwconv and self.num_heads == self.num_heads_kv:
                qkv = _convolved(self.dwconv_qkv, qkv)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        if self.dwconv and hasattr(self, "dwconv_q"):
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
        return q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, (2, -1, self.head_dim))

    def _cached(self, kv, inference_params):
        """kv at its place in the cache of this layer: all keys and values from the first position on."""
        if self.layer_idx is None:
            raise ValueError("inference_params is given: the layer needs layer_idx, its key in key_value_memory_dict")
        memory, start = inference_params.key_value_memory_dict, inference_params.seqlen_offset
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen, kv.dtype
            )
        first, end, cache = inference_params.batch_size_offset, start + kv.shape[1], memory[self.layer_idx]
        if first + kv.shape[0] > cache.shape[0] or end > cache.shape[1]:
            raise ValueError(
                f"inference_params: the cache is {list(cache.shape)}, and batch {first} to {first + kv.shape[0]} at positions "
                f"{start} to {end} does not fit; raise max_batch_size or max_seqlen"
            )
        cache[first : first + kv.shape[0], start:end] = kv
        return cache[first : first + kv.shape[0], :end]

    def _step(self, q, kv, inference_params):
        """Attention of q to the cache of this layer, with kv added to each sequence at its own length."""
        if self.layer_idx not in inference_params.key_value_memory_dict:
            raise ValueError("inference_params.seqlen_offset is not 0 and its key_value_memory_dict has no cache of this layer")
        first, inner = inference_params.batch_size_offset, self.inner_cross_attn
        rows = slice(first, first + q.shape[0])
        cache, lengths = inference_params.key_value_memory_dict[self.layer_idx][rows], inference_params.lengths_per_sample[rows]
        if not cache.shape[0] == lengths.shape[0] == q.shape[0]:
            raise ValueError(
                f"inference_params: batch {first} to {first + q.shape[0]} is not in a cache and lengths_per_sample of "
                f"{cache.shape[0]} and {lengths.shape[0]} rows from there on; raise max_batch_size"
            )
        rotary = {}
        if self.rotary_emb_dim > 0:
            if self.rotary_emb.scale is not None:
                raise NotImplementedError("rotary_emb_scale_base is given: sequences of different lengths have no xPos")
            (cos, sin), _ = self.rotary_emb._tables(inference_params.max_seqlen, q.device, q.dtype)
            rotary = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=self.rotary_emb.interleaved)
        slopes = inner.alibi_slopes
        return flash_attn_with_kvcache(
            q, *cache.unbind(2), *kv.unbind(2), cache_seqlens=lengths.int(),
            softmax_scale=inner.softmax_scale, causal=inner.causal, window_size=inner.window_size,
            alibi_slopes=None if slopes is None else slopes.float(), **rotary,
        )  # fmt: skip

    def forward(
        self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, mixer_subset=None, inference_params=None,
        **kwargs,
    ):  # fmt: skip
        """x [batch, seq, embed_dim], or [total, embed_dim] with cu_seqlens int32 [batch + 1] and max_seqlen; out as x, or
        (out, x) with return_residual.

        key_padding_mask [batch, seq]: True for a token. mixer_subset: rows of x that ask, with cross_attn.
        inference_params: an object with max_seqlen, max_batch_size, seqlen_offset, batch_size_offset, key_value_memory_dict and
        lengths_per_sample (or None), as flash_attn.utils.generation has it; keys and values of x go to positions seqlen_offset
        on, or after the first call, where seqlen_offset is 0, to lengths_per_sample [batch] on; in rows batch_size_offset on of
        the cache and of lengths_per_sample.
        """
        if cu_seqlens is not None and (key_padding_mask is not None or self.dwconv or self.rotary_emb_dim > 0):
            raise ValueError("cu_seqlens is given: key_padding_mask, dwconv and rotary embeddings do not go with it")
        if inference_params is not None:
            if key_padding_mask is not None or cu_seqlens is not None or self.dwconv:
                raise ValueError("inference_params is given: key_padding_mask, cu_seqlens and dwconv do not go with it")
        check_input(self.embed_dim, cu_seqlens is not None, x=x, x_kv=x_kv)
        q, kv = self._project(x, x_kv, mixer_subset)
        params = inference_params
        if params is not None and params.lengths_per_sample is not None and params.seqlen_offset > 0:
            context = self._step(q, kv, inference_params)
            out = self.out_proj(context.flatten(-2))
            return (out, x) if self.return_residual else out
        if self.rotary_emb_dim > 0:
            start, most = (0, None) if inference_params is None else (inference_params.seqlen_offset, inference_params.max_seqlen)
            q, kv = self.rotary_emb(q, kv, seqlen_offset=start, max_seqlen=most)
        if cu_seqlens is not None:
            kwargs.update(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            kwargs.setdefault("cu_seqlens_k", cu_seqlens)
            kwargs.setdefault("max_seqlen_k", max_seqlen)
        if inference_params is not None:
            kv = self._cached(kv, inference_params)
        inner = self.inner_cross_attn
        if self.checkpointing and inference_params is None:
            context = checkpoint(inner, q, kv, key_padding_mask=key_padding_mask, use_reentrant=False, **kwargs)
        else:
            context = inner(q, kv, key_padding_mask=key_padding_mask, **kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out


def _convolved(convolution, x):
    """A convolution over the last three tokens of x [batch, seq, width]."""
    return convolution(x.mT)[..., :-2].mT
