"""What small batches do to each batch norm of a model, and what would help."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.convert import IDEAL_BATCH_SIZE, without_batch_norm
from mbnorm.diagnosis import ITSELF, Diagnosis, LayerDiagnosis, Recommendation, Verdict, number
from mbnorm.noise import Noise, NoiseMeter
from mbnorm.observe import Forward, observe

ENOUGH_VALUES = IDEAL_BATCH_SIZE
"""Effective values per batch from which noise does no harm: the ECCV paper's ideal batch size."""

VALUES_IF_ALIKE = 128
"""How many it takes where values are alike."""


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
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

    :math:`\mathrm{Var}(m_b)` is measured between the batches: n_eff is n for independent values, less where
    they are alike (neighboring pixels, an image's brightness, batches of one class), more where they make
    up for one another. A layer is noisy below 32 used values, and one with a memory below 16.

    What is recommended there, and done by `Diagnosis.convert`, has the noise of 32 values, and no longer
    a memory than that takes: "matched" with measured=False, which goes by n, and with matched_values =
    32 n / n_eff. It is 128 in place of 32 where values are alike, by image or by batch: what they have in
    common is what a net learns to see, and a batch is then worth less than it was to the untrained net.

    Printed, the table has a line a layer, and says under it what its columns mean: the values n of a batch,
    n_eff and n_used; the errors of the batch's own mean, in standard deviations of a channel, and variance,
    relative to the channel's; the distance between the outputs of train and eval mode, before weight and
    bias; the errors of the running statistics; how many channels are dead, and how many explode; the
    verdict, what would help, with the matched_values that it takes, and the size of shuffled batches that
    would do instead. Columns that say nothing of any layer are left out.

    A layer is stale if its running statistics are off by more than those of 32 values would be. The model
    is if recalibrating then brings its eval mode closer to its train mode, over all layers: where memories
    lag behind, too, the net has learned with that.

    The pass is that of `recalibrate`: eval mode, each layer normalizing with all that it has been given so
    far. So a layer's noise is its own, not that of those before it, and the running statistics are
    compared with what recalibrating on the same batches would set. The model, torch's random streams
    included, is as before on return, and if anything raises. It takes O(C) memory a layer.

    Args:
        model: its batch norms are measured, ours and torch's, SyncBatchNorm included (each rank its part).
        batches: at least 2, of the size and drawn in the way that the model is trained with; about 100
            make n_eff of a single channel accurate to 14 percent. In form as for `recalibrate`.
        forward: called with the model and a batch instead, where that does not fit.
        device: where the batches' tensors are moved first.

    Raises:
        ValueError: the model has no batch norm, or none was given at least 2 batches.

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
    observe(model, batches, meters, forward, device)
    found = tuple(
        _diagnosis(layers[layer] or ITSELF, meter) for layer, meter in meters.items() if meter.batches > 1
    )
    if not found:
        most = max(meter.batches for meter in meters.values())
        raise ValueError(f"expected at least 2 batches to reach a batch norm, got {most}")
    unreached = tuple(name for layer, name in layers.items() if meters[layer].batches < 2)
    return Diagnosis(found, unreached, *_overall(found))


def _has_running(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None


def _diagnosis(name: str, meter: NoiseMeter) -> LayerDiagnosis:
    noise = meter.result()
    own, frozen = type(meter.layer).__name__, meter.frozen
    noisy, used = False, None
    if noise.effective_values is not None and not frozen:
        used = noise.effective_values * noise.pooled_batches
        # of what was given 32 values other batches, or the weights of later, may find less
        noisy = used < (ENOUGH_VALUES if noise.pooled_batches == 1 else ENOUGH_VALUES / 2)
    stale = _is_stale(noise)
    verdict: Verdict = "fine"
    recommendation: Recommendation = "none"
    matched_values = ideal_batch_size = None
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
        # what values have in common a net learns to see, and their worth falls to a half, a quarter or less
        alike = _values_alike(noise, noise.effective_values) or _batches_alike(noise)
        wanted = VALUES_IF_ALIKE if alike else ENOUGH_VALUES
        # so that (N - n) / (N + n) is what n_eff values need
        matched_values = math.ceil(wanted * noise.values / noise.effective_values)
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
        reasons.append(f"{number(used)} effective values normalize a batch" if used else "nothing to mend")
    return LayerDiagnosis(
        name, own, noise, verdict, recommendation, matched_values, ideal_batch_size, stale, "; ".join(reasons)
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


def _values_alike(noise: Noise, effective: float) -> bool:
    """Whether the values of a batch are worth less than their number, and less than chance makes them."""
    return noise.values > effective * (1 + 3 * math.sqrt(2 / (noise.batches - 1)))


def _batches_alike(noise: Noise) -> bool:
    """Whether the samples of a batch are more alike than chance makes those of one channel."""
    by_chance = 1 + 3 * math.sqrt(2 * (1 - 1 / noise.samples) / (noise.batches - 1))
    return noise.alikeness is not None and noise.alikeness > by_chance


def _ideal_batch_size(noise: Noise, effective: float) -> int:
    if _batches_alike(noise) and noise.alikeness is not None:
        # as many samples would have so many more effective values if they were drawn independently
        effective *= noise.alikeness
    return max(1, math.ceil(ENOUGH_VALUES * noise.samples / effective))


def _why_noisy(noise: Noise, effective: float, used: float, own: str) -> str:
    words = (
        f"a batch has {number(noise.values)} values a channel, as noisy as {number(effective)} independent "
        f"ones: its mean is wrong by {noise.mean_error:.2g} standard deviations, its variance by "
        f"{noise.var_error:.0%}"
    )
    if noise.pooled_batches > 1:
        words += f"; with its memory {own} normalizes with {number(used)}, too few"
    if _batches_alike(noise):
        words += (
            f"; its samples are alike ({noise.alikeness:.1f} times the noise of independent ones): shuffle "
            "them if you can"
        )
    return words


def _overall(layers: tuple[LayerDiagnosis, ...]) -> tuple[Recommendation, int | None, bool, str]:
    ideal_batch_size = _largest(layer.ideal_batch_size for layer in layers)
    noisy = sum(layer.ideal_batch_size is not None for layer in layers)
    stale, helps = sum(layer.stale for layer in layers), _recalibrating_helps(layers)
    off = f"{stale} of {len(layers)} layers have running statistics that are not those of the data"
    if stale and not helps:
        off += ", but the net has learned with such"
    if noisy:
        reason = (
            "recommended: mbnorm.diagnose(model, batches).convert(model), or shuffled batches of "
            f"{ideal_batch_size}: {noisy} of {len(layers)} layers normalize training batches with too few "
            "effective values"
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
        "recommended: no other normalization: enough effective values normalize the batches of every layer"
    )
    if are_same:
        reason = (
            "not known: the batches are the same, so that they show no noise. Give different ones, of the "
            "size that the model is trained with"
        )
    if stale:
        reason += f"; {off}"
    if broken:
        reason = f"recommended: mend dead or exploding channels first, in {broken} of {len(layers)} layers"
    return "none", None, False, reason


def _channels(indices: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"channel {shown} is" if len(indices) == 1 else f"{len(indices)} channels ({shown}) are"


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
