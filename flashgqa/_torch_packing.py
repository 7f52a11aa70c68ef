"""Rows of packed tensors moved together, without waiting for a GPU."""

import torch
from torch.nn import functional


def packed_rows(x, starts, lengths):
    """Of x [total, ...] the rows starts[n] to starts[n] + lengths[n], one sequence behind the other, and their cu_seqlens.

    starts, lengths: int32 [sequences]. On a GPU, where the sum of lengths is not known here, there are as many rows as in x;
    those behind the last sequence are 0.
    """
    cu_seqlens = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    count = int(cu_seqlens[-1]) if x.device.type == "cpu" else x.shape[0]
    return moved_rows(x, starts, cu_seqlens, count), cu_seqlens


def moved_rows(x, starts, cu_seqlens, count):
    """Rows starts[n] + i of x [total, ...] at cu_seqlens[n] + i: [count, ...], 0 behind the last sequence."""
    row = torch.arange(count, device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=max(starts.shape[0] - 1, 0))
    valid = row < cu_seqlens[-1]
    rows = x.index_select(0, torch.where(valid, (starts - cu_seqlens[:-1])[sequence] + row, 0))
    return torch.where(valid.view(-1, *[1] * (x.dim() - 1)), rows, 0)


def unpacked_rows(x, cu_seqlens, starts, total, fill):
    """The inverse of `packed_rows` for starts that never decrease: [total, ...], with fill between the sequences."""
    lengths = cu_seqlens.diff()
    row = torch.arange(total, device=x.device, dtype=starts.dtype)
    # Of sequences that start at one row all but the last are empty.
    sequence = (torch.searchsorted(starts, row, right=True) - 1).clamp(min=0)
    local = row - starts[sequence]
    valid = (local >= 0) & (local < lengths[sequence])
    if x.shape[0] == 0:
        return x.new_full((total, *x.shape[1:]), fill)
    rows = x.index_select(0, torch.where(valid, cu_seqlens[sequence] + local, 0))
    return torch.where(valid.view(-1, *[1] * (x.dim() - 1)), rows, fill)
