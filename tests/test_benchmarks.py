"""The benchmarks' own arithmetic and options; what they measure is checked where it is measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashgqa

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)


def run(code):
    """Standard output of code that imports the benchmarks' modules, whose names are not unique."""
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("gpu --threads 2", "gpu has no --threads"),
        ("kvcache --pass forward", "kvcache has no --pass"),
        ("cpu --junit x.xml", "cpu has no --junit"),
        ("gpu --dtype float32", "--dtype of gpu: choose from bfloat16, float16"),
        ("gpu --pass decode", "--pass of gpu: choose from forward, backward"),
    ],
)
def test_options_that_a_device_does_not_read_are_refused(arguments, message):
    ran = python("bench.py", *arguments.split())
    assert ran.returncode == 2 and message in ran.stderr


def test_the_table_of_peers_has_every_training_row():
    code = """if True:
        import json, peers, shapes
        rows = [(which, *peers.best_peer(row, which, 100.0)) for row in shapes.GPU_TRAIN for which in ("forward", "backward")]
        print(json.dumps(rows))
    """
    rows = json.loads(run(code))
    assert len(rows) == 72 and all(rate >= 100.0 for _, _, rate in rows)      # the best peer is at least cuDNN
    assert rows[0][1] == "FA3" and rows[0][2] == pytest.approx(100 * 622 / 598)
    assert rows[1][1] == "FA4" and rows[1][2] == pytest.approx(100 * 496 / 446)


def test_operations_are_counted_as_the_plan_counts_them():
    """Of what GPU_MORE has: windows, parts of a prompt, packed sequences; to the diagonal's half."""
    rows = [
        {"queries": 0, "causal": True, "window": 64},
        {"queries": 0, "causal": True, "window": 0},
        {"queries": 0, "causal": False, "window": 0},
        {"queries": 128, "causal": True, "window": 0},
        {"queries": 0, "causal": True, "window": 0, "lengths": [300, 17, 707]},
    ]
    code = f"""if True:
        import json, counting, shapes
        rows = [shapes.GpuRow("", "float32", 2, 4, 2, 1024, 16, **row) for row in {rows!r}]
        print(json.dumps([(counting.flops(row, "forward"), counting.flops(row, "backward")) for row in rows]))
    """
    for row, (forward, backward) in zip(rows, json.loads(run(code)), strict=True):
        assert backward == 2.5 * forward
        options = {"causal": row["causal"], "window": (row["window"] - 1, 0) if row["window"] else None}
        if "lengths" in row:
            q, k = (np.zeros((1024, h, 16), np.float32) for h in (4, 2))
            options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), np.cumsum([0, *row["lengths"]], dtype=np.int32))
        else:
            q, k = np.zeros((2, 4, row["queries"] or 1024, 16), np.float32), np.zeros((2, 2, 1024, 16), np.float32)
        assert forward == pytest.approx(flashgqa.explain(q, k, k, **options)["flops"], rel=0.02)


def test_packed_lengths_are_those_of_the_row():
    lengths = json.loads(run("import json, shapes; print(json.dumps(shapes._PACKED))"))
    assert sum(lengths) == 65536 and min(lengths) >= 16 and 2048 < max(lengths) <= 4096


def test_the_sanitizers_have_a_call_for_every_row():
    """The calls of benchmarks/sanitize.py themselves, on the CPU: each variant and head dim of kernels.def once."""
    code = """if True:
        import re, sanitize
        table = (sanitize.__file__.rpartition("benchmarks")[0] + "csrc/cuda/kernels.def")
        rows = re.findall(r"^FGQA_KERNEL\\((.*)\\)", open(table).read(), re.M)
        names = {}
        for row in rows:
            which, arch, dtype, d, dv, *_, variant = [cell.strip() for cell in row.split(",")]
            names[which, variant, d] = f"{which}_sm{arch}_{dtype}_d{d}_dv{dv}_{variant}"
        for name in names.values():
            assert sanitize.are_finite(sanitize.run_row(name, {}, lambda x: x)), name
        for name in ("rows_any", "keysum_any"):
            assert sanitize.are_finite(sanitize.run_other(name, {}, lambda x: x)), name
        print(sorted(names))
    """
    assert "('fwd', 'cache', '128')" in run(code)
