"""The normalization methods that are compared, each made from a net with torch's batch norms."""

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from mbnorm import MomentumSchedule, convert

Method: TypeAlias = Literal[
    "none", "batch", "group", "momentum", "momentum-constant", "memorized", "memorized+df", "matched"
]
METHODS: tuple[Method, ...] = get_args(Method)
OURS: tuple[Method, ...] = METHODS[3:]

# a channel of an (N, C) input is one value, so its groups need more channels than those of a map
CHANNELS_PER_GROUP: dict[type[nn.Module], int] = {nn.BatchNorm1d: 10, nn.BatchNorm2d: 4}


class Bias(nn.Module):
    """What is left of a normalization layer when nothing is normalized: a bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Add the bias to an (N, C, ...) input."""
        return x + self.bias.view(-1, *(1,) * (x.dim() - 2))


def set_method(model: nn.Module, method: Method, batch_size: int) -> None:
    """Turn the batch norms of ``model`` into ``method``, in place; no weight changes its initial value."""
    match method:
        case "batch":
            pass
        case "none":
            _replace(model, lambda layer: Bias(layer.num_features))
        case "group":
            _replace(
                model,
                lambda layer: nn.GroupNorm(
                    layer.num_features // CHANNELS_PER_GROUP[type(layer)], layer.num_features
                ),
            )
        case "momentum" | "momentum-constant":
            convert(model, "momentum", batch_size=batch_size)
        case "memorized" | "memorized+df":
            convert(model, "memorized", batch_size=batch_size)
        case "matched":
            convert(model, "matched", batch_size=batch_size)


def schedule_for(
    method: Method, model: nn.Module, total_steps: int, batch_size: int
) -> MomentumSchedule | None:
    """Return the schedule to step after each optimizer step, if the method has one."""
    if method == "momentum":
        return MomentumSchedule(model, total_steps, batch_size=batch_size, schedule="paper")
    if method == "momentum-constant":
        return MomentumSchedule(model, total_steps, batch_size=batch_size, schedule="constant")
    return None


def _replace(module: nn.Module, new: Callable[[nn.BatchNorm1d | nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, new(child))
        else:
            _replace(child, new)
