"""Matched batch normalization: layers find the history weight themselves."""

from typing import Any

from torch import Tensor, nn

from mbnorm.distributed import ProcessGroup, Sync
from mbnorm.functional import Backend
from mbnorm.gradient import Gradient, default_gradient
from mbnorm.layers.layer import HistoryBatchNorm
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import option


class _MatchedBatchNorm(HistoryBatchNorm):
    memory_type = MeasuredAverage
    memory: MeasuredAverage
    matched_batch_size = option("matched_batch_size")
    measured = option("measured")
    early_weight = option("early_weight")
    subtract_mean = option("subtract_mean")
    memory_measured: Tensor

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
        matched_batch_size: int = 128,
        measured: bool = True,
        early_weight: float = 8.0,
        subtract_mean: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
        gradient: Gradient | None = None,
    ) -> None:
        memory = MeasuredAverage(matched_batch_size, measured, early_weight, subtract_mean)
        torchs = num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        if gradient is None:
            gradient = default_gradient(sync)
        super().__init__(*torchs, memory, backend, process_group, sync, gradient)


class MatchedBatchNorm1d(_MatchedBatchNorm, nn.BatchNorm1d):
    r"""Matched batch normalization of (N, C) or (N, C, L) inputs; see `MatchedBatchNorm2d`.

    >>> import torch
    >>> from mbnorm import MatchedBatchNorm1d
    >>> MatchedBatchNorm1d(4)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """


class MatchedBatchNorm2d(_MatchedBatchNorm, nn.BatchNorm2d):
    r"""Normalize (B, C, H, W) inputs with statistics as accurate as those of N independent samples.

    .. math::
        \mathrm{mean} = (1-\lambda)\,m_B + \lambda\,M, \qquad
        \mathrm{var} = (1-\lambda)\,v_B + \lambda\,V + \lambda(1-\lambda)(m_B-M)^2, \qquad
        M, V \leftarrow \mathrm{mean}, \mathrm{var}

    .. math::
        \lambda = \max\Bigl(0, \min\Bigl(\frac{r/n}{r/n+e}, \frac{N-w}{N+w}\Bigr)\Bigr), \qquad
        w = \min(m, n/r)

    A batch of m samples with n values per channel counts as w independent samples: m, or fewer where they are
    correlated. For each layer measures, while it trains, the effective sample size n/r of its batches, and
    the squared error e of M. Batches of N samples are plain batch normalization. A drop-in for
    `torch.nn.BatchNorm2d`: same arguments, same eval mode, same checkpoint keys plus the memory's. Nothing
    needs to be set.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of 32 samples in running_mean and running_var; that of m samples is
            1 - (1 - momentum)^(m/32). 0 stores nothing at all, None and 1.0 store raw batch statistics, as
            torch's tools expect.
        affine: whether there are weight and bias, shape (C,).
        track_running_stats: False is plain batch normalization without a memory.
        device: where parameters and state live.
        dtype: of the parameters; the state is never below float32.
        bias: False leaves the bias out.
        matched_batch_size: N, at least 1.
        measured: False takes w = m and e = 0: :math:`\lambda = \max(0, (N-m)/(N+m))`.
        early_weight: in running_mean and running_var a batch has at least the weight of so many batches
            before it. So these cover the last part of a training of any length. 0 uses ``momentum`` only.
        subtract_mean: False divides by the root mean square: :math:`m_B = 0`, :math:`v_B = \mathrm{E}[x^2]`,
            and nothing of a mean is subtracted from the gradient either. Then r and e are those of the mean
            square. For inputs whose mean is near 0, as behind centered filters.
        backend: as in `mbnorm.functional.blended_batch_norm`. torch.compile makes its own kernels instead.
        process_group: ranks to share the memory with, each with its part of the batch, which may be empty:
            a `torch.distributed.ProcessGroup`, or "world" for the default one. None is this process alone.
        sync: True normalizes with the statistics of the whole batch, as one process with all of it would;
            every rank waits for them. "late" normalizes with the batch statistics of this rank's part. Those
            of the whole batch enter the memory at the next forward, and no rank waits.
        gradient: "remembered" also averages over batches the two means that batch norm subtracts from a
            gradient; see `mbnorm.gradient.RememberedGradient`. It keeps 2 C numbers more, is not the
            derivative of the forward, and does not go with sync="late". "exact" is the derivative. None is
            "remembered", and with sync="late" "exact".

    Raises:
        TypeError: ``process_group`` is not a process group.
        ValueError: an option out of range.

    Source: ours, from the noise analysis of Yong et al., ECCV 2020; the first term of :math:`\lambda` is
    that of a Kalman filter. ``early_weight`` is the polynomial-decay averaging of Shamir and Zhang, ICML
    2013.

    >>> import torch
    >>> from mbnorm import MatchedBatchNorm2d
    >>> layer = MatchedBatchNorm2d(8)
    >>> layer(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """


class MatchedBatchNorm3d(_MatchedBatchNorm, nn.BatchNorm3d):
    r"""Matched batch normalization of (N, C, D, H, W) inputs; see `MatchedBatchNorm2d`.

    >>> import torch
    >>> from mbnorm import MatchedBatchNorm3d
    >>> MatchedBatchNorm3d(4)(torch.randn(1, 4, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """
