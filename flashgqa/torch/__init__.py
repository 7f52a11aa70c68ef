"""flashgqa for PyTorch: attention with gradients, and what other libraries call it.

Here: `attention` and `merge`; torch's `scaled_dot_product_attention` and `use_flashgqa`; the functions of FlashAttention 2; the
layers `FlashGQA` and `FlashMHA`, and `mean_pool_kv_heads`. In modules of their own, under the names of the originals: `fa3`
(FlashAttention-3), `bert_padding`, `layers.rotary`, `modules.mha`, `xops` (xformers). Importing it also makes the implementation
"FGQA" known to torch.nn.attention.activate_flash_attention_impl.

Importing flashgqa alone never imports torch.
"""

from .. import _torch_flash_impl, _torch_flops  # noqa: F401 - register themselves with torch
from .._torch_attention import attention, merge
from .._torch_flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .._torch_modules import FlashGQA, FlashMHA, mean_pool_kv_heads
from .._torch_sdpa import scaled_dot_product_attention, use_flashgqa

__all__ = [
    "FlashGQA",
    "FlashMHA",
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "mean_pool_kv_heads",
    "merge",
    "scaled_dot_product_attention",
    "use_flashgqa",
]
