"""The nets by name, built with torch's batch norm for the data they are to learn."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbnorm.experiments import nets
from mbnorm.experiments.dataset import Data, Parts

SMALL = ("mlp", "cnn", "mlp6", "vgg-small", "segment")
"""Those that train within seconds on a core."""
MODELS = (
    *SMALL,
    *("resnet8", "resnet20", "resnet18", "resnet34", "resnet50"),
    *("vgg11", "vgg16", "unet2d", "unet3d"),
)
TIMM = "timm:"

WIDTHS = {"mlp": 100, "mlp6": 100, "cnn": 8, "vgg-small": 8, "segment": 8}
LEAST_MULTIPLE = {"segment": 4, "unet2d": 8, "unet3d": 4}
"""Nets that give a class per pixel, and what the sides of their inputs must be multiples of."""
CIFAR_SIDE = 64
"""Up to this side a ResNet starts without pooling."""


def build(name: str, data: Data | Parts) -> nn.Module:
    """Return a net from inputs of ``data`` to logits, shape (N, classes, ...).

    Its weights are drawn from torch's random stream.

    Raises:
        ValueError: no such net, or none for such data.
    """
    why = why_not(name, data)
    if why is not None:
        raise ValueError(why)
    inputs, side, classes = data.shape[0], min(data.shape[1:]), data.classes
    match name:
        case "mlp" | "mlp6":
            return _mlp(data.shape.numel(), WIDTHS[name], 6 if name == "mlp6" else 2, classes)
        case "cnn":
            return _cnn(inputs, WIDTHS[name], classes)
        case "vgg-small":
            return _vgg_small(inputs, side, WIDTHS[name], classes)
        case "segment":
            return _Segment(inputs, WIDTHS[name], classes)
        case "resnet8" | "resnet20":
            return nets.small_resnet(int(name.removeprefix("resnet")), inputs, classes)
        case "resnet18" | "resnet34" | "resnet50":
            stem = nets.cifar_stem if side <= CIFAR_SIDE else nets.imagenet_stem
            return nets.resnet(int(name.removeprefix("resnet")), inputs, classes, stem)
        case "vgg11" | "vgg16":
            return nets.vgg(int(name.removeprefix("vgg")), inputs, side, classes)
        case "unet2d":
            return nets.unet2d(inputs, classes)
        case "unet3d":
            return nets.unet3d(inputs, classes, (8, 16, 32))
    return _timm(name.removeprefix(TIMM), inputs, classes)


def why_not(name: str, data: Data | Parts) -> str | None:
    """Return why there is no such net for such data, if there is none."""
    if not known(name):
        return f"expected {', '.join(MODELS)} or {TIMM}NAME; got {name!r}"
    if data.per_pixel and name not in LEAST_MULTIPLE:
        return f"{name} gives a class per image, and these data have one per pixel"
    if not data.per_pixel and name in LEAST_MULTIPLE:
        return f"{name} gives a class per pixel, and these data have one per image"
    volumes = len(data.shape) == 4
    if volumes != (name == "unet3d"):
        return f"{name} takes {'images' if volumes else 'volumes'}, got inputs of shape {tuple(data.shape)}"
    least = LEAST_MULTIPLE.get(name, 1)
    if any(side % least for side in data.shape[1:]):
        return f"{name} takes sides that are multiples of {least}, got inputs of shape {tuple(data.shape)}"
    return None


def known(name: str) -> bool:
    """Return whether a net has this name."""
    return name in MODELS or (name.startswith(TIMM) and name != TIMM)


def _mlp(inputs: int, width: int, depth: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before in (inputs, *[width] * (depth - 1)):
        layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, classes))


def _cnn(inputs: int, width: int, classes: int) -> nn.Module:
    return nn.Sequential(
        *_conv(inputs, width),
        _Residual(width, width, stride=1),
        _Residual(width, 2 * width, stride=2),
        _Residual(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(cast(Tensor, self.branch(x)) + self.shortcut(x))


def _vgg_small(inputs: int, side: int, width: int, classes: int) -> nn.Module:
    """Halve the maps until they are 1x1, where two more layers follow: a batch of m has m values there."""
    layers: list[nn.Module] = []
    widths = [width * min(2**level, 4) for level in range(int(math.log2(side)))]
    for outputs in widths:
        layers += [*_conv(inputs, outputs), nn.MaxPool2d(2)]
        inputs = outputs
    late = 4 * width
    return nn.Sequential(
        *layers,
        nn.AdaptiveMaxPool2d(1),
        *_conv(inputs, late, kernel=1),
        *_conv(late, late, kernel=1),
        nn.Flatten(),
        nn.Linear(late, classes),
    )


class _Segment(nn.Module):
    """Local and dilated features beside those of the whole image, as in DeepLab: the latter have 1x1 maps."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = nn.Sequential(
            *_conv(inputs, width), *_conv(width, wide, stride=2), *_conv(wide, wide, stride=2)
        )
        self.near = nn.Sequential(*_conv(wide, wide, kernel=1))
        self.far = nn.Sequential(*_conv(wide, wide, dilation=2))
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(wide, wide, kernel=1))
        self.head = nn.Sequential(*_conv(3 * wide, wide, kernel=1), nn.Conv2d(wide, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        whole = self.whole(y).expand(-1, -1, *y.shape[2:])
        logits = self.head(torch.cat([self.near(y), self.far(y), whole], dim=1))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear")


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> tuple[nn.Module, ...]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def _timm(name: str, inputs: int, classes: int) -> nn.Module:
    try:
        import timm
    # torchvision, which timm imports, raises RuntimeError where it was built for another torch
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{TIMM}{name} needs a timm that can be imported: {_first_line(error)}") from error
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=inputs)
    except RuntimeError as error:
        raise ValueError(f"timm has no model {name!r} for such data: {_first_line(error)}") from error
    return model


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
