"""A layer's forward by fused kernels, prepared once and run again for as long as nothing has changed.

On small maps the Python around the kernels takes longer than they do: it finds out what kind of call this is,
and puts the same arguments together.
"""

from itertools import repeat
from operator import attrgetter, is_, itemgetter
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mbnorm.backends import cpu
from mbnorm.blend import statistics_dtype
from mbnorm.functional import RecordedForward, normalize_by_kernels
from mbnorm.recompute import CpuCall, RecordedCall, backward_runs

if TYPE_CHECKING:
    from mbnorm.layers.base import HistoryBatchNorm

_dtype_of = attrgetter("dtype")

Remembered: TypeAlias = tuple[Tensor, Tensor]
"""Output and record of kernels that read a memory; see `mbnorm.backends.cpu`."""


class PreparedForward:
    """What the kernels take beside an input of one shape, and what that rests on.

    Args:
        layer: the layer, in train mode.
        kernels: the backend.
        input: of the shape to come, such as the kernels take.
        n: values per channel of ``input``.
        logs: whether the state before a forward is noted for `HistoryBatchNorm.undo`.
        stores: whether a forward is stored.
    """

    __slots__ = (
        "_after",
        "_before",
        "_buffers",
        "_dtype",
        "_kernels",
        "_kind",
        "_log",
        "_n",
        "_of_that_dtype",
        "_operator",
        "_parameters",
        "_rules",
        "_settings",
        "_settings_of",
        "_undo",
    )

    def __init__(
        self,
        layer: "HistoryBatchNorm",
        kernels: ModuleType,
        input: Tensor,
        n: int,
        *,
        logs: bool,
        stores: bool,
    ) -> None:
        self._settings_of = itemgetter(*layer.settings)
        self._settings = self._settings_of(layer.__dict__)
        self._buffers = tuple(layer._buffers.values())
        self._kind = (input.shape, input.dtype, input.device)
        self._n = n
        self._parameters = layer._parameters_for(input)
        self._kernels = kernels
        self._operator = layer._fused_operator(kernels)
        self._rules = layer.variance, layer.eps
        averages = layer._averages()
        self._undo = layer._undo if logs else None
        rows, counters = None, None
        if self._undo is not None:
            rows, counters, _ = self._undo.to_write(averages.mean, layer._more_numbers())
        self._before = (layer.variance == "pooled", layer.eps, *layer._as_kernels_take(layer._memory()))
        self._log = (*averages, rows, counters)
        self._after = (stores, *layer._fused_update(input.shape[0]))
        self._dtype = statistics_dtype(input.dtype)
        own = (averages.mean, *self._parameters)
        self._of_that_dtype = tuple(t for t in own if t is not None)

    @property
    def lasts(self) -> bool:
        """Whether it may be kept: parameters with a history, as functional_call gives, are of one forward."""
        return all(p is None or p.is_leaf for p in self._parameters)

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
            # whoever sets .data may change that of the tensors themselves
            and all(map(is_, map(_dtype_of, self._of_that_dtype), repeat(self._dtype)))
            and layer._calls.script is None
            and not backward_runs()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and not torch._C._is_tracing()
            and not torch._C._len_torch_dispatch_stack()
        )

    def run(self, layer: "HistoryBatchNorm", input: Tensor) -> Remembered:
        """Read the memory, normalize, and store or not."""
        calls, undo, n = layer._calls, self._undo, self._n
        calls.drop_done()
        slot = 0 if undo is None else undo.slot
        how = layer._how_read(n)
        arguments = *self._before, *how, *self._log, slot, *self._after
        call: RecordedCall
        if self._kernels is cpu:
            # differentiable itself, and counts its backward passes
            y, record = self._operator(input, *self._parameters, *arguments)
            call, node = CpuCall(n, record), None
        else:
            forward = RecordedForward(self._kernels, *self._rules, self._operator, arguments)
            y = normalize_by_kernels(forward, input, *self._parameters)
            record = forward.statistics
            call, node = RecordedCall(n, record), y.grad_fn
        if undo is not None:
            undo.add_written()
        calls.remember(call, node)
        return y, record
