"""Interleaved timing, checked for correctness first."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from mbnorm.backends import cpu
from mbnorm.experiments.bench.cases import DTYPES, KERNELS, PROVIDERS, Case
from mbnorm.experiments.bench.memory import peak_bytes

Mode: TypeAlias = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
PASSES: dict[Mode, int] = {"forward": 2, "backward": 3, "both": 5}
"""Tensors of the input's size that must be read or written at least."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 1e-2}
"""Error against float64, in units of the largest value, above which nothing is timed."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and the 20 % and 80 % quantiles of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summarize the rounds."""
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), low, high)


class Contestant:
    """A layer with its input, ready to be timed.

    Args:
        case: the input.
        layer: the layer, new.
    """

    def __init__(self, case: Case, layer: nn.Module) -> None:
        self.layer = layer
        self.x = case.tensor(seed=0).requires_grad_()
        self.cotangent = case.tensor(seed=1)
        self.parameters = [p for p in layer.parameters() if p.requires_grad]

    def error(self) -> float:
        """Return the error of output and input gradient against a float64 copy, over the largest value."""
        exact = copy.deepcopy(self._plain_layer()).double()
        x = self.x.detach().double().requires_grad_()
        want = exact(x)
        (want_dx,) = torch.autograd.grad(want, x, self.cotangent.double())
        y = self.layer(self.x)
        (dx,) = torch.autograd.grad(y, self.x, self.cotangent)
        return max(_relative(y, want), _relative(dx, want_dx))

    def _plain_layer(self) -> nn.Module:
        inner: nn.Module = getattr(self.layer, "_orig_mod", self.layer)
        return inner

    def run(self, calls: int) -> tuple[float, float]:
        """Return the seconds of ``calls`` forwards, and of the backward after each of them."""
        forward = backward = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            y = self.layer(self.x)
            middle = time.perf_counter()
            self._backward(y)
            forward += middle - start
            backward += time.perf_counter() - middle
        return forward, backward

    def _backward(self, y: Tensor) -> None:
        torch.autograd.grad(y, (self.x, *self.parameters), self.cotangent)

    def peak_bytes(self) -> int:
        """Return the most bytes that the tensors of a forward and backward take."""
        return peak_bytes(lambda: self._backward(self.layer(self.x)))

    def saved_bytes(self) -> int:
        """Return the memory that a forward keeps for its backward."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.layer(self.x)
        return sum(storages.values())


class Kernels(Contestant):
    """The CPU kernels of a Momentum layer's operator called bare: what is left without layer and autograd."""

    def __init__(self, case: Case) -> None:
        layer = PROVIDERS["momentum"](case)
        super().__init__(case, layer)
        self.values = self.x.detach()
        self.weight, self.bias = (p.detach() for p in layer.parameters())
        self.past = torch.zeros_like(self.bias), torch.ones_like(self.bias)

    def run(self, calls: int) -> tuple[float, float]:
        """Return the seconds of ``calls`` forwards, and of the backward after each of them."""
        forward = backward = 0.0
        x, weight, a = self.values, self.weight, torch.tensor(0.25)
        for _ in range(calls):
            start = time.perf_counter()
            y, statistics = cpu.forward(x, weight, self.bias, *self.past, a, "averaged", 1e-5)
            middle = time.perf_counter()
            cpu.backward(self.cotangent, x, weight, a, statistics, "averaged", 1e-5, True)
            forward += middle - start
            backward += time.perf_counter() - middle
            del y
        return forward, backward


def contestants(case: Case, names: list[str]) -> dict[str, Contestant]:
    """Return the layers by name.

    Raises:
        ArithmeticError: a layer computes something else than its float64 copy.
    """
    ready = {}
    for name in names:
        contestant = Kernels(case) if name == KERNELS else Contestant(case, PROVIDERS[name](case))
        error = contestant.error()
        if not error <= TOLERANCE[case.dtype]:
            raise ArithmeticError(f"{name} on {case}: error {error:.1e} against float64, nothing timed")
        ready[name] = contestant
    return ready


def race(
    ready: dict[str, Contestant], rounds: int, seconds_a_round: float
) -> Iterator[tuple[str, dict[Mode, Timing]]]:
    """Time every contestant in each round, so that a slow moment of the machine hits all of them."""
    calls = {name: _calls(contestant, seconds_a_round) for name, contestant in ready.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, contestant in ready.items():
                forward, backward = contestant.run(calls[name])
                seconds[name].append((forward / calls[name], backward / calls[name]))
    finally:
        gc.enable()
    for name, pairs in seconds.items():
        yield (
            name,
            {
                "forward": Timing.of([forward for forward, _ in pairs]),
                "backward": Timing.of([backward for _, backward in pairs]),
                "both": Timing.of([sum(pair) for pair in pairs]),
            },
        )


def _calls(contestant: Contestant, seconds: float) -> int:
    contestant.run(1)
    once = sum(contestant.run(1))
    return max(1, min(100, int(seconds / once)))


def copy_rate(case: Case) -> float:
    """Return the bytes a second, read and written, of copying a tensor of the case's size."""
    source = torch.zeros(case.shape, dtype=DTYPES[case.dtype])
    target = torch.empty_like(source)
    return 2 * case.bytes / _best(lambda: target.copy_(source))


def _best(call: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _relative(value: Tensor, want: Tensor) -> float:
    return float((value.detach().double() - want.detach()).abs().max() / want.detach().abs().max())
