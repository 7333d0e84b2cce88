"""Forwards run again as they were prepared, beside a twin that finds everything out anew at each call."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from mbnorm import MatchedBatchNorm2d, MemorizedBatchNorm2d, MomentumBatchNorm2d, no_update
from mbnorm.backends import cpu
from mbnorm.layers import HistoryBatchNorm

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

CHANNELS = 3
LAYERS = {
    "momentum": lambda: MomentumBatchNorm2d(CHANNELS, history_weight=0.75),
    "matched": lambda: MatchedBatchNorm2d(CHANNELS, matched_batch_size=128, measured=False),
    "measured": lambda: MatchedBatchNorm2d(CHANNELS, matched_batch_size=128, early_weight=0),
    "memorized": lambda: MemorizedBatchNorm2d(CHANNELS, memory_size=4),
}


def batch(step, side=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, CHANNELS, side, side, generator=generator).to(dtype)


def step_of(layer, x, anew=False):
    """Return output and gradients of a forward and backward; ``anew`` forgets what was prepared."""
    if anew:
        layer._prepared = None
    x = x.clone().requires_grad_()
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters())]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, cotangent)]


def same(layer, twin, x):
    for a, b in zip(step_of(layer, x), step_of(twin, x, anew=True), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def prepared(method):
    layer = LAYERS[method]()
    twin = copy.deepcopy(layer)
    for step in range(3):
        same(layer, twin, batch(step))
    assert layer._prepared is not None
    return layer, twin


@pytest.fixture
def anew(monkeypatch):
    """Count the forwards that were not run as prepared."""
    counted = []
    plain = HistoryBatchNorm._forward
    monkeypatch.setattr(HistoryBatchNorm, "_forward", lambda self, x: counted.append(1) or plain(self, x))
    return counted


on_every_method = pytest.mark.parametrize("method", LAYERS)


def set_attribute(name, value):
    return lambda layer: setattr(layer, name, value)


def set_option(name, value):
    """Give a layer a memory with another option: nobody changes those of the one that it has."""

    def change(layer):
        memory = layer.memory
        options = {name: getattr(memory, name) for name in memory.options}
        layer.memory = type(memory)(**options | {name: value})

    return change


def replace_running_mean(layer):
    layer.running_mean = torch.full((CHANNELS,), 0.5)


def replace_a_buffer_behind_the_module(layer):
    layer._buffers["memory_mean"] = layer._buffers["memory_mean"].clone()


def replace_weight(layer):
    layer.weight = nn.Parameter(torch.full((CHANNELS,), 2.0))


def set_dtype_of_parameters(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def set_dtype_of_state(layer):
    for buffer in layer.buffers():
        buffer.data = buffer.data.double() if buffer.is_floating_point() else buffer.data


def double_weight(layer):
    parametrize.register_parametrization(layer, "weight", _Double())


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "momentum of 0": set_attribute("momentum", 0),
    "momentum of None": set_attribute("momentum", None),
    "momentum of 1": set_attribute("momentum", 1.0),
    "another momentum": set_attribute("momentum", 0.5),
    "eps": set_attribute("eps", 0.1),
    "backend": set_attribute("backend", "aten"),
    "not tracking": set_attribute("track_running_stats", False),
    "eval mode": lambda layer: layer.eval(),
    "shared": lambda layer: layer.share_with("world"),
    "gradient": set_attribute("_gradient", "exact"),
    "reset": lambda layer: layer.reset_running_stats(),
    "seeded": lambda layer: layer.seed(),
    "loaded": lambda layer: layer.load_state_dict(made_like(layer).state_dict()),
    "bfloat16": lambda layer: layer.bfloat16(),
    "running mean replaced": replace_running_mean,
    "buffer replaced": replace_a_buffer_behind_the_module,
    "weight replaced": replace_weight,
    "weight parametrized": double_weight,
    "parameters set to bfloat16": set_dtype_of_parameters,
    "state set to float64": set_dtype_of_state,
}
OF_MOMENTUM = {
    "history weight in place": lambda layer: layer.history_weight.fill_(0.25),
    "history weight by a schedule": lambda layer: layer.set_history_weight(0.25),
    "variance rule": set_option("variance_rule", "pooled"),
}
OF_MATCHED = {
    "matched values": set_option("matched_batch_size", 64),
    "early weight": set_option("early_weight", 2.0),
}
OF_MEMORIZED = {
    "memory values": set_option("memory_values", 40),
    "decay": set_option("decay", 0.5),
    "inference": set_option("inference", "ema"),
    "variance rule": set_option("variance_rule", "averaged"),
}
CASES = [
    *((method, name, change) for method in LAYERS for name, change in CHANGES.items()),
    *(("momentum", *case) for case in OF_MOMENTUM.items()),
    *(("matched", *case) for case in OF_MATCHED.items()),
    *(("measured", *case) for case in OF_MATCHED.items()),
    *(("memorized", *case) for case in OF_MEMORIZED.items()),
]


def made_like(layer):
    other = copy.deepcopy(layer)
    other(batch(20))
    return other


@pytest.mark.parametrize(("method", "change"), [pytest.param(m, c, id=f"{m}-{n}") for m, n, c in CASES])
def test_a_changed_layer_forwards_as_it_is_now(method, change):
    layer, twin = prepared(method)
    change(layer)
    change(twin)
    for step in range(3, 6):
        same(layer, twin, batch(step))


@on_every_method
def test_a_layer_shows_the_options_of_its_memory_and_lets_nobody_set_them(method):
    layer = LAYERS[method]()
    for name in layer.memory.options:
        if name != "history_weight":  # a buffer, which may be filled in place
            assert getattr(layer, name) == getattr(layer.memory, name)
            with pytest.raises(AttributeError):
                setattr(layer, name, getattr(layer.memory, name))


@on_every_method
def test_nothing_is_found_out_again_while_nothing_changes(method, anew):
    layer = LAYERS[method]()
    for step in range(4):
        step_of(layer, batch(step))
    assert len(anew) == 1


@on_every_method
def test_an_input_of_another_kind_is_prepared_anew(method, anew):
    layer, twin = prepared(method)
    for x in (batch(3, side=5), batch(4, side=5), batch(5), batch(6, dtype=torch.bfloat16)):
        same(layer, twin, x)
    assert len(anew) == 3 + 4 + 1 + 3  # the twin always, the layer at first and where the kind changes


@on_every_method
def test_no_update_stores_nothing(method):
    layer, _ = prepared(method)
    before = copy.deepcopy(layer.state_dict())
    with no_update(layer):
        layer(batch(3))
        layer(batch(4))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@on_every_method
def test_functional_calls_use_what_they_are_given(method):
    layer, twin = prepared(method)
    given = {"weight": torch.full((CHANNELS,), 3.0), "running_mean": torch.zeros(CHANNELS)}
    for step in (3, 4):
        twin._prepared = None
        want = functional_call(twin, {k: v.clone() for k, v in given.items()}, (batch(step),))
        assert torch.equal(functional_call(layer, given, (batch(step),)), want)
        same(layer, twin, batch(step))


@pytest.mark.contract("ST-7")
@on_every_method
def test_parameters_with_a_history_are_not_kept(method):
    layer, _ = prepared(method)
    history = torch.ones(CHANNELS, requires_grad=True)
    weight = history * 2
    seen = weakref.ref(weight)
    y = functional_call(layer, {"weight": weight, "bias": layer.bias}, (batch(3),))
    del y, weight
    assert seen() is None


@on_every_method
def test_function_transforms_are_traced(method):
    layer, twin = prepared(method)

    def loss(x, of):
        return (of(x) * batch(11)).sum()

    with no_update(layer), no_update(twin):
        got = torch.func.grad(loss)(batch(3), layer)
        twin._prepared = None
        assert torch.equal(got, torch.func.grad(loss)(batch(3), twin))


@on_every_method
def test_a_copy_prepares_its_own(method):
    layer, _ = prepared(method)
    other = copy.deepcopy(layer)
    assert other._prepared is None
    before = copy.deepcopy(layer.state_dict())
    other(batch(3))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@on_every_method
def test_a_single_value_finds_out_each_time_if_there_is_a_past(method):
    layer, _ = prepared(method)
    single = torch.ones(1, CHANNELS, 1, 1)
    layer(single)
    layer.reset_running_stats()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(single)


def test_the_warning_of_a_missing_schedule_comes_before_the_first_forward_is_prepared(anew):
    layer = MomentumBatchNorm2d(CHANNELS)
    with pytest.warns(UserWarning, match="MomentumSchedule"):
        layer(batch(0))
    for step in range(1, 4):
        layer(batch(step))
    assert len(anew) == 1


def test_what_is_prepared_takes_the_kernels_of_the_cpu():
    layer, _ = prepared("matched")
    assert layer._prepared._operator is cpu.forward_with_average
