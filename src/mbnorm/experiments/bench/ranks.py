"""Training steps on two gloo processes, with and without synchronized statistics, and the table of both.

    python -m mbnorm.experiments.bench.ranks benchmarks/ranks

measures (minutes, on two cores), simulates, and writes ranks.jsonl and ranks.md.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import mbnorm
from mbnorm.experiments.bench.network import NETWORKS, RANKS, SYNCHRONIZATIONS, step_seconds
from mbnorm.experiments.bench.rows import Row, machine, read, write
from mbnorm.experiments.nets import resnet18

BATCH = 4
ROUNDS = {"small CNN": 61, "ResNet-18": 15}


def small_cnn() -> nn.Module:
    """Return six convolutions with norms, for images of 32 pixels."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


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


def _measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows: list[Row] = []
    for net, rounds in ROUNDS.items():
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
                    **machine(),
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


def table(rows: list[Row]) -> str:
    """Return the Markdown tables of rows."""
    measured = [r for r in rows if r["kind"] == "measured"]
    first = measured[0]
    lines = [
        f"{first['processor']}, {first['cores']} cores, torch {first['torch']}, mbnorm {first['mbnorm']}; "
        f"two gloo processes of one thread each, batch {first['batch']} a rank, images of 32 pixels, DDP. "
        "Written by `python -m mbnorm.experiments.bench.ranks`.",
        "",
        "Step time in turns, medians. *Over alone* is the ratio, within a round, to the same norm without "
        "`process_group`: of the step, and of both processes' processor time. *Load* is the machine's, which "
        "others use too; its two cores are 2.",
        "",
        "| net | norm | rounds | load | step, ms | over alone | processor over alone | buffers, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in measured:
        lines.append(
            f"| {r['net']} | {r['norm']} | {r['rounds']} | {r['load']:.1f} | {1e3 * r['median_s']:.1f} | "
            f"{r['over_alone']:.3f} | {r['cpu_over_alone']:.3f} | {r['buffer_bytes'] / 1e6:.2f} |"
        )
    lines += [
        "",
        f"`nn.SyncBatchNorm` there: {next(r['sync_batch_norm'] for r in rows if r['kind'] == 'torch')}",
        "",
        "Simulated step of a ResNet-50 under DDP over the step without synchronization: 15 + 30 ms of "
        "compute in 53 equal parts that jitter by 5 %, 10 us to ask for a collective, rings or trees, "
        "collectives of one group in turn. It counts the network and the waiting, not the arithmetic of the "
        "layers. *own group*: the statistics have a process group of their own.",
        "",
        "| network | ranks | none, ms | " + " | ".join(SYNCHRONIZATIONS[1:]) + " |",
        "| --- | ---: |" + " ---: |" * len(SYNCHRONIZATIONS),
    ]
    simulated = {(r["network"], r["ranks"], r["sync"]): r["step_s"] for r in rows if r["kind"] == "simulated"}
    for network in NETWORKS:
        for ranks in RANKS:
            none = simulated[network.name, ranks, "none"]
            cells = [f"{simulated[network.name, ranks, s] / none:.3f}" for s in SYNCHRONIZATIONS[1:]]
            lines.append(f"| {network.name} | {ranks} | {1e3 * none:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    """Measure and simulate; ``out`` gets ranks.jsonl and ranks.md."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (folder,), nprocs=2)  # type: ignore[no-untyped-call]
        rows = read(Path(folder) / "rows.jsonl")
    rows += simulate()
    write(out / "ranks.jsonl", rows)
    (out / "ranks.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
