"""torch.nn.functional.scaled_dot_product_attention, and the with-block that routes torch's own here."""

import math
import threading
from contextlib import contextmanager

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ._torch_attention import attention
from ._torch_eager import _has_autocast, as_autocast, attend, check_tensors


def _fold(x, batch, heads, matrix):
    """x, broadcast to [*batch, heads, *matrix] and with the axes of batch made one; a view where strides allow it."""
    if x.shape[:-2] != (*batch, heads):
        x = x.expand(*batch, heads, *matrix)
    return x if len(batch) == 1 else x.reshape(math.prod(batch), heads, *matrix)


def _broadcast(query, key, value, axes, fix):
    """The shape that these of three tensors broadcast to; torch's own function takes longer than all of a small call."""
    if query == key == value:
        return tuple(query)
    rank = max(len(query), len(key), len(value))
    joined = [1] * rank
    for shape in (query, key, value):
        for axis, size in enumerate(shape, rank - len(shape)):
            if size != 1 and joined[axis] not in (1, size):
                raise RuntimeError(f"{axes}: query has {list(query)}, key {list(key)} and value {list(value)}: {fix}")
            joined[axis] = joined[axis] if size == 1 else size
    return tuple(joined)


def _mask_fold(mask, batch, heads):
    """A mask of any rank as [b or 1, heads or 1, sq or 1, sk or 1], expanded only where axes of batch must be joined."""
    shape = (1,) * (len(batch) + 3 - mask.dim()) + tuple(mask.shape)
    mask = mask.reshape(shape)
    lead, head = shape[: len(batch)], shape[len(batch)]
    if any(n not in (1, whole) for n, whole in zip((*lead, head), (*batch, heads), strict=True)):
        raise ValueError(f"attn_mask has shape {list(shape)}: it must broadcast to {[*batch, heads, *shape[-2:]]}")
    if all(n == 1 for n in lead):
        return mask.reshape(1, *shape[len(batch) :])
    return _fold(mask, batch, head, shape[-2:])


def _is_plain_mask(query, key, mask, is_causal):
    """Whether a mask is taken as it is: a tensor of rank 4 that broadcasts, and nothing to be cast."""
    if is_causal or type(mask) is not torch.Tensor or mask.dim() != 4 or _has_autocast():
        return False
    (b, h, sq, sk), (batch, heads, rows, _), keys = mask.shape, query.shape, key.shape[2]
    fits = b in (1, batch) and h in (1, heads) and sq in (1, rows) and sk in (1, keys)
    return fits and mask.dtype in (torch.bool, torch.float32, query.dtype)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch.nn.functional.scaled_dot_product_attention: same arguments, same meaning, gradients of query, key, value and a
    float attn_mask.

    Parameters
    ----------
    query, key, value : torch.Tensor, [..., hq, sq, d], [..., hk, sk, d], [..., hk, sk, dv]
        float16, bfloat16 or float32; float64 on the CPU. Leading axes, any number, broadcast, also with none of them.
    attn_mask : torch.Tensor or torch.nn.attention.bias.CausalBias, optional
        Broadcasts to [..., hq, sq, sk]: bool (True: may attend), or float, added to the scores, with a gradient.
    dropout_p : float
        Probability with which a weight is dropped; there is no training flag.
    is_causal : bool
        Row i sees keys j <= i, counted from the start, whatever the lengths; not together with attn_mask.
    scale : float, optional
        Factor of the scores, default 1 / sqrt(d).
    enable_gqa : bool
        Allows fewer heads in key and value than in query. They are never repeated in memory, unless key and value differ. One KV
        head broadcasts without it.

    Returns
    -------
    out : torch.Tensor, [..., hq, sq, dv]
        A row that sees no key is 0.

    Raises
    ------
    RuntimeError, ValueError
        RuntimeError where torch's function raises it: mask with is_causal, dtype of the mask, heads that do not divide.
    NotImplementedError
        No kernel serves the request; a second or forward-mode derivative.
    """
    try:
        ranks = (query.dim(), key.dim(), value.dim())
    except AttributeError:
        check_tensors({"query": query, "key": key, "value": value})
        raise
    if dropout_p == 0 and ranks == (4, 4, 4) and (attn_mask is None or _is_plain_mask(query, key, attn_mask, is_causal)):
        # What models call, layer by layer.
        (b, hq, _, _), (bk, hk, _, _), (bv, hv, _, _) = query.shape, key.shape, value.shape
        if b == bk == bv and hk == hv and (hq == hk or enable_gqa and hk > 0 and hq % hk == 0):
            given = attn_mask is not None
            mask, bias = (attn_mask, None) if given and attn_mask.dtype == torch.bool else (None, attn_mask)
            options = (
                is_causal, (None, None), "top-left", None, scale, None, mask, bias, None, None, None, None, None, None, None,
                None, 0.0, None, None, None, True, False, None, False, None, None,
            )  # fmt: skip
            return attend(query, key, value, False, options, given)
    causal, align = is_causal, "top-left"
    if attn_mask is not None and is_causal:
        raise RuntimeError("attn_mask is set and is_causal is True: give one of them; attn_mask can hold both")
    if type(attn_mask).__name__ == "CausalBias":
        from torch.nn.attention.bias import CausalVariant  # takes seconds, but whoever made the bias has spent them

        sizes = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
        if sizes != (query.shape[-2], key.shape[-2]):
            raise ValueError(f"attn_mask is a CausalBias of {sizes}: it must be of {(query.shape[-2], key.shape[-2])}")
        causal, align = True, "top-left" if attn_mask.variant == CausalVariant.UPPER_LEFT else "bottom-right"
        attn_mask = None
    for name, rank in zip(("query", "key", "value"), ranks, strict=True):
        if rank < 2:
            raise ValueError(f"{name} has {rank} dimensions: it must have at least 2, [..., length, head dim]")
    query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attn_mask is {attn_mask.dtype}: it must be torch.bool, torch.float32 or query's {query.dtype}")

    # Axes: batch (any number, made one) | heads | matrix.
    q, k, v = (x.unsqueeze(0) if x.dim() == 2 else x for x in (query, key, value))
    hq, hk, hv = q.shape[-3], k.shape[-3], v.shape[-3]
    if enable_gqa:
        if hk == 0 or hv == 0 or hq % hk != 0 or hq % hv != 0:
            raise RuntimeError(f"enable_gqa: query has {hq} heads, key {hk} and value {hv}: query's must be a multiple of both")
        kv_heads = max(hk, hv) if max(hk, hv) % min(hk, hv) == 0 else hq
        k = k if hk == kv_heads else k.repeat_interleave(kv_heads // hk, -3)
        v = v if hv == kv_heads else v.repeat_interleave(kv_heads // hv, -3)
    else:
        hq = _broadcast((hq,), (hk,), (hv,), "heads", "they must be equal, or 1; fewer KV heads need enable_gqa=True")[0]
        kv_heads = 1 if hk == 1 and hv == 1 else hq
    batch = _broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3], "batch", "they must broadcast")
    mask = bias = None
    if attn_mask is not None:
        attn_mask = _mask_fold(attn_mask, batch, hq)
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    out = attention(
        _fold(q, batch, hq, q.shape[-2:]),
        _fold(k, batch, kv_heads, k.shape[-2:]),
        _fold(v, batch, kv_heads, v.shape[-2:]),
        causal=causal, align=align, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p,
    )  # fmt: skip
    if len(batch) != 1:
        out = out.reshape(*batch, hq, *out.shape[-2:])
    return out[0] if ranks == (2, 2, 2) else out


class _Route(TorchFunctionMode):
    """Catches torch's function by whatever name it is called, and makes torch.compile trace anew."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._nn.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Replaced:
    """torch.nn.functional's attribute. What torch itself runs inside of a mode, such as backward() and the layers of torch.nn,
    no longer sees the mode, but it sees this."""

    def __init__(self):
        self.lock, self.blocks, self.own = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if self.blocks == 0:
                self.own = functional.scaled_dot_product_attention
                functional.scaled_dot_product_attention = scaled_dot_product_attention
            self.blocks += 1

    def __exit__(self, *_):
        with self.lock:
            self.blocks -= 1
            if self.blocks == 0:
                functional.scaled_dot_product_attention = self.own


_replaced = _Replaced()


@contextmanager
def use_flashgqa():
    """Inside of ``with use_flashgqa():`` torch.nn.functional.scaled_dot_product_attention is that of flashgqa.

    Whatever calls it: layers of torch.nn and models of other libraries as well, compiled or not. What flashgqa does not serve
    is an error, never torch's own function in silence. Backward passes through torch.utils.checkpoint belong inside of the
    block, too, for they compute forward again. While a block is open it holds for all threads of the process.
    """
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError("use_flashgqa() goes around the call of a compiled function, not into it")
    with _replaced, _Route():
        yield
