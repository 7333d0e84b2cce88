import copy
import json
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mbnorm import DoubleForward, convert, diagnose, recalibrate
from mbnorm.experiments.synthetic import GaussianField

BATCHES, CHANNELS = 200, 20
# relative standard error of 1/n_eff, where channels are independent and means are Gaussian
SPREAD = math.sqrt(2 / (CHANNELS * (BATCHES - 1)))
LAYERS = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


def layer_for(field):
    return LAYERS[len(field.sides)](field.channels)


def only(layer, batches, **options):
    (found,) = diagnose(layer, batches, **options).layers
    return found


def measured(field, batch_size, count=BATCHES):
    return only(layer_for(field), field.batches(batch_size, count, 0))


FIELDS = {
    "vectors": (GaussianField(CHANNELS), 2),
    "white noise": (GaussianField(CHANNELS, (4, 4)), 2),
    "single images": (GaussianField(CHANNELS, (4, 4)), 1),
    "smooth": (GaussianField(CHANNELS, (8, 8), correlation=0.7), 2),
    "smooth volumes": (GaussianField(CHANNELS, (4, 4, 4), correlation=0.5), 2),
    "alternating": (GaussianField(CHANNELS, (12,), correlation=-0.6), 3),
    "an offset an image": (GaussianField(CHANNELS, (4, 4), image_offset=1.0), 4),
    "an offset a batch": (GaussianField(CHANNELS, (4, 4), batch_offset=0.3), 4),
}
on_every_field = pytest.mark.parametrize(("field", "m"), FIELDS.values(), ids=FIELDS)


@on_every_field
def test_effective_values_are_those_of_the_field(field, m):
    noise = measured(field, m).noise
    assert noise.values == m * math.prod(field.sides)
    assert 1 / noise.effective_values == pytest.approx(1 / field.effective_values(m), rel=4 * SPREAD)
    assert noise.mean_error == pytest.approx(field.effective_values(m) ** -0.5, rel=2 * SPREAD)


def test_independent_values_are_worth_their_number_and_others_more_or_less():
    worth = {name: measured(*FIELDS[name]).noise for name in ("white noise", "smooth", "alternating")}
    ratios = {name: noise.effective_values / noise.values for name, noise in worth.items()}
    assert ratios["white noise"] == pytest.approx(1, rel=4 * SPREAD)
    assert ratios["smooth"] < 0.2
    assert ratios["alternating"] > 2


def test_an_offset_an_image_leaves_as_many_effective_values_as_images():
    assert measured(*FIELDS["an offset an image"]).noise.effective_values == pytest.approx(4, rel=4 * SPREAD)


@pytest.mark.parametrize("m", [2, 8])
def test_the_variance_of_gaussian_values_errs_as_chi_square_says(m):
    noise = measured(GaussianField(CHANNELS), m, 1000).noise
    # scatter 2 (n-1) / n^2, and the bias 1 / n of a biased variance
    assert noise.var_error == pytest.approx(math.sqrt(2 * m - 1) / m, rel=0.03)


@pytest.mark.parametrize("cut", [[40], [7, 5, 1, 2, 25], [1] * 40], ids=str)
def test_unequal_batches_have_the_variance_of_the_mean_at_their_mean_size(cut):
    x = torch.randn(4000, CHANNELS)
    noise = only(nn.BatchNorm1d(CHANNELS), x.split(cut * 100)).noise
    assert noise.effective_values == pytest.approx(40 / len(cut), rel=4 * math.sqrt(2 / (CHANNELS * 99)))


@on_every_field
def test_only_batches_of_their_own_kind_have_samples_that_are_alike(field, m):
    variance_inflation = measured(field, m).noise.variance_inflation
    if m == 1:
        assert variance_inflation is None
    else:
        expected = m * field.effective_values(1) / field.effective_values(m)
        assert variance_inflation == pytest.approx(expected, rel=4 * SPREAD)


@pytest.mark.parametrize("persistence", [0.0, 0.9])
def test_drift_is_called_by_its_name_and_shuffling_is_the_ideal(persistence):
    field = GaussianField(CHANNELS, (4, 4), batch_offset=0.3, offset_persistence=persistence)
    found = measured(field, 4, 1000)
    assert found.noise.effective_values == pytest.approx(field.effective_values(4), rel=0.15)
    assert "its samples are correlated" in found.reason
    assert found.verdict == "noisy"
    # of shuffled images
    assert found.ideal_batch_size == pytest.approx(32 / field.effective_values(1), rel=0.15)


def test_shuffled_samples_are_not_called_alike():
    assert "correlated" not in measured(*FIELDS["vectors"]).reason


def test_a_dead_channel_is_named_and_does_not_count():
    found = measured(GaussianField(CHANNELS, (8, 8), dead=(3,)), 2)
    assert (found.verdict, found.noise.dead, found.noise.exploding) == ("dead", (3,), ())
    assert found.noise.effective_values == pytest.approx(128, rel=4 * SPREAD)
    assert found.reason == "channel 3 is constant, so nothing gets through"


@pytest.mark.parametrize("count", [50, 200], ids=["large", "not finite"])
def test_an_exploding_channel_is_named_and_does_not_count(count):
    found = measured(GaussianField(CHANNELS, (8, 8), exploding=(2, 5)), 2, count)
    assert (found.verdict, found.noise.dead, found.noise.exploding) == ("exploding", (), (2, 5))
    expected = pytest.approx(128, rel=4 * math.sqrt(2 / (CHANNELS * (count - 1))))
    assert found.noise.effective_values == expected
    assert found.reason.startswith("2 channels (2, 5) are not finite or 100 times as large")


@pytest.mark.parametrize(("scale", "dead"), [(2e-3, False), (2e-4, True)])
def test_a_channel_is_dead_where_eps_swallows_it_and_not_where_its_values_are_small(scale, dead):
    x = scale * torch.randn(200, 4, 6)
    layer = nn.BatchNorm1d(6)
    outputs = layer(x.flatten(0, 1))
    assert (float(outputs.detach().std()) < 0.1) is dead
    assert (only(layer, x).verdict == "dead") is dead


def test_a_layer_of_dead_channels_alone_has_no_noise():
    found = only(nn.BatchNorm1d(2), torch.ones(10, 4, 2))
    assert found.verdict == "dead"
    assert (found.noise.effective_values, found.noise.mean_error, found.noise.mismatch) == (None, None, None)


def test_running_statistics_are_off_by_as_much_as_they_were_moved():
    layer, x = nn.BatchNorm1d(CHANNELS), torch.randn(BATCHES, 32, CHANNELS) * 3 + 1
    recalibrate(layer, x)
    layer.running_mean += 1.5
    layer.running_var *= 0.5
    found = only(layer, x)
    assert found.noise.running_mean_error == pytest.approx(0.5, rel=0.01)
    assert found.noise.running_var_error == pytest.approx(0.5, rel=0.01)
    assert found.recommendation == "recalibrate"
    assert "running_mean is 0.5 standard deviations and running_var 50% from" in found.reason


def test_recalibrating_on_the_same_batches_brings_them_to_the_truth_in_every_layer():
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    )
    model.append(nn.BatchNorm2d(8))
    x = torch.randn(30, 4, 2, 9, 9) + 3
    model[0](x[0])
    assert diagnose(model, x).recommendation == "recalibrate"
    recalibrate(model, x)
    found = diagnose(model, x)
    for layer in found.layers:
        assert layer.noise.running_mean_error < 1e-5
        # unbiased against biased, of 4 images of 25 positions at least
        assert layer.noise.running_var_error < 1e-3
    assert found.recommendation == "none"


def test_initial_running_statistics_are_not_called_stale():
    noise = only(nn.BatchNorm1d(3), torch.randn(20, 64, 3) + 5).noise
    assert (noise.running_mean_error, noise.running_var_error, noise.mismatch) == (None, None, None)


METHODS = {
    "stock": None,
    "momentum": ("momentum", {"history_weight": 0.5}),
    "matched": ("matched", {}),
    "memorized": ("memorized", {"memory_size": 4}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)


def trained(method):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(6))
    if METHODS[method] is not None:
        name, options = METHODS[method]
        convert(model, name, **options)
    for _ in range(6):
        model(torch.randn(3, 4) + 1)
    return model


@on_every_method
def test_the_mismatch_is_the_difference_of_the_outputs(method):
    layer = trained(method)[1]
    nn.init.ones_(layer.weight)
    batches = [torch.randn(3, 6) * 2 for _ in range(8)]
    squares = []
    for x in batches:
        in_train = copy.deepcopy(layer).train()(x).detach()
        squares.append((in_train - copy.deepcopy(layer).eval()(x).detach()).square().mean())
    expected = float(torch.stack(squares).mean().sqrt())
    assert only(layer, batches).noise.mismatch == pytest.approx(expected, rel=1e-4)


def test_a_frozen_layer_is_not_noisy_and_has_no_mismatch():
    model, batches = trained("stock"), [torch.randn(2, 4) + 1 for _ in range(50)]
    recalibrate(model, batches)
    model[1].eval()
    frozen, other = diagnose(model, batches).layers
    assert (frozen.noise.mismatch, frozen.recommendation, frozen.ideal_batch_size) == (0.0, "none", None)
    assert "frozen" in frozen.reason
    assert other.verdict == "noisy"


def test_a_stale_frozen_layer_is_to_be_thawed_before_recalibrate_reaches_it():
    model, batches = trained("stock"), [torch.randn(2, 4) + 9 for _ in range(50)]
    model[1].eval()
    frozen = diagnose(model, batches).layers[0]
    assert (frozen.verdict, frozen.recommendation) == ("stale", "recalibrate")
    assert "put it in train mode first" in frozen.reason


GAINS = {
    "matched": ("matched", {"matched_batch_size": 128, "measured": False}, 64.0),
    "lambda": ("momentum", {"history_weight": 0.75}, 7.0),
    "memory": ("memorized", {"memory_size": 16}, 16.0),
    "decaying": ("memorized", {"memory_size": 3, "decay": 0.5}, 1.75**2 / (1 + 0.25 + 0.0625)),
}


@pytest.mark.parametrize(("method", "options", "gain"), GAINS.values(), ids=GAINS)
def test_layers_with_a_memory_use_more_values_than_the_batch_has(method, options, gain):
    layer = nn.BatchNorm1d(CHANNELS)
    convert(layer, method, **options)
    found = only(layer, GaussianField(CHANNELS).batches(2, BATCHES, 0))
    assert found.noise.pooled_batches == pytest.approx(gain)
    assert found.verdict == ("fine" if 2 * gain >= 31 else "noisy")


@pytest.mark.parametrize(("wanted", "verdict"), [(128, "fine"), (12, "noisy")])
@pytest.mark.parametrize("pixels_alike", [False, True])
def test_a_layer_that_measures_uses_the_samples_it_is_to_match(pixels_alike, wanted, verdict):
    # samples that are worth one value each, or four
    field = GaussianField(CHANNELS, (2, 2), image_offset=1.0 if pixels_alike else 0.0)
    layer = layer_for(field)
    convert(layer, "matched", matched_batch_size=wanted if pixels_alike else wanted // 4)
    for x in field.batches(2, 300, 1):
        layer(x)
    found = only(layer, field.batches(2, BATCHES, 0))
    assert found.noise.effective_values * found.noise.pooled_batches == pytest.approx(wanted, rel=0.25)
    assert found.verdict == verdict


VERDICTS = {
    "enough values": (GaussianField(CHANNELS, (8, 8)), 2, ("fine", "none")),
    "few values": (GaussianField(CHANNELS), 4, ("noisy", "matched")),
    "few effective values": (
        GaussianField(CHANNELS, (4, 4), image_offset=1.0),
        8,
        ("noisy", "matched"),
    ),
}


@pytest.mark.parametrize(("field", "m", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(field, m, expected):
    found = measured(field, m)
    assert (found.verdict, found.recommendation) == expected


@pytest.mark.parametrize(
    ("field", "m", "ideal"), [(FIELDS["vectors"][0], 2, 32), (VERDICTS["few effective values"][0], 8, 32)]
)
def test_the_ideal_batch_has_32_effective_values(field, m, ideal):
    found = measured(field, m)
    assert found.ideal_batch_size == pytest.approx(ideal, rel=0.12)
    assert only(layer_for(field), field.batches(2 * ideal, BATCHES, 1)).verdict == "fine"


def mixed():
    return nn.Sequential(
        nn.BatchNorm2d(CHANNELS), nn.Flatten(), nn.Linear(CHANNELS * 64, 4), nn.BatchNorm1d(4)
    )


def test_a_model_is_recommended_what_its_neediest_layer_needs():
    found = diagnose(mixed(), GaussianField(CHANNELS, (8, 8)).batches(2, BATCHES, 0))
    assert [layer.verdict for layer in found.layers] == ["fine", "noisy"]
    assert found.recommendation == "matched"
    assert found.ideal_batch_size == found.layers[1].ideal_batch_size
    assert "Recommended: mbnorm.convert(model), or shuffled batches of" in found.reason
    assert "1 of 2 layers" in found.reason


def test_a_layer_whose_worth_has_halved_since_is_told_again():
    layer = layer_for(VERDICTS["few values"][0])
    convert(layer, "matched", matched_batch_size=12, measured=False)
    assert only(layer, GaussianField(CHANNELS).batches(4, BATCHES, 0)).verdict == "noisy"


@on_every_method
def test_the_recalibrated_mismatch_is_that_of_a_recalibrated_layer(method):
    layer = trained(method)[1]
    # far from 0, where differences of large sums would show
    batches = [torch.randn(30, 6) * 2 + 1000 for _ in range(8)]
    expected = only(layer, batches).noise.recalibrated_mismatch
    recalibrate(layer, batches)
    assert only(layer, batches).noise.mismatch == pytest.approx(expected, rel=0.01)


def test_a_net_that_is_noisy_and_stale_is_told_both():
    layer, x = nn.BatchNorm1d(CHANNELS), torch.randn(BATCHES, 2, CHANNELS)
    recalibrate(layer, x)
    assert not diagnose(layer, x).stale
    layer.running_mean += 1
    found = diagnose(layer, x)
    assert (found.recommendation, found.stale) == ("matched", True)
    assert "mbnorm.recalibrate(model, batches) before you evaluate this net as it is" in found.reason


def test_statistics_that_a_net_has_learned_with_are_not_to_be_recalibrated():
    # its memory is as far from these data as its running statistics
    layer = nn.BatchNorm1d(CHANNELS)
    convert(layer, "matched")
    for _ in range(300):
        layer(torch.randn(2, CHANNELS))
    x = torch.randn(BATCHES, 2, CHANNELS) + 1
    found = diagnose(layer, x)
    assert found.layers[0].noise.running_mean_error == pytest.approx(1, rel=0.1)
    assert found.layers[0].noise.recalibrated_mismatch > 2 * found.layers[0].noise.mismatch
    assert (found.layers[0].stale, found.stale, found.recommendation) == (True, False, "none")
    assert "not those of the data, but the net was trained with statistics like these" in found.reason
    layer.memory_mean += 1
    assert diagnose(layer, x).recommendation == "recalibrate"


def test_all_layers_together_say_whether_to_recalibrate():
    x = torch.randn(BATCHES, 2, CHANNELS) + 1
    lagging, plain = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
    convert(lagging, "matched")
    for _ in range(300):
        lagging(torch.randn(2, CHANNELS))
    model = nn.Sequential(lagging, plain)
    assert not diagnose(model, x).stale
    plain.running_mean += 10
    assert diagnose(model, x).stale


def everything(model):
    state = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    tensors = [id(b) for b in model.buffers()]
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return state, tensors, modes, hooks, torch.get_rng_state()


def same(first, second):
    (state, *rest, rng), (other_state, *other_rest, other_rng) = first, second
    equal = all(torch.equal(value, other_state[name]) for name, value in state.items())
    return equal and rest == other_rest and torch.equal(rng, other_rng)


@pytest.mark.parametrize("training", [True, False])
@on_every_method
def test_nothing_changes(method, training):
    model = trained(method).train(training)
    loader = DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=2, shuffle=True)
    before = everything(model)
    diagnose(model, loader)
    assert same(everything(model), before)
    assert all(p.grad is None for p in model.parameters())


class Broken(Exception):
    pass


def broken_loader():
    yield torch.randn(2, 4)
    raise Broken


@on_every_method
def test_nothing_changes_if_the_loader_raises(method):
    model = trained(method)
    before = everything(model)
    with pytest.raises(Broken):
        diagnose(model, broken_loader())
    assert same(everything(model), before)


@on_every_method
def test_training_goes_on_as_if_nothing_had_been(method):
    models = trained(method), trained(method)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if method != "stock":
            DoubleForward(model, optimizer)
        torch.manual_seed(1)
        for _ in range(6):
            model(torch.randn(3, 4)).square().mean().backward()
            if model is models[1]:
                # between a forward and the step that Double-Forward repeats it after
                diagnose(model, torch.ones(3, 5, 4).cumsum(0))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x, 0), lambda x: {"input": x}], ids=["tensor", "tuple", "mapping"]
)
def test_batches_come_in_every_usual_form(form):
    x = torch.randn(9, 4, 6)
    layer = nn.BatchNorm1d(6)
    assert diagnose(layer, [form(b) for b in x], device="cpu") == diagnose(layer, x)


def test_forward_says_how_to_call_the_model():
    x, layer = torch.randn(9, 4, 6), nn.BatchNorm1d(6)
    found = diagnose(
        layer, [{"image": b} for b in x], forward=lambda model, batch: model(batch["image"] * 1.0)
    )
    assert found == diagnose(layer, x)


def test_layers_without_running_statistics_and_of_sync_batch_norm_are_measured():
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, track_running_stats=False), nn.SyncBatchNorm(CHANNELS))
    found = diagnose(model, GaussianField(CHANNELS, (4, 4)).batches(2, BATCHES, 0))
    for layer in found.layers:
        assert layer.noise.effective_values == pytest.approx(32, rel=0.1)
    assert model[0].running_mean is None


def test_a_shared_layer_counts_each_call_and_an_unreached_one_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(F.relu(self.used(x)))

    found = diagnose(Net(), torch.randn(10, 8, 3))
    assert [(layer.name, layer.noise.batches) for layer in found.layers] == [("used", 20)]
    assert found.unreached == ("unused",)
    assert "not reached: unused" in str(found)


def test_empty_batches_do_not_count():
    x = torch.randn(10, 8, 3)
    assert diagnose(nn.BatchNorm1d(3), [*x, x[0, :0]]) == diagnose(nn.BatchNorm1d(3), x)


def test_memory_does_not_grow_with_the_batches():
    layer, sizes = nn.BatchNorm1d(3), []
    for count in (2, 50):
        meters = []

        def keep(model, x, meters=meters):
            meters[:] = [c.cell_contents for h in layer._forward_pre_hooks.values() for c in h.__closure__]
            model(x)

        diagnose(layer, torch.randn(count, 8, 3), forward=keep)
        (meter,) = (m for held in meters if isinstance(held, dict) for m in held.values() if callable(m))
        sizes.append(sum(t.numel() for t in vars(meter).values() if isinstance(t, torch.Tensor)))
    assert sizes == [14 * 3, 14 * 3]


def test_the_table_has_a_line_for_each_layer_and_the_reason_of_what_is_not_fine():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    text = str(diagnose(model, torch.randn(50, 2, 4)))
    above, heading, row, *_, reason, last = text.splitlines()
    assert above.split() == ["mean", "var", "or", "batches"]
    assert heading.split() == [
        *("layer", "type", "n", "n_eff", "error", "error", "verdict", "recommended", "of"),
    ]
    assert len(above) <= len(heading) <= 80
    assert row.split()[:3] == ["1", "BatchNorm1d", "2"]
    assert reason.startswith("1: a batch has 2 values a channel, as noisy as ")
    assert last.startswith("noisy: 1 of 1 layers normalize their batches with too few effective values")


def test_the_table_explains_each_of_its_columns_and_has_no_others():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(5.0)
    stale = str(diagnose(layer, torch.randn(50, 64, 3)))
    assert "running mean  error of running_mean, in standard deviations of the channel" in stale
    assert "running mean" not in str(diagnose(nn.BatchNorm1d(3), torch.randn(50, 64, 3)))
    above, heading = stale.splitlines()[:2]
    words = [name for name, *_ in map(str.split, stale.split("\n\n")[1].splitlines())]
    assert len(words) == len(re.findall(r"\S+(?: \S+)*", heading)) - 2  # a name and a type explain themselves
    assert {"n", "n_eff", "mean", "var", "train", "running", "verdict", "recommended"} == set(words)
    assert above.split()[:2] == ["mean", "var"]


def test_the_table_says_how_many_values_normalize_a_batch():
    layer = nn.BatchNorm1d(3)
    assert "n_used" not in str(diagnose(layer, torch.randn(50, 2, 3)))
    convert(layer, "momentum", history_weight=0.5)
    layer(torch.randn(8, 3))
    kept = str(diagnose(layer, torch.randn(50, 2, 3))).splitlines()[2].split()
    frozen = str(
        diagnose(nn.ModuleList([layer.eval()]), torch.randn(50, 2, 3), forward=lambda _, x: layer(x))
    )
    # after the name of the model itself, in three words, and the type
    assert float(kept[6]) == pytest.approx(3 * float(kept[5]), rel=0.01)
    assert frozen.splitlines()[1].split()[4] == "n_used"
    assert frozen.splitlines()[2].split()[4] == "-"


def test_json_has_all_that_was_found_and_null_for_what_is_infinite():
    found = diagnose(nn.BatchNorm1d(3), torch.randn(1, 8, 3).expand(4, 8, 3))
    assert found.layers[0].noise.effective_values == math.inf
    record = json.loads(found.to_json())
    assert record["recommendation"] == "none"
    (layer,) = record["layers"]
    assert layer["noise"]["effective_values"] is None
    assert layer["noise"]["values"] == 8
    assert set(layer["noise"]) == set(found.layers[0].noise._fields)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(3, 3), torch.randn(4, 2, 3), "the model has no batch norm"),
        (nn.BatchNorm1d(3), [], "at least 2 batches to reach a batch norm, got 0"),
        (nn.BatchNorm1d(3), torch.randn(1, 2, 3), "at least 2 batches to reach a batch norm, got 1"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(model, batches, message):
    with pytest.raises(ValueError, match=message):
        diagnose(model, batches)
