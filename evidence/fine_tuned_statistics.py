"""What fine-tuned nets are evaluated with."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from torch import nn

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell, name_lines
from evidence.fine_tuning import Column, Step, columns, described, score_name, trained
from evidence.lists import TUNED_FINE, FineTuning
from evidence.trained import score_of, where
from mbnorm import recalibrate
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, estimate, paired_difference
from mbnorm.experiments.methods import Method, in_random_order
from mbnorm.experiments.training import measured
from mbnorm.experiments.workers import in_processes
from mbnorm.layers import MatchedBatchNorm1d, MatchedBatchNorm2d, MatchedBatchNorm3d

MATCHED = (MatchedBatchNorm1d, MatchedBatchNorm2d, MatchedBatchNorm3d)


class Variant(NamedTuple):
    """What a net is fine-tuned with, and what it is evaluated with."""

    method: Method
    statistics: str

    def __str__(self) -> str:
        return f"{self.method}: {self.statistics}"

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of this variant."""
        return where(rows, **self._asdict())


METHODS: tuple[Method, ...] = ("batch", "matched")
AS_CONVERTED = Variant("matched", "running")
VARIANTS = (
    *(Variant("batch", statistics) for statistics in ("running", "exact")),
    *(Variant("matched", statistics) for statistics in ("running", "memory", "exact")),
)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    steps = [
        Step(task, method, rate, seed, task.lengths).without(Variant(method, "running").of(known))
        for seed in range(seeds)
        for task in TUNED_FINE
        for method in METHODS
        for rate in task.rates
    ]
    steps = [step for step in steps if step.lengths]
    for number, rows in enumerate(in_processes(partial(trained, measure=_in_all_ways), steps), 1):
        for row in rows:
            tell(
                f"{number} of {len(steps)}: {row['method']}, {row['statistics']}, "
                f"{row['task']}, rate {row['rate']}, {row['steps']} steps, seed {row['seed']}: "
                f"{score_of(row):.1f} %, {row['seconds']} s"
            )
            yield row


def _in_all_ways(model: nn.Module, data: Data) -> list[Row]:
    """Return the scores with each kind of statistics in eval mode."""
    rows = [{"statistics": "running"} | measured(model, data)]
    other = copy.deepcopy(model)
    remembering = [layer for layer in other.modules() if isinstance(layer, MATCHED)]
    for layer in remembering:
        layer.averages.mean.copy_(layer.state[0])
        layer.averages.var.copy_(layer.state[1])
    if remembering:
        rows.append({"statistics": "memory"} | measured(other, data))
    recalibrate(other, in_random_order(data.train_inputs))
    return [*rows, {"statistics": "exact"} | measured(other, data)]


def _scores(column: Column, variant: Variant) -> dict[int, float]:
    return {row["seed"]: score_of(row) for row in variant.of(column.rows)}


def _tables(rows: Sequence[Row]) -> list[Table]:
    return [_table(task, rows) for task in TUNED_FINE]


def _table(task: FineTuning, rows: Sequence[Row]) -> Table:
    lines, found = [], columns(task, rows)
    for variant in VARIANTS:
        cells = []
        for column in found:
            scores = _scores(column, variant)
            mean = mean_cell(list(scores.values()), 1, PERCENT)
            gain = paired_difference(scores, _scores(column, AS_CONVERTED))
            cells.append(mean if variant == AS_CONVERTED else f"{mean} [{difference_cell(gain, 1)}]")
        lines.append([str(variant), *cells])
    return [f"{task.name}: {score_name(task)}, % [against {AS_CONVERTED}]", *map(str, found)], lines


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for panel, task in zip(panels, TUNED_FINE, strict=True):
        for number, column in enumerate(columns(task, rows)):
            for place, variant in enumerate(VARIANTS):
                scores = list(_scores(column, variant).values())
                y, mean = place + 0.15 * (number - 1.5), estimate(scores, PERCENT)
                if mean is not None:
                    panel.hlines(y, mean.low, mean.high, color=f"C{number}")
                panel.plot(scores, [y] * len(scores), ".", color=f"C{number}")
            panel.plot([], [], ".", color=f"C{number}", label=str(column))
        name_lines(panel, [str(variant) for variant in VARIANTS])
        panel.set_xlabel(f"{score_name(task)}, % (dots: seeds; lines: 95 % intervals)")
        panel.set_title(task.name)


CLAIM = Claim(
    title="What fine-tuned nets are evaluated with",
    sentence=(
        "After a fine-tuning at batch 2 and a constant rate running statistics are stale, and exact ones "
        "gain."
    ),
    measured=(
        "Score on test images after a fine-tuning, as in `fine-tuning`: "
        f"{'. '.join(described(task) for task in TUNED_FINE)}. Eval mode uses the running statistics, which "
        "with Matched BN average some 150 batches; or the statistics of the memory; or the exact ones of the "
        "training images, as `recalibrate` sets them. matched is what `convert` makes. "
        f"{NO_DIFFERENCE} A training whose loss is not finite has the score 0."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TUNED_FINE),
    seeds=3,
)
