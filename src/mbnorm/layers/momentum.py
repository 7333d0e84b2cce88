"""Momentum batch normalization, with the paper's history weight or matched to a noise level."""

import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mbnorm.averages import InferenceUpdate
from mbnorm.backends import cpu
from mbnorm.blend import Variance
from mbnorm.distributed import ProcessGroup, Sync
from mbnorm.functional import Backend
from mbnorm.layers.base import moments_update
from mbnorm.layers.synced import SyncedBatchNorm
from mbnorm.measures import MEASURES
from mbnorm.memory import MeasuredAverage, Memory, MovingAverage, Past

STEPS_BEFORE_NOTICE = 100


class _MomentumBatchNorm(SyncedBatchNorm):
    memory_buffers = ("memory_mean", "memory_var", "memory_filled")
    settings = (*SyncedBatchNorm.settings, "matched_values", "measured", "early_weight", "scheduled")
    options = (
        "history_weight",
        "initial_history_weight",
        "matched_values",
        "measured",
        "memory_buffers",
        "early_weight",
        "scheduled",
        "_steps_as_plain_bn",
        "_notices_before",
    )
    written_options = ("eps", "variance", "matched_values", "measured")
    memory_mean: Tensor
    memory_var: Tensor
    memory_filled: Tensor
    memory_measured: Tensor
    history_weight: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        history_weight: float = 0.0,
        matched_values: int | None = None,
        measured: bool = False,
        early_weight: float = 0.0,
        variance: Variance | None = None,
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias)
        self.set_up(
            history_weight=history_weight,
            matched_values=matched_values,
            measured=measured,
            early_weight=early_weight,
            variance=variance,
            backend=backend,
            process_group=process_group,
            sync=sync,
        )

    def set_up(
        self,
        *,
        history_weight: float = 0.0,
        matched_values: int | None = None,
        measured: bool = False,
        early_weight: float = 0.0,
        variance: Variance | None = None,
        backend: Backend = "auto",
        process_group: ProcessGroup = None,
        sync: Sync = True,
    ) -> None:
        """Check and set the options, and start with an empty memory."""
        if not 0 <= history_weight < 1:
            raise ValueError(f"history_weight must be in [0, 1), got {history_weight}")
        if not 0 <= early_weight < math.inf:
            raise ValueError(f"early_weight must be 0 or more, and finite, got {early_weight}")
        if matched_values is not None:
            if matched_values < 1:
                raise ValueError(f"matched_values must be at least 1, got {matched_values}")
            if history_weight:
                raise ValueError(
                    f"matched_values={matched_values} sets the weight of the history itself: "
                    f"leave history_weight={history_weight} out"
                )
            if variance == "averaged":
                raise ValueError('matched_values works with variance="pooled" only, got "averaged"')
        elif measured:
            raise ValueError("measured=True needs matched_values, the noise to be matched")
        if variance is None:
            variance = "averaged" if matched_values is None else "pooled"
        self.measured = measured
        own = ("memory_last", "memory_measured") if measured else ()
        self.memory_buffers = (*type(self).memory_buffers, *own)
        self._set_up_ranks(process_group, sync, backend)
        self._set_up_history(variance, backend)
        self.matched_values = matched_values
        self.early_weight = float(early_weight)
        self._steps_as_plain_bn = 0
        self._notices_before = 0
        self.scheduled = False
        self.initial_history_weight = float(history_weight)
        weight = None
        if matched_values is None:
            like = self.weight if self.running_mean is None else self.running_mean
            weight = torch.tensor(
                self.initial_history_weight,
                device=None if like is None else like.device,
                dtype=torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32,
            )
        # set by the constructor or a schedule, so a checkpoint does not carry it
        self.register_buffer("history_weight", weight, persistent=False)

    def has_options(self, options: dict[str, Any]) -> bool:
        """Return whether the layer was set up with these."""
        first = options.get("history_weight", 0.0)
        rest = {name: value for name, value in options.items() if name != "history_weight"}
        matched = options.get("matched_values")
        return (
            first == self.initial_history_weight
            and matched == self.matched_values
            and super().has_options(rest)
        )

    def reset_parameters(self) -> None:
        """Reset statistics, memory, weight and bias, and the history weight to its first value."""
        super().reset_parameters()
        # torch's constructor calls this before there is a history weight
        if self._buffers.get("history_weight") is not None:
            self.history_weight.fill_(self.initial_history_weight)

    def _fill_history_weight(self, like: Tensor) -> None:
        """Give the history weight its first value where it has none, on the device of ``like``."""
        if self._buffers.get("history_weight") is not None and not like.is_meta:
            self.history_weight = torch.full_like(
                self.history_weight, self.initial_history_weight, device=like.device
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_MomentumBatchNorm":
        had_none = self.history_weight is not None and self.history_weight.is_meta
        super()._apply(fn, recurse)
        if had_none:
            self._fill_history_weight(self.history_weight)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._fit_measures(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.history_weight is not None and self.history_weight.is_meta:
            self._fill_history_weight(cast(Tensor, self.running_mean))

    def _fit_measures(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Let a layer that measures load the state of one that does not, and the other way round."""
        names = [prefix + name for name in ("memory_last", "memory_measured")]
        if not self.measured:
            for name in names:
                state_dict.pop(name, None)
        elif isinstance(mean := state_dict.get(prefix + "memory_mean"), Tensor):
            memory = cast(MeasuredAverage, self._new_memory(mean))
            memory.clear()
            for name, tensor in zip(names, memory[-2:], strict=True):
                state_dict.setdefault(name, tensor)

    def _new_memory(self, like: Tensor) -> MovingAverage | MeasuredAverage:
        filled = torch.empty((), device=like.device, dtype=torch.int64)
        average = MovingAverage(torch.empty_like(like), torch.empty_like(like), filled)
        if not self.measured:
            return average
        return MeasuredAverage(*average, torch.empty_like(like), like.new_empty(MEASURES))

    def _memory(self) -> MovingAverage | MeasuredAverage:
        # the dictionary itself: attributes of modules are slow
        buffers: dict[str, Any] = self._buffers
        average = buffers["memory_mean"], buffers["memory_var"], buffers["memory_filled"]
        if not self.measured:
            return MovingAverage(*average)
        return MeasuredAverage(*average, buffers["memory_last"], buffers["memory_measured"])

    def _weight_of_history(self, n: int) -> Tensor | float:
        if self.matched_values is None:
            return self.history_weight
        memory = self._memory()
        if isinstance(memory, MeasuredAverage):
            return memory.history_weight(n, self.matched_values)
        return max(0.0, (self.matched_values - n) / (self.matched_values + n))

    def _read(self, n: int) -> Past:
        return self._memory().read(self._weight_of_history(n))

    def _how_read(self, n: int) -> tuple[Tensor | float, ...]:
        if self.measured:
            # the kernels themselves find the weight that follows from it
            return (float(cast(int, self.matched_values)),)
        weight = self._weight_of_history(n)
        # to ask another device for its value is to wait for it
        on_device = isinstance(weight, Tensor) and not weight.is_cpu
        return (weight if on_device else float(weight),)

    def _fused_operator(self, kernels: ModuleType) -> Callable[..., Any]:
        return cast(Callable[..., Any], kernels.forward_with_average)

    def _commit_fused(self, *arguments: Any) -> None:
        cpu.commit_to_average(*arguments)

    def _as_kernels_take(self, memory: Memory) -> tuple[Tensor | None, ...]:
        return memory if self.measured else (*memory, None, None)

    def _memory_before(
        self, past_mean: Tensor, past_var: Tensor, counter: Tensor, more: Tensor
    ) -> tuple[Tensor, ...]:
        average = past_mean, past_var, counter
        return (*average, more[:-MEASURES], more[-MEASURES:]) if self.measured else average

    def _more_numbers(self) -> int:
        return self.num_features + MEASURES if self.measured else 0

    @property
    def past_depends_on_count(self) -> bool:
        """Whether `_read` gives batches of different numbers of values different answers."""
        return self.matched_values is not None

    def _forward(self, input: Tensor) -> Tensor:
        y = super()._forward(input)
        if not self._had_notice():
            self._notice_missing_schedule()
        return y

    def _had_notice(self) -> bool:
        """Whether nothing is left to say of a missing schedule."""
        has_history = self.matched_values is not None or self.initial_history_weight > 0
        return has_history or self.scheduled or self._steps_as_plain_bn >= STEPS_BEFORE_NOTICE

    def _repeats(self) -> bool:
        return self._had_notice() and super()._repeats()

    def _has_past(self) -> bool:
        if torch.compiler.is_compiling() or self._holds_past:
            return True
        if self.memory_device.type == "meta":
            return False
        # with no weight on it the past is as good as none
        weighs = self.history_weight > 0 if self.matched_values is None else self.matched_values > 1
        self._holds_past = bool(weighs) and super()._has_past()
        return self._holds_past

    def _inference_update(self, m: int) -> InferenceUpdate:
        momentum = self.momentum or 0.0
        if self.matched_values is not None:
            return moments_update(momentum, m, self.early_weight)
        return InferenceUpdate(False, False, momentum, "averaged", self.early_weight)

    def _notice_missing_schedule(self) -> None:
        # a forward without gradients, as a replay, is no step
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.stores:
            return
        # around torch's __setattr__, which is slow
        self.__dict__["_steps_as_plain_bn"] += 1
        if self._steps_as_plain_bn == 1:
            self._notices_before = _Notice.given
        weight = self.history_weight
        if self._steps_as_plain_bn == STEPS_BEFORE_NOTICE and not weight.is_meta and float(weight) == 0:
            _Notice.give(self)

    def _history_repr(self) -> str:
        if self.matched_values is not None:
            method = f"matched_values={self.matched_values}" + ", measured=True" * self.measured
        else:
            method = f"history_weight={_number(self.history_weight)}"
        early = f", early_weight={self.early_weight:g}" if self.early_weight else ""
        return f"{method}{early}, variance={self.variance}, backend={self.backend}"


class _Notice:
    """The warning that Momentum layers trained as plain batch norm, given once for a whole model."""

    given = 0

    @classmethod
    def give(cls, layer: _MomentumBatchNorm) -> None:
        """Warn, unless a layer was told since this one began to train: it is of the same model."""
        if cls.given > layer._notices_before:
            return
        cls.given += 1
        warnings.warn(
            f"Momentum layers have trained {STEPS_BEFORE_NOTICE} steps with history_weight=0, which is "
            "plain batch normalization: use MomentumSchedule(model, ...), or give history_weight or "
            "matched_values",
            stacklevel=2,
        )


def _number(tensor: Tensor) -> str:
    return "?" if tensor.is_meta else f"{float(tensor):.6g}"


class MomentumBatchNorm1d(_MomentumBatchNorm, nn.BatchNorm1d):
    r"""Momentum batch normalization of (N, C) or (N, C, L) inputs; see `MomentumBatchNorm2d`.

    >>> MomentumBatchNorm1d(4, matched_values=128)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """


class MomentumBatchNorm2d(_MomentumBatchNorm, nn.BatchNorm2d):
    r"""Normalize (N, C, H, W) inputs with batch statistics averaged with past ones.

    .. math::
        \mathrm{mean} = (1-\lambda)\,m_B + \lambda\,M, \qquad
        \mathrm{var} = (1-\lambda)\,v_B + \lambda\,V, \qquad
        M, V \leftarrow \mathrm{mean}, \mathrm{var}

    A drop-in for `torch.nn.BatchNorm2d`: same arguments, same eval mode, same checkpoint keys plus the
    memory's. Steer :math:`\lambda` with `mbnorm.MomentumSchedule`, or set ``matched_values`` and
    nothing else.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of the new value in running_mean and running_var, which eval mode uses. 0
            stores nothing at all, None and 1.0 store raw batch statistics, as torch's tools expect.
        affine: whether there are weight and bias, shape (C,).
        track_running_stats: False is plain batch normalization without a memory.
        device: where parameters and state live.
        dtype: of the parameters; the state is never below float32.
        bias: False leaves the bias out.
        history_weight: the paper's :math:`\lambda` in [0, 1), kept as a 0-dim tensor to be changed in place.
        matched_values: N; sets :math:`\lambda = \max(0, (N-n)/(N+n))` for each batch of n values per
            channel, so that the noise is that of N values (64 to 256; 128 is a good choice).
        measured: with ``matched_values``: measures how noisy the layer's batches are and how wrong its memory
            is, and sets :math:`\lambda = \max(0, \min(\frac{r/n}{r/n + e}, \frac{N' - n/r}{N' + n/r}))` with
            :math:`N' = N \min(r, 4)`. Here :math:`n/r` is how many independent values the batch is worth,
            fewer than n since the pixels of an image are alike, and e the squared error of the remembered
            mean, in variances, which grows as the weights change. The past weighs what leaves the least
            error, and no more than the noise of N values takes, or of up to 4 N where they are alike. r and e
            are averages over some 50 batches; see `mbnorm.memory.MeasuredAverage`. 32 is a good N.
        early_weight: c; after t batches (num_batches_tracked) the next one weighs at least c / (t + c) in
            running_mean and running_var, so that they forget torch's initial 0 and 1 at once, and early
            batches soon. 1 averages all batches alike until ``momentum`` takes over, 8 the last fifth of
            them or so, and 0, the default, is ``momentum`` alone.
        variance: "averaged" as above (the paper's), or "pooled", which adds the variance between the
            two means; None is "pooled" with ``matched_values`` and "averaged" without.
        backend: as in `mbnorm.functional.blended_batch_norm`.
        process_group: ranks to share the memory with, each with its part of the batch, which may be empty:
            a `torch.distributed.ProcessGroup`, or "world" for the default one. None is this process alone.
        sync: True normalizes with the statistics of the whole batch, as one process with all of it would;
            every rank waits for them. "late" normalizes with those of this rank's part, and lets the
            whole batch's enter the memory at the next forward, for which no rank waits.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: an option out of range; ``matched_values`` with "averaged" or a ``history_weight``;
            ``measured`` without ``matched_values``.

    Source: Yong, Huang, Meng, Hua, Zhang: Momentum Batch Normalization for Deep Learning with Small
    Batch Size, ECCV 2020. ``matched_values`` is ours, from that paper's noise analysis, and so is
    ``measured``, whose first weight is that of a Kalman filter. ``early_weight`` is the polynomial-decay
    averaging of Shamir and Zhang, ICML 2013.

    >>> layer = MomentumBatchNorm2d(8, history_weight=0.75)
    >>> layer(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """


class MomentumBatchNorm3d(_MomentumBatchNorm, nn.BatchNorm3d):
    r"""Momentum batch normalization of (N, C, D, H, W) inputs; see `MomentumBatchNorm2d`.

    >>> MomentumBatchNorm3d(4, matched_values=128)(torch.randn(1, 4, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """
