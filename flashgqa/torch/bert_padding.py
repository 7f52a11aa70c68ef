"""flash_attn.bert_padding: padded batches [batch, seq, ...] to packed tokens [total, ...] and back, with gradients."""

import torch
from torch.nn import functional

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input, indices):
    """Rows of input [n, ...] at indices [m]: [m, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values, indices, first_axis_dim):
    """Zeros of [first_axis_dim, ...] with values [m, ...] at rows indices [m]."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input, indices):
    """Rows of input at indices, and input itself, to be the residual of what the rows go through."""
    return input.index_select(0, indices), input


def _packing(lengths):
    """cu_seqlens int32 [b + 1] and the greatest length, as an int, of lengths [b]."""
    cu_seqlens = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def _select(hidden_states, chosen):
    indices = chosen.flatten().nonzero().flatten()
    return hidden_states.flatten(0, 1).index_select(0, indices), indices


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """The tokens of hidden_states [batch, seq, ...] that attention_mask [batch, seq] names, one sequence after the other.

    Parameters
    ----------
    attention_mask : bool or int tensor
        True or 1: a token.
    unused_mask : bool or int tensor, optional
        Further places to keep that hold no token.

    Returns
    -------
    hidden_states [total, ...], indices [total] into the flattened [batch * seq], cu_seqlens int32 [batch + 1],
    max_seqlen (int), seqused int32 [batch] (tokens of attention_mask alone). Waits for a GPU, to know total and max_seqlen.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    tokens, indices = _select(hidden_states, kept)
    cu_seqlens, longest = _packing(kept.sum(-1, dtype=torch.int32))
    return tokens, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """`unpad_input` where each row holds several sequences, one after the other.

    attention_mask_in_length [batch, seq] int: the lengths of the sequences of a row, first to last, then zeros. Returns
    hidden_states, indices, cu_seqlens (of all sequences of all rows) and max_seqlen.
    """
    places = torch.arange(attention_mask_in_length.shape[1], device=attention_mask_in_length.device)
    tokens, indices = _select(hidden_states, places < attention_mask_in_length.sum(-1, keepdim=True))
    lengths = attention_mask_in_length.flatten()
    return tokens, indices, *_packing(lengths[lengths != 0])


def pad_input(hidden_states, indices, batch, seqlen):
    """hidden_states [total, ...] back at their places, indices [total] of `unpad_input`: [batch, seqlen, ...], else 0."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
