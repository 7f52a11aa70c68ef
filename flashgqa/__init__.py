"""Exact attention (MHA, MQA, GQA) on NumPy arrays and DLPack tensors: forward and backward, on the CPU."""

from .api import (
    Config,
    Gradients,
    Plan,
    Tensor,
    __version__,
    attention,
    attention_backward,
    attention_weights,
    dropout_mask,
    explain,
    get_num_threads,
    kernels,
    kv_cache_bytes,
    merge,
    set_num_threads,
    show_config,
)

__all__ = [
    "Config",
    "Gradients",
    "Plan",
    "Tensor",
    "__version__",
    "attention",
    "attention_backward",
    "attention_weights",
    "dropout_mask",
    "explain",
    "get_num_threads",
    "kernels",
    "kv_cache_bytes",
    "merge",
    "set_num_threads",
    "show_config",
]
