import io

import pytest
import torch
from rich.console import Console

from mbnorm.experiments import pictures, progress
from mbnorm.experiments.data import EMBEDDED, load
from mbnorm.experiments.sampling import SAMPLINGS, class_of_each, largest_batch, one_epoch

on_every_data_set = pytest.mark.parametrize("name", EMBEDDED)


@on_every_data_set
def test_each_input_has_its_targets(name):
    data = load(name)
    for inputs, targets in ((data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets)):
        assert targets.shape in {inputs.shape[:1], (len(inputs), *inputs.shape[2:])}


@on_every_data_set
def test_both_parts_and_both_halves_to_test_on_show_every_class(name):
    data = load(name)
    halves = (data.test_targets[::2], data.test_targets[1::2])
    for targets in (data.train_targets, data.test_targets, *halves):
        assert targets.unique().tolist() == list(range(data.classes))


@on_every_data_set
def test_what_is_trained_on_is_centred_and_scaled(name):
    inputs = load(name).train_inputs
    assert inputs.mean().item() == pytest.approx(0, abs=1e-4)
    assert inputs.std().item() == pytest.approx(1, abs=1e-4)


@on_every_data_set
def test_a_data_set_is_the_same_every_time(name):
    first = load(name)
    again = load.__wrapped__(name)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))


def test_patches_to_train_on_and_to_test_on_share_no_pixel(monkeypatch):
    """Of a picture whose pixels are all different, each pixel is in one part only."""
    numbered = torch.arange(300 * 451, dtype=torch.float32).view(1, 300, 451)
    monkeypatch.setattr(pictures, "_picture", lambda name: numbered)
    monkeypatch.setattr(pictures, "scaled", lambda data: data)
    for data in (pictures.textures(), pictures.segments()):
        train, test = (set(inputs.flatten().tolist()) for inputs in (data.train_inputs, data.test_inputs))
        assert not train & test


def test_a_mosaic_shows_at_each_pixel_the_texture_it_says(monkeypatch):
    shades = {name: torch.full((1, 512, 512), float(c)) for c, name in enumerate(pictures.TEXTURES)}
    monkeypatch.setattr(pictures, "_picture", shades.get)
    monkeypatch.setattr(pictures, "scaled", lambda data: data)
    data = pictures.segments()
    assert torch.equal(data.train_inputs.squeeze(1), data.train_targets.float())


def test_no_voxel_of_a_volume_tells_alone():
    """The best threshold on single voxels gets a tenth of them wrong: a net must look around."""
    data = load("volumes")
    values = data.test_inputs.flatten()
    inside = data.test_targets.flatten() == 1
    best = max(((values > t) == inside).float().mean().item() for t in torch.linspace(-2, 4, 60))
    assert best < 0.93


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="expected digits, textures, photos, segments, volumes, folder:PATH"):
        load("faces")


def test_one_class_batches_of_mosaics_share_their_most_frequent_texture():
    targets = load("segments").train_targets
    batches = one_epoch("one-class", targets, 4, torch.Generator().manual_seed(0))
    commonest = class_of_each(targets)[batches]
    assert (commonest == commonest[:, :1]).all()
    assert commonest[:, 0].unique().numel() == 3


def test_the_largest_batch_of_one_class_is_that_of_the_rarest():
    targets = torch.tensor([0, 0, 0, 2, 2])
    assert largest_batch("one-class", targets) == 2
    assert largest_batch("shuffled", targets) == 5


def epoch_of(sampling, targets, batch_size=4, seed=0):
    return one_epoch(sampling, targets, batch_size, torch.Generator().manual_seed(seed))


def test_drifting_batches_go_through_the_classes_once():
    """Batches far apart in an epoch share no class, neighbors nearly all."""
    targets = torch.arange(10).repeat(100)
    classes = targets[epoch_of("drifting", targets)].float()
    means = torch.stack([classes[i : i + 25].mode().values.mode().values for i in range(0, 250, 25)])
    assert sorted(means.tolist()) == list(range(10))


def test_each_epoch_drifts_another_way():
    targets = torch.arange(10).repeat(100)
    first, second = (targets[epoch_of("drifting", targets, seed=seed)[0]] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_long_tail_falls_by_the_same_factor_from_class_to_class():
    targets = torch.arange(3).repeat(100)
    counts = targets[epoch_of("long-tailed", targets, 1)].flatten().bincount()
    assert counts.tolist() == [100, 14, 2]


def test_a_long_tail_is_of_the_same_images_in_every_epoch():
    targets = torch.arange(3).repeat(100)
    first, second = (epoch_of("long-tailed", targets, 1, seed).flatten() for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_largest_batch_is_a_batch(sampling):
    targets = torch.arange(3).repeat(20)
    most = largest_batch(sampling, targets)
    assert len(epoch_of(sampling, targets, most)) >= 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=terminal))
    assert list(progress.shown(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    assert ("reading" in screen.getvalue()) == terminal
    assert terminal or screen.getvalue() == ""
