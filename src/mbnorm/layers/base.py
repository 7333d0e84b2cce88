"""The forward of every layer with a memory: torch's batch norm around the blended operator."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mbnorm.blend import Variance, statistics_dtype
from mbnorm.functional import BlendedBatchNorm, backend_for, blended_batch_norm
from mbnorm.layers.state import StatefulBatchNorm
from mbnorm.memory import Past
from mbnorm.recompute import Call, in_compiled_checkpoint, in_recompute

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
        if self._calls.script is not None or in_recompute():
            return self._repeat(input, n)
        if torch.compiler.is_compiling() and not self._calls.explicit and in_compiled_checkpoint():
            # compiled, the recompute would read the memory as it is after the forward
            torch._dynamo.graph_break(msg="pass context_fn=mbnorm.checkpoint_context_fn(model) to checkpoint")
        past = self._read(n)
        if torch.compiler.is_compiling():
            result = self._blend(input, past)
        else:
            result, node = self._blend_watched(input, past)
            self._calls.remember(Call(n, result.batch_mean, result.batch_var, past), node)
        if n > 0 and self.stores:
            self._commit(result, n, m)
        return result.y

    def _blend(self, input: Tensor, past: Past) -> BlendedBatchNorm:
        return blended_batch_norm(
            input,
            self.weight,
            self.bias,
            *past,
            variance=self.variance,
            eps=self.eps,
            backend=self.backend,
        )

    def _blend_watched(
        self, input: Tensor, past: Past
    ) -> tuple[BlendedBatchNorm, "torch.autograd.graph.Node | None"]:
        """Return the operator's result, and the node that its backward pass comes through last."""
        backend = backend_for(input) if self.backend == "auto" else self.backend
        if backend == "traceable":
            # many nodes: one of their own in front of them all
            input = input.view_as(input)
            return self._blend(input, past), input.grad_fn
        result = self._blend(input, past)
        return result, result.y.grad_fn

    def _repeat(self, input: Tensor, n: int) -> Tensor:
        """Do a forward again as it was: read what it had read, and store nothing."""
        log = self._calls
        if log.script is not None:
            call = next(log.script)
        elif candidates := log.likeliest(n):
            call = candidates[0]
            if len(candidates) > 1 or log.lost:
                # without a graph: what is saved for the backward must be saved as often as in the forward
                with torch.no_grad():
                    probe = self._blend(input, call.past)
                call = log.identify(candidates, probe.batch_mean, probe.batch_var)
        else:
            # a forward that somebody makes inside a backward pass repeats nothing
            return self._blend(input, self._read(n)).y
        result, node = self._blend_watched(input, call.past)
        log.note(call, node)
        return result.y

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

    @property
    def stores(self) -> bool:
        """Whether a forward now would be stored."""
        return self.tracks and not self._frozen

    @torch.no_grad()
    def _commit(self, result: BlendedBatchNorm, n: int, m: int) -> None:
        if self._undo is not None and not torch.compiler.is_compiling():
            self._undo.append(self.snapshot())
        mean, var = result.batch_mean, result.batch_var
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        update = self._commit_history(finite, (mean, var), (result.mean, result.var), n, m)
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
