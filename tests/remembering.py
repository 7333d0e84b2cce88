"""The operators that read a memory, normalize and commit at once, and the same step by step."""

import copy
from typing import NamedTuple

import pytest
import torch
from helpers import layout_id

from mbnorm.averages import InferenceAverages, commit
from mbnorm.blend import number_of
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import CUMULATIVE, RAW, InferenceUpdate, Memory
from mbnorm.memories.moving_average import MovingAverage
from mbnorm.memories.recent_batches import RecentBatches

EPS = 1e-3
SHAPE = (6, 11, 3)
BAD = (torch.nan, torch.inf, -torch.inf)
RINGS = {
    "ring": RecentBatches(5),
    "ring of which little is read": RecentBatches(5, memory_values=24, decay=0.7),
    "ring of which nothing is read": RecentBatches(5, memory_values=1),
    "ring of one": RecentBatches(1),
}
MOVING = {
    "average": MovingAverage(0.75),
    "average of no weight": MovingAverage(0.0),
}
MEASURING = {
    "measured": MeasuredAverage(64),
    "measured, for few values": MeasuredAverage(8),
    "matched by size": MeasuredAverage(64, measured=False),
    "uncentered": MeasuredAverage(64, subtract_mean=False),
    "matched by size, for few values": MeasuredAverage(8, measured=False),
}
KINDS = RINGS | MOVING | MEASURING
PLAIN_UPDATES = [
    InferenceUpdate(0.1),
    CUMULATIVE,
    RAW,
    InferenceUpdate(1.0, blended=True),
    InferenceUpdate(0.2, pooled=True),
]
EARLY_UPDATE = InferenceUpdate(0.15, early=4.0, pooled=True)
UPDATES = [*PLAIN_UPDATES, EARLY_UPDATE]

in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=layout_id)
of_every_kind = pytest.mark.parametrize(
    "memory", [KINDS[name] for name in ("ring", "average", "measured")], ids=lambda m: type(m).__name__
)


class Held(NamedTuple):
    """A memory, its state, and the averages for inference beside it."""

    memory: Memory
    state: tuple[torch.Tensor, ...]
    averages: InferenceAverages

    @property
    def tensors(self):
        return *self.state, *self.averages

    def copy(self):
        state, averages = (tuple(t.clone() for t in part) for part in self[1:])
        return Held(self.memory, state, InferenceAverages(*averages))

    def arguments(self, update, n, m):
        """What the operators take of it: lists of tensors, and lists of numbers."""
        numbers = self.memory.read_numbers(n, m), [float(number) for number in update]
        return list(self.state), list(self.averages), *numbers


def held(memory, dtype, channels=SHAPE[1], device="cpu"):
    one_each = {"dtype": dtype, "device": device}
    mean, var = torch.zeros(channels, **one_each), torch.ones(channels, **one_each)
    counters = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    return Held(memory, memory.new(mean), InferenceAverages(mean, var, *counters))


def with_rule(memory, variance_rule):
    memory = copy.copy(memory)
    memory.variance_rule = variance_rule
    return memory


def seeds(channels, dtype, device="cpu", seed=99):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    var = torch.rand(channels, generator=generator, dtype=torch.float64)
    return mean.to(device, dtype), var.to(device, dtype)


def assert_close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        tolerance = 1e-13 if g.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_same(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


def fused(kernels, x, parameters, held, update, *, store=True):
    operator = getattr(kernels, f"forward_with_{held.memory.kernels}")
    rules = number_of(held.memory.variance_rule), EPS, store
    y, record = operator(x, *parameters, *held.arguments(update, x.numel() // x.shape[1], len(x)), *rules)
    return y, as_matrix(record)


def step_by_step(kernels, x, parameters, held, update):
    memory, state, averages = held
    n = x.numel() // x.shape[1]
    past = memory.read(state, n, len(x))
    a = torch.as_tensor(past.batch_weight, dtype=past.mean.dtype, device=past.mean.device)
    y, record = kernels.forward(x, *parameters, past.mean, past.var, a, memory.variance_rule, EPS)
    commit(memory, state, averages, tuple(record[:2]), tuple(record[2:4]), n, update)
    return y, as_matrix(record)


def as_matrix(record):
    """A record as one tensor: ATen's is seven, the last of them a number."""
    return record if isinstance(record, torch.Tensor) else torch.stack(torch.broadcast_tensors(*record))
