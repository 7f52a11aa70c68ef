"""README's section on speed, results/README.md with every row, and their figures, made from the JSON files in results; nothing
in them is typed by hand.

    python benchmarks/report.py             writes both, and results/{cpu,gpu}.png if matplotlib is installed
    python benchmarks/report.py --check     fails if they do not say what the JSON says
"""

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import figures
import peers
from figures import heads
from report_options import filled, options_section, short_section

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- speed: made by benchmarks/report.py -->\n", "<!-- end of speed -->"


def ratio(record):
    return f"**{record['ratio']:.2f}**" if record["ratio"] >= 1 else f"{record['ratio']:.2f}"


def training_table(rows):
    """One line a shape: both passes side by side."""
    passes = {}
    for record in rows:
        if not record["queries"]:
            key = record["dtype"], heads(record), record["d"], record["s"], "yes" if record["causal"] else "no"
            passes.setdefault(key, {})[record["which"]] = record
    lines = ["| dtype | heads q/kv | d | length | causal | forward ms | GFLOP/s | ratio | backward ms | GFLOP/s | ratio |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for key, both in passes.items():
        cells = [str(x) for x in key]
        for which in ("forward", "backward"):
            record = both.get(which)
            cells += [f"{record['ms']:.2f}", f"{record['gflops']:.0f}", ratio(record)] if record else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def decode_table(rows):
    lines = ["| dtype | batch | cached keys | heads q/kv | ms | GB/s | ratio |", "|---|---|---|---|---|---|---|"]
    for record in rows:
        if record["queries"]:
            figures = f"{record['ms']:.2f}", f"{record['gbs']:.1f}", ratio(record)
            cells = [record["dtype"], record["b"], record["s"], heads(record), *figures]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def cpu_about(result):
    machine, limit, rows = result["machine"], result["ceilings"], result["rows"]
    commit = f"commit {machine['commit']}, " if machine.get("commit") else ""
    wins = sum(record["ratio"] >= 1 for record in rows)
    fma = f"float32 multiply-adds in registers reached {limit['fma_gflops']:.0f} GFLOP/s, " if limit.get("fma_gflops") else ""
    return filled(f"""\
{machine["processor"]}, {machine["threads"]} threads: {machine["flashgqa"]} ({commit}{machine["isa"]}) and {machine["torch"]}
(`scaled_dot_product_attention`) on the same arrays in alternating calls, {machine["date"]}. ratio = PyTorch's time / ours, the
median over the pairs: above 1 we are faster, in {wins} of {len(rows)} rows. In the same run {fma}a float32 matrix product reached
{limit["matmul_gflops"]:.0f} GFLOP/s and reading memory {limit["read_gbs"]:.0f} GB/s.
""") + "\n"


def cpu_tables(rows):
    decode = "Decode, one query over a cache (d 128); GB/s count each key and value once:"
    return "\n".join(["Forward and backward:", "", *training_table(rows), "", decode, "", *decode_table(rows)]) + "\n"


def length_section(result):
    """One sentence on short and odd lengths; "" if they have not been measured."""
    if result is None:
        return ""
    machine, rows = result["machine"], result["rows"]
    spans = []
    for library in dict.fromkeys(row["library"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["library"] == library]
        spans.append(f"{library} {min(ratios):.2f} to {max(ratios):.2f}")
    lengths = sorted({row["length"] for row in rows})
    lowest = min(rows, key=lambda row: row["ratio"])
    return f"""
Against two matrix products and a softmax written by hand (float32, 8 heads, d 128, {len(lengths)} lengths from {lengths[0]} to
{lengths[-1]:,}, three primes among them; {machine["date"]}, commit {machine["commit"]}), ratio: {"; ".join(spans)}.
Lowest: length {lowest["length"]:,}, {lowest["library"]} ({lowest["us"]:.0f} us a call).
"""


def cache_section(result):
    """Decode through attention_with_kvcache, one line a shape, kinds of cache side by side."""
    machine, limit, shapes = result["machine"], result["ceilings"], {}
    for record in result["rows"]:
        shapes.setdefault((record["dtype"], record["b"], record["s"], heads(record)), {})[record["cache"]] = record
    kinds = list(dict.fromkeys(record["cache"] for record in result["rows"]))
    lines = [f"""
Decode through `attention_with_kvcache`, appending included: ms, share of the {limit["read_gbs"]:.0f} GB/s at which the run read
memory, ratio to PyTorch over contiguous tensors of q's dtype ({machine["date"]}, commit {machine["commit"]}):
""",
             f"| dtype | batch | cached keys | heads q/kv | {' | '.join(kinds)} |", "|---" * (4 + len(kinds)) + "|"]
    for key, row in shapes.items():
        cells = [f"{x['ms']:.2f} ms, {100 * x['share']:.0f}%, {ratio(x)}" if (x := row.get(kind)) else "" for kind in kinds]
        lines.append(f"| {' | '.join(map(str, (*key, *cells)))} |")
    return "\n".join(lines) + "\n"


def gpu_more_table(rows):
    """The rows with one thing different; what is missing in a run was not measured."""
    about = {"sustained": "ten launches back to back", "any order": "`deterministic=False`", "float16": "float16",
             "packed": "packed, 65,536 tokens, 16 to 4,096 each", "even": "{b} of equal length, as many FLOPs",
             "window": "window of 1,024 keys", "prefill": "128 queries, b 4", "few tiles": "128 queries, b 1",
             "cached": "512 queries, b 4, a KV cache in pages of {page}"}
    lines = ["| what | pass | heads q/kv | d | length | causal | TFLOP/s | to FA2 | to cuDNN | best | to ours in order |",
             "|---" * 11 + "|"]
    for row in rows:
        ours = row["flashgqa_tflops"]
        others = [row.get("fa2_tflops"), row.get("cudnn_tflops"), None, row.get("ordered_tflops")]
        if row["kind"] == "any order":      # of shapes that the table of peers has
            others[2] = peers.best_peer(SimpleNamespace(**row), row["which"], row["cudnn_tflops"])[1]
        ratios = [f"{ours / rate:.2f}" if rate else "" for rate in others]
        causal = "yes" if row["causal"] else "no"
        what = about[row["kind"]].format(page=row.get("page"), b=row["b"])
        cells = [what, row["which"], heads(row), row["d"], row["s"], causal, f"{ours:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells + ratios))} |")
    return lines


def gpu_decode_table(rows):
    columns = ("batch", "cached keys", "heads q/kv", "page", "us", "TB/s", "best peer", "ratio", "to cuDNN", "to FA2", "read us",
               "over it, apart", "lengths given", "invariant", "4 queries", "float8 cache, lengths given")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "error" in row:
            cells = [row["b"], row["s"], heads(row), row["page"] or "", "failed", *[""] * (len(columns) - 5)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            continue
        mine = row["flashgqa_us"]
        ratios = [f"{row[f'{name}_us'] / mine:.2f}" for name in ("best", "cudnn", "fa2")]
        rate = 4 * row["b"] * row["hk"] * row["s"] * 128 / mine / 1e6
        others = [f"{row[f'{name}_us']:.1f}" if f"{name}_us" in row else "" for name in ("invariant", "few", "float8")]
        apart = f"{row['apart_us'] - row['read_apart_us']:.1f}" if "apart_us" in row else ""
        cells = [row["b"], row["s"], heads(row), row["page"] or "", f"{mine:.1f}", f"{rate:.2f}", row["best_peer"], *ratios,
                 f"{row['read_us']:.1f}", apart, f"{row['lengths_us']:.1f}", *others]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def gpu_about(record):
    tests, limit = record["tests"], record["ceilings"]
    return f"""\
{record["device"]}, bfloat16, 16,384 tokens a row, {record["date"]}, torch {record["torch"]}: TFLOP/s of one launch behind queued
work, and its ratio to PyTorch's FlashAttention-2 and cuDNN backends in the same run, where a matrix product reached
{limit["matmul_tflops"]:.0f} TFLOP/s. best: to the fastest of these two, FlashAttention-3 and flash-attn-4, at the ratio to cuDNN
that it had on an H200 (`benchmarks/peers.py`). GPU tests of that build: {tests["passed"]} passed, {tests["failed"]} failed, \
{tests["skipped"]} skipped.
"""


def gpu_summary_table(rows):
    """Geometric mean, least and most of the ratios of all training rows, by pass and head dim."""
    lines = ["| pass | d | rows | to FA2 | to cuDNN | best |", "|---|---|---|---|---|---|"]
    for which in ("forward", "backward"):
        for d in sorted({row["d"] for row in rows}):
            some = [row for row in rows if row["which"] == which and row["d"] == d]
            cells = [which, d, len(some)]
            for name in ("fa2", "cudnn", "best"):
                ratios = [row["flashgqa_tflops"] / row[f"{name}_tflops"] for row in some]
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                cells.append(f"{mean:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def gpu_training_table(rows):
    """One line a shape; the ratios are our rate over that of torch's backends in the same run, and over that of the best peer."""
    passes = {}
    for row in rows:
        passes.setdefault((heads(row), row["d"], row["s"], "yes" if row["causal"] else "no"), {})[row["which"]] = row
    lines = ["| heads q/kv | d | length | causal | forward | to FA2 | to cuDNN | best | backward | to FA2 | to cuDNN | best |",
             "|---" * 12 + "|"]
    for key, both in passes.items():
        cells = [str(x) for x in key]
        for which in ("forward", "backward"):
            rates = [both[which][f"{name}_tflops"] for name in ("flashgqa", "fa2", "cudnn", "best")]
            cells += [f"{rates[0]:.0f}", *(f"{rates[0] / rate:.2f}" for rate in rates[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gpu_decode_about(rows):
    readers = {"bulk copies": "a kernel that does nothing else (`benchmarks/bulk_read.py`)", "torch.amax": "torch's `amax`"}
    reader = " or ".join(dict.fromkeys(readers[row["read_by"]] for row in rows if "read_by" in row))
    return f"""\
Decode, one query token, bfloat16, d 128, replayed from a CUDA graph over more than 512 MB of keys and values: a launch in us; the
ratio of the best peer's time to ours (`benchmarks/gpu_decode.py`: at its ratio to cuDNN on an H200), of cuDNN's and
FlashAttention-2's in the same run; the time in which as many bytes are read by
{reader}, and what ours takes beyond it where no launch begins before the end of
the one ahead, as it may in the graph; ours with lengths on the device (of paged rows: contiguous), with `batch_invariant=True`,
with 4 queries, and over a float8 cache of as many keys:"""


def in_short(cpu, gpu):
    """README's part: the figures, means over all rows, and some of the rows, most of them with the heads of Llama 3 8B."""
    training = [row for row in gpu["rows"] if not row.get("kind")]
    some = [row for row in training if row["s"] != 4096 and heads(row) in ("32/8", "16/4")]
    decode = [row for row in gpu.get("decode", []) if row["b"] == 16]
    shown = [row for row in cpu["rows"] if (heads(row) == "32/8" if not row["queries"] else row["b"] == 1)]
    return "\n".join([
        "Every row, more settings and KV caches on the CPU: [benchmarks/results](benchmarks/results/README.md).", "",
        gpu_about(gpu), "![Our rate over that of each peer, in every row](benchmarks/results/gpu.png)", "",
        "Geometric mean over all rows, least and most:", "", *gpu_summary_table(training), "",
        *gpu_training_table(some), "", *([gpu_decode_about(decode), "", *gpu_decode_table(decode), ""] if decode else []),
        *options_section(gpu), *short_section(gpu),
        cpu_about(cpu), "![PyTorch's time / ours in every row](benchmarks/results/cpu.png)", "", cpu_tables(shown)])


def in_full(cpu, lengths, caches, gpu):
    """results/README.md: everything."""
    training, more = [[row for row in gpu["rows"] if bool(row.get("kind")) == kind] for kind in (False, True)]
    parts = ["# All results\n\nMade by `benchmarks/report.py` from the JSON files beside it.\n", "## GPU\n", gpu_about(gpu),
             *gpu_training_table(training)]
    if more:
        parts += ["", "Other settings:", "", *gpu_more_table(more)]
    if gpu.get("decode"):
        parts += ["", gpu_decode_about(gpu["decode"]), "", *gpu_decode_table(gpu["decode"])]
    parts += ["", *options_section(gpu, everything=True), *short_section(gpu)]
    return "\n".join([*parts, "## CPU\n", cpu_about(cpu), cpu_tables(cpu["rows"])]) \
        + length_section(lengths) + cache_section(caches)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    cpu, gpu, caches = [json.loads((options.results / f"{name}.json").read_text(encoding="utf-8"))
                        for name in ("cpu", "gpu", "kvcache")]
    measured = options.results / "lengths.json"
    lengths = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    wanted = {README: before + BEGIN + in_short(cpu, gpu) + rest[rest.index(END):],
              options.results / "README.md": in_full(cpu, lengths, caches, gpu)}
    if options.check:
        stale = [path.name for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        sys.exit(f"{', '.join(stale)} not as the results say: run benchmarks/report.py" if stale else None)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
        print("wrote", path)
    figures.draw(cpu, gpu, options.results)


if __name__ == "__main__":
    main()
