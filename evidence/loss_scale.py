"""Whether a remembered gradient minds a loss scale that grows and backs off."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell, name_lines
from evidence.lists import MLP, Entrant, data_of
from evidence.trained import where
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, paired_difference
from mbnorm.experiments.grid import Run
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import MOMENTUM, measured

RATE = 0.1


class Scale(NamedTuple):
    """How a loss is scaled: as `torch.amp.GradScaler` does from ``first`` on, or not at all."""

    first: float = 1.0
    interval: int | None = None


SCALES = {
    "none": Scale(),
    "torch's own: from 2^16, doubled after 2000 steps": Scale(2.0**16, 2000),
    "from 2^16, doubled after 50 steps": Scale(2.0**16, 50),
    "from 2^110, doubled after 50 steps, until it overflows and is halved": Scale(2.0**110, 50),
}


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for name, scale in SCALES.items():
            if not where(known, name=name, seed=seed):
                row = {"name": name, "seed": seed, **_trained(scale, seed)}
                tell(f"{name}, seed {seed}: {row['accuracy']:.1f} %, {row['skipped']} steps skipped")
                yield row


def _trained(scale: Scale, seed: int) -> Row:
    """Train the MLP of six layers with Matched BN, and return its accuracy and how many steps overflowed."""
    data, setting = data_of(MLP, "report"), MLP.setting(RATE, MLP.batch_size)
    model = Entrant("matched").net(Run("matched", setting, seed), data)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=MOMENTUM)
    enabled = scale.interval is not None
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale.first, growth_interval=scale.interval or 1, enabled=enabled
    )
    draws = torch.Generator().manual_seed(seed)
    skipped = 0
    model.train()
    for _ in range(setting.epochs):
        for batch in one_epoch(setting.sampling, data.train_targets, setting.batch_size, draws):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_inputs[batch]), data.train_targets[batch])
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            skipped += scaler.get_scale() < before
    return {"skipped": skipped, **measured(model, data)}


def _scores(rows: Sequence[Row], name: str) -> dict[int, float]:
    return {row["seed"]: row["accuracy"] for row in where(rows, name=name)}


def _tables(rows: Sequence[Row]) -> list[Table]:
    plain = _scores(rows, "none")
    lines = []
    for name in SCALES:
        scores = _scores(rows, name)
        difference = "-" if name == "none" else difference_cell(paired_difference(scores, plain), 1)
        skipped = [row["skipped"] for row in where(rows, name=name)]
        lines.append([name, mean_cell(list(scores.values()), 1, PERCENT), difference, f"{sum(skipped)}"])
    return [(["loss scale", "accuracy, %", "against none", "steps skipped, all seeds"], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for place, name in enumerate(SCALES):
        scores = list(_scores(rows, name).values())
        panel.plot(scores, [place] * len(scores), "o", color="C0")
    name_lines(panel, list(SCALES))
    panel.set_xlabel("test accuracy of each seed, %")


CLAIM = Claim(
    title="Loss scale",
    sentence=(
        "A loss scale that grows and backs off costs a remembered gradient nothing, though its units change."
    ),
    measured=(
        f"The MLP of six layers on digits with Matched BN at batch {MLP.batch_size}, {MLP.epochs} epochs at "
        f"rate {RATE} for a batch of 64, under torch.amp.GradScaler in float32. What the backward pass "
        "remembers is in units of the scaled loss, so a change of the scale makes it too small or too large "
        "until it has followed. A step that overflows is skipped, and is not remembered. " + NO_DIFFERENCE
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
