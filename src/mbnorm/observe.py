"""A pass over data in which each batch norm is asked about what it is given, and that leaves no trace."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from mbnorm.blend import statistics_dtype
from mbnorm.replay import without_trace

Forward: TypeAlias = Callable[[nn.Module, Any], object]
Observer: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor] | None]
"""Gets a layer's input; returns the mean and variance to normalize it with, None for the running ones."""


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    observers: Mapping[_BatchNorm, Observer],
    forward: Forward | None,
    device: torch.device | str | int | None,
    note: Callable[[Any, Any], None] | None = None,
) -> None:
    """Run all batches through the model in eval mode, without gradients, and show the layers' inputs.

    A tensor goes to the model as it is, a mapping as keyword arguments, of a tuple or list that begins with
    a tensor that first element, and anything else as it is, unless ``forward`` does it. Empty inputs are
    not shown. ``note`` is given what each forward returns, and its batch. On return, or if anything raises,
    the model and torch's random streams are as before.
    """
    with _observed(observers), _eval_mode(model), without_trace(model):
        for batch in batches:
            there = _moved(batch, device)
            output = _run(model, *_arguments(there)) if forward is None else forward(model, there)
            if note is not None:
                note(output, there)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if not kwargs or "argument" not in str(error):
            raise
        first = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), next(iter(kwargs)))
        raise TypeError(
            f"the model does not take the keys of the batches, {', '.join(kwargs)}, as arguments: say what "
            f'it takes with forward=lambda model, batch: model(batch["{first}"])'
        ) from error


@contextmanager
def _observed(observers: Mapping[_BatchNorm, Observer]) -> Iterator[None]:
    def show(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
        if x.numel() == 0:
            return
        answer = observers[layer](x)
        if answer is not None:
            mean, var = answer
            held = statistics[layer][0]
            dtype = statistics_dtype(x.dtype) if held is None else held.dtype
            # others in their place: what they hold is there again if the pass fails
            layer.running_mean, layer.running_var = mean.to(x.device, dtype), var.to(x.device, dtype)

    statistics = {layer: (layer.running_mean, layer.running_var) for layer in observers}
    handles = [layer.register_forward_pre_hook(show, with_kwargs=True) for layer in observers]
    try:
        # code that is compiled already does not see the hooks
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, (mean, var) in statistics.items():
            layer.running_mean, layer.running_var = mean, var


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # not by eval() and train(): some models do more in these
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    return (batch,), {}


def _moved(batch: Any, device: torch.device | str | int | None) -> Any:
    if device is None:
        return batch
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
