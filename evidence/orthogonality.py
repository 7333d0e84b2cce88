"""How much of a gradient lies along a shift and a scale of a layer's input."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, mean_cell
from evidence.lists import MLP, Entrant, data_of
from evidence.rule import matched
from evidence.trained import where
from mbnorm.experiments.estimates import PERCENT
from mbnorm.experiments.grid import Run
from mbnorm.experiments.training import fit

ENTRANTS = {
    "batch norm at 2": Entrant("batch"),
    "batch norm at 32": Entrant("batch", 32),
    "matched, exact": matched("exact", 32),
    "matched, remembered": matched("remembered", 32),
}
RATE = 0.1
IMAGES_TOGETHER = 100
"""Gradients of so many images at least are added up before their parts are taken."""
PARTS = ("shift", "scale")


class Shares:
    r"""The shares of a layer's input gradients, of many batches together, along a shift and a scale.

    With dx the gradient of a channel's values x over all batches, and z these normalized by all of them,

    .. math:: \frac{(\sum dx)^2}{n \sum dx^2}, \qquad \frac{(\sum dx\,z)^2}{n \sum dx^2}

    Both are 0 for a gradient that batch norm takes of them as one batch, and 1 for one that is nothing else.
    """

    def __init__(self, layer: nn.Module, together: int) -> None:
        self.together = together
        self.found: list[tuple[float, float]] = []
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor] = []
        layer.register_forward_pre_hook(self._note)

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer.training and inputs[0].requires_grad:
            values = inputs[0].detach()
            inputs[0].register_hook(lambda dx: self._add(values, dx))

    def _add(self, x: Tensor, dx: Tensor) -> None:
        self._inputs.append(x.movedim(1, -1).flatten(0, -2))
        self._gradients.append(dx.movedim(1, -1).flatten(0, -2))
        if sum(map(len, self._inputs)) < self.together:
            return
        x, dx = torch.cat(self._inputs).double(), torch.cat(self._gradients).double()
        self._inputs, self._gradients = [], []
        var, mean = torch.var_mean(x, 0, correction=0)
        z = (x - mean) / (var + 1e-5).sqrt()
        power = len(dx) * dx.square().sum(0)
        live = power > 0
        shares = [(along.sum(0).square()[live] / power[live]).mean().item() for along in (dx, dx * z)]
        if live.any():
            self.found.append((shares[0], shares[1]))


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    data = data_of(MLP, "report")
    for seed in range(seeds):
        for name, entrant in ENTRANTS.items():
            if where(known, name=name, seed=seed):
                continue
            batch_size = entrant.batch_size or MLP.batch_size
            run = Run(entrant.method, MLP.setting(RATE, batch_size), seed)
            model = entrant.net(run, data)
            layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
            shares = [Shares(layer, IMAGES_TOGETHER) for layer in layers]
            fit(model, run, data)
            row: Row = {"name": name, "seed": seed}
            for index, part in enumerate(PARTS):
                of_layers = [[found[index] for found in layer.found] for layer in shares]
                row[part] = [100 * sum(of) / len(of) for of in of_layers]
            tell(
                f"{name}, seed {seed}: {', '.join(f'{value:.1f}' for value in row['shift'])} % along a shift"
            )
            yield row


def _of_all(rows: Sequence[Row], name: str, part: str) -> list[float]:
    """Return the mean over the layers, for each seed."""
    return [sum(row[part]) / len(row[part]) for row in where(rows, name=name)]


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = [
        [name, *(mean_cell(_of_all(rows, name, part), 1, PERCENT) for part in PARTS)] for name in ENTRANTS
    ]
    return [(["", *(f"along a {part}, %" for part in PARTS)], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for panel, part in zip(panels, PARTS, strict=True):
        for number, name in enumerate(ENTRANTS):
            found = [row[part] for row in where(rows, name=name)]
            if found:
                means = [sum(of) / len(of) for of in zip(*found, strict=True)]
                panel.plot(range(1, len(means) + 1), means, "o-", color=f"C{number}", label=name)
        panel.set_xlabel("batch norm, from the input on")
        panel.set_ylabel(f"share of the gradient along a {part}, %")


CLAIM = Claim(
    title="Direction of the gradient",
    sentence=(
        "Batch norm's gradient has no part along a shift or a scale of its input. A memory that only the "
        "forward pass reads leaves such a part; remembered means of the gradient take most of it out."
    ),
    measured=(
        f"{MLP.name}, rate {RATE} for a batch of 64: the gradients of the inputs of each batch norm over "
        f"{IMAGES_TOGETHER} images or the next whole batch, while the weights change. Shares of their power "
        "that lie along a constant, and along the inputs themselves; of independent numbers about 1 % would. "
        "Means over the training, the channels and the layers."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=2,
)
