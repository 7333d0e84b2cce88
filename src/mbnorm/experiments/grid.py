"""What `compare` trains: settings, and the runs of a setting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from mbnorm.experiments.data import load
from mbnorm.experiments.losses import Loss
from mbnorm.experiments.methods import DOUBLE_FORWARD, METHODS, OURS, REFERENCE_BATCH_SIZE, Method
from mbnorm.experiments.sampling import Sampling

SuiteName: TypeAlias = Literal["quick", "full"]
SUITES: tuple[SuiteName, ...] = get_args(SuiteName)

EPOCHS = {"mlp": 10, "mlp6": 10}
OTHER_EPOCHS = 8
SEEDS: dict[SuiteName, int] = {"quick": 3, "full": 5}
SUITE_METHODS: dict[SuiteName, tuple[Method, ...]] = {
    "quick": (
        "none",
        "batch",
        "renorm",
        "group",
        "layer",
        "momentum",
        "momentum-constant",
        "memorized",
        "memorized+df",
        "matched",
    ),
    "full": METHODS,
}


@dataclass(frozen=True)
class Setting:
    """Everything that the methods under comparison share."""

    model: str
    batch_size: int
    sampling: Sampling
    lr: float
    epochs: int
    data: str = "digits"
    loss: Loss = "cross-entropy"

    def __str__(self) -> str:
        batches = "batches" if self.sampling == "shuffled" else f"{self.sampling} batches"
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        model = self.model if self.data == "digits" else f"{self.model} on {self.data}"
        loss = "" if self.loss == "cross-entropy" else f", {self.loss} loss"
        return f"{model}, {batches} of {self.batch_size}, lr {self.lr:g}, {epochs}{loss}"


@dataclass(frozen=True)
class Run:
    """One training: a method in a setting from a seed."""

    method: Method
    setting: Setting
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.setting}, seed {self.seed}"


def linear_rate(batch_size: int) -> float:
    """Return the learning rate 0.1 at batches of 64, in proportion to the batch size."""
    return 0.1 * batch_size / 64


def default_epochs(model: str) -> int:
    """Return how long a net is trained if nothing is said."""
    return EPOCHS.get(model, OTHER_EPOCHS)


def reference_of(setting: Setting) -> Setting:
    """Return where batch norm is at ease: what it reaches there is what small batches can cost."""
    m = REFERENCE_BATCH_SIZE
    return replace(setting, batch_size=m, sampling="shuffled", lr=linear_rate(m))


def suite_settings(suite: SuiteName) -> list[Setting]:
    """Return the settings of a suite in which every method is trained."""
    high_rate = Setting("mlp", 2, "shuffled", 0.025, default_epochs("mlp"))
    one_class = Setting("cnn", 4, "one-class", linear_rate(4), default_epochs("cnn"))
    if suite == "quick":
        return [high_rate, one_class]
    return [high_rate, *grid_settings(["mlp"], [1, 2, 4, 8, 16, 32, 64], ["shuffled"], None, None), one_class]


def grid_settings(
    models: Sequence[str],
    batch_sizes: Sequence[int],
    samplings: Sequence[Sampling],
    rates: Sequence[float] | None,
    epochs: int | None,
    data: Sequence[str] = ("digits",),
    loss: Loss = "cross-entropy",
) -> list[Setting]:
    """Return every combination; rates of None follow the batch size, epochs of None the model."""
    return [
        Setting(model, m, sampling, lr, epochs or default_epochs(model), source, loss)
        for source in data
        for model in models
        for sampling in samplings
        for m in batch_sizes
        for lr in rates or (linear_rate(m),)
    ]


def runs_of(settings: Iterable[Setting], methods: Sequence[Method], seeds: int) -> list[Run]:
    """Return the runs of ``methods`` in ``settings`` from seeds 0, 1, ..."""
    return [Run(method, s, seed) for s in settings for method in methods for seed in range(seeds)]


def suite_runs(suite: SuiteName, methods: Sequence[Method], seeds: int) -> list[Run]:
    """Return the runs of a suite, batch norm in the MLP's reference setting included."""
    settings = suite_settings(suite)
    reference = runs_of([reference_of(settings[0])], ["batch"], seeds)
    return list(dict.fromkeys(runs_of(settings, methods, seeds) + reference))


# rough milliseconds a step of batch norm on one core: they order the runs and foretell the time left
_STEP = {"mlp": 0.7, "mlp6": 2.0}
_OTHER_STEP = 3.0


def cost(run: Run) -> float:
    """Return about how many milliseconds a run takes; nets other than the MLPs count as the CNN."""
    setting = run.setting
    steps = setting.epochs * (len(load(setting.data).train_targets) // setting.batch_size)
    ours, twice = run.method in OURS, run.method in DOUBLE_FORWARD
    return steps * _STEP.get(setting.model, _OTHER_STEP) * (1 + 1.5 * ours) * (1 + twice)
