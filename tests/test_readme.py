"""Every Python block of README.md runs, and what README names exists."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import flashgqa

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    block = BLOCKS[number]
    for library in ("torch", "transformers", "jax"):
        if re.search(rf"^(import|from) {library}\b", block, re.M):
            pytest.importorskip(library)
    ran = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    promised = re.findall(r"^print\(.*\)\s+# (.+)$", block, re.M)
    assert all(line in ran.stdout for line in promised), f"{promised} not in:\n{ran.stdout}"


def test_there_are_blocks():
    assert len(BLOCKS) >= 4


def test_commands_are_marked():
    for marker in ("install", "test"):
        assert re.search(rf"<!-- {marker} -->\n```sh\n.+?```", README, re.S), f"no block after the marker {marker}"


@pytest.mark.parametrize("page", ["README.md", "csrc/README.md"])
def test_named_files_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    names = re.findall(r"`((?:[\w.]+/)*[\w.]+/|(?:[\w.]+/)*\w+\.(?:py|c|h|def|md))`", text)
    assert names
    missing = [name for name in names if not any((base / name).exists() for base in (folder, ROOT, ROOT / "csrc"))]
    assert not missing


def test_map_names_every_source():
    text = (ROOT / "csrc" / "README.md").read_text(encoding="utf-8")
    sources = [path.relative_to(ROOT / "csrc").as_posix() for path in (ROOT / "csrc").glob("*/*.c")]
    common = {"core/tensor.c", "core/status.c"}     # named by their headers
    assert len(sources) > 10
    assert not [name for name in sources if f"`{name}`" not in text and name not in common]


def test_commands_are_those_of_the_command_line():
    named = re.findall(r"^\| `([\w-]+)` \|", README.split("| `python -m flashgqa` |")[1].split("\n\n")[0], re.M)
    command = [sys.executable, "-m", "flashgqa", "--help"]
    helped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert named == re.findall(r"^    ([\w-]+) {2,}\S", helped.split("options:")[0], re.M)


def test_speed_is_what_was_measured():
    if (ROOT / "benchmarks" / "results" / "cpu.json").exists():
        command = [sys.executable, "benchmarks/report.py", "--check"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr


def test_options_are_those_of_attention():
    table = README.split("| option | meaning |")[1].split("\n\n")[0]
    named = {name for cell in re.findall(r"^\| (`[^|]+) \|", table, re.M) for name in re.findall(r"`(\w+)", cell)}
    known = set(inspect.signature(flashgqa.attention).parameters) | {"dlse"}
    assert named <= known
    no_meaning = set("q k v max_q max_kv stream deterministic batch_invariant precision check device kernel".split())
    assert known - no_meaning <= named
