"""What every layer with a memory shares: torch's batch norm around the blended operator."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.blend import VARIANCES, Variance, statistics_dtype
from mbnorm.functional import BACKENDS, Backend, blended_batch_norm
from mbnorm.memory import InferenceAverages, MovingAverage, Past, RecentBatches
from mbnorm.recompute import in_recompute

REFERENCE_BATCH = 32
"""Batch size at which ``momentum`` is the weight of one batch in the averages of moments."""

UNDO_DEPTH = 8
"""How many calls of one layer `undo` can take back."""


class Snapshot(NamedTuple):
    """The state of a layer before a forward, valid until that state is reset or loaded."""

    resets: int
    averages: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]


class InferenceUpdate(NamedTuple):
    """Statistics that go into the averages for inference, their weight there, and the rule."""

    mean: Tensor
    var: Tensor
    weight: float | None
    variance: Variance


class HistoryBatchNorm(_BatchNorm):
    """Base of the layers: everything but what the memory is and how the averages for inference move.

    A subclass names its memory's buffers and its options, and defines the methods that raise here.
    """

    _version = 3  # 2 is torch's; at 3 the memory's buffers were added
    memory_buffers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

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
        self._undo: deque[Snapshot] | None = deque(maxlen=UNDO_DEPTH)
        if self.running_mean is None or self.running_var is None:
            for name in self.memory_buffers:
                self.register_buffer(name, None)
            return
        dtype = statistics_dtype(self.running_mean.dtype)
        self.running_mean = self.running_mean.to(dtype)
        self.running_var = self.running_var.to(dtype)
        for name, buffer in self._new_memory(self.running_mean)._asdict().items():
            self.register_buffer(f"memory_{name}", buffer)
        self._memory().clear()

    def set_up(self, *_: Any, **options: Any) -> None:
        """Check and set the options, and start with an empty memory; also turns a batch norm into ours."""
        raise NotImplementedError

    def tear_down(self) -> None:
        """Remove all that `set_up` added."""
        own = ("variance", "backend", "_frozen", "_resets", "_holds_past", "_undo")
        for name in (*own, *self.memory_buffers, *self.options):
            delattr(self, name)

    def _new_memory(self, like: Tensor) -> MovingAverage | RecentBatches:
        """Return an uninitialized memory on the device and in the dtype of ``like``."""
        raise NotImplementedError

    def _memory(self) -> MovingAverage | RecentBatches:
        """Return the memory made of this layer's buffers."""
        raise NotImplementedError

    def _read(self, n: int) -> Past:
        """Return what a batch of ``n`` values per channel is blended with."""
        raise NotImplementedError

    def _commit_history(
        self, finite: Tensor, batch: tuple[Tensor, Tensor], blended: tuple[Tensor, Tensor], n: int, m: int
    ) -> InferenceUpdate:
        """Store a forward in the memory, and return what goes into the averages for inference."""
        raise NotImplementedError

    def _averages(self) -> InferenceAverages:
        return InferenceAverages(
            cast(Tensor, self.running_mean),
            cast(Tensor, self.running_var),
            cast(Tensor, self.num_batches_tracked),
        )

    @property
    def has_memory(self) -> bool:
        """Whether this layer has a memory: not if it was built with ``track_running_stats=False``."""
        return self._buffers.get(self.memory_buffers[0]) is not None

    @property
    def memory_device(self) -> torch.device:
        """Where the memory lives."""
        return cast(Tensor, self._buffers[self.memory_buffers[0]]).device

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` as in `torch.nn.BatchNorm2d`; in train mode with the memory's help."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not (self.training and self.has_memory):
            return self._plain_batch_norm(input)
        m = input.shape[0]
        n = m * math.prod(input.shape[2:])
        if n == 1 and not self._has_past():
            # one value has no variance: torch says so in its own words
            return self._plain_batch_norm(input)
        past = self._read(n)
        y, batch_mean, batch_var, mean, var = blended_batch_norm(
            input,
            self.weight,
            self.bias,
            *past,
            variance=self.variance,
            eps=self.eps,
            backend=self.backend,
        )
        if self.tracks and not self._frozen and not in_recompute():
            self._commit((batch_mean, batch_var), (mean, var), n, m)
        return y

    def _plain_batch_norm(self, input: Tensor) -> Tensor:
        dtype = statistics_dtype(input.dtype) if self.running_mean is None else self.running_mean.dtype
        return F.batch_norm(
            input,
            None if self.training else self.running_mean,
            None if self.training else self.running_var,
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            self.training or self.running_mean is None,
            0.0,
            self.eps,
        )

    def _has_past(self) -> bool:
        """Whether the memory holds something to read; asks the device until the answer is yes."""
        if not self._holds_past and not torch.compiler.is_compiling():
            self._holds_past = bool(self._memory().holds_anything())
            return self._holds_past
        return True

    @property
    def tracks(self) -> bool:
        """Whether forwards are stored as the layer is set: in train mode and not frozen by its momentum."""
        return (
            self.training
            and self.track_running_stats
            and self.running_mean is not None
            and self.momentum != 0
        )

    @torch.no_grad()
    def _commit(self, batch: tuple[Tensor, Tensor], blended: tuple[Tensor, Tensor], n: int, m: int) -> None:
        if self._undo is not None and not torch.compiler.is_compiling():
            self._undo.append(self.snapshot())
        mean, var = batch
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        update = self._commit_history(finite, batch, blended, n, m)
        if self.momentum is None or self.momentum == 1:
            # update_bn and PreciseBN set these to read the raw statistics of each batch
            update = InferenceUpdate(mean, unbiased(var, n), self.momentum, "averaged")
        self._averages().commit(finite, *update)

    def snapshot(self) -> Snapshot:
        """Return the state of this layer, for `rewind`."""
        return Snapshot(self._resets, self._averages().snapshot(), self._memory().snapshot())

    @torch.no_grad()
    def rewind(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; without effect if the state was reset or loaded since."""
        if snapshot.resets == self._resets:
            self._averages().rewind(snapshot.averages)
            self._memory().rewind(snapshot.memory)
            self._holds_past = False

    def undo(self, calls: int) -> None:
        """Take back the last ``calls`` forwards that stored something.

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
        if self._undo and calls:
            self.rewind(self._undo[-calls])
            self._undo.clear()

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
        if self._undo is not None:
            self._undo.clear()

    def reset_running_stats(self) -> None:
        """Reset the averages for inference as torch does, and empty the memory."""
        super().reset_running_stats()
        # torch's constructor calls this before there is a memory
        if hasattr(self, "_resets") and self.has_memory:
            self._memory().clear()
            self._forget_past_answers()

    def reset_parameters(self) -> None:
        """Reset statistics, memory, weight and bias."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HistoryBatchNorm":
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

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if self.has_memory:
            names = [prefix + name for name in self.memory_buffers]
            version = local_metadata.get("version")
            if (version is None or version < 3) and not any(name in state_dict for name in names):
                memory = self._memory_from_stock(state_dict, prefix)
                state_dict.update(zip(names, memory, strict=True))
            for name in ("running_mean", "running_var", *self.memory_buffers):
                value = state_dict.get(prefix + name)
                if isinstance(value, Tensor) and value.is_floating_point():
                    state_dict[prefix + name] = value.to(statistics_dtype(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._forget_past_answers()

    def _memory_from_stock(self, state_dict: dict[str, Any], prefix: str) -> MovingAverage | RecentBatches:
        """Return the memory that a checkpoint of torch's own batch norm stands for."""
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        batches = state_dict.get(prefix + "num_batches_tracked")
        memory = self._new_memory(self._averages().mean)
        memory.clear()
        # checkpoints older than the counter are trained ones
        trained = batches is None or (not batches.is_meta and bool(batches > 0))
        if mean is not None and var is not None and mean.shape == memory.mean.shape[-1:] and trained:
            memory.seed(mean, var)
        return memory

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_undo"] = deque(maxlen=UNDO_DEPTH)
        return state

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


def moments_update(batch: tuple[Tensor, Tensor], momentum: float, m: int) -> InferenceUpdate:
    """Return the update of averages of moments by a batch of ``m`` samples, its weight in proportion."""
    return InferenceUpdate(*batch, 1 - (1 - momentum) ** (m / REFERENCE_BATCH), "pooled")


def unbiased(var: Tensor, n: int) -> Tensor:
    """Return the unbiased variance of ``n`` values; a single value keeps the biased one."""
    return var * (n / (n - 1)) if n > 1 else var
