"""Input factories and error budgets shared by the tests."""

from __future__ import annotations

import reference
import torch
from torch import Tensor
from torch.nn import functional as F

from mbnorm.backends import cpu

# where there is no compiler the third has a test file of its own that says so
BACKENDS = ["traceable", "aten", *(["cpu"] if cpu.missing() is None else [])]
CONTIGUOUS = torch.contiguous_format
LAYOUTS = [
    ((6, 5), CONTIGUOUS),
    ((4, 5, 7), CONTIGUOUS),
    ((3, 5, 4, 6), CONTIGUOUS),
    ((3, 5, 4, 6), torch.channels_last),
    ((2, 5, 3, 4, 3), CONTIGUOUS),
    ((2, 5, 3, 4, 3), torch.channels_last_3d),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layout_id(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def make_input(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = CONTIGUOUS, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    x = x * (0.5 + channels / shape[1]) + channels - 1
    return x.to(dtype).contiguous(memory_format=memory_format)


def make_parameters(channels: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = 1 + 0.3 * torch.randn(channels, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype)


def near_statistics(x: Tensor, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Past statistics close to the batch's, so that outputs stay of the size of plain batch norm's."""
    mean, var, _ = reference.batch_statistics(x.double())
    generator = torch.Generator().manual_seed(seed)
    mean = mean + 0.3 * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    return mean, var * 1.3


def gradients(
    y: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor, **options: bool
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, cotangent.to(y.dtype), **options)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest error, in units of the largest expected value."""
    assert torch.isfinite(value).all()
    scale = expected.abs().max().clamp_min(1e-30)
    return float((value.double() - expected).abs().max() / scale)


def native_errors(x: Tensor, weight: Tensor, bias: Tensor, cotangent: Tensor, eps: float) -> list[float]:
    """Errors of torch's own training batch norm at the precision of ``x``: y, dx, dw, db."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, eps)
    zeros, ones = torch.zeros_like(exact[1]), torch.ones_like(exact[1])
    want, *_ = reference.blended_batch_norm(*exact, zeros, ones, 1.0, "pooled", eps)
    got = (y, *gradients(y, tuple(leaves), cotangent))
    wanted = (want, *gradients(want, tuple(exact), cotangent.double()))
    return [relative_error(g.detach(), w.detach()) for g, w in zip(got, wanted, strict=True)]


def budget(dtype: torch.dtype, native_error: float) -> float:
    """Twice native batch norm's own error plus one rounding; float64 is exact to rounding."""
    if dtype == torch.float64:
        return 1e-12
    return 2 * native_error + torch.finfo(dtype).eps


def cut_or_covering(figure):
    """Return the words of a figure that stick out of it, and the legends that lie over a panel."""
    figure.draw_without_rendering()
    whole, found = figure.bbox.padded(1), []
    for panel in figure.axes:
        legend = panel.get_legend()
        titles = [panel.title, panel._left_title, panel._right_title, *panel.texts]
        words = [*titles, *(legend.get_texts() if legend else [])]
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            words += [axis.label, *(label for place, label in ticks if low <= place <= high)]
        for word in words:
            box = word.get_window_extent()
            if (
                word.get_text()
                and panel.axison
                and not (whole.contains(*box.min) and whole.contains(*box.max))
            ):
                found.append(word.get_text())
        if legend and legend.get_window_extent().overlaps(panel.bbox):
            found.append(f"a legend over {panel.get_title()!r}")
    return found
