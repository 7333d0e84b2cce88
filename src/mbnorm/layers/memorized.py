"""Memorized batch normalization, the AAAI 2018 paper's."""

from typing import Any

from torch import nn

from mbnorm.blend import VarianceRule
from mbnorm.distributed import ProcessGroup, Sync
from mbnorm.functional import Backend
from mbnorm.gradient import Gradient
from mbnorm.layers.layer import HistoryBatchNorm
from mbnorm.memories.memory import option
from mbnorm.memories.recent_batches import Inference, RecentBatches


class _MemorizedBatchNorm(HistoryBatchNorm):
    memory_type = RecentBatches
    memory: RecentBatches
    memory_size = option("memory_size")
    memory_values = option("memory_values")
    decay = option("decay")
    variance_rule = option("variance_rule")
    inference = option("inference")

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
        variance_rule: VarianceRule = "pooled",
        inference: Inference = "memory",
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
        gradient: Gradient = "exact",
    ) -> None:
        memory = RecentBatches(memory_size, memory_values, decay, variance_rule, inference)
        torchs = num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        super().__init__(*torchs, memory, backend, process_group, sync, gradient)


class MemorizedBatchNorm1d(_MemorizedBatchNorm, nn.BatchNorm1d):
    r"""Memorized batch normalization of (N, C) or (N, C, L) inputs; see `MemorizedBatchNorm2d`.

    >>> import torch
    >>> from mbnorm import MemorizedBatchNorm1d
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
        memory_values: use only the newest batches that together have about so many values per channel: few
            for wide maps, many for 1x1 maps. Implies ``inference="ema"``.
        decay: factor in (0, 1] on the weight of an entry for each batch of age.
        variance_rule: "pooled" with the bracket above, or "averaged" without.
        inference: what eval mode uses: "memory" as above (the paper's), or "ema", moving averages of
            the batches' moments.
        backend: as in `mbnorm.functional.blended_batch_norm`. torch.compile makes its own kernels instead.
        process_group: ranks to share the memory with, each with its part of the batch, which may be empty:
            a `torch.distributed.ProcessGroup`, or "world" for the default one. None is this process alone.
        sync: True normalizes with the statistics of the whole batch, as one process with all of it would;
            every rank waits for them. "late" normalizes with the batch statistics of this rank's part. Those
            of the whole batch enter the memory at the next forward, and no rank waits.
        gradient: "exact" is the derivative of the forward. "remembered" also averages over batches the two
            means that batch norm subtracts from a gradient; see `mbnorm.gradient.RememberedGradient`. It
            keeps 2 C numbers more, is not a derivative, and does not go with sync="late".

    Raises:
        TypeError: ``process_group`` is not a process group.
        ValueError: an option out of range.

    Source: Guo, Wu, Deng, Chen, Tan: Double Forward Propagation for Memorized Batch Normalization,
    AAAI 2018. ``memory_values`` and ``inference="ema"`` are ours.

    >>> import torch
    >>> from mbnorm import MemorizedBatchNorm2d
    >>> layer = MemorizedBatchNorm2d(8, memory_size=64)
    >>> layer(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """


class MemorizedBatchNorm3d(_MemorizedBatchNorm, nn.BatchNorm3d):
    r"""Memorized batch normalization of (N, C, D, H, W) inputs; see `MemorizedBatchNorm2d`.

    >>> import torch
    >>> from mbnorm import MemorizedBatchNorm3d
    >>> MemorizedBatchNorm3d(4)(torch.randn(1, 4, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """
