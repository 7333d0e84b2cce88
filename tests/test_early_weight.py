"""The averages for inference with an early weight: where they begin, and what holds in the end."""

import copy

import pytest
import torch
from helpers import make_input
from torch import nn

import mbnorm
from mbnorm import MatchedBatchNorm1d, recalibrate

LAST = 1 - 0.9 ** (2 / 32)
"""What a batch of 2 weighs by momentum = 0.1 alone."""


def batch(seed=0):
    return make_input((2, 3), torch.float64, seed=seed)


def matched(**options):
    return MatchedBatchNorm1d(
        3, dtype=torch.float64, **{"matched_batch_size": 64, "measured": False, **options}
    )


def weight_of(layer, x):
    """What a batch weighs in the running mean of ``layer``, which is told it."""
    before = layer.running_mean.clone()
    layer(x)
    return ((layer.running_mean - before) / (x.mean(0) - before))[0].item()


@pytest.mark.parametrize("c", [0.5, 1, 8])
def test_a_batch_weighs_c_of_those_before_it_and_never_less_than_by_momentum(c):
    layer = matched(early_weight=c, momentum=0.9)
    floor = 1 - 0.1 ** (2 / 32)
    found = [weight_of(layer, batch(t) + t) for t in range(80)]
    assert found == pytest.approx([max(floor, c / (t + c)) for t in range(80)])
    assert found[-1] == pytest.approx(floor)


def test_without_it_nothing_is_changed():
    layer = matched(early_weight=0)
    assert [weight_of(layer, batch(t) + t) for t in range(5)] == pytest.approx([LAST] * 5)


def test_nothing_is_left_of_the_initial_values_after_the_first_batch():
    layer = matched(early_weight=8)
    layer(batch())
    torch.testing.assert_close(layer.running_mean, batch().mean(0))
    torch.testing.assert_close(layer.running_var, batch().var(0, correction=0))


def test_with_1_the_averages_are_those_of_all_values():
    layer = matched(early_weight=1)
    for t in range(20):
        layer(batch(t) + t)
    everything = torch.cat([batch(t) + t for t in range(20)])
    torch.testing.assert_close(layer.running_mean, everything.mean(0))
    torch.testing.assert_close(layer.running_var, everything.var(0, correction=0))


def trained(batches):
    layer = nn.BatchNorm1d(3).double()
    layer.running_mean.fill_(5.0)
    layer.num_batches_tracked.fill_(batches)
    return layer


@pytest.mark.parametrize(
    ("batches", "weight"), [(100_000, LAST), (800, 8 / 808), (24, 8 / 408), (0, 8 / 408)]
)
def test_a_trained_net_goes_on_as_after_400_batches_at_least(batches, weight):
    layer = trained(batches)
    mbnorm.convert(layer, "matched")
    assert weight_of(layer, batch()) == pytest.approx(weight)
    assert int(layer.num_batches_tracked) == batches + 1


def test_the_count_of_a_trained_net_goes_on():
    layer = trained(0)
    mbnorm.convert(layer, "matched")
    found = [weight_of(layer, batch(t) + t) for t in range(4)]
    assert found == pytest.approx([8 / (408 + t) for t in range(4)])


def test_a_counter_without_statistics_counts_for_nothing():
    layer = nn.BatchNorm1d(3).double()
    layer.num_batches_tracked.fill_(100)
    mbnorm.convert(layer, "matched")
    assert weight_of(layer, batch()) == pytest.approx(1.0)


@pytest.mark.parametrize(("batches", "weight"), [(800, 8 / 808), (24, 8 / 408)])
def test_a_checkpoint_of_torchs_brings_its_count_along(batches, weight):
    layer = matched(early_weight=8)
    layer.load_state_dict(trained(batches).state_dict())
    assert weight_of(layer, batch()) == pytest.approx(weight)


def test_a_checkpoint_without_a_count_goes_on_as_after_400_batches():
    layer = matched(early_weight=8)
    state = trained(0).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer.load_state_dict(state)
    assert (layer.running_mean == 5).all()
    assert weight_of(layer, batch()) == pytest.approx(8 / 408)


def test_a_saved_training_goes_on_where_it_was():
    layer = matched(early_weight=8)
    for t in range(5):
        layer(batch(t))
    twin = matched(early_weight=8)
    twin.load_state_dict(copy.deepcopy(layer.state_dict()))
    for t in range(5, 9):
        layer(batch(t))
        twin(batch(t))
    assert torch.equal(layer.running_mean, twin.running_mean)
    assert torch.equal(layer.running_var, twin.running_var)


def test_after_a_reset_the_count_begins_anew():
    layer = matched(early_weight=8)
    for t in range(5):
        layer(batch(t))
    layer.reset_running_stats()
    assert weight_of(layer, batch(9)) == pytest.approx(1.0)


def test_a_batch_that_is_not_finite_does_not_count():
    layer = matched(early_weight=8)
    layer(batch())
    layer(batch() * torch.nan)
    assert weight_of(layer, batch(1)) == pytest.approx(8 / 9)


def test_what_is_taken_back_does_not_count():
    layer = matched(early_weight=8)
    layer(batch())
    then = layer.snapshot()
    layer(batch(1))
    layer.rewind(then)
    assert weight_of(layer, batch(2)) == pytest.approx(8 / 9)


def test_recalibration_leaves_the_count_alone():
    layer = matched(early_weight=8)
    for t in range(8):
        layer(batch(t))
    recalibrate(layer, [batch(t) for t in range(4)])
    assert weight_of(layer, batch(9)) == pytest.approx(0.5)


@pytest.mark.parametrize(("momentum", "weight"), [(None, 1 / 6), (1.0, 1.0)])
def test_momentum_of_none_and_of_1_mean_what_they_do_in_torch(momentum, weight):
    layer = matched(early_weight=8)
    for t in range(5):
        layer(batch(t))
    layer.momentum = momentum
    assert weight_of(layer, batch(9)) == pytest.approx(weight)


def test_momentum_of_0_stores_nothing():
    layer = matched(early_weight=8, momentum=0)
    layer(batch())
    assert int(layer.num_batches_tracked) == 0
    assert (layer.running_mean == 0).all()


def test_it_goes_with_the_layer_that_is_reverted():
    layer = nn.BatchNorm1d(3)
    mbnorm.convert(layer, "matched")
    mbnorm.revert(layer)
    assert not hasattr(layer, "early_weight")
