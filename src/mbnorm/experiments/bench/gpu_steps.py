"""Training steps of a ResNet-50 on a GPU with each norm, launched one by one and in a CUDA graph."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import nn

import mbnorm
from mbnorm.experiments.bench.gpu_parts import Job
from mbnorm.experiments.bench.rows import Row
from mbnorm.experiments.bench.timing import Timing
from mbnorm.experiments.nets import resnet50

Launched: TypeAlias = Literal["eager", "graph"]
METHODS = (
    "momentum",
    "matched",
    "memorized",
    "momentum+df",
    "matched+df",
    "memorized+df",
    "momentum-aten",
)
DEVICE = "cuda"
BATCH = 2
ROUNDS = 7
STEPS_A_ROUND = 5
WARM_UP = 4


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Return ``call`` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class GpuTrainer:
    """A net with one norm, and its training step."""

    def __init__(self, method: str, device: str, side: int = 224) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = resnet50().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        norm, _, double_forward = method.partition("+")
        norm, _, backend = norm.partition("-")
        if norm != "batch":
            on_gpu = "triton" if device == "cuda" else "auto"
            mbnorm.convert(self.model, norm, batch_size=BATCH, backend=backend or on_gpu)  # type: ignore[arg-type]
        if double_forward:
            mbnorm.DoubleForward(self.model, self.optimizer)
        self.x = torch.randn(BATCH, 3, side, side, device=device)
        self.classes = torch.randint(10, (BATCH,), device=device)

    def step(self) -> None:
        """Train a step."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.classes).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def peak_bytes(self) -> int:
        """Return the most bytes that a step takes beside what is there before, once it is warm."""
        for _ in range(WARM_UP):
            self.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Ready(NamedTuple):
    """A training step, launched one by one or as the replay of a graph, and its peak memory."""

    step: Callable[[], None]
    peak_bytes: int

    @classmethod
    def of(cls, method: str, launched: Launched) -> "Ready":
        """Make a net with this norm, and warm it up."""
        trainer = GpuTrainer(method, DEVICE)
        peak = trainer.peak_bytes()
        return cls(trainer.step if launched == "eager" else captured(trainer.step), peak)


def jobs(launched: Launched) -> list[Job]:
    """Return a job for each method, which is timed in turns with batch norm."""
    made: list[Ready] = []

    def base() -> Ready:
        if not made:
            made.append(Ready.of("batch", launched))
        return made[0]

    def rows(method: str) -> Iterator[Row]:
        yield step_row(method, launched, base(), Ready.of(method, launched))

    return [Job(method, partial(rows, method)) for method in METHODS]


def step_row(method: str, launched: Launched, base: Ready, ours: Ready) -> Row:
    """Return time and peak memory of a step, and those of batch norm."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for ready, found in zip((base, ours), seconds, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                ready.step()
            torch.cuda.synchronize()
            found.append((time.perf_counter() - start) / STEPS_A_ROUND)
    timing = Timing.of(seconds[1])
    return {
        "kind": "step",
        "net": "resnet50",
        "method": method,
        "threads": launched,
        "median_s": timing.median,
        "low_s": timing.low,
        "high_s": timing.high,
        "peak_bytes": ours.peak_bytes,
        "base_s": Timing.of(seconds[0]).median,
        "base_peak_bytes": base.peak_bytes,
    }
