"""flashgqa::forward and flashgqa::backward: the C entry points as torch operators, with shapes for tracing, autograd and vmap.

Operators take every option as a plain value or a tensor, so that torch.compile and torch.export see through them.
"""

import torch

from . import _C

_TENSORS = "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? q_lens, Tensor? kv_lens, \
Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, Tensor? seed"
_VALUES = "bool causal, SymInt? window_left, SymInt? window_right, str align, SymInt? chunk, float? scale, float? softcap, \
SymInt? max_q, SymInt? max_kv, float dropout_p, str? layout, bool deterministic, bool batch_invariant, str? precision, bool check"
_N_TENSORS = _TENSORS.count(",") + 1
_N_VALUES = _VALUES.count(",") + 1

_library = torch.library.Library("flashgqa", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_VALUES}) -> (Tensor, Tensor)")
# What has no gradient is empty: an operator cannot return "no tensor".
_library.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, bool want_dbias, "
    f"{_TENSORS}, {_VALUES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

forward = torch.ops.flashgqa.forward.default
backward = torch.ops.flashgqa.backward.default


def untraced(function):
    """What torch.compile must not look into where it runs below code that it left to eager: torch.compiler.disable without its
    import of the compiler and its cost at every call.
    """
    try:
        control = torch._C._dynamo.eval_frame
        skip = control._FrameAction.SKIP
        control.set_code_exec_strategy(function.__code__, control._FrameExecStrategy(skip, skip))
    except AttributeError:  # names of torch's own, which another torch may not have
        return torch.compiler.disable(function)
    return function


def _c_options(tensors, values):
    """The options of an operator in the order of ``_C``: what `operator_options` takes."""
    mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_kv, seed = tensors
    causal, left, right, align, chunk, scale, softcap, max_q, max_kv, dropout_p, layout, *rest = values
    deterministic, batch_invariant, precision, check = rest
    return (
        causal, (left, right), align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, None, deterministic, batch_invariant,
        precision, check, None, None,
    )  # fmt: skip


def operator_options(options):
    """Options in the order of ``_C``, which all eager calls use, as those of an operator."""
    causal, window, align, chunk, scale, softcap, *tensors, max_q, max_kv, dropout_p, seed, layout = options[:19]
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window is {window!r}: it must be None or a pair (left, right) of integers or None")
    return (
        *tensors, seed, causal, *window, align, chunk, scale, softcap, max_q, max_kv, dropout_p, layout, *options[20:24]
    )  # fmt: skip


# ---- computing ----


def refuse_nested(name, x):
    if x.is_nested:
        raise NotImplementedError(
            f"{name} is a nested tensor: join the sequences, values() of a jagged one as [total, heads, head dim], "
            "and give their offsets().int() as cu_seqlens_q and cu_seqlens_kv"
        )


@untraced
def c_forward(q, k, v, return_lse, options):
    """_C.forward, options in its order; torch's own error where memory does not suffice. Meta tensors give shapes."""
    try:
        return _C.forward(q, k, v, return_lse, None, *options)
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    except BufferError:
        for name, x in zip("qkv", (q, k, v), strict=True):
            refuse_nested(name, x)
        if any(x.is_neg() for x in (q, k, v)):
            return c_forward(q.resolve_neg(), k.resolve_neg(), v.resolve_neg(), return_lse, options)
        if not q.is_meta:
            raise
        results = forward(q, k, v, *operator_options(options))
        return results if return_lse else results[0]


@untraced
def c_backward(dout, tensors, dlse, want_dbias, options):
    """_C.backward of tensors q, k, v, out and lse."""
    # Gradients of sums and means are expanded scalars.
    if not dout.is_contiguous() and dout.stride(-1) != 1:
        dout = dout.contiguous()
    try:
        return _C.backward(dout, *tensors, dlse, want_dbias, *options)
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    except BufferError:
        given = [dout, *tensors, *([] if dlse is None else [dlse])]
        if not any(x.is_neg() for x in given):
            raise
        dout, *resolved = (x.resolve_neg() for x in given)
        return c_backward(dout, resolved[:5], None if dlse is None else resolved[5], want_dbias, options)


def _as_tensors(*given):
    """Subclasses that add methods, as fastai's, as the tensors they are; one with a __torch_dispatch__ stays what it may be."""
    plain = torch._C._disabled_torch_dispatch_impl
    return [
        x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) and type(x).__torch_dispatch__ is plain else x for x in given
    ]


@untraced
def _forward(*given):
    q, k, v, *options = _as_tensors(*given)
    return c_forward(q, k, v, True, _c_options(options[:_N_TENSORS], options[_N_TENSORS:]))


@untraced
def _backward(*given):
    dout, q, k, v, out, lse, dlse, want_dbias, *options = _as_tensors(*given)
    of_options = _c_options(options[:_N_TENSORS], options[_N_TENSORS:])
    dq, dk, dv, dbias, dsink = c_backward(dout, (q, k, v, out, lse), dlse, want_dbias, of_options)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsink is None else dsink


for _device in ("cpu", "cuda"):
    torch.library.impl("flashgqa::forward", _device, _forward, lib=_library)
    torch.library.impl("flashgqa::backward", _device, _backward, lib=_library)


# ---- shapes ----


@torch.library.register_fake("flashgqa::forward", lib=_library)
def _forward_shapes(q, k, v, *options):
    bhs = q.shape[:-1]
    cu_seqlens_q, layout = options[6], options[_N_TENSORS + 10]
    heads_last = cu_seqlens_q is not None or layout == "bshd"
    lse_shape = (*bhs[:-2], bhs[-1], bhs[-2]) if heads_last else bhs
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*bhs, v.shape[-1])), q.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.register_fake("flashgqa::backward", lib=_library)
def _backward_shapes(dout, q, k, v, out, lse, dlse, want_dbias, mask, bias, alibi_slopes, sink, *options):
    inputs = (q, k, v, bias if want_dbias else None, sink)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


# ---- vmap ----


def _unmapped(x, dim):
    return x.shape if dim is None else x.movedim(dim, -1).shape[:-1]


def _each(operator, n, in_dims, args):
    """One call for each entry of the mapped axis: any option may differ between them."""
    if n == 0:  # shapes alone
        shapes = [
            x.new_empty(_unmapped(x, dim), device="meta") if isinstance(x, torch.Tensor) else x
            for x, dim in zip(args, in_dims, strict=True)
        ]
        return tuple(torch.empty(0, *x.shape, dtype=x.dtype, device=args[0].device) for x in operator(*shapes))
    calls = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(n)
    ]
    return tuple(torch.stack(results) for results in zip(*calls, strict=True))


def _joined(operator, n, batch, in_dims, args):
    """The mapped axis as part of the batch: one call."""

    def join(x, dim):
        x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    results = operator(*(join(x, dim) if isinstance(x, torch.Tensor) else x for x, dim in zip(args, in_dims, strict=True)))
    return tuple(x.unflatten(0, (n, batch)) if x.dim() > 1 else x.expand(n, *x.shape) for x in results)


def _map(operator, q_at, options_at, info, in_dims, args):
    n, q, options = info.batch_size, args[q_at], args[options_at : options_at + _N_TENSORS]
    shape = _unmapped(q, in_dims[q_at])
    if len(shape) == 4 and all(x is None for x in options):
        results = _joined(operator, n, shape[0], in_dims, args)
    else:
        results = _each(operator, n, in_dims, args)
    return results, (0,) * len(results)


def _map_forward(info, in_dims, *args):
    return _map(differentiable_forward, 0, 3, info, in_dims, args)


def _map_backward(info, in_dims, *args):
    return _map(differentiable_backward, 1, 8, info, in_dims, args)


torch.library.register_vmap("flashgqa::forward", _map_forward, lib=_library)
torch.library.register_vmap("flashgqa::backward", _map_backward, lib=_library)


# ---- autograd ----


@untraced
def _keep(ctx, inputs, output):
    q, k, v, *options = inputs
    tensors, ctx.values = options[:_N_TENSORS], options[_N_TENSORS:]
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.set_materialize_grads(False)


@untraced
def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    want_dbias, want_dsink = ctx.needs_input_grad[4], ctx.needs_input_grad[6]
    if dout is None:
        dout = torch.zeros_like(out)
    inputs = (dout, q, k, v, out, lse, dlse, want_dbias, *tensors, *ctx.values)
    dq, dk, dv, dbias, dsink = differentiable_backward(*inputs)
    of_options = [None] * (_N_TENSORS + _N_VALUES)
    of_options[1] = dbias if want_dbias else None
    of_options[3] = dsink if want_dsink else None
    return dq, dk, dv, *of_options


def _keep_nothing(ctx, inputs, output):
    pass


def _refuse_second_derivative(ctx, *_):
    raise NotImplementedError(
        "flashgqa: the gradient of attention is not differentiable itself (double backward, create_graph=True); "
        "use torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH) for that"
    )


def _refuse_forward_mode(ctx, *_):
    raise NotImplementedError("flashgqa: attention has no forward-mode derivative; use backward()")


torch.library.register_autograd("flashgqa::forward", _differentiate, setup_context=_keep, lib=_library)
torch.library.register_autograd("flashgqa::backward", _refuse_second_derivative, lib=_library)


# ---- torch.func: its grad takes no operators of torch.library, but Functions around them ----


def _in_transforms():
    return torch._C._are_functorch_transforms_active()


class _ForwardInTransforms(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return forward(*inputs)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_refuse_forward_mode)
    vmap = staticmethod(_map_forward)


class _BackwardInTransforms(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return backward(*inputs)

    setup_context = staticmethod(_keep_nothing)
    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_second_derivative)
    vmap = staticmethod(_map_backward)


def differentiable_forward(*inputs):
    """flashgqa::forward, whatever encloses the call."""
    if torch.compiler.is_compiling() or not _in_transforms():
        return forward(*inputs)
    return _ForwardInTransforms.apply(*inputs)


def differentiable_backward(*inputs):
    """flashgqa::backward, with the error that a second derivative is."""
    return _BackwardInTransforms.apply(*inputs) if _in_transforms() else backward(*inputs)
