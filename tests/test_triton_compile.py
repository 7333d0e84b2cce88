"""Every Triton kernel, compiled for the devices that people have: no device is needed for that."""

import itertools
import os

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mbnorm.backends import triton_backward, triton_forward, triton_memory

pytestmark = pytest.mark.triton

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARIES = {"cuda": "cubin", "hip": "hsaco"}
KERNELS = {
    k.fn.__name__: k
    for k in (
        triton_forward.forward_whole,
        triton_forward.moments_part,
        triton_forward.blend_parts,
        triton_forward.normalize_part,
        triton_backward.backward_whole,
        triton_backward.sums_part,
        triton_backward.add_parts,
        triton_backward.input_gradient_part,
        triton_backward.remember,
        triton_memory.read_ring,
        triton_memory.commit,
    )
}
VALUES = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")
SIZES = ("channels", "outer", "units", "per_split", "splits", "n", "size")
COUNTERS = ("tracked_ptr", "skipped_ptr")
SCALARS = ("matched_batch_size", "m", "limit", "update_weight", "early")
PARAMETERS = ("weight_ptr", "bias_ptr")
AN_AVERAGE = ("filled_ptr", "history_weight_ptr", "measured_ptr", "last_ptr")
A_RING = ("counts_ptr", "ages_ptr")


def compile_for(target, kernel, dtype, rows, size="i32", **others):
    state = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "EPS": 1e-5,
        "POOLED": True,
        "ROWS": rows,
        "UNIT": 1 if rows else 4,
        "BLOCK_C": 32 if rows else 4,
        "BLOCK_O": 1 if rows else 8,
        "BLOCK_I": 64,
        "BLOCK_S": 16,
        "LOG2_DECAY": -0.5,
        "MEASURED": True,
        "CUMULATIVE": False,
        "BLENDED": True,
        "UNBIASED": True,
        "EARLY": True,
        "REPLACES": False,
        "STORE": True,
    }
    constants |= {"outer": 1} if rows else {}
    constants = {k: v for k, v in (constants | others).items() if k in kernel.arg_names}
    of = dict.fromkeys(VALUES, f"*{dtype}") | dict.fromkeys(SIZES, size)
    of |= dict.fromkeys(COUNTERS, "*i64") | dict.fromkeys(SCALARS, "fp64")
    types = {name: of.get(name, f"*{state}") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(fn=kernel, signature=types, constexprs=constants), target=target)
    return made.asm[BINARIES[target.backend]]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_every_device(name, target):
    for dtype, rows in (("fp32", False), ("bf16", True)):
        assert len(compile_for(target, KERNELS[name], dtype, rows)) > 1000


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_every_type_and_layout(name):
    for dtype, rows in itertools.product(("fp64", "fp32", "bf16", "fp16"), (False, True)):
        assert len(compile_for(TARGETS["sm_90"], KERNELS[name], dtype, rows)) > 1000


AVERAGES = {
    "measured": {"history_weight_ptr": None},
    "not by its measures": {"history_weight_ptr": None, "MEASURED": False},
    "fixed": {"measured_ptr": None, "last_ptr": None, "MEASURED": False, "EARLY": False},
}
READ_OR_WRITE_AVERAGES = ("commit", "forward_whole", "blend_parts")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("of", AVERAGES.values(), ids=AVERAGES)
def test_kernels_compile_for_a_moving_average(of, target):
    without = of | dict.fromkeys(("batch_weight_ptr", *A_RING))
    for name, dtype in itertools.product(READ_OR_WRITE_AVERAGES, ("fp32", "fp64")):
        assert len(compile_for(target, KERNELS[name], dtype, False, **without)) > 1000


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_without_what_is_optional(name):
    kernel = KERNELS[name]
    without = dict.fromkeys((*PARAMETERS, *AN_AVERAGE))
    without |= {"POOLED": False, "LOG2_DECAY": 0.0, "EARLY": False, "REPLACES": True, "MEASURED": False}
    assert len(compile_for(TARGETS["sm_90"], kernel, "fp16", False, **without)) > 1000


def test_the_commit_of_an_average_compiles_for_every_update():
    for rule in ("CUMULATIVE", "REPLACES"):
        made = compile_for(TARGETS["sm_90"], KERNELS["commit"], "fp32", False, **{rule: True})
        assert len(made) > 1000


@pytest.mark.parametrize("name", ["forward_whole", "blend_parts"])
def test_kernels_compile_for_a_past_that_is_in_the_record(name):
    without = dict.fromkeys(("past_mean_ptr", "past_var_ptr", "batch_weight_ptr", *AN_AVERAGE))
    assert len(compile_for(TARGETS["sm_90"], KERNELS[name], "fp32", False, **without)) > 1000


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_sizes_of_one_and_for_huge_ones(name):
    kernel = KERNELS[name]
    ones = {"channels": 1, "outer": 1, "units": 1, "per_split": 1, "BLOCK_C": 1, "BLOCK_O": 1, "BLOCK_I": 1}
    assert len(compile_for(TARGETS["sm_90"], kernel, "fp32", False, **ones)) > 1000
    assert len(compile_for(TARGETS["sm_90"], kernel, "fp32", True, **ones)) > 1000
    assert len(compile_for(TARGETS["sm_90"], kernel, "bf16", False, size="i64")) > 1000


@pytest.mark.parametrize("name", ["backward_whole", "input_gradient_part"])
@pytest.mark.parametrize(
    "without", [["past_scale_ptr"], ["past_ptr", "past_scale_ptr"]], ids=["read", "exact"]
)
def test_the_backward_compiles_for_what_was_read_before_and_for_nothing_remembered(without, name):
    made = compile_for(TARGETS["sm_90"], KERNELS[name], "fp32", False, **dict.fromkeys(without))
    assert len(made) > 1000


def test_the_backward_compiles_without_an_input_gradient():
    assert len(compile_for(TARGETS["sm_90"], KERNELS["backward_whole"], "bf16", True, dx_ptr=None)) > 1000
