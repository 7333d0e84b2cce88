"""What the flagship's rule is to be: chosen here, on the list of tasks that tune."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import MEASURED, drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Tell
from evidence.lists import TUNED, Entrant
from mbnorm.gradient import Gradient

REMEMBERED = (("gradient", "remembered"),)


def matched(gradient: Gradient, values: int, *, centered: bool = False, per_image: bool = False) -> Entrant:
    """Return the flagship with options; it matches the noise of so many values."""
    options = ("gradient", gradient), ("center_filters", centered), ("per_image", per_image)
    return Entrant("matched", None, (*options, ("matched_values", values)))


CHOSEN = matched("remembered", 128, centered=True, per_image=True)
CANDIDATES = (
    matched("exact", 32),
    matched("remembered", 32),
    matched("remembered", 128),
    matched("exact", 128, centered=True),
    *(matched("remembered", values, centered=True) for values in (32, 128, 512)),
    CHOSEN,
    Entrant("momentum-constant", None, REMEMBERED),
    Entrant("memorized", None, REMEMBERED),
)
RIVALS = (
    Entrant("batch"),
    Entrant("batch", 32),
    Entrant("batch+centered"),
    Entrant("batch+centered", 32),
    Entrant("group"),
    Entrant("group+ws"),
    Entrant("mabn"),
    Entrant("renorm"),
)
ENTRANTS = (*RIVALS, *CANDIDATES)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return measured_rows(TUNED, ENTRANTS, seeds, tell, known)


CLAIM = Claim(
    sentence=(
        "Candidates for the flagship's rule: a gradient that is remembered, centered filters, each image's "
        "statistics, and how many values to match, beside their rivals, on the list that tunes."
    ),
    measured=MEASURED,
    rows=_rows,
    tables=lambda rows: tables_of(TUNED, ENTRANTS, rows),
    draw=lambda rows, panels: drawn(TUNED, ENTRANTS, rows, panels),
    panels=len(TUNED),
    verdict=lambda rows: verdict(TUNED, RIVALS, CHOSEN, rows),
    seeds=3,
)
