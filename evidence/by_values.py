"""An earlier rule of Matched BN: a batch is worth its values, positions included, and not its samples."""

import torch
from torch import Tensor, nn

from mbnorm.layers.layer import HistoryBatchNorm
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import State

MOST_IF_CORRELATED = 4.0
"""How many times as many values are matched, at most, where values are correlated."""


class ByValues(MeasuredAverage):
    r"""Matches the noise of N values, or of up to four times as many where values are correlated.

    .. math::
        \lambda = \max\Bigl(0, \min\Bigl(\frac{r/n}{r/n + e}, \frac{N' - n/r}{N' + n/r}\Bigr)\Bigr), \qquad
        N' = N \min(r, 4)
    """

    # theirs is another weight
    kernels = None  # type: ignore[assignment]

    def weight_of_history(self, state: State, n: int, m: int) -> Tensor:
        """Return the history weight for a batch of n values per channel."""
        ratio, error, _, samples = state[4].unbind()
        ratio = torch.where(samples > 0, ratio.clamp_min(1.0), 1.0)
        noise = torch.where(samples > 0, ratio / max(n, 1), 1.0).clamp_max(1.0)
        inverse = noise * ratio.clamp_max(MOST_IF_CORRELATED) * self.matched_batch_size
        matched = ((inverse - 1) / (inverse + 1)).clamp_min(0.0)
        return torch.minimum(noise / (noise + error.clamp_min(0.0)), matched)


def match_by_values(model: nn.Module, values: int) -> None:
    """Give the layers of a net that was just converted to Matched BN the earlier rule."""
    for layer in model.modules():
        if isinstance(layer, HistoryBatchNorm):
            layer.memory = ByValues(values)
