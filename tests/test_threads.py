"""The thread pool seen from Python: how many threads, the same bits whoever computes, fork at a bad moment, Ctrl-C."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import flashgqa

fork_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    yield flashgqa.set_num_threads
    flashgqa.set_num_threads(None)


def run(code, **environment):
    """Standard output of a fresh interpreter."""
    clean = {k: v for k, v in os.environ.items() if k not in ("FLASHGQA_NUM_THREADS", "OMP_NUM_THREADS")}
    ran = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


# ---- how many ----

COUNT = "import flashgqa; print(flashgqa.get_num_threads())"


@pytest.mark.parametrize(
    "environment, count",
    [
        ({"FLASHGQA_NUM_THREADS": "3"}, 3),
        ({"FLASHGQA_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"FLASHGQA_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, 5),
    ],
    ids=str,
)
def test_environment_sets_the_count(environment, count):
    assert run(COUNT, **environment) == str(count)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_affinity_bounds_the_default_even_after_the_first_call():
    code = """
import os, numpy, flashgqa
q = numpy.ones((4, 300, 64))
flashgqa.attention(q, q, q)
before = flashgqa.get_num_threads()
assert 1 <= before <= len(os.sched_getaffinity(0))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(flashgqa.get_num_threads())
"""
    assert run(code) == "1"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_small_calls_stay_on_one_thread():
    """Work of less than 50 us at half of what a core does; not even the pool is started for it."""
    code = """
import os, numpy, flashgqa
normal = numpy.random.default_rng(0).standard_normal
def call(dtype, hk, sq, sk, d):
    q, k, v = (normal((1, heads, n, d)).astype(dtype) for heads, n in ((8, sq), (hk, sk), (hk, sk)))
    out, lse = flashgqa.attention(q, k, v, return_lse=True)
    flashgqa.attention_backward(out, q, k, v, out, lse)
    return [flashgqa.explain(q, k, v, backward=backward)["threads"] for backward in (False, True)]
for dtype, hk in (("float32", 2), ("float32", 8), ("float16", 2), ("float64", 1)):
    for sq, sk in ((1, 1), (1, 32), (4, 4), (8, 6)):
        assert call(dtype, hk, sq, sk, 64) == [1, 1], (dtype, hk, sq, sk)
small = len(os.listdir("/proc/self/task"))
assert min(call("float32", 2, 512, 512, 64)) > 1
print(small, len(os.listdir("/proc/self/task")))
"""
    assert run(code, FLASHGQA_NUM_THREADS="4", OPENBLAS_NUM_THREADS="1") == "1 4"


# ---- the same bits ----


def everything(backend, kv_heads):
    """Every result of every pass, with all that has sums of its own: splits of dk and dv, dbias, dsink, key sums."""
    rng = np.random.default_rng(5)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v = normal(2, 4, 400, 24), normal(2, kv_heads, 330, 24), normal(2, kv_heads, 330, 40)
    options = {"causal": True, "bias": normal(1, 4, 1, 330), "sink": normal(4)}
    dropout = {"dropout_p": 0.2, "seed": 9}
    out, lse = backend.attention(q, k, v, return_lse=True, **options, **dropout)
    gradients = backend.attention_backward(normal(2, 4, 400, 40), q, k, v, out, lse, dlse=normal(2, 4, 400), **options, **dropout)
    weights = backend.attention_weights(q, k, rows=[3, 100, 101, 399], **options)
    sums = backend.attention_weights(q, k, reduce="keys", **options)
    return [out, lse, *gradients, weights, sums]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bits_do_not_depend_on_the_number_of_threads(backend, kv_heads, threads):
    threads(1)
    alone = everything(backend, kv_heads)
    for n in (2, 3, 8):
        threads(n)
        for a, b in zip(alone, everything(backend, kv_heads), strict=True):
            np.testing.assert_array_equal(a, b)


def test_batch_invariant_bits_of_a_sequence_alone_and_in_a_batch(backend):
    rng = np.random.default_rng(6)
    q, dout = (rng.standard_normal((5, 4, 700, 16), dtype=np.float32) for _ in range(2))
    k, v = (rng.standard_normal((5, 2, 700, 16), dtype=np.float32) for _ in range(2))
    options = {"causal": True, "batch_invariant": True}
    together = backend.attention_backward(dout, q, k, v, *backend.attention(q, k, v, return_lse=True, **options), **options)
    one = slice(3, 4)
    out, lse = backend.attention(q[one], k[one], v[one], return_lse=True, **options)
    alone = backend.attention_backward(dout[one], q[one], k[one], v[one], out, lse, **options)
    for a, b in zip(alone[:3], together[:3], strict=True):
        np.testing.assert_array_equal(a, b[one])


# ---- several callers ----

FIRST_USE = """
import threading, numpy, flashgqa
q = numpy.random.default_rng(0).standard_normal((4, 500, 32))
results, start = [], threading.Barrier(6)
def work():
    start.wait()
    results.append(flashgqa.attention(q, q, q, causal=True))
workers = [threading.Thread(target=work) for _ in range(6)]
for w in workers: w.start()
for w in workers: w.join()
print(len(results), all(numpy.array_equal(results[0], r) for r in results))
"""


def test_first_use_by_many_threads_at_once():
    for _ in range(3):
        assert run(FIRST_USE, FLASHGQA_NUM_THREADS="4") == "6 True"


# ---- fork ----


def attend(x):
    return flashgqa.attention(x, x, x, causal=True)


@fork_only
@pytest.mark.filterwarnings("ignore")
def test_fork_while_another_thread_computes(threads):
    threads(4)
    x = np.random.default_rng(0).standard_normal((4, 900, 64))
    expected, stop = attend(x), threading.Event()

    def work():
        while not stop.is_set():
            attend(x)

    busy = threading.Thread(target=work)
    busy.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(0 if np.array_equal(attend(x), expected) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        busy.join()
    assert np.array_equal(attend(x), expected)


@fork_only
@pytest.mark.filterwarnings("ignore")
def test_workers_of_a_process_pool(threads):
    threads(2)
    x = np.random.default_rng(0).standard_normal((4, 300, 32))
    expected = attend(x)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for got in pool.map(attend, [x] * 4):
            np.testing.assert_array_equal(got, expected)


# ---- the end of the process ----


def test_exit_while_daemon_threads_compute():
    code = """
import threading, time, numpy, flashgqa
q, k = numpy.ones((1, 8, 8000, 64), "float32"), numpy.ones((1, 2, 8000, 64), "float32")
def forever():
    while True:
        flashgqa.attention(q, k, k)
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
print("end")
"""
    assert run(code, FLASHGQA_NUM_THREADS="4") == "end"


# ---- Ctrl-C ----

INTERRUPTED = """
import os, signal, threading, time, numpy, flashgqa
q = numpy.ones((1, 8, 8000, 128), "float32")
k = numpy.ones((1, 2, 8000, 128), "float32")
waits = []
for _ in range(4):
    sent = []
    def interrupt():
        time.sleep(0.15)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    try:
        CALL
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        waits.append(time.monotonic() - sent[0])
print(min(waits))
"""


@pytest.mark.timing
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "call",
    [
        "flashgqa.attention(q, k, k)",
        "flashgqa.attention_backward(q, q, k, k, q, q[..., 0])",
        "flashgqa.attention_weights(q, k, reduce='keys')",
    ],
    ids=["forward", "backward", "weights"],
)
def test_interrupt_within_200_ms(call, count):
    assert float(run(INTERRUPTED.replace("CALL", call), FLASHGQA_NUM_THREADS=str(count))) < 0.2


def test_other_threads_run_while_an_argument_is_copied():
    """`explain` does nothing else with an array whose last axis is not contiguous; 120 MB take some 100 ms."""
    q = np.broadcast_to(np.zeros((1, 1, 1, 1)), (1, 4, 60000, 64))
    ends, times = threading.Event(), []

    def tick():
        while not ends.wait(0.001):
            times.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    flashgqa.explain(q, q[:, :, :1], q[:, :, :1])
    end = time.perf_counter()
    ends.set()
    thread.join()
    assert any(begin + 0.2 * (end - begin) < t < end - 0.2 * (end - begin) for t in times)
