"""`python -m benchmarks NAME OUT`, from a clone: measure, and write OUT/NAME.jsonl and OUT/NAME.md."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu, layers, overhead, ranks, steps
from benchmarks.memory import keep_freed_memory
from benchmarks.rows import Row, append, caption, failures, machine, read


class Benchmark(NamedTuple):
    """What yields the rows, quickly or well, and what makes tables of them."""

    rows: Callable[[bool], Iterator[Row]]
    tables: Callable[[list[Row]], list[str]]
    help: str


BENCHMARKS = {
    "layers": Benchmark(layers.rows, layers.tables, "each layer on the CPU"),
    "compiled-layers": Benchmark(layers.compiled_rows, layers.tables, "layers under torch.compile"),
    "steps": Benchmark(steps.rows, steps.tables, "training steps on the CPU"),
    "compiled-steps": Benchmark(steps.compiled_rows, steps.tables, "steps under torch.compile"),
    "ranks": Benchmark(ranks.rows, ranks.tables, "training steps of two processes"),
    "gpu": Benchmark(gpu.rows, gpu.tables, "steps and layers on a GPU; 8 minutes at most"),
}


def page_of(name: str, rows: list[Row]) -> str:
    """Return the page of a benchmark, from its rows alone."""
    parts = [caption(name, rows), *BENCHMARKS[name].tables(rows), *failures(rows)]
    return "\n\n".join(parts) + "\n"


def measure(name: str, path: Path, *, quick: bool) -> None:
    """Measure, and write each row as it comes."""
    path.unlink(missing_ok=True)
    where = machine()
    for row in BENCHMARKS[name].rows(quick):
        append(path, row | where)
        print(_said(row), flush=True)


def _said(row: Row) -> str:
    what = " ".join(str(row[key]) for key in row if isinstance(row[key], str | tuple) and key != "traceback")
    return f"{what}: {1e3 * row['median_s']:.3f} ms" if "median_s" in row else what


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 1 where something did not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.help)
        command.add_argument("out", type=Path, help="folder for the rows and the page")
        command.add_argument("--quick", action="store_true", help="few shapes and rounds")
        command.add_argument("--page", action="store_true", help="only write the page, of the rows there are")
    commands.add_parser("overhead", help="where the time of a small layer goes; prints microseconds")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    if options.name == "overhead":
        overhead.show()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.jsonl"
    if not options.page:
        measure(options.name, path, quick=options.quick)
    rows = read(path)
    page = page_of(options.name, rows)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(f"\n{page}")
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
