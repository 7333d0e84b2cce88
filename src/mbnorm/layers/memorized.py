"""Memorized batch normalization."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, SupportsIndex, TypeAlias, cast

import torch
from torch import Tensor, nn

from mbnorm.averages import InferenceUpdate
from mbnorm.backends import cpu
from mbnorm.blend import Variance
from mbnorm.distributed import ProcessGroup, Sync
from mbnorm.functional import Backend
from mbnorm.layers.base import moments_update
from mbnorm.layers.synced import SyncedBatchNorm
from mbnorm.memory import Past, RecentBatches

Inference: TypeAlias = Literal["memory", "ema"]


class _MemorizedBatchNorm(SyncedBatchNorm):
    memory_buffers = ("memory_mean", "memory_var", "memory_counts", "memory_position")
    options = ("memory_size", "memory_values", "decay", "inference")
    settings = (*SyncedBatchNorm.settings, *options)
    written_options = ("eps", "variance", "memory_values", "decay", "inference")
    memory_mean: Tensor
    memory_var: Tensor
    memory_counts: Tensor
    memory_position: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        memory_size: int = 64,
        memory_values: int | None = None,
        decay: float = 1.0,
        variance: Variance = "pooled",
        inference: Inference = "memory",
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias)
        self.set_up(
            memory_size=memory_size,
            memory_values=memory_values,
            decay=decay,
            variance=variance,
            inference=inference,
            backend=backend,
            process_group=process_group,
            sync=sync,
        )

    def set_up(
        self,
        *,
        memory_size: int = 64,
        memory_values: int | None = None,
        decay: float = 1.0,
        variance: Variance = "pooled",
        inference: Inference = "memory",
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
    ) -> None:
        """Check and set the options, and start with an empty memory."""
        if not isinstance(memory_size, SupportsIndex) or memory_size < 1:
            raise ValueError(f"memory_size must be a whole number of at least 1, got {memory_size!r}")
        if memory_values is not None and memory_values < 1:
            raise ValueError(f"memory_values must be at least 1, got {memory_values}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        if inference not in ("memory", "ema"):
            raise ValueError(f'inference must be "memory" or "ema", got {inference!r}')
        self.memory_size = int(memory_size)
        self.memory_values = memory_values
        self.decay = decay
        self.inference: Inference = "memory" if memory_values is None and inference == "memory" else "ema"
        self._set_up_ranks(process_group, sync, backend)
        self._set_up_history(variance, backend)

    def _new_memory(self, like: Tensor) -> RecentBatches:
        k = self.memory_size
        return RecentBatches(
            like.new_empty((k, self.num_features)),
            like.new_empty((k, self.num_features)),
            like.new_empty((k,)),
            torch.empty((), device=like.device, dtype=torch.int64),
        )

    def _memory(self) -> RecentBatches:
        # the dictionary itself: attributes of modules are slow
        buffers: dict[str, Any] = self._buffers
        return RecentBatches(
            buffers["memory_mean"],
            buffers["memory_var"],
            buffers["memory_counts"],
            buffers["memory_position"],
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [prefix + name for name in self.memory_buffers]
        saved = [state_dict.get(name) for name in names]
        if self.has_memory and all(isinstance(value, Tensor) for value in saved):
            ring = RecentBatches(*cast(list[Tensor], saved))
            channels = (*ring.counts.shape, self.num_features)
            # what is no ring of these channels is for torch's own checks to name
            is_one = ring.counts.dim() == 1 and ring.mean.shape == ring.var.shape == channels
            if is_one and ring.size not in (0, self.memory_size):
                # the same words for each layer: Python's default filter shows them once
                warnings.warn(
                    f"the checkpoint was written with memory_size={ring.size} and is loaded into layers with "
                    f"memory_size={self.memory_size}: the newest {min(ring.size, self.memory_size)} batches "
                    "are kept",
                    stacklevel=2,
                )
                state_dict.update(zip(names, ring.resized(self.memory_size), strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _entries_read(self, n: int) -> int:
        """How many past entries a batch of ``n`` values per channel may read."""
        if self.memory_values is None:
            return self.memory_size - 1
        return min(-(-self.memory_values // n), self.memory_size) - 1

    def _has_past(self) -> bool:
        return self._entries_read(1) > 0 and super()._has_past()

    def _read(self, n: int) -> Past:
        # an empty batch reads as if it had a value
        limit = self._entries_read(max(n, 1))
        return self._memory().read(n, limit, self.decay, self.variance)

    def _how_read(self, n: int) -> tuple[Tensor | float, ...]:
        return self._entries_read(n), self.decay

    def _fused_operator(self, kernels: ModuleType) -> Callable[..., Any]:
        return cast(Callable[..., Any], kernels.forward_with_ring)

    def _commit_fused(self, *arguments: Any) -> None:
        cpu.commit_to_ring(*arguments)

    def _memory_before(
        self, past_mean: Tensor, past_var: Tensor, counter: Tensor, more: Tensor
    ) -> tuple[Tensor, ...]:
        # what was evicted since is lost: the counts are those of now
        return counter, self.memory_counts

    def _inference_update(self, m: int) -> InferenceUpdate:
        momentum = self.momentum or 0.0
        if self.memory_size == 1:
            return InferenceUpdate(False, True, momentum, "averaged")
        if self.inference == "memory":
            return InferenceUpdate(True, False, 1.0, "averaged")
        return moments_update(momentum, m)

    def _history_repr(self) -> str:
        values = "" if self.memory_values is None else f", memory_values={self.memory_values}"
        return (
            f"memory_size={self.memory_size}{values}, decay={self.decay}, variance={self.variance}, "
            f"inference={self.inference}, backend={self.backend}"
        )


class MemorizedBatchNorm1d(_MemorizedBatchNorm, nn.BatchNorm1d):
    r"""Memorized batch normalization of (N, C) or (N, C, L) inputs; see `MemorizedBatchNorm2d`.

    >>> MemorizedBatchNorm1d(4)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """


class MemorizedBatchNorm2d(_MemorizedBatchNorm, nn.BatchNorm2d):
    r"""Normalize (N, C, H, W) inputs with the statistics of the last k batches, current one included.

    .. math::
        \mathrm{mean} = \sum_i w_i m_i, \qquad
        \mathrm{var} = \sum_i w_i v_i \;[\,+\; \text{the variance between the batches}\,], \qquad
        w_i \propto n_i\,\mathrm{decay}^i

    Entry i = 0 is the current batch, the only one that gradients flow through; :math:`n_i` counts the
    values per channel. A drop-in for `torch.nn.BatchNorm2d`: same arguments, same eval mode, same
    checkpoint keys plus the memory's.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of the new value in the averages of ``inference="ema"``. 0 stores nothing at
            all, None and 1.0 store raw batch statistics, as torch's tools expect.
        affine: whether there are weight and bias, shape (C,).
        track_running_stats: False is plain batch normalization without a memory.
        device: where parameters and state live.
        dtype: of the parameters; the state is never below float32.
        bias: False leaves the bias out.
        memory_size: k, batches in the memory; about 128 / batch size. 1 is plain batch normalization.
        memory_values: read only the newest batches that make up about so many values per channel, so
            that wide maps read few entries and 1x1 maps many; implies ``inference="ema"``.
        decay: factor in (0, 1] on the weight of an entry for each batch of age.
        variance: "pooled" with the bracket above, or "averaged" without.
        inference: what eval mode uses: "memory" as above (the paper's), or "ema", moving averages of
            the batches' moments.
        backend: as in `mbnorm.functional.blended_batch_norm`.
        process_group: ranks to share the memory with, each with its part of the batch, which may be empty:
            a `torch.distributed.ProcessGroup`, or "world" for the default one. None is this process alone.
        sync: True normalizes with the statistics of the whole batch, as one process with all of it would;
            every rank waits for them. "late" normalizes with those of this rank's part, and lets the
            whole batch's enter the memory at the next forward, for which no rank waits.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: an option out of range.

    Source: Guo, Wu, Deng, Chen, Tan: Double Forward Propagation for Memorized Batch Normalization,
    AAAI 2018. ``memory_values`` and ``inference="ema"`` are ours.

    >>> layer = MemorizedBatchNorm2d(8, memory_size=64)
    >>> layer(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """


class MemorizedBatchNorm3d(_MemorizedBatchNorm, nn.BatchNorm3d):
    r"""Memorized batch normalization of (N, C, D, H, W) inputs; see `MemorizedBatchNorm2d`.

    >>> MemorizedBatchNorm3d(4)(torch.randn(1, 4, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """
