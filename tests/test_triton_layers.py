"""What the layers hand to Triton's kernels and take from them: with the C++ ones in their place."""

import copy
from types import SimpleNamespace

import pytest
import test_lockstep
import torch
from helpers import gradients, make_input
from test_layers import build, on_every_method, same_state, shape_of, state_of
from torch.utils.checkpoint import checkpoint

import mbnorm
from mbnorm import functional
from mbnorm.backends import cpu
from mbnorm.layers import layer as layers

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the C++ kernels do not run here")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    stand_in = SimpleNamespace(
        forward=cpu.forward,
        backward=cpu.backward,
        forward_with_average=cpu.forward_with_average,
        forward_with_ring=cpu.forward_with_ring,
    )
    monkeypatch.setitem(functional.KERNELS, "triton", stand_in)
    monkeypatch.setitem(layers.FUSED, "triton", stand_in)
    for module in (layers, functional):
        monkeypatch.setattr(module, "choose", lambda x, backend: "triton")


def batch(seed, m=4):
    return make_input(shape_of(4, m), torch.float32, seed=seed)


# a layer without a weight says so
@pytest.mark.filterwarnings("ignore:Momentum layers train with history_weight=0")
@pytest.mark.parametrize(("kind", "options"), test_lockstep.pairs())
def test_layers_follow_the_reference(kind, options):
    test_lockstep.test_outputs_gradients_and_state_follow_the_reference(kind, options, 2, "triton")


@on_every_method
def test_layers_without_parameters_train(method):
    layer, twin = build(method, affine=False), build(method, affine=False, backend="cpu")
    assert torch.equal(layer(batch(0)), twin(batch(0)))


@on_every_method
def test_half_parameters_get_half_gradients(method):
    layer = build(method, dtype=torch.float16)
    y = layer(batch(0).half())
    found = gradients(y, (layer.weight, layer.bias), torch.ones_like(y))
    assert [y.dtype, *(t.dtype for t in found)] == [torch.float16] * 3


@on_every_method
def test_without_update_the_memory_is_read_only(method):
    layer = build(method)
    layer(batch(0))
    twin, before = copy.deepcopy(layer), state_of(layer)
    with mbnorm.no_update(layer):
        y = layer(batch(1))
    assert same_state(layer, before)
    assert torch.equal(y, twin(batch(1)))


@on_every_method
def test_an_empty_batch_changes_nothing(method):
    layer = build(method)
    layer(batch(0))
    before = state_of(layer)
    assert layer(batch(1, m=0)).numel() == 0
    assert same_state(layer, before)


@pytest.mark.parametrize("reentrant", [True, False])
@on_every_method
def test_a_recompute_reads_what_its_forward_had_read(method, reentrant):
    layer = build(method).double()
    twin = copy.deepcopy(layer)
    cotangents = [make_input(shape_of(4), torch.float64, seed=seed) for seed in (8, 9)]
    found = []
    for net in (layer, twin):
        net(batch(0).double())
        x = batch(1).double().requires_grad_()
        outputs = [
            checkpoint(net, x, use_reentrant=reentrant) if net is layer else net(x) for _ in cotangents
        ]
        sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True)).backward()
        found.append((x.grad, net.weight.grad, net.bias.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert same_state(layer, state_of(twin))


@on_every_method
def test_a_forward_whose_backward_has_run_is_forgotten(method):
    layer = build(method)
    for seed in range(3):
        layer(batch(seed)).square().sum().backward()
    assert len(layer._calls.calls) == 1
