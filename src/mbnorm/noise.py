"""How much the statistics of a layer's batches scatter, measured batch by batch in O(C) memory."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.blend import blend
from mbnorm.layers import HistoryBatchNorm
from mbnorm.layers.layer import statistics_for
from mbnorm.values import is_trained

DEAD = 0.01
"""A channel's variance, in eps, up to which it is dead: the deviation of its outputs is 0.1 at most."""
SAME = 1e6
"""The effective sample size over n, from which batches differ by rounding only."""
EXPLODED = 100
"""A channel's root mean square, in those of its layer's median channel, from which it has exploded."""


class Noise(NamedTuple):
    """What was measured of a layer; None is unknown from these batches.

    Means over channels leave out those that are dead or exploding; roots are taken after the mean.

    Attributes:
        batches: how many batches the layer was given.
        samples: their mean size m.
        values: their mean number n of values per channel, positions included.
        effective_values: how many independent values have a mean as noisy as the batches'; infinite if the
            batches are the same.
        mean_error: standard error of the batch mean, in standard deviations of the channel.
        var_error: root mean square error of the biased batch variance, relative to the channel's.
        variance_inflation: variance of the batch mean, in units of that of as many samples drawn
            independently: 1 for shuffled batches, more where the samples of a batch are correlated.
        pooled_batches: how many batches' noise is averaged out by the layer's memory; 1 without one.
        mismatch: root mean square difference between the outputs that train and eval mode give for the same
            input, before weight and bias; 0 for a frozen layer; None if the running statistics are still
            the initial ones.
        recalibrated_mismatch: the same with the statistics that recalibrating would set.
        running_mean_error: distance of running_mean from the mean, in standard deviations of the channel;
            None if the running statistics are still the initial ones.
        running_var_error: distance of running_var from the variance, relative to it.
        dead: channels whose variance is a hundredth of the layer's eps or less: they come out constant, or
            nearly so.
        exploding: channels with values that are not finite, or that are 100 times those of the median one.
    """

    batches: int
    samples: float
    values: float
    effective_values: float | None
    mean_error: float | None
    var_error: float | None
    variance_inflation: float | None
    pooled_batches: float
    mismatch: float | None
    recalibrated_mismatch: float | None
    running_mean_error: float | None
    running_var_error: float | None
    dead: tuple[int, ...]
    exploding: tuple[int, ...]


class NoiseMeter:
    r"""Measures a layer from its inputs x_b, n_b values per channel each, with mean m_b and variance v_b.

    .. math::
        \mathrm{mean} = \tfrac1N \sum_b n_b m_b, \qquad
        \tau = \tfrac1{B-1} \sum_b n_b (m_b - \mathrm{mean})^2, \qquad
        \sigma^2 = \tfrac1N \sum_b n_b v_b + \tau / n, \qquad
        n_\mathrm{eff} = n\,\sigma^2 / \tau

    with n = N/B. The variance inflation of m samples whose means have the variance u within a batch is
    :math:`m\,(\tau/n) \,/\, (\tau/n + (m-1)\,u/m)`, at most m.
    :math:`\sigma^2` has no bias whatever the correlation of the values, and neither has
    :math:`\tau/n` as the variance of the mean of n values. Of C independent channels and B batches
    :math:`1/n_\mathrm{eff}` has the relative standard error :math:`\sqrt{2/(C(B-1))}`.

    Args:
        layer: a batch norm.
        frozen: whether it normalizes with its running statistics in train mode, too.
    """

    def __init__(self, layer: _BatchNorm, frozen: bool) -> None:
        self.layer = layer
        self.frozen = frozen
        # others stand in for them during the pass
        self.running = (layer.running_mean, layer.running_var)
        self.batches = 0
        self.samples = self.values = 0
        self.pooled_batches = 0.0

    def _start(self, mean: Tensor) -> None:
        # not before: lazy layers have no channels yet
        self.finite = torch.ones_like(mean, dtype=torch.bool)
        self.count, self.pairs = torch.zeros_like(mean), torch.zeros_like(mean)
        self.sample_scatter = torch.zeros_like(mean)
        self.center, self.modes = mean, mean.new_zeros(5, len(mean))
        # of the batches' means and of their variances, in rows
        self.mean, self.spread = mean.new_zeros(2, len(mean)), mean.new_zeros(2, len(mean))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take a layer's input, and let it be normalized with all so far."""
        m, n = x.shape[0], x.numel() // x.shape[1]
        x = x.double()
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        if self.batches == 0:
            self._start(mean)
        batch = torch.stack((mean, var))
        finite = batch.isfinite().all(0)
        self.finite &= finite
        self.batches += 1
        self.samples += m
        self.values += n
        self.count = self.count + n * finite
        step = torch.where(finite, batch - self.mean, 0.0)
        self.mean = self.mean + step * n / self.count.clamp_min(1)
        # no less than 0, as rounding could make it
        self.spread = self.spread + (n * step * torch.where(finite, batch - self.mean, 0.0)).clamp_min(0)
        if m > 1:
            between_samples = x.flatten(2).mean(2).var(0) if x.dim() > 2 else x.var(0)
            self.pairs = self.pairs + finite
            self.sample_scatter = self.sample_scatter + torch.where(finite, n * between_samples / m, 0.0)
        self._compare_modes(mean, var, n, m)
        return None if self.frozen else self.population()

    def population(self) -> tuple[Tensor, Tensor]:
        """Return what normalizes all values so far: their mean and biased variance, or 0 and mean square."""
        mean, within = self.mean
        return statistics_for(self.layer, mean, within + self.spread[0] / self.count.clamp_min(1))

    def in_training(self, mean: Tensor, var: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
        """Return what a batch of these statistics is normalized with in train mode, unless it is frozen."""
        layer = self.layer
        if isinstance(layer, HistoryBatchNorm) and layer.has_memory:
            memory = layer.memory
            mean, var = statistics_for(layer, mean, var)
            return blend(mean, var, *memory.read(layer.state, n, m), memory.variance_rule)
        return mean, var

    def _compare_modes(self, mean: Tensor, var: Tensor, n: int, m: int) -> None:
        """Add what this batch's output in train mode has to be compared with that of any statistics."""
        layer, pooled_batches = self.layer, 1.0
        if isinstance(layer, HistoryBatchNorm) and layer.has_memory:
            pooled_batches = layer.memory.pooled_batches(layer.state, n, m)
        train_mean, train_var = self.in_training(mean, var, n, m)
        self.pooled_batches += pooled_batches
        running_mean, running_var = self.running
        if self.frozen and running_mean is not None and running_var is not None:
            train_mean, train_var = running_mean.double(), running_var.double()
        # about the first batch's mean, since a mean may be many deviations from 0
        centred, rstd = mean - self.center, (train_var + layer.eps).rsqrt()
        shift = (mean - train_mean) * rstd
        terms = (
            rstd.square() * var + shift.square(),
            rstd * var + shift * centred,
            shift,
            var + centred.square(),
            centred,
        )
        self.modes = self.modes + torch.stack(terms)

    def _mismatch(self, mean: Tensor, var: Tensor, live: Tensor) -> float | None:
        """Return how far the outputs of train mode are from those with these statistics."""
        square, product, shift, own_square, own = self.modes / self.batches
        mean, rstd = mean.double() - self.center, (var.double() + self.layer.eps).rsqrt()
        own_square = own_square - 2 * mean * own + mean.square()
        squares = square - 2 * rstd * (product - mean * shift) + rstd.square() * own_square
        return _rms(squares.clamp_min(0), live)

    def result(self) -> Noise:
        """Return what the batches so far have shown.

        Raises:
            ValueError: less than two batches.
        """
        if self.batches < 2:
            raise ValueError(f"expected at least 2 batches, got {self.batches}")
        b, n = self.batches, self.values / self.batches
        between, scatter = self.spread / (b - 1) / n
        mean, within = self.mean
        var = within + between
        dead, exploding = self._dead_and_exploding(mean, var)
        live = ~(dead | exploding)
        mean_error = _rms(between / var, live)
        return Noise(
            batches=b,
            samples=self.samples / b,
            values=n,
            effective_values=None if mean_error is None else _effective_values(mean_error, n),
            mean_error=mean_error,
            var_error=_rms((scatter + (within - var).square()) / var.square(), live),
            variance_inflation=self._variance_inflation(between, var, live),
            pooled_batches=self.pooled_batches / b,
            mismatch=self._running_mismatch(live),
            recalibrated_mismatch=self._mismatch(*self.population(), live),
            **self._running_errors(live),
            dead=_indices(dead),
            exploding=_indices(exploding),
        )

    def _variance_inflation(self, between: Tensor, var: Tensor, live: Tensor) -> float | None:
        if not self.pairs.any():
            # batches of one sample say nothing of how samples scatter within a batch
            return None
        m = self.samples / self.batches
        within = self.sample_scatter / self.pairs * self.batches / self.values
        # m times: the variance of the samples' means over all data, between and within batches
        independent = _rms((between + (m - 1) * within) / m / var, live)
        error = _rms(between / var, live)
        return (error / independent) ** 2 if error and independent else None

    def _dead_and_exploding(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        finite = self.finite
        dead = finite & (var <= DEAD * self.layer.eps)
        size = (mean.square() + var).sqrt()
        usual = size[finite & ~dead]
        if len(usual) == 0:
            return dead, ~finite
        return dead, ~finite | (size > EXPLODED * usual.quantile(0.5))

    def _has_trained(self) -> bool:
        """Whether the running statistics are not those that torch starts with."""
        mean, var = self.running
        return mean is not None and var is not None and is_trained(mean, var)

    def _running_mismatch(self, live: Tensor) -> float | None:
        mean, var = self.running
        if mean is None or var is None or not self._has_trained() or not live.any():
            return None
        return 0.0 if self.frozen else self._mismatch(mean, var, live)

    def _running_errors(self, live: Tensor) -> dict[str, float | None]:
        mean, var = self.running
        keys = ("running_mean_error", "running_var_error")
        if mean is None or var is None or not self._has_trained():
            return dict.fromkeys(keys)
        true_mean, true_var = self.population()
        errors = ((mean - true_mean).square() / true_var, (var / true_var - 1).square())
        return dict(zip(keys, (_rms(error, live) for error in errors), strict=True))


def _rms(squares: Tensor, channels: Tensor) -> float | None:
    return float(squares[channels].mean().sqrt()) if channels.any() else None


def _effective_values(mean_error: float, values: float) -> float:
    return 1 / mean_error**2 if SAME * values * mean_error**2 > 1 else math.inf


def _indices(channels: Tensor) -> tuple[int, ...]:
    return tuple(channels.nonzero()[:, 0].tolist())
