"""What only a GPU has: streams, graphs, devices, arrays of several libraries, copies of NumPy arrays, memory that runs out.
That its numbers are right is tested where those of the CPU are, by the `cuda` backends.
"""

import os

import numpy as np
import pytest
import torch
from cases import Case, build
from gpu import get, put

import flashgqa

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("out", "lse", "dq", "dk", "dv")


def qkv(*shape, hk=2, sk=None, dtype=torch.float16, seed=0, device="cuda"):
    b, hq, sq, d = shape or (2, 8, 130, 64)
    generator = torch.Generator(device).manual_seed(seed)
    extents = ((b, hq, sq, d), (b, hk, sk or sq, d), (b, hk, sk or sq, d))
    return [torch.randn(e, generator=generator, device=device, dtype=torch.float32).to(dtype) for e in extents]


def whole(q, k, v, **options):
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **options)
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse, **options)
    return out, lse, *gradients[:3]


def assert_same(got, expected):
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert torch.equal(a, b), name


def close(a, b, tolerance=2e-2):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance)


# ---- what is offered ----


def test_config_and_kernels_name_the_gpu():
    config = flashgqa.show_config()
    assert config["cuda"] is True and config["cuda_reason"] is None and config["cuda_devices"]
    rows = [row for row in flashgqa.kernels() if row["device"] == "cuda"]
    assert {row["pass"] for row in rows} == {"forward", "backward"} and all(row["available"] for row in rows)


def test_explain_names_kernel_and_reasons():
    q, k, v = qkv()
    plan = flashgqa.explain(q, k, v, softcap=5.0)
    assert plan["device"] == "cuda" and plan["kernel"].endswith("general")
    assert any("softcap" in reason for _, reason in plan["refused"])
    assert flashgqa.explain(q, k, v, backward=True)["kernel"].startswith("bwd_sm80_f16")
    numpy_plan = flashgqa.explain(*(x.float().cpu().numpy() for x in (q, k, v)), device="cuda")
    assert numpy_plan["kernel"].startswith("fwd_sm80_f32")


# ---- results ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_torch_tensors_on_the_same_device(dtype):
    q, k, v = qkv(dtype=dtype)
    out, lse, dq, dk, dv = whole(q, k, v, causal=True)
    for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
        assert type(x) is torch.Tensor and x.dtype == dtype and x.device == q.device and x.shape == like.shape
    assert lse.dtype == torch.float32
    wide = (x.double() for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    close(out.double().cpu(), expected.cpu())


def test_any_strides():
    """Unit stride in the last axis is read in place, others are copied."""
    q, k, v = qkv()
    expected = whole(q, k, v)
    swapped = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert_same(whole(*swapped), expected)
    bshd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    assert_same([flashgqa.attention(*bshd, layout="bshd").transpose(1, 2)], expected)
    lens = torch.tensor([[130, 0], [77, 0]], dtype=torch.int32, device="cuda")[:, 0]
    close(get(flashgqa.attention(q, k, v, kv_lens=lens)), get(flashgqa.attention(q, k, v, kv_lens=lens.contiguous())), 0)


def test_out_is_written_in_place():
    q, k, v = qkv()
    memory = torch.full((2, 8, 131, 80), 7.0, dtype=q.dtype, device="cuda")
    out = memory[:, :, :130, :64]
    assert flashgqa.attention(q, k, v, out=out) is out
    close(get(out), get(flashgqa.attention(q, k, v)), 2e-3)
    memory[:, :, :130, :64] = 7.0
    assert (memory == 7.0).all()


@pytest.mark.parametrize("device_seed", [False, True])
def test_the_dropout_mask_is_that_of_the_cpu(device_seed):
    b, hq, sq, sk, p, seed = 2, 4, 70, 200, 0.3, (99, 3)
    q, k, _ = qkv(b, hq, sq, 32, sk=sk, dtype=torch.float32)
    v = torch.eye(sk, device="cuda").expand(b, 2, sk, sk)
    given = torch.tensor(seed, device="cuda") if device_seed else 99
    dropped = flashgqa.attention(q, k, v, dropout_p=p, seed=given)
    keep = flashgqa.dropout_mask(b, hq, sq, sk, p, np.int64(seed) if device_seed else 99)
    assert ((dropped > 0).cpu().numpy() == keep).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    q, k, v = qkv(60, 8, 300, 64, dtype=dtype)
    expected = whole(q, k, v, causal=True)
    for _ in range(40):
        assert_same(whole(q, k, v, causal=True), expected)


def test_results_do_not_depend_on_what_memory_held():
    """Workspace and results come from memory full of NaN."""
    q, k, v = qkv(1, 8, 64, 128, sk=4096)
    expected = whole(q, k, v)
    poison = torch.full((2**26,), float("nan"), device="cuda")
    del poison
    assert_same(whole(q, k, v), expected)


# ---- streams and graphs ----


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


# ---- refusals ----


def test_tensors_on_the_cpu_among_those_on_the_gpu():
    q, k, v = qkv()
    for arguments in ((q, k.cpu(), v), (q.cpu(), k, v), (q, k, v.float().cpu().numpy())):
        with pytest.raises((ValueError, TypeError), match="is on|dtype"):
            flashgqa.attention(*arguments)
    with pytest.raises(ValueError, match="kv_lens is on cpu but q is on cuda:0"):
        flashgqa.attention(q, k, v, kv_lens=np.int32([3, 4]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
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


def test_float64_and_other_functions_say_what_works():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="float64 runs on the CPU only"):
        flashgqa.attention(q.double(), k.double(), v.double())
    with pytest.raises(NotImplementedError, match="move the tensors to the CPU"):
        flashgqa.attention_weights(q, k, reduce="keys")
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    with pytest.raises(NotImplementedError, match=r"outs\[0\] is on CUDA device 0.*move it to the CPU"):
        flashgqa.merge([out, out], [lse, lse])
    with pytest.raises(ValueError, match="device moves NumPy arrays only"):
        flashgqa.attention(q, k, v, device="cpu")


def test_contents_are_checked_on_request():
    q, k, v = qkv()
    good, bad = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([130, 7], [5, 131]))
    flashgqa.attention(q, k, v, kv_lens=good, check=True)
    flashgqa.attention(q, k, v, kv_lens=bad)
    with pytest.raises(ValueError, match=r"kv_lens\[1\] is 131"):
        flashgqa.attention(q, k, v, kv_lens=bad, check=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ValueError, match="records a graph"):
        flashgqa.attention(q, k, v, kv_lens=good, check=True)


def test_too_little_memory():
    huge = (16, 64, 2**19, 256)
    q = torch.zeros((1, 1, 1, 256), dtype=torch.float16, device="cuda").expand(huge)
    with pytest.raises(torch.OutOfMemoryError):
        flashgqa.attention(q, q, q)
    x = np.broadcast_to(np.zeros((1, 1, 1, 256), np.float16), huge)
    with pytest.raises(MemoryError, match="bytes do not fit into the memory of the GPU"):
        flashgqa.attention(x, x, x, device="cuda")
    close(get(flashgqa.attention(*qkv())), get(flashgqa.attention(*qkv())), 0)


def test_use_after_fork_is_an_error():
    flashgqa.attention(*qkv())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            x = np.zeros((1, 1, 2, 8), np.float32)
            flashgqa.attention(x, x, x, device="cuda")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert "forked" in os.read(read, 4096).decode()


# ---- NumPy arrays ----

STAGED = [
    Case(b=2, hq=8, hk=2, sq=70, sk=130, d=64, causal=True),
    Case(dtype="float16", layout="bshd", storage="sliced", sink=True),
    Case(dtype="bfloat16", storage="negative", softcap=4.0, bias="11qk", dropout=0.25),
    Case(storage="gaps", mask="b11k", alibi="h", b=2, kv_lens=(20, 33), q_lens=(33, 5)),
    Case(storage="broadcast", b=2),
    Case(packed=((5, 9), (0, 3), (40, 40)), causal=True),
]


@pytest.mark.parametrize("case", STAGED, ids=str)
def test_numpy_arrays_give_the_bits_of_torch_tensors(case):
    call = build(case)
    tensors = [put(x) for x in (*call.inputs, call.dout)]
    options = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()}
    out, lse = flashgqa.attention(*call.inputs, **call.options, return_lse=True, device="cuda")
    assert type(out) is np.ndarray and out.dtype == call.dtype
    theirs, their_lse = flashgqa.attention(*tensors[:3], **options, return_lse=True)
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[case.dtype]
    close(out, get(theirs), tolerance)      # alignment may choose another kernel
    finite = np.isfinite(lse)
    assert (finite == np.isfinite(get(their_lse))).all()
    close(lse[finite], get(their_lse)[finite], 1e-3)
    got = flashgqa.attention_backward(call.dout, *call.inputs, out, lse, **call.options, device="cuda")
    expected = flashgqa.attention_backward(tensors[3], *tensors[:3], theirs, their_lse, **options)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert type(a) is np.ndarray
            close(a, get(b), 20 * tolerance)


def test_numpy_out_and_errors():
    x = np.random.default_rng(0).standard_normal((2, 4, 9, 16)).astype(np.float32)
    out = np.full((2, 4, 9, 20), 7.0, np.float32)[..., :16]
    assert flashgqa.attention(x, x, x, out=out, device="cuda:0") is out
    close(out, flashgqa.attention(x, x, x), 1e-5)
    assert (out.base[..., 16:] == 7.0).all()
    with pytest.raises(ValueError, match=r"kv_lens\[0\] is 10"):
        flashgqa.attention(x, x, x, kv_lens=np.int32([10, 3]), device="cuda")
    with pytest.raises(ValueError, match="cuda:99"):
        flashgqa.attention(x, x, x, device="cuda:99")
    with pytest.raises(NotImplementedError, match="float64"):
        flashgqa.attention(*[x.astype(float)] * 3, device="cuda")


# ---- other libraries ----


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    q, k, v = qkv(dtype=torch.float32)
    expected = whole(q, k, v)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        arrays = [cupy.array(get(x)) for x in (q, k, v)]
        got = whole(*arrays)
        assert all(type(x) is cupy.ndarray for x in got)
        stream.synchronize()
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert (cupy.asnumpy(a) == get(b)).all(), name
    side = cupy.cuda.Stream(non_blocking=True)
    out = flashgqa.attention(*arrays, stream=side)
    side.synchronize()
    assert (cupy.asnumpy(out) == get(expected[0])).all()


def test_jax_arrays_are_refused_with_a_way_out():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    try:
        x = jax.device_put(np.zeros((1, 2, 4, 8), np.float32), jax.devices("gpu")[0])
    except RuntimeError:
        pytest.skip("JAX has no GPU here")
    with pytest.raises(NotImplementedError, match="torch.from_dlpack"):
        flashgqa.attention(x, x, x)
