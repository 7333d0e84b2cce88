"""Statistics of a batch that is spread over ranks: their exchange, and the operator that uses them.

Each rank sends the sums of one layer in one all-reduce: over its values, values squared, their number
and that of its samples. They are sums of float64, so that the variance comes out of them as exact as
the statistics are; ranks count by their values, and one without any counts nothing.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mbnorm.blend import VarianceRule, blend, ruled, statistics_dtype
from mbnorm.functional import Rows, in_dtype, run_differentiably
from mbnorm.gradient import RememberedGradient
from mbnorm.memories.memory import Past, Statistics

Sync: TypeAlias = Literal[True, "late"]
ProcessGroup: TypeAlias = Any
"""A `torch.distributed.ProcessGroup`, which torch lacks where it is built without; "world"; or None."""


class Ranks:
    """The ranks that share statistics, by a process group or "world", the default one; None is no others.

    Raises:
        TypeError: neither of these, or a group that this process is no member of.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        if process_group not in (None, "world") and not (
            dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        ):
            raise TypeError(
                'process_group must be None, "world" or a torch.distributed.ProcessGroup that this process '
                f"is a member of, got {process_group!r}"
            )
        self.process_group = process_group

    def group(self) -> ProcessGroup:
        """Return the group to communicate in, or None where there is nobody to communicate with."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group == "world" else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        # torch cannot copy a group, and a copy of a model is to talk to the same ranks
        return self

    def __reduce__(self) -> tuple[type["Ranks"], tuple[ProcessGroup]]:
        if self.process_group not in (None, "world"):
            raise TypeError(
                "a process group cannot be pickled, and so cannot the layers that have one: save their "
                'state_dict, or give them process_group="world"'
            )
        return Ranks, (self.process_group,)


class Pooled(NamedTuple):
    """Mean and biased variance of the whole batch, shape (C,), its values per channel and its samples."""

    mean: Tensor
    var: Tensor
    n: int
    m: int


class PooledPast(NamedTuple):
    """What a rank's part of a batch is normalized with, and the ranks that have the other parts."""

    past: Past
    pooled: Pooled
    group: ProcessGroup

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        variance_rule: VarianceRule,
        eps: float,
        gradient: RememberedGradient | None = None,
    ) -> tuple[Tensor, Rows]:
        """Do as `pooled_batch_norm`; the record has the statistics of this rank's part."""
        y, (_, _, mean, var) = pooled_batch_norm(x, weight, bias, self, variance_rule, eps, gradient)
        return y, (*ruled(*local_statistics(x.detach()), variance_rule), mean, var)


class Exchange:
    """Statistics of one forward on their way: the all-reduce is under way from construction on.

    Args:
        local: mean and biased variance of this rank's part of the batch, shape (C,).
        n: its values per channel; 0 is an empty part, whose statistics are not looked at.
        m: its samples.
        group: of ranks that all construct one now.
    """

    def __init__(self, local: Statistics, n: int, m: int, group: ProcessGroup) -> None:
        self.dtype = local[0].dtype
        self.sums = sums_of(local, n, m)
        self.work: Any = dist.all_reduce(self.sums, group=group, async_op=True)

    def wait_for_sums(self) -> Tensor:
        """Return what the messages of all ranks add up to, once they have come."""
        self.work.wait()
        return self.sums

    def wait(self) -> Pooled:
        """Return the statistics of the whole batch, once all ranks' have come."""
        return pooled_of(self.wait_for_sums(), self.dtype)


def sums_of(local: Statistics, n: int, m: int) -> Tensor:
    """Return the message of one rank: n mean, n (var + mean^2), n, m, shape (2C + 2,) in float64."""
    mean = local[0].double()
    if n == 0:
        return mean.new_zeros(2 * mean.numel() + 2)
    second = torch.addcmul(local[1].double(), mean, mean)
    samples_per_value = mean.new_full((1,), m / n)
    return torch.cat((mean, second, torch.ones_like(samples_per_value), samples_per_value)).mul_(n)


def counts_of(sums: Tensor) -> tuple[int, int]:
    """Return the values per channel and the samples of all ranks."""
    n, m = sums[-2:].tolist()
    return round(n), round(m)


def pooled_of(sums: Tensor, dtype: torch.dtype) -> Pooled:
    """Return what the ranks' messages add up to; NaN statistics if there are no values."""
    n, m = counts_of(sums)
    mean, second = (sums[:-2] / n).view(2, -1)
    var = torch.addcmul(second, mean, mean, value=-1).clamp_min_(0)
    return Pooled(mean.to(dtype), var.to(dtype), n, m)


def local_statistics(x: Tensor) -> Statistics:
    """Return mean and biased variance of ``x`` per channel, NaN if it is empty."""
    dtype = statistics_dtype(x.dtype)
    if x.numel() == 0:
        mean, var = torch.full((2, x.shape[1]), torch.nan, dtype=dtype, device=x.device)
        return mean, var
    scratch_mean = scratch_var = None
    if x.dtype != dtype:
        # without running buffers ATen gives the statistics of half inputs in half, where they overflow
        scratch_mean, scratch_var = torch.zeros((2, x.shape[1]), dtype=dtype, device=x.device)
    mean, var = torch.batch_norm_update_stats(x, scratch_mean, scratch_var, 0.0)
    return mean, var


def pooled_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past: PooledPast,
    variance_rule: VarianceRule,
    eps: float,
    gradient: RememberedGradient | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""Normalize a rank's part ``x`` of a batch with the whole batch's statistics blended with past ones.

    `mbnorm.functional.blended_batch_norm` of the whole batch, with :math:`m_B` and :math:`v_B` given: the
    forward does not communicate. Gradients flow through them into the parts of all ranks; with
    :math:`z = \hat{x}` for "pooled" and :math:`(x - m_B)\,\mathrm{rstd}` for "averaged"

    .. math::
        dx = w\,\mathrm{rstd}\,\Big[dy - \frac{a}{n} \sum_\mathrm{ranks} \sum dy
             - \frac{a}{n}\, z \sum_\mathrm{ranks} \sum dy\,\hat{x}\Big]

    where n counts the values of all ranks, or what `mbnorm.gradient.RememberedGradient` makes of both sums.
    The backward is one all-reduce of them, if ``x`` requires a gradient or one is remembered. The gradients
    of weight and bias are this rank's, for `torch.nn.parallel.DistributedDataParallel` to add up.

    Args:
        x: (N, C, ...), may be empty.
        weight: scale, shape (C,), or None.
        bias: shift, shape (C,), or None.
        past: the past statistics, those of the whole batch (`mbnorm.blend.ruled`), and the ranks whose
            backward passes come here.
        variance_rule: "averaged", "pooled" or "uncentered", which takes the first sum for 0.
        eps: added to the variance.
        gradient: what the backward reads and writes; None is the exact gradient.

    Returns:
        The output, and the statistics of the whole batch and those that normalized it.

    Raises:
        RuntimeError: in the backward, if it is to be differentiated itself (``create_graph=True``).
    """
    dtype = statistics_dtype(x.dtype)
    run = _PooledRun(past, variance_rule, eps, dtype, gradient)
    y = run_differentiably(run, x, in_dtype(weight, dtype), in_dtype(bias, dtype))
    return y, run.rows


class _PooledRun:
    """The operator run once with the statistics of all ranks: see `mbnorm.functional.KernelRun`."""

    def __init__(
        self,
        past: PooledPast,
        variance_rule: VarianceRule,
        eps: float,
        dtype: torch.dtype,
        gradient: RememberedGradient | None,
    ) -> None:
        (past_mean, past_var, batch_weight), pooled, self._group = past
        if not isinstance(batch_weight, Tensor):
            batch_weight = torch.tensor(batch_weight, device=past_mean.device, dtype=dtype)
        batch_weight = batch_weight.to(dtype)
        blended = blend(
            pooled.mean, pooled.var, past_mean.to(dtype), past_var.to(dtype), batch_weight, variance_rule
        )
        self.rows = pooled.mean, pooled.var, *blended
        # the formula's z = (x - center) rstd
        self._center = blended[0] if variance_rule == "pooled" else pooled.mean
        self._subtracts_mean = variance_rule != "uncentered"
        self._batch_weight = batch_weight
        self._n = pooled.n
        self._eps = eps
        self._gradient = gradient

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``y``."""
        return F.batch_norm(x, *self.rows[2:], weight, bias, False, 0.0, self._eps)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of ``x``, ``weight`` and ``bias``."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a layer with sync=True can be differentiated once only: create_graph=True needs layers "
                'without process_group, or with sync="late"'
            )
        _, _, mean, var = self.rows
        dy, values = dy.to(mean.dtype), x.to(mean.dtype)
        rstd = torch.rsqrt(var + self._eps)
        if x.numel():
            _, dw, db = torch.ops.aten.native_batch_norm_backward(
                dy, values, rstd, None, None, mean, rstd, True, self._eps, [False, True, True]
            )
        else:
            dw, db = torch.zeros((2, mean.numel()), dtype=mean.dtype, device=x.device)
        if not needs[0] and self._gradient is None:
            return None, dw, db
        sums = torch.stack((db, dw))
        dist.all_reduce(sums, group=self._group)
        if self._gradient is None:
            level, along = self._batch_weight * sums / self._n
        else:
            read = self._gradient.read(self._batch_weight)
            level, along = torch.lerp(read[:2], sums / self._n, read[2])
            self._gradient.commit((sums[0], sums[1]), self._n, self.rows)
        if not needs[0]:
            return None, dw, db
        if not self._subtracts_mean:
            level = torch.zeros_like(level)
        scale = rstd if weight is None else weight * rstd
        slope = -scale * rstd * along
        shift = -scale * level - slope * self._center
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        dx = torch.addcmul(shift.view(per_channel), dy, scale.view(per_channel))
        dx = dx.addcmul_(values, slope.view(per_channel)).to(x.dtype)
        return dx, dw, db
