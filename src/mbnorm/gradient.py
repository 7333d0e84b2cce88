"""The backward pass's past: what batch normalization takes out of a gradient, averaged over batches."""

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Gradient: TypeAlias = Literal["exact", "remembered"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
GRADIENT_BUFFERS = ("gradient_mean", "gradient_scale")
"""Buffers of a layer that the backward pass reads and writes, shape (C,)."""


class RememberedGradient:
    r"""The gradient of one forward with the two means that it takes out averaged over batches.

    Let dy be the gradient of the output, a the batch's weight in the forward, and

    .. math::
        g = a\,\mathrm{E}[dy] + (1-a)\,G, \qquad s = a\,\mathrm{E}[dy\,\hat x] + (1-a)\,S, \qquad
        dx = w\,\frac{dy - g - z\,s}{\sqrt{\mathrm{var}+\epsilon}}, \qquad G, S \leftarrow g, s

    with z the normalized input :math:`\hat x`, or for the averaged variance rule the input normalized around
    the mean of the batch. With G = S = 0, or a = 1, this is the exact gradient of the forward.

    The first backward pass through the forward reads G and S and writes them; later ones, and those of
    repetitions of the forward, read what it read and write nothing. What is not finite is not written.

    Args:
        mean: G, shape (C,), in the dtype of statistics.
        scale: S, as well.
        stores: whether the first backward pass writes.
    """

    __slots__ = ("_mean", "_read", "_scale", "_written", "stores")

    def __init__(self, mean: Tensor, scale: Tensor, *, stores: bool) -> None:
        self._mean = mean
        self._scale = scale
        self.stores = stores
        self._read: Tensor | None = None
        self._written = False

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return G and S as the first backward pass found them, shape (2, C), in a dtype."""
        if self._read is None:
            # a copy
            self._read = torch.stack((self._mean, self._scale)).to(dtype)
        return self._read

    def commit(self, sums: tuple[Tensor, Tensor], n: int, batch_weight: Tensor) -> None:
        """Write what follows from a backward pass, if it is the first that comes here.

        Args:
            sums: of dy and of dy times the normalized input, shape (C,) each.
            n: values per channel.
            batch_weight: a, 0-dim or shape (C,).
        """
        if not self.stores or self._written:
            return
        self._written = True
        read = self.read(sums[0].dtype)
        found = torch.lerp(read, torch.stack(sums) / n, batch_weight)
        found = torch.where((found.abs() < math.inf).all(), found, read)
        self._mean.copy_(found[0])
        self._scale.copy_(found[1])


def check_gradient(gradient: str, backend: str, process_group: object) -> None:
    """Refuse what is no way to the gradient, or none with the other options.

    Raises:
        ValueError: ``gradient`` is none, or it is "remembered" among ranks or by the backend "traceable".
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
    if gradient == "remembered" and process_group is not None:
        raise ValueError('gradient="remembered" is of one process: process_group must be None')
    if gradient == "remembered" and backend == "traceable":
        raise ValueError('gradient="remembered" needs a backend with a backward pass, got "traceable"')
