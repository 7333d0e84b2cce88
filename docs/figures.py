"""Draws the figures of the documentation: `python docs/figures.py` writes them into docs/figures.

`mbnorm compare` and `mbnorm diagnose` measure what most of them show, into runs/figures. Runs that are there
already are not repeated. Figures of claims are drawn from their rows in docs/results.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from shutil import copyfile
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evidence import confirmed, lists, rule
from evidence.arena import BATCH, Known
from evidence.lists import Entrant, Task
from mbnorm import MatchedBatchNorm1d
from mbnorm.cli import main
from mbnorm.experiments.estimates import PERCENT, estimate
from mbnorm.experiments.plot import WIDTH
from mbnorm.experiments.records import read

FOLDER = Path(__file__).parent / "figures"
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/figures")
COLORS = {"batch": "#c62828", "matched": "#1769aa", "group": "#616161"}
LABELS = {"batch": "batch norm", "matched": 'ours, "matched"', "group": "group norm"}
SIZES = (2, 4, 8, 16, 32, 64)
WEIGHTS = (1, 2, 4, 8, 16)
DEFAULT_SIZE = MatchedBatchNorm1d(1).matched_batch_size


def noise() -> None:
    """How far the mean and the variance of a batch are from the truth, in the first layer of an MLP."""
    figure, (means, variances) = _panels(2)
    for sampling, color in (("shuffled", "#1769aa"), ("one-class", "#c62828")):
        measured = [_first_layer(sampling, m) for m in SIZES]
        means.plot(SIZES, [n["mean_error"] for n in measured], "o-", color=color, label=f"{sampling} batches")
        variances.plot(SIZES, [n["var_error"] for n in measured], "o-", color=color)
    means.plot(SIZES, [m**-0.5 for m in SIZES], "k:", linewidth=1, label="1 / √m")
    means.set_ylabel("error of the batch mean, in sd")
    variances.set_ylabel("error of the batch variance, relative")
    figure.legend(loc="outside upper center", frameon=False)
    for panel in (means, variances):
        panel.set_ylim(bottom=0)
        _batch_size_axis(panel)
    _save(figure, "noise")


def accuracy() -> None:
    """Test accuracy of an MLP against the batch size it was trained with."""
    sizes = ",".join(map(str, SIZES))
    found = _compare("accuracy", "--batch-sizes", sizes, "--methods", ",".join(LABELS), "--seeds", "3")
    figure, (panel,) = _panels(1)
    for method, label in LABELS.items():
        by_size = [[r["accuracy"] for r in found[method] if r["batch_size"] == m] for m in SIZES]
        for m, values in zip(SIZES, by_size, strict=True):
            panel.scatter([m] * len(values), values, s=12, color=COLORS[method], alpha=0.5)
        means = [sum(values) / len(values) for values in by_size]
        panel.plot(SIZES, means, color=COLORS[method], label=label)
    panel.set_ylabel("test accuracy, %")
    panel.legend(frameon=False, loc="lower right")
    _batch_size_axis(panel)
    _save(figure, "accuracy")


def modes() -> None:
    """Loss on the training images in both modes, after training a CNN on one-class batches of 4."""
    options = ("--model", "cnn", "--batch-sizes", "4", "--sampling", "one-class", "--seeds", "2")
    found = _compare("modes", *options, "--methods", ",".join(LABELS))
    figure, (panel,) = _panels(1)
    for row, method in enumerate(LABELS):
        for key, marker in (("train_mode_loss", "o"), ("eval_mode_loss", "s")):
            losses = [r[key] for r in found[method]]
            fill = "none" if marker == "o" else COLORS[method]
            panel.scatter(
                losses, [row] * len(losses), marker=marker, facecolor=fill, edgecolor=COLORS[method]
            )
    panel.set_xscale("log")
    panel.set_xlabel("loss on the training images\n(circles: train mode, squares: eval mode)")
    panel.set_yticks(range(len(LABELS)), LABELS.values())
    panel.set_ylim(len(LABELS) - 0.4, -0.6)
    _save(figure, "modes")


def history_weight() -> None:
    """The history weight: over training by the paper's schedule, and over n by measured=False."""
    figure, (schedule, matched) = _panels(2)
    steps = [i / 200 for i in range(201)]
    for m in WEIGHTS:
        r = m / 32
        schedule.plot(steps, [r ** (1 - p) - r for p in steps], label=f"m = {m}")
    schedule.set_xlabel("part of the training that is done")
    schedule.set_ylabel("history weight λ")
    schedule.set_title("Momentum BN with the paper's schedule", fontsize="medium", loc="left")
    schedule.legend(frameon=False)
    sizes = [2 ** (i / 8) for i in range(8 * 9 + 1)]
    for target in (32, 64, 128):
        weights = [max(0.0, (target - m) / (target + m)) for m in sizes]
        default = ", the default" if target == DEFAULT_SIZE else ""
        matched.plot(sizes, weights, label=f"matched_batch_size = {target}{default}")
    matched.set_xscale("log", base=2)
    matched.set_xlabel("samples in the batch, m")
    matched.set_title("Matched BN with measured=False", fontsize="medium", loc="left")
    matched.set_ylim(top=1.5)
    matched.legend(frameon=False, loc="upper right")
    _save(figure, "history-weight")


def compare() -> None:
    """Every method in the settings of `mbnorm compare`."""
    _run("compare", "--jobs", "1", "--out", str(RUNS / "compare"))
    copyfile(RUNS / "compare" / "compare.png", FOLDER / "compare.png")


def nuclei() -> None:
    """Dice on nuclei, of the methods that the page on segmentation names."""
    rows = read(RESULTS / "rule" / "data.jsonl", dict)
    _scores("nuclei", lists.NUCLEI, rule.CHOSEN, Known(rows))


def hippocampus() -> None:
    """Dice on hippocampus, of the methods that the page on 3D names."""
    tasks, rows = confirmed.newest(read(RESULTS / "confirmed" / "data.jsonl", dict))
    (task,) = [task for task in tasks if task.model == "unet3d"]
    _scores("hippocampus", task, confirmed.OURS, Known(rows))


def _scores(name: str, task: Task, ours: Entrant, known: Known) -> None:
    """Draw the scores of five methods in a task: each seed, and the interval of the mean."""
    shown = {
        "batch norm": BATCH,
        "batch norm,\ncentered filters": Entrant("batch+centered"),
        "Matched BN": ours,
        "MABN": Entrant("mabn"),
        "GroupNorm with\nWeight Standardization": Entrant("group+ws"),
    }
    figure, (panel,) = _panels(1)
    for row, entrant in enumerate(shown.values()):
        scores = list(known.scores(task, entrant).values())
        found = estimate(scores, PERCENT)
        assert found is not None
        color = COLORS["matched"] if entrant == ours else COLORS["group"]
        panel.plot([found.low, found.high], [row, row], color=color, linewidth=6, alpha=0.3)
        panel.plot(scores, [row] * len(scores), "o", color=color, markersize=3)
    panel.set_yticks(range(len(shown)), shown)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_xlabel("Dice, %\n(dots: seeds, bars: 95 % intervals)", loc="right")
    panel.grid(axis="x", color="#eeeeee")
    _save(figure, name)


def _first_layer(sampling: str, batch_size: int) -> dict[str, Any]:
    out = RUNS / f"noise-{sampling}-{batch_size}"
    if not (out / "diagnose.json").exists():
        options = ("--sampling", sampling, "--batch-size", str(batch_size), "--batches", "300")
        _run("diagnose", *options, "--out", str(out))
    noise: dict[str, Any] = json.loads((out / "diagnose.json").read_text())["layers"][0]["noise"]
    return noise


def _compare(name: str, *options: str) -> dict[str, list[dict[str, Any]]]:
    _run("compare", *options, "--jobs", "1", "--out", str(RUNS / name))
    by_method = defaultdict(list)
    for line in (RUNS / name / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        by_method[record["method"]].append(record)
    return by_method


def _run(*arguments: str) -> None:
    if status := main(arguments):
        sys.exit(status)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as a phone, with panels below one another."""
    figure = Figure(figsize=(WIDTH, 3 * count), layout="constrained")
    panels = list(figure.subplots(count, squeeze=False).flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _batch_size_axis(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(SIZES, [str(m) for m in SIZES])
    panel.set_xlabel("batch size m")


def _save(figure: Figure, name: str) -> None:
    # the same figure is the same file: no date, no random identifiers, no outlines of letters
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    # 9 points are 12 pixels
    with matplotlib.rc_context({"font.size": 9}):
        for draw in (noise, accuracy, modes, history_weight, nuclei, hippocampus, compare):
            draw()
