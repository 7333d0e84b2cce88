"""Whole training steps: nets with each norm, timed and their activation memory counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mbnorm
from mbnorm.experiments.bench.memory import peak_bytes
from mbnorm.experiments.bench.timing import Timing
from mbnorm.experiments.nets import resnet18, unet3d


@dataclass(frozen=True)
class Step:
    """A net and its input."""

    net: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


STEPS = (
    Step("resnet18", resnet18, (2, 3, 32, 32)),
    Step("unet3d", unet3d, (2, 1, 32, 32, 32)),
)

METHODS = ("batch", "matched", "momentum", "memorized", "matched+df", "momentum+df", "memorized+df")


class Trainer:
    """One net with one norm, and its training step."""

    def __init__(self, step: Step, method: str) -> None:
        torch.manual_seed(0)
        self.model = step.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        norm, _, double_forward = method.partition("+")
        if norm != "batch":
            mbnorm.convert(self.model, norm, batch_size=step.shape[0])  # type: ignore[arg-type]
        if double_forward:
            mbnorm.DoubleForward(self.model, self.optimizer)
        self.x = torch.randn(step.shape)

    def loss(self) -> Tensor:
        """Return a loss of the net's output."""
        y: Tensor = self.model(self.x)
        return y.square().mean()

    def step(self) -> float:
        """Train a step; return its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return time.perf_counter() - start

    def activation_bytes(self) -> int:
        """Return the memory that a forward keeps for the backward, parameters left out."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        del loss
        return sum(storages.values())


def race_steps(step: Step, rounds: int) -> dict[str, tuple[Timing, int, int]]:
    """Return seconds, activation bytes and peak bytes of a step for each method, timed in turns."""
    trainers = {method: Trainer(step, method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for trainer in trainers.values():
        trainer.step()
    for _ in range(rounds):
        for method, trainer in trainers.items():
            seconds[method].append(trainer.step())
    return {
        m: (Timing.of(seconds[m]), trainer.activation_bytes(), peak_bytes(trainer.step))
        for m, trainer in trainers.items()
    }
