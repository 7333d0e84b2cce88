"""Whether a memory belongs to the running statistics, after others had a layer's buffers in their hands.

Many loaders set buffers one by one, leave out what a checkpoint lacks, or merge dictionaries. So a state
that leaves a layer carries a *seal*, some numbers of the running statistics and of the memory. Where it
comes back, the layer compares: a memory whose seal does not fit starts anew from the running statistics.
In the layer the seal is all zeros.
"""

from collections.abc import Mapping
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbnorm.blend import statistics_dtype
from mbnorm.memories.memory import Memory
from mbnorm.values import has_values

if TYPE_CHECKING:
    from mbnorm.layers.layer import HistoryBatchNorm

SEAL = "memory_seal"
SAMPLES = 8
"""Numbers of each buffer that the seal repeats."""
AGREES = 1e-2
"""Relative error of a number that fits: above the rounding of bfloat16, below what trainings differ by."""


class Seal:
    """What a layer knows of its buffers: which ones it has made, loaded or checked itself.

    ``behind``: whether batches were stored since these were noted, as far as Python has seen.
    """

    def __init__(self, layer: "HistoryBatchNorm") -> None:
        # no others: profilers add buffers of their own
        self._of = itemgetter("running_mean", "running_var", "num_batches_tracked", *layer.own_buffers)
        self.note(layer)

    def note(self, layer: "HistoryBatchNorm") -> None:
        """Know the buffers of a layer as they are now."""
        self._known: tuple[Tensor | None, ...] = self._of(layer._buffers)
        self.behind = False

    def is_of(self, layer: "HistoryBatchNorm") -> bool:
        """Return whether the buffers are those that are known."""
        return all(map(is_, self._of(layer._buffers), self._known)) and is_cut_alike(layer)

    def knows_as_a_copy(self, layer: "HistoryBatchNorm") -> bool:
        """Return whether all buffers are new: a layer's that has trained on, or equal to the known ones."""
        now = self._of(layer._buffers)
        if any(map(is_, now, self._known)):
            return False
        return self.behind or all(_are_equal(a, b) for a, b in zip(now, self._known, strict=True))


def sample_of(memory: Memory, buffers: Mapping[str, Any]) -> Tensor:
    """Return the seal of such a state."""
    names = ("running_mean", "running_var", *_carried(memory))
    return torch.cat([_samples(buffers[name].detach().reshape(-1)) for name in names])


def _samples(values: Tensor) -> Tensor:
    # spread over all: the first channels may be dead, and so those of every net
    step = max(1, values.numel() // SAMPLES)
    return values[: step * SAMPLES : step]


def settle(layer: "HistoryBatchNorm") -> None:
    """Check the buffers, if they came through other hands."""
    if layer.seal.is_of(layer) or not has_values(layer.averages.mean):
        return
    if not (_is_whole(layer) and layer.seal.knows_as_a_copy(layer)):
        check(layer, rebuild=True)
        layer.void_what_is_pending()
    layer.seal.note(layer)


def look_into_new(layer: "HistoryBatchNorm") -> None:
    """Start an empty memory from running statistics that were copied in place, or calibrated."""
    if layer._is_new and not layer.seal.behind and has_values(layer.averages.mean):
        _restart_unless(layer.memory.holds_anything(layer.state), layer)


# outside of it: what is made in inference mode can never be trained
@torch.inference_mode(False)
@torch.no_grad()
def check(layer: "HistoryBatchNorm", *, rebuild: bool) -> None:
    """Keep the memory if the seal fits it and the running statistics; else start it from these.

    It starts empty where these are not trained or not finite. No device is asked.

    Args:
        layer: its buffers have values.
        rebuild: whether buffers that no checkpoint carries came through other hands, too.
    """
    for name in ("running_mean", "running_var"):
        layer._buffers[name] = _widened(layer._buffers[name])
    fits = _fits(layer)
    _restart_unless(fits, layer)
    if rebuild:
        layer.rebuild()
    layer.memory.round(layer.state)
    layer.num_batches_skipped.mul_(fits)
    layer.memory_seal.zero_()
    layer._is_new = False
    layer.forget_past()


@torch.no_grad()
def _restart_unless(keep: Tensor, layer: "HistoryBatchNorm") -> None:
    """Start the memory from the running statistics, if these are trained and finite, else empty."""
    memory, (mean, var, tracked, _) = layer.memory, layer.averages
    empty, seeded = memory.new(mean), memory.new(mean)
    memory.seed(seeded, mean, var, tracked)
    trained = ((mean != 0) | (var != 1)).any() & torch.isfinite(mean).all() & torch.isfinite(var).all()
    for name, present, none, start in zip(memory.buffers, layer.state, empty, seeded, strict=True):
        if name not in memory.rebuilt:
            present.copy_(torch.where(keep, present, torch.where(trained, start, none)))
    for name in layer._gradient_buffers:
        layer._buffers[name].mul_(keep)  # type: ignore[union-attr]


def _carried(memory: Memory) -> list[str]:
    return [name for name in memory.buffers if name not in memory.rebuilt]


def _widened(tensor: Any) -> Tensor:
    return _usable(tensor, tensor.device, statistics_dtype(tensor.dtype))


def _usable(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device and in a dtype: contiguous, and not one of inference mode."""
    moved = tensor.to(device, dtype).contiguous()
    return moved.clone() if moved.is_inference() else moved


def is_cut_alike(layer: "HistoryBatchNorm") -> bool:
    """Return whether running statistics and memory have as many channels: not where one was pruned."""
    mean, own = layer._buffers["running_mean"], layer._buffers[layer.memory.buffers[0]]
    return mean is None or own is None or mean.shape[-1] == own.shape[-1]


def _are_equal(new: Tensor | None, known: Tensor | None) -> bool:
    if new is None or known is None:
        return new is known
    return has_values(new) and has_values(known) and torch.equal(new.to(known.device, known.dtype), known)


def _is_whole(layer: "HistoryBatchNorm") -> bool:
    like = layer.memory.new(layer.averages.mean)
    return all(
        own.shape == t.shape and own.device == t.device and own.dtype == t.dtype
        for own, t in zip(layer.state, like, strict=True)
    )


def _fits(layer: "HistoryBatchNorm") -> Tensor:
    """Give the layer a whole memory; return whether it is the one that was sealed."""
    memory, buffers = layer.memory, layer._buffers
    mean = layer.averages.mean
    whole = True
    for name, like in zip(memory.buffers, memory.new(mean), strict=True):
        present = buffers[name]
        if present is None or present.shape != like.shape or not has_values(present):
            buffers[name], whole = like.clone(), whole and name in memory.rebuilt
        else:
            buffers[name] = _usable(present, like.device, like.dtype)
    for name in layer._gradient_buffers:
        present = buffers[name]
        if present is None or present.shape != mean.shape or not has_values(present):
            buffers[name] = torch.zeros_like(mean)
        else:
            buffers[name] = _usable(present, mean.device, mean.dtype)
            buffers[name].nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[union-attr]
    for name in ("num_batches_tracked", "num_batches_skipped"):
        count = buffers[name]
        if count is None or not has_values(count):
            buffers[name] = torch.zeros((), device=mean.device, dtype=torch.int64)
        else:
            buffers[name] = _usable(count, mean.device, count.dtype)
    sample, seal = sample_of(memory, buffers), buffers[SEAL]
    if not whole or seal is None or not has_values(seal) or seal.shape != sample.shape:
        buffers[SEAL] = sample
        return torch.zeros((), device=mean.device, dtype=torch.bool)
    buffers[SEAL] = seal = _usable(seal, sample.device, sample.dtype)
    # infinities fit themselves: float16 cannot hold large counts
    return torch.isclose(seal, sample, rtol=AGREES, atol=0).all() & memory.is_valid(layer.state)
