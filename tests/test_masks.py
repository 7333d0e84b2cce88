"""Folders of images and masks: what is read, and what is wrong with one in one line."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import mbnorm_says

from mbnorm.experiments.data import load, parts
from mbnorm.experiments.sources import findings, images, masks
from mbnorm.experiments.sources.images import decoded

DRAWS = np.random.default_rng(0)
SIDE = 16


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("findings")
        patch.setattr(findings, "cache_folder", lambda: folder)
        yield


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0] + [0] * 759)
    picture.save(path)


def write(folder, count=10, levels=(0, 255), side=SIDE):
    """Images, and masks with these values; return both."""
    pictures = DRAWS.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    classes = DRAWS.integers(0, len(levels), (count, side, side))
    classes[:, 0, : len(levels)] = range(len(levels))
    for i in range(count):
        save(folder / "images" / f"{i:02}.png", pictures[i])
        save(folder / "masks" / f"{i:02}.png", np.asarray(levels, dtype=np.uint8)[classes[i]])
    return pictures, torch.from_numpy(classes)


def test_the_values_of_masks_are_classes_in_their_order(tmp_path):
    pictures, classes = write(tmp_path, levels=(0, 100, 255))
    data = load(f"masks:{tmp_path}")
    assert (data.classes, data.per_pixel, data.shape) == (3, True, (3, SIDE, SIDE))
    assert torch.equal(data.test_targets, classes[[4, 9]])
    assert torch.equal(data.train_targets, classes[[0, 1, 2, 3, 5, 6, 7, 8]])
    first, _ = parts(f"masks:{tmp_path}").train[0]
    torch.testing.assert_close(first, torch.from_numpy(pictures[0]).movedim(2, 0) / 127.5 - 1)


def test_a_part_to_test_on_may_have_its_own_folders(tmp_path):
    write(tmp_path / "train", 6)
    _, classes = write(tmp_path / "val", 2)
    data = load(f"masks:{tmp_path}")
    assert len(data.train_inputs) == 6
    assert torch.equal(data.test_targets, classes)


def test_images_and_masks_may_be_of_different_formats(tmp_path):
    write(tmp_path)
    for file in (tmp_path / "images").iterdir():
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    for file in (tmp_path / "masks").iterdir():
        Image.open(file).save(file.with_suffix(".tiff"))
        file.unlink()
    assert load(f"masks:{tmp_path}").train_inputs.shape == (8, 3, SIDE, SIDE)


def test_the_indices_of_a_palette_are_classes(tmp_path):
    _, classes = write(tmp_path, levels=(0, 1, 2))
    for i in range(10):
        save(tmp_path / "masks" / f"{i:02}.png", classes[i].numpy().astype(np.uint8), mode="P")
    assert decoded(tmp_path / "masks" / "00.png", "").mode == "P"
    assert torch.equal(load(f"masks:{tmp_path}").test_targets, classes[[4, 9]])


def test_colors_are_classes_beside_black_and_white(tmp_path):
    _, classes = write(tmp_path)
    colors = np.array([[0, 0, 0], [255, 255, 255], [0, 0, 255], [255, 0, 0]], dtype=np.uint8)
    classes = torch.from_numpy(DRAWS.integers(0, 4, (10, SIDE, SIDE)))
    for i in range(10):
        save(tmp_path / "masks" / f"{i:02}.png", colors[classes[i]])
    data = load(f"masks:{tmp_path}")
    assert data.classes == 4
    assert torch.equal(data.test_targets, classes[[4, 9]])


def test_masks_of_16_bits_keep_their_values(tmp_path):
    _, classes = write(tmp_path)
    for i in range(10):
        save(tmp_path / "masks" / f"{i:02}.png", (classes[i].numpy() * 1000).astype(np.uint16))
    assert torch.equal(load(f"masks:{tmp_path}").test_targets, classes[[4, 9]])


def test_a_mask_is_cropped_as_its_image_and_its_classes_are_not_mixed(tmp_path):
    """Where every class is of one shade, a crop shows in both."""
    write(tmp_path)
    shade = np.zeros((64, 96), dtype=np.uint8)
    shade[:, 64:] = 255
    save(tmp_path / "images" / "03.png", shade)
    save(tmp_path / "masks" / "03.png", shade)
    image, mask = parts(f"masks:{tmp_path}").train[3]
    assert mask.unique().tolist() == [0, 1]
    assert torch.equal(mask == 1, image[0] > 0)


def test_images_are_brought_to_sides_that_nets_can_halve(tmp_path):
    write(tmp_path, side=37)
    assert parts(f"masks:{tmp_path}").shape == (3, 32, 32)


def test_an_image_counts_as_of_the_most_frequent_class_of_its_pixels(tmp_path):
    write(tmp_path)
    white = np.full((SIDE, SIDE), 255, dtype=np.uint8)
    white[0, :2] = 0
    save(tmp_path / "masks" / "02.png", white)
    assert parts(f"masks:{tmp_path}").train_targets[2] == 1


def test_masks_are_not_decoded_again_while_they_stay_as_they_are(tmp_path, monkeypatch):
    write(tmp_path)
    parts.__wrapped__(f"masks:{tmp_path}")
    looked_at, look = [], masks._look
    monkeypatch.setattr(masks, "_look", lambda file: looked_at.append(file) or look(file))
    changed = tmp_path / "masks" / "05.png"
    save(changed, np.eye(SIDE, dtype=np.uint8) * 255)
    parts.__wrapped__(f"masks:{tmp_path}")
    assert looked_at == [changed]


def test_of_many_images_a_damaged_one_is_passed_over_with_its_mask(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(images, "MOST_DECODED", 5)
    write(tmp_path)
    path = tmp_path / "images" / "01.png"
    path.write_bytes(path.read_bytes()[:100])
    train = parts(f"masks:{tmp_path}").train
    assert all(torch.equal(a, b) for a, b in zip(train[1], train[2], strict=True))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [str(path)]


def missing(folder):
    shutil.rmtree(folder)
    return folder, "no such folder"


def no_masks(folder):
    shutil.rmtree(folder / "masks")
    return folder / "masks", "no such folder; expected one of images and one of masks"


def empty(folder):
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    return folder / "images", "no images in it"


def no_mask(folder):
    (folder / "masks" / "03.png").unlink()
    return folder / "images" / "03.png", f"no mask of that name in {folder / 'masks'}"


def no_image(folder):
    (folder / "images" / "03.png").unlink()
    return folder / "masks" / "03.png", f"no image of that name in {folder / 'images'}"


def two_images(folder):
    save(folder / "images" / "03.bmp", np.zeros((SIDE, SIDE), dtype=np.uint8))
    return folder / "images" / "03.png", "03.bmp has the same name"


def other_size(folder):
    save(folder / "masks" / "03.png", np.zeros((SIDE, 2 * SIDE), dtype=np.uint8))
    return (
        folder / "masks" / "03.png",
        f"32x16 pixels, and its image {folder / 'images' / '03.png'} has 16x16",
    )


def damaged_image(folder):
    path = folder / "images" / "03.png"
    path.write_bytes(path.read_bytes()[:100])
    return path, "cannot be decoded as an image"


def damaged_mask(folder):
    path = folder / "masks" / "03.png"
    path.write_bytes(path.read_bytes()[:60])
    return path, "cannot be decoded as an image"


def lossy(folder):
    pixels = DRAWS.integers(0, 256, (SIDE, 2 * SIDE, 3), dtype=np.uint8)
    save(folder / "images" / "03.png", pixels)
    save(folder / "masks" / "03.png", pixels)
    return folder / "masks" / "03.png", "expected at most 256 values in a mask, got 51"


def real(folder):
    Image.fromarray(np.zeros((SIDE, SIDE), dtype=np.float32)).save(folder / "masks" / "03.tiff")
    (folder / "masks" / "03.png").unlink()
    return folder / "masks" / "03.tiff", "expected whole numbers in a mask"


def unknown_value(folder):
    save(folder / "masks" / "04.png", np.full((SIDE, SIDE), 7, dtype=np.uint8))
    return folder / "masks" / "04.png", "the value 7 is in no mask to train on"


def unknown_color(folder):
    save(folder / "masks" / "04.png", np.full((SIDE, SIDE, 3), (1, 2, 3), dtype=np.uint8))
    return folder / "masks" / "04.png", "the value #010203 is in no mask to train on"


def one_class(folder):
    for i in range(10):
        save(folder / "masks" / f"{i:02}.png", np.zeros((SIDE, SIDE), dtype=np.uint8))
    return folder, "expected at least 2 classes and 5 images of one, got 1 classes and 8 images"


DAMAGES = [
    *(
        missing,
        no_masks,
        empty,
        no_mask,
        no_image,
        two_images,
        other_size,
        damaged_image,
        damaged_mask,
        lossy,
    ),
    *(real, unknown_value, unknown_color, one_class),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_wrong_is_named_in_one_line(tmp_path, damage):
    folder = tmp_path / "data"
    write(folder)
    path, message = damage(folder)
    status, out, err = mbnorm_says("compare", "--data", f"masks:{folder}", "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert f"--data: {path}: {message}" in err
    assert err.count("\n") == 1
