"""flashgqa as a flash implementation of torch's own: torch.nn.attention.activate_flash_attention_impl("FGQA").

From then on, and until restore_flash_attention_impl(), the flash backend of torch.nn.functional.scaled_dot_product_attention, and
torch.nn.attention.varlen, run here, on the CPU and on CUDA, with torch's own autograd around them. What torch gives to another
backend (a float mask that needs a gradient, say) still goes there; use_flashgqa() is the one that takes everything.
"""

import warnings

import torch

from . import _C
from ._torch_attention import bounds, draw_seed

try:
    from torch.nn.attention import register_flash_attention_impl
except ImportError:  # torch < 2.11
    register_flash_attention_impl = None


def _call(
    function, tensors, *, causal, scale, dropout_p, seed, align, mask=None, window=(None, None), alibi_slopes=None,
    cu_seqlens=(None, None), lengths=(None, None), layout=None,
):  # fmt: skip
    bool_mask, bias = (mask, None) if mask is None or mask.dtype == torch.bool else (None, mask)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with torch.no_grad():  # _C refuses tensors that require grad elsewhere
            return function(
                *tensors, causal, bounds(window), align, None, scale, None,
                bool_mask, bias, alibi_slopes, None, None, None, *cu_seqlens, *lengths, dropout_p, seed, layout, None,
                deterministic, False, None, False, None, None,
            )  # fmt: skip
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error


def _seed(device, dropout_p):
    """The seed of the dropout, which torch keeps for backward; without dropout any."""
    return draw_seed(device) if dropout_p > 0 else torch.zeros(2, dtype=torch.int64, device=device)


def _inner(*tensors):
    """The last axis contiguous, as _C wants what it writes, and gradients of sums are not."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


# ---- scaled_dot_product_attention: [b, h, s, d], causal top-left ----


def _sdpa(query, key, value, dropout_p, is_causal, scale, mask=None):
    seed = _seed(query.device, dropout_p)
    # torch's traces say that out lies in memory as query does.
    out = torch.empty_like(query) if query.shape[-1] == value.shape[-1] and query.stride(-1) == 1 else None
    options = dict(causal=is_causal, scale=scale, dropout_p=dropout_p, seed=seed, align="top-left", mask=mask)
    out, lse = _call(_C.forward, (query, key, value, True, out), **options)
    return out, lse, seed


def _sdpa_backward(grad_out, query, key, value, out, lse, dropout_p, is_causal, seed, scale, mask=None):
    tensors = _inner(grad_out, query, key, value, out)
    options = dict(causal=is_causal, scale=scale, dropout_p=dropout_p, seed=seed, align="top-left", mask=mask)
    return _call(_C.backward, (*tensors, lse, None, False), **options)[:3]


def _sdpa_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if dropout_p > 0:
        raise NotImplementedError("dropout_p > 0: torch's flash operator of the CPU keeps no seed; use use_flashgqa()")
    out, lse, _ = _sdpa(query, key, value, 0.0, is_causal, scale, attn_mask)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _sdpa_cpu_backward(
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    return _sdpa_backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal, None, scale, attn_mask)


def _refuse(**given):
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is given: flashgqa's flash implementation has none")


def _nothing(query):
    return torch.empty(0, dtype=query.dtype, device=query.device)


def _sdpa_cuda(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _refuse(return_debug_mask=return_debug_mask)
    out, lse, seed = _sdpa(query, key, value, dropout_p, is_causal, scale)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], seed.view(torch.uint64), unused, _nothing(query)


def _sdpa_cuda_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    seed = philox_seed.view(torch.int64) if dropout_p > 0 else None
    return _sdpa_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, seed, scale)


# ---- torch.nn.attention.varlen and nested tensors: [b, s, h, d] or [total, h, d], causal bottom-right ----


def _rows(cum_seq_q, cum_seq_k, max_q, max_k):
    if cum_seq_q is None:
        return dict(layout="bshd")
    return dict(cu_seqlens=(cum_seq_q, cum_seq_k), lengths=(max_q, max_k))


def _flash(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None, out=None,
):  # fmt: skip
    _refuse(return_debug_mask=return_debug_mask, seqused_k=seqused_k, block_table=block_table)
    seed = _seed(query.device, dropout_p)
    options = dict(causal=is_causal, scale=scale, dropout_p=dropout_p, seed=seed, align="bottom-right")
    more = dict(window=(window_size_left, window_size_right), alibi_slopes=alibi_slopes)
    rows = _rows(cum_seq_q, cum_seq_k, max_q, max_k)
    out, lse = _call(_C.forward, (*_inner(query, key, value), True, out), **options, **more, **rows)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    return out, lse, seed.view(torch.uint64), unused, _nothing(query)


def _flash_into(out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options):
    return _flash(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, return_debug_mask, out=out, **options
    )[1]  # fmt: skip


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    seed = rng_state.view(torch.int64) if dropout_p > 0 else None
    tensors = _inner(grad_out, query, key, value, out)
    options = dict(causal=is_causal, scale=scale, dropout_p=dropout_p, seed=seed, align="bottom-right")
    more = dict(window=(window_size_left, window_size_right))
    rows = _rows(cum_seq_q, cum_seq_k, max_q, max_k)
    return _call(_C.backward, (*tensors, logsumexp, None, False), **options, **more, **rows)[:3]


KERNELS = {
    ("_scaled_dot_product_flash_attention_for_cpu", "CPU"): _sdpa_cpu,
    ("_scaled_dot_product_flash_attention_for_cpu_backward", "CPU"): _sdpa_cpu_backward,
    ("_scaled_dot_product_flash_attention", "CUDA"): _sdpa_cuda,
    ("_scaled_dot_product_flash_attention_backward", "CUDA"): _sdpa_cuda_backward,
    ("_flash_attention_forward", "CUDA"): _flash,
    ("_flash_attention_forward_no_dropout_inplace", "CUDA"): _flash_into,
    ("_flash_attention_backward", "CUDA"): _flash_backward,
}


class _Active:
    """What torch keeps while the implementation is active."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # replacing torch's own is what this does
            for (name, device), kernel in KERNELS.items():
                if hasattr(torch.ops.aten, name) and (device == "CPU" or torch.backends.cuda.is_built()):
                    self.library.impl(name, kernel, device)

    def remove(self):
        self.library._destroy()


if register_flash_attention_impl is not None:
    register_flash_attention_impl("FGQA", register_fn=_Active)
