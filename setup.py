"""Builds flashgqa._C: one abi3 extension of plain C and, where nvcc is found, of CUDA kernels.

csrc/cpu/isa.def and csrc/cuda/kernels.def are read here and by the C code: the files in PER_ISA are compiled once per row of
this machine's architecture and per precision, sm<arch>/<pass>.cu once per kernel, every other file once. Environment:
    FLASHGQA_WERROR=1     warnings are errors, and so is what ptxas says of wgmmas that do not run as they are written
    FLASHGQA_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer
    FLASHGQA_AMX_EMULATED=1   the row "amx" on any processor with AVX-512, for tests: tests/c/amx_emulated.h
    FLASHGQA_CUDA         0: without the CUDA kernels, which take most of the time; 1: an error if they cannot be built
    FLASHGQA_CUDA_ARCH    machine code to embed, "80,90,ptx" by default: cards from Ampere on; those without code of their own
                          compile the PTX once, into the driver's cache. The kernels of csrc/cuda/sm90 run on Hopper alone: they
                          are compiled for sm_90a if 90 is named, and otherwise refuse to be chosen
"""

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PER_ISA = ("fwd.c", "bwd.c", "weights.c")
PER_BF16_ISA = ("fwd.c", "bwd.c")       # of an FGQA_ISA_BF16 row
SOURCES = {("fwd", "decode"): "decode", ("fwd", "decodef8"): "decode", ("fwd", "decodewide"): "decode_wide",
           ("fwd", "decodewidef8"): "decode_wide", ("bwd", "short"): "bwd_short"}      # of other rows: the pass
LIMITED_API = "0x030A0000"
SANITIZE, WERROR = (os.environ.get(f"FLASHGQA_{name}") == "1" for name in ("SANITIZE", "WERROR"))
CUDA_ARCH = os.environ.get("FLASHGQA_CUDA_ARCH", "80,90,ptx")
OLDEST_NVCC = (12, 0)

CFLAGS = [
    "-std=gnu11", "-fPIC", "-pthread", "-fvisibility=hidden",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-psabi",
]
if SANITIZE:
    CFLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
else:
    CFLAGS += ["-O3", "-g0"]
if os.environ.get("FLASHGQA_AMX_EMULATED") == "1":
    CFLAGS.append(f'-DFGQA_AMX_EMULATED="{ROOT / "tests" / "c" / "amx_emulated.h"}"')
if WERROR:
    CFLAGS.append("-Werror")
# Machine code is compressed, to a quarter, in a way that all drivers of this nvcc's runtime know: unpacked where it is loaded.
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-Xptxas=-warn-spills", "-Xfatbin=-compress-all", "-diag-suppress=177",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti",
]
# Of ptxas: wgmmas one after the other, since registers are lacking or something else touches what is in flight (C7510 to C7519),
# or setmaxnreg ignored (C7508). A kernel that has one is right and slow.
SERIALISED = re.compile(r"\(C75\d\d\)")
LDFLAGS = ["-pthread"] + (["-fsanitize=address,undefined"] if SANITIZE else [])


def isa_rows():
    """(name, flags, whether for bfloat16 alone) of every row of isa.def that this machine's compiler can build."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    rows = re.findall(r'^FGQA_ISA(_BF16)?\((\w+),\s*(\w+),\s*"([^"]*)"', (CSRC / "cpu" / "isa.def").read_text(), re.M)
    return [(name, flags.split(), bool(bf16)) for bf16, name, on, flags in rows if on in (machine, "any")]


@functools.cache
def find_nvcc():
    """nvcc's path, or None: CUDA_HOME, CUDA_PATH, PATH, the usual folder, NVIDIA's packages from pip."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    site = {Path(sysconfig.get_path("purelib")), *(Path(p) for p in sys.path if p.endswith("site-packages"))}
    usual = [Path("/usr/local/cuda"), *(home for p in sorted(site) for home in sorted(p.glob("nvidia/*")))]
    on_path = shutil.which("nvcc")
    candidates = [*(home / "bin" / "nvcc" for home in homes), *([Path(on_path)] if on_path else []),
                  *(home / "bin" / "nvcc" for home in usual)]
    return next((path for path in candidates if path.is_file()), None)


def nvcc_version(nvcc):
    """(12, 8), or (0, 0) if it does not say."""
    if not os.access(nvcc, os.X_OK):
        return 0, 0
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(map(int, (re.search(r"release (\d+)\.(\d+)", printed) or re.match("(0)(0)", "00")).groups()))


@functools.cache
def cuda_libraries(nvcc):
    """(folder of cuda_runtime_api.h, folder of libcudart_static.a), or None."""
    homes = [nvcc.parent.parent, nvcc.resolve().parent.parent]
    if shutil.which(nvcc):      # a script in PATH that calls the one in another folder says where on a dry run
        printed = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
                                 capture_output=True, text=True, check=False)
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", printed.stderr + printed.stdout, re.M)]
    for home in homes:
        includes = (home / "include", *home.glob("targets/*/include"))
        libraries = (home / "lib64", home / "lib", *home.glob("targets/*/lib"))
        include = next((p for p in includes if (p / "cuda_runtime_api.h").is_file()), None)
        library = next((p for p in libraries if (p / "libcudart_static.a").is_file()), None)
        if include and library:
            return include, library
    return None


@functools.cache
def cuda_reason():
    """Why this build has no CUDA kernels, or None: baked into the module, because pip hides what a successful build prints."""
    if os.environ.get("FLASHGQA_CUDA") == "0":
        return "FLASHGQA_CUDA was 0 at build time"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found at build time: looked in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, pip's nvidia packages"
    if nvcc_version(nvcc) < OLDEST_NVCC:
        return f"nvcc of CUDA {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer is needed at build time, {nvcc} is older"
    if cuda_libraries(nvcc) is None:
        return "nvcc was found at build time, but not cuda_runtime_api.h and libcudart_static.a beside it"
    return None


def kernel_rows():
    """The rows of kernels.def, each as {column: text}."""
    columns = ("pass", "arch", "dtype", "d", "dv", "block_q", "block_k", "stages", "warps", "variant")
    rows = re.findall(r"^FGQA_KERNEL\((.+)\)", (CSRC / "cuda" / "kernels.def").read_text(), re.M)
    return [dict(zip(columns, (cell.strip() for cell in row.split(",")), strict=True)) for row in rows]


def nvcc_targets(arch="80", kernels=""):
    """-gencode of every target: a card's code from its own virtual architecture, to use its instructions; PTX of the lowest.
    Kernels for Hopper alone, arch 90, have one target or, if it is not wanted, no code. The general forward rows use nothing that
    cards after Ampere brought: their PTX is made once for all, which is a fifth of the time they take."""
    if arch == "90":
        return ["-gencode=arch=compute_90a,code=sm_90a"] + ([] if "90" in re.findall(r"\d+", CUDA_ARCH) else ["-DFGQA_NO_CODE"])
    code = [(name, f"sm_{name}") if name.isdigit() else ("80", "compute_80") for name in re.findall(r"\d+|ptx", CUDA_ARCH)]
    if kernels == "fwd":
        code = [(str(min(80, int(virtual))), real) for virtual, real in code]
    return [f"-gencode=arch=compute_{virtual},code={real}" for virtual, real in code]


def version():
    return re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)


class Build(build_ext):
    """One compiler call per object, one a processor at a time, skipped while the object is newer than all that it includes."""

    def build_extension(self, ext):
        reason = cuda_reason()
        # An editable install builds in a folder that is deleted; its objects stay in the checkout, for the next one.
        folder = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        objects = folder / ("sanitize" if SANITIZE else "release")
        jobs = [*self.cuda_jobs(objects), *self.jobs(objects)] if reason is None else list(self.jobs(objects))
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(lambda job: self.compile_one(*job), jobs))
        ext.extra_objects = [str(obj) for _, obj, _ in jobs]
        if reason is None:
            # nvcc's host code needs the C++ runtime, which goes into the module together with the CUDA one.
            self.compiler.linker_so = [os.environ.get("CXX", "g++"), *self.compiler.linker_so[1:]]
            ext.library_dirs = [str(cuda_libraries(find_nvcc())[1])]
            ext.libraries = ["cudart_static", "rt", "dl", *ext.libraries]
            ext.extra_link_args = [*LDFLAGS, "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,--as-needed"]
        # A Python with a run-time path of its own hands it to every extension; this one needs nothing but libc.
        self.compiler.linker_so = [arg for arg in self.compiler.linker_so if not arg.startswith("-Wl,-rpath")]
        self.force = True       # the link: its output may stand from a build with other objects, as of FLASHGQA_SANITIZE
        super().build_extension(ext)

    def jobs(self, objects):
        include = [f"-I{p}" for p in self.compiler.include_dirs + self.include_dirs]
        python = include + [f"-I{numpy.get_include()}", f"-DPy_LIMITED_API={LIMITED_API}",
                            "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION", "-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION",
                            f'-DFGQA_VERSION="{version()}"']
        for source in sorted(path for folder in ("core", "cpu", "xla", "python") for path in (CSRC / folder).glob("*.c")):
            stem = f"{source.parent.name}_{source.stem}"
            if source.parent.name == "cpu" and source.name in PER_ISA:
                for name, flags, bf16 in isa_rows():
                    if bf16 and source.name not in PER_BF16_ISA:
                        continue
                    for f64 in (0,) if bf16 else (0, 1):
                        yield source, objects / f"{stem}_{name}_{'f64' if f64 else 'f32'}.o", \
                            [*flags, f"-DFGQA_ISA={name}", f"-DFGQA_REAL_F64={f64}"]
            else:
                yield source, objects / f"{stem}.o", python if source.parent.name == "python" else []
        if cuda_reason() is not None:
            absent = f'-DFGQA_CUDA_REASON="{cuda_reason()}"'
            yield CSRC / "cuda" / "absent.c", objects / "cuda_absent.o", [absent]

    def cuda_jobs(self, objects):
        """Kernels first, those of a row with most of them before the others, then the largest tiles: they take longest."""
        folder, include = CSRC / "cuda", [f"-I{cuda_libraries(find_nvcc())[0]}"]

        def place(row):
            has_most = row["arch"] == "90" and row["d"] in ("64", "128") and row["variant"] in ("plain", "dropout")
            return not has_most, row["pass"] != "bwd", -int(row["d"])

        for row in sorted(kernel_rows(), key=place):
            name = "{pass}_sm{arch}_{dtype}_d{d}_dv{dv}_{variant}".format(**row)
            source = SOURCES.get((row["pass"], row["variant"]), row["pass"])
            yield folder / f"sm{row['arch']}" / f"{source}.cu", objects / f"cuda_{name}.o", \
                nvcc_targets(row["arch"], row["pass"]) + [f"-DFGQA_{column.upper()}={cell}" for column, cell in row.items()]
        for source in sorted((folder / "any").glob("*.cu")):
            yield source, objects / f"cuda_{source.stem}.o", nvcc_targets()
        for source in sorted(path for path in folder.glob("*.c") if path.name != "absent.c"):
            yield source, objects / f"cuda_{source.stem}.o", include

    def compile_one(self, source, obj, flags):
        if source.suffix == ".cu":
            command = [str(find_nvcc()), *NVCC_FLAGS, *flags, "-MMD", "-MF", str(obj.with_suffix(".d"))]
        else:
            command = [*shlex.split(os.environ.get("CC", "cc")), *CFLAGS, *flags, "-MMD"]
        command += ["-c", str(source), "-o", str(obj)]
        stamp, record = obj.with_suffix(".d"), obj.with_suffix(".cmd")
        if obj.exists() and stamp.exists() and record.exists() and record.read_text() == repr(command) and not self.force:
            # nvcc writes "object : source", cc "object: source".
            needs = stamp.read_text().replace("\\\n", " ").partition(":")[2].split()
            if all(Path(p).exists() and Path(p).stat().st_mtime <= obj.stat().st_mtime for p in needs):
                return
        obj.parent.mkdir(parents=True, exist_ok=True)
        print("  ", obj.name, flush=True)
        ran = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(ran.stderr)
        if ran.returncode != 0:
            hint = "; FLASHGQA_CUDA=0 builds without the CUDA kernels" if source.suffix == ".cu" else ""
            sys.exit(f"{obj.name} could not be compiled{hint}")
        if WERROR and SERIALISED.search(ran.stderr):
            sys.exit(f"{obj.name}: ptxas serialises wgmmas or ignores setmaxnreg, see above")
        record.write_text(repr(command))


def main():
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit("this Python is free-threaded, and flashgqa relies on the interpreter's lock: use a Python built with it")
    wanted, reason = os.environ.get("FLASHGQA_CUDA", ""), cuda_reason()
    if wanted not in ("", "0", "1"):
        sys.exit(f"FLASHGQA_CUDA is {wanted!r}: it must be 0, 1 or unset")
    if wanted == "1" and reason is not None:
        sys.exit(f"FLASHGQA_CUDA=1: {reason}")
    setup(
        ext_modules=[Extension("flashgqa._C", sources=[], py_limited_api=True, extra_link_args=LDFLAGS, libraries=["m", "dl"])],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
