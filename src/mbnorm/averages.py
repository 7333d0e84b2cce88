"""The averages used for inference, and the commit of a forward into a memory and into them."""

from typing import NamedTuple

import torch
from torch import Tensor

from mbnorm.blend import blend
from mbnorm.memories.memory import InferenceUpdate, Memory, State, Statistics, all_finite, clones, write


class InferenceAverages(NamedTuple):
    """The statistics of eval mode: ``mean`` and ``var``, shape (C,), and two 0-dim int64 counters.

    ``batches`` counts the batches stored, ``skipped`` those that were not finite.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    skipped: Tensor

    def after(self, mean: Tensor, var: Tensor, update: InferenceUpdate, batches_seen: Tensor) -> Statistics:
        """Return the averages as they are once new statistics are blended in, as the update says.

        Args:
            mean: new mean, shape (C,).
            var: new variance, shape (C,).
            update: their weight and rule.
            batches_seen: after how many batches the averages are, for ``update.early``.
        """
        mean, var = mean.to(self.mean.dtype), var.to(self.mean.dtype)
        if update.weight == 1:
            return mean, var
        weight: Tensor | float = update.weight
        if update.cumulative:
            weight = 1 / (self.batches.to(mean.dtype) + 1)
        elif update.early:
            seen = batches_seen.to(mean.dtype)
            weight = (update.early / (seen + update.early)).clamp_min(update.weight)
        return blend(mean, var, self.mean, self.var, weight, "pooled" if update.pooled else "averaged")

    def commit(self, finite: Tensor, mean: Tensor, var: Tensor) -> None:
        """Replace the averages, and count the batch."""
        self.batches.add_(finite)
        self.skipped.add_(~finite)
        write(self.mean, mean, finite)
        write(self.var, var, finite)

    def snapshot(self) -> tuple[Tensor, ...]:
        """Return what `rewind` needs to come back here."""
        return clones(self)

    def rewind(self, snapshot: tuple[Tensor, ...]) -> None:
        """Go back to a snapshot."""
        for tensor, then in zip(self, snapshot, strict=True):
            tensor.copy_(then)


@torch.no_grad()
def commit(
    memory: Memory,
    state: State,
    averages: InferenceAverages,
    batch: Statistics,
    blended: Statistics,
    n: int,
    update: InferenceUpdate,
) -> None:
    """Store a forward in a memory and in the averages for inference, if all that is stored is finite.

    Args:
        memory: takes the batch's or the blended statistics.
        state: of the memory.
        averages: take the update.
        batch: statistics of the batch.
        blended: statistics that normalized it; they are as finite as the batch's.
        n: values per channel.
        update: for the averages.
    """
    dtype = averages.mean.dtype
    blended = blended[0].to(dtype), blended[1].to(dtype)
    mean, var = blended if update.blended else batch
    if update.unbiased and n > 1:
        var = var * (n / (n - 1))
    running = averages.after(mean, var, update, memory.batches_seen(state, averages.batches))
    finite = all_finite(*blended, *running)
    memory.commit(state, finite, batch, blended, n)
    averages.commit(finite, *running)
