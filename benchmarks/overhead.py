"""Where the time of a small layer goes: python benchmarks/overhead.py prints microseconds a call."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mbnorm
from mbnorm.backends import cpu
from mbnorm.experiments.bench.cases import Doubling

SHAPE = (8, 1024)


def best(call: Callable[[], object], calls: int, rounds: int) -> float:
    """Return the microseconds of a call in the best round."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return min(found) * 1e6


def main(calls: int = 300, rounds: int = 15) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if reason := cpu.missing():
        raise SystemExit(reason)
    channels = SHAPE[1]
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layer, stock = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
    mbnorm.convert(layer, "matched")

    def both(module: Callable[..., Tensor], *parameters: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x), (x, *parameters), dy)

    values, weight, bias = (t.detach() for t in (x, *layer.parameters()))
    state = (torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.int64), None, None)
    averages = (torch.zeros(channels), torch.ones(channels), torch.tensor(0), torch.tensor(0))
    update = (True, False, False, 0.1, False, 0.0)

    def fused() -> Any:
        return cpu.forward_with_average(
            values, weight, bias, False, 1e-5, *state, 0.75, *averages, None, None, 0, *update
        )

    _, record = fused()
    statistics, a = record[:4], record[6, 0]
    rows = {
        "nn.BatchNorm1d, forward and backward": both(stock, *stock.parameters()),
        "converted to matched, forward and backward": both(layer, *layer.parameters()),
        "y = 2x, forward and backward": both(Doubling()),
        "the fused forward operator": fused,
        "the backward operator": lambda: cpu.backward(
            dy, values, weight, a, statistics, "averaged", 1e-5, True
        ),
    }
    for name, call in rows.items():
        print(f"{name:45}{best(call, calls, rounds):8.1f}")


if __name__ == "__main__":
    main()
