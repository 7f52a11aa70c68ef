"""FlashGQA inside JAX's transformations: `attention` under jit, grad, vmap, checkpoint and shard_map, on CPU and GPU.

It is a custom call of XLA (by its FFI) in the compiled program, run by the same kernels as `flashgqa.attention`, on XLA's own
stream and in its memory. Importing this module imports jax.

Source: Dao, "FlashAttention-2" (2023), section 3.1, for both passes; Ainslie et al., "GQA" (2023), section 2.2, for groups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flashgqa import _C

__all__ = ["attention", "dot_product_attention"]

TARGET = "flashgqa_attention"
ARRAYS = ("mask", "bias", "alibi_slopes", "sink", "q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_kv", "seed")
DIFFERENTIABLE = ("q", "k", "v", "bias", "sink")

for _platform, _handler in _C.xla_handlers().items():
    jax.ffi.register_ffi_target(TARGET, _handler, platform=_platform)


def _varying(x):
    """Along which axes of shard_map's mesh an array differs: a part of its type, by a name that JAX 0.10 changed."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def _vary(x, axes):
    """x with a type that says that it differs along these axes. Where it does not by itself, its gradients are added up."""
    missing = tuple(axes - _varying(x))
    if not missing:
        return x
    return jax.lax.pcast(x, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, missing)


def _plan(arrays, options, *, backward=False, return_lse=False, want_dbias=False, want_dsink=False):
    """Attributes of one call, and [(dtype, shape)] of its results in the order of the C code. `options`: the plain ones."""
    known = dict(options)
    forms = {name: (str(x.dtype), x.shape) for name, x in arrays.items()}
    if "seed" in arrays and arrays["seed"].dtype == jnp.uint32:
        forms["seed"] = ("int64", (2,))
    return _C.xla_call(forms, backward, return_lse, want_dbias, want_dsink, *(known.get(name) for name in _C.OPTIONS))


def _custom_call(attributes, results, *arrays):
    exact = {int: np.int64, float: np.float64, str: str}  # Python's own numbers would become 32 bits wide
    types = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in results]
    call = jax.ffi.ffi_call(TARGET, types, vmap_method="expand_dims")
    return call(*arrays, **{name: exact[type(x)](x) for name, x in attributes})


_traced_call = jax.custom_jvp(_custom_call, nondiff_argnums=(0, 1))


@_traced_call.defjvp
def _differentiated(attributes, results, primals, tangents):
    raise NotImplementedError(
        "flashgqa.jax: attention is differentiated twice, or forward through its gradient; it has first derivatives in reverse "
        "mode: use jax.nn.dot_product_attention for that"
    )


def _call(arrays, options, **what):
    """The results of one call."""
    attributes, results = _plan(arrays, options, **what)
    call = _traced_call if any(isinstance(x, jax.core.Tracer) for x in arrays.values()) else _custom_call
    made = call(tuple(attributes.items()), tuple(results), *arrays.values())
    return [_vary(x, _varying(arrays["q"])) for x in made]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, return_lse, arrays):
    """(out,) or (out, lse)."""
    return tuple(_call(arrays, options, return_lse=return_lse))


def _attend_forward(options, return_lse, given):
    for name, x in given.items():
        if x.perturbed and name not in DIFFERENTIABLE:
            raise NotImplementedError(f"{name} is differentiated: it has no gradient; wrap it in jax.lax.stop_gradient")
    arrays = {name: x.value for name, x in given.items()}
    out, lse = _call(arrays, options, return_lse=True)
    wanted = {name: None for name in ("bias", "sink") if name in given and given[name].perturbed}  # a tree without leaves: static
    return ((out, lse) if return_lse else (out,)), (arrays, out, lse, wanted)


def _attend_backward(options, return_lse, saved, cotangents):
    arrays, out, lse, wanted = saved
    dout, dlse = cotangents if return_lse else (cotangents[0], None)
    zero = jax.custom_derivatives.SymbolicZero
    given = {"dout": jnp.zeros_like(out) if isinstance(dout, zero) else dout}
    if dlse is not None and not isinstance(dlse, zero):
        given["dlse"] = dlse
    given |= arrays | {"out": out, "lse": lse}
    gradients = _call(given, options, backward=True, want_dbias="bias" in wanted, want_dsink="sink" in wanted)
    return (dict.fromkeys(arrays) | dict(zip(("q", "k", "v", *wanted), gradients, strict=True)),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _array(name, x):
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} is {type(x).__name__}: it must be a JAX or NumPy array")
    return jnp.asarray(x)


def _refuse_traced(options):
    """Options that the compiled program is made for must be known while it is traced."""
    for name, x in options.items():
        for value in x if isinstance(x, tuple | list) else (x,):
            if isinstance(value, jax.core.Tracer):
                fix = "make it a value of Python's, as by static_argnames of jax.jit"
                product = ", or multiply q by it, with scale=1.0" if name == "scale" else ""
                raise TypeError(f"{name} is {value}: it must be known while the program is traced; {fix}{product}")


def _seed_words(seed):
    """A key of jax.random as the 64-bit seed and the 32-bit offset of the kernels, in words: programs need no int64 for it."""
    try:
        words = jax.random.bits(seed, (3,), "uint32")
    except (TypeError, ValueError) as error:
        fix = "it must be an integer, or one key of jax.random, as jax.random.key(seed)"
        raise TypeError(f"seed has dtype {seed.dtype} and shape {seed.shape}: {fix}") from error
    return jnp.concatenate([words, jnp.zeros(1, "uint32")])


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
    deterministic=True,
    batch_invariant=False,
    precision=None,
    kernel=None,
):
    """`flashgqa.attention` under JAX's transformations, with gradients of q, k, v, bias and sink, through out and lse.

    Works in jit, grad, vjp, vmap (of any of the arrays, nested), checkpoint, scan and shard_map. Arguments that are arrays may be
    traced, all others are static. Over several devices, use shard_map along batch or KV heads: where XLA partitions a program by
    itself, it gathers whole arrays for this call. `jax.export` takes programs with it if ``disabled_checks`` has
    ``DisabledSafetyCheck.custom_call("flashgqa_attention")``; where they run, this module must have been imported.

    Parameters
    ----------
    q, k, v : jax.Array
        As in `flashgqa.attention`: [b, h, s, d], or without b, or packed [total, h, d] with cu_seqlens.
    causal, window, align, chunk, scale, softcap, mask, bias, alibi_slopes, sink, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_kv, \
layout, return_lse, deterministic, batch_invariant, precision, kernel
        As in `flashgqa.attention`.
    max_q, max_kv : int, optional
        As there. Without them a GPU takes the rows of all sequences for what one may have.
    dropout_p : float
        Probability with which a weight is dropped.
    seed : int or a key of jax.random, optional
        Needed with dropout_p; the same seed drops the same weights.

    Returns
    -------
    out, lse : jax.Array
        As in `flashgqa.attention`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As in `flashgqa.attention`, while tracing; of what only the device or values tell (no kernel serves, lengths are out of
        range) a jax.errors.JaxRuntimeError with the same sentence when the program runs. No forward mode, no second derivative.
    """
    if seed is not None and not isinstance(seed, int | np.integer):
        if not hasattr(seed, "dtype"):
            raise TypeError(f"seed is {type(seed).__name__}: it must be an integer, or one key of jax.random")
        seed = jnp.asarray(seed) if not isinstance(seed, jax.Array) else seed
        seed = seed if seed.dtype == jnp.int64 else _seed_words(seed)
    given = locals()
    arrays = {name: _array(name, given[name]) for name in ("q", "k", "v")}
    options = {name: given[name] for name in _C.OPTIONS if name in given}
    for name in ARRAYS:
        if options[name] is not None and not (name == "seed" and isinstance(seed, int | np.integer)):
            arrays[name], options[name] = _array(name, options[name]), None
    options["check"] = False
    _refuse_traced(options | {"return_lse": return_lse})
    _plan(arrays, options, return_lse=return_lse)  # its errors, before JAX asks options to be hashable
    if window is not None:
        options["window"] = tuple(window)
    axes = frozenset().union(*map(_varying, arrays.values()))
    results = _attend(tuple(options.items()), return_lse, {name: _vary(x, axes) for name, x in arrays.items()})
    return results if return_lse else results[0]


def _pair(window):
    """JAX's local_window_size: one number is both sides."""
    return window if window is None or isinstance(window, tuple | list) else (window, window)


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
):
    """`jax.nn.dot_product_attention` by its own arguments, on the kernels of this library.

    Parameters
    ----------
    query, key, value : jax.Array
        [B, T, N, H], [B, S, K, H] and [B, S, K, H], or all without B; N is a multiple of K.
    bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, return_residual
        As in JAX: masks and windows count from the first row and key (top left).
    implementation
        Ignored: which kernel runs is what `flashgqa.explain` says.

    Returns
    -------
    jax.Array
        [B, T, N, H] like query; with return_residual also the log-sum-exp [B, T, N], without a gradient. A row that sees no key
        is 0, where JAX returns the mean of all values.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention` does.
    """
    del implementation
    lengths = [n if n is None else jnp.asarray(n).astype("int32") for n in (query_seq_lengths, key_value_seq_lengths)]
    results = attention(
        query, key, value, causal=is_causal, window=_pair(local_window_size), align="top-left", scale=scale, mask=mask, bias=bias,
        q_lens=lengths[0], kv_lens=lengths[1], layout="bshd", return_lse=return_residual,
    )  # fmt: skip
    if not return_residual:
        return results
    out, lse = results
    return out, jax.lax.stop_gradient(jnp.swapaxes(lse, -1, -2).astype(out.dtype))
