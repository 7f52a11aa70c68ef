"""Packed tensors: q, k and v in one, and rows of sequences moved together without waiting for a GPU."""

import torch
from torch.nn import functional


def unbound(packed, count, name):
    """The count tensors [..., heads, d] in packed [..., count, heads, d]."""
    check_packed(packed, count, name)
    return packed.unbind(-3)


def check_packed(packed, count, name):
    if packed.dim() < 3 or packed.shape[-3] != count:
        raise ValueError(f"{name} is {list(packed.shape)}: it must be [..., {count}, heads, head dim]")


def split_qkv(qkv, num_heads_q, *, to_write=False):
    """q, k and v [b, s, heads, d] of qkv [b, s, 3, h, d], or of [b, s, hq + 2 hk, d] with num_heads_q = hq.

    to_write: as views that autograd allows to be written; others have the cheaper gradient.
    """
    if qkv.dim() == 5:
        check_packed(qkv, 3, "qkv")
        return [qkv.select(2, n) for n in range(3)] if to_write else qkv.unbind(2)
    if qkv.dim() != 4 or num_heads_q is None or qkv.shape[2] < num_heads_q or (qkv.shape[2] - num_heads_q) % 2 != 0:
        raise ValueError(
            f"qkv is {list(qkv.shape)} and num_heads_q {num_heads_q}: it must be [batch, seq, 3, heads, head dim], or "
            "[batch, seq, num_heads_q + 2 KV heads, head dim] with num_heads_q given"
        )
    hq, hk = num_heads_q, (qkv.shape[2] - num_heads_q) // 2
    if to_write:
        return [qkv.narrow(2, start, count) for start, count in ((0, hq), (hq, hk), (hq + hk, hk))]
    return qkv.split((hq, hk, hk), 2)


def is_readable(numbers):
    """Whether a tensor of numbers can be looked at: on the CPU, and not while torch.compile traces."""
    return numbers.device.type == "cpu" and not torch.compiler.is_compiling()


def check_offsets(name, cu_seqlens, tensor, total):
    """That cu_seqlens, where they can be read, divide all rows of a tensor, total of them."""
    if not is_readable(cu_seqlens) or not cu_seqlens.numel():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != total or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"{name} goes from {first} to {last} and {tensor} has {total} rows: it must start at 0, never decrease and end at "
            "that number; pass running sums of the lengths"
        )


def check_lengths(name, lengths, cu_seqlens):
    """That lengths, where they can be read, are one for each sequence of cu_seqlens and no longer than it."""
    sequences = cu_seqlens.shape[0] - 1
    if lengths.shape != (sequences,):
        raise ValueError(f"{name} is {list(lengths.shape)}: it must be [b] = [{sequences}], one length for each sequence")
    if not is_readable(lengths):
        return
    wrong = ((lengths < 0) | (lengths > cu_seqlens.diff())).nonzero().flatten()
    if wrong.numel():
        n = int(wrong[0])
        raise ValueError(
            f"{name}[{n}] is {int(lengths[n])} and sequence {n} has {int(cu_seqlens[n + 1] - cu_seqlens[n])} rows: it must be 0 "
            "to that number"
        )


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
