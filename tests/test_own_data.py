"""Data of one's own in the commands: trained on, compared on, and the same after a stop."""

import numpy as np
import pytest
import test_arrays
import test_masks
from test_cli import mbnorm_says
from test_train_command import assert_same, stop_after

from mbnorm.experiments.sources import findings

__all__ = ["stop_after"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "cache_folder", lambda: tmp_path / "cache")


def npz_images(folder):
    return test_arrays.saved(folder, **test_arrays.IMAGES), "resnet8"


def npz_volumes(folder):
    draws = np.random.default_rng(0)
    volumes = draws.integers(0, 256, (20, 8, 4, 4), dtype=np.uint8)
    return test_arrays.saved(folder, volumes=volumes, masks=volumes > 99), "unet3d"


def idx(folder):
    test_arrays.write_mnist(folder)
    return f"idx:{folder}", "cnn"


def masks(folder):
    test_masks.write(folder)
    return f"masks:{folder}", "unet2d"


on_every_source = pytest.mark.parametrize(
    "source", [npz_images, npz_volumes, idx, masks], ids=lambda source: source.__name__
)


@on_every_source
def test_a_training_that_was_stopped_comes_to_the_same_end(source, tmp_path, stop_after):
    data, model = source(tmp_path)
    options = ["--data", data, "--model", model, "--batch-size", "2", "--epochs", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert mbnorm_says("train", *options, "--out", whole)[0] == 0
    relent = stop_after(3, RuntimeError("the device is lost"))
    assert mbnorm_says("train", *options, "--checkpoint-every", "0", "--out", stopped)[0] == 1
    relent()
    status, out, _ = mbnorm_says("train", *options, "--out", stopped)
    assert status == 0
    assert ": step 3 of " in out
    assert_same(whole, stopped)


@on_every_source
def test_methods_are_compared(source, tmp_path):
    data, model = source(tmp_path)
    options = ["--data", data, "--model", model, "--epochs", "1", "--methods", "group", "--seeds", "1"]
    status, _, err = mbnorm_says("compare", *options, "--jobs", "1", "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert data in (tmp_path / "out" / "table.md").read_text()


@on_every_source
def test_a_net_is_diagnosed(source, tmp_path):
    data, model = source(tmp_path)
    options = ["--data", data, "--model", model, "--batches", "3", "--out", tmp_path / "out"]
    assert mbnorm_says("diagnose", *options)[0] == 0


def test_a_net_of_images_is_refused_for_masks_before_anything_is_trained(tmp_path):
    data, _ = masks(tmp_path)
    status, _, err = mbnorm_says("compare", "--data", data, "--model", "cnn", "--out", tmp_path / "out")
    assert status == 2
    assert f"cnn gives a class per image, and these data have one per pixel: {data}" in err
    assert err.count("\n") == 1
