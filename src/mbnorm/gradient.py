"""The memory of the backward pass: what batch normalization subtracts from a gradient, averaged."""

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mbnorm.blend import weight_in_gradient

Gradient: TypeAlias = Literal["exact", "remembered"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
GRADIENT_BUFFERS = ("gradient_mean", "gradient_scale")
"""Buffers of a layer that the backward pass reads and writes, shape (C,)."""


class Era:
    """What lies between two resets of a layer's state: it is over when the next comes."""

    __slots__ = ("is_over",)

    def __init__(self) -> None:
        self.is_over = False


class RememberedGradient:
    r"""The gradient of one forward, which subtracts two means that are averaged over batches.

    Let dy be the gradient of the output, a the batch's weight in the forward, and

    .. math::
        b = 1 - (1-a)^4, \qquad
        g = b\,\mathrm{E}[dy] + (1-b)\,G, \qquad s = b\,\mathrm{E}[dy\,\hat x] + (1-b)\,S, \qquad
        dx = w\,\frac{dy - g - z\,s}{\sqrt{\mathrm{var}+\epsilon}}, \qquad G, S \leftarrow g, s

    with z the normalized input :math:`\hat x`, or for the averaged variance rule the input normalized around
    the mean of the batch. With a = 1 this is the exact gradient of the forward. The history weight is the
    fourth power of the forward's, so this memory is a quarter as long. Source: ours, by measurement.

    The first backward pass through the forward uses G and S, and writes them. Later ones, and those of
    repetitions of the forward, use the same G and S and write nothing. Values that are not finite are not
    written, nor is anything of a batch whose statistics are not finite.

    Args:
        mean: G, shape (C,), in the dtype of statistics.
        scale: S, as well.
        stores: whether the first backward pass writes.
        era: when it is over, none writes.
    """

    __slots__ = ("_era", "_mean", "_read", "_scale", "_stores", "_written")

    def __init__(self, mean: Tensor, scale: Tensor, *, stores: bool, era: Era) -> None:
        self._mean = mean
        self._scale = scale
        self._stores = stores
        self._era = era
        self._read: Tensor | None = None
        self._written = False

    def for_a_forward_in(self, era: Era) -> "RememberedGradient":
        """Return the same for another forward."""
        return RememberedGradient(self._mean, self._scale, stores=self._stores, era=era)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """G and S."""
        return self._mean, self._scale

    @property
    def stores(self) -> bool:
        """Whether the first backward pass writes."""
        return self._stores and not self._era.is_over

    @property
    def is_unread(self) -> bool:
        """Whether no backward pass has come here."""
        return self._read is None

    def was_read(self, past: Tensor) -> None:
        """Keep what a backend has read, that of the first backward pass; it has written what it had to."""
        self._read, self._written = past, True

    def read(self, batch_weight: Tensor) -> Tensor:
        """Return G, S and b as the first backward pass found them, shape (3, C).

        Args:
            batch_weight: a, 0-dim or shape (C,), in the dtype of the input's statistics.
        """
        if self._read is None:
            # a copy
            self._read = stacked(self._mean, self._scale, batch_weight)
        return self._read

    def commit(self, sums: tuple[Tensor, Tensor], n: int, statistics: Iterable[Tensor]) -> None:
        """Write what follows from a backward pass, if it is the first that comes here.

        Args:
            sums: of dy and of dy times the normalized input, shape (C,) each.
            n: values per channel.
            statistics: of the batch, shape (C,) each.
        """
        if self.stores and not self._written and self._read is not None:
            self._written = True
            write(self._mean, self._scale, self._read, sums, n, statistics)


def stacked(mean: Tensor, scale: Tensor, batch_weight: Tensor) -> Tensor:
    """Return G, S and b as the backends take them, shape (3, C)."""
    weight = weight_in_gradient(batch_weight).expand_as(mean)
    return torch.stack((mean.to(weight.dtype), scale.to(weight.dtype), weight))


def write(
    mean: Tensor,
    scale: Tensor,
    read: Tensor,
    sums: tuple[Tensor, Tensor],
    n: int,
    statistics: Iterable[Tensor],
) -> None:
    """Blend the means of a batch's gradient with what was read, and write G and S if all is finite.

    So must be the batch's statistics, with which the forward stores or not. What is finite in the precision
    of the input need not be in that of the layer.
    """
    found = torch.lerp(read[:2], torch.stack(sums) / n, read[2]).to(mean.dtype)
    all_of_it = torch.stack((*found, *(row.to(mean.dtype) for row in statistics)))
    finite = (all_of_it.abs() < math.inf).all()
    mean.copy_(torch.where(finite, found[0], mean))
    scale.copy_(torch.where(finite, found[1], scale))


def default_gradient(sync: object) -> Gradient:
    """Return the gradient that Matched layers have if none is asked for."""
    return "exact" if sync == "late" else "remembered"


def check_gradient(gradient: str, sync: object) -> None:
    """Refuse what is no way to the gradient, or none with the other options.

    Raises:
        ValueError: ``gradient`` is none, or it is "remembered" among ranks that are late.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
    if gradient == "remembered" and sync == "late":
        raise ValueError('sync="late" needs gradient="exact": ranks that do not wait would remember others')
