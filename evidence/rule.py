"""The rule of Matched BN: chosen here, on the tasks that tune."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import MEASURED, Known, drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Table, Tell, difference_cell
from evidence.lists import EDGES, RATES, TUNED, Entrant
from mbnorm.experiments.estimates import paired_difference
from mbnorm.experiments.methods import Method
from mbnorm.gradient import Gradient

REMEMBERED = (("gradient", "remembered"),)
PAPERS: tuple[Method, ...] = ("momentum-constant", "memorized")


def by_values(*, centered: bool) -> Entrant:
    """Return Matched BN with the rule before this one, which matches 128 values."""
    options = ("gradient", "remembered"), ("center_filters", centered), ("per_image", False)
    return Entrant("matched", None, (*options, ("by_values", 128)))


def matched(gradient: Gradient, size: int, *, centered: bool = False, per_image: bool = False) -> Entrant:
    """Return Matched BN with options; it matches the noise of batches of so many."""
    options = ("gradient", gradient), ("center_filters", centered), ("per_image", per_image)
    return Entrant("matched", None, (*options, ("matched_batch_size", size)))


CHOSEN = matched("remembered", 128, centered=True)
PER_IMAGE = matched("remembered", 128, centered=True, per_image=True)
FIRST_LEFT = Entrant("matched", None, (("first_layers", "not in first layers"),))
"""As chosen, but for the filters of layers on the net's own inputs. In MLPs `convert(model)` does so."""
DROP_IN = matched("remembered", 128)
CHANGES = {
    "samples for values, centered": (CHOSEN, by_values(centered=True)),
    "samples for values, not centered": (DROP_IN, by_values(centered=False)),
    "centered for not": (CHOSEN, DROP_IN),
    "remembered for exact, centered": (CHOSEN, matched("exact", 128, centered=True)),
    "each image too": (PER_IMAGE, CHOSEN),
    "first layers not centered": (FIRST_LEFT, CHOSEN),
    "128 for 64, centered": (CHOSEN, matched("remembered", 64, centered=True)),
    "256 for 128, centered": (matched("remembered", 256, centered=True), CHOSEN),
    **{
        f"remembered for exact, {method}": (Entrant(method, None, REMEMBERED), Entrant(method))
        for method in PAPERS
    },
}
"""What a change adds: with it, and without."""
CANDIDATES = (
    CHOSEN,
    DROP_IN,
    by_values(centered=True),
    by_values(centered=False),
    matched("exact", 128, centered=True),
    PER_IMAGE,
    FIRST_LEFT,
    matched("remembered", 64, centered=True),
    matched("remembered", 256, centered=True),
    *(Entrant(method, None, options) for method in PAPERS for options in ((), REMEMBERED)),
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


def _score(of: dict[float, float], rate: float) -> str:
    return f"{of[rate]:.1f}" if rate in of else "-"


def _by_rate(rows: Sequence[Row]) -> Table:
    """Return what each rate comes to on the held-out images, from the one seed that chooses."""
    known = Known(rows)
    lines = []
    rates = sorted({*RATES, *EDGES.values()})
    for entrant in ENTRANTS:
        scores = [known.held_out(task, entrant) for task in TUNED]
        cells = [" / ".join(_score(of, rate) for rate in rates) if of else "-" for of in scores]
        if any(scores):
            lines.append([entrant.label, *cells])
    heading = f"held-out score at the rates {' / '.join(f'{rate:g}' for rate in rates)}, one seed"
    return [heading, *(task.name for task in TUNED)], lines


CLAIM = Claim(
    title="Candidates for the rule",
    sentence=(
        "Candidates for the rule of Matched BN, beside other methods, on the data that choose it: remembered "
        "gradient, centered filters, each image's own statistics, and which batch size to match."
    ),
    measured=MEASURED,
    rows=_rows,
    tables=lambda rows: [
        _changes(rows),
        *tables_of(TUNED, ENTRANTS, rows, (*RIVALS, CHOSEN)),
        _by_rate(rows),
    ],
    draw=lambda rows, panels: drawn(TUNED, ENTRANTS, rows, panels),
    panels=len(TUNED),
    verdict=lambda rows: verdict(TUNED, RIVALS, CHOSEN, rows),
    seeds=3,
)
