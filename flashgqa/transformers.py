"""flashgqa in Hugging Face transformers: ``attn_implementation="fgqa"``.

    import flashgqa.transformers
    flashgqa.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fgqa")      # or model.set_attn_implementation("fgqa")

It serves every model that asks transformers' AttentionInterface for its attention: forward, training and `generate`, with
grouped heads (never repeated in memory), causal masks, sliding windows, chunks, padding on either side, packed sequences,
softcap, sinks, dropout, dynamic and static caches, torch.compile, cross attention, encoders and rows that choose their keys.
Tested with transformers 4.57, 5.5, 5.17 and 5.24.

- Masks stay intervals and lengths (`flashgqa._transformers_masks`); only one that is something else is a [b, 1, sq, sk] bool
  tensor, as it is for transformers' own "sdpa". A padding token's row that sees no key gives 0; in "eager" it gives the mean
  of all values. What a model makes of it differs at padding tokens only, the last of which, where padding is on the left,
  predicts a sequence's first token: a loss that counts that label differs, too.
- ``output_attentions=True`` given to a call returns the weights, and they have gradients. Of a config transformers refuses it;
  of transformers 4, models that keep the argument to themselves (GPT-2) give None.
- Compiled training without an attention_mask has a dense mask: transformers then assumes packed sequences.
- `head_mask`, continuous batching, a sink of each row (Inkling 2) and a choice of blocks of keys (MiniMax M3) are
  NotImplementedError, and so are models that compute their attention themselves instead of asking for it, as BLOOM, MPT and XGLM
  do, or add keys that their mask does not know of, as DeepSeek V4 does.
"""

import torch

from ._torch_attention import attention, attention_matrix, draw_seed
from ._transformers_masks import BoolMask, IntervalMask, create

__all__ = ["IntervalMask", "attention_forward", "register"]

# Of an argument that changes the result and has no option here, in whatever version of transformers passes it.
_UNSERVED = {
    "head_mask": "a mask of heads",
    "read_index": "the paged cache of continuous batching",
    "sinks": "a sink of each row",
    "block_indices": "a choice of blocks of keys",
}


def register(name="fgqa"):
    """Makes flashgqa known to transformers as ``attn_implementation=name``. To be called once in a process.

    Parameters
    ----------
    name : str
        Anything without "flash" in it, which transformers 5 takes for a request of its own FlashAttention.

    Returns
    -------
    str
        name.

    Raises
    ------
    ValueError
        A name that transformers takes for another's.

    Notes
    -----
    It goes through `transformers.AttentionInterface` and `transformers.AttentionMaskInterface`, and changes nothing else.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if "flash" in name or "|" in name or "/" in name:
        raise ValueError(
            f'name is {name!r}: transformers takes "flash", "|" and "/" in names for its own and for those of the Hub; use "fgqa"'
        )
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, create)
    return name


def _weights_wanted(output_attentions):
    """Whether the call wants weights: by its argument or, of models that keep it to themselves, by what transformers records."""
    if output_attentions or torch.compiler.is_compiling():
        return bool(output_attentions)
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:     # transformers 4
        return False
    recorded = _active_collector.get() or ()
    return any("attentions" in name for name in recorded)


def _mask_options(mask, is_causal, q_length, k_length):
    """The options of `attention` for what a model passes as attention_mask."""
    if isinstance(mask, IntervalMask):
        if mask.shape[2:] != (q_length, k_length):
            raise NotImplementedError(
                f"attention_mask is made for {mask.shape[2]} rows and {mask.shape[3]} keys, and there are {q_length} and "
                f'{k_length}: the model adds keys of its own, which attn_implementation="fgqa" cannot serve; use "eager"'
            )
        return dict(mask.options)
    if mask is None:        # one row is the last one of a cache, as for "sdpa"
        return dict(causal=True, align="top-left") if is_causal and q_length > 1 else {}
    if isinstance(mask, BoolMask):
        mask = mask.as_subclass(torch.Tensor)
    if mask.dim() != 4:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}: it must be [b, heads or 1, sq, sk]")
    return dict(mask=mask) if mask.dtype == torch.bool else dict(bias=mask)


def _separated(options, mask, query, key, cu_seq_lens_q, cu_seq_lens_k):
    """options of a mask that does not know of packed sequences -> those that keep the sequences apart."""
    if "bias" in options:
        raise ValueError("attention_mask is a float tensor and cu_seq_lens_q is given: give one of them")
    if "mask" not in options:
        options = {name: x for name, x in options.items() if name not in ("align", "kv_lens")}
        return options | dict(cu_seqlens_q=cu_seq_lens_q.to(torch.int32), cu_seqlens_kv=cu_seq_lens_k.to(torch.int32))
    if query.shape[0] != 1:
        raise ValueError(f"attention_mask and cu_seq_lens_q are given for a batch of {query.shape[0]}: packed rows have batch 1")
    numbers = [
        torch.searchsorted(starts, torch.arange(x.shape[2], dtype=starts.dtype, device=x.device), right=True)
        for x, starts in ((query, cu_seq_lens_q), (key, cu_seq_lens_k))
    ]
    return dict(mask=(mask & (numbers[0][:, None] == numbers[1])).as_subclass(torch.Tensor))


def _chosen(options, indices, k_length):
    """The mask of options, or none, and of the keys whose numbers indices has, [b, 1, sq, sk]."""
    if "cu_seqlens_q" in options:
        raise NotImplementedError('indices: attn_implementation="fgqa" serves no chosen keys of packed sequences; use "eager"')
    chosen = torch.zeros((*indices.shape[:2], k_length), dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, indices.long(), True)
    return chosen[:, None] & options["mask"] if "mask" in options else chosen[:, None]


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask=None,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    softcap=None,
    s_aux=None,
    position_bias=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    indices=None,
    output_attentions=False,
    **kwargs,
):
    """The attention function of transformers' AttentionInterface.

    Parameters
    ----------
    module : torch.nn.Module
        The model's layer; nothing of it is read.
    query, key, value : torch.Tensor
        [b, hq, sq, d], [b, hk, sk, d] and [b, hk, sk, dv], any strides.
    attention_mask : IntervalMask or torch.Tensor, optional
        As made by the mask function of `register`, or a tensor that broadcasts to [b, hq, sq, sk]: bool (True = may attend)
        or float (added to the scores). Causality, windows and chunks are part of it, as in "eager".
    is_causal : bool, optional
        Whether row i sees no key after i, where there is no mask.
    dropout, scaling, softcap
        Probability; factor of the scores, default 1 / sqrt(d); bound of the scores.
    s_aux : torch.Tensor, optional
        Sinks [hq].
    position_bias : torch.Tensor, optional
        Added to the scores, [1 or b, hq, sq, sk]; has a gradient.
    cu_seq_lens_q, cu_seq_lens_k : torch.Tensor, optional
        Bounds of packed sequences in the rows of all b one after the other, int [n + 1].
    indices : torch.Tensor, optional
        The keys that each row chooses among those that it may see, int [b, sq, n]: sparse attention of the kind of DeepSeek V3.2.

    Returns
    -------
    out : torch.Tensor
        [b, sq, hq, dv], contiguous.
    weights : torch.Tensor or None
        [b, hq, sq, sk] after dropout if output_attentions, differentiable like out: each is the attention to one row of the
        identity in place of the values.
    """
    for name, what in _UNSERVED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{name}: attn_implementation="fgqa" does not serve {what}; use "eager" or "sdpa" for it')
    batch, _, q_length, _ = query.shape
    options = _mask_options(attention_mask, is_causal, q_length, key.shape[2])
    options |= dict(scale=scaling, softcap=softcap, sink=s_aux, dropout_p=dropout)
    if cu_seq_lens_q is not None and "cu_seqlens_q" not in options:
        options = _separated(options, attention_mask, query, key, cu_seq_lens_q, cu_seq_lens_k)
    if indices is not None:
        options["mask"] = _chosen(options, indices, key.shape[2])
    if position_bias is not None:
        options["bias"] = position_bias if "bias" not in options else position_bias + options["bias"]
    wanted = _weights_wanted(output_attentions)
    if wanted and dropout > 0:
        options["seed"] = draw_seed(query.device)       # the same for out and weights

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def run(v):
        if "cu_seqlens_q" not in options:
            return attention(q, k, v, layout="bshd", **options)
        return attention(*(x.flatten(0, 1) for x in (q, k, v)), **options).unflatten(0, (batch, q_length))

    out = run(v)
    if not wanted:
        return out, None
    return out, attention_matrix(q, k, run)
