"""The numbers of every backend and layer on a GPU, against float64; on the way every kernel gets compiled."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mbnorm import functional, trial
from mbnorm.experiments.bench.cases import DTYPES, Case, Layout, Provider
from mbnorm.experiments.bench.gpu_layers import BATCHES, EAGER, described, gpu_cases
from mbnorm.experiments.bench.gpu_parts import Job
from mbnorm.experiments.bench.rows import Row, failure
from mbnorm.experiments.bench.timing import TOLERANCE

Errors: TypeAlias = dict[str, float]
BACKENDS: tuple[functional.Backend, ...] = ("traceable", "aten", "triton")
REMEMBERING = ("momentum", "matched", "memorized")
"""The layers, by their names among those that are timed."""
CHECKPOINTED = "checkpointed "
"""Before the name of a layer inside `torch.utils.checkpoint`, beside the same one outside."""
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
CHECKED = ((9, 70), (4, 5, 33), (2, 64, 56, 56), (2, 3, 224, 224), (2, 2048, 7, 7), (1, 8, 8, 16, 16))
STATE_TOLERANCE = 1e-3
"""Of what layers store, which is float32 in every dtype."""


def tensors_of(case: Case, device: str, count: int) -> list[Tensor]:
    """Return random tensors, drawn on the device: on the host it takes longer than all else."""
    generator = torch.Generator(device).manual_seed(2)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = case.layout == "channels_last"
    memory_format = formats[len(case.shape)] if last else torch.contiguous_format
    drawn = (torch.randn(case.shape, generator=generator, device=device) for _ in range(count))
    return [t.to(DTYPES[case.dtype]).contiguous(memory_format=memory_format) for t in drawn]


def errors_of(backend: functional.Backend, case: Case, device: str) -> Errors:
    """Return the errors of output and gradients against float64, in units of the largest value."""
    channels = case.shape[1]
    generator = torch.Generator().manual_seed(2)
    x, dy = tensors_of(case, device, 2)
    weight, bias, mean = (torch.randn(channels, generator=generator).to(device) for _ in range(3))
    var = 0.5 + torch.rand(channels, generator=generator).to(device)

    def run(dtype: torch.dtype | None, backend: functional.Backend) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
        y = functional.blended_batch_norm(
            leaves[0], leaves[1], leaves[2], mean, var, 0.3, variance="averaged", eps=1e-5, backend=backend
        ).y
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    return _errors(run(None, backend), run(torch.float64, "traceable"))


def layer_errors(provider: Provider, case: Case, device: str) -> Errors:
    """Return the errors of a layer's fourth step, and of its state then; the third batch is not finite."""
    layer = provider(case).to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    exact = copy.deepcopy(layer).double()
    exact.backend = "traceable"  # type: ignore[assignment]
    *inputs, dy = tensors_of(case, device, 4)
    bad = inputs[1].clone()
    bad[-1, case.shape[1] // 2] = torch.nan
    inputs.insert(2, bad)

    def run(layer: nn.Module, dtype: torch.dtype | None) -> list[Tensor]:
        for values in inputs:
            x = values.detach().to(dtype or values.dtype).requires_grad_()
            y: Tensor = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy.to(y.dtype))]

    errors = _errors(run(layer, None), run(exact, torch.float64))
    state = zip(layer.buffers(), exact.buffers(), strict=True)
    return {**errors, "state": max(_error(found, wanted) for found, wanted in state)}


def checkpointed_errors(provider: Provider, case: Case, device: str) -> Errors:
    """Return what activation checkpointing changes in a layer's second step, and in its state then."""
    # a recompute ends with the last thing to be saved, which is to come after all that the layer does
    block = nn.Sequential(provider(case), nn.Sigmoid()).to(device)
    first, values, dy = tensors_of(case, device, 3)

    def run(block: nn.Module, around: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        block(first)
        x = values.detach().requires_grad_()
        y = around(block, x)
        return [y.detach(), *torch.autograd.grad(y, (x, *block.parameters()), dy)]

    twin = copy.deepcopy(block)
    found = run(block, partial(checkpoint, use_reentrant=False))
    errors = _errors(found, [t.double() for t in run(twin, lambda block, x: block(x))])
    state = zip(block.buffers(), twin.buffers(), strict=True)
    return {**errors, "state": max(_error(found, wanted) for found, wanted in state)}


def _errors(found: list[Tensor], wanted: list[Tensor]) -> Errors:
    pairs = zip(("y", "dx", "dw", "db"), found, wanted, strict=True)
    return {name: _error(got, want) for name, got, want in pairs}


def _error(got: Tensor, want: Tensor) -> float:
    away, size = (got.double() - want).abs().max(), want.abs().max()
    # of what is zero, as a count of bad batches may be, every error is one
    return float(away if size == 0 else away / size)


def checked_cases() -> list[Case]:
    """Return shapes of all kinds, in every dtype and layout."""
    return [
        Case(shape, dtype, layout)
        for shape in CHECKED
        for dtype in DTYPES
        for layout in (LAYOUTS if len(shape) > 3 else LAYOUTS[:1])
    ]


def checks() -> list[tuple[str, Case]]:
    """Return every backend with shapes of all kinds, and Triton's layers with all that is timed.

    What compiles no further kernel of a larger batch's is checked at the smallest.
    """
    pairs: list[tuple[str, Case]] = [(backend, case) for case in checked_cases() for backend in BACKENDS]
    for case in gpu_cases():
        pairs += [(name, case) for name in REMEMBERING]
        if case.shape[0] == min(BATCHES):
            pairs += [(CHECKPOINTED + name, case) for name in REMEMBERING]
    return pairs


def jobs(device: str, share: int, shares: int) -> list[Job]:
    """Return one of so many shares of the checks; those that compile the same kernels are in the same one."""
    kinds: dict[object, list[Job]] = {}
    for name, case in checks():
        kind = kinds.setdefault((case.shape[1:], case.dtype, case.layout), [])
        kind.append(Job(f"{name} on {case}", partial(check, name, case, device)))
    chosen = [Job(f"auto on {device}", partial(auto_rows, device))] if share == 0 else []
    return chosen + [job for kind in list(kinds.values())[share::shares] for job in kind]


def auto_rows(device: str) -> Iterator[Row]:
    """Yield what a user gets who asks for no backend, and how long the first call takes to find out."""
    start = time.perf_counter()
    backend = functional.backend_for(torch.empty(2, 3, device=device))
    seconds = time.perf_counter() - start
    why = trial.failure_on(torch.empty(0, device=device).device)
    yield {"kind": "auto", "backend": backend, "seconds": seconds, "why_not_triton": why}


def check(name: str, case: Case, device: str) -> Iterator[Row]:
    """Yield the errors of a backend or layer, and whether they are too large."""
    of: Callable[[], Errors]
    layer = name.removeprefix(CHECKPOINTED)
    if layer != name:
        of = partial(checkpointed_errors, EAGER[layer], case, device)
    elif name in REMEMBERING:
        of = partial(layer_errors, EAGER[name], case, device)
    else:
        of = partial(errors_of, name, case, device)  # type: ignore[arg-type]
    errors = of()
    yield {"kind": "error", "backend": name, **described(case), **errors}
    most = dict.fromkeys(errors, TOLERANCE[case.dtype]) | {"state": STATE_TOLERANCE}
    # not the largest of them: NaN has no place in an order
    if not all(error <= most[value] for value, error in errors.items()):
        yield failure("check", f"{name} on {case}", ArithmeticError(f"errors {errors} against float64"))
