"""The operator composed of ATen's own batch norm kernels: exact gradients, no compiled code of ours.

The gradient of the blended operator is linear in the training gradient of batch norm taken at the
blended statistics, so ATen's backward kernel gives all the reductions.
"""

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule, blend, ruled, statistics_dtype

DEVICES = ("cpu", "cuda")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance_rule: VarianceRule,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return ``y`` and the rows of a `mbnorm.functional.Record`."""
    batch_mean, batch_var = ruled(*statistics(x, past_mean.dtype), variance_rule)
    mean, var = blend(batch_mean, batch_var, past_mean, past_var, batch_weight, variance_rule)
    y, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
    return y, (batch_mean, batch_var, mean, var, past_mean, past_var, batch_weight)


def statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel in ``dtype``, that of statistics."""
    running = None, None
    if x.dtype != dtype:
        # without running buffers ATen gives the statistics of half inputs in half, where they overflow
        running = tuple(torch.zeros(2, x.shape[1], dtype=dtype, device=x.device))
    return torch.batch_norm_update_stats(x, *running, 0.0)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rows: tuple[Tensor, ...],
    variance_rule: VarianceRule,
    eps: float,
    need_dx: bool,
    past: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ``(dx, dw, db)`` for the rows that `forward` returned.

    ``past`` is what `mbnorm.backends.cpu.backward` takes.
    """
    sums = Sums(dy, x, weight, rows, variance_rule, eps)
    if not need_dx:
        return None, sums.dw, sums.db
    batch_weight = rows[6]
    if past is None:
        taken = batch_weight * sums.mean_of_dy, batch_weight * sums.mean_of_products
    else:
        taken = (
            torch.lerp(past[0], sums.mean_of_dy, past[2]),
            torch.lerp(past[1], sums.mean_of_products, past[2]),
        )
    return sums.dx(*taken), sums.dw, sums.db


class Sums:
    """The first pass of a backward: ``dw`` and ``db``."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        rows: tuple[Tensor, ...],
        variance_rule: VarianceRule,
        eps: float,
    ) -> None:
        batch_mean, _, mean, var, *_ = rows
        self._center = mean if variance_rule == "pooled" else batch_mean
        self._subtracts_mean = variance_rule != "uncentered"
        self._dtype = x.dtype
        # upcast so that half gradients are rounded once, after the last addition
        dtype = statistics_dtype(x.dtype)
        self._dy, self._x = dy.to(dtype), x.to(dtype)
        self._var, self._eps = var, eps
        self._rstd = torch.rsqrt(var + eps)
        self._weight = weight
        self._n = x.numel() // x.shape[1]
        # no sum depends on it, but some devices want one
        given = torch.ones_like(mean) if weight is None else weight
        _, self.dw, self.db = torch.ops.aten.native_batch_norm_backward(
            self._dy, self._x, given, None, None, mean, self._rstd, True, eps, [False, True, True]
        )

    @property
    def mean_of_dy(self) -> Tensor:
        """Of each channel."""
        return torch.div(self.db, self._n)

    @property
    def mean_of_products(self) -> Tensor:
        """Of dy with the normalized input."""
        return torch.div(self.dw, self._n)

    def dx(self, g: Tensor, s: Tensor) -> Tensor:
        """Do the second pass: take two means, as `mbnorm.gradient.RememberedGradient` has them, out of dy."""
        scale = self._rstd if self._weight is None else self._weight * self._rstd
        shift = -scale * g if self._subtracts_mean else None
        # the normalization is ATen's fastest way to a multiple of each channel
        dx, _, _ = torch.native_batch_norm(
            self._x, -scale * s, shift, self._center, self._var, False, 0.0, self._eps
        )
        dx.addcmul_(self._dy, scale.view([1, -1] + [1] * (dx.dim() - 2)))
        return dx.to(self._dtype)
