"""Centered filters: which layers have them, and that they stay so."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mbnorm import DoubleForward, MatchedBatchNorm2d, center_filters, convert, revert
from mbnorm.centered import CENTERED, CenteredConv2d, is_centered
from mbnorm.experiments import nets
from mbnorm.feeders import _in_forward, _in_graph, _left_as_it_is, feeders


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.BatchNorm1d(6),
    )


def centered():
    model = net()
    center_filters(model)
    return model


def sums(layer):
    return layer.weight.detach().double().flatten(1).sum(1).abs().max().item()


def step(model, optimizer, x=None):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8) if x is None else x).square().mean().backward()
    optimizer.step()


class Lion(torch.optim.Optimizer):
    """The sign of a moving average, as in Chen et al. 2023: steps that are all of one size."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    p.mul_(1 - 0.1 * group["lr"]).add_(torch.sign(0.9 * average + 0.1 * p.grad), alpha=-0.01)
                    average.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Lion": Lion,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_filters_stay_centered_under_every_optimizer(optimizer):
    model = centered()
    steps = OPTIMIZERS[optimizer](model.parameters())
    before = [model[i].weight.clone() for i in (0, 3, 8)]
    for _ in range(4):
        step(model, steps)
    for index, then in zip((0, 3, 8), before, strict=True):
        assert sums(model[index]) < 1e-5
        assert not torch.equal(model[index].weight, then)


def test_layers_in_front_of_batch_norms_are_centered_and_no_others():
    model = nn.Sequential(net(), nn.Linear(6, 4))
    report = center_filters(model)
    assert list(report.converted) == ["0.0", "0.3", "0.8"]
    assert report.converted["0.3"] == "Conv2d -> CenteredConv2d, feeds 0.4"
    assert type(model[1]) is nn.Linear
    assert sums(model[0][0]) < 1e-5


@pytest.mark.parametrize("make", [net, lambda: nets.small_resnet(8, 3, 10), lambda: nets.unet2d(3, 2)])
def test_an_example_shows_what_tracing_shows(make):
    model = make()
    names = {module: name for name, module in model.named_modules()}
    traced = _in_graph(model).sorted()
    with _left_as_it_is(model):
        shown = _in_forward(model, torch.randn(2, 3, 16, 16)).sorted()
    assert {names[layer] for layer in traced.raw} == {names[layer] for layer in shown.raw}
    by_trace, by_example = (
        {names[layer]: [names[norm] for norm in norms] for layer, norms in found.norms_of.items()}
        for found in (traced, shown)
    )
    assert by_trace == by_example
    assert traced.without == shown.without == {}


class Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_an_example_changes_nothing_in_the_net():
    model = Untraceable(*net())
    before = copy.deepcopy(model.state_dict())
    model.train()
    model[4].eval()
    center_filters(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not model[4].training
    same = [torch.equal(t, before[name]) for name, t in model.state_dict().items() if "weight" not in name]
    assert all(same)


class Branching(nn.Module):
    """Asks for a value, so that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > -1e9 else x


def test_a_net_that_cannot_be_traced_needs_an_example():
    report = center_filters(Branching())
    assert not report.converted
    assert "cannot trace Branching" in report.skipped["norm"]
    assert "an input of the net as example=" in report.skipped["norm"]
    report = center_filters(Branching(), torch.randn(2, 3, 8, 8))
    assert list(report.converted) == ["conv"]


class Parts(nn.Module):
    """Branches around blocks, one of which branches itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)))
        self.third = Branching()

    def forward(self, x):
        return self.third(self.second(self.first(x))) if x.sum() > -1e9 else x


def test_the_parts_of_a_net_are_traced_where_it_cannot_be():
    report = center_filters(Parts())
    assert list(report.converted) == ["first.0", "second.1.0"]
    assert list(report.skipped) == ["second.0", "third.norm"]
    assert all("as example=" in why for why in report.skipped.values())


def test_what_cannot_be_traced_is_converted_without_centered_filters():
    model = Branching()
    report = convert(model)
    assert any("no centered filters for norm: torch.fx cannot trace Branching" in n for n in report.notes)
    assert isinstance(model.norm, MatchedBatchNorm2d)


class Wired(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.of_sum, self.of_shared, self.unused = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        shared = self.b(x)
        return self.of_sum(x + self.a(x)) + self.of_shared(shared) + self.c(shared)


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 4, 4)])
def test_what_is_ambiguous_is_left_alone_and_named(example):
    report = center_filters(Wired(), example)
    assert report.converted == {}
    assert report.skipped == {
        "of_sum": "no convolution or linear layer feeds it directly",
        "of_shared": "the layer that feeds it feeds something else, too",
        "unused": "no call of it is seen in a forward",
    }


def test_depthwise_filters_and_linears_of_one_input_are_left_alone_and_named():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8))
    report = center_filters(model)
    assert report.skipped == {"0": "each of its filters has one input channel"}
    linear = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8))
    assert center_filters(linear).skipped == {"0": "each of its filters has one input channel"}


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (1, 1)])
def test_single_weights_are_never_centered_alone(kernel, stride):
    model = nn.Sequential(nn.ConvTranspose2d(1, 8, kernel, stride=stride), nn.BatchNorm2d(8))
    assert center_filters(model).converted == {}
    assert model[0].weight.abs().min() > 0


class Tied(nn.Module):
    """Uses the weight of its first layer again, by another layer or by itself."""

    def __init__(self, by_layer):
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.by_layer = by_layer
        if by_layer:
            self.out.weight = self.first.weight

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.out(x) if self.by_layer else nn.functional.linear(x, self.first.weight)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_weight_with_another_use_is_left_alone(by_layer):
    model = Tied(by_layer)
    before = model.first.weight.clone()
    assert center_filters(model).converted == {}
    assert torch.equal(model.first.weight, before)


def test_a_frozen_weight_is_left_alone():
    model = net()
    model[0].weight.requires_grad_(False)
    report = center_filters(model)
    assert report.skipped == {"0": "its weight is frozen"}
    assert list(report.converted) == ["3", "8"]


def test_what_is_computed_or_flattened_later_ends_it_with_a_warning():
    model = centered()
    prune.l1_unstructured(model[0], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="centered no longer"):
        step(model, optimizer)
    flat = centered()
    x = torch.randn(4, 3, 8, 8)
    flat(x).square().mean().backward()
    flat[0].weight = nn.Parameter(flat[0].weight.detach().flatten())
    flat[0].weight.grad = torch.ones_like(flat[0].weight)
    with pytest.warns(UserWarning, match="centered no longer"):
        torch.optim.SGD(flat.parameters(), 0.1).step()


def test_copies_in_one_thread_while_another_steps():
    model = centered()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ThreadPoolExecutor(2) as pool:
        copies = pool.submit(lambda: [copy.deepcopy(model[0]) for _ in range(300)])
        for _ in range(30):
            step(model, optimizer)
        assert len(copies.result()) == 300


def test_a_grey_image_is_one_channel_of_many_weights():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    assert list(center_filters(model).converted) == ["0"]
    assert sums(model[0]) < 1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_filters_do_not_see_a_constant_in_front_of_them(stride, groups):
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 2, stride=stride, groups=groups, bias=False), nn.BatchNorm2d(6)
    )
    assert list(center_filters(model).converted) == ["0"]
    y = model[0](torch.ones(1, 4, 5, 5))
    inner = y if stride == 2 else y[..., 1:-1, 1:-1]
    assert inner.abs().max() < 1e-6
    assert is_centered(model[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_filters_do_not_see_a_constant_in_front_of_them(groups):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups, bias=False), nn.BatchNorm2d(6))
    center_filters(model)
    assert model[0](torch.ones(1, 4, 5, 5)).abs().max() < 1e-6


@pytest.mark.parametrize("stock", CENTERED)
def test_every_kind_is_centered_and_released(stock):
    dimensions = next((d for d in (1, 2, 3) if f"{d}d" in stock.__name__), 0)
    layer = stock(4, 4, 2) if dimensions else stock(4, 4)
    norm = getattr(nn, f"BatchNorm{max(dimensions, 1)}d")(4)
    model = nn.Sequential(layer, norm)
    center_filters(model)
    assert type(model[0]) is CENTERED[stock]
    assert isinstance(model[0], stock)
    assert is_centered(model[0])
    x = torch.randn(3, 4, *[5] * dimensions)
    expected = model.eval()(x)
    report = revert(model)
    assert report.converted == {"0": f"Centered{stock.__name__} -> {stock.__name__}"}
    assert type(model[0]) is stock
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_reverted_filters_are_free():
    model = centered()
    revert(model)
    step(model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert sums(model[0]) > 1


def test_filters_of_a_trained_norm_are_refused():
    model = net()
    model(torch.randn(4, 3, 8, 8))
    before = model[0].weight.clone()
    report = center_filters(model)
    assert report.converted == {}
    assert "trained batch norm" in report.skipped["0"]
    assert torch.equal(model[0].weight, before)


def test_centering_twice_changes_nothing():
    model = centered()
    assert center_filters(model).skipped["0"] == "already a CenteredConv2d"


@pytest.mark.parametrize(
    "change", [lambda m: parametrizations.weight_norm(m), lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
def test_weights_that_are_computed_are_left_alone(change):
    model = net()
    change(model[0])
    report = center_filters(model)
    assert list(report.converted) == ["3", "8"]
    assert list(report.skipped) == ["0"]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_centered(way):
    model = way(centered())
    assert isinstance(model[0], CenteredConv2d)
    step(model, torch.optim.Adam(model.parameters(), 0.1))
    assert sums(model[0]) < 1e-5


def test_a_replaced_parameter_is_centered_after_its_first_step():
    model = centered()
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert sums(model[0]) < 1e-5


def test_weights_do_not_change_between_forward_and_backward():
    """Nor where an optimizer steps that has them and no gradient of them."""
    model, other = centered(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1)
    loss = model(torch.randn(4, 3, 8, 8)).square().mean()
    before, version = model[0].weight.clone(), model[0].weight._version
    other(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    assert model[0].weight._version == version
    assert torch.equal(model[0].weight, before)
    loss.backward()


def test_a_centered_state_dict_loads_and_stays_centered():
    model, other = centered(), centered()
    other.load_state_dict(model.state_dict())
    assert isinstance(other[0], CenteredConv2d)
    other.load_state_dict({name: t.bfloat16() for name, t in model.state_dict().items()})
    assert isinstance(other[0], CenteredConv2d)


def test_filters_that_are_not_centered_end_it_as_they_are_loaded():
    model, stock = centered(), net()
    with pytest.warns(UserWarning, match="not centered: they are kept as they are"):
        model.load_state_dict(stock.state_dict())
    assert type(model[0]) is nn.Conv2d
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=0, atol=0)


def test_keys_and_parameters_are_those_of_the_stock_net():
    model = net()
    parameters = list(model.parameters())
    center_filters(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == net().state_dict().keys()


def test_a_layer_without_values_is_taken_as_it_is():
    with torch.device("meta"):
        model = net()
    center_filters(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model[1].reset_running_stats()
    model[4].reset_running_stats()
    model[9].reset_running_stats()
    step(model, torch.optim.SGD(model.parameters(), 0.01))
    assert sums(model[0]) < 1e-4


@pytest.mark.parametrize(
    ("method", "options", "centers"),
    [
        ("matched", {}, ["0", "3", "8"]),
        ("matched", {"center_filters": False}, []),
        ("momentum", {"batch_size": 2}, []),
        ("memorized", {"memory_size": 4}, []),
        ("momentum", {"batch_size": 2, "center_filters": True}, ["0", "3", "8"]),
    ],
    ids=str,
)
def test_convert_centers_filters_with_matched_and_where_it_is_asked_to(method, options, centers):
    model = net()
    report = convert(model, method, **options)
    assert {"1", "4", "9", *centers} == report.converted.keys()
    assert all((sums(model[int(name)]) < 1e-5) == (name in centers) for name in ("0", "3", "8"))


def test_convert_leaves_the_filters_of_a_net_alone_in_which_a_batch_norm_is_trained():
    model = net()
    model[1].running_mean.add_(1)
    before = [p.clone() for p in model.parameters()]
    report = convert(model)
    assert {"1", "4", "9"} == report.converted.keys()
    assert all(map(torch.equal, model.parameters(), before))


def test_converts_report_notes_what_has_no_centered_filters():
    report = convert(Wired())
    assert report.skipped == {}
    note = "no centered filters for of_sum: no convolution or linear layer feeds it directly"
    assert note in report.notes


def test_converts_report_names_a_few_and_counts_the_rest():
    pairs = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))]
    (note,) = convert(nn.Sequential(*pairs)).notes
    assert note == "no centered filters for 0, 2, 4, 6 and 2 more: each of its filters has one input channel"


def test_first_layers_are_those_that_no_matrix_stands_before():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b, self.c = nn.BatchNorm1d(4), *(nn.Linear(i, 4) for i in (4, 4, 8))
            self.of_a, self.of_b, self.of_c = (nn.BatchNorm1d(4) for _ in range(3))

        def forward(self, x):
            x = torch.relu(self.norm(x)) * 2
            y = self.of_b(self.b(self.of_a(self.a(x)).relu()))
            return self.of_c(self.c(torch.cat((x, y), 1)))

    for example in (None, torch.randn(3, 4)):
        traced = Net()
        report = convert(traced, example=example)
        assert {"b", "c"} == {name for name in report.converted if len(name) == 1}
        assert (
            "no centered filters for a: it is a first layer, and the sum of its inputs may count"
            in report.notes
        )
    with _left_as_it_is(traced):
        shown = _in_forward(traced, torch.randn(3, 4)).sorted()
    assert shown.raw == {traced.a}
    assert all(p.requires_grad for p in traced.parameters())


@pytest.mark.parametrize(
    ("first", "centers"),
    [
        (nn.Linear(3, 4), False),
        (nn.Conv1d(3, 4, 1), False),
        (nn.Conv2d(3, 4, 1), False),
        (nn.ConvTranspose2d(3, 4, 1), False),
        (nn.Conv1d(3, 4, 3), True),
        (nn.Conv2d(1, 4, 3), True),
        (nn.Conv2d(3, 4, (1, 3)), True),
        (nn.ConvTranspose2d(3, 4, 2), True),
    ],
    ids=str,
)
def test_first_layers_of_one_position_are_left_alone_unless_asked_for(first, centers):
    norm = nn.BatchNorm2d(4) if first.weight.dim() == 4 else nn.BatchNorm1d(4)
    model = nn.Sequential(first, norm)
    assert ("0" in convert(copy.deepcopy(model)).converted) == centers
    assert "0" in convert(model, center_filters=True).converted


def test_an_example_that_does_not_fit_converts_nothing():
    model = Branching()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="channels"):
        convert(model, example=torch.randn(2, 5, 8, 8))
    assert type(model.norm) is nn.BatchNorm2d
    assert model.training
    assert all(torch.equal(weights[name], found) for name, found in model.state_dict().items())


@pytest.mark.parametrize("centers", [None, True], ids=["by default", "all"])
def test_the_sum_of_the_inputs_is_learned_unless_all_filters_are_centered(centers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    convert(model, center_filters=centers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        x = torch.randn(8, 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        optimizer.step()
    x = torch.randn(1000, 2)
    accuracy = (model.eval()(x).argmax(1) == (x.sum(1) > 0)).float().mean()
    assert accuracy < 0.6 if centers else accuracy > 0.9


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, lambda c: nn.BatchNorm2d(c, track_running_stats=False)])
def test_convert_centers_nothing_in_front_of_what_it_does_not_convert(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), norm(4))
    weights = model[2].weight.clone()
    convert(model, center_filters=True)
    assert torch.equal(model[2].weight, weights)


def test_converting_again_centers_nothing():
    model = net()
    convert(model, center_filters=False)
    assert convert(model).converted == {}
    assert type(model[3]) is nn.Conv2d


def test_lazy_nets_and_layers_without_a_weight_are_left_alone():
    class Quantized(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            del self.weight

        def forward(self, x):
            return x

    partly = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LazyConv2d(4, 3))
    assert {"1", "2"} == convert(partly).converted.keys()
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    assert "no channels yet" in convert(lazy).skipped["1"]
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Quantized(), nn.BatchNorm1d(4))
    assert convert(other).converted.keys() == {"3"}


def test_a_parametrized_weight_is_not_computed():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), conv, nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    convert(model)
    assert all(
        torch.equal(before[name], conv_state)
        for name, conv_state in model.state_dict().items()
        if name in before
    )


def test_a_layer_of_two_parts_that_feeds_something_else_in_one_is_left_alone():
    shared = nn.Conv2d(3, 3, 1)

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), shared, nn.BatchNorm2d(3))
            self.b = nn.Sequential(shared, nn.ReLU())

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = Untraceable()
    convert(model)
    assert type(shared) is nn.Conv2d


def test_output_sizes_are_passed_on():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)
    )
    convert(model)
    assert type(model[2]) is not nn.ConvTranspose2d
    y = model[2](torch.randn(1, 4, 4, 4), output_size=(10, 10))
    assert y.shape == (1, 4, 10, 10)


def test_a_second_forward_that_fails_leaves_the_next_step_centered():
    model = centered()
    convert(model, "memorized", memory_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    double_forward = DoubleForward(model, optimizer)
    x = torch.randn(2, 3, 8, 8)
    model(x).square().sum().backward()
    handle = model[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    double_forward.remove()
    model(x).square().sum().backward()
    optimizer.step()
    assert sums(model[0]) < 1e-4


def test_a_load_of_other_layers_leaves_it_centered():
    model = centered()
    with torch.no_grad():
        model[0].weight.add_(1)
    model.load_state_dict({"1.weight": model[1].weight.detach().clone()}, strict=False)
    assert type(model[0]) is CenteredConv2d


class Careless(nn.Module):
    """Keeps what it saw, counts its calls, changes its weights, and draws numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.calls, self.all = 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.last = x
        self.all.append(x)
        self.calls += 1
        self.count += 1
        with torch.no_grad():
            for parameter in self.stem.parameters():
                parameter.mul_(0.9)
        return self.norm(self.conv(self.stem(x))) + torch.rand(1) * random.random() * np.random.rand()


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 4, 4)])
def test_a_search_for_filters_leaves_the_net_and_the_random_numbers_alone(example):
    model, hooked = Careless(), []
    model.register_forward_hook(lambda *_: hooked.append(1))
    before, weights = set(vars(model)), model.stem.weight.clone()
    drawn = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    feeders(model, example)
    if example is not None:
        _restored_after(model, example)
    assert (set(vars(model)), model.calls, model.all, hooked) == (before, 0, [], [])
    assert (float(model.count), len(model._forward_hooks)) == (0.0, 1)
    assert torch.equal(model.stem.weight, weights)
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert (np.random.get_state()[1] == drawn[2]).all()


def _restored_after(model, example):
    """A forward with an example, as a net that cannot be traced gets it."""
    with _left_as_it_is(model):
        _in_forward(model, example)


def test_new_weights_are_centered():
    model = centered()
    model[0].reset_parameters()
    assert sums(model[0]) < 1e-5


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_torch_fx_takes_them_as_leaves(kind):
    size = () if kind is nn.Linear else (3,)
    norm = nn.BatchNorm1d(4) if kind is nn.Linear else nn.BatchNorm2d(4)
    model = nn.Sequential(kind(3, 4, *size), norm)
    center_filters(model)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_a_second_forward_after_a_step_sees_centered_filters():
    model = centered()
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "memorized", memory_size=4)
    DoubleForward(model, optimizer)
    model[0].register_forward_hook(lambda layer, *_: seen.append(float(sums(layer))))
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert len(seen) == 6
    assert max(seen) < 1e-5


def test_only_the_layers_of_the_stepped_optimizer_are_looked_at():
    one, two = centered(), centered()
    with torch.no_grad():
        two[0].weight.add_(1.0)
    two[0].weight.grad = torch.zeros_like(two[0].weight)
    step(one, torch.optim.SGD(one.parameters(), 0.1))
    assert sums(two[0]) > 1
