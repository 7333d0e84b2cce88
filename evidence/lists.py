"""Which data and nets decide what the layers do, and which only confirm it.

What is on the first list may be looked at as often as one likes, and constants are chosen on it. The second
is run once for a rule; what was looked at before a later change of the rule counts as tuned.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.by_values import match_by_values
from mbnorm import convert
from mbnorm.centered import release
from mbnorm.convert import Method as Converted
from mbnorm.experiments.data import Data, load
from mbnorm.experiments.dataset import scaled
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.losses import Loss
from mbnorm.experiments.methods import Method
from mbnorm.experiments.sampling import Sampling
from mbnorm.experiments.training import net_for
from mbnorm.feeders import feeders
from mbnorm.layers import HistoryBatchNorm
from mbnorm.memories.measured_average import MeasuredAverage

Start: TypeAlias = Literal["ImageNet", "segments"]

RATES = (0.03, 0.1, 0.3)
"""Learning rates of a batch of 64 that each method is tried at; smaller batches have them in proportion."""
EDGES = {0.03: 0.01, 0.3: 1.0}
"""The rate that is tried, too, where the best of these is the first or the last."""

Part: TypeAlias = Literal["choice", "report"]


@dataclass(frozen=True)
class Task:
    """Data, a net, and how long it is trained.

    Attributes:
        name: what tables call it.
        data: a data set's name, as `mbnorm compare` takes it.
        model: a net's name, as well.
        batch_size: of the methods that are compared.
        epochs: of training, for all methods and batch sizes.
        sampling: how batches are drawn.
        loss: what is made small.
        images: how many are trained on; None is all that are not for the choice of the rate.
        held_out: how many of the training images choose the rate; no training sees them.
        halvings: how often each side of the inputs is halved, for volumes take long.
        note: what a reader must know of its place on a list.
    """

    name: str
    data: str
    model: str
    batch_size: int
    epochs: int
    sampling: Sampling = "shuffled"
    loss: Loss = "cross-entropy"
    images: int | None = None
    held_out: int = 200
    halvings: int = 0
    note: str = ""

    def setting(self, rate: float, batch_size: int) -> Setting:
        """Return how a net is trained at a rate of `RATES`; batches of another size are shuffled."""
        sampling = self.sampling if batch_size == self.batch_size else "shuffled"
        lr = rate * batch_size / 64
        return Setting(self.model, batch_size, sampling, lr, self.epochs, self.data, self.loss)


@dataclass(frozen=True)
class Entrant:
    """A method, and how it differs from what `mbnorm compare` trains under that name.

    Attributes:
        method: what becomes of the batch norms.
        batch_size: where it is not the task's.
        options: of `mbnorm.convert`, where they are not the method's; pairs of name and value. With
            ``first_layers`` all filters are centered but those of layers on the net's own inputs.
            ``by_values`` is the number of values that an earlier rule matches.
    """

    method: Method
    batch_size: int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options)
        return self.method + options + ("" if self.batch_size is None else f" at {self.batch_size}")

    @property
    def label(self) -> str:
        """Return what tables and plots call it."""
        words = []
        for name, value in self.options:
            if (name, value) == ("subtract_mean", False):
                words.append("no_mean")
            elif value is not False:
                words.append(
                    name if value is True else value if isinstance(value, str) else f"{name}={value}"
                )
        return " ".join([self.method, *words]) + ("" if self.batch_size is None else f" at {self.batch_size}")

    def net(self, run: Run, data: Data) -> nn.Module:
        """Return the untrained net of a run."""
        if not self.options:
            return net_for(run, data)
        model = net_for(replace(run, method="batch"), data)
        # the rest of the name is a schedule or a second forward, which the training has
        method = self.method.partition("-")[0].partition("+")[0]
        assert method in get_args(Converted)
        options = dict(self.options)
        found = feeders(model)
        first = found.raw if options.pop("first_layers", None) else set()
        fed_by = cast(dict[nn.Module, list[HistoryBatchNorm]], found.norms_of)
        weights = {layer: layer.weight.detach().clone() for layer in first}
        options |= {"center_filters": True} if first else {}
        if method == "matched":
            # rows are named by their options, and this one is younger than most
            options.setdefault("subtract_mean", True)
        values = options.pop("by_values", None)
        convert(model, cast(Converted, method), batch_size=run.setting.batch_size, **options)
        if values is not None:
            match_by_values(model, values)
        for layer, weight in weights.items():
            release(layer)
            layer.weight.data.copy_(weight)
            for norm in fed_by[layer]:
                norm.memory = cast(MeasuredAverage, norm.memory).subtracting_mean()
        return model


MLP = Task("MLP of six layers", "digits", "mlp6", 2, 6)
CIFAR10 = Task("CIFAR-10, ResNet-8", "npz:data/cifar10.npz", "resnet8", 2, 4, images=2500, held_out=500)
NUCLEI = Task(
    *("nuclei, U-Net", "npz:data/nuclei.npz", "unet2d", 2, 6),
    images=400,
    held_out=100,
    note="seen while the rule was found",
)

CNN = Task("CNN", "digits", "cnn", 32, 6)
"""On no list: the noise of its layers is looked at."""

TUNED: tuple[Task, ...] = (
    MLP,
    Task("MLP of two layers", "digits", "mlp", 2, 3),
    Task("CNN, one-class batches", "digits", "cnn", 4, 8, "one-class"),
    Task("CNN, drifting batches", "digits", "cnn", 4, 8, "drifting"),
    Task("CNN, long-tailed classes", "digits", "cnn", 4, 8, "long-tailed"),
    Task("VGG with 1x1 maps", "digits", "vgg-small", 2, 3),
    Task("CNN on photos", "photos", "cnn", 4, 6),
    Task("segmentation of scenes", "segments", "segment", 2, 6, held_out=100),
    NUCLEI,
    CIFAR10,
    Task("CIFAR-10, ResNet-20", "npz:data/cifar10.npz", "resnet20", 2, 2, images=2500, held_out=500),
)
CONFIRMED: tuple[Task, ...] = (
    Task(
        *("Fashion-MNIST, ResNet-8", "idx:/usr/share/datasets/fashion-mnist", "resnet8", 2, 4),
        images=2500,
        held_out=500,
    ),
    Task(
        *("hippocampus in 3D, U-Net", "npz:data/hippocampus.npz", "unet3d", 2, 4),
        loss="dice",
        images=160,
        held_out=40,
        halvings=1,
    ),
)


@dataclass(frozen=True)
class FineTuning:
    """A trained net that learns other data, at rates that stay as they are.

    Attributes:
        name: what tables call it.
        data: a data set's name, as `mbnorm compare` takes it.
        start: what the net has been trained on.
        images: how many are trained on; None is all.
        tested: how many of the test images measure it, from the first on; None is all.
        batch_size: of the methods that are compared.
        lengths: the steps after which it is measured.
        rates: learning rates; all of them are reported.
        note: what a reader must know of its place on a list.
    """

    name: str
    data: str
    start: Start
    images: int | None = None
    tested: int | None = None
    batch_size: int = 2
    lengths: tuple[int, ...] = (300, 3000)
    rates: tuple[float, ...] = (0.001, 0.004)
    note: str = ""


MOBILENET_RATES = (0.00003, 0.0003)
"""With frozen statistics nothing is learned far above the first; batch norm prefers the second."""
TUNED_FINE: tuple[FineTuning, ...] = (
    FineTuning(
        "CIFAR-10, MobileNetV2", "npz:data/cifar10.npz", "ImageNet", 1000, 2000, rates=MOBILENET_RATES
    ),
    FineTuning(
        *("nuclei, U-Net", "npz:data/nuclei.npz", "segments"),
        note="seen while the rule was found",
    ),
)
CONFIRMED_FINE: tuple[FineTuning, ...] = (
    FineTuning(
        *("Fashion-MNIST, MobileNetV2", "idx:/usr/share/datasets/fashion-mnist", "ImageNet", 1000, 2000),
        rates=MOBILENET_RATES,
        note="the images were fine-tuned on, with another net, while the rule was found",
    ),
)


@cache
def data_of(task: Task, part: Part) -> Data:
    """Return what a run trains on and is measured on: held-out training images, or the test images."""
    source = load(task.data)
    order = torch.randperm(len(source.train_inputs), generator=torch.Generator().manual_seed(0))
    chosen, rest = order[: task.held_out], order[task.held_out :]
    kept = rest if task.images is None else rest[: task.images]
    trained = source.train_inputs[kept], source.train_targets[kept]
    tested = source.test_inputs, source.test_targets
    if part == "choice":
        tested = source.train_inputs[chosen], source.train_targets[chosen]
    for _ in range(task.halvings):
        trained, tested = _halved(*trained), _halved(*tested)
    return scaled(Data(*trained, *tested, source.classes))


def _halved(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Average inputs over pairs along each axis, and take the class of the first of a pair."""
    pool = F.avg_pool3d if inputs.dim() == 5 else F.avg_pool2d
    firsts = [slice(None, None, 2)] * (inputs.dim() - 2)
    return pool(inputs, 2), targets[(slice(None), *firsts)]
