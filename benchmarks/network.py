"""What synchronized statistics cost on many ranks, from the latency and bandwidth of their network.

Every rank has a clock; a collective starts when the last rank has asked for it and the one before it on
the same communicator is done. Compute times are given and jitter a little, as those of real ranks do.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Synchronization: TypeAlias = Literal["none", "late", "late, own group", "True", "SyncBatchNorm"]
SYNCHRONIZATIONS: tuple[Synchronization, ...] = get_args(Synchronization)


@dataclass(frozen=True)
class Network:
    """Seconds a message takes from rank to rank, and bytes a second."""

    name: str
    latency: float
    bandwidth: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes, by a ring or a tree."""
        ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
        tree = 2 * (math.ceil(math.log2(ranks)) * self.latency + size / self.bandwidth)
        return min(ring, tree)

    def all_gather(self, size: float, ranks: int) -> float:
        """Return the seconds of an all-gather of ``size`` bytes from each rank, by doubling."""
        return math.ceil(math.log2(ranks)) * self.latency + (ranks - 1) * size / self.bandwidth


NETWORKS = (Network("InfiniBand", 5e-6, 25e9), Network("10 Gb Ethernet", 30e-6, 1.25e9))
RANKS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Work:
    """A training step without communication: seconds, and what one collective costs the rank that asks."""

    forward: float = 15e-3
    backward: float = 30e-3
    ask: float = 10e-6
    jitter: float = 0.05
    parameters: int = 25_557_032
    bucket_bytes: float = 25 * 2**20


def resnet50_channels() -> list[int]:
    """Return the channels of the norms of a ResNet-50, in order."""
    channels = [64]
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            channels += [width, width, 4 * width, *([4 * width] if block == 0 else [])]
    return channels


class _Channel:
    """One communicator: its collectives run one after another."""

    def __init__(self) -> None:
        self.free = 0.0

    def send(self, clocks: Tensor, seconds: float) -> float:
        """Return when a collective is done that every rank asks for at its clock."""
        self.free = max(self.free, float(clocks.max())) + seconds
        return self.free


def step_seconds(
    network: Network, ranks: int, sync: Synchronization, work: Work | None = None, steps: int = 6
) -> float:
    """Return the mean seconds of a step of a ResNet-50 under DDP, the first one left out."""
    work = work or Work()
    channels = resnet50_channels()
    generator = torch.Generator().manual_seed(0)
    clocks = torch.zeros(ranks, dtype=torch.float64)
    gradients = _Channel()
    statistics = _Channel() if sync == "late, own group" else gradients
    arrival = [0.0] * len(channels)
    starts = []

    def compute(seconds: float) -> None:
        noise = torch.randn(ranks, generator=generator, dtype=torch.float64).abs()
        clocks.add_(seconds * (1 + work.jitter * noise))

    def wait(until: float) -> None:
        clocks.clamp_(min=until)

    def meet(seconds: float) -> None:
        clocks.add_(work.ask)
        wait(statistics.send(clocks, seconds))

    for _ in range(steps):
        starts.append(float(clocks.mean()))
        for layer, width in enumerate(channels):
            compute(work.forward / len(channels))
            message = 8 * (2 * width + 2)
            if sync == "True":
                meet(network.all_reduce(message, ranks))
            elif sync == "SyncBatchNorm":
                meet(network.all_gather(4 * (2 * width + 1), ranks))
            elif sync != "none":
                wait(arrival[layer])
                clocks.add_(work.ask)
                arrival[layer] = statistics.send(clocks, network.all_reduce(message, ranks))
        ready, last = 0.0, 0.0
        for layer, width in reversed(list(enumerate(channels))):
            compute(work.backward / len(channels))
            if sync in ("True", "SyncBatchNorm"):
                meet(network.all_reduce(4 * 2 * width, ranks))
            ready += 4 * work.parameters / len(channels)
            if ready >= work.bucket_bytes or layer == 0:
                last = gradients.send(clocks, network.all_reduce(ready, ranks))
                ready = 0.0
        wait(last)
    starts.append(float(clocks.mean()))
    return (starts[-1] - starts[1]) / (steps - 1)
