"""Calls with PyTorch's tensors on the threads of its OpenMP runtime: where they run, the same bits, fork, nested calls, Ctrl-C.

Each in a process of its own, four threads on each side. A call takes the team if it spins, or if nothing is known of it yet, as
in a thread's first call and the first after torch.set_num_threads.
"""

import sys

import pytest
from test_threads import INTERRUPTED, fork_only, run

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for PyTorch's runtime on Linux only")

SETUP = """
import os, signal, sys, threading, time, torch, flashgqa
torch.manual_seed(0)
torch.set_num_threads(4)
x = torch.randn(1, 8, 500, 64)
def attend(x=x):
    return flashgqa.attention(x, x, x, causal=True)
def on_team(x=x):
    "On the team, whatever it does: it is a new one."
    torch.set_num_threads(7 - torch.get_num_threads())
    return attend(x)
def same(a, b):
    "Without an operation of PyTorch's, which would wait for ever in a child of fork."
    return a.view(torch.uint8).numpy().tobytes() == b.view(torch.uint8).numpy().tobytes()
def wait(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
expected = torch.from_numpy(flashgqa.attention(x.numpy(), x.numpy(), x.numpy(), causal=True))
"""


def run_with_torch(code, **environment):
    return run(SETUP + code, **{"FLASHGQA_NUM_THREADS": "4", **environment})


def test_config_names_the_runtime():
    code = "import flashgqa; print(flashgqa.show_config()['openmp']); import torch; print(flashgqa.show_config()['openmp'])"
    before, after = run(code).split("\n")
    assert before == "None" and "omp" in after


def test_no_thread_is_started_beside_the_team():
    code = "import os, torch; torch.set_num_threads(4); x = torch.randn(1, 8, 500, 64); torch.exp(x)\n"
    code += "import flashgqa; before = len(os.listdir('/proc/self/task'))\n"
    code += "flashgqa.attention(CALL); print(len(os.listdir('/proc/self/task')) - before)"
    assert run(code.replace("CALL", "x, x, x"), FLASHGQA_NUM_THREADS="4") == "0"
    assert run(code.replace("CALL", "*(x.numpy(),) * 3"), FLASHGQA_NUM_THREADS="4") == "3"
    assert run(code.replace("CALL", "x, x, x"), FLASHGQA_NUM_THREADS="6") == "2"
    assert run(code.replace("CALL", "x, x, x"), FLASHGQA_NUM_THREADS="3") == "2"      # fewer than the team: the pool alone


def test_bits():
    """Teams of 2 to 5 threads for calls of 1 to 7: in short calls some have nothing to do, the pool adds what a team lacks."""
    code = """
def results(a, b):
    out, lse = flashgqa.attention(a, b, b, return_lse=True, causal=True)
    return (out, lse, *flashgqa.attention_backward(out, a, b, b, out, lse, causal=True)[:3])
q, k = torch.randn(2, 8, 300, 64, dtype=torch.float64), torch.randn(2, 2, 300, 64, dtype=torch.float64)
for dtype, length in ((torch.float64, 300), (torch.float32, 300), (torch.float32, 50), (torch.bfloat16, 300)):
    a, b = q[:, :, :length].to(dtype), k[:, :, :length].to(dtype)
    flashgqa.set_num_threads(1)
    alone = results(a, b)
    for count in (3, 7):
        flashgqa.set_num_threads(count)
        for members in (2, 5, 3):
            torch.set_num_threads(members)
            assert all(map(same, alone, results(a, b))), (dtype, length, count, members)
print("same")
"""
    assert run_with_torch(code) == "same"


@pytest.mark.parametrize("variable, value", [("OMP_THREAD_LIMIT", "2"), ("OMP_DYNAMIC", "true"), ("OMP_MAX_ACTIVE_LEVELS", "0")])
def test_a_team_that_is_smaller_than_asked_for(variable, value):
    code = "for _ in range(5): assert same(on_team(), expected)\nprint('same')"
    assert run_with_torch(code, **{variable: value}) == "same"


def test_many_python_threads():
    code = """
failed = []
def work():
    for _ in range(4):
        if not (same(attend(), expected) and same(on_team(), expected)): failed.append(1)
        torch.exp(x)
workers = [threading.Thread(target=work) for _ in range(6)]
for w in workers: w.start()
for w in workers: w.join()
print(failed)
"""
    assert run_with_torch(code) == "[]"


@fork_only
def test_a_child_of_fork_has_no_team():
    code = """
torch.exp(x)
attend()
child = os.fork()
if child == 0:
    signal.alarm(60)
    for _ in range(3):
        assert same(attend(), expected)
    assert flashgqa.show_config()["openmp"] is None
    os._exit(0)
wait(child)
assert same(on_team(), expected)
print("end")
"""
    assert run_with_torch(code) == "end"


@fork_only
def test_a_child_of_fork_that_imports_flashgqa_itself():
    code = """
import os, signal, torch
torch.set_num_threads(4)
x = torch.randn(1, 8, 500, 64)
torch.exp(x)
child = os.fork()
if child == 0:
    signal.alarm(60)
    import flashgqa
    flashgqa.attention(x, x, x)
    assert flashgqa.show_config()["openmp"] is None
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("end")
"""
    assert run(code, FLASHGQA_NUM_THREADS="4") == "end"


LONG = """
long = torch.randn(1, 8, 8000, 64)
def later(handler):
    signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, 0.1)
"""


@fork_only
def test_fork_inside_of_a_call_on_the_team():
    code = """
children = []
later(lambda: children.append(os.fork()))
try:
    out = on_team(long)
except RuntimeError as error:
    assert children == [0] and "forked" in str(error)
    signal.alarm(60)
    assert same(attend(), expected)
    os._exit(0)
wait(children[0])
assert same(out, on_team(long))
print("end")
"""
    assert run_with_torch(LONG + code) == "end"


def test_a_call_inside_of_a_call_on_the_team():
    code = """
inner = []
later(lambda: inner.append((attend(), torch.exp(x))))
out = on_team(long)
assert len(inner) == 1 and same(inner[0][0], expected)
assert same(out, on_team(long))
print("end")
"""
    assert run_with_torch(LONG + code) == "end"


def test_exit_while_daemon_threads_compute():
    """In calls that last: a daemon thread that comes back to PyTorch's own functions while the interpreter ends is the end of the
    process, without this library, too."""
    code = """
long = torch.randn(1, 8, 40000, 64)
for _ in range(3): threading.Thread(target=on_team, args=(long,), daemon=True).start()
time.sleep(0.5)
print("end")
"""
    assert run_with_torch(code) == "end"


@pytest.mark.timing
@pytest.mark.parametrize("count", [3, 4])
def test_interrupt_within_200_ms(count):
    code = INTERRUPTED.replace("numpy, ", "torch, ").replace("numpy.ones(", "torch.ones(").replace(', "float32")', ")")
    code = code.replace("CALL", f"torch.set_num_threads({2 * count - 1} - torch.get_num_threads()); flashgqa.attention(q, k, k)")
    code = f"import torch; torch.set_num_threads({count})\n" + code
    assert float(run(code, FLASHGQA_NUM_THREADS=str(count))) < 0.2


def test_rounding_of_the_team_stays_as_it_was():
    """Tasks round to nearest and flush results; afterwards the team's threads count subnormal numbers as PyTorch set them to."""
    code = """
tiny = torch.full((1 << 20,), 1e-39)
half = tiny * 0.5
assert half.numpy().min() > 0
assert same(on_team(), expected)
assert same(tiny * 0.5, half)
print("end")
"""
    assert run_with_torch(code) == "end"
