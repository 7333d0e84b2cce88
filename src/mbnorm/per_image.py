"""Each image's own statistics, after those of the batches."""

from torch import Tensor, nn
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
        # a group of so few values is worth nothing
        return input if input.shape[2:].numel() == 1 else super().forward(input)


def groups_of(channels: int) -> int:
    """Return how many groups the channels make.

    >>> groups_of(64), groups_of(8), groups_of(3)
    (8, 4, 1)
    """
    return max(g for g in range(1, GROUPS + 1) if channels % g == 0 and (g == 1 or channels // g >= 2))


def normalize_images(model: nn.Module, layers: set[_BatchNorm], report: ConversionReport) -> None:
    """Put a `PerImageNorm` behind layers of a model, and tell the report.

    Each of them becomes the first of a `torch.nn.Sequential` of two.
    """
    made: dict[nn.Module, nn.Module] = {}
    for _, parent in named(model, nn.Module):
        for name, child in parent._modules.items():
            if child in layers and not isinstance(parent, _Pair):
                assert isinstance(child, _BatchNorm)
                if child not in made:
                    made[child] = _Pair(child)
                setattr(parent, name, made[child])
    report.notes.append(
        f"{len(made)} layers normalize each image, too: give their new parameters to the optimizer"
    )


class _Pair(nn.Sequential):
    """A batch norm, and the normalization of each image behind it."""

    def __init__(self, layer: _BatchNorm) -> None:
        like = layer.running_mean
        behind = PerImageNorm(groups_of(layer.num_features), layer.num_features, layer.eps, layer.affine)
        if like is not None:
            behind.to(like)
        super().__init__(layer, behind)
