"""Whether what a layer's noise adds to the loss says better than its effective size what to convert."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean

import torch
from matplotlib.axes import Axes
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, draw_seeds, mean_cell
from evidence.lists import CONFIRMED, MLP, TUNED, Entrant, Task, data_of
from evidence.trained import score_of, where
from mbnorm import Diagnosis, convert, diagnose
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, paired_difference
from mbnorm.experiments.grid import Run
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import fit, measured
from mbnorm.experiments.workers import preparing

VGG, SCENES = (next(task for task in TUNED if task.model == model) for model in ("vgg-small", "segment"))
CONFIRMING = replace(CONFIRMED[0], images=1000, epochs=2)
TASKS = (MLP, VGG, replace(SCENES, epochs=3), CONFIRMING)
RATE = 0.1
BATCHES = 100
"""That a net is diagnosed with."""
BY_LOSS, BY_SIZE = "half the layers, by added loss", "half the layers, by effective sample size"
NOTHING, EVERYTHING = "no layer", "all layers"
NAMES = (BY_LOSS, BY_SIZE, EVERYTHING, NOTHING)


def ranked(found: Diagnosis, name: str) -> list[str]:
    """Return the layers to convert, those that need it most first."""
    half = math.ceil(len(found.layers) / 2)
    if name == BY_LOSS:
        costs = {layer.name: -layer.cost.added for layer in found.layers if layer.cost is not None}
        return sorted(costs, key=lambda layer: costs[layer])[:half]
    if name == BY_SIZE:
        sizes = {layer.name: layer.noise.effective_values or math.inf for layer in found.layers}
        return sorted(sizes, key=lambda layer: sizes[layer])[:half]
    return [layer.name for layer in found.layers] if name == EVERYTHING else []


def trained(task: Task, name: str, seed: int) -> Row:
    """Convert some layers of an untrained net, train it, and return the row."""
    data = _data(task)
    run = Run("batch", task.setting(RATE, task.batch_size), seed)
    layers = ranked(_diagnosed(task, seed), name)
    with preparing(task.model):
        model = Entrant("batch").net(run, data)
        modules = dict(model.named_modules())
        for layer in layers:
            convert(modules[layer], "matched")
        loss = fit(model, run, data)
        scores = measured(model, data)
    status = "ok" if math.isfinite(loss) else "diverged"
    return {"task": task.name, "name": name, "seed": seed, "status": status, **scores, "layers": layers}


@cache
def _diagnosed(task: Task, seed: int) -> Diagnosis:
    """Train the net for an epoch with batch norm, and diagnose it."""
    data = _data(task)
    run = Run("batch", replace(task, epochs=1).setting(RATE, task.batch_size), seed)
    with preparing(task.model):
        model = Entrant("batch").net(run, data)
        fit(model, run, data)
        draws = torch.Generator().manual_seed(seed)
        indices = one_epoch("shuffled", data.train_targets, task.batch_size, draws)[:BATCHES]
        batches = [(data.train_inputs[index], data.train_targets[index]) for index in indices]
        return diagnose(model, batches, loss=lambda output, batch: F.cross_entropy(output, batch[1]))


def _data(task: Task) -> Data:
    return data_of(task, "report" if task == CONFIRMING else "choice")


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for task in TASKS:
            for name in NAMES:
                if where(known, task=task.name, name=name, seed=seed):
                    continue
                row = trained(task, name, seed)
                tell(f"{task.name}, {name}, seed {seed}: {score_of(row):.1f} %: {', '.join(row['layers'])}")
                yield row


def _scores(rows: Sequence[Row], task: Task, name: str) -> dict[int, float]:
    return {row["seed"]: score_of(row) for row in where(rows, task=task.name, name=name)}


def _shared(rows: Sequence[Row], task: Task) -> str:
    """Return how many of the layers both rankings convert, of how many."""
    chosen = [where(rows, task=task.name, name=name) for name in (BY_LOSS, BY_SIZE)]
    pairs = [
        (a["layers"], b["layers"])
        for a, b in zip(*(sorted(found, key=lambda row: int(row["seed"])) for found in chosen), strict=False)
    ]
    if not pairs:
        return "-"
    return f"{fmean(len(set(a) & set(b)) for a, b in pairs):.1f} of {len(pairs[0][0])}"


def _tables(rows: Sequence[Row]) -> list[Table]:
    headings = ["score, % [by size against by loss]", *NAMES, "in both halves"]
    lines = []
    for task in TASKS:
        name = f"{task.name} (confirming)" if task == CONFIRMING else task.name
        cells = [mean_cell(list(_scores(rows, task, one).values()), 1, PERCENT) for one in NAMES]
        difference = paired_difference(_scores(rows, task, BY_SIZE), _scores(rows, task, BY_LOSS))
        cells[1] += f" [{difference_cell(difference, 1)}]"
        lines.append([name, *cells, _shared(rows, task)])
    return [(headings, lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for task, panel in zip(TASKS, panels, strict=True):
        draw_seeds(panel, {name: list(_scores(rows, task, name).values()) for name in NAMES})
        panel.set_xlabel("score, % (dots: seeds; bars: 95 % interval of the mean)")
        panel.set_title(task.name)


CLAIM = Claim(
    title="Which layers to convert",
    sentence=(
        "To convert the layers whose noise adds most to the loss does better than to convert those of the "
        "smallest effective sample size."
    ),
    measured=(
        f"Batches of 2, rate {RATE} for a batch of 64, fixed beforehand. `diagnose` looks with a loss and "
        f"{BATCHES} batches at a net that batch norm has trained for an epoch. In the untrained net half the "
        "layers become Matched BN, without centered filters, and the others stay batch norm. Scores are "
        "those of held-out training images, and of the test images in the "
        f"confirming task, which was run once. Scenes learn for {TASKS[2].epochs} epochs, and Fashion-MNIST "
        f"{CONFIRMING.images} images for {CONFIRMING.epochs}. {NO_DIFFERENCE}"
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TASKS),
    seeds=3,
)
