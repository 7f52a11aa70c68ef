"""Fewer KV heads out of many."""

from ._counts import count, whole


def mean_pool_kv_heads(source, num_kv_heads, *, axis=1):
    """Fewer KV heads: each is the mean of as many neighbours as make one group. The start of a GQA or MQA model from MHA.

    Parameters
    ----------
    source : array
        Keys, values or weights with their heads along ``axis``: a NumPy array, or any with reshape and mean (PyTorch, JAX,
        CuPy, ...). For layers and whole models of PyTorch see `flashgqa.torch.mean_pool_kv_heads`.
    num_kv_heads : int
        A divisor of the number of heads there are. 1 gives MQA.
    axis : int
        That of the heads; default 1, as in [b, hk, s, d].

    Returns
    -------
    array
        Of source's type and dtype, with num_kv_heads heads along ``axis``. A narrow dtype is summed in float32.

    Raises
    ------
    TypeError, ValueError
        Not an array; an axis that it does not have; num_kv_heads that does not divide the heads.

    Notes
    -----
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (arXiv:2305.13245).

    Examples
    --------
    >>> import numpy, flashgqa
    >>> flashgqa.mean_pool_kv_heads(numpy.ones((2, 32, 7, 64)), 8).shape
    (2, 8, 7, 64)
    """
    shape = getattr(source, "shape", None)
    if shape is None or not hasattr(source, "reshape"):
        raise TypeError(
            f"source is {type(source).__name__}: it must be an array; layers and models are for flashgqa.torch.mean_pool_kv_heads"
        )
    if not -len(shape) <= whole("axis", axis) < len(shape):
        raise ValueError(f"axis is {axis} and source has {len(shape)} axes: it must name one of them, that of the heads")
    axis %= len(shape)
    check_division(shape[axis], num_kv_heads)
    pooled = source.reshape((*shape[:axis], num_kv_heads, shape[axis] // num_kv_heads, *shape[axis + 1 :]))
    if type(source).__module__ == "numpy" and source.dtype.itemsize == 2:
        # ml_dtypes' bfloat16 would be summed in bfloat16.
        return pooled.mean(axis + 1, dtype="float32").astype(source.dtype)
    return pooled.mean(axis + 1)


def check_division(heads, num_kv_heads):
    if heads % count("num_kv_heads", num_kv_heads, 1) != 0:
        raise ValueError(f"num_kv_heads is {num_kv_heads} and there are {heads} heads: it must divide them")
