"""The ways to draw batches from a data set."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Sampling: TypeAlias = Literal["shuffled", "one-class", "drifting", "long-tailed"]
OVERLAP = 0.25
"""How far images stray from their class's turn in "drifting" epochs, in turns."""
IMBALANCE = 50.0
"""Images of the most frequent class for each of the rarest, in "long-tailed" epochs."""

SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)


def one_epoch(sampling: Sampling, targets: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return the indices of an epoch's batches, shape (batches, batch_size).

    "shuffled" draws from all images. With "one-class" all images of a batch are of one class. With
    "drifting" the classes of an epoch follow one another, in a new order each time, and neighbors overlap.
    "long-tailed" draws from a part of the images, the same one every time, in which class c of K has
    50^(-c/(K-1)) times the images of class 0. What does not fill a batch is left out, and is another part
    of the images in each epoch.

    Args:
        sampling: the way to draw.
        targets: shape (N,), or (N, ...) with a class per pixel, where an image is of its most frequent class.
        batch_size: images of a batch.
        generator: what is drawn from.
    """
    if sampling == "shuffled":
        return _batches(torch.arange(len(targets)), batch_size, generator)
    classes = class_of_each(targets)
    if sampling == "long-tailed":
        return _batches(_long_tail(classes), batch_size, generator)
    if sampling == "drifting":
        turn = torch.randperm(int(classes.max()) + 1, generator=generator)[classes]
        moment = turn + OVERLAP * torch.randn(len(classes), generator=generator)
        return _in_batches(moment.argsort(), batch_size)
    batches = [_batches((classes == c).nonzero()[:, 0], batch_size, generator) for c in torch.unique(classes)]
    every_class = torch.cat(batches)
    return every_class[torch.randperm(len(every_class), generator=generator)]


def largest_batch(sampling: Sampling, targets: Tensor) -> int:
    """Return the largest batch size that leaves no class without a batch."""
    if sampling == "long-tailed":
        return len(_long_tail(class_of_each(targets)))
    if sampling != "one-class":
        return len(targets)
    return int(torch.unique(class_of_each(targets), return_counts=True)[1].min())


def class_of_each(targets: Tensor) -> Tensor:
    """Return one class per image, shape (N,): where pixels have classes, the most frequent one."""
    return targets if targets.dim() == 1 else targets.flatten(1).mode(1).values


def _batches(indices: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    return _in_batches(indices[torch.randperm(len(indices), generator=generator)], batch_size)


def _in_batches(indices: Tensor, batch_size: int) -> Tensor:
    return indices[: len(indices) // batch_size * batch_size].view(-1, batch_size)


def _long_tail(classes: Tensor) -> Tensor:
    present, counts = torch.unique(classes, return_counts=True)
    shares = IMBALANCE ** -torch.linspace(0, 1, len(present), dtype=torch.float64)
    kept = (shares * counts.min()).round().long().clamp_min(1)
    return torch.cat([(classes == c).nonzero()[:k, 0] for c, k in zip(present, kept, strict=True)])
