"""attend: attention of tensors by the shortest way that what encloses the call allows.

torch takes a quarter of a millisecond to carry thirty arguments through an operator with autograd, and a microsecond for each
handful that a Python function passes on. So an eager call goes to ``_C`` by an autograd.Function of few arguments, with the
options as one tuple in the order of ``_C``; only what traces, transforms or watches gets the operators of `_torch_ops`.
"""

import torch
from torch.autograd import forward_ad

from . import _torch_ops
from ._torch_ops import c_backward, c_forward, refuse_nested, untraced

# Tensors among the options in the order of _C: mask, bias, alibi_slopes, sink, q_lens, kv_lens, both cu_seqlens, seed.
TENSORS_AT = (6, 7, 8, 9, 10, 11, 12, 13, 17)
BIAS_AT, SINK_AT = 7, 9

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_is_recording = torch.is_grad_enabled
_has_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_is_mapped = torch._C._functorch.is_legacy_batchedtensor    # by torch.autograd's own vmap: is_grads_batched, vectorize


def as_autocast(*tensors):
    """The tensors as torch's autocast would hand them to scaled_dot_product_attention: wide floats become narrow."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x is not None and x.dtype in narrow else x for x in tensors)


def check_tensors(required, optional=()):
    """Of {name: tensor}, and of pairs (name, tensor or None)."""
    tensors = {**required, **{name: x for name, x in optional if x is not None}}
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            fix = "flashgqa.attention takes other arrays" if hasattr(x, "__dlpack__") else "torch.tensor() makes one of numbers"
            raise TypeError(f"{name} is {type(x).__name__}: it must be a torch.Tensor; {fix}")
        refuse_nested(name, x)
        if type(x).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name} is a DTensor, and attention takes each process's part of heads or of the batch: wrap the call in "
                "torch.distributed.tensor.experimental.local_map, or pass to_local()"
            )
    if not _is_compiling() and forward_ad._current_level >= 0:
        for name, x in tensors.items():
            if forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"flashgqa: {name} has a forward-mode tangent, and attention no forward-mode derivative; use backward()"
                )


def attend(q, k, v, return_lse, options, given):
    """out, or (out, lse) with return_lse; options as of ``_C``, with the seed as a tensor; given: whether one of them is a tensor
    at all.
    """
    if not _is_compiling():
        if (
            type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN and forward_ad._current_level < 0
            and not _dispatch_modes() and not _transforms() and _tracing() is None
        ):  # fmt: skip
            if _has_autocast():
                q, k, v = as_autocast(q, k, v)
            if not given:
                if _is_recording() and (q.requires_grad or k.requires_grad or v.requires_grad):
                    return _with_lse(q, k, v, options) if return_lse else _plain(q, k, v, options)
                return c_forward(q, k, v, return_lse, options)
            if all(options[n] is None or type(options[n]) in _PLAIN for n in TENSORS_AT):
                bias, sink = options[BIAS_AT], options[SINK_AT]
                if _is_recording() and torch._C._any_requires_grad(q, k, v, bias, sink):
                    out, lse = _with_tensors(q, k, v, bias, sink, options)
                    return (out, lse) if return_lse else out
                return c_forward(q, k, v, return_lse, options)
    names = ("mask", "bias", "alibi_slopes", "sink", "q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_kv", "seed")
    check_tensors({"q": q, "k": k, "v": v}, zip(names, (options[n] for n in TENSORS_AT), strict=True))
    q, k, v = as_autocast(q, k, v)
    out, lse = _torch_ops.differentiable_forward(q, k, v, *_torch_ops.operator_options(options))
    return (out, lse) if return_lse else out


def _differentiate(tensors, dout, dlse, want_dbias, options):
    """Gradients of q, k, v, bias and sink; tensors: q, k, v, out, lse."""
    if dout is None:
        dout = torch.zeros_like(tensors[3])
    mapped = _is_mapped(dout) or (dlse is not None and _is_mapped(dlse))
    if mapped or _is_recording() or _dispatch_modes() or _transforms() or _is_compiling() or dout.is_meta:
        operands = _torch_ops.operator_options(options)
        dq, dk, dv, dbias, dsink = _torch_ops.differentiable_backward(dout, *tensors, dlse, want_dbias, *operands)
        return dq, dk, dv, dbias if want_dbias else None, None if options[SINK_AT] is None else dsink
    return c_backward(dout, tensors, dlse, want_dbias, options)


class _Plain(torch.autograd.Function):
    """No tensors among the options, and nobody asks for lse."""

    @staticmethod
    @untraced
    def forward(ctx, q, k, v, options):
        out, lse = c_forward(q, k, v, True, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @untraced
    def backward(ctx, dout):
        dq, dk, dv, _, _ = _differentiate(ctx.saved_tensors, dout, None, False, ctx.options)
        return dq, dk, dv, None


class _WithLse(torch.autograd.Function):
    @staticmethod
    @untraced
    def forward(ctx, q, k, v, options):
        out, lse = c_forward(q, k, v, True, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return out, lse

    @staticmethod
    @untraced
    def backward(ctx, dout, dlse):
        dq, dk, dv, _, _ = _differentiate(ctx.saved_tensors, dout, dlse, False, ctx.options)
        return dq, dk, dv, None


class _WithTensors(torch.autograd.Function):
    @staticmethod
    @untraced
    def forward(ctx, q, k, v, bias, sink, options):
        out, lse = c_forward(q, k, v, True, options)
        # Saved as torch saves tensors, so that one that is changed before backward() is noticed.
        ctx.at = [n for n in TENSORS_AT if options[n] is not None]
        ctx.save_for_backward(q, k, v, out, lse, *(options[n] for n in ctx.at))
        ctx.set_materialize_grads(False)
        ctx.options = [None if n in TENSORS_AT else x for n, x in enumerate(options)]
        return out, lse

    @staticmethod
    @untraced
    def backward(ctx, dout, dlse):
        saved, options = ctx.saved_tensors, list(ctx.options)
        for n, x in zip(ctx.at, saved[5:], strict=True):
            options[n] = x
        dq, dk, dv, dbias, dsink = _differentiate(saved[:5], dout, dlse, ctx.needs_input_grad[3], options)
        return dq, dk, dv, dbias, dsink, None


def _applied(function):
    """function.apply without torch's Python around it, which looks for what `attend` has excluded already."""
    return super(torch.autograd.Function, function).apply


_plain, _with_lse, _with_tensors = _applied(_Plain), _applied(_WithLse), _applied(_WithTensors)
