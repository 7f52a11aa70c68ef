"""Rotary position embeddings, on any device, with gradients, under the names of flash_attn.layers.rotary.

Of x at position p, the pairs (a, b) of its first 2 r elements become (a cos - b sin, a sin + b cos), with cos and sin of row p
of the tables [positions, r]: elements n and n + r are a pair (GPT-NeoX), or 2 n and 2 n + 1 with ``interleaved`` (GPT-J).
Computed in float32 (float64 for float64) whatever the dtype of x. Su et al., "RoFormer" (arXiv:2104.09864).
"""

import torch
from torch import nn

from ._torch_packing import check_packed, split_qkv


def rotary_tables(cos, sin, seqlens=None):
    """(rotary_cos, rotary_sin) of flash_attn_with_kvcache, or None where it gets neither."""
    given = {"rotary_cos": cos, "rotary_sin": sin}
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == 2 and seqlens is None:
        return None
    if missing:
        there = "rotary_seqlens" if len(missing) == 2 else next(name for name in given if name not in missing)
        raise ValueError(f"{there} is given without {' and '.join(missing)}: rotary embeddings need both tables, cos and sin")
    return cos, sin


def _rows(positions, tables):
    """Rows of the tables at positions of any shape, [..., 1, r]: one axis more, for the heads."""
    count = tables[0].shape[0]
    if positions.device.type == "cpu":
        if not torch.compiler.is_compiling() and positions.numel() and not 0 <= positions.min() <= positions.max() < count:
            raise ValueError(
                f"positions reach from {positions.min()} to {positions.max()}: cos and sin hold those from 0 to {count - 1}; "
                "make them longer, or mind seqlen_offsets"
            )
    else:
        positions = positions.clamp(0, count - 1)  # an index out of range would take down the whole CUDA context
    return [table[positions].unsqueeze(-2) for table in tables]


def _at_positions(x, cos, sin, seqlen_offsets, cu_seqlens):
    """cos and sin for each token of x: [seq, 1, r], [batch, seq, 1, r] or [total, 1, r]."""
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos is {list(cos.shape)} and sin {list(sin.shape)}: both must be [positions, rotary_dim / 2], with rotary_dim at "
            f"most the head dim, {x.shape[-1]}"
        )
    if x.dim() != (4 if cu_seqlens is None else 3):
        shape = "[batch, seq, heads, head dim]" if cu_seqlens is None else "[total, heads, head dim] with cu_seqlens"
        raise ValueError(f"x is {list(x.shape)}: it must be {shape}")
    if cu_seqlens is not None:
        token = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp(max=cu_seqlens.shape[0] - 2)
        offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, torch.Tensor) else seqlen_offsets
        return _rows(token - cu_seqlens[sequence] + offset, (cos, sin))
    if isinstance(seqlen_offsets, torch.Tensor):
        if seqlen_offsets.shape != (x.shape[0],):
            raise ValueError(f"seqlen_offsets is {list(seqlen_offsets.shape)}: it must be an int, or [batch] = [{x.shape[0]}]")
        return _rows(seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device), (cos, sin))
    end = seqlen_offsets + x.shape[1]
    if seqlen_offsets < 0 or end > cos.shape[0]:
        raise ValueError(
            f"positions reach from {seqlen_offsets} to {end - 1}: cos and sin hold those from 0 to {cos.shape[0] - 1}; make them "
            "longer, or mind seqlen_offsets"
        )
    return [table[seqlen_offsets:end, None] for table in (cos, sin)]


def _turned(x, cos, sin, interleaved):
    """x with its first 2 r elements turned."""
    width, dtype = 2 * cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    head, cos, sin = x[..., :width].to(dtype), cos.to(dtype), sin.to(dtype)
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    head = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return head.to(x.dtype)


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    """x [batch, seq, heads, d], or [total, heads, d] with cu_seqlens int32 [batch + 1], turned by its positions.

    Parameters
    ----------
    cos, sin : torch.Tensor, [positions, r]
        2 r <= d; elements from 2 r on stay as they are.
    interleaved, inplace : bool
        Which elements are a pair; whether x itself is changed and returned.
    seqlen_offsets : int, or int tensor [batch]
        Position of the first token of each sequence.
    max_seqlen : int, optional
        Not needed.
    """
    head = _turned(x, *_at_positions(x, cos, sin, seqlen_offsets, cu_seqlens), interleaved)
    if inplace:
        x[..., : head.shape[-1]].copy_(head)
        return x
    return torch.cat((head, x[..., head.shape[-1] :]), -1) if head.shape[-1] < x.shape[-1] else head


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x, cos, sin, interleaved=False):
    """`apply_rotary_emb` from position 0 on; cos and sin may also be [batch, seq, r]."""
    head = _turned(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)
    return torch.cat((head, x[..., head.shape[-1] :]), -1)


def apply_rotary_emb_qkv_(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None):
    """Turns the queries and keys of qkv in place; returns it.

    qkv [batch, seq, 3, heads, d], or [batch, seq, hq + 2 hk, d] with num_heads_q = hq. cos_k and sin_k: other tables for keys.
    """
    q, k, _ = split_qkv(qkv, num_heads_q, to_write=True)
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(
        k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, True, seqlen_offsets
    )
    return qkv


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0):
    """Turns the keys of kv [batch, seq, 2, heads, d] in place; returns it."""
    check_packed(kv, 2, "kv")
    apply_rotary_emb(kv.select(-3, 0), cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin that grow with the positions asked for, and their application to packed q, k, v in place.

    Parameters
    ----------
    dim : int
        Elements of a head that are turned: 2 r.
    base : float
        Of position p and pair n the angle is p / base^(2 n / dim).
    interleaved : bool
        As in `apply_rotary_emb`.
    scale_base : float, optional
        xPos (arXiv:2212.10554): queries are scaled up with the position and keys down.
    """

    def __init__(self, dim, base=10000.0, interleaved=False, scale_base=None, device=None):
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def _compute_inv_freq(self, device=None):
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _compute_scale(self, device=None):
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return None if self.scale_base is None else (pairs + 0.4 * self.dim) / (1.4 * self.dim)

    def _apply(self, fn, recurse=True):
        """What to(), to_empty() and the like go through. Nothing else fills buffers that come from the meta device: no state dict
        has them.
        """
        was_meta = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.inv_freq.is_meta:
            device = self.inv_freq.device
            self.inv_freq, self.scale = self._compute_inv_freq(device), self._compute_scale(device)
        return self

    def _holds(self, seqlen, device, dtype):
        cos = self._cos_cached
        return cos is not None and seqlen <= self._seq_len_cached and cos.device == device and cos.dtype == dtype

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        """Makes the tables hold seqlen positions."""
        if self._holds(seqlen, device, dtype):
            return
        with torch.inference_mode(False):       # tables made there could not be part of training
            tables = self._make_tables(seqlen, device, dtype)
        self._seq_len_cached = seqlen
        self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached = tables

    def _tables(self, seqlen, device, dtype):
        """(cos, sin) of queries and of keys, of at least seqlen positions.

        A compiled call keeps none: what it computes may lie in the memory of a CUDA graph, which the next call writes.
        """
        if torch.compiler.is_compiling() and not self._holds(seqlen, device, dtype):
            cos, sin, cos_k, sin_k = self._make_tables(seqlen, device, dtype)
        else:
            self._update_cos_sin_cache(seqlen, device, dtype)
            cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        return (cos, sin), (cos, sin) if self.scale is None else (cos_k, sin_k)

    def _make_tables(self, seqlen, device, dtype):
        # In float32, whatever module.to(dtype) made of the buffers: narrow positions would be wrong by whole turns.
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(position, frequencies.to(position.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            return cos.to(dtype), sin.to(dtype), None, None
        power = (position - seqlen // 2) / self.scale_base
        scale = self.scale.to(position.device, torch.float32) ** power[:, None]
        return tuple(x.to(dtype) for x in (cos * scale, sin * scale, cos / scale, sin / scale))

    def forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None):
        """Turns in place and returns qkv, as in `apply_rotary_emb_qkv_`; or (q, kv), if qkv is q [batch, seq, heads, d] and kv
        [batch, seq, 2, heads, d] is given.

        seqlen_offset: int, or int tensor [batch]; with a tensor max_seqlen says how many positions the tables must hold.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        elif max_seqlen is None and self._cos_cached is None:
            raise ValueError("seqlen_offset is a tensor and there are no tables yet: give max_seqlen, how much they must hold")
        length = self._seq_len_cached if max_seqlen is None else max_seqlen
        (cos, sin), (cos_k, sin_k) = self._tables(length, qkv.device, qkv.dtype)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
