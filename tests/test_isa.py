"""Every instruction set: forced by name, forced by the environment, and refused by name."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import SMOKE, build
from checking import same_bits
from conftest import cpu_isas

import flashgqa

PASSES = ("fwd", "bwd", "rows", "keysum")
ROOT = os.path.dirname(os.path.dirname(flashgqa.__file__))


def test_every_row_has_every_pass_and_the_portable_one_is_always_there():
    names = [kernel["name"] for kernel in flashgqa.kernels() if kernel["device"] == "cpu" and kernel["available"]]
    assert sorted(names) == sorted(f"{which}_{isa}" for which in PASSES for isa in cpu_isas())
    assert cpu_isas()[-1] == "portable"
    config = flashgqa.show_config()
    assert config["isa"] == cpu_isas()[0] and config["isa_supported"] == cpu_isas()


def test_the_plan_takes_the_best_row_and_obeys_kernel(backend):
    if backend.device != "cpu":
        pytest.skip("rows of isa.def")
    call = build(SMOKE[0])
    assert flashgqa.explain(*call.inputs)["kernel"] == f"fwd_{cpu_isas()[0]}"
    assert flashgqa.explain(*call.inputs, kernel=f"fwd_{backend.isa}")["kernel"] == f"fwd_{backend.isa}"
    assert flashgqa.explain(*call.inputs, backward=True, kernel=f"bwd_{backend.isa}")["kernel"] == f"bwd_{backend.isa}"


def test_unknown_kernel_is_refused_with_the_names_there_are():
    call = build(SMOKE[0])
    with pytest.raises(ValueError, match=f"fwd_{cpu_isas()[0]}"):
        flashgqa.attention(*call.inputs, kernel="fwd_altivec")


RUN_SMOKE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import flashgqa
from cases import SMOKE, build
bits = []
for case in SMOKE:
    call = build(case)
    out, lse = flashgqa.attention(*call.inputs, **call.options, return_lse=True)
    got = flashgqa.attention_backward(call.dout, *call.inputs, out, lse, **call.options)
    bits.append([x.tobytes().hex() for x in (out, lse, *got[:3])])
print(json.dumps({"isa": flashgqa.show_config()["isa"], "kernels": flashgqa.kernels(), "bits": bits}))
"""


def child(isa, code):
    command = [sys.executable, "-c", code, ROOT, os.path.dirname(__file__)]
    return subprocess.run(command, env=os.environ | {"FLASHGQA_CPU_ISA": isa}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", cpu_isas())
def test_environment_forces_a_row(isa):
    """FLASHGQA_CPU_ISA gives the same bits as kernel=, and leaves only that row and lower ones."""
    done = child(isa, RUN_SMOKE)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["isa"] == isa
    better = cpu_isas()[: cpu_isas().index(isa)]
    for kernel, there in zip(flashgqa.kernels(), printed["kernels"], strict=True):
        ruled_out = kernel["name"].split("_", 1)[1] in better
        assert there == (kernel | {"available": False, "reason": "ruled out by FLASHGQA_CPU_ISA"} if ruled_out else kernel)
    for case, bits in zip(SMOKE, printed["bits"], strict=True):
        call = build(case)
        out, lse = flashgqa.attention(*call.inputs, **call.options, return_lse=True, kernel=f"fwd_{isa}")
        got = flashgqa.attention_backward(call.dout, *call.inputs, out, lse, **call.options, kernel=f"bwd_{isa}")
        assert bits == [x.tobytes().hex() for x in (out, lse, *got[:3])], case


@pytest.mark.parametrize("name", ["sse9", "AVX2 "])
def test_environment_with_an_unknown_row_is_refused_at_import(name):
    done = child(name, "import sys; sys.path.insert(0, sys.argv[1]); import flashgqa")
    assert done.returncode != 0
    assert f'FLASHGQA_CPU_ISA is "{name}"' in done.stderr and "portable" in done.stderr


@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_rows_agree_with_each_other(case):
    """Closer than the error rule asks: all rows compute the same sums, in different orders."""
    call = build(case)
    results = [flashgqa.attention(*call.inputs, **call.options, kernel=f"fwd_{isa}") for isa in cpu_isas()]
    epsilon = {"float64": 2e-15, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[case.dtype]
    for other in results[1:]:
        a, b = (x.astype(np.float64) for x in (results[0], other))
        np.testing.assert_allclose(a, b, rtol=0, atol=epsilon * max(1, np.abs(a).max()))
    assert same_bits(results[0], flashgqa.attention(*call.inputs, **call.options))
