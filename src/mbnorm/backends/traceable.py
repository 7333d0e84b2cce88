"""The operator in plain PyTorch: differentiable any number of times, and open to torch.compile."""

import torch
from torch import Tensor

from mbnorm.blend import Variance, blend, statistics_dtype


def blended_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance: Variance,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(y, batch_mean, batch_var, mean, var)``; all of them carry gradients."""
    values = x.to(statistics_dtype(x.dtype))
    dims = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    batch_var, batch_mean = torch.var_mean(values, dims, correction=0)
    mean, var = blend(batch_mean, batch_var, past_mean, past_var, batch_weight, variance)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    y = (values - mean.view(per_channel)) * scale.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype), batch_mean, batch_var, mean, var
