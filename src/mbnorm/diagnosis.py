"""What `diagnose` finds: a record a layer and one of the model, as a table and as JSON."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from mbnorm.noise import Noise

Verdict: TypeAlias = Literal["fine", "noisy", "stale", "dead", "exploding"]
Recommendation: TypeAlias = Literal["none", "matched", "memorized", "recalibrate"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """What was found of one layer.

    Attributes:
        name: the layer's name in the model.
        kind: its type.
        noise: what was measured.
        verdict: "exploding" or "dead" if channels are; "noisy" if what normalizes a training batch has less
            than 32 effective values; "stale" if the running statistics are further from the truth than those
            of a batch of 32 values would be; else "fine". The first that applies.
        recommendation: a method of `mbnorm.convert`, `mbnorm.recalibrate`, or "none".
        memory_size: of "memorized", else None.
        ideal_batch_size: samples, drawn independently, from which this layer needs no method; None if it
            needs none now.
        stale: whether the running statistics are so far off, whatever the verdict.
        reason: all in words.
    """

    name: str
    kind: str
    noise: Noise
    verdict: Verdict
    recommendation: Recommendation
    memory_size: int | None
    ideal_batch_size: int | None
    stale: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a model; ``print`` it.

    Attributes:
        layers: in the model's order.
        unreached: names of the layers that no forward has reached.
        recommendation: for the whole model: "memorized" if a layer needs it, else "matched", else
            "recalibrate", else "none".
        memory_size: of "memorized": the largest that a layer needs.
        ideal_batch_size: the largest that a layer needs; None if none does.
        stale: whether a layer's running statistics are: then `mbnorm.recalibrate` before evaluating this net
            as it is, whatever is recommended for its training.
        reason: in words.
    """

    layers: tuple[LayerDiagnosis, ...]
    unreached: tuple[str, ...]
    recommendation: Recommendation
    memory_size: int | None
    ideal_batch_size: int | None
    stale: bool
    reason: str

    def __str__(self) -> str:
        cells = [_HEADINGS, *(_cells(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                c.ljust(w) if i in _TEXTS else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        reasons = [f"{layer.name}: {layer.reason}" for layer in self.layers if layer.verdict != "fine"]
        if self.unreached:
            reasons.append(f"not reached: {', '.join(self.unreached)}")
        return "\n".join([*(line.rstrip() for line in lines), *reasons, self.reason])

    def to_json(self) -> str:
        """Return everything as a JSON object; what is unknown or infinite is null."""
        record = asdict(self)
        for layer, found in zip(record["layers"], self.layers, strict=True):
            layer["noise"] = found.noise._asdict()
        return json.dumps(_without_infinities(record), indent=1, allow_nan=False)


_HEADINGS = (
    "layer",
    "type",
    "n",
    "n_eff",
    "mean off by",
    "var off by",
    "train/eval",
    "running mean",
    "running var",
    "dead",
    "exploding",
    "verdict",
    "recommended",
    "or batches of",
)
_TEXTS = (0, 1, 11, 12)


def _cells(layer: LayerDiagnosis) -> tuple[str, ...]:
    noise = layer.noise
    recommended = layer.recommendation + (f" ({layer.memory_size})" if layer.memory_size else "")
    return (
        layer.name,
        layer.kind,
        number(noise.values),
        number(noise.effective_values),
        number(noise.mean_error),
        _percent(noise.var_error),
        number(noise.mismatch),
        number(noise.running_mean_error),
        _percent(noise.running_var_error),
        str(len(noise.dead)),
        str(len(noise.exploding)),
        layer.verdict,
        recommended,
        "-" if layer.ideal_batch_size is None else str(layer.ideal_batch_size),
    )


def number(value: float | None) -> str:
    """Return a number in three digits or so, "-" for one that is unknown."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 and math.isfinite(value) else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
