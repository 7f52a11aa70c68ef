"""The benchmarks' own arithmetic and options; what they measure is checked where it is measured."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ON_A_GPU

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
        ("gpu --section all", "--section of gpu: choose from training, decode, options, short"),
        ("cpu --section short", "cpu has no --section"),
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


def test_equal_lengths_have_the_operations_of_packed_ones():
    code = """if True:
        import json, counting, shapes
        of = lambda kind: [counting.flops(row, "forward") for row in shapes.GPU_MORE if row.kind == kind]
        print(json.dumps([of("packed"), of("even")]))
    """
    packed, even = json.loads(run(code))
    assert len(even) == 4 and even == pytest.approx(packed, rel=0.02)


def test_short_rows_have_the_tokens_that_the_table_says():
    code = """if True:
        import json, report_options, shapes
        rows = [(report_options.tokens(row._asdict()), row.b * row.s) for row in shapes.GPU_SHORT if row.kind == "short"]
        some = [row for row in shapes.GPU_SHORT if row.lengths]
        packed = [(row.kind, min(row.lengths[:-1]), max(row.lengths), sum(row.lengths)) for row in some]
        print(json.dumps([rows, packed]))
    """
    rows, packed = json.loads(run(code))
    assert {said for said, _ in rows} == {4096, 65536} and all(0.95 * said < real <= said for said, real in rows)
    for kind, least, most, total in packed:
        _, low, _, high = kind.split()
        assert int(low) <= least and most <= int(high) and total == 65536


def test_rows_of_options_ask_the_same_of_all():
    """On the CPU, small and in float32: the options of a row, those that torch gets, and the row's first group alone."""
    pytest.importorskip("torch")
    code = """if True:
        import gpu_options, peers, shapes, torch
        from torch.nn.attention import SDPBackend
        compared = set()
        for row in shapes.GPU_OPTIONS:
            row = row._replace(b=2, hq=4, hk=2, d=8, s=24 if row.s == 4096 else 21, dtype="float32")
            inputs = q, k, v, dout = peers.tensors(row, "cpu")
            options, theirs = gpu_options.arguments(row, "cpu")
            own, alone = gpu_options.own_calls(row, *inputs, options), gpu_options.first_group(row, *inputs, options)
            for n in range(2):
                got, want = ([call] if n == 0 else call[:3] for call in (own[n](), alone[n]()))
                assert peers.difference([x[:1, :y.shape[1]] for x, y in zip(got, want, strict=True)], want) < 1e-4, row
            assert len(own[1]()) == 3 + ("its gradient" in row.what)
            if theirs is None or theirs["dropout_p"] > 0:
                continue
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            out, grads = (call() for call in peers.Sdpa(SDPBackend.MATH, **theirs).calls(row, q, k, v, dout))
            grads = [grads[0], *(x.unflatten(1, (2, 2)).sum(2) for x in grads[1:3]), *grads[3:]]
            assert peers.difference([own[0](), *own[1]()], [out, *grads]) < 1e-4, row
            compared.add(row.name)
        print(len(compared))
    """
    assert int(run(code)) >= 9


RECORD = {"sources_sha256": "a" * 64, "device": "one card", "date": "2026-11-27", "torch": "2.11.0"}


def sections(record):
    """What report.py makes of the options and short sequences of a record, for README and for the page of everything."""
    code = f"""if True:
        import json, report_options as of
        record = {record!r}
        print(json.dumps([of.options_section(record), of.options_section(record, True), of.short_section(record)]))
    """
    return ["\n".join(lines) for lines in json.loads(run(code))]


def option(what, which, d, s=4096, **rates):
    row = {"what": what, "hq": 32, "hk": 8, "d": d, "s": s, "b": 4, "dtype": "bfloat16", "causal": False}
    return row | ({"which": which} if which else {}) | rates


def test_a_record_without_options_and_short_sequences_says_so():
    for text in sections(RECORD):
        assert "not measured by the run of this record" in text and "|" not in text


def test_tables_of_options_are_those_of_the_record():
    rows = [
        option("none", "forward", 64, flashgqa_tflops=600.0), option("none", "backward", 64, flashgqa_tflops=500.0),
        option("bias", "forward", 64, flashgqa_tflops=300.0, cudnn_tflops=200.0, fa2_tflops=250.0),
        option("bias", "backward", 64, flashgqa_tflops=350.0, efficient_tflops=100.0),
        option("ALiBi + bias", "forward", 64, flashgqa_tflops=150.0), option("ALiBi + bias", None, 64, error="no memory"),
    ]
    short, full, _ = sections(RECORD | {"options": RECORD | {"rows": rows}})
    assert "| options | length | forward d 64 | backward d 64 |" in short and "run of its own" not in short
    assert "| bias | 4096 | 0.50, FA2 1.20 | 0.70, efficient 3.50 |" in short and "ALiBi + bias" not in short
    assert "| none | 4096 | 600 | 500 |" in full and "| ALiBi + bias | 4096 | 150, 0.25 | failed |" in full


def test_tables_of_short_sequences_are_those_of_the_record():
    row = {"hq": 12, "hk": 12, "d": 64, "causal": False, "flashgqa_us": 20.0, "fa2_us": 50.0}
    rows = [
        row | {"kind": "short", "b": 851, "s": 77, "cudnn_us": 10.0}, row | {"kind": "short", "b": 53, "s": 77, "cudnn_us": 30.0},
        row | {"kind": "packed 8 to 128", "b": 1500, "s": 127}, {"kind": "short", "b": 4096, "s": 16, "hq": 12, "hk": 12, "d": 64,
                                                                 "causal": False, "error": "not so"},
    ]
    *_, text = sections(RECORD | {"short": RECORD | {"rows": rows, "sources_sha256": "b" * 64, "device": "another"}})
    assert "a run of its own, of other kernels: another, 2026-11-27" in " ".join(text.split())
    assert text.rstrip().endswith("""\
| length | 65,536 tokens, 12/12 d 64 | 4,096 tokens, 12/12 d 64 |
|---|---|---|
| 16 | failed |  |
| 77 | 20: 0.50, 2.50 | 20: 1.50, 2.50 |
| packed 8 to 128 | 20: -, 2.50 |  |""")


def test_sections_of_their_own_are_put_into_the_record(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rows": [1], "short": {"rows": ["old"]}}))
    code = f"""if True:
        import bench, gpu, gpu_options
        gpu.contestants, gpu.measured_here = dict, lambda: {{"device": "one card", "torch": "2.11.0"}}
        gpu_options.run = lambda options, rounds: ["new"]
        gpu.run(bench.read_options(["gpu", "--section", "options", "--out", {str(path)!r}]))
    """
    run(code)
    here = {"device": "one card", "torch": "2.11.0"}
    assert json.loads(path.read_text()) == {"rows": [1], "short": {"rows": ["old"]}, "options": here | {"rows": ["new"]}}


def test_evidence_asks_all_sections_for_these_kernels():
    code = """if True:
        import evidence
        of = lambda now, *rows: {"rows": list(rows), "sources_sha256": now}
        whole = {"decode": [], "options": of("now"), "short": of("now")}
        records = [whole, {"decode": []}, whole | {"short": of("then")}, whole | {"options": of("now", {"error": "no"})}]
        print([evidence.sections(record, "now") for record in records])
    """
    *_, last = run(code).splitlines()
    assert last == "[0, 1, 1, 1]"


def test_the_whole_run_has_every_file_of_tests_in_one_group():
    """Those that need a GPU in one that has no others, so that all of their tests run."""
    code = "import whole_run as w; print([(n, [f.name for f in files]) for g in w.groups_with_files() for n, _, files, _ in g])"
    groups = dict(ast.literal_eval(run(code)))
    files = [name for group in groups.values() for name in group]
    assert len(files) == len(set(files)) and set(files) == {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert all(groups.values()) and not set(groups["general"]) & set(ON_A_GPU)


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
