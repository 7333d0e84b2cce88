"""The table and the plot of `mbnorm bench`, from its rows alone."""

from pathlib import Path

from mbnorm.experiments.bench.cases import RESNET50
from mbnorm.experiments.bench.rows import Row, geometric_mean, ratios

ORDER = (
    "matched",
    "momentum",
    "memorized",
    "kernels",
    "doubling",
    "momentum-aten",
    "momentum-traceable",
    "compiled_batch_norm",
    "group_norm",
    "formulas",
)


def table(rows: list[Row]) -> str:
    """Return the Markdown tables of layers and of whole steps."""
    lines = [_where(rows), ""]
    if any(row["kind"] == "layer" for row in rows):
        lines += _layers(rows)
    if any(row["kind"] == "step" for row in rows):
        lines += _steps(rows)
    return "\n".join(lines)


def _where(rows: list[Row]) -> str:
    row = rows[0]
    return (
        f"{row['processor']}, {row['cores']} cores, torch {row['torch']}, mbnorm {row['mbnorm']}. "
        "Written by `mbnorm bench`."
    )


def _layers(rows: list[Row]) -> list[str]:
    groups = sorted({(r["dtype"], r["layout"], r["threads"]) for r in rows if r["kind"] == "layer"})
    present = {r["provider"] for r in rows if r["kind"] == "layer"}
    providers = [p for p in ORDER if p in present]
    lines = [
        "Time of forward and backward over that of `nn.BatchNorm` in the same run: geometric mean over the "
        "shapes of ResNet-50 at batch 2 (worst shape). `kernels` are those of `momentum`, without layer and "
        "autograd. `doubling` is y = 2x: one node of autograd, and four of the five tensors that a "
        "normalization must move.",
        "",
        "| dtype, layout, threads | " + " | ".join(providers) + " |",
        "| --- |" + " ---: |" * len(providers),
    ]
    for dtype, layout, threads in groups:
        cells = []
        for provider in providers:
            found = ratios(
                rows, provider, "batch_norm", mode="both", dtype=dtype, layout=layout, threads=threads
            )
            of_resnet = [ratio for (shape, _), ratio in found.items() if shape in RESNET50]
            cells.append(f"{geometric_mean(of_resnet):.2f} ({max(of_resnet):.2f})" if of_resnet else "-")
        lines.append(f"| {dtype}, {layout}, {threads} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each shape, float32, one thread, contiguous: time over `nn.BatchNorm`, and GB/s of the layer "
        "`momentum` (5 tensors moved at least) beside that of a copy; the bytes it saves for the backward, "
        "and the most that its tensors take, over those of `nn.BatchNorm`.",
        "",
        "| shape | " + " | ".join(providers) + " | GB/s | copy GB/s | saved | peak |",
        "| --- |" + " ---: |" * (len(providers) + 4),
    ]
    chosen = [
        r
        for r in rows
        if r["kind"] == "layer"
        and (r["mode"], r["dtype"], r["threads"], r["layout"]) == ("both", "float32", 1, "contiguous")
    ]
    for shape in dict.fromkeys(tuple(r["shape"]) for r in chosen):
        here = {r["provider"]: r for r in chosen if tuple(r["shape"]) == shape}
        base = here["batch_norm"]
        cells = [f"{here[p]['median_s'] / base['median_s']:.2f}" if p in here else "-" for p in providers]
        if "momentum" in here:
            saved = here["momentum"]["saved_bytes"] / base["saved_bytes"]
            peak = here["momentum"]["peak_bytes"] / base["peak_bytes"]
            rates = (
                f"{here['momentum']['gb_per_s']:.1f} | {base['copy_gb_per_s']:.1f} | {saved:.2f} | {peak:.2f}"
            )
        else:
            rates = "- | - | - | -"
        lines.append(f"| {'x'.join(map(str, shape))} | " + " | ".join(cells) + f" | {rates} |")
    return [*lines, ""]


def _steps(rows: list[Row]) -> list[str]:
    steps = [r for r in rows if r["kind"] == "step"]
    lines = [
        "Whole training steps at batch 2, over the same net with `nn.BatchNorm`.",
        "",
        "| net, threads | norm | step time | activation memory | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for net, threads in dict.fromkeys((r["net"], r["threads"]) for r in steps):
        here = {r["method"]: r for r in steps if (r["net"], r["threads"]) == (net, threads)}
        base = here["batch"]
        for method, row in here.items():
            lines.append(
                f"| {net}, {threads} | {method} | {row['median_s'] / base['median_s']:.2f} | "
                f"{row['activation_bytes'] / base['activation_bytes']:.3f} | "
                f"{row['peak_bytes'] / base['peak_bytes']:.3f} |"
            )
    return [*lines, ""]


def draw(rows: list[Row], path: Path) -> None:
    """Draw the time of each provider over batch norm's, a panel for each dtype and layout."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    layers = [r for r in rows if r["kind"] == "layer" and r["mode"] == "both" and r["threads"] == 1]
    panels = list(dict.fromkeys((r["dtype"], r["layout"]) for r in layers))
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (dtype, layout) in zip(axes[0], panels, strict=True):
        names = [p for p in ORDER if any(r["provider"] == p for r in layers)]
        for height, provider in enumerate(reversed(names)):
            found = ratios(layers, provider, "batch_norm", dtype=dtype, layout=layout)
            values = [v for (shape, _), v in found.items() if shape in RESNET50]
            if not values:
                continue
            ours = provider.startswith(("matched", "momentum", "memorized"))
            color = "tab:blue" if ours else "dimgray"
            axis.plot(values, [height] * len(values), "o", color=color, alpha=0.5, markersize=5)
            mean = geometric_mean(values)
            axis.plot([mean], [height], "|", color=color, markersize=18, markeredgewidth=2.5)
            axis.annotate(f"{mean:.2f}", (mean, height), (0, 9), textcoords="offset points", ha="center")
        axis.axvline(1, color="tab:red", linewidth=1)
        axis.set_xscale("log")
        axis.set_yticks(range(len(names)), reversed(names))
        axis.set_title(f"{dtype}, {layout}")
        axis.set_xlabel("time over nn.BatchNorm2d")
    figure.savefig(path, dpi=120)
    plt.close(figure)
