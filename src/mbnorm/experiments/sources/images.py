"""Image files: decoded, and as a dataset."""

import io
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

MOST_DECODED = 20_000
"""Up to so many images are decoded before training, to find those that are damaged."""
LARGEST_SIDE = 224
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
GRAY = ("1", "L", "I", "I;16", "F")

Picture = Image.Image


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images with a class each, decoded when they are asked for.

    Args:
        picture: gives the image of an index; raises a ValueError if it cannot be decoded.
        targets: a class per image.
        shape: channels, 1 or 3, height and width; images are scaled to cover it and cropped at the centre.
    """

    def __init__(self, picture: Callable[[int], Picture], targets: Tensor, shape: torch.Size) -> None:
        self.picture, self.targets, self.shape = picture, targets, shape

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return as_tensor(self.picture(int(index)), self.shape), self.targets[index]


class Skipping(Dataset[tuple[Tensor, Tensor]]):
    """A dataset in which the next image stands in for one that cannot be read; each is named and counted.

    Args:
        images: raises a ValueError for an image that cannot be read.
    """

    def __init__(self, images: Dataset[tuple[Tensor, Tensor]]) -> None:
        self.images = images
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        for candidate in chain(range(index, len(self)), range(index)):
            if candidate in self.skipped:
                continue
            try:
                return self.images[candidate]
            except ValueError as error:
                self.skipped.add(candidate)
                logging.getLogger("mbnorm").warning("%s; %d skipped so far", error, len(self.skipped))
        raise ValueError(f"none of {len(self)} images can be read")


def files_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, in the order of their names."""
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]


def decoded(content: Path | bytes, place: str) -> Picture:
    """Return the image in a file or in bytes.

    Raises:
        ValueError: it cannot be decoded; the line names ``place``.
    """
    try:
        picture = Image.open(io.BytesIO(content if isinstance(content, bytes) else content.read_bytes()))
        picture.load()
    # damaged files raise nearly anything
    except Exception as error:
        raise ValueError(f"{place}: cannot be decoded as an image ({first_line(error)})") from error
    return picture


def decoded_size(file: Path) -> list[int]:
    """Return width and height of an image that can be decoded."""
    return list(decoded(file, str(file)).size)


def size_in_header(file: Path) -> list[int]:
    """Return width and height as the file's header says.

    Raises:
        ValueError: there is no such header.
    """
    try:
        with Image.open(file) as picture:
            return list(picture.size)
    except Exception as error:
        raise ValueError(f"{file}: cannot be decoded as an image ({first_line(error)})") from error


def as_tensor(picture: Picture, shape: Sequence[int]) -> Tensor:
    """Return an image as values in [-1, 1], scaled to cover the shape (C, H, W) and cropped at the centre."""
    channels, height, width = shape
    picture = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (width, height))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).movedim(2, 0).float() / 127.5 - 1


def square_like(picture: Picture) -> torch.Size:
    """Return the shape that all images are brought to: that of the first, made square and 224 at most."""
    side = min(*picture.size, LARGEST_SIDE)
    return torch.Size((channels_of(picture), side, side))


def channels_of(picture: Picture) -> int:
    """Return 1 for gray images, 3 for all others."""
    return 1 if picture.mode in GRAY else 3


def first_line(error: BaseException) -> str:
    """Return what was raised, in a line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def any_skipped(images: Any, count: int) -> Any:
    """Return the dataset, with damaged images passed over where there are too many to decode before."""
    return Skipping(images) if count > MOST_DECODED else images
