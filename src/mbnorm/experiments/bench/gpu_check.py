"""The numbers of every backend on a GPU, against float64; on the way every kernel gets compiled."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mbnorm import functional
from mbnorm.experiments.bench.cases import DTYPES, Case, Layout
from mbnorm.experiments.bench.gpu_layers import described, gpu_cases
from mbnorm.experiments.bench.rows import Row, failure
from mbnorm.experiments.bench.timing import TOLERANCE

BACKENDS: tuple[functional.Backend, ...] = ("traceable", "aten", "triton")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
CHECKED = ((9, 70), (4, 5, 33), (2, 64, 56, 56), (2, 3, 224, 224), (2, 2048, 7, 7), (1, 8, 8, 16, 16))


def errors_of(backend: functional.Backend, case: Case, device: str) -> dict[str, float]:
    """Return the errors of output and gradients against float64, in units of the largest value."""
    channels = case.shape[1]
    generator = torch.Generator().manual_seed(2)
    x, dy = (case.tensor(seed).to(device) for seed in (0, 1))
    weight, bias, mean = (torch.randn(channels, generator=generator).to(device) for _ in range(3))
    var = 0.5 + torch.rand(channels, generator=generator).to(device)

    def run(dtype: torch.dtype | None, backend: functional.Backend) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
        y = functional.blended_batch_norm(
            leaves[0], leaves[1], leaves[2], mean, var, 0.3, variance="averaged", eps=1e-5, backend=backend
        ).y
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    wanted = run(torch.float64, "traceable")
    found = run(None, backend)
    return {
        name: float((got.double() - want).abs().max() / want.abs().max())
        for name, got, want in zip(("y", "dx", "dw", "db"), found, wanted, strict=True)
    }


def checked_cases() -> list[tuple[functional.Backend, Case]]:
    """Return every backend with shapes of all kinds, and Triton's with all that is timed."""
    cases = [
        Case(shape, dtype, layout)
        for shape in CHECKED
        for dtype in DTYPES
        for layout in (LAYOUTS if len(shape) > 3 else LAYOUTS[:1])
    ]
    timed = [case for case in gpu_cases() if case.shape[0] < 32]
    pairs = [(backend, case) for backend in BACKENDS for case in cases]
    return list(dict.fromkeys(pairs + [("triton", case) for case in timed]))


def check(pairs: list[tuple[functional.Backend, Case]], device: str) -> Iterator[Row]:
    """Yield the errors, and what is wrong or does not run."""
    for backend, case in pairs:
        what = f"{backend} on {case}"
        try:
            errors = errors_of(backend, case, device)
        except Exception as error:
            yield failure("check", what, error)
            continue
        yield {"kind": "error", "backend": backend, **described(case), **errors}
        # not the largest of them: NaN has no place in an order
        if not all(error <= TOLERANCE[case.dtype] for error in errors.values()):
            yield failure("check", what, ArithmeticError(f"errors {errors} against float64"))
