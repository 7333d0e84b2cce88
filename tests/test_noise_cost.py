"""What noise adds to the loss, in `diagnose` with a loss."""

import copy
import json
import math

import pytest
import torch
from test_diagnose import everything, on_every_method, same, trained
from torch import nn
from torch.nn import functional as F

from mbnorm import convert, diagnose
from mbnorm.noise_cost import BATCHES


def square(output, batch):
    return output.square().mean()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
    )


def inputs(count=40, m=2):
    return torch.randn(count, m, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(model, batches, noisy, part=1.0):
    """The loss of each batch, the layers of some indices having so large a part of the batch's noise."""
    model = copy.deepcopy(model).double().eval()
    x = batches.double().flatten(0, 1)
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean, layer.running_var = x.mean(0), x.var(0, correction=0)
        x = layer(x).detach()
    losses = []
    for batch in batches.double():
        y = batch
        for index, layer in enumerate(model):
            if index in noisy:
                mean = torch.lerp(layer.running_mean, y.mean(0), part)
                var = torch.lerp(layer.running_var, y.var(0, correction=0), part)
                y = F.batch_norm(y, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)
            else:
                y = layer(y)
        losses.append(float(y.detach().square().mean()))
    return torch.tensor(losses)


def test_what_a_layer_adds_is_the_loss_with_its_noise_alone_minus_that_without():
    # a first layer has the same inputs whatever the others do, so its statistics are exact
    model = nn.Sequential(*list(net())[:4])
    x = inputs(BATCHES)
    (found,) = diagnose(model, x, loss=square).layers
    differences = by_hand(model, x, {1}) - by_hand(model, x, set())
    assert found.cost.added == pytest.approx(float(differences.mean()), rel=1e-4)
    assert found.cost.error == pytest.approx(float(differences.std()) / math.sqrt(BATCHES), rel=1e-4)


def test_matched_leaves_the_part_of_the_noise_that_128_samples_have():
    model, x = nn.Sequential(*list(net())[:4]), inputs(BATCHES)
    (found,) = diagnose(model, x, loss=square).layers
    size = found.noise.effective_values
    part = math.sqrt(min(size, 2) / 128)
    differences = by_hand(model, x, {1}, part) - by_hand(model, x, set())
    assert found.cost.matched == pytest.approx(float(differences.mean()), rel=1e-3)


def test_a_layer_with_samples_enough_keeps_its_noise():
    (found,) = diagnose(nn.Sequential(nn.BatchNorm1d(4)), inputs(m=300), loss=square).layers
    assert found.cost.matched == found.cost.added


def test_all_layers_together_are_measured_too():
    model, x = net(), inputs()
    found = diagnose(model, x, loss=square)
    both = [layer.cost.added for layer in found.layers]
    assert found.cost.added != pytest.approx(sum(both), rel=1e-3)
    alone = diagnose(nn.Sequential(*list(model)[:4]), x, loss=square)
    assert alone.cost == alone.layers[0].cost


def test_the_loss_without_noise_is_that_with_the_statistics_of_all_batches():
    model, x = nn.Sequential(*list(net())[:4]), inputs(BATCHES)
    found = diagnose(model, x, loss=square)
    assert found.loss == pytest.approx(float(by_hand(model, x, set()).mean()), rel=1e-5)


def test_a_layer_with_a_memory_adds_what_train_mode_adds():
    # a history that weighs all but everything and is that of the data leaves no noise
    layer, x = nn.BatchNorm1d(4), inputs()
    layer.running_mean, layer.running_var = x.mean((0, 1)), x.var((0, 1), correction=0)
    model = nn.Sequential(layer, nn.Linear(4, 3))
    plain = diagnose(model, x, loss=square).layers[0].cost.added
    convert(model, "momentum", history_weight=0.99999)
    remembering = diagnose(model, x, loss=square).layers[0].cost.added
    assert abs(remembering) < 0.01 * abs(plain)


def test_the_first_batches_are_kept_and_the_loss_is_of_them():
    seen = []

    def loss(output, batch):
        seen.append(batch[1])
        return output.square().mean()

    batches = ((x, number) for number, x in enumerate(inputs(BATCHES + 8)))
    diagnose(net(), batches, loss=loss)
    # 2 layers: without noise, each and both with it, and the same with a part
    assert seen == list(range(BATCHES)) * (2 * 2 + 3)


def test_with_forward_the_loss_gets_what_it_returns():
    x = inputs()
    plain = diagnose(net(), x, loss=square)
    found = diagnose(
        net(), [{"x": b} for b in x], forward=lambda model, batch: {"out": model(batch["x"])},
        loss=lambda output, batch: output["out"].square().mean(),
    )  # fmt: skip
    assert found == plain


def test_without_a_loss_nothing_is_said_of_it():
    found = diagnose(net(), inputs())
    assert (found.loss, found.cost, found.layers[0].cost) == (None, None, None)
    assert "loss" not in str(found)


def test_a_frozen_layer_adds_nothing_and_is_left_out():
    model = trained("stock")
    model[1].eval()
    frozen, other = diagnose(model, inputs(), loss=square).layers
    assert frozen.cost is None
    assert other.cost is not None


def test_the_table_has_what_each_layer_adds_and_names_the_largest():
    found = diagnose(net(), inputs(), loss=square)
    text = str(found)
    most = max(found.layers, key=lambda layer: layer.cost.added)
    assert f"{most.cost.added:+.2g} ± {most.cost.error:.1g}" in text
    assert "loss added " in text
    assert "with matched " in text
    assert f"most by itself adds that of {most.name} ({most.cost.added:+.2g})" in text.splitlines()[-1]


def test_json_has_the_costs_by_name():
    found = diagnose(net(), inputs(), loss=square)
    record = json.loads(found.to_json())
    assert record["cost"] == found.cost._asdict()
    assert record["layers"][1]["cost"] == found.layers[1].cost._asdict()


def test_a_loss_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"expected a loss that is one number, got one of shape \(2, 3\)"):
        diagnose(net(), inputs(), loss=lambda output, batch: output)


@pytest.mark.parametrize("training", [True, False])
@on_every_method
def test_nothing_changes(method, training):
    model = trained(method).train(training)
    before = everything(model)
    diagnose(model, inputs(), loss=square)
    assert same(everything(model), before)


@on_every_method
def test_nothing_changes_if_the_loss_raises(method):
    model = trained(method)
    before = everything(model)

    def loss(output, batch):
        raise KeyError("no target")

    with pytest.raises(KeyError):
        diagnose(model, inputs(), loss=loss)
    assert same(everything(model), before)
