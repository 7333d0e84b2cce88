"""The operators that read a memory, normalize and commit at once, beside the memories and the operator."""

import pytest
import torch
from helpers import layout_id, make_input, make_parameters
from torch.library import opcheck

import mbnorm
from mbnorm.backends import cpu
from mbnorm.distributed import local_statistics, sums_of
from mbnorm.memory import InferenceAverages, InferenceUpdate, MovingAverage, RecentBatches, commit

EPS = 1e-3
SHAPE = (6, 11, 3)

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=layout_id)
of_both_kinds = pytest.mark.parametrize("kind", ["ring", "average"])


def filled(channels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    return mean.to(dtype), torch.rand(channels, generator=generator, dtype=torch.float64).to(dtype)


def memory_of(kind, dtype, channels=SHAPE[1], size=5):
    integer = torch.zeros((), dtype=torch.int64)
    if kind == "average":
        memory = MovingAverage(*(torch.empty(channels, dtype=dtype) for _ in range(2)), integer)
    else:
        rings = (torch.empty(size, channels, dtype=dtype) for _ in range(2))
        memory = RecentBatches(*rings, torch.empty(size, dtype=dtype), integer)
    memory.clear()
    return memory


def averages_of(dtype, channels=SHAPE[1]):
    zeros, ones = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    return InferenceAverages(zeros, ones, torch.tensor(0), torch.tensor(0))


def copy_of(state):
    return type(state)(*(t.clone() for t in state))


def assert_close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        tolerance = 1e-13 if g.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance, equal_nan=True)


NO_LOG = (None, None, 0)


def fused(x, parameters, state, how_read, variance, update, *, store=True, log=NO_LOG):
    memory, averages = state
    operator = cpu.forward_with_ring if isinstance(memory, RecentBatches) else cpu.forward_with_average
    blended, unbiased, weight, rule = update
    y, record = operator(
        x,
        *parameters,
        variance == "pooled",
        EPS,
        *memory,
        *how_read,
        *averages,
        *log,
        store,
        blended,
        unbiased,
        weight,
        rule == "pooled",
    )
    return y, record[:4], record[4:6], record[6, 0]


def step_by_step(x, parameters, state, how_read, variance, update):
    memory, averages = state
    n = x.numel() // x.shape[1]
    if isinstance(memory, RecentBatches):
        past = memory.read(n, *how_read, variance)
    else:
        past = memory.read(*how_read)
    a = torch.as_tensor(past.batch_weight, dtype=past.mean.dtype)
    y, statistics = cpu.forward(x, *parameters, past.mean, past.var, a, variance, EPS)
    commit(memory, averages, tuple(statistics[:2]), tuple(statistics[2:]), n, update)
    return y, statistics, past.mean, past.var, a


BAD = (torch.nan, torch.inf, -torch.inf)
UPDATES = [
    InferenceUpdate(False, False, 0.1, "averaged"),
    InferenceUpdate(False, True, None, "averaged"),
    InferenceUpdate(False, True, 1.0, "averaged"),
    InferenceUpdate(True, False, 1.0, "averaged"),
    InferenceUpdate(False, False, 0.2, "pooled"),
]


@in_both_precisions
@pytest.mark.parametrize("variance", ["averaged", "pooled"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(
    ("kind", "how_read"),
    [("ring", (4, 1.0)), ("ring", (2, 0.7)), ("ring", (0, 1.0)), ("average", (0.75,)), ("average", (0.0,))],
)
def test_one_operator_does_as_read_normalize_commit(kind, how_read, seeded, update, variance, dtype):
    memory, averages = memory_of(kind, dtype), averages_of(dtype)
    if seeded:
        memory.seed(*filled(SHAPE[1], dtype, 99))
    ours, theirs = (memory, averages), (copy_of(memory), copy_of(averages))
    parameters = make_parameters(SHAPE[1], dtype)
    for step in range(12):
        x = make_input((2 + step % 3, *SHAPE[1:]), dtype, seed=step)
        if step % 4 == 1:
            x[-1, step % SHAPE[1], -1] = BAD[step % 3]
        y, statistics, past, a = fused(x, parameters, ours, how_read, variance, update)
        wanted = step_by_step(x, parameters, theirs, how_read, variance, update)
        assert_close((y, statistics, *past, a), wanted)
        assert_close((*ours[0], *ours[1]), (*theirs[0], *theirs[1]))
    assert (int(averages.batches), int(averages.skipped)) == (9, 3)


@in_both_precisions
@pytest.mark.parametrize("variance", ["averaged", "pooled"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("kind", "how_read"), [("ring", (3, 0.7)), ("average", (0.75,))])
def test_one_operator_commits_the_batch_of_all_ranks(kind, how_read, update, variance, dtype):
    memory, averages = memory_of(kind, dtype), averages_of(dtype)
    wanted = copy_of(memory), copy_of(averages)
    operator = cpu.commit_to_ring if kind == "ring" else cpu.commit_to_average
    blended, unbiased, weight, rule = update
    for step in range(12):
        x = make_input((2 + step % 3, *SHAPE[1:]), dtype, seed=step)
        if step % 4 == 1:
            x[-1, step % SHAPE[1], -1] = BAD[step % 3]
        ranks = [
            sums_of(local_statistics(part), part.numel() // SHAPE[1], len(part))
            for part in (x[:1], x[1:], x[:0])
        ]
        rules = (blended, unbiased, weight, rule == "pooled")
        operator(sum(ranks), variance == "pooled", *memory, *how_read, *averages, *rules)
        step_by_step(x, (None, None), wanted, how_read, variance, update)
        assert_close((*memory, *averages), (*wanted[0], *wanted[1]))
    assert (int(averages.batches), int(averages.skipped)) == (9, 3)


@of_both_kinds
def test_statistics_that_are_finite_but_blend_to_infinity_are_not_stored(kind):
    state = memory_of(kind, torch.float32), averages_of(torch.float32)
    how_read = (4, 1.0) if kind == "ring" else (0.5,)
    x = make_input(SHAPE, torch.float32)
    fused(x, (None, None), state, how_read, "pooled", UPDATES[3])
    before = [t.clone() for part in state for t in part][:-1]
    fused(x + 1e20, (None, None), state, how_read, "pooled", UPDATES[3])
    assert all(torch.equal(a, b) for a, b in zip((*state[0], *state[1][:3]), before, strict=True))
    assert int(state[1].skipped) == 1


@of_both_kinds
def test_without_store_nothing_is_written(kind):
    state = memory_of(kind, torch.float64), averages_of(torch.float64)
    state[0].seed(*filled(SHAPE[1], torch.float64, 1))
    before = [copy_of(part) for part in state]
    how_read = (4, 1.0) if kind == "ring" else (0.5,)
    x = make_input(SHAPE, torch.float64)
    got = fused(x, (None, None), state, how_read, "pooled", UPDATES[0], store=False)
    now, then = ([t for part in parts for t in part] for parts in (state, before))
    assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
    wanted = step_by_step(x, (None, None), before, how_read, "pooled", UPDATES[0])
    assert_close(got[:2], wanted[:2])


@of_both_kinds
def test_what_was_before_is_logged(kind):
    rows, counters = torch.full((2, 4, 11), torch.nan, dtype=torch.float64), torch.full((2, 3), -1)
    state = memory_of(kind, torch.float64), averages_of(torch.float64)
    how_read = (4, 1.0) if kind == "ring" else (0.5,)
    x = make_input(SHAPE, torch.float64)
    fused(x, (None, None), state, how_read, "pooled", UPDATES[0])
    running = [t.clone() for t in state[1][:2]]
    log = (rows, counters, 1)
    _, _, past, _ = fused(x, (None, None), state, how_read, "pooled", UPDATES[0], log=log)
    assert all(torch.equal(a, b) for a, b in zip(rows[1], (*past, *running), strict=True))
    assert counters.tolist() == [[-1, -1, -1], [1, 0, 1]]
    assert rows[0].isnan().all()


@pytest.mark.parametrize("layer_class", [mbnorm.MomentumBatchNorm1d, mbnorm.MemorizedBatchNorm1d])
def test_a_layer_that_lost_channels_takes_back_what_it_stored(layer_class):
    layer = layer_class(5)
    layer(torch.randn(4, 5))
    layer.num_features = 3
    for parameter in ("weight", "bias"):
        setattr(layer, parameter, torch.nn.Parameter(getattr(layer, parameter).detach()[:3]))
    for name, buffer in layer.named_buffers():
        if buffer.shape[-1:] == (5,):
            setattr(layer, name, buffer[..., :3].clone())
    layer(torch.randn(4, 3))
    before = layer.running_mean.clone()
    layer(torch.randn(4, 3))
    layer.undo(1)
    assert torch.equal(layer.running_mean, before)


def test_half_inputs_keep_float32_state():
    state = memory_of("ring", torch.float32), averages_of(torch.float32)
    x = make_input(SHAPE, torch.bfloat16)
    y, statistics, *_ = fused(x, (None, None), state, (4, 1.0), "pooled", UPDATES[0])
    assert (y.dtype, statistics.dtype) == (torch.bfloat16, torch.float32)


def test_states_that_do_not_fit_are_refused():
    memory, averages = memory_of("ring", torch.float32), averages_of(torch.float32)
    x, rest = make_input(SHAPE, torch.float32), ((4, 1.0), "pooled", UPDATES[0])
    none = (None, None)
    with pytest.raises(RuntimeError, match="contiguous state of 55 values, in float64 for a float64 input"):
        fused(x, none, (memory._replace(mean=memory.mean.double()), averages), *rest)
    with pytest.raises(RuntimeError, match="contiguous state of 11 values"):
        fused(x, none, (memory, averages._replace(mean=averages.mean[1:])), *rest)
    with pytest.raises(RuntimeError, match="int64 counters"):
        fused(x, none, (memory, averages._replace(skipped=averages.mean)), *rest)


def test_a_log_that_does_not_fit_is_refused():
    state = memory_of("ring", torch.float32), averages_of(torch.float32)
    x, log = make_input(SHAPE, torch.float32), (torch.zeros(2, 4, 11), torch.zeros(2, 3, dtype=torch.int64))
    rest = ((4, 1.0), "pooled", UPDATES[0])
    with pytest.raises(RuntimeError, match="slot 2"):
        fused(x, (None, None), state, *rest, log=(*log, 2))
    with pytest.raises(RuntimeError, match="contiguous state of 88 values"):
        fused(x, (None, None), state, *rest, log=(log[0][0], log[1], 1))


@in_both_precisions
def test_the_operators_are_well_formed(dtype):
    x, parameters = make_input(SHAPE, dtype), make_parameters(SHAPE[1], dtype)
    log = (torch.zeros(3, 4, SHAPE[1], dtype=dtype), torch.zeros(3, 3, dtype=torch.int64), 1)
    rest = (*averages_of(dtype), *log, True, False, True, None, True)
    operators = torch.ops.mbnorm_cpu
    first = (x, *parameters, True, EPS)
    opcheck(operators.forward_with_ring.default, (*first, *memory_of("ring", dtype), 3, 0.9, *rest))
    opcheck(operators.forward_with_average.default, (*first, *memory_of("average", dtype), 0.5, *rest))
    sums = sums_of(local_statistics(x), 18, 6), True
    rest = (*averages_of(dtype), False, True, None, True)
    opcheck(operators.commit_to_ring.default, (*sums, *memory_of("ring", dtype), 3, 0.9, *rest))
    opcheck(operators.commit_to_average.default, (*sums, *memory_of("average", dtype), 0.5, *rest))
