"""The memory of Matched BN: a moving average that measures its batches and its own error."""

import math

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule, ruled
from mbnorm.measures import EARLY, MEASURED_WEIGHT, MEASURES, SEEDED
from mbnorm.memories.memory import (
    InferenceUpdate,
    State,
    Statistics,
    all_finite,
    check_numbers,
    moments_update,
    plain,
    write,
)
from mbnorm.memories.moving_average import Average


class MeasuredAverage(Average):
    r"""A moving average that measures how noisy its batches are, and its own error.

    A batch of n values per channel, with mean :math:`m` after one of n' values with mean :math:`m'`, adds a
    sample to two averages over the last 50 batches or so, the means over channels of

    .. math::
        r: \ \frac{(m - m')^2}{(1/n + 1/n')\,\mathrm{var}}, \qquad
        e: \ \frac{(m - M)^2}{\mathrm{var}} - \frac{(m - m')^2}{(1 + n/n')\,\mathrm{var}}

    with the variance that normalizes the batch. So a batch has the effective sample size :math:`n/r`, and the
    remembered mean has the squared error e, in units of the variance. Half of the change of the true mean in
    one step counts as noise and is in r, too.

    The state has two more tensors: ``memory_last``, shape (C,), is :math:`m'`; ``memory_measured``, shape
    (4,), is r, e, n' and the number of samples. That is negative where there is no batch before: -1 in an
    empty memory, else minus the number of batches that the seeded statistics stand for.

    Args:
        matched_batch_size: N: the normalizing statistics shall be as accurate as those of N samples.
        measured: choose the history weight by r and e, too; False takes samples to be independent, and e = 0.
        early_weight: in the running statistics a batch has at least the weight of so many batches before it.
        subtract_mean: False takes the mean for 0 and the mean square for the variance. Then r and e are of
            the mean square, in its own square.
    """

    buffers = ("memory_mean", "memory_var", "memory_filled", "memory_last", "memory_measured")
    options = ("matched_batch_size", "measured", "early_weight", "subtract_mean")
    written = ("matched_batch_size", "measured", "subtract_mean")

    def __init__(
        self,
        matched_batch_size: int = 128,
        measured: bool = True,
        early_weight: float = 8.0,
        subtract_mean: bool = True,
    ) -> None:
        check_numbers(matched_batch_size=matched_batch_size, early_weight=early_weight)
        if not matched_batch_size >= 1:
            raise ValueError(f"matched_batch_size must be at least 1, got {matched_batch_size}")
        if not 0 <= early_weight < math.inf:
            raise ValueError(f"early_weight must be 0 or more, and finite, got {early_weight}")
        self.matched_batch_size: int = plain(matched_batch_size)
        self.measured = bool(measured)
        self.early_weight = float(early_weight)
        self.variance_rule: VarianceRule = "pooled" if subtract_mean else "uncentered"

    def subtracting_mean(self) -> "MeasuredAverage":
        """Return a memory with the same options, for layers that subtract the mean."""
        return MeasuredAverage(self.matched_batch_size, self.measured, self.early_weight)

    def new(self, like: Tensor) -> State:
        """Return an empty state for as many channels as ``like``, on its device and in its dtype."""
        average = torch.empty_like(like), torch.empty_like(like), like.new_empty(())
        state = *average, torch.empty_like(like), like.new_empty(MEASURES)
        self.clear(state)
        return state

    def clear(self, state: State) -> None:
        """Forget everything."""
        super().clear(state)
        *_, last, measured = state
        last.zero_()
        measured.zero_()
        measured.narrow(0, 3, 1).fill_(-1.0)

    def seed(self, state: State, mean: Tensor, var: Tensor, batches: Tensor | float = 0) -> None:
        """Start from known statistics, which count as exact until batches are measured."""
        self.clear(state)
        super().seed(state, *ruled(mean, var, self.variance_rule))
        known = torch.as_tensor(batches, dtype=mean.dtype, device=mean.device)
        state[4].narrow(0, 3, 1).copy_(-known.clamp_min(SEEDED))

    def weight_of_history(self, state: State, n: int, m: int) -> Tensor:
        r"""Return the history weight for a batch of m samples with n values per channel.

        .. math::
            \lambda = \max\Bigl(0, \min\Bigl(\frac{r/n}{r/n + e}, \frac{N - w}{N + w}\Bigr)\Bigr),
            \qquad w = \min(m, n/r)

        The first term leaves the least error. The second makes the noise that of N samples: a batch counts as
        its samples, or fewer where these are correlated. The effective sample size n/r is 1 at least, which
        is also taken before any is measured, and n at most: the same batch again and again has no noise, and
        would otherwise be used alone.
        """
        independent = self.matched_batch_size / max(m, 1)
        if not self.measured:
            return state[0].new_full((), max(0.0, (independent - 1) / (independent + 1)))
        ratio, error, _, samples = state[4].unbind()
        ratio = torch.where(samples > 0, ratio.clamp_min(1.0), 1.0)
        noise = torch.where(samples > 0, ratio / max(n, 1), 1.0).clamp_max(1.0)
        inverse = (noise * self.matched_batch_size).clamp_min(independent)
        matched = ((inverse - 1) / (inverse + 1)).clamp_min(0.0)
        return torch.minimum(noise / (noise + error.clamp_min(0.0)), matched)

    def commit(self, state: State, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Measure a forward, and replace the averages with its blended statistics."""
        own_mean, own_var, filled, last, measured = state
        var = blended[1].to(own_var.dtype)
        # what is measured, where it was last, and in which units
        which, unit = (0, var) if self.subtract_mean else (1, var.square())
        own, new = state[which], batch[which].to(own_mean.dtype)
        ratio, error, last_n, samples = measured.unbind()
        live = unit > 0
        step, distance = (
            torch.where(live, (new - past).square() / torch.where(live, unit, 1.0), 0.0).sum()
            / live.sum().clamp_min(1)
            for past in (last, own)
        )
        per_value = step / (1 / n + 1 / last_n.clamp_min(1.0))
        weight = (EARLY / (samples + EARLY)).clamp_min(MEASURED_WEIGHT)
        first, seeded = samples < 0, filled > 0
        # seeded statistics are exact, and batches have an effective sample size of 1, as if measured long;
        # an empty memory becomes this batch, with its error
        new_ratio = torch.where(first, torch.where(seeded, n, 0.0), ratio + weight * (per_value - ratio))
        new_error = torch.where(
            first,
            torch.where(seeded, 0.0, 1.0),
            error + weight * (distance - per_value / n - error),
        )
        new_samples = self.batches_seen(state, samples)
        # one of four in each place: what is stacked torch.compile would store and read again
        place = torch.arange(MEASURES, device=measured.device)
        found = torch.where(
            place < 2,
            torch.where(place < 1, new_ratio, new_error),
            torch.where(place < 3, n, new_samples),
        )
        # statistics may be finite whose distances are not
        write(measured, found, finite & all_finite(new_ratio, new_error))
        write(last, new, finite)
        super().commit(state, finite, batch, blended, n)

    def update(self, momentum: float, m: int) -> InferenceUpdate:
        """Return the update of averages of moments."""
        return moments_update(momentum, m, self.early_weight)

    def describe(self) -> str:
        """Return the options as a layer's `repr` shows them."""
        measured = "" if self.measured else ", measured=False"
        around = "" if self.subtract_mean else ", subtract_mean=False"
        early = f", early_weight={self.early_weight:g}"
        return f"matched_batch_size={self.matched_batch_size}{measured}{early}{around}"

    def read_numbers(self, n: int, m: int) -> list[float]:
        """Return N, whether the history weight follows what was measured, and m."""
        return [float(self.matched_batch_size), float(self.measured), float(max(m, 1))]

    def weighs_past(self, state: State) -> bool:
        """Return whether a batch of one value would be blended with past statistics, if there are any."""
        return self.matched_batch_size > 1

    def batches_seen(self, state: State, batches: Tensor) -> Tensor:
        """Return after how many batches the averages are: as many as the memory has seen."""
        _, _, filled, _, measured = state
        samples = measured.narrow(0, 3, 1).view(())
        return torch.where((samples < 0) & (filled > 0), -samples, samples + 1)

    def pooled_batches(self, state: State, n: int, m: int) -> float:
        """Return how many batches' noise is averaged out, of independent samples before any are measured."""
        if self.measured and state[4][3] <= 0:
            return max(1.0, self.matched_batch_size / max(m, 1))
        return super().pooled_batches(state, n, m)

    def is_valid(self, state: State) -> Tensor:
        """Return whether this can be a state: not a mean of full and empty ones."""
        *_, last, measured = state
        found, counts = measured.view(2, 2).unbind()
        known = all_finite(found) & ~counts.isnan().any()
        return super().is_valid(state) & all_finite(last) & known

    def round(self, state: State) -> None:
        """Make whole what is a whole number but for the rounding of a mean."""
        super().round(state)
        # a large count is infinite in float16
        state[4].nan_to_num_()
