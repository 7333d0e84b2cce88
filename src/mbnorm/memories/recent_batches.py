"""The memory of Memorized BN: the statistics of the last batches."""

import warnings
from typing import Any, Literal, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule
from mbnorm.memories.memory import (
    InferenceUpdate,
    Memory,
    Past,
    State,
    Statistics,
    all_finite,
    check_numbers,
    check_variance_rule,
    clones,
    moments_update,
    plain,
)
from mbnorm.memories.moving_average import ROUNDING
from mbnorm.values import has_values

Inference: TypeAlias = Literal["memory", "ema"]

AS_MANY_AS_THE_BATCH = -1.0
"""Count of a seeded entry, as any below 0: it counts as many values as the batch that reads it."""


class RecentBatches(Memory):
    """A ring of k entries: ``memory_mean`` and ``memory_var`` are (k, C).

    ``memory_counts``, (k,), has the values per channel of each entry; ``memory_ages``, (k,), is 1 for the
    newest entry, 2 for the one before, and 0 where there is none. Both are 0 there.

    Args:
        memory_size: k, the current batch's place included.
        memory_values: read only the newest entries that make up about so many values per channel.
        decay: factor in (0, 1] on the weight of an entry for each batch of age.
        variance_rule: "pooled" adds the variance between the entries, "averaged" does not.
        inference: "memory" or "ema".
    """

    buffers = ("memory_mean", "memory_var", "memory_counts", "memory_ages")
    options = ("memory_size", "memory_values", "decay", "variance_rule", "inference")
    written = ("variance_rule", "memory_values", "decay", "inference")
    kernels = "ring"

    def __init__(
        self,
        memory_size: int = 64,
        memory_values: int | None = None,
        decay: float = 1.0,
        variance_rule: VarianceRule = "pooled",
        inference: Inference = "memory",
    ) -> None:
        if not isinstance(memory_size, SupportsIndex) or memory_size < 1:
            raise ValueError(f"memory_size must be a whole number of at least 1, got {memory_size!r}")
        check_numbers(decay=decay)
        if memory_values is not None:
            check_numbers(memory_values=memory_values)
            if memory_values < 1:
                raise ValueError(f"memory_values must be at least 1, got {memory_values}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        if inference not in ("memory", "ema"):
            raise ValueError(f'inference must be "memory" or "ema", got {inference!r}')
        check_variance_rule(variance_rule)
        self.memory_size = int(memory_size)
        self.memory_values: int | None = plain(memory_values)
        self.decay = float(decay)
        self.variance_rule: VarianceRule = variance_rule
        self.inference: Inference = "memory" if memory_values is None and inference == "memory" else "ema"

    def new(self, like: Tensor) -> State:
        """Return an empty state for as many channels as ``like``, on its device and in its dtype."""
        k = self.memory_size
        state = (
            *(like.new_empty((k, *like.shape)) for _ in range(2)),
            *(like.new_empty((k,)) for _ in range(2)),
        )
        self.clear(state)
        return state

    def clear(self, state: State) -> None:
        """Forget everything."""
        mean, var, counts, ages = state
        mean.zero_()
        var.fill_(1.0)
        counts.zero_()
        ages.zero_()

    def seed(self, state: State, mean: Tensor, var: Tensor, batches: Tensor | float = 0) -> None:
        """Start from the statistics of a trained batch norm: k - 1 entries as large as the batch."""
        self.clear(state)
        own_mean, own_var, counts, ages = state
        own_mean[:-1] = mean
        own_var[:-1] = var
        counts[:-1] = AS_MANY_AS_THE_BATCH
        ages[:-1] = torch.arange(self.memory_size - 1, 0, -1, device=ages.device)

    def holds_anything(self, state: State) -> Tensor:
        """Return whether there is an entry that counts."""
        return (state[2] != 0).any()

    def entries_read(self, n: int) -> int:
        """Return how many past entries a batch of ``n`` values per channel may read."""
        if self.memory_values is None:
            return self.memory_size - 1
        # an empty batch reads as if it had a value
        return min(-(-self.memory_values // max(n, 1)), self.memory_size) - 1

    def read(self, state: State, n: int, m: int) -> Past:
        """Return the weighted statistics of the newest entries."""
        mean, var, counts, ages = state
        weight = torch.where(counts < 0, n, counts)
        weight = torch.where((ages > 0) & (ages <= self.entries_read(n)), weight, 0.0)
        if self.decay != 1:
            weight = weight * self.decay**ages
        total = weight.sum()
        # the history weight of an empty memory is 0 / 1
        share = (weight / torch.where(total > 0, total, 1.0)).unsqueeze(1)
        past_mean = (share * mean).sum(0)
        past_var = (share * var).sum(0)
        if self.variance_rule == "pooled":
            past_var = past_var + (share * (mean - past_mean).square()).sum(0)
        return Past(past_mean, past_var, n / (n + total))

    def commit(self, state: State, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Store the batch's statistics after the newest entry, in place of the oldest if there is one."""
        mean, var, counts, ages = state
        here = (ages == 1).roll(1)
        # the first entry is the first of the ring
        first = torch.arange(self.memory_size, device=ages.device) == 0
        here = torch.where((ages == 1).any(), here, first) & finite
        mean.copy_(torch.where(here.unsqueeze(1), batch[0].to(mean.dtype), mean))
        var.copy_(torch.where(here.unsqueeze(1), batch[1].to(var.dtype), var))
        counts.masked_fill_(here, n)
        ages.add_((ages > 0) & finite)
        ages.masked_fill_(here, 1.0)

    def update(self, momentum: float, m: int) -> InferenceUpdate:
        """Return what ``inference`` says; without a past it is torch's own update."""
        if self.memory_size == 1:
            return InferenceUpdate(momentum, unbiased=True)
        if self.inference == "memory":
            return InferenceUpdate(1.0, blended=True)
        return moments_update(momentum, m)

    def read_numbers(self, n: int, m: int) -> list[float]:
        """Return how many entries are read, and the decay."""
        return [float(self.entries_read(n)), float(self.decay)]

    def weighs_past(self, state: State) -> bool:
        """Return whether a batch of one value would be blended with past statistics, if there are any."""
        return self.entries_read(1) > 0

    def describe(self) -> str:
        """Return the options as a layer's `repr` shows them."""
        values = "" if self.memory_values is None else f", memory_values={self.memory_values}"
        return (
            f"memory_size={self.memory_size}{values}, decay={self.decay}, "
            f"variance_rule={self.variance_rule}, inference={self.inference}"
        )

    def pooled_batches(self, state: State, n: int, m: int) -> float:
        """Return how many batches' noise is averaged out once the memory is full."""
        weights = [float(self.decay) ** age for age in range(1 + self.entries_read(n))]
        return sum(weights) ** 2 / sum(w * w for w in weights)

    def snapshot(self, state: State) -> State:
        """Return what `rewind` and `restore` need to come back here: not the entries themselves."""
        _, _, counts, ages = state
        return clones((counts, ages))

    def rewind(self, state: State, then: State, stored: Tensor) -> None:
        """Drop the newest ``stored`` entries; what they evicted stays lost."""
        _, _, counts, ages = state
        slots = torch.arange(self.memory_size, device=ages.device)
        # where none is left, the slot before those that come has the newest entry, which counts nothing
        newest = (slots == ((ages == 1).int().argmax() - stored) % self.memory_size) & (ages > 0)
        none_left = stored >= self.memory_size
        counts.masked_fill_((ages <= stored) | none_left, 0.0)
        ages.sub_(stored).clamp_min_(0.0)
        ages.copy_(torch.where(none_left, newest.to(ages.dtype), ages))

    def restore(self, state: State, then: State) -> None:
        """Bring back the entries of a snapshot that `rewind` has dropped since."""
        for tensor, old in zip(state[2:], then, strict=True):
            tensor.copy_(old)

    def is_valid(self, state: State) -> Tensor:
        """Return whether this can be a state: not a mean of rings that begin at different places."""
        mean, var, counts, ages = state
        in_order = _ages_around(ages)
        placed = ((ages - in_order).abs() <= ROUNDING * in_order).all()
        return placed & all_finite(mean, var) & (var >= 0).all() & ~counts.isnan().any()

    def round(self, state: State) -> None:
        """Make whole what is a whole number but for the rounding of a mean."""
        *_, counts, ages = state
        ages.copy_(_ages_around(ages))
        # a large count is infinite in float16
        counts.masked_fill_(counts.isinf(), AS_MANY_AS_THE_BATCH)

    def fit(self, saved: dict[str, Any]) -> None:
        """Let a checkpoint of another ``memory_size`` load: the newest batches are kept."""
        found: list[Any] = [saved.get(name) for name in self.buffers]
        mean, var, counts, ages = found
        if not all(isinstance(tensor, Tensor) and has_values(tensor) for tensor in found):
            return
        size = ages.numel()
        # what is no ring is for torch's own checks to name
        rings = mean.dim() == 2 and mean.shape == var.shape and counts.shape == ages.shape == mean.shape[:1]
        if not rings or size in (0, self.memory_size):
            return
        # the same words for each layer: Python's default filter shows them once
        warnings.warn(
            f"the checkpoint was written with memory_size={size} and is loaded into layers with "
            f"memory_size={self.memory_size}: the newest {min(size, self.memory_size)} batches are kept",
            stacklevel=2,
        )
        saved.update(zip(self.buffers, self._resized(mean, var, counts, ages), strict=True))

    def _resized(self, mean: Tensor, var: Tensor, counts: Tensor, ages: Tensor) -> State:
        state = self.new(mean[0])
        # oldest first, so that the newest is the last of them
        newest = sorted((round(age), slot) for slot, age in enumerate(ages.tolist()) if age > 0)
        for new, (age, old) in enumerate(reversed(newest[: self.memory_size])):
            for target, source in zip(state[:3], (mean, var, counts), strict=True):
                target[new] = source[old]
            state[3][new] = age
        return state


def _ages_around(ages: Tensor) -> Tensor:
    """Return the ages of the entries, counted backwards around the ring from the newest."""
    held = ages > 0
    place = torch.arange(ages.numel(), device=ages.device)
    newest = torch.where(held, ages, torch.inf).argmin()
    return torch.where(held, (newest - place) % ages.numel() + 1, 0).to(ages.dtype)
