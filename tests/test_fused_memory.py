"""The operators that read a memory, normalize and commit at once, beside the memories and the operator.

Those of the CPU, and of Triton: on a GPU where there is one, else interpreted (`make test-triton`).
"""

import itertools
import os
from functools import partial
from importlib.util import find_spec

import pytest
import remembering
import torch
from helpers import make_input, make_parameters
from remembering import (
    BAD,
    EARLY_UPDATE,
    KINDS,
    MEASURING,
    PLAIN_UPDATES,
    SHAPE,
    assert_close,
    assert_same,
    held,
    of_every_kind,
    seeds,
    with_rule,
)

from mbnorm.backends import aten_memory, cpu, triton
from mbnorm.blend import VARIANCE_RULES
from mbnorm.memories.memory import RAW, InferenceUpdate
from mbnorm.memories.recent_batches import RecentBatches

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

RUNS = {
    cpu: cpu.missing() is None,
    aten_memory: True,
    triton: find_spec("triton") is not None
    and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
    and triton.missing() is None,
}
BLENDED = InferenceUpdate(1.0, blended=True)


@pytest.fixture(params=[cpu, aten_memory, triton], ids=["cpu", "aten", "triton"])
def kernels(request):
    if not RUNS[request.param]:
        pytest.skip("these kernels do not run here")
    return request.param


@pytest.fixture
def device(kernels):
    return "cuda" if kernels is triton and torch.cuda.is_available() else "cpu"


@pytest.fixture
def fused(kernels):
    return partial(remembering.fused, kernels)


@pytest.fixture
def step_by_step(kernels):
    return partial(remembering.step_by_step, kernels)


HELD = [(False, name) for name in KINDS] + [(True, name) for name in KINDS]
RULES, FLOATS = VARIANCE_RULES, (torch.float32, torch.float64)
CASES = [
    *itertools.product(HELD, PLAIN_UPDATES, RULES, FLOATS),
    *itertools.product([one for one in HELD if one[1] in MEASURING], [EARLY_UPDATE], RULES, FLOATS),
]


# every eleventh is enough where kernels are interpreted
@pytest.mark.parametrize(
    ("kernels", "number"),
    [
        *((cpu, number) for number in range(len(CASES))),
        *((aten_memory, number) for number in range(len(CASES))),
        *((triton, number) for number in range(0, len(CASES), 11)),
    ],
    indirect=["kernels"],
    ids=lambda v: v if isinstance(v, int) else v.__name__.rpartition(".")[2],
)
def test_one_operator_does_as_read_normalize_commit(number, kernels, fused, step_by_step, device):
    (seeded, name), update, variance_rule, dtype = CASES[number]
    memory = with_rule(KINDS[name], variance_rule)
    ours = held(memory, dtype, device=device)
    if seeded:
        memory.seed(ours.state, *seeds(SHAPE[1], dtype, device))
    theirs = ours.copy()
    parameters = [p.to(device) for p in make_parameters(SHAPE[1], dtype)]
    for step in range(12):
        x = make_input((2 + step % 3, *SHAPE[1:]), dtype, seed=step).to(device)
        if step % 4 == 1:
            x[-1, step % SHAPE[1], -1] = BAD[step % 3]
        assert_close(fused(x, parameters, ours, update), step_by_step(x, parameters, theirs, update))
        assert_close(ours.tensors, theirs.tensors)
    assert (int(ours.averages.batches), int(ours.averages.skipped)) == (9, 3)


@of_every_kind
def test_statistics_that_are_finite_but_blend_to_infinity_are_not_stored(memory, fused, device):
    memory = with_rule(memory, "pooled")
    ours = held(memory, torch.float32, device=device)
    x = make_input(SHAPE, torch.float32).to(device)
    fused(x, (None, None), ours, BLENDED)
    before = ours.copy()
    fused(x + 1e20, (None, None), ours, BLENDED)
    assert_same(ours.tensors[:-1], before.tensors[:-1])
    assert int(ours.averages.skipped) == 1


@of_every_kind
def test_without_store_nothing_is_written(memory, fused, step_by_step, device):
    ours = held(memory, torch.float64, device=device)
    memory.seed(ours.state, *seeds(SHAPE[1], torch.float64, device))
    before = ours.copy()
    x = make_input(SHAPE, torch.float64).to(device)
    got = fused(x, (None, None), ours, InferenceUpdate(0.1), store=False)
    assert_same(ours.tensors, before.tensors)
    assert_close(got, step_by_step(x, (None, None), before, InferenceUpdate(0.1)))


@of_every_kind
def test_a_weight_of_one_replaces_averages_that_are_not_finite(memory, fused, step_by_step, device):
    ours = held(memory, torch.float64, device=device)
    ours.averages.mean.fill_(torch.inf)
    ours.averages.var.fill_(torch.nan)
    theirs = ours.copy()
    x = make_input(SHAPE, torch.float64).to(device)
    fused(x, (None, None), ours, RAW)
    step_by_step(x, (None, None), theirs, RAW)
    assert ours.averages.mean.isfinite().all()
    assert_close(ours.tensors, theirs.tensors)


def test_a_ring_without_a_newest_entry_begins_anew(fused, step_by_step, device):
    memory = RecentBatches(5)
    ours = held(memory, torch.float64, device=device)
    # ages 2 and 3, as if the entry of age 1 had been dropped
    ours.state[2].copy_(torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]))
    ours.state[3].copy_(torch.tensor([3.0, 0.0, 2.0, 0.0, 0.0]))
    theirs = ours.copy()
    x = make_input(SHAPE, torch.float64).to(device)
    got = fused(x, (None, None), ours, BLENDED)
    assert_close(got, step_by_step(x, (None, None), theirs, BLENDED))
    assert_close(ours.tensors, theirs.tensors)
    assert ours.state[3].tolist() == [1, 0, 3, 0, 0]


def test_half_inputs_keep_float32_state(fused, device):
    x = make_input(SHAPE, torch.bfloat16).to(device)
    y, record = fused(x, (None, None), held(RecentBatches(5), torch.float32, device=device), BLENDED)
    assert (y.dtype, record.dtype) == (torch.bfloat16, torch.float32)


@of_every_kind
def test_more_channels_and_entries_than_a_program_takes_at_once(
    memory, kernels, fused, step_by_step, device, monkeypatch
):
    if kernels is triton:
        from mbnorm.backends import triton_memory

        for limit, at_once in (("MOST_ENTRIES", 8), ("READ_TILE", 32), ("CHANNELS_OF_ONE", 8)):
            monkeypatch.setattr(triton_memory, limit, at_once)
    channels, size = 37, 21
    if memory.kernels == "ring":
        # of batches of three values, the newest 18
        memory = RecentBatches(size, memory_values=57)
    ours = held(memory, torch.float32, channels, device)
    if memory.kernels == "ring":
        # a ring that has wrapped, with an entry for each number of values
        mean, var, counts, ages = ours.state
        mean.copy_(torch.randn(size, channels))
        var.copy_(torch.rand(size, channels))
        counts.copy_(torch.arange(1.0, size + 1))
        ages.copy_(torch.arange(float(size), 0, -1).roll(17))
    theirs, update = ours.copy(), InferenceUpdate(0.2, pooled=True)
    for step in range(2):
        x = make_input((3, channels), torch.float32, seed=step).to(device)
        (_, record), (_, wanted) = (
            fused(x, (None, None), ours, update),
            step_by_step(x, (None, None), theirs, update),
        )
        assert_close(record, wanted)
        assert_close(ours.tensors, theirs.tensors)
    x[0, -1] = torch.nan
    before = ours.copy()
    fused(x, (None, None), ours, update)
    assert_same(ours.state, before.state)
