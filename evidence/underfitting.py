"""Whether the noise of small batches is what makes a net underfit."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from torch import nn

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, draw_seeds, mean_cell
from evidence.lists import CIFAR10, MLP, Entrant, Task, data_of
from evidence.noise_layers import NoisyBatchNorm, SplitBatchNorm, replace_norms, size_of
from evidence.rule import DROP_IN
from evidence.trained import DIVERGED, where
from mbnorm import recalibrate
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.estimates import NO_DIFFERENCE, NOT_NEGATIVE, PERCENT, paired_difference
from mbnorm.experiments.grid import Run
from mbnorm.experiments.methods import in_random_order
from mbnorm.experiments.training import eval_mode_loss, fit, measured
from mbnorm.experiments.workers import preparing

SMALL, LARGE = 2, 32
TASKS = (MLP, replace(CIFAR10, images=1000, epochs=5))
RATE = 0.1
AT_TWO, AT_32 = "batch norm at 2", "batch norm at 32"
SPLIT = "at 32, each 2 normalized by themselves"
INJECTED = "at 32, injected noise of 2"
WITH_ITSELF = "at 32, injected noise of 1 other image"
MATCHED = "Matched BN at 2"
NAMES = (AT_TWO, SPLIT, WITH_ITSELF, INJECTED, AT_32, MATCHED)
COMPARED = {AT_TWO: AT_32, SPLIT: AT_TWO, WITH_ITSELF: AT_TWO, INJECTED: AT_TWO, MATCHED: AT_32}
"""Each training, and the one it is compared with."""


class Scores(NamedTuple):
    """What a trained net is measured by, and how many digits a table has of it."""

    key: str
    heading: str
    digits: int


SCORES = (
    Scores("train_mode_loss", "training loss", 3),
    Scores("train_accuracy", "training accuracy, %", 1),
    Scores("accuracy", "test accuracy, %", 1),
)


def net(name: str, run: Run, data: Data) -> nn.Module:
    """Return the untrained net of a training; all have the same weights."""
    if name == MATCHED:
        return DROP_IN.net(run, data)
    model = Entrant("batch").net(run, data)
    if name in (INJECTED, WITH_ITSELF):
        # beside an image itself there is one other
        images, share = (SMALL, 0.0) if name == INJECTED else (SMALL - 1, 1 / SMALL)
        size = partial(size_of, images=images)
        replace_norms(model, lambda norm, i: NoisyBatchNorm(norm, size, 1000 * run.seed + i, share))
    if name == SPLIT:
        replace_norms(model, lambda norm, _: SplitBatchNorm(norm, SMALL))
    return model


def trained(task: Task, name: str, seed: int) -> Row:
    """Train once, set exact running statistics, and return the row."""
    start = time.perf_counter()
    data = data_of(task, "report")
    batch_size = SMALL if name in (AT_TWO, MATCHED) else LARGE
    run = Run("matched" if name == MATCHED else "batch", task.setting(RATE, batch_size), seed)
    with preparing(task.model):
        model = net(name, run, data)
        train_mode = fit(model, run, data)
        finite = train_mode < DIVERGED
        row: Row = {"task": task.name, "name": name, "seed": seed, "status": "ok" if finite else "diverged"}
        if finite:
            recalibrate(model, in_random_order(data.train_inputs))
            seen = data._replace(test_inputs=data.train_inputs, test_targets=data.train_targets)
            row |= {
                "train_mode_loss": train_mode,
                "loss": eval_mode_loss(model, data),
                "train_accuracy": measured(model, seen)["accuracy"],
                **measured(model, data),
            }
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for task in TASKS:
            for name in NAMES:
                if where(known, task=task.name, name=name, seed=seed):
                    continue
                row = trained(task, name, seed)
                tell(
                    f"{task.name}, {name}, seed {seed}: {row.get('accuracy', math.nan):.1f} %, "
                    f"{row['seconds']} s"
                )
                yield row


def _of(rows: Sequence[Row], task: Task, name: str, key: str) -> dict[int, float]:
    return {row["seed"]: row[key] for row in where(rows, task=task.name, name=name, status="ok")}


def _tables(rows: Sequence[Row]) -> list[Table]:
    return [_table_of(rows, task) for task in TASKS if where(rows, task=task.name)]


def _table_of(rows: Sequence[Row], task: Task) -> Table:
    headings = [task.name]
    for score in SCORES:
        headings += [score.heading, "difference"]
    lines = []
    for name in NAMES:
        other = COMPARED.get(name)
        line = [name if other is None else f"{name} [against {other}]"]
        for score in SCORES:
            found = _of(rows, task, name, score.key)
            bounds = NOT_NEGATIVE if score.key == "train_mode_loss" else PERCENT
            difference = other and paired_difference(found, _of(rows, task, other, score.key))
            diverged = len(where(rows, task=task.name, name=name, status="diverged"))
            text = mean_cell(list(found.values()), score.digits, bounds)
            line.append(text + (f" ({diverged} diverged)" if diverged else ""))
            line.append(difference_cell(difference or None, score.digits))
        lines.append(line)
    return headings, lines


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for task, panel in zip(TASKS, panels, strict=True):
        losses = {name: list(_of(rows, task, name, "train_mode_loss").values()) for name in NAMES}
        draw_seeds(panel, losses, NOT_NEGATIVE)
        panel.set_xlabel("loss of the last epoch (dots: seeds; bars: 95 % interval of the mean)")
        panel.set_title(task.name)


def _verdict(rows: Sequence[Row]) -> str:
    parts = []
    for task in TASKS:
        for name, other in COMPARED.items():
            difference = paired_difference(
                _of(rows, task, name, "accuracy"), _of(rows, task, other, "accuracy")
            )
            if difference is not None:
                parts.append(f"{name}, against {other}: {difference.signed()} ({task.name})")
    return "Test accuracy, points: " + "; ".join(parts) + "." if parts else ""


CLAIM = Claim(
    title="Underfitting is noise",
    sentence=(
        "Underfitting is noise: a net trained with batches of 32 that have the noise of batches of 2 learns "
        "as little as one trained with batches of 2, and Matched BN at 2 learns as much as batch norm at 32."
    ),
    measured=(
        f"Rate {RATE} for a batch of 64, smaller batches in proportion, the same weights and as many images "
        f"in all trainings; ResNet-8 learns {TASKS[1].images} images for {TASKS[1].epochs} epochs. Training "
        "loss: the mean over the last epoch, noise included. Accuracies: in eval mode with exact running "
        "statistics. Matched BN has no centered filters here. Injected: u is normal with variance 1/n and s² "
        "is (1 - 1/n) times a chi-square with d "
        "degrees of freedom over d, one draw a channel and batch, independent of the images; n and d are "
        "measured between the parts of each batch of 32 (n - 1 = d for vectors). With 1 other image: each "
        "image has the statistics of itself and of one other, whose u and s² are drawn so. A training whose "
        f"loss is above {DIVERGED:.0f} has diverged. {NO_DIFFERENCE}"
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TASKS),
    verdict=_verdict,
)
