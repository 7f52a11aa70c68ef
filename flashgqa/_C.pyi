"""The compiled part of flashgqa. Call it through flashgqa.api, which documents it."""

from typing import Any, final

__version__: str
OPTIONS: tuple[str, ...]

@final
class Tensor:
    """A result whose memory is shared by DLPack, for callers whose library offers DLPack but no from_dlpack of its own."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> Any: ...

# The last arguments of the first four are the options in the order of OPTIONS.
def forward(q: Any, k: Any, v: Any, return_lse: bool, out: Any, /, *options: Any) -> Any: ...
def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, /, *options: Any) -> tuple[Any, ...]: ...
def weights(q: Any, k: Any, rows: Any, /, *options: Any) -> Any: ...
def explain(q: Any, k: Any, v: Any, return_lse: bool, out: Any, backward: bool, /, *options: Any) -> dict[str, Any]: ...
def attention_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k_new: Any,
    v_new: Any,
    cache_lens: Any,
    new_lens: Any,
    page_table: Any,
    batch_index: Any,
    left_pad: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    rotary_offsets: Any,
    k_scale: Any,
    v_scale: Any,
    rotary_interleaved: bool,
    return_lse: bool,
    out: Any,
    /,
    *options: Any,
) -> Any: ...
def merge(outs: tuple[Any, ...], lses: tuple[Any, ...], layout: str | None, /) -> tuple[Any, Any]: ...
def dropout_mask(b: int, hq: int, sq: int, sk: int, dropout_p: float, seed: Any, /) -> Any: ...
def kernels() -> list[tuple[str, str, str]]: ...
def cuda_kernels() -> list[tuple[str, str, str | None]]: ...
def build_info() -> dict[str, Any]: ...
def set_num_threads(n: int | None, /) -> None: ...
def get_num_threads() -> int: ...
