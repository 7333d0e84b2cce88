"""Whether the Triton kernels may be used on a device: they are tried there, beside ATen's on the CPU.

Compilers, drivers and devices are many, and Triton needs a C compiler, too. Nobody asks for these kernels by
name where "auto" chooses them, so they have to show that they work.
"""

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from mbnorm.averages import InferenceAverages, InferenceUpdate, commit
from mbnorm.backends import aten, triton
from mbnorm.measures import MEASURES
from mbnorm.memory import MeasuredAverage, RecentBatches

CASES = (((3, 5, 7, 9), torch.contiguous_format), ((2, 2, 100, 100), torch.channels_last))
"""What one program takes at once, and what is cut into parts."""
STEPS = 3
EPS = 1e-5
MATCHED_VALUES = 1024
UPDATE = InferenceUpdate(blended=False, unbiased=False, weight=0.1, variance="pooled", early=8.0)
LIMIT, DECAY = 3, 0.9
TOLERANCE = 1e-4
"""In units of the value, or of 1 where that is less."""

Tried: TypeAlias = MeasuredAverage | RecentBatches

_failures: dict[torch.device, str | None] = {}


def triton_works_for(x: Tensor) -> bool:
    """Return whether the kernels have shown on the device of ``x`` that they work, or do so now.

    They cannot while kernels are not run as they are launched, as in the capture of a CUDA graph.
    """
    if x.device not in _failures and not (triton.missing() is None and _can_be_tried(x)):
        return False
    return failure_on(x.device) is None


def _can_be_tried(x: Tensor) -> bool:
    return triton.is_plain(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def failure_on(device: torch.device) -> str | None:
    """Return why the kernels are not to be used on a device, in one line, or None.

    The first call for a device takes seconds, most of them to compile what Triton then keeps on disk, and
    waits for the device.
    """
    if device not in _failures:
        _failures[device] = triton.missing() or _try_all(device)
    return _failures[device]


@torch.no_grad()
def _try_all(device: torch.device) -> str | None:
    try:
        for shape, layout in CASES:
            for memory in _empty_memories(shape[1]):
                _try(shape, layout, memory, device)
    except ArithmeticError as error:
        warnings.warn(f"mbnorm leaves Triton alone: {error}. Please tell its authors", stacklevel=2)
        return str(error)
    # whatever a compiler or driver raises: there is another backend
    except Exception as error:
        first, *_ = [*str(error).splitlines(), ""]
        return f"its kernels do not run on {device}: {type(error).__name__}: {first}"
    return None


def _try(shape: tuple[int, ...], layout: torch.memory_format, memory: Tried, device: torch.device) -> None:
    """Take some steps both ways, and each forward twice.

    Raises:
        ArithmeticError: the numbers do not agree.
    """
    averages = InferenceAverages(*torch.zeros(2, shape[1], **_EXACT).unbind(), *_counters(2))
    weight, bias = _values((2, shape[1]), 2.0)
    state = tuple(_on(device, t) for t in (*memory, *averages))
    names = ("y", "dx", "dw", "db", *len(state) * ["state"])
    for step in range(STEPS):
        x, dy = (_values(shape, f + step).contiguous(memory_format=layout) for f in (0.7, 0.3))
        given = x, dy, weight, bias
        wanted = _by_aten(*given, memory, averages)
        found = _by_triton(*(_on(device, t) for t in given), kind=type(memory), state=state)
        for name, got, want in zip(names, found, wanted, strict=True):
            away = (got.to("cpu", torch.float64) - want).abs()
            error = (away / want.abs().clamp_min(1.0)).max()
            # NaN is no more than anything
            if not error <= TOLERANCE:
                raise ArithmeticError(f"its {name} is off by {error:.1e} on {device}")


# whatever the defaults are
_EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def _counters(number: int) -> tuple[Tensor, ...]:
    return torch.zeros(number, dtype=torch.int64, device="cpu").unbind()


def _empty_memories(channels: int) -> tuple[Tried, ...]:
    mean, var, last = torch.empty(3, channels, **_EXACT).unbind()
    means, variances = torch.empty(2, LIMIT, channels, **_EXACT).unbind()
    filled, position = _counters(2)
    memories: tuple[Tried, ...] = (
        MeasuredAverage(mean, var, filled, last, torch.empty(MEASURES, **_EXACT)),
        RecentBatches(means, variances, torch.empty(LIMIT, **_EXACT), position),
    )
    for memory in memories:
        memory.clear()
    return memories


def _values(shape: Sequence[int], frequency: float) -> Tensor:
    number = torch.Size(shape).numel()
    return torch.arange(number, **_EXACT).mul_(frequency).sin_().view(*shape)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device, dtype, copy=True)


def _by_triton(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, *, kind: type[Tried], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    ring = kind is RecentBatches
    operator: Any = triton.forward_with_ring if ring else triton.forward_with_average
    how_read = (LIMIT, DECAY) if ring else (float(MATCHED_VALUES),)
    no_log = None, None, 0
    blended, unbiased, new_weight, rule, early = UPDATE
    update = True, blended, unbiased, new_weight, rule == "pooled", early
    rest = *state[:-4], *how_read, *state[-4:], *no_log, *update
    y, record = operator(x, weight, bias, True, EPS, *rest)
    past_mean, past_var, a = record[4:].unbind()
    _, again = triton.forward(x, weight, bias, past_mean, past_var, a[0], "pooled", EPS)
    if not torch.equal(again[:2], record[:2]):
        # activation checkpointing finds a forward by these
        raise ArithmeticError(f"its statistics of a batch differ from one forward to another on {x.device}")
    dx, dw, db = triton.backward(dy, x, weight, None, record, "pooled", EPS, True)
    return y, cast(Tensor, dx), dw, db, *state


def _by_aten(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, memory: Tried, averages: InferenceAverages
) -> tuple[Tensor, ...]:
    n = x.numel() // x.shape[1]
    if isinstance(memory, RecentBatches):
        past = memory.read(n, LIMIT, DECAY, "pooled")
    else:
        past = memory.read(memory.history_weight(n, MATCHED_VALUES))
    a = torch.as_tensor(past.batch_weight, **_EXACT)
    y, statistics = aten.forward(x, weight, bias, past.mean, past.var, a, "pooled", EPS)
    dx, dw, db = aten.backward(dy, x, weight, a, statistics, "pooled", EPS, True)
    commit(memory, averages, statistics[:2], statistics[2:], n, UPDATE)
    return y, cast(Tensor, dx), dw, db, *memory, *averages
