"""``python -m flashgqa`` as its users run it: each subcommand in a process of its own, at tiny sizes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import flashgqa


def command(*arguments):
    return [sys.executable, "-m", "flashgqa", *arguments]


def run(*arguments, code=0):
    """stdout; the exit code is as expected."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code in (0, 1) else done.stderr


def test_version():
    assert run("--version").strip() == f"flashgqa {flashgqa.__version__}"


@pytest.mark.parametrize("arguments", [(), ("demo",), ("info",)])
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
    assert info["config"] == json.loads(json.dumps(flashgqa.show_config()))
    assert info["kernels"] == flashgqa.kernels()


def test_demo_runs_and_checks():
    text = run("demo", "--tokens", "96")
    assert "standard library's source" in text and "q [32, 96, 128]" in text
    assert "GFLOP/s" in text and "peak of this process" in text and "All sampled rows are right." in text
    assert f"fwd_{flashgqa.show_config()['isa']}" in text


def test_demo_progress_is_plain_lines_when_not_a_terminal():
    done = subprocess.run(command("demo", "--tokens", "8"), capture_output=True, text=True, timeout=300)
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
    assert arguments[1] in run(*arguments, code=2)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_prints_one_line():
    process = subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("kernel"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
