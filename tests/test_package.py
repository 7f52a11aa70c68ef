"""What is installed and what is shipped: import without frameworks, one version, one abi3 module, a complete sdist."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import numpy
import pytest

import flashgqa

ROOT = pathlib.Path(__file__).resolve().parent.parent
FRAMEWORKS = {"torch", "jax", "jaxlib", "cupy", "tensorflow", "ml_dtypes", "transformers", "matplotlib"}


def run_python(*arguments, cwd=ROOT, check=True, **environment):
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert not check or ran.returncode == 0, ran.stderr
    return ran


def test_import_brings_no_framework():
    found = run_python("-c", "import sys, flashgqa; print(*{name.split('.')[0] for name in sys.modules})").stdout
    assert "numpy" in found.split()
    assert not FRAMEWORKS & set(found.split())


def test_submodules_are_imported_when_they_are_named():
    code = """
import sys, flashgqa
assert not {"flashgqa.reference", "flashgqa.torch", "torch"} & set(sys.modules)
assert flashgqa.reference.attention and "flashgqa.torch" not in sys.modules
assert not hasattr(flashgqa, "attenshun") and "torch" not in dir(flashgqa)
try:
    flashgqa.attenshun
except AttributeError as error:
    print(error)
"""
    assert run_python("-c", code).stdout == "module 'flashgqa' has no attribute 'attenshun'\n"


def test_source_folder_says_that_it_is_not_built(tmp_path):
    package = tmp_path / "flashgqa"
    package.mkdir()
    for source in (ROOT / "flashgqa").glob("*.py"):
        shutil.copy(source, package)
    # -S: without the finder of an editable install, which would bring the module of another folder.
    path = os.pathsep.join([str(tmp_path), str(pathlib.Path(numpy.__file__).parent.parent)])
    ran = run_python("-S", "-c", "import flashgqa", cwd=tmp_path, check=False, PYTHONPATH=path)
    assert ran.returncode == 1 and "pip install -e ." in ran.stderr.splitlines()[-1]


def test_an_older_numpy_is_named():
    ran = run_python("-c", "import numpy; numpy.__version__ = '1.26.4'; import flashgqa", check=False)
    assert ran.returncode == 1 and "flashgqa needs NumPy 2.0 or newer, this is 1.26.4" in ran.stderr.splitlines()[-1]


@pytest.mark.timing
def test_import_is_quick():
    """Less than 60 ms over NumPy's own; the best of several, for the machine may have other work."""

    def microseconds():
        report = run_python("-X", "importtime", "-c", "import numpy, flashgqa").stderr
        return int(re.search(r"\|\s*(\d+) \|\s+flashgqa$", report, re.M).group(1))

    assert min(microseconds() for _ in range(5)) < 60_000


def test_version_has_one_source():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert flashgqa.__version__ == version
    try:
        assert importlib.metadata.version("flashgqa") == version
    except importlib.metadata.PackageNotFoundError:
        pass        # built in place, not installed


def test_module_is_abi3_and_exports_its_init_only():
    path = pathlib.Path(flashgqa._C.__file__)
    assert path.name == "_C.abi3.so"
    if shutil.which("nm"):
        listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        exported = {line.split()[-1] for line in listed.splitlines()} - {"_init", "_fini"}
        assert exported == {"PyInit__C"}


def test_no_run_time_path_of_the_build():
    """The module must not look for libraries in folders of the machine that built it, nor need any but libc's."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    needed = subprocess.run(["readelf", "-d", flashgqa._C.__file__], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[(.+?)\]", needed))
    allowed = {"libc", "libm", "libpthread", "libdl", "librt", "ld-linux-x86-64", "ld-linux-aarch64", "libasan", "libubsan"}
    assert libraries and {name.split(".")[0] for name in libraries} <= allowed
    assert "PATH)" not in needed      # RPATH, RUNPATH


def test_a_free_threaded_python_is_refused():
    pytest.importorskip("setuptools", minversion="77")
    code = """
import runpy, sys, sysconfig
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
    ran = run_python("-c", code, check=False)
    assert ran.returncode == 1 and "this Python is free-threaded" in ran.stderr and not ran.stdout


def test_cuda_asked_for_but_impossible_is_an_error(tmp_path):
    """An nvcc without the runtime's headers beside it; that of this machine, if any, comes later in the order."""
    pytest.importorskip("setuptools")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    ran = run_python("setup.py", "--version", check=False, FLASHGQA_CUDA="1", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert ran.returncode != 0
    assert "FLASHGQA_CUDA=1" in ran.stderr
    ran = run_python("setup.py", "--version", check=False, FLASHGQA_CUDA="yes")
    assert ran.returncode != 0 and "it must be 0, 1 or unset" in ran.stderr


def test_cuda_impossible_and_not_asked_for_is_none(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    ran = run_python("setup.py", "--version", FLASHGQA_CUDA="", CUDA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert flashgqa.__version__ in ran.stdout


@pytest.mark.parametrize("werror", ["0", "1"])
def test_what_ptxas_says_of_wgmma_is_an_error_where_warnings_are(tmp_path, werror):
    """An nvcc that makes nothing and says what ptxas does of products that it lets wait for each other."""
    pytest.importorskip("setuptools", minversion="77")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions' >&2\n")
    nvcc.chmod(0o755)
    code = """
import pathlib, runpy, setuptools, types
setuptools.setup = lambda **arguments: None
setup = runpy.run_path("setup.py")
setup["Build"].compile_one(types.SimpleNamespace(force=True), pathlib.Path("kernel.cu"), pathlib.Path(OBJECT), [])
""".replace("OBJECT", repr(str(tmp_path / "kernel.o")))
    ran = run_python("-c", code, check=False, FLASHGQA_WERROR=werror, FLASHGQA_CUDA="", CUDA_HOME=str(tmp_path))
    assert ran.returncode == int(werror) and "(C7510)" in ran.stderr, ran.stderr
    assert ("kernel.o: ptxas serialises wgmmas" in ran.stderr) == (werror == "1")


def test_sdist_is_complete(tmp_path):
    """Whatever the build and the tests read is in the archive."""
    pytest.importorskip("setuptools", minversion="77")
    run_python("setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", ".ci/run"}
    for folder in ("csrc", "flashgqa", "tests", "benchmarks"):
        wanted |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.suffix in {".py", ".pyi", ".typed", ".c", ".h", ".def", ".cu", ".cuh", ".md", ".json"}
        }
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
