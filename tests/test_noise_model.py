"""The noise model of batch statistics, against batches that are normalized by themselves."""

import math

import pytest
import reference
import torch
from helpers import make_input, make_parameters
from torch import nn

from evidence.noise_layers import (
    NoisyBatchNorm,
    Size,
    SplitBatchNorm,
    draw_noise,
    independent,
    replace_norms,
    size_of,
)
from mbnorm.experiments.synthetic import GaussianField

EPS = 1e-5
CHANNELS = 4000


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batches(n, channels=CHANNELS):
    """A batch of n independent values in each of many channels: many batches at once."""
    return torch.randn(n, channels, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
def test_population_statistics_with_a_batchs_noise_give_what_batch_norm_gives(shape):
    x = make_input(shape, torch.float64)
    w, b = make_parameters(3, torch.float64)
    mB, vB, _ = reference.batch_statistics(x)
    mu, sigma2 = mB + 0.3, 1.7 * vB
    u, s2 = (mu - mB) / (sigma2 + EPS).sqrt(), (vB + EPS) / (sigma2 + EPS)
    found = reference.noisy(x, mu, sigma2, w, b, u, s2, EPS)
    torch.testing.assert_close(found, reference.normalize(x, mB, vB, w, b, EPS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_deviations_of_independent_values_are_distributed_as_the_model(n):
    mB, vB, _ = reference.batch_statistics(batches(n))
    u, s2 = reference.noise_of_values(n, CHANNELS)
    # the 0.1 % quantile of Kolmogorov and Smirnov's distance between two samples of this size
    largest = 1.95 * math.sqrt(2 / CHANNELS)
    for real, drawn in ((mB, u), (vB, s2)):
        both = torch.cat((real, drawn)).sort().values
        below = [
            torch.searchsorted(part.sort().values, both, right=True) / CHANNELS for part in (real, drawn)
        ]
        assert float((below[0] - below[1]).abs().max()) < largest


def test_the_deviations_of_mean_and_variance_are_independent_of_each_other():
    mB, vB, _ = reference.batch_statistics(batches(4))
    for power in (1, 2):
        both = torch.corrcoef(torch.stack((mB**power, vB)))[0, 1]
        assert abs(float(both)) < 4 / math.sqrt(CHANNELS)


def test_channels_that_are_correlated_have_correlated_noise():
    common = torch.randn(500, 4, 1, dtype=torch.float64)
    x = (common + torch.randn(500, 4, 50, dtype=torch.float64)) / math.sqrt(2)
    means = torch.stack([reference.batch_statistics(batch)[0] for batch in x])
    off_diagonal = (torch.corrcoef(means.T).sum() - 50) / (50 * 49)
    # the model draws each channel by itself
    assert float(off_diagonal) == pytest.approx(0.5, abs=0.1)


def test_correlated_values_have_the_mean_of_fewer_and_the_variance_of_others():
    field = GaussianField(50, (8, 8), correlation=0.7)
    x = torch.stack(list(field.batches(2, 400, 0))).double()
    worth = reference.effective_sample_size(x)
    assert worth == pytest.approx(field.effective_values(2), rel=0.05)
    variances = torch.stack([reference.batch_statistics(batch)[1] for batch in x])
    scatter = float((variances / variances.mean(0)).var(0).mean())
    # squares forget their correlation sooner than values: n_eff would make it more than twice as much
    assert scatter < 0.5 * 2 * (worth - 1) / worth**2
    assert scatter > 2 * 127 / 128**2


@pytest.mark.parametrize("n", [2.0, 5.5, 32.0])
def test_the_layers_draws_have_the_moments_of_the_model(n):
    u, s2 = draw_noise(independent(n), 100_000, torch.Generator().manual_seed(1))
    assert float(u.square().mean()) == pytest.approx(1 / n, rel=0.03)
    assert float(s2.mean()) == pytest.approx((n - 1) / n, rel=0.03)
    assert float(s2.var()) == pytest.approx(2 * (n - 1) / n**2, rel=0.05)


def test_a_single_value_has_no_variance():
    assert draw_noise(independent(1.0), 5, torch.Generator())[1].tolist() == [0.0] * 5


@pytest.mark.parametrize("images", [1, 2, 4])
def test_the_size_of_independent_images_is_their_number(images):
    values, freedom = size_of(torch.randn(512, 200), images)
    assert values == pytest.approx(images, rel=0.05)
    assert freedom == pytest.approx(images - 1, rel=0.1, abs=1e-6)


def test_the_size_of_correlated_pixels_is_that_of_the_field():
    field = GaussianField(50, (8, 8), correlation=0.7)
    (x,) = field.batches(800, 1, 0)
    assert size_of(x, 2).values == pytest.approx(field.effective_values(2), rel=0.05)


def test_constant_channels_leave_the_size_as_it_is():
    x = torch.randn(512, 200)
    assert size_of(torch.cat((x, torch.ones(512, 7)), 1), 2) == size_of(x, 2)


def noisy_layer(n, share=0.0):
    return NoisyBatchNorm(nn.BatchNorm1d(CHANNELS), lambda _: Size(n, n - 1), 3, share).train()


def test_the_layer_computes_the_references_formula():
    layer, x = noisy_layer(8.0).double(), 3 * batches(32) + 1
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    u, s2 = draw_noise(independent(8.0), CHANNELS, torch.Generator().manual_seed(3))
    mB, vB, _ = reference.batch_statistics(x)
    wanted = reference.noisy(x, mB, vB, layer.norm.weight, layer.norm.bias, u, s2 + EPS, EPS)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_an_image_in_its_own_statistics_is_normalized_with_one_other_value():
    layer, x = noisy_layer(1.0, share=0.5).double(), batches(32)
    u, _ = draw_noise(independent(1.0), CHANNELS, torch.Generator().manual_seed(3))
    mB, vB, _ = reference.batch_statistics(x)
    z = reference.normalize(x, mB, vB, None, None, EPS)
    pair = torch.stack((z[5], -u))
    mean, var, _ = reference.batch_statistics(pair)
    wanted = reference.normalize(pair, mean, var, None, None, EPS)[0]
    torch.testing.assert_close(layer(x)[5].detach(), wanted, rtol=1e-8, atol=1e-8)


def test_without_noise_and_in_eval_mode_the_layer_is_the_batch_norm():
    norm, x = nn.BatchNorm1d(5), torch.randn(8, 5)
    quiet = NoisyBatchNorm(norm, lambda _: None, 0)
    assert torch.equal(quiet(x), norm(x))
    noisy = NoisyBatchNorm(norm, lambda _: independent(2.0), 0).eval()
    assert torch.equal(noisy(x), norm.eval()(x))


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_parts_of_a_batch_are_normalized_by_themselves(shape):
    x = make_input(shape, torch.float64)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3).double()
    y = SplitBatchNorm(norm, 2).train()(x)
    for part, own in zip(y.split(2), x.split(2), strict=True):
        torch.testing.assert_close(part, norm(own))


def test_every_batch_norm_of_a_net_is_replaced_in_its_order():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
    numbers = []
    replace_norms(net, lambda norm, i: numbers.append((i, norm.num_features)) or nn.Identity())
    assert numbers == [(0, 2), (1, 3)]
    assert not any(isinstance(m, nn.BatchNorm1d) for m in net.modules())
