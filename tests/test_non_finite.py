"""NaN and Inf never enter the state."""

import pytest
import torch
from helpers import make_input
from torch import nn

import mbnorm
from mbnorm import DoubleForward, MatchedBatchNorm2d, MemorizedBatchNorm2d, MomentumBatchNorm2d

LAYERS = {
    "momentum": lambda: MomentumBatchNorm2d(3, history_weight=0.75),
    "matched": lambda: MatchedBatchNorm2d(3, matched_batch_size=4096, measured=False, early_weight=0),
    "measured": lambda: MatchedBatchNorm2d(3, matched_batch_size=4096, early_weight=0),
    "memorized": lambda: MemorizedBatchNorm2d(3, memory_size=4),
    "memorized-ema": lambda: MemorizedBatchNorm2d(3, memory_size=4, inference="ema"),
    "memory_size=1": lambda: MemorizedBatchNorm2d(3, memory_size=1),
}
on_every_method = pytest.mark.parametrize("method", LAYERS)
with_every_poison = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])


def batch(seed):
    return make_input((2, 3, 4, 4), torch.float32, seed=seed)


def poisoned(bad, everywhere=False):
    x = batch(77)
    x[0, 1, 0, 0] = bad
    return torch.full_like(x, bad) if everywhere else x


def state_of(layer):
    return {n: b.clone() for n, b in layer.named_buffers() if n != "num_batches_skipped"}


def same(layer, state):
    return all(torch.equal(b, state[n]) for n, b in layer.named_buffers() if n in state)


@pytest.mark.contract("NI-1")
@with_every_poison
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@on_every_method
def test_a_non_finite_call_stores_nothing(method, momentum, bad):
    layer = LAYERS[method]()
    layer.momentum = momentum
    for before_poison in range(6):
        before = state_of(layer)
        layer(poisoned(bad))
        assert same(layer, before)
        layer(batch(before_poison))


@pytest.mark.contract("NI-1")
@on_every_method
def test_deciding_so_reads_no_device_value(method, monkeypatch):
    layer = LAYERS[method]()
    # what is for the CPU alone may look: there it costs nothing
    layer.backend = "traceable"
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("read a device value"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("read a device value"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("read a device value"))
    for x in (batch(0), poisoned(torch.nan), batch(1)):
        layer(x)


@pytest.mark.contract("NI-2")
@with_every_poison
@on_every_method
def test_afterwards_the_run_is_as_if_the_batch_had_never_come(method, bad):
    layer, clean = LAYERS[method](), LAYERS[method]()
    for step in range(10):
        if step in (0, 3, 6):
            layer(poisoned(bad))
        assert torch.equal(layer(batch(step)), clean(batch(step)))
    assert same(layer, state_of(clean))


@pytest.mark.contract("NI-3")
@on_every_method
def test_non_finite_calls_are_counted(method):
    layer = LAYERS[method]()
    for x in (batch(0), poisoned(torch.nan), batch(1), poisoned(torch.inf), torch.empty(0, 3, 4, 4)):
        layer(x)
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (2, 2)
    layer.reset_running_stats()
    assert int(layer.num_batches_skipped) == 0


@pytest.mark.contract("NI-3")
def test_a_refresh_does_not_count_twice():
    net = nn.Sequential(LAYERS["memorized"]())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    net(poisoned(torch.nan)).sum().backward()
    optimizer.step()
    assert int(net[0].num_batches_skipped) == 1


@pytest.mark.contract("NI-4")
@with_every_poison
@on_every_method
def test_the_output_still_shows_it_in_its_channel_alone(method, bad):
    layer = LAYERS[method]()
    layer(batch(0))
    y = layer(poisoned(bad))
    assert not torch.isfinite(y[:, 1]).any()
    assert torch.isfinite(y[:, [0, 2]]).all()


@pytest.mark.contract("NI-5")
@on_every_method
def test_a_poisoned_checkpoint_is_named_when_it_is_loaded(method):
    stock = nn.BatchNorm2d(3)
    stock(poisoned(torch.nan))
    model = nn.Sequential(LAYERS[method]())
    with pytest.warns(
        UserWarning, match="not finite in the checkpoint: 0.running_mean, 0.running_var. Call"
    ) as told:
        model.load_state_dict({f"0.{name}": value for name, value in stock.state_dict().items()})
    assert len(told) == 1
    model[0].reset_running_stats()
    model(batch(0))
    assert torch.isfinite(model.eval()(batch(1))).all()


@pytest.mark.contract("NI-5")
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@on_every_method
def test_a_stock_checkpoint_with_one_poisoned_buffer_leaves_the_memory_empty(method, name):
    stock = nn.BatchNorm2d(3)
    stock(batch(0))
    getattr(stock, name)[1] = torch.nan
    layer = LAYERS[method]()
    with pytest.warns(UserWarning, match=rf"not finite in the checkpoint: {name}\. Call"):
        layer.load_state_dict(stock.state_dict())
    assert torch.isfinite(layer(batch(1))).all()


@pytest.mark.contract("NI-1")
@on_every_method
def test_finite_values_whose_statistics_overflow_in_the_blend_are_not_stored(method):
    layer = LAYERS[method]()
    layer(batch(0))
    before = state_of(layer)
    x = torch.full((2, 3, 4, 4), 1e20)
    x[0] *= 1.0001
    layer(x)
    if not same(layer, before):
        # what was stored, as plain batch norm does, must at least be finite
        assert all(torch.isfinite(b).all() for b in layer.buffers())
    for step in range(1, 10):
        layer(batch(step))
    assert layer.eval()(batch(1)).abs().max() > 0.01


@pytest.mark.contract("NI-1")
def test_float64_values_beyond_a_float32_state_are_not_stored():
    layer = LAYERS["momentum"]()
    x = torch.full((2, 3, 4, 4), 1e200, dtype=torch.float64)
    x[0] = 0
    before = state_of(layer)
    layer(x)
    assert same(layer, before)


@pytest.mark.contract("NI-5")
@pytest.mark.parametrize("method", ["matched", "memorized"])
def test_a_poisoned_norm_is_named_when_it_is_converted(method):
    stock = nn.BatchNorm2d(3)
    stock(poisoned(torch.nan))
    report = mbnorm.convert(stock, method)
    assert "memory starts empty: the running statistics are not finite" in str(report)
    assert torch.isfinite(stock(batch(0))).all()
