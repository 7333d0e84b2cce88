"""Which layers feed the batch norms of a net."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Feeder: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@torch.no_grad()
def feeders(model: nn.Module, shape: Sequence[int]) -> list[Feeder]:
    """Return the convolutions and linear layers whose outputs are the inputs of batch norms.

    A forward of two zero inputs shows them; it changes nothing in the net.

    Args:
        model: a net with torch's batch norms.
        shape: that of one input.

    Raises:
        ValueError: a batch norm is not called, or its input is no such layer's untouched output.
    """
    # kept, so that no other tensor takes the place of one; in-place operations change the version
    outputs: list[tuple[Tensor, int, Feeder]] = []
    found: list[Feeder] = []
    waiting = {layer: name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    names = dict(waiting)

    def remember(layer: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(layer, Feeder)
        outputs.append((output, output._version, layer))

    def recognize(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        waiting.pop(layer, None)
        for output, version, feeder in outputs:
            if output is inputs[0] and version == output._version:
                if feeder not in found:
                    found.append(feeder)
                return
        raise ValueError(f"{names[layer]}: expected a convolution or a linear layer in front of it")

    hooks = [layer.register_forward_hook(remember) for layer in model.modules() if isinstance(layer, Feeder)]
    hooks += [layer.register_forward_pre_hook(recognize) for layer in names]
    modes = {layer: layer.training for layer in model.modules()}
    example = torch.zeros(2, *shape, device=next(model.parameters()).device)
    try:
        model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training in modes.items():
            layer.training = training
    if waiting:
        raise ValueError(f"{next(iter(waiting.values()))}: is not called in a forward of this net")
    return found
