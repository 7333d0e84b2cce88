"""Each image's own statistics, after those of the batches."""

from typing import cast

from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.conversion import ConversionReport, named

GROUPS = 8
"""Of channels, in each image; fewer where that leaves less than two channels a group."""


class PerImageNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of maps: an input of one position per channel is left as it is.

    >>> import torch
    >>> x = torch.randn(2, 8, 1, 1)
    >>> PerImageNorm(4, 8)(x) is x
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each group of channels of each image."""
        # two conditions: TorchScript leaves out what is behind the first alone
        if not is_scripting():  # noqa: SIM102
            if isinstance(input, Proxy):
                # a leaf, as torch's own layers are
                name = input.tracer.path_of_module(self)
                return cast(Tensor, input.tracer.create_proxy("call_module", name, (input,), {}))
        # a group of so few values is worth nothing
        if input.numel() == input.size(0) * input.size(1):
            return input
        return nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


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
    for _, parent in named(model, nn.Module):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and child in layers:
                if child not in made:
                    made[child] = _pair_of(child)
                parent._modules[name] = made[child]
    report.notes.append(
        f"{len(made)} layers normalize each image, too: they are the first of two now, and the second has "
        "their scale and shift"
    )


def _pair_of(layer: _BatchNorm) -> nn.Sequential:
    channels = layer.num_features
    behind = PerImageNorm(groups_of(channels), channels, layer.eps, affine=False)
    behind.affine = layer.affine
    for name in ("weight", "bias"):
        behind.register_parameter(name, layer._parameters[name])
        layer.register_parameter(name, None)
    layer.affine = False
    return nn.Sequential(layer, behind).train(layer.training)
