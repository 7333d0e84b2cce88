"""What `mbnorm train` is asked to do."""

from dataclasses import asdict, dataclass
from typing import Any

from mbnorm.experiments.grid import Run
from mbnorm.experiments.methods import batches_a_step
from mbnorm.experiments.training import RATE_DROPS


@dataclass(frozen=True)
class Recipe:
    """How long to train and when to divide the learning rate by 10, in shares of the training."""

    epochs: int
    drops: tuple[float, ...]


RECIPES = {
    # Yong et al.: Momentum Batch Normalization, ECCV 2020, experiments on CIFAR: SGD with a rate of 0.1 m/64
    "eccv2020-cifar": Recipe(200, (60 / 200, 120 / 200, 180 / 200)),
}


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a training comes to."""

    run: Run
    drops: tuple[float, ...] = RATE_DROPS
    accumulate: int = 1
    precision: str = "32-true"

    @property
    def batches_a_step(self) -> int:
        """Batches of each rank whose gradients make an optimizer step."""
        return self.accumulate * batches_a_step(self.run.method, self.run.setting.batch_size)

    def record(self, ranks: int) -> dict[str, Any]:
        """Return all of it by name."""
        rest = {"drops": list(self.drops), "accumulate": self.accumulate, "precision": self.precision}
        return {
            "method": self.run.method,
            "seed": self.run.seed,
            **asdict(self.run.setting),
            **rest,
            "ranks": ranks,
        }
