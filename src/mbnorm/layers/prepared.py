"""A layer's forward by fused kernels, prepared once and run again for as long as nothing has changed.

On small maps Python's dispatch costs more than the kernels: this puts the arguments together once.
"""

from itertools import repeat
from operator import attrgetter, is_, itemgetter
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mbnorm.blend import number_of, statistics_dtype
from mbnorm.functional import FusedRun, Rows, differentiated_in_other_ways, run_differentiably
from mbnorm.recompute import Call, backward_runs

if TYPE_CHECKING:
    from mbnorm.layers.layer import HistoryBatchNorm

_dtype_of = attrgetter("dtype")


class PreparedForward:
    """What the kernels take beside an input of one shape, and what that rests on.

    Args:
        layer: the layer, in train mode.
        kernels: the backend.
        input: of the shape to come, such as the kernels take.
        n: values per channel of ``input``.
        stores: whether a forward is stored.
    """

    __slots__ = (
        "_arguments",
        "_buffers",
        "_dtype",
        "_gradient",
        "_kernels",
        "_kind",
        "_n",
        "_of_that_dtype",
        "_operator",
        "_parameters",
        "_rules",
        "_settings",
        "_settings_of",
    )

    def __init__(
        self, layer: "HistoryBatchNorm", kernels: ModuleType, input: Tensor, n: int, *, stores: bool
    ) -> None:
        self._settings_of = itemgetter(*layer.settings)
        self._settings = self._settings_of(layer.__dict__)
        self._buffers = tuple(layer._buffers.values())
        self._kind = (input.shape, input.dtype, input.device)
        self._n = n
        self._parameters = layer.parameters_for(input)
        self._kernels = kernels
        memory, averages = layer.memory, layer.averages
        self._operator = getattr(kernels, f"forward_with_{memory.kernels}")
        self._rules = memory.variance_rule, layer.eps
        update = [float(number) for number in layer.update_for(input.shape[0], layer.momentum)]
        rules = number_of(memory.variance_rule), layer.eps
        self._arguments = (
            list(layer.state),
            list(averages),
            memory.read_numbers(n, input.shape[0]),
            update,
            *rules,
            stores,
        )
        self._gradient = layer.remembered_gradient()
        self._dtype = statistics_dtype(input.dtype)
        own = (averages.mean, *self._parameters)
        self._of_that_dtype = tuple(t for t in own if t is not None)

    def lasts(self, layer: "HistoryBatchNorm") -> bool:
        """Return whether it may be kept.

        Parameters with a history, as functional_call gives, and casts of the layer's own are of one forward.
        """
        own = tuple(layer._parameters.values())
        return (
            len(own) == 2
            and all(map(is_, own, self._parameters))
            and all(p is None or p.is_leaf for p in own)
        )

    def fits(self, layer: "HistoryBatchNorm", input: Tensor) -> bool:
        """Return whether a forward of ``input`` now is the one that was prepared."""
        buffers, own = layer._buffers.values(), layer._parameters.values()
        return (
            type(input) is Tensor
            and (input.shape, input.dtype, input.device) == self._kind
            and self._settings_of(layer.__dict__) == self._settings
            and len(buffers) == len(self._buffers)
            and all(map(is_, buffers, self._buffers))
            and len(own) == 2
            # parameters of another dtype are cast at each call
            and all(map(is_, own, self._parameters))
            # code that sets .data may change that of the tensors themselves
            and all(map(is_, map(_dtype_of, self._of_that_dtype), repeat(self._dtype)))
            and layer._calls.script is None
            and not backward_runs()
            and not differentiated_in_other_ways()
            and not torch._C._is_tracing()
            and not torch._C._len_torch_dispatch_stack()
        )

    def run(self, layer: "HistoryBatchNorm", input: Tensor) -> Tensor:
        """Read the memory, normalize, and store or not."""
        y, _ = self.run_recorded(layer, input)
        return y

    def run_recorded(self, layer: "HistoryBatchNorm", input: Tensor) -> tuple[Tensor, Rows]:
        """Do as `run`; return the record, too."""
        calls = layer._calls
        calls.drop_done()
        layer.seal.behind = True
        # each forward has its own
        gradient = self._gradient and self._gradient.for_a_forward_in(calls.era)
        run = FusedRun(self._kernels, self._operator, self._arguments, *self._rules, gradient)
        y = run_differentiably(run, input, *self._parameters)
        calls.remember(Call(self._n, run.rows, gradient=gradient), y.grad_fn)
        return y, run.rows
