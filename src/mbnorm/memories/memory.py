"""What every memory can do: the part of a layer that has past statistics and chooses their share.

A memory holds options and no tensor: its *state* is a tuple of a layer's buffers, which its functions are
given. `Memory.read` gives what the operator needs, as fresh tensors; `Memory.commit` is the only writer in
a forward: in place, without a host synchronization, and without effect where ``finite`` is false.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mbnorm.blend import VARIANCE_RULES, VarianceRule

Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and biased variance, shape (C,)."""
State: TypeAlias = tuple[Tensor, ...]
"""The tensors of a memory, in the order of `Memory.buffers`."""

REFERENCE_BATCH = 32
"""Batch size at which ``momentum`` is the weight of one batch in the averages of moments."""


class Past(NamedTuple):
    """Past mean and variance, shape (C,), and the weight of the current batch, in (0, 1]."""

    mean: Tensor
    var: Tensor
    batch_weight: Tensor | float


class InferenceUpdate(NamedTuple):
    """What a forward puts into the averages for inference.

    Attributes:
        weight: of the new statistics.
        early: how many of the batches before them they weigh at least, which matters while these are few.
        cumulative: each batch has the same weight as any before, whatever the rest says.
        blended: the statistics that normalized the batch, not the batch's own.
        unbiased: the variance is corrected for the number of values.
        pooled: the variance between old and new mean is added.
    """

    weight: float
    early: float = 0.0
    cumulative: bool = False
    blended: bool = False
    unbiased: bool = False
    pooled: bool = False


CUMULATIVE = InferenceUpdate(0.0, cumulative=True, unbiased=True)
"""The update of ``momentum=None``."""
RAW = InferenceUpdate(1.0, unbiased=True)
"""The update of ``momentum=1.0``."""


class Memory:
    """Base of the memories.

    A subclass is given the options that its layers' constructors take, and defines what raises here. Nobody
    changes an option of a memory that a layer has.
    """

    buffers: ClassVar[tuple[str, ...]]
    """Names of the layer's buffers that are the state, in order."""
    rebuilt: ClassVar[tuple[str, ...]] = ()
    """Those of them that no checkpoint carries: `new` has them as the options say."""
    options: ClassVar[tuple[str, ...]]
    """Names of the options, which are attributes."""
    written: ClassVar[tuple[str, ...]] = ()
    """Options that are saved so that a load can compare them."""
    kernels: ClassVar[Literal["average", "ring"] | None] = None
    """Which of the backends' fused operators read and commit it, if any do."""
    variance_rule: VarianceRule = "pooled"

    @property
    def subtract_mean(self) -> bool:
        """Whether the mean of the values counts, and is subtracted."""
        return self.variance_rule != "uncentered"

    def new(self, like: Tensor) -> State:
        """Return an empty state for as many channels as ``like``, on its device and in its dtype."""
        raise NotImplementedError

    def clear(self, state: State) -> None:
        """Forget everything."""
        raise NotImplementedError

    def seed(self, state: State, mean: Tensor, var: Tensor, batches: Tensor | float = 0) -> None:
        """Start from the statistics of a batch norm that was trained on ``batches``, as far as is known."""
        raise NotImplementedError

    def holds_anything(self, state: State) -> Tensor:
        """Return whether there is something to read, as a 0-dim bool."""
        raise NotImplementedError

    def read(self, state: State, n: int, m: int) -> Past:
        """Return what a batch of ``m`` samples with ``n`` values per channel is blended with."""
        raise NotImplementedError

    def commit(self, state: State, finite: Tensor, batch: Statistics, blended: Statistics, n: int) -> None:
        """Store a forward of ``n`` values per channel: statistics of the batch, and the blended ones."""
        raise NotImplementedError

    def update(self, momentum: float, m: int) -> InferenceUpdate:
        """Return what a forward of ``m`` samples puts into the averages for inference."""
        raise NotImplementedError

    def has(self, options: dict[str, Any]) -> bool:
        """Return whether these are the options."""
        return all(getattr(self, name) == value for name, value in options.items())

    def describe(self) -> str:
        """Return the options as a layer's `repr` shows them."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.options)

    def read_numbers(self, n: int, m: int) -> list[float]:
        """Return what tells the fused operators how a batch reads the state, of a size as for `read`."""
        raise NotImplementedError

    def weighs_past(self, state: State) -> bool:
        """Return whether a batch of one value would be blended with past statistics, if there are any."""
        return True

    @property
    def depends_on_count(self) -> bool:
        """Whether `read` gives batches of different sizes different answers."""
        return True

    def batches_seen(self, state: State, batches: Tensor) -> Tensor:
        """Return how many batches the averages for inference have; ``batches`` is the layer's counter."""
        return batches

    def reset(self) -> None:
        """Go back to the options as they were given."""

    def pooled_batches(self, state: State, n: int, m: int) -> float:
        """Return how many batches' noise is averaged out, for batches of a size as for `read`."""
        raise NotImplementedError

    def before_training(self, state: State) -> None:
        """Say what there is to say of the options before a layer trains with them."""

    def is_valid(self, state: State) -> Tensor:
        """Return whether this can be a state, as a 0-dim bool: a mean of several may be none."""
        raise NotImplementedError

    def round(self, state: State) -> None:
        """Make whole what is a whole number but for the rounding of a mean."""
        raise NotImplementedError

    def fit(self, saved: dict[str, Any]) -> None:
        """Change a layer's part of a checkpoint, under the names of `buffers`, to what can be loaded."""

    def snapshot(self, state: State) -> State:
        """Return what `rewind` and `restore` need to come back here."""
        return clones(state)

    def rewind(self, state: State, then: State, stored: Tensor) -> None:
        """Go back to a snapshot, after which ``stored`` batches were stored."""
        for tensor, old in zip(state, then, strict=True):
            tensor.copy_(old)

    def restore(self, state: State, then: State) -> None:
        """Go back to a snapshot, from wherever a `rewind` and commits have led."""
        for tensor, old in zip(state, then, strict=True):
            tensor.copy_(old)


def check_variance_rule(rule: str) -> None:
    """Refuse what is no rule, or one that layers do not have as an option.

    Raises:
        ValueError: ``rule`` is none of those.
    """
    if rule not in VARIANCE_RULES[:2]:
        raise ValueError(f"variance_rule must be one of {VARIANCE_RULES[:2]}, got {rule!r}")


def check_numbers(**options: Any) -> None:
    """Refuse options that are no numbers.

    Raises:
        TypeError: one is none.
    """
    for name, value in options.items():
        if not (isinstance(value, Real) or getattr(value, "shape", None) == ()):
            raise TypeError(f"{name} must be a number, got {value!r}")


def plain(value: Any) -> Any:
    """Return an option as a Python number if it is one of NumPy or torch, which is not saved or compiled."""
    return value.item() if hasattr(value, "item") else value


def moments_update(momentum: float, m: int, early: float = 0.0) -> InferenceUpdate:
    """Return the update of averages of moments by a batch of ``m`` samples, its weight in proportion."""
    return InferenceUpdate(1 - (1 - momentum) ** (m / REFERENCE_BATCH), early, pooled=True)


def option(name: str) -> Any:
    """Return a property of a layer that is an option of its memory."""
    read: Callable[[Any], Any] = lambda layer: getattr(layer.memory, name)  # noqa: E731
    return property(read, doc=f"The option ``{name}``.")


def clones(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return copies of tensors."""
    # one call is half the time of several
    if hasattr(torch, "_foreach_clone"):
        return tuple(torch._foreach_clone(list(tensors)))
    return tuple(t.clone() for t in tensors)


def all_finite(*tensors: Tensor) -> Tensor:
    """Return whether tensors of one shape are finite, as a 0-dim bool."""
    # a stack of them is what torch.compile would store
    largest = tensors[0].abs()
    for tensor in tensors[1:]:
        largest = torch.maximum(largest, tensor.abs())
    return (largest < math.inf).all()


def write(target: Tensor, value: Tensor, finite: Tensor) -> None:
    """Copy a value into the state in place, if ``finite``."""
    target.copy_(torch.where(finite, value.to(target.dtype), target))
