"""Conversion of a model's batch norms into layers with a memory, and back."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mbnorm.layers import (
    HistoryBatchNorm,
    MemorizedBatchNorm1d,
    MemorizedBatchNorm2d,
    MemorizedBatchNorm3d,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
)
from mbnorm.layers.state import all_finite

Method: TypeAlias = Literal["momentum", "memorized", "matched"]

SAMPLES_REMEMBERED = 128
IDEAL_BATCH_SIZE = 32
INFERENCE_MOMENTUM = 0.9
MATCHED: dict[str, Any] = {"matched_values": 32, "measured": True, "early_weight": 8.0}
"""What "matched" sets."""

_MOMENTUM: dict[type[_BatchNorm], type[HistoryBatchNorm]] = {
    nn.BatchNorm1d: MomentumBatchNorm1d,
    nn.BatchNorm2d: MomentumBatchNorm2d,
    nn.BatchNorm3d: MomentumBatchNorm3d,
}
_MEMORIZED: dict[type[_BatchNorm], type[HistoryBatchNorm]] = {
    nn.BatchNorm1d: MemorizedBatchNorm1d,
    nn.BatchNorm2d: MemorizedBatchNorm2d,
    nn.BatchNorm3d: MemorizedBatchNorm3d,
}
_STOCK = {ours: stock for table in (_MOMENTUM, _MEMORIZED) for stock, ours in table.items()}


@dataclass
class ConversionReport:
    """What `convert` or `revert` did: layer names, and for those left alone the reason.

    ``print`` it. A shared layer has all its names, joined by " = ".
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} skipped"]
        lines += [f"  {name}: {what}" for name, what in self.converted.items()]
        lines += [f"  {name}: skipped, {why}" for name, why in self.skipped.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def convert(
    model: nn.Module, method: Method = "matched", *, batch_size: int | None = None, **options: Any
) -> ConversionReport:
    """Turn the batch norms of ``model`` into layers with a memory, in place.

    The module objects themselves change their type, so parameters, hooks, sharing, optimizers built
    before, device, dtype and modes stay, and eval mode gives the same output bit for bit. Only
    `torch.nn.BatchNorm1d`, ``2d`` and ``3d`` themselves are converted: a subclass may do more than
    normalize. A trained batch norm (num_batches_tracked > 0) starts the memory from its running
    statistics.

    Args:
        model: any module, a batch norm itself included.
        method: "matched" (Momentum BN whose noise is matched per layer to that of matched_values = 32, by
            what its batches are measured to be worth, and whose averages do not start late, early_weight = 8;
            needs nothing else), "momentum" (Yong et al., ECCV 2020) or "memorized" (Guo et al., AAAI 2018).
        batch_size: samples m that each layer will see at a time. "memorized" gets memory_size =
            ceil(128 / m); "momentum" gets history_weight = max(0, 1 - m/32) and momentum =
            1 - 0.9^(m/32), until a `MomentumSchedule` takes over; "matched" does without.
        **options: keyword options of the layers; they win over what follows from ``batch_size``.

    Returns:
        A report of what was converted, and what was not and why.

    Raises:
        ValueError: ``method``, ``batch_size`` or an option is out of range; nothing is converted then.
        TypeError: the method has no such option; nothing is converted then.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(convert(model, "matched"))
    1 converted, 0 skipped
      1: BatchNorm2d -> MomentumBatchNorm2d
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    table = _MEMORIZED if method == "memorized" else _MOMENTUM
    options = _defaults(method, batch_size) | options
    # wrong options raise here, before anything is converted
    known = inspect.signature(table[nn.BatchNorm1d].set_up).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"method {method!r} has no option {name!r}; it has {', '.join(list(known)[1:])}")
    table[nn.BatchNorm1d](1, **options)
    momentum = None
    if method == "momentum" and batch_size is not None:
        momentum = 1 - INFERENCE_MOMENTUM ** (batch_size / IDEAL_BATCH_SIZE)
    report = ConversionReport()
    seeded = False
    for name, layer in _batch_norms(model):
        target = table.get(type(layer))
        if target is None:
            report.skipped[name] = _why_not(layer, table, options)
        elif not layer.track_running_stats or layer.running_mean is None:
            report.skipped[name] = "track_running_stats=False keeps no statistics to remember"
        elif layer.num_batches_tracked is None:
            report.skipped[name] = "it has no num_batches_tracked: set that to how many batches it has seen"
        else:
            report.converted[name] = f"{type(layer).__name__} -> {target.__name__}"
            start = _become(layer, target, options, momentum)
            seeded |= start == "seeded"
            if start == "poisoned":
                report.notes.append(f"{name} has statistics that are not finite: its memory starts empty")
    report.skipped.update(_foreign(model))
    if seeded and method == "momentum":
        report.notes.append(
            "the memories start from the trained running statistics, but the paper's MomentumSchedule "
            'starts as plain batch normalization: use schedule="constant" to start where the net was'
        )
    return report


def revert(model: nn.Module) -> ConversionReport:
    """Turn the layers with a memory back into torch's batch norms, in place.

    Eval mode gives the same output bit for bit, and the state_dict has torch's keys. The memories are
    dropped. Weight and bias below float32 become float32, since torch's batch norm takes float32
    statistics with float32 parameters only.

    Args:
        model: any module.

    Returns:
        A report of what was converted, and what was not and why.

    >>> model = nn.Sequential(nn.BatchNorm2d(8))
    >>> _ = convert(model, "memorized")
    >>> print(revert(model))
    1 converted, 0 skipped
      0: MemorizedBatchNorm2d -> BatchNorm2d
    """
    report = ConversionReport()
    for name, layer in _batch_norms(model):
        if not isinstance(layer, HistoryBatchNorm):
            continue
        stock = _STOCK.get(type(layer))
        if stock is None:
            report.skipped[name] = f"{type(layer).__name__} is a subclass that may do more than normalize"
            continue
        report.converted[name] = f"{type(layer).__name__} -> {stock.__name__}"
        layer.tear_down()
        layer.__class__ = stock  # type: ignore[assignment]
        # pruned layers keep their parameters under other names
        for parameter in layer.parameters(recurse=False):
            if layer.running_mean is not None:
                dtype = layer.running_mean.dtype
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None if parameter.grad is None else parameter.grad.to(dtype)
    return report


def _defaults(method: Method, batch_size: int | None) -> dict[str, Any]:
    if method == "matched":
        return MATCHED
    if batch_size is None:
        return {}
    if method == "memorized":
        return {"memory_size": -(-SAMPLES_REMEMBERED // batch_size)}
    return {"history_weight": max(0.0, 1 - batch_size / IDEAL_BATCH_SIZE)}


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield every batch norm once, with all its names."""
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            names.setdefault(module, []).append(name or "(the model itself)")
    for module, all_names in names.items():
        yield " = ".join(all_names), module


def _foreign(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield batch norms that are none of torch's, as FrozenBatchNorm2d, and why they stay."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "BatchNorm" in kind and "running_mean" in module._buffers and not isinstance(module, _NormBase):
            why = f"{kind} is none of torch's: build the net with those, or copy its statistics into one"
            yield name or "(the model itself)", why


def _why_not(
    layer: _BatchNorm, table: dict[type[_BatchNorm], type[HistoryBatchNorm]], options: dict[str, Any]
) -> str:
    kind = type(layer).__name__
    if isinstance(layer, HistoryBatchNorm):
        same = type(layer) in table.values() and layer.has_options(options)
        return f"already a {kind}" + ("" if same else " with other options: revert it first")
    if isinstance(layer, nn.SyncBatchNorm):
        return (
            "SyncBatchNorm shares statistics across ranks: leave convert_sync_batchnorm out, and give our "
            'layers process_group="world"'
        )
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has no channels yet: run a batch through the model first"
    return f"{kind} is a subclass that may do more than normalize"


def _become(
    layer: _BatchNorm, target: type[HistoryBatchNorm], options: dict[str, Any], momentum: float | None
) -> Literal["empty", "seeded", "poisoned"]:
    """Change the type of a layer; return how its memory starts."""
    batches = cast(Tensor, layer.num_batches_tracked)
    trained = not batches.is_meta and bool(batches > 0)
    finite = all_finite(cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var))
    layer.__class__ = target
    ours = cast(HistoryBatchNorm, layer)
    ours.set_up(**options)
    if momentum is not None:
        cast(MomentumBatchNorm2d, ours).scheduled = True
        # 0 and None are orders to store nothing, and raw statistics
        if ours.momentum:
            ours.torchs_momentum, ours.momentum = ours.momentum, momentum
    if not trained:
        return "empty"
    if not finite:
        return "poisoned"
    ours.seed()
    return "seeded"
