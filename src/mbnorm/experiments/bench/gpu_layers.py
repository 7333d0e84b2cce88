"""Forward and backward of layers on a GPU, launched one by one and replayed from a CUDA graph."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import mbnorm
from mbnorm.experiments.bench.cases import DTYPES, PROVIDERS, RESNET50, Case, Layout, Provider
from mbnorm.experiments.bench.gpu_parts import Job, told
from mbnorm.experiments.bench.gpu_steps import DEVICE, captured
from mbnorm.experiments.bench.rows import Row
from mbnorm.experiments.bench.timing import Timing

BATCHES = (2, 8, 32)
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
COMPILED_SHAPES = ((64, 112, 112), (256, 56, 56), (2048, 7, 7))
ROUNDS = 5
SECONDS_A_ROUND = 0.01
CUT_SHAPES = ((2, 64, 112, 112), (32, 256, 56, 56), (2, 2048, 7, 7), (32, 512, 28, 28))
CUTS = {
    "as it is": {},
    "never split": {"STEPS_OF_ONE": 10**6},
    "split early": {"STEPS_OF_ONE": 1},
    "narrow programs": {"WIDEST": 2048, "STEPS_OF_ONE": 16},
    "few splits": {"PROGRAMS_A_PROCESSOR": 4},
    "many splits": {"PROGRAMS_A_PROCESSOR": 16},
}
"""Other ways to cut a tensor into programs, by what they change in `mbnorm.backends.triton_cut`."""
LARGE = 100e6
"""Bytes of an input above which the caches do not hold it."""


def _momentum(case: Case) -> nn.Module:
    return mbnorm.MomentumBatchNorm2d(case.shape[1], history_weight=0.75, backend="triton")


def _matched(case: Case) -> nn.Module:
    layer = PROVIDERS["batch_norm"](case)
    mbnorm.convert(layer, "matched", backend="triton")
    return layer


def _memorized(case: Case) -> nn.Module:
    return mbnorm.MemorizedBatchNorm2d(case.shape[1], memory_size=64, backend="triton")


def _compiled_momentum(case: Case) -> nn.Module:
    return torch.compile(PROVIDERS["momentum-traceable"](case))  # type: ignore[return-value]


EAGER: dict[str, Provider] = {
    "batch_norm": PROVIDERS["batch_norm"],
    "momentum": _momentum,
    "matched": _matched,
    "memorized": _memorized,
    "momentum-aten": PROVIDERS["momentum-aten"],
}
COMPILED: dict[str, Provider] = {
    "batch_norm": PROVIDERS["batch_norm"],
    "compiled_batch_norm": PROVIDERS["compiled_batch_norm"],
    "compiled_momentum": _compiled_momentum,
}


def gpu_cases() -> list[Case]:
    """Return the shapes of ResNet-50 at every batch size, dtype and layout."""
    return [
        Case((batch, *shape[1:]), dtype, layout)
        for batch in BATCHES
        for dtype in ("float32", "bfloat16")
        for layout in LAYOUTS
        for shape in RESNET50
    ]


def compiled_cases() -> list[Case]:
    """Return the cases that compiled layers run too: compiling all of them takes too long."""
    return [
        Case((batch, *shape), dtype, "contiguous")
        for batch, dtype in ((2, "float32"), (32, "bfloat16"))
        for shape in COMPILED_SHAPES
    ]


def described(case: Case) -> Row:
    """Return what a row says of a case."""
    return {"shape": case.shape, "dtype": case.dtype, "layout": case.layout}


class Runner:
    """A layer on the GPU with its input, to be timed on the device's clock."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer = layer.to(x.device)
        self.x = x.detach().requires_grad_()
        self.dy = dy
        self.wanted = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def __call__(self) -> None:
        """Run a forward and backward."""
        torch.autograd.grad(self.layer(self.x), self.wanted, self.dy)

    def peak_bytes(self) -> int:
        """Return the most bytes that a forward and backward take beside what is there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """Return the seconds of a call among ``calls`` in a row, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def race(calls: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    """Time every call in each round, so that a slow moment of the machine hits all of them."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(100, int(SECONDS_A_ROUND / seconds_of(call, 2))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, repeats[name]))
    return {name: Timing.of(found) for name, found in seconds.items()}


def copy_rate(source: Tensor) -> float:
    """Return the bytes a second, read and written, of copying a tensor like this."""
    target = torch.empty_like(source)
    taken = race({"copy": lambda: target.copy_(source)})["copy"].median
    return 2 * source.numel() * source.element_size() / taken


def _values(case: Case) -> tuple[Tensor, Tensor]:
    """Return input and gradient, drawn on the device: on the host it takes longer than all else."""
    x, dy = (torch.randn(case.shape, device=DEVICE).to(DTYPES[case.dtype]) for _ in range(2))
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)


def layer_rows(case: Case, providers: dict[str, Provider]) -> Iterator[Row]:
    """Yield the times and peak memory of layers, each launched and replayed from a graph."""
    if "torch._dynamo" in sys.modules:
        # one case's compiled graphs are of no use to the next
        torch.compiler.reset()
    x, dy = _values(case)
    copied = copy_rate(x)
    runners: dict[str, Runner] = {}
    peaks = {}
    for name, build in providers.items():
        try:
            runner = Runner(build(case), x, dy)
            for _ in range(2):
                runner()
            peaks[name] = runner.peak_bytes()
            runners[name] = runner
        except Exception as error:
            yield {**described(case), **told("layer", f"{name} on {case}", error)}
    for launched in ("eager", "graph"):
        calls: dict[str, Callable[[], object]] = {}
        for name, runner in runners.items():
            try:
                calls[name] = runner if launched == "eager" else captured(runner)
            except Exception as error:
                yield {**described(case), **told("layer", f"{name} on {case}, {launched}", error)}
        for name, timing in race(calls).items():
            yield {
                "kind": "layer",
                "provider": name,
                **described(case),
                "threads": launched,
                "mode": "both",
                "median_s": timing.median,
                "low_s": timing.low,
                "high_s": timing.high,
                "bytes": case.bytes,
                "copy_bytes_per_s": copied,
                "peak_bytes": peaks[name],
            }


def layer_jobs(cases: list[Case], providers: dict[str, Provider]) -> list[Job]:
    """Return a job for each case, those first that the caches do not hold."""
    ordered = sorted(cases, key=lambda case: case.bytes <= LARGE)
    return [Job(str(case), partial(layer_rows, case, providers)) for case in ordered]


def cut_jobs() -> list[Job]:
    """Return a job for each shape and layout that is cut in other ways, too."""
    cases = [Case(shape, "float32", layout) for shape in CUT_SHAPES for layout in LAYOUTS]
    return [Job(str(case), partial(cut_rows, case)) for case in cases]


def cut_rows(case: Case) -> Iterator[Row]:
    """Yield the times of the Triton kernels for tensors cut in other ways than theirs."""
    from mbnorm.backends import triton_cut, triton_kinds

    usual = {name: getattr(triton_cut, name) for changes in CUTS.values() for name in changes}
    calls: dict[str, Callable[[], object]] = {}
    x, dy = _values(case)
    for cut, changes in (CUTS | {"": {}}).items():
        for name, value in (usual | changes).items():
            setattr(triton_cut, name, value)
        triton_cut.cut.cache_clear()
        triton_kinds.forget_kinds()
        if not cut:
            break
        try:
            calls[cut] = captured(Runner(_momentum(case), x, dy))
        except Exception as error:
            yield {**described(case), **told("cut", f"{case}, {cut}", error)}
    for name, timing in race(calls).items():
        yield {"kind": "cut", "cut": name, **described(case), "median_s": timing.median}
