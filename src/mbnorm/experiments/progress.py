"""A bar for what may take more than some seconds."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

from mbnorm.backends import cpu
from mbnorm.experiments.methods import OURS

Item = TypeVar("Item")


def shown(items: Iterable[Item], count: int, what: str) -> Iterator[Item]:
    """Yield the items while a bar says how many of ``count`` there were; it needs a terminal, and goes."""
    console = Console(stderr=True)
    yield from track(items, what, count, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def counted(count: int, what: str) -> Iterator[Callable[[], None]]:
    """Give a function to call ``count`` times, once a step, while a bar says how often it was called."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=count)
        yield lambda: bar.advance(task)


def prepare_kernels(methods: Iterable[str]) -> None:
    """Compile the CPU kernels under a bar, if they are missing and one of the methods runs on them."""
    if not any(method in OURS for method in methods):
        return
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task("CPU kernels", total=None)
        cpu.missing()
