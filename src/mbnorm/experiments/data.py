"""Data sets by name, as tensors."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


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


@cache
def load(name: str) -> Data:
    """Return the data set of that name, the same one every time.

    Raises:
        ValueError: there is none.
    """
    # the packages behind them take seconds to import, and not every command needs each
    match name:
        case "digits":
            return digits()
        case "textures" | "photos" | "segments":
            from mbnorm.experiments import pictures

            return {
                "textures": pictures.textures,
                "photos": pictures.photos,
                "segments": pictures.segments,
            }[name]()
        case "volumes":
            from mbnorm.experiments.volumes import volumes

            return volumes()
    raise ValueError(f"expected {', '.join(EMBEDDED)}; got {name!r}")


EMBEDDED = ("digits", "textures", "photos", "segments", "volumes")
TRAIN_DIGITS = 1000


@cache
def digits() -> Data:
    """Return scikit-learn's digits, 1000 to train on and the other 797 to test on.

    The mean training image is subtracted, and the rest scaled to variance 1 over all training pixels.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1)
    images = images - images[:TRAIN_DIGITS].mean(0)
    images = images / images[:TRAIN_DIGITS].std()
    classes = torch.tensor(bunch.target)[order]
    return Data(
        images[:TRAIN_DIGITS],
        classes[:TRAIN_DIGITS],
        images[TRAIN_DIGITS:],
        classes[TRAIN_DIGITS:],
        classes=10,
    )
