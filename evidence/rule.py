"""What the flagship's rule is to be: chosen here, on the list of tasks that tune."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import MEASURED, drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Tell
from evidence.lists import TUNED, Entrant

EXACT = (("gradient", "exact"),)
BOTH = (("gradient", "remembered"),)
CENTERED = (*BOTH, ("center_filters", True))
PER_IMAGE = (*CENTERED, ("per_image", True))


def matched(options: tuple[tuple[str, object], ...], values: int) -> Entrant:
    """Return the flagship with options, matching the noise of so many values."""
    return Entrant("matched", None, (*options, ("matched_values", values)))


LEAST_ERROR = 10**6
"""So many values no memory reaches: what is left of the rule is the weight of the least error."""

CANDIDATES = (
    matched(EXACT, 32),
    *(matched(BOTH, values) for values in (32, 128)),
    *(matched(CENTERED, values) for values in (32, 128, LEAST_ERROR)),
    *(matched(PER_IMAGE, values) for values in (32, 128)),
    Entrant("momentum-constant", None, BOTH),
    Entrant("memorized", None, BOTH),
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
    verdict=lambda rows: verdict(TUNED, RIVALS, matched(PER_IMAGE, 128), rows),
    seeds=3,
)
