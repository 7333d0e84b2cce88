"""ATen's kernels with a memory around them, on the CPU, where numbers can be looked at without waiting.

What `mbnorm.memories` and `mbnorm.averages` do with tensors alone takes longer than to normalize a small map.
Here single numbers are Python's. The functions take and return what those of `mbnorm.backends.cpu` do.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mbnorm.backends import aten
from mbnorm.blend import VARIANCE_RULES, VarianceRule, weight_in_gradient
from mbnorm.measures import EARLY, MEASURED_WEIGHT

forward, backward = aten.forward, aten.backward


def forward_with_average(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
    eps: float,
    store: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Read a moving average, normalize, and ``store`` or not; return ``y`` and seven rows."""
    past = _Average(memory, read, VARIANCE_RULES[rule])
    return _forward(past, x, weight, bias, averages, update, VARIANCE_RULES[rule], eps, store)


def forward_with_ring(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
    eps: float,
    store: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Do as `forward_with_average` with a ring."""
    past = _Ring(memory, read)
    return _forward(past, x, weight, bias, averages, update, VARIANCE_RULES[rule], eps, store)


def remembering_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rows: tuple[Tensor, ...],
    remembered: tuple[Tensor, Tensor],
    variance_rule: VarianceRule,
    eps: float,
    need_dx: bool,
    store: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Do as `backward` with ``remembered`` as the past means; return these, too, and ``store`` or not."""
    sums = aten.Sums(dy, x, weight, rows, variance_rule, eps)
    mean, scale = remembered
    b = weight_in_gradient(rows[6].item())
    past = torch.stack((mean, scale, torch.full_like(mean, b)))
    taken = torch.lerp(mean, sums.mean_of_dy, b), torch.lerp(scale, sums.mean_of_products, b)
    dx = sums.dx(*taken) if need_dx else None
    if store and _all_finite(*taken, *rows[:4]):
        torch._foreach_copy_([mean, scale], taken)
    return dx, sums.dw, sums.db, past


class _Average:
    """A moving average, measured where ``memory`` has five tensors."""

    def __init__(self, memory: Sequence[Tensor], read: Sequence[float], rule: VarianceRule) -> None:
        self.mean, self.var, self.filled = memory[:3]
        self.subtracts_mean = rule != "uncentered"
        self.is_filled = self.filled.item() > 0
        self.history = memory[3].item() if len(memory) == 4 else None
        if self.history is not None:
            return
        self.last, self.measured = memory[3:]
        self.ratio, self.error, self.last_values, self.samples = self.measured.tolist()
        self.matched_batch_size, self.by_measures, self.m = read

    def read(self, n: int, rule: VarianceRule) -> tuple[Tensor, Tensor, float]:
        """Return copies of the past statistics, and the weight of a batch of ``n`` values per channel."""
        mean, var = self.mean.clone(), self.var.clone()
        return mean, var, 1 - self._history_weight(n) if self.is_filled else 1.0

    def _history_weight(self, n: int) -> float:
        if self.history is not None:
            return float(self.history)
        # of samples that are independent
        inverse = self.matched_batch_size / self.m
        if not self.by_measures:
            return max(0.0, (inverse - 1) / (inverse + 1))
        ratio = max(1.0, self.ratio) if self.samples > 0 else 1.0
        noise = min(1.0, ratio / n) if self.samples > 0 else 1.0
        inverse = max(inverse, noise * self.matched_batch_size)
        matched = (inverse - 1) / (inverse + 1)
        return float(max(0.0, min(noise / (noise + max(0.0, self.error)), matched)))

    def batches_seen(self, batches: int) -> float:
        """Return after how many batches the averages for inference are; ``batches`` is their counter."""
        if self.history is not None:
            return batches
        seen: float = -self.samples if self.samples < 0 and self.is_filled else self.samples + 1
        return seen

    def store(self, rows: Sequence[Tensor], n: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return what to write, and its values: a batch whose statistics are finite."""
        _, _, mean, var, *_ = rows
        written, values = [self.mean, self.var], [mean, var]
        if not self.is_filled:
            self.filled.fill_(1.0)
        if self.history is None:
            # of the mean, or of the mean square
            which, unit = (0, var) if self.subtracts_mean else (1, var.square())
            found = self._measure(rows[which], unit, rows[4 + which], n)
            if math.isfinite(found[0]) and math.isfinite(found[1]):
                written.append(self.measured)
                values.append(torch.tensor(found, dtype=mean.dtype))
            written.append(self.last)
            values.append(rows[which])
        return written, values

    def _measure(
        self, new: Tensor, unit: Tensor, remembered: Tensor, n: int
    ) -> tuple[float, float, float, float]:
        if self.samples < 0:
            return (n, 0.0, n, -self.samples) if self.is_filled else (0.0, 1.0, n, 0.0)
        live = int(torch.count_nonzero(unit))
        inverse = unit.reciprocal()
        if live < len(unit):
            inverse.masked_fill_(unit <= 0, 0.0)
        step, distance = (
            float(torch.dot((new - past).square_(), inverse)) / max(live, 1)
            for past in (self.last, remembered)
        )
        per_value = step / (1 / n + 1 / max(1.0, self.last_values))
        weight = max(MEASURED_WEIGHT, EARLY / (self.samples + EARLY))
        return (
            self.ratio + weight * (per_value - self.ratio),
            self.error + weight * (distance - per_value / n - self.error),
            n,
            self.samples + 1,
        )


class _Ring:
    """The statistics of the last batches."""

    def __init__(self, memory: Sequence[Tensor], read: Sequence[float]) -> None:
        self.mean, self.var, self.counts, self.ages = memory
        self.limit, self.decay = read

    def read(self, n: int, rule: VarianceRule) -> tuple[Tensor, Tensor, float]:
        """Return the past statistics, and the weight of a batch of ``n`` values per channel."""
        ages = self.ages.tolist()
        weights = [
            # an entry that was seeded counts as many values as the batch
            (n if count < 0 else count) * self.decay**age if 0 < age <= self.limit else 0.0
            for count, age in zip(self.counts.tolist(), ages, strict=True)
        ]
        total = sum(weights)
        share = torch.tensor([w / (total or 1.0) for w in weights], dtype=self.mean.dtype)
        mean, var = share @ self.mean, share @ self.var
        if rule == "pooled":
            var += share @ (self.mean - mean).square_()
        return mean, var, n / (n + total)

    def batches_seen(self, batches: int) -> float:
        """Return ``batches``."""
        return batches

    def store(self, rows: Sequence[Tensor], n: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return what to write, and its values: the slot after the newest entry's takes the batch."""
        ages = self.ages.tolist()
        slot = (ages.index(1) + 1) % len(ages) if 1 in ages else 0
        ages = [age + (age > 0) for age in ages]
        ages[slot] = 1
        self.counts[slot] = n
        written = [self.mean[slot], self.var[slot], self.ages]
        return written, [*rows[:2], torch.tensor(ages, dtype=self.ages.dtype)]


@torch.no_grad()
def _forward(
    past: _Average | _Ring,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    averages: Sequence[Tensor],
    update: Sequence[float],
    rule: VarianceRule,
    eps: float,
    store: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    n = x.numel() // x.shape[1]
    past_mean, past_var, a = past.read(n, rule)
    batch_weight = torch.full((), a, dtype=past_mean.dtype)
    # the same operations, since a recompute is recognized by equal bits
    y, rows = aten.forward(x, weight, bias, past_mean, past_var, batch_weight, rule, eps)
    if store:
        _commit(past, averages, rows, n, update)
    return y, rows


def _commit(
    past: _Average | _Ring,
    averages: Sequence[Tensor],
    rows: Sequence[Tensor],
    n: int,
    update: Sequence[float],
) -> None:
    """Store a batch in a memory and in the averages, if all that is stored is finite."""
    running_mean, running_var, batches, skipped = averages
    weight, early, cumulative, blended, unbiased, pooled = update
    mean, var = rows[2:4] if blended else rows[:2]
    if unbiased and n > 1:
        var = var * (n / (n - 1))
    # otherwise also where the averages held so far are not finite
    if weight != 1:
        counter = int(batches)
        if cumulative:
            weight = 1 / (counter + 1)
        elif early:
            weight = max(weight, early / (past.batches_seen(counter) + early))
        mean, var = _blend(mean, var, running_mean, running_var, weight, bool(pooled))
    if not _all_finite(*rows[2:4], mean, var):
        skipped += 1
        return
    written, values = past.store(rows, n)
    torch._foreach_copy_([*written, running_mean, running_var], [*values, mean, var])
    batches += 1


def _all_finite(*vectors: Tensor) -> bool:
    # a value that is not finite has a zeroth multiple of NaN, and so has their sum
    values = torch.cat(vectors)
    return not math.isnan(torch.dot(values, torch.zeros_like(values)))


def _blend(
    new_mean: Tensor, new_var: Tensor, old_mean: Tensor, old_var: Tensor, weight: float, pooled: bool
) -> tuple[Tensor, Tensor]:
    # not lerp, which makes NaN of infinity
    mean, var = (
        torch.add(new * weight, old, alpha=1 - weight)
        for new, old in ((new_mean, old_mean), (new_var, old_var))
    )
    if pooled:
        between = new_mean - old_mean
        var.addcmul_(between, between, value=weight * (1 - weight))
    return mean, var
