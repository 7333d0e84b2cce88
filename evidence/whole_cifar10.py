"""All images of CIFAR-10: what a training of some hours at batch 2 comes to, epoch by epoch."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell
from evidence.trained import where
from mbnorm.experiments.methods import OURS, Method

RATES: dict[Method, float] = {
    "batch": 0.1,
    "matched": 0.1,
    "mabn": 0.03,
    "group+ws": 0.03,
    "momentum-constant": 0.03,
    "memorized": 0.03,
}
"""For a batch of 64, as held-out images chose them for ResNet-8, in `rule` and `real-data`."""
DATA, MODEL, BATCH_SIZE, EPOCHS = "npz:data/cifar10.npz", "resnet20", 2, 4
FOLDER = Path("runs/whole-cifar10")
"""Has the checkpoints that stopped trainings go on from."""
SECONDS_BETWEEN_LOOKS = 1.0


def command(method: Method) -> list[str]:
    """Return how to train with a method."""
    return [
        *("mbnorm", "train", "--model", MODEL, "--data", DATA, "--method", method),
        *("--batch-size", str(BATCH_SIZE), "--epochs", str(EPOCHS)),
        *("--lr", f"{RATES[method] * BATCH_SIZE / 64:g}", "--out", str(FOLDER / method)),
    ]


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    waiting = [method for method in RATES if len(where(known, method=method)) < EPOCHS]
    told = {(row["method"], row["epoch"]) for row in known}
    running: dict[Method, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                method = waiting.pop(0)
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                module = [sys.executable, "-m", *command(method)]
                running[method] = subprocess.Popen(module, env=environment, stdout=subprocess.DEVNULL)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for method, process in list(running.items()):
                ended = process.poll() is not None
                for row in _epochs(method):
                    if (method, row["epoch"]) not in told:
                        told.add((method, row["epoch"]))
                        tell(f"{method}, epoch {row['epoch']:.0f}: {row['test_accuracy']:.1f} %")
                        yield row
                if ended:
                    del running[method]
                    if process.returncode:
                        raise RuntimeError(f"{' '.join(command(method))}: exit status {process.returncode}")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _epochs(method: Method) -> list[Row]:
    of = {"method": method, "rate": RATES[method], "date": date.today().isoformat()}
    log = FOLDER / method / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    # the last one may be being written
    return [of | json.loads(line) for line in lines if line.endswith("\n")]


def _tables(rows: Sequence[Row]) -> list[Table]:
    headings = [
        "ResNet-20, batch 2",
        "rate",
        *(f"epoch {epoch}" for epoch in range(1, EPOCHS + 1)),
        "training",
    ]
    lines = []
    for method, rate in RATES.items():
        found = sorted(where(rows, method=method), key=lambda row: float(row["epoch"]))
        cells = [f"{row['test_accuracy']:.1f}" for row in found]
        cells += ["-"] * (EPOCHS - len(cells))
        trained = f"{found[-1]['train_accuracy']:.1f}" if len(found) == EPOCHS else "-"
        lines.append([method, f"{rate:g}", *cells, trained])
    return [(headings, lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for method in RATES:
        found = sorted(where(rows, method=method), key=lambda row: float(row["epoch"]))
        style = "-" if method in OURS else "--"
        accuracies = [row["test_accuracy"] for row in found]
        panel.plot([row["epoch"] for row in found], accuracies, style, marker="o", label=method)
    panel.set_xticks(range(1, EPOCHS + 1))
    panel.set_xlabel("epoch")
    panel.set_ylabel("test accuracy, %")


CLAIM = Claim(
    title="All of CIFAR-10",
    sentence="What a ResNet-20 learns from all 50,000 images of CIFAR-10 with batches of 2.",
    measured=(
        f"Accuracy in percent on all 10,000 test images after each of {EPOCHS} epochs, and on the training "
        "images, as they came, in the last. It is one seed, so differences of a point or two mean nothing. "
        "Rates are for a batch of 64, smaller batches in proportion; held-out images chose them for a "
        f"smaller net on part of the data. Each line is `{' '.join(command('matched'))}`, with its method "
        "and rate; the command goes on where it was stopped."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
    seeds=1,
)
