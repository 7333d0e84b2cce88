"""The operator in plain PyTorch: differentiable any number of times, and open to torch.compile."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule, blend, ruled, statistics_dtype


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
    """Return ``y``, which carries gradients, and the rows of a `mbnorm.functional.Record`, which do not."""
    values = x.to(statistics_dtype(x.dtype))
    dims = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    batch_var, precise_mean = torch.var_mean(values, dims, correction=0)
    # the variance's derivative has this mean, and a compiled backward sums again for any other
    batch_mean = values.mean(dims, keepdim=True).view(-1)
    batch_mean = batch_mean + (precise_mean - batch_mean).detach()
    batch_mean, batch_var = ruled(batch_mean, batch_var, variance_rule)
    mean, var = blend(batch_mean, batch_var, past_mean, past_var, batch_weight, variance_rule)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    # y is the same around any center; around a constant, the gradient of the mean takes no sum of its own
    center = mean.detach()
    shift = (center - mean) * scale
    if bias is not None:
        shift = shift + bias
    y = (values - center.view(per_channel)) * scale.view(per_channel) + shift.view(per_channel)
    statistics = (s.detach() for s in (batch_mean, batch_var, mean, var))
    return y.to(x.dtype), (*statistics, past_mean, past_var, batch_weight)


def statistics(
    x: Tensor, past_mean: Tensor, past_var: Tensor, batch_weight: Tensor, variance_rule: VarianceRule
) -> tuple[Tensor, ...]:
    """Return the rows that `forward` returns: for a backward that is `backward`."""
    with torch.no_grad():
        dims = [d for d in range(x.dim()) if d != 1]
        batch_var, batch_mean = torch.var_mean(x.to(past_mean.dtype), dims, correction=0)
        batch_mean, batch_var = ruled(batch_mean, batch_var, variance_rule)
        blended = blend(batch_mean, batch_var, past_mean, past_var, batch_weight, variance_rule)
        return batch_mean, batch_var, *blended, past_mean, past_var, batch_weight


def normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Return ``y`` for statistics that are known."""
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    y = (x.to(mean.dtype) - mean.view(per_channel)) * scale.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype)


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
    dims = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    gradient, values = dy.to(mean.dtype), x.to(mean.dtype)
    rstd = torch.rsqrt(var + eps)
    db = gradient.sum(dims)
    dw = (gradient * (values - mean.view(per_channel))).sum(dims) * rstd
    if not need_dx:
        return None, dw, db
    n = x.numel() // x.shape[1]
    if past is None:
        level, slope = batch_weight * db / n, batch_weight * dw / n
    else:
        level, slope = torch.lerp(past[:2], torch.stack((db, dw)) / n, past[2])
    if variance_rule == "uncentered":
        level = torch.zeros_like(level)
    center = mean if variance_rule == "pooled" else batch_mean
    z = (values - center.view(per_channel)) * rstd.view(per_channel)
    scale = rstd if weight is None else weight * rstd
    dx = (gradient - level.view(per_channel) - z * slope.view(per_channel)) * scale.view(per_channel)
    return dx.to(x.dtype), dw, db


def saved(mean: Tensor, var: Tensor, batch_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what torch.compile saves for the backward pass, and does not compute there again.

    It computes cheap values again, also from buffers that the forward has overwritten by then, and the
    gradients are wrong without a word (pytorch#197039). The result of a flip it saves, and it fuses flips
    with what comes before and after, unlike concatenations.
    """
    one = batch_weight.view(1).flip(0).flip(0).view(())
    return mean.flip(0).flip(0), var.flip(0).flip(0), one


def differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance_rule: VarianceRule,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients that are needed of ``x``, ``weight`` and ``bias``, differentiable themselves."""
    # views: where the input depends on the weight, that path is for the graph outside
    views: list[Any] = [None if t is None else t.view_as(t) for t in (x, weight, bias)]
    past = past_mean, past_var, batch_weight
    y, _ = forward(views[0], views[1], views[2], *past, variance_rule, eps)
    wanted = [t for t, need in zip(views, needs, strict=True) if need]
    return list(torch.autograd.grad(y, wanted, dy, create_graph=True))
