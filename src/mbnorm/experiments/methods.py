"""The normalization methods that are compared, each made from a net with torch's batch norms."""

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbnorm import MomentumSchedule, convert, recalibrate
from mbnorm.experiments.peers.batch_renorm import BatchRenorm, RenormSchedule
from mbnorm.experiments.peers.filters import center, standardize
from mbnorm.experiments.peers.mabn import MABN
from mbnorm.experiments.peers.online import OnlineNorm
from mbnorm.values import is_trained

Method: TypeAlias = Literal[
    "none",
    "batch",
    "batch+recalibrate",
    "batch+accumulate",
    "batch+centered",
    "frozen",
    "renorm",
    "mabn",
    "online",
    "group",
    "group+ws",
    "layer",
    "instance",
    "momentum",
    "momentum-constant",
    "momentum+df",
    "memorized",
    "memorized+df",
    "matched",
    "matched+df",
    "matched-64",
    "matched-128",
    "matched-plain",
    "matched-plain-32",
    "momentum-pooled",
    "memorized-averaged",
]
_ALL: tuple[Method, ...] = get_args(Method)
VARIANTS: tuple[Method, ...] = _ALL[_ALL.index("matched-64") :]
"""Methods with other options than their own; the evidence trains them, `compare` does not."""
METHODS: tuple[Method, ...] = tuple(method for method in _ALL if method not in VARIANTS)
OURS: tuple[Method, ...] = _ALL[_ALL.index("momentum") :]
DOUBLE_FORWARD: tuple[Method, ...] = ("momentum+df", "memorized+df", "matched+df")
WITHOUT_BATCH_NORM: tuple[Method, ...] = (
    "none",
    "frozen",
    "renorm",
    "mabn",
    "online",
    "group",
    "group+ws",
    "layer",
    "instance",
)

REFERENCE_BATCH_SIZE = 64
"""Where batch norm is at ease, and how many samples an accumulated step takes."""

INPUTS_AT_ONCE = 100
_BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class Schedule(Protocol):
    """What is called after every optimizer step."""

    def step(self) -> None:
        """Follow an optimizer step."""


class Bias(nn.Module):
    """What is left of a normalization layer when nothing is normalized: a bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Add the bias to an (N, C, ...) input."""
        return x + self.bias.view(-1, *(1,) * (x.dim() - 2))


class Frozen(nn.Module):
    """A batch norm whose running statistics normalize in train mode, too, and never change."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Leave the layer in eval mode."""
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalize an (N, C, ...) input."""
        normalized: Tensor = self.layer(x)
        return normalized


class Instance(nn.Module):
    """Normalize each channel of each sample by itself; torch's layers take (N, C) for one (C, L)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize an (N, C, ...) input; in train mode a single value per channel is a ValueError."""
        return F.instance_norm(x, weight=self.weight, bias=self.bias)


def set_method(model: nn.Module, method: Method, batch_size: int, shape: torch.Size) -> None:
    """Turn the batch norms of ``model`` into ``method``, in place; no parameter changes its value.

    Batch renormalization and what is mbnorm's take over the running statistics of a trained net.

    Args:
        model: a net with torch's batch norms, untrained or trained.
        method: what they become.
        batch_size: samples of a batch.
        shape: that of one input.

    Raises:
        ValueError: the method needs centered filters, and no convolution or linear layer feeds a batch norm.
    """
    match method:
        case "batch" | "batch+recalibrate" | "batch+accumulate":
            pass
        case "none":
            _replace(model, lambda layer: Bias(layer.num_features))
        case "frozen":
            _replace(model, Frozen)
        case "renorm":
            _replace(model, _renorm)
        case "batch+centered":
            center(model, shape)
        case "mabn":
            center(model, shape)
            _replace(model, lambda layer: MABN(layer.num_features, batch_size))
        case "online":
            _replace(model, lambda layer: OnlineNorm(layer.num_features))
        case "group":
            _replace(model, lambda layer: nn.GroupNorm(_groups(layer), layer.num_features))
        case "group+ws":
            standardize(model, shape)
            _replace(model, lambda layer: nn.GroupNorm(_groups(layer), layer.num_features))
        case "layer":
            # over channels and positions, as it is done in convolutional nets
            _replace(model, lambda layer: nn.GroupNorm(1, layer.num_features))
        case "instance":
            _replace(model, lambda layer: Instance(layer.num_features))
        case "momentum" | "momentum-constant" | "momentum+df":
            convert(model, "momentum", batch_size=batch_size)
        case "matched-64" | "matched-128":
            convert(model, "matched", matched_batch_size=int(method.removeprefix("matched-")))
        case "matched-plain":
            convert(model, "matched", matched_batch_size=128, measured=False)
        case "matched-plain-32":
            convert(model, "matched", measured=False)
        case "momentum-pooled":
            convert(model, "momentum", batch_size=batch_size, variance_rule="pooled")
        case "memorized-averaged":
            convert(model, "memorized", batch_size=batch_size, variance_rule="averaged")
        case "memorized" | "memorized+df":
            convert(model, "memorized", batch_size=batch_size)
        case "matched" | "matched+df":
            convert(model, "matched", batch_size=batch_size)


def schedule_for(method: Method, model: nn.Module, total_steps: int, batch_size: int) -> Schedule | None:
    """Return the schedule to step after each optimizer step, if the method has one."""
    if method in ("momentum", "momentum+df"):
        return MomentumSchedule(model, total_steps, batch_size=batch_size, schedule="paper")
    if method in ("momentum-constant", "momentum-pooled"):
        return MomentumSchedule(model, total_steps, batch_size=batch_size, schedule="constant")
    if method == "renorm":
        return RenormSchedule(model, total_steps)
    return None


def batches_a_step(method: Method, batch_size: int) -> int:
    """Return how many batches' gradients are averaged for an optimizer step, and multiply its rate."""
    return max(1, REFERENCE_BATCH_SIZE // batch_size) if method == "batch+accumulate" else 1


def before_training(method: Method, model: nn.Module, inputs: Tensor) -> None:
    """Give frozen layers the statistics of the training data under the initial weights, if they have none."""
    if method == "frozen" and not _has_statistics(model):
        recalibrate(model.eval(), in_random_order(inputs))
        model.train()


def after_training(method: Method, model: nn.Module, inputs: Tensor) -> None:
    """Give the layers the statistics of the training data under the final weights, if the method does."""
    if method == "batch+recalibrate":
        recalibrate(model, in_random_order(inputs))


def in_random_order(inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs in parts, shuffled, as `recalibrate` wants them."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return torch.split(inputs[order.to(inputs.device)], INPUTS_AT_ONCE)


def _has_statistics(model: nn.Module) -> bool:
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return any(_is_trained(layer) for layer in layers)


def _is_trained(layer: _BatchNorm) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and var is not None and is_trained(mean, var)


def _renorm(layer: _BatchNorm) -> BatchRenorm:
    made = BatchRenorm(layer.num_features, layer.eps)
    if _is_trained(layer):
        made.running_mean.copy_(cast(Tensor, layer.running_mean))
        made.running_std.copy_((cast(Tensor, layer.running_var) + layer.eps).sqrt())
    return made


def _groups(layer: _BatchNorm) -> int:
    # a channel of an (N, C) input is one value, so its groups need more channels than those of a map
    channels, least = layer.num_features, 10 if isinstance(layer, nn.BatchNorm1d) else 4
    return max(groups for groups in range(1, max(channels // least, 1) + 1) if channels % groups == 0)


def _replace(module: nn.Module, new: Callable[[_BatchNorm], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            made = new(child)
            for parameter in ("weight", "bias"):
                own, theirs = getattr(made, parameter, None), getattr(child, parameter)
                if own is not None and theirs is not None:
                    own.data.copy_(theirs.data)
            setattr(module, name, made)
        else:
            _replace(child, new)
