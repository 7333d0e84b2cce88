"""The layers as they were before both passes were remembered, beside the strongest peers, on real data."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import MEASURED, drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Tell
from evidence.lists import CIFAR10, MLP, NUCLEI, Entrant

TASKS = (CIFAR10, MLP, NUCLEI)
ENTRANTS = (
    Entrant("batch"),
    Entrant("batch", 32),
    Entrant("batch+centered"),
    Entrant("group"),
    Entrant("group+ws"),
    Entrant("mabn"),
    Entrant("online"),
    Entrant("renorm"),
    Entrant("momentum-constant"),
    Entrant("memorized"),
    Entrant("matched"),
)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return measured_rows(TASKS, ENTRANTS, seeds, tell, known)


CLAIM = Claim(
    title="Real data, with an earlier rule",
    sentence=(
        "What the layers reach on real data, beside other methods, with an earlier rule: 32 values, and a "
        "memory of the forward pass only. Nothing was chosen on the test images."
    ),
    measured=MEASURED,
    rows=_rows,
    tables=lambda rows: tables_of(TASKS, ENTRANTS, rows),
    draw=lambda rows, panels: drawn(TASKS, ENTRANTS, rows, panels),
    panels=len(TASKS),
    verdict=lambda rows: verdict(TASKS, ENTRANTS, Entrant("matched"), rows),
)
