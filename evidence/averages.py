"""How soon the averages for inference forget the start of a training, and what that costs eval mode."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.rows import Row
from evidence import suite
from evidence.claim import Claim, Table, Tell, difference_cell, mean_cell
from evidence.trained import of_setting, where
from mbnorm import convert, recalibrate, revert
from mbnorm.experiments.data import load
from mbnorm.experiments.estimates import NO_DIFFERENCE, NOT_NEGATIVE, estimate
from mbnorm.experiments.grid import Run, Setting, linear_rate
from mbnorm.experiments.methods import in_random_order
from mbnorm.experiments.training import eval_mode_loss, fit, initial_model

EARLY_WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
NAMES = tuple(f"{c:g}" for c in EARLY_WEIGHTS)
MEMORY = "memory"
EXACT = "exact"
SHORT = (
    *suite.MLP,
    *suite.at_two_rates("mlp6", 2, 1, 0.4),
    *(
        setting
        for sampling in ("one-class", "drifting", "long-tailed")
        for setting in suite.at_two_rates("cnn", 4, 2, 0.4, sampling=sampling)
    ),
    *suite.at_two_rates("vgg-small", 2, 1, 0.4),
    *suite.at_two_rates("cnn", 4, 1, 0.4, "photos"),
    *suite.at_two_rates("segment", 2, 1, 0.4, "segments"),
)
LONG = (
    Setting("mlp", 2, "shuffled", 0.025, 10),
    Setting("cnn", 4, "one-class", linear_rate(4), 8),
    Setting("cnn", 4, "drifting", linear_rate(4), 6),
)
SETTINGS = (*SHORT, *LONG)


class Averages:
    """The averages for inference of a noise-matched layer as each early weight would have them.

    Args:
        layer: is watched from now on, in train mode; it must not have been trained.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.followers: list[Any] = [_follower(layer, early) for early in EARLY_WEIGHTS]
        layer.register_forward_pre_hook(self._follow)

    @torch.no_grad()
    def _follow(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            for follower in self.followers:
                follower(*inputs)

    def use(self, name: str) -> None:
        """Let eval mode use the averages of an early weight, or the memory that training reads."""
        if name == MEMORY:
            mean, var = self.layer.memory_mean, self.layer.memory_var
        else:
            follower = self.followers[NAMES.index(name)]
            mean, var = follower.running_mean, follower.running_var
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(var)


def _follower(layer: nn.Module, early_weight: float) -> nn.Module:
    """Return a layer of the same kind whose batches of the beginning have another weight."""
    follower = copy.deepcopy(layer)
    revert(follower)
    convert(follower, "matched", early_weight=early_weight, measured=False)
    return follower.train()


def losses(setting: Setting, seed: int) -> dict[str, float]:
    """Train once, and return the eval-mode loss on the training images with each set of statistics."""
    run, data = Run("matched-plain", setting, seed), load(setting.data)
    model = initial_model(run)
    layers = [Averages(m) for m in model.modules() if isinstance(m, _BatchNorm)]
    fit(model, run, data)
    found = {}
    for name in (*NAMES, MEMORY):
        for layer in layers:
            layer.use(name)
        found[name] = eval_mode_loss(model, data)
    recalibrate(model, in_random_order(data.train_inputs))
    return found | {EXACT: eval_mode_loss(model, data)}


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    for seed in range(seeds):
        for setting in SETTINGS:
            if where(of_setting(known, setting), seed=seed):
                continue
            found = losses(setting, seed)
            tell(
                f"{setting}, seed {seed}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in found.items())
            )
            yield {**asdict(setting), "seed": seed, "losses": found}


def above_exact(rows: Sequence[Row], setting: Setting, name: str) -> dict[int, float]:
    """Return how far the loss is above that with exact statistics, seed by seed."""
    return {row["seed"]: row["losses"][name] - row["losses"][EXACT] for row in of_setting(rows, setting)}


def _mean_above_exact(rows: Sequence[Row], name: str) -> list[float]:
    """Return the same as a mean over the settings, seed by seed."""
    gaps = [above_exact(rows, setting, name) for setting in SETTINGS]
    return [fmean(gap[seed] for gap in gaps) for seed in gaps[0]]


def _tables(rows: Sequence[Row]) -> list[Table]:
    names = (*NAMES, MEMORY)
    gaps = {
        setting: [list(above_exact(rows, setting, name).values()) for name in names] for setting in SETTINGS
    }
    lines = []
    for setting, found in gaps.items():
        exact = mean_cell([row["losses"][EXACT] for row in of_setting(rows, setting)], 3, NOT_NEGATIVE)
        lines.append([str(setting), exact, *(difference_cell(estimate(gap), 3) for gap in found)])
    overall = [estimate(_mean_above_exact(rows, name)) for name in names]
    lines.append(["mean", "", *(difference_cell(found, 3) for found in overall)])
    columns = zip(*gaps.values(), strict=True)
    lines.append(["largest", "", *(f"{max(fmean(gap) for gap in column):+.3f}" for column in columns)])
    return [(["setting", "exact", *(f"c = {name}" for name in NAMES), MEMORY], lines)]


def _draw(rows: Sequence[Row], panels: Sequence[Axes]) -> None:
    (panel,) = panels
    for setting in SETTINGS:
        gaps = [fmean(above_exact(rows, setting, name).values()) for name in NAMES]
        panel.plot(NAMES, gaps, "-", color="#bdbdbd")
    means = [fmean(_mean_above_exact(rows, name)) for name in NAMES]
    panel.plot(NAMES, means, "ko-", label="mean over the settings (grey)")
    panel.set_xlabel("early weight c")
    panel.set_ylabel("eval-mode loss above that with exact statistics")


CLAIM = Claim(
    title="Running statistics after short trainings",
    sentence="After a short training eval mode suffers from running statistics that still contain its start.",
    measured=(
        "Loss of eval mode on the training images, of nets trained with the plain noise-matched rule: with "
        "exact statistics, recalibrated on shuffled images, and how far above that it is with the averages "
        "of each early weight c and with the memory that training reads. All columns are of the same "
        f"trainings, so differences are taken seed by seed. {NO_DIFFERENCE} Largest: of the settings' "
        "means. Less than exact can be: training has normalized with what these averages follow, "
        "and with long-tailed batches exact statistics are of other images."
    ),
    rows=_rows,
    tables=_tables,
    draw=_draw,
    panels=1,
)
