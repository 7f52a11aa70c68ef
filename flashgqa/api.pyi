"""Types of flashgqa.api: results have the array type of q, and return_lse decides how many there are."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar, overload

import numpy
from typing_extensions import Unpack

from ._C import Tensor as Tensor

__version__: str

class Array(Protocol):
    """A NumPy array or any tensor with the DLPack methods, of which JAX's stubs name this one only."""

    def __dlpack__(self) -> Any: ...

A = TypeVar("A", bound=Array)

class _Meaning(TypedDict, total=False):
    causal: bool
    window: tuple[int | None, int | None] | None
    align: Literal["bottom-right", "top-left"]
    chunk: int | None
    scale: float | None
    softcap: float | None
    mask: Array | None
    bias: Array | None
    alibi_slopes: Array | None
    sink: Array | None
    q_lens: Array | None
    kv_lens: Array | None
    cu_seqlens_q: Array | None
    cu_seqlens_kv: Array | None
    max_q: int | None
    max_kv: int | None
    layout: Literal["bhsd", "bshd"] | None

class _Place(TypedDict, total=False):
    stream: Any
    check: bool
    device: str | None
    kernel: str | None

class _Computation(TypedDict, total=False):
    dropout_p: float
    seed: int | Array | None
    deterministic: bool
    batch_invariant: bool
    precision: Literal["bf16x3"] | None

class _Scores(_Meaning, _Place, total=False): ...
class _Options(_Scores, _Computation, total=False): ...

class Gradients(NamedTuple):
    dq: Any
    dk: Any
    dv: Any
    dbias: Any
    dsink: Any

class Plan(dict[str, Any]): ...

class Config(dict[str, Any]):
    def _repr_html_(self) -> str: ...

@overload
def attention(
    q: A, k: Array, v: Array, *, return_lse: Literal[False] = False, out: Array | None = None, **options: Unpack[_Options]
) -> A: ...
@overload
def attention(
    q: A, k: Array, v: Array, *, return_lse: Literal[True], out: Array | None = None, **options: Unpack[_Options]
) -> tuple[A, A]: ...
@overload
def attention(
    q: A, k: Array, v: Array, *, return_lse: bool, out: Array | None = None, **options: Unpack[_Options]
) -> A | tuple[A, A]: ...
def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, *, dlse: Array | None = None, **options: Unpack[_Options]
) -> Gradients: ...
def attention_weights(
    q: A,
    k: Array,
    *,
    rows: Array | Sequence[int] | None = None,
    reduce: Literal["keys"] | None = None,
    **options: Unpack[_Scores],
) -> A: ...
def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    backward: bool = False,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Unpack[_Options],
) -> Plan: ...
def merge(outs: Sequence[A], lses: Sequence[Array], *, layout: Literal["bhsd", "bshd"] | None = None) -> tuple[A, A]: ...
def dropout_mask(b: int, hq: int, sq: int, sk: int, dropout_p: float, seed: int | Array) -> numpy.ndarray: ...
def kv_cache_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: Any, tokens: int = 1, batch: int = 1) -> int: ...
def show_config() -> Config: ...
def kernels() -> list[dict[str, Any]]: ...
def set_num_threads(n: int | None, /) -> None: ...
def get_num_threads() -> int: ...
