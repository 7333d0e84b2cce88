"""The averages used for inference, and the commit of a forward into a memory and into them."""

from typing import NamedTuple

from torch import Tensor

from mbnorm.blend import Variance, blend
from mbnorm.memory import Memory, Statistics, all_finite, clones, write


class InferenceUpdate(NamedTuple):
    """What a forward puts into the averages for inference.

    The blended statistics or the batch's own, with the variance corrected for the batch's size or not; their
    weight and the rule; and how many of the batches before they weigh at least, which matters while these are
    few.
    """

    blended: bool
    unbiased: bool
    weight: float
    variance: Variance
    early: float = 0.0


CUMULATIVE = InferenceUpdate(blended=False, unbiased=True, weight=0.0, variance="averaged", early=1.0)
"""Each batch weighs as much as any before."""


class InferenceAverages(NamedTuple):
    """The statistics of eval mode: ``mean`` and ``var``, shape (C,), and two 0-dim int64 counters.

    ``batches`` counts the batches stored, ``skipped`` those that were not finite.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    skipped: Tensor

    def after(
        self, mean: Tensor, var: Tensor, weight: float, variance: Variance, early: float = 0.0
    ) -> Statistics:
        """Return the averages as they are once new statistics are blended in.

        After t batches these weigh ``weight``, or early / (t + early) if that is more.
        """
        mean, var = mean.to(self.mean.dtype), var.to(self.mean.dtype)
        if weight == 1:
            return mean, var
        factor: Tensor | float = weight
        if early:
            factor = (early / (self.batches.to(mean.dtype) + early)).clamp_min(weight)
        return blend(mean, var, self.mean, self.var, factor, variance)

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


def commit(
    memory: Memory,
    averages: InferenceAverages,
    batch: Statistics,
    blended: Statistics,
    n: int,
    update: InferenceUpdate,
) -> None:
    """Store a forward in a memory and in the averages for inference, if all that is stored is finite.

    Args:
        memory: takes the batch's or the blended statistics.
        averages: take the update.
        batch: statistics of the batch.
        blended: statistics that normalized it; they are as finite as the batch's.
        n: values per channel.
        update: for the averages.
    """
    state = averages.mean.dtype
    blended = blended[0].to(state), blended[1].to(state)
    mean, var = blended if update.blended else batch
    if update.unbiased and n > 1:
        var = var * (n / (n - 1))
    running = averages.after(mean, var, update.weight, update.variance, update.early)
    finite = all_finite(*blended, *running)
    memory.commit(finite, batch, blended, n)
    averages.commit(finite, *running)
