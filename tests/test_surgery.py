"""Layers whose channels, buffers or settings others change by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hands import (
    CHANNELS,
    METHODS,
    assert_memory,
    assert_same_state,
    data_of_a,
    data_of_b,
    memory_of,
    on_every_method,
    ours,
    seed_of,
    stock,
    trained,
)
from torch import nn

from mbnorm import (
    DoubleForward,
    MatchedBatchNorm2d,
    MemorizedBatchNorm2d,
    MomentumBatchNorm2d,
    convert,
    revert,
)

KEPT = torch.tensor([0, 2, 3, 7])
RUNNING = ("running_mean", "running_var")
PARAMETERS = ("weight", "bias")


def by_data(layer):
    for name in (*PARAMETERS, *RUNNING):
        tensor = getattr(layer, name)
        tensor.data = tensor.data[KEPT]


def by_new_tensors(layer):
    for name in PARAMETERS:
        setattr(layer, name, nn.Parameter(getattr(layer, name).data[KEPT]))
    for name in RUNNING:
        setattr(layer, name, getattr(layer, name)[KEPT])


def by_views(layer):
    for name in PARAMETERS:
        setattr(layer, name, nn.Parameter(getattr(layer, name).data[::2]))
    for name in RUNNING:
        setattr(layer, name, getattr(layer, name)[::2])


def by_torch_pruning(layer):
    """As torch-pruning's BatchnormPruner does, gradients included."""
    layer.num_features = len(KEPT)
    layer.running_mean = layer.running_mean.data[KEPT]
    layer.running_var = layer.running_var.data[KEPT]
    for name in PARAMETERS:
        old = getattr(layer, name)
        new = nn.Parameter(torch.index_select(old.data, 0, KEPT))
        new.grad = None if old.grad is None else torch.index_select(old.grad, 0, KEPT)
        setattr(layer, name, new)


CUTS = pytest.mark.parametrize("cut", [by_data, by_new_tensors, by_views, by_torch_pruning])


@pytest.mark.contract("SH-14")
# torch.compile's, where it leaves a layer to eager mode
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("mode", ["train", "eval", "compiled"])
@CUTS
@on_every_method
def test_a_pruned_layer_starts_from_the_statistics_that_are_left(method, cut, mode):
    model = trained(ours(method), data_of_a)
    model(data_of_a()).sum().backward()
    run = torch.compile(model, backend="eager") if mode == "compiled" else model
    run(data_of_a())
    cut(model[0])
    expected = stock()
    expected[0] = nn.BatchNorm2d(len(KEPT))
    for name in (*RUNNING, "num_batches_tracked"):
        getattr(expected[0], name).copy_(getattr(model[0], name))
    x = data_of_a()[:, KEPT]
    if mode == "eval":
        torch.testing.assert_close(model.eval()(x), copy.deepcopy(expected).eval()(x))
        model.train()
    ours(method, expected)
    torch.testing.assert_close(run(x), expected(x))
    for name, value in memory_of(model).items():
        torch.testing.assert_close(value, memory_of(expected)[name])


@pytest.mark.contract("SH-14")
@pytest.mark.parametrize("number", ["changed", "left as it was"])
@CUTS
@on_every_method
def test_a_pruned_layer_trains_saves_copies_and_reverts(method, cut, number):
    model = trained(ours(method), data_of_a)
    cut(model[0])
    if number == "changed":
        model[0].num_features = len(KEPT)
    x = data_of_a()[:, KEPT]
    saved = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model(x).sum().backward()
    assert model[0].weight.grad.shape == model[0].memory_mean.shape[-1:] == KEPT.shape
    model.load_state_dict(saved)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    y = model(x)
    assert all(torch.equal(twin(x), y) for twin in twins)
    y = model.eval()(x)
    revert(model)
    assert torch.equal(model(x), y)


@pytest.mark.contract("SH-14")
@on_every_method
def test_double_forward_takes_back_the_first_forward_of_a_pruned_layer(method):
    model = trained(ours(method), data_of_a)
    by_data(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = int(model[0].num_batches_tracked)
    with DoubleForward(model, optimizer):
        model(data_of_a(2)[:, KEPT]).square().mean().backward()
        optimizer.step()
    assert int(model[0].num_batches_tracked) == before + 1


@pytest.mark.contract("SH-14")
@on_every_method
def test_a_pruned_checkpoint_loads_into_a_pruned_net(method):
    model = trained(ours(method), data_of_a)
    by_new_tensors(model[0])
    other = ours(method, nn.Sequential(nn.BatchNorm2d(len(KEPT))))
    other.load_state_dict(model.state_dict())
    x = data_of_a()[:, KEPT]
    assert torch.equal(other(x), model(x))


@pytest.mark.contract("SH-14")
@on_every_method
def test_channels_that_grow_are_taken_with_the_statistics_they_are_given(method):
    model = trained(ours(method), data_of_a)
    layer = model[0]
    for name, value in (("running_mean", 3.0), ("running_var", 4.0)):
        setattr(layer, name, torch.cat([getattr(layer, name), torch.full((4,), value)]))
    for name in PARAMETERS:
        setattr(layer, name, nn.Parameter(torch.cat([getattr(layer, name).data, torch.ones(4)])))
    layer.num_features = CHANNELS + 4
    for _ in range(3):
        y = model(3 + 2 * torch.randn(4, CHANNELS + 4, 4, 4))
        y.sum().backward()
    assert layer.memory_mean.shape[-1] == layer.running_mean.shape[0] == CHANNELS + 4
    # weight and bias of the new ones are 1
    assert (y.mean((0, 2, 3)) - torch.tensor([0.0] * CHANNELS + [1.0] * 4)).abs().max() < 1


@pytest.mark.contract("SH-14")
@on_every_method
def test_other_channels_than_the_layers_are_refused_with_both_numbers(method):
    model = trained(ours(method), data_of_a)
    with pytest.raises(ValueError, match=r"expected 8 channels, got an input of shape \(2, 4, 4, 4\)"):
        model(data_of_a(2)[:, KEPT])


def without(layer):
    layer.running_mean = layer.running_var = None


def without_by_torch(layer):
    torch.func.replace_all_batch_norm_modules_(layer)


def without_counter(layer):
    for name in (*RUNNING, "num_batches_tracked"):
        setattr(layer, name, None)
    layer.track_running_stats = False


@pytest.mark.contract("SH-15")
@pytest.mark.parametrize("take", [without, without_by_torch, without_counter])
@on_every_method
def test_without_running_statistics_both_modes_normalize_with_the_batchs(method, take):
    model, plain = trained(ours(method), data_of_a), trained(stock(), data_of_a)
    for net in (model, plain):
        take(net[0])
    for _ in range(3):
        x = data_of_b(1)
        assert torch.equal(model.train()(x), plain.train()(x))
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert "memory=0 bytes" in repr(model)
    model.double().float()
    copy.deepcopy(model).train()(x)
    revert(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.contract("SH-8", "SH-15")
@on_every_method
def test_running_statistics_that_were_away_for_a_while_come_back_with_their_memory(method):
    model = trained(ours(method), data_of_a)
    expected, mean, var = memory_of(model), model[0].running_mean, model[0].running_var
    without(model[0])
    model(data_of_b())
    model.eval()(data_of_b())
    model[0].running_mean, model[0].running_var = mean, var
    assert_memory(model, expected)


@pytest.mark.contract("SH-16")
@on_every_method
def test_tracking_that_is_switched_off_and_on_stores_nothing_in_between(method):
    model = trained(ours(method), data_of_a)
    plain = trained(stock(), data_of_a)
    expected, averages = memory_of(model), model[0].running_mean.clone()
    for net in (model, plain):
        net[0].track_running_stats = False
        net(data_of_b())
    assert_memory(model, expected)
    assert torch.equal(model[0].running_mean, averages)
    plain[0].load_state_dict({n: t for n, t in model[0].state_dict().items() if n in plain[0].state_dict()})
    x = data_of_a(2)
    assert torch.equal(copy.deepcopy(model).eval()(x), copy.deepcopy(plain).eval()(x))
    for net in (model, plain):
        net[0].track_running_stats = True
        net(x)
    assert int(model[0].num_batches_tracked) == int(plain[0].num_batches_tracked) == 61
    assert not torch.equal(model[0].running_mean, averages)


@pytest.mark.contract("SH-17")
@on_every_method
def test_layers_share_weights(method):
    def build():
        net = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS))
        net[1].weight, net[1].bias = net[0].weight, net[0].bias
        return net

    model, before = build(), build()
    convert(before)
    convert(model)
    assert model[0].weight is model[1].weight
    assert len(list(model.parameters())) == 2
    x = data_of_a(32)
    model(x).square().sum().backward()
    # each adds its part, in a copy as well
    copied = copy.deepcopy(before)
    assert copied[0].weight is copied[1].weight
    copied(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, copied[0].weight.grad)


@pytest.mark.contract("SH-17")
@on_every_method
def test_layers_share_running_statistics(method):
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS))
    for name in (*RUNNING, "num_batches_tracked"):
        setattr(model[1], name, getattr(model[0], name))
    ours(method, model)
    for _ in range(3):
        model(data_of_a(2)).sum().backward()
    assert all(getattr(model[0], name) is getattr(model[1], name) for name in RUNNING)
    assert int(model[0].num_batches_tracked) == 6


@pytest.mark.contract("SH-18")
@on_every_method
def test_a_shallow_copy_of_a_layer_shares_its_state(method):
    layer = trained(ours(method), data_of_a)[0]
    twin, alone = copy.copy(layer), copy.deepcopy(layer)
    for norm in (layer, twin, layer):
        x = data_of_a(2)
        torch.testing.assert_close(norm(x), alone(x))
    assert twin.running_mean is layer.running_mean
    assert_same_state(nn.Sequential(twin), nn.Sequential(alone))
    assert_same_state(nn.Sequential(copy.deepcopy(twin)), nn.Sequential(alone))


@pytest.mark.contract("SH-18")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@on_every_method
def test_a_copy_of_a_layer_that_has_trained_goes_on_alike(method, copied):
    layer = trained(ours(method), data_of_a)[0]
    alone, twin = copy.deepcopy(layer), copied(copied(layer))
    x = data_of_a(2)
    assert torch.equal(twin.train()(x), alone(x))


@pytest.mark.contract("SH-18")
@on_every_method
def test_a_layer_built_again_from_its_attributes_loads_its_state(method):
    layer = trained(ours(method), data_of_a)[0]
    kind = type(layer)
    again = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, **METHODS[method][1])
    again.load_state_dict(layer.state_dict())
    assert_same_state(nn.Sequential(again), nn.Sequential(layer))


def half_by_data(model):
    # as CLIP's convert_weights and fp16 utilities do
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.half()


@pytest.mark.contract("SH-14")
@on_every_method
def test_running_statistics_of_another_precision_are_taken(method):
    model = trained(ours(method), data_of_a)
    expected = seed_of(method, model)
    for name in RUNNING:
        setattr(model[0], name, getattr(model[0], name).half())
    assert_memory(model, expected, rtol=2e-3)
    assert model[0].running_mean.dtype == torch.float32
    half_by_data(model)
    assert torch.isfinite(model(data_of_a().half())).all()


@pytest.mark.contract("SH-13")
@pytest.mark.parametrize("weight", [0.7, np.float64(0.7), 0.1])
def test_a_history_weight_is_the_users_number_in_every_precision(weight):
    for build in (
        lambda: MomentumBatchNorm2d(CHANNELS, history_weight=weight),
        lambda: ours("momentum")[0] if weight == 0.7 else MomentumBatchNorm2d(4, history_weight=weight),
    ):
        layer = build()
        assert layer.history_weight == torch.tensor(weight, dtype=torch.float32)
        assert float(layer.double().history_weight) == weight
        assert float(layer.half().float().double().history_weight) == weight
        assert float(copy.deepcopy(layer.float()).double().history_weight) == weight


@pytest.mark.contract("SH-13")
def test_a_schedules_history_weight_survives_precisions_and_copies():
    layer = MomentumBatchNorm2d(CHANNELS)
    layer.set_history_weight(np.float64(0.3))
    layer.double()
    assert float(layer.history_weight) == 0.3
    again = pickle.loads(pickle.dumps(layer.float())).double()
    assert float(again.history_weight) == 0.3
    assert type(again.memory.history_weight) is float


NUMBERS = [np.float64, np.float32, torch.tensor]


@pytest.mark.contract("SH-13")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.__name__)
def test_options_may_be_numbers_of_numpy_and_torch(number):
    value = float(number(0.9))
    layer = MemorizedBatchNorm2d(CHANNELS, decay=number(0.9), memory_values=number(64), eps=1e-3)
    plain = MemorizedBatchNorm2d(CHANNELS, decay=value, memory_values=64, eps=1e-3)
    assert (type(layer.decay), layer.decay) == (float, value)
    assert repr(layer).replace("64.0", "64") == repr(plain)
    matched = MatchedBatchNorm2d(
        CHANNELS, matched_batch_size=number(48), early_weight=number(5), eps=number(0.1)
    )
    plain_matched = MatchedBatchNorm2d(
        CHANNELS, matched_batch_size=48, early_weight=5, eps=float(number(0.1))
    )
    for given, meant in ((layer, plain), (matched, plain_matched)):
        given.double()
        meant.double()
        for _ in range(3):
            x = data_of_a(2).double()
            assert torch.equal(given(x), meant(x))
        meant.load_state_dict(given.state_dict())


@pytest.mark.contract("SH-13")
def test_options_of_numpy_compile_without_a_graph_break():
    layer = MemorizedBatchNorm2d(CHANNELS, decay=np.float64(0.9), memory_values=np.int64(64))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        x = data_of_a(2)
        torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.contract("SH-13")
def test_a_batch_size_of_numpy_leaves_plain_numbers():
    model = stock()
    convert(model, "momentum", batch_size=np.int64(2))
    assert (type(model[0].momentum), type(model[0].memory.history_weight)) == (float, float)


@pytest.mark.contract("SH-14")
@on_every_method
def test_a_counter_that_was_taken_away_is_replaced(method):
    model, plain = trained(ours(method), data_of_a), trained(stock(), data_of_a)
    for net in (model, plain):
        net[0].num_batches_tracked = None
        net(data_of_a(2))
    assert int(model[0].num_batches_tracked) == 1
    assert bool(model[0].memory.holds_anything(model[0].state))
