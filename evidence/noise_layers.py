"""Batch norms whose batches are as noisy as smaller ones, and that do all else as they did."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class Size(NamedTuple):
    """What a batch's mean and variance are as noisy as.

    Attributes:
        values: n, how many independent values have a mean as noisy.
        freedom: d, the degrees of freedom of the chi-square that scatters as the variance; n - 1 for
            independent values of a normal distribution.
    """

    values: float
    freedom: float


def independent(values: float) -> Size:
    """Return the size of so many independent values."""
    return Size(values, values - 1)


def size_of(x: Tensor, images: int) -> Size:
    """Return the size of batches of so many images, as it is measured between parts of a larger batch.

    Means are over the channels that are not constant.

    Args:
        x: shape (N, C, ...), images drawn independently.
        images: of a part.
    """
    parts = x.detach().double().flatten(2) if x.dim() > 2 else x.detach().double().unsqueeze(2)
    parts = parts[: len(parts) // images * images].reshape(-1, images, *parts.shape[1:])
    live = parts.var((0, 1, 3), correction=0) > 1e-10
    if not live.any():
        return independent(images * x[0, 0].numel())
    parts = parts[:, :, live] / parts[:, :, live].std((0, 1, 3), correction=0)[:, None]
    vars_, means = torch.var_mean(parts, (1, 3), correction=0)
    values = 1 / float(means.var(0).mean())
    scatter = float(vars_.var(0).mean())
    return Size(values, 2 * (1 - 1 / values) ** 2 / scatter if scatter > 0 else 0.0)


def draw_noise(size: Size, channels: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""Return u and s^2 of each channel for one batch, shape (channels,) in float64.

    .. math:: u \sim N(0, 1/n), \qquad s^2 \sim (1 - 1/n)\,\chi^2_d / d

    With d = n - 1 the second is chi-square(n-1) / n.
    """
    u = torch.randn(channels, generator=draws, dtype=torch.float64) / math.sqrt(size.values)
    if size.freedom <= 0:
        return u, torch.zeros_like(u)
    half = torch.full((channels,), size.freedom / 2, dtype=torch.float64)
    mean = max(1 - 1 / size.values, 0.0)
    return u, torch._standard_gamma(half, generator=draws) * mean / half


class NoisyBatchNorm(nn.Module):
    r"""A batch norm that adds noise to what normalizes its training batches.

    .. math:: y = w\,(\hat x + u) / \sqrt{s^2 + \epsilon} + b

    with u and s^2 drawn once a batch and channel, and x normalized by the whole batch. With a ``share`` of
    1/m each image is in its statistics, as it is in a batch of m: u and s^2 are those of the other images.
    In eval mode it is the batch norm.

    Args:
        norm: the batch norm.
        size: is given x, and returns the size of the batches whose noise to add; None adds none.
        seed: of the noise.
        share: of an image in its own statistics.
    """

    def __init__(
        self, norm: _BatchNorm, size: Callable[[Tensor], Size | None], seed: int, share: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = norm
        self.size = size
        self.share = share
        self.draws = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch."""
        norm = self.norm
        size = self.size(x) if self.training else None
        if size is None:
            y: Tensor = norm(x)
            return y
        z = F.batch_norm(x, norm.running_mean, norm.running_var, None, None, True, 0.1, norm.eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        u, square = (t.to(x.dtype).view(shape) for t in draw_noise(size, x.shape[1], self.draws))
        mean, var = -u, square
        if self.share:
            positions = [*range(2, x.dim())]
            own, own_square = ((t.mean(positions, keepdim=True) if positions else t) for t in (z, z.square()))
            mean = self.share * own - (1 - self.share) * u
            var = self.share * own_square + (1 - self.share) * (square + u.square()) - mean.square()
        z = (z - mean) * (var.clamp_min(0) + norm.eps).rsqrt()
        return z * norm.weight.view(shape) + norm.bias.view(shape)


class SplitBatchNorm(nn.Module):
    """A batch norm that normalizes each few images of a training batch by themselves.

    Their noise and their gradients are those of so small a batch, while a step has those of the whole.

    Args:
        norm: the batch norm.
        images: normalized together.
    """

    def __init__(self, norm: _BatchNorm, images: int) -> None:
        super().__init__()
        self.norm = norm
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch."""
        y: Tensor = self.norm(x)
        if not self.training:
            return y
        parts, channels = len(x) // self.images, x.shape[1]
        # the parts side by side, as further channels
        apart = x.reshape(parts, self.images, channels, *x.shape[2:]).transpose(0, 1)
        wide = apart.reshape(self.images, parts * channels, *x.shape[2:])
        w, b = self.norm.weight.repeat(parts), self.norm.bias.repeat(parts)
        wide = F.batch_norm(wide, None, None, w, b, True, 0.0, self.norm.eps)
        together = wide.reshape(self.images, parts, channels, *x.shape[2:]).transpose(0, 1)
        return together.reshape(x.shape)


def replace_norms(model: nn.Module, new: Callable[[_BatchNorm, int], nn.Module]) -> None:
    """Put another layer in the place of each batch norm, which is given its number in the model's order."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    for number, (parent, name, norm) in enumerate(places):
        setattr(parent, name, new(norm, number))
