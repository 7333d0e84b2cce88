"""The law of mixing two sets of statistics, and the precision they are kept in."""

from typing import Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

VarianceRule: TypeAlias = Literal["averaged", "pooled", "uncentered"]
VARIANCE_RULES: tuple[VarianceRule, ...] = get_args(VarianceRule)
"""In the order of the numbers that the kernels know them by."""
SHORTER = 4
"""How many times as short as the forward's the memory of the backward pass is."""

Weight = TypeVar("Weight", float, Tensor)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics of a tensor of ``dtype``: float64 for float64, float32 below."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def number_of(rule: VarianceRule) -> int:
    """Return the number by which the kernels know a rule."""
    return VARIANCE_RULES.index(rule)


def ruled(mean: Tensor, var: Tensor, rule: VarianceRule) -> tuple[Tensor, Tensor]:
    """Return what counts as the statistics of a batch whose mean and biased variance are given.

    To ``"uncentered"`` the mean is 0, and so the variance is the mean square of the values.
    """
    if rule == "uncentered":
        return torch.zeros_like(mean), torch.addcmul(var, mean, mean)
    return mean, var


def blend(
    new_mean: Tensor,
    new_var: Tensor,
    old_mean: Tensor,
    old_var: Tensor,
    weight: Tensor | float,
    variance_rule: VarianceRule,
) -> tuple[Tensor, Tensor]:
    """Mix new and old statistics, those of a batch as `ruled` has them, the new ones weighing ``weight``.

    ``"averaged"`` and ``"uncentered"`` average the variances; ``"pooled"`` adds the variance between the two
    means (law of total variance). With ``weight=1`` the new statistics come back exactly.
    """
    rest = 1 - weight
    mean = weight * new_mean + rest * old_mean
    var = weight * new_var + rest * old_var
    if variance_rule == "pooled":
        var = var + weight * rest * (new_mean - old_mean).square()
    return mean, var


def weight_in_gradient(batch_weight: Weight) -> Weight:
    """Return b, the weight of a batch in the backward pass, for a, that in the forward."""
    return 1 - (1 - batch_weight) ** SHORTER
