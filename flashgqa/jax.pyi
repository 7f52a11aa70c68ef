"""Types of flashgqa.jax: results are JAX arrays, and return_lse decides how many there are."""

from typing import Any, Literal, overload

import jax
from typing_extensions import Unpack

from .api import Array, _Computation, _Meaning

__all__ = ["attention", "dot_product_attention"]

class _Options(_Meaning, _Computation, total=False):
    kernel: str | None

@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> jax.Array: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, return_lse: bool, **options: Unpack[_Options]
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any: ...
