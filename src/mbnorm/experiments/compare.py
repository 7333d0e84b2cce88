"""`compare`: trains what is not in the results yet, then reports on all of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mbnorm.experiments.grid import Run, Setting, cost
from mbnorm.experiments.methods import Method
from mbnorm.experiments.plot import draw
from mbnorm.experiments.report import as_markdown, show
from mbnorm.experiments.report_page import as_html
from mbnorm.experiments.results import Results
from mbnorm.experiments.rows import rows_of
from mbnorm.experiments.training import Outcome
from mbnorm.experiments.workers import Scheduler, train_all

SECONDS_BETWEEN_LINES = 10.0

Advance: TypeAlias = Callable[[Run, str], None]


def train_missing(
    runs: Sequence[Run],
    results: Results,
    console: Console,
    jobs: int | None,
    accelerator: str,
    scheduler: Scheduler = "local",
    address: str | None = None,
) -> list[str]:
    """Train the runs that have no result yet, add their results, and return a line for each that crashed.

    Raises:
        BrokenProcessPool: a process died without a word.
    """
    missing = [run for run in runs if run not in results.outcomes]
    crashed: list[str] = []
    if not missing:
        return crashed
    with (
        closing(train_all(missing, jobs, accelerator, scheduler, address)) as finished,
        _progress(missing, console) as advance,
    ):
        for run, outcome in finished:
            if isinstance(outcome, Outcome):
                results.add(run, outcome, accelerator)
                advance(run, _in_short(outcome))
            else:
                crashed.append(f"{run}: {outcome}")
                advance(run, "crashed")
    return crashed


def report(
    settings: Sequence[Setting],
    runs: Sequence[Run],
    results: Results,
    out: Path,
    console: Console,
    *,
    baseline: Method,
    command: str,
) -> None:
    """Show the results of ``runs``, and write them to table.md, compare.png and report.html in ``out``.

    Args:
        settings: a table each.
        runs: what is shown; those without a result count as missing.
        results: where the results are.
        out: the folder to write to.
        console: where the tables are printed.
        baseline: the method that the others are compared with, seed by seed.
        command: what regenerates all of it.
    """
    tables = [(setting, rows_of(setting, runs, results.outcomes)) for setting in settings]
    missing = [run for run in runs if run not in results.outcomes]
    if len(missing) == len(runs):
        return
    show(tables, baseline, console)
    table, figure, page = out / "table.md", out / "compare.png", out / "report.html"
    table.write_text(as_markdown(tables, baseline), encoding="utf-8")
    draw(tables, figure)
    page.write_text(as_html(tables, missing, baseline, command), encoding="utf-8")
    console.print(f"written: {results.path}, {table}, {figure}, {page}", markup=False, soft_wrap=True)


def _in_short(outcome: Outcome) -> str:
    if outcome.score is None:
        return f"failed: {outcome.error}"
    return f"{outcome.score:.1f} %" + (" (diverged)" if outcome.status == "diverged" else "")


@contextmanager
def _progress(runs: Sequence[Run], console: Console) -> Iterator[Advance]:
    """Give a function to call with each finished run and what came of it."""
    if not console.is_terminal:
        yield _Lines(runs, console)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # runs end a minute apart in slow settings: an estimate from the last 30 seconds would be none
    with Progress(*columns, console=console, speed_estimate_period=3600, refresh_per_second=2) as bar:
        task = bar.add_task(f"0/{len(runs)} runs", total=sum(map(cost, runs)))
        done = 0

        def advance(run: Run, result: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, advance=cost(run), description=f"{done}/{len(runs)} runs")
            if result.startswith(("failed", "crashed")):
                bar.console.print(f"{run}: {result}", markup=False)

        yield advance


class _Lines:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        self.console = console
        self.runs, self.done = len(runs), 0
        self.cost, self.cost_done = sum(map(cost, runs)), 0.0
        self.start = self.last_line = time.monotonic()

    def __call__(self, run: Run, result: str) -> None:
        self.done += 1
        self.cost_done += cost(run)
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES and self.done < self.runs:
            return
        self.last_line = now
        left = (now - self.start) * (self.cost / self.cost_done - 1)
        line = f"{self.done}/{self.runs} runs, about {left:.0f} s left; {run}: {result}"
        self.console.print(line, markup=False, soft_wrap=True)
