"""Data from npz files and from MNIST's family: what is read, and what is wrong with them in one line."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch
from test_cli import mbnorm_says

from mbnorm.experiments.data import load, parts

DRAWS = np.random.default_rng(0)


def bytes_of(*shape):
    return DRAWS.integers(0, 256, shape, dtype=np.uint8)


def classes_of(*shape, classes=3):
    """Whole numbers with each class in the first samples."""
    values = DRAWS.integers(0, classes, shape, dtype=np.uint8)
    values.flat[:classes] = range(classes)
    return values


IMAGES = {"images": bytes_of(40, 6, 5, 3), "labels": np.arange(40) % 3}
TESTED = {"test_images": bytes_of(8, 6, 5, 3), "test_labels": np.arange(8) % 3}


def saved(folder, **arrays):
    np.savez_compressed(folder / "data.npz", **arrays)
    return f"npz:{folder / 'data.npz'}"


def unscaled(inputs, like):
    """Channels first, centred and scaled as ``like``, written out in float64."""
    inputs, like = (np.moveaxis(x, -1, 1).astype(np.float64) for x in (inputs, like))
    axes = (0, *range(2, like.ndim))
    mean = like.mean(axes, keepdims=True)
    return torch.from_numpy((inputs - mean) / (like - mean).std(ddof=1)).float()


def test_images_and_their_labels_are_read(tmp_path):
    data = load(saved(tmp_path, **IMAGES, **TESTED))
    torch.testing.assert_close(data.train_inputs, unscaled(IMAGES["images"], IMAGES["images"]))
    torch.testing.assert_close(data.test_inputs, unscaled(TESTED["test_images"], IMAGES["images"]))
    assert data.train_targets.tolist() == IMAGES["labels"].tolist()
    assert data.test_targets.tolist() == TESTED["test_labels"].tolist()
    assert (data.classes, data.per_pixel) == (3, False)


def test_gray_images_have_a_channel(tmp_path):
    assert load(saved(tmp_path, images=bytes_of(40, 6, 5), labels=IMAGES["labels"])).shape == (1, 6, 5)


def test_every_fifth_image_of_a_class_is_tested_on(tmp_path):
    data = load(saved(tmp_path, **IMAGES))
    every = unscaled(IMAGES["images"], IMAGES["images"][[i for i in range(40) if i // 3 % 5 != 4]])
    torch.testing.assert_close(data.test_inputs, every[[12, 13, 14, 27, 28, 29]])
    assert data.test_targets.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("shape", [(20, 8, 4), (20, 4, 8, 2)], ids=["images", "volumes"])
def test_masks_have_a_class_for_each_pixel_and_every_fifth_sample_is_tested_on(tmp_path, shape):
    key = "images" if len(shape) == 3 else "volumes"
    masks = classes_of(*shape)
    data = load(saved(tmp_path, **{key: bytes_of(*shape), "masks": masks}))
    assert data.shape == (1, *shape[1:])
    assert (data.classes, data.per_pixel) == (3, True)
    assert torch.equal(data.test_targets, torch.from_numpy(masks[4::5]).long())


def test_masks_may_be_boolean_and_images_floating(tmp_path):
    images = DRAWS.normal(size=(20, 4, 4)).astype(">f8")
    data = load(saved(tmp_path, images=images, masks=images > images.mean()))
    rest = images[np.arange(20) % 5 != 4]
    torch.testing.assert_close(data.train_inputs, unscaled(rest[..., None], rest[..., None]))
    assert data.train_targets.tolist() == (rest > images.mean()).astype(int).tolist()


def test_npz_files_are_the_same_read_one_by_one(tmp_path):
    name = saved(tmp_path, **IMAGES)
    image, target = parts(name).train[7]
    assert torch.equal(image, load(name).train_inputs[7])
    assert target == load(name).train_targets[7]


def without(key):
    return lambda: {k: v for k, v in {**IMAGES, **TESTED}.items() if k != key}


def altered(**arrays):
    return lambda: {**IMAGES, **TESTED, **arrays}


def nan():
    images = np.zeros((40, 6, 5))
    images[3, 2, 1] = np.nan
    return {"images": images, "labels": IMAGES["labels"]}


WRONG_ARRAYS = {
    "no images": (without("images"), "expected one array named images or volumes, got labels, test_images"),
    "no labels": (without("labels"), "expected one array named labels or masks, got images, test_images"),
    "two targets": (altered(masks=IMAGES["labels"]), "expected one array named labels or masks, got images,"),
    "no test labels": (without("test_labels"), "test_images without test_labels"),
    "no test images": (without("test_images"), "test_labels without test_images"),
    "flat": (altered(images=bytes_of(40, 90)), r"expected images of shape (N, H, W[, C]), got (40, 90)"),
    "empty": (altered(images=bytes_of(0, 6, 5, 3)), "got (0, 6, 5, 3)"),
    "channels first": (altered(images=bytes_of(40, 3, 32, 32)), "with channels last, got (40, 3, 32, 32)"),
    "fewer labels": (altered(labels=np.arange(39) % 3), "40 samples in images, and 39 in labels"),
    "fewer test labels": (altered(test_labels=np.arange(7) % 3), "8 samples in test_images, and 7 in test_l"),
    "label columns": (altered(labels=np.zeros((40, 1), int)), "expected labels of shape (40,), got (40, 1)"),
    "real labels": (altered(labels=np.arange(40) / 3), "expected whole numbers in labels, got float64"),
    "text labels": (altered(labels=np.array(["a", "b"] * 20)), "expected whole numbers in labels, got <U1"),
    "negative": (altered(labels=np.arange(40) % 3 - 1), "1, each at least once, got -1, 0, 1"),
    "empty class": (altered(labels=np.arange(40) % 3 * 2), "1, each at least once, got 0, 2, 4"),
    "one class": (
        altered(labels=np.zeros(40, int), test_labels=np.zeros(8, int)),
        "expected at least 2 classes",
    ),
    "other classes": (altered(test_labels=np.arange(8)), "test_labels has 3, which is not in labels"),
    "other sides": (
        altered(test_images=bytes_of(8, 6, 6, 3)),
        "test_images has samples of shape (6, 6, 3), ",
    ),
    "text": (altered(images=np.full((40, 6, 5, 3), "a")), "expected numbers in images, got <U1"),
    "nan": (nan, "a value of images is not finite"),
    "constant": (altered(images=np.full((40, 6, 5, 3), 7)), "all values of images are 7"),
    "objects": (altered(labels=np.array([0, None] * 20)), "labels cannot be read (ValueError: Object arrays"),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_wrong_arrays_are_named(tmp_path, wrong):
    arrays, message = WRONG_ARRAYS[wrong]
    name = saved(tmp_path, **arrays())
    with pytest.raises(ValueError, match=f"^{tmp_path / 'data.npz'}: .*{re.escape(message)}"):
        load(name)


def test_masks_of_other_sides_than_the_images_are_named(tmp_path):
    name = saved(tmp_path, images=bytes_of(10, 8, 8), masks=classes_of(10, 8, 4))
    with pytest.raises(ValueError, match=r"expected masks of shape \(10, 8, 8\), got \(10, 8, 4\)"):
        load(name)


def test_masks_of_0_and_255_are_no_classes(tmp_path):
    name = saved(tmp_path, images=bytes_of(10, 8, 8), masks=255 * classes_of(10, 8, 8, classes=2))
    with pytest.raises(ValueError, match=r"each at least once, got 0, 255$"):
        load(name)


def test_arrays_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mbnorm.experiments.dataset.MOST_VALUES", 1000)
    with pytest.raises(ValueError, match="40 images of 90 values do not fit into memory"):
        load(saved(tmp_path, **IMAGES))


def missing_npz(folder):
    return f"npz:{folder / 'none.npz'}", f"{folder / 'none.npz'}: no such file"


def a_folder(folder):
    return f"npz:{folder}", f"{folder}: not a file"


def text(folder):
    (folder / "x.npz").write_text("images")
    return f"npz:{folder / 'x.npz'}", f"{folder / 'x.npz'}: cannot be read as npz"


def cut(folder):
    name = saved(folder, **IMAGES)
    path = folder / "data.npz"
    path.write_bytes(path.read_bytes()[:1000])
    return name, f"{path}: cannot be read as npz (BadZipFile: "


def flipped(folder):
    name = saved(folder, **IMAGES)
    path = folder / "data.npz"
    content = bytearray(path.read_bytes())
    content[500] ^= 255
    path.write_bytes(content)
    return name, f"{path}: images cannot be read ("


def one_array(folder):
    with (folder / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    return f"npz:{folder / 'x.npz'}", f"{folder / 'x.npz'}: expected several arrays, got one"


FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(values):
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder, compressed=()):
    arrays = (bytes_of(30, 7, 6), classes_of(30), bytes_of(10, 7, 6), classes_of(10))
    for name, values in zip(FILES, arrays, strict=True):
        content = idx_bytes(values)
        if name in compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("compressed", [(), FILES, FILES[1:3]], ids=["plain", "gzip", "mixed"])
def test_files_of_mnists_family_are_read(tmp_path, compressed):
    images, labels, test_images, test_labels = write_mnist(tmp_path, compressed)
    data = load(f"idx:{tmp_path}")
    torch.testing.assert_close(data.train_inputs, unscaled(images[..., None], images[..., None]))
    torch.testing.assert_close(data.test_inputs, unscaled(test_images[..., None], images[..., None]))
    assert data.train_targets.tolist() == labels.tolist()
    assert data.test_targets.tolist() == test_labels.tolist()


def damaged_idx(number, change):
    def damage(folder):
        write_mnist(folder)
        path = folder / FILES[number]
        path.write_bytes(change(path.read_bytes()))
        return f"idx:{folder}", path

    return damage


def missing_idx(folder):
    write_mnist(folder)
    (folder / FILES[3]).unlink()
    return f"idx:{folder}", f"{folder / FILES[3]}: no such file, and none with .gz"


def no_idx_folder(folder):
    return f"idx:{folder / 'none'}", f"{folder / 'none'}: no such folder"


def wrong_magic(folder):
    name, path = damaged_idx(0, lambda content: b"\x00\x00\x0d\x03" + content[4:])(folder)
    return name, f"{path}: expected an IDX file that begins with 00000803, got 00000d03"


def labels_as_images(folder):
    name, path = damaged_idx(0, lambda content: idx_bytes(bytes_of(30)))(folder)
    return name, f"{path}: expected an IDX file that begins with 00000803, got 00000801"


def truncated_idx(folder):
    name, path = damaged_idx(2, lambda content: content[:-1])(folder)
    return name, f"{path}: expected values of shape (10, 7, 6), got 419 bytes"


def truncated_header(folder):
    name, path = damaged_idx(2, lambda content: content[:9])(folder)
    return name, f"{path}: expected an IDX file that begins with 00000803"


def other_length(folder):
    name, _ = damaged_idx(1, lambda content: idx_bytes(classes_of(29)))(folder)
    return name, f"{folder}: 30 samples in {FILES[0]}, and 29 in {FILES[1]}"


def empty_class(folder):
    name, _ = damaged_idx(1, lambda content: idx_bytes(classes_of(30) * 2))(folder)
    return name, f"{folder}: expected {FILES[1]} from 0 to the number of classes less 1, each at least once"


def truncated_gzip(folder):
    write_mnist(folder, FILES)
    path = folder / f"{FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return f"idx:{folder}", f"{path}: cannot be read ("


def no_gzip(folder):
    write_mnist(folder, FILES)
    path = folder / f"{FILES[0]}.gz"
    path.write_bytes(b"nonsense")
    return f"idx:{folder}", f"{path}: cannot be read (BadGzipFile: "


DAMAGES = [
    *(missing_npz, a_folder, text, cut, flipped, one_array),
    *(
        missing_idx,
        no_idx_folder,
        wrong_magic,
        labels_as_images,
        truncated_idx,
        truncated_header,
        other_length,
    ),
    *(empty_class, truncated_gzip, no_gzip),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_give_one_line_that_names_them(tmp_path, damage):
    name, message = damage(tmp_path)
    status, out, err = mbnorm_says("compare", "--data", name, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert f"--data: {message}" in err
    assert err.count("\n") == 1


def test_train_says_in_one_line_what_is_wrong_with_a_file(tmp_path):
    name, message = wrong_magic(tmp_path)
    status, _, err = mbnorm_says("train", "--data", name, "--out", tmp_path / "out")
    assert (status, err) == (2, f"mbnorm: {message}\n")
