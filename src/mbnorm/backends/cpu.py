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
    for name in ("cpu.cpp", "cpu_kernels.cpp", "cpu_memory.cpp", "cpu_kernels.h")
)

_forward: Any = None
_backward: Any = None
ring_read: Any = None
"""``(mean, var, counts, position, n, limit, decay, pooled) -> (past_mean, past_var, batch_weight)``, as
`mbnorm.memory.RecentBatches.read`."""
ring_commit: Any = None
"""``(batch_mean, batch_var, n, blended_mean, blended_var, ring_mean, ring_var, counts, position, new_mean,
new_var, weight, pooled, running_mean, running_var, batches, skipped) -> None``: blend the new statistics into
the averages with `mbnorm.memory.InferenceAverages.after`, and if that and the blended statistics are finite,
commit the batch's to the `mbnorm.memory.RecentBatches` and the averages."""
average_commit: Any = None
"""``(blended_mean, blended_var, memory_mean, memory_var, filled, new_mean, new_var, weight, pooled,
running_mean, running_var, batches, skipped) -> None``: the same with a `mbnorm.memory.MovingAverage`, which
takes the blended statistics."""


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
    for name in ("_forward", "_backward", "ring_read", "ring_commit", "average_commit"):
        globals()[name] = getattr(operators, name.lstrip("_")).default
    register_fake: Any = torch.library.register_fake
    for name, shapes in (
        ("forward", _forward_shapes),
        ("backward", _backward_shapes),
        ("ring_read", _ring_read_shapes),
        ("ring_commit", _no_shapes),
        ("average_commit", _no_shapes),
    ):
        register_fake(f"mbnorm_cpu::{name}", shapes)


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_per_channel(x, 4)


def _backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    need_dx = others[-1]
    return torch.empty_like(x) if need_dx else x.new_empty(0), *_per_channel(x, 2)


def _ring_read_shapes(mean: Tensor, *_: Any) -> tuple[Tensor, ...]:
    channels = mean.shape[1]
    return mean.new_empty(channels), mean.new_empty(channels), mean.new_empty(())


def _no_shapes(*_: Any) -> None:
    return None


def _per_channel(x: Tensor, number: int) -> list[Tensor]:
    return [x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype)) for _ in range(number)]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance: Variance,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(y, batch_mean, batch_var, mean, var)``."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _forward(
        x, weight, bias, past_mean, past_var, batch_weight, variance == "pooled", eps
    )
    return result


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    batch_weight: Tensor,
    batch_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    variance: Variance,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ``(dx, dw, db)``."""
    dx, dw, db = _backward(
        dy, x, weight, batch_weight, batch_mean, mean, var, variance == "pooled", eps, need_dx
    )
    return dx if need_dx else None, dw, db
