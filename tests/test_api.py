"""The Python face of flashgqa: signatures, documentation, explain, show_config, threads, import, interruption."""

import ast
import doctest
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
from capsules import inputs

import flashgqa
from flashgqa import _C, _heads, _memory, _warmup, api, kvcache, reference

Q, K, V = inputs("float64")
CALLS = {"attention": (5, ()), "attention_backward": (8, ()), "explain": (6, ()), "attention_weights": (3, ())}
NO_DROPOUT = {"dropout_p", "seed", "deterministic", "batch_invariant", "precision"}


def run(code, **environment):
    """A fresh interpreter; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout, done.stderr


# ---- signatures and documentation ----


@pytest.mark.parametrize("name", CALLS)
def test_options_are_keyword_only_and_all_there(name):
    parameters = inspect.signature(getattr(flashgqa, name)).parameters
    keywords = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    missing = NO_DROPOUT if name == "attention_weights" else set()
    assert keywords >= set(_C.OPTIONS) - missing
    assert not keywords & missing
    tensors = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert tensors == {"attention_backward": ["dout", "q", "k", "v", "out", "lse"], "attention_weights": ["q", "k"]}.get(
        name, ["q", "k", "v"]
    )


def handed_over(name):
    """Names of the arguments that a function of api.py gives to _C, in order."""
    function = next(n for n in ast.parse(Path(api.__file__).read_text()).body if getattr(n, "name", None) == name)
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and len(n.args) > 10]
    assert len(calls) == 1
    return [getattr(argument, "id", None) for argument in calls[0].args]


@pytest.mark.parametrize("name", CALLS)
def test_options_are_handed_over_in_the_order_of_C(name):
    options = handed_over(name)[CALLS[name][0] :]
    expected = [None if name == "attention_weights" and o in NO_DROPOUT else o for o in _C.OPTIONS]
    assert options == expected


def test_attention_takes_arrays_and_keywords_as_python_functions_do():
    """It is a function of C; what is not three arrays and known keywords goes through the one in api.py."""
    expected = flashgqa.attention(Q, K, V, causal=True, scale=0.5)
    made_late = {"".join(["cau", "sal"]): True, "".join(["sc", "ale"]): 0.5}  # strings that are not interned
    for result in (
        flashgqa.attention(v=V, k=K, q=Q, causal=True, scale=0.5),
        flashgqa.attention(Q, v=V, k=K, scale=0.5, causal=True),
        flashgqa.attention(Q, K, V, **made_late),
        flashgqa.attention(*(Q, K), **{"v": V, "causal": True, "scale": 0.5, "return_lse": False}),
    ):
        numpy.testing.assert_array_equal(result, expected)
    for call, message in (
        (lambda: flashgqa.attention(), "missing 3 required positional arguments"),
        (lambda: flashgqa.attention(Q, K), "missing 1 required positional argument: 'v'"),
        (lambda: flashgqa.attention(Q, K, V, True), "takes 3 positional arguments but 4"),
        (lambda: flashgqa.attention(Q, K, V, casual=True), "unexpected keyword argument 'casual'"),
        (lambda: flashgqa.attention(Q, K, V, q=Q), "multiple values for argument 'q'"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_attention_is_known_by_its_name_and_documentation():
    assert flashgqa.attention.__name__ == flashgqa.attention.__qualname__ == "attention"
    assert flashgqa.attention.__doc__.startswith("Exact attention, ")
    assert flashgqa.attention.__module__ == "flashgqa.api"
    assert pickle.loads(pickle.dumps(flashgqa.attention)) is flashgqa.attention
    with pytest.raises(TypeError, match="not those of forward"):
        _C.keyword_attention(lambda *, causal=False: None, "")
    assert flashgqa.attention(Q, K, V).shape == Q.shape  # as before


def test_both_passes_have_the_same_defaults():
    forward = inspect.signature(flashgqa.attention).parameters
    for name in CALLS:
        for parameter in inspect.signature(getattr(flashgqa, name)).parameters.values():
            if parameter.name in _C.OPTIONS:
                assert (
                    parameter.default == forward[parameter.name].default or parameter.default is forward[parameter.name].default
                )


def test_stubs_name_what_exists():
    stub = ast.parse(Path(api.__file__).with_suffix(".pyi").read_text())
    classes = {n.name: n for n in stub.body if isinstance(n, ast.ClassDef)}
    options = [n.target.id for c in ("_Meaning", "_Place", "_Computation") for n in classes[c].body]
    assert sorted(options) == sorted(_C.OPTIONS)
    functions = {n.name for n in stub.body if isinstance(n, ast.FunctionDef)}
    assert functions | {"Config", "Gradients", "Plan", "Tensor", "__version__"} == set(api.__all__)
    assert set(api.__all__) | set(kvcache.__all__) | {"mean_pool_kv_heads", "warmup"} == set(flashgqa.__all__)
    compiled = ast.parse((Path(api.__file__).parent / "_C.pyi").read_text())
    named = {getattr(n, "name", None) or n.target.id for n in compiled.body if hasattr(n, "name") or hasattr(n, "target")}
    assert named == {n for n in dir(_C) if not n.startswith("__")} | {"__version__"}


def test_every_function_is_documented_and_examples_run():
    for name in flashgqa.__all__:
        thing = getattr(flashgqa, name)
        assert name == "__version__" or (thing.__doc__ and len(thing.__doc__) > 40), name
    for module in (api, _heads, _memory, _warmup):
        assert doctest.testmod(module).failed == 0


def test_wrong_number_of_arguments_to_C():
    with pytest.raises(TypeError, match="_C.forward takes 31 arguments, got 3"):
        _C.forward(Q, K, V)
    with pytest.raises(TypeError, match="unexpected keyword"):
        flashgqa.attention(Q, K, V, is_causal=True)


# ---- import ----


def test_import_brings_no_framework_and_starts_no_thread():
    code = """
import os, sys, numpy
tasks = len(os.listdir("/proc/self/task"))
import flashgqa
assert not {"torch", "jax", "jaxlib", "ml_dtypes", "cupy", "tensorflow"} & set(sys.modules)
assert len(os.listdir("/proc/self/task")) == tasks
"""
    assert run(code) == (0, "", "")


def test_import_time():
    """Under 60 ms over NumPy's own; the best of several runs, as this machine may be busy."""
    code = "import numpy, time; t = time.perf_counter(); import flashgqa; print(time.perf_counter() - t)"
    assert min(float(run(code)[1]) for _ in range(5)) < 0.06


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("FLASHGQA_LOG", "all", 'FLASHGQA_LOG is "all": it must be "plan"'),
        ("FLASHGQA_CPU_ISA", "sse9", "FLASHGQA_CPU_ISA"),
        ("FLASHGQA_NUM_THREADS", "many", "FLASHGQA_NUM_THREADS"),
    ],
)
def test_wrong_environment_fails_at_import(variable, value, text):
    code, _, errors = run("import flashgqa", **{variable: value})
    assert code != 0 and "ValueError" in errors and text in errors


def test_log_prints_each_plan_once():
    code = """
import numpy, flashgqa
q = numpy.ones((2, 3, 4)); k = numpy.ones((2, 5, 4))
for _ in range(3):
    flashgqa.attention(q, k, k)
flashgqa.attention(q, k, k, causal=True)
"""
    status, out, errors = run(code, FLASHGQA_LOG="plan")
    assert (status, out) == (0, "") and errors.count("flashgqa plan\n") == 2 and errors.count("sq 3, sk 5") == 2


# ---- explain, show_config, kernels, threads ----


def test_explain_is_data_and_text():
    plan = flashgqa.explain(Q, K, V, causal=True)
    assert (plan["pass"], plan["device"], plan["dtype"]) == ("forward", "cpu", "float64")
    assert [plan[n] for n in ("b", "hq", "hk", "sq", "sk", "d", "dv")] == [1, 4, 2, 3, 5, 8, 8]
    assert plan["flops"] == 4 * 8 * 4 * (3 + 4 + 5)  # 2 (d + dv) a visible score
    assert plan["kernel"] in str(plan) and str(plan) == plan["text"] == repr(plan)
    assert isinstance(plan["workspace_bytes"], int) and plan["refused"] == [] and plan["any_order"] is False


def test_explain_backward_plans_the_backward_pass():
    bias, sink = numpy.ones((3, 5)), numpy.ones(4)
    for options in ({}, dict(causal=True), dict(bias=bias, sink=sink), dict(dropout_p=0.5, seed=1), dict(layout="bshd")):
        q, k, v = (x[None].transpose(0, 2, 1, 3) if "layout" in options else x for x in (Q, K, V))
        plan = flashgqa.explain(q, k, v, backward=True, **options)
        assert plan["pass"] == "backward" and plan["kernel"].startswith("bwd")


def test_explain_of_each_kernel():
    for kernel in flashgqa.kernels():
        if kernel["pass"] in ("forward", "backward") and kernel["available"] and kernel["device"] == "cpu":
            plan = flashgqa.explain(Q, K, V, kernel=kernel["name"], backward=kernel["pass"] == "backward")
            assert (plan["kernel"], plan["pass"]) == (kernel["name"], kernel["pass"])


def test_explain_raises_as_the_call_does():
    for options, error in (
        (dict(chunk=0), ValueError),
        (dict(device="cuda:4096"), (NotImplementedError, ValueError)),
        (dict(kernel="x"), ValueError),
    ):
        for backward in (False, True):
            with pytest.raises(error) as explained:
                flashgqa.explain(Q, K, V, backward=backward, **options)
        with pytest.raises(error) as called:
            flashgqa.attention(Q, K, V, **options)
        if "kernel" not in options:
            assert str(explained.value) == str(called.value)
    with pytest.raises(ValueError, match="out has shape"):
        flashgqa.explain(Q, K, V, out=numpy.empty((4, 3, 9)))
    with pytest.raises(TypeError, match="backward is 1"):
        flashgqa.explain(Q, K, V, backward=1)


def test_kernels_are_listed_with_reasons():
    rows = flashgqa.kernels()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    for name, which, device in _C.kernels():
        assert dict(name=name, device=device, available=True, reason=None, **{"pass": which}) in rows
    status, out, _ = run(
        "import flashgqa; print([r['reason'] for r in flashgqa.kernels() if not r['available']], flashgqa.show_config()['isa'])",
        FLASHGQA_CPU_ISA="portable",
    )
    assert status == 0 and out.rstrip().endswith("portable")
    if flashgqa.show_config()["isa"] != "portable":
        assert "ruled out by FLASHGQA_CPU_ISA" in out


def test_show_config():
    config = flashgqa.show_config()
    assert config["version"] == flashgqa.__version__ and config["numpy"] == numpy.__version__
    assert config["isa"] in config["isa_supported"] and set(config["isa_supported"]) <= set(config["isa_compiled"])
    assert config["cuda"] is bool(config["cuda_devices"]) and config["cuda"] is (config["cuda_reason"] is None)
    lines = dict(line.split(maxsplit=1) for line in str(config).splitlines())
    assert lines["threads"] == str(config["threads"]) and lines["cuda"] == str(config["cuda"]) and len(lines) == len(config)
    assert "<th>isa</th>" in config._repr_html_() and repr(config) == str(config)


def test_threads_do_not_change_bits():
    draw = numpy.random.default_rng(0)
    q, k, v = (draw.standard_normal((2, h, 300, 32)).astype("float32") for h in (4, 2, 2))
    default = flashgqa.get_num_threads()
    seen = []
    try:
        for n in (1, 2, 5):
            flashgqa.set_num_threads(n)
            assert flashgqa.get_num_threads() == n
            out, lse = flashgqa.attention(q, k, v, causal=True, return_lse=True)
            seen.append([out, lse, *flashgqa.attention_backward(out, q, k, v, out, lse, causal=True)[:3]])
    finally:
        flashgqa.set_num_threads(None)
    assert flashgqa.get_num_threads() == default
    assert all(numpy.array_equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_two_python_threads_at_once():
    draw = numpy.random.default_rng(0)
    q, k, v = (draw.standard_normal((2, h, 200, 32)) for h in (4, 2, 2))
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    gradients = flashgqa.attention_backward(out, q, k, v, out, lse)
    wrong, done = [], []

    def work():
        for _ in range(15):
            got, got_lse = flashgqa.attention(q, k, v, return_lse=True)
            if not (numpy.array_equal(got, out) and numpy.array_equal(got_lse, lse)):
                wrong.append("forward")
            got = flashgqa.attention_backward(out, q, k, v, out, lse)
            if not all(numpy.array_equal(a, b) for a, b in zip(got[:3], gradients[:3], strict=True)):
                wrong.append("backward")
            try:
                flashgqa.attention(q, k, v[:1])
            except ValueError as error:
                done.append("v has batch size 1" in str(error))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == [] and done == [True] * 60


def test_other_python_threads_run_meanwhile():
    """The GIL is released: a Python thread counts while attention computes."""
    q = numpy.ones((1, 8, 4000, 64), "float32")
    ticks, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        began = time.monotonic()
        flashgqa.attention(q, q, q)
        lasted, counted = time.monotonic() - began, ticks[0]
    finally:
        stop.set()
        counter.join()
    assert lasted < 0.05 or counted > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_fork_after_use():
    q = numpy.random.default_rng(0).standard_normal((4, 600, 64))
    expected = flashgqa.attention(q, q, q)
    child = os.fork()
    if child == 0:
        os._exit(0 if numpy.array_equal(flashgqa.attention(q, q, q), expected) else 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("the child hung")
    assert os.waitstatus_to_exitcode(status) == 0
    assert numpy.array_equal(flashgqa.attention(q, q, q), expected)


# ---- small functions ----


def test_kv_cache_bytes():
    assert flashgqa.kv_cache_bytes(32, 32, 128, "float16") == 524_288  # Llama 2 7B, MHA, a token
    assert flashgqa.kv_cache_bytes(32, 1, 128, "float16") == 16_384
    assert flashgqa.kv_cache_bytes(32, 8, 128, "bfloat16", tokens=8192, batch=4) == 2 * 32 * 8 * 128 * 2 * 8192 * 4
    for dtype in (4, "float32", numpy.float32, numpy.dtype("float32"), numpy.ones(1, "float32").dtype):
        assert flashgqa.kv_cache_bytes(1, 1, 1, dtype) == 8
    assert flashgqa.kv_cache_bytes(1, 1, 1, "float8_e4m3") == 2
    torch = pytest.importorskip("torch")
    assert flashgqa.kv_cache_bytes(1, 1, 1, torch.bfloat16) == 4
    for bad in (1.5, True, None):
        with pytest.raises(TypeError, match="num_layers is"):
            flashgqa.kv_cache_bytes(bad, 1, 1, "float16")
        with pytest.raises(TypeError, match="dtype is .*a dtype, its name"):
            flashgqa.kv_cache_bytes(1, 1, 1, bad)
    with pytest.raises(TypeError, match="dtype is 'half precision'"):
        flashgqa.kv_cache_bytes(1, 1, 1, "half precision")
    with pytest.raises(ValueError, match="dtype is -2"):
        flashgqa.kv_cache_bytes(1, 1, 1, -2)
    with pytest.raises(ValueError, match="tokens is -1"):
        flashgqa.kv_cache_bytes(1, 1, 1, "float16", tokens=-1)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, numpy.int64(7), numpy.array([5, 9]), numpy.array([-3, 2**32 - 1])])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0, 2**-17])
def test_dropout_mask(seed, p):
    got = flashgqa.dropout_mask(2, 3, 5, 21, p, seed)
    assert got.dtype == bool and got.shape == (2, 3, 5, 21)
    assert numpy.array_equal(got, reference.dropout_mask(2, 3, 5, 21, p, seed))


def test_dropout_mask_is_what_attention_drops():
    q, k = numpy.zeros((1, 2, 6, 8)), numpy.zeros((1, 2, 40, 8))
    v = numpy.broadcast_to(numpy.eye(40), (1, 2, 40, 40))
    kept = flashgqa.attention(q, k, v, dropout_p=0.3, seed=11) > 0
    assert numpy.array_equal(kept, flashgqa.dropout_mask(1, 2, 6, 40, 0.3, 11))


def test_dropout_mask_needs_a_seed_and_memory():
    with pytest.raises(ValueError, match="seed is None: the dropped weights follow from the seed alone"):
        flashgqa.dropout_mask(1, 1, 2, 2, 0.5, None)
    assert flashgqa.dropout_mask(1, 1, 2, 2, 0.0, None).all()
    for extent in (2**20, 2**31 - 1):
        with pytest.raises(MemoryError, match="b \\* hq \\* sq \\* sk bytes does not fit"):
            flashgqa.dropout_mask(extent, extent, extent, 4, 0.5, 1)


def test_dropout_mask_of_nothing():
    assert flashgqa.dropout_mask(0, 3, 5, 7, 0.5, 1).shape == (0, 3, 5, 7)
    assert flashgqa.dropout_mask(2, 3, 5, 0, 0.5, 1).shape == (2, 3, 5, 0)


@pytest.mark.parametrize("name", ["float64", "float32", "float16"])
@pytest.mark.parametrize("layout", [None, "bhsd", "bshd"])
@pytest.mark.parametrize("rank", [3, 4])
def test_merge(name, layout, rank):
    q, k, v = (x.astype(name) for x in inputs("float64"))
    if layout == "bshd":
        q, k, v = (x.transpose(1, 0, 2).copy() for x in (q, k, v))
    axis = 0 if layout == "bshd" else 1
    if rank == 4:
        q, k, v, axis = q[None], k[None], v[None], axis + 1
    cut = [(slice(None),) * axis + (part,) for part in (slice(0, 1), slice(1, 1), slice(1, 5))]
    parts = [flashgqa.attention(q, k[c], v[c], layout=layout, return_lse=True) for c in cut]
    out, lse = flashgqa.merge([o for o, _ in parts], [x for _, x in parts], layout=layout)
    whole, whole_lse = flashgqa.attention(q, k, v, layout=layout, return_lse=True)
    tolerance = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3}[name]
    assert out.dtype == whole.dtype and lse.dtype == whole_lse.dtype and out.shape == whole.shape and lse.shape == whole_lse.shape
    assert numpy.allclose(out, whole, atol=tolerance) and numpy.allclose(lse, whole_lse, atol=max(tolerance, 1e-14))


def test_merge_of_packed_sequences():
    q, k, v = (x.transpose(1, 0, 2).copy() for x in inputs("float64"))
    offsets = dict(cu_seqlens_q=numpy.array([0, 1, 3], "int32"), cu_seqlens_kv=numpy.array([0, 2, 5], "int32"))
    out, lse = flashgqa.attention(q, k, v, return_lse=True, **offsets)
    nothing = numpy.full_like(out, numpy.nan), numpy.full_like(lse, -numpy.inf)
    got = flashgqa.merge((out, nothing[0]), (lse, nothing[1]), layout="bshd")
    assert numpy.allclose(got[0], out, atol=1e-15) and numpy.allclose(got[1], lse)


def test_merge_in_the_callers_library():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in inputs())
    parts = [flashgqa.attention(q, k[:, c], v[:, c], return_lse=True) for c in (slice(0, 2), slice(2, 5))]
    out, lse = flashgqa.merge(*zip(*parts, strict=True))
    assert type(out) is type(lse) is torch.Tensor
    assert torch.allclose(out, flashgqa.attention(q, k, v), atol=1e-6)


def test_weights():
    options = dict(causal=True, sink=numpy.linspace(-1, 1, 4), scale=0.7)
    rows = flashgqa.attention_weights(Q, K, rows=[2, 0], **options)
    expected = reference.attention_weights(Q, K, rows=numpy.array([2, 0]), **options)
    assert rows.shape == (4, 2, 5) and numpy.allclose(rows, expected, atol=1e-14)
    sums = flashgqa.attention_weights(Q, K, reduce="keys", **options)
    everything = flashgqa.attention_weights(Q, K, rows=range(3), **options)
    assert sums.shape == (4, 5) and numpy.allclose(sums, everything.sum(1), atol=1e-14)
    assert flashgqa.attention_weights(Q.astype("float16"), K.astype("float16"), reduce="keys").dtype == "float32"
    assert flashgqa.attention_weights(Q, K, rows=[]).shape == (4, 0, 5)
    for bad in ([1.5], ["1"], [2**70], (None,)):
        with pytest.raises(TypeError, match="rows is .*sequence of integers"):
            flashgqa.attention_weights(Q, K, rows=bad)
    torch = pytest.importorskip("torch")
    got = flashgqa.attention_weights(torch.from_numpy(Q), torch.from_numpy(K), rows=torch.tensor([2, 0]), **options)
    assert type(got) is torch.Tensor and numpy.array_equal(got.numpy(), rows)


def test_the_loop_of_the_issue():
    """Four query heads over two KV heads, head by head: what attention is."""
    q, k, v = numpy.random.randn(4, 3, 4), numpy.random.randn(2, 3, 4), numpy.random.randn(2, 3, 4)
    out = flashgqa.attention(q, k, v)
    for h in range(4):
        scores = q[h] @ k[h // 2].T / numpy.sqrt(4)
        weights = numpy.exp(scores) / numpy.exp(scores).sum(axis=-1, keepdims=True)
        assert abs(out[h] - weights @ v[h // 2]).max() < 1e-12


def test_warmup_without_a_gpu_does_nothing_unless_asked():
    if flashgqa.show_config()["cuda"]:
        return
    flashgqa.warmup()
    with pytest.raises((RuntimeError, NotImplementedError), match="CUDA"):
        flashgqa.warmup("cuda")
    for wrong, error in (("cpu", ValueError), ("cuda:x", ValueError), ("cuda:", ValueError), (0, TypeError)):
        with pytest.raises(error, match="device is"):
            flashgqa.warmup(wrong)
