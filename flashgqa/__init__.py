"""Exact attention (MHA, MQA, GQA) on NumPy arrays and DLPack tensors: forward and backward, on CPUs and NVIDIA GPUs."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

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

if not _TYPE_CHECKING:  # which would take every name for one of the module

    def __getattr__(name):
        """Submodules that are imported when they are first named, as flashgqa.torch imports torch."""
        if name in ("jax", "reference", "torch", "transformers"):
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
