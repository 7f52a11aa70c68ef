"""attention and merge of `flashgqa.torch`."""

import torch
from torch.autograd import forward_ad

from . import _torch_ops


def draw_seed(device):
    """int64 [seed, offset] from torch's generator of a device; stays there, so that nothing waits for it."""
    return torch.randint(2**32, (2,), dtype=torch.int64, device=device)


def seed_tensor(seed, device):
    """[seed, 0] without a copy from the host, which would have to wait."""
    key = torch.zeros(2, dtype=torch.int64, device=device)
    key[:1].fill_(seed - 2**64 if seed >= 2**63 else seed)
    return key


def as_autocast(*tensors):
    """The tensors as torch's autocast would hand them to scaled_dot_product_attention: wide floats become narrow."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x is not None and x.dtype in narrow else x for x in tensors)


def check_tensors(**tensors):
    for name, x in tensors.items():
        if x is not None and not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: it must be a torch.Tensor; flashgqa.attention takes other arrays")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        for name, x in tensors.items():
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"flashgqa: {name} has a forward-mode tangent, and attention no forward-mode derivative; use backward()"
                )


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    align="bottom-right",
    chunk=None,
    scale=None,
    softcap=None,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_q=None,
    max_kv=None,
    dropout_p=0.0,
    seed=None,
    layout=None,
    return_lse=False,
    deterministic=True,
    batch_invariant=False,
    precision=None,
    check=False,
):
    """`flashgqa.attention` with gradients: of q, k, v, bias and sink, through out and lse.

    Works in torch.compile, torch.export, torch.utils.checkpoint, torch.func.grad and torch.vmap; torch.compile takes backward()
    and vmap, but not torch.func.grad. A second derivative and forward-mode differentiation raise NotImplementedError.

    Parameters
    ----------
    q, k, v : torch.Tensor
        As in `flashgqa.attention`. Inside of torch.autocast they are cast to its dtype.
    causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, \
cu_seqlens_kv, max_q, max_kv, layout, return_lse, batch_invariant, precision, check
        As in `flashgqa.attention`; arrays are torch tensors.
    dropout_p : float
        Probability with which a weight is dropped. There is no training flag: pass 0 for evaluation.
    seed : int or int64 tensor [seed, offset], optional
        Drawn from torch's generator of q's device by default; torch.manual_seed makes it repeatable, and recomputation by
        torch.utils.checkpoint drops the same weights.
    deterministic : bool
        As in `flashgqa.attention`; torch.use_deterministic_algorithms(True) forces it.

    Returns
    -------
    out, lse : torch.Tensor
        As in `flashgqa.attention`.
    """
    check_tensors(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sink=sink, q_lens=q_lens, kv_lens=kv_lens,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv,
    )  # fmt: skip
    q, k, v = as_autocast(q, k, v)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(q.device)
    elif isinstance(seed, int):
        seed = seed_tensor(seed, q.device)
    left, right = (None, None) if window is None else window
    out, lse = _torch_ops.differentiable_forward(
        q, k, v, mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_kv, seed,
        causal, left, right, align, chunk, scale, softcap, max_q, max_kv, dropout_p, layout,
        deterministic or torch.are_deterministic_algorithms_enabled(), batch_invariant, precision, check,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def merge(outs, lses, *, layout=None):
    """`flashgqa.merge` with gradients, to any order: results over disjoint sets of keys into the result over all of them.

    Parameters
    ----------
    outs, lses : sequences of torch.Tensor
        What ``attention(..., return_lse=True)`` returned for each part; all of one shape and dtype.
    layout : {"bhsd", "bshd"}, optional
        That of outs; default "bhsd". Packed results [total, hq, dv] are "bshd".

    Returns
    -------
    out, lse : torch.Tensor
        As `attention` would have returned them.
    """
    if layout not in (None, "bhsd", "bshd"):
        raise ValueError(f'layout is {layout!r}: it must be "bhsd" or "bshd"')
    if len(outs) != len(lses) or not len(outs):
        raise ValueError(f"merge got {len(outs)} outs and {len(lses)} lses: it needs one lse for each out, and at least one pair")
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        rows = out.shape[:-1] if layout != "bshd" else (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype or lse.shape != rows:
            raise ValueError(
                f"outs[{n}] is {out.dtype} {list(out.shape)} with lse {list(lse.shape)}: all must be as outs[0], {outs[0].dtype} "
                f"{list(outs[0].shape)}, with lse [b, hq, sq] (without b for rank 3)"
            )
    parts = torch.stack(tuple(lses))
    # Rows that no part sees are kept out of the arithmetic: -inf - -inf is NaN, and so is its gradient.
    highest = parts.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0, highest)
    total = torch.exp(parts - highest).sum(0)
    empty = total == 0
    logarithm = torch.log(torch.where(empty, 1, total)) + highest
    weights = torch.exp(parts - logarithm).unsqueeze(-1)
    if layout == "bshd":
        weights = weights.transpose(-2, -3)
    out = sum(weight * out for weight, out in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), torch.where(empty, -torch.inf, logarithm)
