"""Double-Forward: after an optimizer step, forward its batches again to refresh the memories."""

import sys
import warnings
from collections import deque
from types import FrameType, TracebackType
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from mbnorm.centered import centered_early
from mbnorm.layers.layer import HistoryBatchNorm
from mbnorm.optimizer_steps import check_hooks, was_skipped
from mbnorm.replay import Call, Mark, replaying
from mbnorm.state import memorizing_layers, why_none

FORWARDS_KEPT = 64
"""Forwards kept for a replay where no layer has a memory_size to say how many matter."""


class DoubleForward:
    """Refresh the memories of ``model`` after each step of ``optimizer``, or by hand.

    What a forward stores belongs to the parameters before the step. After the step every layer with a memory
    goes back to its state before the step's first forward. Then the step's batches are forwarded again with
    the new parameters, without a gradient and in the modes of that moment. Only the memories change: other
    buffers, gradients, optimizer state and torch's random streams are bit-identical.

    The constructor attaches it. `remove` detaches it, and so does leaving it as a context manager. It costs
    about one forward without gradient for each captured batch, and keeps the step's inputs alive.

    Args:
        model: the module that the training loop calls. Its calls in train mode with gradients are captured:
            all since the last step (several micro-batches), and inside ``optimizer.step(closure)`` those of
            the last evaluation; at most as many as the longest memory holds.
        optimizer: its steps trigger the refresh. None is for loops without a torch optimizer: call `refresh`
            after each step, or `forget` after one that is not to be refreshed.
        scaler: the `torch.amp.GradScaler` in use, if any: a step that it skips triggers nothing.
        every: refresh after every so many optimizer steps only, with the last step's batches.

    Raises:
        ValueError: ``every`` below 1, ``every`` or ``scaler`` without an optimizer, or no layer with a memory
            in ``model``.
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
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scaler: "torch.amp.GradScaler | None" = None,
        every: int = 1,
    ) -> None:
        if not isinstance(every, SupportsIndex) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        if optimizer is None and (every != 1 or scaler is not None):
            raise ValueError("every and scaler need an optimizer, whose steps they are about")
        if optimizer is not None:
            check_hooks(optimizer)
        model = _inside(model)
        layers = _layers_to_refresh(model)
        self.model = model
        self.optimizer = optimizer
        self.every = int(every)
        self.scaler = scaler
        self._steps = 0
        self._mark: Mark | None = None
        kept = max(getattr(layer, "memory_size", FORWARDS_KEPT) for layer in layers)
        self._calls: deque[Call] = deque(maxlen=kept)
        self._in_closure = False
        self._warned = False
        self._handles: list[RemovableHandle] = [_watch(model, self)]
        if optimizer is not None:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def refresh(self) -> None:
        """Do the second forward now: repeat all forwards since the last `refresh` or `forget`.

        For loops whose optimizer gives no hook: call it after the step.

        Raises:
            ValueError: the model is in eval mode, where nothing is stored.
            RuntimeError: there was no training forward since the last `refresh` or `forget`, or since the
                state was loaded or reset.

        >>> from mbnorm import MemorizedBatchNorm1d
        >>> layer = MemorizedBatchNorm1d(4)
        >>> double_forward = DoubleForward(layer)
        >>> _ = layer(torch.randn(2, 4))
        >>> double_forward.refresh()
        >>> layer.num_batches_tracked
        tensor(1)
        """
        if not self.model.training:
            raise ValueError("refresh needs a model in train mode: eval mode stores nothing")
        mark, calls = self._mark, list(self._calls)
        if mark is None or mark.is_void():
            raise RuntimeError(
                "nothing to refresh: no training forward was seen since the last refresh() or forget(), or "
                "since the state was loaded or reset"
            )
        mark.replay(self.model, calls)
        self.forget()

    def forget(self) -> None:
        """Release the captured forwards: a step that is not refreshed is over."""
        self._mark = None
        self._calls.clear()

    def remove(self) -> None:
        """Detach from the model and the optimizer, and release the captured inputs."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint: the steps counted, for ``every`` above 1."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._steps = int(state_dict["steps"])

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
            self._mark = Mark.of(self.model)
        # a step whose closure raised has ended without a hook
        self._in_closure = self._in_closure and self.optimizer is not None and _is_stepping(self.optimizer)
        evaluation = self._evaluation() if self._in_closure else None
        # a closure is evaluated again and again: its last evaluation has the step's batches
        while evaluation is not None and self._calls and self._calls[-1].evaluation not in (None, evaluation):
            self._calls.pop()
        self._calls.append(Call.of(self.model, args, kwargs, evaluation=evaluation))

    def _evaluation(self) -> int:
        # the optimizer moves the parameters between two evaluations, and within one nobody does
        groups = () if self.optimizer is None else self.optimizer.param_groups
        return sum(p._version for group in groups for p in group["params"])

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # hooks get the optimizer as the first argument too
        self._in_closure = any(callable(a) for a in (*args[1:], *kwargs.values()))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._in_closure = False
        if was_skipped(optimizer, self.scaler):
            return
        self._steps += 1
        mark, calls = self._mark, list(self._calls)
        self.forget()
        if mark is None:
            self._warn_of_no_forward()
        elif self._steps % self.every == 0 and self.model.training:
            with centered_early(optimizer):
                mark.replay(self.model, calls)

    def _warn_of_no_forward(self) -> None:
        if self._warned or not self.model.training:
            return
        layers = memorizing_layers(self.model)
        if not layers:
            reason = f"its model has no layer with a memory any more: {why_none(self.model, 'matched')}"
        elif any(layer.stores for layer in layers):
            reason = (
                "it has seen no training forward of its model before this optimizer step: give it the module "
                "that the training loop calls"
            )
        else:
            return
        self._warned = True
        warnings.warn(f"DoubleForward refreshes nothing: {reason}", stacklevel=2)


class _RootHook:
    """A forward pre-hook that a copy or pickle of the model does not take along."""

    def __init__(self, watcher: DoubleForward | None = None) -> None:
        self.watcher = watcher

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watcher is None or not model.training:
            return
        if torch.compiler.is_compiling():
            from mbnorm.tracing import in_eager_mode

            torch._dynamo.graph_break(msg="attach DoubleForward to what torch.compile(model) returns")
            in_eager_mode(_capture, self.watcher, model, args, kwargs)
        else:
            _capture(self.watcher, model, args, kwargs)

    def __reduce__(self) -> tuple[type["_RootHook"], tuple[()]]:
        return _RootHook, ()


def _capture(watcher: DoubleForward, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # a forward that stores nothing, as SAM's second one, is none to repeat
    if not replaying.get() and any(layer.stores for layer in memorizing_layers(model)):
        watcher.capture(model, args, kwargs)


def _watch(model: nn.Module, watcher: DoubleForward) -> RemovableHandle:
    return model.register_forward_pre_hook(_RootHook(watcher), prepend=True, with_kwargs=True)


def _is_stepping(optimizer: torch.optim.Optimizer) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step" and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _inside(model: nn.Module) -> nn.Module:
    # the wrapper's forward copies the buffers of rank 0 over all others
    return model.module if isinstance(model, DistributedDataParallel) else model


def _layers_to_refresh(model: nn.Module) -> list[HistoryBatchNorm]:
    layers = memorizing_layers(model)
    if not layers:
        raise ValueError(f"the model has no layer with a memory to refresh: {why_none(model, 'matched')}")
    return layers
