"""Test accuracy against injected noise: whether there is a best one, and whether nets agree on it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell
from evidence.lists import CIFAR10, CNN, MLP, Entrant, Task, data_of
from evidence.noise_layers import NoisyBatchNorm, independent, replace_norms
from evidence.trained import DIVERGED, score_of, where
from mbnorm import recalibrate
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, paired_difference
from mbnorm.experiments.grid import Run
from mbnorm.experiments.methods import in_random_order
from mbnorm.experiments.training import fit, measured
from mbnorm.experiments.workers import preparing
from mbnorm.memories.measured_average import MeasuredAverage

BATCH = 32
MATCHED = MeasuredAverage().matched_batch_size
"""The samples whose noise Matched BN aims at; where there are maps they have more values."""
VALUES = (2, 4, 8, 16, 32, 128, 512, None)
"""Independent values whose noise is injected; None injects none."""
NONE = "none"
FEW = replace(CIFAR10, images=320, epochs=12, held_out=1000)
TASKS = (MLP, CNN, FEW)
RATE = 0.1


def trained(task: Task, values: int | None, seed: int) -> Row:
    """Train once with so much noise in every layer, set exact running statistics, and return the row."""
    data = data_of(task, "choice" if task == FEW else "report")
    run = Run("batch", task.setting(RATE, BATCH), seed)
    with preparing(task.model):
        model = Entrant("batch").net(run, data)
        if values is not None:
            size = independent(values)
            replace_norms(model, lambda norm, i: NoisyBatchNorm(norm, lambda _: size, 1000 * seed + i))
        loss = fit(model, run, data)
        row: Row = {"task": task.name, "values": values or NONE, "seed": seed}
        if not loss < DIVERGED:
            return row | {"status": "diverged"}
        recalibrate(model, in_random_order(data.train_inputs))
        return row | {"status": "ok", "train_mode_loss": loss, **measured(model, data)}


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for task in TASKS:
            for values in VALUES:
                if where(known, task=task.name, values=values or NONE, seed=seed):
                    continue
                row = trained(task, values, seed)
                tell(f"{task.name}, noise of {row['values']} values, seed {seed}: {score_of(row):.1f} %")
                yield row


def _scores(rows: Sequence[Row], task: Task, values: int | None) -> dict[int, float]:
    return {row["seed"]: score_of(row) for row in where(rows, task=task.name, values=values or NONE)}


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for values in VALUES:
        line = [str(values or NONE)]
        for task in TASKS:
            scores = _scores(rows, task, values)
            line.append(mean_cell(list(scores.values()), 1, PERCENT))
            none = None if values is None else paired_difference(scores, _scores(rows, task, None))
            line.append(difference_cell(none, 1))
        lines.append(line)
    headings = ["noise of so many values"]
    for task in TASKS:
        headings += [f"{task.name}: test accuracy, %", "against none"]
    return [(headings, lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for task, panel in zip(TASKS, panels, strict=True):
        found = {values or math.inf: _scores(rows, task, values) for values in VALUES}
        points = [(values, list(scores.values())) for values, scores in found.items() if scores]
        limited = [(values, scores) for values, scores in points if not math.isinf(values)]
        panel.plot([v for v, _ in limited], [fmean(s) for _, s in limited], "-", color="C0", label="injected")
        for values, scores in limited:
            panel.plot([values] * len(scores), scores, ".", color="C0")
        if without := found[math.inf]:
            panel.axhline(fmean(without.values()), color="#9e9e9e", label="none injected")
        panel.axvline(MATCHED, color="C3", linestyle="--", label="Matched BN's target")
        panel.set_xscale("log", base=2)
        panel.set_xticks([v for v in VALUES if v], [str(v) for v in VALUES if v])
        panel.set_xlabel("values whose noise is injected (dots: seeds)")
        panel.set_ylabel("test accuracy, %")
        panel.set_title(task.name)


def _verdict(rows: Sequence[Row]) -> str:
    said = []
    for task in TASKS:
        means = {v: fmean(s.values()) for v in VALUES if (s := _scores(rows, task, v))}
        if not means:
            continue
        best = max(means, key=lambda values: means[values])
        difference = paired_difference(_scores(rows, task, best), _scores(rows, task, None))
        told = "that is without" if best is None else f"that of {best} values"
        against = f", {difference.signed()} against none" if best is not None and difference else ""
        said.append(f"{task.name}: {told} ({means[best]:.1f} %{against})")
    return "The best noise by the mean: " + "; ".join(said) + "." if said else ""


CLAIM = Claim(
    title="Accuracy by injected noise",
    sentence=(
        "The noise of batch statistics is a regularizer: some is better than none, too much underfits, and "
        "the same number of values is best for several nets."
    ),
    measured=(
        f"Batches of {BATCH}, rate {RATE} for a batch of 64; ResNet-8 learns {FEW.images} images for "
        f"{FEW.epochs} epochs, and {FEW.held_out} further training images test it. In every layer each "
        "channel has u with variance 1/n and s² of "
        "chi-square(n-1)/n, one draw a batch. The batch has noise of its own beside it, which is that "
        f"of {BATCH} values in the MLP. Running statistics are exact. A training that diverges scores 0. "
        f"{NO_DIFFERENCE}"
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TASKS),
    verdict=_verdict,
)
