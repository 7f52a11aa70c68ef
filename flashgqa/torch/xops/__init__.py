"""xformers.ops under flashgqa.torch: memory_efficient_attention and its biases."""

from . import fmha
from .fmha import memory_efficient_attention
from .fmha.attn_bias import AttentionBias, LowerTriangularMask

AttentionMask = AttentionBias

__all__ = ["AttentionBias", "AttentionMask", "LowerTriangularMask", "fmha", "memory_efficient_attention"]
