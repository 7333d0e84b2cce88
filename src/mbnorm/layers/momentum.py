"""Momentum batch normalization, the ECCV 2020 paper's."""

from typing import Any

from torch import Tensor, nn

from mbnorm.blend import VarianceRule
from mbnorm.distributed import ProcessGroup, Sync
from mbnorm.functional import Backend
from mbnorm.gradient import Gradient
from mbnorm.layers.layer import HistoryBatchNorm
from mbnorm.memories.memory import option
from mbnorm.memories.moving_average import MovingAverage


class _MomentumBatchNorm(HistoryBatchNorm):
    memory_type = MovingAverage
    memory: MovingAverage
    variance_rule = option("variance_rule")
    history_weight: Tensor

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
        history_weight: float = 0.0,
        variance_rule: VarianceRule = "averaged",
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
        gradient: Gradient = "exact",
    ) -> None:
        memory = MovingAverage(history_weight, variance_rule)
        torchs = num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        super().__init__(*torchs, memory, backend, process_group, sync, gradient)

    def set_history_weight(self, value: float) -> None:
        """Set the history weight, as a schedule does."""
        self.memory.scheduled = True
        self.memory.history_weight = float(value)
        self.rebuild()


class MomentumBatchNorm1d(_MomentumBatchNorm, nn.BatchNorm1d):
    r"""Momentum batch normalization of (N, C) or (N, C, L) inputs; see `MomentumBatchNorm2d`.

    >>> import torch
    >>> from mbnorm import MomentumBatchNorm1d
    >>> MomentumBatchNorm1d(4, history_weight=0.75)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """


class MomentumBatchNorm2d(_MomentumBatchNorm, nn.BatchNorm2d):
    r"""Normalize (N, C, H, W) inputs with batch statistics averaged with past ones.

    .. math::
        \mathrm{mean} = (1-\lambda)\,m_B + \lambda\,M, \qquad
        \mathrm{var} = (1-\lambda)\,v_B + \lambda\,V, \qquad
        M, V \leftarrow \mathrm{mean}, \mathrm{var}

    A drop-in for `torch.nn.BatchNorm2d`: same arguments, same eval mode, same checkpoint keys plus the
    memory's. `mbnorm.MomentumSchedule` changes :math:`\lambda` over training, or ``history_weight`` fixes it.
    Without either this is plain batch normalization. `MatchedBatchNorm2d` chooses its history weight itself.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of the new value in running_mean and running_var. 0 stores nothing at all, None and
            1.0 store raw batch statistics, as torch's tools expect.
        affine: whether there are weight and bias, shape (C,).
        track_running_stats: False is plain batch normalization without a memory.
        device: where parameters and state live.
        dtype: of the parameters; the state is never below float32.
        bias: False leaves the bias out.
        history_weight: :math:`\lambda` in [0, 1), kept as a 0-dim tensor; a schedule changes it in place.
        variance_rule: "averaged" as above (the paper's), or "pooled", which adds the variance between the
            two means.
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

    Source: Yong, Huang, Meng, Hua, Zhang: Momentum Batch Normalization for Deep Learning with Small
    Batch Size, ECCV 2020.

    >>> import torch
    >>> from mbnorm import MomentumBatchNorm2d
    >>> layer = MomentumBatchNorm2d(8, history_weight=0.75)
    >>> layer(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """


class MomentumBatchNorm3d(_MomentumBatchNorm, nn.BatchNorm3d):
    r"""Momentum batch normalization of (N, C, D, H, W) inputs; see `MomentumBatchNorm2d`.

    >>> import torch
    >>> from mbnorm import MomentumBatchNorm3d
    >>> MomentumBatchNorm3d(4, history_weight=0.75)(torch.randn(1, 4, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """
