"""Scikit-learn's digits as tensors, and the two ways to draw batches from them."""

from functools import cache
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Sampling: TypeAlias = Literal["shuffled", "one-class"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)

TRAIN_IMAGES = 1000
CLASSES = 10


class Digits(NamedTuple):
    """Images, shape (N, 1, 8, 8), and their classes, shape (N,)."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor

    def to(self, device: torch.device) -> "Digits":
        """Return the same digits on ``device``."""
        return Digits(*(t.to(device) for t in self))


@cache
def digits() -> Digits:
    """Return 1000 digits to train on and the other 797 to test on, the same ones every time.

    The mean training image is subtracted, and the rest scaled to variance 1 over all training pixels.
    """
    # takes a second, and not every command needs it
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1)
    images = images - images[:TRAIN_IMAGES].mean(0)
    images = images / images[:TRAIN_IMAGES].std()
    classes = torch.tensor(bunch.target)[order]
    return Digits(
        images[:TRAIN_IMAGES], classes[:TRAIN_IMAGES], images[TRAIN_IMAGES:], classes[TRAIN_IMAGES:]
    )


def one_epoch(sampling: Sampling, classes: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return the indices of an epoch's batches, shape (batches, batch_size).

    "shuffled" draws from all images; with "one-class" all images of a batch are of one class. What does
    not fill a batch is left out, and is another part of the images in each epoch.
    """
    if sampling == "shuffled":
        return _batches(torch.arange(len(classes)), batch_size, generator)
    batches = [_batches((classes == c).nonzero()[:, 0], batch_size, generator) for c in range(CLASSES)]
    every_class = torch.cat(batches)
    return every_class[torch.randperm(len(every_class), generator=generator)]


def _batches(indices: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    shuffled = indices[torch.randperm(len(indices), generator=generator)]
    return shuffled[: len(shuffled) // batch_size * batch_size].view(-1, batch_size)


def largest_batch(sampling: Sampling) -> int:
    """Return the largest batch size that leaves no class without a batch."""
    classes = digits().train_classes
    return len(classes) if sampling == "shuffled" else int(classes.bincount().min())
