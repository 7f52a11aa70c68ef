"""flashgqa.torch on CUDA tensors: its numbers against the CPU's in float64, and what only a GPU has.

The tests that run on both devices stand where those of the CPU do; ``-k cuda`` picks what runs here.
"""

import copy

import numpy
import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_tools import assert_near, gradients, inputs, randn, seeded  # noqa: F401

import flashgqa
import flashgqa.torch as fg
from flashgqa.torch import fa3, xops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda(*tensors, dtype=None):
    """Leaves on the GPU; float tensors in the dtype."""
    moved = [x.detach().to("cuda", dtype if x.is_floating_point() else None) for x in tensors]
    return [x.requires_grad_() if x.is_floating_point() else x for x in moved]


def naive(q, k, v, *, causal=False, window=(None, None), softcap=None, bias=None, sink=None, dropout=None):
    """The same in the dtype of the inputs, without tiles."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    x = q @ k.mT / q.shape[-1] ** 0.5
    x = softcap * torch.tanh(x / softcap) if softcap else x
    x = x if bias is None else x + bias
    row, key = (torch.arange(n, device=q.device) for n in x.shape[-2:])
    row = row[:, None] + x.shape[-1] - x.shape[-2]
    seen = (key <= row) if causal else torch.ones_like(key <= row)
    seen = seen if window[0] is None else seen & (key >= row - window[0])
    seen = seen if window[1] is None else seen & (key <= row + window[1])
    x = x.masked_fill(~seen, -torch.inf)
    if sink is not None:
        x = torch.cat([x, sink[:, None, None].expand(*x.shape[:-1], 1).to(x.dtype)], -1)
    weights = x.softmax(-1)[..., : key.shape[0]]
    return (weights if dropout is None else weights * dropout.to(weights)) @ v


OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(20, 3), softcap=5.0),
    "bias": dict(bias=(2, 4, 70, 90), sink=(4,)),
    "dropout": dict(causal=True, dropout_p=0.3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention(name, dtype):
    options, tensors = dict(OPTIONS[name]), [x.detach().to(dtype) for x in inputs(sq=70, sk=90, d=64, dv=64)]
    extra = [randn(*options.pop(x), grad=False).to(dtype) for x in ("bias", "sink") if x in options]
    more = {} if name != "dropout" else {"seed": 77}
    keep = None if name != "dropout" else torch.from_numpy(flashgqa.dropout_mask(2, 4, 70, 90, 0.3, 77)).cuda() / 0.7
    rules = {x: y for x, y in options.items() if x != "dropout_p"}
    results = []
    for function, device, to in ((fg.attention, "cuda", dtype), (fg.attention, "cpu", torch.float64), (naive, "cuda", dtype)):
        leaves = [x.to(device, to).requires_grad_() for x in (*tensors, *extra)]
        given = dict(zip(("bias", "sink"), leaves[3:], strict=False))
        given |= {**options, **more} if function is fg.attention else {**rules, "dropout": keep}
        out = function(*leaves[:3], **given)
        cotangent = torch.cos(torch.arange(out.numel()).view(out.shape) * 0.37).to(dtype)
        results.append([x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, cotangent.to(device, to)))])
    ours, truth, rough = results
    assert ours[0].dtype == dtype
    for n, (a, b, c) in enumerate(zip(ours, truth, rough, strict=True)):
        assert_near(a, b, c, dtype, 2 if n == 0 else 3)


def test_transformations():
    q, k, v = cuda(*inputs(sq=33, sk=33, d=32, dv=32), dtype=torch.float32)

    def function(q, k, v):
        return fg.attention(q, k, v, causal=True, softcap=5.0).sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = [f(q, k, v) for f in (function, compiled)]
    assert torch.equal(*results)
    for a, b in zip(*(gradients((out,), (q, k, v)) for out in results), strict=True):
        assert torch.equal(a, b)
    many = torch.stack([q.detach(), q.detach() * 2])
    assert torch.equal(torch.vmap(lambda q: function(q, k, v))(many)[1], function(q * 2, k, v))
    gradient = torch.func.grad(lambda q: function(q, k.detach(), v.detach()).sum())(q.detach())
    assert torch.equal(gradient, torch.autograd.grad(function(q, k, v).sum(), q)[0])
    first, *_ = torch.autograd.grad(function(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        first.sum().backward()


def test_distributed_data_parallel():
    """One process over NCCL: its gradients are those of the layer alone, through the buckets that DDP hooks into autograd."""
    layer = fg.FlashGQA(64, 4, 2, causal=True, rotary_dim=16, device="cuda", dtype=torch.float32)
    x = torch.randn(2, 40, 64, device="cuda")
    layer(x).square().sum().backward()
    expected = [y.grad.clone() for y in layer.parameters()]
    layer.zero_grad()
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(layer, device_ids=[0])(x).square().sum().backward()
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(y.grad, z) for y, z in zip(layer.parameters(), expected, strict=True))


def test_autocast_and_dropout_seeds():
    q, k, v = cuda(*inputs(sq=33, sk=33, d=32, dv=32), dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = fg.flash_attn_func(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32

    def drop(*tensors):
        return fg.attention(*tensors, dropout_p=0.4)

    torch.manual_seed(3)
    seed = torch.randint(2**32, (2,), device="cuda").cpu().numpy()
    torch.manual_seed(3)
    out = drop(q, k, v)
    keep = torch.from_numpy(flashgqa.dropout_mask(2, 4, 33, 33, 0.4, seed)).cuda() / 0.6
    torch.testing.assert_close(out, naive(q, k, v, dropout=keep), rtol=0, atol=1e-4)
    torch.manual_seed(3)
    kept = checkpoint(drop, q, k, v, use_reentrant=False)
    assert torch.equal(kept, out)
    for a, b in zip(gradients((kept,), (q, k, v)), gradients((out,), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def everything():
    """name -> a call, forward and backward, of each function."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in cuda(*inputs(sq=40, sk=40, d=64, dv=64), dtype=torch.bfloat16))
    q, k, v = cuda(q, k, v)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    cu = torch.tensor([0, 30, 80], dtype=torch.int32, device="cuda")
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    pages = torch.zeros(10, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    table = torch.arange(10, dtype=torch.int32, device="cuda").view(2, 5)
    lens = torch.tensor([17, 30], dtype=torch.int32, device="cuda")
    layer = fg.FlashGQA(64, 4, 2, causal=True, rotary_dim=16, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mask = xops.fmha.BlockDiagonalMask.from_seqlens([30, 50], device="cuda").make_causal()
    yield "attention", lambda: fg.attention(*turned, causal=True, return_lse=True)[0]
    yield "dropout", lambda: fg.attention(*turned, dropout_p=0.2)
    yield "sdpa", lambda: fg.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
    yield "flash", lambda: fg.flash_attn_func(q, k, v, causal=True, window_size=(9, 0))
    yield "varlen", lambda: fg.flash_attn_varlen_func(*packed, cu, cu, 50, 50, causal=True)
    yield "fa3", lambda: fa3.flash_attn_varlen_func(*packed, cu, cu, 50, 50, seqused_k=lens, causal=True)
    yield "block table", lambda: fg.flash_attn_varlen_func(packed[0], pages, pages, cu, cu, 50, 50, block_table=table)
    yield "xops", lambda: xops.memory_efficient_attention(*(y[None] for y in packed), attn_bias=mask)
    yield "layer", lambda: layer(x)
    yield "cache", lambda: fg.flash_attn_with_kvcache(
        q.detach()[:, :1], pages, pages.clone(), k.detach()[:, :1], v.detach()[:, :1], cache_seqlens=lens, block_table=table,
        causal=True,
    )  # fmt: skip


def run(call):
    out = call()
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    return out


def test_nothing_waits_for_the_gpu():
    for name, call in everything():
        run(call)       # what is made once may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(call)
        except RuntimeError as error:
            raise AssertionError(f"{name}: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_graphs_of_forward_and_backward():
    tensors = cuda(*inputs(sq=65, sk=65, d=64, dv=64), dtype=torch.float16)
    cotangent = torch.randn(2, 4, 65, 64, dtype=torch.float16, device="cuda")

    def step():
        out = fg.attention(*tensors, causal=True)
        return out, *torch.autograd.grad(out, tensors, cotangent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
    # Dropout draws anew in each replay.
    dropped = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(dropped):
        out = fg.attention(*tensors, dropout_p=0.5)
    outs = []
    for _ in range(2):
        dropped.replay()
        outs.append(out.clone())
    assert not torch.equal(*outs)


def test_torchs_own_ways_to_graphs():
    """torch.cuda.make_graphed_callables of a layer, and the graphs of torch.compile's reduce-overhead: as without graphs."""
    layer = fg.FlashGQA(64, 4, 2, causal=True, rotary_dim=16, device="cuda", dtype=torch.bfloat16)
    twin, x = copy.deepcopy(layer), torch.randn(2, 40, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(twin, (x,))
    for _ in range(2):
        y = torch.randn_like(x).requires_grad_()
        results = []
        for function, module in ((layer, layer), (graphed, twin)):
            out = function(y)
            results.append((out.clone(), *gradients((out,), (y, *module.parameters()))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def function(q, k, v):
        return fg.attention(q, k, v, causal=True) + q

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):      # warm-up, recording, replays
        tensors = cuda(*inputs(sq=65, sk=65, d=64, dv=64), dtype=torch.float16)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*tensors)
        found, expected = out.clone(), function(*tensors)
        assert torch.equal(found, expected)
        cotangent = torch.randn_like(expected)
        for a, b in zip(gradients((out,), tensors, cotangent), gradients((expected,), tensors, cotangent), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-2)     # inductor adds the gradients of q without rounding between

    layer = fg.FlashGQA(64, 4, 2, causal=True, rotary_dim=16, device="cuda")       # with tables that no call has made yet
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(2, 40, 64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        results = []
        for function in (layer, compiled):
            out = function(x)
            results.append((out.clone(), *gradients((out,), tuple(function.parameters()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_memory_that_does_not_suffice():
    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device="cuda").expand(64, 64, 2**20, 128)
    k = torch.zeros(64, 64, 4, 128, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        fg.attention(q, k, k)
    out = fg.attention(k, k, k)
    assert numpy.isfinite(out.float().cpu().numpy()).all()


@pytest.mark.parametrize("page_size", [16, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_gqa_and_a_cache_on_cuda(dtype, page_size, device="cuda"):
    """A prompt of 300 tokens, of which the second sequence keeps 257, then tokens one by one, then three to two copies of it."""
    layer = fg.FlashGQA(512, 8, 2, causal=True, rotary_dim=32, device=device, dtype=dtype).eval()
    x = randn(2, 304, 512, grad=False).to(device, dtype)
    cache = flashgqa.KVCache(
        2, 2, 64, capacity=512, page_size=page_size, dtype=str(dtype).removeprefix("torch."), layout="bshd", library="torch",
        device=device,
    )  # fmt: skip
    with torch.no_grad():
        truth, whole = copy.deepcopy(layer).cpu().double()(x.cpu().double()), layer(x).cpu()
        steps = [(layer(x[:, :300], cache=cache), [(n, t) for n in range(2) for t in range(300)])]
        cache.crop([300, 257])
        for t in range(4):
            at = [(0, 300 + t), (1, 257 + t)]
            steps.append((layer(torch.stack([x[n, t] for n, t in at])[:, None], cache=cache), at))
        cache.reorder([1, 1])
        steps.append((layer(x[1:, 261:264].expand(2, -1, -1), cache=cache), [(1, t) for t in (261, 262, 263)] * 2))
    assert list(cache.lens) == [264, 264]
    for got, at in steps:
        right, rough = (torch.stack([y[n, t] for n, t in at]) for y in (truth, whole))
        assert got.dtype == dtype and got.device.type == device
        assert_near(got.reshape(-1, 512).cpu(), right, rough, dtype, 3)
