"""Types of flashgqa.kvcache."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import numpy
from typing_extensions import Unpack

from .api import A, Array, Plan

class _CacheOptions(TypedDict, total=False):
    cache_lens: Array | int | None
    new_lens: Array | None
    q_lens: Array | None
    page_table: Array | None
    batch_index: Array | None
    left_pad: Array | None
    rotary: tuple[Array, Array] | None
    rotary_interleaved: bool
    rotary_offsets: Array | None
    k_scale: Array | None
    v_scale: Array | None
    causal: bool
    window: tuple[int | None, int | None] | None
    chunk: int | None
    scale: float | None
    softcap: float | None
    alibi_slopes: Array | None
    sink: Array | None
    layout: Literal["bhsd", "bshd"] | None
    out: Array | None
    stream: Any
    batch_invariant: bool
    check: bool
    device: str | None
    kernel: str | None

@overload
def attention_with_kvcache(
    q: A,
    k_cache: Array,
    v_cache: Array,
    k_new: Array | None = None,
    v_new: Array | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_CacheOptions],
) -> A: ...
@overload
def attention_with_kvcache(
    q: A,
    k_cache: Array,
    v_cache: Array,
    k_new: Array | None = None,
    v_new: Array | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_CacheOptions],
) -> tuple[A, A]: ...
@overload
def attention_with_kvcache(
    q: A,
    k_cache: Array,
    v_cache: Array,
    k_new: Array | None = None,
    v_new: Array | None = None,
    *,
    return_lse: bool,
    **options: Unpack[_CacheOptions],
) -> A | tuple[A, A]: ...
def explain_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k_new: Array | None = None,
    v_new: Array | None = None,
    *,
    return_lse: bool = False,
    **options: Unpack[_CacheOptions],
) -> Plan: ...

_Integers = int | Sequence[int] | numpy.ndarray

class KVCache:
    capacity: int
    page_size: int
    layout: Literal["bhsd", "bshd"]
    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int,
        value_dim: int | None = None,
        dtype: Any = "float32",
        page_size: int = 128,
        pages: int | None = None,
        layout: Literal["bhsd", "bshd"] = "bhsd",
        library: Literal["numpy", "torch"] = "numpy",
        device: Any = None,
        k_scale: Array | None = None,
        v_scale: Array | None = None,
    ) -> None: ...
    def __len__(self) -> int: ...
    @property
    def k(self) -> Any: ...
    @property
    def v(self) -> Any: ...
    @property
    def page_table(self) -> numpy.ndarray: ...
    @property
    def lens(self) -> numpy.ndarray: ...
    @property
    def bytes_used(self) -> int: ...
    @property
    def bytes_allocated(self) -> int: ...
    def attention(
        self, q: A, k_new: Array | None = None, v_new: Array | None = None, *, new_lens: _Integers | None = None, **options: Any
    ) -> Any: ...
    def append(self, k_new: Array, v_new: Array, *, new_lens: _Integers | None = None, **options: Any) -> None: ...
    def crop(self, lens: _Integers) -> None: ...
    def reorder(self, sequences: Sequence[int] | numpy.ndarray) -> None: ...
    def fork(self, sequences: Sequence[int] | numpy.ndarray | None = None) -> KVCache: ...
    def sequence(self, n: int) -> tuple[Any, Any]: ...
