"""The layers as they were before both passes were remembered, beside the strongest peers, on real data."""

from collections.abc import Iterator, Sequence

from benchmarks.rows import Row
from evidence.arena import drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Tell
from evidence.lists import CIFAR10, MLP, NUCLEI, RATES, Entrant
from mbnorm.experiments.estimates import NO_DIFFERENCE

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
    sentence=(
        "What the layers with today's rule, a memory that only the forward pass reads, reach on real data "
        "beside the strongest peers. Nothing was chosen on the test images."
    ),
    measured=(
        f"Each method trains at the rates {', '.join(map(str, RATES))} for a batch of 64, smaller batches in "
        "proportion, from a seed that no other run has; where the best is the first or the last, at a third "
        "or three times of it, too. Held-out training images choose the rate. Five further seeds train at "
        "it, and all test images measure these: accuracy, or for nuclei Dice over all images. A training "
        "whose loss is not finite scores 0. From one seed all methods see the same batches. Batch norm at "
        '32 sees as many images, in fewer steps. "test set ±" is half the 95 % interval that comes of which '
        f"images are tested on. {NO_DIFFERENCE} Ranks are by the mean alone."
    ),
    rows=_rows,
    tables=lambda rows: tables_of(TASKS, ENTRANTS, rows),
    draw=lambda rows, panels: drawn(TASKS, ENTRANTS, rows, panels),
    panels=len(TASKS),
    verdict=lambda rows: verdict(TASKS, ENTRANTS, Entrant("matched"), rows),
)
