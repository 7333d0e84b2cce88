"""Each image's own statistics behind those of the batches."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mbnorm import MatchedBatchNorm2d, convert, revert
from mbnorm.per_image import PerImageNorm, groups_of


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4)
    )


def converted(**options):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16))
    return model, convert(model, per_image=True, **options)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (2, 1), (4, 2), (8, 4), (16, 8), (64, 8), (6, 3)])
def test_groups_have_two_channels_at_least(channels, groups):
    assert groups_of(channels) == groups


def test_maps_are_normalized_as_by_torchs_group_norm():
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(PerImageNorm(8, 16)(x), nn.GroupNorm(8, 16)(x))


def test_maps_of_one_position_are_scaled_and_shifted_alone():
    x, layer = torch.randn(2, 16, 1, 1), PerImageNorm(8, 16)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    expected = x * layer.weight.view(16, 1, 1) + layer.bias.view(16, 1, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("method", ["matched", "momentum", "memorized"])
def test_layers_of_maps_become_the_first_of_two(method):
    model, report = converted(method=method)
    for index in (1, 3):
        norm, behind = model[index]
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(behind, PerImageNorm)
        assert (behind.num_groups, behind.num_channels) == (8, 16)
    assert any("2 layers normalize each image" in note for note in report.notes)


def test_vectors_are_not_normalized_by_image():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    convert(model, per_image=True)
    assert isinstance(model[1], nn.BatchNorm1d)


def test_trained_layers_are_not_normalized_by_image():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model(torch.randn(2, 3, 6, 6))
    convert(model, per_image=True)
    assert isinstance(model[1], MatchedBatchNorm2d)


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    convert(model, per_image=True)
    assert model[0] is model[2]
    assert model[0][0] is norm


def test_converting_twice_changes_nothing():
    model, _ = converted()
    names = [name for name, _ in model.named_modules()]
    convert(model, per_image=True)
    assert [name for name, _ in model.named_modules()] == names


def test_the_output_is_that_of_the_two_layers():
    model, _ = converted()
    x = torch.randn(2, 16, 4, 4)
    pair = copy.deepcopy(model[1])
    torch.testing.assert_close(model[1](x), pair[1](pair[0](x)))


def test_revert_leaves_both_in_torchs_classes():
    model, _ = converted()
    model(torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    revert(model)
    assert type(model[1][0]) is nn.BatchNorm2d
    assert isinstance(model[1][1], nn.GroupNorm)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_its_parameters_are_where_those_of_the_layer_are():
    model = nn.Sequential(nn.BatchNorm2d(8, dtype=torch.float64), nn.ReLU())
    convert(model, per_image=True)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_model_that_is_the_layer_itself_has_no_place_for_another():
    norm = nn.BatchNorm2d(8)
    report = convert(norm, per_image=True)
    assert isinstance(norm, MatchedBatchNorm2d)
    assert any("0 layers normalize each image" in note for note in report.notes)


def test_scale_and_shift_move_behind():
    """As residual nets start: a group norm of zeros would multiply what follows without bound."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    parameters = model[0].weight, model[0].bias
    convert(model, per_image=True)
    norm, behind = model[0]
    assert norm.weight is norm.bias is None
    assert behind.weight is parameters[0]
    assert behind.bias is parameters[1]


def test_an_optimizer_built_before_trains_what_was_moved():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, per_image=True)
    model(torch.randn(2, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    assert (model[1][1].bias != 0).all()


def test_a_layer_whose_scale_is_computed_stays_as_it_is():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)
    report = convert(model, per_image=True)
    assert isinstance(model[0], MatchedBatchNorm2d)
    assert any("1 layers do not, since their scale or shift is computed" in note for note in report.notes)
    assert model(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)


def test_a_layer_without_a_shift_has_none_behind():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    model[0].register_parameter("bias", None)
    convert(model, per_image=True)
    assert model[0][1].bias is None
    assert model(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)


def test_modes_are_kept():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()).eval()
    convert(model, per_image=True)
    assert not any(module.training for module in model.modules())


def test_tracing_sees_a_layer():
    model, _ = converted()
    graph = torch.fx.symbolic_trace(model).graph
    assert "1.1" in [node.target for node in graph.nodes]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in its first use
def test_a_reverted_net_can_be_scripted():
    model, _ = converted()
    revert(model)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))


def stock():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16))
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    nn.init.uniform_(model[1].weight)
    return model


@pytest.mark.filterwarnings("ignore:the filters that were loaded are not centered")
@pytest.mark.parametrize("centered", [False, True])
def test_a_stock_checkpoint_loads_into_a_converted_net(centered):
    trained, (model, _) = stock().eval(), converted(center_filters=centered)
    with pytest.warns(UserWarning, match="per-image") as caught:
        model.load_state_dict(trained.state_dict())
    assert sum("without per-image normalization" in str(w.message) for w in caught) == 2
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), trained(x))
    assert "active=False" in repr(model[1][1])


@pytest.mark.filterwarnings("ignore:the checkpoint is of a net without per-image normalization")
def test_what_was_switched_off_becomes_one_layer_when_reverted():
    trained, (model, _) = stock().eval(), converted(center_filters=False)
    model.load_state_dict(trained.state_dict())
    revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert model.state_dict().keys() == trained.state_dict().keys()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), trained(x))


@pytest.mark.filterwarnings("ignore:the checkpoint is of a net without per-image normalization")
def test_a_checkpoint_of_its_own_switches_it_on_again():
    (own, _), (model, _) = converted(center_filters=False), converted(center_filters=False)
    model.load_state_dict(stock().state_dict())
    model.load_state_dict(own.state_dict())
    assert model[1][1].active


def test_copies_load_stock_checkpoints_too():
    trained, (model, _) = stock().eval(), converted(center_filters=False)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with pytest.warns(UserWarning, match="without per-image normalization"):
        model.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), trained(x))
