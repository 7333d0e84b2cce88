"""One run on a GPU: `python -m mbnorm.experiments.bench.gpu OUT` checks, then measures, in 8 minutes at most.

Numbers of every backend and layer first; then steps of a ResNet-50; then forward and backward of layers in
its shapes, launched one by one and replayed from a CUDA graph, with their peak memory; then compiled layers,
and other ways to cut tensors. It writes OUT/gpu.jsonl, row by row, and OUT/gpu.md, and ends with a verdict on
each goal. Each part is done by processes of its own (`gpu_parts`), since an error on the device ends all work
of a process. What does not run, or what the time did not suffice for, becomes a row that says why.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from mbnorm.experiments.bench import gpu_check, gpu_layers, gpu_steps
from mbnorm.experiments.bench.gpu_parts import Job, Note, supervise, work
from mbnorm.experiments.bench.gpu_report import table
from mbnorm.experiments.bench.gpu_verdicts import verdicts
from mbnorm.experiments.bench.rows import Row, machine, read


class Part(NamedTuple):
    """Seconds of a part at most, with what those before it left over, and seconds without progress."""

    seconds: float
    patience: float
    processes: int = 1


PARTS = {
    # nearly all of that time goes into imports and into compiling kernels
    "check": Part(125.0, 45.0, 12),
    "steps": Part(50.0, 50.0),
    "graphed steps": Part(50.0, 50.0),
    "layers": Part(155.0, 30.0),
    "compiled": Part(60.0, 50.0),
    "cuts": Part(20.0, 20.0),
}
SECONDS = sum(part.seconds for part in PARTS.values())


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


def jobs_of(part: str, share: int) -> list[Job]:
    """Return what a process does for a part: its share, where several do it."""
    match part:
        case "check":
            return gpu_check.jobs("cuda", share, PARTS["check"].processes)
        case "steps":
            return gpu_steps.jobs("eager")
        case "graphed steps":
            return gpu_steps.jobs("graph")
        case "layers":
            return gpu_layers.layer_jobs(gpu_layers.gpu_cases(), gpu_layers.EAGER)
        case "compiled":
            return gpu_layers.layer_jobs(gpu_layers.compiled_cases(), gpu_layers.COMPILED)
        case "cuts":
            return gpu_layers.cut_jobs()
    raise ValueError(f"expected one of {', '.join(PARTS)}, got {part!r}")


def do(part: str, out: Path, until: float, share: int, first: int, note: Note) -> int:
    """Do a part in this process, append its rows as they come, and return the exit status."""
    where = gpu_machine()

    def write(row: Row) -> None:
        append(out, {**row, **where})

    return work(part, jobs_of(part, share), first, until, note, write, torch.cuda.synchronize)


def append(out: Path, row: Row) -> None:
    """Add a row to the file; lines of several processes do not mix."""
    with (out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run(name: str, out: Path, until: float) -> Iterator[Row]:
    """Do a part in processes of their own; yield why they failed, if they did."""
    part = PARTS[name]
    command = [sys.executable, "-m", "mbnorm.experiments.bench.gpu", str(out), "--part", name]

    def of_share(share: int) -> list[Row]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            shared = [*command, "--share", str(share)]
            return list(supervise(name, shared, Path(scratch), until, part.patience))

    with ThreadPoolExecutor(part.processes) as pool:
        for rows in pool.map(of_share, range(part.processes)):
            yield from rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mbnorm.experiments.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--part", choices=PARTS, help="only this, in this process")
    parser.add_argument("--share", type=int, default=0, help="which share of a part")
    parser.add_argument("--first", type=int, default=0, help="which of its jobs to begin with")
    parser.add_argument("--until", type=float, help="when no job begins any more, by time.monotonic")
    parser.add_argument("--note", type=Path, help="file for the job it is at")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: this measures one, and torch sees none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        until = time.monotonic() + options.seconds if options.until is None else options.until
        note = Note(options.note or options.out / "note")
        return do(options.part, options.out, until, options.share, options.first, note)
    (options.out / "gpu.jsonl").unlink(missing_ok=True)
    measure(options.out, options.seconds)
    return 0


def measure(out: Path, seconds: float) -> None:
    """Do all parts in so many seconds, write what they found and print a verdict on each goal."""
    where = gpu_machine()
    start = until = time.monotonic()
    said = ""
    for name, part in PARTS.items():
        until += part.seconds * seconds / SECONDS
        for row in run(name, out, until):
            append(out, {**row, **where})
        said = _report(out)
        (out / "gpu.md").write_text(said, encoding="utf-8")
        print(f"{name} done after {time.monotonic() - start:.0f} s", flush=True)
    print(said)


def _report(out: Path) -> str:
    """Return tables and verdicts, or why there are none: the measurement goes on."""
    try:
        rows = read(out / "gpu.jsonl") if (out / "gpu.jsonl").exists() else []
        return "\n".join([table(rows) if rows else "Nothing was measured.\n", *verdicts(rows)]) + "\n"
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    raise SystemExit(main())
