"""README's section on speed and its figure, made from benchmarks/results/{cpu,kvcache,gpu}.json; nothing in it is typed by hand.

    python benchmarks/report.py             writes README.md, and results/cpu.png if matplotlib is installed
    python benchmarks/report.py --check     fails if README.md does not say what the JSON says
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- speed: made by benchmarks/report.py -->\n", "<!-- end of speed -->"


def ratio(record):
    return f"**{record['ratio']:.2f}**" if record["ratio"] >= 1 else f"{record['ratio']:.2f}"


def heads(record):
    return f"{record['hq']}/{record['hk']}"


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


def section(result):
    machine, limit, rows = result["machine"], result["ceilings"], result["rows"]
    commit = f"commit {machine['commit']}, " if machine.get("commit") else ""
    wins = sum(record["ratio"] >= 1 for record in rows)
    text = f"""\
{machine["processor"]}, {machine["threads"]} threads: {machine["flashgqa"]} ({commit}{machine["isa"]}) and {machine["torch"]}
(`scaled_dot_product_attention`) on the same arrays in alternating calls, {machine["date"]}. ratio = PyTorch's time / ours, the
median over the pairs: above 1 we are faster, in {wins} of {len(rows)} rows. In the same run a float32 matrix product reached
{limit["matmul_gflops"]:.0f} GFLOP/s and reading memory {limit["read_gbs"]:.0f} GB/s.

![PyTorch's time / ours in every row](benchmarks/results/cpu.png)

Forward and backward:
"""
    decode = "Decode, one query over a cache (d 128); GB/s count each key and value once:"
    return "\n".join([text, *training_table(rows), "", decode, "", *decode_table(rows)]) + "\n"


def cache_section(result):
    """Decode through attention_with_kvcache, one line a shape, kinds of cache side by side; "" if it has not been measured."""
    if result is None:
        return ""
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
             "packed": "packed, 65,536 tokens, 16 to 4,096 each", "window": "window of 1,024 keys", "prefill": "128 queries, b 4"}
    lines = ["| what | pass | heads q/kv | d | length | causal | TFLOP/s | to FA2 | to cuDNN | to ours in order |",
             "|---" * 10 + "|"]
    for row in rows:
        ours = row["flashgqa_tflops"]
        others = [row.get(f"{name}_tflops") for name in ("fa2", "cudnn", "ordered")]
        ratios = [f"{ours / rate:.2f}" if rate else "" for rate in others]
        causal = "yes" if row["causal"] else "no"
        cells = [about[row["kind"]], row["which"], heads(row), row["d"], row["s"], causal, f"{ours:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells + ratios))} |")
    return lines


def gpu_decode_table(rows):
    columns = ("batch", "cached keys", "heads q/kv", "page", "us", "TB/s", "best peer", "ratio", "to cuDNN", "to FA2", "read us",
               "lengths given", "invariant")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "error" in row:
            cells = [row["b"], row["s"], heads(row), row["page"] or "", "failed", *[""] * (len(columns) - 5)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            continue
        mine = row["flashgqa_us"]
        ratios = [f"{row[f'{name}_us'] / mine:.2f}" for name in ("best", "cudnn", "fa2")]
        rate = 4 * row["b"] * row["hk"] * row["s"] * 128 / mine / 1e6
        invariant = f"{row['invariant_us']:.1f}" if "invariant_us" in row else ""
        cells = [row["b"], row["s"], heads(row), row["page"] or "", f"{mine:.1f}", f"{rate:.2f}", row["best_peer"], *ratios,
                 f"{row['read_us']:.1f}", f"{row['lengths_us']:.1f}", invariant]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def gpu_section(record):
    """The GPU rows, one line a shape; the ratios are our rate over that of torch's backends in the same run, and over that of the
    best peer (peers.py)."""
    tests, limit, passes = record["tests"], record["ceilings"], {}
    more = [row for row in record["rows"] if row.get("kind")]
    for row in record["rows"]:
        if not row.get("kind"):
            key = heads(row), row["d"], row["s"], "yes" if row["causal"] else "no"
            passes.setdefault(key, {})[row["which"]] = row
    machine = f"{record['device']}, bfloat16, 16,384 tokens a row, {record['date']}, torch {record['torch']}"
    counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    lines = [f"""
{machine}: TFLOP/s of one launch behind queued work,
and its ratio to PyTorch's FlashAttention-2 and cuDNN backends in the same run, where a matrix product reached
{limit["matmul_tflops"]:.0f} TFLOP/s. best: to the fastest of these two, FlashAttention-3 and flash-attn-4, at the ratio to cuDNN
that it had on an H200 (`benchmarks/peers.py`). GPU tests of that build: {counts}.
""",
             "| heads q/kv | d | length | causal | forward | to FA2 | to cuDNN | best | backward | to FA2 | to cuDNN | best |",
             "|---" * 12 + "|"]
    for key, both in passes.items():
        cells = [str(x) for x in key]
        for which in ("forward", "backward"):
            rates = [both[which][f"{name}_tflops"] for name in ("flashgqa", "fa2", "cudnn", "best")]
            cells += [f"{rates[0]:.0f}", *(f"{rates[0] / rate:.2f}" for rate in rates[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    if more:
        lines += ["", "Other settings:", "", *gpu_more_table(more)]
    if record.get("decode"):
        lines += ["", """\
Decode, one query token, bfloat16, d 128, replayed from a CUDA graph over more than 512 MB of keys and values: a launch in us; the
ratio of the best peer's time to ours (`benchmarks/gpu_decode.py`: at its ratio to cuDNN on an H200), of cuDNN's and
FlashAttention-2's in the same run; the time in which torch's `amax` reads as many bytes; ours with lengths on the device (of
paged rows: contiguous) and with `batch_invariant=True`:""", "", *gpu_decode_table(record["decode"])]
    return "\n".join(lines) + "\n"


def plot(result, path):
    """A dot per row at its ratio with the quartiles as a bar. Without matplotlib there is no figure."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figure")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    names = [f"{r['dtype']} {heads(r)} d {r['d']} s {r['s']}{' causal' if r['causal'] else ''} "
             f"{'decode b ' + str(r['b']) if r['queries'] else r['which']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.22 * len(rows) + 1.4), layout="constrained")
    colours = {"forward": "tab:blue", "backward": "tab:green", "decode": "tab:red"}
    for y, record in enumerate(rows):
        colour = colours["decode" if record["queries"] else record["which"]]
        low, high = record["ratio_quartiles"]
        axes.plot([low, high], [y, y], color=colour, alpha=0.4, linewidth=4, solid_capstyle="butt")
        axes.plot(record["ratio"], y, "o", color=colour, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("PyTorch's time / ours (dot: median, bar: quartiles); right of 1: flashgqa is faster")
    figure.savefig(path, dpi=110)
    print("wrote", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", default=str(HERE / "results" / "cpu.json"))
    parser.add_argument("--kvcache", default=str(HERE / "results" / "kvcache.json"))
    parser.add_argument("--gpu", default=str(HERE / "results" / "gpu.json"))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    result = json.loads(Path(options.result).read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest[rest.index(END):]
    gpu = json.loads(Path(options.gpu).read_text(encoding="utf-8"))
    caches = Path(options.kvcache)
    cached = cache_section(json.loads(caches.read_text(encoding="utf-8")) if caches.exists() else None)
    wanted = before + BEGIN + section(result) + cached + gpu_section(gpu) + after
    if options.check:
        sys.exit(None if text == wanted else "README.md does not say what the result says: run benchmarks/report.py")
    README.write_text(wanted, encoding="utf-8")
    print("wrote", README)
    plot(result, Path(options.result).with_suffix(".png"))


if __name__ == "__main__":
    main()
