"""The forward of every layer with a memory: torch's batch norm around the blended operator."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mbnorm.blend import Variance, statistics_dtype
from mbnorm.functional import blended_batch_norm
from mbnorm.layers.state import StatefulBatchNorm
from mbnorm.memory import Past
from mbnorm.recompute import in_recompute

REFERENCE_BATCH = 32
"""Batch size at which ``momentum`` is the weight of one batch in the averages of moments."""


class InferenceUpdate(NamedTuple):
    """Statistics that go into the averages for inference, their weight there, and the rule."""

    mean: Tensor
    var: Tensor
    weight: float | None
    variance: Variance


class HistoryBatchNorm(StatefulBatchNorm):
    """Base of the layers: everything but what the memory is and how the averages for inference move."""

    def _read(self, n: int) -> Past:
        """Return what a batch of ``n`` values per channel is blended with."""
        raise NotImplementedError

    def _commit_history(
        self, finite: Tensor, batch: tuple[Tensor, Tensor], blended: tuple[Tensor, Tensor], n: int, m: int
    ) -> InferenceUpdate:
        """Store a forward in the memory, and return what goes into the averages for inference."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` as in `torch.nn.BatchNorm2d`; in train mode with the memory's help."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not (self.training and self.has_memory):
            return self._plain_batch_norm(input)
        m = input.shape[0]
        n = m * math.prod(input.shape[2:])
        if n == 1 and not self._has_past():
            # one value has no variance: torch says so in its own words
            return self._plain_batch_norm(input)
        past = self._read(n)
        y, batch_mean, batch_var, mean, var = blended_batch_norm(
            input,
            self.weight,
            self.bias,
            *past,
            variance=self.variance,
            eps=self.eps,
            backend=self.backend,
        )
        if self.tracks and not self._frozen and not in_recompute():
            self._commit((batch_mean, batch_var), (mean, var), n, m)
        return y

    def _plain_batch_norm(self, input: Tensor) -> Tensor:
        dtype = statistics_dtype(input.dtype) if self.running_mean is None else self.running_mean.dtype
        return F.batch_norm(
            input,
            None if self.training else self.running_mean,
            None if self.training else self.running_var,
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            self.training or self.running_mean is None,
            0.0,
            self.eps,
        )

    def _has_past(self) -> bool:
        """Whether the memory holds something to read; asks the device until the answer is yes."""
        if not self._holds_past and not torch.compiler.is_compiling():
            self._holds_past = bool(self._memory().holds_anything())
            return self._holds_past
        return True

    @property
    def tracks(self) -> bool:
        """Whether forwards are stored as the layer is set: in train mode and not frozen by its momentum."""
        return (
            self.training
            and self.track_running_stats
            and self.running_mean is not None
            and self.momentum != 0
        )

    @torch.no_grad()
    def _commit(self, batch: tuple[Tensor, Tensor], blended: tuple[Tensor, Tensor], n: int, m: int) -> None:
        if self._undo is not None and not torch.compiler.is_compiling():
            self._undo.append(self.snapshot())
        mean, var = batch
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        update = self._commit_history(finite, batch, blended, n, m)
        if self.momentum is None or self.momentum == 1:
            # update_bn and PreciseBN set these to read the raw statistics of each batch
            update = InferenceUpdate(mean, unbiased(var, n), self.momentum, "averaged")
        self._averages().commit(finite, *update)


def moments_update(batch: tuple[Tensor, Tensor], momentum: float, m: int) -> InferenceUpdate:
    """Return the update of averages of moments by a batch of ``m`` samples, its weight in proportion."""
    return InferenceUpdate(*batch, 1 - (1 - momentum) ** (m / REFERENCE_BATCH), "pooled")


def unbiased(var: Tensor, n: int) -> Tensor:
    """Return the unbiased variance of ``n`` values; a single value keeps the biased one."""
    return var * (n / (n - 1)) if n > 1 else var
