"""Layers over `attention`, and fewer KV heads out of many."""

import torch
from torch import nn

from ._torch_attention import attention


class FlashMHA(nn.Module):
    """Self-attention over x [batch, seq, d_model], with linear layers W_q, W_k, W_v and W_o around it; out as x.

    Parameters
    ----------
    d_model, num_heads : int
        Width, and query heads of d_model / num_heads each.
    num_kv_heads : int, optional
        A divisor of num_heads; default num_heads (MHA). 1 is MQA.
    causal, window
        As in `attention`.
    dropout_p : float
        Probability with which a weight is dropped, in training only.
    bias : bool
        Whether the four linear layers have one.
    """

    def __init__(
        self, d_model, num_heads, *, num_kv_heads=None, causal=False, window=None, dropout_p=0.0, bias=True, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or d_model % num_heads != 0:
            raise ValueError(f"d_model is {d_model} and num_heads {num_heads}: d_model must be a multiple of num_heads")
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}: num_heads must be a multiple of it")
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim = d_model // num_heads
        self.causal, self.window, self.dropout_p = causal, window, dropout_p
        kv_width = num_kv_heads * self.head_dim
        self.W_q = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)
        self.W_k = nn.Linear(d_model, kv_width, bias=bias, device=device, dtype=dtype)
        self.W_v = nn.Linear(d_model, kv_width, bias=bias, device=device, dtype=dtype)
        self.W_o = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.W_q, self.W_k, self.W_v))
        dropout_p = self.dropout_p if self.training else 0.0
        out = attention(q, k, v, causal=self.causal, window=self.window, dropout_p=dropout_p, layout="bshd")
        return self.W_o(out.flatten(-2))

    def extra_repr(self):
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, causal={self.causal}, "
            f"window={self.window}, dropout_p={self.dropout_p}"
        )


def mean_pool_kv_heads(source, num_kv_heads, *, axis=1):
    """Fewer KV heads: each is the mean of as many neighbours as make one group. The start of a GQA or MQA model from MHA.

    Parameters
    ----------
    source : torch.Tensor or FlashMHA
        Keys, values or weights with their heads along ``axis``; a layer gives a new layer of pooled W_k and W_v.
    num_kv_heads : int
        A divisor of the number of heads there are.
    axis : int
        That of the heads; for tensors only. A linear layer's weight is ``weight.unflatten(0, (heads, -1))`` with axis 0.

    Notes
    -----
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (arXiv:2305.13245).
    """
    heads = source.num_kv_heads if isinstance(source, FlashMHA) else source.shape[axis]
    if num_kv_heads < 1 or heads % num_kv_heads != 0:
        raise ValueError(f"num_kv_heads is {num_kv_heads} and there are {heads} heads: it must divide them")
    if not isinstance(source, FlashMHA):
        axis = axis % source.dim()
        return source.unflatten(axis, (num_kv_heads, -1)).mean(axis + 1)
    weight = source.W_q.weight
    layer = FlashMHA(
        source.d_model, source.num_heads, num_kv_heads=num_kv_heads, causal=source.causal, window=source.window,
        dropout_p=source.dropout_p, bias=source.W_q.bias is not None, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        for name, x in source.state_dict().items():
            if name.startswith(("W_k", "W_v")):
                x = mean_pool_kv_heads(x.unflatten(0, (heads, -1)), num_kv_heads, axis=0).flatten(0, 1)
            layer.get_parameter(name).copy_(x)
    return layer.train(source.training)
