"""The CPU kernels that read a memory, normalize and commit at once, beside the memories and the operator."""

from functools import partial

import pytest
import remembering
import torch
from helpers import make_input, make_parameters
from remembering import (
    EPS,
    SHAPE,
    UPDATES,
    averages_of,
    in_both_precisions,
    memory_of,
)
from torch.library import opcheck

from mbnorm.backends import cpu

fused, step_by_step = partial(remembering.fused, cpu), partial(remembering.step_by_step, cpu)

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


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
