"""How the operators launch Triton's kernels: compiled for a GPU that need not be there, and not run."""

import os

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import torch

if torch.cuda.is_available():
    pytest.skip("Triton would take its kernels for loaded ones", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mbnorm.backends import triton as kernels
from mbnorm.backends import triton_backward, triton_forward, triton_launch, triton_memory
from mbnorm.blend import number_of
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import CUMULATIVE, RAW
from mbnorm.memories.moving_average import MovingAverage
from mbnorm.memories.recent_batches import RecentBatches

pytestmark = pytest.mark.triton
LAST = torch.channels_last


# of all drivers: Triton keeps what it has compiled with the first one
LAUNCHES = []


class Driver:
    """A GPU that takes every launch, and does nothing."""

    def __init__(self):
        LAUNCHES.clear()
        self.launches = LAUNCHES
        self.utils = self

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        return (1, 2, 0, 0, 1024)

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            self.launches.append(metadata.name)

        return launch


@pytest.fixture
def device(monkeypatch):
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(triton_launch, "_processors", lambda device: 132)
    monkeypatch.setattr(triton_launch, "_kinds", {})
    monkeypatch.setattr(triton_launch, "_compiled", {})
    assert kernels.missing() is None
    return made


@pytest.fixture
def looks(monkeypatch):
    """The names of the kernels for whose launch Triton has looked at every argument."""
    names = []
    run = JITFunction.run

    def counted(self, *arguments, **options):
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


class Norm:
    """What a layer with a memory gives the operators, and takes from them."""

    def __init__(self, channels, memory, dtype=torch.float32, affine=True, bias=True, eps=1e-5, update=None):
        self.memory, self.eps, self.update = memory, eps, update
        zeros, ones = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
        self.state = memory.new(zeros)
        self.averages = zeros, ones, torch.tensor(0), torch.tensor(0)
        self.weight = torch.ones(channels, dtype=dtype) if affine else None
        self.bias = torch.zeros(channels, dtype=dtype) if affine and bias else None

    def forward(self, x, store=True):
        ring = self.memory.kernels == "ring"
        operator = kernels.forward_with_ring if ring else kernels.forward_with_average
        read = self.memory.read_numbers(x.numel() // x.shape[1], len(x))
        how = read, self.update or self.memory.update(0.1, len(x)), number_of(self.memory.variance_rule)
        return operator(x, self.weight, self.bias, self.state, self.averages, *how, self.eps, store)

    def train(self, x, store=True, need_dx=True):
        y, record = self.forward(x, store)
        kernels.backward(y, x, self.weight, record, self.memory.variance_rule, self.eps, need_dx)


def momentum(channels, **options):
    return Norm(channels, MovingAverage(0.5), **options)


def matched(channels, **options):
    return Norm(channels, MeasuredAverage(32), **options)


def memorized(channels, **options):
    return Norm(channels, RecentBatches(9), **options)


def input_of(shape, dtype, layout=torch.contiguous_format):
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


WHOLE = {"forward_whole", "backward_whole"}
PARTS = {"moments_part", "blend_parts", "normalize_part", "sums_part", "add_parts", "input_gradient_part"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "wanted"),
    [
        ((2, 64, 112, 112), torch.contiguous_format, WHOLE),
        ((2, 1024, 14, 14), torch.contiguous_format, WHOLE),
        ((2, 2048, 7, 7), torch.contiguous_format, WHOLE),
        ((2, 2048, 7, 7), LAST, WHOLE),
        ((2, 64, 112, 112), LAST, PARTS),
        ((8, 64, 112, 112), torch.contiguous_format, PARTS),
    ],
    ids=lambda v: "whole" if v is WHOLE else "parts" if v is PARTS else str(v).replace(", ", "x"),
)
def test_a_step_launches_what_is_compiled_for_its_shape(device, shape, layout, wanted, dtype):
    x = input_of(shape, dtype, layout)
    for build, more in ((momentum, []), (matched, []), (memorized, ["read_ring"])):
        build(shape[1]).train(x)
        assert sorted(device.launches) == sorted([*wanted, "commit", *more])
        device.launches.clear()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 8, 3, 3), ["backward_whole"]),
        ((8, 64, 112, 112), ["sums_part", "add_parts", "input_gradient_part"]),
    ],
    ids=["whole", "parts"],
)
def test_a_backward_that_remembers_launches_one_kernel_more(device, shape, wanted):
    norm, x = matched(shape[1]), torch.randn(shape)
    y, record = norm.forward(x)
    remembered = torch.zeros(shape[1]), torch.zeros(shape[1])
    device.launches.clear()
    kernels.remembering_backward(y, x, norm.weight, record, remembered, "pooled", norm.eps, True, True)
    assert device.launches == [*wanted, "remember"]


def test_a_forward_that_stores_nothing_is_one_launch(device):
    for build in (momentum, matched):
        build(8).forward(torch.randn(2, 8, 3, 3), store=False)
    assert device.launches == 2 * ["forward_whole"]


def test_triton_looks_at_arguments_of_a_kind_once(device, looks):
    norm = momentum(8)
    for _ in range(3):
        norm.train(torch.randn(2, 8, 3, 3))
    assert looks == ["forward_whole", "commit", "backward_whole"]
    assert device.launches == 3 * looks
    # a larger batch is cut alike here
    norm.train(torch.randn(2, 8, 1, 9))
    assert len(looks) == 3
    assert len(triton_launch._compiled) == 3


def test_triton_looks_at_what_is_not_aligned_every_time(device, looks):
    norm, x = momentum(8), torch.randn(145)[1:].view(2, 8, 3, 3)
    for _ in range(2):
        norm.forward(x)
    assert looks == ["forward_whole", "commit", "forward_whole"]
    for values in (x.clone(), x, x.clone()):
        norm.forward(values)
    assert looks[3:] == ["forward_whole", "forward_whole"]


def test_on_rocm_triton_looks_every_time(device, looks, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    norm = momentum(8)
    for _ in range(2):
        norm.forward(torch.randn(2, 8, 3, 3))
    assert looks == 2 * ["forward_whole", "commit"]


SMALL = torch.randn(2, 8, 3, 3)
AVERAGE = MovingAverage(0.5)
WAYS = {
    "as it is": (AVERAGE, {}, SMALL),
    "pooled": (MovingAverage(0.5, "pooled"), {}, SMALL),
    "another eps": (AVERAGE, {"eps": 1e-3}, SMALL),
    "cumulative": (AVERAGE, {"update": CUMULATIVE}, SMALL),
    "raw": (AVERAGE, {"update": RAW}, SMALL),
    "matched": (MeasuredAverage(64, measured=False, early_weight=0.0), {}, SMALL),
    "measured": (MeasuredAverage(), {}, SMALL),
    "measured, float64": (MeasuredAverage(), {"dtype": torch.float64}, SMALL.double()),
    "without bias": (AVERAGE, {"bias": False}, SMALL),
    "without parameters": (AVERAGE, {"affine": False}, SMALL),
    "float64": (AVERAGE, {"dtype": torch.float64}, SMALL.double()),
    "float16": (AVERAGE, {}, SMALL.half()),
    "channels last": (AVERAGE, {}, SMALL.contiguous(memory_format=LAST)),
    "other map": (AVERAGE, {}, torch.randn(2, 8, 1, 9)),
    "odd channels": (AVERAGE, {}, torch.randn(2, 7, 3, 3)),
    "ring": (RecentBatches(9), {}, SMALL),
    "other ring": (RecentBatches(16), {}, SMALL),
    "decay": (RecentBatches(9, decay=0.5), {}, SMALL),
    "ring, averaged": (RecentBatches(9, variance_rule="averaged"), {}, SMALL),
    "ring, ema": (RecentBatches(9, inference="ema"), {}, SMALL),
    "ring of one": (RecentBatches(1), {}, SMALL),
}


def test_what_is_launched_by_shape_is_what_triton_would_launch(device, monkeypatch):
    def step(memory, options, x):
        norm = Norm(x.shape[1], memory, **options)
        norm.train(x)
        norm.train(x, store=False)
        norm.train(x, need_dx=False)
        past = norm.averages[0], norm.averages[1], torch.ones((), dtype=norm.averages[0].dtype)
        kernels.forward(x, norm.weight, norm.bias, *past, memory.variance_rule, norm.eps)

    for way in WAYS.values():
        step(*way)
    launch, checked = triton_launch.launch, []

    def checking(kernel, grid, key, *arguments, warps=4):
        known, _ = triton_launch._compiled[id(kernel), key]
        assert known is kernel[grid](*arguments, num_warps=warps)
        checked.append(kernel)
        launch(kernel, grid, key, *arguments, warps=warps)

    for module in (triton_forward, triton_backward, triton_memory):
        monkeypatch.setattr(module, "launch", checking)
    for way in WAYS.values():
        step(*way)
    assert len(checked) > 200


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, "v4.b32"), (torch.bfloat16, "v2.b32")], ids=str)
def test_maps_of_14_are_loaded_by_fours(device, dtype, wide):
    momentum(1024).forward(input_of((2, 1024, 14, 14), dtype))
    (whole,) = (made for made, _ in triton_launch._compiled.values() if made.name == "forward_whole")
    text = whole.asm["ptx"]
    assert f"ld.global.{wide}" in text
    assert f"st.global.{wide}" in text


def test_direct_calls_and_operators_launch_the_same(device):
    state = torch.zeros(8), torch.ones(8), torch.ones(())
    x = torch.randn(2, 8, 3, 3)
    arguments = x, None, None, *state, True, 1e-5
    for forward in (torch.ops.mbnorm_triton.forward, triton_forward.forward):
        forward(*arguments)
    assert device.launches == 2 * ["forward_whole"]


@pytest.mark.parametrize("build", [momentum, matched, memorized])
def test_writes_raise_the_version_of_what_is_written(device, build):
    norm = build(8)
    written = *norm.state, *norm.averages
    before = [t._version for t in written]
    norm.forward(torch.randn(2, 8, 3, 3))
    assert all(t._version > sooner for t, sooner in zip(written, before, strict=True))
