"""masks:PATH, a folder of images and a folder of masks."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from mbnorm.experiments.dataset import Parts
from mbnorm.experiments.sources.findings import found_in
from mbnorm.experiments.sources.folders import check_decodable
from mbnorm.experiments.sources.images import (
    GRAY,
    LARGEST_SIDE,
    Picture,
    any_skipped,
    as_tensor,
    channels_of,
    decoded,
    files_in,
)
from mbnorm.experiments.sources.splits import EVERY_FIFTH, TEST_SPLITS, check_enough

MULTIPLE = 16
"""Sides are multiples of it, so that nets can halve their maps four times."""
MOST_CLASSES = 256
COLORED = 1 << 24
"""Is added to the code of a pixel that is not gray, so that no gray has the same code."""


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images with a class for each pixel, decoded when they are asked for.

    Args:
        pairs: the files of image and mask.
        shape: channels, 1 or 3, height and width; both are scaled to cover it and cropped at the centre.
        codes: the values that masks have, in ascending order: the first is class 0.
    """

    def __init__(self, pairs: list[tuple[Path, Path]], shape: torch.Size, codes: Tensor) -> None:
        self.pairs, self.shape, self.codes = pairs, shape, codes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[int(index)]
        _, height, width = self.shape
        inputs = as_tensor(decoded(image, str(image)), self.shape)
        fitted = ImageOps.fit(_mask(mask), (width, height), method=Image.Resampling.NEAREST)
        return inputs, torch.searchsorted(self.codes, _codes(fitted))


def read(place: str) -> Parts:
    """Open a folder with the folders images and masks, or with two such folders, train and test.

    The mask of an image is the file of the same name but for its suffix. The values that masks have are the
    classes, in ascending order; in colored masks each color is one, in masks with a palette each index.
    Where nothing is there to test on, it is every fifth image. All images are brought to the shape of the
    first.

    Raises:
        ValueError: a folder is missing or empty, an image has no mask or a mask no image, their sizes
            differ, one cannot be decoded, or a value is in masks to test on alone.
    """
    path = Path(place)
    if not path.is_dir():
        raise ValueError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    tests = [path / name for name in TEST_SPLITS if (path / name).is_dir()]
    if (path / "train").is_dir() and tests:
        train, test = _pairs(path / "train"), _pairs(tests[0])
    else:
        pairs = _pairs(path)
        train = [pair for number, pair in enumerate(pairs, 1) if number % EVERY_FIFTH]
        test = pairs[EVERY_FIFTH - 1 :: EVERY_FIFTH]
    sizes = check_decodable([image for image, _ in (*train, *test)], path)
    # the classes of all are known only when all are decoded
    found = found_in([mask for _, mask in (*train, *test)], _look, path, "masks")
    for (image, mask), (width, height), fact in zip((*train, *test), sizes, found, strict=True):
        if fact["size"] != [width, height]:
            other_width, other_height = fact["size"]
            raise ValueError(
                f"{mask}: {other_width}x{other_height} pixels, and its image {image} has {width}x{height}"
            )
    known = {code for fact in found[: len(train)] for code in fact["values"]}
    if len(known) > MOST_CLASSES:
        raise ValueError(f"{path}: expected at most {MOST_CLASSES} values in its masks, got {len(known)}")
    for (_, mask), fact in zip(test, found[len(train) :], strict=True):
        unknown = sorted(set(fact["values"]) - known)
        if unknown:
            raise ValueError(f"{mask}: the value {_shown(unknown[0])} is in no mask to train on")
    codes = torch.tensor(sorted(known))
    check_enough(place, len(codes), len(train), len(test))
    shape = _shape(decoded(train[0][0], str(train[0][0])))
    commonest = torch.searchsorted(codes, torch.tensor([fact["commonest"] for fact in found[: len(train)]]))
    wrapped = partial(any_skipped, count=len(train) + len(test))
    return Parts(
        wrapped(MaskedImages(train, shape, codes)),
        wrapped(MaskedImages(test, shape, codes)),
        commonest,
        shape,
        len(codes),
        per_pixel=True,
    )


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    images, masks = _by_stem(path / "images"), _by_stem(path / "masks")
    for stem, image in images.items():
        if stem not in masks:
            raise ValueError(f"{image}: no mask of that name in {path / 'masks'}")
    for stem, mask in masks.items():
        if stem not in images:
            raise ValueError(f"{mask}: no image of that name in {path / 'images'}")
    return [(image, masks[stem]) for stem, image in images.items()]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one of images and one of masks")
    found: dict[str, Path] = {}
    for file in files_in(folder):
        other = found.setdefault(file.stem, file)
        if other is not file:
            raise ValueError(f"{file}: {other.name} has the same name")
    if not found:
        raise ValueError(f"{folder}: no images in it")
    return found


def _look(file: Path) -> dict[str, Any]:
    """Return the size of a mask, the values that it has and the most frequent one."""
    mask = _mask(file)
    values, counts = torch.unique(_codes(mask), return_counts=True)
    if len(values) > MOST_CLASSES:
        raise ValueError(f"{file}: expected at most {MOST_CLASSES} values in a mask, got {len(values)}")
    commonest = int(values[counts.argmax()])
    return {"size": list(mask.size), "values": values.tolist(), "commonest": commonest}


def _mask(file: Path) -> Picture:
    """Return a mask in one of the modes P, I and RGB."""
    picture = decoded(file, str(file))
    if picture.mode == "P":
        return picture
    if picture.mode == "F":
        raise ValueError(f"{file}: expected whole numbers in a mask")
    return picture.convert("I" if picture.mode in GRAY else "RGB")


def _codes(mask: Picture) -> Tensor:
    """Return a number for each pixel, shape (H, W), ascending with gray values and indices."""
    width, height = mask.size
    content = bytearray(mask.tobytes())
    if mask.mode == "P":
        return torch.frombuffer(content, dtype=torch.uint8).view(height, width).long()
    if mask.mode == "I":
        return torch.frombuffer(content, dtype=torch.int32).view(height, width).long()
    red, green, blue = torch.frombuffer(content, dtype=torch.uint8).view(height, width, 3).long().unbind(2)
    gray = (red == green) & (green == blue)
    return torch.where(gray, red, COLORED + (red << 16) + (green << 8) + blue)


def _shown(code: int) -> str:
    return str(code) if code < COLORED else f"#{code - COLORED:06x}"


def _shape(picture: Picture) -> torch.Size:
    """Return the shape that all images are brought to: the first's, with sides of 224 at most."""
    scale = min(1.0, LARGEST_SIDE / max(picture.size))
    width, height = (int(side * scale) for side in picture.size)
    width, height = (side // MULTIPLE * MULTIPLE or side for side in (width, height))
    return torch.Size((channels_of(picture), height, width))
