"""What is timed: the shapes, and the layers that compete."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

import mbnorm

Layout: TypeAlias = Literal["contiguous", "channels_last"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

RESNET50 = (
    (2, 64, 112, 112),
    (2, 64, 56, 56),
    (2, 256, 56, 56),
    (2, 128, 56, 56),
    (2, 128, 28, 28),
    (2, 512, 28, 28),
    (2, 256, 28, 28),
    (2, 256, 14, 14),
    (2, 1024, 14, 14),
    (2, 512, 14, 14),
    (2, 512, 7, 7),
    (2, 2048, 7, 7),
)
"""Every BatchNorm2d shape of ResNet-50 at 224 pixels and batch 2."""

OTHERS = ((8, 1024), (2, 64, 1000), (2, 32, 32, 64, 64))
"""Shapes of BatchNorm1d and BatchNorm3d."""


@dataclass(frozen=True)
class Case:
    """One input to normalize."""

    shape: tuple[int, ...]
    dtype: str
    layout: Layout

    @property
    def rank(self) -> int:
        """The 1, 2 or 3 of BatchNorm1d, 2d, 3d."""
        return max(len(self.shape) - 2, 1)

    @property
    def bytes(self) -> int:
        """The size of the input."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def tensor(self, seed: int) -> Tensor:
        """Return random values of this case."""
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        values = values.to(DTYPES[self.dtype])
        if self.layout == "contiguous":
            return values
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[len(self.shape)])


def cases(dtypes: list[str], layouts: list[Layout], *, quick: bool = False) -> list[Case]:
    """Return every shape in every dtype and layout that it has; ``quick`` is a sample of them."""
    shapes = RESNET50[-2:] + OTHERS[:1] if quick else RESNET50 + OTHERS
    return [
        Case(shape, dtype, layout)
        for dtype in dtypes
        for layout in layouts
        for shape in shapes
        if layout == "contiguous" or len(shape) >= 4
    ]


class Formulas(nn.Module):
    """Batch norm as one writes it by hand."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, *[1] * (rank - 2)))
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * (rank - 2)))
        self.dims = [d for d in range(rank) if d != 1]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        mean = x.mean(self.dims, keepdim=True)
        var = (x - mean).square().mean(self.dims, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


class Doubling(nn.Module):
    """Next to nothing, differentiably: no layer that must read its input twice in the backward can be faster.

    Four tensors of the input's size move, of a normalization at least five, and autograd has one node.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Double ``x``."""
        return x * 2.0


KERNELS = "kernels"
"""Name of the provider that is no layer: the CPU kernels called bare."""

Provider: TypeAlias = Callable[[Case], nn.Module]


def _stock(case: Case) -> nn.Module:
    layer: nn.Module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[case.rank - 1](case.shape[1])
    return layer


def _compiled(case: Case) -> nn.Module:
    # of one function torch compiles eight kinds of input, and runs others as they are
    torch.compiler.reset()
    return torch.compile(_stock(case))  # type: ignore[return-value]


def _momentum(backend: str) -> Provider:
    def build(case: Case) -> nn.Module:
        layer: nn.Module = getattr(mbnorm, f"MomentumBatchNorm{case.rank}d")(
            case.shape[1], history_weight=0.75, backend=backend
        )
        return layer

    return build


def _matched(case: Case) -> nn.Module:
    layer = _stock(case)
    mbnorm.convert(layer, "matched")
    return layer


def _memorized(case: Case) -> nn.Module:
    layer: nn.Module = getattr(mbnorm, f"MemorizedBatchNorm{case.rank}d")(case.shape[1], memory_size=64)
    return layer


PROVIDERS: dict[str, Provider] = {
    "batch_norm": _stock,
    "group_norm": lambda case: nn.GroupNorm(32, case.shape[1]),
    "formulas": lambda case: Formulas(case.shape[1], len(case.shape)),
    "doubling": lambda case: Doubling(),
    "compiled_batch_norm": _compiled,
    "matched": _matched,
    "momentum": _momentum("auto"),
    "memorized": _memorized,
    KERNELS: _momentum("cpu"),
    "momentum-aten": _momentum("aten"),
    "momentum-traceable": _momentum("traceable"),
}
"""By name; "matched", "momentum" and "memorized" take the backend that a user gets."""
