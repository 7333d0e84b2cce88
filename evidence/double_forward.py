"""Where Double-Forward might gain accuracy: long memories, high rates, accumulation, batch 1, fine-tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from matplotlib.axes import Axes
from torch import nn
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell, name_lines
from evidence.trained import by_seed, where
from mbnorm import DoubleForward, convert
from mbnorm.experiments.data import Data, load
from mbnorm.experiments.estimates import NO_DIFFERENCE, NOT_NEGATIVE, PERCENT, estimate
from mbnorm.experiments.models import build
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import FIRST_FORWARD, MOMENTUM, RATE_DROPS, WEIGHT_DECAY, logits_of

NAMES = ("without", "with")


@dataclass(frozen=True)
class Case:
    """A training of the MLP on digits with memorized layers.

    Attributes:
        batch_size: samples of a forward.
        memory_size: batches remembered.
        lr: learning rate of a step.
        epochs: passes over the training images.
        accumulated: forwards before a step.
        pretrained: whether batch norm has learned the same images turned by 90 degrees before.
    """

    batch_size: int
    memory_size: int
    lr: float
    epochs: int = 2
    accumulated: int = 1
    pretrained: bool = False

    def __str__(self) -> str:
        words = f"batches of {self.batch_size}, memory of {self.memory_size}, lr {self.lr:g}"
        if self.accumulated > 1:
            words += f", {self.accumulated} forwards a step"
        return words + (", fine-tuned" if self.pretrained else "")


CASES = (
    Case(2, 64, 0.0125),
    Case(2, 64, 0.05),
    Case(2, 256, 0.0125),
    Case(2, 256, 0.05),
    Case(8, 64, 0.05),
    Case(8, 64, 0.2),
    Case(2, 64, 0.1, epochs=4, accumulated=8),
    Case(2, 8, 0.1, epochs=4, accumulated=8),
    Case(1, 128, 0.00625),
    Case(1, 128, 0.025),
    Case(2, 64, 0.003125, epochs=1, pretrained=True),
    Case(2, 64, 0.025, epochs=1, pretrained=True),
)
PRETRAINING = Case(64, 1, 0.1, epochs=6)


def _fit(model: nn.Module, data: Data, case: Case, draws: torch.Generator, *, double_forward: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), case.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    if double_forward:
        DoubleForward(model, optimizer)
    if case.batch_size == 1:
        # a single value has no variance: there must be a past to blend it with
        with torch.no_grad():
            model.train()(data.train_inputs[:FIRST_FORWARD])
    epochs = [one_epoch("shuffled", data.train_targets, case.batch_size, draws) for _ in range(case.epochs)]
    batches = torch.cat(epochs)
    drops = {int(share * len(batches)) for share in RATE_DROPS}
    for number, batch in enumerate(batches):
        if number in drops:
            optimizer.param_groups[0]["lr"] *= 0.1
        loss = F.cross_entropy(model(data.train_inputs[batch]), data.train_targets[batch])
        (loss / case.accumulated).backward()  # type: ignore[no-untyped-call]
        if (number + 1) % case.accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()


def outcome(case: Case, seed: int, *, double_forward: bool) -> dict[str, float]:
    """Train once; return the test accuracy in percent and the eval-mode loss on the training images."""
    data, draws = load("digits"), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build("mlp", data)
    if case.pretrained:
        turned = torch.rot90(data.train_inputs, dims=(2, 3))
        _fit(model, data._replace(train_inputs=turned), PRETRAINING, draws, double_forward=False)
    convert(model, "memorized", memory_size=case.memory_size)
    _fit(model, data, case, draws, double_forward=double_forward)
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(logits_of(model, data.train_inputs), data.train_targets)
        right = logits_of(model, data.test_inputs).argmax(1) == data.test_targets
    return {"accuracy": 100 * right.float().mean().item(), "loss": loss.item()}


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for case in CASES:
            for name in NAMES:
                of = {**asdict(case), "double_forward": name, "seed": seed}
                if where(known, **of):
                    continue
                found = outcome(case, seed, double_forward=name == "with")
                tell(f"{case}, {name}, seed {seed}: {found['accuracy']:.1f} %")
                yield {**of, **found}


def _values(rows: Sequence[Row], case: Case, name: str, key: str) -> dict[int, float]:
    return by_seed(where(rows, **asdict(case), double_forward=name), key)


def _gains(rows: Sequence[Row], case: Case) -> dict[int, float]:
    """Return the points of accuracy that Double-Forward adds, seed by seed."""
    without, with_it = (_values(rows, case, name, "accuracy") for name in NAMES)
    return {seed: with_it[seed] - without[seed] for seed in without}


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = [
        [
            str(case),
            *(mean_cell(list(_values(rows, case, name, "accuracy").values()), 1, PERCENT) for name in NAMES),
            difference_cell(estimate(list(_gains(rows, case).values())), 1),
            *(mean_cell(list(_values(rows, case, name, "loss").values()), 3, NOT_NEGATIVE) for name in NAMES),
        ]
        for case in CASES
    ]
    gains = [_gains(rows, case) for case in CASES]
    overall = [fmean(of_case[seed] for of_case in gains) for seed in gains[0]]
    lines.append(["mean", "", "", difference_cell(estimate(overall), 1), "", ""])
    headings = ["setting", "without, %", "with, %", "gain, points", "loss without", "loss with"]
    return [(headings, lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for height, case in enumerate(CASES):
        gains = list(_gains(rows, case).values())
        panel.plot(gains, [height] * len(gains), "o", color="#9ecae1")
        panel.plot([fmean(gains)], [height], "k|", markersize=14, label="mean" if height == 0 else None)
    panel.axvline(0, color="#c62828", linewidth=1)
    name_lines(panel, [str(case) for case in CASES])
    panel.set_xlabel("points of test accuracy that Double-Forward adds, a dot a seed")


CLAIM = Claim(
    title="Gain of Double-Forward",
    sentence="Double-Forward gains accuracy where memories are long, rates high or batches accumulated.",
    measured=(
        "Test accuracy of the MLP on digits with memorized layers, without and with Double-Forward from the "
        "same weights and on the same batches, and the loss of eval mode on the training images. Gains are "
        f"taken seed by seed. {NO_DIFFERENCE} Fine-tuned: batch norm has learned the same images turned by "
        f"90 degrees in {PRETRAINING.epochs} epochs of batches of {PRETRAINING.batch_size}, then its layers "
        "are converted."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
