"""Data sets by name, as tensors."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from mbnorm.experiments.dataset import Data, Parts, check_fits, scaled
from mbnorm.experiments.progress import shown

__all__ = ["EMBEDDED", "OUTSIDE_FORMS", "Data", "Parts", "digits", "load", "parts"]

EMBEDDED = ("digits", "textures", "photos", "segments", "volumes")
READ_ONE_BY_ONE = ("folder:", "masks:", "parquet:", "hub:")
OUTSIDE_FORMS = (
    "folder:PATH",
    "masks:PATH",
    "npz:FILE",
    "idx:PATH",
    "parquet:PATH[:image=COLUMN][:label=COLUMN]",
    "hub:NAME",
)


@cache
def parts(name: str) -> Parts:
    """Return the data set of that name as it is read, input by input.

    Raises:
        ValueError: there is none, or it cannot be read; the line names the file.
    """
    if name.startswith(READ_ONE_BY_ONE):
        return _from_outside(name)
    data = load(name)
    return Parts(
        TensorDataset(data.train_inputs, data.train_targets),
        TensorDataset(data.test_inputs, data.test_targets),
        data.train_targets,
        data.shape,
        data.classes,
        data.per_pixel,
    )


def _from_outside(name: str) -> Parts:
    kind, _, place = name.partition(":")
    match kind:
        case "folder":
            from mbnorm.experiments.sources import folders

            return folders.read(place)
        case "masks":
            from mbnorm.experiments.sources import masks

            return masks.read(place)
    from mbnorm.experiments.sources import tables

    return tables.read(kind, place)


@cache
def load(name: str) -> Data:
    """Return the data set of that name in memory, the same one every time.

    Raises:
        ValueError: there is none, it is too large, or it cannot be read; the line names the file.
    """
    if name.startswith(READ_ONE_BY_ONE):
        return _in_memory(name)
    # the packages behind them take seconds to import, and not every command needs each
    kind, outside, place = name.partition(":")
    match kind + outside:
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
        case "npz:":
            from mbnorm.experiments.sources import npz

            return scaled(npz.read(place))
        case "idx:":
            from mbnorm.experiments.sources import idx

            return scaled(idx.read(place))
    raise ValueError(f"expected {', '.join(EMBEDDED)}, {', '.join(OUTSIDE_FORMS)}; got {name!r}")


def _in_memory(name: str) -> Data:
    source = parts(name)
    check_fits(name, len(source.train_targets) + len(source.test), source.shape)  # type: ignore[arg-type]
    train_inputs, train_targets = _stacked(source.train)
    test_inputs, test_targets = _stacked(source.test)
    return scaled(Data(train_inputs, train_targets, test_inputs, test_targets, source.classes))


def _stacked(part: Any) -> tuple[Tensor, Tensor]:
    indices = shown(range(len(part)), len(part), "reading")
    inputs, targets = zip(*(part[index] for index in indices), strict=True)
    return torch.stack(inputs), torch.stack(targets)


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
