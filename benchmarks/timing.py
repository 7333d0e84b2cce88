"""Calls timed in turns, by torch's timer, which waits for a GPU."""

from collections.abc import Callable, Mapping

import torch
from torch.utils.benchmark import Measurement, Timer

from benchmarks.rows import Row

MOST_CALLS = 1000
WARM_UP = 4
GRAPH = "CUDA graph"
"""How calls run that are `captured`."""


def on(threads: int) -> str:
    """Return how calls run on so many threads of the CPU."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def race(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds_a_round: float = 0.0, threads: int = 1
) -> dict[str, Measurement]:
    """Time every call in each round, so that a slow moment of the machine hits all of them.

    Args:
        calls: what is timed, by name.
        rounds: how often each is timed; the median over the rounds is what counts.
        seconds_a_round: how long a call is repeated in a round; it is run once at least.
        threads: of torch, for all that is timed.
    """
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()
    }
    numbers = {}
    for name, timer in timers.items():
        once = timer.timeit(1).median
        numbers[name] = max(1, min(MOST_CALLS, int(seconds_a_round / once)))
    found: dict[str, list[Measurement]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.timeit(numbers[name]))
    return {name: Measurement.merge(measured)[0] for name, measured in found.items()}


def seconds_of(measurement: Measurement) -> Row:
    """Return what a row says of a measurement: the seconds of a call, and their interquartile range."""
    return {"median_s": measurement.median, "iqr_s": measurement.iqr}


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
