"""Patches of scikit-image's pictures: those to train on and those to test on share no pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mbnorm.experiments.dataset import Data, scaled

TEXTURES = ("brick", "grass", "gravel")
PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
TRAIN_PATCHES, TEST_PATCHES, SIDE = 1000, 800, 16
TRAIN_MOSAICS, TEST_MOSAICS, MOSAIC_SIDE, PIECES = 400, 200, 32, 4
TILE = 64
EVERY_THIRD = 3


def textures() -> Data:
    """Return gray patches of three textures, and which one each is of."""
    return _whence(TEXTURES)


def photos() -> Data:
    """Return colored patches of eight photos, and which one each is of."""
    return _whence(PHOTOS)


def segments() -> Data:
    """Return mosaics of the three textures, and the texture of each pixel.

    The pieces are the nearest pixels of 4 random points, each piece of a random texture.
    """
    draws = torch.Generator().manual_seed(0)
    train, test = zip(*(_tiles(_picture(name)) for name in TEXTURES), strict=True)
    drawn = *_mosaics(train, TRAIN_MOSAICS, draws), *_mosaics(test, TEST_MOSAICS, draws)
    return scaled(Data(*drawn, classes=len(TEXTURES)))


def _whence(names: Sequence[str]) -> Data:
    draws = torch.Generator().manual_seed(0)
    train, test = zip(*(_tiles(_picture(name)) for name in names), strict=True)
    drawn, (images, classes) = _labelled(train, TRAIN_PATCHES, draws), _labelled(test, TEST_PATCHES, draws)
    # or every other test image would be one of every other class
    order = torch.randperm(TEST_PATCHES, generator=draws)
    return scaled(Data(*drawn, images[order], classes[order], classes=len(names)))


def _picture(name: str) -> Tensor:
    """Return a picture, shape (C, H, W), with values in [0, 1]."""
    from skimage import data

    picture = getattr(data, name)()
    if isinstance(picture, tuple):
        # a stereo pair and its disparity
        picture = picture[0]
    pixels = torch.tensor(picture, dtype=torch.float32) / 255
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.movedim(2, 0)


def _tiles(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a picture into tiles, shape (tiles, C, 64, 64): those to train on and those to test on."""
    grid = picture.unfold(1, TILE, TILE).unfold(2, TILE, TILE).movedim(0, 2)
    diagonal = torch.arange(grid.shape[0])[:, None] + torch.arange(grid.shape[1])
    of_test = diagonal % EVERY_THIRD == 0
    return grid[~of_test], grid[of_test]


def _labelled(tiles: Sequence[Tensor], count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    classes = torch.arange(count) % len(tiles)
    return torch.stack([_patch(tiles[c], SIDE, draws) for c in classes.tolist()]), classes


def _patch(tiles: Tensor, side: int, draws: torch.Generator) -> Tensor:
    tile = tiles[int(torch.randint(len(tiles), (), generator=draws))]
    top, left = torch.randint(TILE - side + 1, (2,), generator=draws).tolist()
    return tile[:, top : top + side, left : left + side]


def _mosaics(tiles: Sequence[Tensor], count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    axis = torch.arange(MOSAIC_SIDE, dtype=torch.float32)
    pixels = torch.cartesian_prod(axis, axis)
    images, labels = [], []
    for _ in range(count):
        points = torch.rand(PIECES, 2, generator=draws) * MOSAIC_SIDE
        texture_of_piece = torch.randint(len(tiles), (PIECES,), generator=draws)
        piece = torch.cdist(pixels, points).argmin(1)
        label = texture_of_piece[piece].view(MOSAIC_SIDE, MOSAIC_SIDE)
        patches = torch.stack([_patch(t, MOSAIC_SIDE, draws) for t in tiles])
        images.append(patches.gather(0, label.expand(1, *patches.shape[1:])).squeeze(0))
        labels.append(label)
    return torch.stack(images), torch.stack(labels)
