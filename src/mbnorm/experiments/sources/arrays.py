"""Arrays of samples and of what they show, as data in memory."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbnorm.experiments.dataset import Data, check_fits
from mbnorm.experiments.sources.splits import check_enough, held_out

Array = NDArray[Any]


class Named(NamedTuple):
    """An array, and what messages call it."""

    name: str
    values: Array


def data_of(
    place: str, inputs: Named, targets: Named, test: tuple[Named, Named] | None, spatial: int, per_pixel: bool
) -> Data:
    """Return arrays as data, with the values that they have.

    Args:
        place: the file or folder that messages name.
        inputs: shape (N, H, W) or (N, H, W, C), volumes (N, D, H, W) or (N, D, H, W, C).
        targets: whole numbers from 0 on, shape (N,), or with ``per_pixel`` (N, H, W) or (N, D, H, W).
        test: the same to test on; None takes every fifth sample.
        spatial: axes of a sample, 2 or 3.
        per_pixel: whether each pixel has a class.

    Raises:
        ValueError: shapes, lengths or dtypes are others, a class has no sample, a value is not finite.
    """
    train_inputs, train_targets = _checked(place, inputs, targets, spatial, per_pixel)
    classes = np.unique(train_targets.values)
    if len(classes) == 0 or not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(
            f"{place}: expected {targets.name} from 0 to the number of classes less 1, each at least once, "
            f"got {_shown(classes)}"
        )
    if test is not None:
        test_inputs, test_targets = _checked(place, *test, spatial, per_pixel)
        if test_inputs.values.shape[1:] != train_inputs.values.shape[1:]:
            raise ValueError(
                f"{place}: {test[0].name} has samples of shape {test_inputs.values.shape[1:]}, "
                f"{inputs.name} of {train_inputs.values.shape[1:]}"
            )
        unknown = np.setdiff1d(test_targets.values, classes)
        if len(unknown):
            raise ValueError(f"{place}: {test[1].name} has {unknown[0]}, which is not in {targets.name}")
        train_part = _inputs(train_inputs), _targets(train_targets)
        test_part = _inputs(test_inputs), _targets(test_targets)
    else:
        every, every_target = _inputs(train_inputs), _targets(train_targets)
        chosen = held_out(every_target)
        train_part, test_part = (every[~chosen], every_target[~chosen]), (every[chosen], every_target[chosen])
    check_enough(place, len(classes), len(train_part[0]), len(test_part[0]))
    least, most = train_part[0].aminmax()
    if least == most:
        raise ValueError(f"{place}: all values of {inputs.name} are {least.item():g}")
    return Data(*train_part, *test_part, len(classes))


def _checked(place: str, inputs: Named, targets: Named, spatial: int, per_pixel: bool) -> tuple[Named, Named]:
    """Return inputs with their channels at the end, and targets."""
    values, classes = inputs.values, targets.values
    axes = "N, H, W" if spatial == 2 else "N, D, H, W"
    if values.ndim not in (spatial + 1, spatial + 2) or 0 in values.shape:
        raise ValueError(f"{place}: expected {inputs.name} of shape ({axes}[, C]), got {values.shape}")
    if values.ndim == spatial + 1:
        values = values[..., None]
    elif values.shape[1] in (1, 3) and values.shape[-1] > 4:
        raise ValueError(f"{place}: expected {inputs.name} with channels last, got {values.shape}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"{place}: expected numbers in {inputs.name}, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{place}: a value of {inputs.name} is not finite")
    if len(classes) != len(values):
        raise ValueError(
            f"{place}: {len(values)} samples in {inputs.name}, and {len(classes)} in {targets.name}"
        )
    expected = values.shape[:-1] if per_pixel else values.shape[:1]
    if classes.shape != expected:
        raise ValueError(f"{place}: expected {targets.name} of shape {expected}, got {classes.shape}")
    if classes.dtype.kind not in "bui":
        raise ValueError(f"{place}: expected whole numbers in {targets.name}, got {classes.dtype}")
    check_fits(place, len(values), torch.Size(values.shape[1:]))
    return Named(inputs.name, values), Named(targets.name, classes)


def _inputs(array: Named) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array.values, -1, 1), dtype=np.float32))


def _targets(array: Named) -> Tensor:
    return torch.from_numpy(array.values.astype(np.int64))


def _shown(values: Array) -> str:
    few = ", ".join(map(str, values[:6].tolist()))
    return f"{few}, ..." if len(values) > 6 else few
