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
    HOW_READ,
    SHAPE,
    UPDATES,
    assert_close,
    averages_of,
    copy_of,
    filled,
    log_of,
    memory_of,
    of_every_kind,
)

from mbnorm.backends import cpu, triton

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

RUNS = {
    cpu: cpu.missing() is None,
    triton: find_spec("triton") is not None
    and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
    and triton.missing() is None,
}


@pytest.fixture(params=[cpu, triton], ids=["cpu", "triton"])
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


RINGS = [("ring", (4, 1.0)), ("ring", (2, 0.7)), ("ring", (0, 1.0))]
AVERAGES = [("average", (0.75,)), ("average", (0.0,)), ("measured", (64.0,)), ("measured", (8.0,))]
VARIANCES, FLOATS = ("averaged", "pooled"), (torch.float32, torch.float64)
CASES = list(itertools.product(RINGS + AVERAGES, (False, True), UPDATES, VARIANCES, FLOATS))


# every eleventh is enough where kernels are interpreted
@pytest.mark.parametrize(
    ("kernels", "number"),
    [
        *((cpu, number) for number in range(len(CASES))),
        *((triton, number) for number in range(0, len(CASES), 11)),
    ],
    indirect=["kernels"],
    ids=lambda v: v if isinstance(v, int) else v.__name__.rpartition(".")[2],
)
def test_one_operator_does_as_read_normalize_commit(number, kernels, fused, step_by_step, device):
    (kind, how_read), seeded, update, variance, dtype = CASES[number]
    memory, averages = memory_of(kind, dtype, device=device), averages_of(dtype, device=device)
    if seeded:
        memory.seed(*(t.to(device) for t in filled(SHAPE[1], dtype, 99)))
    ours, theirs = (memory, averages), (copy_of(memory), copy_of(averages))
    parameters = [p.to(device) for p in make_parameters(SHAPE[1], dtype)]
    for step in range(12):
        x = make_input((2 + step % 3, *SHAPE[1:]), dtype, seed=step).to(device)
        if step % 4 == 1:
            x[-1, step % SHAPE[1], -1] = BAD[step % 3]
        y, statistics, past, a = fused(x, parameters, ours, how_read, variance, update)
        wanted = step_by_step(x, parameters, theirs, how_read, variance, update)
        assert_close((y, statistics, *past, a), wanted)
        assert_close((*ours[0], *ours[1]), (*theirs[0], *theirs[1]))
    assert (int(averages.batches), int(averages.skipped)) == (9, 3)


@of_every_kind
def test_statistics_that_are_finite_but_blend_to_infinity_are_not_stored(kind, fused, device):
    state = memory_of(kind, torch.float32, device=device), averages_of(torch.float32, device=device)
    x = make_input(SHAPE, torch.float32).to(device)
    fused(x, (None, None), state, HOW_READ[kind], "pooled", UPDATES[3])
    before = [t.clone() for part in state for t in part][:-1]
    fused(x + 1e20, (None, None), state, HOW_READ[kind], "pooled", UPDATES[3])
    assert all(torch.equal(a, b) for a, b in zip((*state[0], *state[1][:3]), before, strict=True))
    assert int(state[1].skipped) == 1


@of_every_kind
def test_without_store_nothing_is_written(kind, fused, step_by_step, device):
    state = memory_of(kind, torch.float64, device=device), averages_of(torch.float64, device=device)
    state[0].seed(*(t.to(device) for t in filled(SHAPE[1], torch.float64, 1)))
    before = [copy_of(part) for part in state]
    x = make_input(SHAPE, torch.float64).to(device)
    got = fused(x, (None, None), state, HOW_READ[kind], "pooled", UPDATES[0], store=False)
    now, then = ([t for part in parts for t in part] for parts in (state, before))
    assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
    wanted = step_by_step(x, (None, None), before, HOW_READ[kind], "pooled", UPDATES[0])
    assert_close(got[:2], wanted[:2])


@of_every_kind
def test_what_was_before_is_logged(kind, fused, device):
    state = memory_of(kind, torch.float64, device=device), averages_of(torch.float64, device=device)
    rows, counters = log_of(state[0], torch.float64, slots=2, device=device)
    x = make_input(SHAPE, torch.float64).to(device)
    fused(x, (None, None), state, HOW_READ[kind], "pooled", UPDATES[0])
    running = [t.clone() for t in state[1][:2]]
    more = [t.clone() for t in state[0][3:]] if kind == "measured" else []
    log = (rows, counters, 1)
    _, _, past, _ = fused(x, (None, None), state, HOW_READ[kind], "pooled", UPDATES[0], log=log)
    assert torch.equal(rows[1], torch.cat((*past, *running, *more)))
    assert counters.tolist() == [[-1, -1, -1], [1, 0, 1]]
    assert rows[0].isnan().all()


def test_half_inputs_keep_float32_state(fused, device):
    state = memory_of("ring", torch.float32, device=device), averages_of(torch.float32, device=device)
    x = make_input(SHAPE, torch.bfloat16).to(device)
    y, statistics, *_ = fused(x, (None, None), state, (4, 1.0), "pooled", UPDATES[0])
    assert (y.dtype, statistics.dtype) == (torch.bfloat16, torch.float32)


@of_every_kind
def test_more_channels_and_entries_than_a_program_takes_at_once(
    kind, kernels, fused, step_by_step, device, monkeypatch
):
    if kernels is triton:
        from mbnorm.backends import triton_remember

        for limit, at_once in (
            ("MOST_ENTRIES", 8),
            ("READ_TILE", 32),
            ("NOTE_TILE", 8),
            ("CHANNELS_OF_ONE", 8),
        ):
            monkeypatch.setattr(triton_remember, limit, at_once)
    channels, size = 37, 21
    sizes = {"channels": channels, "device": device}
    memory, averages = memory_of(kind, torch.float32, size=size, **sizes), averages_of(torch.float32, **sizes)
    if kind == "ring":
        # a ring that has wrapped, with an entry for each number of values
        memory.mean.copy_(torch.randn(size, channels))
        memory.var.copy_(torch.rand(size, channels))
        memory.counts.copy_(torch.arange(1.0, size + 1))
        memory.position.fill_(2 * size + 17)
    ours, theirs = (memory, averages), (copy_of(memory), copy_of(averages))
    how_read = (size - 3, 1.0) if kind == "ring" else HOW_READ[kind]
    for step in range(2):
        x = make_input((3, channels), torch.float32, seed=step).to(device)
        _, statistics, past, a = fused(x, (None, None), ours, how_read, "pooled", UPDATES[4])
        wanted = step_by_step(x, (None, None), theirs, how_read, "pooled", UPDATES[4])
        assert_close((statistics, *past, a), wanted[1:])
        assert_close((*ours[0], *ours[1]), (*theirs[0], *theirs[1]))
    x[0, -1] = torch.nan
    before = [t.clone() for t in ours[0]]
    fused(x, (None, None), ours, how_read, "pooled", UPDATES[4])
    assert all(map(torch.equal, ours[0], before))
