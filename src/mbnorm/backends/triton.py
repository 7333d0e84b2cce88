"""The operator and the memories as Triton kernels, for CUDA and ROCm.

Triton is neither imported nor searched before `missing` is called. If that returns None, the other functions
may be called. They take and return what those of `mbnorm.backends.cpu` do. They are not differentiable, and
what they read of a memory stays on the device.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mbnorm.blend import VarianceRule, number_of

# torch calls ROCm's devices cuda, too
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_forward: Any = None
_backward: Any = None
_memory: Any = None
_operators: Any = None


@cache
def missing() -> str | None:
    """Return why these kernels cannot be used here, in one line, or None; the first call imports Triton."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    global _forward, _backward, _memory, _operators
    from mbnorm.backends import triton_backward, triton_forward, triton_memory

    _forward, _backward, _memory = triton_forward, triton_backward, triton_memory
    _operators = torch.ops.mbnorm_triton
    return None


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher, which takes longer than a launch, can be bypassed."""
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
    variance_rule: VarianceRule,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the record.

    Its rows are mean and variance of the batch, blended mean and variance, past mean and variance, and the
    weight of the batch.
    """
    run = _forward.forward if is_plain(x, weight, bias) else _operators.forward.default
    y, record = run(x, weight, bias, past_mean, past_var, batch_weight, number_of(variance_rule), eps)
    return y, record


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
    """Read a moving average, normalize, and ``store`` or not; return ``y`` and the record."""
    how = read, update, rule, eps, store
    return _with_memory("forward_with_average", x, weight, bias, memory, averages, *how)


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
    """Read a ring of recent batches, normalize, and ``store`` or not; return ``y`` and the record."""
    how = read, update, rule, eps, store
    return _with_memory("forward_with_ring", x, weight, bias, memory, averages, *how)


def _with_memory(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    *how: Any,
) -> tuple[Tensor, Tensor]:
    plain = is_plain(x, weight, bias)
    run = getattr(_memory, name) if plain else getattr(_operators, name).default
    y, record = run(x, weight, bias, memory, averages, *how)
    if plain:
        # tell autograd what the kernels wrote, as the dispatcher does
        torch.autograd.graph.increment_version([*memory, *averages])
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
    """Return ``(dx, dw, db)`` for the record that a forward returned.

    ``past`` is what `mbnorm.backends.cpu.backward` takes.
    """
    run = _backward.backward if is_plain(dy, x, weight) else _operators.backward.default
    dx, dw, db = run(dy, x, weight, record, past, number_of(variance_rule), eps, need_dx)
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
    """Do as `backward` with ``remembered`` as the past means; return them, too, and ``store`` or not."""
    plain = is_plain(dy, x, weight)
    run = _backward.remembering_backward if plain else _operators.remembering_backward.default
    how = number_of(variance_rule), eps, need_dx, store
    dx, dw, db, past = run(dy, x, weight, record, *remembered, *how)
    if plain and store:
        torch.autograd.graph.increment_version(remembered)
    return dx if need_dx else None, dw, db, past
