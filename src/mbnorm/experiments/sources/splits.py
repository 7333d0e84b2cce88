"""What is trained on and what is tested on."""

import torch
from torch import Tensor

EVERY_FIFTH = 5
"""What is tested on where a source says nothing."""
TEST_SPLITS = ("test", "validation", "valid", "val")


def held_out(targets: Tensor) -> Tensor:
    """Return which samples to test on: every fifth of a class, or where pixels have classes every fifth.

    Args:
        targets: shape (N,), a class each, or (N, ...).
    """
    if targets.dim() > 1:
        return torch.arange(len(targets)) % EVERY_FIFTH == EVERY_FIFTH - 1
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for c in torch.unique(targets):
        chosen[(targets == c).nonzero()[EVERY_FIFTH - 1 :: EVERY_FIFTH, 0]] = True
    return chosen


def check_enough(place: str, classes: int, train: int, test: int) -> None:
    """Refuse data that nothing can be learned from or tested on.

    Raises:
        ValueError: there are fewer than 2 classes, or there is nothing to test on.
    """
    if classes < 2 or test == 0:
        raise ValueError(
            f"{place}: expected at least 2 classes and {EVERY_FIFTH} images of one, "
            f"got {classes} classes and {train} images"
        )
