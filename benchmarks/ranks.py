"""Training steps of two gloo processes with and without shared statistics, and of more by simulation."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import mbnorm
from benchmarks.network import NETWORKS, RANKS, SYNCHRONIZATIONS, step_seconds
from benchmarks.rows import Row, read, write
from benchmarks.steps import small_cnn
from mbnorm.experiments.markdown import table
from mbnorm.experiments.nets import resnet18

BATCH = 4
ROUNDS = {"small CNN": 61, "ResNet-18": 15}


NETS: dict[str, Callable[[], nn.Module]] = {"small CNN": small_cnn, "ResNet-18": resnet18}
NORMS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "batch norm": None,
    "matched": ("matched", {}),
    "matched, late": ("matched", {"process_group": "world", "sync": "late"}),
    "matched, sync": ("matched", {"process_group": "world"}),
    "memorized": ("memorized", {}),
    "memorized, late": ("memorized", {"process_group": "world", "sync": "late"}),
    "memorized, sync": ("memorized", {"process_group": "world"}),
    "memorized, buffers not broadcast": ("memorized", {}),
}


class _Trainer:
    def __init__(self, net: str, norm: str) -> None:
        torch.manual_seed(0)
        model = NETS[net]()
        converted = NORMS[norm]
        if converted is not None:
            method: Any = converted[0]
            mbnorm.convert(model, method, **converted[1])
        options: dict[str, Any] = {"forward_sync_buffers": False} if "not broadcast" in norm else {}
        self.buffer_bytes = sum(b.numel() * b.element_size() for b in model.buffers())
        self.model = DistributedDataParallel(model, **options)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.x = torch.randn(BATCH, 3, 32, 32)

    def step(self) -> tuple[float, float]:
        """Train a step; return the seconds of the slower rank, and of both ranks' processors."""
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        seconds = torch.tensor(time.perf_counter() - start)
        processor = torch.tensor(time.process_time() - busy)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        dist.all_reduce(processor)
        return float(seconds), float(processor)


def _measure(rank: int, folder: str, quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows: list[Row] = []
    for net, rounds in {"small CNN": 3}.items() if quick else ROUNDS.items():
        trainers = {norm: _Trainer(net, norm) for norm in NORMS}
        seconds: dict[str, list[tuple[float, float]]] = {norm: [] for norm in NORMS}
        for number in range(rounds + 3):
            for norm, trainer in trainers.items():
                taken = trainer.step()
                if number >= 3:
                    seconds[norm].append(taken)
        for norm, values in seconds.items():
            base = seconds[norm.partition(",")[0]]
            rows.append(
                {
                    "kind": "measured",
                    "net": net,
                    "norm": norm,
                    "batch": BATCH,
                    "median_s": statistics.median(wall for wall, _ in values),
                    "median_cpu_s": statistics.median(busy for _, busy in values),
                    # both steps of a ratio are of the same moment
                    "over_alone": statistics.median(v[0] / b[0] for v, b in zip(values, base, strict=True)),
                    "cpu_over_alone": statistics.median(
                        v[1] / b[1] for v, b in zip(values, base, strict=True)
                    ),
                    "load": os.getloadavg()[0],
                    "buffer_bytes": trainers[norm].buffer_bytes,
                    "rounds": rounds,
                }
            )
    rows.append({"kind": "torch", "sync_batch_norm": _sync_batch_norm()})
    if rank == 0:
        write(Path(folder) / "rows.jsonl", rows)
    dist.destroy_process_group()


def _sync_batch_norm() -> str:
    # torch refuses before it communicates
    try:
        nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4))
    except ValueError as error:
        return str(error)
    return "runs"


def simulate() -> list[Row]:
    """Return the simulated rows."""
    return [
        {
            "kind": "simulated",
            "network": network.name,
            "ranks": ranks,
            "sync": sync,
            "step_s": step_seconds(network, ranks, sync),
        }
        for network in NETWORKS
        for ranks in RANKS
        for sync in SYNCHRONIZATIONS
    ]


def rows(quick: bool) -> Iterator[Row]:
    """Yield what two processes measure, and what is simulated."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (folder, quick), nprocs=2)  # type: ignore[no-untyped-call]
        yield from read(Path(folder) / "rows.jsonl")
    yield from simulate()


def tables(rows: list[Row]) -> list[str]:
    """Return the tables of what was measured and of what was simulated, each after what it says."""
    measured = [row for row in rows if row["kind"] == "measured"]
    lines = [
        [
            row["net"],
            row["norm"],
            str(row["rounds"]),
            f"{row['load']:.1f}",
            f"{1e3 * row['median_s']:.1f}",
            f"{row['over_alone']:.3f}",
            f"{row['cpu_over_alone']:.3f}",
            f"{row['buffer_bytes'] / 1e6:.2f}",
        ]
        for row in measured
    ]
    header = [
        "net",
        "norm",
        "rounds",
        "load",
        "step, ms",
        "over alone",
        "processor over alone",
        "buffers, MB",
    ]
    (torchs,) = (row["sync_batch_norm"] for row in rows if row["kind"] == "torch")
    return [
        f"Two gloo processes of one thread each, batch {measured[0]['batch']} a rank, images of 32 pixels, "
        "DDP. Step time in turns, medians. *Over alone* is the ratio, within a round, to the same norm "
        "without `process_group`: of the step, and of both processes' processor time. *Load* is the "
        "machine's, which others use too; its two cores are 2.",
        table(header, lines, "llrrrrrr"),
        f"`nn.SyncBatchNorm` there: {torchs}",
        "Simulated step of a ResNet-50 under DDP over the step without synchronization: 15 + 30 ms of "
        "compute in 53 equal parts that jitter by 5 %, 10 us to ask for a collective, rings or trees, "
        "collectives of one group in turn. It counts the network and the waiting, not the arithmetic of the "
        "layers. *own group*: the statistics have a process group of their own.",
        _simulated(rows),
    ]


def _simulated(rows: list[Row]) -> str:
    steps = {(r["network"], r["ranks"], r["sync"]): r["step_s"] for r in rows if r["kind"] == "simulated"}
    lines = []
    for network, ranks in dict.fromkeys(step[:2] for step in steps):
        none = steps[network, ranks, "none"]
        over = [f"{steps[network, ranks, sync] / none:.3f}" for sync in SYNCHRONIZATIONS[1:]]
        lines.append([network, str(ranks), f"{1e3 * none:.0f}", *over])
    header = ["network", "ranks", "none, ms", *SYNCHRONIZATIONS[1:]]
    return table(header, lines, "l" + "r" * (len(header) - 1))
