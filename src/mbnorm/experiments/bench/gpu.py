"""One run on a GPU: `python -m mbnorm.experiments.bench.gpu OUT` checks, then measures, in 8 minutes at most.

Numbers of every backend first; then steps of a ResNet-50; then forward and backward of layers in its shapes,
launched one by one and replayed from a CUDA graph, with their peak memory; then compiled layers, and tiles of
other sizes. It writes OUT/gpu.jsonl, row by row, and OUT/gpu.md. Each part is a process of its own, since an
error on the device ends all work of a process. What does not run, or what the time did not suffice for,
becomes a row that says why.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from mbnorm.experiments.bench import gpu_check, gpu_layers, gpu_steps
from mbnorm.experiments.bench.gpu_report import table
from mbnorm.experiments.bench.rows import Row, failure, machine, read

PARTS = {
    "check": 100.0,
    "steps": 50.0,
    "graphed steps": 50.0,
    "layers": 150.0,
    "compiled": 80.0,
    "cuts": 20.0,
}
"""Seconds of each part at most, with what those before it left over."""
CHECKERS = 12
"""Processes that check side by side: nearly all of that time goes into compiling kernels."""


def gpu_machine() -> Row:
    """Return what a row says of where it was measured."""
    row = machine()
    if torch.cuda.is_available():
        row |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    if find_spec("triton") is not None:
        import triton

        row["triton"] = triton.__version__
    return row


def rows_of(part: str, until: float, share: int) -> Iterator[Row]:
    """Yield the rows of a part, as far as the time goes."""
    match part:
        case "check":
            yield from gpu_check.check(gpu_check.checked_cases()[share::CHECKERS], "cuda")
        case "steps":
            yield from gpu_steps.step_rows(until, "eager")
        case "graphed steps":
            yield from gpu_steps.step_rows(until, "graph")
        case "layers":
            yield from gpu_layers.all_layer_rows(until, gpu_layers.gpu_cases(), gpu_layers.EAGER)
        case "compiled":
            yield from gpu_layers.all_layer_rows(until, gpu_layers.compiled_cases(), gpu_layers.COMPILED)
        case "cuts":
            yield from gpu_layers.cut_rows(until)


def do(part: str, out: Path, seconds: float, share: int) -> None:
    """Do a part in this process, and append its rows as they come."""
    where = gpu_machine()
    for row in rows_of(part, time.monotonic() + seconds, share):
        append(out, {**row, **where})


def append(out: Path, row: Row) -> None:
    """Add a row to the file; lines of several processes do not mix."""
    with (out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run(part: str, out: Path, until: float) -> Iterator[Row]:
    """Do a part in processes of their own; yield why they failed, if they did."""
    seconds = until - time.monotonic()
    command = [sys.executable, "-m", "mbnorm.experiments.bench.gpu", str(out), "--part", part]
    command += ["--seconds", f"{0.9 * seconds - 5:.0f}"]
    started = []
    for share in range(CHECKERS if part == "check" else 1):
        log = (out / f"{part.replace(' ', '-')}-{share}.log").open("w+", encoding="utf-8")
        process = subprocess.Popen([*command, "--share", str(share)], stdout=log, stderr=log)
        started.append((process, log))
    for process, log in started:
        try:
            status = process.wait(max(until - time.monotonic(), 0.1))
            why = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            why = "killed: no time left"
        log.seek(0)
        said = log.read().strip().splitlines()
        log.close()
        if why is not None:
            yield failure("part", part, RuntimeError(f"{why}; {said[-1] if said else 'it said nothing'}"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mbnorm.experiments.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=PARTS, help="only this, in this process")
    parser.add_argument("--seconds", type=float, default=sum(PARTS.values()), help="for all of it")
    parser.add_argument("--share", type=int, default=0, help="which share of the checks")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this measures a GPU, and torch sees none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        do(options.part, options.out, options.seconds, options.share)
        return 0
    (options.out / "gpu.jsonl").unlink(missing_ok=True)
    measure(options.out, options.seconds)
    return 0


def measure(out: Path, seconds: float) -> None:
    """Do all parts in so many seconds, and write what they found."""
    where = gpu_machine()
    until = time.monotonic()
    for part, share in PARTS.items():
        until += share * seconds / sum(PARTS.values())
        for row in run(part, out, until):
            append(out, {**row, **where})
        text = table(read(out / "gpu.jsonl")) if (out / "gpu.jsonl").exists() else ""
        (out / "gpu.md").write_text(text, encoding="utf-8")
        print(f"{part} done", flush=True)
    print(text)


if __name__ == "__main__":
    raise SystemExit(main())
