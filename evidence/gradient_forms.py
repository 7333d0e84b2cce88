"""Other ways to remember what the backward pass takes out of a gradient, beside the one that is shipped."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.rows import Row
from evidence.arena import Step, trained
from evidence.claim import Claim, Table, Tell, difference_cell, draw_seeds, mean_cell
from evidence.lists import MLP, TUNED, Entrant, Task
from evidence.trained import score_of, where
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, paired_difference
from mbnorm.experiments.workers import in_processes
from mbnorm.functional import KernelRun
from mbnorm.measures import EARLY, MEASURED_WEIGHT

SHIPPED = "averaged, a quarter as long"
VGG, SCENES = (next(task for task in TUNED if task.model == model) for model in ("vgg-small", "segment"))
TASKS = (MLP, VGG, SCENES)
RATE = 0.1
OURS = Entrant("matched", None, (("gradient", "remembered"), ("center_filters", True), ("by_values", 128)))
"""With the rule that the form was chosen for."""


class Pass(NamedTuple):
    """A backward pass through a layer.

    Attributes:
        dy: gradient of the output.
        z: normalized input.
        past: what is remembered of the two means, shape (2, C).
        own: the means over this batch, as well.
        batch_weight: a.
        layer: a tensor that is the layer's own, for what else there is to remember.
    """

    dy: Tensor
    z: Tensor
    past: Tensor
    own: Tensor
    batch_weight: Tensor
    layer: Tensor


Form: TypeAlias = Callable[[Pass], Tensor]
"""What to take out of a gradient, and to remember: shape (2, C)."""


def _averaged(weight: Callable[[Pass], Tensor]) -> Form:
    return lambda at: torch.lerp(at.past, at.own, weight(at))


def _integral(at: Pass) -> Tensor:
    """Accumulate what is left of the two means after they have been taken out."""
    axes = [axis for axis in range(at.z.dim()) if axis != 1]
    mean, scale = at.past
    z_mean, z_square = at.z.mean(axes), at.z.square().mean(axes)
    left = at.own - torch.stack((mean + scale * z_mean, mean * z_mean + scale * z_square))
    return at.past + at.batch_weight * left


def _measured(at: Pass) -> Tensor:
    """Weigh for the least error, by the noise of a batch's mean of dy and the error of the memory's.

    Both are measured as the forward's are, in units of the variance of dy.
    """
    state: Any = at.layer
    n = at.dy.numel() // at.dy.size(1)
    own, past = at.own[0], at.past[0]
    axes = [axis for axis in range(at.dy.dim()) if axis != 1]
    power = at.dy.var(axes, correction=0) + (own - past).square()
    if not hasattr(state, "measured"):
        state.measured = own, 1.0, 1.0, 0
        return at.batch_weight
    last, ratio, error, samples = state.measured
    weight = max(MEASURED_WEIGHT, EARLY / (samples + EARLY))
    live = power > 0
    step, distance = (
        float(((own - then).square() / power)[live].mean()) if live.any() else 0.0 for then in (last, past)
    )
    ratio += weight * (step * n / 2 - ratio)
    error += weight * (distance - step / 2 - error)
    state.measured = own, ratio, error, samples + 1
    noise = min(max(ratio, 1.0) / n, 1.0)
    return own.new_tensor(max(error, 0.0) / (noise + max(error, 0.0)))


def _power(power: int) -> Form:
    return _averaged(lambda at: 1 - (1 - at.batch_weight) ** power)


FORMS: dict[str, Form] = {
    SHIPPED: _power(4),
    "averaged, as long a memory": _power(1),
    "averaged, half as long": _power(2),
    "averaged, an eighth as long": _power(8),
    "averaged, four times as long": _averaged(lambda at: at.batch_weight / 4),
    "averaged, measured weight": _averaged(_measured),
    "nothing remembered": _averaged(lambda at: torch.ones_like(at.batch_weight)),
    "integral, as long a memory": _integral,
    "integral, a quarter as long": lambda at: _integral(
        at._replace(batch_weight=1 - (1 - at.batch_weight) ** 4)
    ),
}


@contextmanager
def remembering(form: Form) -> Iterator[None]:
    """Let all layers remember their gradients in another way."""
    swapped: Any = KernelRun
    own_backward = KernelRun.backward

    def backward(run: KernelRun, dy: Tensor, x: Tensor, weight: Tensor | None, *others: Any) -> Any:
        memory = run.gradient
        if memory is None or torch.is_grad_enabled():
            return own_backward(run, dy, x, weight, *others)
        _, dw, db = run.kernels.backward(dy, x, weight, run.rows, run.variance_rule, run.eps, False)
        shape = [1, -1] + [1] * (x.dim() - 2)
        rstd = torch.rsqrt(run.rows[3] + run.eps).view(shape)
        z = (x - run.rows[2].view(shape)) * rstd
        own = torch.stack((db, dw)) / (x.numel() // x.shape[1])
        taken = form(Pass(dy, z, memory.read(run.rows[-1])[:2], own, run.rows[-1], memory._mean))
        memory._mean.copy_(taken[0])
        memory._scale.copy_(taken[1])
        dx = (dy - taken[0].view(shape) - z * taken[1].view(shape)) * rstd
        return (dx if weight is None else dx * weight.view(shape)), dw, db

    swapped.backward = backward
    try:
        yield
    finally:
        swapped.backward = own_backward


def _trained(step: tuple[str, Task, int]) -> Row:
    name, task, seed = step
    start = time.perf_counter()
    with remembering(FORMS[name]):
        row = trained(Step(task, OURS, RATE, seed, "choice"))
    return {"form": name, **row, "seconds": round(time.perf_counter() - start, 1)}


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    steps = [
        (name, task, seed)
        for task in TASKS
        for seed in range(seeds)
        for name in FORMS
        if not where(known, form=name, task=task.name, seed=seed)
    ]
    for number, row in enumerate(in_processes(_trained, steps), 1):
        tell(f"{number} of {len(steps)}: {row['form']}, {row['task']}: {score_of(row):.1f} %")
        yield row


def _scores(rows: Sequence[Row], name: str, task: Task) -> dict[int, float]:
    return {row["seed"]: score_of(row) for row in where(rows, form=name, task=task.name)}


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for name in FORMS:
        cells = []
        for task in TASKS:
            scores = _scores(rows, name, task)
            mean = mean_cell(list(scores.values()), 1, PERCENT)
            difference = paired_difference(scores, _scores(rows, SHIPPED, task))
            cells.append(mean if name == SHIPPED else f"{mean} [{difference_cell(difference, 1)}]")
        lines.append([name, *cells])
    return [(["score, % [against the first]", *(task.name for task in TASKS)], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for task, panel in zip(TASKS, panels, strict=True):
        draw_seeds(panel, {name: list(_scores(rows, name, task).values()) for name in FORMS})
        panel.set_xlabel(
            "score on held-out training images, % (dots: seeds; bars: 95 % interval of the mean)"
        )
        panel.set_title(task.name)


def _verdict(rows: Sequence[Row]) -> str:
    means = {
        name: [fmean(scores.values()) for task in TASKS if (scores := _scores(rows, name, task))]
        for name in FORMS
    }
    whole = {name: fmean(found) for name, found in means.items() if len(found) == len(TASKS)}
    if len(whole) < len(FORMS):
        return ""
    ordered = sorted(whole.items(), key=lambda item: -item[1])
    return "Mean score over the tasks: " + "; ".join(f"{name} {mean:.1f}" for name, mean in ordered) + "."


CLAIM = Claim(
    title="Ways to remember the gradient",
    sentence=(
        "Ways to remember the two means that the backward pass subtracts from a gradient. The first is the "
        "default."
    ),
    measured=(
        f"`{OURS}` at batch 2 and the rate {RATE} for a batch of 64, measured on training images that no "
        "training sees. Lengths are relative to the forward's memory: with the fourth power of its history "
        "weight an average is a quarter as long. The integral form accumulates what is left of both means "
        "once they have been subtracted. The measured weight is the one of least error, from the noise of a "
        "batch's mean of the gradient and the error of the remembered one, both measured as the forward pass "
        f"measures its own. {NO_DIFFERENCE}"
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=len(TASKS),
    verdict=_verdict,
    seeds=3,
)
