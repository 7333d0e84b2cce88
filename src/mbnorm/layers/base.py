"""The forward of every layer with a memory: torch's batch norm around the blended operator."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from mbnorm.averages import CUMULATIVE, InferenceAverages, InferenceUpdate, commit
from mbnorm.backends import cpu, triton
from mbnorm.blend import statistics_dtype
from mbnorm.functional import (
    Backend,
    BlendedBatchNorm,
    blended_batch_norm,
    choose,
    in_dtype,
)
from mbnorm.layers.prepared import PreparedForward, Remembered
from mbnorm.layers.state import StatefulBatchNorm
from mbnorm.memory import Memory, Past
from mbnorm.recompute import (
    Call,
    Node,
    in_backward,
    refuse_unknown_recompute,
    saved_by_compiled_code,
    transforms_run,
    unseen_by_selective_checkpoints,
)

FUSED: dict[str, ModuleType] = {"cpu": cpu, "triton": triton}
"""The backends whose kernels read and commit, too."""

REFERENCE_BATCH = 32
"""Batch size at which ``momentum`` is the weight of one batch in the averages of moments."""


class HistoryBatchNorm(StatefulBatchNorm):
    """Base of the layers: everything but what the memory is and how the averages for inference move."""

    def _read(self, n: int) -> Past:
        """Return what a batch of ``n`` values per channel is blended with."""
        raise NotImplementedError

    def _inference_update(self, m: int) -> InferenceUpdate:
        """Return what a forward of ``m`` samples puts into the averages for inference."""
        raise NotImplementedError

    def _how_read(self, n: int) -> tuple[Tensor | float, ...]:
        """Return what tells the kernels how a batch of ``n`` values per channel reads the memory."""
        raise NotImplementedError

    def _as_kernels_take(self, memory: Memory) -> tuple[Tensor | None, ...]:
        """Return the tensors of a memory as the kernels' operators take them."""
        return memory

    def _fused_operator(self, kernels: ModuleType) -> Callable[..., Any]:
        """Return the operator of ``kernels`` that reads, normalizes and commits."""
        raise NotImplementedError

    def _commit_fused(self, *arguments: Any) -> None:
        """Read, blend and commit in one operator of the CPU kernels."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` as in `torch.nn.BatchNorm2d`; in train mode with the memory's help."""
        if not torch.compiler.is_compiling():
            prepared: PreparedForward | None = self.__dict__.get("_prepared")
            if prepared is not None and prepared.fits(self, input):
                return prepared.run(self, input)[0]
            if torch._C._len_torch_dispatch_stack() and self.training and self.has_memory:
                with unseen_by_selective_checkpoints():
                    return self._forward(input)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._leaf_of(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not (self.training and self.has_memory):
            return self._plain_batch_norm(input)
        if self._is_exported():
            raise RuntimeError(
                f"{type(self).__name__} is exported in eval mode: a graph of train mode would have today's "
                "memory in it for ever. Call model.eval() first"
            )
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels, got an input of shape {tuple(input.shape)}"
            )
        m = input.shape[0]
        n = m * math.prod(input.shape[2:])
        if n == 1 and not self._has_past():
            # one value has no variance: torch says so in its own words
            return self._plain_batch_norm(input)
        backend = choose(input, self.backend)
        if torch.compiler.is_compiling():
            from mbnorm.tracing import in_eager_mode, unsafe_to_compile

            if reason := unsafe_to_compile():
                # the backward would read the memory as it is after the forward
                torch._dynamo.graph_break(msg=reason)
                y: Tensor = in_eager_mode(HistoryBatchNorm._forward, self, input)
                return y
            result = self._blend(input, saved_by_compiled_code(self._read(n)), backend)
        else:
            if repeated := self._repeat(input, n, backend):
                return repeated.y
            kernels = FUSED.get(backend)
            if kernels is not None and n > 0 and self._fuses(input):
                stores = self.stores
                return self._run_fused(kernels, input, n, logs=stores, stores=stores)[0]
            self._calls.drop_done()
            past = self._read(n)
            result, node = self._blend_watched(input, past, backend)
            self._calls.remember(Call(n, result[1:], past), node)
        if n > 0 and self.stores:
            self._commit(result, n, m)
        return result.y

    def _is_exported(self) -> bool:
        """Whether a graph is made of this forward that outlives the process."""
        if not torch.compiler.is_compiling():
            return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
        from mbnorm.tracing import exports

        return bool(exports())

    def _leaf_of(self, input: Proxy) -> Tensor:
        """Return what torch.fx notes of torch's own layers: one call of a module, in both modes."""
        name = input.tracer.path_of_module(self)  # type: ignore[attr-defined]
        return cast(Tensor, input.tracer.create_proxy("call_module", name, (input,), {}))

    def _fuses(self, input: Tensor) -> bool:
        """Whether the kernels that read and commit take the state as it is for such an input."""
        state = self._buffers["running_mean"]
        return state is not None and state.dtype == statistics_dtype(input.dtype)

    def _run_fused(
        self, kernels: ModuleType, input: Tensor, n: int, *, logs: bool, stores: bool
    ) -> Remembered:
        """Read the memory, normalize, and store or not; ``logs`` notes the state before for `undo`."""
        prepared = PreparedForward(self, kernels, input, n, logs=logs, stores=stores)
        # past Module's own way, which looks for parameters and is slow
        self.__dict__["_prepared"] = prepared if n > 1 and prepared.lasts and self._repeats() else None
        return prepared.run(self, input)

    def _repeats(self) -> bool:
        """Whether the next forward of the same kind needs nothing but the kernels."""
        return True

    def _fused_update(self, m: int) -> tuple[bool, bool, float, bool, float]:
        """Return what tells the kernels what goes into the averages for inference."""
        blended, unbiased, new_weight, rule, early = self._update(m)
        return blended, unbiased, new_weight, rule == "pooled", early

    def _parameters_for(self, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dtype = statistics_dtype(input.dtype)
        return in_dtype(self._parameter("weight"), dtype), in_dtype(self._parameter("bias"), dtype)

    def _parameter(self, name: str) -> Tensor | None:
        # the dictionary itself: attributes of modules are slow; a parametrized one is a property
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _blend(
        self, input: Tensor, past: Past, backend: Backend, weight: Tensor | None = None
    ) -> BlendedBatchNorm:
        return blended_batch_norm(
            input,
            self.weight if weight is None else weight,
            self.bias,
            *past,
            variance=self.variance,
            eps=self.eps,
            backend=backend,
        )

    def _blend_watched(
        self, input: Tensor, past: Past, backend: Backend
    ) -> tuple[BlendedBatchNorm, Node | None]:
        """Return the operator's result, and the node that its backward pass comes through last."""
        if backend != "traceable":
            result = self._blend(input, past, backend)
            return result, result.y.grad_fn
        # many nodes: put one of their own in front of them all
        if input.requires_grad or self.weight is None:
            input = input.view_as(input)
            return self._blend(input, past, backend), input.grad_fn
        weight = self.weight.view_as(self.weight)
        result = self._blend(input, past, backend, weight)
        return result, weight.grad_fn or result.y.grad_fn

    def _repeat(self, input: Tensor, n: int, backend: Backend) -> BlendedBatchNorm | None:
        """Do a forward again as it was, if this is a recompute: read what it had read, store nothing."""
        log = self._calls
        if log.script is not None:
            call = next(log.script)
        elif not in_backward():
            return None
        else:
            candidates = log.likeliest(n)
            if len(candidates) > 1:
                # without a graph: what is saved for the backward must be saved as often as in the forward
                with torch.no_grad():
                    probe = self._blend(input, candidates[0].past, backend)
                candidates = [c for c in candidates if c.is_of(probe.batch_mean, probe.batch_var)]
            if not candidates:
                refuse_unknown_recompute()
                return None
            call = candidates[0]
        result, node = self._blend_watched(input, call.past, backend)
        if log.script is None and not call.is_of(result.batch_mean, result.batch_var):
            refuse_unknown_recompute()
            return None
        log.note(call, node)
        return result

    def _plain_batch_norm(self, input: Tensor) -> Tensor:
        mean, var = self._running()
        dtype = statistics_dtype(input.dtype) if mean is None else mean.dtype
        of_the_batch = self.training or mean is None or var is None
        if of_the_batch:
            mean = var = None
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch._C._is_tracing():
            # copies for the backward: a training forward may come before that, and writes in place
            mean, var = cast(Tensor, mean).clone(), cast(Tensor, var).clone()
        return F.batch_norm(
            input,
            mean,
            var,
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            of_the_batch,
            0.0,
            self.eps,
        )

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean and variance of eval mode."""
        return self.running_mean, self.running_var

    def _has_past(self) -> bool:
        """Whether the memory holds something to read; asks the device until the answer is yes."""
        if torch.compiler.is_compiling():
            return True
        if not self._holds_past and self.memory_device.type != "meta":
            self._holds_past = bool(self._memory().holds_anything())
        return self._holds_past

    @property
    def tracks(self) -> bool:
        """Whether forwards are stored as the layer is set: in train mode and not frozen by its momentum."""
        return (
            self.training
            and self.track_running_stats
            and self._buffers["running_mean"] is not None
            and self.momentum != 0
        )

    @property
    def stores(self) -> bool:
        """Whether a forward now would be stored."""
        return self.tracks and not self._frozen

    def _update(self, m: int) -> InferenceUpdate:
        # update_bn and PreciseBN set these to read the raw statistics of each batch
        if self.momentum is None:
            return CUMULATIVE
        if self.momentum == 1:
            return InferenceUpdate(False, True, 1.0, "averaged")
        return self._inference_update(m)

    @torch.no_grad()
    def _commit(self, result: BlendedBatchNorm, n: int, m: int) -> None:
        # state that is given for a function transform is not the layer's own
        if self._undo is not None and not (torch.compiler.is_compiling() or transforms_run()):
            self._undo.append(self.snapshot())
        self._store(self._memory(), self._averages(), result, n, m)

    def _store(
        self,
        memory: Memory,
        averages: InferenceAverages,
        result: BlendedBatchNorm,
        n: int,
        m: int,
    ) -> None:
        batch, blended = (result.batch_mean, result.batch_var), (result.mean, result.var)
        commit(memory, averages, batch, blended, n, self._update(m))


def moments_update(momentum: float, m: int, early: float = 0.0) -> InferenceUpdate:
    """Return the update of averages of moments by a batch of ``m`` samples, its weight in proportion."""
    return InferenceUpdate(False, False, 1 - (1 - momentum) ** (m / REFERENCE_BATCH), "pooled", early)
