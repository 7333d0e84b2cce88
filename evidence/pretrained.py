"""Trained nets to fine-tune, with a new last layer, and data as they take them."""

import copy
from functools import cache
from typing import cast

import torch
from torch import nn

from evidence import mobilenet
from evidence.lists import FineTuning, Start
from mbnorm.experiments.data import load
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.sources import idx, npz
from mbnorm.experiments.training import fit, initial_model

SIDE = 96
"""Of the images that MobileNetV2 gets."""
PRETRAINING = Run("batch", Setting("unet2d", 32, "shuffled", 0.05, 40, "segments"), 0)
READERS = {"npz": npz.read, "idx": idx.read}


@cache
def pretrained(start: Start) -> nn.Module:
    """Return a trained net."""
    if start == "ImageNet":
        return mobilenet.pretrained()
    model = initial_model(PRETRAINING)
    fit(model, PRETRAINING, load(PRETRAINING.setting.data))
    return model


def with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """Return a copy of a net whose last layer is untrained, and gives the logits of other classes."""
    model = copy.deepcopy(model)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = model.get_submodule(layers[-1])
    if isinstance(last, nn.Linear):
        head: nn.Module = nn.Linear(last.in_features, classes)
    else:
        last = cast(nn.Conv2d, last)
        head = nn.Conv2d(last.in_channels, classes, cast(tuple[int, int], last.kernel_size))
    model.set_submodule(layers[-1], head)
    return model


@cache
def data_of(task: FineTuning) -> Data:
    """Return what is trained on and tested, as the trained net expects its inputs."""
    if task.start == "ImageNet":
        kind, _, place = task.data.partition(":")
        source = READERS[kind](place)
    else:
        source = load(task.data)
    order = torch.randperm(len(source.train_inputs), generator=torch.Generator().manual_seed(0))
    chosen = order[: task.images]
    train, test = source.train_inputs[chosen], source.test_inputs[: task.tested]
    if task.start == "ImageNet":
        train, test = (mobilenet.as_imagenet(images, SIDE) for images in (train, test))
    return Data(train, source.train_targets[chosen], test, source.test_targets[: task.tested], source.classes)


def check(task: FineTuning) -> None:
    """Refuse to begin without the weights or the data.

    Raises:
        ValueError: they are missing.
    """
    if task.start == "ImageNet":
        mobilenet.weights()
    data_of(task)
