"""flashgqa.torch under torch's transformations: its operators, torch.compile, export, autocast, vmap, threads."""

import warnings

import pytest

torch = pytest.importorskip("torch")

from torch_tools import DEVICES, assert_equal, gradients, inputs, leaves, on_devices, randn, seeded  # noqa: E402, F401

import flashgqa.torch as fg  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
OPERATORS = torch.ops.flashgqa


def operator_arguments(**options):
    """Positional arguments of flashgqa::forward: those of a call with these options."""
    caught = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPERATORS.forward.default:
                caught.append(args)
            return func(*args, **(kwargs or {}))

    tensors = options.pop("tensors", None) or inputs(grad=False)
    with Catch():
        fg.attention(*tensors, **options)
    return caught[0]


OPCHECKS = [
    {},
    dict(causal=True, window=(3, 0), softcap=4.0, dropout_p=0.1, layout="bshd"),
    dict(bias=torch.randn(1, 4, 5, 7, dtype=torch.float64), sink=torch.randn(4, dtype=torch.float64)),
    dict(mask=torch.ones(2, 1, 5, 7, dtype=torch.bool), alibi_slopes=torch.rand(4)),
]


@pytest.mark.parametrize("number", range(len(OPCHECKS)))
def test_opcheck(number):
    options = dict(OPCHECKS[number])
    if options.get("layout") == "bshd":
        options["tensors"] = [x.transpose(1, 2) for x in inputs(grad=False)]
    arguments = operator_arguments(**options)
    torch.library.opcheck(OPERATORS.backward, backward_arguments(arguments))
    differentiable = {0, 1, 2, 4, 6}
    arguments = [x.detach().requires_grad_() if n in differentiable and x is not None else x for n, x in enumerate(arguments)]
    torch.library.opcheck(OPERATORS.forward, tuple(arguments))


def backward_arguments(arguments):
    out, lse = OPERATORS.forward(*arguments)
    return (torch.ones_like(out), *arguments[:3], out, lse, torch.ones_like(lse), arguments[4] is not None, *arguments[3:])


def test_operator_and_eager_call_are_the_same():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    options = dict(causal=True, bias=randn(1, 4, 5, 7), sink=randn(4), dropout_p=0.2, seed=4, return_lse=True)
    tensors = (*inputs(), options["bias"], options["sink"])
    results = fg.attention(*tensors[:3], **options)
    with Watch():
        watched = fg.attention(*tensors[:3], **options)
        found = gradients(watched, tensors)
    assert type(watched[0].grad_fn) is not type(results[0].grad_fn)
    assert_equal(watched, results)
    assert_equal(found, gradients(results, tensors))


def test_another_torch_may_lack_what_hides_code_from_the_compiler(monkeypatch):
    import torch._dynamo  # which has taken its own copy of the name then

    from flashgqa._torch_ops import untraced

    monkeypatch.delattr(torch._C._dynamo.eval_frame, "_FrameExecStrategy")
    hidden = untraced(lambda x: x + (1 if torch.compiler.is_compiling() else 2))
    assert torch.compile(lambda x: hidden(x) * 10, backend="eager")(torch.zeros(1)) == 20


def test_compile_without_graph_break():
    bias, sink = randn(1, 4, 5, 7), randn(4)

    def function(q, k, v, bias, sink):
        out, lse = fg.attention(q, k, v, causal=True, window=(4, 2), softcap=5.0, bias=bias, sink=sink, return_lse=True)
        return out.sin() + lse[..., None]

    plain = (*inputs(), bias, sink)
    again = leaves(*plain)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(function(*plain), compiled(*again))
    function(*plain).sum().backward()
    compiled(*again).sum().backward()
    assert_equal([x.grad for x in again], [x.grad for x in plain])


@on_devices
def test_compile_by_inductor(device):
    """torch.compile as users call it; what surrounds the attention is fused, the attention is ours."""
    dtype, tolerance = DEVICES[device]

    def function(q, k, v):
        return fg.scaled_dot_product_attention(q.sin(), k * 2, v, is_causal=True, enable_gqa=True).cos()

    plain = inputs(sq=33, sk=33, dtype=dtype, device=device)
    again = leaves(*plain)
    out, expected = torch.compile(function, fullgraph=True)(*again), function(*plain)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    for a, b in zip(gradients((out,), again), gradients((expected,), plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_compile_packed_dropout_and_shapes_that_change():
    def function(qkv, cu_seqlens):
        return fg.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, int(qkv.shape[0]), dropout_p=0.2, causal=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for total in (9, 12, 30):
        qkv = randn(total, 3, 2, 8)
        cu_seqlens = torch.tensor([0, 4, total], dtype=torch.int32)
        torch.manual_seed(total)
        expected = function(qkv, cu_seqlens)
        torch.manual_seed(total)
        out = compiled(qkv, cu_seqlens)
        assert torch.equal(out, expected)
        assert_equal(gradients((out,), (qkv,)), gradients((expected,), (qkv,)))


def test_compile_and_vmap():
    def function(q):
        return torch.vmap(lambda q: fg.attention(q, q, q, causal=True))(q)

    q = randn(3, 1, 2, 5, 8)
    results = [f(q) for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True))]
    assert torch.equal(*results)
    assert_equal(*(gradients((out,), (q,)) for out in results))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return fg.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    tensors = inputs(grad=False)
    program = torch.export.export(Model(), tensors)
    assert "flashgqa.forward" in program.graph_module.code
    assert torch.equal(program.module()(*tensors), Model()(*tensors))


def test_autocast():
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fg.attention(q, k.bfloat16(), v, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fg.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True))
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    wide = inputs(grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fg.attention(*wide).dtype == torch.float64


def test_deterministic_algorithms_are_asked_for():
    flag = [n for n, a in enumerate(OPERATORS.forward.default._schema.arguments) if a.name == "deterministic"][0]
    assert operator_arguments()[flag] is True and operator_arguments(deterministic=False)[flag] is False
    torch.use_deterministic_algorithms(True)
    try:
        assert operator_arguments(deterministic=False)[flag] is True
    finally:
        torch.use_deterministic_algorithms(False)


def test_func_grad_and_vmap():
    q, k, v = inputs()
    many = torch.stack([q.detach(), q.detach() + 1, q.detach() * 2])
    plain = (q.detach(), k.detach(), v.detach())

    def loss(q, bias=None):
        return torch.cos(fg.attention(q, plain[1], plain[2], causal=True, bias=bias)).sum()

    def eager(q, bias=None):
        q, = leaves(q)
        loss(q, bias).backward()
        return q.grad

    assert torch.equal(torch.func.grad(loss)(plain[0]), eager(plain[0]))
    expected = torch.stack([eager(x) for x in many])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(many), expected)
    biases = randn(3, 1, 1, 5, 7, grad=False)
    expected = torch.stack([eager(x, bias) for x, bias in zip(many, biases, strict=True)])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(many, biases), expected)
    heads = torch.vmap(lambda k, v: fg.attention(plain[0], k, v), in_dims=(3, None), out_dims=1)
    tiled = torch.stack([k, k + 1], dim=3)
    out = heads(tiled, v)
    assert torch.equal(out[:, 1], fg.attention(plain[0], k + 1, v))
    assert torch.equal(torch.autograd.grad(out[:, 1].sum(), k)[0], torch.autograd.grad(fg.attention(q, k + 1, v).sum(), k)[0])
    jacobian = torch.func.jacrev(lambda q: fg.attention(q, plain[1], plain[2]).sum((0, 1)))(plain[0])
    assert torch.allclose(jacobian.sum((0, 1)), torch.autograd.grad(fg.attention(q, k, v).sum(), q)[0], rtol=0, atol=1e-13)


def test_vmap_of_nothing():
    """A mapped axis of no entries, or entries without rows: empty results, with all options, and empty gradients."""
    q, k, v = inputs(grad=False)
    mask, bias = torch.ones(0, 5, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=q.dtype)
    none, shape = q.new_empty(0, *q.shape), (0, *q.shape[:3], v.shape[3])
    assert torch.vmap(lambda q: fg.attention(q, k, v))(none).shape == shape
    assert torch.vmap(lambda mask: fg.attention(q, k, v, mask=mask, bias=bias))(mask).shape == shape
    out, lse = torch.vmap(lambda q, mask: fg.attention(q, k, v, mask=mask, return_lse=True), in_dims=(1, 0))(
        none.transpose(0, 1), mask
    )
    assert out.shape == shape and out.dtype == q.dtype and lse.shape == shape[:-1]
    gradient = torch.func.grad(lambda q, bias: fg.attention(q, k, v, bias=bias).sum(), argnums=(0, 1))
    dq, dbias = torch.vmap(gradient, in_dims=(0, None))(none, bias)
    assert dq.shape == none.shape and dbias.shape == (0, *bias.shape)
    rowless = q[None, :, :, :0].expand(3, -1, -1, -1, -1)
    assert torch.vmap(torch.func.grad(lambda q: fg.attention(q, k, v).sum()))(rowless).shape == rowless.shape


def test_nested_tensors_are_refused_with_what_to_give():
    parts = [torch.randn(n, 4, 8) for n in (3, 5)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        strided = torch.nested.nested_tensor(parts).transpose(1, 2)
    for x, function in ((jagged, fg.attention), (jagged, fg.scaled_dot_product_attention), (strided, fg.attention)):
        with pytest.raises(NotImplementedError, match="q is a nested tensor: join the sequences.* cu_seqlens_q"):
            function(x, x, x)
    joined, offsets = jagged.transpose(1, 2).values(), jagged.offsets().int()
    out = fg.attention(joined, joined, joined, cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    expected = torch.nn.functional.scaled_dot_product_attention(*[jagged] * 3).transpose(1, 2).values()
    torch.testing.assert_close(out, expected)


def test_vmap_drops_as_asked():
    q, k, v = inputs(b=1, sq=20, sk=20, grad=False)
    many = q.expand(3, *q.shape)

    def function(q):
        return fg.attention(q, k, v, dropout_p=0.5)

    same = torch.vmap(function, randomness="same")(many)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(function, randomness="different")(many)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(many)


def test_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(8, 24, generator=generator).requires_grad_()
        x = torch.randn(2, 33, 8, generator=generator)
        for _ in range(5):
            out = fg.flash_attn_qkvpacked_func((x @ weight).view(2, 33, 3, 1, 8), causal=True)
            gradient, = torch.autograd.grad(out.square().sum(), weight)
            weight = (weight - 0.1 * gradient).detach().requires_grad_()
        return weight.detach()

    expected = [train(n) for n in range(4)]
    with ThreadPoolExecutor(2) as pool:
        assert_equal(pool.map(train, range(4)), expected)
