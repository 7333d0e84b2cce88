"""The memory of Momentum BN: moving averages of the statistics that normalized the batches."""

import warnings
from typing import Any

import torch
from torch import Tensor

from mbnorm.blend import VarianceRule
from mbnorm.memories.memory import (
    InferenceUpdate,
    Memory,
    Past,
    State,
    Statistics,
    all_finite,
    check_numbers,
    check_variance_rule,
    write,
)
from mbnorm.values import has_values

ROUNDING = 0.05
"""How far, relative, a mean of equal whole numbers may be off: weights in bfloat16 do not add up to 1."""


class Average(Memory):
    """Base of the memories that are moving averages of the statistics that normalized the batches.

    Their state begins with mean and variance, shape (C,), and a 0-dim tensor: 1 if these hold something,
    else 0.
    """

    kernels = "average"

    def clear(self, state: State) -> None:
        """Forget everything."""
        mean, var, filled, *_ = state
        mean.zero_()
        var.fill_(1.0)
        filled.zero_()

    def seed(self, state: State, mean: Tensor, var: Tensor, batches: Tensor | float = 0) -> None:
        """Start from the statistics of a trained batch norm."""
        own_mean, own_var, filled, *_ = state
        own_mean.copy_(mean)
        own_var.copy_(var)
        filled.fill_(1.0)

    def holds_anything(self, state: State) -> Tensor:
        """Return whether there is something to read, as a 0-dim bool."""
        return state[2] > 0

    def weight_of_history(self, state: State, n: int, m: int) -> Tensor:
        """Return the weight of a past that is not empty, for a batch of a size as for `read`."""
        raise NotImplementedError

    def read(self, state: State, n: int, m: int) -> Past:
        """Return the averages; their weight is 0 while they are empty."""
        mean, var, filled, *_ = state
        held = (filled > 0).to(mean.dtype)
        return Past(mean.clone(), var.clone(), 1 - self.weight_of_history(state, n, m) * held)

    def commit(self, state: State, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Replace the averages with the blended statistics of a forward."""
        mean, var, filled, *_ = state
        write(mean, blended[0], finite)
        write(var, blended[1], finite)
        # as a view: torch.compile drops what is written into 0-dim tensors of float64
        filled.view(1).masked_fill_(finite, 1.0)

    def pooled_batches(self, state: State, n: int, m: int) -> float:
        """Return how many batches' noise a moving average of this weight averages out, in the long run."""
        history = float(self.weight_of_history(state, n, m))
        return (1 + history) / (1 - history)

    def is_valid(self, state: State) -> Tensor:
        """Return whether this can be a state: not a mean of full and empty ones."""
        mean, var, filled, *_ = state
        equal = (filled == 0) | ((filled - 1).abs() < ROUNDING)
        return all_finite(mean, var) & (var >= 0).all() & equal

    def round(self, state: State) -> None:
        """Make whole what is a whole number but for the rounding of a mean."""
        state[2].round_()


class MovingAverage(Average):
    """The memory of Momentum BN: the weight of its past is the fourth tensor of the state.

    Args:
        history_weight: the share of past statistics, until a schedule sets another.
        variance_rule: "averaged" (the paper's) or "pooled".
    """

    buffers = ("memory_mean", "memory_var", "memory_filled", "history_weight")
    rebuilt = ("history_weight",)
    options = ("history_weight", "variance_rule")
    written = ("variance_rule",)

    def __init__(self, history_weight: float = 0.0, variance_rule: VarianceRule = "averaged") -> None:
        check_numbers(history_weight=history_weight)
        if not 0 <= history_weight < 1:
            raise ValueError(f"history_weight must be in [0, 1), got {history_weight}")
        check_variance_rule(variance_rule)
        self.initial_history_weight = self.history_weight = float(history_weight)
        self.variance_rule: VarianceRule = variance_rule
        self.scheduled = False
        self._notice = _Notice.of_now()

    def has(self, options: dict[str, Any]) -> bool:
        """Return whether these are the options; a history weight is the one before any schedule."""
        first = options.get("history_weight", 0.0)
        rest = {name: value for name, value in options.items() if name != "history_weight"}
        return bool(first == self.initial_history_weight) and super().has(rest)

    def new(self, like: Tensor) -> State:
        """Return an empty state for as many channels as ``like``, on its device and in its dtype."""
        average = torch.empty_like(like), torch.empty_like(like), like.new_empty(())
        state = *average, like.new_full((), self.history_weight)
        self.clear(state)
        return state

    def weight_of_history(self, state: State, n: int, m: int) -> Tensor:
        """Return the history weight."""
        return state[3]

    def weighs_past(self, state: State) -> bool:
        """Return whether the history weight is not 0."""
        return bool(state[3] > 0)

    @property
    def depends_on_count(self) -> bool:
        """Whether `read` gives batches of different sizes different answers."""
        return False

    def read_numbers(self, n: int, m: int) -> list[float]:
        """Return nothing: the history weight is in the state."""
        return []

    def update(self, momentum: float, m: int) -> InferenceUpdate:
        """Return torch's own update, of the biased variance."""
        return InferenceUpdate(momentum)

    def describe(self) -> str:
        """Return the options as a layer's `repr` shows them."""
        idle = (
            ""
            if self.history_weight or self.scheduled
            else " (plain batch norm without a weight or schedule)"
        )
        return f"history_weight={self.history_weight:.6g}{idle}, variance_rule={self.variance_rule}"

    def reset(self) -> None:
        """Go back to the history weight that was given first."""
        self.history_weight = self.initial_history_weight

    def before_training(self, state: State) -> None:
        """Warn, once a model, of a layer that would stay plain batch norm."""
        if self.history_weight or self.scheduled or self._notice.given:
            return
        weight = state[3]
        if not has_values(weight):
            return
        # a schedule of the user's own fills it in place
        self.scheduled = bool(weight > 0)
        if not self.scheduled:
            self._notice.give()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_notice": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _notice=_Notice.of_now())


class _Notice:
    """The warning that Momentum layers have no history weight, shared by the layers of a model.

    Layers do not know their model: those that are made while no notice has been given share one.
    """

    _present: "_Notice | None" = None

    def __init__(self) -> None:
        self.given = False

    @classmethod
    def of_now(cls) -> "_Notice":
        """Return the notice that is still to be given."""
        if cls._present is None or cls._present.given:
            cls._present = cls()
        return cls._present

    def give(self) -> None:
        """Warn, for all layers that share this notice."""
        self.given = True
        warnings.warn(
            "Momentum layers train with history_weight=0, which is plain batch normalization: use "
            "MomentumSchedule(model, ...), or give history_weight",
            stacklevel=2,
        )
