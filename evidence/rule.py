"""The rule of Matched BN: chosen here, on the tasks that tune."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import MEASURED, Known, drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Table, Tell, difference_cell
from evidence.lists import TUNED, Entrant
from mbnorm.experiments.estimates import paired_difference
from mbnorm.gradient import Gradient

REMEMBERED = (("gradient", "remembered"),)


def matched(gradient: Gradient, values: int, *, centered: bool = False, per_image: bool = False) -> Entrant:
    """Return Matched BN with options; it matches the noise of so many values."""
    options = ("gradient", gradient), ("center_filters", centered), ("per_image", per_image)
    return Entrant("matched", None, (*options, ("matched_values", values)))


CHOSEN = matched("remembered", 128, centered=True)
PER_IMAGE = matched("remembered", 128, centered=True, per_image=True)
FIRST_LEFT = Entrant("matched", None, (("first_layers", "not in first layers"),))
"""As chosen, but for the filters of layers on the net's own inputs. In MLPs `convert(model)` does so."""
CHANGES = {
    "128 values for 32, not centered": (matched("remembered", 128), matched("remembered", 32)),
    "remembered for exact, 128, centered": (CHOSEN, matched("exact", 128, centered=True)),
    "centered for not, 128": (CHOSEN, matched("remembered", 128)),
    "first layers not centered": (FIRST_LEFT, CHOSEN),
    "each image too": (PER_IMAGE, CHOSEN),
}
"""What a change adds: with it, and without."""
CANDIDATES = (
    matched("exact", 32),
    matched("remembered", 32),
    matched("remembered", 128),
    matched("exact", 128, centered=True),
    CHOSEN,
    FIRST_LEFT,
    PER_IMAGE,
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


def _changes(rows: Sequence[Row]) -> Table:
    """Return by how many points each change moves the score of each task, seed by seed."""
    known = Known(rows)
    lines = [
        [
            change,
            *(
                difference_cell(paired_difference(known.scores(task, new), known.scores(task, old)), 1)
                for task in TUNED
            ),
        ]
        for change, (new, old) in CHANGES.items()
    ]
    return ["what a change adds, points", *(task.name for task in TUNED)], lines


CLAIM = Claim(
    title="Candidates for the rule",
    sentence=(
        "Candidates for the rule of Matched BN, beside other methods, on the data that choose it: remembered "
        "gradient, centered filters, each image's own statistics, and how many values to match."
    ),
    measured=MEASURED,
    rows=_rows,
    tables=lambda rows: [_changes(rows), *tables_of(TUNED, ENTRANTS, rows)],
    draw=lambda rows, panels: drawn(TUNED, ENTRANTS, rows, panels),
    panels=len(TUNED),
    verdict=lambda rows: verdict(TUNED, RIVALS, CHOSEN, rows),
    seeds=3,
)
