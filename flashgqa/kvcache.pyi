"""Types of flashgqa.kvcache."""

from typing import Any, Literal, TypedDict, overload

from typing_extensions import Unpack

from .api import A, Array

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
