"""attention and merge of `flashgqa.torch`."""

import torch

from ._counts import whole as whole_number
from ._torch_eager import attend

WIDEST = 256  # the greatest head dim of values


def draw_seed(device):
    """int64 [seed, offset] from torch's generator of a device; stays there, so that nothing waits for it."""
    return torch.randint(2**32, (2,), dtype=torch.int64, device=device)


def seed_tensor(seed, device):
    """[seed, 0] without a copy from the host, which would have to wait."""
    if not isinstance(seed, int) or isinstance(seed, bool):     # of an int whole_number() would make torch.compile a constant
        try:
            seed = whole_number("seed", seed)
        except TypeError:
            raise TypeError(f"seed is {seed!r}: it must be an integer or an int64 tensor [seed, offset]") from None
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: it must be 0 to 2**64 - 1")
    key = torch.zeros(2, dtype=torch.int64, device=device)
    key[:1].fill_(seed - 2**64 if seed >= 2**63 else seed)
    return key


def bounds(window):
    """A window of flash_attn's, in which -1 (any negative number) is no bound, as `attention` takes it. None is none, too."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"window_size is {window!r}: it must be (left, right), where -1 or None is no bound") from None
    return None if left is None or left < 0 else left, None if right is None or right < 0 else right


def whole(n):
    """The longest length as an int: flash_attn also takes a tensor of one element. It is a bound and no more, so where reading it
    would mean to wait for a GPU, or to break a graph that torch.compile traces, there is none.
    """
    if not isinstance(n, torch.Tensor):
        return n
    return None if n.is_cuda or torch.compiler.is_compiling() else n.item()


def attention_matrix(q, k, run):
    """The weights [b, hq, sq, sk] of attention of q to k [b, s, h, d]: run(v) is what it makes of values v, [b, sq, hq, dv], and
    of unit vectors it makes columns of its weights. Differentiable where run is.
    """
    b, keys, heads = k.shape[:3]
    if keys == 0:
        return q.new_zeros(b, q.shape[2], q.shape[1], 0)
    unit = torch.eye(keys, dtype=q.dtype, device=q.device)
    columns = [run(part[None, :, None].expand(b, keys, heads, -1)) for part in unit.split(WIDEST, 1)]
    return torch.cat(columns, -1).transpose(1, 2)


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
        As in `flashgqa.attention`; arrays are torch tensors, and max_q and max_kv may be, which a GPU leaves unread.
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

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flashgqa.attention`; TypeError for what is no torch.Tensor.
    torch.OutOfMemoryError
        Results or workspace do not fit into memory.
    """
    given = not (
        mask is bias is alibi_slopes is sink is q_lens is kv_lens is cu_seqlens_q is cu_seqlens_kv is None and dropout_p == 0
    )
    if cu_seqlens_q is not None:
        max_q, max_kv = whole(max_q), whole(max_kv)
    if isinstance(alibi_slopes, torch.Tensor) and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("alibi_slopes requires grad: it has no gradient; pass alibi_slopes.detach()")
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(q.device)
    elif not isinstance(seed, torch.Tensor):
        seed = seed_tensor(seed, q.device)
    options = (
        causal, (None, None) if window is None else window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink,
        q_lens, kv_lens, cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, None,
        deterministic or torch.are_deterministic_algorithms_enabled(), batch_invariant, precision, check, None, None,
    )  # fmt: skip
    return attend(q, k, v, return_lse, options, given)


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
        As `attention` would have returned them. A row that no part sees is 0, with lse -inf.

    Raises
    ------
    ValueError
        No parts, not one lse for each out, or shapes and dtypes that differ.

    Notes
    -----
    With sink, exactly one part may have it: lse counts it. Milakov and Gimelshein, "Online normalizer calculation for softmax"
    (arXiv:1805.02867).
    """
    if layout not in (None, "bhsd", "bshd"):
        raise ValueError(f'layout is {layout!r}: it must be "bhsd" or "bshd"')
    outs, lses = tuple(outs), tuple(lses)
    for name, parts in (("outs", outs), ("lses", lses)):
        for n, x in enumerate(parts):
            if not isinstance(x, torch.Tensor):
                fix = "it must be a torch.Tensor; flashgqa.merge takes other arrays"
                raise TypeError(f"{name}[{n}] is {type(x).__name__}: {fix}")
    if len(outs) != len(lses) or not len(outs):
        raise ValueError(f"merge got {len(outs)} outs and {len(lses)} lses: it needs one lse for each out, and at least one pair")
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        rows = out.shape[:-1] if layout != "bshd" else (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype or lse.shape != rows:
            raise ValueError(
                f"outs[{n}] is {out.dtype} {list(out.shape)} with lse {list(lse.shape)}: all must be as outs[0], {outs[0].dtype} "
                f"{list(outs[0].shape)}, with lse [b, hq, sq] (without b for rank 3)"
            )
    parts = torch.stack(lses)
    # Rows that no part sees are kept out of the arithmetic: -inf - -inf is NaN, and so is its gradient.
    highest = parts.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0, highest)
    # A part whose sink is +inf has all of the weight, and all of the gradient of lse.
    infinite = parts == torch.inf
    exponents = torch.where(infinite, 0, parts - highest)
    total = torch.exp(exponents).sum(0)
    empty = total == 0
    rest = torch.log(torch.where(empty, 1, total))
    logarithm = rest + highest + torch.where(infinite, parts, 0).sum(0)
    weights = torch.exp(exponents - rest).unsqueeze(-1)
    if layout == "bshd":
        weights = weights.transpose(-2, -3)
    out = sum(weight * out for weight, out in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), torch.where(empty, -torch.inf, logarithm)
