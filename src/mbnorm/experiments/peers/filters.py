"""Filters that are centered or standardized over their inputs, where they feed a batch norm."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from mbnorm.feeders import feeders


class Centered(nn.Module):
    """Subtract from each filter the mean over its inputs, as MABN and weight standardization do.

    >>> Centered()(torch.randn(8, 3, 5, 5)).sum((1, 2, 3)).abs().max() < 1e-5
    tensor(True)
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return centered filters, those of shape (outputs, inputs, ...)."""
        return weight - weight.mean(_inputs(weight), keepdim=True)


class Standardized(nn.Module):
    r"""Give each filter mean 0 and standard deviation 1 over its inputs.

    .. math::
        \hat w = \frac{w - \mathrm{E} w}{\sqrt{\mathrm{Var}\, w + \epsilon}}

    Source: Qiao et al.: Micro-Batch Training with Batch-Channel Normalization and Weight Standardization,
    2019, section 2.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """Return standardized filters, those of shape (outputs, inputs, ...)."""
        var, mean = torch.var_mean(weight, _inputs(weight), correction=0, keepdim=True)
        return (weight - mean) / (var + self.eps).sqrt()


def center(model: nn.Module, shape: Sequence[int]) -> None:
    """Center the filters that feed batch norms, in place, by a parametrization.

    Args:
        model: a net with torch's batch norms.
        shape: that of one input.

    Raises:
        ValueError: no convolution or linear layer feeds a batch norm, or filters have one weight.
    """
    _parametrize(model, shape, Centered)


def standardize(model: nn.Module, shape: Sequence[int]) -> None:
    """Standardize the filters that feed batch norms, as `center` does."""
    _parametrize(model, shape, Standardized)


def _parametrize(model: nn.Module, shape: Sequence[int], rule: Callable[[], nn.Module]) -> None:
    device = next(model.parameters()).device
    found = feeders(model, torch.zeros(2, *shape, device=device))
    names = {layer: name for name, layer in model.named_modules()}
    for norm, reason in found.without.items():
        raise ValueError(f"{names[norm]}: {reason}")
    for layer in found.norms_of:
        if isinstance(layer, _ConvTransposeNd):
            raise ValueError(f"{names[layer]}: the published rule has no transposed convolutions")
        if layer.weight[0].numel() == 1:
            raise ValueError(f"{names[layer]}: filters of one weight cannot be centered")
    for layer in found.norms_of:
        parametrize.register_parametrization(layer, "weight", rule())


def _inputs(weight: Tensor) -> list[int]:
    return list(range(1, weight.dim()))
