"""What a data set is: in memory, or read input by input."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

MOST_VALUES = 2**30
"""Float32 values that are held in memory: 4 GiB, enough for CIFAR and for 10,000 images of 180 pixels."""


class Data(NamedTuple):
    """What to train on and what to test on.

    Inputs have the shape (N, C, H, W), volumes (N, C, D, H, W); targets are classes below ``classes``, shape
    (N,), or (N, H, W) and (N, D, H, W) where each pixel has one.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int

    @property
    def shape(self) -> torch.Size:
        """The shape of one input."""
        return self.train_inputs.shape[1:]

    @property
    def per_pixel(self) -> bool:
        """Whether each pixel has a class of its own."""
        return self.train_targets.dim() > 1

    def to(self, device: torch.device) -> "Data":
        """Return the same data on ``device``."""
        train_inputs, train_targets, test_inputs, test_targets = (t.to(device) for t in self[:4])
        return Data(train_inputs, train_targets, test_inputs, test_targets, self.classes)


def scaled(data: Data) -> Data:
    """Return the data with mean 0 in each channel and variance 1, over the inputs to train on."""
    axes = [0, *range(2, data.train_inputs.dim())]
    mean = data.train_inputs.mean(axes, keepdim=True)
    std = (data.train_inputs - mean).std()
    train, test = ((inputs - mean) / std for inputs in (data.train_inputs, data.test_inputs))
    return data._replace(train_inputs=train, test_inputs=test)


class Parts(NamedTuple):
    """The same as `torch.utils.data.Dataset`s, which may be larger than memory.

    Where each pixel has a class, ``train_targets`` may have the most frequent one of each input, shape (N,).
    """

    train: Dataset[Any]
    test: Dataset[Any]
    train_targets: Tensor
    shape: torch.Size
    classes: int
    per_pixel: bool


def check_fits(place: str, inputs: int, shape: torch.Size) -> None:
    """Refuse data that do not fit into memory.

    Raises:
        ValueError: they do not.
    """
    if inputs * shape.numel() > MOST_VALUES:
        raise ValueError(f"{place}: {inputs} images of {shape.numel()} values do not fit into memory")
