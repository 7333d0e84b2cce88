"""What the noise of a layer's batches adds to the loss, measured by forwards with that noise alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.layers.layer import statistics_for
from mbnorm.noise import Noise, NoiseMeter
from mbnorm.observe import Forward, Observer, observe
from mbnorm.values import has_values

Loss: TypeAlias = Callable[[Any, Any], Tensor | float]
"""Is given what the model returns and the batch, and returns the loss."""

BATCHES = 32
"""How many batches the loss is taken of."""


class NoiseCost(NamedTuple):
    """What noise adds to the loss.

    Attributes:
        added: the loss with the noise minus the loss without it, in the mean over batches.
        error: its standard error.
        matched: what is left of it with the noise that Matched BN would have.
    """

    added: float
    error: float
    matched: float


class NoiseCosts(NamedTuple):
    """What noise adds to the loss of a model.

    Attributes:
        loss: without noise.
        of_all: what the noise of all layers together adds.
        of_each: what that of each layer adds by itself; layers that are frozen or not reached have none.
    """

    loss: float
    of_all: NoiseCost
    of_each: dict[_BatchNorm, NoiseCost]


def noise_costs(
    model: nn.Module,
    batches: Sequence[Any],
    meters: Mapping[_BatchNorm, NoiseMeter],
    loss: Loss,
    matched_batch_size: int,
    forward: Forward | None,
    device: torch.device | str | int | None,
) -> NoiseCosts:
    r"""Measure what the noise of each layer adds to the loss, the others normalizing without any.

    Without noise a layer normalizes with the statistics :math:`\mu, \sigma^2` of all that its meter was
    given. With noise it normalizes as in train mode, and with a part k of the noise

    .. math::
        \mathrm{mean} = \mu + k\,(m_B - \mu), \qquad \mathrm{var} = \sigma^2 + k\,(v_B - \sigma^2), \qquad
        k = \min\big(1, \sqrt{w / N}\big), \quad w = \min(m, n_\mathrm{eff})

    Each of L layers takes two forwards a batch, and all together three.

    Args:
        model: any module with batch norms.
        batches: of which the loss is taken.
        meters: of the layers, which have seen batches.
        loss: is given what the model returns and the batch.
        matched_batch_size: N.
        forward: how to call the model, as for `observe`.
        device: where the batches' tensors are moved first.

    Raises:
        ValueError: a loss is no single number.
    """
    noises = {
        layer: meter.result() for layer, meter in meters.items() if meter.batches > 1 and not meter.frozen
    }
    without = {layer: Normalizer(meters[layer]) for layer in noises}
    observers: dict[_BatchNorm, Observer] = {layer: without.get(layer, _as_it_is) for layer in meters}

    def losses(noisy: Mapping[_BatchNorm, "Normalizer"]) -> list[float]:
        found: list[float] = []

        def note(output: Any, batch: Any) -> None:
            found.append(_number(loss(output, batch)))

        observe(model, batches, {**observers, **noisy}, forward, device, note)
        return found

    plain = losses({})

    def cost(layers: Sequence[_BatchNorm]) -> NoiseCost:
        def added(parts: Mapping[_BatchNorm, float]) -> list[float]:
            noisy = losses({layer: Normalizer(meters[layer], part) for layer, part in parts.items()})
            return [one - other for one, other in zip(noisy, plain, strict=True)]

        of_batch = added(dict.fromkeys(layers, 1.0))
        of_matched = added({layer: matched_part(noises[layer], matched_batch_size) for layer in layers})
        return NoiseCost(_mean(of_batch), _standard_error(of_batch), _mean(of_matched))

    return NoiseCosts(_mean(plain), cost(list(without)), {layer: cost([layer]) for layer in without})


def matched_part(noise: Noise, matched_batch_size: int) -> float:
    """Return the part of a batch's noise that statistics of so many samples have."""
    if noise.effective_values is None:
        return 1.0
    worth = min(noise.samples, noise.effective_values)
    return min(1.0, math.sqrt(worth / matched_batch_size))


class Normalizer:
    """Normalizes a layer with the statistics of all batches, and a part of the noise of the one at hand."""

    def __init__(self, meter: NoiseMeter, part: float = 0.0) -> None:
        self.meter = meter
        self.population = meter.population()
        self.part = part

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and variance to normalize a layer's input with."""
        mean, var = self.population
        if not self.part:
            return mean, var
        own_var, own_mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
        if self.part == 1.0:
            return self.meter.in_training(own_mean, own_var, x.numel() // x.shape[1], x.shape[0])
        own_mean, own_var = statistics_for(self.meter.layer, own_mean, own_var)
        return torch.lerp(mean, own_mean, self.part), torch.lerp(var, own_var, self.part)


def _as_it_is(x: Tensor) -> None:
    return None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    count, mean = len(values), _mean(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan


def _number(loss: Tensor | float) -> float:
    if isinstance(loss, Tensor) and (loss.numel() != 1 or not has_values(loss)):
        raise ValueError(f"expected a loss that is one number, got one of shape {tuple(loss.shape)}")
    return float(loss)
