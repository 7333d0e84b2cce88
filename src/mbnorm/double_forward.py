"""Double-Forward: after an optimizer step, forward its batches again to refresh the memories."""

import contextlib
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from mbnorm.layers import HistoryBatchNorm
from mbnorm.layers.state import Snapshot
from mbnorm.optimizer_steps import was_skipped
from mbnorm.state import memorizing_layers, no_update, why_none

FORWARDS_KEPT = 64
"""Forwards kept for a replay where no layer has a memory_size to say how many matter."""

_replaying: ContextVar[bool] = ContextVar("mbnorm_replaying", default=False)


class DoubleForward:
    """Refresh the memories of ``model`` after each step of ``optimizer``.

    What a forward stores belongs to the parameters before the step. After the step every memorizing
    layer goes back to its state before the step's first forward, and the step's batches are forwarded
    again, with no gradient graph and in the modes of that moment, with the new parameters. Nothing but
    the state of the memorizing layers changes: other buffers, gradients, optimizer state and torch's
    random streams are bit-identical.

    Attached by construction; `remove` detaches, and so does leaving it as a context manager. It costs
    about one forward without gradient per captured batch, and keeps the step's inputs alive.

    Args:
        model: the module that the training loop calls. Its calls in train mode with gradients enabled
            are captured: all since the last step (several micro-batches), the last one of those inside
            one ``optimizer.step(closure)``, at most as many as the longest memory holds.
        optimizer: its steps trigger the refresh.
        scaler: the `torch.amp.GradScaler` in use, if any: a step that it skips triggers nothing.
        every: refresh after every so many optimizer steps only, with the last step's batches.

    Raises:
        ValueError: ``every`` below 1, or no layer with a memory in ``model``.
        TypeError: ``optimizer`` has no step hooks.

    Source: Guo et al., AAAI 2018, double forward propagation.

    >>> from mbnorm import MemorizedBatchNorm1d
    >>> model = nn.Sequential(nn.Linear(4, 4), MemorizedBatchNorm1d(4))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with DoubleForward(model, optimizer):
    ...     model(torch.randn(2, 4)).square().mean().backward()
    ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: "torch.amp.GradScaler | None" = None,
        every: int = 1,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"expected a torch optimizer with step hooks, got {type(optimizer).__name__}")
        layers = _layers_to_refresh(model)
        self.model = model
        self.every = every
        self.scaler = scaler
        self._steps = 0
        self._mark: _Mark | None = None
        kept = max(getattr(layer, "memory_size", FORWARDS_KEPT) for layer in layers)
        self._calls: deque[_Call] = deque(maxlen=kept)
        self._calls_before_step: int | None = None
        self._handles: list[RemovableHandle] = [
            _watch(model, self),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Detach from the model and the optimizer, and release the captured inputs."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def __enter__(self) -> "DoubleForward":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a forward of the model in train mode."""
        if not torch.is_grad_enabled():
            return
        if self._mark is None:
            self._mark = _Mark.of(self.model)
        if self._calls_before_step is not None:
            # a closure is evaluated again and again: its last evaluation is the step's batch
            while len(self._calls) > self._calls_before_step:
                self._calls.pop()
        self._calls.append(_Call.of(self.model, args, kwargs))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._calls_before_step = len(self._calls)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._calls_before_step = None
        if was_skipped(optimizer, self.scaler):
            return
        self._steps += 1
        mark, calls = self._mark, list(self._calls)
        self._forget()
        if mark is not None and self._steps % self.every == 0 and self.model.training:
            with _replay(self.model):
                mark.rewind()
                for call in calls:
                    call.forward(self.model)

    def _forget(self) -> None:
        self._mark = None
        self._calls.clear()


def refresh(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Do the second forward by hand: take back the last forward of ``model`` and forward these inputs.

    For loops whose optimizer gives `DoubleForward` no hook. Call it after the step with the batch that
    was trained on; what else changes is as with `DoubleForward`. The first call for a model forwards
    the inputs once more, to learn how often each layer is called.

    Args:
        model: the module that the training loop calls, in train mode.
        *args: inputs of ``model``.
        **kwargs: keyword inputs of ``model``.

    Raises:
        ValueError: ``model`` has no layer with a memory, or is in eval mode, where nothing is stored.
        RuntimeError: no forward in train mode has been seen.

    Source: Guo et al., AAAI 2018, double forward propagation.

    >>> from mbnorm import MemorizedBatchNorm1d
    >>> layer, x = MemorizedBatchNorm1d(4), torch.randn(2, 4)
    >>> _ = layer(x)
    >>> refresh(layer, x)
    >>> layer.num_batches_tracked
    tensor(1)
    """
    layers = _layers_to_refresh(model)
    if not model.training:
        raise ValueError("refresh needs a model in train mode: eval mode stores nothing")
    call = _Call.of(model, args, kwargs)
    last = _LastForward.of(model)
    with _replay(model):
        if last is not None and last.mark is not None:
            last.mark.rewind()
        else:
            calls = _count_calls(model, layers, call)
            for layer in layers:
                layer.undo(calls[layer])
            last = _LastForward()
            last.mark = _Mark.of(model)
            _watch(model, last)
            for layer in layers:
                layer.stop_undo()
        call.forward(model)


class _LastForward:
    """Marks the state before each training forward of a model that is refreshed by hand."""

    def __init__(self) -> None:
        self.mark: _Mark | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "_LastForward | None":
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, _RootHook) and isinstance(hook.watcher, cls):
                return hook.watcher
        return None

    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mark = _Mark.of(model)


class _Mark:
    """The state of a model's memorizing layers at one moment."""

    def __init__(self, snapshots: list[tuple[HistoryBatchNorm, Snapshot]]) -> None:
        self.snapshots = snapshots

    @classmethod
    def of(cls, model: nn.Module) -> "_Mark":
        return cls([(layer, layer.snapshot()) for layer in memorizing_layers(model)])

    def rewind(self) -> None:
        for layer, snapshot in self.snapshots:
            layer.rewind(snapshot)


class _Call(NamedTuple):
    """One call of a model: its inputs, detached, and the autocast settings it ran under."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: list[tuple[str, torch.dtype, bool]]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
        devices = {"cpu", *(layer.memory_device.type for layer in memorizing_layers(model))}
        autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in sorted(devices)]
        return cls(args, kwargs, autocast)

    def forward(self, model: nn.Module) -> None:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.autocast:
                # a cast of a parameter cached before the step would be that of the old one
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            model(*self.args, **self.kwargs)


class _RootHook:
    """A forward pre-hook that a copy or pickle of the model does not take along."""

    def __init__(self, watcher: "DoubleForward | _LastForward | None" = None) -> None:
        self.watcher = watcher

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watcher is None or not model.training or _replaying.get():
            return
        # a forward that stores nothing, as SAM's second one, is none to repeat
        if any(layer.stores for layer in memorizing_layers(model)):
            self.watcher.capture(model, args, kwargs)

    def __reduce__(self) -> tuple[type["_RootHook"], tuple[()]]:
        return _RootHook, ()


def _watch(model: nn.Module, watcher: "DoubleForward | _LastForward") -> RemovableHandle:
    return model.register_forward_pre_hook(_RootHook(watcher), prepend=True, with_kwargs=True)


def _layers_to_refresh(model: nn.Module) -> list[HistoryBatchNorm]:
    layers = memorizing_layers(model)
    if not layers:
        raise ValueError(f"the model has no layer with a memory to refresh: {why_none(model)}")
    return layers


def _count_calls(
    model: nn.Module, layers: list[HistoryBatchNorm], call: _Call
) -> "Counter[HistoryBatchNorm]":
    """Return how often each layer runs, and would store, in one forward."""
    calls: Counter[HistoryBatchNorm] = Counter()

    def count(layer: HistoryBatchNorm, args: tuple[Any, ...]) -> None:
        calls[layer] += layer.tracks

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        with no_update(model):
            call.forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextlib.contextmanager
def _replay(model: nn.Module) -> Iterator[None]:
    """Forward inside without a graph, and without a trace outside the memorizing layers."""
    ours = {id(b) for layer in memorizing_layers(model) for b in layer.buffers(recurse=False)}
    others = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and id(buffer) not in ours
    ]
    pending = [(layer._calls, layer._calls.calls.copy()) for layer in memorizing_layers(model)]
    token = _replaying.set(True)
    try:
        with _forked_rng(model), torch.no_grad(), warnings.catch_warnings():
            # reentrant checkpoints miss the gradients that a replay does without
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            yield
    finally:
        _replaying.reset(token)
        for log, calls in pending:
            # no backward follows a replay, but one of an earlier forward may
            log.calls = calls
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
            indices = [d.index for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        yield
