"""Memorized batch norm and Double-Forward where their paper has them: with batches of 128."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import BATCH, MEASURED, Known, drawn, measured_rows, tables_of
from evidence.claim import Claim, Tell
from evidence.lists import Entrant, Task
from mbnorm.experiments.estimates import paired_difference

MEMORY = (("memory_size", 4),)
"""The paper has no number; these are the statistics of 512 images."""
WITHOUT, WITH = Entrant("memorized", None, MEMORY), Entrant("memorized+df", None, MEMORY)
ENTRANTS = (BATCH, WITHOUT, WITH)
TASKS = (
    Task(
        *("CIFAR-10, ResNet-8", "npz:data/cifar10.npz", "resnet8", 128, 8),
        images=10_000,
        held_out=1_000,
    ),
)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return measured_rows(TASKS, ENTRANTS, seeds, tell, known)


def _verdict(rows: Sequence[Row]) -> str:
    known = Known(rows)
    gain = paired_difference(known.scores(TASKS[0], WITH), known.scores(TASKS[0], WITHOUT))
    if gain is None or gain.half_width is None:
        return ""
    words = f"{gain.signed(1)} points, seed by seed"
    if not gain.decided:
        return f"Double-Forward makes no difference with batches of 128: {words}."
    return f"Double-Forward {'gains' if gain.mean > 0 else 'loses'} with batches of 128: {words}."


CLAIM = Claim(
    title="Batches of 128",
    sentence="Double-Forward gains accuracy with batches of 128, the setting of its paper.",
    measured=MEASURED,
    rows=_rows,
    tables=lambda rows: tables_of(TASKS, ENTRANTS, rows)[:1],
    draw=lambda rows, panels: drawn(TASKS, ENTRANTS, rows, panels),
    panels=len(TASKS),
    seeds=3,
    verdict=_verdict,
)
