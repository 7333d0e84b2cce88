"""What Triton's operators promise to torch, and sizes that no small tensor has.

On a GPU where there is one, else interpreted (`make test-triton`).
"""

import os
from importlib.util import find_spec

import pytest
import reference
import torch
from helpers import CONTIGUOUS, layout_id, make_input, make_parameters, near_statistics, relative_error
from remembering import as_kernels_take, averages_of, log_of, memory_of
from torch.library import opcheck

from mbnorm.backends import triton as kernels

if find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

from mbnorm.backends import triton_forward

assert kernels.missing() is None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
OPERATORS = torch.ops.mbnorm_triton
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
    statistics = torch.stack((*past, *past))
    for need_dx in (True, False):
        opcheck(OPERATORS.backward.default, (x, x, weight, a, statistics, True, EPS, need_dx))


@on_two_layouts
def test_the_operators_that_write_memories_are_well_formed(shape, layout, dtype):
    channels = shape[1]
    x = make_input(shape, dtype, layout).to(DEVICE)
    first = (x, None, None, True, EPS)
    how_read = {
        "ring": (3, 0.9),
        "average": (torch.tensor(0.5, device=DEVICE), 0.0),
        "measured": (None, 64.0),
    }
    for kind, how in how_read.items():
        memory = memory_of(kind, torch.float32, channels, device=DEVICE)
        averages = averages_of(torch.float32, channels, DEVICE)
        log = *log_of(memory, torch.float32, device=DEVICE), 1
        operator = OPERATORS.forward_with_ring if kind == "ring" else OPERATORS.forward_with_average
        rest = (*averages, *log, True, False, True, 0.0, True, 1.0)
        opcheck(operator.default, (*first, *as_kernels_take(memory), *how, *rest))


def test_state_that_cannot_be_written_in_place_is_refused():
    x = make_input((6, 11), torch.float32).to(DEVICE)
    memory, averages = memory_of("average", torch.float32, device=DEVICE), averages_of(torch.float32)
    averages = averages._replace(mean=torch.zeros(22, device=DEVICE)[::2])
    update = (None, None, 0, True, False, False, 0.1, False, 0.0)
    with pytest.raises(RuntimeError, match=r"contiguous state in torch.float32 .* strides \(2,\)"):
        kernels.forward_with_average(x, None, None, True, EPS, *memory, None, None, 0.5, *averages, *update)


def test_offsets_beyond_two_billion():
    # the second sample of the first channel lies there; pages that nobody touches cost nothing
    channels, inner = 2**17, 2**14
    x, y = (torch.empty(channels * inner + inner, dtype=torch.float16, device=DEVICE) for _ in range(2))
    values = make_input((2, 1, inner), torch.float16)
    x[:inner], x[-inner:] = values.to(DEVICE)[:, 0]
    statistics = torch.empty(4, channels, device=DEVICE)
    past = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    a = torch.tensor(1.0, device=DEVICE)
    sizes, past = (channels, 2, inner // 16, 16), (*past, a, None, None, 0.0, None, 1)
    triton_forward.forward_whole[(1, 1)](
        x, y, None, None, *past, statistics, *sizes, EPS, False, tl.float32, False, 16, 1, 1, 2048
    )
    want, mean, var, *_ = reference.blended_batch_norm(
        values.double(), None, None, torch.zeros(1), torch.ones(1), 1.0, "averaged", EPS
    )
    assert relative_error(torch.stack((y[:inner], y[-inner:])).cpu(), want[:, 0]) < 1e-3
    assert relative_error(statistics[:2, 0].cpu(), torch.cat((mean, var))) < 1e-6
