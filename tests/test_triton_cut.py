"""How tensors are cut into programs; neither Triton nor a device is asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbnorm.backends import triton_cut
from mbnorm.backends.triton_cut import Runs, cut, parts_cut, power_of_two, runs_of

PROCESSORS = 132
# of every batch norm of ResNet-50 at 224 pixels: channels, and the side of a map
RESNET50 = (
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
    (512, 7),
    (2048, 7),
)
sizes = st.integers(1, 5000)
# a machine that pauses is no slow code, and each run is to try the same
without_chance = settings(max_examples=400, derandomize=True, database=None, deadline=None)


def cut_of(batch, channels, values, rows):
    outer, inner = (1, batch * values) if rows else (batch, values)
    return cut(channels, outer, inner, rows, PROCESSORS)


@without_chance
@given(sizes, sizes, sizes, st.booleans())
def test_every_value_belongs_to_one_program(batch, channels, values, rows):
    made = cut_of(batch, channels, values, rows)
    outer, inner = (1, batch * values) if rows else (batch, values)
    assert made.c * made.blocks >= channels > made.c * (made.blocks - 1)
    assert made.steps == -(-outer // made.o) * -(-inner // made.i)
    assert made.per_split * made.splits >= made.steps > made.per_split * (made.splits - 1)


@without_chance
@given(sizes, sizes, sizes, st.booleans())
def test_a_tile_fits_its_warps(batch, channels, values, rows):
    made = cut_of(batch, channels, values, rows)
    values = made.c * made.o * made.i
    assert all(number == power_of_two(number) for number in made[:3])
    assert values <= triton_cut.WIDEST
    # 16 values a thread at most
    assert made.warps in (4, 8, 16)
    assert values <= made.warps * 32 * 16


@without_chance
@given(sizes, sizes, sizes, st.booleans())
def test_parts_fit_the_program_that_puts_them_together(batch, channels, values, rows):
    made = cut_of(batch, channels, values, rows)
    splits, c, blocks = parts_cut(made.splits, channels)
    assert splits >= made.splits
    assert splits * c <= triton_cut.TILE
    assert c * blocks >= channels


@pytest.mark.parametrize(("channels", "side"), RESNET50)
def test_channels_of_two_samples_need_one_program_each_at_most(channels, side):
    made = cut_of(2, channels, side * side, rows=False)
    assert made.splits == 1
    assert made.blocks >= min(channels, 128)


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("rows", [False, True])
def test_large_tensors_keep_all_processors_busy(batch, rows):
    for channels, side in ((64, 112), (256, 56), (512, 28)):
        made = cut_of(batch, channels, side * side, rows)
        assert made.blocks * made.splits * made.warps >= 4 * 2 * PROCESSORS


def test_rows_of_a_program_are_as_long_as_memory_moves_at_once():
    made = cut_of(2, 2048, 49, rows=True)
    assert made.c * torch.bfloat16.itemsize >= 64


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_parts_of_rows_are_small_beside_what_they_are_of(batch):
    for channels, side in ((64, 112), (256, 56), (128, 56), (512, 28)):
        made = cut_of(batch, channels, side * side, rows=True)
        # two sums in float32 of each part in the backward
        part = 2 * 4 * made.splits / (batch * side * side * torch.bfloat16.itemsize)
        assert part < 0.04


def test_how_values_lie_is_seen():
    assert runs_of(torch.empty(2, 3, 14, 14)) == Runs(2, 196, False, 4)
    assert runs_of(torch.empty(2, 3, 7, 7)) == Runs(2, 49, False, 1)
    assert runs_of(torch.empty(2, 3, 56, 56)) == Runs(2, 3136, False, 16)
    assert runs_of(torch.empty(2, 3, 4, 4, 4)) == Runs(2, 64, False, 16)
    last = torch.empty(2, 3, 14, 14).contiguous(memory_format=torch.channels_last)
    assert runs_of(last) == Runs(1, 392, True, 1)
    assert runs_of(torch.empty(6, 5)) == runs_of(torch.empty(6, 5, 1)) == Runs(1, 6, True, 1)


def test_units_that_32_bits_do_not_count_are_ones():
    assert runs_of(torch.empty(1, 1, 2**31, device="meta")).unit == 1
