"""The figures of results/: a dot a row at its ratio to each peer. Without matplotlib there are none."""

COLOURS = {"forward": "tab:blue", "backward": "tab:green", "decode": "tab:red"}


def heads(record):
    return f"{record['hq']}/{record['hk']}"


def shape(record):
    return f"{heads(record)} d {record['d']} s {record['s']}{' causal' if record['causal'] else ''}"


def ratio_axes(axes, names, label):
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [x for x in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(label)


def cpu_figure(pyplot, rows):
    """PyTorch's time over ours, with the quartiles of the pairs as a bar."""
    names = [f"{r['dtype']} {shape(r)} {'decode b ' + str(r['b']) if r['queries'] else r['which']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.22 * len(rows) + 1.4), layout="constrained")
    for y, record in enumerate(rows):
        colour = COLOURS["decode" if record["queries"] else record["which"]]
        axes.plot(record["ratio_quartiles"], [y, y], color=colour, alpha=0.4, linewidth=4, solid_capstyle="butt")
        axes.plot(record["ratio"], y, "o", color=colour, markersize=5)
    ratio_axes(axes, names, "PyTorch's time / ours (dot: median, bar: quartiles); right of 1: flashgqa is faster")
    return figure


def gpu_figure(pyplot, rows):
    """Our rate over that of each peer; forward on the left, backward on the right."""
    passes = {which: [row for row in rows if row["which"] == which] for which in ("forward", "backward")}
    most = max(map(len, passes.values()))
    figure, both = pyplot.subplots(1, 2, figsize=(11, 0.17 * most + 1.4), sharex=True, layout="constrained")
    peers = ("fa2", "FlashAttention-2", "s"), ("cudnn", "cuDNN", "o"), ("best", "best peer", "x")
    for axes, (which, some) in zip(both, passes.items(), strict=True):
        for name, label, marker in peers:
            ratios = [row["flashgqa_tflops"] / row[f"{name}_tflops"] for row in some]
            axes.plot(ratios, range(len(some)), marker, label=label, markersize=5)
        ratio_axes(axes, [shape(row) for row in some], f"{which}: our rate / the peer's")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(peers))
    return figure


def draw(cpu, gpu, folder):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figures")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    training = [row for row in gpu["rows"] if not row.get("kind")]
    for name, figure in (("cpu", cpu_figure(pyplot, cpu["rows"])), ("gpu", gpu_figure(pyplot, training))):
        figure.savefig(folder / f"{name}.png", dpi=110)
        print("wrote", folder / f"{name}.png")
