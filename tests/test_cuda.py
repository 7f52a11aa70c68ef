"""What only a GPU has: every kernel, sizes, memory that runs out; streams, graphs and devices are in test_cuda_streams.py,
arrays of other libraries in test_cuda_arrays.py. That its numbers are right is tested where those of the CPU are, by the
`cuda` backends.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gpu import assert_alike, get

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
    names = NAMES[: len(expected)]      # the first of the five, or all
    for name, a, b in zip(names, got, expected, strict=True):
        assert torch.equal(a, b), name


def close(a, b, tolerance=2e-2):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance)


# ---- what is offered ----


def test_config_and_kernels_name_the_gpu():
    config = flashgqa.show_config()
    assert config["cuda"] is True and config["cuda_reason"] is None and config["cuda_devices"]
    rows = [row for row in flashgqa.kernels() if row["device"] == "cuda"]
    assert {row["pass"] for row in rows} == {"forward", "backward", "weights of rows", "weights by key"}
    assert all(row["available"] for row in rows if "_sm80_" in row["name"])


def test_explain_names_kernel_and_reasons():
    q, k, v = qkv()
    plan = flashgqa.explain(q, k, v, dropout_p=0.5, seed=1)
    assert plan["device"] == "cuda" and plan["kernel"].endswith(("general", "dropout"))
    assert any("dropout" in reason for _, reason in plan["refused"])
    assert flashgqa.explain(q, k, v, backward=True)["kernel"].startswith(("bwd_sm80_f16", "bwd_sm90_f16"))
    numpy_plan = flashgqa.explain(*(x.float().cpu().numpy() for x in (q, k, v)), device="cuda")
    assert numpy_plan["kernel"].startswith("fwd_sm80_f32")


def test_explain_gives_the_reason_of_every_kernel_passed_over():
    """Of the last rows of the table, too, which have the longest list ahead."""
    x = [torch.randn(1, 2, 4, 256, device="cuda") for _ in range(3)]
    for plan in (flashgqa.explain_with_kvcache(*x, cache_lens=3), flashgqa.explain(*x, backward=True)):
        which = "forward" if plan["kernel"].startswith("fwd") else "backward"
        names = [row["name"] for row in flashgqa.kernels() if row["device"] == "cuda" and row["pass"] == which]
        assert [name for name, _ in plan["refused"]] == names[: names.index(plan["kernel"])]
        assert all(len(reason) > 5 for _, reason in plan["refused"])
    with pytest.raises(ValueError, match="or None$") as error:
        flashgqa.attention(*x, kernel="no")
    assert all(row["name"] in str(error.value) for row in flashgqa.kernels() if row["name"].startswith("fwd_sm"))
    with pytest.raises(NotImplementedError, match="change what the reasons name$") as error:
        flashgqa.attention(*x, precision="bf16x3")
    assert str(error.value).count("leave precision out") == 1


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
    assert_same([flashgqa.attention(*bshd, layout="bshd").transpose(1, 2)], expected[:1])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_merge(layout, dtype):
    q, k, v = qkv(2, 8, 130, 40, sk=300, dtype=dtype)
    q[0, 0, 0] = float("nan")
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    axis = 2 if layout == "bhsd" else 1
    whole_out, whole_lse = flashgqa.attention(q, k, v, layout=layout, return_lse=True)
    parts = []
    for begin, end in ((0, 100), (100, 117), (117, 300)):
        keys, values = k.narrow(axis, begin, end - begin), v.narrow(axis, begin, end - begin)
        parts.append(flashgqa.attention(q, keys, values, layout=layout, return_lse=True))
    parts.append((torch.full_like(whole_out, float("nan")), torch.full_like(whole_lse, -float("inf"))))
    out, lse = flashgqa.merge(*zip(*parts, strict=True), layout=layout)
    assert type(out) is torch.Tensor and out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, whole_out, equal_nan=True, rtol=0, atol={2: 1e-2, 4: 2e-6}[dtype.itemsize])
    torch.testing.assert_close(lse, whole_lse, equal_nan=True, rtol=0, atol=1e-5)
    got = flashgqa.merge([parts[-1][0]] * 2, [parts[-1][1]] * 2, layout=layout)
    assert (got[0] == 0).all() and (got[1] == -float("inf")).all()


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
    for _ in range(200):
        assert_same(whole(q, k, v, causal=True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dq_in_any_order(dtype):
    """deterministic=False leaves dk and dv as they are, and dq but for rounding."""
    q, k, v = qkv(2, 8, 700, 128, dtype=dtype)
    for options in ({}, {"causal": True}, {"window": (200, 50)}):
        out, lse = flashgqa.attention(q, k, v, **options, return_lse=True)
        dq, dk, dv, *_ = flashgqa.attention_backward(out, q, k, v, out, lse, **options)
        free = flashgqa.attention_backward(out, q, k, v, out, lse, **options, deterministic=False)
        assert torch.equal(free.dk, dk) and torch.equal(free.dv, dv)
        assert_alike([free.dq], [dq], ["dq"], factor=16 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_what_memory_held(dtype, d, softcap):
    """Workspace and results come from memory full of NaN: what a kernel reads there before it was written shows."""
    for sq, sk, options in ((64, 4096, {}), (700, 700, {"causal": True})):
        q, k, v = qkv(1, 8, sq, d, sk=sk, dtype=dtype)
        expected = whole(q, k, v, softcap=softcap, **options)
        for _ in range(3):
            poison = torch.full((2**26,), float("nan"), device="cuda")
            del poison
            assert_same(whole(q, k, v, softcap=softcap, **options), expected)
        assert all(torch.isfinite(x).all() for x in expected)


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_may_hold_nan(dtype, softcap):
    """In rows and keys past the lengths, of inputs and of what the forward pass left there."""
    q, k, v = qkv(2, 8, 200, 64, dtype=dtype)
    options = {"causal": True, "softcap": softcap}
    lens = torch.tensor([137, 64], dtype=torch.int32, device="cuda")
    padded = torch.arange(200, device="cuda")[None, :] >= lens[:, None]
    results = []
    for value in (0, float("nan")):
        for x in (q, k, v):
            x.masked_fill_(padded[:, None, :, None], value)
        out, lse = flashgqa.attention(q, k, v, **options, q_lens=lens, kv_lens=lens, return_lse=True)
        dout = torch.ones_like(out).masked_fill_(padded[:, None, :, None], value)
        gradients = flashgqa.attention_backward(dout, q, k, v, out, lse, **options, q_lens=lens, kv_lens=lens)
        results.append((out, lse, *gradients[:3]))
    assert_same(results[1], results[0])
    for x in (results[1][0], *results[1][2:]):
        assert torch.isfinite(x).all() and (x.transpose(1, 2)[padded] == 0).all()


# ---- every kernel ----

CUDA_ROWS = [row["name"] for row in flashgqa.kernels()
             if row["device"] == "cuda" and row["available"] and row["pass"] in ("forward", "backward")]
EVERYTHING = {"softcap": 8.0, "dropout_p": 0.2, "seed": 7, "window": (150, 20), "sink": True, "bias": True, "alibi_slopes": True}


def options_of_row(name):
    if name.endswith("dropout"):
        return {"causal": True, "dropout_p": 0.2, "seed": 7}
    if not name.endswith("general"):
        return {"causal": True}
    options = dict(EVERYTHING)
    options["sink"] = torch.linspace(-1, 1, 8, device="cuda")
    options["bias"] = torch.linspace(-2, 2, 190, device="cuda").expand(1, 1, 130, 190)
    options["alibi_slopes"] = torch.linspace(0.01, 0.5, 8, device="cuda")
    return options


@pytest.mark.parametrize("name", CUDA_ROWS)
def test_every_kernel_forced_agrees_with_the_cpu(name):
    """Each row of kernels.def at its largest head dims, so also those that only smaller cards would choose."""
    _, _, short, wide, wide_v, _ = name.split("_")
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[short]
    d, dv = int(wide[1:]), int(wide_v[2:])
    few = name.endswith(("decode", "decodef8"))         # up to 8 rows of a KV head
    whole_heads = name.startswith("bwd") and name.endswith("short")     # up to 128 rows and keys, heads that share none
    rows, keys, heads = (110, 120, 8) if whole_heads else (2 if few else 130, 190, 2)
    q, k, v = qkv(2, 8, rows, d, hk=heads, sk=keys, dtype=dtype)
    v, options = v[..., :dv], options_of_row(name)
    if name.endswith("f8"):
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    on_cpu = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    wide_inputs = [x.double().cpu() for x in (q, k, v)]
    out, lse = flashgqa.attention(*wide_inputs, **on_cpu, return_lse=True)
    factor = 16 if dtype == torch.float32 else 2
    if name.startswith("fwd"):
        function = flashgqa.attention_with_kvcache if name.endswith(("cache", "f8")) else flashgqa.attention
        got = function(q, k, v, **options, return_lse=True, kernel=name)
        assert_alike(got, (out, lse), factor=factor)
        return
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = flashgqa.attention_backward(dout.double(), *wide_inputs, out, lse, **on_cpu)
    got = flashgqa.attention_backward(dout.cuda(), q, k, v, out.to(q), lse.float().cuda(), **options, kernel=name)
    assert [x is None for x in got] == [x is None for x in expected]
    for which, a, b in zip(expected._fields, got, expected, strict=True):
        if b is not None:
            assert_alike([a], [b], [which], factor, dtype)      # dbias and dsink are float32, with the error of dtype


def test_cards_with_little_shared_memory_have_a_kernel_for_everything():
    """Compute capability 8.6, 8.9 and 12.0 give a block 99 KB."""
    small = [row for row in flashgqa.kernels() if row["device"] == "cuda" and row["shared_memory"] <= 99 * 1024]
    for which in ("fwd", "bwd"):
        for dtype in ("bf16", "f16", "f32"):
            stem = f"{which}_sm80_{dtype}_d256_dv256"
            assert f"{stem}_general" in {row["name"] for row in small}, stem


LAUNCH = """
import sys, torch, flashgqa
torch.manual_seed(0)
rows = [(torch.bfloat16, "bf16_d64_dv64_plain", {"causal": True}), (torch.float32, "f32_d64_dv64_general", {"softcap": 9.0})]
for dtype, row, options in rows:
    q, k, v = (torch.randn(1, h, 150, 64).to("cuda", dtype) for h in (4, 2, 2))
    out, lse = flashgqa.attention(q, k, v, **options, return_lse=True, kernel="fwd_sm80_" + row)
    results = [out, lse]
    if dtype == torch.bfloat16:      # the driver takes long to compile these
        results += flashgqa.attention_backward(out, q, k, v, out, lse, **options, kernel="bwd_sm80_" + row)[:3]
    torch.save([x.cpu() for x in results], f"{sys.argv[1]}/{dtype}")
"""


def test_the_embedded_ptx_gives_the_same_results(tmp_path):
    """What a card without machine code of its own runs: the driver compiles the PTX."""
    folders = [tmp_path / "own", tmp_path / "ptx"]
    for folder, extra in zip(folders, ({}, {"CUDA_FORCE_PTX_JIT": "1", "CUDA_CACHE_DISABLE": "1"}), strict=True):
        folder.mkdir()
        script = folder / "launch.py"
        script.write_text(LAUNCH)
        environment = {**os.environ, **extra}
        ran = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True, check=False)
        if extra and "no kernel image" in ran.stderr:
            pytest.skip("this build has no PTX (FLASHGQA_CUDA_ARCH)")
        assert ran.returncode == 0, ran.stderr
    for dtype, factor in ((torch.bfloat16, 1), (torch.float32, 4)):
        own, ptx = (torch.load(folder / str(dtype)) for folder in folders)
        assert_alike(ptx, own, NAMES[: len(own)], factor)


def test_a_precision_for_other_processors_is_refused():
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="bf16x3.*leave precision out"):
        flashgqa.attention(q, k, v, precision="bf16x3")


# ---- sizes ----


@pytest.mark.parametrize("options", [{"causal": True}, {"bias": True}], ids=["plain", "general"])
@pytest.mark.parametrize("axis", ["batch", "head", "row"])
def test_elements_beyond_2_31(axis, options):
    """Every tensor spans more than 2^31 elements; a product in 32 bits would wrap around."""
    far, shape = 2**31 + 64, (2, 3, 5, 64)
    strides = {"batch": (far, 4096, 64, 1), "head": (4096, far // 2, 64, 1), "row": (8192, 1024, far // 4, 1)}[axis]

    def spread(x):
        return torch.empty_strided(x.shape, strides[: x.ndim], dtype=x.dtype, device="cuda").copy_(x)

    q, k, v = qkv(*shape, hk=3)
    bias = torch.randn((2, 3, 5, 5), device="cuda", dtype=torch.float16)
    options, far_options = ({"bias": bias}, {"bias": spread(bias)}) if "bias" in options else (options, options)
    expected = whole(q, k, v, **options)
    inputs = [spread(x) for x in (q, k, v)]
    out = spread(torch.zeros_like(q))
    assert flashgqa.attention(*inputs, out=out, **far_options) is out
    gradients = flashgqa.attention_backward(out, *inputs, out, expected[1], **far_options)
    assert_same([out, expected[1], *gradients[:3]], expected)


def test_more_elements_and_heads_than_32_and_16_bits_count():
    """2.3e9 elements of q in 70,000 sequences: the last ones are right."""
    b = 70_000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    q = torch.empty((b, 8, 64, 64), dtype=torch.float16, device="cuda").normal_()
    k, v = (torch.empty((b, 1, 64, 64), dtype=torch.float16, device="cuda").normal_() for _ in range(2))
    got = whole(q, k, v, causal=True)
    for part in (slice(0, 2), slice(b // 2, b // 2 + 2), slice(b - 2, b)):
        expected = whole(q[part], k[part], v[part], causal=True)
        assert_alike([x[part] for x in got], expected, NAMES)


# ---- refusals ----


def test_tensors_on_the_cpu_among_those_on_the_gpu():
    q, k, v = qkv()
    for arguments in ((q, k.cpu(), v), (q.cpu(), k, v), (q, k, v.float().cpu().numpy())):
        with pytest.raises((ValueError, TypeError), match="is on|dtype"):
            flashgqa.attention(*arguments)
    with pytest.raises(ValueError, match="kv_lens is on cpu but q is on cuda:0"):
        flashgqa.attention(q, k, v, kv_lens=np.int32([3, 4]))


# ---- weights ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_long_sequences_agree_with_the_cpu(dtype):
    q, k, _ = qkv(1, 8, 900, 72, sk=1500, dtype=dtype)
    options = {"window": (700, 30), "softcap": 20.0}
    rows = [899, 0, 5, 6, 450]
    on_cpu = q.double().cpu(), k.double().cpu()
    by_row = flashgqa.attention_weights(q, k, rows=rows, **options)
    by_key = flashgqa.attention_weights(q, k, reduce="keys", **options)
    assert by_row.dtype == by_key.dtype == torch.float32 and by_row.device == q.device and by_row.shape == (1, 8, 5, 1500)
    close(by_row.cpu(), flashgqa.attention_weights(*on_cpu, rows=rows, **options), 2e-6)
    close(by_key.cpu(), flashgqa.attention_weights(*on_cpu, reduce="keys", **options), 2e-5)
    for _ in range(5):
        assert torch.equal(flashgqa.attention_weights(q, k, reduce="keys", **options), by_key)


def test_rows_out_of_range_on_the_device_are_clamped_away_or_refused():
    q, k, _ = qkv()
    rows = torch.tensor([3, 130, -1, 2**40], device="cuda")
    got = flashgqa.attention_weights(q, k, rows=rows)
    assert torch.equal(got[:, :, :1], flashgqa.attention_weights(q, k, rows=[3])) and (got[:, :, 1:] == 0).all()
    with pytest.raises(ValueError, match=r"rows\[1\] is 130"):
        flashgqa.attention_weights(q, k, rows=rows, check=True)
    for given in ([3, 130], np.array([3, 130])):        # read on the host, where nothing has to wait
        with pytest.raises(ValueError, match=r"rows\[1\] is 130 but q has 130 rows"):
            flashgqa.attention_weights(q, k, rows=given)


@pytest.mark.parametrize("shape", [(1, 8, 3000, 128), (5, 4, 1500, 128)], ids=["by head", "by batch"])
def test_weights_of_arrays_that_are_moved_in_parts(shape):
    q, k, _ = qkv(*shape, dtype=torch.float32)
    arrays = q.cpu().numpy(), k.cpu().numpy()
    for which in ({"rows": [0, 700, 1499]}, {"reduce": "keys"}):
        expected = flashgqa.attention_weights(q, k, causal=True, **which)
        close(flashgqa.attention_weights(*arrays, causal=True, **which, device="cuda"), expected.cpu(), 0)
        if shape[0] == 1:
            of_head = flashgqa.attention_weights(*(x[0] for x in arrays), causal=True, **which, device="cuda")
            close(of_head, expected[0].cpu(), 0)


def test_weights_of_arrays_and_in_graphs():
    q, k, _ = qkv(dtype=torch.float32)
    rows = torch.tensor([7, 129], device="cuda")
    expected = flashgqa.attention_weights(q, k, rows=rows), flashgqa.attention_weights(q, k, reduce="keys")
    arrays = q.cpu().numpy(), k.cpu().numpy()
    close(flashgqa.attention_weights(*arrays, rows=[7, 129], device="cuda"), expected[0].cpu(), 0)
    close(flashgqa.attention_weights(*arrays, reduce="keys", device="cuda"), expected[1].cpu(), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flashgqa.attention_weights(q, k, rows=rows), flashgqa.attention_weights(q, k, reduce="keys")
        with pytest.raises(ValueError, match="records a graph"):
            flashgqa.attention_weights(q, k, rows=[7])
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_float64_and_other_functions_say_what_works():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="float64 runs on the CPU only"):
        flashgqa.attention(q.double(), k.double(), v.double())
    with pytest.raises(NotImplementedError, match="float64 runs on the CPU only"):
        flashgqa.attention_weights(q.double(), k.double(), reduce="keys")
    for x in (q.bool(), q.bool().mT.contiguous().mT):           # arguments like the second are copied, if they have another dtype
        with pytest.raises(TypeError, match="q has dtype bool: it must be float16"):
            flashgqa.attention(x, k, v)
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    with pytest.raises(NotImplementedError, match="outs has 33 parts: at most 32"):
        flashgqa.merge([out] * 33, [lse] * 33)
    with pytest.raises(ValueError, match=r"outs\[1\] and outs\[0\] are on a CPU and a GPU"):
        flashgqa.merge([out, out.cpu()], [lse, lse.cpu()])
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
    expected = get(flashgqa.attention(*qkv()))
    huge = (16, 64, 2**19, 256)
    q = torch.zeros((1, 1, 1, 256), dtype=torch.float16, device="cuda").expand(huge)
    with pytest.raises(torch.OutOfMemoryError):
        flashgqa.attention(q, q, q)
    x = np.broadcast_to(np.zeros((1, 1, 1, 256), np.float16), huge)
    with pytest.raises(MemoryError, match="bytes do not fit into the memory of the GPU"):
        flashgqa.attention(x, x, x, device="cuda")
    close(get(flashgqa.attention(*qkv())), expected, 0)


def test_after_a_device_fault_a_call_says_so():
    """In a process of its own, whose context an index out of range takes down; one that wrote a core file would end there."""
    script = """
import flashgqa, torch
q = torch.randn(1, 2, 8, 16, device="cuda")
out = flashgqa.attention(q, q, q)
try:
    q[torch.tensor([5], device="cuda")]
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    flashgqa.attention(q, q, q, out=out)
except RuntimeError as error:
    print(error)
"""
    plain = {name: value for name, value in os.environ.items() if "COREDUMP" not in name}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=plain)
    assert "failed: " in ran.stdout and "(cudaError" in ran.stdout and "code " in ran.stdout, ran


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


def test_warmup():
    """In a process of its own: afterwards a call that is the first of its kind is recorded in a graph."""
    script = """
import flashgqa, torch
flashgqa.warmup()
flashgqa.warmup("cuda:0")
q, k, v = (torch.randn(1, h, 300, 64, device="cuda", dtype=torch.float16) for h in (4, 2, 2))
bias = torch.randn(300, 300, device="cuda")
sink = torch.randn(4, device="cuda")
out, lse = torch.zeros_like(q), torch.zeros(1, 4, 300, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flashgqa.attention(q, k, v, bias=bias, sink=sink, softcap=5.0)
    flashgqa.attention_backward(out, q, k, v, out, lse, bias=bias, sink=sink, softcap=5.0)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out, flashgqa.attention(q, k, v, bias=bias, sink=sink, softcap=5.0))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with pytest.raises(ValueError, match="cuda:99"):
        flashgqa.warmup("cuda:99")
