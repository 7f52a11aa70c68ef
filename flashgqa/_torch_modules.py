"""Layers over `attention`: FlashGQA, and FlashMHA with the arguments of flash_attn's MHA."""

import copy
import math

import torch
from torch import nn

from . import _heads
from ._torch_attention import attention, attention_matrix, bounds
from ._torch_rotary import RotaryEmbedding, apply_rotary_emb
from .kvcache import KVCache


def alibi_slopes(num_heads, device=None):
    """Slopes of ALiBi, float32 [num_heads]: 2^(-8 n / N) for n = 1 .. N; with N no power of 2, those of the power below it, then
    every other one of twice that power. Press et al., "Train Short, Test Long" (arXiv:2108.12409).
    """

    def geometric(count):
        return [2.0 ** (-8.0 * n / count) for n in range(1, count + 1)]

    below = 2 ** int(math.log2(num_heads))
    return torch.tensor(geometric(below) + geometric(2 * below)[::2][: num_heads - below], device=device)


def fill_slopes(layers, num_heads, apply):
    """Calls apply, a Module._apply, and fills the slopes of layers if that brought them from the meta device: no state dict has
    them.
    """
    was_meta = [layer.alibi_slopes is not None and layer.alibi_slopes.is_meta for layer in layers]
    apply()
    for layer, empty in zip(layers, was_meta, strict=True):
        if empty and not layer.alibi_slopes.is_meta:
            layer.alibi_slopes = alibi_slopes(num_heads, layer.alibi_slopes.device)


class LayerCache:
    """Keys and values of one layer, k and v [batch, max_length, num_kv_heads, head_dim], of which the first ``length`` are used.

    Made by ``layer.new_cache(batch, max_length)``; ``reset()`` empties it.
    """

    def __init__(self, k, v):
        self.k, self.v, self.length = k, v, 0

    def reset(self):
        self.length = 0

    def put(self, k, v):
        """Puts k and v [batch, n, num_kv_heads, head_dim] behind what is there; views of all that is there then. They count once
        ``length`` says so, which a call that fails does not do.
        """
        batch, capacity = self.k.shape[:2]
        end = self.length + k.shape[1]
        if k.shape[0] != batch or end > capacity:
            raise ValueError(
                f"cache holds {self.length} of {capacity} positions for a batch of {batch}, and {k.shape[1]} are to be added for "
                f"a batch of {k.shape[0]}: make a larger one with new_cache(batch, max_length), or reset() it"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("a cache is for inference: call the layer under torch.no_grad() or torch.inference_mode()")
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        return self.k[:, :end], self.v[:, :end]


def check_input(embed_dim, packed, **inputs):
    """Of a layer: that no sequences are joined without cu_seqlens, which would attend to each other in silence."""
    for name, x in inputs.items():
        if x is not None and not isinstance(x, torch.Tensor) or x is None and name == "x":
            raise TypeError(f"{name} is {type(x).__name__}: it must be a torch.Tensor")
        if x is not None and (x.dim() != (2 if packed else 3) or x.shape[-1] != embed_dim):
            raise ValueError(
                f"{name} is {list(x.shape)}: it must be [batch, seq, embed_dim] with embed_dim {embed_dim}, or "
                "[total, embed_dim] with cu_seqlens"
            )


class FlashGQA(nn.Module):
    """Multi-head attention with fewer KV heads, over x [batch, seq, embed_dim]; out as x.

    Linear layers W_q, W_k, W_v make the heads and W_o joins them. Its state dict also loads from that of
    torch.nn.MultiheadAttention (in_proj_weight, out_proj) and of flash_attn's MHA (Wqkv, out_proj).

    Parameters
    ----------
    embed_dim, num_heads : int
        Width, and query heads.
    num_kv_heads : int, optional
        A divisor of num_heads; default num_heads (MHA). 1 is MQA.
    head_dim : int, optional
        Default embed_dim / num_heads.
    causal, window, softcap, scale
        As in `attention`.
    dropout : float
        Probability with which a weight is dropped, in training only.
    rotary_dim : int
        Elements of each head that rotary embeddings turn; 0 for none. rotary_base, rotary_interleaved: as in
        `flashgqa.torch.layers.rotary`; rotary_scale_base: xPos.
    alibi : bool
        The slopes of `alibi_slopes` in every head.
    bias, out_bias : bool
        Whether W_q, W_k, W_v have a bias, and W_o; out_bias as bias by default.

    Raises
    ------
    ValueError
        Widths and heads that do not divide, a rotary_dim that is odd or beyond the head dim, dropout that is no probability.

    Notes
    -----
    Ainslie et al., "GQA" (arXiv:2305.13245); Shazeer, "Fast Transformer Decoding" (MQA, arXiv:1911.02150).
    """

    def __init__(
        self, embed_dim, num_heads, num_kv_heads=None, *, head_dim=None, causal=False, window=None, dropout=0.0, scale=None,
        softcap=None, rotary_dim=0, rotary_base=10000.0, rotary_interleaved=False, rotary_scale_base=None, alibi=False,
        bias=True, out_bias=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and embed_dim % num_heads != 0):
            raise ValueError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}: embed_dim must be a multiple of num_heads, or give head_dim"
            )
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}: num_heads must be a multiple of it")
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}: it must be 1 or more")
        if rotary_dim % 2 != 0 or not 0 <= rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim is {rotary_dim}: it must be even and at most the head dim, {head_dim}; 0 is none")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}: it must be a probability, from 0 to 1")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.causal, self.window, self.dropout_p, self.scale, self.softcap = causal, window, dropout, scale, softcap
        self.rotary_dim = rotary_dim
        self.rotary = None
        if rotary_dim:
            self.rotary = RotaryEmbedding(rotary_dim, rotary_base, rotary_interleaved, rotary_scale_base, device)
        self.register_buffer("alibi_slopes", alibi_slopes(num_heads, device) if alibi else None, persistent=False)
        options = dict(device=device, dtype=dtype)
        out_bias = bias if out_bias is None else out_bias
        self.W_q = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **options)
        self.W_k = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **options)
        self.W_v = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **options)
        self.W_o = nn.Linear(num_heads * head_dim, embed_dim, bias=out_bias, **options)
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def _apply(self, fn, recurse=True):
        fill_slopes([self], self.num_heads, lambda: super(FlashGQA, self)._apply(fn, recurse))
        return self

    def new_cache(self, batch, max_length, *, dtype=None):
        """Room for the keys and values of max_length positions; dtype as W_k's by default."""
        weight = self.W_k.weight
        shape = (batch, max_length, self.num_kv_heads, self.head_dim)
        return LayerCache(*(torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device) for _ in range(2)))

    def forward(
        self, x, x_kv=None, *, key_padding_mask=None, mask=None, cu_seqlens=None, max_seqlen=None, cache=None, need_weights=False
    ):
        """Attention of x to itself, or to x_kv.

        Parameters
        ----------
        x : torch.Tensor, [batch, seq, embed_dim]
            Or [total, embed_dim] with cu_seqlens.
        x_kv : torch.Tensor, [batch, seq_kv, embed_dim], optional
            What keys and values are made of; default x.
        key_padding_mask : bool tensor, [batch, keys], optional
            True: a token (flash_attn's meaning, the opposite of torch.nn.MultiheadAttention's). With a cache, keys are all that
            it holds after the call.
        mask : bool tensor, broadcast to [batch, num_heads, seq, keys], optional
            True: may attend.
        cu_seqlens : int32 tensor, [sequences + 1], optional
            Offsets of the sequences that x joins; max_seqlen: an upper bound of their lengths.
        cache : LayerCache or flashgqa.KVCache, optional
            Keys and values of x go behind those it holds, and x attends to all of them. For inference. A KVCache is paged, its
            sequences may differ in length, and it takes no masks; it must be made with layout="bshd".
        need_weights : bool
            Also return the weights, without dropout, float, [batch, num_heads, seq, keys]: O(seq * keys) memory.

        Returns
        -------
        out : torch.Tensor, as x; with need_weights (out, weights)

        Raises
        ------
        ValueError
            Arguments that do not go together, masks of other shapes, a cache that is full or of another layout.
        RuntimeError
            A cache while gradients are recorded.
        """
        if cu_seqlens is not None and any(y is not None for y in (x_kv, key_padding_mask, mask, cache)):
            raise ValueError("cu_seqlens is given: x_kv, key_padding_mask, mask and cache do not go with it")
        if cache is not None and x_kv is not None:
            raise ValueError("cache and x_kv are given: a cache is for attention of x to itself")
        if need_weights and cu_seqlens is not None:
            raise ValueError("need_weights and cu_seqlens are given: weights are for padded sequences")
        check_input(self.embed_dim, cu_seqlens is not None, x=x, x_kv=x_kv)
        q, k, v = self._heads(x, x if x_kv is None else x_kv)
        if self.rotary is not None:
            if x_kv is not None:
                raise ValueError("x_kv is given: rotary embeddings are for attention of x to itself; use rotary_dim=0")
            q, k = self._turn(q, k, cu_seqlens, cache)
        if isinstance(cache, KVCache):
            if need_weights or mask is not None or key_padding_mask is not None:
                raise ValueError("cache is a KVCache: need_weights, mask and key_padding_mask do not go with it")
            return self._joined(self._paged(q, k, v, cache).flatten(-2))
        if cache is not None:
            k, v = cache.put(k, v)
        if key_padding_mask is not None:
            mask = _join(key_padding_mask, mask, k)
        options = self._options() | dict(mask=mask)
        if cu_seqlens is None:
            options["layout"] = "bshd"
        else:
            options.update(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_q=max_seqlen, max_kv=max_seqlen)
        dropout_p = self.dropout_p if self.training else 0.0
        out = self._joined(attention(q, k, v, dropout_p=dropout_p, **options).flatten(-2))
        if need_weights:
            out = out, attention_matrix(q, k, lambda unit: attention(q, k, unit, **options))
        if cache is not None:
            cache.length = k.shape[1]
        return out

    def _options(self):
        slopes = None if self.alibi_slopes is None else self.alibi_slopes.float()   # narrow after module.half()
        return dict(causal=self.causal, window=self.window, scale=self.scale, softcap=self.softcap, alibi_slopes=slopes)

    def _heads(self, x, x_kv):
        """Queries of x, keys and values of x_kv, [..., heads, head_dim]."""
        pairs = ((self.W_q, x), (self.W_k, x_kv), (self.W_v, x_kv))
        return [layer(y).unflatten(-1, (-1, self.head_dim)) for layer, y in pairs]

    def _paged(self, q, k, v, cache):
        if cache.layout != "bshd":
            raise ValueError(f'cache has layout {cache.layout!r}: a layer needs KVCache(..., layout="bshd")')
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            raise RuntimeError("a cache is for inference: call the layer under torch.no_grad() or torch.inference_mode()")
        return cache.attention(q, k, v, **self._options())

    def _joined(self, heads):
        return self.W_o(heads)

    def _turn(self, q, k, cu_seqlens, cache):
        rotary, start = self.rotary, 0
        length = q.shape[0] if cu_seqlens is not None else q.shape[1]
        if isinstance(cache, KVCache):
            start, length = torch.from_numpy(cache.lens).to(q.device), cache.capacity
        elif cache is not None:
            start, length = cache.length, max(cache.length + length, cache.k.shape[1])
        tables, tables_k = rotary._tables(length, q.device, torch.promote_types(q.dtype, torch.float32))
        options = dict(interleaved=rotary.interleaved, seqlen_offsets=start, cu_seqlens=cu_seqlens)
        return apply_rotary_emb(q, *tables, **options), apply_rotary_emb(k, *tables_k, **options)

    def extra_repr(self):
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, causal={self.causal}, "
            f"window={self.window}, dropout_p={self.dropout_p}"
        )

    @classmethod
    def from_multihead_attention(cls, source, num_kv_heads=None, **options):
        """The layer that computes what a torch.nn.MultiheadAttention does, with its weights; options as of the constructor.

        num_kv_heads fewer than its heads: keys and values are mean-pooled, see `mean_pool_kv_heads`. The layer takes
        [batch, seq, embed_dim] whatever source.batch_first says, and its key_padding_mask is True where there is a token.
        """
        if not isinstance(source, nn.MultiheadAttention):
            raise TypeError(f"source is {type(source).__name__}: it must be a torch.nn.MultiheadAttention")
        if source.bias_k is not None or source.add_zero_attn or not source._qkv_same_embed_dim:
            raise NotImplementedError(
                "from_multihead_attention: source has add_bias_kv, add_zero_attn, kdim or vdim, which have no counterpart here"
            )
        weight = source.out_proj.weight
        layer = cls(source.embed_dim, source.num_heads, **{
            "dropout" if cls is FlashGQA else "dropout_p": source.dropout, "bias": source.in_proj_bias is not None,
            "device": weight.device, "dtype": weight.dtype, **options,
        })  # fmt: skip
        layer.load_state_dict(source.state_dict())
        layer.train(source.training)
        return layer if num_kv_heads is None else pooled_layer(layer, num_kv_heads)

    def to_multihead_attention(self):
        """torch.nn.MultiheadAttention (batch_first) with the weights of this layer; causal and window are up to its caller."""
        grouped = self.num_kv_heads != self.num_heads or self.head_dim * self.num_heads != self.embed_dim
        biased, weight = self.W_q.bias is not None, self.W_o.weight
        more = (self.rotary, self.scale, self.softcap, self.alibi_slopes)
        if grouped or any(x is not None for x in more) or biased != (self.W_o.bias is not None):
            raise NotImplementedError(
                "to_multihead_attention: torch.nn.MultiheadAttention has as many KV heads as query heads, head_dim = embed_dim / "
                "num_heads, a bias everywhere or nowhere, and neither rotary embeddings, ALiBi, softcap nor scale"
            )
        layer = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout_p, biased, batch_first=True, device=weight.device, dtype=weight.dtype
        )
        state = self.state_dict()
        kinds = ("weight", "bias") if biased else ("weight",)
        state = {f"in_proj_{kind}": torch.cat([state[f"W_{n}.{kind}"] for n in "qkv"]) for kind in kinds} | {
            f"out_proj.{kind}": state[f"W_o.{kind}"] for kind in kinds
        }
        layer.load_state_dict(state)
        return layer.train(self.training)


def _join(key_padding_mask, mask, k):
    if key_padding_mask.dim() != 2 or key_padding_mask.shape[1] != k.shape[1] or key_padding_mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask is {key_padding_mask.dtype} {list(key_padding_mask.shape)}: it must be bool, [batch, keys] = "
            f"{list(k.shape[:2])}"
        )
    padding = key_padding_mask[:, None, None]
    return padding if mask is None else padding & mask


def _rename_loaded(module, state_dict, prefix, *_):
    """Entries of torch.nn.MultiheadAttention and of flash_attn's MHA under the names of this layer."""
    rows = [module.num_heads * module.head_dim, *[module.num_kv_heads * module.head_dim] * 2]
    for kind in ("weight", "bias"):
        for fused in (f"in_proj_{kind}", f"Wqkv.{kind}"):
            x = state_dict.get(prefix + fused)
            if x is not None and x.shape[0] == sum(rows):
                del state_dict[prefix + fused]
                state_dict.update(zip((f"{prefix}W_{n}.{kind}" for n in "qkv"), x.split(rows), strict=True))
        for own, theirs in (("W_o", "out_proj"), ("W_q", "Wq")):
            if f"{prefix}{theirs}.{kind}" in state_dict:
                state_dict[f"{prefix}{own}.{kind}"] = state_dict.pop(f"{prefix}{theirs}.{kind}")
        x = state_dict.get(f"{prefix}Wkv.{kind}")
        if x is not None and x.shape[0] == 2 * rows[1]:
            del state_dict[f"{prefix}Wkv.{kind}"]
            state_dict.update(zip((f"{prefix}W_{n}.{kind}" for n in "kv"), x.chunk(2), strict=True))


class FlashMHA(FlashGQA):
    """Self-attention over x [batch, seq, d_model], with linear layers W_q, W_k, W_v and W_o around it; out as x.

    `FlashGQA` by the names of flash_attn: its MHA's keyword arguments are taken too. What they have in common with the
    arguments named here is the same thing: embed_dim is d_model, num_heads_kv num_kv_heads, dropout dropout_p, window_size
    (with -1) window, qkv_proj_bias bias, softmax_scale scale, use_alibi alibi. For flash_attn's own parameter names and
    positional arguments see `flashgqa.torch.modules.mha.MHA`.

    Parameters
    ----------
    d_model, num_heads : int
        Width, and query heads of d_model / num_heads each.
    num_kv_heads : int, optional
        A divisor of num_heads; default num_heads (MHA). 1 is MQA.
    causal, window
        As in `attention`.
    dropout_p : float
        Probability with which a weight is dropped, in training only.
    bias : bool
        Whether the four linear layers have one.
    flash_attn
        Any of num_heads_kv, qkv_proj_bias, out_proj_bias, dropout, softmax_scale, rotary_emb_dim, rotary_emb_base,
        rotary_emb_scale_base, rotary_emb_interleaved, use_alibi, window_size. use_flash_attn, fused_bias_fc and layer_idx
        change nothing; cross_attn, dwconv, return_residual and checkpointing must be False here.
    """

    NAMES = {
        "embed_dim": "d_model", "num_heads_kv": "num_kv_heads", "qkv_proj_bias": "bias", "out_proj_bias": "out_bias",
        "dropout": "dropout_p", "softmax_scale": "scale", "rotary_emb_dim": "rotary_dim", "rotary_emb_base": "rotary_base",
        "rotary_emb_scale_base": "rotary_scale_base", "rotary_emb_interleaved": "rotary_interleaved", "use_alibi": "alibi",
        "window_size": "window",
    }  # fmt: skip

    def __init__(
        self, d_model=None, num_heads=None, *, num_kv_heads=None, causal=False, window=None, dropout_p=0.0, bias=True,
        device=None, dtype=None, **flash_attn,
    ):  # fmt: skip
        options = dict(d_model=d_model, num_kv_heads=num_kv_heads, window=window, dropout_p=dropout_p, bias=bias)
        usual = dict(d_model=None, num_kv_heads=None, window=None, dropout_p=0.0, bias=True)
        given = {name: name for name, value in options.items() if value != usual[name]}
        own = {"head_dim", "scale", "softcap", "rotary_dim", "rotary_base", "rotary_interleaved", "alibi", "out_bias"}
        for name, value in flash_attn.items():
            if name in ("use_flash_attn", "fused_bias_fc", "layer_idx"):
                continue
            if name in ("cross_attn", "dwconv", "return_residual", "checkpointing"):
                if value:
                    raise NotImplementedError(
                        f"{name} is {value!r}: FlashMHA has none; use flashgqa.torch.modules.mha.MHA, or x_kv of its forward, or "
                        "torch.utils.checkpoint around the layer"
                    )
                continue
            if name not in self.NAMES and name not in own:
                known = ", ".join(sorted({*self.NAMES, *own}))
                raise TypeError(f"FlashMHA got an unknown argument {name!r}: beside those of its signature it takes {known}")
            if name == "window_size":
                value = bounds(value)
                value = None if value == (None, None) else value
            target = self.NAMES.get(name, name)
            if target in given:
                raise TypeError(f"FlashMHA got {given[target]} and {name}, which are the same: give one of them")
            given[target], options[target] = name, value
        d_model, dropout = options.pop("d_model"), options.pop("dropout_p")
        if d_model is None or num_heads is None:
            raise TypeError("FlashMHA needs d_model (or embed_dim) and num_heads")
        if num_heads < 1 or d_model % num_heads != 0 and "head_dim" not in options:
            raise ValueError(f"d_model is {d_model} and num_heads {num_heads}: d_model must be a multiple of num_heads")
        super().__init__(d_model, num_heads, dropout=dropout, causal=causal, device=device, dtype=dtype, **options)

    @property
    def d_model(self):
        return self.embed_dim

    def extra_repr(self):
        return super().extra_repr().replace("embed_dim", "d_model")


def pooled_layer(source, num_kv_heads):
    """A copy of a FlashGQA with mean-pooled W_k and W_v."""
    heads = source.num_kv_heads
    _heads.check_division(heads, num_kv_heads)
    layer = copy.deepcopy(source)
    layer.num_kv_heads = num_kv_heads
    with torch.no_grad():
        for linear in (layer.W_k, layer.W_v):
            linear.out_features = num_kv_heads * layer.head_dim
            for name, x in linear.named_parameters():
                pooled = _heads.mean_pool_kv_heads(x.unflatten(0, (heads, -1)), num_kv_heads, axis=0).flatten(0, 1)
                setattr(linear, name, nn.Parameter(pooled, requires_grad=x.requires_grad))
    return layer


def mean_pool_kv_heads(source, num_kv_heads, *, axis=1):
    """`flashgqa.mean_pool_kv_heads` that takes layers and models of PyTorch, too.

    Parameters
    ----------
    source : array, torch.Tensor or torch.nn.Module
        Keys, values or weights with their heads along ``axis``; a linear layer's weight is ``weight.unflatten(0, (heads, -1))``
        with axis 0. A FlashGQA or FlashMHA gives a new one of pooled W_k and W_v, torch.nn.MultiheadAttention the FlashGQA of
        its weights, pooled; any other module a copy in which all layers of the first kinds are pooled.
    num_kv_heads : int
        A divisor of the number of heads there are.
    axis : int
        That of the heads; for arrays and tensors only.

    Returns
    -------
    array, torch.Tensor or torch.nn.Module
        Of source's kind, with num_kv_heads heads; source stays as it is.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        Nothing that has KV heads; num_kv_heads that does not divide them; what `FlashGQA.from_multihead_attention` refuses.

    Notes
    -----
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (arXiv:2305.13245).
    """
    if not isinstance(source, nn.Module):
        return _heads.mean_pool_kv_heads(source, num_kv_heads, axis=axis)
    if isinstance(source, nn.MultiheadAttention):
        return FlashGQA.from_multihead_attention(source, num_kv_heads)
    if isinstance(source, FlashGQA):
        return pooled_layer(source, num_kv_heads)
    model, found = copy.deepcopy(source), False
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FlashGQA):
                setattr(parent, name, pooled_layer(child, num_kv_heads))
                found = True
    if not found:
        raise TypeError(
            f"source is {type(source).__name__} and holds no FlashGQA or FlashMHA: pool each torch.nn.MultiheadAttention by "
            "itself, or the weights of other layers as tensors"
        )
    return model
