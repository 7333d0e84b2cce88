"""What counts as trained, and how a memory then starts: whatever wrote the running statistics."""

import copy

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
    seeded,
    stock,
    trained,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mbnorm import convert, recalibrate
from mbnorm.values import is_trained

COUNTERS = [None, 0, 3, 60, 10**7]
on_every_counter = pytest.mark.parametrize("counter", COUNTERS)


def checkpoint(counter, data=data_of_b):
    """Trained running statistics with any counter, or none, as from before there was one."""
    # a plain dictionary: those from before there was a counter say no version
    saved = dict(trained(stock(), data).state_dict())
    if counter is None:
        del saved["0.num_batches_tracked"]
    else:
        saved["0.num_batches_tracked"] = torch.tensor(counter)
    return saved


@pytest.mark.contract("SH-1")
@on_every_counter
@on_every_method
def test_a_memory_starts_from_trained_statistics_whatever_the_counter(method, counter):
    saved = checkpoint(counter)
    model = stock()
    model.load_state_dict(saved)
    assert_memory(
        ours(method, model), seeded(method, saved["0.running_mean"], saved["0.running_var"], counter or 0)
    )


@pytest.mark.contract("SH-1")
@on_every_counter
@on_every_method
def test_the_first_training_forward_normalizes_nearly_as_eval_mode_does(method, counter):
    saved = checkpoint(counter)
    model, plain = ours(method), stock()
    for net in (model, plain):
        net.load_state_dict(saved)
    x = data_of_b(1)
    wanted = copy.deepcopy(plain).eval()(x)
    off, torchs = ((net(x) - wanted).square().mean().sqrt() for net in (model, plain))
    # of all, with three seeds, at most 0.33: momentum's, whose weight is 0.7 whatever the batch
    assert off < 0.5 * torchs


@pytest.mark.contract("SH-2")
@pytest.mark.parametrize("before", ["new", "trained"])
@on_every_counter
@on_every_method
def test_converting_and_loading_in_either_order_is_the_same(method, counter, before):
    saved = checkpoint(counter)
    loaded_first = stock() if before == "new" else trained(stock(), data_of_a)
    converted_first = copy.deepcopy(loaded_first)
    loaded_first.load_state_dict(saved)
    ours(method, loaded_first)
    ours(method, converted_first).load_state_dict(saved)
    assert_same_state(loaded_first, converted_first)
    for x in (data_of_b(2), data_of_b(1)):
        assert torch.equal(loaded_first(x), converted_first(x))
        assert_same_state(loaded_first, converted_first)


@pytest.mark.contract("SH-2")
@on_every_method
def test_untrained_statistics_empty_a_memory_in_either_order(method):
    loaded_first = trained(stock(), data_of_a)
    converted_first = copy.deepcopy(loaded_first)
    loaded_first.load_state_dict(stock().state_dict())
    ours(method, loaded_first)
    ours(method, converted_first).load_state_dict(stock().state_dict())
    assert_same_state(loaded_first, converted_first)
    assert not loaded_first[0].memory.holds_anything(loaded_first[0].state)


@pytest.mark.contract("SH-1")
def test_the_report_says_from_what_each_memory_starts():
    model = nn.Sequential(*(nn.BatchNorm2d(CHANNELS) for _ in range(3)))
    model[1].running_mean.fill_(0.5)
    model[2].running_var[3] = torch.nan
    assert list(convert(model).converted.values()) == [
        "BatchNorm2d -> MatchedBatchNorm2d, memory starts empty",
        "BatchNorm2d -> MatchedBatchNorm2d, memory starts from the running statistics",
        "BatchNorm2d -> MatchedBatchNorm2d, memory starts empty: the running statistics are not finite",
    ]


@pytest.mark.contract("SH-1")
def test_one_number_is_enough_to_be_trained():
    mean, var = torch.zeros(3), torch.ones(3)
    assert not is_trained(mean, var)
    var[2] = 0.5
    assert is_trained(mean, var)


@pytest.mark.contract("SH-1")
@on_every_method
def test_layers_without_values_start_empty(method):
    with torch.device("meta"):
        on_meta = stock()
    ours(method, on_meta)
    with FakeTensorMode():
        ours(method)
    on_meta.to_empty(device="cpu")
    on_meta[0].reset_parameters()
    assert_memory(on_meta, memory_of(ours(method)))


@pytest.mark.contract("SH-3")
@pytest.mark.parametrize("counter", [None, 0, 1, 400])
def test_the_averages_of_a_trained_norm_go_on_as_after_400_batches(counter):
    saved = checkpoint(counter, data_of_a)
    model = ours("matched")
    model.load_state_dict(saved)
    layer = model[0]
    before = layer.running_mean.clone()
    x = data_of_b(32)
    model(x)
    moved = (layer.running_mean - before) / (x.mean((0, 2, 3)) - before)
    # of 32 samples: the larger of momentum and 8 / 408
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-4, atol=0)
    layer.momentum = 0.001
    before = layer.running_mean.clone()
    model(x)
    moved = (layer.running_mean - before) / (x.mean((0, 2, 3)) - before)
    torch.testing.assert_close(moved, torch.full_like(moved, 8 / 409), rtol=1e-3, atol=0)
    assert int(layer.num_batches_tracked) == (counter or 0) + 2


@pytest.mark.contract("SH-4")
@on_every_method
def test_recalibrating_and_converting_in_either_order_starts_the_memory(method):
    batches = [data_of_b() for _ in range(10)]
    converted_first, recalibrated_first = ours(method), stock()
    recalibrate(converted_first, batches)
    recalibrate(recalibrated_first, batches)
    ours(method, recalibrated_first)
    x = data_of_b(2)
    assert torch.equal(converted_first(x), recalibrated_first(x))
    assert_same_state(converted_first, recalibrated_first)


@pytest.mark.contract("SH-4")
@pytest.mark.parametrize("by", ["forward", "train", "deepcopy", "compile"])
@on_every_method
def test_statistics_copied_in_place_into_a_new_layer_start_its_memory(method, by):
    source, model, expected = trained(stock(), data_of_b), ours(method), stock()
    expected.load_state_dict(source.state_dict())
    ours(method, expected)
    for name, tensor in model.named_buffers():
        if name in source.state_dict():
            tensor.copy_(source.state_dict()[name])
    if by == "deepcopy":
        model = copy.deepcopy(model)
    if by in ("train", "compile"):
        model.train()
        assert_memory(model, memory_of(expected))
    x = data_of_b(2)
    run = torch.compile(model, backend="eager", fullgraph=True) if by == "compile" else model
    torch.testing.assert_close(run(x), expected(x))


@pytest.mark.contract("SH-4")
@on_every_method
def test_a_memory_that_is_copied_in_place_with_its_statistics_stays(method):
    # as DistributedDataParallel gives rank 0's to all when it is built
    source, model = trained(ours(method), data_of_b), ours(method)
    for mine, theirs in zip(model.buffers(), source.buffers(), strict=True):
        mine.detach().copy_(theirs)
    assert_memory(model, memory_of(source))
    x = data_of_b(2)
    assert torch.equal(model(x), source(x))


@pytest.mark.contract("SH-10")
@on_every_method
def test_momentum_0_of_an_untrained_norm_starts_empty_and_stores_nothing(method):
    # meant as Keras does, where it is what is kept
    plain = trained(nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=0.0)), data_of_a, steps=10)
    model = copy.deepcopy(plain)
    name, options = METHODS[method]
    report = convert(model, name, **options)
    assert "memory starts empty" in report.converted["0"]
    assert [note for note in report.notes if note.startswith("momentum=0 stores nothing")] != []
    for _ in range(3):
        x = data_of_a(2)
        torch.testing.assert_close(model(x), plain(x))
    assert_memory(model, memory_of(ours(method)))
    assert torch.equal(model[0].running_mean, torch.zeros(CHANNELS))


@pytest.mark.contract("SH-11")
@on_every_method
def test_statistics_of_tensorflow_keep_its_momentum_and_eps_and_start_the_memory(method):
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=0.01, eps=1e-3))
    model[0].running_mean.fill_(3.0)
    model[0].running_var.fill_(4.0)
    x = data_of_a()
    wanted = copy.deepcopy(model).eval()(x)
    ours(method, model)
    assert (model[0].momentum, model[0].eps) == (0.01, 1e-3)
    assert torch.equal(copy.deepcopy(model).eval()(x), wanted)
    assert_memory(model, seeded(method, torch.full((CHANNELS,), 3.0), torch.full((CHANNELS,), 4.0)))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: four buffers."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {"weight": 1.5, "bias": 0.3, "running_mean": 3.0, "running_var": 4.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, eps=1e-5)


def unfrozen(frozen):
    """The recipe of docs/migrate.md."""
    norm = nn.BatchNorm2d(len(frozen.weight))
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(frozen, name))
    return norm


@pytest.mark.contract("SH-12")
def test_a_frozen_norm_turned_back_starts_where_it_was_and_stays_near():
    frozen = FrozenBatchNorm2d(CHANNELS)
    model = nn.Sequential(unfrozen(frozen))
    report = convert(model)
    assert report.converted["0"].endswith("memory starts from the running statistics")
    x = data_of_a()
    assert torch.equal(model.eval()(x), frozen(x))
    model.train()
    plain = nn.Sequential(unfrozen(frozen))
    for _ in range(10):
        # one image, whose pixels are alike
        image = 3 + 1.4 * torch.randn(1, CHANNELS, 1, 1) + 1.4 * torch.randn(1, CHANNELS, 4, 4)
        model(image)
        plain(image)
    off, torchs = (
        float(((net[0].running_mean - frozen.running_mean) / 2).square().mean().sqrt())
        for net in (model, plain)
    )
    assert off < 0.1
    assert torchs > 3 * off


@pytest.mark.contract("SH-1")
@on_every_method
def test_a_layer_that_is_given_running_statistics_later_starts_a_memory_from_them(method):
    source = trained(stock(), data_of_b)
    layer = type(ours(method)[0])(CHANNELS, track_running_stats=False, **METHODS[method][1])
    plain = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    for norm in (layer, plain):
        norm(data_of_b())
        norm.track_running_stats = True
        norm.running_mean = source[0].running_mean.clone()
        norm.running_var = source[0].running_var.clone()
        norm.num_batches_tracked = torch.tensor(0)
    layer.train()
    assert bool(layer.memory.holds_anything(layer.state))
    for _ in range(2):
        x = data_of_b(2)
        layer(x)
        plain(x)
    assert int(layer.num_batches_tracked) == int(plain.num_batches_tracked) == 2


@pytest.mark.contract("SH-1")
@on_every_method
def test_a_trained_net_that_was_reset_starts_empty_again(method):
    model = trained(ours(method), data_of_a)
    model[0].reset_running_stats()
    x = data_of_b(2)
    torch.testing.assert_close(model(x), stock()(x))


def test_the_seed_of_a_loaded_net_is_that_of_the_converted_one():
    source = trained(stock(), data_of_b)
    assert_memory(ours("matched", copy.deepcopy(source)), seed_of("matched", source))
