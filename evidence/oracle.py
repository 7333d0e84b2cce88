"""What a perfect memory gains if only the forward pass has it."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, draw_seeds, mean_cell
from evidence.lists import MLP, Entrant, data_of
from evidence.rule import matched
from evidence.trained import loss_cell, score_of, where
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, paired_difference
from mbnorm.experiments.grid import Run
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import MOMENTUM, RATE_DROPS, WEIGHT_DECAY, fit, measured

OWN, LARGE = 2, 32
"""Images whose loss is taken, and those that each layer's statistics are of."""
THROUGH, CONSTANT = "oracle, gradient through all", "oracle, the others constant"
ORACLES = (THROUGH, CONSTANT)
ENTRANTS = {
    "batch norm at 2": Entrant("batch"),
    "batch norm at 32": Entrant("batch", LARGE),
    "matched, exact": matched("exact", 32),
    "matched, remembered": matched("remembered", 32),
}
NAMES = (*ORACLES, *ENTRANTS)
RATE = 0.1


class OthersConstant(nn.Module):
    """Let gradients through for the first samples of a batch alone, and normalize with all of it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch of vectors."""
        if self.training:
            x = torch.cat([x[:OWN], x[OWN:].detach()])
        normalized: Tensor = self.norm(x)
        return normalized


def _oracle(seed: int, name: str, data: Data) -> tuple[nn.Module, float]:
    """Train on batches of two whose statistics are those of 32 images, drawn anew at each step."""
    setting = MLP.setting(RATE, OWN)
    model = Entrant("batch").net(Run("batch", setting, seed), data)
    assert isinstance(model, nn.Sequential)
    if name == CONSTANT:
        for index, layer in enumerate(model):
            if isinstance(layer, nn.BatchNorm1d):
                model[index] = OthersConstant(layer)
    optimizer = torch.optim.SGD(
        model.parameters(), setting.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )
    draws = torch.Generator().manual_seed(seed)
    epochs = [one_epoch("shuffled", data.train_targets, OWN, draws) for _ in range(setting.epochs)]
    batches = torch.cat(epochs)
    others = torch.Generator().manual_seed(1000 + seed)
    drops = {int(part * len(batches)) for part in RATE_DROPS}
    loss = torch.zeros(())
    for number, batch in enumerate(batches):
        if number in drops:
            optimizer.param_groups[0]["lr"] *= 0.1
        beside = torch.randint(len(data.train_inputs), (LARGE - OWN,), generator=others)
        optimizer.zero_grad()
        logits = model(data.train_inputs[torch.cat([batch, beside])])[:OWN]
        step_loss = F.cross_entropy(logits, data.train_targets[batch])
        step_loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if number >= len(batches) - len(epochs[-1]):
            loss += step_loss.detach()
    return model, loss.item() / len(epochs[-1])


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    data = data_of(MLP, "report")
    for seed in range(seeds):
        for name in NAMES:
            if where(known, name=name, seed=seed):
                continue
            start = time.perf_counter()
            if name in ORACLES:
                model, loss = _oracle(seed, name, data)
            else:
                entrant = ENTRANTS[name]
                run = Run(entrant.method, MLP.setting(RATE, entrant.batch_size or OWN), seed)
                model = entrant.net(run, data)
                loss = fit(model, run, data)
            finite = math.isfinite(loss)
            row: Row = {"name": name, "seed": seed, "status": "ok" if finite else "diverged"}
            row |= {"train_loss": loss if finite else None, **measured(model, data)}
            tell(f"{name}, seed {seed}: {score_of(row):.1f} %, {time.perf_counter() - start:.1f} s")
            yield row


def _scores(rows: Sequence[Row], name: str) -> dict[int, float]:
    return {row["seed"]: score_of(row) for row in where(rows, name=name)}


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for name in NAMES:
        scores = _scores(rows, name)
        difference = paired_difference(scores, _scores(rows, THROUGH))
        lines.append(
            [
                name,
                mean_cell(list(scores.values()), 1, PERCENT),
                "-" if name == THROUGH else difference_cell(difference, 1),
                loss_cell(where(rows, name=name), "train_loss"),
            ]
        )
    return [(["batches of 2", "accuracy, %", f"against {THROUGH}", "training loss"], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    draw_seeds(panel, {name: list(_scores(rows, name).values()) for name in NAMES})
    panel.set_xlabel("test accuracy, % (dots: seeds; bars: 95 % interval of the mean)")


CLAIM = Claim(
    title="A perfect memory",
    sentence=(
        "A memory without any staleness helps a batch of 2 much less if only the forward pass has it: the "
        "backward pass needs batch norm's two means of the gradient from more than two images, too."
    ),
    measured=(
        f"{MLP.name}, batches of {OWN}, rate {RATE} for a batch of 64. The oracle normalizes each batch with "
        f"the statistics of {LARGE} images under the present weights, its own and {LARGE - OWN} of the "
        "training images, drawn anew, and takes the loss of its own. The gradient goes through all of them, "
        "or the others are constants, as a memory's past is. The training loss is that of the last epoch. "
        f"{NO_DIFFERENCE}"
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
