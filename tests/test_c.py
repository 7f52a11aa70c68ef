"""The C unit tests: plain C11 programs in tests/c, built with the system's compiler and run. No Python.h, no CUDA: tests/c/cuda
has what two files of the host's side of it need of its header.

Each runs as it is and under the address and undefined-behaviour sanitizers, where the compiler has them.
"""

import os
import pathlib
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = sorted((ROOT / "tests" / "c").glob("test_*.c"))
CORE = sorted((ROOT / "csrc" / "core").glob("*.c"))
# What a test links besides the core.
MORE_SOURCES = {
    "test_backward_shift": ["csrc/cuda/bwd_plan.c"],
    "test_threads": ["csrc/cpu/threads.c", "csrc/cpu/thread_count.c", "csrc/cpu/openmp.c"],
    "test_threads_team": ["csrc/cpu/threads.c", "csrc/cpu/thread_count.c"],
    "test_warmup": [f"csrc/cuda/{name}.c" for name in ("bwd_plan", "launch", "properties", "tile_height", "warmup")],
    "test_xla": ["csrc/xla/handler.c", "csrc/cpu/memory.c", "csrc/cuda/absent.c"],
    "test_xla_cuda": ["csrc/xla/handler.c", "csrc/cpu/memory.c"],
}
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def find_compiler():
    for name in (os.environ.get("CC"), (sysconfig.get_config_var("CC") or "").split(" ")[0], "cc", "gcc", "clang"):
        if name and shutil.which(name.split(" ")[0]):
            return name.split(" ")
    return None


COMPILER = find_compiler()


def build(sources, program, extra=()):
    command = [*COMPILER, *FLAGS, *extra, *map(str, sources), "-o", str(program), "-lm"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def sanitizers(tmp_path_factory):
    """The sanitizer flags, or None where this compiler or machine cannot run them."""
    folder = tmp_path_factory.mktemp("sanitizers")
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    built = build([source], folder / "empty", SANITIZERS)
    runs = built.returncode == 0 and subprocess.run([folder / "empty"], capture_output=True, check=False).returncode == 0
    return SANITIZERS if runs else None


@pytest.mark.skipif(COMPILER is None, reason="no C compiler found (CC, cc, gcc, clang)")
@pytest.mark.parametrize("mode", ["plain", "sanitized"])
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_c(path, mode, tmp_path, request):
    extra = [f"-I{ROOT / 'tests' / 'c' / 'cuda'}"]
    if mode == "sanitized":
        sanitizers = request.getfixturevalue("sanitizers")
        if sanitizers is None:
            pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
        extra += sanitizers
    sources = [path, *CORE, *(ROOT / more for more in MORE_SOURCES.get(path.stem, []))]
    built = build(sources, tmp_path / path.stem, extra)
    assert built.returncode == 0, built.stderr
    # Exported preloads of an outer sanitizer run would clash with the program's own.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "allocator_may_return_null=1"
    ran = subprocess.run([tmp_path / path.stem], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ran.returncode == 0, f"{path.name} failed:\n{ran.stdout}{ran.stderr}"


@pytest.mark.skipif(COMPILER is None, reason="no C compiler found (CC, cc, gcc, clang)")
def test_core_headers_stand_alone(tmp_path):
    """Each core header compiles by itself, so none relies on what another file included before it."""
    for header in sorted((ROOT / "csrc" / "core").glob("*.h")):
        source = tmp_path / f"{header.stem}_alone.c"
        source.write_text(f'#include "{header}"\nint fgqa_alone_{header.stem}(void) {{ return 0; }}\n')
        built = subprocess.run(
            [*COMPILER, *FLAGS, "-Wno-unused-function", "-c", str(source), "-o", str(tmp_path / "alone.o")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert built.returncode == 0, built.stderr
