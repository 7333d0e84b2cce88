"""Compiled training steps with each norm, over those of the same net with `nn.BatchNorm2d`, compiled as well.

    python -m mbnorm.experiments.bench.compiled benchmarks/compiled

compiles (minutes, the first time), measures one thread, and writes compiled.jsonl and compiled.md.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import mbnorm
from mbnorm.experiments.bench.memory import keep_freed_memory
from mbnorm.experiments.bench.ranks import small_cnn
from mbnorm.experiments.bench.rows import Row, machine, write
from mbnorm.experiments.bench.timing import Timing
from mbnorm.experiments.nets import resnet18

BASE = "batch"
METHODS = (BASE, "momentum", "matched", "memorized")


def _two_convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, 32):
        layers += [nn.Conv2d(inputs, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two convolutions": (_two_convolutions, (2, 3, 32, 32)),
    "small CNN": (small_cnn, (2, 3, 32, 32)),
    "ResNet-18": (resnet18, (2, 3, 32, 32)),
}
ROUNDS = {"two convolutions": 100, "small CNN": 60, "ResNet-18": 20}


class Trainer:
    """A compiled net with one norm, and its training step."""

    def __init__(self, net: str, method: str) -> None:
        build, shape = NETS[net]
        torch.manual_seed(0)
        model = build()
        if method != BASE:
            mbnorm.convert(model, method, batch_size=shape[0])  # type: ignore[arg-type]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.model = torch.compile(model, fullgraph=True)
        self.x = torch.randn(shape)

    def step(self) -> float:
        """Train a step; return its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - start


def race(net: str, rounds: int) -> dict[str, Timing]:
    """Return the seconds of a step of each method, timed in turns."""
    # torch.compile takes the nets before for versions of these, and only so many versions
    torch.compiler.reset()
    trainers = {method: Trainer(net, method) for method in METHODS}
    for trainer in trainers.values():
        for _ in range(3):
            trainer.step()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, trainer in trainers.items():
            seconds[method].append(trainer.step())
    return {method: Timing.of(found) for method, found in seconds.items()}


def table(rows: list[Row]) -> str:
    """Return the Markdown table of the rows."""
    where = rows[0]
    lines = [
        f"{where['processor']}, one thread, torch {where['torch']}, mbnorm {where['mbnorm']}. Written by "
        "`python -m mbnorm.experiments.bench.compiled benchmarks/compiled`.",
        "",
        "Training steps at batch 2 and 32x32 pixels, the whole net under `torch.compile`: milliseconds with "
        "`nn.BatchNorm2d`, and the time with our layers over it.",
        "",
        "| net | ms | " + " | ".join(METHODS[1:]) + " |",
        "| --- | ---: |" + " ---: |" * (len(METHODS) - 1),
    ]
    for net in dict.fromkeys(r["net"] for r in rows):
        here = {r["method"]: r["median_s"] for r in rows if r["net"] == net}
        cells = (f"{here[method] / here[BASE]:.2f}" for method in METHODS[1:])
        lines.append(f"| {net} | {1e3 * here[BASE]:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    """Run the command."""
    keep_freed_memory()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for net, rounds in ROUNDS.items():
        for method, timing in race(net, rounds).items():
            rows.append(
                {
                    "kind": "compiled",
                    "net": net,
                    "method": method,
                    "median_s": timing.median,
                    "low_s": timing.low,
                    "high_s": timing.high,
                    **machine(),
                }
            )
        write(out / "compiled.jsonl", rows)
        (out / "compiled.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
