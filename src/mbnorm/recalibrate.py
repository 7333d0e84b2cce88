"""Exact statistics for inference, from a pass over data with the weights as they are."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.blend import blend
from mbnorm.layers.layer import statistics_for
from mbnorm.observe import Forward, observe
from mbnorm.values import known_finite


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> None:
    r"""Set running_mean and running_var to the statistics of the layers' inputs under the present weights.

    .. math::
        N = \sum_b n_b, \qquad
        \mathrm{mean} = \tfrac1N \sum_b n_b\,m_b, \qquad
        \mathrm{var} = \tfrac1{N-1} \sum_b n_b \big(v_b + (m_b - \mathrm{mean})^2\big)

    Every batch b counts with its values per channel :math:`n_b`, in float64. The result is the mean and the
    unbiased variance of all values that a layer was given, however they were cut into batches. A layer with
    ``subtract_mean=False`` gets 0 and the mean square. Use it on
    averaged weights (SWA, EMA), before evaluating on other data, or where running statistics are stale.

    In the pass the model is in eval mode, without dropout and without gradients. Each layer normalizes with
    the pooled statistics of all that it has been given so far, this batch included. So later layers soon get
    the inputs of eval mode, also from batches of 1 or 2 samples. Give the batches shuffled.

    Nothing else changes: memories, num_batches_tracked, other buffers, modes and torch's random streams are
    bit-identical; and if anything raises, ``batches`` included, the running statistics are, too.

    Args:
        model: its batch norms are set, ours and torch's, except for frozen ones: in eval mode while the
            model is in train mode, with ``momentum=0`` or without running statistics. Layers that the
            forwards do not reach keep their statistics.
        batches: a tensor goes to the model as it is, a mapping as keyword arguments, of a tuple or list
            that begins with a tensor that first element, and anything else as it is. A batch that is
            not finite in a layer does not count there. `itertools.islice` takes a number of them.
        forward: called with the model and a batch instead, where that does not fit.
        device: where the batches' tensors are moved first.
        process_group: pools over its ranks, which must all call this, each with its own part of the data
            and the bare model (``ddp.module``); None is for one process.

    Raises:
        ValueError: no batches, no batch norm to set or to run, or less than two finite values per
            channel in one that ran.

    Source: PreciseBN (Wu and Johnson: Rethinking "Batch" in BatchNorm, 2021). To normalize with the pooled
    statistics so far is ours.

    >>> layer = nn.BatchNorm1d(2)
    >>> recalibrate(layer, [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0], [4.0, 4.0]])])
    >>> layer.running_mean, layer.running_var
    (tensor([2., 2.]), tensor([4., 3.]))
    """
    populations = {layer: _Population(name, layer) for name, layer in _layers_to_set(model)}
    observe(model, batches, populations, forward, device)
    if process_group is not None:
        for population in populations.values():
            population.pool(process_group)
    _check(populations)
    for population in populations.values():
        population.write()


class _Population:
    """Mean and biased variance, shape (C,) in float64, of ``count`` values per channel."""

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        like = cast(Tensor, layer.running_mean)
        self.name = name
        self._layer = layer
        self.reached = False
        self.count = 0
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        self.var = torch.zeros_like(like, dtype=torch.float64)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add a layer's input, and let it be normalized with all so far."""
        var, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
        self.add(x.numel() // x.shape[1], mean, var)
        return statistics_for(self._layer, self.mean, self.var) if self.count else None

    def add(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Add values by their number, mean and biased variance."""
        self.reached |= count > 0
        if count and known_finite(mean, var):
            self.count += count
            self.mean, self.var = blend(mean, var, self.mean, self.var, count / self.count, "pooled")

    def pool(self, group: "dist.ProcessGroup") -> None:
        """Add the values of the other ranks, in the order of the ranks on all of them."""
        own = torch.cat((self.mean, self.var, self.mean.new_tensor([self.count, self.reached])))
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group)
        self.count = 0
        for part in parts:
            mean, var = part[:-2].chunk(2)
            self.reached |= bool(part[-1])
            self.add(int(part[-2]), mean, var)

    def write(self) -> None:
        """Set the layer's running statistics, if it was reached."""
        if self.reached:
            mean, var = statistics_for(self._layer, self.mean, self.var)
            if mean is self.mean:
                # unbiased, which a mean square is
                var = var * (self.count / (self.count - 1))
            cast(Tensor, self._layer.running_mean).copy_(mean)
            cast(Tensor, self._layer.running_var).copy_(var)


def _layers_to_set(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    layers = [
        (name or "(the model itself)", layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.running_mean is not None
        and layer.track_running_stats
        and layer.momentum != 0
        and (layer.training or not model.training)
    ]
    if not layers:
        raise ValueError("the model has no batch norm with running statistics that is not frozen")
    return layers


def _check(populations: dict[_BatchNorm, _Population]) -> None:
    reached = [population for population in populations.values() if population.reached]
    if not reached:
        raise ValueError(
            "no batch norm has run: batches is empty, or its forwards reach none that is not frozen"
        )
    short = [population.name for population in reached if population.count < 2]
    if short:
        raise ValueError(f"less than two finite values per channel, so no variance, in {', '.join(short)}")
