import math

import pytest
import torch

from mbnorm.experiments.synthetic import GaussianField

BATCHES, CHANNELS = 400, 40
# of a variance over so many batches and independent channels
SPREAD = math.sqrt(2 / (CHANNELS * (BATCHES - 1)))
FIELDS = {
    "vectors": ({}, 3, 3.0),
    "white noise": ({"sides": (4, 5)}, 2, 40.0),
    # by hand: two neighbors have a mean of variance (1 + r) / 2
    "pairs that attract": ({"sides": (2,), "correlation": 0.5}, 3, 3 / 0.75),
    "pairs that repel": ({"sides": (2,), "correlation": -0.5}, 3, 3 / 0.25),
    "squares": ({"sides": (2, 2), "correlation": 0.5}, 3, 3 / 0.75**2),
    "cubes": ({"sides": (2, 2, 2), "correlation": 0.5}, 1, 1 / 0.75**3),
    "an offset an image": ({"sides": (4, 4), "image_offset": 1.0}, 4, 4.0),
    "an offset a batch": ({"sides": (4, 4), "batch_offset": 0.25}, 4, 1 / (0.25 + 0.75 / 64)),
}


@pytest.mark.parametrize(("options", "batch_size", "expected"), FIELDS.values(), ids=FIELDS)
def test_effective_values_are_those_by_hand(options, batch_size, expected):
    assert GaussianField(CHANNELS, **options).effective_values(batch_size) == pytest.approx(expected)


def test_effective_values_are_the_sum_over_all_pairs():
    field = GaussianField(1, (5, 7), correlation=0.6)
    rows, columns = (torch.arange(float(side)) for side in field.sides)
    covariance = [0.6 ** (a[:, None] - a).abs() for a in (rows, columns)]
    expected = covariance[0].mean() * covariance[1].mean() / 3
    assert field.effective_values(3) == pytest.approx(float(1 / expected), rel=1e-5)


@pytest.mark.parametrize(("options", "batch_size", "expected"), FIELDS.values(), ids=FIELDS)
def test_batch_means_scatter_as_they_should(options, batch_size, expected):
    field = GaussianField(CHANNELS, **options)
    means = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in field.batches(batch_size, BATCHES, 0)])
    assert float(means.var(0).mean() * expected) == pytest.approx(1, abs=4 * SPREAD)


@pytest.mark.parametrize("options", [options for options, _, _ in FIELDS.values()], ids=FIELDS)
def test_values_have_mean_0_and_variance_1(options):
    x = torch.cat(list(GaussianField(CHANNELS, **options).batches(2, 500, 1)))
    dims = (0, *range(2, x.dim()))
    assert float(x.square().mean(dims).mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("distance", [1, 2])
def test_correlation_decays_with_distance_and_is_the_same_everywhere(axis, distance):
    x = torch.cat(list(GaussianField(CHANNELS, (5, 5), correlation=0.7).batches(50, 20, 0)))
    x = x.transpose(axis, -1)
    products = (x[..., distance:] * x[..., :-distance]).mean((0, 1, 2))
    torch.testing.assert_close(products, torch.full_like(products, 0.7**distance), atol=0.03, rtol=0)


def test_batch_offsets_drift_with_their_persistence():
    field = GaussianField(CHANNELS, batch_offset=1.0, offset_persistence=0.9)
    offsets = torch.stack([x.mean(0) for x in field.batches(2, 2000, 0)])
    assert float((offsets[1:] * offsets[:-1]).mean()) == pytest.approx(0.9, abs=0.05)
    assert float(offsets.square().mean()) == pytest.approx(1, abs=0.05)


def test_dead_channels_are_constant_and_exploding_ones_double():
    field = GaussianField(4, (8, 8), dead=(1,), exploding=(3,))
    batches = list(field.batches(16, 5, 0))
    assert all((x[:, 1] == 0.5).all() for x in batches)
    sizes = torch.tensor([float(x[:, 3].std()) for x in batches])
    torch.testing.assert_close(sizes, 2.0 ** torch.arange(5.0), rtol=0.1, atol=0)


def test_a_seed_gives_the_same_batches_and_leaves_torchs_stream_alone():
    state = torch.get_rng_state()
    first, second, other = (list(GaussianField(2, (3,)).batches(2, 3, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels and sides must be at least 1, got 0"),
        ({"sides": (3, 0)}, r"at least 1, got 4 and \(3, 0\)"),
        ({"correlation": 1.0}, r"correlation must be in \(-1, 1\), got 1.0"),
        ({"image_offset": 0.7, "batch_offset": 0.5}, "1 at most together, got 0.7 and 0.5"),
        ({"batch_offset": -0.1}, "at least 0"),
        ({"offset_persistence": 1.0}, r"offset_persistence must be in \[0, 1\), got 1.0"),
        ({"dead": (4,)}, "channels below 4, got 4"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianField(**{"channels": 4, **options})
