"""What torch.utils.flop_counter counts for flashgqa::forward and flashgqa::backward."""

import torch
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula


def _scores(q, k, layout, cu_seqlens_q, cu_seqlens_kv):
    """Query rows times keys of all query heads, as torch counts those of its own attention: whatever the mask."""
    if cu_seqlens_q is None:
        rows, heads = (-3, -2) if layout == "bshd" else (-2, -3)
        return q.shape[:-3].numel() * q.shape[heads] * q.shape[rows] * k.shape[rows]
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:  # nobody knows: sequences of one length
        return q.shape[1] * q.shape[0] * k.shape[0] // max(len(cu_seqlens_q) - 1, 1)
    lengths = (cu_seqlens_q.diff().tolist(), cu_seqlens_kv.diff().tolist())
    return q.shape[1] * sum(rows * keys for rows, keys in zip(*lengths, strict=True))


# Places among the options of an operator: see _torch_ops.
_LAYOUT, _CU_SEQLENS = 19, slice(6, 8)


@register_flop_formula(torch.ops.flashgqa.forward, get_raw=True)
def _of_forward(q, k, v, *options, out_val=None):
    return 2 * _scores(q, k, options[_LAYOUT], *options[_CU_SEQLENS]) * (q.shape[-1] + v.shape[-1])


@register_flop_formula(torch.ops.flashgqa.backward, get_raw=True)
def _of_backward(dout, q, k, v, out, lse, dlse, want_dbias, *options, out_val=None):
    return 2 * _scores(q, k, options[_LAYOUT], *options[_CU_SEQLENS]) * (3 * q.shape[-1] + 2 * v.shape[-1])
