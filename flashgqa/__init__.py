"""Exact attention (MHA, MQA, GQA) on NumPy arrays and DLPack tensors: forward and backward, on CPUs and NVIDIA GPUs."""

from importlib.util import find_spec as _find_spec

import numpy as _numpy

if int(_numpy.__version__.partition(".")[0]) < 2:
    raise ImportError(f"flashgqa needs NumPy 2.0 or newer, this is {_numpy.__version__}: pip install 'numpy>=2.0'")
if _find_spec(f"{__name__}._C") is None:
    raise ImportError(
        f"{__path__[0]} is flashgqa's source folder and holds no compiled module; build it there with 'pip install -e .', "
        "or leave the checkout to import the installed package"
    )

from ._heads import mean_pool_kv_heads
from ._warmup import warmup
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
from .kvcache import KVCache, attention_with_kvcache, explain_with_kvcache

__all__ = [
    "Config",
    "Gradients",
    "KVCache",
    "Plan",
    "Tensor",
    "__version__",
    "attention",
    "attention_backward",
    "attention_weights",
    "attention_with_kvcache",
    "dropout_mask",
    "explain",
    "explain_with_kvcache",
    "get_num_threads",
    "kernels",
    "kv_cache_bytes",
    "mean_pool_kv_heads",
    "merge",
    "set_num_threads",
    "show_config",
    "warmup",
]
