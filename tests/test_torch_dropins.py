"""flashgqa.torch under the names of other libraries: scaled_dot_product_attention, flash_attn, modules, a model in training.

Over a grid of shapes and dtypes: test_torch_grid.py.
"""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies

import flashgqa

torch = pytest.importorskip("torch")

from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_tools import (  # noqa: E402, F401
    DEVICES,
    arguments_of,
    assert_equal,
    assert_near,
    gradients,
    inputs,
    leaves,
    on_devices,
    randn,
    seeded,
)

import flashgqa.torch as fg  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
OPERATORS = torch.ops.flashgqa


# ---- scaled_dot_product_attention ----


def sdpa_math(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def agree(tensors, mask=None, **options):
    """Ours against torch's in float64, with torch's in the dtype for the scale of the errors; outputs and gradients."""
    dtype = tensors[0].dtype
    results = []
    for function, to in ((fg.scaled_dot_product_attention, dtype), (sdpa_math, torch.float64), (sdpa_math, dtype)):
        given = [x.detach().to(to).requires_grad_() for x in tensors]
        own = mask if mask is None or mask.dtype == torch.bool else mask.detach().to(to).requires_grad_()
        out = function(*given, attn_mask=own, **options)
        wanted = given if own is None or own.dtype == torch.bool else [*given, own]
        torch.manual_seed(5)
        cotangent = torch.randn(out.shape, dtype=torch.float64).to(dtype).to(to)
        results.append((out.detach(), torch.autograd.grad(out, wanted, cotangent, allow_unused=True, materialize_grads=True)))
    (out, got), (exact, expected), (naive, narrow) = results
    assert out.shape == naive.shape and out.dtype == naive.dtype
    if out.numel() == 0:
        return
    assert_near(out, exact, naive, dtype, 2)
    for a, b, c, x in zip(got, expected, narrow, (*tensors, mask), strict=False):
        assert a.shape == x.shape and a.dtype == x.dtype
        assert_near(a, b, c, dtype, 3)


SHAPES = [
    ((5, 8), (7, 8), (7, 6)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
    ((1, 3, 5, 8), (4, 1, 7, 8), (4, 3, 7, 6)),
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)),
    ((2, 1, 3, 5, 8), (1, 4, 3, 7, 8), (4, 1, 7, 6)),
    ((3, 5, 8), (7, 8), (7, 6)),
    ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 6)),
    ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_sdpa_batch_axes_and_broadcasting(shapes):
    agree([randn(*shape) for shape in shapes])
    agree([randn(*shape) for shape in shapes], is_causal=True, scale=0.3)
    agree([randn(*shape) for shape in shapes], randn(5 if shapes[0][-2] else 0, 7))


MASKS = [(7,), (5, 7), (1, 7), (5, 1), (3, 5, 7), (3, 1, 7), (4, 1, 1, 7), (1, 3, 5, 7), (2, 4, 3, 5, 7), (2, 1, 1, 5, 1)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_sdpa_mask_shapes(shape):
    rank = max(len(shape), 4)
    tensors = [randn(*(2, 4, 3, n, 8)[-rank:]) for n in (5, 7, 7)]
    agree(tensors, randn(*shape))
    mask = torch.rand(shape) < 0.8
    mask[..., 0] = True
    agree(tensors, mask)


@strategies.composite
def sdpa_calls(draw):
    """Shapes of query, key and value whose leading axes broadcast, a mask (shape, kind) or None, options."""

    def part(shape):
        """Some axes 1, some of the first left out."""
        shape = [draw(strategies.sampled_from((1, n))) for n in shape]
        return (*shape[draw(strategies.integers(0, len(shape))) :],)

    batch = draw(strategies.lists(strategies.integers(1, 3), max_size=2))
    hk, g = draw(strategies.integers(1, 3)), draw(strategies.integers(1, 3))
    sq, sk, d, dv = (draw(strategies.integers(1, 9)) for _ in range(4))
    grouped = draw(strategies.booleans())
    heads = (hk * g, hk, hk) if grouped else [draw(strategies.sampled_from((1, hk))) for _ in range(3)]
    shapes = [(*part(batch), h, *matrix) for h, matrix in zip(heads, ((sq, d), (sk, d), (sk, dv)), strict=True)]
    kind, scale = draw(strategies.sampled_from(("plain", "causal", "bool", "float"))), draw(strategies.sampled_from((None, 0.3)))
    lead = torch.broadcast_shapes(*(x[:-3] for x in shapes[:2]))        # torch adds the mask in place to query times key
    mask = (part((*lead, max(heads[:2]), sq, sk)), kind) if kind in ("bool", "float") else None
    return shapes, mask, dict(is_causal=kind == "causal", enable_gqa=grouped, scale=scale)


@settings(max_examples=80)
@given(sdpa_calls())
def test_sdpa_any_shapes(call):
    shapes, mask, options = call
    if mask is not None:
        shape, kind = mask
        mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    agree([randn(*shape) for shape in shapes], mask, **options)


def test_sdpa_grouped_heads_of_key_and_value_may_differ():
    agree([randn(2, 12, 5, 8), randn(2, 3, 7, 8), randn(2, 6, 7, 8)], enable_gqa=True)
    agree([randn(2, 12, 5, 8), randn(2, 6, 7, 8), randn(2, 4, 7, 8)], enable_gqa=True)


def test_sdpa_rows_without_keys_are_zero():
    tensors = inputs(hk=4)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out = fg.scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert out[:, :, 2].eq(0).all()
    assert all(x.isfinite().all() for x in gradients((out,), tensors))
    bias = torch.where(mask, 0.0, -torch.inf).double()
    assert torch.equal(fg.scaled_dot_product_attention(*tensors, attn_mask=bias), out)


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_sdpa_causal_bias(make):
    tensors = inputs(hk=4)
    bias = make(5, 7)
    diagonal = 0 if make is causal_upper_left else 2
    expected = sdpa_math(*tensors, attn_mask=torch.ones(5, 7, dtype=torch.bool).tril(diagonal))
    torch.testing.assert_close(fg.scaled_dot_product_attention(*tensors, attn_mask=bias), expected, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="CausalBias"):
        fg.scaled_dot_product_attention(*tensors, attn_mask=make(7, 7))


def test_sdpa_dropout():
    tensors = inputs(hk=4)
    torch.manual_seed(9)
    seed = torch.randint(2**32, (2,)).numpy()
    keep = torch.from_numpy(flashgqa.dropout_mask(2, 4, 5, 7, 0.25, seed))
    torch.manual_seed(9)
    out = fg.scaled_dot_product_attention(*tensors, dropout_p=0.25, is_causal=True)
    causal = torch.ones(5, 7, dtype=torch.bool).tril()
    weights = (tensors[0] @ tensors[1].mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1) * keep / 0.75
    torch.testing.assert_close(out, weights @ tensors[2], rtol=0, atol=1e-13)


def test_sdpa_errors():
    q, k, v = inputs(hk=4)
    with pytest.raises(RuntimeError, match="is_causal"):
        fg.scaled_dot_product_attention(q, k, v, torch.ones(5, 7, dtype=torch.bool), is_causal=True)
    with pytest.raises(RuntimeError, match=r"heads: query has \[4\], key \[2\] and value \[2\]: .* need enable_gqa=True"):
        fg.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(RuntimeError, match=r"batch: query has \[2\], key \[3\] and value \[2\]: they must broadcast"):
        fg.scaled_dot_product_attention(q, torch.cat([k, k[:1]]), v)
    with pytest.raises(RuntimeError, match="enable_gqa"):
        fg.scaled_dot_product_attention(q, k[:, :3], v[:, :3], enable_gqa=True)
    with pytest.raises(ValueError, match="at least 2"):
        fg.scaled_dot_product_attention(q[0, 0, 0], k, v)
    for position, name in enumerate(("query", "key", "value")):
        tensors = [q, k, v]
        tensors[position] = None
        with pytest.raises(TypeError, match=f"{name} is NoneType: it must be a torch.Tensor"):
            fg.scaled_dot_product_attention(*tensors)
    with pytest.raises(RuntimeError, match="attn_mask is torch.int64"):
        fg.scaled_dot_product_attention(q, k, v, torch.ones(5, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="attn_mask has shape"):
        fg.scaled_dot_product_attention(q, k, v, torch.ones(3, 5, 7, dtype=torch.bool))


def test_sdpa_float32_mask_with_narrow_inputs():
    q, k, v = inputs(hk=4, dtype=torch.bfloat16)
    mask = randn(5, 7, dtype=torch.float32)
    out = fg.scaled_dot_product_attention(q, k, v, mask)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and mask.grad.dtype == torch.float32 and mask.grad.shape == (5, 7)


# ---- use_flashgqa ----


def routed(function, *args):
    """Whether flashgqa computed, and the result."""
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func is OPERATORS.forward.default)
            return func(*args, **(kwargs or {}))

    with Watch():
        result = function(*args)
    return any(calls), result


def test_use_flashgqa_routes_inside_of_the_block_only():
    tensors = inputs(hk=4, grad=False)
    taken_before = F.scaled_dot_product_attention
    with fg.use_flashgqa():
        for function in (F.scaled_dot_product_attention, taken_before, torch._C._nn.scaled_dot_product_attention):
            ours, out = routed(function, *tensors)
            assert ours
        with pytest.raises(NotImplementedError):
            F.scaled_dot_product_attention(*(torch.zeros(1, 1, 2, 300) for _ in range(3)))
    ours, expected = routed(F.scaled_dot_product_attention, *tensors)
    assert not ours
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@on_devices
def test_use_flashgqa_routes_modules(device):
    dtype, tolerance = DEVICES[device]
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=dtype, device=device)
    x = randn(2, 9, 16, dtype=dtype, device=device)
    padding = (torch.arange(9)[None] >= torch.tensor([[9], [6]])).to(device)
    expected = layer(x, src_key_padding_mask=padding)
    wanted = gradients((expected,), tuple(layer.parameters()))
    with fg.use_flashgqa():
        ours, out = routed(lambda: layer(x, src_key_padding_mask=padding))
        got = gradients((out,), tuple(layer.parameters()), torch.cos(expected.detach()))
    assert ours
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


def test_use_flashgqa_and_checkpoint():
    tensors = inputs(hk=4)
    with fg.use_flashgqa():
        out = checkpoint(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.3), *tensors, use_reentrant=False)
        ours, _ = routed(lambda: out.sum().backward())
    assert ours and all(x.grad is not None for x in tensors)


def test_use_flashgqa_around_compiled_code():
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    x, graphs = randn(2, 9, 16, grad=False), []

    def keep(graph, example):
        graphs.append(graph.code)
        return graph.forward

    backend = aot_autograd(fw_compiler=keep)
    compiled = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0], backend=backend, fullgraph=True)
    results = [compiled(x)]
    with fg.use_flashgqa():
        results.append(compiled(x))
    results.append(compiled(x))
    assert ["flashgqa.forward" in graph for graph in graphs] == [False, True]
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-13)


def test_use_flashgqa_inside_of_compiled_code():
    def function(q, k, v):
        with fg.use_flashgqa():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    tensors = inputs(hk=4, grad=False)
    ours, out = routed(torch.compile(function, backend="eager"), *tensors)
    assert ours and torch.equal(out, function(*tensors))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="around"):
        torch.compile(lambda *x: function(*x), backend="eager", fullgraph=True)(*tensors)


def test_use_flashgqa_nests_and_leaves_nothing():
    own = F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), fg.use_flashgqa():
        with fg.use_flashgqa():
            pass
        assert F.scaled_dot_product_attention is fg.scaled_dot_product_attention
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is own


# ---- flash_attn ----


def flash_inputs(*shape, heads=(4, 2, 2), d=8):
    return tuple(randn(*shape, h, d) for h in heads)


FLASH = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, \
deterministic=False, return_attn_probs=False"
VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {FLASH}",
    "flash_attn_kvpacked_func": f"q, kv, {FLASH}",
    "flash_attn_qkvpacked_func": f"qkv, {FLASH}",
    "flash_attn_varlen_func": f"q, k, v, {VARLEN}, {FLASH}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {VARLEN}, {FLASH}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {FLASH}",
    "scaled_dot_product_attention": "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, "
    "enable_gqa=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert arguments_of(getattr(fg, name)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize(
    "flash, ours",
    [
        ({}, {}),
        (dict(causal=True, softmax_scale=0.2), dict(causal=True, scale=0.2)),
        (dict(window_size=(3, -1)), dict(window=(3, None))),
        (dict(window_size=(None, 0)), dict(window=(None, 0))),
        (dict(window_size=(2, 0), softcap=5.0, causal=True), dict(window=(2, 0), softcap=5.0, causal=True)),
        (dict(alibi_slopes=torch.tensor([0.5, 0.1, 0.2, 0.3])), dict(alibi_slopes=torch.tensor([0.5, 0.1, 0.2, 0.3]))),
    ],
)
def test_flash_attn_func(flash, ours):
    q, k, v = flash_inputs(2, 9)
    out, lse, weights = fg.flash_attn_func(q, k, v, **flash, return_attn_probs=True)
    expected, expected_lse = fg.attention(*(x.transpose(1, 2) for x in (q, k, v)), **ours, return_lse=True)
    assert weights is None and lse.dtype == torch.float64
    assert_equal((out, lse), (expected.transpose(1, 2), expected_lse))
    alone = fg.flash_attn_func(q, k, v, **flash)
    assert_equal((alone,), (out,))
    assert_equal((fg.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **flash),), (out,))
    assert_equal(gradients((alone,), (q, k, v)), gradients((expected.transpose(1, 2),), (q, k, v)))


def test_flash_attn_packed_gradients():
    qkv = randn(2, 9, 3, 4, 8)
    out = fg.flash_attn_qkvpacked_func(qkv, causal=True)
    q, k, v = leaves(*qkv.unbind(2))
    expected = fg.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out, expected)
    assert torch.equal(gradients((out,), (qkv,))[0], torch.stack(gradients((expected,), (q, k, v)), 2))


def test_flash_attn_varlen():
    lengths_q, lengths_k = (3, 0, 6), (3, 2, 9)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths_q, lengths_k))
    q, k, v = randn(9, 4, 8), randn(14, 2, 8), randn(14, 2, 8)
    options = dict(causal=True, window_size=(4, 0), return_attn_probs=True)
    out, lse, weights = fg.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 9, **options)
    assert out.shape == (9, 4, 8) and lse.shape == (4, 9) and weights is None
    found = gradients((out,), (q, k, v))
    packed = fg.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), cu_q, cu_k, 6, 9, **options)
    assert_equal(packed[:2], (out, lse))
    for n in (0, 2):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        part, part_lse, _ = fg.flash_attn_func(q[None, rows], k[None, keys], v[None, keys], **options)
        torch.testing.assert_close(out[rows], part[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(lse[:, rows], part_lse[0], rtol=0, atol=1e-14)
        got = gradients((part,), (q, k, v))
        torch.testing.assert_close(found[0][rows], got[0][rows], rtol=0, atol=1e-13)
        torch.testing.assert_close(found[1][keys], got[1][keys], rtol=0, atol=1e-13)
    assert found[1][3:5].eq(0).all()
    qkv = randn(9, 3, 4, 8)
    joined = fg.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 6, causal=True)
    assert torch.equal(joined, fg.flash_attn_varlen_func(*qkv.unbind(1), cu_q, cu_q, 6, 6, causal=True))


def test_longest_lengths_may_be_tensors():
    """flash_attn's functions are operators of torch, whose integers may be tensors of one element, such as diff().max()."""
    from flashgqa.torch import fa3

    cu = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    q, k, v = randn(9, 4, 8), randn(9, 2, 8), randn(9, 2, 8)
    longest = cu.diff().max()
    expected = fg.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, causal=True)
    assert torch.equal(fg.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True), expected)
    assert torch.equal(fa3.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True), expected)
    got = fg.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_q=longest, max_kv=longest)
    assert torch.equal(got, expected)
    pages = torch.arange(3, dtype=torch.int32).reshape(3, 1)
    pool = torch.zeros(3, 8, 2, 8, dtype=q.dtype)
    for n in range(3):
        pool[n, : cu[n + 1] - cu[n]] = k[cu[n] : cu[n + 1]].detach()
    paged = (fg.flash_attn_varlen_func(q.detach(), pool, pool, cu, cu, m, m, block_table=pages) for m in (6, longest))
    assert_equal(*((x,) for x in paged))
    compiled = torch.compile(
        lambda q, k, v, cu: fg.flash_attn_varlen_func(q, k, v, cu, cu, cu.diff().max(), cu.diff().max(), causal=True),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    assert torch.equal(compiled(q, k, v, cu), expected)
    with pytest.raises(TypeError, match="max_q is 6.0: it must be an integer"):
        fg.flash_attn_varlen_func(q, k, v, cu, cu, longest.float(), longest)


def test_flash_attn_rows_without_keys_and_dropout():
    q, k, v = randn(1, 5, 2, 8), randn(1, 3, 2, 8), randn(1, 3, 2, 8)
    out, lse, _ = fg.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out[:, :2].eq(0).all() and lse[:, :, :2].eq(-torch.inf).all() and lse[:, :, 2:].isfinite().all()
    torch.manual_seed(1)
    first = fg.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(1)
    assert torch.equal(fg.flash_attn_func(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(fg.flash_attn_func(q, k, v, dropout_p=0.5), first)


def test_flash_attn_errors():
    q, k, v = randn(4, 2, 8), randn(4, 2, 8), randn(4, 2, 8)
    for window in (3, (1, 2, 3)):
        with pytest.raises(TypeError, match=r"window_size is .*: it must be \(left, right\)"):
            fg.flash_attn_func(q[None], q[None], q[None], window_size=window)
    with pytest.raises(ValueError, match=r"qkv is \[4, 2, 8\]: it must be \[..., 3, heads, head dim\]"):
        fg.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv is \[1, 4, 2, 8\]: it must be \[..., 2, heads, head dim\]"):
        fg.flash_attn_kvpacked_func(q[None], q[None])
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_q"):
        fg.flash_attn_varlen_func(q, k, v, cu, cu, 3, 4)


# ---- a model ----


class Block(torch.nn.Module):
    """A layer of a small Llama: grouped heads, a causal window, dropout of weights."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.qkv, self.out = torch.nn.Linear(32, 32 + 2 * 16), torch.nn.Linear(32, 32)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(F.layer_norm(x, (32,))).split((32, 16, 16), -1)
        q, k, v = (y.view(b, s, -1, 8).transpose(1, 2) for y in (q, k, v))
        x = x + self.out(self.attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(b, s, 32))
        return x + self.down(F.silu(self.up(F.layer_norm(x, (32,)))))


def test_training_equals_torchs_step_by_step():
    model = torch.nn.Sequential(*(Block(fg.scaled_dot_product_attention) for _ in range(2))).double()
    twin = copy.deepcopy(model)
    for block in twin:
        block.attend = F.scaled_dot_product_attention
    x, target = randn(2, 17, 32, grad=False), randn(2, 17, 32, grad=False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    for _ in range(4):
        losses = []
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (m(x) - target).square().mean()
            loss.backward()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-12
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()


def test_models_copy_and_pickle():
    x = randn(1, 9, 32, grad=False)
    for model in (Block(fg.scaled_dot_product_attention).double(), fg.FlashMHA(32, 4, causal=True, dtype=torch.float64)):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), model(x))
    for function in (fg.attention, fg.flash_attn_func, fg.merge):
        assert pickle.loads(pickle.dumps(function)) is function


# ---- modules ----


def test_flash_mha_is_torchs_multihead_attention():
    own = fg.FlashMHA(24, 4, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([own.W_q.weight, own.W_k.weight, own.W_v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([own.W_q.bias, own.W_k.bias, own.W_v.bias]))
        theirs.out_proj.load_state_dict(own.W_o.state_dict())
    x = randn(2, 9, 24)
    out, expected = own(x), theirs(x, x, x)[0]
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradients((out,), (x,)), gradients((expected,), (x,)), rtol=0, atol=1e-12)
    assert list(own.state_dict()) == [f"W_{name}.{kind}" for name in "qkvo" for kind in ("weight", "bias")]


def test_flash_mha_options():
    layer = fg.FlashMHA(32, 8, num_kv_heads=2, causal=True, window=(3, 0), dropout_p=0.3, bias=False, dtype=torch.bfloat16)
    assert layer.W_k.weight.shape == (8, 32) and layer.W_v.bias is None
    x = randn(2, 9, 32, dtype=torch.bfloat16, grad=False)
    q, k, v = (layer_(x).view(2, 9, -1, 4) for layer_ in (layer.W_q, layer.W_k, layer.W_v))
    options = dict(causal=True, window=(3, 0), layout="bshd")
    torch.manual_seed(2)
    expected = fg.attention(q, k, v, dropout_p=0.3, **options)
    torch.manual_seed(2)
    assert torch.equal(layer(x), layer.W_o(expected.reshape(2, 9, 32)))
    assert torch.equal(layer.eval()(x), layer.W_o(fg.attention(q, k, v, **options).reshape(2, 9, 32)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert "num_kv_heads=2" in repr(layer)
    for arguments in ((30, 4), (32, 0), (32, 4, 3), (32, 4, 0)):
        with pytest.raises(ValueError, match="multiple"):
            fg.FlashMHA(*arguments[:2], num_kv_heads=arguments[2] if len(arguments) == 3 else None)


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_mean_pool_kv_heads(heads):
    x = randn(2, 4, 5, 6)
    pooled = fg.mean_pool_kv_heads(x, heads)
    groups = [x[:, n : n + 4 // heads].mean(1) for n in range(0, 4, 4 // heads)]
    torch.testing.assert_close(pooled, torch.stack(groups, 1), rtol=0, atol=1e-15)
    assert torch.equal(fg.mean_pool_kv_heads(x.transpose(1, 2), heads, axis=-2), pooled.transpose(1, 2))
    source = fg.FlashMHA(24, 4, causal=True, dtype=torch.float64).eval()
    layer = fg.mean_pool_kv_heads(source, heads)
    assert layer.num_kv_heads == heads and not layer.training and layer.W_k.weight.requires_grad
    x = randn(2, 9, 24)
    q, k, v = (layer_(x).view(2, 9, 4, 6) for layer_ in (source.W_q, source.W_k, source.W_v))
    k, v = (fg.mean_pool_kv_heads(y, heads, axis=2) for y in (k, v))
    expected = source.W_o(fg.attention(q, k, v, causal=True, layout="bshd").reshape(2, 9, 24))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="divide"):
        fg.mean_pool_kv_heads(source, 3)


def test_module_imports_alone_and_twice():
    code = "import flashgqa.torch, importlib, sys, torch; importlib.import_module('flashgqa.torch'); \
assert 'torch._dynamo' not in sys.modules, 'the compiler takes seconds to import'; print(torch.ops.flashgqa.forward)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0 and "flashgqa.forward" in ran.stdout, ran.stderr
