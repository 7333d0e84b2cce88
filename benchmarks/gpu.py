"""Steps of a ResNet-50 and layers in its shapes on a GPU, in 8 minutes at most. Not yet run on a GPU.

Launched one by one ("eager") and replayed from a CUDA graph. `make test-gpu` checks the numbers.
"""

import faulthandler
import time
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from benchmarks import layers, steps
from benchmarks.cases import BASE, RESNET50, Case, cases
from benchmarks.rows import Row, failure
from benchmarks.timing import GRAPH
from mbnorm.functional import backend_for
from mbnorm.versions import describe

SECONDS = 465.0
"""When the process ends, whatever hangs; the imports before and the page after take the rest of 8 minutes."""
SECONDS_OF_THE_LAST = 45.0
"""Before that no job begins any more."""
NORMS = (*steps.WITH_REFRESHED, "matched-aten")
LAYERS = (BASE, *steps.OURS, "matched-aten")
COMPILED_LAYERS = (BASE, "compiled_batch_norm", "compiled_matched")
COMPILED_SHAPES = ((64, 112, 112), (256, 56, 56), (2048, 7, 7))


def machine() -> Row:
    """Return what a row says of the GPU it was measured on."""
    row: Row = {"triton": None}
    if find_spec("triton") is not None:
        import triton

        row["triton"] = triton.__version__
    if torch.cuda.is_available():
        row |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda or torch.version.hip}
    return row


def jobs(device: str, quick: bool) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yield names and rows that are measured once they are asked for, first what matters most."""
    yield "backend", backend(device)
    net, rounds = ("two convolutions", 2) if quick else ("resnet50", 5)
    for how in ("eager",) if device == "cpu" else ("eager", GRAPH):
        found = steps.measure(net, NORMS, how, rounds=rounds, seconds_a_round=0.1, device=device)
        yield f"steps of {net}, {how}", found

    def of(batch: int) -> list[Case]:
        shapes = RESNET50[-1:] if quick else RESNET50
        return cases(tuple((batch, *shape[1:]) for shape in shapes), ("float32", "bfloat16"))

    def measured(cases: list[Case], names: tuple[str, ...]) -> Iterator[tuple[str, Iterator[Row]]]:
        for case in cases:
            found = layers.measure(case, names, rounds=rounds, seconds_a_round=0.01, device=device)
            yield f"layers on {case}", found

    yield from measured(of(2), LAYERS)
    if quick:
        return
    yield from measured(of(32), LAYERS)
    for batch, dtype in ((2, "float32"), (32, "bfloat16")):
        compiled = [Case((batch, *shape), dtype, "contiguous") for shape in COMPILED_SHAPES]
        yield from measured(compiled, COMPILED_LAYERS)
    yield from measured(of(8), LAYERS)


def backend(device: str) -> Iterator[Row]:
    """Yield what runs where no backend is asked for, and how long the first call takes to find out."""
    start = time.perf_counter()
    found = backend_for(torch.empty(2, 3, device=device))
    seconds = time.perf_counter() - start
    yield {"kind": "backend", "backend": found, "seconds": seconds, "versions": describe()}


def measure(device: str, *, quick: bool, seconds: float) -> Iterator[Row]:
    """Yield the rows of each job that begins within so many seconds; of others, and of errors, why not."""
    where = machine()
    end = time.monotonic() + seconds
    for name, job in jobs(device, quick):
        try:
            if time.monotonic() > end:
                raise TimeoutError(f"the {seconds:.0f} seconds are over")
            for row in job:
                yield row | where
        except Exception as error:
            # after most errors of a device all that follows fails, too, and says so
            yield failure("gpu", name, error) | where


def rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of a GPU, in 8 minutes at most; a process that hangs ends with a traceback."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: this measures one, and torch sees none")
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield from measure("cuda", quick=quick, seconds=SECONDS - SECONDS_OF_THE_LAST)
    finally:
        faulthandler.cancel_dump_traceback_later()


def tables(rows: list[Row]) -> list[str]:
    """Return what ran and the tables of steps and layers."""
    where = rows[0]
    found = [row for row in rows if row["kind"] == "backend"]
    took = "".join(
        f" Without `backend=` {row['backend']} runs, which took {row['seconds']:.1f} s to find out."
        for row in found
    )
    said = f"{where.get('device')}, CUDA {where.get('cuda')}, triton {where['triton']}.{took}"
    versions = [f"```text\n{row['versions']}\n```" for row in found]
    return [said, *versions, *steps.tables(rows), *layers.tables(rows)]
