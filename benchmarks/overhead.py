"""Where the time of a small layer goes: the layer, and the operators that it runs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases import BASE, Case, Doubling, give_norm
from benchmarks.operators import operators_of
from benchmarks.timing import race

CASE = Case((8, 1024), "float32", "contiguous")


def show(rounds: int = 15, seconds_a_round: float = 0.03) -> None:
    """Print the microseconds of each, forward and backward, in the best round."""
    x, dy = CASE.tensor(0).requires_grad_(), CASE.tensor(1)

    def both(layer: nn.Module) -> Tensor:
        parameters = list(layer.parameters())
        return torch.autograd.grad(layer(x), (x, *parameters), dy)[0]

    calls: dict[str, Callable[[], object]] = {"y = 2x": partial(both, Doubling())}
    operators: dict[str, Callable[[], object]] = {}
    for norm in (BASE, "matched"):
        layer = nn.BatchNorm1d(CASE.shape[1])
        give_norm(layer, norm)
        calls[norm] = partial(both, layer)
        # with the first forward the memory is filled
        calls[norm]()
        for name, operator in operators_of(calls[norm]):
            operators[f"{norm}, {name} alone"] = torch.no_grad()(operator)
    for name, measured in race(calls | operators, rounds=rounds, seconds_a_round=seconds_a_round).items():
        print(f"{name:55}{1e6 * min(measured.times):8.1f}")
