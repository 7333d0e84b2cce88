"""What a layer loads: its own checkpoints, torch's, and what others have made of either."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbnorm.blend import statistics_dtype
from mbnorm.gradient import GRADIENT_BUFFERS
from mbnorm.layers.seal import AGREES, SAMPLES, SEAL, sample_of
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import Memory, plain
from mbnorm.values import has_values, known_finite

if TYPE_CHECKING:
    from mbnorm.layers.layer import HistoryBatchNorm


def options_written(layer: "HistoryBatchNorm") -> dict[str, Any]:
    """Return the options that are saved so that a load can compare them."""
    options = {name: getattr(layer.memory, name) for name in layer.memory.written}
    of_the_layer = {"eps": layer.eps, "gradient": layer.gradient}
    return {name: plain(value) for name, value in {**of_the_layer, **options}.items()}


def fit_state_dict(
    layer: "HistoryBatchNorm", state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Change what ``layer`` is about to load to what it can load; `seal.check` comes afterwards."""
    _subtract_mean_if_one(layer, state_dict.get(prefix + "running_mean"))
    _warn_of_other_options(layer, metadata.get("options", {}))
    if not layer.has_memory:
        return
    for name in GRADIENT_BUFFERS:
        # a checkpoint of the other kind of gradient
        if layer.gradient == "exact":
            state_dict.pop(prefix + name, None)
        elif any(prefix + own in state_dict for own in layer.memory.buffers):
            state_dict.setdefault(prefix + name, torch.zeros_like(layer.averages.mean))
    own = [name for name in layer.own_buffers if name not in layer.memory.rebuilt]
    saved = {name: state_dict[prefix + name] for name in (*TORCHS, *own) if prefix + name in state_dict}
    if not any(name in saved for name in own):
        # a stock checkpoint, or a part of one: the memory is the present one
        saved.update({name: layer._buffers[name] for name in own})
        saved[SEAL] = sample_of(layer.memory, layer._buffers)
    elif _has_trained_on(layer, saved, own):
        saved[SEAL] = sample_of(layer.memory, layer._buffers)
    _raise_precision(saved, prefix)
    mean = saved.get("running_mean")
    # what is of other channels is for torch's own checks to name
    if isinstance(mean, Tensor) and mean.shape == layer.averages.mean.shape:
        _fit_memory(layer.memory, saved)
    state_dict.update({prefix + name: value for name, value in saved.items()})


TORCHS = ("running_mean", "running_var")


def _subtract_mean_if_one(layer: "HistoryBatchNorm", mean: Any) -> None:
    """Let a layer that does not subtract the mean do so if it is given one: that of a net trained with it."""
    memory = layer.memory
    if not isinstance(memory, MeasuredAverage) or memory.subtract_mean:
        return
    if isinstance(mean, Tensor) and has_values(mean) and bool(mean.any()):
        # the same words for each layer: Python's default filter shows them once
        warnings.warn(
            "the statistics that were loaded have a mean, and these layers were made with "
            "subtract_mean=False: they subtract it from now on",
            stacklevel=4,
        )
        layer.memory = memory.subtracting_mean()


def _has_trained_on(layer: "HistoryBatchNorm", saved: dict[str, Any], own: list[str]) -> bool:
    """Return whether a state has the layer's very tensors, and training has changed these since it was taken.

    Others who write in place into such a state change the running statistics alone.
    """
    pairs = [(saved.get(name), layer._buffers[name]) for name in (*TORCHS, *own) if name != SEAL]
    aliases = all(
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and has_values(a)
        and has_values(b)
        and a.shape == b.shape
        and a.data_ptr() == b.data_ptr()
        for a, b in pairs
    )
    if not aliases or not isinstance(saved.get(SEAL), Tensor) or not has_values(saved[SEAL]):
        return False
    of_running = 2 * min(SAMPLES, layer.averages.mean.numel())
    then, now = saved[SEAL][of_running:], sample_of(layer.memory, layer._buffers)[of_running:]
    return then.shape != now.shape or not torch.equal(then.to(now), now)


def _fit_memory(memory: Memory, saved: dict[str, Any]) -> None:
    before = dict(saved)
    memory.fit(saved)
    changed = any(saved[name] is not before[name] for name in saved)
    if changed and all(name in saved for name in TORCHS):
        # the seal is of the memory as it was
        fitted = torch.allclose(saved[SEAL], sample_of(memory, before), rtol=AGREES)
        saved[SEAL] = (
            sample_of(memory, saved) if fitted else torch.full_like(sample_of(memory, saved), torch.nan)
        )


def _raise_precision(saved: dict[str, Any], prefix: str) -> None:
    poisoned = []
    for name, value in saved.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            saved[name] = value.to(statistics_dtype(value.dtype))
            # a memory that is not finite starts anew
            if name in TORCHS and not known_finite(value):
                poisoned.append(prefix + name)
    if poisoned:
        warnings.warn(
            f"not finite in the checkpoint: {', '.join(poisoned)}. Call reset_running_stats() and "
            "make some training forwards, or every output will be NaN",
            stacklevel=4,
        )


def _warn_of_other_options(layer: "HistoryBatchNorm", written: dict[str, Any]) -> None:
    own = options_written(layer)
    other = [name for name in own if name in written and written[name] != own[name]]
    if other:
        # the same words for each layer: Python's default filter shows them once
        warnings.warn(
            f"the checkpoint was written with {', '.join(f'{name}={written[name]!r}' for name in other)} "
            f"and is loaded into layers with {', '.join(f'{name}={own[name]!r}' for name in other)}",
            stacklevel=4,
        )
