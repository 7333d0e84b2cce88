"""Fine-tuning a net at batch 2 that was trained at batch 32: where it starts and gets, what stays frozen.

The numbers beside the margins were measured with seeds 0, 1 and 2 of the pretrained net and all methods.
"""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm import DoubleForward, MomentumSchedule, convert, no_update

pytest.importorskip("sklearn")
from mbnorm.experiments.data import digits
from mbnorm.experiments.sampling import one_epoch

METHODS = ["momentum", "matched", "memorized"]
on_every_method = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(16)
        self.linear1 = nn.Linear(144, 64)
        self.bn3 = nn.BatchNorm1d(64)
        self.linear2 = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear2(torch.relu(self.bn3(self.linear1(x.flatten(1)))))


def norms(net):
    return [net.bn1, net.bn2, net.bn3]


def loss_of(net, images, classes):
    return F.cross_entropy(net(images), classes)


def batches_of(images, classes, m, seed):
    order = one_epoch("shuffled", classes, m, torch.Generator().manual_seed(seed))
    return list(zip(images[order], classes[order], strict=True))


@cache
@torch.enable_grad()
def _trained(seed):
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(4):
        for batch in batches_of(digits().train_inputs, digits().train_targets, 32, 100 * seed + epoch):
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            optimizer.step()
    return net


def pretrained(method=None, seed=0):
    net = copy.deepcopy(_trained(seed))
    if method is not None:
        convert(net, method, batch_size=2)
    return net


def to_train_on(steps):
    return batches_of(digits().train_inputs, digits().train_targets, 2, seed=5)[:steps]


def freeze(net):
    for norm in norms(net):
        norm.eval()


def fine_tune(net, optimizer, batches, prepare=lambda net: None):
    for batch in batches:
        net.train()
        prepare(net)
        optimizer.zero_grad()
        loss_of(net, *batch).backward()
        optimizer.step()


def sgd(net, lr=0.002):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def test_result(net):
    """Accuracy in percent and mean loss on the test digits."""
    net.eval()
    with torch.no_grad():
        output = net(digits().test_inputs)
    right = output.argmax(1) == digits().test_targets
    return 100 * right.float().mean().item(), F.cross_entropy(output, digits().test_targets).item()


test_result.__test__ = False


@pytest.mark.contract("FT-1", "CV-3")
@on_every_method
def test_a_converted_net_evaluates_bit_for_bit_as_before(method):
    images = digits().test_inputs
    with torch.no_grad():
        assert torch.equal(pretrained(method).eval()(images), pretrained().eval()(images))


def first_losses(net, forwards=20):
    """Mean loss of the first training forwards at batch 2, nothing learned in between."""
    batches = batches_of(digits().test_inputs, digits().test_targets, 2, seed=99)[:forwards]
    with torch.no_grad():
        return torch.stack([loss_of(net, *batch) for batch in batches]).mean().item()


@pytest.mark.contract("FT-1")
@pytest.mark.parametrize("seed", [0, 1, 2])
@on_every_method
def test_the_first_training_forwards_at_batch_2_lose_what_eval_mode_does(method, seed):
    # the nine differences: -0.012 to 0.002; with empty memories 0.055 to 0.39; plain batch norm 1.00 to 1.03
    near = 0.02
    in_eval_mode = first_losses(pretrained(seed=seed).eval())
    assert abs(first_losses(pretrained(method, seed)) - in_eval_mode) < near
    empty = pretrained(seed=seed)
    for norm in norms(empty):
        norm.reset_running_stats()
    convert(empty, method, batch_size=2)
    assert first_losses(empty) - in_eval_mode > 2 * near
    assert first_losses(pretrained(seed=seed)) - in_eval_mode > 25 * near


ON_LARGE_MAPS = {
    "by number": lambda layer: convert(layer, "matched", measured=False),
    "matched": lambda layer: convert(layer, "matched"),
    "memorized": lambda layer: convert(layer, "memorized", batch_size=1),
}


@cache
def distances_on_large_maps(seed, channels=16, forwards=300):
    """By method, the squared distance of each forward of one image whose pixels are alike from eval mode."""
    torch.manual_seed(seed)

    def images(count):
        return torch.randn(count, channels, 16, 16) + torch.randn(count, 1, 1, 1)

    trained = nn.BatchNorm2d(channels)
    for _ in range(100):
        trained(images(32))
    layers = {"batch norm": copy.deepcopy(trained)}
    for name, convert_it in ON_LARGE_MAPS.items():
        layers[name] = copy.deepcopy(trained)
        convert_it(layers[name])
    trained.eval()
    found = {name: [] for name in layers}
    with torch.no_grad():
        for _ in range(forwards):
            image = images(1)
            wanted = trained(image)
            for name, layer in layers.items():
                found[name].append((layer(image) - wanted).square().mean())
    return {name: torch.stack(squares) for name, squares in found.items()}


def share_of_batch_norms(method, seed, first, last):
    """Distance from eval mode in these forwards, in that of batch norm."""
    squares = distances_on_large_maps(seed)
    return (squares[method][first:last].mean() / squares["batch norm"][first:last].mean()).sqrt().item()


on_seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@pytest.mark.contract("FT-1")
@on_seeds
@pytest.mark.parametrize("method", ON_LARGE_MAPS)
def test_on_large_maps_a_converted_net_starts_where_it_was(method, seed):
    # the largest of the nine: 0.04
    assert share_of_batch_norms(method, seed, 0, 2) < 0.1


@pytest.mark.contract("FT-1")
@on_seeds
@pytest.mark.parametrize(
    # the largest of three seeds: 0.08 and 0.29, 0.05 and 0.09
    ("method", "early", "late"),
    [("matched", 0.1, 0.4), ("memorized", 0.1, 0.2)],
)
def test_on_large_maps_a_converted_net_stays_nearer_to_where_it_was(method, early, late, seed):
    assert share_of_batch_norms(method, seed, 2, 50) < early
    assert share_of_batch_norms(method, seed, 50, 300) < late


@pytest.mark.contract("FT-1")
@on_every_method
def test_real_batches_replace_the_seed(method):
    net = pretrained(method)
    shifted = [(images + 3.0, classes) for images, classes in to_train_on(200)]
    with torch.no_grad():
        for batch in shifted:
            loss_of(net, *batch)
        past = net.bn1.read(128, 2)
        wanted = torch.var_mean(net.conv1(torch.cat([images for images, _ in shifted])), (0, 2, 3))
    seed = pretrained().bn1.running_mean
    assert (past.mean - wanted[1]).abs().max() < 0.1 * (seed - wanted[1]).abs().max()


@cache
@torch.enable_grad()
def with_stock_norms(frozen):
    net = pretrained()
    fine_tune(net, sgd(net), to_train_on(300), freeze if frozen else lambda net: None)
    return test_result(net)


@pytest.mark.contract("FT-2")
@pytest.mark.parametrize("double_forward", [False, True])
@on_every_method
def test_300_steps_at_batch_2_end_where_frozen_statistics_do(method, double_forward):
    net = pretrained(method)
    optimizer = sgd(net)
    if double_forward:
        DoubleForward(net, optimizer)
    fine_tune(net, optimizer, to_train_on(300))
    accuracy, loss = test_result(net)
    # of 18 runs the worst is 0.38 points behind, 3 of 797 images; batch norm is 43 to 57 points behind
    assert accuracy > with_stock_norms(frozen=True)[0] - 1.0
    assert accuracy > with_stock_norms(frozen=False)[0] + 20
    # 0.015 below to 0.004 above the loss before the first step, 0.057 to 0.083
    assert loss < test_result(pretrained())[1] + 0.01


def by_eval(norm):
    norm.eval()


def by_eval_and_no_gradient(norm):
    norm.eval()
    norm.requires_grad_(False)


def by_momentum(norm):
    norm.momentum = 0


def by_not_tracking(norm):
    norm.track_running_stats = False


FREEZING = pytest.mark.parametrize(
    "freezing", [by_eval, by_eval_and_no_gradient, by_momentum, by_not_tracking], ids=lambda f: f.__name__
)


def state_of(norm):
    return {name: t.clone() for name, t in norm.named_buffers()}


def same(norm, state):
    return all(torch.equal(t, state[name]) for name, t in norm.named_buffers())


@pytest.mark.contract("FT-3")
@pytest.mark.parametrize("double_forward", [False, True])
@FREEZING
@on_every_method
def test_frozen_layers_stay_as_they_are_while_the_others_learn(method, freezing, double_forward):
    net = pretrained(method)
    frozen, learning = [net.bn1, net.bn3], net.bn2

    def prepare(net):
        for norm in frozen:
            freezing(norm)

    optimizer = sgd(net)
    if double_forward:
        DoubleForward(net, optimizer)
    before = [state_of(norm) for norm in frozen]
    weights = [norm.weight.detach().clone() for norm in frozen]
    running_mean = learning.running_mean.clone()
    fine_tune(net, optimizer, to_train_on(10), prepare)
    assert all(same(norm, state) for norm, state in zip(frozen, before, strict=True))
    kept = [torch.equal(norm.weight, weight) for norm, weight in zip(frozen, weights, strict=True)]
    assert kept == [freezing is by_eval_and_no_gradient] * 2
    assert not torch.equal(learning.running_mean, running_mean)


@pytest.mark.contract("FT-3")
@pytest.mark.parametrize("double_forward", [False, True])
@on_every_method
def test_no_update_freezes_whatever_is_inside(method, double_forward):
    net = pretrained(method)
    optimizer = sgd(net)
    if double_forward:
        DoubleForward(net, optimizer)
    before = [state_of(norm) for norm in norms(net)]
    with no_update(net):
        fine_tune(net, optimizer, to_train_on(5))
    assert all(same(norm, state) for norm, state in zip(norms(net), before, strict=True))


class FreezesItsNorms(Net):
    """As detectors do it: each call of train() leaves the norms in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@pytest.mark.contract("FT-3")
@on_every_method
def test_a_net_that_freezes_its_norms_in_train_learns_bit_for_bit_as_with_stock_norms(method):
    stock, net = pretrained(), pretrained(method)
    stock.__class__ = net.__class__ = FreezesItsNorms
    before = [state_of(norm) for norm in norms(net)]
    optimizer = sgd(net)
    DoubleForward(net, optimizer)
    fine_tune(net, optimizer, to_train_on(10))
    fine_tune(stock, sgd(stock), to_train_on(10))
    assert all(same(norm, state) for norm, state in zip(norms(net), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), stock.parameters(), strict=True))


@pytest.mark.contract("FT-3", "A2")
@pytest.mark.parametrize("order", [0, None])
def test_a_schedule_leaves_orders_in_the_momentum_alone(order):
    net = pretrained("momentum")
    net.bn1.momentum = order
    MomentumSchedule(net, 100, batch_size=2, schedule="constant")
    assert net.bn1.momentum == order
    assert net.bn2.momentum == pytest.approx(1 - 0.9 ** (2 / 32))


@pytest.mark.contract("FT-3")
@FREEZING
def test_the_schedule_moves_nothing_that_a_frozen_layer_reads_or_stores(freezing):
    net = pretrained("momentum")
    freezing(net.bn1)
    before = state_of(net.bn1)
    optimizer = sgd(net)
    MomentumSchedule(net, 10, batch_size=2).follow(optimizer)

    def prepare(net):
        freezing(net.bn1)

    fine_tune(net, optimizer, to_train_on(10), prepare)
    after = state_of(net.bn1)
    # the weight of the past is the schedule's, the rest is the layer's
    del before["history_weight"], after["history_weight"]
    assert all(torch.equal(t, before[name]) for name, t in after.items())


def groups_by_type(net):
    """As helpers of training libraries split off what no weight decay is for."""
    types = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return [name for name, m in net.named_modules() if isinstance(m, types)]


def groups_by_shape(net):
    return [name for name, p in net.named_parameters() if p.ndim <= 1 or name.endswith(".bias")]


@pytest.mark.contract("FT-5")
@pytest.mark.parametrize("helper", [groups_by_type, groups_by_shape])
@on_every_method
def test_weight_decay_helpers_find_the_parameters_of_our_norms(method, helper):
    assert helper(pretrained(method)) == helper(pretrained()) != []


@pytest.mark.contract("FT-5")
@on_every_method
def test_an_optimizer_built_before_conversion_keeps_the_norms_out_of_the_decay(method):
    net = pretrained()
    own = {id(p) for norm in norms(net) for p in norm.parameters()}
    groups = [
        {"params": [p for p in net.parameters() if id(p) in own], "weight_decay": 0.0},
        {"params": [p for p in net.parameters() if id(p) not in own], "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    convert(net, method, batch_size=2)
    before = copy.deepcopy(dict(net.named_parameters()))
    # no gradients but zeros: the decay alone moves parameters
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("bn"), name
