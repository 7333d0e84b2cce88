import copy

import pytest
import torch
from helpers import gradients, make_input, make_parameters, relative_error
from torch import nn

from mbnorm.experiments.peers.batch_renorm import BatchRenorm, RenormSchedule

SHAPES = [(6, 5), (4, 5, 7), (3, 5, 4, 6), (2, 5, 3, 4, 3)]
BOUNDS = [(1.0, 0.0), (1.1, 0.2), (3.0, 5.0)]


def layer_for(shape, r_max, d_max, momentum=0.01):
    layer = BatchRenorm(shape[1], momentum=momentum).double()
    layer.r_max, layer.d_max = r_max, d_max
    weight, bias = make_parameters(shape[1], torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        layer.running_mean.copy_(torch.randn(shape[1], generator=generator))
        layer.running_std.copy_(0.5 + torch.rand(shape[1], generator=generator))
    return layer


def written_down(x, layer):
    """Algorithm 1 of the paper, channel by channel, from the state of a layer; also its next state."""
    outputs, means, stds = [], [], []
    for c in range(x.shape[1]):
        values = x[:, c]
        mu_b = values.sum() / values.numel()
        sigma_b = (layer.eps + ((values - mu_b) ** 2).sum() / values.numel()) ** 0.5
        mu, sigma = layer.running_mean[c].item(), layer.running_std[c].item()
        r = min(max(sigma_b.item() / sigma, 1 / layer.r_max), layer.r_max)
        d = min(max((mu_b.item() - mu) / sigma, -layer.d_max), layer.d_max)
        outputs.append(layer.weight[c] * ((values - mu_b) / sigma_b * r + d) + layer.bias[c])
        means.append(mu + layer.momentum * (mu_b.item() - mu))
        stds.append(sigma + layer.momentum * (sigma_b.item() - sigma))
    return torch.stack(outputs, 1), torch.tensor(means).double(), torch.tensor(stds).double()


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_the_papers(shape, bounds):
    layer = layer_for(shape, *bounds)
    x = make_input(shape, torch.float64).requires_grad_()
    leaves = (x, layer.weight, layer.bias)
    want, *_ = written_down(x, layer)
    got = layer(x)
    # the numbers behind x would be in the null space of its gradient
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for g, w in zip(
        (got, *gradients(got, leaves, cotangent)), (want, *gradients(want, leaves, cotangent)), strict=True
    ):
        assert relative_error(g.detach(), w.detach()) < 1e-12


def test_averages_move_towards_each_batch():
    layer = layer_for((4, 5, 7), 3.0, 5.0, momentum=0.3)
    for seed in range(4):
        x = make_input((4, 5, 7), torch.float64, seed=seed)
        _, mean, std = written_down(x, layer)
        layer(x)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_std, std)


def test_eval_mode_normalizes_with_the_averages_and_changes_nothing():
    layer = layer_for((3, 5, 4, 6), 3.0, 5.0).eval()
    x = make_input((3, 5, 4, 6), torch.float64)
    before = copy.deepcopy(layer.state_dict())
    mean, std, weight, bias = (
        t.view(-1, 1, 1) for t in (layer.running_mean, layer.running_std, layer.weight, layer.bias)
    )
    torch.testing.assert_close(layer(x), weight * (x - mean) / std + bias)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_within_wide_bounds_train_mode_gives_the_values_of_eval_mode():
    layer = layer_for((6, 5), 1e6, 1e6)
    x = make_input((6, 5), torch.float64)
    want = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), want)


def test_a_new_layer_trains_as_batch_norm():
    x = make_input((6, 5), torch.float64)
    torch.testing.assert_close(BatchRenorm(5).double()(x), nn.BatchNorm1d(5).double()(x))


def test_a_single_value_per_channel_is_refused():
    with pytest.raises(ValueError, match=r"more than one value per channel to train on, got shape \(1, 5\)"):
        BatchRenorm(5)(torch.randn(1, 5))


@pytest.mark.parametrize(
    ("steps", "r_max", "d_max"),
    [(0, 1, 0), (5, 1, 0), (15, 1 + 2 * 10 / 35, 2.5), (25, 1 + 2 * 20 / 35, 5), (40, 3, 5), (160, 3, 5)],
)
def test_the_bounds_follow_the_papers_schedule(steps, r_max, d_max):
    net = nn.Sequential(nn.Linear(3, 4), BatchRenorm(4))
    schedule = RenormSchedule(net, 160)
    for _ in range(steps):
        schedule.step()
    assert (net[1].r_max, net[1].d_max) == pytest.approx((r_max, d_max))
