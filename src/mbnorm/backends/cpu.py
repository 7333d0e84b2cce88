"""The operator and the memories as C++ kernels, from the wheel or compiled at first use.

Nothing is loaded, or even looked for, before `missing` is called. Call the rest only if it returns None.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mbnorm.blend import VarianceRule, number_of, statistics_dtype

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAME = "mbnorm_cpu"
SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        "cpu_blend.h",
        "cpu_kernels.cpp",
        "cpu_kernels.h",
        "cpu_memory.cpp",
        "cpu_operator.cpp",
        "cpu_operator.h",
        "cpu_parallel.h",
        "cpu_tensors.h",
        "cpu_vectors.h",
    )
)
RECORD_ROWS = 7
PAST_ROWS = 3

_library: Any = None
_forward: Any = None
_backward: Any = None
_remembering_backward: Any = None
_forward_with_average: Any = None
_forward_with_ring: Any = None
_commit_to_average: Any = None
_commit_to_ring: Any = None


@cache
def missing() -> str | None:
    """Return why these kernels cannot be used here, in one line, or None; the first call loads them."""
    from mbnorm.backends import build, library

    try:
        library.load(NAME, SOURCES)
    except build.BuildError as error:
        return str(error)
    _bind()
    return None


def build() -> str | None:
    """Do as `missing`, and try again what failed before."""
    from mbnorm.backends import library

    library.forget_failures()
    return missing()


def _bind() -> None:
    global _library
    _library = torch.library.Library(NAME, "IMPL")  # type: ignore[no-untyped-call]
    register_fake: Any = torch.library.register_fake
    for name, shapes in (
        ("forward", _forward_shapes),
        ("backward", _backward_shapes),
        ("remembering_backward", _remembering_backward_shapes),
        ("forward_with_average", _forward_shapes),
        ("forward_with_ring", _forward_shapes),
        ("commit_to_average", _nothing),
        ("commit_to_ring", _nothing),
    ):
        globals()[f"_{name}"] = getattr(torch.ops.mbnorm_cpu, name).default
        register_fake(f"{NAME}::{name}", shapes)
        # `mbnorm.functional` has the gradients, and torch's stand-in for missing ones is slow
        _library.impl(name, torch.library.fallthrough_kernel, "AutogradCPU")


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), _per_channel(x, RECORD_ROWS)


def _backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    need_dx = others[-1]
    return torch.empty_like(x) if need_dx else x.new_empty(0), _per_channel(x), _per_channel(x)


def _remembering_backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, need_dx, _store = others
    return *_backward_shapes(dy, x, need_dx), _per_channel(x, PAST_ROWS)


def _nothing(*_: Any) -> None:
    return None


def _per_channel(x: Tensor, *rows: int) -> Tensor:
    return x.new_empty((*rows, x.shape[1]), dtype=statistics_dtype(x.dtype))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance_rule: VarianceRule,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the record of the forward.

    Its rows, each with a number per channel, are the batch's mean and variance, the blended ones, the past
    ones, and the weight of the batch.
    """
    y, record = _forward(x, weight, bias, past_mean, past_var, batch_weight, number_of(variance_rule), eps)
    return y, record


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    record: Tensor,
    variance_rule: VarianceRule,
    eps: float,
    need_dx: bool,
    past: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ``(dx, dw, db)`` for the record of a forward.

    ``past``, shape (3, C), is what `mbnorm.gradient.RememberedGradient` reads: what it remembers of the two
    means, and the weight of this batch's. None is the exact gradient.
    """
    dx, dw, db = _backward(dy, x, weight, record, past, number_of(variance_rule), eps, need_dx)
    return dx if need_dx else None, dw, db


def remembering_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    record: Tensor,
    remembered: tuple[Tensor, Tensor],
    variance_rule: VarianceRule,
    eps: float,
    need_dx: bool,
    store: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Do as `backward` with ``remembered`` as the past means; return these, too, and ``store`` or not.

    ``remembered`` are the buffers of a `mbnorm.gradient.RememberedGradient`, in the dtype of the record.
    """
    how = number_of(variance_rule), eps, need_dx, store
    dx, dw, db, past = _remembering_backward(dy, x, weight, record, *remembered, *how)
    if store:
        increment_version(remembered)
    return dx if need_dx else None, dw, db, past


def forward_with_average(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
    eps: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """Read a moving average, normalize, and ``store`` or not; return ``y`` and the record of the forward.

    Args:
        x: input.
        weight: scale, or None.
        bias: shift, or None.
        memory: mean, var, filled and the history weight; or mean, var, filled, last and measured, as
            `mbnorm.memories.measured_average.MeasuredAverage` has them.
        averages: `mbnorm.averages.InferenceAverages`.
        read: nothing; or the batch size to be matched, whether by what is measured, and the samples of ``x``.
        update: `mbnorm.memories.memory.InferenceUpdate`.
        rule: the number of the variance rule.
        eps: added to the variance.
        store: whether to write ``memory`` and ``averages``.
    """
    y, record = _forward_with_average(x, weight, bias, memory, averages, read, update, rule, eps, store)
    if store:
        # the dispatcher raises no versions: graphs that saved what was here before have to notice
        increment_version((*_written(memory), *averages))
    return y, record


def forward_with_ring(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
    eps: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """Do as `forward_with_average` with a `mbnorm.memories.recent_batches.RecentBatches`.

    ``memory`` is its mean, var, counts and ages; ``read`` the greatest age that is read, and the decay.
    """
    y, record = _forward_with_ring(x, weight, bias, memory, averages, read, update, rule, eps, store)
    if store:
        increment_version((*memory, *averages))
    return y, record


def commit_to_average(
    sums: Tensor,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
) -> None:
    """Store a batch in a moving average: the one whose ranks' messages add up to ``sums``.

    `mbnorm.distributed` has the messages.
    """
    _commit_to_average(sums, memory, averages, read, update, rule)
    increment_version((*_written(memory), *averages))


def commit_to_ring(
    sums: Tensor,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
) -> None:
    """Do as `commit_to_average` with a ring."""
    _commit_to_ring(sums, memory, averages, read, update, rule)
    increment_version((*memory, *averages))


def _written(average: Sequence[Tensor]) -> Sequence[Tensor]:
    # the fourth of four is a history weight, which is only read
    return average[:3] if len(average) == 4 else average
