"""The operator composed of ATen's own batch norm kernels: exact gradients, no compiled code of ours.

The gradient of the blended operator is linear in the training gradient of batch norm taken at the
blended statistics, so ATen's backward kernel gives all the reductions.
"""

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule, blend, statistics_dtype

DEVICES = ("cpu", "cuda")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance_rule: VarianceRule,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return ``y`` and the rows of a `mbnorm.functional.Record`."""
    scratch_mean = scratch_var = None
    if x.dtype != past_mean.dtype:
        # without running buffers ATen gives the statistics of half inputs in half, where they overflow
        scratch_mean, scratch_var = past_mean.clone(), past_var.clone()
    batch_mean, batch_var = torch.batch_norm_update_stats(x, scratch_mean, scratch_var, 0.0)
    mean, var = blend(batch_mean, batch_var, past_mean, past_var, batch_weight, variance_rule)
    y, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
    return y, (batch_mean, batch_var, mean, var, past_mean, past_var, batch_weight)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rows: tuple[Tensor, ...],
    variance_rule: VarianceRule,
    eps: float,
    need_dx: bool,
    past: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ``(dx, dw, db)`` for the rows that `forward` returned.

    ``past`` is what `mbnorm.backends.cpu.backward` takes.
    """
    batch_mean, _, mean, var, _, _, batch_weight = rows
    if past is not None:
        batch_weight = past[2]
    # upcast so that half gradients are rounded once, after the last addition
    dtype = statistics_dtype(x.dtype)
    dy, values = dy.to(dtype), x.to(dtype)
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight * rstd
    batch_scale = batch_weight.expand_as(mean) if weight is None else weight * batch_weight
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        dy, values, batch_scale.contiguous(), None, None, mean, rstd, True, eps, [need_dx, True, True]
    )
    if not need_dx:
        return None, dw, db
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    dx.addcmul_(dy, ((1 - batch_weight) * scale).view(per_channel))
    if variance_rule == "averaged":
        values_per_channel = x.numel() // x.shape[1]
        shift = batch_weight * scale * rstd * dw * (batch_mean - mean) / values_per_channel
        dx.add_(shift.view(per_channel))
    if past is not None:
        history = (batch_weight - 1) * scale
        center = mean if variance_rule == "pooled" else batch_mean
        slope = history * rstd * past[1]
        dx.addcmul_(values - center.view(per_channel), slope.view(per_channel))
        dx.add_((history * past[0]).view(per_channel))
    return dx.to(x.dtype), dw, db
