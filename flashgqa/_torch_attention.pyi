"""Types of flashgqa.torch's own functions: results are tensors, and return_lse decides how many there are."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from .api import _Computation, _Meaning

WIDEST: int

class _Options(_Meaning, _Computation, total=False):
    check: bool

@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Options]) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, layout: Literal["bhsd", "bshd"] | None = None
) -> tuple[Tensor, Tensor]: ...
def draw_seed(device: Any) -> Tensor: ...
def seed_tensor(seed: int, device: Any) -> Tensor: ...
def bounds(window: Any) -> tuple[int | None, int | None]: ...
def whole(n: Any) -> Any: ...
def attention_matrix(q: Tensor, k: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor: ...
