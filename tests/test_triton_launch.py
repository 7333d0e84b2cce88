"""How layers launch Triton's kernels: compiled for a GPU that need not be there, and not run."""

import itertools
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

from benchmarks.cases import Case
from mbnorm import MemorizedBatchNorm2d, MomentumBatchNorm2d, no_update
from mbnorm.backends import triton as kernels
from mbnorm.backends import triton_kinds, triton_launch, triton_remember

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
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(triton_kinds, "_processors", lambda device: 132)
    monkeypatch.setattr(triton_kinds, "_kinds", {})
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


def train(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.autograd.grad(y, wanted, torch.ones_like(y))


def momentum(channels, **options):
    return MomentumBatchNorm2d(channels, backend="triton", **({"history_weight": 0.5} | options))


def measured(channels, **options):
    return momentum(channels, history_weight=0.0, matched_values=32, measured=True, **options)


def memorized(channels, **options):
    return MemorizedBatchNorm2d(channels, backend="triton", **({"memory_size": 9} | options))


WHOLE = {"forward_whole", "backward_whole"}
PARTS = {"moments_part", "blend_parts", "normalize_part", "sums_part", "add_parts", "input_gradient_part"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "layout", "wanted"),
    [
        ((2, 64, 112, 112), "contiguous", WHOLE),
        ((2, 1024, 14, 14), "contiguous", WHOLE),
        ((2, 2048, 7, 7), "contiguous", WHOLE),
        ((2, 2048, 7, 7), "channels_last", WHOLE),
        ((2, 64, 112, 112), "channels_last", PARTS),
        ((8, 64, 112, 112), "contiguous", PARTS),
    ],
    ids=lambda v: "whole" if v is WHOLE else "parts" if v is PARTS else str(v).replace(", ", "x"),
)
def test_a_layer_launches_what_is_compiled_for_its_shape(device, shape, layout, wanted, dtype):
    x = Case(shape, dtype, layout).tensor(0)
    for build, more in ((momentum, set()), (measured, set()), (memorized, {"read_ring"})):
        train(build(shape[1]), x)
        assert set(device.launches) == wanted | {"commit"} | more
        device.launches.clear()


def test_a_forward_that_stores_nothing_notes_what_it_has_read(device):
    layer = momentum(8)
    with no_update(layer):
        layer(torch.randn(2, 8, 3, 3))
    assert device.launches == ["forward_whole", "note_average"]


def test_triton_looks_at_arguments_of_a_kind_once(device, looks):
    layer = momentum(8)
    for _ in range(3):
        train(layer, torch.randn(2, 8, 3, 3))
    assert looks == ["forward_whole", "commit", "backward_whole"]
    assert device.launches == 3 * looks
    # a larger batch is cut alike here
    train(layer, torch.randn(2, 8, 1, 9))
    assert len(looks) == 3
    assert len(triton_launch._compiled) == 3


def test_triton_looks_at_what_is_not_aligned_every_time(device, looks):
    layer, x = momentum(8), torch.randn(145)[1:].view(2, 8, 3, 3)
    for _ in range(2):
        layer(x)
    assert looks == ["forward_whole", "commit", "forward_whole"]
    for values in (x.clone(), x, x.clone()):
        layer(values)
    assert looks[3:] == ["forward_whole", "forward_whole"]


def test_on_rocm_triton_looks_every_time(device, looks, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    layer = momentum(8)
    for _ in range(2):
        layer(torch.randn(2, 8, 3, 3))
    assert looks == 2 * ["forward_whole", "commit"]


SMALL = torch.randn(2, 8, 3, 3)
WAYS = {
    "as it is": (momentum, {}, SMALL),
    "pooled": (momentum, {"variance": "pooled"}, SMALL),
    "another eps": (momentum, {"eps": 1e-3}, SMALL),
    "cumulative": (momentum, {"momentum": None}, SMALL),
    "raw": (momentum, {"momentum": 1.0}, SMALL),
    "matched": (momentum, {"history_weight": 0.0, "matched_values": 64}, SMALL),
    "measured": (measured, {"early_weight": 8.0}, SMALL),
    "measured, float64": (measured, {"dtype": torch.float64}, SMALL.double()),
    "without bias": (momentum, {"bias": False}, SMALL),
    "without parameters": (momentum, {"affine": False}, SMALL),
    "float64": (momentum, {"dtype": torch.float64}, SMALL.double()),
    "float16": (momentum, {}, SMALL.half()),
    "channels last": (momentum, {}, SMALL.contiguous(memory_format=LAST)),
    "other map": (momentum, {}, torch.randn(2, 8, 1, 9)),
    "odd channels": (momentum, {}, torch.randn(2, 7, 3, 3)),
    "ring": (memorized, {}, SMALL),
    "other ring": (memorized, {"memory_size": 16}, SMALL),
    "decay": (memorized, {"decay": 0.5}, SMALL),
    "ring, averaged": (memorized, {"variance": "averaged"}, SMALL),
    "ring, ema": (memorized, {"inference": "ema"}, SMALL),
    "ring of one": (memorized, {"memory_size": 1}, SMALL),
}


def test_what_is_launched_by_shape_is_what_triton_would_launch(device, monkeypatch):
    def step(build, options, x):
        layer = build(x.shape[1], **options)
        train(layer, x)
        with no_update(layer):
            train(layer, x)
        layer.stop_undo()
        train(layer, x)
        train(layer.requires_grad_(False), x)

    for way in WAYS.values():
        step(*way)
    launch, checked = triton_launch.launch, []

    def checking(kernel, grid, key, *arguments, warps=4):
        known, _ = triton_launch._compiled[id(kernel), key]
        assert known is kernel[grid](*arguments, num_warps=warps)
        checked.append(kernel)
        launch(kernel, grid, key, *arguments, warps=warps)

    for module in (triton_launch, triton_remember):
        monkeypatch.setattr(module, "launch", checking)
    for way in WAYS.values():
        step(*way)
    assert len(checked) > 200


@pytest.mark.parametrize(("dtype", "wide"), [("float32", "v4.b32"), ("bfloat16", "v2.b32")])
def test_maps_of_14_are_loaded_by_fours(device, dtype, wide):
    x = Case((2, 1024, 14, 14), dtype, "contiguous").tensor(0)
    momentum(1024)(x)
    (whole,) = (made for made, _ in triton_launch._compiled.values() if made.name == "forward_whole")
    text = whole.asm["ptx"]
    assert f"ld.global.{wide}" in text
    assert f"st.global.{wide}" in text


def test_direct_calls_and_operators_launch_the_same(device):
    state = torch.zeros(8), torch.ones(8), torch.ones(())
    x = torch.randn(2, 8, 3, 3)
    arguments = x, None, None, *state, True, 1e-5
    for forward in (torch.ops.mbnorm_triton.forward, triton_launch.forward):
        forward(*arguments)
    assert device.launches == 2 * ["forward_whole"]


def test_writes_raise_the_version_of_what_is_written(device):
    for layer, names in (
        (momentum(8), ("memory_mean", "memory_filled", "running_var", "num_batches_tracked")),
        (measured(8), ("memory_last", "memory_measured")),
        (memorized(8), ("memory_var", "memory_position", "running_mean", "num_batches_skipped")),
    ):
        before = [layer.get_buffer(name)._version for name in names]
        layer(torch.randn(2, 8, 3, 3))
        after = [layer.get_buffer(name)._version for name in names]
        assert all(later > sooner for sooner, later in itertools.zip_longest(before, after))
