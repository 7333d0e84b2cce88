"""Tools around a net: estimates without values, hooks on what is saved, loaders, other normalizations."""

import copy
import math

import pytest
import torch
from hands import (
    CHANNELS,
    assert_memory,
    assert_same_state,
    data_of_a,
    memory_of,
    on_every_method,
    ours,
    trained,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mbnorm import convert, diagnose, recalibrate, revert


def net():
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU())


@pytest.mark.contract("SH-19")
@on_every_method
def test_fake_tensors_go_through_all_that_a_net_does(method):
    with FakeTensorMode():
        model = ours(method, net())
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        for _ in range(2):
            model(x).sum().backward()
        model.eval()(x).sum().backward()
        model.train()
        model.load_state_dict(net().state_dict())
        model.load_state_dict(model.state_dict())
        assert model(x).shape == (2, CHANNELS, 6, 6)
        revert(model)
        assert isinstance(model(x), FakeTensor)


@pytest.mark.contract("SH-19")
@on_every_method
def test_a_real_state_is_loaded_into_a_fake_net(method):
    saved = trained(net(), lambda: torch.randn(2, 3, 8, 8), steps=3).state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = ours(method, net())
        model.load_state_dict(saved)
        model(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.contract("SH-19")
@on_every_method
def test_a_real_net_is_estimated_and_stays_as_it_was(method):
    model = trained(ours(method), data_of_a)
    expected, before = memory_of(model), copy.deepcopy(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = {name: mode.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    with mode:
        y = torch.func.functional_call(model, given, (torch.randn(2, CHANNELS, 4, 4),))
    assert isinstance(y, FakeTensor)
    assert_memory(model, expected)
    assert_same_state(model, before)


@pytest.mark.contract("SH-19")
@pytest.mark.parametrize("fake", [False, True])
@on_every_method
def test_one_value_a_channel_is_torchs_error_without_values(method, fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        model = ours(method)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.empty(1, CHANNELS, 1, 1))


@pytest.mark.contract("SH-20")
@on_every_method
def test_saved_tensors_that_may_be_changed(method):
    model = trained(ours(method), data_of_a)
    plain = copy.deepcopy(model)
    inputs = [data_of_a(2) for _ in range(2)]
    weights = torch.randn_like(inputs[0])

    def gradients(model, change):
        leaves = [x.clone().requires_grad_() for x in inputs]
        # of two forwards, the first one's state is written over by the second
        layers = [x * 1 for x in leaves]
        losses = [(model(x) * weights).sum() for x in layers]
        if change:
            with torch.no_grad():
                layers[0].zero_()
                model[0].weight.mul_(3)
        return torch.autograd.grad(sum(losses), leaves)

    expected = gradients(plain, change=False)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        found = gradients(model, change=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.contract("SH-20")
@pytest.mark.parametrize(
    "hooks",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        lambda: torch.autograd.detect_anomaly(check_nan=True),
    ],
    ids=["save_on_cpu", "hooks", "anomaly"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@on_every_method
def test_hooks_on_saved_tensors(method, hooks):
    model = trained(ours(method), data_of_a)
    plain = copy.deepcopy(model)
    x, other = (data_of_a(2).requires_grad_() for _ in range(2))
    other.data = x.data.clone()
    with hooks():
        model(x).square().sum().backward()
    plain(other).square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert_same_state(model, plain)


@pytest.mark.contract("SH-22")
def test_a_net_without_batch_norms_is_told_what_it_has():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm(8)
    )
    before = [type(module) for module in model]
    report = convert(model)
    assert str(report).startswith("0 converted, 0 skipped")
    (note,) = report.notes
    assert "no batch norm, but 2 InstanceNorm2d, 1 GroupNorm, 1 LayerNorm" in note
    assert 'MONAI: norm="batch"' in note
    assert [type(module) for module in model] == before
    with pytest.raises(ValueError, match="no batch norm, but 2 InstanceNorm2d"):
        diagnose(model, torch.randn(2, 2, 3, 9, 9))


@pytest.mark.contract("SH-22")
def test_a_net_without_any_normalization_is_told_so():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.ReLU())
    assert convert(model).notes == ["the model has no batch norm, nor any other normalization layer"]


@pytest.mark.contract("SH-22")
def test_a_net_with_batch_norms_is_not_told_of_others():
    assert convert(nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8))).notes == []
    skipped = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8))
    assert convert(skipped).notes == []


@pytest.mark.contract("SH-22")
def test_nets_of_monai_are_told_how_to_get_batch_norm():
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.SegResNet(spatial_dims=2, init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
    assert "GroupNorm" in convert(model).notes[0]
    # as the note says
    assert convert(nets.UNet(2, 1, 2, (4, 8), (2,), norm="batch")).converted


DICTIONARIES = pytest.mark.parametrize("run", [diagnose, recalibrate])


@pytest.mark.contract("SH-23")
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["bare", "wrapped"])
@DICTIONARIES
def test_batches_of_dictionaries_show_what_forward_would_take_them(run, wrap):
    model = wrap(net())
    batches = [{"name": "a", "image": torch.randn(2, 3, 8, 8), "label": torch.zeros(2)} for _ in range(3)]
    with pytest.raises(TypeError, match=r'forward=lambda model, batch: model\(batch\["image"\]\)') as error:
        run(model, batches)
    assert "name, image, label" in str(error.value)
    # and that works
    run(model, batches, forward=lambda model, batch: model(batch["image"]))


@pytest.mark.contract("SH-23")
@DICTIONARIES
def test_other_type_errors_stay_what_they_are(run):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, image):
            self.norm(image)
            raise TypeError("of the model's own")

    with pytest.raises(TypeError, match="of the model's own"):
        run(Takes(), [{"image": torch.randn(2, 3, 8, 8)}] * 3)


@pytest.mark.contract("SH-24")
@pytest.mark.parametrize("batches", ["one", "shuffled"])
def test_batches_that_are_the_same_are_said_to_be(batches):
    x = torch.randn(6, 3, 9, 9)
    model = trained(net(), lambda: torch.randn(6, 3, 9, 9), steps=3)
    given = [x] * 5 if batches == "one" else [x[torch.randperm(6)] for _ in range(5)]
    found = diagnose(model, given)
    assert found.layers[0].noise.effective_values == math.inf
    assert "the batches are the same" in found.reason
    assert "the batches are the same" in found.layers[0].reason
    assert found.recommendation in ("none", "recalibrate")
    assert "the batches are the same" in str(found)


@pytest.mark.contract("SH-24")
def test_few_batches_that_differ_are_not_said_to_be_the_same():
    found = diagnose(net(), [torch.randn(64, 3, 40, 40) for _ in range(2)])
    assert "the same" not in str(found)
    assert math.isfinite(found.layers[0].noise.effective_values)


@pytest.mark.contract("SH-19")
@on_every_method
def test_counters_of_operations_take_the_layers(method):
    from torch.utils.flop_counter import FlopCounterMode

    model, plain = ours(method, net()), net()
    counts = []
    for counted in (model, plain):
        with FlopCounterMode(display=False) as counter:
            counted(torch.randn(2, 3, 8, 8)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.contract("SH-19")
@on_every_method
def test_layers_without_values_save_move_and_copy(method):
    with torch.device("meta"):
        model = ours(method, net())
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        model.load_state_dict(model.state_dict())
    copy.deepcopy(model).half().to("meta")
    assert model.to_empty(device="cpu")[1].memory_mean.device.type == "cpu"
    on_cpu = trained(ours(method), data_of_a)
    assert all(t.is_meta for t in copy.deepcopy(on_cpu).to("meta").buffers())
