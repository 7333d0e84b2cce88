"""Every method in nets and data of many kinds, and the goals that are set for the noise-matched rule."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from matplotlib.axes import Axes

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, difference_cell, name_lines
from evidence.trained import (
    accuracy_cell,
    by_seed,
    of_setting,
    scale_by_error,
    trained,
    where,
)
from mbnorm.experiments.estimates import NO_DIFFERENCE, paired_difference
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.methods import Method
from mbnorm.experiments.sampling import Sampling

METHODS: tuple[Method, ...] = (
    "batch",
    "group",
    "layer",
    "renorm",
    "momentum",
    "memorized",
    "matched",
    "matched-64",
    "matched-128",
    "matched-plain",
    "matched-plain-32",
)
OURS: tuple[Method, ...] = METHODS[METHODS.index("matched") :]
LARGE = 32
BATCH_OF_GOAL = 64
HALVES = ("even", "odd")


def at_two_rates(
    model: str, m: int, epochs: int, high: float, data: str = "digits", sampling: Sampling = "shuffled"
) -> list[Setting]:
    """Return a setting at the learning rates 0.1 m/64 and ``high`` m/64."""
    return [Setting(model, m, sampling, rate * m / 64, epochs, data) for rate in (0.1, high)]


MLP = at_two_rates("mlp", 2, 3, 0.8)
ONE_CLASS = at_two_rates("cnn", 4, 8, 0.4, sampling="one-class")
SETTINGS = (
    *MLP,
    *at_two_rates("mlp6", 2, 2, 0.4),
    *ONE_CLASS,
    *at_two_rates("cnn", 4, 8, 0.4, sampling="drifting"),
    *at_two_rates("cnn", 4, 8, 0.4, sampling="long-tailed"),
    *at_two_rates("vgg-small", 2, 3, 0.4),
    *at_two_rates("cnn", 4, 6, 0.4, "photos"),
    *at_two_rates("segment", 2, 6, 0.4, "segments"),
)


def at_ease(setting: Setting, batch_size: int = LARGE) -> Setting:
    """Return the setting with shuffled batches that need no help, and the rate in proportion."""
    rate = setting.lr * batch_size / setting.batch_size
    return replace(setting, batch_size=batch_size, sampling="shuffled", lr=rate)


def runs(seeds: int) -> list[Run]:
    """Return all runs, seed by seed."""
    return [run for seed in range(seeds) for run in _of_seed(seed)]


def _of_seed(seed: int) -> list[Run]:
    large = [at_ease(s) for s in SETTINGS] + [at_ease(s, BATCH_OF_GOAL) for s in MLP]
    large = list(dict.fromkeys(large))
    small = [Run(method, setting, seed) for setting in SETTINGS for method in METHODS]
    return small + [Run("batch", setting, seed) for setting in large]


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    return trained(runs(seeds), tell, known)


def ranks(rows: Sequence[Row]) -> dict[Method, float]:
    """Return each method's rank by mean accuracy, 1 the best, as a mean over the settings."""
    found: dict[Method, list[int]] = {method: [] for method in METHODS}
    for setting in SETTINGS:
        means = {method: _mean(rows, setting, method) for method in METHODS}
        for method, mean in means.items():
            found[method].append(1 + sum(other > mean for other in means.values()))
    return {method: fmean(places) for method, places in found.items()}


def _mean(rows: Sequence[Row], setting: Setting, method: Method = "batch", key: str = "accuracy") -> float:
    return fmean(by_seed(_of(rows, setting, method), key).values() or [0.0])


def _of(rows: Sequence[Row], setting: Setting, method: Method) -> list[Row]:
    return where(of_setting(rows, setting), method=method)


def _tables(rows: Sequence[Row]) -> list[Table]:
    lines = []
    for setting in SETTINGS:
        cells = [accuracy_cell(_of(rows, setting, method)) for method in METHODS]
        large = accuracy_cell(of_setting(rows, at_ease(setting)))
        lines.append([str(setting), *cells, large])
    places = ranks(rows)
    lines.append(["mean rank", *(f"{places[method]:.2f}" for method in METHODS), ""])
    suite = (["setting", *METHODS, f"batch, m = {LARGE}"], lines)
    halves = (
        ["test images", *(f"{m}: {what}" for m in OURS for what in ("mean", "first in"))],
        _halves(rows),
    )
    return [suite, halves, (["goal", "at least", *OURS], goals(rows))]


def _halves(rows: Sequence[Row]) -> list[list[str]]:
    """Return what ours come to on each half of the test images."""
    lines = []
    for half in HALVES:
        key = f"{half}_accuracy"
        wins = [_winner(rows, setting, key) for setting in SETTINGS]
        line = [half]
        for method in OURS:
            mean = fmean(_mean(rows, setting, method, key) for setting in SETTINGS)
            line += [f"{mean:.2f}", f"{wins.count(method)} of {len(SETTINGS)}"]
        lines.append(line)
    return lines


def _winner(rows: Sequence[Row], setting: Setting, key: str) -> Method | None:
    """Return which of ours has the best mean, if the second differs from it."""
    first, second = sorted(OURS, key=lambda method: _mean(rows, setting, method, key), reverse=True)[:2]
    lead = paired_difference(*(by_seed(_of(rows, setting, method), key) for method in (first, second)))
    return first if lead is not None and lead.decided else None


def goals(rows: Sequence[Row]) -> list[list[str]]:
    """Return each goal, as points of accuracy over a baseline, and what each noise level came to."""
    large = f"BN at {BATCH_OF_GOAL}"
    compared = [
        *((s, "BN at 2", "+20", _of(rows, s, "batch")) for s in MLP),
        *((s, large, "-1", _of(rows, at_ease(s, BATCH_OF_GOAL), "batch")) for s in MLP),
        *((s, "BN at 4", "+40", _of(rows, s, "batch")) for s in ONE_CLASS),
        *((s, "GroupNorm", "0", _of(rows, s, "group")) for s in ONE_CLASS),
    ]
    return [
        [f"{s}: over {name}", goal, *(_over(baseline, _of(rows, s, method)) for method in OURS)]
        for s, name, goal, baseline in compared
    ]


def _over(baseline: Sequence[Row], ours: Sequence[Row]) -> str:
    found = paired_difference(by_seed(ours, "accuracy"), by_seed(baseline, "accuracy"))
    return difference_cell(found, 1)


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for number, method in enumerate(METHODS):
        means = [_mean(rows, setting, method) for setting in SETTINGS]
        marker = "*" if method in OURS else "o"
        panel.plot(means, range(len(SETTINGS)), marker, color=f"C{number}", label=method)
    large = [_mean(rows, at_ease(setting)) for setting in SETTINGS]
    panel.plot(large, range(len(SETTINGS)), "k|", markersize=16, label=f"batch, m = {LARGE}")
    whats = [s.data if s.sampling == "shuffled" else s.sampling for s in SETTINGS]
    names = [f"{s.model}, {what}, lr {s.lr:.3g}" for s, what in zip(SETTINGS, whats, strict=True)]
    name_lines(panel, names)
    scale_by_error(panel, "test accuracy, %, spaced by the error (means over seeds)", across=True)


CLAIM = Claim(
    title="Sixteen small settings",
    sentence=(
        "Matched BN with an earlier rule, beside other methods: by the effective sample size, for 32, 64 and "
        "128 values; and by the number of values (plain), for 128 and 32."
    ),
    measured=(
        "Test accuracy in percent; from one seed all methods start at the same weights and see the same "
        f"batches. Batch norm at m = {LARGE} has the learning rate in proportion and as many epochs, so "
        "fewer steps. Short trainings: they show the order of methods, not what these nets can reach. Ranks "
        "go by mean accuracy alone. The even and the odd test images by themselves show how much of the "
        "order of ours is luck of the images; first in: where the best mean of ours differs from the "
        f"second. The goals are differences in points, taken seed by seed. {NO_DIFFERENCE}"
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
