import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from mbnorm.experiments.data import digits
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.methods import (
    Frozen,
    Instance,
    after_training,
    batches_a_step,
    before_training,
    schedule_for,
    set_method,
)
from mbnorm.experiments.peers.batch_renorm import BatchRenorm, RenormSchedule
from mbnorm.experiments.peers.filters import Centered, Standardized
from mbnorm.experiments.peers.mabn import MABN
from mbnorm.experiments.peers.online import OnlineNorm
from mbnorm.experiments.training import initial_model, train

SETTING = Setting("mlp", 4, "shuffled", 0.025, 1)
CNN = replace(SETTING, model="cnn")


def net_of(method, setting=SETTING):
    return initial_model(Run(method, setting, 0))


def running_means(net):
    return [m.running_mean.clone() for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_layer_norm_is_over_channels_and_positions():
    norm = next(m for m in net_of("layer", CNN).modules() if isinstance(m, nn.GroupNorm))
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8, 3, 3)))


def test_instance_norm_is_torchs():
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(Instance(8)(x), nn.InstanceNorm2d(8, affine=True)(x))


@pytest.mark.parametrize("batch_size", [32, 100])
def test_instance_norm_cannot_train_an_mlp_and_the_run_says_so(batch_size):
    outcome = train(Run("instance", replace(SETTING, batch_size=batch_size), 0))
    assert outcome.status == "failed"
    assert outcome.error.startswith("Expected more than 1 spatial element")


def test_frozen_layers_start_with_the_statistics_of_the_training_images():
    net = net_of("frozen")
    before_training("frozen", net, digits().train_inputs)
    first = next(m for m in net.modules() if isinstance(m, Frozen))
    inputs = net[1](digits().train_inputs.flatten(1))
    torch.testing.assert_close(first.layer.running_mean, inputs.mean(0))
    assert net.training


def test_frozen_layers_never_change_their_statistics():
    net = net_of("frozen")
    before_training("frozen", net, digits().train_inputs)
    before = running_means(net)
    net.train()(digits().train_inputs[:8])
    assert all(torch.equal(a, b) for a, b in zip(before, running_means(net), strict=True))


def test_frozen_layers_train_their_weights():
    net = net_of("frozen")
    net(digits().train_inputs[:8]).square().mean().backward()
    assert all(m.layer.weight.grad is not None for m in net.modules() if isinstance(m, Frozen))


def test_recalibration_follows_training_and_keeps_the_weights():
    net = net_of("batch+recalibrate")
    weights = copy.deepcopy([p.data for p in net.parameters()])
    after_training("batch+recalibrate", net, digits().train_inputs)
    inputs = net[1](digits().train_inputs.flatten(1))
    torch.testing.assert_close(running_means(net)[0], inputs.mean(0))
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_other_methods_are_not_recalibrated():
    net = net_of("batch")
    after_training("batch", net, digits().train_inputs)
    assert not any(mean.any() for mean in running_means(net))


def test_recalibration_trains_the_same_net():
    plain, recalibrated = (
        train(Run(m, replace(CNN, batch_size=16), 0)) for m in ("batch", "batch+recalibrate")
    )
    assert plain.train_loss == recalibrated.train_loss
    assert plain.eval_mode_loss != recalibrated.eval_mode_loss


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 64), (2, 32), (5, 12), (64, 1), (128, 1)])
def test_accumulated_steps_take_the_samples_of_the_reference(batch_size, batches):
    assert batches_a_step("batch+accumulate", batch_size) == batches
    assert batches_a_step("batch", batch_size) == 1


def test_accumulation_at_the_reference_batch_size_is_batch_norm():
    setting = replace(SETTING, batch_size=64)
    plain, accumulated = (train(Run(m, setting, 0)) for m in ("batch", "batch+accumulate"))
    assert replace(plain, seconds=0) == replace(accumulated, seconds=0)


def test_accumulation_without_normalization_is_the_large_batch(monkeypatch):
    from mbnorm.experiments import training

    large = train(Run("none", Setting("mlp", 64, "shuffled", 0.1, 2), 0))
    monkeypatch.setattr(training, "batches_a_step", lambda *_: 2)
    small = train(Run("none", Setting("mlp", 32, "shuffled", 0.05, 2), 0))
    # an epoch is 15 batches of 64, or 31 of 32: the samples are the same ones but for a few
    assert small.eval_mode_loss == pytest.approx(large.eval_mode_loss, rel=0.05)


@pytest.mark.parametrize(
    ("method", "norm", "rule"),
    [
        ("mabn", MABN, Centered),
        ("batch+centered", nn.BatchNorm2d, Centered),
        ("group+ws", nn.GroupNorm, Standardized),
        ("online", OnlineNorm, None),
    ],
)
def test_peers_have_their_norms_and_their_filters(method, norm, rule):
    net = net_of(method, CNN)
    assert sum(type(m) is norm for m in net.modules()) == 9
    assert sum(type(m) is rule for m in net.modules()) == (9 if rule else 0)


def test_mabn_simulates_a_batch_of_32():
    layers = [m for m in net_of("mabn", replace(CNN, batch_size=2)).modules() if isinstance(m, MABN)]
    assert {layer.remembered for layer in layers} == {16}


def test_a_peer_that_a_net_does_not_take_is_a_failed_run_that_names_the_layer(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    monkeypatch.setattr("mbnorm.experiments.training.build", lambda name, data: net)
    outcome = train(Run("mabn", SETTING, 0))
    assert (outcome.status, outcome.error) == (
        "failed",
        "1: no convolution or linear layer feeds it directly",
    )


def test_renorm_layers_are_steered_by_their_schedule():
    net = net_of("renorm")
    schedule = schedule_for("renorm", net, 160, 4)
    assert isinstance(schedule, RenormSchedule)
    assert sum(isinstance(m, BatchRenorm) for m in net.modules()) == len(schedule.layers) == 2


@pytest.mark.parametrize("method", ["momentum", "memorized", "matched"])
def test_double_forward_changes_each_method(method):
    plain, refreshed = (train(Run(m, replace(SETTING, batch_size=16), 0)) for m in (method, f"{method}+df"))
    assert plain.eval_mode_loss != refreshed.eval_mode_loss


@pytest.mark.parametrize(
    "method",
    ["renorm", "frozen", "layer", "batch+accumulate", "batch+centered", "mabn", "online", "group+ws"],
)
def test_peers_learn(method):
    outcome = train(Run(method, Setting("mlp", 8, "shuffled", 0.0125, 4), 0))
    assert outcome.status == "ok"
    assert outcome.accuracy > 85


def trained_net():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.Flatten())
    for _ in range(5):
        net(torch.randn(4, 1, 8, 8) * 2 + 1)
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
        net[1].bias.normal_()
    return net


@pytest.mark.parametrize("method", ["frozen", "renorm", "momentum", "memorized", "matched"])
def test_a_trained_net_evaluates_as_before_with_what_keeps_its_statistics(method):
    net, x = trained_net(), torch.randn(4, 1, 8, 8)
    expected = net.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_method(net, method, 2, torch.Size([1, 8, 8]))
    torch.testing.assert_close(net.eval()(x), expected)


def test_a_frozen_trained_net_keeps_its_statistics():
    net = trained_net()
    mean = net[1].running_mean.clone()
    set_method(net, "frozen", 2, torch.Size([1, 8, 8]))
    before_training("frozen", net, torch.randn(100, 1, 8, 8))
    net.train()(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(net[1].layer.running_mean, mean, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["none", "group", "layer", "instance", "mabn", "online", "renorm"])
def test_what_replaces_a_layer_takes_over_scale_and_shift(method):
    net = trained_net()
    bias = net[1].bias.clone()
    set_method(net, method, 2, torch.Size([1, 8, 8]))
    torch.testing.assert_close(net[1].bias, bias, rtol=0, atol=0)
