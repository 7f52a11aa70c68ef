"""The functions of flashgqa: signatures, defaults and documentation. All checks and all arithmetic are in ``flashgqa._C``.

Letters: b batch, hq and hk query and KV heads, g = hq/hk, sq and sk lengths, d head dim of q and k, dv of v and out;
i a query row, j a key.
"""

from html import escape
from operator import index
from typing import NamedTuple

import numpy

from . import _C
from ._C import Tensor, __version__, get_num_threads, set_num_threads
from ._keywords import in_c
from ._memory import kv_cache_bytes

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


@in_c
def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    align="bottom-right",
    chunk=None,
    scale=None,
    softcap=None,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_q=None,
    max_kv=None,
    dropout_p=0.0,
    seed=None,
    layout=None,
    return_lse=False,
    out=None,
    stream=None,
    deterministic=True,
    batch_invariant=False,
    precision=None,
    check=False,
    device=None,
    kernel=None,
):
    """Exact attention, out = softmax(scale * q k^T + ...) v, in O(sq + sk) memory.

    Query head h reads KV head floor(h / g), g = hq / hk: hk = hq is MHA, hk = 1 MQA, anything between GQA. Of row i the
    score with key j is ::

        x = scale * (q_i . k_j)                 default scale 1/sqrt(d)
        x = softcap * tanh(x / softcap)         if softcap is given
        x = x + bias - slope * |diag(i) - j|    diag(i) = i + sk - sq, or i with align="top-left"

    over the keys that the row sees; with weights p = exp(x - lse), lse = log(sum exp x), out_i = sum_j p_j v_j. A row that
    sees no key has out = 0 and lse = -inf. Keys that are not seen never matter, even if they hold NaN.

    Parameters
    ----------
    q : array, [b, hq, sq, d]
        NumPy array or any tensor with ``__dlpack__`` (PyTorch, JAX, ...), on a CPU or GPU. float64, float32, float16 or bfloat16.
        Rank 3, [hq, sq, d], is a batch of one. Any strides; a last axis that is not contiguous is copied once.
    k : array, [b, hk, sk, d]
        Keys, of the dtype of q. hq must be a multiple of hk.
    v : array, [b, hk, sk, dv]
        Values, of the dtype of q.
    causal : bool
        Row i sees keys j <= diag(i).
    window : (left, right), optional
        Row i sees diag(i) - left <= j <= diag(i) + right, both inclusive; None in a place: no bound.
    align : {"bottom-right", "top-left"}
        Whether the last rows and keys of a sequence meet on the diagonal, or the first ones.
    chunk : int, optional
        Row i sees keys with floor(j / chunk) = floor(diag(i) / chunk) only.
    scale, softcap : float, optional
        See the equation. softcap > 0.
    mask : bool array, broadcast to [b, hq, sq, sk], optional
        True: may attend. Rank 2 is [sq, sk]; key padding is [b, 1, 1, sk]. Read in place, never expanded.
    bias : float array, broadcast to [b, hq, sq, sk], optional
        Added to the scores; -inf masks.
    alibi_slopes : float32 array, [hq] or [b, hq], optional
        The slopes of the equation (ALiBi).
    sink : float array, [hq], optional
        A logit for each head in the denominator only; part of lse.
    q_lens, kv_lens : int32 array, [b], optional
        Lengths of the sequences of padded tensors. They are the sq and sk of diag(i): causal self-attention over padded sequences
        takes both, for kv_lens alone moves the diagonal. Padded rows have out = 0 and lse = -inf.
    cu_seqlens_q, cu_seqlens_kv : int32 array, [b + 1], optional
        Sequences joined along the first axis: q is [total_q, hq, d], k [total_kv, hk, d], v [total_kv, hk, dv].
    max_q, max_kv : int, optional
        Upper bounds of the lengths with cu_seqlens.
    dropout_p : float
        Probability with which a weight is dropped, after the softmax; lse is that without dropout.
    seed : int or int64 array [seed, offset], optional
        Key of the dropout's Philox4x32-10; needed with dropout_p > 0. See `dropout_mask`.
    layout : {"bhsd", "bshd"}, optional
        Order of the axes of q, k, v and out; default "bhsd". mask, bias and lse do not depend on it.
    return_lse : bool
        Also return lse.
    out : array, optional
        Where to write the result: exact shape and dtype, contiguous last axis, writable, no overlap with inputs.
        An error leaves it as it was; Ctrl-C may leave it half written.
    stream : int or stream object, optional
        CUDA stream to work on, for tensors on a GPU: its address, or a stream of torch, CuPy or any with ``__cuda_stream__``.
        The default is the current stream of q's library. Nothing waits for the GPU.
    deterministic : bool
        The same bits run to run. False: the backward pass may add up dq in any order, which it does where that is faster
        (`explain`: any_order). The CPU is always deterministic, whatever the number of threads.
    batch_invariant : bool
        The bits of a sequence do not depend on the rest of the batch; those of dq only where `deterministic` is true, too.
    precision : {"bf16x3"}, optional
        "bf16x3", for float32 on a CPU with AMX, forward and backward: numbers are sums of two bfloat16 numbers and products three
        of theirs, summed in float32, with errors of about 2^-16 of what is multiplied. NotImplementedError elsewhere.
    check : bool
        Check the contents of lengths, offsets and seeds on a GPU, too, which waits for it; on the CPU they always are.
    device : {"cpu", "cuda", "cuda:N"}, optional
        Where NumPy arrays are computed; they are copied to a GPU, and the results back, in parts beside the computation.
    kernel : str, optional
        Force one of `kernels`; by default the plan chooses, see `explain`.

    Returns
    -------
    out : array, [b, hq, sq, dv] in the layout of q
        Of q's array type and dtype, or the object given as ``out``.
    lse : array, [b, hq, sq], float32 (float64 for float64)
        With ``return_lse``. [hq, sq] for rank 3, [hq, total_q] with cu_seqlens.

    Raises
    ------
    TypeError
        Wrong kind of object or dtype.
    ValueError
        Wrong shape, range or combination.
    BufferError
        A tensor that cannot be exported by DLPack, such as a torch tensor that requires grad while grad mode is on.
    NotImplementedError
        A valid request that no kernel of this build serves; the message gives each kernel's reason.

    Notes
    -----
    Tiled softmax after Dao et al., "FlashAttention" (arXiv:2205.14135) and Milakov, Gimelshein, "Online normalizer
    calculation for softmax" (arXiv:1805.02867); grouped heads after Ainslie et al., "GQA" (arXiv:2305.13245) and Shazeer,
    "Fast Transformer Decoding" (arXiv:1911.02150).

    Examples
    --------
    >>> import numpy, flashgqa
    >>> q = numpy.random.randn(1, 8, 5, 64)
    >>> k = v = numpy.random.randn(1, 2, 7, 64)
    >>> flashgqa.attention(q, k, v, causal=True).shape
    (1, 8, 5, 64)
    """
    return _C.forward(
        q, k, v, return_lse, out,
        causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, stream, deterministic, batch_invariant,
        precision, check, device, kernel,
    )  # fmt: skip


class Gradients(NamedTuple):
    """What `attention_backward` returns; dbias and dsink are None where bias and sink were."""

    dq: object
    dk: object
    dv: object
    dbias: object
    dsink: object


def attention_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    dlse=None,
    causal=False,
    window=None,
    align="bottom-right",
    chunk=None,
    scale=None,
    softcap=None,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_q=None,
    max_kv=None,
    dropout_p=0.0,
    seed=None,
    layout=None,
    stream=None,
    deterministic=True,
    batch_invariant=False,
    precision=None,
    check=False,
    device=None,
    kernel=None,
):
    """Gradients of `attention`. Nothing is kept from the forward pass: give the same inputs and the same options.

    With p the weights of the forward pass, ds = p * (dout v^T - delta), delta = sum(dout * out) - dlse: ::

        dv = p^T dout,    dq = scale * ds k,    dk = scale * ds^T q,    dbias = ds,    dsink = -sum exp(sink - lse) * delta

    (dropout and softcap are carried through as well), summed over the query heads of a group.

    Parameters
    ----------
    dout : array
        Gradient of out, of its shape and dtype.
    q, k, v : array
        As in `attention`.
    out, lse : array
        What ``attention(..., return_lse=True)`` returned.
    dlse : array, optional
        Gradient of lse, of its shape and dtype.
    causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, \
cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, stream, deterministic, batch_invariant, precision, check, device, kernel
        As in `attention`. There is no gradient of alibi_slopes.

    Returns
    -------
    Gradients
        Named tuple (dq, dk, dv, dbias, dsink), each of the dtype and shape of its input (dbias that of bias, summed over
        the axes in which bias was broadcast), of q's array type.

    Raises
    ------
    TypeError, ValueError, BufferError, NotImplementedError
        As `attention`.

    Notes
    -----
    Recomputation of p after Dao et al., "FlashAttention" (arXiv:2205.14135), algorithm 4.

    Examples
    --------
    >>> import numpy, flashgqa
    >>> q = numpy.random.randn(8, 5, 64)
    >>> k = v = numpy.random.randn(2, 7, 64)
    >>> out, lse = flashgqa.attention(q, k, v, return_lse=True)
    >>> flashgqa.attention_backward(out, q, k, v, out, lse).dk.shape
    (2, 7, 64)
    """
    return Gradients(*_C.backward(
        dout, q, k, v, out, lse, dlse, True,
        causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, stream, deterministic, batch_invariant,
        precision, check, device, kernel,
    ))  # fmt: skip


def merge(outs, lses, *, layout=None):
    """Combine results of attention over disjoint sets of keys into the result over all of them.

    lse = log(sum_n exp lse_n), out = sum_n exp(lse_n - lse) out_n. Of several calls only one may have had a ``sink``.

    Parameters
    ----------
    outs : sequence of arrays, [b, hq, sq, dv]
        What ``attention(..., return_lse=True)`` returned first for each part; all of one shape and dtype. Rank 3: without b.
    lses : sequence of arrays, [b, hq, sq], float32 (float64 for float64)
        What it returned second.
    layout : {"bhsd", "bshd"}, optional
        That of outs; default "bhsd". Packed results [total, hq, dv] are "bshd".

    Returns
    -------
    out, lse : array
        As `attention` would have returned them, of the array type of ``outs[0]``. A row that no part sees: 0 and -inf.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        No parts, not one lse for each out, shapes or dtypes that differ; more than 32 parts on a GPU.

    Notes
    -----
    Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
    """
    parts = []
    for name, given in (("outs", outs), ("lses", lses)):
        try:
            parts.append(tuple(given))
        except TypeError:
            raise TypeError(f"{name} is {type(given).__name__}: it must be a sequence of arrays, one for each part") from None
    return _C.merge(*parts, layout)


def dropout_mask(b, hq, sq, sk, dropout_p, seed):
    """The dropout mask that the kernels use, on every device and for every tile size.

    Weight (batch, h, i, j) is kept if 16 bits of Philox4x32-10 are at least t = round(65536 * dropout_p); key = seed,
    counter = (floor(j / 8), i, batch * hq + h, offset), half j % 8 of the output. What is kept is scaled by 65536 / (65536 - t).

    Parameters
    ----------
    b, hq, sq, sk : int
        Extents. With packed sequences b counts them, and i and j are local to each.
    dropout_p : float
        Probability of being dropped, 0 to 1.
    seed : int or int64 array [seed, offset]
        As in `attention`.

    Returns
    -------
    numpy.ndarray, bool, [b, hq, sq, sk]
        True where the weight is kept.

    Raises
    ------
    TypeError, ValueError
        An extent that is no integer or negative, dropout_p that is no probability, a seed as in `attention`.

    Notes
    -----
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    return _C.dropout_mask(b, hq, sq, sk, dropout_p, seed)


def attention_weights(
    q,
    k,
    *,
    rows=None,
    reduce=None,
    causal=False,
    window=None,
    align="bottom-right",
    chunk=None,
    scale=None,
    softcap=None,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_q=None,
    max_kv=None,
    layout=None,
    stream=None,
    check=False,
    device=None,
    kernel=None,
):
    """Weights of chosen query rows, or sums of weights over all rows, without the [sq, sk] matrix.

    p_ij = exp(x_ij - lse_i), with the scores x and their log-sum-exp of the equations of `attention`.

    Parameters
    ----------
    q, k : array
        As in `attention`.
    rows : int64 array [n], or sequence of int, optional
        Query rows whose weights are returned; with packed sequences local to each sequence. On a GPU a sequence or NumPy array is
        copied there (not while a graph is recorded). Out of range in an array on the GPU: weights 0, or an error with check=True.
    reduce : {"keys"}, optional
        Return for each key the sum of its weights over all query rows. Exactly one of rows and reduce must be given.
    causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, \
cu_seqlens_kv, max_q, max_kv, layout, stream, check, device, kernel
        As in `attention`. There is no dropout; a sink is in the denominator.

    Returns
    -------
    array, float32 (float64 for float64)
        [b, hq, n, sk] for rows, [b, hq, sk] for reduce="keys"; without b for rank 3. Keys not seen have weight 0. Of packed
        sequences sk is the longest one; on a GPU, where offsets are not read, max_kv, or all rows of k if it is not given.

    Raises
    ------
    TypeError, ValueError, BufferError, NotImplementedError
        As `attention`; both of rows and reduce, or none; rows that q does not have.
    """
    if (rows is None) == (reduce is None):
        raise ValueError('rows and reduce: exactly one must be given; pass rows=[...], or reduce="keys"')
    if reduce is not None and reduce != "keys":
        raise ValueError(f'reduce is {reduce!r}: it must be "keys"')
    if isinstance(rows, (list, tuple, range)):
        try:
            whole = [index(row) for row in rows if not isinstance(row, bool)]
            if len(whole) < len(rows):
                raise TypeError
            rows = numpy.array(whole, dtype=numpy.int64)
        except (TypeError, OverflowError):
            fix = "it must be a sequence of integers, or an int64 array; of a mask those are numpy.flatnonzero(mask)"
            raise TypeError(f"rows is {rows!r}: {fix}") from None
    return _C.weights(
        q, k, rows,
        causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, 0.0, None, layout, stream, True, False,
        None, check, device, kernel,
    )  # fmt: skip


class Plan(dict):
    """How a call would run. A dict of plain data, printed as text.

    Keys: kernel, pass, device, dtype, b, hq, hk, sq, sk, d, dv; block_q, block_k (rows and keys of a tile), splits, tasks,
    threads (most workers), scratch_bytes (each worker), workspace_bytes, flops (of visible scores), any_order (of additions to
    dq), refused (list of (kernel, reason) passed over), text.
    """

    def __str__(self):
        return self["text"]

    __repr__ = __str__


def explain(
    q,
    k,
    v,
    *,
    backward=False,
    causal=False,
    window=None,
    align="bottom-right",
    chunk=None,
    scale=None,
    softcap=None,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_q=None,
    max_kv=None,
    dropout_p=0.0,
    seed=None,
    layout=None,
    return_lse=False,
    out=None,
    stream=None,
    deterministic=True,
    batch_invariant=False,
    precision=None,
    check=False,
    device=None,
    kernel=None,
):
    """Which kernel a call would run, in what tiles, with how much memory, and why faster ones do not serve it.

    Nothing is computed. All errors of the call itself are raised here, too.

    Parameters
    ----------
    q, k, v : array
        As in `attention`.
    backward : bool
        Explain `attention_backward` instead of `attention`, with the gradients of bias and sink.
    causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, \
cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, return_lse, out, stream, deterministic, batch_invariant, precision, \
check, device, kernel
        As in `attention`.

    Returns
    -------
    Plan
        A dict that prints as text.
    """
    return Plan(_C.explain(
        q, k, v, return_lse, out, backward,
        causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, dropout_p, seed, layout, stream, deterministic, batch_invariant,
        precision, check, device, kernel,
    ))  # fmt: skip


class Config(dict):
    """What `show_config` returns: a dict that prints as a table, also in notebooks."""

    def __str__(self):
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in self.items())

    __repr__ = __str__

    def _repr_html_(self):
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in self.items())
        return f"<table>{rows}</table>"


def _text(value):
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def show_config():
    """This build and this machine: version, instruction sets, threads, NumPy, and whether CUDA can be used or why not.

    Returns
    -------
    Config
        A dict that prints as a table. Keys: version, isa (in use), isa_compiled, isa_supported (of those), cpu_features,
        threads, openmp (the runtime on whose threads calls with PyTorch's tensors can run, or None: PyTorch is not
        imported, or the process was forked), numpy, dlpack, compiler, cuda (whether a GPU can be used), cuda_reason (why
        not, or None), cuda_devices, cuda_runtime (built in), cuda_driver.
    """
    build = _C.build_info()
    return Config(
        version=__version__,
        isa=build["isa_in_use"],
        isa_compiled=[name for name, is_compiled, _ in build["isa"] if is_compiled],
        isa_supported=[name for name, is_compiled, supported in build["isa"] if is_compiled and supported],
        cpu_features=build["cpu_features"],
        threads=get_num_threads(),
        openmp=build["openmp"],
        numpy=numpy.__version__,
        dlpack=build["dlpack"],
        compiler=build["compiler"],
        cuda=build["cuda"],
        cuda_reason=build["cuda_reason"],
        cuda_devices=build["cuda_devices"],
        cuda_runtime=_cuda_version(build["cuda_runtime"]),
        cuda_driver=_cuda_version(build["cuda_driver"]),
    )


def _cuda_version(number):
    """13000 -> "13.0"; None where there is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def kernels():
    """The kernels of this build, fastest first on each device.

    Returns
    -------
    list of dict
        Keys: name (for ``kernel=``), pass, device, available (on this machine), reason (why not, or None), and on a GPU
        shared_memory (bytes a block).
    """
    build, running = _C.build_info(), {name: (which, device) for name, which, device in _C.kernels()}
    isa = build["isa_in_use"]
    stems = {name.removesuffix(isa): row for name, row in running.items() if name.endswith("_" + isa)}
    rows = []
    for name, compiled, supported in build["isa"]:
        for stem, (which, device) in stems.items() if compiled else ():
            reason = "ruled out by FLASHGQA_CPU_ISA" if supported else f"this processor lacks {name}"
            rows.append(_kernel(stem + name, which, device, None if stem + name in running else reason))
    for name, which, reason, shared in _C.cuda_kernels():
        rows.append(_kernel(name, which, "cuda", reason) | {"shared_memory": shared})
    return rows


def _kernel(name, which, device, reason):
    return {"name": name, "pass": which, "device": device, "available": reason is None, "reason": reason}
