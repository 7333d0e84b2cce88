"""The memories of past statistics: tensors in, tensors out.

*read* gives what the operator needs, as fresh tensors; *commit* is the only writer of state: in place,
without a host synchronization, and without effect where ``finite`` is false.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mbnorm.blend import Variance
from mbnorm.measures import EARLY, MEASURED_WEIGHT, MOST_IF_ALIKE, SEEDED

AS_MANY_AS_THE_BATCH = -1.0
"""Count of a seeded entry, as any below 0: it weighs as many values as whichever batch reads it."""


Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and biased variance, shape (C,)."""


class Past(NamedTuple):
    """Past mean and variance, shape (C,), and the weight of the current batch, in (0, 1]."""

    mean: Tensor
    var: Tensor
    batch_weight: Tensor | float


class MovingAverage(NamedTuple):
    """Memory of Momentum BN: mean and variance, shape (C,), and 0-dim int64, 1 if they hold something."""

    mean: Tensor
    var: Tensor
    filled: Tensor

    def read(self, history_weight: Tensor | float) -> Past:
        """Return the averages, weighing ``history_weight`` unless the memory is empty."""
        held = (self.filled > 0).to(self.mean.dtype)
        return Past(self.mean.clone(), self.var.clone(), 1 - history_weight * held)

    def commit(self, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Replace the averages with the blended statistics of a forward."""
        mean, var = blended
        write(self.mean, mean, finite)
        write(self.var, var, finite)
        self.filled.masked_fill_(finite, 1)

    def seed(self, mean: Tensor, var: Tensor) -> None:
        """Start from known statistics."""
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.filled.fill_(1)

    def clear(self) -> None:
        """Forget everything."""
        self.mean.zero_()
        self.var.fill_(1.0)
        self.filled.zero_()

    def holds_anything(self) -> Tensor:
        """Return whether there is something to read."""
        return self.filled > 0

    def snapshot(self) -> tuple[Tensor, ...]:
        """Return what `rewind` needs to come back here."""
        return clones(self)

    def rewind(self, snapshot: tuple[Tensor, ...]) -> None:
        """Go back to a snapshot."""
        for tensor, then in zip(self, snapshot, strict=True):
            tensor.copy_(then)

    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Go back to a snapshot, from wherever a `rewind` and commits have led."""
        self.rewind(snapshot)


class MeasuredAverage(NamedTuple):
    r"""A `MovingAverage` that measures how noisy its batches are and how wrong it is itself.

    A batch of n values per channel, with mean :math:`m` after one of n' values with mean :math:`m'`, adds a
    sample to two averages over the last 50 batches or so, the means over channels of

    .. math::
        r: \ \frac{(m - m')^2}{(1/n + 1/n')\,\mathrm{var}}, \qquad
        e: \ \frac{(m - M)^2}{\mathrm{var}} - \frac{(m - m')^2}{(1 + n/n')\,\mathrm{var}}

    with the variance that normalizes the batch. A batch is thus worth :math:`n/r` independent values, and
    the remembered mean's squared error is e variances. Half of what the truth moves in a step is in r, too.

    ``last``, shape (C,), is :math:`m'`; ``measured``, shape (4,), is r, e, n' and the number of samples,
    which is -1 where there is no batch before.
    """

    mean: Tensor
    var: Tensor
    filled: Tensor
    last: Tensor
    measured: Tensor

    # Dynamo of torch 2.10 sees methods of tuples, and no properties
    def _average(self) -> MovingAverage:
        return MovingAverage(self.mean, self.var, self.filled)

    def history_weight(self, n: int, matched_values: int) -> Tensor:
        r"""Return the weight of the past for a batch of n values per channel.

        .. math::
            \lambda = \max\bigl(0, \min\bigl(\tfrac{r/n}{r/n + e}, \tfrac{N' - n/r}{N' + n/r}\bigr)\bigr),
            \qquad N' = N \min(r, 4)

        The first is what leaves the least error; the second what matches the noise of N' values. A batch is
        worth one value at least, of which nothing else is known before there are samples, and n at most: the
        same batch again and again has no noise, and would be left to itself.
        """
        ratio, error, _, samples = self.measured.unbind()
        ratio = torch.where(samples > 0, ratio.clamp_min(1.0), 1.0)
        noise = torch.where(samples > 0, ratio / max(n, 1), 1.0).clamp_max(1.0)
        inverse = noise * ratio.clamp_max(MOST_IF_ALIKE) * matched_values
        matched = ((inverse - 1) / (inverse + 1)).clamp_min(0.0)
        return torch.minimum(noise / (noise + error.clamp_min(0.0)), matched)

    def read(self, history_weight: Tensor | float) -> Past:
        """Return the averages, weighing ``history_weight`` unless the memory is empty."""
        return self._average().read(history_weight)

    def commit(self, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Measure a forward, and replace the averages with its blended statistics."""
        mean, var = batch[0].to(self.mean.dtype), blended[1].to(self.var.dtype)
        ratio, error, last_n, samples = self.measured.unbind()
        live = var > 0
        step, distance = (
            torch.where(live, (mean - past).square() / torch.where(live, var, 1.0), 0.0).sum()
            / live.sum().clamp_min(1)
            for past in (self.last, self.mean)
        )
        per_value = step / (1 / n + 1 / last_n.clamp_min(1.0))
        weight = (EARLY / (samples + EARLY)).clamp_min(MEASURED_WEIGHT)
        first, seeded = samples < 0, self.filled > 0
        # what was seeded is right, and batches are worth one value, as if that had long been measured;
        # an empty memory becomes this batch, and is as wrong as that
        new_ratio = torch.where(first, torch.where(seeded, n, 0.0), ratio + weight * (per_value - ratio))
        new_error = torch.where(
            first,
            torch.where(seeded, 0.0, 1.0),
            error + weight * (distance - per_value / n - error),
        )
        new_samples = torch.where(first & seeded, SEEDED, samples + 1)
        measured = torch.stack((new_ratio, new_error, torch.full_like(last_n, n), new_samples))
        # statistics may be finite whose distances are not
        write(self.measured, measured, finite & all_finite(new_ratio, new_error))
        write(self.last, mean, finite)
        self._average().commit(finite, batch, blended, n)

    def seed(self, mean: Tensor, var: Tensor) -> None:
        """Start from known statistics, which are taken to be right until the batches say more."""
        self.clear()
        self._average().seed(mean, var)

    def clear(self) -> None:
        """Forget everything."""
        self._average().clear()
        self.last.zero_()
        self.measured.zero_()
        self.measured.narrow(0, 3, 1).fill_(-1.0)

    def holds_anything(self) -> Tensor:
        """Return whether there is something to read."""
        return self.filled > 0

    def snapshot(self) -> tuple[Tensor, ...]:
        """Return what `rewind` needs to come back here."""
        return clones(self)

    def rewind(self, snapshot: tuple[Tensor, ...]) -> None:
        """Go back to a snapshot."""
        for tensor, then in zip(self, snapshot, strict=True):
            tensor.copy_(then)

    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Go back to a snapshot, from wherever a `rewind` and commits have led."""
        self.rewind(snapshot)


class RecentBatches(NamedTuple):
    """Memory of Memorized BN: a ring of the statistics of the last k batches.

    ``mean`` and ``var`` are (k, C); ``counts``, (k,), has the values per channel of each entry, 0 where
    the slot is empty; ``position``, 0-dim int64, is the number of entries ever stored.
    """

    mean: Tensor
    var: Tensor
    counts: Tensor
    position: Tensor

    @property
    def size(self) -> int:
        """The length k of the ring."""
        return self.counts.shape[0]

    def _ages(self, position: Tensor) -> Tensor:
        """Age of each slot at ``position``: 1 is the newest, k the next to be overwritten."""
        size = self.counts.shape[0]
        slots = torch.arange(size, device=position.device)
        return (position - 1 - slots) % size + 1

    def read(self, n: int, limit: int, decay: float, variance: Variance) -> Past:
        """Return the statistics of the newest ``limit`` entries for a batch of ``n`` values per channel."""
        ages = self._ages(self.position)
        weight = torch.where(self.counts < 0, n, self.counts)
        weight = torch.where(ages <= limit, weight, 0.0)
        if decay != 1:
            weight = weight * decay ** ages.to(weight.dtype)
        total = weight.sum()
        # an empty memory weighs nothing: 0 / 1
        share = (weight / torch.where(total > 0, total, 1.0)).unsqueeze(1)
        mean = (share * self.mean).sum(0)
        var = (share * self.var).sum(0)
        if variance == "pooled":
            var = var + (share * (self.mean - mean).square()).sum(0)
        return Past(mean, var, n / (n + total))

    def commit(self, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Store the statistics of a batch of ``n`` values per channel in place of the oldest entry."""
        mean, var = batch
        size = self.counts.shape[0]
        slots = torch.arange(size, device=self.position.device)
        here = (slots == self.position % size) & finite
        self.mean.copy_(torch.where(here.unsqueeze(1), mean.to(self.mean.dtype), self.mean))
        self.var.copy_(torch.where(here.unsqueeze(1), var.to(self.var.dtype), self.var))
        self.counts.masked_fill_(here, n)
        self.position.add_(finite)

    def seed(self, mean: Tensor, var: Tensor) -> None:
        """Start from known statistics: k-1 entries that each weigh as much as the batch that reads them."""
        self.clear()
        self.mean[:-1] = mean
        self.var[:-1] = var
        self.counts[:-1] = AS_MANY_AS_THE_BATCH
        self.position.fill_(self.size - 1)

    def clear(self) -> None:
        """Forget everything."""
        self.mean.zero_()
        self.var.fill_(1.0)
        self.counts.zero_()
        self.position.zero_()

    def resized(self, size: int) -> "RecentBatches":
        """Return a ring of another length that holds the newest entries of this one, and no tensor of it."""
        ring = RecentBatches(
            self.mean.new_empty((size, *self.mean.shape[1:])),
            self.var.new_empty((size, *self.var.shape[1:])),
            self.counts.new_empty((size,)),
            torch.empty_like(self.position),
        )
        ring.clear()
        newest = self.position - 1 - torch.arange(min(size, self.size), device=self.position.device)
        for new, old in zip(ring[:-1], self[:-1], strict=True):
            new.index_copy_(0, newest % size, old.index_select(0, newest % self.size))
        ring.position.copy_(self.position)
        return ring

    def holds_anything(self) -> Tensor:
        """Return whether there is an entry."""
        return (self.counts != 0).any()

    def snapshot(self) -> tuple[Tensor, ...]:
        """Return what `rewind` and `restore` need to come back here."""
        return clones((self.position, self.counts))

    def rewind(self, snapshot: tuple[Tensor, ...]) -> None:
        """Drop the entries stored since a snapshot; what they evicted stays lost."""
        then, _ = snapshot
        stored_since = self.position - then
        self.counts.masked_fill_(self._ages(self.position) <= stored_since, 0.0)
        self.position.copy_(then)

    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Bring back the entries of a snapshot that `rewind` has dropped since."""
        position, counts = snapshot
        self.position.copy_(position)
        self.counts.copy_(counts)


Memory: TypeAlias = MovingAverage | MeasuredAverage | RecentBatches


def clones(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return copies of tensors."""
    # one call is half the time of several
    if hasattr(torch, "_foreach_clone"):
        return tuple(torch._foreach_clone(list(tensors)))
    return tuple(t.clone() for t in tensors)


def all_finite(*tensors: Tensor) -> Tensor:
    """Return whether tensors of one shape are finite, as a 0-dim bool."""
    # a stack of them is what torch.compile would store
    largest = tensors[0].abs()
    for tensor in tensors[1:]:
        largest = torch.maximum(largest, tensor.abs())
    return (largest < math.inf).all()


def write(target: Tensor, value: Tensor, finite: Tensor) -> None:
    """Copy a value into the state in place, if ``finite``."""
    target.copy_(torch.where(finite, value.to(target.dtype), target))
