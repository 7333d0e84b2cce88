"""What a conversion of a model did, and the layers it goes through."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass
class ConversionReport:
    """What `convert` or `revert` did: layer names, and for those left alone the reason.

    ``print`` it. A shared layer has all its names, joined by " = ".
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} skipped"]
        lines += [f"  {name}: {what}" for name, what in self.converted.items()]
        lines += [f"  {name}: skipped, {why}" for name, why in self.skipped.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def named(model: nn.Module, kind: type[Layer]) -> Iterator[tuple[str, Layer]]:
    """Yield every module of a kind once, with all its names, joined by " = "."""
    names: dict[Layer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names.setdefault(module, []).append(name or "(the model itself)")
    for module, all_names in names.items():
        yield " = ".join(all_names), module
