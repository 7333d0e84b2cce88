"""What the runs of a setting came to: a row a method, and the methods' ranks over all settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from mbnorm.experiments.estimates import (
    FEWEST,
    INTERVAL,
    NO_DIFFERENCE,
    PERCENT,
    Estimate,
    estimate,
    paired_difference,
)
from mbnorm.experiments.grid import Run, Setting, reference_of
from mbnorm.experiments.methods import OURS, Method
from mbnorm.experiments.training import FIRST_FORWARD, Outcome


@dataclass(frozen=True)
class Row:
    """The runs of one method in one setting: an outcome for each seed, None where there is none yet."""

    method: Method
    outcomes: Mapping[int, Outcome | None]
    reference: Setting | None = None

    @property
    def label(self) -> str:
        """The method's name, and where the reference stands if this is one."""
        return self.method if self.reference is None else f"batch at m = {self.reference.batch_size}"

    @property
    def finished(self) -> list[Outcome]:
        """The outcomes that are there."""
        return [outcome for outcome in self.outcomes.values() if outcome is not None]

    @property
    def scores(self) -> dict[int, float]:
        """The score of each seed that has one."""
        return {seed: o.score for seed, o in self.outcomes.items() if o and o.score is not None}

    @property
    def score(self) -> Estimate | None:
        """The mean over the runs that have a score."""
        return estimate(list(self.scores.values()), PERCENT)

    @property
    def test_error(self) -> float | None:
        """The mean over the runs of what other test samples could change, where it is known."""
        known = [o.test_error for o in self.finished if o.test_error is not None]
        return fmean(known) if known else None

    @property
    def without_score(self) -> int:
        """How many runs failed, or are missing."""
        return len(self.outcomes) - len(self.scores)

    @property
    def error(self) -> str | None:
        """Why runs failed, if some did."""
        return next((o.error for o in self.finished if o.error is not None), None)

    def cells(self, baseline: "Row | None") -> tuple[str, ...]:
        """Return the row's text, one for each of `columns`."""
        score, test_error = self.score, self.test_error
        trained = [outcome for outcome in self.finished if outcome.status != "failed"]
        return (
            self.label,
            "-" if score is None else str(score),
            "-" if test_error is None else f"{test_error:.1f}",
            self._difference(baseline),
            str(len(self.outcomes)),
            self._failures(),
            _mean_loss([o.train_mode_loss for o in trained]),
            _mean_loss([o.eval_mode_loss for o in trained]),
        )

    def _difference(self, baseline: "Row | None") -> str:
        if baseline is None or baseline is self:
            return "-"
        difference = paired_difference(self.scores, baseline.scores)
        return "-" if difference is None else difference.signed()

    def _failures(self) -> str:
        statuses = ["missing" if o is None else o.status for o in self.outcomes.values()]
        counts = [(statuses.count(what), what) for what in ("failed", "diverged", "missing")]
        return ", ".join(f"{n} {what}" for n, what in counts if n) or "0"


Tables: TypeAlias = Sequence[tuple[Setting, Sequence[Row]]]


def caption(tables: Tables, baseline: Method) -> str:
    """Return how the tables were made, and what stands in italics if anything does."""
    italics = "In italics: batch norm on shuffled batches of 64 at lr 0.1. "
    dice = "Where pixels have classes it is Dice, over all test images, a mean of all classes but the first. "
    segments = any(scored_by_dice(rows) for _, rows in tables)
    return (
        f"Test accuracy, mean over the seeds. {dice if segments else ''}{INTERVAL} The interval says what "
        "other seeds could change; "
        '"test set ±" says what another test set of the same size could: the half width of the 95 % interval '
        "over draws of its samples, as a mean over the runs. From one seed all methods start at the same "
        "weights, which some of them center, and see the same batches, so each is compared with "
        f"{baseline} seed by seed: the difference is the mean over the seeds for which both have a score. "
        f"{NO_DIFFERENCE} A run that diverged is "
        "measured like any other and is part of the means; one that failed has no score, and is counted. "
        "The losses are those of the trained net on its training data, with its layers in train mode and in "
        "eval mode. "
        f"{italics if any(row.reference for _, rows in tables for row in rows) else ''}"
        "Written by `mbnorm compare`."
    )


RANKS = (
    "Ranks go by mean score alone, so a better rank need not be a difference. A method with runs that "
    "have no score is behind all with fewer of them."
)


def scored_by_dice(rows: Sequence[Row]) -> bool:
    """Return whether pixels have classes, and Dice is the score."""
    return any(outcome.dice is not None for row in rows for outcome in row.finished)


def columns(baseline: Method, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the headings of the rows' cells."""
    return (
        "method",
        "Dice, %" if scored_by_dice(rows) else "accuracy, %",
        "test set ±",
        f"against {baseline}",
        "seeds",
        "failed",
        "train-mode loss",
        "eval-mode loss",
    )


def rows_of(setting: Setting, runs: Sequence[Run], outcomes: Mapping[Run, Outcome]) -> list[Row]:
    """Return a row for each method and for the reference, best score first and failures last."""
    by_method: dict[Method, dict[int, Outcome | None]] = {}
    for run in runs:
        if run.setting == setting:
            by_method.setdefault(run.method, {})[run.seed] = outcomes.get(run)
    rows = [Row(method, found) for method, found in by_method.items()]
    reference = reference_of(setting)
    at_ease = {r.seed: outcomes.get(r) for r in runs if r.setting == reference and r.method == "batch"}
    if at_ease and reference != setting:
        rows.append(Row("batch", at_ease, reference))
    return sorted(rows, key=lambda row: -1.0 if row.score is None else row.score.mean, reverse=True)


def row_of(method: Method, rows: Sequence[Row]) -> Row | None:
    """Return the row of a method, which is not the reference's."""
    return next((row for row in rows if row.method == method and row.reference is None), None)


def mean_ranks(tables: Tables) -> list[tuple[Method, float, list[float]]]:
    """Return each method's mean rank and its rank in each setting, best first.

    In a setting 1 is the best mean score, and equal ones share the mean of their ranks; a method with more
    runs that have no score is behind all with fewer. Only methods that are in every setting are ranked.
    """
    of_each = [{row.method: _standing(row) for row in rows if row.reference is None} for _, rows in tables]
    methods = [method for method in of_each[0] if all(method in standings for standings in of_each)]
    ranks = {
        method: [
            1
            + sum(standings[other] > standings[method] for other in methods)
            + sum(standings[other] == standings[method] for other in methods if other != method) / 2
            for standings in of_each
        ]
        for method in methods
    }
    return sorted(((m, fmean(found), found) for m, found in ranks.items()), key=lambda entry: entry[1])


def conclusion(tables: Tables, baseline: Method) -> str:
    """Return in a sentence what was found: a method is better or worse where the interval leaves out 0."""
    verdicts: dict[Method, list[int]] = {}
    for _, rows in tables:
        theirs = row_of(baseline, rows)
        for row in rows:
            if theirs is None or row.method == baseline or row.reference is not None:
                continue
            difference = paired_difference(row.scores, theirs.scores)
            if difference is not None and difference.half_width is not None:
                sign = 1 if difference.mean > 0 else -1
                verdicts.setdefault(row.method, []).append(difference.decided * sign)
    if not verdicts:
        return f"No method can be called better or worse than {baseline}: that takes {FEWEST} seeds of both."
    everywhere = "" if len(tables) == 1 else f" in all {len(tables)} settings"
    found: dict[str, list[str]] = {}
    for method, signs in verdicts.items():
        better, worse = signs.count(1), signs.count(-1)
        if len(tables) in (better, worse):
            found.setdefault(f"{'better' if better else 'worse'}{everywhere}", []).append(method)
        elif better or worse:
            counts = " and ".join(f"{n} {what}" for n, what in ((better, "better"), (worse, "worse")) if n)
            found.setdefault("in some", []).append(f"{method} ({counts} of {len(tables)})")
        else:
            found.setdefault("no difference", []).append(method)
    said = "; ".join(f"{kind}: {', '.join(methods)}" for kind, methods in found.items())
    return f"Compared with {baseline}, {said}."


def notes(setting: Setting, rows: Sequence[Row]) -> list[str]:
    """Return the sentences under a table: who is first, where mbnorm's layers lose, why runs failed."""
    ranked = [row for row in rows if row.reference is None and row.score is not None]
    ours = [row for row in ranked if row.method in OURS]
    said = [_first(*ranked[:2])] if len(ranked) > 1 else []
    if ours and all(_is_before(ranked[0], row) for row in ours):
        said.append(f"All of mbnorm's layers are behind {ranked[0].label}.")
    if ours and setting.batch_size == 1:
        said.append(f"mbnorm's layers were given a memory by one forward of {FIRST_FORWARD} images.")
    return said + [f"{row.label} failed: {row.error}." for row in rows if row.error is not None]


def _first(first: Row, second: Row) -> str:
    if _is_before(first, second):
        return f"{first.label} does best here."
    difference = paired_difference(first.scores, second.scores)
    if difference is None or difference.half_width is None:
        return f"{first.label} has the best mean. Whether that is a difference takes {FEWEST} seeds to tell."
    return f"{first.label} and {second.label} come first, with no difference between them."


def _is_before(row: Row, other: Row) -> bool:
    difference = paired_difference(row.scores, other.scores)
    return difference is not None and difference.decided and difference.mean > 0


def _standing(row: Row) -> tuple[int, float]:
    return -row.without_score, 0.0 if row.score is None else row.score.mean


def _mean_loss(losses: Sequence[float | None]) -> str:
    finite = [loss for loss in losses if loss is not None]
    if not losses:
        return "-"
    return f"{fmean(finite):.3f}" if len(finite) == len(losses) else "not finite"
