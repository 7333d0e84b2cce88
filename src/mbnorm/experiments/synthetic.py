"""Batches of Gaussian fields whose batch statistics are known in closed form."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianField:
    r"""Images of channels with mean 0 and variance 1, stationary in space, to be drawn in batches.

    Values of one image i and batch b have the covariance, along each spatial axis
    :math:`\rho^{|\mathrm{distance}|}`, of

    .. math::
        x = \sqrt{\delta}\, d_b + \sqrt{\omega}\, o_i + \sqrt{1 - \delta - \omega}\, z, \qquad
        \mathrm{Cov}(z_p, z_q) = \prod_k \rho^{|p_k - q_k|}

    with independent standard normal d, o and z, all of them per channel. The mean of a batch of m images
    with sides :math:`L_k` then has the variance

    .. math::
        \frac{1}{n_\mathrm{eff}} = \delta
            + \frac1m \Big(\omega + (1 - \delta - \omega) \prod_k s(L_k)\Big), \qquad
        s(L) = \frac1L \Big(1 + 2 \sum_{j=1}^{L-1} (1 - j/L)\, \rho^j \Big)

    Args:
        channels: number of channels.
        sides: the lengths :math:`L_k` of the spatial axes; () for vectors.
        correlation: :math:`\rho` of neighbors, in (-1, 1); 0 is white noise.
        image_offset: the share :math:`\omega` of the variance that all values of an image have in common.
        batch_offset: the share :math:`\delta` that all values of a batch have in common: poor sampling.
        offset_persistence: correlation of :math:`d_b` with that of the batch before, in [0, 1): near 1 the
            data drift slowly over the batches.
        dead: channels that are constant 0.5 instead.
        exploding: channels that are multiplied by 2 to the number of the batch, infinite after some 130.

    Raises:
        ValueError: an argument out of range.
    """

    channels: int
    sides: tuple[int, ...] = ()
    correlation: float = 0.0
    image_offset: float = 0.0
    batch_offset: float = 0.0
    offset_persistence: float = 0.0
    dead: tuple[int, ...] = ()
    exploding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.channels < 1 or any(side < 1 for side in self.sides):
            raise ValueError(f"channels and sides must be at least 1, got {self.channels} and {self.sides}")
        if not -1 < self.correlation < 1:
            raise ValueError(f"correlation must be in (-1, 1), got {self.correlation}")
        if min(self.image_offset, self.batch_offset) < 0 or self.image_offset + self.batch_offset > 1:
            raise ValueError(
                "image_offset and batch_offset are shares of the variance: at least 0 and 1 at most "
                f"together, got {self.image_offset} and {self.batch_offset}"
            )
        if not 0 <= self.offset_persistence < 1:
            raise ValueError(f"offset_persistence must be in [0, 1), got {self.offset_persistence}")
        for channel in (*self.dead, *self.exploding):
            if not 0 <= channel < self.channels:
                raise ValueError(f"dead and exploding are channels below {self.channels}, got {channel}")

    def effective_values(self, batch_size: int) -> float:
        """Return n_eff of a batch: the number of independent values whose mean is as noisy."""
        own = 1 - self.image_offset - self.batch_offset
        positions = math.prod(_variance_of_mean(side, self.correlation) for side in self.sides)
        return 1 / (self.batch_offset + (self.image_offset + own * positions) / batch_size)

    def batches(self, batch_size: int, count: int, seed: int) -> Iterator[Tensor]:
        """Draw batches, shape (batch_size, channels, *sides), the same ones for a seed."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        per_channel = (self.channels, *(1,) * len(self.sides))
        own = math.sqrt(1 - self.image_offset - self.batch_offset)
        offset = normal(1, *per_channel)
        for number in range(count):
            if number:
                keep = self.offset_persistence
                offset = keep * offset + math.sqrt(1 - keep**2) * normal(1, *per_channel)
            x = normal(batch_size, self.channels, *self.sides)
            for axis in range(2, x.dim()):
                x = _correlated(x, axis, self.correlation)
            x = own * x + math.sqrt(self.image_offset) * normal(batch_size, *per_channel)
            x = x + math.sqrt(self.batch_offset) * offset
            x[:, list(self.dead)] = 0.5
            x[:, list(self.exploding)] *= torch.tensor(2.0).double() ** number
            yield x.float()


def _variance_of_mean(side: int, correlation: float) -> float:
    """Return the variance of the mean of so many neighbors with variance 1."""
    pairs = sum((1 - j / side) * correlation**j for j in range(1, side))
    return (1 + 2 * pairs) / side


def _correlated(x: Tensor, axis: int, correlation: float) -> Tensor:
    """Turn white noise into a stationary first-order autoregression along an axis."""
    first, *rest = x.unbind(axis)
    values = [first]
    for innovation in rest:
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * innovation)
    return torch.stack(values, axis)
