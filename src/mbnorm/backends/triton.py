"""The operator as Triton kernels, for CUDA and ROCm.

Triton is neither imported nor looked for before `missing` is called; whoever gets None from it may call the
rest.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mbnorm.blend import Variance

# torch calls ROCm's devices cuda, too
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_forward: Any = None
_backward: Any = None
_forward_with_average: Any = None
forward_with_ring: Any = None
"""As `mbnorm.backends.cpu.forward_with_ring`."""


@cache
def missing() -> str | None:
    """Return why these kernels cannot be used here, in one line, or None; the first call imports Triton."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    global _forward, _backward, _forward_with_average, forward_with_ring
    from mbnorm.backends import triton_launch, triton_remember  # noqa: F401

    operators = torch.ops.mbnorm_triton
    _forward = operators.forward.default
    _backward = operators.backward.default
    _forward_with_average = operators.forward_with_average.default
    forward_with_ring = operators.forward_with_ring.default
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance: Variance,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the rows ``(batch_mean, batch_var, mean, var)``."""
    y, statistics = _forward(x, weight, bias, past_mean, past_var, batch_weight, variance == "pooled", eps)
    return y, statistics


def forward_with_average(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooled: bool,
    eps: float,
    memory_mean: Tensor,
    memory_var: Tensor,
    filled: Tensor,
    history_weight: Tensor | float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do as `mbnorm.backends.cpu.forward_with_average`; a history weight on the device stays there."""
    given = history_weight if isinstance(history_weight, Tensor) else None
    fixed = 0.0 if isinstance(history_weight, Tensor) else history_weight
    memory = memory_mean, memory_var, filled
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _forward_with_average(
        x, weight, bias, pooled, eps, *memory, given, fixed, *rest
    )
    return result


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    batch_weight: Tensor,
    statistics: Tensor,
    variance: Variance,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ``(dx, dw, db)`` for the statistics that `forward` returned."""
    dx, (dw, db) = _backward(dy, x, weight, batch_weight, statistics, variance == "pooled", eps, need_dx)
    return dx if need_dx else None, dw, db
