import math

import pytest
import torch
from torch import nn

from mbnorm import MomentumBatchNorm1d, MomentumBatchNorm2d, convert, reference, revert
from mbnorm.experiments.synthetic import GaussianField
from mbnorm.memory import RATIO_WEIGHT

CHANNELS = 32


def fed(layer, batches):
    for x in batches:
        layer(x)
    return layer


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(matched_values=64, **options):
    return MomentumBatchNorm2d(CHANNELS, matched_values=matched_values, measured=True, **options)


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
    layer = fed(layer_of(), field.batches(4, 200, seed=0))
    # the estimate averages some 2 / RATIO_WEIGHT batches of so many channels
    error = 5 * math.sqrt(RATIO_WEIGHT / CHANNELS)
    assert 64 / float(layer.memory_ratio) == pytest.approx(field.effective_values(4), rel=error)


@pytest.mark.parametrize("worth_of_a_pixel", [1.0, 0.0])
def test_the_normalizing_mean_has_the_noise_of_so_many_values(worth_of_a_pixel):
    field = GaussianField(CHANNELS, (2, 2), image_offset=1 - worth_of_a_pixel)
    layer = layer_of(64)
    squares = []
    for number, x in enumerate(field.batches(2, 1200, seed=0)):
        layer(x)
        if number > 200:
            squares.append(layer.memory_mean.square().mean())
    assert 1 / float(torch.stack(squares).mean()) == pytest.approx(64, rel=0.25)


def test_matched_alone_stays_the_plain_rule():
    layer = MomentumBatchNorm1d(3, matched_values=64)
    assert "memory_ratio" not in layer.state_dict()
    fed(layer, normal(5, 2, 3).float())
    assert layer._weight_of_history(2) == 62 / 66


def test_a_first_batch_counts_as_independent_values():
    layer = fed(layer_of(), [normal(2, CHANNELS, 2, 2).float()])
    assert float(layer._weight_of_history(8)) == pytest.approx((64 - 8) / (64 + 8))


def test_no_batch_is_worth_less_than_one_value():
    layer = layer_of(64)
    layer.memory_ratio.fill_(1e9)
    assert float(layer._weight_of_history(8)) == pytest.approx(63 / 65)


def test_channels_without_variance_are_left_out():
    x = [normal(4, 2, 3, 3, seed=seed) for seed in range(9)]
    both = fed(MomentumBatchNorm2d(2, matched_values=64, measured=True).double(), x)
    x = [torch.cat([v, torch.full_like(v[:, :1], 0.5)], 1) for v in x]
    with_dead = fed(MomentumBatchNorm2d(3, matched_values=64, measured=True).double(), x)
    torch.testing.assert_close(both.memory_ratio, with_dead.memory_ratio)


def test_a_batch_that_is_not_finite_measures_nothing():
    layer = fed(layer_of(), [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(3)])
    before = {name: t.clone() for name, t in layer.named_buffers() if name.startswith("memory")}
    layer(torch.full((2, CHANNELS, 2, 2), math.inf))
    assert all(torch.equal(before[name], getattr(layer, name)) for name in before)


def test_many_steps_agree_with_the_reference():
    layer = MomentumBatchNorm1d(5, matched_values=64, measured=True).double()
    norm = reference.MomentumNorm(5, matched_values=64, measured=True)
    for step in range(12):
        x = normal(3 + step % 3, 5, seed=step) + 3 * normal(1, 5, seed=100 + step)
        torch.testing.assert_close(layer(x), norm(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer.memory_ratio.item(), norm.r)
    torch.testing.assert_close(layer.memory_last, norm.last)


def test_training_goes_on_from_a_checkpoint_bit_for_bit():
    whole = fed(layer_of(), [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(6)])
    half = fed(layer_of(), [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(3)])
    rest = layer_of()
    rest.load_state_dict(half.state_dict())
    fed(rest, [normal(2, CHANNELS, 3, 3, seed=s).float() for s in range(3, 6)])
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), rest.buffers(), strict=True))


def test_a_stock_checkpoint_is_loaded_and_starts_the_memory():
    stock = nn.BatchNorm2d(CHANNELS)
    stock(normal(8, CHANNELS, 2, 2).float())
    layer = layer_of()
    layer.load_state_dict(stock.state_dict())
    torch.testing.assert_close(layer.memory_last, stock.running_mean)
    assert layer.memory_ratio == 1


def test_revert_leaves_nothing_behind():
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    before = set(model[0].__dict__)
    convert(model, "matched", measured=True)
    revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert set(model[0].__dict__) == before


def test_measured_needs_a_goal():
    with pytest.raises(ValueError, match="measured=True needs matched_values"):
        MomentumBatchNorm2d(3, measured=True)


def test_the_repr_says_so():
    assert "matched_values=64, measured=True" in repr(layer_of())


def test_an_empty_batch_moves_nothing():
    layer = fed(layer_of(), [normal(2, CHANNELS, 2, 2, seed=s).float() for s in range(3)])
    before = layer.memory_ratio.clone()
    layer(torch.empty(0, CHANNELS, 2, 2))
    assert torch.equal(layer.memory_ratio, before)
