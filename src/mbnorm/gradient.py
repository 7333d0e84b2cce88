"""The backward pass's past: what batch normalization takes out of a gradient, averaged over batches."""

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule

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

    __slots__ = ("_mean", "_read", "_scale", "stores")

    def __init__(self, mean: Tensor, scale: Tensor, *, stores: bool) -> None:
        self._mean = mean
        self._scale = scale
        self.stores = stores
        self._read: tuple[Tensor, Tensor] | None = None

    def past(self, own_mean: Tensor, own_scale: Tensor, batch_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return G and S for a backward pass that has these means, and write what follows from them."""
        if self._read is None:
            # copies, in the dtype of the input's statistics
            past_mean, past_scale = (torch.empty_like(own_mean).copy_(t) for t in (self._mean, self._scale))
            self._read = past_mean, past_scale
            if self.stores:
                mean = torch.lerp(past_mean, own_mean, batch_weight)
                scale = torch.lerp(past_scale, own_scale, batch_weight)
                finite = (torch.maximum(mean.abs(), scale.abs()) < math.inf).all()
                self._mean.copy_(torch.where(finite, mean, self._mean))
                self._scale.copy_(torch.where(finite, scale, self._scale))
        return self._read

    def of_input(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        own_mean: Tensor,
        own_scale: Tensor,
        batch_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        batch_weight: Tensor,
        variance_rule: VarianceRule,
        eps: float,
    ) -> Tensor:
        """Return dx, and write G and S if this is the first backward pass.

        Args:
            dy: gradient of the output.
            x: input.
            weight: scale, shape (C,), or None.
            own_mean: the mean of dy over the batch, shape (C,).
            own_scale: the mean of dy times the normalized input, as well.
            batch_mean: mean of the batch.
            mean: that normalized it.
            var: that normalized it.
            batch_weight: a, 0-dim or shape (C,).
            variance_rule: that of the forward.
            eps: added to the variance.
        """
        past_mean, past_scale = self.past(own_mean, own_scale, batch_weight)
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        rstd = torch.rsqrt(var + eps)
        center = mean if variance_rule == "pooled" else batch_mean
        g = torch.lerp(past_mean, own_mean, batch_weight).view(per_channel)
        slope = (torch.lerp(past_scale, own_scale, batch_weight) * rstd).view(per_channel)
        # in the dtype of statistics, so that half gradients are rounded once
        left = torch.addcmul(dy.to(g.dtype) - g, x.to(g.dtype) - center.view(per_channel), slope, value=-1)
        scale = rstd if weight is None else weight * rstd
        return left.mul_(scale.view(per_channel)).to(x.dtype)


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
