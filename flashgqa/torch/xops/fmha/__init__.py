"""xformers.ops.fmha: memory_efficient_attention with gradients, for tensors as biases, our bias objects and xformers' own."""

from ...._torch_attention import attention
from ...._torch_packing import packed_rows
from . import attn_bias
from .attn_bias import AttentionBias, BlockDiagonalMask, LowerTriangularMask, rule_of

__all__ = ["AttentionBias", "BlockDiagonalMask", "LowerTriangularMask", "attn_bias", "memory_efficient_attention"]


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers.ops.memory_efficient_attention: same arguments, same meaning.

    Parameters
    ----------
    query : torch.Tensor, [batch, sq, heads, d]
        Or [batch, sq, d] with one head, or [batch, sq, groups, heads, d] for grouped heads: one KV head a group, which key and
        value [batch, sk, groups, heads, d] hold expanded; they are read once a group then, and gradients reach them, too.
    key, value : torch.Tensor
        [batch, sk, heads, d] and [batch, sk, heads, dv]. Fewer heads than query's are grouped heads, too.
    attn_bias : tensor or bias object, optional
        A tensor is added to the scores, broadcast to [batch, heads, sq, sk] ([batch, groups, heads, sq, sk] with groups). Objects
        are those of `flashgqa.torch.xops.fmha.attn_bias`, or xformers' of the same names. Block-diagonal ones take
        a batch of one.
    p : float
        Probability with which a weight is dropped.
    op
        Chooses between xformers' kernels, and changes nothing here.
    output_dtype : torch.dtype, optional

    Returns
    -------
    out : as query, with dv
    """
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4, 5):
        raise ValueError(
            f"query, key and value are {list(query.shape)}, {list(key.shape)} and {list(value.shape)}: all must be "
            "[batch, length, heads, head dim], or without heads, or with [..., groups, heads, head dim]"
        )
    shape = (*query.shape[:-1], value.shape[-1])
    if query.dim() == 3:
        q, k, v = (x.unsqueeze(2) for x in (query, key, value))
    elif query.dim() == 5:
        q, (k, v) = query.flatten(2, 3), _per_group(key, value)
    else:
        q, k, v = query, key, value
    out = _compute(q, k, v, attn_bias, query.dim(), scale, p).reshape(shape)
    return out if output_dtype is None else out.to(output_dtype)


def _per_group(*tensors):
    """One KV head a group where all heads of the groups are the same memory, else all of them."""
    if all(x.shape[3] == 1 or x.stride(3) == 0 for x in tensors):
        return [x[:, :, :, 0] for x in tensors]
    return [x.flatten(2, 3) for x in tensors]


def _compute(q, k, v, bias, dims, scale, p):
    options = dict(scale=scale, dropout_p=p)
    if bias is None:
        return attention(q, k, v, layout="bshd", **options)
    rule = rule_of(bias)
    options.update(causal=rule.causal, align=rule.align, window=rule.window)
    if rule.bias is not None:
        grouped = dims == 5 and rule.bias.dim() == 5
        options["bias"] = rule.bias.unsqueeze(1) if dims == 3 else rule.bias.flatten(1, 2) if grouped else rule.bias
    if rule.rows is None:
        return attention(q, k, v, layout="bshd", **options)
    if not q.shape[0] == k.shape[0] == v.shape[0] == 1:
        raise ValueError(
            f"query, key and value are batches of {q.shape[0]}, {k.shape[0]} and {v.shape[0]}: with {type(bias).__name__} they "
            "must be of one, which holds the sequences one after the other"
        )
    return _packed(q[0], k[0], v[0], rule.rows, rule.keys, options)[None]


def _packed(q, k, v, rows, keys, options):
    sequences, padding = rows.seqstart.shape[0] - 1, getattr(keys, "padding", None)
    if padding is not None and rows.min_seqlen == rows.max_seqlen and sequences:
        # Each sequence has as many queries: keys are read where they are.
        padded = [x.unflatten(0, (sequences, -1)) for x in (q, k, v)]
        return attention(*padded, kv_lens=keys.seqlen, layout="bshd", **options).flatten(0, 1)
    cu_seqlens_kv = keys.seqstart
    if hasattr(keys, "seqlen"):
        (k, cu_seqlens_kv), (v, _) = (packed_rows(x, keys.seqstart[:-1], keys.seqlen) for x in (k, v))
    return attention(
        q, k, v, cu_seqlens_q=rows.seqstart, cu_seqlens_kv=cu_seqlens_kv, max_q=rows.max_seqlen, max_kv=keys.max_seqlen, **options
    )
