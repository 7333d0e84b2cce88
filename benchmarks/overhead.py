"""Where the time of a small layer goes: python benchmarks/overhead.py prints microseconds a call."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mbnorm
from mbnorm.backends import cpu

SHAPE = (8, 1024)


class Nothing(torch.autograd.Function):
    """The least that a differentiable step of our own can do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return something of the shape of ``x``."""
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return something for each gradient."""
        _, weight, bias = ctx.saved_tensors
        return torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(bias)


def best(call: Callable[[], object], calls: int = 300, rounds: int = 15) -> float:
    """Return the microseconds of a call in the best round."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return min(found) * 1e6


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if reason := cpu.missing():
        raise SystemExit(reason)
    channels = SHAPE[1]
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layer, stock = mbnorm.MomentumBatchNorm1d(channels, history_weight=0.75), nn.BatchNorm1d(channels)

    def both(module: Callable[..., Tensor], *parameters: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x), (x, *parameters), dy)

    values, weight, bias = (t.detach() for t in (x, *layer.parameters()))
    state = (torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.int64))
    averages = (torch.zeros(channels), torch.ones(channels), torch.tensor(0), torch.tensor(0))
    update = (True, False, False, 0.1, False)

    def fused() -> Any:
        return cpu.forward_with_average(
            values, weight, bias, False, 1e-5, *state, 0.75, *averages, None, None, 0, *update
        )

    _, record = fused()
    statistics, a = record[:4], record[6, 0]
    rows = {
        "nn.BatchNorm1d, forward and backward": both(stock, *stock.parameters()),
        "MomentumBatchNorm1d, forward and backward": both(layer, *layer.parameters()),
        "an autograd.Function that does nothing": lambda: torch.autograd.grad(
            Nothing.apply(x, *layer.parameters()),  # type: ignore[no-untyped-call]
            (x, *layer.parameters()),
            dy,
        ),
        "the fused forward operator": fused,
        "the backward operator": lambda: cpu.backward(
            dy, values, weight, a, statistics, "averaged", 1e-5, True
        ),
    }
    for name, call in rows.items():
        print(f"{name:45}{best(call):8.1f}")


if __name__ == "__main__":
    main()
