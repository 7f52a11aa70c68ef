"""flashgqa.torch: attention and its gradients, dropout, merge. Under torch's transformations: test_torch_transforms.py."""

import inspect

import numpy
import pytest
from cases import EDGES, SMOKE, build

import flashgqa

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_tools import DEVICES, assert_equal, assert_near, gradients, inputs, leaves, on_devices, randn, seeded  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


# ---- attention ----

# Every option at least once; the arithmetic itself is tested on arrays.
CASES = [*SMOKE, *EDGES[:: max(1, len(EDGES) // 60)]]


def to_torch(x):
    if not isinstance(x, numpy.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.astype(numpy.float32)).to(torch.bfloat16)
    return torch.from_numpy(x.copy())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_attention_backward(case):
    call = build(case)
    q, k, v, dout, dlse = (to_torch(x) for x in (call.q, call.k, call.v, call.dout, call.dlse))
    options = {name: to_torch(x) for name, x in call.options.items()}
    expected = flashgqa.attention(q, k, v, return_lse=True, **options)
    wanted = flashgqa.attention_backward(dout, q, k, v, *expected, dlse=dlse, **options)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    tensors += [options[name].requires_grad_() for name in ("bias", "sink") if name in options]
    out, lse = fg.attention(q, k, v, return_lse=True, **options)
    assert_equal((out, lse), expected)
    if dlse is None:
        got = gradients((out,), tensors, dout)
    else:
        got = gradients((out, lse), tensors, dout, dlse)
    assert_equal(got, [x for x in wanted if x is not None])


def test_precision_is_that_of_both_passes():
    """Refused where it is not to be had: there are no gradients of another precision."""
    q, k, v, dout = torch.from_numpy(numpy.random.default_rng(0).standard_normal((4, 1, 2, 40, 32)).astype(numpy.float32))
    options = {"causal": True, "precision": "bf16x3"}
    tensors = [x.requires_grad_() for x in (q, k, v)]
    if "fwd_amx" not in [kernel["name"] for kernel in flashgqa.kernels() if kernel["available"]]:
        with pytest.raises(NotImplementedError, match="bf16x3.*needs a CPU with AMX"):
            fg.attention(q, k, v, **options)
        return
    got = gradients((fg.attention(q, k, v, **options),), tensors, dout)
    with torch.no_grad():
        expected = flashgqa.attention(q, k, v, return_lse=True, **options)
        wanted = flashgqa.attention_backward(dout, q, k, v, *expected, **options)
    assert_equal(got, wanted[:3])


def test_signature_is_that_of_the_array_function():
    arrays = inspect.signature(flashgqa.attention).parameters
    without = {"out", "stream", "device", "kernel"}
    for name, parameter in inspect.signature(fg.attention).parameters.items():
        assert parameter.default == arrays[name].default and parameter.kind == arrays[name].kind
    assert set(arrays) - set(inspect.signature(fg.attention).parameters) == without


GRADCHECKS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(3, 1), softcap=5.0),
    "dropout": dict(causal=True, dropout_p=0.3, seed=2**64 - 7),
    "mask": dict(mask=torch.arange(7) % 3 != 0),
    "lens": dict(q_lens=torch.tensor([5, 2], dtype=torch.int32), kv_lens=torch.tensor([4, 7], dtype=torch.int32)),
}


@pytest.mark.parametrize("name", GRADCHECKS)
@pytest.mark.parametrize("more", [False, True])
def test_gradcheck(name, more):
    options = {n: x[None, None, None] if n == "mask" else x for n, x in GRADCHECKS[name].items()}
    extra = (randn(1, 4, 5, 7), randn(4)) if more else ()

    def function(q, k, v, bias=None, sink=None):
        out, lse = fg.attention(q, k, v, bias=bias, sink=sink, return_lse=True, **options)
        return out, lse.nan_to_num(neginf=0)

    assert torch.autograd.gradcheck(function, (*inputs(), *extra), fast_mode=True)


def test_gradcheck_packed():
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q, k, v = randn(8, 4, 6), randn(8, 2, 6), randn(8, 2, 5)

    def function(q, k, v):
        return fg.attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


def test_gradients_through_out_or_lse_alone():
    tensors = inputs()
    for name in ("out", "lse"):
        results = dict(zip(("out", "lse"), fg.attention(*tensors, return_lse=True), strict=True))
        got = gradients((results[name],), tensors, torch.ones_like(results[name]))
        x = tensors[0] @ tensors[1].repeat_interleave(2, 1).mT / 8**0.5
        expected = x.softmax(-1) @ tensors[2].repeat_interleave(2, 1) if name == "out" else x.logsumexp(-1)
        wanted = torch.autograd.grad(expected.sum(), tensors, materialize_grads=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_only_what_requires_grad_has_a_gradient():
    q, k, v = inputs()
    bias, sink = randn(1, 1, 5, 7, grad=False), randn(4, grad=False)
    out = fg.attention(q, k.detach(), v.detach(), bias=bias, sink=sink)
    out.sum().backward()
    assert q.grad is not None and k.grad is None and bias.grad is None and sink.grad is None
    assert not fg.attention(q.detach(), k.detach(), v.detach()).requires_grad
    with torch.no_grad():
        assert not fg.attention(q, k, v).requires_grad


def test_parameters_inference_mode_and_strides():
    q, k, v = inputs(grad=False)
    expected = fg.attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(fg.attention(q, k, v), expected)
    assert torch.equal(fg.attention(torch.nn.Parameter(q), k, v), expected)
    turned = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    out = fg.attention(*(x.transpose(1, 2) for x in turned))
    assert torch.equal(out, expected)
    out.sum().backward()
    again = leaves(*turned)
    fg.attention(*again, layout="bshd").sum().backward()
    assert_equal([x.grad for x in turned], [x.grad for x in again])


def test_changed_inputs_are_noticed():
    q, k, v = inputs()
    k = k * 1
    out = fg.attention(q, k, v)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_devices
def test_results_written_in_place_are_noticed(device):
    """What the array functions write into a tensor of the caller's, torch hears of: no silent gradient of what it was."""
    q, k, _ = inputs(grad=False, dtype=torch.float32, device=device)
    weight = torch.ones(2, 4, 16, 8, device=device, requires_grad=True)
    out, k_cache, v_cache = torch.zeros_like(q), torch.zeros_like(weight[:, :2]), torch.zeros_like(weight[:, :2])
    lens, new = torch.zeros(2, dtype=torch.int32, device=device), (k[:, :, :1], k[:, :, 1:2])
    written = [out, k_cache, v_cache]

    def saved(*tensors):
        return [(weight[:, : x.shape[1], : x.shape[2]] * x).sum() for x in tensors]

    sums = saved(*written)
    flashgqa.attention(q, k, k, out=out)
    flashgqa.attention_with_kvcache(q, k_cache, v_cache, *new, cache_lens=lens)
    for one in sums:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            one.backward()
    sums = saved(out, k_cache, v_cache)
    with pytest.raises(ValueError, match="k has 2 heads but q has 3"):      # a refused call has written nothing
        flashgqa.attention(q[:, :3], k, k, out=out[:, :3])
    flashgqa.attention_with_kvcache(q, k_cache, v_cache, cache_lens=lens + 1, out=torch.empty_like(q))    # reads the caches
    for one in sums:
        one.backward()


def test_wrong_arguments():
    q, k, v = inputs(grad=False)
    with pytest.raises(TypeError, match="k is ndarray: it must be a torch.Tensor; flashgqa.attention takes other arrays"):
        fg.attention(q, k.numpy(), v)
    with pytest.raises(TypeError, match=r"kv_lens is list: it must be a torch.Tensor; torch.tensor\(\) makes one"):
        fg.attention(q, k, v, kv_lens=[5, 6])
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed is {seed}: it must be 0 to 2\*\*64 - 1"):
            fg.attention(q, k, v, dropout_p=0.1, seed=seed)
    for seed in (True, 3.0, [1, 2]):
        with pytest.raises(TypeError, match="seed is .*: it must be an integer or an int64 tensor"):
            fg.attention(q, k, v, dropout_p=0.1, seed=seed)
    with pytest.raises(ValueError, match="k has 2 heads but q has 3"):
        fg.attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="chunk"):
        fg.attention(q, k, v, chunk=0)
    with pytest.raises(ValueError, match="align"):
        fg.attention(q, k, v, align="left")
    for tensors in ((q, k, v), (q.to("meta"), k.to("meta"), v.to("meta"))):
        with pytest.raises(TypeError, match="window is 3: it must be None or a pair"):
            fg.attention(*tensors, window=3)


# ---- derivatives that do not exist ----


def test_slopes_have_no_gradient():
    """An error, for a gradient that is None or 0 would only look as if they were trained. flash_attn gives None."""
    q, k, v = inputs(dtype=torch.float32)
    slopes = torch.rand(4, requires_grad=True)
    for call in (fg.attention, torch.compile(fg.attention, backend="eager")):
        with pytest.raises(NotImplementedError, match="alibi_slopes requires grad"):
            call(q, k, v, alibi_slopes=slopes)
    with pytest.raises(NotImplementedError, match="alibi_slopes requires grad"):
        torch.func.grad(lambda slopes: fg.attention(q, k, v, alibi_slopes=slopes).sum())(slopes.detach())
    with torch.no_grad():
        fg.attention(q, k, v, alibi_slopes=slopes)
    fg.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), alibi_slopes=slopes).sum().backward()
    assert slopes.grad is None and q.grad is not None


def test_second_derivative_is_an_error():
    q, k, v = inputs()
    gradient, *_ = torch.autograd.grad(fg.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.jacrev(torch.func.grad(lambda q: fg.attention(q, k.detach(), v.detach()).sum()))(q.detach())
    with pytest.raises(NotImplementedError, match="flashgqa: "):
        torch.func.hessian(lambda q: fg.attention(q, k.detach(), v.detach()).sum())(q.detach())


def test_forward_mode_is_an_error():
    q, k, v = inputs(grad=False)
    for position in range(3):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            tensors = [q, k, v]
            tensors[position] = torch.autograd.forward_ad.make_dual(tensors[position], tensors[position])
            fg.attention(*tensors)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda k: fg.attention(q, k, v), (k,), (k,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(lambda q: fg.attention(q, k, v))(q)


# ---- dropout ----


def test_dropout_seed_is_torchs():
    q, k, v = inputs(b=1, sq=40, sk=40, grad=False)

    def draw():
        return fg.attention(q, k, v, dropout_p=0.5)

    first, second = draw(), draw()
    torch.manual_seed(0)
    q2, k2, v2 = inputs(b=1, sq=40, sk=40, grad=False)
    assert torch.equal(q, q2) and torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    draw()
    assert not torch.equal(state, torch.get_rng_state())
    state = torch.get_rng_state()
    fg.attention(q, k, v)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 5, numpy.int64(7), 2**63, 2**64 - 1, [11, 2**32 - 1]])
def test_dropout_is_that_of_the_mask(seed):
    q, k, v = inputs(grad=False)
    keep = torch.from_numpy(flashgqa.dropout_mask(2, 4, 5, 7, 0.25, numpy.array(seed) if isinstance(seed, list) else seed))
    weights = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).softmax(-1) * keep / 0.75
    out = fg.attention(q, k, v, dropout_p=0.25, seed=torch.tensor(seed) if isinstance(seed, list) else seed)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_drops_the_same_weights(reentrant):
    def function(*tensors):
        return fg.attention(*tensors, causal=True, dropout_p=0.4)

    plain = inputs(b=1, sq=33, sk=33)
    again = leaves(*plain)
    torch.manual_seed(3)
    out = function(*plain)
    torch.manual_seed(3)
    kept = checkpoint(function, *again, use_reentrant=reentrant)
    assert torch.equal(out, kept)
    for result in (out, kept):
        torch.cos(result).sum().backward()
    assert_equal([x.grad for x in again], [x.grad for x in plain])


# ---- merge ----


@pytest.mark.parametrize("layout", [None, "bshd"])
def test_merge_and_its_gradients(layout):
    turn = (lambda x: x) if layout is None else (lambda x: x.transpose(1, 2))
    q, k, v = inputs(sq=9, sk=9)

    def parts(q, k, v):
        pairs = []
        for keys in (slice(0, 4), slice(4, 4), slice(4, 9)):
            mask = torch.ones(9, 9, dtype=torch.bool).tril()[:, keys]
            tensors = [turn(x) for x in (q, k[:, :, keys], v[:, :, keys])]
            pairs.append(fg.attention(*tensors, mask=mask, layout=layout, return_lse=True))
        out, lse = fg.merge(*zip(*pairs, strict=True), layout=layout)
        return turn(out), lse

    whole = fg.attention(q, k, v, causal=True, return_lse=True)
    merged = parts(q, k, v)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    for a, b in zip(gradients(merged, (q, k, v)), gradients(whole, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_merge_agrees_with_the_array_function_and_rows_may_be_empty():
    outs, lses = randn(3, 2, 4, 5, 6, dtype=torch.float32), randn(3, 2, 4, 5, dtype=torch.float32)
    with torch.no_grad():
        lses[:, :, :, 0] = -torch.inf
        lses[1] = -torch.inf
        outs[lses == -torch.inf] = 0
    expected = flashgqa.merge(list(outs.detach()), list(lses.detach()))
    got = fg.merge(list(outs), list(lses))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    found = gradients((got[0],), (outs, lses))
    assert all(x.isfinite().all() for x in found)
    assert got[0][:, :, 0].eq(0).all() and found[1][:, :, :, 0].eq(0).all()
    with pytest.raises(ValueError, match="one lse for each out"):
        fg.merge(list(outs), list(lses)[:1])
    with pytest.raises(ValueError, match=r"outs\[1\]"):
        fg.merge(list(outs), [lses[0], lses[1, :1], lses[2]])
    with pytest.raises(TypeError, match=r"lses\[0\] is ndarray: it must be a torch.Tensor"):
        fg.merge(outs, [lses[0].detach().numpy(), *lses[1:]])
    for a, b in zip(fg.merge(iter(outs), iter(lses)), got, strict=True):
        assert a.equal(b)
    whole = torch.autograd.functional.jvp(lambda x: fg.merge(list(x), list(lses))[0], outs, outs)[1]
    assert torch.func.jvp(lambda x: fg.merge(list(x), list(lses.detach()))[0], (outs.detach(),), (outs.detach(),))[1].equal(whole)
