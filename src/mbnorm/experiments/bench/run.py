"""`mbnorm bench`: measure, write the rows, and the table and plot made of them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from mbnorm.experiments.bench import report
from mbnorm.experiments.bench.cases import Case, cases
from mbnorm.experiments.bench.memory import keep_freed_memory
from mbnorm.experiments.bench.rows import Row, machine, write
from mbnorm.experiments.bench.steps import STEPS, race_steps
from mbnorm.experiments.bench.timing import PASSES, contestants, copy_rate, race

ROUNDS = 7
SECONDS_A_ROUND = 0.03
STEP_ROUNDS = 9


def bench(out: Path, *, threads: list[int], providers: list[str], dtypes: list[str], quick: bool) -> None:
    """Measure layers and whole steps; ``out`` gets bench.jsonl, bench.md and bench.png.

    Raises:
        ArithmeticError: a layer computes something else than its float64 copy.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    before = torch.get_num_threads()
    rows: list[Row] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            for case in cases(dtypes, ["contiguous", "channels_last"], quick=quick):
                rows += _layer_rows(case, providers, count, quick)
                console.print(f"{case.dtype} {case.layout} {case.shape}, threads: {count}", highlight=False)
                write(out / "bench.jsonl", rows)
            for step in STEPS[:1] if quick else STEPS:
                for method, (timing, saved, peak) in race_steps(step, 3 if quick else STEP_ROUNDS).items():
                    rows.append(
                        {
                            "kind": "step",
                            "net": step.net,
                            "method": method,
                            "threads": count,
                            "median_s": timing.median,
                            "low_s": timing.low,
                            "high_s": timing.high,
                            "activation_bytes": saved,
                            "peak_bytes": peak,
                            **machine(),
                        }
                    )
                console.print(f"step of {step.net}, threads: {count}", highlight=False)
                write(out / "bench.jsonl", rows)
    finally:
        torch.set_num_threads(before)
    text = report.table(rows)
    (out / "bench.md").write_text(text, encoding="utf-8")
    report.draw(rows, out / "bench.png")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _layer_rows(case: Case, providers: list[str], threads: int, quick: bool) -> Iterator[Row]:
    ready = contestants(case, providers)
    copied = copy_rate(case) / 1e9
    memory = {name: (c.saved_bytes(), c.peak_bytes()) for name, c in ready.items()}
    for name, timings in race(ready, 3 if quick else ROUNDS, SECONDS_A_ROUND):
        saved, peak = memory[name]
        for mode, timing in timings.items():
            yield {
                "kind": "layer",
                "provider": name,
                "shape": case.shape,
                "dtype": case.dtype,
                "layout": case.layout,
                "mode": mode,
                "threads": threads,
                "median_s": timing.median,
                "low_s": timing.low,
                "high_s": timing.high,
                "gb_per_s": PASSES[mode] * case.bytes / timing.median / 1e9,
                "copy_gb_per_s": copied,
                "saved_bytes": saved,
                "peak_bytes": peak,
                **machine(),
            }
