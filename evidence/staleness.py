"""Double-Forward removes one step of staleness from the statistics in the memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rows import Row
from evidence.claim import Claim, Table, Tell, mean_cell
from evidence.trained import by_seed, where
from mbnorm import DoubleForward, convert
from mbnorm.experiments.data import digits
from mbnorm.experiments.estimates import NOT_NEGATIVE
from mbnorm.experiments.sampling import one_epoch

BATCH_SIZE = 8
STEPS = 80
WIDTH = 100
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Case:
    """Memory of k batches, learning rate, and micro-batches that are accumulated for a step."""

    k: int
    lr: float
    micro_batches: int = 1

    @property
    def theory(self) -> tuple[float, float]:
        """Staleness with Double-Forward over that without, where a memory is read and at evaluation.

        With weights that move steadily it is that of the mean ages of what is read: the k-1 newest entries,
        and all k. Within an accumulation the weights rest, so refreshed entries of it are exact.
        """
        if self.micro_batches >= self.k:
            return 0.0, 0.0
        return (self.k - 2) / self.k, (self.k - 1) / (self.k + 1)


SIZES = (2, 4, 8)
RATES = (0.003125, 0.0125, 0.05)
ACCUMULATED = Case(4, 0.0125, micro_batches=4)
CASES = (*(Case(k, lr) for lr in RATES for k in SIZES), ACCUMULATED)


def staleness(case: Case, seed: int, double_forward: bool, steps: int = STEPS) -> tuple[float, float]:
    """Return how far the means in the first layer's memory are from those of the same batches now.

    Where the memory is read, before the first batch of a step, and after the step, as evaluation finds it:
    the mean over entries and steps of the distance in standard deviations, root mean square over channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer: Any = nn.BatchNorm1d(WIDTH)
        first = nn.Linear(64, WIDTH)
        model = nn.Sequential(nn.Flatten(), first, layer, nn.ReLU(), nn.Linear(WIDTH, 10))
    convert(model, "memorized", memory_size=case.k)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=SGD_MOMENTUM)
    if double_forward:
        DoubleForward(model, optimizer)
    newest: deque[Tensor] = deque(maxlen=case.k)
    at_use: list[float] = []
    at_eval: list[float] = []
    batches = _batches(seed)
    for step in range(steps):
        if len(newest) == case.k:
            at_use += _distances(layer, first, list(newest)[:-1])
        optimizer.zero_grad()
        for _ in range(case.micro_batches):
            images, classes = next(batches)
            newest.appendleft(images)
            loss = F.cross_entropy(model(images), classes)
            torch.autograd.backward(loss / case.micro_batches)
        optimizer.step()
        if step > 0 and len(newest) == case.k:
            at_eval += _distances(layer, first, list(newest))
    return fmean(at_use), fmean(at_eval)


def _batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    data = digits()
    while True:
        for indices in one_epoch("shuffled", data.train_targets, BATCH_SIZE, draws):
            yield data.train_inputs[indices], data.train_targets[indices]


@torch.no_grad()
def _distances(layer: Any, first: nn.Module, batches: Sequence[Tensor]) -> list[float]:
    """Return the distance of each entry, newest first, from the mean of its batch under present weights."""
    newest_first = torch.where(layer.memory_ages > 0, layer.memory_ages, torch.inf).argsort()
    slots = newest_first[: len(batches)]
    now = first(torch.stack(list(batches)).flatten(2))
    var = now.flatten(0, 1).var(0)
    squares = (layer.memory_mean[slots] - now.mean(1)).square() / var
    distances: list[float] = squares.mean(1).sqrt().tolist()
    return distances


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for case in CASES:
        for seed in range(seeds):
            for double_forward in (False, True):
                of = {**asdict(case), "seed": seed, "double_forward": double_forward}
                if not where(known, **of):
                    at_use, at_eval = staleness(case, seed, double_forward)
                    yield {**of, "at_use": at_use, "at_eval": at_eval}
        tell(f"k = {case.k}, lr {case.lr:g}, {case.micro_batches} micro-batches")


def ratios(rows: Sequence[Row], case: Case, key: str) -> list[float]:
    """Return staleness with Double-Forward over that without, seed by seed."""
    plain, refreshed = (by_seed(where(rows, **asdict(case), double_forward=df), key) for df in (False, True))
    return [refreshed[seed] / plain[seed] for seed in plain]


def _plain(rows: Sequence[Row], case: Case, key: str) -> list[float]:
    return [r[key] for r in where(rows, **asdict(case), double_forward=False)]


def _tables(rows: Sequence[Row]) -> list[Table]:
    headings = ["k", "learning rate", "micro-batches"]
    for when in ("at use", "at eval"):
        headings += [f"{when}: without", "with / without", "theory"]
    lines = []
    for case in CASES:
        line = [str(case.k), f"{case.lr:g}", str(case.micro_batches)]
        for key, theory in zip(("at_use", "at_eval"), case.theory, strict=True):
            line += [
                mean_cell(_plain(rows, case, key), 4, NOT_NEGATIVE),
                mean_cell(ratios(rows, case, key), 2, NOT_NEGATIVE),
                f"{theory:.2f}",
            ]
        lines.append(line)
    return [(headings, lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    for panel, key, place in zip(panels, ("at_use", "at_eval"), (0, 1), strict=True):
        panel.plot(SIZES, [Case(k, 1.0).theory[place] for k in SIZES], "--", color="#9e9e9e", label="theory")
        for shift, lr in enumerate(RATES):
            found = [ratios(rows, Case(k, lr), key) for k in SIZES]
            x = [k + 0.12 * (shift - 1) for k in SIZES]
            panel.plot(x, [fmean(f) for f in found], "o-", label=f"lr {lr:g}")
            panel.vlines(x, [min(f) for f in found], [max(f) for f in found], color=f"C{shift}", alpha=0.5)
        accumulated = ratios(rows, ACCUMULATED, key)
        panel.plot([ACCUMULATED.k], [fmean(accumulated)], "kx", label="4 micro-batches a step")
        panel.set_xticks(SIZES)
        panel.set_xlabel("memory size k (lines: smallest to largest seed)")
        panel.set_ylabel(f"staleness {key.replace('_', ' ')}, with Double-Forward / without")
        panel.set_ylim(-0.03, 1.25)


CLAIM = Claim(
    title="Staleness of the memory",
    sentence=(
        "Memorized BN remembers statistics of older weights; Double-Forward makes them one step younger."
    ),
    measured=(
        f"MLP with one hidden layer on digits, batches of {BATCH_SIZE}, SGD with momentum {SGD_MOMENTUM}, "
        f"{STEPS} steps. Staleness: distance of the means in the memory from those of the same batches under "
        "the present weights, in standard deviations of the channel (root mean square over channels, mean "
        "over entries and steps). At use: what the first batch of a step reads. At eval: what evaluation "
        "after a step finds. Theory: the mean age of what is read, as if the weights moved steadily."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=2,
)
