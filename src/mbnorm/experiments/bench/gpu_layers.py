"""Forward and backward of layers on a GPU, launched one by one and replayed from a CUDA graph."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import mbnorm
from mbnorm.experiments.bench.cases import DTYPES, PROVIDERS, RESNET50, Case, Layout, Provider
from mbnorm.experiments.bench.gpu_steps import captured
from mbnorm.experiments.bench.rows import Row, failure
from mbnorm.experiments.bench.timing import Timing

BATCHES = (2, 8, 32)
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
COMPILED_SHAPES = ((64, 112, 112), (256, 56, 56), (2048, 7, 7))
ROUNDS = 5
SECONDS_A_ROUND = 0.01
CUT_SHAPES = ((2, 64, 112, 112), (2, 2048, 7, 7), (32, 256, 56, 56), (32, 512, 28, 28))
TILES = (1024, 2048, 4096)
STEPS_OF_ONE = (4, 16)


def _momentum(case: Case) -> nn.Module:
    return mbnorm.MomentumBatchNorm2d(case.shape[1], history_weight=0.75, backend="triton")


def _memorized(case: Case) -> nn.Module:
    return mbnorm.MemorizedBatchNorm2d(case.shape[1], memory_size=64, backend="triton")


def _compiled_momentum(case: Case) -> nn.Module:
    return torch.compile(PROVIDERS["momentum-traceable"](case))  # type: ignore[return-value]


EAGER: dict[str, Provider] = {
    "batch_norm": PROVIDERS["batch_norm"],
    "momentum": _momentum,
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
    x, dy = (torch.randn(case.shape, device="cuda").to(DTYPES[case.dtype]) for _ in range(2))
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)


def layer_rows(case: Case, providers: dict[str, Provider]) -> Iterator[Row]:
    """Yield the times and peak memory of layers, each launched and replayed from a graph."""
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
            yield {**described(case), **failure("layer", name, error)}
    for launched in ("eager", "graph"):
        calls: dict[str, Callable[[], object]] = {}
        for name, runner in runners.items():
            try:
                calls[name] = runner if launched == "eager" else captured(runner)
            except Exception as error:
                yield {**described(case), **failure("layer", f"{name}, {launched}", error)}
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


def all_layer_rows(until: float, cases: list[Case], providers: dict[str, Provider]) -> Iterator[Row]:
    """Yield the rows of all cases, as far as the time goes."""
    for number, case in enumerate(cases):
        if time.monotonic() > until:
            yield failure("layer", f"{len(cases) - number} cases", TimeoutError("no time left"))
            return
        # one case's compiled graphs are of no use to the next
        torch.compiler.reset()
        try:
            yield from layer_rows(case, providers)
        except Exception as error:
            yield {**described(case), **failure("layer", "all", error)}


def cut_rows(until: float) -> Iterator[Row]:
    """Yield the times of the Triton kernels for tiles of other sizes than theirs."""
    from mbnorm.backends import triton_launch

    for shape in CUT_SHAPES:
        for layout in LAYOUTS:
            case = Case(shape, "float32", layout)
            calls: dict[str, Callable[[], object]] = {}
            for tile in TILES:
                for steps in STEPS_OF_ONE:
                    if time.monotonic() > until:
                        yield failure("cut", f"{case} and on", TimeoutError("no time left"))
                        return
                    triton_launch.TILE, triton_launch.STEPS_OF_ONE = tile, steps
                    triton_launch.cut.cache_clear()
                    try:
                        calls[f"{tile}, {steps}"] = captured(Runner(_momentum(case), *_values(case)))
                    except Exception as error:
                        yield {**described(case), **failure("cut", f"{tile}, {steps}", error)}
            for name, timing in race(calls).items():
                yield {"kind": "cut", "cut": name, **described(case), "median_s": timing.median}
