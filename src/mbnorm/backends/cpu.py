"""The operator and the memories as C++ kernels of this package's own, compiled at first use.

Nothing is compiled, or even looked for, before `missing` is called; whoever gets None from it may call the
rest.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbnorm.blend import Variance, statistics_dtype

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        "cpu.cpp",
        "cpu_autograd.cpp",
        "cpu_kernels.cpp",
        "cpu_kernels.h",
        "cpu_memory.cpp",
        "cpu_memory.h",
        "cpu_operator.cpp",
        "cpu_operator.h",
        "cpu_parallel.h",
    )
)

_library: Any = None
_forward: Any = None
_backward: Any = None
forward_with_average: Any = None
"""``(x, weight, bias, pooled, eps, memory_mean, memory_var, filled, last, measured, history_weight,
running_mean, running_var, batches, skipped, log, log_counters, slot, store, blended, unbiased, new_weight,
new_pooled, early) -> (y, record)``: read a `mbnorm.memory.MovingAverage`, or a `MeasuredAverage` where there
are ``last`` and ``measured``, for which ``history_weight`` is the values to be matched, normalize, and
``store`` or not; differentiable.

``blended`` to ``early`` are a `mbnorm.averages.InferenceUpdate`. Rows of ``record`` are the batch's mean
and variance, the blended ones, the past ones that were read, and the weight of the batch; each backward pass
raises its version. The state before goes into a `mbnorm.layers.undo.UndoLog`, if there is one."""
forward_with_ring: Any = None
"""``(x, weight, bias, pooled, eps, memory_mean, memory_var, counts, position, limit, decay, running_mean,
...)``: the same with a `mbnorm.memory.RecentBatches`."""
awaits_backward: Any = None
"""``(record) -> bool``: whether the backward pass that runs now comes through the forward of a record."""
differentiable_gradients: Any = None
"""How the kernels' gradients are had where they must be differentiable; `mbnorm.functional` sets it, since
backends do not know one another."""
commit_to_average: Any = None
"""``(sums, pooled, memory_mean, memory_var, filled, last, measured, history_weight, running_mean,
running_var, batches, skipped, blended, unbiased, new_weight, new_pooled, early)``: read such an average,
blend with it the batch whose ranks' messages add up to ``sums`` (see `mbnorm.distributed`), and commit."""
commit_to_ring: Any = None
"""``(sums, pooled, memory_mean, memory_var, counts, position, limit, decay, running_mean, ...)``: the same
with a `mbnorm.memory.RecentBatches`."""


@cache
def missing() -> str | None:
    """Return why these kernels cannot be used here, in one line, or None; the first call builds them."""
    from mbnorm.backends import build

    try:
        build.load("mbnorm_cpu", list(SOURCES))
    except build.BuildError as error:
        return str(error)
    _bind()
    return None


def _bind() -> None:
    operators = torch.ops.mbnorm_cpu
    global _library
    _library = torch.library.Library("mbnorm_cpu", "IMPL")  # type: ignore[no-untyped-call]
    register_fake: Any = torch.library.register_fake
    for name, shapes in (
        ("_forward", _forward_shapes),
        ("_backward", _backward_shapes),
        ("_backward_recorded", _backward_shapes),
        ("forward_with_average", _remembering_shapes),
        ("forward_with_ring", _remembering_shapes),
        ("commit_to_average", _nothing),
        ("commit_to_ring", _nothing),
    ):
        operator = name.lstrip("_")
        globals()[name] = getattr(operators, operator).default
        register_fake(f"mbnorm_cpu::{operator}", shapes)
        if shapes is not _remembering_shapes:
            # their gradients are functional's, and torch's stand-in for missing ones is slow
            _library.impl(operator, torch.library.fallthrough_kernel, "AutogradCPU")
    globals()["awaits_backward"] = operators.awaits_backward.default
    _library.impl("backward_differentiably", _backward_differentiably, "CompositeImplicitAutograd")


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), _per_channel(x, 4)


def _backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    need_dx = others[-1]
    return torch.empty_like(x) if need_dx else x.new_empty(0), _per_channel(x), _per_channel(x)


def _remembering_shapes(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), _per_channel(x, 7)


def _nothing(*_: Any) -> None:
    return None


def _per_channel(x: Tensor, *rows: int) -> Tensor:
    return x.new_empty((*rows, x.shape[1]), dtype=statistics_dtype(x.dtype))


def _backward_differentiably(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    record: Tensor,
    pooled: bool,
    eps: float,
    *needs: bool,
) -> list[Tensor]:
    variance: Variance = "pooled" if pooled else "averaged"
    # a copy: the next backward pass raises the record's version, and the graph made here may outlive that
    past_mean, past_var, batch_weight = record[4:].clone()
    past = past_mean, past_var, batch_weight[0]
    gradients: list[Tensor] = differentiable_gradients(dy, x, weight, bias, *past, variance, eps, needs)
    return gradients


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
    dx, dw, db = _backward(dy, x, weight, batch_weight, statistics, variance == "pooled", eps, need_dx)
    return dx if need_dx else None, dw, db
