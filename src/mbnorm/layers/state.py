"""The state of a layer with a memory: how it is made, moved, saved, loaded, reset and taken back."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.averages import InferenceAverages
from mbnorm.blend import VARIANCES, Variance, statistics_dtype
from mbnorm.functional import BACKENDS, Backend
from mbnorm.layers.prepared import PreparedForward
from mbnorm.layers.undo import UNDO_DEPTH, Snapshot, UndoLog, Written
from mbnorm.memory import Memory
from mbnorm.recompute import CallLog


class StatefulBatchNorm(_BatchNorm):
    """A batch norm with a memory beside its running averages.

    A subclass names its memory's buffers, its options, and those of them that a checkpoint carries along for
    the layer that loads it to compare, and defines the methods that raise here.
    """

    _version = 3  # 2 is torch's; at 3 the memory's buffers were added
    memory_buffers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    written_options: tuple[str, ...] = ()
    settings: tuple[str, ...] = (
        "training",
        "track_running_stats",
        "momentum",
        "eps",
        "variance",
        "backend",
        "_frozen",
        "_undo",
    )
    """Attributes that decide how a forward goes."""
    num_batches_skipped: Tensor

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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            # torch takes this keyword since 2.13 only
            self.register_parameter("bias", None)

    def _set_up_history(self, variance: Variance, backend: Backend) -> None:
        """Set the options that all layers have, and add the memory's buffers."""
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {VARIANCES}, got {variance!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.variance: Variance = variance
        self.backend: Backend = backend
        self._frozen = 0
        self._resets = 0
        self._holds_past = False
        self._undo: UndoLog | None = UndoLog()
        self._calls = CallLog()
        self._prepared: PreparedForward | None = None
        # set where conversion or a schedule changes it, for the way back
        self.torchs_momentum: float | None = None
        if self.running_mean is None or self.running_var is None:
            for name in self._own_buffers:
                self.register_buffer(name, None)
            return
        dtype = statistics_dtype(self.running_mean.dtype)
        self.running_mean = self.running_mean.to(dtype)
        self.running_var = self.running_var.to(dtype)
        memory = self._new_memory(self.running_mean)
        skipped = torch.zeros((), device=self.running_mean.device, dtype=torch.int64)
        for name, buffer in zip(self._own_buffers, (*memory, skipped), strict=True):
            self.register_buffer(name, buffer)
        memory.clear()

    def set_up(self, *_: Any, **options: Any) -> None:
        """Check and set the options, and start with an empty memory; also turns a batch norm into ours."""
        raise NotImplementedError

    def tear_down(self) -> None:
        """Remove all that `set_up` added."""
        own = (
            "variance",
            "backend",
            "_frozen",
            "_resets",
            "_holds_past",
            "_undo",
            "_calls",
            "_prepared",
            "torchs_momentum",
        )
        if self.torchs_momentum is not None:
            self.momentum = self.torchs_momentum
        for name in (*own, *self._own_buffers, *self.options):
            delattr(self, name)

    def has_options(self, options: dict[str, Any]) -> bool:
        """Return whether the layer was set up with these."""
        return all(getattr(self, name) == value for name, value in options.items())

    @property
    def _own_buffers(self) -> tuple[str, ...]:
        """The buffers that torch's batch norm has not."""
        return (*self.memory_buffers, "num_batches_skipped")

    def _new_memory(self, like: Tensor) -> Memory:
        """Return an uninitialized memory on the device and in the dtype of ``like``."""
        raise NotImplementedError

    def _memory(self) -> Memory:
        """Return the memory made of this layer's buffers."""
        raise NotImplementedError

    def _averages(self) -> InferenceAverages:
        # the dictionary itself: attributes of modules are slow
        buffers: dict[str, Any] = self._buffers
        return InferenceAverages(
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
            buffers["num_batches_skipped"],
        )

    @property
    def has_memory(self) -> bool:
        """Whether this layer has a memory: not if it was built with ``track_running_stats=False``."""
        return self._buffers.get(self.memory_buffers[0]) is not None

    @property
    def memory_device(self) -> torch.device:
        """Where the memory lives."""
        return cast(Tensor, self._buffers[self.memory_buffers[0]]).device

    def snapshot(self) -> Snapshot:
        """Return the state of this layer, for `rewind`."""
        return Snapshot(self._resets, self._averages().snapshot(), self._memory().snapshot())

    def is_void(self, snapshot: Snapshot) -> bool:
        """Return whether the state was reset, loaded or torn down since a snapshot."""
        return not self.has_memory or snapshot.resets != self._resets

    @torch.no_grad()
    def rewind(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; without effect if that is void."""
        if not self.is_void(snapshot):
            self._averages().rewind(snapshot.averages)
            self._memory().rewind(snapshot.memory)
            self._holds_past = False

    def _as_snapshot(self, state: Written) -> Snapshot:
        channels = self.num_features
        past_mean, past_var, *running = state.numbers[: 4 * channels].view(4, channels)
        *counters, own = state.counters
        memory = self._memory_before(past_mean, past_var, own, state.numbers[4 * channels :])
        return Snapshot(self._resets, (*running, *counters), memory)

    def _memory_before(
        self, past_mean: Tensor, past_var: Tensor, counter: Tensor, more: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the memory's snapshot from what was read of it, its counter, and its further numbers."""
        raise NotImplementedError

    def _more_numbers(self) -> int:
        """How many numbers the memory's snapshot has beside a mean and a variance."""
        return 0

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Take back a rewind, and what was stored after it."""
        self._averages().rewind(snapshot.averages)
        self._memory().restore(snapshot.memory)

    def check_undo(self, calls: int) -> None:
        """Refuse an `undo` that is not possible.

        Raises:
            RuntimeError: more calls than were seen, or than `UNDO_DEPTH`.
        """
        known = len(self._undo or ())
        if calls > known:
            raise RuntimeError(
                f"cannot take back {calls} training forward(s) of a {type(self).__name__} that has seen "
                f"{known} since its state began (it knows {UNDO_DEPTH} at most, and none that ran "
                "compiled): attach DoubleForward before training"
            )

    def undo(self, calls: int) -> None:
        """Take back the last ``calls`` forwards that stored something."""
        if self._undo and calls:
            state = self._undo.before(calls)
            self.rewind(state if isinstance(state, Snapshot) else self._as_snapshot(state))
            self._undo.clear()

    def start_undo(self) -> None:
        """Keep again what `undo` needs, from now on."""
        self._undo = UndoLog()

    def stop_undo(self) -> None:
        """Keep nothing for `undo` any more: whoever calls this takes snapshots itself."""
        self._undo = None

    def seed(self) -> None:
        """Start the memory from running_mean and running_var, as after loading a trained batch norm."""
        if self.running_mean is not None and self.running_var is not None:
            self._memory().seed(self.running_mean, self.running_var)
            self._forget_past_answers()

    def _forget_past_answers(self) -> None:
        self._holds_past = False
        self._resets += 1
        self._calls.clear()
        if self._undo is not None:
            self._undo.clear()

    def reset_running_stats(self) -> None:
        """Reset the averages for inference as torch does, and empty the memory."""
        super().reset_running_stats()
        # torch's constructor calls this before there is a memory
        if hasattr(self, "_resets") and self.has_memory:
            self._memory().clear()
            self.num_batches_skipped.zero_()
            self._forget_past_answers()

    def reset_parameters(self) -> None:
        """Reset statistics, memory, weight and bias."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StatefulBatchNorm":
        self._prepared = None
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            original = before[name]
            if buffer is not None and original is not None and buffer.is_floating_point():
                dtype = statistics_dtype(buffer.dtype)
                if dtype != buffer.dtype:
                    # .half() and .bfloat16() move the state but do not round it
                    self._buffers[name] = original.to(buffer.device, dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # beside the version, so that the keys stay as they are
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["options"] = {name: _plain(getattr(self, name)) for name in self.written_options}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        self._warn_of_other_options(local_metadata.get("options", {}))
        if self.has_memory:
            names = [prefix + name for name in self._own_buffers]
            version = local_metadata.get("version")
            if (version is None or version < 3) and not any(name in state_dict for name in names):
                own = self._state_from_stock(state_dict, prefix)
                state_dict.update(zip(names, own, strict=True))
            poisoned = []
            for name in ("running_mean", "running_var", *self.memory_buffers):
                value = state_dict.get(prefix + name)
                if isinstance(value, Tensor) and value.is_floating_point():
                    state_dict[prefix + name] = value.to(statistics_dtype(value.dtype))
                    if not all_finite(value):
                        poisoned.append(prefix + name)
            if poisoned:
                warnings.warn(
                    f"not finite in the checkpoint: {', '.join(poisoned)}. Call reset_running_stats() and "
                    "make some training forwards, or every output will be NaN",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.has_memory:
            self._forget_past_answers()

    def _warn_of_other_options(self, written: dict[str, Any]) -> None:
        own = {name: getattr(self, name) for name in self.written_options}
        other = [name for name in own if name in written and written[name] != own[name]]
        if other:
            # the same words for each layer: Python's default filter shows them once
            warnings.warn(
                f"the checkpoint was written with {', '.join(f'{name}={written[name]!r}' for name in other)} "
                f"and is loaded into layers with {', '.join(f'{name}={own[name]!r}' for name in other)}",
                stacklevel=3,
            )

    def _state_from_stock(self, state_dict: dict[str, Any], prefix: str) -> tuple[Tensor, ...]:
        """Return what our buffers become with a checkpoint of torch's own batch norm."""
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if mean is None or var is None:
            # a part of a model that has nothing for the memory
            return (*self._memory(), self.num_batches_skipped)
        own_mean = self._averages().mean
        memory = self._new_memory(mean.to(own_mean.dtype) if own_mean.is_meta else own_mean)
        memory.clear()
        batches = state_dict.get(prefix + "num_batches_tracked")
        # checkpoints older than the counter are trained ones
        trained = batches is None or (not batches.is_meta and bool(batches > 0))
        # what does not fit is for torch's own checks to name
        fits = mean.shape == var.shape == memory.mean.shape[-1:]
        if trained and fits and all_finite(mean, var):
            memory.seed(mean, var)
        return (*memory, torch.zeros((), dtype=torch.int64, device=memory.mean.device))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state |= {"_undo": UndoLog(), "_calls": CallLog(), "_prepared": None, "_frozen": 0}
        return state

    def _replicate_for_data_parallel(self) -> "StatefulBatchNorm":
        """Return what torch's DataParallel runs in a thread: it shares no log with the others."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__.update(_undo=None, _calls=CallLog(), _prepared=None)
        return cast(StatefulBatchNorm, replica)

    @property
    def memory_bytes(self) -> int:
        """What the memory's buffers take, in bytes."""
        buffers = (self._buffers.get(name) for name in self.memory_buffers)
        return sum(b.numel() * b.element_size() for b in buffers if b is not None)

    def extra_repr(self) -> str:
        """Return torch's description, the method's options and the size of the memory."""
        torchs = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{torchs}, {self._history_repr()}, memory={self.memory_bytes} bytes"

    def _history_repr(self) -> str:
        raise NotImplementedError


def _plain(value: Any) -> Any:
    """Return an option as torch.load takes it by default: a number that is not NumPy's."""
    return value.item() if hasattr(value, "item") else value


def all_finite(*tensors: Tensor) -> bool:
    """Return whether no value is NaN or infinite, as far as can be seen: meta tensors have none."""
    return all(t.is_meta or bool(torch.isfinite(t).all()) for t in tensors)
