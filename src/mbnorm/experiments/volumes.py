"""Synthetic volumes to segment."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mbnorm.experiments.dataset import Data, scaled

TRAIN_VOLUMES, TEST_VOLUMES, SIDE = 80, 40, 16
BALLS = 3
CONTRAST = 2.0


def volumes() -> Data:
    """Return volumes with three balls in noise, and for each voxel whether it is in a ball.

    White noise and a smooth field are half as strong as the balls, so that no voxel tells alone.
    """
    draws = torch.Generator().manual_seed(0)
    return scaled(Data(*_drawn(TRAIN_VOLUMES, draws), *_drawn(TEST_VOLUMES, draws), classes=2))


def _drawn(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIDE, dtype=torch.float32)
    voxels = torch.cartesian_prod(axis, axis, axis)
    centres = torch.rand(count, BALLS, 3, generator=draws) * SIDE
    radii = 3 + 3 * torch.rand(count, BALLS, generator=draws)
    inside = (torch.cdist(voxels.expand(count, -1, 3), centres) < radii[:, None]).any(2)
    inside = inside.view(count, SIDE, SIDE, SIDE)
    noise = torch.randn(count, 1, SIDE, SIDE, SIDE, generator=draws)
    coarse = torch.randn(count, 1, 4, 4, 4, generator=draws)
    smooth = F.interpolate(coarse, size=(SIDE, SIDE, SIDE), mode="trilinear")
    return CONTRAST * inside[:, None] + noise + smooth, inside.long()
