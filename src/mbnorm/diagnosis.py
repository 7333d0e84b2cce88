"""What `diagnose` finds: a record a layer and one of the model, as a table and as JSON."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from mbnorm.noise import Noise
from mbnorm.noise_cost import NoiseCost

MOST = 3
"""How many layers are named of those whose noise adds most to the loss."""
ITSELF = "(the model itself)"
"""The name of a batch norm that is no layer of a model."""

Verdict: TypeAlias = Literal["fine", "noisy", "stale", "dead", "exploding"]
Recommendation: TypeAlias = Literal["none", "matched", "recalibrate"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """What `diagnose` found of one layer.

    Attributes:
        name: the layer's name in the model.
        kind: its type.
        noise: what was measured.
        verdict: the first that applies: "exploding" or "dead" if channels are; "noisy" if fewer than 32
            effective values normalize a batch, or 16 with a memory; "stale" if the running statistics have a
            larger error than those of 32 values; else "fine".
        recommendation: "matched", which `mbnorm.convert` makes of all layers; "recalibrate", for
            `mbnorm.recalibrate`; or "none".
        ideal_batch_size: the size of shuffled batches that this layer needs no memory for; None if it is not
            noisy.
        stale: whether the running statistics are stale, whatever the verdict.
        reason: the finding in words.
        cost: what this layer's noise adds to the loss by itself; None without a loss, or if it is frozen.
    """

    name: str
    kind: str
    noise: Noise
    verdict: Verdict
    recommendation: Recommendation
    ideal_batch_size: int | None
    stale: bool
    reason: str
    cost: NoiseCost | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found of a model; ``print`` it.

    Attributes:
        layers: in the model's order.
        unreached: names of the layers that no forward has reached.
        recommendation: for the whole model: "matched" if a layer needs it, else "recalibrate", else "none".
        ideal_batch_size: the largest that a layer needs; None if none does.
        stale: whether to `mbnorm.recalibrate` before evaluating this net as it is, whatever is recommended
            for its training: a layer is stale, and exact statistics bring the outputs of eval mode closer to
            those of train mode, in the mean over layers.
        reason: in words.
        loss: without noise; None if none was given.
        cost: what the noise of all layers together adds to it; None without a loss.
    """

    layers: tuple[LayerDiagnosis, ...]
    unreached: tuple[str, ...]
    recommendation: Recommendation
    ideal_batch_size: int | None
    stale: bool
    reason: str
    loss: float | None = None
    cost: NoiseCost | None = None

    def __str__(self) -> str:
        rows = [[column.cell(layer) for column in _COLUMNS] for layer in self.layers]
        says = [
            not column.meaning or not set(cells) <= {"-", "0", "none"}
            for column, cells in zip(_COLUMNS, zip(*rows, strict=True), strict=True)
        ]
        # of layers without a memory it would repeat the column before it
        says[_N_USED] = any(row[_N_USED] != row[_N_USED - 1] for row in rows)
        shown = [i for i, words in enumerate(says) if words]
        columns = [_COLUMNS[i] for i in shown]
        cells = [*zip(*(column.heading.rpartition("\n")[::2] for column in columns), strict=True)]
        cells += [tuple(row[i] for i in shown) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column.left else cell.rjust(width)
                for cell, width, column in zip(line, widths, columns, strict=True)
            )
            for line in cells
        ]
        reasons = [f"{layer.name}: {layer.reason}" for layer in self.layers if layer.verdict != "fine"]
        if self.unreached:
            reasons.append(f"not reached: {', '.join(self.unreached)}")
        names = [" ".join(column.heading.split()) for column in columns]
        wide = max(map(len, names))
        key = [f"{n:{wide}}  {c.meaning}" for n, c in zip(names, columns, strict=True) if c.meaning]
        reasons += [self.reason, *self._says_of_loss()]
        return "\n".join([*(line.rstrip() for line in lines), "", *key, "", *reasons])

    def _says_of_loss(self) -> list[str]:
        """Return what noise adds to the loss, in a sentence, if there is one."""
        if self.loss is None or self.cost is None:
            return []
        known = [(layer.cost.added, layer.name) for layer in self.layers if layer.cost is not None]
        most = ", ".join(f"{name} ({added:+.2g})" for added, name in sorted(known, reverse=True)[:MOST])
        return [
            f"without noise the loss is {self.loss:.3g}; the noise of all layers together adds "
            f"{_with_error(self.cost)} to it, with Matched BN {self.cost.matched:+.2g}; most by itself adds "
            f"that of {most}"
        ]

    def to_json(self) -> str:
        """Return everything as a JSON object; what is unknown or infinite is null."""
        record = asdict(self) | {"cost": self.cost and self.cost._asdict()}
        for layer, found in zip(record["layers"], self.layers, strict=True):
            layer["noise"] = found.noise._asdict()
            layer["cost"] = found.cost and found.cost._asdict()
        return json.dumps(_without_infinities(record), indent=1, allow_nan=False)


def used_values(noise: Noise) -> float | None:
    """Return how many effective values normalize a batch; a frozen layer uses none of it."""
    frozen = noise.mismatch == 0
    return None if noise.effective_values is None or frozen else noise.effective_values * noise.pooled_batches


def number(value: float | None) -> str:
    """Return a number in three digits or so, "-" for one that is unknown."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 and math.isfinite(value) else f"{value:.3g}"


def _with_error(cost: NoiseCost) -> str:
    return f"{cost.added:+.2g} ± {cost.error:.1g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Column(NamedTuple):
    """A column of the printed table: its heading in one or two lines, what it means, and its cells."""

    heading: str
    meaning: str
    cell: Callable[[LayerDiagnosis], str]
    left: bool = False


_COLUMNS = (
    _Column("layer", "", lambda layer: layer.name, left=True),
    _Column("type", "", lambda layer: layer.kind, left=True),
    _Column(
        "n",
        "values of a channel in a batch: samples times positions",
        lambda layer: number(layer.noise.values),
    ),
    _Column(
        "n_eff",
        "effective sample size: so many independent values would be as noisy",
        lambda layer: number(layer.noise.effective_values),
    ),
    _Column(
        "n_used",
        "the same, together with the layer's memory; - if it is frozen",
        lambda layer: number(used_values(layer.noise)),
    ),
    _Column(
        "mean\nerror",
        "of a batch's mean, in standard deviations of the channel",
        lambda layer: number(layer.noise.mean_error),
    ),
    _Column(
        "var\nerror",
        "of a batch's variance, in percent of the channel's",
        lambda layer: _percent(layer.noise.var_error),
    ),
    _Column(
        "train\n/eval",
        "distance between the outputs of the two modes, in standard deviations",
        lambda layer: number(layer.noise.mismatch),
    ),
    _Column(
        "running\nmean",
        "error of running_mean, in standard deviations of the channel",
        lambda layer: number(layer.noise.running_mean_error),
    ),
    _Column(
        "running\nvar",
        "error of running_var, in percent of the channel's variance",
        lambda layer: _percent(layer.noise.running_var_error),
    ),
    _Column(
        "loss\nadded",
        "by the noise of this layer alone, ± its standard error",
        lambda layer: "-" if layer.cost is None else _with_error(layer.cost),
    ),
    _Column(
        "with\nmatched",
        "the same with the noise that Matched BN would have",
        lambda layer: "-" if layer.cost is None else f"{layer.cost.matched:+.2g}",
    ),
    _Column("dead", "channels that are constant", lambda layer: str(len(layer.noise.dead))),
    _Column(
        "exploding",
        "channels that are not finite, or 100 times as large as the median one",
        lambda layer: str(len(layer.noise.exploding)),
    ),
    _Column(
        "verdict",
        "noisy: less than 32 effective values, 16 with a memory; stale: wrong running statistics",
        lambda layer: layer.verdict,
        left=True,
    ),
    _Column(
        "recommended",
        "matched: mbnorm.convert(model), which makes all layers Matched BN; recalibrate: mbnorm.recalibrate",
        lambda layer: layer.recommendation,
        left=True,
    ),
    _Column(
        "or batches\nof",
        "the size of shuffled batches that would do instead",
        lambda layer: "-" if layer.ideal_batch_size is None else str(layer.ideal_batch_size),
    ),
)
_N_USED = [column.heading for column in _COLUMNS].index("n_used")
