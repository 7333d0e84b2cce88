"""The two nets, built with torch's batch norm."""

from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from mbnorm.experiments.data import CLASSES

ModelName: TypeAlias = Literal["mlp", "cnn"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)

WIDTHS: dict[ModelName, int] = {"mlp": 100, "cnn": 8}


def build(name: ModelName) -> nn.Module:
    """Return a net from (N, 1, 8, 8) images to (N, 10) logits, drawn from torch's random stream."""
    return _mlp(WIDTHS["mlp"]) if name == "mlp" else _cnn(WIDTHS["cnn"])


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Linear(width, CLASSES),
    )


def _cnn(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        _Residual(width, width, stride=1),
        _Residual(width, 2 * width, stride=2),
        _Residual(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
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
