"""Nets of a size that people train, with torch's batch norms."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Module:
    """Return a ResNet-18 for images of 32 pixels."""
    return resnet(18, 3, classes, cifar_stem)


def resnet50(classes: int = 10) -> nn.Module:
    """Return a ResNet-50 for images of 224 pixels."""
    return resnet(50, 3, classes, imagenet_stem)


def resnet(depth: int, inputs: int, classes: int, stem: Callable[[int], list[nn.Module]]) -> nn.Module:
    """Return the ResNet of 18, 34 or 50 layers after a stem."""
    block: type[_BasicBlock | _Bottleneck] = _Bottleneck if depth == 50 else _BasicBlock
    widening = 4 if depth == 50 else 1
    blocks: list[nn.Module] = []
    before = 64
    for stage, count in enumerate((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)):
        for number in range(count):
            blocks.append(block(before, 64 * 2**stage, 2 if stage > 0 and number == 0 else 1))
            before = 64 * 2**stage * widening
    return nn.Sequential(
        *stem(inputs), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
    )


def small_resnet(depth: int, inputs: int, classes: int) -> nn.Module:
    """Return the ResNet for CIFAR of 6 n + 2 layers: three stages of n blocks, 16, 32 and 64 wide.

    Shortcuts between stages are 1x1 convolutions.
    """
    blocks: list[nn.Module] = []
    before = 16
    for width in (16, 32, 64):
        for number in range((depth - 2) // 6):
            blocks.append(_BasicBlock(before, width, 2 if width > 16 and number == 0 else 1))
            before = width
    stem = (nn.Conv2d(inputs, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def cifar_stem(inputs: int) -> list[nn.Module]:
    """Return a ResNet's first layers for images of 32 pixels: no pooling."""
    return [nn.Conv2d(inputs, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]


def imagenet_stem(inputs: int) -> list[nn.Module]:
    """Return a ResNet's first layers for images of 224 pixels: a quarter of the side is left."""
    return [
        nn.Conv2d(inputs, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]


_VGG = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


def vgg(depth: int, inputs: int, side: int, classes: int) -> nn.Module:
    """Return the VGG of 11 or 16 layers with one fully connected layer, as is usual for images of 32 pixels.

    Smaller images are pooled until their maps are 1x1.
    """
    layers: list[nn.Module] = []
    for stage in _VGG[depth]:
        for outputs in stage:
            layers += [
                nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class _UNet(nn.Module):
    """Two convolutions a level; maps are halved by pooling and doubled by transposed convolutions."""

    def __init__(self, dimensions: int, inputs: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        conv, transposed = _CONVOLUTIONS[dimensions]
        self.pool = _POOLINGS[dimensions]
        pairs = list(zip((inputs, *widths), widths, strict=False))
        self.down = nn.ModuleList(_double_conv(dimensions, i, o) for i, o in pairs)
        ups = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.up = nn.ModuleList(transposed(i, o, 2, 2) for i, o in ups)
        self.merge = nn.ModuleList(_double_conv(dimensions, 2 * o, o) for _, o in ups)
        self.head = conv(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        y: Tensor = self.head(x)
        return y


_CONVOLUTIONS = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
_POOLINGS = {2: F.max_pool2d, 3: F.max_pool3d}
_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _double_conv(dimensions: int, inputs: int, outputs: int) -> nn.Sequential:
    (conv, _), norm = _CONVOLUTIONS[dimensions], _NORMS[dimensions]
    return nn.Sequential(
        conv(inputs, outputs, 3, padding=1, bias=False),
        norm(outputs),
        nn.ReLU(),
        conv(outputs, outputs, 3, padding=1, bias=False),
        norm(outputs),
        nn.ReLU(),
    )


def unet2d(inputs: int = 1, classes: int = 2, widths: tuple[int, ...] = (8, 16, 32, 64)) -> nn.Module:
    """Return a small U-Net for images whose sides are multiples of 8."""
    return _UNet(2, inputs, classes, widths)


def unet3d(inputs: int = 1, classes: int = 2, widths: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """Return a small U-Net for volumes whose sides are multiples of 4."""
    return _UNet(3, inputs, classes, widths)
