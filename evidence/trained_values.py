"""How many values a net that is trained on should match the noise of, on the list that tunes."""

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell, name_lines
from evidence.fine_tuning import Column, Step, columns, described, score_name, trained
from evidence.lists import TUNED_FINE, FineTuning
from evidence.trained import score_of, where
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, estimate, paired_difference
from mbnorm.experiments.workers import in_processes

VALUES = (128, 1024, 8192)
FROM_SCRATCH = 128
"""What nets without trained statistics match."""


def _of(rows: Sequence[Row], values: int) -> list[Row]:
    return where(rows, matched_values=values)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    steps = [
        Step(task, "matched", rate, seed, task.lengths, values).without(_of(known, values))
        for seed in range(seeds)
        for task in TUNED_FINE
        for rate in task.rates
        for values in VALUES
    ]
    steps = [step for step in steps if step.lengths]
    for number, rows in enumerate(in_processes(_trained, steps), 1):
        for row in rows:
            tell(
                f"{number} of {len(steps)}: {row['matched_values']} values, {row['task']}, "
                f"rate {row['rate']}, {row['steps']} steps, seed {row['seed']}: {score_of(row):.1f} %, "
                f"{row['seconds']} s"
            )
            yield row


def _trained(step: Step) -> list[Row]:
    return [{"matched_values": step.matched_values} | row for row in trained(step)]


def _scores(column: Column, values: int) -> dict[int, float]:
    return {row["seed"]: score_of(row) for row in _of(column.rows, values)}


def _tables(rows: Sequence[Row]) -> list[Table]:
    return [_table(task, columns(task, rows)) for task in TUNED_FINE]


def _table(task: FineTuning, found: Sequence[Column]) -> Table:
    lines = []
    for values in VALUES:
        cells = []
        for column in found:
            scores = _scores(column, values)
            mean = mean_cell(list(scores.values()), 1, PERCENT)
            gain = paired_difference(scores, _scores(column, FROM_SCRATCH))
            cells.append(mean if values == FROM_SCRATCH else f"{mean} [{difference_cell(gain, 1)}]")
        lines.append([str(values), *cells])
    return [
        f"{task.name}: values to match; {score_name(task)}, % [against {FROM_SCRATCH}]",
        *map(str, found),
    ], lines


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for panel, task in zip(panels, TUNED_FINE, strict=True):
        for number, column in enumerate(columns(task, rows)):
            places = [place + 0.15 * (number - 1.5) for place in range(len(VALUES))]
            scores = [list(_scores(column, values).values()) for values in VALUES]
            for place, found in zip(places, scores, strict=True):
                mean = estimate(found, PERCENT)
                if mean is not None:
                    panel.hlines(place, mean.low, mean.high, color=f"C{number}")
                panel.plot(found, [place] * len(found), ".", color=f"C{number}")
            panel.plot([], [], ".", color=f"C{number}", label=str(column))
        name_lines(panel, [f"{values:,} values" for values in VALUES])
        panel.set_xlabel(f"{score_name(task)}, % (dots: seeds; lines: 95 % intervals)")
        panel.set_title(task.name)


CLAIM = Claim(
    title="How many values trained nets match",
    sentence=(
        "How many independent values Matched BN is to match the noise of in nets that are trained already, "
        "at batch 2, on data that rules may be chosen on."
    ),
    measured=(
        "Score on test images after a fine-tuning, as in `fine-tuning`: "
        f"{'. '.join(described(task) for task in TUNED_FINE)}. "
        f"All layers match as many values; {FROM_SCRATCH} is what nets that are trained from scratch have. "
        f"{NO_DIFFERENCE} A training whose loss is not finite has the score 0."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TUNED_FINE),
    seeds=3,
)
