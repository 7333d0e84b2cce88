"""Peers against their published rules, written down in float64 sample by sample and channel by channel."""

import copy

import pytest
import torch
from helpers import gradients, make_input, make_parameters, relative_error
from torch import nn
from torch.nn.utils import parametrize

from mbnorm.experiments.peers import mabn
from mbnorm.experiments.peers.filters import Centered, Standardized, center, standardize
from mbnorm.experiments.peers.mabn import MABN
from mbnorm.experiments.peers.online import OnlineNorm
from mbnorm.feeders import feeders

SHAPES = [(4, 5), (2, 5, 7), (2, 5, 4, 3), (2, 5, 3, 4, 3)]
on_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def with_parameters(layer, channels):
    weight, bias = make_parameters(channels, torch.float64)
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def cotangent(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def assert_close(got, want):
    for g, w in zip(got, want, strict=True):
        assert relative_error(g.detach(), w.detach()) < 1e-11


def step_of(layer, x, dy):
    """Return y and the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y, *gradients(y, (x, layer.weight, layer.bias), dy))


class WrittenMABN:
    """The paper's formulas with the constants of its authors' code, channel by channel."""

    def __init__(self, channels, k, eps=1e-5):
        self.k, self.eps, self.step = k, eps, 0
        self.squares, self.products = [[] for _ in range(channels)], [[] for _ in range(channels)]
        self.running = [1.0] * channels

    def __call__(self, x, dy, weight, bias):
        self.step += 1
        alone = self.step <= max(self.k, 100)
        y, dx = torch.empty_like(x), torch.empty_like(x)
        dw, db = torch.empty_like(weight), torch.empty_like(bias)
        for c in range(x.shape[1]):
            self.squares[c].append((x[:, c] ** 2).mean())
            s2 = self.squares[c][-1] if alone else sum(self.squares[c][-self.k :]) / self.k
            z = x[:, c] / (s2 + self.eps) ** 0.5
            ratio = ((s2 + self.eps) / (self.running[c] + self.eps)) ** 0.5
            r = 1.0 if self.step <= 1000 else min(max(float(ratio), 1 / 5), 5.0)
            y[:, c] = weight[c] * r * z + bias[c]
            self.running[c] = 0.98 * self.running[c] + 0.02 * s2
            g = dy[:, c] * weight[c] * r
            self.products[c].append((g * z).mean())
            product = self.products[c][-1] if alone else sum(self.products[c][-self.k :]) / self.k
            dx[:, c] = (g - z * product) / (s2 + self.eps) ** 0.5
            dw[c], db[c] = (dy[:, c] * r * z).sum(), dy[:, c].sum()
        return y, dx, dw, db

    def evaluated(self, x, weight, bias):
        parts = [
            weight[c] * x[:, c] / (self.running[c] + self.eps) ** 0.5 + bias[c] for c in range(x.shape[1])
        ]
        return torch.stack(parts, 1)


@on_every_shape
def test_mabn_is_its_paper_s_over_the_end_of_its_warm_up(shape):
    layer = with_parameters(MABN(5, batch_size=8), 5)
    written = WrittenMABN(5, k=4)
    for step in range(1, 110):
        x, dy = make_input(shape, torch.float64, seed=step) * (1 + step % 3), cotangent(shape, step)
        want = written(x, dy, layer.weight.detach(), layer.bias.detach())
        assert_close(step_of(layer, x, dy), want)


def test_mabn_corrects_by_its_running_mean_square_after_1000_steps():
    shape = (2, 5, 3)
    layer = with_parameters(MABN(5, batch_size=16), 5)
    written = WrittenMABN(5, k=2)
    for step in range(1, 1010):
        # what is large in the end is corrected up to the bound
        x, dy = (
            make_input(shape, torch.float64, seed=step) * (20 if step > 1000 else 1),
            cotangent(shape, step),
        )
        want = written(x, dy, layer.weight.detach(), layer.bias.detach())
        got = step_of(layer, x, dy)
        if step > 990:
            assert_close(got, want)
    torch.testing.assert_close(layer.running_square, torch.stack([r.detach() for r in written.running]))


def test_mabn_s_correction_is_bounded_and_reached():
    layer = MABN(1, batch_size=32).double()
    layer.steps.fill_(mabn.UNCORRECTED)
    x = cotangent((8, 1), 0)
    normalized = x / (x.square().mean() + layer.eps).sqrt()
    layer.running_square.fill_(1e-9)
    torch.testing.assert_close(layer(x), 5 * normalized)
    layer.running_square.fill_(1e9)
    torch.testing.assert_close(layer(x), normalized / 5)


def test_mabn_in_eval_mode_normalizes_with_its_running_mean_square_and_changes_nothing():
    layer = with_parameters(MABN(5, batch_size=8), 5)
    written = WrittenMABN(5, k=4)
    for step in range(5):
        x, dy = make_input((4, 5, 3), torch.float64, seed=step), cotangent((4, 5, 3), step)
        written(x, dy, layer.weight.detach(), layer.bias.detach())
        step_of(layer, x, dy)
    before = copy.deepcopy(layer.state_dict())
    x = make_input((4, 5, 3), torch.float64, seed=9)
    want = written.evaluated(x, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(layer.eval()(x), want)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(("batch_size", "remembered"), [(1, 32), (2, 16), (3, 10), (32, 1), (64, 1)])
def test_mabn_remembers_as_many_batches_as_make_32_samples(batch_size, remembered):
    assert MABN(3, batch_size).squares.shape == MABN(3, batch_size).products.shape == (remembered, 3)


def test_mabn_goes_on_from_a_checkpoint():
    def steps(layer, first, last):
        for step in range(first, last):
            out = step_of(layer, make_input((2, 5, 3), torch.float64, seed=step), cotangent((2, 5, 3), step))
        return out

    whole = with_parameters(MABN(5, batch_size=8), 5)
    want = steps(whole, 0, 120)
    stopped = with_parameters(MABN(5, batch_size=8), 5)
    steps(stopped, 0, 103)
    resumed = MABN(5, batch_size=8).double()
    resumed.load_state_dict(stopped.state_dict())
    assert_close(steps(resumed, 103, 120), want)


class WrittenOnline:
    """The paper's algorithm, one sample and channel after the other; the guard by autograd."""

    def __init__(self, channels, eps=1e-5):
        self.eps = eps
        self.mu, self.var = torch.zeros(channels).double(), torch.ones(channels).double()
        self.u, self.v = torch.zeros(channels).double(), torch.zeros(channels).double()

    def guarded(self, normalized, weight, bias):
        outputs = []
        for sample in normalized:
            y = torch.stack([weight[c] * sample[c] + bias[c] for c in range(len(weight))])
            outputs.append(y / ((y**2).sum() / y.numel() + self.eps) ** 0.5)
        return torch.stack(outputs)

    def __call__(self, x, dy, weight, bias):
        af, ab = 0.999, 0.99
        normalized, scales = torch.empty_like(x), torch.empty(x.shape[:2], dtype=x.dtype)
        for n in range(len(x)):
            for c in range(x.shape[1]):
                values = x[n, c]
                s = (self.var[c] + self.eps) ** 0.5
                normalized[n, c], scales[n, c] = (values - self.mu[c]) / s, s
                mean = values.sum() / values.numel()
                var = ((values - mean) ** 2).sum() / values.numel()
                d = mean - self.mu[c]
                self.var[c] = af * self.var[c] + (1 - af) * var + af * (1 - af) * d**2
                self.mu[c] = self.mu[c] + (1 - af) * d
        leaves = [t.detach().clone().requires_grad_() for t in (normalized, weight, bias)]
        y = self.guarded(*leaves)
        dnormalized, dw, db = torch.autograd.grad(y, leaves, dy)
        dx = torch.empty_like(x)
        for n in range(len(x)):
            for c in range(x.shape[1]):
                g = dnormalized[n, c] - (1 - ab) * self.v[c] * normalized[n, c]
                self.v[c] += (g * normalized[n, c]).mean()
                dx[n, c] = g / scales[n, c] - (1 - ab) * self.u[c]
                self.u[c] += dx[n, c].mean()
        return y, dx, dw, db


@on_every_shape
def test_online_normalization_is_its_paper_s_over_many_steps(shape):
    layer, written = with_parameters(OnlineNorm(5), 5), WrittenOnline(5)
    for step in range(30):
        x, dy = make_input(shape, torch.float64, seed=step), cotangent(shape, step)
        want = written(x, dy, layer.weight.detach(), layer.bias.detach())
        assert_close(step_of(layer, x, dy), want)
    state = (layer.running_mean, layer.running_var, layer.mean_control, layer.scale_control)
    assert_close(state, (written.mu, written.var, written.u, written.v))


def test_online_normalization_in_eval_mode_is_guarded_and_changes_nothing():
    layer, written = with_parameters(OnlineNorm(5), 5), WrittenOnline(5)
    for step in range(20):
        x, dy = make_input((2, 5, 3), torch.float64, seed=step), cotangent((2, 5, 3), step)
        written(x, dy, layer.weight.detach(), layer.bias.detach())
        step_of(layer, x, dy)
    before = copy.deepcopy(layer.state_dict())
    x = make_input((2, 5, 3), torch.float64, seed=99)
    normalized = (x - written.mu[:, None]) / (written.var[:, None] + written.eps).sqrt()
    torch.testing.assert_close(layer.eval()(x), written.guarded(normalized, layer.weight, layer.bias))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_online_normalization_of_a_batch_is_that_of_its_samples_one_by_one():
    whole, single = with_parameters(OnlineNorm(5), 5), with_parameters(OnlineNorm(5), 5)
    x, dy = make_input((4, 5, 3), torch.float64), cotangent((4, 5, 3), 0)
    parts = [step_of(single, x[n : n + 1], dy[n : n + 1]) for n in range(4)]
    y, dx, dw, db = step_of(whole, x, dy)
    want = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    assert_close((y, dx, dw, db), (*want, sum(p[2] for p in parts), sum(p[3] for p in parts)))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 2), (6, 4, 3, 2, 3)], ids=str)
@pytest.mark.parametrize("rule", ["centered", "standardized"])
def test_filters_are_changed_one_by_one(shape, rule):
    weight = cotangent(shape, 0).requires_grad_()
    filters = []
    for each in weight:
        difference = each - each.sum() / each.numel()
        sd = ((difference**2).sum() / each.numel() + 1e-5) ** 0.5
        filters.append(difference if rule == "centered" else difference / sd)
    want = torch.stack(filters)
    got = (Centered() if rule == "centered" else Standardized())(weight)
    dy = cotangent(shape, 1)
    assert_close((got, *gradients(got, (weight,), dy)), (want, *gradients(want, (weight,), dy)))


class Branches(nn.Module):
    """Two layers feed norms, one does not; modules are not in the order of the forward."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3)])

    def forward(self, x):
        return self.head(self.norms[0](self.convs[0](self.norms[1](self.convs[1](x)).relu())))


def test_feeders_are_found_whatever_the_order_of_the_modules():
    net = Branches()
    before = copy.deepcopy(net.state_dict())
    assert set(feeders(net).norms_of) == set(net.convs)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.second(self.norm(self.first(x))))


def test_a_norm_that_is_called_twice_has_two_feeders():
    net = Shared()
    assert feeders(net).norms_of == {net.first: [net.norm], net.second: [net.norm]}


def after_an_activation():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4))


def first_of_all():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def after_an_identity():
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Identity(), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("net", "name"), [(after_an_activation, 2), (first_of_all, 0), (after_an_identity, 2)]
)
def test_a_norm_that_no_such_layer_feeds_is_named_and_the_net_is_left_alone(net, name):
    model = net()
    with pytest.raises(ValueError, match=f"^{name}: no convolution or linear layer feeds it directly$"):
        center(model, (3, 8, 8))
    assert not any(parametrize.is_parametrized(layer) for layer in model)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model)


def test_a_norm_that_is_not_called_is_named():
    net = Shared()
    net.spare = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=r"^spare: no call of it is seen in a forward$"):
        standardize(net, (3,))


def test_transposed_filters_are_refused():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"^0: the published rule has no transposed convolutions$"):
        standardize(net, (3, 8, 8))


def test_filters_of_one_weight_are_refused():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"^1: filters of one weight cannot be centered$"):
        center(net, (4, 8, 8))


def test_layers_that_feed_no_norm_keep_their_filters():
    net = Branches()
    center(net, (3, 8, 8))
    assert parametrize.is_parametrized(net.convs[1])
    assert not parametrize.is_parametrized(net.head)


def test_training_keeps_filters_centered():
    net = Branches()
    center(net, (3, 8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        net(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for conv in net.convs:
        torch.testing.assert_close(conv.weight.sum((1, 2, 3)), torch.zeros(4))
        assert conv.weight.norm() > 0.1
