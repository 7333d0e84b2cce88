"""Normalization of each image by itself, after that of the batch."""

import warnings
from typing import Any, cast

from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.conversion import ConversionReport, named
from mbnorm.leaves import leaf_of

GROUPS = 8
"""Of channels, in each image; fewer where that leaves less than two channels a group."""


class PerImageNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` for maps; an input of one position per channel only gets scale and shift.

    Attributes:
        active: whether it normalizes. False after loading a checkpoint of a net without this layer.

    >>> import torch
    >>> x = torch.randn(2, 8, 1, 1)
    >>> torch.equal(PerImageNorm(4, 8)(x), x)
    True
    """

    active: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.active = True

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each group of channels of each image."""
        # two conditions: TorchScript leaves out what is behind the first alone
        if not is_scripting():  # noqa: SIM102
            if isinstance(input, Proxy):
                return leaf_of(self, input)
        # groups of so few values have no useful statistics
        if self.active and input.numel() > input.size(0) * input.size(1):
            return nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        per_channel = [1, -1] + [1] * (input.dim() - 2)
        if self.weight is not None:
            input = input * self.weight.to(input.dtype).view(per_channel)
        if self.bias is not None:
            input = input + self.bias.to(input.dtype).view(per_channel)
        return input

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return super().extra_repr() + ("" if self.active else ", active=False")


def groups_of(channels: int) -> int:
    """Return how many groups the channels make.

    >>> groups_of(64), groups_of(8), groups_of(3)
    (8, 4, 1)
    """
    return max(g for g in range(1, GROUPS + 1) if channels % g == 0 and (g == 1 or channels // g >= 2))


def normalize_images(model: nn.Module, layers: set[_BatchNorm], report: ConversionReport) -> None:
    """Put a `PerImageNorm` behind layers of a model, and tell the report.

    Each of them becomes the first of a `torch.nn.Sequential` of two, and its scale and shift, the same
    parameters, become the second's: optimizers that have them keep them, and a scale that starts at 0, as in
    residual nets, leaves the first something to normalize.
    """
    made: dict[nn.Module, nn.Module] = {}
    computed: set[nn.Module] = set()
    for _, parent in named(model, nn.Module):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and child in layers:
                if not {"weight", "bias"} <= child._parameters.keys():
                    computed.add(child)
                    continue
                if child not in made:
                    made[child] = _pair_of(child)
                parent._modules[name] = made[child]
    report.notes.append(
        f"{len(made)} layers normalize each image, too: they are the first of two now, and the second has "
        "their scale and shift"
    )
    if computed:
        report.notes.append(
            f"{len(computed)} layers do not, since their scale or shift is computed from others: remove the "
            "pruning or parametrization first"
        )


def _pair_of(layer: _BatchNorm) -> nn.Sequential:
    channels = layer.num_features
    behind = PerImageNorm(groups_of(channels), channels, layer.eps, affine=False)
    behind.affine = layer.affine
    for name in ("weight", "bias"):
        behind.register_parameter(name, layer._parameters[name])
        layer.register_parameter(name, None)
    layer.affine = False
    pair = nn.Sequential(layer, behind).train(layer.training)
    pair.register_load_state_dict_pre_hook(_load_one_layer)  # type: ignore[no-untyped-call]
    return pair


def rejoin(model: nn.Module) -> None:
    """Make one layer again of those whose images are not normalized any more."""
    for _, parent in named(model, nn.Module):
        for name, child in parent._modules.items():
            parts = list(child.children()) if isinstance(child, nn.Sequential) else []
            if len(parts) == 2 and isinstance(parts[1], PerImageNorm) and not parts[1].active:
                norm, behind = parts
                for parameter in ("weight", "bias"):
                    norm.register_parameter(parameter, behind._parameters[parameter])
                cast(_BatchNorm, norm).affine = cast(PerImageNorm, behind).affine
                parent._modules[name] = norm


def _load_one_layer(pair: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let two layers take the state of one, which a net had that was not normalized by image."""
    norm, behind = pair.children()
    assert isinstance(behind, PerImageNorm)
    if f"{prefix}running_var" not in state:
        if f"{prefix}0.running_var" in state:
            behind.active = True
        return
    if behind.active:
        # the same words for each layer: Python's default filter shows them once
        warnings.warn(
            "the checkpoint is of a net without per-image normalization: it is off from now on",
            stacklevel=2,
        )
        behind.active = False
    places = {"weight": "1", "bias": "1"} | {name: "0" for name, _ in norm.named_buffers(recurse=False)}
    for name, place in places.items():
        if prefix + name in state:
            state[f"{prefix}{place}.{name}"] = state.pop(prefix + name)
