"""Training steps of a ResNet-50 on a GPU with each norm, launched one by one and in a CUDA graph."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import mbnorm
from mbnorm.experiments.bench.rows import Row
from mbnorm.experiments.bench.timing import Timing
from mbnorm.experiments.nets import resnet50

METHODS = ("batch", "momentum", "memorized", "momentum+df", "memorized+df")
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
        if norm == "momentum":
            mbnorm.convert(self.model, "momentum", batch_size=BATCH)
        elif norm == "memorized":
            mbnorm.convert(self.model, "memorized", batch_size=BATCH)
        if double_forward:
            mbnorm.DoubleForward(self.model, self.optimizer)
        self.x = torch.randn(BATCH, 3, side, side, device=device)
        self.classes = torch.randint(10, (BATCH,), device=device)

    def step(self) -> None:
        """Train a step."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.classes).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def step_rows(until: float) -> Iterator[Row]:
    """Yield times and peak memory of the steps, all methods in turns."""
    trainers = {method: GpuTrainer(method, "cuda") for method in METHODS}
    peaks = {}
    for method, trainer in trainers.items():
        for _ in range(WARM_UP):
            trainer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step()
        torch.cuda.synchronize()
        peaks[method] = torch.cuda.max_memory_allocated() - before
    for launched in ("eager", "graph"):
        calls: dict[str, Callable[[], None]] = {}
        for method, trainer in trainers.items():
            try:
                calls[method] = trainer.step if launched == "eager" else captured(trainer.step)
            except RuntimeError as error:
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                yield {"kind": "failure", "of": "step", "what": f"{method}, {launched}", "why": why}
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
                yield {
                    "kind": "failure",
                    "of": "step",
                    "what": f"{method}, {launched}",
                    "why": "no time left",
                }
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
