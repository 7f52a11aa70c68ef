"""CUDA kernels and where they run: streams, threads, graphs, and two GPUs."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cuda import assert_same, close, qkv, whole

import flashgqa

# ---- streams and graphs ----


def test_two_streams_at_once():
    problems = [qkv(2, 8, 900, 64, seed=n) for n in range(2)]
    expected = [whole(*x, causal=True) for x in problems]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(20):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[n].append(whole(*problems[n], causal=True))
    torch.cuda.synchronize()
    for n in range(2):
        for results in got[n]:
            assert_same(results, expected[n])


def test_threads_that_have_not_used_cuda():
    """PyTorch's autograd engine starts such threads. They have no context, which TMA descriptors need."""
    tensors = qkv(1, 8, 200, 128)
    out, lse, *gradients = whole(*tensors)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as forward, ThreadPoolExecutor(1) as backward:
        assert torch.equal(forward.submit(flashgqa.attention, *tensors).result(), out)
        again = backward.submit(flashgqa.attention_backward, out, *tensors, out, lse).result()
        assert_same([out, lse, *again[:3]], [out, lse, *gradients])


def delayed(q, k, v):
    """Work that is under way for a while before q, k and v become other ones."""
    fresh = qkv(seed=5)
    torch.cuda._sleep(100_000_000)
    for x, y in zip((q, k, v), fresh, strict=True):
        x.copy_(y)


def test_the_current_stream_is_followed():
    expected = whole(*qkv(seed=5))
    q, k, v = qkv()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        delayed(q, k, v)
        got = whole(q, k, v)
    side.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("form", ["torch", "address", "protocol"])
def test_a_given_stream_is_followed(form):
    class Protocol:
        def __cuda_stream__(self):
            return 0, side.cuda_stream

    expected = whole(*qkv(seed=5))
    q, k, v = qkv()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    before = torch.cuda.current_stream()
    with torch.cuda.stream(side):
        delayed(q, k, v)
    stream = {"torch": side, "address": side.cuda_stream, "protocol": Protocol()}[form]
    got = whole(q, k, v, stream=stream)
    assert torch.cuda.current_stream() == before
    side.synchronize()
    assert_same(got, expected)


def test_the_call_does_not_wait():
    q, k, v = qkv()
    whole(q, k, v)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    whole(q, k, v)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("wrong", ["abc", 1.5, True, object()])
def test_a_stream_of_another_kind_is_an_error(wrong):
    with pytest.raises(TypeError, match="stream"):
        flashgqa.attention(*qkv(), stream=wrong)


@pytest.mark.parametrize("options", [{"causal": True}, {"dropout_p": 0.2, "seed": "device"}, {"softcap": 9.0}], ids=str)
def test_graph_capture_and_replay_with_other_inputs(options):
    if options.get("seed") == "device":
        options = options | {"seed": torch.tensor([3, 4], device="cuda")}
    q, k, v = qkv()
    whole(q, k, v, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = whole(q, k, v, **options)
    for seed in (1, 2):
        for x, y in zip((q, k, v), qkv(seed=seed), strict=True):
            x.copy_(y)
        if isinstance(options.get("seed"), torch.Tensor):
            options["seed"][1] = 10 * seed
        graph.replay()
        torch.cuda.synchronize()
        assert_same(got, whole(q, k, v, **options))


# ---- two GPUs ----

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_two_devices():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="k is on cuda:1 but q is on cuda:0"):
        flashgqa.attention(q, k.to("cuda:1"), v.to("cuda:1"))
    expected = whole(q, k, v)
    for current in (0, 1):
        with torch.cuda.device(current):
            for device in ("cuda:0", "cuda:1"):
                got = whole(*(x.to(device) for x in (q, k, v)))
                assert torch.cuda.current_device() == current and got[0].device == torch.device(device)
                assert_same([x.cpu() for x in got], [x.cpu() for x in expected])


@two_gpus
@pytest.mark.parametrize("current", [0, 1])
def test_everything_on_the_device_that_is_not_current(current):
    """Graphs, streams of the data's device, NumPy arrays staged to it, a thread without a context, kernels of both families."""
    data = f"cuda:{1 - current}"
    problems = ((128, torch.bfloat16, {"causal": True}), (64, torch.float32, {"softcap": 9.0}), (256, torch.float16, {}))
    for d, dtype, options in problems:
        inputs = qkv(2, 8, 300, d, dtype=dtype)
        expected = whole(*inputs, **options)
        keys = flashgqa.attention_weights(*inputs[:2], reduce="keys", **options)
        moved = [x.to(data) for x in inputs]
        with torch.cuda.device(current):
            got = whole(*moved, **options)
            with ThreadPoolExecutor(1) as pool:
                again = pool.submit(whole, *moved, **options).result()
            got_keys = flashgqa.attention_weights(*moved[:2], reduce="keys", **options)
            for results in (got, again):
                assert_same([x.cpu() for x in results], [x.cpu() for x in expected])
            assert torch.equal(got_keys.cpu(), keys.cpu()) and got_keys.device == torch.device(data)
            side = torch.cuda.Stream(data)
            torch.cuda.synchronize(data)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(data), torch.cuda.graph(graph, stream=torch.cuda.Stream(data)):
                captured = whole(*moved, **options)
            given = whole(*moved, **options, stream=side)
            graph.replay()
            torch.cuda.synchronize(data)
            for results in (captured, given):
                assert_same([x.cpu() for x in results], [x.cpu() for x in expected])
            assert torch.cuda.current_device() == current
            if dtype == torch.float32:
                arrays = [x.cpu().numpy() for x in inputs]
                close(flashgqa.attention(*arrays, **options, device=data), expected[0].cpu(), 0)
                assert torch.cuda.current_device() == current


@two_gpus
def test_every_argument_on_another_device_is_named():
    q, k, v = qkv()
    other = torch.ones(8, device="cuda:1")
    for name, x in (("sink", other), ("alibi_slopes", other), ("bias", torch.zeros(130, 130, device="cuda:1"))):
        with pytest.raises(ValueError, match=f"{name} is on cuda:1 but q is on cuda:0"):
            flashgqa.attention(q, k, v, **{name: x})
    with pytest.raises(ValueError, match="out is on cuda:1 but q is on cuda:0"):
        flashgqa.attention(q, k, v, out=torch.empty_like(q, device="cuda:1"))
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match=r"cuda:1 but .* is on cuda:0"):
        flashgqa.merge([out, out.to("cuda:1")], [lse, lse.to("cuda:1")])


@two_gpus
def test_both_devices_at_once_from_two_threads():
    inputs = [[x.to(f"cuda:{n}") for x in qkv(2, 8, 700, 128, dtype=torch.bfloat16)] for n in range(2)]
    expected = [x.cpu() for x in whole(*inputs[0], causal=True)]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda x: [whole(*x, causal=True) for _ in range(20)], x) for x in inputs]
        for future in futures:
            for results in future.result():
                assert_same([x.cpu() for x in results], expected)


@two_gpus
def test_parts_on_two_devices_are_merged():
    """Keys shared out to two GPUs; and keys that a copy from the other one, still under way, brings."""
    q, k, v = qkv(1, 8, 1000, 128, dtype=torch.bfloat16)
    whole_out, whole_lse = flashgqa.attention(q, k, v, return_lse=True)
    far = [x.to("cuda:1") for x in (q, k, v)]
    here = flashgqa.attention(q, k[:, :, :500], v[:, :, :500], return_lse=True)
    there = flashgqa.attention(far[0], far[1][:, :, 500:], far[2][:, :, 500:], return_lse=True)
    out, lse = flashgqa.merge(*zip(here, [x.to("cuda:0", non_blocking=True) for x in there], strict=True))
    close(out.double().cpu(), whole_out.double().cpu())
    close(lse.cpu(), whole_lse.cpu(), 1e-5)
    with torch.cuda.device(1):
        torch.cuda._sleep(200_000_000)
        far[1].mul_(2)
        near = far[1].to("cuda:0", non_blocking=True)
    assert torch.equal(flashgqa.attention(q, near, v), flashgqa.attention(q, 2 * k, v))
