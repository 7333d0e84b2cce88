"""Layers whose batch is spread over ranks: statistics pooled at once, or one forward late."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy

from mbnorm.averages import InferenceAverages
from mbnorm.backends import cpu
from mbnorm.blend import blend
from mbnorm.distributed import (
    Exchange,
    Pooled,
    PooledPast,
    ProcessGroup,
    Ranks,
    Sync,
    counts_of,
    local_statistics,
    pooled_batch_norm,
    pooled_of,
)
from mbnorm.functional import Backend, BlendedBatchNorm, choose
from mbnorm.layers.base import HistoryBatchNorm
from mbnorm.layers.undo import Snapshot
from mbnorm.memory import Memory, Past
from mbnorm.recompute import Call


class _Late:
    """A forward that has not entered the memory: its exchange, what it read, and how it would have entered.

    ``past`` is what it read, or, for the CPU kernels to read it again, how. ``seen`` is the state that it
    leads to, once someone has looked at it.
    """

    __slots__ = ("exchange", "momentum", "past", "seen")

    def __init__(
        self, exchange: Exchange, past: Past | tuple[Tensor | float, ...], momentum: float | None
    ) -> None:
        self.exchange = exchange
        self.past = past
        self.momentum = momentum
        self.seen: tuple[Memory, InferenceAverages] | None = None


class SyncedBatchNorm(HistoryBatchNorm):
    r"""Base of the layers: with a ``process_group`` their memory is that of the whole batch.

    Let rank r have :math:`n_r` values per channel with mean :math:`m_r` and biased variance :math:`v_r`, and

    .. math::
        n = \sum_r n_r, \qquad m_B = \sum_r \tfrac{n_r}{n}\,m_r, \qquad
        v_B = \sum_r \tfrac{n_r}{n}\,(v_r + m_r^2) - m_B^2

    Write :math:`M, V, a = \mathrm{read}(n)` for what the memory gives a batch of n values, and
    :math:`\mathrm{blend}_a(m, v)` for the operator's mean and variance. All ranks hold the same memory.

    ``sync=True``: forward t normalizes with :math:`\mathrm{blend}_a(m_B, v_B)`, a, M and V from
    :math:`\mathrm{read}(n)`, and commits :math:`m_B, v_B` and the blend. The ranks together are one
    process with the whole batch: outputs, gradients and state. It costs an all-reduce of 2C + 2 numbers in
    the forward and one of 2C in the backward, and every rank waits for both.

    ``sync="late"``: forward t normalizes with :math:`\mathrm{blend}_a(m_r, v_r)`, a, M and V from
    :math:`\mathrm{read}(n_r)`: its own part of the batch and the memory of all ranks. It starts the
    all-reduce and goes on; what ``sync=True`` would commit from the same input is committed when the
    layer's next training forward begins, before that reads. So the past is always whole and the present
    always local, no rank waits for another, and the backward does not communicate. In between

    - the buffers are one batch behind; eval mode, ``state_dict``, copies and pickles have that batch,
      and waiting for it is all they do: no rank needs another for that, and nothing is written;
    - a snapshot (`mbnorm.DoubleForward` takes one as a step's first forward begins) waits and commits,
      so that a rewind drops that step's batches and no other; a replay's are late as any;
    - loading and resetting the state drop it;
    - with momentum None or 1.0, where tools read the raw statistics of each batch, nothing is late.

    Forwards in train mode and backwards must run on all ranks alike; an empty part takes part with
    ``n_r = 0``. Where torch.distributed is not initialized, or one rank is all, this is a layer without
    ``process_group``.
    """

    settings = (*HistoryBatchNorm.settings, "_ranks")
    _ranks: Ranks
    _late: "_Late | None" = None

    @property
    def past_depends_on_count(self) -> bool:
        """Whether `_read` gives batches of different numbers of values different answers."""
        return True

    def _set_up_ranks(self, process_group: ProcessGroup, sync: Sync, backend: Backend) -> None:
        if sync is not True and sync != "late":
            raise ValueError(f'sync must be True or "late", got {sync!r}')
        if process_group is None and sync == "late":
            raise ValueError('sync="late" needs the ranks to share with: process_group="world" is all')
        if process_group is not None and sync is True and backend not in ("auto", "aten"):
            raise ValueError(
                f'sync=True computes with ATen: backend must be "auto" or "aten", got {backend!r}'
            )
        self._ranks = Ranks(process_group)
        self.sync: Sync = sync
        self._late = None

    def share_with(self, process_group: ProcessGroup, sync: Sync = True) -> None:
        """Share the memory with other ranks from now on, or with none; all must hold the same one."""
        self.catch_up()
        self._set_up_ranks(process_group, sync, self.backend)

    def tear_down(self) -> None:
        """Remove all that `set_up` added."""
        self.catch_up()
        super().tear_down()
        for name in ("_ranks", "sync", "_late"):
            delattr(self, name)

    @property
    def process_group(self) -> ProcessGroup:
        """The ranks that share statistics with this one: a group, "world", or None."""
        return self._ranks.process_group

    def _forward(self, input: Tensor) -> Tensor:
        if (
            self._ranks.process_group is None
            or not (self.training and self.has_memory)
            or isinstance(input, Proxy)
        ):
            return super()._forward(input)
        if torch.compiler.is_compiling():
            # torch.compile cannot trace collectives on the way to a memory; it says so where fullgraph=True
            from mbnorm.tracing import in_eager_mode

            torch._dynamo.graph_break(msg="process_group= needs eager mode")
            return cast(Tensor, in_eager_mode(self._forward_synced, input))
        return self._forward_synced(input)

    def _repeats(self) -> bool:
        return self._ranks.process_group is None

    def _forward_synced(self, input: Tensor) -> Tensor:
        group = self._ranks.group()
        if group is None:
            # the other ranks may be gone since the last forward
            self.catch_up()
            return super()._forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels, got an input of shape {tuple(input.shape)}"
            )
        m = input.shape[0]
        n = m * math.prod(input.shape[2:])
        if self.sync == "late":
            return self._forward_late(input, n, m, group)
        return self._forward_pooled(input, n, m, group)

    def _forward_pooled(self, input: Tensor, n: int, m: int, group: ProcessGroup) -> Tensor:
        backend = choose(input, self.backend)
        # it reads what its forward had read, the other ranks' statistics included
        if repeated := self._repeat(input, n, backend):
            return repeated.y
        self._calls.drop_done()
        local = local_statistics(input.detach())
        pooled = Exchange(local, n, m, group).wait()
        if pooled.n == 1 and not self._has_past():
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 on all ranks together"
            )
        if pooled.n == 0:
            return self._blend(input, self._read(0), backend).y
        past = PooledPast(self._read(pooled.n), pooled, local)
        result, node = self._blend_watched(input, past, backend)  # type: ignore[arg-type]
        read: Any = past._replace(local=None)
        self._calls.remember(Call(n, local, read), node)
        if self.stores:
            batch = result._replace(batch_mean=pooled.mean, batch_var=pooled.var)
            self._commit(batch, pooled.n, pooled.m)
        return result.y

    def _blend(
        self, input: Tensor, past: Past, backend: Backend, weight: Tensor | None = None
    ) -> BlendedBatchNorm:
        if not isinstance(past, PooledPast):
            return super()._blend(input, past, backend, weight)
        return pooled_batch_norm(
            input,
            self.weight,
            self.bias,
            past,
            self._ranks.group(),
            variance=self.variance,
            eps=self.eps,
        )

    def _forward_late(self, input: Tensor, n: int, m: int, group: ProcessGroup) -> Tensor:
        backend = choose(input, self.backend)
        # a recompute writes nothing, not even what is late
        if repeated := self._repeat(input, n, backend):
            return repeated.y
        self._calls.drop_done()
        self.catch_up()
        if n == 1 and not self._has_past():
            return self._plain_batch_norm(input)
        stores = self.stores
        # alike on all ranks, also where this one's part is empty: they must round alike
        commits_fused = backend == "cpu" and self._fuses(input)
        if commits_fused and n > 0:
            y, record = self._run_fused(cpu, input, n, logs=stores, stores=False)
            local = record[0], record[1]
        else:
            past = self._read(n)
            result, node = self._blend_watched(input, past, backend)
            self._calls.remember(Call(n, result[1:], past), node)
            y, local = result.y, (result.batch_mean, result.batch_var)
            if stores and self._undo is not None:
                self._undo.append(self.snapshot())
        if stores:
            exchange = Exchange(local, n, m, group)
            how = self._how_read(max(n, 1)) if commits_fused else past
            # past Module's own way, which looks for parameters and is slow
            self.__dict__["_late"] = _Late(exchange, how, self.momentum)
            if self.momentum is None or self.momentum == 1:
                self.catch_up()
        return y

    def catch_up(self) -> None:
        """Commit the batch that is late, if one is, waiting for the other ranks' part of it."""
        if self._late is not None:
            self._enter(self._late, self._memory(), self._averages())
            self.__dict__["_late"] = None

    def _see(self, late: _Late) -> tuple[Memory, InferenceAverages]:
        if torch.compiler.is_compiling():
            from mbnorm.tracing import in_eager_mode

            return cast("tuple[Memory, InferenceAverages]", in_eager_mode(self._see_now, late))
        return self._see_now(late)

    def _see_now(self, late: _Late) -> tuple[Memory, InferenceAverages]:
        """Return the state as it is with the late batch, and leave it as it is without.

        Only a training forward may write: DDP copies the buffers of rank 0 over all others before each, and
        a rank that has evaluated or saved must not differ from one that has not.
        """
        if late.seen is None:
            memory, averages = self._memory(), self._averages()
            memory = type(memory)(*(t.clone() for t in memory))
            averages = InferenceAverages(*(t.clone() for t in averages))
            self._enter(late, memory, averages)
            late.seen = memory, averages
        return late.seen

    @torch.no_grad()
    def _enter(self, late: _Late, memory: Memory, averages: InferenceAverages) -> None:
        sums = late.exchange.wait_for_sums()
        n, m = counts_of(sums)
        if n == 0:
            return
        present = self.__dict__["momentum"]
        self.__dict__["momentum"] = late.momentum
        try:
            if isinstance(late.past, Past):
                self._enter_blended(late.past, pooled_of(sums, late.exchange.dtype), memory, averages)
                return
            how_read = self._how_read(n) if self.past_depends_on_count else late.past
            update = self._fused_update(m)
            self._commit_fused(
                sums, self.variance == "pooled", *self._as_kernels_take(memory), *how_read, *averages, *update
            )
        finally:
            self.__dict__["momentum"] = present

    def _enter_blended(self, past: Past, pooled: Pooled, memory: Memory, averages: InferenceAverages) -> None:
        past = self._read(pooled.n) if self.past_depends_on_count else past
        mean, var = blend(pooled.mean, pooled.var, *past, self.variance)
        # the memory takes no output
        result = BlendedBatchNorm(mean.new_empty(0), pooled.mean, pooled.var, mean, var)
        self._store(memory, averages, result, pooled.n, pooled.m)

    def _drop_late(self) -> None:
        if self._late is not None:
            # the message's memory is the backend's until it has been received
            self._late.exchange.work.wait()
            self._late = None

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        if self._late is None:
            return super()._running()
        _, averages = self._see(self._late)
        return averages.mean, averages.var

    def snapshot(self) -> Snapshot:
        """Return the state of this layer, for `rewind`."""
        self.catch_up()
        return super().snapshot()

    def rewind(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; without effect if that is void."""
        if not self.is_void(snapshot):
            self._drop_late()
        super().rewind(snapshot)

    def restore(self, snapshot: Snapshot) -> None:
        """Take back a rewind, and what was stored after it."""
        self._drop_late()
        super().restore(snapshot)

    def _forget_past_answers(self) -> None:
        self._drop_late()
        super()._forget_past_answers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SyncedBatchNorm":
        self.catch_up()
        super()._apply(fn, recurse)
        return self

    def _buffers_seen(self) -> dict[str, Tensor]:
        """Return the buffers that the late batch will change, as they will be."""
        if self._late is None:
            return {}
        memory, averages = self._see(self._late)
        torchs = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")
        return dict(zip((*self.memory_buffers, *torchs), (*memory, *averages), strict=True))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, t.clone()) for name, t in self._buffers_seen().items())

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        buffers = {**self._buffers, **{name: t.clone() for name, t in self._buffers_seen().items()}}
        return {**state, "_buffers": buffers, "_late": None}

    def extra_repr(self) -> str:
        """Return torch's description, the method's options, the size of the memory and who shares it."""
        if self.process_group is None:
            return super().extra_repr()
        ranks = "world" if self.process_group == "world" else "given"
        return f"{super().extra_repr()}, process_group={ranks}, sync={self.sync}"
