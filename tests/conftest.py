"""Which kernels the tests run: every row of isa.def that this processor has, each forced in turn, and those of a GPU where
there is one.

A test that takes the `backend` fixture runs once for each; it calls `backend.attention(...)` as users call
`flashgqa.attention(...)`. Cases and their oracles come from cases.py, which knows no device.
"""

import os
import signal

# The oracle's matrix products are small; BLAS threads would only wait for each other and for the kernels' own pool.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# JAX would take three quarters of a GPU's memory at its first array, from all test processes beside it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import numpy as np
import pytest

import flashgqa

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("suite")


def cpu_isas():
    """Rows of isa.def that have a kernel here, best first."""
    names = [kernel["name"] for kernel in flashgqa.kernels() if kernel["device"] == "cpu" and kernel["available"]]
    return list(dict.fromkeys(name.split("_", 1)[1] for name in names))


class Backend:
    """One instruction set of the CPU. A GPU is another class with these methods (gpu.py), `put` and `get` moving arrays."""

    device = "cpu"

    def __init__(self, isa):
        self.isa = isa

    def __repr__(self):
        return f"cpu-{self.isa}"

    def put(self, x):
        return x

    def get(self, x):
        return np.asarray(x)

    def attention(self, *inputs, **options):
        return flashgqa.attention(*inputs, **options, kernel=f"fwd_{self.isa}")

    def attention_backward(self, *inputs, **options):
        return flashgqa.attention_backward(*inputs, **options, kernel=f"bwd_{self.isa}")

    def attention_with_kvcache(self, *inputs, **options):
        return flashgqa.attention_with_kvcache(*inputs, **options, kernel=f"fwd_{self.isa}")

    def attention_weights(self, *inputs, **options):
        which = "keysum" if "reduce" in options else "rows"
        return flashgqa.attention_weights(*inputs, **options, kernel=f"{which}_{self.isa}")


def has_gpu():
    return any(kernel["device"] == "cuda" and kernel["available"] for kernel in flashgqa.kernels())


def backends():
    rows = [Backend(isa) for isa in cpu_isas()]
    if has_gpu():
        from gpu import CudaBackend

        rows += [CudaBackend(), CudaBackend("general")]
    return rows


def cache_backends():
    """The same for KV caches, which kernels of their own read: the plan's choice, and the one that serves every call."""
    rows = [Backend(isa) for isa in cpu_isas()]
    if has_gpu():
        from gpu import CudaBackend

        rows += [CudaBackend(), CudaBackend("cache")]
    return rows


ON_A_GPU = [
    "test_cuda.py", "test_cuda_arrays.py", "test_cuda_streams.py", "test_decode_cuda.py", "test_decode_float8_cuda.py",
    "test_guard_pages_cuda.py", "test_hopper.py", "test_hopper_alibi.py", "test_hopper_backward.py",
    "test_hopper_backward_any_bias.py", "test_hopper_backward_bias.py", "test_hopper_backward_bits.py",
    "test_hopper_backward_dbias.py", "test_hopper_backward_short.py", "test_hopper_backward_wide_bias.py",
    "test_hopper_dropout.py", "test_hopper_lengths.py", "test_hopper_pairs.py", "test_hopper_poison.py", "test_hopper_rising.py",
    "test_hopper_rows.py", "test_hopper_softcap.py", "test_hopper_strides.py", "test_hopper_terms.py", "test_kvcache_cuda.py",
    "test_merged_launches_cuda.py", "test_probes.py", "test_torch_cuda.py", "test_warmup_cuda.py",
]  # fmt: skip
collect_ignore = [] if has_gpu() else ON_A_GPU


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """After the test's own parameters, so that the kernels take turns at one case while its oracle is at hand."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends(), ids=repr)


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


def pytest_configure(config):
    # A shell that starts the suite in the background has SIGINT ignored in all of it; the tests of Ctrl-C need it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "sweep: random combinations of all options; the longest part of the suite")


def pytest_report_header(config):
    lacking = [kernel for kernel in flashgqa.kernels() if not kernel["available"]]
    names = [f"{kernel['name']} ({kernel['reason']})" for kernel in lacking if kernel["device"] == "cpu"]
    if not has_gpu():
        names.append(f"cuda ({flashgqa.show_config()['cuda_reason']})")
    return f"flashgqa: cpu rows {', '.join(cpu_isas())}; not collected: {', '.join(names) or 'none'}"
