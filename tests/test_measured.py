"""What a layer measures of its batches, and what it makes of that."""

import math

import pytest
import reference
import torch
from torch import nn

from mbnorm import MatchedBatchNorm1d, MatchedBatchNorm2d, convert, revert
from mbnorm.experiments.synthetic import GaussianField
from mbnorm.measures import MEASURED_WEIGHT

CHANNELS = 32


def fed(layer, batches):
    for x in batches:
        layer(x)
    return layer


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(matched_batch_size=64, **options):
    return MatchedBatchNorm2d(CHANNELS, matched_batch_size=matched_batch_size, **options, early_weight=0)


def weight(layer, n, m):
    """The weight of the past for a batch of m samples with n values per channel."""
    return float(layer.memory.weight_of_history(layer.state, n, m))


def worth(layer, n):
    """How many independent values a batch of n was measured to be worth."""
    return n / float(layer.memory_measured[0])


@pytest.mark.parametrize(
    "field",
    [
        GaussianField(CHANNELS, (4, 4)),
        GaussianField(CHANNELS, (4, 4), correlation=0.8),
        GaussianField(CHANNELS, (4, 4), image_offset=0.5),
        GaussianField(CHANNELS, (4, 4), batch_offset=0.3),
    ],
    ids=["independent", "correlated", "offset images", "poorly sampled"],
)
def test_what_a_batch_is_worth_is_measured(field):
    layer = fed(layer_of(), field.batches(4, 300, seed=0))
    # the estimate averages some 2 / MEASURED_WEIGHT batches of so many channels, in pairs that overlap
    error = 5 * math.sqrt(1.5 * MEASURED_WEIGHT / CHANNELS)
    assert worth(layer, 64) == pytest.approx(field.effective_values(4), rel=error)


# four pixels to a sample, which are as many values or one
@pytest.mark.parametrize(("image_offset", "values_of_a_sample"), [(0.0, 4), (1.0, 1)])
def test_the_normalizing_mean_has_the_noise_of_so_many_samples(image_offset, values_of_a_sample):
    field = GaussianField(CHANNELS, (2, 2), image_offset=image_offset)
    layer = layer_of(64 // values_of_a_sample)
    squares = []
    for number, x in enumerate(field.batches(2, 1200, seed=0)):
        layer(x)
        if number > 200:
            squares.append(layer.memory_mean.square().mean())
    assert 1 / float(torch.stack(squares).mean()) == pytest.approx(64, rel=0.25)


def test_samples_that_are_correlated_are_worth_less_than_so_many():
    # the four samples of a batch are one
    layer = fed(layer_of(64), GaussianField(CHANNELS, (2, 2), batch_offset=0.9).batches(4, 400, seed=0))
    layer.memory_measured[1] = 0.0
    assert weight(layer, 16, 4) == pytest.approx((64 - 1) / (64 + 1), abs=0.01)


def weight_where_the_truth_moves(by):
    """The weight of the past after batches of 4 values whose mean moves each step by so many deviations."""
    layer, truth = layer_of(1000), torch.zeros(1, CHANNELS, 1, 1)
    draws = torch.Generator().manual_seed(0)
    weights = []
    for step in range(600):
        truth = truth + by * torch.randn(truth.shape, generator=draws)
        layer(truth + torch.randn(4, CHANNELS, 1, 1, generator=draws))
        if step >= 200:
            weights.append(weight(layer, 4, 4))
    return sum(weights) / len(weights)


@pytest.mark.parametrize("by", [0.03, 0.1])
def test_the_weight_is_that_of_the_kalman_filter_where_the_truth_moves(by):
    # the steady state of a random walk seen through noise: P = P R / (P + R) + Q
    noise, walk = 1 / 4, by**2
    error = (walk + math.sqrt(walk**2 + 4 * walk * noise)) / 2
    assert weight_where_the_truth_moves(by) == pytest.approx(noise / (noise + error), abs=0.06)


def test_the_past_weighs_half_at_most_where_the_truth_moves_faster_than_the_noise():
    assert weight_where_the_truth_moves(2.0) < 0.52


def test_matched_alone_stays_the_plain_rule():
    layer = MatchedBatchNorm1d(3, matched_batch_size=64, measured=False, early_weight=0)
    fed(layer, normal(5, 2, 3).float())
    assert weight(layer, 2, 2) == pytest.approx(62 / 66)


def test_enough_samples_are_plain_batch_norm():
    layer, stock = layer_of(4), nn.BatchNorm2d(CHANNELS)
    for seed in range(20):
        x = normal(4, CHANNELS, 8, 8, seed=seed).float()
        got, want = layer(x), stock(x)
    torch.testing.assert_close(got, want)


def test_a_second_batch_weighs_as_much_as_the_first():
    layer = fed(layer_of(), [normal(2, CHANNELS, 2, 2).float()])
    assert weight(layer, 8, 2) == 0.5


def test_what_a_trained_norm_knows_is_taken_to_be_right_at_first():
    stock = nn.BatchNorm2d(CHANNELS)
    stock(normal(8, CHANNELS, 2, 2).float())
    layer = layer_of(64)
    layer.load_state_dict(stock.state_dict())
    # as if the batch were a single value
    assert weight(layer, 10_000, 50) == pytest.approx(63 / 65)


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("backend", ["auto", "traceable"])
def test_a_seeded_memory_follows_the_reference(backend, subtract_mean):
    options = {"matched_batch_size": 64, "subtract_mean": subtract_mean}
    layer = MatchedBatchNorm1d(5, backend=backend, early_weight=0, **options).double()
    norm = reference.MatchedNorm(5, **options)
    mean, var = normal(5), normal(5, seed=1).square() + 0.5
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    layer.seed()
    norm.seed(mean, var)
    for step in range(60):
        x = normal(3 + step % 3, 5, seed=step) + 3 * normal(1, 5, seed=100 + step)
        torch.testing.assert_close(layer(x), norm(x, layer.weight, layer.bias))
    measured = torch.tensor([norm.r, norm.e, norm.last[1], norm.samples], dtype=torch.float64)
    torch.testing.assert_close(layer.memory_measured, measured)


def test_what_a_trained_norm_knows_weighs_for_some_fifty_batches():
    stock = nn.BatchNorm2d(CHANNELS)
    layer = layer_of(64)
    stock.running_mean.fill_(1e-6)
    layer.load_state_dict(stock.state_dict())
    # 64 samples that are worth as many: plain batch norm in the end
    weights = []
    for seed in range(400):
        layer(normal(64, CHANNELS, 2, 2, seed=seed).float())
        weights.append(weight(layer, 256, 64))
    assert weights[10] > 0.9
    assert weights[50] > 0.8
    assert weights[-1] < 0.1


@pytest.mark.parametrize(("ratio", "worth"), [(1e9, 1), (4.0, 2), (2.0, 4), (1.0, 4), (0.0, 4)])
def test_a_batch_is_worth_one_sample_at_least_and_its_own_at_most(ratio, worth):
    layer = layer_of(64)
    layer.memory_measured.copy_(torch.tensor([ratio, 0.0, 8.0, 9.0]))
    assert weight(layer, 8, 4) == pytest.approx((64 - worth) / (64 + worth))


def test_the_same_batch_again_and_again_is_no_reason_to_forget():
    x = normal(2, CHANNELS, 2, 2).float()
    layer = fed(layer_of(64), [x] * 50)
    assert weight(layer, 8, 2) == pytest.approx(62 / 66, abs=0.01)


def test_what_is_measured_holds_for_batches_of_other_sizes():
    layer = fed(layer_of(1000), [normal(4, CHANNELS, 2, 2, seed=s).float() for s in range(300)])
    expected = (1000 - 4) / (1000 + 4), (1000 - 64) / (1000 + 64)
    found = [float(layer.memory_measured[0]) / n for n in (4, 64)]
    layer.memory_measured[1] = 0.0
    assert [weight(layer, n, n) for n in (4, 64)] == pytest.approx(expected, abs=0.02)
    assert found == pytest.approx([1 / 4, 1 / 64], rel=0.2)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scales_of_channels_do_not_matter(scale):
    x = [normal(2, CHANNELS, 3, 3, seed=seed) for seed in range(30)]
    scales = torch.ones(CHANNELS, 1, 1, dtype=torch.float64)
    scales[::2] = scale
    plain = fed(layer_of(dtype=torch.float64), x)
    scaled = fed(layer_of(dtype=torch.float64), [scales * v for v in x])
    torch.testing.assert_close(plain.memory_measured, scaled.memory_measured)


def test_channels_without_variance_are_left_out():
    x = [normal(4, 2, 3, 3, seed=seed) for seed in range(9)]
    both = fed(MatchedBatchNorm2d(2, matched_batch_size=64, early_weight=0).double(), x)
    x = [torch.cat([v, torch.full_like(v[:, :1], 0.5)], 1) for v in x]
    with_dead = fed(MatchedBatchNorm2d(3, matched_batch_size=64, early_weight=0).double(), x)
    torch.testing.assert_close(both.memory_measured, with_dead.memory_measured)


@pytest.mark.parametrize("backend", ["auto", "traceable"])
def test_distances_that_overflow_are_not_measured(backend):
    layer = fed(layer_of(backend=backend), [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(3)])
    before = layer.memory_measured.clone()
    # statistics that are just finite, and a distance that is not
    layer.memory_last.fill_(-1e30)
    layer(normal(2, CHANNELS, 2, 2).float())
    assert torch.equal(layer.memory_measured, before)


@pytest.mark.parametrize("backend", ["auto", "traceable"])
def test_a_batch_that_is_not_finite_measures_nothing(backend):
    layer = fed(layer_of(backend=backend), [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(3)])
    before = {name: t.clone() for name, t in layer.named_buffers() if name.startswith("memory")}
    layer(torch.full((2, CHANNELS, 2, 2), math.inf))
    assert all(torch.equal(before[name], getattr(layer, name)) for name in before)


def test_an_empty_batch_measures_nothing():
    layer = fed(layer_of(), [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(3)])
    before = layer.memory_measured.clone()
    layer(torch.empty(0, CHANNELS, 2, 2))
    assert torch.equal(layer.memory_measured, before)


@pytest.mark.parametrize("backend", ["auto", "traceable"])
def test_what_is_measured_agrees_with_the_reference(backend):
    layer = MatchedBatchNorm1d(5, matched_batch_size=64, backend=backend, early_weight=0).double()
    norm = reference.MatchedNorm(5, matched_batch_size=64)
    for step in range(120):
        x = normal(3 + step % 3, 5, seed=step) + 3 * normal(1, 5, seed=100 + step)
        layer(x), norm(x)
    measured = torch.tensor([norm.r, norm.e, norm.last[1], norm.samples], dtype=torch.float64)
    torch.testing.assert_close(layer.memory_measured, measured)
    torch.testing.assert_close(layer.memory_last, norm.last[0])


@pytest.mark.parametrize("backend", ["auto", "traceable"])
def test_what_was_measured_is_taken_back_with_the_forwards(backend):
    layer = fed(layer_of(backend=backend), [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(4)])
    before = {name: t.clone() for name, t in layer.named_buffers()}
    then = layer.snapshot()
    fed(layer, [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(4, 7)])
    layer.rewind(then)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.named_buffers())


def test_training_goes_on_from_a_checkpoint_bit_for_bit():
    whole = fed(layer_of(), [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(6)])
    half = fed(layer_of(), [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(3)])
    rest = layer_of()
    rest.load_state_dict(half.state_dict())
    fed(rest, [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(3, 6)])
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), rest.buffers(), strict=True))


@pytest.mark.filterwarnings("ignore:the checkpoint was written with")
@pytest.mark.parametrize("measures", [True, False])
def test_a_layer_that_does_the_other_takes_the_memory_from_a_checkpoint(measures):
    source = fed(
        MatchedBatchNorm2d(CHANNELS, matched_batch_size=64, measured=not measures, early_weight=0),
        [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(3)],
    )
    target = MatchedBatchNorm2d(CHANNELS, matched_batch_size=64, measured=measures, early_weight=0)
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), source.buffers(), strict=True))


def without_mean(**options):
    return MatchedBatchNorm2d(CHANNELS, subtract_mean=False, **options)


def test_without_a_mean_outputs_are_multiples_of_the_inputs_in_both_modes():
    layer = fed(without_mean(), [normal(2, CHANNELS, 3, 3, seed=s).float() + 5 for s in range(40)])
    x = normal(2, CHANNELS, 3, 3, seed=50).float() + 5
    for mode in (True, False):
        ratios = layer.train(mode)(x) / x
        torch.testing.assert_close(ratios, ratios[:1, :, :1, :1].expand_as(x))
    # the mean square of the values is 26
    torch.testing.assert_close(ratios.mean().item(), 26**-0.5, rtol=0.02, atol=0)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_without_a_mean_the_noise_of_mean_squares_is_measured(correlation):
    field = GaussianField(CHANNELS, (4, 4), correlation=correlation)
    squares = torch.stack([x.square().mean((0, 2, 3)) for x in field.batches(4, 2000, seed=1)])
    layer = fed(layer_of(subtract_mean=False), field.batches(4, 300, seed=0))
    noise = float((squares.var(0) / squares.mean(0).square()).mean())
    assert 1 / worth(layer, 64) == pytest.approx(noise, rel=5 * math.sqrt(1.5 * MEASURED_WEIGHT / CHANNELS))


def test_without_a_mean_the_past_weighs_little_where_scales_move_fast():
    batches = [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(80)]
    still = fed(without_mean(), batches)
    moving = fed(without_mean(), [x * 1.2**step for step, x in enumerate(batches)])
    assert weight(moving, 18, 2) < 0.7 < 0.9 < weight(still, 18, 2)


def test_a_reverted_layer_without_a_mean_gives_the_same_output():
    model = nn.Sequential(fed(without_mean(), [normal(2, CHANNELS, 3, 3).float() + 5] * 3)).eval()
    x = normal(2, CHANNELS, 3, 3, seed=1).float()
    before = model(x)
    revert(model)
    assert torch.equal(model(x), before)


def test_statistics_that_have_a_mean_are_loaded_into_a_layer_that_subtracts_it_from_then_on():
    stock = nn.BatchNorm2d(CHANNELS)
    stock(normal(8, CHANNELS, 2, 2).float() + 3)
    layer, same = without_mean(), MatchedBatchNorm2d(CHANNELS)
    with pytest.warns(UserWarning, match="they subtract it from now on"):
        layer.load_state_dict(stock.state_dict())
    same.load_state_dict(stock.state_dict())
    x = normal(2, CHANNELS, 3, 3, seed=1).float()
    assert torch.equal(layer(x), same(x))
    assert torch.equal(layer.eval()(x), same.eval()(x))
    assert layer.subtract_mean
    assert layer.matched_batch_size == 128


def test_statistics_without_a_mean_are_loaded_as_they_are():
    source = fed(without_mean(), [normal(2, CHANNELS, 3, 3).float()])
    layer = without_mean()
    layer.load_state_dict(source.state_dict())
    assert not layer.subtract_mean
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), source.buffers(), strict=True))


def test_the_option_of_a_checkpoint_without_a_mean_is_named():
    source = fed(without_mean(), [normal(2, CHANNELS, 3, 3).float()])
    with pytest.warns(UserWarning, match="subtract_mean=False and is loaded"):
        MatchedBatchNorm2d(CHANNELS).load_state_dict(source.state_dict())


def test_the_repr_says_that_no_mean_is_subtracted():
    assert "subtract_mean=False" in repr(without_mean())
    assert "subtract_mean" not in repr(MatchedBatchNorm2d(CHANNELS))


def test_revert_leaves_nothing_behind():
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    before = set(model[0].__dict__)
    convert(model, "matched")
    revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert set(model[0].__dict__) == before
