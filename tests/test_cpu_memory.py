"""The CPU kernels that read a memory, normalize and commit at once, beside the memories and the operator."""

from functools import partial

import pytest
import remembering
import torch
from helpers import make_input, make_parameters
from remembering import (
    BAD,
    EPS,
    SHAPE,
    UPDATES,
    as_kernels_take,
    assert_close,
    averages_of,
    copy_of,
    in_both_precisions,
    memory_of,
)
from torch.library import opcheck

import mbnorm
from mbnorm.backends import cpu
from mbnorm.distributed import local_statistics, sums_of
from mbnorm.measures import MEASURES

fused, step_by_step = partial(remembering.fused, cpu), partial(remembering.step_by_step, cpu)

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


@in_both_precisions
@pytest.mark.parametrize("variance", ["averaged", "pooled"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("kind", "how_read"), [("ring", (3, 0.7)), ("average", (0.75,)), ("measured", (64.0,))]
)
def test_one_operator_commits_the_batch_of_all_ranks(kind, how_read, update, variance, dtype):
    memory, averages = memory_of(kind, dtype), averages_of(dtype)
    wanted = copy_of(memory), copy_of(averages)
    operator = cpu.commit_to_ring if kind == "ring" else cpu.commit_to_average
    blended, unbiased, weight, rule, early = update
    for step in range(12):
        x = make_input((2 + step % 3, *SHAPE[1:]), dtype, seed=step)
        if step % 4 == 1:
            x[-1, step % SHAPE[1], -1] = BAD[step % 3]
        ranks = [
            sums_of(local_statistics(part), part.numel() // SHAPE[1], len(part))
            for part in (x[:1], x[1:], x[:0])
        ]
        rules = (blended, unbiased, weight, rule == "pooled", early)
        operator(sum(ranks), variance == "pooled", *as_kernels_take(memory), *how_read, *averages, *rules)
        step_by_step(x, (None, None), wanted, how_read, variance, update)
        assert_close((*memory, *averages), (*wanted[0], *wanted[1]))
    assert (int(averages.batches), int(averages.skipped)) == (9, 3)


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
    counters = torch.zeros(3, 3, dtype=torch.int64)
    update = True, False, True, 0.1, True, 2.0
    operators = torch.ops.mbnorm_cpu
    first = (x, *parameters, True, EPS)
    log = torch.zeros(3, 4 * SHAPE[1], dtype=dtype), counters, 1
    rest = (*averages_of(dtype), *log, *update)
    opcheck(operators.forward_with_ring.default, (*first, *memory_of("ring", dtype), 3, 0.9, *rest))
    average = as_kernels_take(memory_of("average", dtype))
    opcheck(operators.forward_with_average.default, (*first, *average, 0.5, *rest))
    log = torch.zeros(3, 5 * SHAPE[1] + MEASURES, dtype=dtype), counters, 1
    measured = memory_of("measured", dtype)
    rest = (*averages_of(dtype), *log, *update)
    opcheck(operators.forward_with_average.default, (*first, *measured, 64.0, *rest))
    sums = sums_of(local_statistics(x), 18, 6), True
    rest = (*averages_of(dtype), False, True, 0.1, True, 2.0)
    opcheck(operators.commit_to_ring.default, (*sums, *memory_of("ring", dtype), 3, 0.9, *rest))
    opcheck(operators.commit_to_average.default, (*sums, *average, 0.5, *rest))
    opcheck(operators.commit_to_average.default, (*sums, *memory_of("measured", dtype), 64.0, *rest))
