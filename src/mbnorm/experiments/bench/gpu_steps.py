"""Training steps of a ResNet-50 on a GPU with each norm, launched one by one and in a CUDA graph."""

import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import nn

import mbnorm
from mbnorm.experiments.bench.rows import Row, failure
from mbnorm.experiments.bench.timing import Timing
from mbnorm.experiments.nets import resnet50

Launched: TypeAlias = Literal["eager", "graph"]
METHODS = ("batch", "momentum", "momentum-aten", "memorized", "momentum+df", "memorized+df")
BATCH = 2
ROUNDS = 5
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


def step_rows(until: float, launched: Launched) -> Iterator[Row]:
    """Yield times and peak memory of the steps, all methods in turns."""
    calls: dict[str, Callable[[], None]] = {}
    peaks = {}
    for method in METHODS:
        try:
            trainer = GpuTrainer(method, "cuda")
            peaks[method] = trainer.peak_bytes()
            calls[method] = trainer.step if launched == "eager" else captured(trainer.step)
        except Exception as error:
            yield failure("step", f"{method}, {launched}", error)
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    for _ in range(ROUNDS):
        if time.monotonic() > until:
            break
        for method, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                call()
            torch.cuda.synchronize()
            seconds[method].append((time.perf_counter() - start) / STEPS_A_ROUND)
    for method, found in seconds.items():
        if len(found) < 2:
            yield failure("step", f"{method}, {launched}", TimeoutError("no time left"))
            continue
        timing = Timing.of(found)
        yield {
            "kind": "step",
            "net": "resnet50",
            "method": method,
            "threads": launched,
            "median_s": timing.median,
            "low_s": timing.low,
            "high_s": timing.high,
            "peak_bytes": peaks[method],
        }
