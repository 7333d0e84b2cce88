"""Activation checkpointing: telling a recompute from a forward, and what the forward it repeats had read."""

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from mbnorm.distributed import PooledPast
from mbnorm.functional import Record, Rows, transforms_run
from mbnorm.gradient import Era, RememberedGradient
from mbnorm.memories.memory import Past

CALLS_KEPT = 32
"""Forwards of one layer that a backward pass still to come may repeat."""

Node = torch.autograd.graph.Node

_SELECTIVE_CHECKPOINTS = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
"""What is active in a forward and in a recompute of selective activation checkpointing."""


def in_backward() -> bool:
    """Return whether this call comes from inside a backward pass, as a recompute does.

    Compiled code repeats no forward with side effects, so there the answer is no.
    """
    return not torch.compiler.is_compiling() and backward_runs()


# torch has no public test; this is the one that its own module tracker and FSDP use
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
"""Returns the number of the backward pass that runs, or -1."""


def backward_runs() -> bool:
    """Return whether uncompiled code is called from inside a backward pass."""
    return _graph_task() != -1


def in_torch_checkpoint(functions: tuple[str, ...]) -> bool:
    """Return whether one of these functions of torch's checkpointing is on the stack."""
    return any(
        f.f_code.co_filename.endswith("checkpoint.py") and f.f_code.co_name in functions for f in callers()
    )


def _recompute_runs() -> bool:
    # a block is called again from these, reentrant and not
    return in_torch_checkpoint(("backward", "unpack_hook"))


if not hasattr(torch._C, "_current_graph_task_id"):
    backward_runs = _recompute_runs


def _in_autograd_function() -> bool:
    """Return whether a `torch.autograd.Function` runs, as reentrant checkpoints of any library are."""
    # torch's own frame around it is in C++ since 2.14
    return any(f.f_code.co_name == "forward" and _is_of_function(f.f_code) for f in callers())


_of_functions: dict[int, tuple[CodeType, bool]] = {}


def _is_of_function(code: CodeType) -> bool:
    known = _of_functions.get(id(code))
    if known is None:
        forwards = (inspect.unwrap(function.forward) for function in _below(torch.autograd.Function))
        found = any(getattr(forward, "__code__", None) is code for forward in forwards)
        # with the code itself, whose id is then no other's
        known = _of_functions[id(code)] = code, found
    return known[1]


def _below(parent: type[Any]) -> Iterator[type[Any]]:
    for child in parent.__subclasses__():
        yield child
        yield from _below(child)


def callers() -> Iterator[FrameType]:
    """Return the frames on the stack, from the caller's caller on."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def unseen_by_selective_checkpoints() -> Iterator[None]:
    """Hide the operators called inside from torch's selective activation checkpointing.

    It numbers them, and finds those of a recompute by their numbers: it must not see that one needs others
    than its forward did.
    """
    with ExitStack() as stack:
        while isinstance(_get_current_dispatch_mode(), _SELECTIVE_CHECKPOINTS):
            stack.enter_context(_pop_mode_temporarily())
        yield


SAVES_WHAT_WAS_READ = "mbnorm_saves_what_was_read"
"""Attribute of a context function that compiled checkpoints may be traced with."""


class Call:
    """One forward of a layer: the batch's statistics identify it, what it read is what a recompute needs.

    Args:
        n: values per channel.
        rows: a record, or at least its first two rows: the mean and the variance of the batch.
        past: what was read; None if the record has it.
        gradient: what its backward passes read and write, if anything.
    """

    __slots__ = ("_graph_task", "_past", "_rows", "_this_time", "backwards", "gradient", "n", "node")

    def __init__(
        self,
        n: int,
        rows: Rows,
        past: Past | PooledPast | None = None,
        gradient: RememberedGradient | None = None,
    ) -> None:
        self.n = n
        self.gradient = gradient
        self._rows = rows
        self._past = past
        self.backwards = 0
        """How often a backward pass has come through this forward or a repetition of it."""
        self._graph_task = -1
        self._this_time = 0
        self.node: weakref.ref[Node] | None = None
        """Of the forward's own graph, if it has one that can be told from others."""

    @property
    def past(self) -> Past | PooledPast:
        """What the forward had read."""
        if self._past is None:
            record = Record(*self._rows)
            return Past(record.past_mean, record.past_var, record.one_weight)
        return self._past

    def watch(self, node: Node) -> None:
        """Count the backward passes through this call, or a repetition of it, whose last step is ``node``."""
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            # an attribute of our own node costs less than a hook
            node.on_backward = self._count
        else:
            node.register_hook(self._count)

    def _count(self, *_: object) -> None:
        task = _graph_task()
        self._this_time = 1 + (self._this_time if task == self._graph_task else 0)
        self._graph_task = task
        self.backwards += 1

    @property
    def is_done(self) -> bool:
        """Whether no backward pass can come any more, as far as is known."""
        if self.node is None:
            return self.backwards > 0
        node = self.node()
        return node is None or (self.backwards > 0 and _is_freed(node))

    def order(self) -> tuple[bool, bool, int]:
        """Return what is smaller for a call that is likelier to be repeated now."""
        if self.node is None:
            return self.is_done, False, self.backwards
        node = self.node()
        awaits = node is not None and torch._C._will_engine_execute_node(node)
        # a graph that was retained has had others
        return self.is_done, not awaits, self._this_time if self._graph_task == _graph_task() else 0

    def is_of(self, rows: Rows) -> bool:
        """Return whether a record has this call's batch, bit for bit."""
        return all(torch.allclose(self._rows[i], rows[i], rtol=0, atol=0, equal_nan=True) for i in (0, 1))


def _is_freed(node: Node) -> bool:
    """Return whether a backward pass has freed what a node had saved, as it does without retain_graph."""
    try:
        # not saved_tensors, which would compute a checkpoint again
        node._raw_saved_tensors  # type: ignore[attr-defined]  # noqa: B018
    except RuntimeError:
        return True
    return False


class CallLog:
    """The forwards of one layer that may be repeated, newest last; bounded, and in no checkpoint."""

    def __init__(self) -> None:
        self.calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self.tapes: list[list[Call]] = []
        self.script: Iterator[Call] | None = None
        self.era = Era()
        # threads that train one model at the same time share its layers
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["CallLog"], tuple[()]]:
        return CallLog, ()

    def start_anew(self) -> None:
        """Let the backward passes of all forwards so far write nothing; they can be repeated as before."""
        self.era.is_over = True
        self.era = Era()

    def drop_done(self) -> None:
        """Forget forwards that no backward pass comes through any more, before the next takes memory."""
        if not self.calls or not torch.is_grad_enabled():
            return
        with self._lock:
            calls = self.calls
            while calls and calls[0].is_done:
                calls.popleft()
            if calls and any(c.is_done for c in calls):
                self.calls = deque((c for c in calls if not c.is_done), maxlen=CALLS_KEPT)

    def remember(self, call: Call, node: Node | None) -> None:
        """Add a forward."""
        if transforms_run() or not (torch.is_grad_enabled() or self.tapes or _in_autograd_function()):
            # nothing will repeat it, and what a transform has wrapped is of no use after it
            return
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            # a strong reference would keep the graph; torch's own nodes take no weak one
            call.node = weakref.ref(node)
        with self._lock:
            self.calls.append(call)
        self.note(call, node)

    def note(self, call: Call, node: Node | None) -> None:
        """Add a forward, the first or a repeated one, to what is being recorded."""
        if node is not None:
            call.watch(node)
        for tape in self.tapes:
            tape.append(call)

    def likeliest(self, n: int) -> list[Call]:
        """Return the forwards of ``n`` values per channel, in the order in which a backward meets them.

        Autograd runs the latest forward's backward first. A forward may be repeated several times
        before its backward is through (nested checkpoints), so that alone moves it to the end.
        """
        with self._lock:
            newest_first = [c for c in reversed(self.calls) if c.n == n]
        return sorted(newest_first, key=Call.order)


def refuse_unknown_recompute() -> None:
    """Raise if torch's checkpointing repeats a forward that no layer remembers.

    Raises:
        RuntimeError: it does; what the forward had read is not known.
    """
    if _recompute_runs():
        raise RuntimeError(
            f"activation checkpointing repeats a forward that is none of the last {CALLS_KEPT} of this "
            "layer: the recompute is not deterministic, or there were too many forwards before the "
            "backward. Pass context_fn=mbnorm.checkpoint_context_fn(model) to torch.utils.checkpoint"
        )
