"""Activation checkpointing: telling a recompute from a forward, and what the forward it repeats had read."""

import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mbnorm.memory import Past

CALLS_KEPT = 32
"""Forwards of one layer that a backward pass still to come may repeat."""


def in_recompute() -> bool:
    """Return whether this call repeats an earlier forward from inside a backward pass.

    Compiled code repeats no forward with side effects, so there the answer is no.
    """
    return not torch.compiler.is_compiling() and _in_backward()


def _in_backward() -> bool:
    # torch has no public test; this is the one that its own module tracker and FSDP use
    return bool(torch._C._current_graph_task_id() != -1)


def _in_backward_by_stack() -> bool:
    # checkpointing calls a block again from these functions, reentrant and not
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if code.co_filename.endswith("checkpoint.py") and code.co_name in ("backward", "unpack_hook"):
            return True
    return False


if not hasattr(torch._C, "_current_graph_task_id"):
    _in_backward = _in_backward_by_stack


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_compiled_checkpoint() -> bool:
    """Return, while torch.compile traces, whether it is inside a checkpointed block."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    except (ImportError, AttributeError):
        return False
    while tracer is not None:
        if "checkpoint" in str(getattr(tracer, "source_target", "")):
            return True
        tracer = tracer.parent
    return False


class Call:
    """One forward of a layer: the batch's statistics identify it, what it read is what a recompute needs."""

    __slots__ = ("backwards", "mean", "n", "past", "var")

    def __init__(self, n: int, mean: Tensor, var: Tensor, past: Past) -> None:
        self.n = n
        self.mean = mean
        self.var = var
        self.past = past
        self.backwards = 0

    def watch(self, node: "torch.autograd.graph.Node | None") -> None:
        """Count the backward passes through this call, whose last step is ``node``."""
        if node is not None:
            node.register_hook(self._count)

    def _count(self, *_: object) -> None:
        self.backwards += 1

    def is_of(self, mean: Tensor, var: Tensor) -> bool:
        """Return whether these are this call's statistics, bit for bit."""
        return all(
            torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in ((self.mean, mean), (self.var, var))
        )


class CallLog:
    """The forwards of one layer whose backward has not run, newest last; bounded, and in no checkpoint."""

    def __init__(self) -> None:
        self.calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self.lost = False
        self.explicit = False
        self.tapes: list[list[Call]] = []
        self.script: Iterator[Call] | None = None

    def clear(self) -> None:
        """Forget all forwards."""
        self.calls.clear()
        self.lost = False

    def remember(self, call: Call, node: "torch.autograd.graph.Node | None") -> None:
        """Add a forward, and drop those whose backward has run."""
        if any(c.backwards for c in self.calls):
            self.calls = deque((c for c in self.calls if not c.backwards), maxlen=CALLS_KEPT)
        self.lost |= len(self.calls) == CALLS_KEPT
        self.calls.append(call)
        self.note(call, node)

    def note(self, call: Call, node: "torch.autograd.graph.Node | None") -> None:
        """Add a forward, the first or a repeated one, to what is being recorded."""
        call.watch(node)
        for tape in self.tapes:
            tape.append(call)

    def likeliest(self, n: int) -> list[Call]:
        """Return the forwards of ``n`` values per channel, in the order in which a backward meets them.

        Autograd runs the latest forward's backward first. A forward may be repeated several times
        before its backward is through (nested checkpoints), so that alone moves it to the end.
        """
        newest_first = (c for c in reversed(self.calls) if c.n == n)
        return sorted(newest_first, key=lambda c: c.backwards)

    def identify(self, candidates: list[Call], mean: Tensor, var: Tensor) -> Call:
        """Return the forward that had these statistics.

        Raises:
            RuntimeError: none had, so that the recompute would read the wrong past.
        """
        for call in candidates:
            if call.is_of(mean, var):
                return call
        raise RuntimeError(
            f"activation checkpointing repeats a forward that is none of the last {len(self.calls)} of this "
            "layer: the recompute is not deterministic, or there were too many forwards before the "
            "backward. Pass context_fn=mbnorm.checkpoint_context_fn(model) to torch.utils.checkpoint"
        )
