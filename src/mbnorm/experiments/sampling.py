"""The ways to draw batches from a data set."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Sampling: TypeAlias = Literal["shuffled", "one-class"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)


def one_epoch(sampling: Sampling, targets: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return the indices of an epoch's batches, shape (batches, batch_size).

    "shuffled" draws from all images; with "one-class" all images of a batch are of one class. What does
    not fill a batch is left out, and is another part of the images in each epoch.

    Args:
        sampling: the way to draw.
        targets: shape (N,), or (N, ...) with a class per pixel, where an image is of its most frequent class.
        batch_size: images of a batch.
        generator: what is drawn from.
    """
    if sampling == "shuffled":
        return _batches(torch.arange(len(targets)), batch_size, generator)
    classes = class_of_each(targets)
    batches = [_batches((classes == c).nonzero()[:, 0], batch_size, generator) for c in torch.unique(classes)]
    every_class = torch.cat(batches)
    return every_class[torch.randperm(len(every_class), generator=generator)]


def largest_batch(sampling: Sampling, targets: Tensor) -> int:
    """Return the largest batch size that leaves no class without a batch."""
    if sampling == "shuffled":
        return len(targets)
    return int(torch.unique(class_of_each(targets), return_counts=True)[1].min())


def class_of_each(targets: Tensor) -> Tensor:
    """Return one class per image, shape (N,): where pixels have classes, the most frequent one."""
    return targets if targets.dim() == 1 else targets.flatten(1).mode(1).values


def _batches(indices: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    shuffled = indices[torch.randperm(len(indices), generator=generator)]
    return shuffled[: len(shuffled) // batch_size * batch_size].view(-1, batch_size)
