"""The operator as Triton kernels, for CUDA and ROCm.

Triton is neither imported nor looked for before `missing` is called; whoever gets None from it may call the
rest.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mbnorm.blend import Variance

# torch calls ROCm's devices cuda, too
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES_OF_A_LAYER = 6
"""Tensors beside the memory that a forward may write: running statistics, counters and log."""

_launch: Any = None
_remember: Any = None
_operators: Any = None


@cache
def missing() -> str | None:
    """Return why these kernels cannot be used here, in one line, or None; the first call imports Triton."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    global _launch, _remember, _operators
    from mbnorm.backends import triton_launch, triton_remember

    _launch, _remember, _operators = triton_launch, triton_remember, torch.ops.mbnorm_triton
    return None


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher, which takes longer than a launch, would do no more than call a function."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_inference_mode_enabled()
        and all(t is None or type(t) in (Tensor, Parameter) for t in tensors)
    )


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
    run = _launch.forward if is_plain(x, weight, bias) else _operators.forward.default
    y, statistics = run(x, weight, bias, past_mean, past_var, batch_weight, variance == "pooled", eps)
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
    last: Tensor | None,
    measured: Tensor | None,
    history_weight: Tensor | float,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Do as `mbnorm.backends.cpu.forward_with_average`, not differentiably.

    A history weight on the device stays there.
    """
    given = history_weight if isinstance(history_weight, Tensor) else None
    fixed = 0.0 if isinstance(history_weight, Tensor) else history_weight
    memory = memory_mean, memory_var, filled, last, measured
    arguments = x, weight, bias, pooled, eps, *memory, given, fixed, *rest
    result: tuple[Tensor, Tensor]
    if not is_plain(x, weight, bias):
        result = _operators.forward_with_average.default(*arguments)
        return result
    result = _remember.forward_with_average(*arguments)
    _written(*memory, *rest[:STATES_OF_A_LAYER])
    return result


def forward_with_ring(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pooled: bool, eps: float, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Do as `mbnorm.backends.cpu.forward_with_ring`, not differentiably."""
    result: tuple[Tensor, Tensor]
    if not is_plain(x, weight, bias):
        result = _operators.forward_with_ring.default(x, weight, bias, pooled, eps, *rest)
        return result
    result = _remember.forward_with_ring(x, weight, bias, pooled, eps, *rest)
    memory, layer = rest[:4], rest[6:]
    _written(*memory, *layer[:STATES_OF_A_LAYER])
    return result


def _written(*states: Tensor | None) -> None:
    """Tell autograd what the kernels wrote, as the dispatcher does."""
    torch.autograd.graph.increment_version([s for s in states if s is not None])


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    batch_weight: Tensor | None,
    statistics: Tensor,
    variance: Variance,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ``(dx, dw, db)`` for the statistics that `forward` returned, or for a record."""
    run = _launch.backward if is_plain(dy, x, weight) else _operators.backward.default
    dx, parameters = run(dy, x, weight, batch_weight, statistics, variance == "pooled", eps, need_dx)
    dw, db = parameters.unbind(0)
    return dx if need_dx else None, dw, db
