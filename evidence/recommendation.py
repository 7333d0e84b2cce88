"""What `diagnose` recommends, beside the best of a sweep over all that it can recommend."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell, name_lines
from evidence.trained import of_setting, where
from mbnorm import Diagnosis, convert, diagnose, recalibrate
from mbnorm.experiments.data import Data, load
from mbnorm.experiments.estimates import NO_DIFFERENCE, PERCENT, estimate
from mbnorm.experiments.grid import Run, Setting, linear_rate
from mbnorm.experiments.methods import in_random_order
from mbnorm.experiments.sampling import Sampling, one_epoch
from mbnorm.experiments.training import fit, initial_model, logits_of

BATCHES = 100
"""Batches that are diagnosed."""
MEMORY_SIZES = (8, 16, 32, 64, 128)
TICKS = (-100, -10, -1, 0, 1, 10)
GOAL = 0.5
"""Points of accuracy that the recommended may stay behind the best."""
UNTRAINED = "untrained"
BATCH_NORM = "batch"
RECOMMENDED = "matched"
NOT_CENTERED = "matched, not centered"
SWEEP = (
    *(BATCH_NORM, RECOMMENDED, NOT_CENTERED, "plain 128", "plain 32"),
    *(f"memorized {size}" for size in MEMORY_SIZES),
)
"""What is trained in every setting; each is measured as trained and recalibrated."""


def _setting(model: str, m: int, sampling: Sampling, epochs: int, data: str = "digits") -> Setting:
    return Setting(model, m, sampling, linear_rate(m), epochs, data)


SETTINGS = (
    _setting("mlp", 2, "shuffled", 4),
    _setting("mlp", 8, "shuffled", 4),
    _setting("mlp", 32, "shuffled", 4),
    _setting("cnn", 4, "one-class", 2),
    _setting("cnn", 4, "shuffled", 2),
    _setting("cnn", 16, "shuffled", 4),
    _setting("vgg-small", 2, "shuffled", 2),
    _setting("cnn", 4, "shuffled", 2, "photos"),
    _setting("segment", 2, "shuffled", 2, "segments"),
)


@dataclass(frozen=True)
class Choice:
    """What is trained, and whether its statistics are recalibrated before it is evaluated."""

    candidate: str
    recalibrated: bool

    def __str__(self) -> str:
        name = "batch norm" if self.candidate == BATCH_NORM else self.candidate
        return name + (", recalibrated" if self.recalibrated else "")


NOTHING = Choice(BATCH_NORM, recalibrated=False)
MATCHED = Choice(RECOMMENDED, recalibrated=False)


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for setting in SETTINGS:
            done = {row["candidate"]: row for row in where(of_setting(known, setting), seed=seed)}
            if UNTRAINED not in done:
                before = _told(initial_model(Run("batch", setting, seed)), setting, seed)
                yield {"candidate": UNTRAINED, **asdict(setting), "seed": seed, **_in_short(before)}
            for candidate in SWEEP:
                if candidate in done:
                    continue
                row = _trained(candidate, setting, seed)
                tell(f"{candidate}, {setting}, seed {seed}: {row['accuracy']}, {row['seconds']} s")
                yield row


def _trained(candidate: str, setting: Setting, seed: int) -> Row:
    """Train a candidate, diagnose it, and measure it on both halves, as trained and recalibrated."""
    start = time.perf_counter()
    run = Run("batch", setting, seed)
    model, data = initial_model(run), load(setting.data)
    _convert(model, candidate)
    loss = fit(model, run, data)
    # what is not recommended is not diagnosed again
    after = {"stale": _told(model, setting, seed).stale} if candidate in (BATCH_NORM, RECOMMENDED) else {}
    accuracy = [_accuracy_of_halves(model.eval(), data)]
    recalibrate(model, in_random_order(data.train_inputs))
    accuracy.append(_accuracy_of_halves(model, data))
    return {
        "candidate": candidate,
        **asdict(setting),
        "seed": seed,
        "status": "ok" if math.isfinite(loss) else "diverged",
        "seconds": round(time.perf_counter() - start, 2),
        "accuracy": accuracy,
        **after,
    }


def _convert(model: nn.Module, candidate: str) -> None:
    method, _, number = candidate.partition(" ")
    if candidate == RECOMMENDED:
        convert(model, "matched")
    elif candidate == NOT_CENTERED:
        convert(model, "matched", center_filters=False)
    elif method == "plain":
        convert(model, "matched", matched_batch_size=int(number), measured=False)
    elif method == "memorized":
        convert(model, "memorized", memory_size=int(number), inference="ema")


def _told(model: nn.Module, setting: Setting, seed: int) -> Diagnosis:
    """Return what a user is told who diagnoses this net on batches like those of the training."""
    data = load(setting.data)
    # other batches than the training's, which has drawn from the seed itself
    draws = torch.Generator().manual_seed(1000 + seed)
    batches: list[Tensor] = []
    while len(batches) < BATCHES:
        epoch = one_epoch(setting.sampling, data.train_targets, setting.batch_size, draws)
        batches += [data.train_inputs[indices] for indices in epoch[: BATCHES - len(batches)]]
    return diagnose(model.train(), batches)


def _in_short(found: Diagnosis) -> dict[str, Any]:
    """Return what is recommended, and how many of the layers are noisy."""
    noisy = sum(layer.recommendation == "matched" for layer in found.layers)
    return {"recommendation": found.recommendation, "layers": len(found.layers), "noisy": noisy}


@torch.no_grad()
def _accuracy_of_halves(model: nn.Module, data: Data) -> list[float]:
    """Return the accuracy in percent on every other test image from the first, and on the others."""
    right = (logits_of(model, data.test_inputs).argmax(1) == data.test_targets).float()
    return [round(100 * right[half::2].mean().item(), 3) for half in (0, 1)]


def recommended(rows: Sequence[Row], setting: Setting, seed: int) -> Choice:
    """Return what `diagnose` says before the training to train, and after it of the statistics."""
    told = _row(rows, setting, seed, UNTRAINED)
    candidate = RECOMMENDED if told["recommendation"] == "matched" else BATCH_NORM
    return Choice(candidate, _row(rows, setting, seed, candidate)["stale"])


def best(rows: Sequence[Row], setting: Setting) -> list[Choice]:
    """Return for each seed the choice of the sweep that is best by its mean over the other seeds."""
    count = len(seeds_of(rows, setting))
    choices = [Choice(candidate, again) for candidate in SWEEP for again in (False, True)]
    of_all = {choice: _accuracies(rows, setting, [choice] * count) for choice in choices}

    def of_others(choice: Choice, seed: int) -> float:
        found = of_all[choice]
        return fmean(found[:seed] + found[seed + 1 :] or found)

    return [max(choices, key=lambda choice: of_others(choice, seed)) for seed in range(count)]


def seeds_of(rows: Sequence[Row], setting: Setting) -> list[int]:
    """Return the seeds from which everything was measured."""
    complete = [
        {row["seed"] for row in where(of_setting(rows, setting), candidate=candidate)}
        for candidate in (UNTRAINED, *SWEEP)
    ]
    return sorted(set.intersection(*complete))


@dataclass(frozen=True)
class Comparison:
    """A setting's choices, and their accuracies seed by seed."""

    recommended: list[Choice]
    best: list[Choice]
    of_recommended: list[float]
    of_best: list[float]
    of_matched: list[float]
    of_nothing: list[float]

    @property
    def behind(self) -> list[float]:
        """How far the recommended is from the best, in points; negative where it is behind."""
        return self._behind(self.of_recommended)

    @property
    def matched_behind(self) -> list[float]:
        """The same of "matched", undiagnosed."""
        return self._behind(self.of_matched)

    @property
    def nothing_behind(self) -> list[float]:
        """The same of batch norm as trained."""
        return self._behind(self.of_nothing)

    @property
    def matched_gain(self) -> list[float]:
        """How far "matched" is above doing nothing, in points."""
        return [a - b for a, b in zip(self.of_matched, self.of_nothing, strict=True)]

    def _behind(self, accuracies: list[float]) -> list[float]:
        return [a - b for a, b in zip(accuracies, self.of_best, strict=True)]


def compared(rows: Sequence[Row], setting: Setting) -> Comparison:
    """Compare the recommended, the best, "matched" and doing nothing in a setting."""
    seeds = seeds_of(rows, setting)
    told, winners = [recommended(rows, setting, seed) for seed in seeds], best(rows, setting)
    always = ([choice] * len(seeds) for choice in (MATCHED, NOTHING))
    accuracies = (_accuracies(rows, setting, choices) for choices in (told, winners, *always))
    return Comparison(told, winners, *accuracies)


def _accuracies(rows: Sequence[Row], setting: Setting, choices: Sequence[Choice]) -> list[float]:
    return [
        fmean(_row(rows, setting, seed, choice.candidate)["accuracy"][choice.recalibrated])
        for seed, choice in zip(seeds_of(rows, setting), choices, strict=True)
    ]


def _row(rows: Sequence[Row], setting: Setting, seed: int, candidate: str) -> Row:
    (row,) = where(of_setting(rows, setting), seed=seed, candidate=candidate)
    return row


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines, sweep = [], []
    for setting in SETTINGS:
        found = compared(rows, setting)
        lines.append(
            [
                str(setting),
                in_words(rows, setting),
                _counted(map(str, found.best)),
                mean_cell(found.of_recommended, 1, PERCENT),
                mean_cell(found.of_best, 1, PERCENT),
                difference_cell(estimate(found.behind), 1),
                difference_cell(estimate(found.matched_behind), 1),
                difference_cell(estimate(found.nothing_behind), 1),
                difference_cell(estimate(found.matched_gain), 1),
            ]
        )
        sweep.append([str(setting), *(_cell(rows, setting, candidate) for candidate in SWEEP)])
    headings = ["setting", "recommended", "best of the sweep", "recommended, %", "best, %"]
    return [
        ([*headings, "difference", "matched - best", "do nothing - best", "matched - do nothing"], lines),
        (["sweep", *SWEEP], sweep),
    ]


def in_words(rows: Sequence[Row], setting: Setting) -> str:
    """Return what was recommended, with how often where the seeds differ."""
    names = []
    for seed in seeds_of(rows, setting):
        choice, told = recommended(rows, setting, seed), _row(rows, setting, seed, UNTRAINED)
        names.append(f"{choice} ({told['noisy']} of {told['layers']} layers are noisy)")
    return _counted(names)


def _counted(names: Iterable[str]) -> str:
    """Return names with how often, or the one that there is."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count} x {name}" for name, count in counts.items())


def _cell(rows: Sequence[Row], setting: Setting, candidate: str) -> str:
    found = where(of_setting(rows, setting), candidate=candidate)
    if not found:
        return ""
    both = [[fmean(row["accuracy"][again]) for row in found] for again in (False, True)]
    return " / ".join(f"{fmean(values):.1f}" for values in both)


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    found = [compared(rows, setting) for setting in SETTINGS]
    series = {
        "what diagnose recommends": [c.behind for c in found],
        "matched": [c.matched_behind for c in found],
        "do nothing": [c.nothing_behind for c in found],
    }
    for number, (name, differences) in enumerate(series.items()):
        ys = [y + 0.2 * (number - 1) for y in range(len(SETTINGS))]
        panel.plot([fmean(d) for d in differences], ys, "o", color=f"C{number}", label=name)
        panel.hlines(ys, [min(d) for d in differences], [max(d) for d in differences], color=f"C{number}")
    panel.axvspan(-GOAL, GOAL, color="#9e9e9e", alpha=0.3, linewidth=0)
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    name_lines(panel, [f"{s.model}, {s.data}, {s.sampling} batches of {s.batch_size}" for s in SETTINGS])
    panel.set_xlabel("points from the best of the sweep (lines: smallest to largest seed)")


CLAIM = Claim(
    title="What diagnose recommends",
    sentence=f"What `diagnose` recommends is within {GOAL:g} point of accuracy of the best of a sweep.",
    measured=(
        f"A net with torch's batch norms is diagnosed before its training, on {BATCHES} batches drawn like "
        "those of the training, and converted where a layer is noisy; the trained net is diagnosed "
        "again, and recalibrated if it is called stale. The sweep trains batch norm, matched "
        "(without centered filters, and by the number of values, too: plain 128 and 32), and memorized of "
        f"{', '.join(map(str, MEMORY_SIZES))} batches, and takes each as trained and recalibrated. For each "
        "seed the best is what is best by the mean over the others, so that no luck of its own is counted. "
        f"Differences are taken seed by seed. {NO_DIFFERENCE} matched - best: "
        "without a diagnosis, as trained. Do nothing: batch norm as trained. The second table "
        "has mean accuracies, as trained / recalibrated."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
