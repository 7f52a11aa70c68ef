"""Whether tensors are plain ones, asked of torch once for all of a call: torch.compile's guards, where this torch has them.

A tensor of exact type torch.Tensor may be no memory with values: negated lazily, sparse, a wrapper of torch.func. The long way to
know is a question for each of these and each tensor. But a guard says in one call whether tensors have the type, dispatch keys,
dtype, device, rank and requires_grad of others, which were asked the long way.
"""

import torch
from torch.utils._python_dispatch import _disable_current_modes


def _guard_of(*tensors):
    """(check, whether one of them requires grad): check(*others) says whether others are of the same kind, whatever their shapes.
    Not of one tensor given twice: of that it says no, and the long way is gone.
    """
    any_shape = [[None] * x.dim() for x in tensors]
    guard = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=any_shape, dynamic_dims_strides=any_shape)
    return guard.check, any(x.requires_grad for x in tensors)


def _tells_kinds_apart():
    """Tried, because torch promises nothing about what is not public."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        plain, longer = torch.zeros(1, 2, device="cpu"), torch.zeros(5, 7, device="cpu").T
        others = (
            torch._neg_view(plain), torch._to_functional_tensor(plain), plain.to_sparse(), plain.to("meta"), plain.double(),
            plain.detach().requires_grad_(), torch.nn.Parameter(plain, requires_grad=False), plain[0],
        )  # fmt: skip
        check, requires_grad = _guard_of(plain, longer)
        return (
            check(plain, longer) and check(longer, plain) and not requires_grad
            and not any(check(longer, x) or check(x, longer) for x in (*others, None))
        )  # fmt: skip


def _find():
    try:
        return _guard_of if _tells_kinds_apart() else None
    except Exception:  # another torch: its own names, arguments or errors
        return None


guard_of = _find()
