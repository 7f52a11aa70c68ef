"""`flashgqa.jax` under jit, grad, vmap, checkpoint, scan and shard_map, against the oracle and, on JAX's own device,
against `flashgqa.attention`."""

import ast
import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import SMOKE, SWEEP, build

import flashgqa
from flashgqa import reference

jax = pytest.importorskip("jax")
jnp = jax.numpy

import flashgqa.jax as fj  # noqa: E402

B, HQ, HK, SQ, SK, D, DV = 2, 6, 2, 19, 27, 16, 24


@pytest.fixture
def inputs(rng):
    shapes = (B, HQ, SQ, D), (B, HK, SK, D), (B, HK, SK, DV), (B, HQ, SQ, DV)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def option_cases():
    rng = np.random.default_rng(1)
    mask = rng.random((B, 1, SQ, SK)) < 0.7
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (5, 3), "align": "top-left"},
        "chunk": {"causal": True, "chunk": 8},
        "softcap": {"softcap": 3.0, "scale": 0.5},
        "mask": {"mask": mask},
        "bias": {"bias": rng.standard_normal((1, HQ, SQ, SK)).astype("float32")},
        "bias_row": {"bias": rng.standard_normal((SQ, SK)).astype("float32"), "mask": mask[0, 0]},
        "alibi": {"alibi_slopes": rng.random(HQ).astype("float32"), "causal": True},
        "sink": {"sink": rng.standard_normal(HQ).astype("float32"), "causal": True},
        "lengths": {"q_lens": np.array([3, 19], "int32"), "kv_lens": np.array([0, 20], "int32")},
        "dropout": {"dropout_p": 0.3, "seed": 11},
    }


def direct(q, k, v, **options):
    """`flashgqa.attention` on the device where JAX computes."""
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) and x.dtype != "int64" else x for name, x in options.items()}
    return flashgqa.attention(*(jnp.asarray(x) for x in (q, k, v)), **options)


def gradients_of(options, *arrays):
    """What `flashgqa` itself gives: out, lse and the gradients of sum(out*dout) + sum(finite lse)."""
    q, k, v, dout = (jnp.asarray(x) for x in arrays)
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **options)
    dlse = jnp.isfinite(lse).astype("float32")
    return out, lse, flashgqa.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)


@pytest.mark.parametrize("name", option_cases())
def test_every_option_with_gradients_under_jit(name, inputs):
    options = option_cases()[name]
    static = {key: x for key, x in options.items() if not isinstance(x, np.ndarray)}
    traced = {key: x for key, x in options.items() if isinstance(x, np.ndarray)}
    q, k, v, dout = inputs
    through = ("q", "k", "v", *(key for key in ("bias", "sink") if key in traced))

    def loss(floats, others):
        given = {**floats, **others}
        out, lse = fj.attention(given.pop("q"), given.pop("k"), given.pop("v"), return_lse=True, **given, **static)
        return jnp.sum(out * dout) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

    everything = {"q": q, "k": k, "v": v, **traced}
    floats = {key: jnp.asarray(everything[key]) for key in through}
    others = {key: jnp.asarray(x) for key, x in everything.items() if key not in through}
    (_, (out, lse)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats, others)
    expected_out, expected_lse, expected = gradients_of(options, q, k, v, dout)
    assert np.array_equal(out, expected_out) and np.array_equal(lse, expected_lse)
    for key in through:
        assert np.array_equal(grads[key], getattr(expected, f"d{key}")), key


def dense(x):
    return jnp.asarray(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("case", SMOKE + SWEEP[:60], ids=str)
def test_compiled_calls_give_the_bits_of_direct_ones(case):
    """Combined options, dtypes and layouts: a program and its transpose against flashgqa's functions, on the CPU."""
    with_64_bits = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with with_64_bits(True), jax.default_device(jax.devices("cpu")[0]):
        call = build(case)
        options = {name: dense(x) for name, x in call.options.items()}
        q, k, v, dout = map(dense, (*call.inputs, call.dout))
        given = {name: options.pop(name) for name in ("bias", "sink") if name in options}
        traced = {name: options.pop(name) for name in [n for n, x in options.items() if hasattr(x, "shape")]}

        @jax.jit
        def both(q, k, v, given, traced, dout, dlse):
            run = functools.partial(fj.attention, **traced, **options, return_lse=True)
            results, transposed = jax.vjp(lambda q, k, v, given: run(q, k, v, **given), q, k, v, given)
            return *results, transposed((dout, dlse))

        options_of_all = given | traced | options
        expected = flashgqa.attention(q, k, v, **options_of_all, return_lse=True)
        dlse = jnp.zeros_like(expected[1]) if call.dlse is None else jnp.asarray(call.dlse)
        wanted = flashgqa.attention_backward(dout, q, k, v, *expected, dlse=dlse, **options_of_all)
        out, lse, (dq, dk, dv, others) = both(q, k, v, given, traced, dout, dlse)
        assert others.keys() == given.keys()
        for got, right in zip(
            (out, lse, dq, dk, dv, others.get("bias"), others.get("sink")), (*expected, *wanted), strict=True
        ):  # fmt: skip
            assert (got is None) == (right is None)
            assert got is None or got.dtype == right.dtype and np.array_equal(got, right, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_against_the_oracle(dtype, inputs):
    q, k, v, _ = (jnp.asarray(x, dtype) for x in inputs)
    out = jax.jit(lambda q, k, v: fj.attention(q, k, v, causal=True))(q, k, v)
    expected = reference.attention(*(np.asarray(x, "float64") for x in (q, k, v)), causal=True)
    assert out.dtype == dtype
    assert np.abs(np.asarray(out, "float64") - expected).max() < {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-6}[dtype]


def test_packed_sequences_and_layouts(rng):
    offsets = np.array([0, 5, 5, 20], "int32")
    q, k, v = (rng.standard_normal((20, h, D)).astype("float32") for h in (4, 2, 2))
    expected = direct(q, k, v, causal=True, cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    for longest in ({}, {"max_q": 15, "max_kv": 16}):
        options = {"causal": True, **longest}
        run = jax.jit(lambda q, k, v, n, options=options: fj.attention(q, k, v, cu_seqlens_q=n, cu_seqlens_kv=n, **options))
        assert np.array_equal(run(q, k, v, offsets), expected)
    q, k, v = (np.swapaxes(x[None], 1, 2).copy() for x in (q, k, v))
    swapped = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    assert np.array_equal(jnp.swapaxes(fj.attention(*swapped, layout="bshd"), 1, 2), direct(q, k, v))
    assert np.array_equal(fj.attention(q[0], k[0], v[0]), direct(q, k, v)[0])


def test_vmap_over_any_of_the_arrays_and_nested(inputs):
    q, k, v, dout = inputs
    whole = direct(q, k, v, causal=True)

    def attend(q, k, v):
        return fj.attention(q, k, v, causal=True)

    def alike(a, b):
        return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-5)

    assert alike(jax.vmap(attend)(q, k, v), whole)
    assert alike(jax.vmap(attend, (0, None, None))(q, k[0], v[0])[0], whole[0])
    assert alike(jax.vmap(attend, (None, 0, None))(q[0], k, v[0])[0], whole[0])
    stacked = jnp.stack([q, q + 1]), jnp.stack([k, k]), jnp.stack([v, v])
    assert alike(jax.vmap(jax.vmap(attend))(*stacked)[0], whole)
    assert alike(jax.vmap(attend)(*stacked)[0], whole)
    each = jax.vmap(jax.grad(lambda q, k, v, dout: jnp.sum(attend(q, k, v) * dout), (0, 1, 2)))(q, k, v, dout)
    together = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) * dout), (0, 1, 2))(q, k, v)
    assert all(alike(a, b) for a, b in zip(each, together, strict=True))
    assert jax.vmap(attend)(q[:0], k[:0], v[:0]).shape == (0, HQ, SQ, DV)


def test_vmap_over_lengths_and_seeds(inputs):
    q, k, v, _ = inputs
    lens = np.array([[3, 4], [27, 0]], "int32")
    each = jax.vmap(lambda n: fj.attention(q, k, v, kv_lens=n))(lens)
    assert all(np.array_equal(one, direct(q, k, v, kv_lens=n)) for one, n in zip(each, lens, strict=True))
    each = jax.vmap(lambda q, k, v, n: fj.attention(q, k, v, kv_lens=n))(*(np.stack([x, x]) for x in (q, k, v)), lens)
    assert all(np.allclose(one, direct(q, k, v, kv_lens=n), atol=1e-5) for one, n in zip(each, lens, strict=True))
    one = jax.vmap(lambda q, k, v, n: fj.attention(q, k, v, kv_lens=n))(q, k, v, lens[0][:, None])
    assert np.allclose(one, direct(q, k, v, kv_lens=lens[0]), atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 3)
    each = jax.vmap(lambda key: fj.attention(q, k, v, dropout_p=0.5, seed=key))(keys)
    assert np.array_equal(each[1], fj.attention(q, k, v, dropout_p=0.5, seed=keys[1])) and not np.array_equal(each[0], each[1])


def test_a_random_key_is_as_good_as_the_same_seed(inputs):
    q, k, v, _ = inputs
    low, high, offset = (int(x) for x in jax.random.bits(jax.random.PRNGKey(5), (3,), "uint32"))
    seed = np.array([low + (high << 32), offset], "uint64").view("int64")
    expected = flashgqa.attention(q, k, v, dropout_p=0.5, seed=seed)
    for key in (jax.random.PRNGKey(5), jax.random.key(5)):
        assert np.allclose(jax.jit(lambda key: fj.attention(q, k, v, dropout_p=0.5, seed=key))(key), expected, atol=1e-5)


def test_checkpoint_and_scan(inputs):
    q, k, v, dout = inputs

    def loss(q, wrap):
        def layer(x, _):
            return x + wrap(lambda x: fj.attention(x, k, v[..., :D], causal=True))(x), None

        return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0] * dout[..., :D])

    plain, recomputed = (jax.jit(jax.grad(lambda q, wrap=wrap: loss(q, wrap)))(q) for wrap in (lambda f: f, jax.checkpoint))
    assert np.array_equal(plain, recomputed) and np.isfinite(plain).all()


def test_exported_programs(inputs):
    from jax import export

    q, k, v, _ = (jnp.asarray(x) for x in inputs)
    gradient = jax.jit(jax.grad(lambda q, k, v: fj.attention(q, k, v, causal=True).sum()))
    allowed = [export.DisabledSafetyCheck.custom_call("flashgqa_attention")]
    exported = export.export(gradient, platforms=["cpu", "cuda"], disabled_checks=allowed)(q, k, v)
    assert np.array_equal(exported.call(q, k, v), gradient(q, k, v))


def test_only_the_gradients_that_are_asked_for(inputs):
    """dbias costs a pass over all scores: it is not computed where nobody differentiates bias."""
    q, k, v, _ = inputs
    bias = np.zeros((1, 1, SQ, SK), "float32")

    def loss(q, bias):
        return fj.attention(q, k, v, bias=bias).sum()

    assert "want_dbias = 0" in jax.jit(jax.grad(loss)).lower(q, bias).as_text()
    assert "want_dbias = 1" in jax.jit(jax.grad(loss, 1)).lower(q, bias).as_text()


def test_what_has_no_gradient_says_so(inputs):
    q, k, v, _ = inputs
    slopes = np.ones(HQ, "float32")
    with pytest.raises(NotImplementedError, match="alibi_slopes is differentiated: it has no gradient"):
        jax.grad(lambda slopes: fj.attention(q, k, v, alibi_slopes=slopes).sum())(slopes)
    gradient = jax.grad(lambda q: fj.attention(q, k, v).sum())
    for twice in (jax.grad(lambda q: gradient(q).sum()), jax.jit(jax.hessian(lambda q: fj.attention(q, k, v).sum()))):
        with pytest.raises(NotImplementedError, match="differentiated twice.*: use jax.nn.dot_product_attention"):
            twice(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: fj.attention(q, k, v), (q,), (q,))
    fixed = jax.grad(lambda q, x: gradient(jax.lax.stop_gradient(q)).sum() * x, 1)      # its gradient does not pass through
    assert fixed(q, 2.0) == gradient(q).sum()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": np.zeros((B, 4, SK, D), "float32"), "v": np.zeros((B, 4, SK, D), "float32")}, "k has 4 heads but q has 6"),
        ({"k": np.zeros((B, HK, SK, D), "float16")}, "k has dtype float16"),
        ({"chunk": 0}, "chunk is 0"),
        ({"causal": 1}, "causal is 1: it must be True or False"),
        ({"dropout_p": 0.5}, "seed is missing"),
        ({"mask": np.ones((SQ, SK), "uint8")}, r"mask has dtype uint8: it must be bool .*; convert it to bool"),
        ({"mask": np.ones((3, 3), bool)}, r"mask has shape \(3, 3\): it must broadcast"),
        ({"kv_lens": np.ones(3, "int32")}, r"kv_lens has shape \(3,\): it must be \[b\] = \(2,\)"),
        ({"kernel": "fwd_none"}, "kernel is \"fwd_none\": no forward kernel"),
        ({"precision": "bf16x2"}, "precision is 'bf16x2': it must be"),
        ({"window": 3}, r"window is 3: it must be None or a pair"),
        ({"scale": np.ones(1)}, r"scale is array\(\[1\.\]\): it must be a number"),
        ({"q": [1.0]}, "q is list: it must be a JAX or NumPy array"),
        ({"v": None}, "v is NoneType: it must be a JAX or NumPy array"),
        ({"mask": [True]}, "mask is list: it must be a JAX or NumPy array"),
        ({"dropout_p": 0.5, "seed": np.zeros(2)}, r"seed has dtype float32 and shape \(2,\): it must be an integer, or one key"),
        ({"dropout_p": 0.5, "seed": "7"}, "seed is str: it must be"),
    ],
)
def test_errors_while_tracing(change, message, inputs):
    given = dict(zip("qkv", inputs, strict=False)) | change
    with pytest.raises((TypeError, ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.jit(lambda: fj.attention(**given))().block_until_ready()


@pytest.mark.parametrize("name", ["scale", "softcap", "chunk", "causal", "dropout_p", "return_lse", "window"])
def test_numbers_are_not_traced(name, inputs):
    """The error says how to make them static, where float() or bool() of a tracer would be another error."""
    q, k, v, _ = inputs
    fix = "static_argnames of jax.jit" + (", or multiply q by it" if name == "scale" else "")
    with pytest.raises(TypeError, match=f"{name} is .*Trace.*: it must be known while the program is traced; .*{fix}"):
        jax.jit(lambda x: fj.attention(q, k, v, seed=1, **{name: (x, 0) if name == "window" else x}))(1)


def test_a_seed_is_one_key(inputs):
    q, k, v, _ = inputs
    with pytest.raises(TypeError, match="one key of jax.random"):
        fj.attention(q, k, v, dropout_p=0.5, seed=jax.random.split(jax.random.key(0)))


def test_errors_of_values_come_when_the_program_runs(inputs):
    q, k, v, _ = inputs
    run = jax.jit(lambda n: fj.attention(q, k, v, kv_lens=n))
    if jax.default_backend() == "cpu":
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"kv_lens\[1\] is 99 but k has length 27"):
            run(np.array([1, 99], "int32")).block_until_ready()
    assert np.isfinite(run(np.array([1, 27], "int32"))).all()


def test_float64(inputs):
    code = """
import jax, numpy as np, flashgqa, flashgqa.jax as fj
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((20, h, 8)) for h in (4, 2, 2))
n = np.array([0, 7, 20], "int32")
options = dict(causal=True, dropout_p=0.2, cu_seqlens_q=n, cu_seqlens_kv=n)
with jax.default_device(jax.devices("cpu")[0]):
    for seed in (3, np.array([3, 0])):
        out = jax.jit(lambda q, k, v: fj.attention(q, k, v, seed=seed, max_q=13, max_kv=14, **options))(q, k, v)
        assert out.dtype == "float64" and np.array_equal(out, flashgqa.attention(q, k, v, seed=3, **options))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shard_map_over_batch_and_heads(inputs):
    code = """
import functools, jax, jax.numpy as jnp, numpy as np, flashgqa, flashgqa.jax as fj
from jax.sharding import Mesh, PartitionSpec as P
mesh = Mesh(np.array(jax.devices("cpu")).reshape(2, 2), ("batch", "heads"))
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, h, 33, 16)).astype("float32") for h in (8, 2, 2))
spec = P("batch", "heads")
attend = functools.partial(fj.attention, causal=True)
mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
expected = flashgqa.attention(q, k, v, causal=True)
assert np.array_equal(jax.jit(mapped)(q, k, v), expected)
grads = jax.jit(jax.grad(lambda *x: mapped(*x).sum(), (0, 1, 2)))(q, k, v)
plain = jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))(q, k, v)
assert all(np.array_equal(a, b) for a, b in zip(grads, plain))
# What all devices have whole: its gradient is the sum over them, with JAX's check of what differs and without.
k, v = k[:2], v[:2]
for checked in ({}, {"check_vma": False}):
    by_batch = jax.shard_map(attend, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=P("batch"), **checked)
    grads = jax.jit(jax.grad(lambda *x: (by_batch(*x) ** 2).sum(), (0, 1, 2)))(q, k, v)
    plain = jax.grad(lambda q, k, v: (attend(q, *(jnp.concatenate([x] * 2) for x in (k, v))) ** 2).sum(), (0, 1, 2))(q, k, v)
    for a, b in zip(grads, plain):
        assert np.allclose(a, b, rtol=0, atol=1e-4), checked
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment})


@pytest.fixture
def exact_products():
    with jax.default_matmul_precision("highest"):       # of JAX's own attention on a GPU
        yield


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="JAX 0.6 has other windows, and other rows beyond a length")
def test_instead_of_jax_nn_dot_product_attention(rng, exact_products):
    q, k, v = (jnp.asarray(rng.standard_normal((B, s, h, D)), "float32") for s, h in ((SQ, HQ), (SK, HK), (SK, HK)))
    bias, mask = rng.standard_normal((B, 1, SQ, SK)).astype("float32"), rng.random((1, HQ, SQ, SK)) < 0.8
    mask[..., 0] = True
    lengths = np.array([7, 27], "int64")
    cases = [
        {}, {"is_causal": True}, {"scale": 0.3, "bias": bias}, {"mask": mask}, {"local_window_size": 4},
        {"local_window_size": (3, 0)}, {"key_value_seq_lengths": lengths}, {"query_seq_lengths": [5, 19], "is_causal": True},
    ]  # fmt: skip
    for case in cases:
        theirs, ours = (f(q, k, v, **{n: jnp.asarray(x) if n.endswith("lengths") else x for n, x in case.items()})
                        for f in (jax.nn.dot_product_attention, fj.dot_product_attention))  # fmt: skip
        assert np.abs(theirs - ours).max() < 3e-6, case
    theirs, ours = (
        jax.grad(lambda *x, f=f: (f(*x, is_causal=True) ** 2).sum(), (0, 1, 2))(q, k, v)
        for f in (jax.nn.dot_product_attention, fj.dot_product_attention)
    )
    assert all(np.abs(a - b).max() < 2e-5 for a, b in zip(theirs, ours, strict=True))
    assert np.abs(fj.dot_product_attention(q[0], k[0], v[0]) - jax.nn.dot_product_attention(q[0], k[0], v[0])).max() < 3e-6
    out, lse = fj.dot_product_attention(q, k, v, return_residual=True)
    assert out.shape == (B, SQ, HQ, D) and lse.shape == (B, SQ, HQ)
    assert np.allclose(lse, np.swapaxes(direct(q, k, v, layout="bshd", return_lse=True)[1], 1, 2), atol=1e-6)


def test_decode_token_by_token_in_scan(rng):
    """A cache of JAX's own: written by dynamic_update_slice, read as far as kv_lens says."""
    tokens, slots = 9, 16
    q, k, v = (jnp.asarray(rng.standard_normal((h, tokens, D)), "float32") for h in (HQ, HK, HK))

    def step(cache, n):
        new = (jax.lax.dynamic_slice_in_dim(x, n, 1, 1) for x in (k, v))
        cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, x, n, 1) for old, x in zip(cache, new, strict=True))
        return cache, fj.attention(jax.lax.dynamic_slice_in_dim(q, n, 1, 1), *cache, kv_lens=n[None] + 1, causal=True)

    empty = (jnp.full((HK, slots, D), jnp.nan),) * 2
    _, out = jax.jit(lambda: jax.lax.scan(step, empty, jnp.arange(tokens, dtype="int32")))()
    assert np.allclose(np.swapaxes(out[:, :, 0], 0, 1), direct(q, k, v, causal=True), atol=1e-5)


def test_stubs_have_the_arguments_there_are():
    folder = Path(fj.__file__).parent
    classes, functions = {}, {}
    for node in ast.parse((folder / "api.pyi").read_text()).body + ast.parse((folder / "jax.pyi").read_text()).body:
        (classes if isinstance(node, ast.ClassDef) else functions)[getattr(node, "name", None)] = node
    options = {n.target.id for name in ("_Meaning", "_Computation", "_Options") for n in classes[name].body}
    assert options | {"q", "k", "v", "return_lse"} == set(inspect.signature(fj.attention).parameters)
    given = functions["dot_product_attention"].args
    names = [argument.arg for argument in given.args + given.kwonlyargs]
    assert names == list(inspect.signature(fj.dot_product_attention).parameters)
