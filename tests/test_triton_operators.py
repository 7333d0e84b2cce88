"""What Triton's operators promise to torch, and sizes that no small tensor has.

On a GPU where there is one, else interpreted (`make test-triton`).
"""

import os
from importlib.util import find_spec

import pytest
import reference
import torch
from helpers import CONTIGUOUS, layout_id, make_input, make_parameters, near_statistics, relative_error
from torch.library import opcheck

from mbnorm.backends import triton as kernels
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import InferenceUpdate
from mbnorm.memories.moving_average import MovingAverage
from mbnorm.memories.recent_batches import RecentBatches

if find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from mbnorm.backends import triton_forward

assert kernels.missing() is None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
OPERATORS = torch.ops.mbnorm_triton
MEMORIES = {
    "average": MovingAverage(0.5),
    "measured": MeasuredAverage(64),
    "ring": RecentBatches(5, decay=0.9),
}
on_two_layouts = pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [((6, 5), CONTIGUOUS, torch.float32), ((3, 9, 5, 5), torch.channels_last, torch.bfloat16)],
    ids=layout_id,
)


@on_two_layouts
def test_the_operators_are_well_formed(shape, layout, dtype):
    x = make_input(shape, dtype, layout).to(DEVICE)
    weight, bias = (p.to(DEVICE) for p in make_parameters(shape[1], torch.float32))
    past = [t.to(DEVICE, torch.float32) for t in near_statistics(x.cpu())]
    a = torch.tensor(0.3, device=DEVICE)
    opcheck(OPERATORS.forward.default, (x, weight, bias, *past, a, True, EPS))
    record = torch.stack((*past, *past, *past, a.expand(shape[1])))
    for need_dx, past_gradient in ((True, None), (False, None), (True, torch.stack((*past, past[1])))):
        opcheck(OPERATORS.backward.default, (x, x, weight, record, past_gradient, True, EPS, need_dx))


def averages_of(channels):
    zeros, ones = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    return [zeros, ones, *(torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))]


@pytest.mark.parametrize("kind", MEMORIES)
@on_two_layouts
def test_the_operators_that_write_memories_are_well_formed(shape, layout, dtype, kind):
    x = make_input(shape, dtype, layout).to(DEVICE)
    memory, averages = MEMORIES[kind], averages_of(shape[1])
    state = list(memory.new(averages[0]))
    update = [float(u) for u in InferenceUpdate(0.1, early=1.0, unbiased=True)]
    operator = OPERATORS.forward_with_ring if kind == "ring" else OPERATORS.forward_with_average
    how = memory.read_numbers(x.numel() // shape[1], shape[0]), update, True, EPS
    for store in (True, False):
        opcheck(operator.default, (x, None, None, state, averages, *how, store))


def test_state_that_cannot_be_written_in_place_is_refused():
    x = make_input((6, 11), torch.float32).to(DEVICE)
    averages = averages_of(11)
    state = MEMORIES["average"].new(averages[0])
    averages[0] = torch.zeros(22, device=DEVICE)[::2]
    with pytest.raises(RuntimeError, match=r"contiguous state in torch.float32 .* strides \(2,\)"):
        kernels.forward_with_average(
            x, None, None, state, averages, [], InferenceUpdate(0.1), True, EPS, True
        )


def test_offsets_beyond_two_billion():
    # the second sample of the first channel lies there; pages that nobody touches cost nothing
    channels, inner = 2**17, 2**14
    x, y = (torch.empty(channels * inner + inner, dtype=torch.float16, device=DEVICE) for _ in range(2))
    values = make_input((2, 1, inner), torch.float16)
    x[:inner], x[-inner:] = values.to(DEVICE)[:, 0]
    record = torch.empty(7, channels, device=DEVICE)
    past = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    a = torch.tensor(1.0, device=DEVICE)
    sizes, past = (channels, 2, inner // 16, 16), triton_forward.Past(*past, a)
    triton_forward.forward_whole[(1, 1)](
        x, y, None, None, *past, record, *sizes, EPS, False, False, False, 16, 1, 1, 2048
    )
    want, mean, var, *_ = reference.blended_batch_norm(
        values.double(), None, None, torch.zeros(1), torch.ones(1), 1.0, "averaged", EPS
    )
    assert relative_error(torch.stack((y[:inner], y[-inner:])).cpu(), want[:, 0]) < 1e-3
    assert relative_error(record[:2, 0].cpu(), torch.cat((mean, var))) < 1e-6
