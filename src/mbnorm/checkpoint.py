"""The explicit form of what the layers do under activation checkpointing by themselves."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._guards import TracingContext
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mbnorm.recompute import SAVES_WHAT_WAS_READ, Call
from mbnorm.state import memorizing_layers

Contexts: TypeAlias = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def checkpoint_context_fn(model: nn.Module) -> Callable[[], Contexts]:
    """Return a ``context_fn`` for `torch.utils.checkpoint.checkpoint` without reentrance.

    Under activation checkpointing a layer recognizes a recompute, uses the past statistics of the forward
    that it repeats, and stores nothing. It distinguishes forwards by their statistics. With this function
    it distinguishes them by position instead. Use it in three cases: a recompute is not bit-equal to its
    forward; a layer is called more than 32 times before a backward; or a checkpointed block shall be compiled
    into one graph, which torch.compile otherwise leaves to eager mode.

    Args:
        model: contains the layers of the checkpointed block.

    >>> import torch
    >>> from torch.utils.checkpoint import checkpoint
    >>> from mbnorm import MemorizedBatchNorm1d
    >>> block = MemorizedBatchNorm1d(4)
    >>> x = torch.randn(2, 4, requires_grad=True)
    >>> y = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_context_fn(block))
    """

    def make() -> Contexts:
        if TracingContext.try_get() is not None:
            contexts: Contexts = create_selective_checkpoint_contexts(_save_per_channel)  # type: ignore[no-untyped-call]
            return contexts
        record = _Record(model)
        return record, _Repeat(record)

    setattr(make, SAVES_WHAT_WAS_READ, True)
    return make


def _save_per_channel(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Under torch.compile, keep what was read of the memory: the recompute comes after it has changed."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if tensors and all(t.dim() <= 1 for t in tensors):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Record(AbstractContextManager[None]):
    """While open, notes the calls of each layer in order."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[nn.Module, list[Call]] = {layer: [] for layer in memorizing_layers(model)}
        self.logs = {layer: layer._calls for layer in memorizing_layers(model)}

    def __enter__(self) -> None:
        for layer, log in self.logs.items():
            log.tapes.append(self.calls[layer])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in self.logs.values():
            log.tapes.pop()


class _Repeat(AbstractContextManager[None]):
    """While open, lets each layer read what its recorded calls had read."""

    def __init__(self, record: _Record) -> None:
        self.record = record

    def __enter__(self) -> None:
        self.outer = {layer: log.script for layer, log in self.record.logs.items()}
        for layer, log in self.record.logs.items():
            log.script = iter(self.record.calls[layer])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, log in self.record.logs.items():
            log.script = self.outer[layer]
