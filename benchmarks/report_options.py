"""The tables of options and of short sequences, for report.py. A record whose run did not measure them says so."""
import math
import textwrap

from figures import heads

PASSES = ("forward", "backward")
PEERS = {"cudnn": "cuDNN", "fa2": "FA2", "efficient": "efficient"}
# README's lines of the table of options; results/README.md has all.
SHOWN = ("softcap", "ALiBi", "mask", "padding", "bias", "bias + its gradient", "float32 bias", "dropout", "softcap + bias",
         "mask + dropout", "bias + dropout", "bias + dropout + its gradient")


def where(record, section):
    """Of a section that was measured apart from the rest of its record."""
    said = []
    if any(section[name] != record[name] for name in ("sources_sha256", "device", "date", "torch")):
        kernels = "the same kernels" if section["sources_sha256"] == record["sources_sha256"] else "other kernels"
        said.append(f"a run of its own, of {kernels}: {section['device']}, {section['date']}, torch {section['torch']}")
    return f" ({'; '.join(said)})" if said else ""


def filled(text):
    return textwrap.fill(text, 128, break_on_hyphens=False)


def option_cell(row, without, rate):
    """Share of our speed without options and ratio to the fastest peer; behind the rate, if it is asked."""
    if row is None:
        return ""
    if "error" in row:
        return "failed"
    mine = row["flashgqa_tflops"]
    parts = [f"{mine:.0f}"] if rate or row is without else []
    if row is not without:
        parts.append(f"{mine / without['flashgqa_tflops']:.2f}" if "flashgqa_tflops" in without else "?")
    theirs = {name: row[f"{peer}_tflops"] for peer, name in PEERS.items() if f"{peer}_tflops" in row}
    if theirs:
        best = max(theirs, key=theirs.get)
        parts.append(f"{best} {mine / theirs[best]:.2f}")
    return ", ".join(parts)


def options_table(rows, shown, rate):
    """One line for each set of options and length, passes and head dims side by side."""
    columns = [(which, d) for which in PASSES for d in sorted({row["d"] for row in rows})]
    cells = {}
    for row in rows:
        for which in [row["which"]] if "which" in row else PASSES:      # what failed did so in any pass that has no record
            cells.setdefault((row["s"], row["what"]), {}).setdefault((which, row["d"]), row)
    lines = [f"| options | length | {' | '.join(f'{which} d {d}' for which, d in columns)} |", "|---" * (2 + len(columns)) + "|"]
    for (s, what), of_line in cells.items():
        if what in shown:
            without = cells.get((s, "none"), {})
            texts = [option_cell(of_line.get(key), without.get(key, {}), rate) for key in columns]
            lines.append(f"| {what} | {s} | {' | '.join(texts)} |")
    return lines


def options_section(record, everything=False):
    """README's lines, or every row with its rate."""
    if "options" not in record:
        return ["Options: not measured by the run of this record (`python benchmarks/bench.py gpu --section options`).", ""]
    rows = record["options"]["rows"]
    shapes = ", ".join(dict.fromkeys(f"{heads(row)} at d {row['d']}" for row in rows))
    shown = {row["what"] for row in rows} if everything else SHOWN
    about = f"""\
Options{where(record, record["options"])}, bfloat16, dense, batch {rows[0]["b"]}, {shapes}:
{"TFLOP/s (without options that alone), " if everything else ""}share of our speed without, then the ratio to the
fastest of cuDNN, FlashAttention-2 and, where neither takes it, PyTorch's memory-efficient backend with the same in the same run
(ALiBi as a bias; no name: they do not take it, as softcap and float32 biases, or were not asked, `OptionRow` in
`benchmarks/shapes.py`). mask [b, 1, s, s], padding a mask [b, 1, 1, s], bias [1, h, s, s], of q's dtype unless said; at a length
of 4,090 the rows of masks and biases do not begin on 16 bytes:"""
    return [filled(about), "", *options_table(rows, shown, everything), ""]


def tokens(row):
    """Of all sequences of a row of equal lengths, which a last one may lack."""
    return 1 << round(math.log2(row["b"] * row["s"]))


def short_cell(row):
    if "error" in row:
        return "failed"
    mine = row["flashgqa_us"]
    return f"{mine:.0f}: " + ", ".join(f"{row[name] / mine:.2f}" if name in row else "-" for name in ("cudnn_us", "fa2_us"))


def short_table(rows):
    """One line a length or mixture of lengths; columns are tokens, heads, head dim and mask."""
    columns, lines_of = {}, {}
    for row in rows:
        packed = row["kind"].startswith("packed")
        key = 65536 if packed else tokens(row), heads(row), row["d"], row["causal"]
        columns[key] = f"{key[0]:,} tokens, {key[1]} d {key[2]}{', causal' if key[3] else ''}"
        lines_of.setdefault(row["kind"] if packed else f"{row['s']}", {})[key] = short_cell(row)
    order = sorted(lines_of, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else int(name.split()[1])))
    lines = [f"| length | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    return lines + [f"| {name} | {' | '.join(lines_of[name].get(key, '') for key in columns)} |" for name in order]


def short_section(record):
    if "short" not in record:
        return ["Short sequences: not measured by the run of this record (`python benchmarks/bench.py gpu --section short`).", ""]
    about = f"""\
Short sequences{where(record, record["short"])}, forward, bfloat16: us of a launch, then the
ratios of cuDNN's and FlashAttention-2's times to it; packed: lengths spread between the two, joined along one axis
(`benchmarks/shapes.py`):"""
    return [filled(about), "", *short_table(record["short"]["rows"]), ""]
