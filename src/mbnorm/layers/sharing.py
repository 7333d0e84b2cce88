"""The part of a layer that shares statistics with other ranks: pooled at once, or one forward late."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbnorm.averages import InferenceAverages, commit
from mbnorm.backends import cpu
from mbnorm.blend import blend, number_of, ruled
from mbnorm.distributed import (
    Exchange,
    PooledPast,
    ProcessGroup,
    Ranks,
    Sync,
    counts_of,
    local_statistics,
    pooled_of,
)
from mbnorm.functional import Backend, choose
from mbnorm.memories.memory import InferenceUpdate, Past, State
from mbnorm.recompute import Call

if TYPE_CHECKING:
    from mbnorm.layers.layer import HistoryBatchNorm


class _Late:
    """A forward that has not entered the memory: its exchange, what it read, and how it would have entered.

    ``past`` is what it read; it is None where the CPU's kernels, the same on all ranks, commit it.
    ``options`` are the buffers that the options say, as they were. ``seen`` is the state that it leads to,
    once someone has looked at it.
    """

    __slots__ = ("exchange", "momentum", "options", "past", "seen")

    def __init__(
        self, exchange: Exchange, past: Past | None, options: dict[str, Tensor], momentum: float | None
    ) -> None:
        self.exchange = exchange
        self.past = past
        self.options = options
        self.momentum = momentum
        self.seen: tuple[State, InferenceAverages] | None = None


class Sharing:
    r"""Makes the memory of a layer that of the whole batch, whose parts are on several ranks.

    Let rank r have :math:`n_r` values per channel with mean :math:`m_r` and biased variance :math:`v_r`, and

    .. math::
        n = \sum_r n_r, \qquad m_B = \sum_r \tfrac{n_r}{n}\,m_r, \qquad
        v_B = \sum_r \tfrac{n_r}{n}\,(v_r + m_r^2) - m_B^2

    Write :math:`M, V, a = \mathrm{read}(n)` for what the memory gives a batch of n values, whose samples
    add up over ranks as n does, and :math:`\mathrm{blend}_a(m, v)` for the operator's mean and variance. All
    ranks hold the same memory.

    ``sync=True``: forward t normalizes with :math:`\mathrm{blend}_a(m_B, v_B)`, a, M and V from
    :math:`\mathrm{read}(n)`, and commits :math:`m_B, v_B` and the blend. The ranks together are one
    process with the whole batch: outputs, gradients and state. It costs an all-reduce of 2C + 2 numbers in
    the forward and one of 2C in the backward, and every rank waits for both.

    ``sync="late"``: forward t normalizes with :math:`\mathrm{blend}_a(m_r, v_r)`, a, M and V from
    :math:`\mathrm{read}(n_r)`: its own part of the batch and the memory of all ranks. It starts the
    all-reduce and goes on; what ``sync=True`` would commit from the same input is committed when the
    layer's next training forward begins, before that reads. So past statistics are always those of all
    ranks and the batch's those of one, no rank waits for another, and the backward does not
    communicate. In between

    - the buffers are one batch behind; eval mode, ``state_dict``, copies and pickles have that batch,
      and waiting for it is all they do: no rank needs another for that, and nothing is written;
    - a snapshot (`mbnorm.DoubleForward` takes one as a step's first forward begins) waits and commits,
      so that a rewind drops that step's batches and no other; a replay's are late as any;
    - loading and resetting the state drop it;
    - with momentum None or 1.0, where tools read the raw statistics of each batch, nothing is late.

    Forwards in train mode and backwards must run on all ranks in the same order; an empty part takes
    part with ``n_r = 0``. Where torch.distributed is not initialized, or one rank is all, a layer
    is one without ``process_group``.
    """

    def __init__(self, ranks: Ranks, sync: Sync) -> None:
        self._ranks = ranks
        self.sync: Sync = sync
        self.late: _Late | None = None

    @classmethod
    def among(cls, process_group: ProcessGroup, sync: Sync, backend: Backend) -> "Sharing | None":
        """Return the part for a layer's options: None for a layer of one process.

        Raises:
            TypeError: ``process_group`` is none.
            ValueError: ``sync`` is unknown, or does not go with the other options.
        """
        if sync is not True and sync != "late":
            raise ValueError(f'sync must be True or "late", got {sync!r}')
        if process_group is None and sync == "late":
            raise ValueError('sync="late" needs the ranks to share with: process_group="world" is all')
        if process_group is not None and sync is True and backend not in ("auto", "aten"):
            raise ValueError(
                f'sync=True computes with ATen: backend must be "auto" or "aten", got {backend!r}'
            )
        ranks = Ranks(process_group)
        return None if process_group is None else cls(ranks, sync)

    @property
    def process_group(self) -> ProcessGroup:
        """The ranks: a group, or "world"."""
        return self._ranks.process_group

    def group(self) -> ProcessGroup:
        """Return the group to communicate in, or None where there is nobody to communicate with."""
        return self._ranks.group()

    def forward(self, layer: "HistoryBatchNorm", input: Tensor, n: int, group: ProcessGroup) -> Tensor:
        """Normalize this rank's part of a batch, of ``n`` values per channel, in train mode."""
        backend = choose(input, layer.backend)
        # a recompute reads what its forward had read, other ranks' statistics included, and writes nothing
        if (repeated := layer.repeat(input, n, backend)) is not None:
            return repeated
        layer._calls.drop_done()
        run = self._forward_late if self.sync == "late" else self._forward_pooled
        return run(layer, input, n, group)

    def _forward_pooled(
        self, layer: "HistoryBatchNorm", input: Tensor, n: int, group: ProcessGroup
    ) -> Tensor:
        backend = choose(input, layer.backend)
        local = ruled(*local_statistics(input.detach()), layer.memory.variance_rule)
        pooled = Exchange(local, n, input.shape[0], group).wait()
        if pooled.n == 1 and not layer.has_past():
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 on all ranks together"
            )
        if pooled.n == 0:
            return layer.blend(input, layer.read(0, 0), backend)[0]
        past = PooledPast(layer.read(pooled.n, pooled.m), pooled, group)
        gradient = layer.remembered_gradient()
        y, rows, node = layer.blend_watched(input, past, backend, gradient)
        # it is known again by the statistics of this part
        layer._calls.remember(Call(n, local, past, gradient), node)
        if layer.stores:
            layer.store((pooled.mean, pooled.var, *rows[2:4]), pooled.n, pooled.m)
        return y

    def _forward_late(self, layer: "HistoryBatchNorm", input: Tensor, n: int, group: ProcessGroup) -> Tensor:
        self.settle(layer)
        if n == 1 and not layer.has_past():
            return layer._plain_batch_norm(input)
        backend = choose(input, layer.backend)
        stores = layer.stores
        # on all ranks the same, also where this one's part is empty: all must round in the same way
        fused = backend == "cpu" and layer.fused_kernels(input, backend) is not None
        past = None
        local: tuple[Tensor, Tensor]
        if fused and n > 0:
            y, record = layer.prepare(cpu, input, n, stores=False).run_recorded(layer, input)
            local = record[0], record[1]
        else:
            past = layer.read(n, input.shape[0])
            y, rows, node = layer.blend_watched(input, past, backend)
            layer._calls.remember(Call(n, rows, past), node)
            local = rows[0], rows[1]
        if stores:
            exchange = Exchange(local, n, input.shape[0], group)
            options = {name: layer._buffers[name].clone() for name in layer.memory.rebuilt}  # type: ignore[union-attr]
            self.late = _Late(exchange, None if fused else past, options, layer.momentum)
            if layer.momentum is None or layer.momentum == 1:
                self.settle(layer)
        return y

    def settle(self, layer: "HistoryBatchNorm") -> None:
        """Commit the batch that is late, if one is, waiting for the other ranks' part of it."""
        if self.late is not None:
            self._enter(layer, self.late, layer.state, layer.averages)
            self.late = None

    def drop(self) -> None:
        """Forget the batch that is late."""
        if self.late is not None:
            # the message's memory is the backend's until it has been received
            self.late.exchange.work.wait()
            self.late = None

    def seen(self, layer: "HistoryBatchNorm") -> tuple[State, InferenceAverages]:
        """Return the layer's state with the batch that is late, and leave it as it is without.

        Only a training forward may write: DDP copies the buffers of rank 0 over all others before each, and
        a rank that has evaluated or saved must not differ from one that has not.
        """
        if torch.compiler.is_compiling():
            from mbnorm.tracing import in_eager_mode

            eager: tuple[State, InferenceAverages] = in_eager_mode(self._seen, layer)
            return eager
        return self._seen(layer)

    def _seen(self, layer: "HistoryBatchNorm") -> tuple[State, InferenceAverages]:
        late = self.late
        if late is None:
            return layer.state, layer.averages
        if late.seen is None:
            state = tuple(t.clone() for t in layer.state)
            averages = InferenceAverages(*(t.clone() for t in layer.averages))
            self._enter(layer, late, state, averages)
            late.seen = state, averages
        return late.seen

    @torch.no_grad()
    def _enter(
        self, layer: "HistoryBatchNorm", late: _Late, state: State, averages: InferenceAverages
    ) -> None:
        sums = late.exchange.wait_for_sums()
        n, m = counts_of(sums)
        if n == 0:
            return
        memory = layer.memory
        update = layer.update_for(m, late.momentum)
        if late.past is None:
            # a schedule may have changed them since
            names = zip(memory.buffers, state, strict=True)
            state = tuple(late.options.get(name, tensor) for name, tensor in names)
            self._enter_fused(layer, sums, state, averages, memory.read_numbers(n, m), update)
            return
        past = memory.read(state, n, m) if memory.depends_on_count else late.past
        pooled = pooled_of(sums, late.exchange.dtype)
        blended = blend(pooled.mean, pooled.var, *past, memory.variance_rule)
        commit(memory, state, averages, (pooled.mean, pooled.var), blended, n, update)

    def _enter_fused(
        self,
        layer: "HistoryBatchNorm",
        sums: Tensor,
        state: State,
        averages: InferenceAverages,
        read: list[float],
        update: InferenceUpdate,
    ) -> None:
        memory = layer.memory
        operator: Any = getattr(cpu, f"commit_to_{memory.kernels}")
        numbers = [float(number) for number in update]
        operator(sums, list(state), list(averages), read, numbers, number_of(memory.variance_rule))

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the layer has the late batch in its buffers
        return {**self.__dict__, "late": None}
