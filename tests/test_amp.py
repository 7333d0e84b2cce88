"""Mixed and low precision, and GradScaler."""

import copy

import pytest
import torch
from helpers import budget, layout_id, make_input, native_errors, relative_error
from torch import nn

from mbnorm import (
    DoubleForward,
    MatchedBatchNorm2d,
    MemorizedBatchNorm2d,
    MomentumBatchNorm2d,
    MomentumSchedule,
    convert,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=layout_id)
LAYERS = {
    "momentum": lambda: MomentumBatchNorm2d(3, history_weight=0.75),
    "matched": lambda: MatchedBatchNorm2d(3, matched_batch_size=4096, measured=False, early_weight=0),
    "measured": lambda: MatchedBatchNorm2d(3, matched_batch_size=4096, early_weight=0),
    "memorized": lambda: MemorizedBatchNorm2d(3, memory_size=5),
}
on_every_method = pytest.mark.parametrize("method", LAYERS)


@pytest.mark.contract("AM-1")
@HALVES
@on_every_method
def test_half_inputs_follow_the_float64_run_within_twice_native_error(method, dtype):
    layer, exact = LAYERS[method](), LAYERS[method]().double()
    for step in range(8):
        x = make_input((4, 3, 5, 5), dtype, seed=step)
        cotangent = make_input((4, 3, 5, 5), dtype, seed=50 + step)
        y_native, dx_native, _, _ = native_errors(
            x, layer.weight.detach(), layer.bias.detach(), cotangent, layer.eps
        )
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        y, want = layer(leaf), exact(twin)
        (dx,) = torch.autograd.grad(y, leaf, cotangent)
        (dx_want,) = torch.autograd.grad(want, twin, cotangent.double())
        assert relative_error(y.detach(), want.detach()) <= budget(dtype, y_native)
        assert relative_error(dx, dx_want) <= budget(dtype, dx_native)
        torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.contract("AM-1")
@on_every_method
def test_float16_values_whose_variance_overflows_float16(method):
    layer = LAYERS[method]()
    for step in range(3):
        layer((1000 * make_input((4, 3, 5, 5), torch.float64, seed=step)).half())
    assert torch.isfinite(layer.running_var).all()
    assert layer.running_var.max() > torch.finfo(torch.float16).max


@pytest.mark.contract("AM-2")
@HALVES
@on_every_method
def test_a_half_model_remembers_variances_beyond_float16(method, dtype):
    layer = LAYERS[method]()
    layer(300 * make_input((4, 3, 5, 5), torch.float32))
    before = {n: b.clone() for n, b in layer.named_buffers()}
    layer.to(dtype)
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())


@pytest.mark.contract("AM-5")
@HALVES
@on_every_method
def test_under_autocast_output_follows_the_input_and_the_state_is_float32s(method, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), LAYERS[method]())
    twin = copy.deepcopy(net)
    x = torch.randn(4, 2, 6, 6)
    with torch.autocast("cpu", dtype=dtype):
        y = net(x)
        middle = net[0](x)
    twin[1](middle.float())
    assert y.dtype == middle.dtype == dtype
    # autocast must not round the memory's own arithmetic
    torch.testing.assert_close(net[1].running_var, twin[1].running_var, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", dtype=dtype):
        net(x)
    twin[1](middle.float())
    torch.testing.assert_close(net[1].memory_mean, twin[1].memory_mean, rtol=1e-6, atol=1e-7)


def scaled_step(net, optimizer, scaler, x, factor=1.0):
    optimizer.zero_grad()
    scaler.scale(net(x).square().mean() * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def small_net(method="memorized"):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    convert(net, method)
    return net


@pytest.mark.contract("AM-3")
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.SGD])
def test_a_skipped_step_advances_no_schedule_and_refreshes_nothing(optimizer_type, fused):
    net = small_net("momentum")
    optimizer = optimizer_type(net.parameters(), lr=0.01, fused=fused, foreach=not fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedule = MomentumSchedule(net, 10, batch_size=4)
    schedule.follow(optimizer, scaler=scaler)
    DoubleForward(net, optimizer, scaler=scaler)
    forwards = []
    net.register_forward_hook(lambda *_: forwards.append(1))
    x = torch.randn(4, 2, 6, 6)
    weights = net[0].weight.detach().clone()
    scaled_step(net, optimizer, scaler, x, factor=torch.inf)
    assert torch.equal(net[0].weight, weights)
    assert (schedule.t, len(forwards)) == (1, 1)
    scaled_step(net, optimizer, scaler, x)
    assert schedule.t == 2
    assert len(forwards) > 2


@pytest.mark.contract("AM-3")
def test_a_followed_schedule_can_be_let_go():
    net = small_net("momentum")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    schedule = MomentumSchedule(net, 10, batch_size=4)
    handle = schedule.follow(optimizer)
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert schedule.t == 2


@pytest.mark.contract("AM-4")
@pytest.mark.parametrize("scaler", [None, "scaler"])
def test_without_a_fused_optimizer_the_decision_reads_no_device_value(monkeypatch, scaler):
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, foreach=True)
    if scaler:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        monkeypatch.setattr(scaler, "_found_inf_per_device", lambda _: pytest.fail("read found_inf"))
    DoubleForward(net, optimizer, scaler=scaler)
    net(torch.randn(4, 2, 6, 6)).square().mean().backward()
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("read a device value"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("read a device value"))
    optimizer.step()
    assert int(net[1].num_batches_tracked) == 1
