"""Centered filters: layers in front of batch norms whose filters sum to zero over their inputs."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeAlias, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim.optimizer import register_optimizer_step_post_hook

from mbnorm.leaves import leaf_of
from mbnorm.values import has_values

Layer: TypeAlias = _ConvNd | nn.Linear

AGREES = 1e-2
"""How far from zero the mean of a loaded filter may be, in standard deviations: above bfloat16's rounding."""


def center(layer: Layer) -> None:
    """Subtract from each filter its mean over what it is applied to, in place.

    A filter of a convolution or linear layer is ``weight[o]``. One of a transposed convolution is applied to
    all inputs of its group; with a stride, a position of the output sees some positions of the filter only,
    so that each position is centered by itself.
    """
    filters = _filters(layer)
    filters.sub_(filters.mean(_axes(layer), keepdim=True))


def is_centered(layer: Layer) -> bool:
    """Return whether the filters sum to zero, but for the rounding of a checkpoint."""
    var, mean = torch.var_mean(_filters(layer).float(), _axes(layer), correction=0)
    return bool((mean.abs() <= AGREES * var.sqrt()).all())


def is_depthwise(layer: Layer) -> bool:
    """Return whether each filter has one input channel of several, or one weight would be centered alone."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == 1
    shape = _filters(layer).shape
    alone = math.prod(shape[axis] for axis in _axes(layer)) == 1
    return alone or 1 < layer.groups == layer.in_channels


def is_pointwise(layer: Layer) -> bool:
    """Return whether each filter is applied to one position alone."""
    return isinstance(layer, nn.Linear) or math.prod(layer.kernel_size) == 1


def _filters(layer: Layer) -> Tensor:
    """Return a view of the weight; that of a transposed convolution as (groups, inputs, outputs, kernel)."""
    weight = layer.weight.detach()
    if isinstance(layer, _ConvTransposeNd):
        return weight.view(layer.groups, -1, *weight.shape[1:])
    return weight


def _axes(layer: Layer) -> list[int]:
    if not isinstance(layer, _ConvTransposeNd):
        return list(range(1, layer.weight.dim()))
    return [1, *(axis for axis, stride in enumerate(cast(Sequence[int], layer.stride), 3) if stride == 1)]


class _Centered:
    """A layer whose filters are centered again after each optimizer step that has changed them."""

    weight: Tensor

    @property
    def dimensions(self) -> int:
        """Dimensions of the weight."""
        return 2 if isinstance(self, nn.Linear) else 2 + len(cast(_ConvNd, self).kernel_size)

    def forward(self, input: Tensor, *others: Any, **named: Any) -> Tensor:
        """Do as torch's layer; to torch.fx it is a leaf, as that is."""
        if isinstance(input, Proxy):
            return leaf_of(self, input, *others, **named)
        return cast(Tensor, super().forward(input, *others, **named))  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Draw new weights as torch's layer does, and center them."""
        super().reset_parameters()  # type: ignore[misc]
        if has_values(self.weight):
            center(cast(Layer, self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _follow(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        layer = cast(Layer, self)
        if f"{prefix}weight" in state_dict and has_values(self.weight) and not is_centered(layer):
            # the same words for each layer: Python's default filter shows them once
            warnings.warn(
                "the filters that were loaded are not centered: they are kept as they are, and these layers "
                "train with them as torch's do",
                stacklevel=4,
            )
            release(layer)


class CenteredConv1d(_Centered, nn.Conv1d):
    """`torch.nn.Conv1d` whose filters sum to zero."""


class CenteredConv2d(_Centered, nn.Conv2d):
    """`torch.nn.Conv2d` whose filters sum to zero."""


class CenteredConv3d(_Centered, nn.Conv3d):
    """`torch.nn.Conv3d` whose filters sum to zero."""


class CenteredConvTranspose1d(_Centered, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` whose filters sum to zero."""


class CenteredConvTranspose2d(_Centered, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` whose filters sum to zero."""


class CenteredConvTranspose3d(_Centered, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` whose filters sum to zero."""


class CenteredLinear(_Centered, nn.Linear):
    """`torch.nn.Linear` whose filters sum to zero."""


CENTERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: CenteredConv1d,
    nn.Conv2d: CenteredConv2d,
    nn.Conv3d: CenteredConv3d,
    nn.ConvTranspose1d: CenteredConvTranspose1d,
    nn.ConvTranspose2d: CenteredConvTranspose2d,
    nn.ConvTranspose3d: CenteredConvTranspose3d,
    nn.Linear: CenteredLinear,
}
"""The layers that can be centered, and what they become."""
_STOCK = {centered: stock for stock, centered in CENTERED.items()}

_layers: "WeakSet[Any]" = WeakSet()
_early: "WeakSet[torch.optim.Optimizer]" = WeakSet()
"""Optimizers whose present step has been followed before torch calls the hook."""
_follows = False
# copies may be made in one thread while another trains
_lock = Lock()


def keep_centered(layer: Layer) -> None:
    """Center the filters of a layer of torch's, now and after each optimizer step."""
    layer.__class__ = CENTERED[type(layer)]  # type: ignore[assignment]
    if has_values(layer.weight):
        center(layer)
    _follow(cast(_Centered, layer))


def release(layer: nn.Module) -> bool:
    """Turn a layer back into torch's, with the weights it has; return whether it was centered."""
    stock = _STOCK.get(type(layer))
    if stock is None:
        return False
    layer.__class__ = stock
    with _lock:
        _layers.discard(layer)
    return True


def _follow(layer: _Centered) -> None:
    global _follows
    with _lock:
        _layers.add(layer)
        if not _follows:
            # torch calls it for every optimizer
            register_optimizer_step_post_hook(_after_step)
            _follows = True


@contextmanager
def centered_early(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Center what a step has changed for a hook of the optimizer's own: torch calls ours after those."""
    if _layers:
        _center_layers_of(optimizer)
        _early.add(optimizer)
    try:
        yield
    except BaseException:
        # torch calls no further hook
        _early.discard(optimizer)
        raise


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _early:
        _early.discard(optimizer)
    elif _layers:
        _center_layers_of(optimizer)


def _center_layers_of(optimizer: torch.optim.Optimizer) -> None:
    """Center the layers whose weights an optimizer has changed: after its step, so after their backward."""
    with _lock:
        layers = list(_layers)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        # the dictionary itself: a parametrized weight is computed whenever it is asked for
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() != layer.dimensions:
            warnings.warn(
                "the weights of centered layers are computed from others, or parts of them: these layers are "
                "centered no longer",
                stacklevel=4,
            )
            with _lock:
                _layers.discard(layer)
        # a step leaves alone what has no gradient; others may have a graph that waits for its backward
        elif id(weight) in own and weight.grad is not None:
            center(layer)
