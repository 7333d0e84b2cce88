import copy

import pytest
import torch
from helpers import make_input
from torch import nn
from torch.nn.utils import prune

from mbnorm import (
    MatchedBatchNorm1d,
    MatchedBatchNorm2d,
    MatchedBatchNorm3d,
    MemorizedBatchNorm1d,
    MemorizedBatchNorm2d,
    MemorizedBatchNorm3d,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
    convert,
    revert,
)

# "momentum" alone has no weight, and says so
pytestmark = pytest.mark.filterwarnings("ignore:Momentum layers train with history_weight=0")

METHODS = ["momentum", "memorized", "matched"]
on_every_method = pytest.mark.parametrize("method", METHODS)
STOCK = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
OURS = {
    "momentum": [MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d],
    "matched": [MatchedBatchNorm1d, MatchedBatchNorm2d, MatchedBatchNorm3d],
    "memorized": [MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d],
}


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = norm

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))) + x


def net(trained=True):
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3, eps=1e-3)
    model = nn.Sequential(Block(shared), Block(shared), Block(nn.BatchNorm2d(3, momentum=0.3, affine=False)))
    if trained:
        for step in range(20):
            model(make_input((8, 3, 5, 5), torch.float32, seed=step))
    return model


def images(seed=99, m=4):
    return make_input((m, 3, 5, 5), torch.float32, seed=seed)


@on_every_method
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_batch_norm_becomes_its_counterpart(method, rank):
    layer = STOCK[rank](4)
    report = convert(layer, method)
    assert type(layer) is OURS[method][rank]
    change = f"{STOCK[rank].__name__} -> {OURS[method][rank].__name__}"
    assert report.converted == {"(the model itself)": f"{change}, memory starts empty"}
    revert(layer)
    assert type(layer) is STOCK[rank]


@on_every_method
def test_eval_output_is_bit_identical_after_conversion_and_back(method):
    model = net().eval()
    want = model(images())
    convert(model, method)
    assert torch.equal(model(images()), want)
    revert(model)
    assert torch.equal(model(images()), want)


@on_every_method
def test_revert_after_training_keeps_the_eval_output(method):
    model = net()
    convert(model, method)
    for step in range(5):
        model(images(step, m=2))
    want = model.eval()(images())
    revert(model)
    assert torch.equal(model(images()), want)


@pytest.mark.contract("ST-2")
@on_every_method
def test_reverted_models_have_the_stock_keys_and_load_strictly(method):
    stock = net()
    model = copy.deepcopy(stock)
    convert(model, method)
    model(images())
    revert(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict(), strict=True)


@on_every_method
def test_reverted_layers_are_as_good_as_new(method):
    layer = nn.BatchNorm2d(3)
    convert(layer, method)
    revert(layer)
    assert vars(layer).keys() == vars(nn.BatchNorm2d(3)).keys()
    assert repr(layer) == repr(nn.BatchNorm2d(3))
    fresh = nn.BatchNorm2d(3)
    assert torch.equal(layer(images()), fresh(images()))
    assert torch.equal(layer.running_var, fresh.running_var)


@on_every_method
def test_parameters_options_and_modes_are_kept(method):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].norm.weight.requires_grad_(False)
    model[2].norm.eval()
    parameters = list(model.parameters())
    before = {n: (m.eps, m.training, m.affine) for n, m in model.named_modules() if hasattr(m, "affine")}
    convert(model, method)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.param_groups[0]["params"] == parameters
    assert not model[0].norm.weight.requires_grad
    after = {n: (m.eps, m.training, m.affine) for n, m in model.named_modules() if hasattr(m, "affine")}
    assert after == before
    assert [model[0].norm.momentum, model[2].norm.momentum] == [0.1, 0.3]


@on_every_method
def test_shared_modules_stay_shared_and_are_reported_once(method):
    model = net()
    report = convert(model, method)
    assert model[0].norm is model[1].norm
    assert list(report.converted) == ["0.norm = 1.norm", "2.norm"]


@on_every_method
def test_hooks_still_fire(method):
    model = net()
    calls = []
    model[2].norm.register_forward_hook(lambda *_: calls.append(1))
    convert(model, method)
    model(images())
    revert(model)
    model(images())
    assert calls == [1, 1]


@on_every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(method, dtype):
    layer = nn.BatchNorm2d(3).to(dtype)
    convert(layer, method)
    assert layer.weight.dtype == dtype
    x = images().to(dtype)
    layer(x)
    want = layer.eval()(x)
    revert(layer)
    assert torch.equal(layer(x), want)


@on_every_method
def test_a_root_norm_is_converted_in_place(method):
    layer = nn.BatchNorm1d(3)
    report = convert(layer, method)
    assert list(report.converted) == ["(the model itself)"]


@on_every_method
def test_a_trained_norm_starts_where_it_was(method):
    layer = nn.BatchNorm1d(3).double()
    for step in range(200):
        layer(make_input((16, 3), torch.float64, seed=step))
    x = make_input((2, 3), torch.float64, seed=999)
    want = copy.deepcopy(layer).eval()(x)
    convert(layer, method, batch_size=2)
    # the batch of 2 has a weight of its own, 1/64 to 1/16: close, not equal
    near = {"momentum": 0.2, "matched": 0.2, "memorized": 0.2}[method]
    plain = nn.BatchNorm1d(3).double()(x)
    assert (layer(x) - want).abs().max() < near
    assert (plain - want).abs().max() > 2 * near


def test_a_seeded_memory_is_full_of_the_running_statistics():
    layer = nn.BatchNorm1d(3)
    layer(torch.randn(8, 3))
    convert(layer, "memorized", memory_size=5)
    past = layer.read(2, 2)
    torch.testing.assert_close(past.mean, layer.running_mean)
    assert past.batch_weight.item() == pytest.approx(1 / 5)


@on_every_method
def test_an_untrained_norm_starts_empty(method):
    layer = nn.BatchNorm1d(3)
    convert(layer, method)
    assert layer.read(2, 2).batch_weight == 1


@pytest.mark.parametrize(("m", "size"), [(1, 128), (2, 64), (3, 43), (128, 1), (500, 1)])
def test_memory_size_follows_the_batch_size(m, size):
    layer = nn.BatchNorm1d(3)
    convert(layer, "memorized", batch_size=m)
    assert layer.memory_size == size


def test_memory_size_without_a_batch_size():
    layer = nn.BatchNorm1d(3)
    convert(layer, "memorized")
    assert layer.memory_size == 64


@pytest.mark.parametrize(("m", "weight"), [(2, 1 - 2 / 32), (8, 0.75), (32, 0.0), (64, 0.0)])
def test_momentum_follows_the_batch_size(m, weight):
    layer = nn.BatchNorm1d(3)
    convert(layer, "momentum", batch_size=m)
    assert float(layer.history_weight) == weight
    assert layer.momentum == pytest.approx(1 - 0.9 ** (m / 32))


@pytest.mark.parametrize("method", [[], ["matched"]], ids=["nothing", "matched"])
def test_matched_is_the_default_and_needs_nothing(method):
    layer = nn.BatchNorm1d(3)
    convert(layer, *method)
    assert (layer.matched_batch_size, layer.measured, layer.gradient) == (128, True, "remembered")
    assert (layer.early_weight, layer.momentum) == (8, 0.1)


def test_ranks_that_are_late_have_the_exact_gradient_unless_one_asks_for_another():
    layer = nn.BatchNorm1d(3)
    convert(layer, process_group="world", sync="late")
    assert (layer.gradient, MatchedBatchNorm1d(3, process_group="world", sync="late").gradient) == (
        "exact",
        "exact",
    )
    with pytest.raises(ValueError, match='sync="late" needs gradient="exact"'):
        convert(nn.BatchNorm1d(3), process_group="world", sync="late", gradient="remembered")


def test_options_win_over_the_batch_size():
    layer = nn.BatchNorm1d(3)
    convert(layer, "memorized", batch_size=2, memory_size=10, decay=0.9)
    assert (layer.memory_size, layer.decay) == (10, 0.9)


def test_a_seeded_momentum_model_is_warned_of_the_papers_schedule():
    assert "plain batch normalization" in str(convert(net(), "momentum", batch_size=2))
    assert convert(net(trained=False), "momentum", batch_size=2).notes == []


def test_one_trained_norm_is_enough_for_the_warning():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0](torch.randn(4, 3))
    assert len(convert(model, "momentum", batch_size=2).notes) == 1


def test_a_momentum_model_without_a_weight_is_told_of_in_the_report():
    assert "plain batch normalization until a MomentumSchedule" in str(
        convert(net(trained=False), "momentum")
    )
    assert convert(net(trained=False), "momentum", history_weight=0.5).notes == []


@on_every_method
@pytest.mark.parametrize("change", [{"track_running_stats": False}, {"running_mean": None}], ids=str)
def test_a_norm_that_lost_its_statistics_later_is_left_alone(method, change):
    layer = nn.BatchNorm1d(3)
    for name, value in change.items():
        setattr(layer, name, value)
    report = convert(layer, method)
    assert type(layer) is nn.BatchNorm1d
    assert list(report.skipped) == ["(the model itself)"]


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision, detectron2 and transformers."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))


@on_every_method
def test_a_norm_without_a_counter_gets_one(method):
    net = nn.Sequential(nn.BatchNorm1d(4))
    net[0].num_batches_tracked = None
    convert(net, method, batch_size=2)
    net(torch.randn(2, 4))
    assert int(net[0].num_batches_tracked) == 1


@on_every_method
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (FrozenBatchNorm2d(3), "FrozenBatchNorm2d is not a torch BatchNorm: build the net with those"),
        (NormWithActivation(3), "NormWithActivation is a subclass that may do more"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d has no channels yet"),
        (nn.SyncBatchNorm(3), "SyncBatchNorm shares statistics"),
        (nn.BatchNorm2d(3, track_running_stats=False), "track_running_stats=False"),
    ],
    ids=["frozen", "subclass", "lazy", "sync", "untracked"],
)
def test_what_is_left_alone_is_named_with_the_reason(method, layer, words):
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    kind = type(layer)
    report = convert(model, method)
    assert type(model[0]) is kind
    assert words in report.skipped["0"]
    assert list(report.converted) == ["1"]
    assert f"0: skipped, {report.skipped['0']}" in str(report)


@on_every_method
def test_other_norms_are_not_touched(method):
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    report = convert(model, method)
    assert (report.converted, report.skipped) == ({}, {})


@on_every_method
def test_converting_twice_changes_nothing(method):
    model = net()
    convert(model, method)
    model(images())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    report = convert(model, method)
    assert report.converted == {}
    assert all("already a" in why for why in report.skipped.values())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_another_method_needs_a_revert_first():
    layer = nn.BatchNorm2d(3)
    convert(layer, "memorized")
    assert "with other options: revert it first" in next(iter(convert(layer, "momentum").skipped.values()))


def test_revert_says_what_it_did_and_passes_over_all_others():
    class Louder(MomentumBatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(3), Louder(3), MemorizedBatchNorm3d(3), MomentumBatchNorm1d(3))
    assert str(revert(model)) == (
        "2 converted, 1 skipped\n"
        "  2: MemorizedBatchNorm3d -> BatchNorm3d\n"
        "  3: MomentumBatchNorm1d -> BatchNorm1d\n"
        "  1: skipped, Louder is a subclass that may do more than normalize"
    )


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_a_norm_with_statistics_that_are_not_finite_starts_empty(buffer):
    model = net()
    model[0].norm.get_buffer(buffer)[1] = torch.nan
    report = convert(model, "matched")
    assert report.converted["0.norm = 1.norm"].endswith("empty: the running statistics are not finite")
    assert [bool(model[i].norm.memory_filled) for i in (0, 2)] == [False, True]


def test_a_conversion_for_a_batch_size_is_not_told_to_use_a_schedule(recwarn):
    layer = nn.BatchNorm1d(3)
    convert(layer, "momentum", batch_size=64)
    layer(torch.randn(4, 3))
    assert list(recwarn) == []


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "group"}, ValueError, r"one of \('matched', 'momentum', 'memorized'\), got 'group'"),
        ({"method": "memorized", "batch_size": "4"}, TypeError, "batch_size must be a number, got '4'"),
        ({"method": "memorized", "batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"method": "memorized", "decay": 2.0}, ValueError, "decay must be in"),
        ({"method": "memorized", "matched_batch_size": 3}, TypeError, "no option 'matched_batch_size'"),
        (
            {"method": "memorized", "momentum": 0.05},
            TypeError,
            "'momentum'; it has memory_size, memory_values,",
        ),
        ({"method": "matched", "eps": 1e-3}, TypeError, "no option 'eps'"),
        ({"method": "matched", "history_weight": 0.5}, TypeError, "no option 'history_weight'"),
    ],
)
def test_wrong_arguments_convert_nothing(arguments, error, words):
    model = net()
    with pytest.raises(error, match=words):
        convert(model, **arguments)
    assert type(model[0].norm) is nn.BatchNorm2d
    assert vars(model[0].norm).keys() == vars(nn.BatchNorm2d(3)).keys()


@pytest.mark.contract("ST-1")
@on_every_method
def test_stock_checkpoints_load_strictly_into_a_converted_model(method):
    stock, model = net(), net(trained=False)
    convert(model, method, center_filters=False)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(model.eval()(images()), stock.eval()(images()))
    torch.testing.assert_close(model[0].norm.read(8, 8).mean, stock[0].norm.running_mean)


@on_every_method
def test_meta_models_are_converted(method):
    with torch.device("meta"):
        model = net(trained=False)
    report = convert(model, method, center_filters=False)
    assert len(report.converted) == 2
    assert model[0].norm.memory_mean.is_meta


@on_every_method
def test_pruned_half_norms_are_reverted_whole(method):
    layer = nn.BatchNorm2d(3).half()
    convert(layer, method)
    prune.l1_unstructured(layer, "weight", 1)
    layer(images().half()).float().sum().backward()
    revert(layer)
    assert torch.isfinite(layer.eval()(images().half())).all()
    assert layer.weight_orig.grad.dtype == layer.weight_orig.dtype == torch.float32


def test_orders_in_the_momentum_are_kept_and_other_values_come_back():
    frozen, other = nn.BatchNorm1d(3, momentum=0.0), nn.BatchNorm1d(3, momentum=0.01)
    for layer in (frozen, other):
        convert(layer, "momentum", batch_size=2)
    assert frozen.momentum == 0
    revert(other)
    assert other.momentum == 0.01


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("momentum", {"batch_size": 2}), ("momentum", {"batch_size": 2}), True),
        (("momentum", {"batch_size": 2}), ("matched", {}), False),
        (("matched", {}), ("matched", {}), True),
        (("matched", {}), ("matched", {"matched_batch_size": 64}), False),
        (("matched", {}), ("matched", {"measured": False}), False),
        (("matched", {}), ("momentum", {"batch_size": 2}), False),
    ],
)
def test_converting_again_with_other_options_says_so(first, second, same):
    layer = nn.BatchNorm1d(3)
    convert(layer, first[0], **first[1])
    why = convert(layer, second[0], **second[1]).skipped["(the model itself)"]
    kind = type(layer).__name__
    assert why == f"already a {kind}" + ("" if same else " with other options: revert it first")


def test_modules_inside_a_norm_keep_their_dtype_when_it_is_reverted():
    layer = nn.BatchNorm1d(3).half()
    layer.adapter = nn.Linear(3, 3).half()
    convert(layer, "matched")
    revert(layer)
    assert (layer.weight.dtype, layer.adapter.weight.dtype) == (torch.float32, torch.float16)
