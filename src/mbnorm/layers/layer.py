"""The layer: torch's batch norm around the blended operator, with a memory that says what is blended in."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.averages import InferenceAverages, commit
from mbnorm.backends import aten_memory, cpu, triton
from mbnorm.blend import ruled, statistics_dtype
from mbnorm.distributed import PooledPast, ProcessGroup, Sync
from mbnorm.functional import (
    BACKENDS,
    Backend,
    Chosen,
    Rows,
    choose,
    compiled_record,
    differentiated_in_other_ways,
    in_dtype,
    normalize,
    normalize_compiled,
    transforms_run,
)
from mbnorm.gradient import GRADIENT_BUFFERS, Gradient, RememberedGradient, check_gradient
from mbnorm.layers import seal
from mbnorm.layers.prepared import PreparedForward
from mbnorm.layers.seal import SEAL, Seal
from mbnorm.layers.sharing import Sharing
from mbnorm.layers.state_dict import fit_state_dict, options_written
from mbnorm.leaves import leaf_of
from mbnorm.memories.memory import CUMULATIVE, RAW, InferenceUpdate, Memory, Past, State
from mbnorm.recompute import (
    Call,
    CallLog,
    Node,
    in_backward,
    refuse_unknown_recompute,
    unseen_by_selective_checkpoints,
)
from mbnorm.values import has_values, is_trained

FUSED: dict[str, ModuleType] = {"cpu": cpu, "triton": triton}
"""The backends whose kernels read and commit, too."""


class Snapshot(NamedTuple):
    """The state of a layer before a forward, valid until that state is reset or loaded."""

    resets: int
    averages: tuple[Tensor, ...]
    memory: State


class HistoryBatchNorm(_BatchNorm):
    """A batch norm that has a memory beside its running averages.

    Its buffers are torch's, the memory's, and num_batches_skipped. A subclass has a constructor with the
    options of one kind of memory, and nothing else.
    """

    _version = 3  # 2 is torch's; at 3 the memory's buffers were added
    memory_type: ClassVar[type[Memory]]
    settings: ClassVar[tuple[str, ...]] = (
        "training",
        "track_running_stats",
        "momentum",
        "eps",
        "memory",
        "backend",
        "_gradient",
        "_frozen",
        "_sharing",
    )
    """Attributes that decide how a forward goes."""
    memory: Memory
    num_batches_skipped: Tensor
    memory_seal: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: Any,
        dtype: Any,
        bias: bool,
        memory: Memory,
        backend: Backend,
        process_group: ProcessGroup,
        sync: Sync,
        gradient: Gradient,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            # torch takes this keyword since 2.13 only
            self.register_parameter("bias", None)
        self.set_up(memory, backend=backend, process_group=process_group, sync=sync, gradient=gradient)

    # how it is made, and made a torch layer again

    def set_up(
        self,
        memory: Memory,
        *,
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
        gradient: Gradient = "exact",
    ) -> None:
        """Start with an empty memory; also turns a batch norm into one of ours."""
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        check_gradient(gradient, sync)
        self._sharing = Sharing.among(process_group, sync, backend)
        self.memory = memory
        self.backend: Backend = backend
        self._gradient: Gradient = gradient
        self._frozen = 0
        self._resets = 0
        self._holds_past = False
        # nothing was stored in the memory
        self._is_new = True
        self._calls = CallLog()
        self._prepared: PreparedForward | None = None
        # set where conversion or a schedule changes it, for the way back
        self.torchs_momentum: float | None = None
        self._make_memory()

    # outside of it: what is made in inference mode can never be trained
    @torch.inference_mode(False)
    def _make_memory(self) -> None:
        """Register an empty memory; none without running statistics."""
        memory, mean, var = self.memory, self.running_mean, self.running_var
        if mean is None or var is None:
            for name in self.own_buffers:
                self.register_buffer(name, None)
        else:
            dtype = statistics_dtype(mean.dtype)
            self.running_mean, self.running_var = mean.to(dtype), var.to(dtype)
            for name, tensor in zip(memory.buffers, memory.new(self.running_mean), strict=True):
                self.register_buffer(name, tensor, persistent=name not in memory.rebuilt)
            for name in self._gradient_buffers:
                self.register_buffer(name, torch.zeros_like(self.running_mean))
            zero = torch.zeros((), device=mean.device, dtype=torch.int64)
            if self.num_batches_tracked is None:
                self.num_batches_tracked = zero
            self.register_buffer("num_batches_skipped", zero.clone())
            self.register_buffer(SEAL, torch.zeros_like(seal.sample_of(memory, self._buffers)))
        self.seal = Seal(self)

    def _take_given_statistics(self) -> None:
        """Start a memory from running statistics that were given to a layer that was made without."""
        mean, var = self.running_mean, self.running_var
        is_without = self._buffers.get(self.memory.buffers[0]) is None
        if is_without and self.track_running_stats and mean is not None and var is not None:
            self._make_memory()
            if is_trained(mean, var):
                self.seed()

    def tear_down(self) -> None:
        """Remove all that `set_up` added."""
        self.settle()
        if self.torchs_momentum is not None:
            self.momentum = self.torchs_momentum
        for name in (
            *self.own_buffers,
            "seal",
            "memory",
            "backend",
            "_gradient",
            "_sharing",
            "_frozen",
            "_resets",
            "_holds_past",
            "_is_new",
            "_calls",
            "_prepared",
            "torchs_momentum",
        ):
            delattr(self, name)

    def share_with(self, process_group: ProcessGroup, sync: Sync = True) -> None:
        """Share the memory with other ranks from now on, or with none; all must hold the same one."""
        check_gradient(self.gradient, sync)
        self.settle()
        self._sharing = Sharing.among(process_group, sync, self.backend)

    @property
    def gradient(self) -> Gradient:
        """Which gradient the backward pass has."""
        return self._gradient

    @property
    def process_group(self) -> ProcessGroup:
        """The ranks that share statistics with this one: a group, "world", or None."""
        return None if self._sharing is None else self._sharing.process_group

    @property
    def sync(self) -> Sync:
        """How they share them."""
        return True if self._sharing is None else self._sharing.sync

    # its state

    @property
    def own_buffers(self) -> tuple[str, ...]:
        """The buffers that torch's batch norm has not."""
        return (*self.memory.buffers, *self._gradient_buffers, "num_batches_skipped", SEAL)

    @property
    def _gradient_buffers(self) -> tuple[str, ...]:
        return GRADIENT_BUFFERS if self._gradient == "remembered" else ()

    @property
    def has_memory(self) -> bool:
        """Whether there are running statistics and a memory: not with ``track_running_stats=False``."""
        buffers = self._buffers
        return (
            buffers.get(self.memory.buffers[0]) is not None
            and buffers["running_mean"] is not None
            and buffers["running_var"] is not None
        )

    @property
    def memory_device(self) -> torch.device:
        """Where the memory lives."""
        return cast(Tensor, self._buffers[self.memory.buffers[0]]).device

    @property
    def state(self) -> State:
        """The memory's buffers."""
        # the dictionary itself: attributes of modules are slow
        buffers: dict[str, Any] = self._buffers
        return tuple([buffers[name] for name in self.memory.buffers])

    @property
    def averages(self) -> InferenceAverages:
        """The buffers of the averages for inference."""
        buffers: dict[str, Any] = self._buffers
        return InferenceAverages(
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
            buffers["num_batches_skipped"],
        )

    def settle(self) -> None:
        """Commit the batch that is late, if ranks share one, waiting for their part of it."""
        if self._sharing is not None:
            self._sharing.settle(self)

    def snapshot(self) -> Snapshot:
        """Return the state of this layer, for `rewind`."""
        self.settle()
        # others may have cut its channels: what is taken now must be what the forward will change
        self._settle_buffers()
        return Snapshot(self._resets, self.averages.snapshot(), self.memory.snapshot(self.state))

    def is_void(self, snapshot: Snapshot) -> bool:
        """Return whether the state was reset, loaded or torn down since a snapshot."""
        return not self.has_memory or snapshot.resets != self._resets

    @torch.no_grad()
    def rewind(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; without effect if that is void."""
        if not self.is_void(snapshot):
            self._drop_late()
            averages = self.averages
            _, _, batches, _ = snapshot.averages
            self.memory.rewind(self.state, snapshot.memory, averages.batches - batches)
            averages.rewind(snapshot.averages)
            self._holds_past = False

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Take back a rewind, and what was stored after it."""
        self._drop_late()
        self.averages.rewind(snapshot.averages)
        self.memory.restore(self.state, snapshot.memory)

    @torch.no_grad()
    def seed(self, batches: float | None = None) -> None:
        """Start the memory from running_mean and running_var, as after loading a trained batch norm.

        Args:
            batches: how many these statistics stand for; None asks num_batches_tracked.
        """
        if self.has_memory:
            mean, var, tracked, _ = self.averages
            self.memory.seed(self.state, mean, var, tracked if batches is None else batches)
            self._is_new = False
            self.forget_answers()

    def forget_answers(self) -> None:
        """Forget what was concluded from a state that is another now."""
        self._drop_late()
        self.void_what_is_pending()
        self.forget_past()

    def void_what_is_pending(self) -> None:
        """Let no snapshot be rewound to, and no backward pass of the forwards so far write."""
        self._resets += 1
        self._calls.start_anew()

    def forget_past(self) -> None:
        """Ask the memory again whether it holds something."""
        self._holds_past = False

    def _drop_late(self) -> None:
        if self._sharing is not None:
            self._sharing.drop()

    def reset_running_stats(self) -> None:
        """Reset the averages for inference as torch does, and empty the memory."""
        super().reset_running_stats()
        # torch's constructor calls this before there is a memory
        if "memory" in self.__dict__ and self.has_memory:
            self.memory.clear(self.state)
            for name in self._gradient_buffers:
                cast(Tensor, self._buffers[name]).zero_()
            self.num_batches_skipped.zero_()
            self.memory_seal.zero_()
            self._is_new, self._prepared = True, None
            self.forget_answers()
            self.seal.note(self)

    def reset_parameters(self) -> None:
        """Reset statistics, memory, weight and bias, and what a schedule has changed."""
        self.reset_running_stats()
        if "memory" in self.__dict__:
            self.memory.reset()
            self.rebuild()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HistoryBatchNorm":
        self.settle()
        self._prepared = None
        if sealed := self._settle_buffers():
            self.memory_seal.copy_(seal.sample_of(self.memory, self._buffers))
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            original = before[name]
            if buffer is not None and original is not None and buffer.is_floating_point():
                dtype = statistics_dtype(buffer.dtype)
                if dtype != buffer.dtype:
                    # .half() and .bfloat16() move the state but do not round it
                    self._buffers[name] = original.to(buffer.device, dtype)
        self._rebuild_after(before)
        if self.has_memory and has_values(self.averages.mean):
            # to_empty leaves nothing in them
            seal.check(self, rebuild=not sealed)
        self.seal.note(self)
        return self

    def rebuild(self) -> None:
        """Give the buffers that no checkpoint carries the values that the memory's options say, in place."""
        if self.has_memory and self.memory.rebuilt:
            made = dict(zip(self.memory.buffers, self.memory.new(self.averages.mean), strict=True))
            for name in self.memory.rebuilt:
                cast(Tensor, self._buffers[name]).copy_(made[name])

    def _rebuild_after(self, before: dict[str, Tensor | None]) -> None:
        """Do as `rebuild`, in the present precision, for buffers that nobody had changed ``before``."""
        if not (self.has_memory and self.memory.rebuilt):
            return
        made = dict(zip(self.memory.buffers, self.memory.new(self.averages.mean), strict=True))
        for name in self.memory.rebuilt:
            old, present, new = before[name], self._buffers[name], made[name]
            if old is None or not (has_values(old) and has_values(new)) or torch.equal(old, new.to(old)):
                if present is not None and (present.device, present.dtype) == (new.device, new.dtype):
                    # in place: other processes may share it
                    present.copy_(new)
                else:
                    self._buffers[name] = new

    def _settle_buffers(self) -> bool:
        """Check buffers that came through other hands; return whether there are some to seal."""
        if not (self.has_memory and has_values(self.averages.mean)):
            return False
        seal.settle(self)
        return True

    def train(self, mode: bool = True) -> "HistoryBatchNorm":
        """Set the mode; what a loader has put into the buffers is checked then, too."""
        # torch's constructor of a module calls no mode, but a subclass's may
        if "seal" in self.__dict__ and not torch.compiler.is_compiling():
            self._take_given_statistics()
            if self.has_memory:
                seal.settle(self)
                seal.look_into_new(self)
        super().train(mode)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        sealed = self._settle_buffers()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        given = self._late_buffers()
        if sealed:
            given[SEAL] = seal.sample_of(self.memory, {**self._buffers, **given})
        destination.update((prefix + name, tensor) for name, tensor in given.items())
        # beside the version, so that the keys stay as they are
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["options"] = options_written(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        fit_state_dict(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.has_memory:
            if has_values(self.averages.mean):
                seal.check(self, rebuild=False)
                self.seal.note(self)
            self.forget_answers()

    def _late_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers that a late batch will change, as they will be."""
        if self._sharing is None or self._sharing.late is None:
            return {}
        state, averages = self._sharing.seen(self)
        torchs = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")
        tensors = zip((*self.memory.buffers, *torchs), (*state, *averages), strict=True)
        return {name: tensor.clone() for name, tensor in tensors if name not in self.memory.rebuilt}

    def __getstate__(self) -> dict[str, Any]:
        self._settle_buffers()
        return {
            **self.__dict__,
            "_buffers": {**self._buffers, **self._late_buffers()},
            "_calls": CallLog(),
            "_prepared": None,
            "_frozen": 0,
            "seal": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.seal = Seal(self)

    def _replicate_for_data_parallel(self) -> "HistoryBatchNorm":
        """Return what torch's DataParallel runs in a thread: it shares no log with the others."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        log = CallLog()
        # on the first device its buffers are the layer's own
        log.era = self._calls.era
        replica.__dict__.update(_calls=log, _prepared=None)
        return cast(HistoryBatchNorm, replica)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffers that remember, for the forward and for the backward."""
        if not self.has_memory:
            return 0
        remembered = (*self.state, *(cast(Tensor, self._buffers[name]) for name in self._gradient_buffers))
        return sum(t.numel() * t.element_size() for t in remembered)

    def extra_repr(self) -> str:
        """Return torch's description, the memory's options and size, and who shares it."""
        torchs = super().extra_repr()  # type: ignore[no-untyped-call]
        gradient = ", gradient=remembered" if self.gradient == "remembered" else ""
        own = f"{self.memory.describe()}{gradient}, backend={self.backend}, memory={self.memory_bytes} bytes"
        if self._sharing is None:
            return f"{torchs}, {own}"
        ranks = "world" if self.process_group == "world" else "given"
        return f"{torchs}, {own}, process_group={ranks}, sync={self.sync}"

    # its forward

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` as in `torch.nn.BatchNorm2d`; in train mode with the memory's help."""
        if not torch.compiler.is_compiling():
            prepared: PreparedForward | None = self.__dict__.get("_prepared")
            if prepared is not None and prepared.fits(self, input):
                return prepared.run(self, input)
            if torch._C._len_torch_dispatch_stack() and self.training and self.has_memory:
                with unseen_by_selective_checkpoints():
                    return self._forward(input)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf_of(self, input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if self.training and not (self.has_memory or torch.compiler.is_compiling()):
            self._take_given_statistics()
        if not (self.training and self.has_memory):
            return self._plain_batch_norm(input)
        if self._is_exported():
            raise RuntimeError(
                f"{type(self).__name__} is exported in eval mode only: a graph of train mode would bake the "
                "current memory into the graph. Call model.eval() first"
            )
        # not num_features: who cuts channels by hand may leave it
        channels = self.averages.mean.shape[-1]
        if input.shape[1] != channels:
            raise ValueError(f"expected {channels} channels, got an input of shape {tuple(input.shape)}")
        if torch.compiler.is_compiling():
            return self._forward_compiled(input)
        return self._forward_eager(input)

    def _forward_compiled(self, input: Tensor) -> Tensor:
        from mbnorm.tracing import in_eager_mode, traces_derivatives, unsafe_to_compile

        # torch.compile cannot trace collectives on the way to a memory
        reason = unsafe_to_compile() if self._sharing is None else "process_group= needs eager mode"
        if not seal.is_cut_alike(self):
            reason = "channels were cut: the memory starts anew in eager mode"
        if reason:
            torch._dynamo.graph_break(msg=reason)
            y: Tensor = in_eager_mode(HistoryBatchNorm._forward_eager, self, input)
            return y
        n, m = _values_per_channel(input), input.shape[0]
        past, rule = self.read(n, m), self.memory.variance_rule
        gradient = None if traces_derivatives() else self.remembered_gradient()
        if gradient is None or n == 0:
            y, rows = self.blend(input, past, "traceable")
            if n > 0 and self.stores:
                self.store(rows, n, m)
            return y
        record = compiled_record(input, *past, rule)
        # before the output: torch computes again in the backward what is near, and saves what is far
        if self.stores:
            self.store(record, n, m)
        return normalize_compiled(input, self.weight, self.bias, record, rule, self.eps, gradient)

    def _forward_eager(self, input: Tensor) -> Tensor:
        if not (transforms_run() or in_backward() or getattr(self, "_is_replica", False)):
            seal.settle(self)
            if self._is_new and self.stores:
                seal.look_into_new(self)
                self._is_new = False
            self.seal.behind = True
        if torch.is_grad_enabled() and self.stores:
            self.memory.before_training(self.state)
        if self._sharing is not None:
            group = self._sharing.group()
            if group is not None:
                return self._sharing.forward(self, input, _values_per_channel(input), group)
            # the other ranks may be gone since the last forward
            self.settle()
        return self.forward_alone(input)

    def forward_alone(self, input: Tensor) -> Tensor:
        """Normalize with the batch of this process; read the memory and store."""
        n = _values_per_channel(input)
        if n == 1 and not self.has_past():
            # one value has no variance: torch says so in its own words
            return self._plain_batch_norm(input)
        backend = choose(input, self.backend)
        if (repeated := self.repeat(input, n, backend)) is not None:
            return repeated
        if n > 0 and (kernels := self.fused_kernels(input, backend)) is not None:
            prepared = self.prepare(kernels, input, n, stores=self.stores)
            # past Module's own way, which looks for parameters and is slow
            self.__dict__["_prepared"] = (
                prepared if n > 1 and self._sharing is None and prepared.lasts(self) else None
            )
            return prepared.run(self, input)
        self._calls.drop_done()
        past = self.read(n, input.shape[0])
        gradient = self.remembered_gradient()
        y, rows, node = self.blend_watched(input, past, backend, gradient)
        self._calls.remember(Call(n, rows, past, gradient), node)
        if n > 0 and self.stores:
            self.store(rows, n, input.shape[0])
        return y

    def _is_exported(self) -> bool:
        """Whether a graph is made of this forward that outlives the process."""
        if not torch.compiler.is_compiling():
            return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
        from mbnorm.tracing import exports

        return bool(exports())

    def fused_kernels(self, input: Tensor, backend: Chosen) -> ModuleType | None:
        """Return the kernels that read and commit as well, if there are any for this memory and input."""
        state = self._buffers["running_mean"]
        if self.memory.kernels is None or state is None or state.dtype != statistics_dtype(input.dtype):
            return None
        if backend == "aten":
            return aten_memory if input.device.type == "cpu" and triton.is_plain(input) else None
        return FUSED.get(backend)

    def prepare(self, kernels: ModuleType, input: Tensor, n: int, *, stores: bool) -> PreparedForward:
        """Put together what the fused kernels take for a batch of ``n`` values per channel."""
        return PreparedForward(self, kernels, input, n, stores=stores)

    def parameters_for(self, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias in the dtype of the statistics of ``input``."""
        dtype = statistics_dtype(input.dtype)
        return in_dtype(self._parameter("weight"), dtype), in_dtype(self._parameter("bias"), dtype)

    def _parameter(self, name: str) -> Tensor | None:
        # the dictionary itself: attributes of modules are slow; a parametrized one is a property
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def read(self, n: int, m: int) -> Past:
        """Return what a batch of ``m`` samples with ``n`` values per channel is blended with."""
        return self.memory.read(self.state, n, m)

    def remembered_gradient(self) -> RememberedGradient | None:
        """Return what the backward passes of a forward now will read and write, if anything."""
        if self._gradient == "exact":
            return None
        mean, scale = (cast(Tensor, self._buffers[name]) for name in GRADIENT_BUFFERS)
        return RememberedGradient(mean, scale, stores=self.stores, era=self._calls.era)

    def blend(
        self,
        input: Tensor,
        past: Past | PooledPast,
        backend: Chosen,
        gradient: RememberedGradient | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Rows]:
        """Normalize a batch; return the output and a record, of this rank's part if others have one."""
        weight = self.weight if weight is None else weight
        rules = self.memory.variance_rule, self.eps
        if isinstance(past, PooledPast):
            return past.normalize(input, weight, self.bias, *rules, gradient)
        return normalize(input, weight, self.bias, *past, *rules, backend, gradient)

    def blend_watched(
        self,
        input: Tensor,
        past: Past | PooledPast,
        backend: Chosen,
        gradient: RememberedGradient | None = None,
    ) -> tuple[Tensor, Rows, Node | None]:
        """Return output and record, and the node that the backward pass comes through last."""
        if differentiated_in_other_ways():
            gradient = None
        if backend != "traceable" or gradient is not None:
            y, rows = self.blend(input, past, backend, gradient)
            return y, rows, y.grad_fn
        # many nodes: put one of their own in front of them all
        if input.requires_grad or self.weight is None:
            input = input.view_as(input)
            y, rows = self.blend(input, past, backend)
            return y, rows, input.grad_fn
        weight = self.weight.view_as(self.weight)
        y, rows = self.blend(input, past, backend, weight=weight)
        return y, rows, weight.grad_fn or y.grad_fn

    def repeat(self, input: Tensor, n: int, backend: Chosen) -> Tensor | None:
        """Do a forward again as it was, if this is a recompute: read what it had read, store nothing."""
        log = self._calls
        if log.script is not None:
            call = next(log.script)
        elif not in_backward():
            return None
        else:
            candidates = log.likeliest(n)
            # under "traceable" torch may stop a recompute before its last comparison, below
            if len(candidates) > 1 or backend == "traceable":
                # without a graph: what is saved for the backward must be saved as often as in the forward
                with torch.no_grad():
                    _, probe = self.blend(input, candidates[0].past, backend)
                candidates = [c for c in candidates if c.is_of(probe)]
            if not candidates:
                refuse_unknown_recompute()
                return None
            call = candidates[0]
        y, rows, node = self.blend_watched(input, call.past, backend, call.gradient)
        if log.script is None and not call.is_of(rows):
            refuse_unknown_recompute()
            return None
        log.note(call, node)
        return y

    def _plain_batch_norm(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self._sharing is not None and self._sharing.late is not None:
            _, (mean, var, _, _) = self._sharing.seen(self)
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

    def has_past(self) -> bool:
        """Whether the memory has statistics with a weight; asks the device until the answer is yes."""
        if torch.compiler.is_compiling():
            return True
        state = self.state
        if not self._holds_past and all(has_values(t) for t in state):
            # past statistics with a history weight of 0 are not used
            self._holds_past = self.memory.weighs_past(state) and bool(self.memory.holds_anything(state))
        return self._holds_past

    @property
    def tracks(self) -> bool:
        """Whether forwards are stored as the layer is set: in train mode and not frozen by its momentum."""
        return self.training and self.track_running_stats and self.has_memory and self.momentum != 0

    @property
    def stores(self) -> bool:
        """Whether a forward now would be stored."""
        return self.tracks and not self._frozen

    def update_for(self, m: int, momentum: float | None) -> InferenceUpdate:
        """Return what a forward of ``m`` samples puts into the averages for inference."""
        # update_bn and PreciseBN set these to read the raw statistics of each batch
        if momentum is not None and momentum != 1:
            return self.memory.update(momentum, m)
        raw = CUMULATIVE if momentum is None else RAW
        # a mean square has no bias
        return raw if self.memory.subtract_mean else raw._replace(unbiased=False)

    def store(self, rows: Rows, n: int, m: int) -> None:
        """Store a forward of ``n`` values per channel and ``m`` samples."""
        batch, blended = (rows[0], rows[1]), (rows[2], rows[3])
        commit(self.memory, self.state, self.averages, batch, blended, n, self.update_for(m, self.momentum))


def statistics_for(layer: _BatchNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a batch norm normalizes values with whose mean and variance are given."""
    return (
        ruled(mean, var, layer.memory.variance_rule) if isinstance(layer, HistoryBatchNorm) else (mean, var)
    )


def _values_per_channel(input: Tensor) -> int:
    return int(input.shape[0] * math.prod(input.shape[2:]))
