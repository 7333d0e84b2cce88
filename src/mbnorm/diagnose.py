"""What small batches do to each batch norm of a model, and what would help."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.convert import IDEAL_BATCH_SIZE, without_batch_norm
from mbnorm.diagnosis import ITSELF, Diagnosis, LayerDiagnosis, Recommendation, Verdict, number
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.noise import Noise, NoiseMeter
from mbnorm.noise_cost import BATCHES, Loss, NoiseCost, noise_costs
from mbnorm.observe import Forward, observe

ENOUGH_VALUES = IDEAL_BATCH_SIZE
"""Effective values per batch from which noise does no harm: the ECCV paper's ideal batch size."""


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    device: torch.device | str | int | None = None,
) -> Diagnosis:
    r"""Measure how small batches hurt each batch norm of a model, and say what would help.

    .. math::
        n_\mathrm{eff} = \frac{\sigma^2}{\mathrm{Var}(m_b)}, \qquad
        n_\mathrm{used} = n_\mathrm{eff} \cdot \begin{cases}
            1 & \text{torch's batch norm} \\
            (1+\lambda)/(1-\lambda) & \text{Momentum, matched} \\
            (\sum_i w_i)^2 / \sum_i w_i^2 & \text{Memorized}
        \end{cases}

    :math:`\mathrm{Var}(m_b)` is the variance of the batch means over the batches. The effective sample size
    n_eff is n for independent values, smaller for correlated ones (pixels, batches of one class), and
    larger for values that compensate each other. A layer is noisy if n_used is below 32, or below 16 with a
    memory.

    If a layer is noisy, convert the model: `mbnorm.convert` gives all layers a memory. In those with enough
    values it is short. The effective sample size says how noisy a layer's batches are, not what that costs:
    to convert the noisy layers alone does no better, and in some nets worse.

    Printed, the table has a line for each layer, and a line below for the meaning of each column. Columns
    that say nothing of any layer are left out.

    A layer is stale if its running statistics have a larger error than those of 32 values. The model is
    stale if a layer is, and recalibrating brings the outputs of eval mode closer to those of train mode.

    The pass is that of `recalibrate`: eval mode, and each layer normalizes with all that it has been given
    so far. So the noise of a layer is its own, not that of layers before it. Afterwards, and if anything
    raises, the model and torch's random streams are as before. It takes O(C) memory for each layer.

    With a ``loss`` two more columns say what the noise of each layer adds to it: the loss where this layer
    normalizes as in train mode and the others with the statistics of all batches, minus the loss where all
    layers use the statistics of all batches. The second column is the same with the noise that Matched BN
    would have. Both are means over the first 32 batches, which are kept in memory. L layers take 2 L + 3
    more forwards of each. Nothing is assumed of the noise; what it does to gradients is not in the numbers.

    Args:
        model: its batch norms are measured, ours and torch's, SyncBatchNorm included (each rank its part).
        batches: at least 2, of the size and drawn in the way that the model is trained with; about 100
            make n_eff of a single channel accurate to 14 percent. In form as for `recalibrate`.
        loss: called with what the model returns and the batch, as in
            ``loss=lambda output, batch: F.cross_entropy(output, batch[1])``; returns one number.
        forward: called with the model and a batch instead, where that does not fit.
        device: where the batches' tensors are moved first.

    Raises:
        ValueError: the model has no batch norm, or none was given at least 2 batches, or a loss is not one
            number.

    Source: ours; 32 values are the ideal batch size of Yong et al., ECCV 2020.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> found = diagnose(model, torch.randn(100, 2, 4))
    >>> found.layers[0].verdict, found.recommendation
    ('noisy', 'matched')
    """
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    if not layers:
        raise ValueError(without_batch_norm(model))
    meters = {
        layer: NoiseMeter(layer, frozen=model.training and not layer.training and _has_running(layer))
        for layer in layers
    }
    kept: list[Any] = []
    observe(model, batches if loss is None else _keeping(batches, kept), meters, forward, device)
    reached = {layer: meter for layer, meter in meters.items() if meter.batches > 1}
    if not reached:
        most = max(meter.batches for meter in meters.values())
        raise ValueError(f"expected at least 2 batches to reach a batch norm, got {most}")
    costs = (
        None
        if loss is None
        else noise_costs(model, kept, meters, loss, MeasuredAverage().matched_batch_size, forward, device)
    )
    found = tuple(
        _diagnosis(layers[layer] or ITSELF, meter, costs and costs.of_each.get(layer))
        for layer, meter in reached.items()
    )
    unreached = tuple(name for layer, name in layers.items() if layer not in reached)
    overall = _overall(found)
    return Diagnosis(found, unreached, *overall, costs and costs.loss, costs and costs.of_all)


def _keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """Pass batches on, and keep the first that the loss is taken of."""
    for batch in batches:
        if len(kept) < BATCHES:
            kept.append(batch)
        yield batch


def _has_running(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None


def _diagnosis(name: str, meter: NoiseMeter, cost: NoiseCost | None) -> LayerDiagnosis:
    noise = meter.result()
    own, frozen = type(meter.layer).__name__, meter.frozen
    noisy, used = False, None
    if noise.effective_values is not None and not frozen:
        used = noise.effective_values * noise.pooled_batches
        # a layer with a memory of 32 values may have fewer with other batches or later weights
        noisy = used < (ENOUGH_VALUES if noise.pooled_batches == 1 else ENOUGH_VALUES / 2)
    stale = _is_stale(noise)
    verdict: Verdict = "fine"
    recommendation: Recommendation = "none"
    ideal_batch_size = None
    reasons = []
    if noise.exploding:
        verdict = "exploding"
        reasons.append(
            f"{_channels(noise.exploding)} not finite or 100 times as large as the median one: look at the "
            "learning rate and at what feeds this layer"
        )
    if noise.dead:
        verdict = "dead" if verdict == "fine" else verdict
        reasons.append(f"{_channels(noise.dead)} constant, so nothing gets through")
    if noisy and noise.effective_values is not None and used is not None:
        verdict = "noisy" if verdict == "fine" else verdict
        recommendation = "matched"
        ideal_batch_size = _ideal_batch_size(noise, noise.effective_values)
        reasons.append(_why_noisy(noise, noise.effective_values, used, own))
    if stale:
        verdict = "stale" if verdict == "fine" else verdict
        recommendation = "recalibrate" if recommendation == "none" else recommendation
        reasons.append(
            f"running_mean is {noise.running_mean_error:.2g} standard deviations and running_var "
            f"{noise.running_var_error:.0%} from what the data give under the present weights"
        )
    if frozen:
        words = "frozen: normalizes with its running statistics in training, too"
        reasons.append(words + ("; to recalibrate it put it in train mode first" if stale else ""))
    if _are_same(noise):
        reasons.append("the batches are the same, so their noise is not known")
    elif verdict == "fine":
        reasons.append(f"{number(used)} effective values normalize a batch" if used else "nothing to repair")
    return LayerDiagnosis(
        name,
        own,
        noise,
        verdict,
        recommendation,
        ideal_batch_size,
        stale,
        "; ".join(reasons),
        cost,
    )


def _are_same(noise: Noise) -> bool:
    """Whether the batches have the same means, as when one is given again, or all data shuffled."""
    return noise.effective_values == math.inf


def _is_stale(noise: Noise) -> bool:
    """Whether running statistics are further off than those of enough values, and than can be measured."""
    mean, var = noise.running_mean_error, noise.running_var_error
    if mean is None or var is None or noise.effective_values is None:
        return False
    square = 1 / ENOUGH_VALUES + 1 / (noise.batches * noise.effective_values)
    return mean**2 > square or var**2 > 2 * square


def _recalibrating_helps(layers: tuple[LayerDiagnosis, ...]) -> bool:
    """Whether a layer is stale, and recalibrating, which sets all, brings eval mode closer to train mode.

    The net has learned with what its layers normalize with: where that lags behind the data, too, exact
    statistics can be further from it.
    """
    if not any(layer.stale for layer in layers):
        return False
    # frozen layers are the same in both modes
    modes = [
        (layer.noise.mismatch, layer.noise.recalibrated_mismatch) for layer in layers if layer.noise.mismatch
    ]
    return not modes or sum((then or 0.0) ** 2 - now**2 for now, then in modes) < 0


def _samples_correlated(noise: Noise) -> bool:
    """Whether the samples of a batch are more correlated than chance makes those of one channel."""
    by_chance = 1 + 3 * math.sqrt(2 * (1 - 1 / noise.samples) / (noise.batches - 1))
    return noise.variance_inflation is not None and noise.variance_inflation > by_chance


def _ideal_batch_size(noise: Noise, effective: float) -> int:
    if _samples_correlated(noise) and noise.variance_inflation is not None:
        # independent samples would have so many times the effective sample size
        effective *= noise.variance_inflation
    return max(1, math.ceil(ENOUGH_VALUES * noise.samples / effective))


def _why_noisy(noise: Noise, effective: float, used: float, own: str) -> str:
    words = (
        f"a batch has {number(noise.values)} values a channel, as noisy as {number(effective)} independent "
        f"ones: its mean has an error of {noise.mean_error:.2g} standard deviations, its variance one of "
        f"{noise.var_error:.0%}"
    )
    if noise.pooled_batches > 1:
        words += f"; with its memory {own} normalizes with {number(used)}, too few"
    if _samples_correlated(noise):
        words += (
            f"; its samples are correlated ({noise.variance_inflation:.1f} times the noise of independent "
            "ones): shuffle them if you can"
        )
    return words


def _overall(layers: tuple[LayerDiagnosis, ...]) -> tuple[Recommendation, int | None, bool, str]:
    ideal_batch_size = _largest(layer.ideal_batch_size for layer in layers)
    noisy = sum(layer.ideal_batch_size is not None for layer in layers)
    stale, helps = sum(layer.stale for layer in layers), _recalibrating_helps(layers)
    off = f"{stale} of {len(layers)} layers have running statistics that are not those of the data"
    if stale and not helps:
        off += ", but the net was trained with statistics like these"
    if noisy:
        reason = (
            f"noisy: {noisy} of {len(layers)} layers normalize their batches with too few effective values. "
            f"Recommended: mbnorm.convert(model), or shuffled batches of {ideal_batch_size}"
        )
        if helps:
            reason += "; mbnorm.recalibrate(model, batches) before you evaluate this net as it is"
        if stale:
            reason += f"; {off}"
        return "matched", ideal_batch_size, helps, reason
    are_same = any(_are_same(layer.noise) for layer in layers)
    if helps:
        reason = f"recommended: mbnorm.recalibrate(model, batches): {off}"
        if are_same:
            reason += "; the batches are the same, so that they show no noise"
        return "recalibrate", None, True, reason
    broken = sum(layer.verdict in ("dead", "exploding") for layer in layers)
    reason = (
        "recommended: keep the net as it is: enough effective values normalize the batches of every layer"
    )
    if are_same:
        reason = (
            "not known: the batches are the same, so that they show no noise. Give different ones, of the "
            "size that the model is trained with"
        )
    if stale:
        reason += f"; {off}"
    if broken:
        reason = f"recommended: repair dead or exploding channels first, in {broken} of {len(layers)} layers"
    return "none", None, False, reason


def _channels(indices: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"channel {shown} is" if len(indices) == 1 else f"{len(indices)} channels ({shown}) are"


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
