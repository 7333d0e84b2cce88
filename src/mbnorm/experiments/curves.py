"""The figure of a training: loss and accuracy over its epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mbnorm.experiments.plot import OTHERS, OWN, WIDTH

PARTS = {"train": ("--", OTHERS), "test": ("-", OWN)}


def draw(epochs: Sequence[Mapping[str, float | None]], path: Path) -> None:
    """Write the figure of the epochs in a log; None is a loss that was not finite."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    for panel, what in zip(panels, ("loss", "accuracy"), strict=True):
        for part, (style, color) in PARTS.items():
            values = [epoch[f"{part}_{what}"] for epoch in epochs]
            known = [math.nan if value is None else value for value in values]
            numbers = [epoch["epoch"] for epoch in epochs]
            panel.plot(numbers, known, style, marker="o", markersize=3, color=color, label=part)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#eeeeee")
        panel.set_ylabel("accuracy, %" if what == "accuracy" else what, fontsize=9)
        panel.tick_params(labelsize=9)
    panels[0].set_ylim(bottom=0)
    panels[1].set_xlabel("epoch (train: mean over its batches)", fontsize=9)
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=200)
