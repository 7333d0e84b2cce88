"""Each image's own statistics behind those of the batches."""

import copy

import pytest
import torch
from torch import nn

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


def test_maps_of_one_position_are_left_as_they_are():
    x = torch.randn(2, 16, 1, 1)
    assert PerImageNorm(8, 16)(x) is x


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
