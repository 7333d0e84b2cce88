import copy
import warnings

import pytest
import reference
import torch
from torch import nn

from mbnorm import (
    MatchedBatchNorm1d,
    MemorizedBatchNorm1d,
    MomentumBatchNorm1d,
    MomentumSchedule,
    convert,
    revert,
)


def lambdas(schedule, layer, steps):
    found = []
    for _ in range(steps):
        found.append(float(layer.history_weight))
        schedule.step()
    return found


@pytest.mark.parametrize("T", [1, 2, 7, 200])
@pytest.mark.parametrize("m", [1, 2, 8, 31, 32, 64])
def test_paper_schedule_is_the_papers_formula(m, T):
    layer = MomentumBatchNorm1d(3, dtype=torch.float64)
    schedule = MomentumSchedule(layer, T, batch_size=m)
    wanted = [reference.paper_lambda(t, T, m) for t in range(1, T + 4)]
    torch.testing.assert_close(lambdas(schedule, layer, T + 3), wanted, rtol=1e-12, atol=1e-13)


def test_paper_schedule_starts_as_plain_batch_norm_and_ends_at_its_ideal():
    layer = MomentumBatchNorm1d(3, dtype=torch.float64)
    found = lambdas(MomentumSchedule(layer, 10, batch_size=2), layer, 12)
    assert found[0] == 0
    assert found[9:] == [1 - 2 / 32] * 3
    assert found == sorted(found)


def test_schedule_of_one_step_starts_as_plain_batch_norm():
    layer = MomentumBatchNorm1d(3)
    assert lambdas(MomentumSchedule(layer, 1, batch_size=8), layer, 2) == [0.0, 0.75]


@pytest.mark.parametrize("m", [32, 100])
def test_batches_of_the_ideal_size_need_no_history(m):
    layer = MomentumBatchNorm1d(3)
    assert set(lambdas(MomentumSchedule(layer, 5, batch_size=m), layer, 7)) == {0.0}


def test_constant_schedule():
    layer = MomentumBatchNorm1d(3)
    schedule = MomentumSchedule(layer, 5, batch_size=8, schedule="constant")
    assert set(lambdas(schedule, layer, 7)) == {0.75}


@pytest.mark.parametrize("m", [1, 2, 32, 64])
def test_inference_weight_follows_tau(m):
    layer = MomentumBatchNorm1d(3)
    MomentumSchedule(layer, 5, batch_size=m)
    assert layer.momentum == pytest.approx(1 - reference.inference_tau(m), abs=1e-15)


def test_inference_momentum_and_ideal_batch_size_are_options():
    layer = MomentumBatchNorm1d(3)
    MomentumSchedule(
        layer, 5, batch_size=4, ideal_batch_size=16, inference_momentum=0.99, schedule="constant"
    )
    assert layer.momentum == pytest.approx(1 - 0.99**0.25)
    assert float(layer.history_weight) == 0.75


def test_history_weight_is_changed_in_place():
    layer = MomentumBatchNorm1d(3)
    tensor = layer.history_weight
    MomentumSchedule(layer, 5, batch_size=8).step()
    assert layer.history_weight is tensor
    assert float(tensor) > 0


def test_matched_and_memorized_layers_are_left_alone():
    model = nn.Sequential(
        MatchedBatchNorm1d(3, matched_batch_size=64, measured=False, early_weight=0),
        MemorizedBatchNorm1d(3),
        MomentumBatchNorm1d(3),
    )
    MomentumSchedule(model, 5, batch_size=8, schedule="constant")
    assert [m.momentum for m in model[:2]] == [0.1, 0.1]
    assert float(model[2].history_weight) == 0.75


@pytest.mark.contract("CV-6")
@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_reverted_net_has_the_momentum_that_it_had_before_the_schedule(batch_size):
    net = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3))
    convert(net, "momentum", batch_size=batch_size)
    for _ in range(2):
        MomentumSchedule(net, total_steps=10, batch_size=2)
    revert(net)
    assert net[0].momentum == 0.3


def test_a_checkpointed_schedule_goes_on_where_it_was():
    layer, resumed_layer = MomentumBatchNorm1d(3), MomentumBatchNorm1d(3)
    schedule = MomentumSchedule(layer, 20, batch_size=2)
    for _ in range(7):
        schedule.step()
    resumed = MomentumSchedule(resumed_layer, 20, batch_size=2)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert torch.equal(resumed_layer.history_weight, layer.history_weight)
    schedule.step()
    resumed.step()
    assert torch.equal(resumed_layer.history_weight, layer.history_weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ideal_batch_size": -1}, "ideal_batch_size must be at least 1, got -1"),
        ({"inference_momentum": 1.0}, r"inference_momentum must be in \(0, 1\), got 1.0"),
        ({"inference_momentum": 0.0}, r"inference_momentum must be in \(0, 1\), got 0.0"),
        ({"schedule": "cosine"}, r"schedule must be one of \('paper', 'constant'\), got 'cosine'"),
    ],
)
def test_wrong_options_are_named(change, words):
    options = {"total_steps": 5, "batch_size": 2} | change
    with pytest.raises(ValueError, match=words):
        MomentumSchedule(MomentumBatchNorm1d(3), **options)


def test_a_model_without_momentum_layers_is_refused():
    with pytest.raises(ValueError, match=r"no Momentum layer to steer: mbnorm\.convert\(model, .momentum"):
        MomentumSchedule(nn.BatchNorm1d(3), 5, batch_size=2)


def test_a_model_whose_layers_need_no_schedule_is_told_so():
    with pytest.raises(ValueError, match="to steer: those it has need no schedule"):
        MomentumSchedule(
            MatchedBatchNorm1d(3, matched_batch_size=64, measured=False, early_weight=0), 5, batch_size=2
        )


def train(model, steps):
    for _ in range(steps):
        model(torch.randn(4, 3))


def two_layers(**options):
    return nn.Sequential(MomentumBatchNorm1d(3, **options), MomentumBatchNorm1d(3, **options))


def test_a_model_without_a_weight_is_told_once_at_its_first_training_forward():
    model = two_layers()
    with pytest.warns(UserWarning, match="train with history_weight=0, which is plain batch") as told:
        train(model, 10)
    assert len(told) == 1


def test_each_model_is_told_once():
    models = []
    for _ in range(3):
        # the earlier ones are still there
        models.append(two_layers())
        with pytest.warns(UserWarning, match="MomentumSchedule") as told:
            train(models[-1], 3)
        assert len(told) == 1


def test_a_copy_that_trains_is_told_itself():
    model = two_layers()
    with pytest.warns(UserWarning, match="MomentumSchedule"):
        train(model, 1)
    with pytest.warns(UserWarning, match="MomentumSchedule") as told:
        train(copy.deepcopy(model), 2)
    assert len(told) == 1


def test_layers_with_a_history_are_not_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(two_layers(history_weight=0.5), 5)


def test_forwards_without_gradients_are_no_steps():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        train(two_layers(), 5)


def test_scheduled_layers_are_not_told():
    model = two_layers()
    MomentumSchedule(model, 1000, batch_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 105)


def test_layers_called_unequally_often_are_told_of_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = MomentumBatchNorm1d(3), MomentumBatchNorm1d(3)

        def forward(self, x):
            return self.second(self.first(self.first(x)))

    net = Net()
    with pytest.warns(UserWarning, match="history_weight=0") as told:
        train(net, 3)
    assert len(told) == 1
