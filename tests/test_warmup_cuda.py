"""flashgqa.warmup() leaves no kernel of the module to be loaded later, which takes time, and which not every driver may do while
a graph is recorded. Each test has a process of its own, in which nothing but warmup has run."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import backward_without_dbias

import flashgqa
from flashgqa import _C

pytestmark = pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="other cards do not run all of the module")
LOADED = 1  # CUfunctionLoadingState: CU_FUNCTION_LOADING_STATE_LOADED
# Decode's own merge, which a launch takes only where not all of its blocks are resident or streams are very many.
RARE = r"fgqa_fwd_sm90_\w+_decode\w*_combine"


def run(function):
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); from {here.stem} import {function.__name__} as f; f()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def module_kernels():
    """{CUfunction: its name} of all kernels of the module on the current device: those of each library that the CUDA runtime
    inside of the module has made of an object."""
    driver = ctypes.CDLL("libcuda.so.1")
    listed = subprocess.run(["nm", _C.__file__], capture_output=True, text=True, check=False).stdout
    places = [(name, int(place, 16)) for place, name in re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", listed, re.M)]
    mapped = re.findall(rf"^([0-9a-f]+)-.*{Path(_C.__file__).name}$", Path("/proc/self/maps").read_text(), re.M)
    base = min(int(begin, 16) for begin in mapped)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    get_kernel = prototype(base + dict(places)["cudaGetKernel"])
    kernel, library, module, count, name = (kind() for kind in (*3 * [ctypes.c_void_p], ctypes.c_uint, ctypes.c_char_p))
    libraries, found = set(), {}
    for _, place in places:  # of functions that are no kernels the runtime knows nothing
        if get_kernel(ctypes.byref(kernel), base + place) == 0:
            assert driver.cuKernelGetLibrary(ctypes.byref(library), kernel) == 0
            libraries.add(library.value)
    for known in libraries:
        assert driver.cuLibraryGetModule(ctypes.byref(module), ctypes.c_void_p(known)) == 0
        assert driver.cuModuleGetFunctionCount(ctypes.byref(count), module) == 0
        functions = (ctypes.c_void_p * count.value)()
        assert driver.cuModuleEnumerateFunctions(functions, count, module) == 0
        for function in functions:
            assert driver.cuFuncGetName(ctypes.byref(name), ctypes.c_void_p(function)) == 0
            found[function] = name.value.decode()
    return found


def left_to_load(kernels):
    """Names of those that the current device has not loaded."""
    driver, left = ctypes.CDLL("libcuda.so.1"), []
    for function, name in kernels.items():
        state = ctypes.c_int()
        assert driver.cuFuncIsLoaded(ctypes.byref(state), ctypes.c_void_p(function)) == 0, name
        left += [name] * (state.value != LOADED)
    return left


def print_left():
    torch.zeros(1, device="cuda")
    kernels = module_kernels()
    print(len(kernels), len(left_to_load(kernels)))
    flashgqa.warmup()
    print(*left_to_load(kernels), sep="\n")


def test_no_kernel_is_left_to_load():
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "cuKernelGetLibrary"):
        pytest.skip("needs a driver of CUDA 12.5")
    if " cudaGetKernel" not in subprocess.run(["nm", _C.__file__], capture_output=True, text=True, check=False).stdout:
        pytest.skip("the module has no symbols")
    first, *left = run(print_left).split("\n")
    kernels, before = map(int, first.split())
    if before == 0:
        pytest.skip("all kernels were loaded with the module (CUDA_MODULE_LOADING)")
    assert kernels >= before > len(_C.kernels()) // 2
    names = subprocess.run(["c++filt"], input="\n".join(left), capture_output=True, text=True, check=True).stdout.split("\n")
    assert not [name for name in names if name and not re.match(RARE, name)]


def record_graphs():
    """Each call is recorded, and gives what it gives outside of a graph."""
    flashgqa.warmup()
    for dtype in (torch.bfloat16, torch.float16):
        for call in calls(dtype):
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                recorded = call()
            graph.replay()
            for got, wanted in zip(recorded, call(), strict=True):
                assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def calls(dtype):
    """What has kernels of its own and comes at no plain call: heads that share keys, few keys, keys of a mask apart, a bias whose
    gradient nobody asks for."""

    def random(*extents):
        return torch.randn(*extents, device="cuda").to(dtype)

    q, k = random(3, 8, 1000, 256), random(3, 2, 2304, 256)
    yield lambda: flashgqa.attention(q, k, k, return_lse=True)
    for d in (64, 96, 128):
        for keys in (20, 64, 70, 90, 100, 128):
            few, few_keys = random(100, 4, keys, d), random(100, 2, keys, d)
            yield lambda few=few, few_keys=few_keys: flashgqa.attention(few, few_keys, few_keys, return_lse=True)
    for d in (64, 128):
        x, y = random(2, 4, 1000, d), random(2, 2, 1000, d)
        apart = torch.rand(1000, 2000, device="cuda")[:, ::2] < 0.9
        bias, slopes = random(1000, 1000), torch.linspace(0.1, 1, 4, device="cuda")
        for options in ({}, {"dropout_p": 0.2, "seed": 3}):
            masked = {"mask": apart, "return_lse": True, **options}
            yield lambda x=x, y=y, masked=masked: flashgqa.attention(x, y, y, **masked)
            for more in ({"softcap": 5.0}, {"alibi_slopes": slopes}):
                given = {"bias": bias, **more, **options}
                arrays = x, x, y, y, random(2, 4, 1000, d), torch.full((2, 4, 1000), 7.0, device="cuda")  # of no call
                yield lambda arrays=arrays, given=given: backward_without_dbias(*arrays, **given)[:3]


def test_first_calls_are_recorded():
    run(record_graphs)
