"""The operators that a call runs, to be timed bare: without modules and autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, Callable[[], Any]]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        self.calls.append((operator.name(), lambda: operator(*args, **options)))
        return operator(*args, **options)


def operators_of(call: Callable[[], object]) -> list[tuple[str, Callable[[], Any]]]:
    """Return the operators that ``call`` runs, each with its name, to be run again with the same tensors."""
    recording = _Recording()
    with recording:
        call()
    return recording.calls


def bare(call: Callable[[], object]) -> Callable[[], None]:
    """Return what runs the operators of ``call`` alone."""
    operators = [operator for _, operator in operators_of(call)]

    def run() -> None:
        with torch.no_grad():
            for operator in operators:
                operator()

    return run
