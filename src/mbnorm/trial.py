"""Whether the Triton kernels may be used on a device: they are tried there, beside ATen's on the CPU.

Compilers, drivers and devices are many, and Triton needs a C compiler, too. Nobody asks for these kernels by
name where "auto" chooses them, so they are tested first.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mbnorm.averages import InferenceAverages, commit
from mbnorm.backends import aten, triton
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import Memory, State
from mbnorm.memories.recent_batches import RecentBatches

CASES = (((3, 5, 7, 9), torch.contiguous_format), ((2, 2, 100, 100), torch.channels_last))
"""What one program takes at once, and what is cut into parts."""
STEPS = 3
EPS = 1e-5
MOMENTUM = 0.9
TOLERANCE = 1e-4
"""In units of the value, or of 1 where that is less."""

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
            for memory in (MeasuredAverage(1024), RecentBatches(3, decay=0.9, inference="ema")):
                _try(shape, layout, memory, device)
    except ArithmeticError as error:
        warnings.warn(f"mbnorm leaves Triton alone: {error}. Please tell its authors", stacklevel=2)
        return str(error)
    # whatever a compiler or driver raises: there is another backend
    except Exception as error:
        first, *_ = [*str(error).splitlines(), ""]
        return f"its kernels do not run on {device}: {type(error).__name__}: {first}"
    return None


def _try(shape: tuple[int, ...], layout: torch.memory_format, memory: Memory, device: torch.device) -> None:
    """Take some steps both ways, and each forward twice.

    Raises:
        ArithmeticError: the numbers do not agree.
    """
    counters = torch.zeros(2, dtype=torch.int64, device="cpu")
    averages = InferenceAverages(*torch.zeros(2, shape[1], **_EXACT).unbind(), *counters.unbind())
    state = memory.new(averages.mean)
    weight, bias = _values((2, shape[1]), 2.0)
    ours = tuple(_on(device, t) for t in (*state, *averages))
    names = ("y", "dx", "dw", "db", *len(ours) * ["state"])
    for step in range(STEPS):
        x, dy = (_values(shape, f + step).contiguous(memory_format=layout) for f in (0.7, 0.3))
        given = x, dy, weight, bias
        wanted = _by_aten(given, memory, state, averages)
        on_device = tuple(_on(device, t) for t in given)
        found = _by_triton(on_device, memory, ours[:-4], InferenceAverages(*ours[-4:]))
        for name, got, want in zip(names, found, wanted, strict=True):
            away = (got.to("cpu", torch.float64) - want).abs()
            error = (away / want.abs().clamp_min(1.0)).max()
            # NaN is no more than anything
            if not error <= TOLERANCE:
                raise ArithmeticError(f"its {name} has an error of {error:.1e} on {device}")


# whatever the defaults are
_EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def _values(shape: Sequence[int], frequency: float) -> Tensor:
    number = torch.Size(shape).numel()
    return torch.arange(number, **_EXACT).mul_(frequency).sin_().view(*shape)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device, dtype, copy=True)


def _by_triton(
    given: tuple[Tensor, ...], memory: Memory, state: State, averages: InferenceAverages
) -> tuple[Tensor, ...]:
    x, dy, weight, bias = given
    m, n = x.shape[0], x.numel() // x.shape[1]
    operator = triton.forward_with_ring if memory.kernels == "ring" else triton.forward_with_average
    how = memory.read_numbers(n, m), memory.update(MOMENTUM, m), True, EPS, True
    y, record = operator(x, weight, bias, state, averages, *how)
    past_mean, past_var, a = record[4:].unbind()
    _, again = triton.forward(x, weight, bias, past_mean, past_var, a[0], "pooled", EPS)
    if not torch.equal(again[:2], record[:2]):
        # activation checkpointing finds a forward by these
        raise ArithmeticError(f"its statistics of a batch differ from one forward to another on {x.device}")
    dx, dw, db = triton.backward(dy, x, weight, record, "pooled", EPS, True)
    return y, cast(Tensor, dx), dw, db, *state, *averages


def _by_aten(
    given: tuple[Tensor, ...], memory: Memory, state: State, averages: InferenceAverages
) -> tuple[Tensor, ...]:
    x, dy, weight, bias = given
    m, n = x.shape[0], x.numel() // x.shape[1]
    past = memory.read(state, n, m)
    a = torch.as_tensor(past.batch_weight, **_EXACT)
    y, record = aten.forward(x, weight, bias, past.mean, past.var, a, "pooled", EPS)
    dx, dw, db = aten.backward(dy, x, weight, record, "pooled", EPS, True)
    batch, blended = (record[0], record[1]), (record[2], record[3])
    commit(memory, state, averages, batch, blended, n, memory.update(MOMENTUM, m))
    return y, cast(Tensor, dx), dw, db, *state, *averages
