"""The states of a layer before its last forwards, for taking these back."""

from collections import deque
from typing import NamedTuple, cast

import torch
from torch import Tensor

UNDO_DEPTH = 16
"""How many calls of one layer can be taken back."""


class Snapshot(NamedTuple):
    """The state of a layer before a forward, valid until that state is reset or loaded."""

    resets: int
    averages: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]


class Written(NamedTuple):
    """What kernels note of a state.

    ``numbers``, (4 C + ...,): past mean and variance, running mean and variance, and what else the memory
    has. ``counters``, (3,): batches, skipped and the memory's own.
    """

    numbers: Tensor
    counters: Tensor


class UndoLog:
    """The states before the last forwards of a layer, newest last; ``slot`` is where kernels write next."""

    def __init__(self) -> None:
        self._entries: deque[Snapshot | int] = deque(maxlen=UNDO_DEPTH)
        self._written: Written | None = None
        self._kind: tuple[torch.dtype, torch.device, int] | None = None
        self.slot = 0

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def append(self, snapshot: Snapshot) -> None:
        """Add the state before a forward."""
        self._entries.append(snapshot)

    def to_write(self, averages: Tensor, more: int) -> tuple[Tensor, Tensor, int]:
        """Return where kernels may write a state with averages like these, and the place in there.

        Args:
            averages: running_mean, shape (C,).
            more: how many numbers the memory has beside a mean and a variance.
        """
        kind = averages.dtype, averages.device, 4 * averages.numel() + more
        if self._written is None or self._kind != kind:
            self.clear()
            numbers = averages.new_empty((UNDO_DEPTH, kind[2]))
            counters = torch.empty((UNDO_DEPTH, 3), dtype=torch.int64, device=averages.device)
            self._written = Written(numbers, counters)
            self._kind = kind
        numbers, counters = self._written
        return numbers, counters, self.slot

    def add_written(self) -> None:
        """Add the state that kernels have written."""
        self._entries.append(self.slot)
        self.slot = (self.slot + 1) % UNDO_DEPTH

    def before(self, calls: int) -> Snapshot | Written:
        """Return the state before the last ``calls`` forwards."""
        entry = self._entries[-calls]
        if isinstance(entry, Snapshot):
            return entry
        numbers, counters = cast(Written, self._written)
        return Written(numbers[entry], counters[entry])
