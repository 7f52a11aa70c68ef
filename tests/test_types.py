"""What type checkers are told: stubs name the arguments there are, and calls have the types that callers rely on."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import flashgqa
from flashgqa import reference

FOLDER = pathlib.Path(flashgqa.__file__).parent

ARRAYS = """
import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type
import flashgqa

q: npt.NDArray[np.float32] = np.zeros((1, 2, 3, 4), np.float32)
out, lse = flashgqa.attention(q, q, q, causal=True, window=(1, None), return_lse=True)
assert_type(flashgqa.attention(q, q, q, bias=q, dropout_p=0.1, seed=1), npt.NDArray[np.float32])
assert_type(lse, npt.NDArray[np.float32])
assert_type(flashgqa.attention_backward(out, q, q, q, out, lse, check=True), flashgqa.Gradients)
assert_type(flashgqa.merge([out, out], [lse, lse]), tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]])
assert_type(flashgqa.attention_with_kvcache(q, q, q, q, q, cache_lens=1, rotary=(q, q)), npt.NDArray[np.float32])
assert_type(flashgqa.attention_weights(q, q, rows=range(2), kernel=None), npt.NDArray[np.float32])
print(flashgqa.explain(q, q, q)["kernel"], flashgqa.show_config(), flashgqa.KVCache(1, 2, 4, capacity=8).attention(q, q, q).shape)
flashgqa.attention(q, q, q, windw=1)  # Unexpected keyword argument "windw"
flashgqa.attention(q, q, q, layout="sbhd")  # No overload variant
"""
TENSORS = """
import torch
from typing_extensions import assert_type
import flashgqa
import flashgqa.torch as fg

q = torch.zeros(1, 2, 3, 4)
assert_type(flashgqa.attention(q, q, q), torch.Tensor)
assert_type(fg.attention(q, q, q, causal=True, check=True), torch.Tensor)
assert_type(fg.attention(q, q, q, return_lse=True), tuple[torch.Tensor, torch.Tensor])
assert_type(fg.merge([q], [q]), tuple[torch.Tensor, torch.Tensor])
print(fg.flash_attn_func(q, q, q).sum(), fg.FlashGQA(4, 2)(q).sum())
fg.attention(q, q, q, kernel="fwd")  # Unexpected keyword argument "kernel"
"""


@pytest.mark.parametrize("program", [ARRAYS, TENSORS], ids=["arrays", "tensors"])
def test_mypy_agrees(program, tmp_path):
    pytest.importorskip("mypy")
    if program is TENSORS:
        pytest.importorskip("torch")
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--allow-untyped-calls", "program.py"]
    environment = {**os.environ, "MYPYPATH": str(FOLDER.parent)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    errors = {}
    for line in ran.stdout.splitlines():
        if ": error: " in line:
            errors[int(line.split(":")[1])] = errors.get(int(line.split(":")[1]), "") + line
    wanted = {n: line.partition("  # ")[2] for n, line in enumerate(program.splitlines(), 1) if "  # " in line}
    assert set(errors) == set(wanted) and all(text in errors[n] for n, text in wanted.items()), ran.stdout + ran.stderr


def test_stub_of_torch_has_the_arguments_there_are():
    pytest.importorskip("torch")
    from flashgqa import _torch_attention
    from flashgqa import torch as fg

    nodes = [n for stub in ("api", "_torch_attention") for n in ast.parse((FOLDER / f"{stub}.pyi").read_text()).body]
    classes = {n.name: n for n in nodes if isinstance(n, ast.ClassDef)}      # of two named _Options the later
    options = {n.target.id for name in ("_Meaning", "_Computation", "_Options") for n in classes[name].body}
    assert options | {"q", "k", "v", "return_lse"} == set(inspect.signature(fg.attention).parameters)
    own = {name for name, f in vars(_torch_attention).items() if getattr(f, "__module__", "") == _torch_attention.__name__}
    assert own <= {getattr(n, "name", None) for n in nodes}


def test_what_returns_one_or_several_says_so():
    """An inferred union of both would make an error of every method that is called on the result."""
    pytest.importorskip("torch")
    from flashgqa import torch as fg
    from flashgqa.torch import fa3

    flags = {"return_attn_probs", "return_softmax_lse", "return_lse"}
    functions = [f for module in (fg, fa3, reference) for f in vars(module).values() if inspect.isfunction(f)]
    several = [f for f in functions if flags & set(inspect.signature(f).parameters)]
    assert len(several) > 10
    assert not [f for f in several if f is not fg.attention and "return" not in f.__annotations__]
