"""Calls of modules that torch.fx notes as one, as it does those of torch's own layers."""

from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Proxy


def leaf_of(module: nn.Module, input: Proxy, *others: Any, **named: Any) -> Tensor:
    """Return what a trace has of a call of ``module``."""
    name = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return cast(Tensor, input.tracer.create_proxy("call_module", name, (input, *others), named))
