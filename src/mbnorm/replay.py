"""Doing forwards of a model again from an earlier state of its memories, and nothing else."""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mbnorm.layers.layer import HistoryBatchNorm, Snapshot
from mbnorm.state import memorizing_layers

replaying: ContextVar[bool] = ContextVar("mbnorm_replaying", default=False)


class Mark:
    """The state of a model's memorizing layers at one moment, and the momentum they had."""

    def __init__(self, snapshots: list[tuple[HistoryBatchNorm, Snapshot, float | None]]) -> None:
        self.snapshots = snapshots

    @classmethod
    def of(cls, model: nn.Module) -> "Mark":
        """Return the state of a model now."""
        return cls([(layer, layer.snapshot(), layer.momentum) for layer in memorizing_layers(model)])

    def is_void(self) -> bool:
        """Return whether a layer's state was reset or loaded since."""
        return any(layer.is_void(snapshot) for layer, snapshot, _ in self.snapshots)

    def replay(self, model: nn.Module, calls: "list[Call]") -> None:
        """Go back to this moment and do the calls again.

        If one fails, every layer has as many batches in its memory as before; one that was reached has
        those of now.
        """
        alive = [entry for entry in self.snapshots if isinstance(entry[0], HistoryBatchNorm)]
        present = [(layer, layer.snapshot(), layer.momentum) for layer in memorizing_layers(model)]
        with without_trace(model):
            try:
                for layer, snapshot, momentum in alive:
                    # recipes for SAM set momentum to 0 around the step: the forwards had another
                    layer.momentum = momentum
                    if layer.stores:
                        layer.rewind(snapshot)
                for call in calls:
                    call.forward(model)
            except BaseException:
                for layer, snapshot, _ in present:
                    layer.restore(snapshot)
                raise
            finally:
                for layer, _, momentum in present:
                    layer.momentum = momentum


class Call(NamedTuple):
    """One call of a model: its inputs, detached, and the autocast settings it ran under.

    ``evaluation`` is the same for all calls in one evaluation of a step's closure, and None outside.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    autocast: list[tuple[str, torch.dtype, bool]]
    evaluation: int | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        evaluation: int | None = None,
    ) -> "Call":
        """Return a call of a model with these inputs, under the autocast settings of now."""
        args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
        devices = {"cpu", *(layer.memory_device.type for layer in memorizing_layers(model))} - {"meta"}
        autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in sorted(devices)]
        return cls(args, kwargs, _versions(args, kwargs), autocast, evaluation)

    def forward(self, model: nn.Module) -> None:
        """Call the model again."""
        if _versions(self.args, self.kwargs) != self.versions:
            warnings.warn(
                "the inputs of a training forward were changed in place, by the model or the loader, before "
                "its batch could be forwarded again: the memories get the statistics of what is there now",
                stacklevel=2,
            )
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.autocast:
                # a cast of a parameter cached before the step would be that of the old one
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            model(*self.args, **self.kwargs)


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    return [t._version for t in tensors if not t.is_inference()]


@contextlib.contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Forward inside without a graph, and without a trace outside the memorizing layers."""
    ours = {id(b) for layer in memorizing_layers(model) for b in layer.buffers(recurse=False)}
    others = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and id(buffer) not in ours
    ]
    token = replaying.set(True)
    try:
        with _forked_rng(model), torch.no_grad():
            yield
    finally:
        replaying.reset(token)
        for module, name, buffer, value in others:
            module._buffers[name] = buffer
            # through .data: a graph that saved this buffer must still find it unchanged
            buffer.data.copy_(value)


@contextlib.contextmanager
def _forked_rng(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {d.type for d in devices} - {"cpu", "meta"}:
            if kind == "cuda" and torch.cuda.is_current_stream_capturing():
                # a CUDA graph moves the stream on by itself, and refuses to be asked for it
                continue
            indices = [d.index for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        yield
