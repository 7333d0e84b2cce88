"""The scripts that make npz files of public data."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbnorm.experiments.data import load

DRAWS = np.random.default_rng(0)


def script(name):
    path = Path(__file__).parent.parent / "data" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"data_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cifar10, hippocampus = script("cifar10"), script("hippocampus")


@pytest.fixture
def package(tmp_path):
    """A package of 3 images in each file."""
    images = DRAWS.integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
    for name, rows in zip((*cifar10.TRAIN, "test_batch.png"), images.reshape(6, 3, 1024, 3), strict=True):
        Image.fromarray(rows).save(tmp_path / name)
    (tmp_path / "train_lables.json").write_text(json.dumps([i % 10 for i in range(15)]))
    (tmp_path / "test_lables.json").write_text("[3, 8, 8]")
    return tmp_path, images


def test_an_image_of_cifar_is_a_row_of_a_picture(package):
    folder, images = package
    arrays = cifar10.read(folder)
    assert np.array_equal(arrays["images"], images[:15])
    assert np.array_equal(arrays["test_images"], images[15:])
    assert arrays["labels"].tolist() == [i % 10 for i in range(15)]
    assert arrays["test_labels"].tolist() == [3, 8, 8]


@pytest.fixture
def cifar(monkeypatch):
    """A hundredth of its images, with their mean and standard deviation in each channel."""
    monkeypatch.setattr(cifar10, "OF_EACH_CLASS", {"": 50, "test_": 10})
    mean, sd = np.array(cifar10.MEAN), np.array(cifar10.SD)
    arrays = {}
    for part, count in (("", 500), ("test_", 100)):
        sides = np.where(np.arange(count)[:, None, None, None] % 2, 1, -1)
        values = np.broadcast_to(255 * (mean + sides * sd), (count, 32, 32, 3))
        # rounded up and down as often as keeps the mean
        images = np.floor(values + DRAWS.random(values.shape)).astype(np.uint8)
        arrays |= {f"{part}images": images, f"{part}labels": np.arange(count) % 10}
    return arrays


def test_cifar_is_known_by_its_mean_and_standard_deviation(cifar):
    cifar10.check(cifar)
    with pytest.raises(
        ValueError, match=r"expected mean and standard deviation \(0.4914, 0.247\) in channel 0"
    ):
        cifar10.check({**cifar, "images": cifar["images"][..., ::-1]})


def test_cifar_is_known_by_the_number_of_its_images(cifar):
    with pytest.raises(ValueError, match=r"expected 500 images of 32x32 in color, got \(499, 32, 32, 3\)"):
        cifar10.check({**cifar, "images": cifar["images"][1:]})
    with pytest.raises(ValueError, match="expected 10 images of each of 10 classes, got"):
        cifar10.check({**cifar, "test_labels": np.zeros(100, int)})


def test_a_volume_is_cropped_and_padded_around_its_middle():
    volume = DRAWS.integers(1, 9, (44, 51, 40))
    out = hippocampus.centred(volume)
    assert out.shape == (40, 56, 40)
    assert np.array_equal(out[:, 2:53], volume[2:42])
    assert out.sum() == volume[2:42].sum()


def test_the_995th_thousandth_of_a_volume_is_white():
    volume = np.arange(1001.0).reshape(7, 11, 13)
    out = hippocampus.brightened(volume).ravel()
    assert out[995] == out[1000] == 255
    assert out[:3].tolist() == [0, 0, 1]
    assert out[497] == 127


@pytest.fixture
def decathlon(tmp_path):
    """The public folder with two volumes, and what is in them."""
    nibabel = pytest.importorskip("nibabel")
    found = []
    for number, shape in enumerate([(36, 50, 40), (41, 57, 30)]):
        volume = DRAWS.integers(0, 400, shape).astype(np.float32)
        mask = DRAWS.integers(0, 3, shape).astype(np.uint8)
        for kind, values in (("imagesTr", volume), ("labelsTr", mask)):
            path = tmp_path / kind / f"hippocampus_{number:03}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
        found.append((volume, mask))
    # as macOS leaves them, and the public archive has them
    (tmp_path / "imagesTr" / "._hippocampus_000.nii.gz").write_bytes(b"x")
    return tmp_path, found


def test_the_decathlons_volumes_become_data(decathlon, tmp_path):
    folder, found = decathlon
    arrays = hippocampus.read(folder)
    assert arrays["volumes"].shape == arrays["masks"].shape == (2, 40, 56, 40)
    for number, (volume, mask) in enumerate(found):
        assert np.array_equal(arrays["masks"][number], hippocampus.centred(mask))
        assert np.array_equal(
            arrays["volumes"][number], hippocampus.centred(hippocampus.brightened(volume.astype(np.float64)))
        )


def test_main_writes_what_npz_reads(tmp_path, monkeypatch, capsys):
    masks = DRAWS.integers(0, 3, (10, 8, 8, 8), dtype=np.uint8)
    monkeypatch.setattr(hippocampus, "read", lambda folder: {"volumes": masks * 80, "masks": masks})
    hippocampus.main(tmp_path, tmp_path / "x.npz")
    assert load(f"npz:{tmp_path / 'x.npz'}").classes == 3
    assert "shares of the classes" in capsys.readouterr().out


def test_a_volume_without_a_mask_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'imagesTr'}: no volumes in it"):
        hippocampus.read(tmp_path)
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{tmp_path / 'labelsTr' / 'a.nii.gz'}: no such file"):
        hippocampus.read(tmp_path)
