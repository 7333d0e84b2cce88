import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mbnorm import MomentumBatchNorm2d, MomentumSchedule
from mbnorm.centered import CENTERED
from mbnorm.centering import center_in_front_of
from mbnorm.experiments.data import digits
from mbnorm.experiments.grid import (
    Run,
    Setting,
    cost,
    grid_settings,
    reference_of,
    suite_runs,
    suite_settings,
)
from mbnorm.experiments.methods import METHODS, Bias, schedule_for
from mbnorm.experiments.models import SMALL
from mbnorm.experiments.results import Results
from mbnorm.experiments.sampling import SAMPLINGS, largest_batch, one_epoch
from mbnorm.experiments.training import Outcome, initial_model, train, train_mode_loss

SETTING = Setting("mlp", 4, "shuffled", 0.025, 2)
ONE_CLASS = replace(SETTING, sampling="one-class")
DONE = Outcome("ok", 1.0, None, 90.0, 0.5, 0.25, 0.125)

on_every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)
on_every_method = pytest.mark.parametrize("method", METHODS)
on_every_model = pytest.mark.parametrize("model", [name for name in SMALL if name != "segment"])


def epoch_of(sampling, batch_size=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return one_epoch(sampling, digits().train_targets, batch_size, draws)


def without_seconds(outcome):
    return replace(outcome, seconds=0.0)


def test_digits_are_split_into_1000_and_797():
    assert [len(part) for part in digits()[:4]] == [1000, 1000, 797, 797]


def test_digits_of_both_parts_show_every_class():
    assert set(digits().train_targets.tolist()) == set(digits().test_targets.tolist()) == set(range(10))


def test_digits_are_centred_and_scaled_by_the_training_part():
    images = digits().train_inputs
    torch.testing.assert_close(images.mean(0), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)
    assert images.std().item() == pytest.approx(1)


@on_every_sampling
def test_no_image_comes_twice_in_an_epoch(sampling):
    indices = epoch_of(sampling, 8).flatten().tolist()
    assert len(set(indices)) == len(indices)


def test_shuffled_batches_leave_out_less_than_one_batch():
    assert epoch_of("shuffled", 64).shape == (15, 64)


def test_one_class_batches_leave_out_less_than_one_batch_of_each_class():
    per_class = digits().train_targets.bincount()
    assert epoch_of("one-class", 8).shape == ((per_class // 8).sum(), 8)


def test_one_class_batches_have_one_class_each():
    classes = digits().train_targets[epoch_of("one-class")]
    assert (classes == classes[:, :1]).all()


def test_one_class_batches_come_in_mixed_order():
    of_each_batch = digits().train_targets[epoch_of("one-class")][:, 0]
    assert of_each_batch[:20].unique().numel() > 2


@on_every_sampling
def test_epochs_differ_and_seeds_repeat(sampling):
    draws = torch.Generator().manual_seed(0)
    first, second = (one_epoch(sampling, digits().train_targets, 4, draws) for _ in range(2))
    assert torch.equal(first, epoch_of(sampling))
    assert not torch.equal(first, second)


def test_the_largest_one_class_batch_leaves_every_class_a_batch():
    most = largest_batch("one-class", digits().train_targets)
    classes = digits().train_targets[epoch_of("one-class", most)]
    assert set(classes.flatten().tolist()) == set(range(10))


@on_every_model
@on_every_method
def test_every_method_gives_logits_in_both_modes(model, method):
    if method == "instance" and model in ("mlp", "mlp6", "vgg-small"):
        pytest.skip("one value per channel and image has no variance")
    net = initial_model(Run(method, Setting(model, 2, "shuffled", 0.1, 1), 0))
    images = digits().train_inputs[:2]
    assert net(images).shape == net.eval()(images).shape == (2, 10)


@on_every_model
@on_every_method
def test_every_method_starts_at_the_same_weights(model, method):
    setting = Setting(model, 2, "shuffled", 0.1, 1)
    ours, plain = (initial_model(Run(m, setting, 3)) for m in (method, "batch"))
    if any(type(layer) in CENTERED.values() for layer in ours.modules()):
        norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        center_in_front_of(norms, plain, None, pointwise_first=False)
    # a parametrization keeps the weight it was given beside the filters that it makes of it
    ours, plain = (
        [
            sorted(layer.parameters(), key=torch.Tensor.numel)
            for layer in net.modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        for net in (ours, plain)
    )
    for layer, other in zip(ours, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, other, strict=True))


def test_seeds_start_at_different_weights():
    first, second = (initial_model(Run("batch", SETTING, seed))[1].weight for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("model", "layers"), [("mlp", 2), ("cnn", 9)])
def test_every_batch_norm_is_replaced(model, layers):
    net = initial_model(Run("none", Setting(model, 2, "shuffled", 0.1, 1), 0))
    assert sum(isinstance(m, Bias) for m in net.modules()) == layers
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


@pytest.mark.parametrize(("model", "groups"), [("mlp", [10] * 2), ("cnn", [2, 2, 2, 4, 4, 4, 8, 8, 8])])
def test_groups_have_ten_channels_in_the_mlp_and_four_in_the_cnn(model, groups):
    net = initial_model(Run("group", Setting(model, 2, "shuffled", 0.1, 1), 0))
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == groups


def test_no_normalization_leaves_a_bias_per_channel():
    bias = Bias(2)
    nn.init.constant_(bias.bias[1:], 3.0)
    assert bias(torch.zeros(1, 2, 2, 2)).sum((0, 2, 3)).tolist() == [0.0, 12.0]


@pytest.mark.parametrize(("method", "name"), [("momentum", "paper"), ("momentum-constant", "constant")])
def test_momentum_is_steered_by_its_schedule(method, name):
    schedule = schedule_for(method, MomentumBatchNorm2d(3), 10, 2)
    assert isinstance(schedule, MomentumSchedule)
    assert schedule.schedule == name


@pytest.mark.parametrize("method", ["momentum", "memorized+df"])
def test_the_same_run_gives_the_same_outcome(method):
    run = Run(method, replace(SETTING, batch_size=32), 0)
    first = train(run)
    torch.randn(3)
    assert without_seconds(train(run)) == without_seconds(first)


def test_training_leaves_the_random_stream_alone():
    before = torch.get_rng_state()
    train(Run("memorized+df", replace(SETTING, batch_size=64, epochs=1), 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_learns():
    outcome = train(Run("batch", Setting("mlp", 32, "shuffled", 0.05, 3), 0))
    assert outcome.status == "ok"
    assert outcome.accuracy > 90
    assert outcome.eval_mode_loss < 0.5


def test_double_forward_changes_the_run():
    plain, with_df = (train(Run(m, replace(SETTING, epochs=1), 0)) for m in ("memorized", "memorized+df"))
    assert plain.eval_mode_loss != with_df.eval_mode_loss


def test_batch_norm_refuses_batches_of_one_and_the_run_says_so():
    outcome = train(Run("batch", replace(SETTING, batch_size=1, epochs=1), 0))
    assert (outcome.status, outcome.accuracy) == ("failed", None)
    assert outcome.error.startswith("Expected more than 1 value per channel")
    assert "\n" not in outcome.error


@pytest.mark.parametrize("method", ["memorized", "matched"])
def test_layers_with_a_memory_train_on_batches_of_one(method):
    outcome = train(Run(method, replace(SETTING, batch_size=1, lr=0.0016, epochs=1), 0))
    assert outcome.status == "ok"
    assert outcome.accuracy > 50


def test_a_diverged_run_is_finished_and_measured():
    outcome = train(Run("none", replace(SETTING, lr=1e6, epochs=1), 0))
    assert (outcome.status, outcome.train_loss) == ("diverged", None)
    assert 0 <= outcome.accuracy < 30


def test_on_one_class_batches_matched_beats_batch_norm_by_far():
    setting = Setting("mlp", 8, "one-class", 0.0125, 4)
    batch, matched = (train(Run(method, setting, 0)).accuracy for method in ("batch", "matched"))
    assert matched > batch + 20


def test_on_one_class_batches_batch_norm_learns_what_eval_mode_does_not_have():
    outcome = train(Run("batch", Setting("cnn", 8, "one-class", 0.0125, 4), 0))
    assert outcome.eval_mode_loss > 3 * outcome.train_mode_loss


@pytest.mark.parametrize("method", ["batch", "momentum", "memorized", "matched"])
def test_measuring_the_train_mode_loss_changes_nothing(method):
    net = initial_model(Run(method, SETTING, 0)).eval()
    before = copy.deepcopy(net.state_dict())
    train_mode_loss(net, digits(), SETTING)
    assert not net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_quick_suite_trains_all_methods_and_a_reference():
    runs = suite_runs("quick", METHODS, 2)
    assert len(runs) == len(set(runs)) == 2 * len(METHODS) * 2 + 2


def test_the_full_suite_trains_no_run_twice():
    runs = suite_runs("full", METHODS, 3)
    assert len(runs) == len(set(runs)) == len(suite_settings("full")) * len(METHODS) * 3


def test_suites_train_the_reference_whatever_the_methods():
    assert Run("batch", reference_of(SETTING), 0) not in suite_runs("quick", ["matched"], 1)
    assert Run("batch", reference_of(replace(SETTING, epochs=10)), 0) in suite_runs("quick", ["matched"], 1)


def test_rates_follow_the_batch_size_and_epochs_the_model():
    settings = grid_settings(["mlp", "cnn"], [1, 64], ["shuffled"], None, None)
    assert [(s.lr, s.epochs) for s in settings] == [(0.1 / 64, 10), (0.1, 10), (0.1 / 64, 8), (0.1, 8)]


def test_a_grid_has_every_combination():
    settings = grid_settings(["mlp", "cnn"], [1, 2], SAMPLINGS, [0.1, 0.2, 0.3], 5)
    assert len(set(settings)) == 2 * 2 * len(SAMPLINGS) * 3


def test_runs_of_small_batches_cost_more():
    small, large = (cost(Run("batch", replace(SETTING, batch_size=m), 0)) for m in (2, 64))
    assert small > 10 * large


def test_results_come_back_from_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    outcomes = {
        Run("batch", SETTING, 0): Outcome("failed", 0.1, "one value per channel"),
        Run("none", ONE_CLASS, 1): replace(DONE, status="diverged", train_loss=None),
    }
    for run, outcome in outcomes.items():
        Results(path).add(run, outcome, "cpu")
    assert Results(path).outcomes == outcomes


def test_a_result_is_one_flat_json_object_with_all_options(tmp_path):
    Results(tmp_path / "r").add(Run("matched", SETTING, 2), DONE, "cpu")
    record = json.loads((tmp_path / "r").read_text())
    expected = {
        "method": "matched",
        "model": "mlp",
        "batch_size": 4,
        "sampling": "shuffled",
        "seed": 2,
        "lr": 0.025,
        "epochs": 2,
        "status": "ok",
        "error": None,
        "accuracy": 90.0,
        "train_loss": 0.5,
        "train_mode_loss": 0.25,
        "eval_mode_loss": 0.125,
        "seconds": 1.0,
        "data": "digits",
        "width": 100,
        "torch": torch.__version__,
    }
    assert expected.items() <= record.items()


def test_results_of_the_time_before_other_data_are_of_digits(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path).add(Run("batch", SETTING, 0), DONE, "cpu")
    record = json.loads(path.read_text())
    del record["data"]
    path.write_text(json.dumps(record) + "\n")
    assert list(Results(path).outcomes) == [Run("batch", SETTING, 0)]


def test_results_of_the_time_before_test_errors_have_none(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path).add(Run("batch", SETTING, 0), replace(DONE, test_error=1.5), "cpu")
    record = json.loads(path.read_text())
    del record["test_error"]
    path.write_text(json.dumps(record) + "\n")
    assert [outcome.test_error for outcome in Results(path).outcomes.values()] == [None]


@pytest.mark.parametrize("version", ["0.0.1", None])
@pytest.mark.parametrize("package", ["torch", "mbnorm"])
def test_results_of_another_version_are_refused_and_named(package, version, tmp_path):
    path = tmp_path / "results.jsonl"
    for seed in (0, 1):
        Results(path).add(Run("batch", SETTING, seed), DONE, "cpu")
    first, second = map(json.loads, path.read_text().splitlines())
    second[package] = version
    before = f"{json.dumps(first)}\n{json.dumps(second)}\n"
    path.write_text(before)
    named = f"{package} 0.0.1" if version else f"an unknown {package}"
    with pytest.raises(ValueError, match=f"has rows of .*{named}.* and this is .*: give another folder"):
        Results(path)
    assert path.read_text() == before


def test_an_unfinished_last_line_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path).add(Run("batch", SETTING, 0), DONE, "cpu")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    assert list(Results(path).outcomes) == [Run("batch", SETTING, 0)]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", "", '{"method": "batch"}', "\xff"])
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    Results(path).add(Run("batch", SETTING, 0), DONE, "cpu")
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is not a result"):
        Results(path)


@pytest.mark.parametrize("value", [math.nan, "high"])
def test_an_accuracy_that_is_no_number_is_corrupt(tmp_path, value):
    path = tmp_path / "results.jsonl"
    Results(path).add(Run("batch", SETTING, 0), DONE, "cpu")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": value}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a result"):
        Results(path)
