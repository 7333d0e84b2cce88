"""The operators that read a memory, normalize and commit at once, and the same step by step."""

import pytest
import torch
from helpers import layout_id

from mbnorm.averages import CUMULATIVE, InferenceAverages, InferenceUpdate, commit
from mbnorm.measures import MEASURES
from mbnorm.memory import MeasuredAverage, MovingAverage, RecentBatches

EPS = 1e-3
SHAPE = (6, 11, 3)
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=layout_id)
HOW_READ = {"ring": (4, 1.0), "average": (0.5,), "measured": (64.0,)}
of_every_kind = pytest.mark.parametrize("kind", HOW_READ)


def filled(channels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    return mean.to(dtype), torch.rand(channels, generator=generator, dtype=torch.float64).to(dtype)


def memory_of(kind, dtype, channels=SHAPE[1], size=5, device="cpu"):
    integer = torch.zeros((), dtype=torch.int64)
    if kind != "ring":
        memory = MovingAverage(*(torch.empty(channels, dtype=dtype) for _ in range(2)), integer)
        if kind == "measured":
            memory = MeasuredAverage(
                *memory, *(torch.empty(size, dtype=dtype) for size in (channels, MEASURES))
            )
    else:
        rings = (torch.empty(size, channels, dtype=dtype) for _ in range(2))
        memory = RecentBatches(*rings, torch.empty(size, dtype=dtype), integer)
    memory.clear()
    return copy_of(memory, device)


def as_kernels_take(memory):
    """The memory's tensors; the operators have a place for what an average may measure."""
    return (*memory, None, None) if type(memory) is MovingAverage else memory


def log_of(memory, dtype, slots=3, device="cpu"):
    """What an undo log of such states has: numbers and counters."""
    channels = memory.mean.shape[-1]
    more = channels + MEASURES if isinstance(memory, MeasuredAverage) else 0
    numbers = torch.full((slots, 4 * channels + more), torch.nan, dtype=dtype, device=device)
    return numbers, torch.full((slots, 3), -1, device=device)


def averages_of(dtype, channels=SHAPE[1], device="cpu"):
    zeros, ones = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    return copy_of(InferenceAverages(zeros, ones, torch.tensor(0), torch.tensor(0)), device)


def copy_of(state, device=None):
    return type(state)(*(t.to(device or t.device, copy=True) for t in state))


def assert_close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        tolerance = 1e-13 if g.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance, equal_nan=True)


NO_LOG = (None, None, 0)


def fused(kernels, x, parameters, state, how_read, variance, update, *, store=True, log=NO_LOG):
    memory, averages = state
    ring = isinstance(memory, RecentBatches)
    operator = kernels.forward_with_ring if ring else kernels.forward_with_average
    blended, unbiased, weight, rule, early = update
    result = operator(
        x,
        *parameters,
        variance == "pooled",
        EPS,
        *as_kernels_take(memory),
        *how_read,
        *averages,
        *log,
        store,
        blended,
        unbiased,
        weight,
        rule == "pooled",
        early,
    )
    y, record = result
    return y, record[:4], record[4:6], record[6, 0]


def step_by_step(kernels, x, parameters, state, how_read, variance, update):
    memory, averages = state
    n = x.numel() // x.shape[1]
    if isinstance(memory, RecentBatches):
        past = memory.read(n, *how_read, variance)
    elif isinstance(memory, MeasuredAverage):
        past = memory.read(memory.history_weight(n, *how_read))
    else:
        past = memory.read(*how_read)
    a = torch.as_tensor(past.batch_weight, dtype=past.mean.dtype, device=past.mean.device)
    y, statistics = kernels.forward(x, *parameters, past.mean, past.var, a, variance, EPS)
    commit(memory, averages, tuple(statistics[:2]), tuple(statistics[2:]), n, update)
    return y, statistics, past.mean, past.var, a


BAD = (torch.nan, torch.inf, -torch.inf)
UPDATES = [
    InferenceUpdate(False, False, 0.1, "averaged"),
    CUMULATIVE,
    InferenceUpdate(False, True, 1.0, "averaged"),
    InferenceUpdate(True, False, 1.0, "averaged"),
    InferenceUpdate(False, False, 0.2, "pooled"),
    InferenceUpdate(False, False, 0.55, "pooled", early=4.0),
]
