"""What is measured: the shapes, and the norms that compete."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

import mbnorm

Layout: TypeAlias = Literal["contiguous", "channels_last"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
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

    def tensor(self, seed: int, device: str = "cpu") -> Tensor:
        """Return random values of this case, drawn on the device."""
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, device=device).to(DTYPES[self.dtype])
        if self.layout == "contiguous":
            return values
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[len(self.shape)])


def cases(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]) -> list[Case]:
    """Return every shape in every dtype and layout that it has."""
    return [
        Case(shape, dtype, layout)
        for dtype in dtypes
        for layout in LAYOUTS
        for shape in shapes
        if layout == "contiguous" or len(shape) >= 4
    ]


BASE = "batch_norm"
"""The norm that others are compared with: torch's own."""

NORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "matched": ("matched", {}),
    "matched-uncentered": ("matched", {"center_filters": False}),
    "momentum": ("momentum", {"history_weight": 0.75}),
    "memorized": ("memorized", {"memory_size": 64}),
    "matched-aten": ("matched", {"backend": "aten"}),
    "momentum-traceable": ("momentum", {"history_weight": 0.75, "backend": "traceable"}),
}
"""Our norms: method and options of `mbnorm.convert`. Those without a backend get what a user gets."""


def give_norm(model: nn.Module, norm: str, **options: Any) -> None:
    """Convert the batch norms of ``model`` into one of `NORMS`; `BASE` leaves them."""
    if norm != BASE:
        method, own = NORMS[norm]
        mbnorm.convert(model, method, **own, **options)


def exact_copy(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer that computes in float64, ours by the formulas."""
    exact = copy.deepcopy(layer).double()
    if hasattr(exact, "backend"):
        exact.backend = "traceable"  # type: ignore[assignment]
    return exact


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
    """The trivial operation y = 2x: no layer that must read its input twice in the backward can be faster.

    Four tensors of the input's size move, of a normalization at least five, and autograd has one node.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Double ``x``."""
        return x * 2.0


KERNELS = "kernels"
"""The operators of the momentum layer alone, without the layer and autograd."""

Provider: TypeAlias = Callable[[Case], nn.Module]


def _layer(norm: str) -> Provider:
    def build(case: Case) -> nn.Module:
        layer: nn.Module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[case.rank - 1](case.shape[1])
        give_norm(layer, norm)
        return layer

    return build


def _compiled(norm: str) -> Provider:
    return lambda case: torch.compile(_layer(norm)(case))  # type: ignore[return-value]


PROVIDERS: dict[str, Provider] = {
    BASE: _layer(BASE),
    "matched": _layer("matched"),
    "momentum": _layer("momentum"),
    "memorized": _layer("memorized"),
    KERNELS: _layer("momentum"),
    "doubling": lambda case: Doubling(),
    "matched-aten": _layer("matched-aten"),
    "momentum-traceable": _layer("momentum-traceable"),
    "compiled_batch_norm": _compiled(BASE),
    "compiled_matched": _compiled("matched"),
    "group_norm": lambda case: nn.GroupNorm(32, case.shape[1]),
    "formulas": lambda case: Formulas(case.shape[1], len(case.shape)),
}
"""What builds a layer for a case, by name and in the order of the tables."""
