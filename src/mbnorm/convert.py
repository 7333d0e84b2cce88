"""Conversion of a model's batch norms into layers with a memory, and back."""

from collections import Counter
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from mbnorm import centering
from mbnorm.centered import CENTERED, release
from mbnorm.conversion import ConversionReport, named
from mbnorm.feeders import Feeder
from mbnorm.gradient import default_gradient
from mbnorm.layers import (
    HistoryBatchNorm,
    MatchedBatchNorm1d,
    MatchedBatchNorm2d,
    MatchedBatchNorm3d,
    MemorizedBatchNorm1d,
    MemorizedBatchNorm2d,
    MemorizedBatchNorm3d,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
)
from mbnorm.memories.memory import Memory, check_numbers
from mbnorm.per_image import normalize_images, rejoin
from mbnorm.values import is_trained, known_finite

Method: TypeAlias = Literal["matched", "momentum", "memorized"]

SAMPLES_REMEMBERED = 128
IDEAL_BATCH_SIZE = 32
INFERENCE_MOMENTUM = 0.9
NAMED = 4
"""Layers that a note names; it counts the others."""
LAYER_OPTIONS = ("backend", "process_group", "sync", "gradient")
"""Options that the layers have whatever their memory."""

_STOCK: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OURS: dict[Method, tuple[type[HistoryBatchNorm], ...]] = {
    "matched": (MatchedBatchNorm1d, MatchedBatchNorm2d, MatchedBatchNorm3d),
    "momentum": (MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d),
    "memorized": (MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d),
}
_STOCK_OF = {ours: stock for kinds in _OURS.values() for stock, ours in zip(_STOCK, kinds, strict=True)}


def convert(
    model: nn.Module,
    method: Method = "matched",
    *,
    batch_size: int | None = None,
    center_filters: bool | None = None,
    per_image: bool = False,
    example: Any = None,
    **options: Any,
) -> ConversionReport:
    """Turn the batch norms of ``model`` into layers with a memory, in place.

    The modules change their type and stay the same objects: parameters, hooks, sharing, optimizers built
    before, device, dtype and modes stay. In a trained net eval mode gives the same output, bit for bit. Only
    `torch.nn.BatchNorm1d`, ``2d`` and ``3d`` themselves are converted, since a subclass may do more than
    normalize. A batch norm is trained if its running statistics are not all 0 and 1, whatever
    num_batches_tracked says. Its memory then starts from these.

    Args:
        model: any module, a batch norm itself included.
        method: "matched" (ours: each layer measures which history weight to use, and remembers the gradient;
            needs nothing else), "momentum" (Yong et al., ECCV 2020) or "memorized" (Guo et al., AAAI 2018).
        batch_size: samples m that each layer will see at a time. "memorized" gets memory_size =
            ceil(128 / m); "momentum" gets history_weight = max(0, 1 - m/32) and momentum =
            1 - 0.9^(m/32), until a `MomentumSchedule` takes over; "matched" does without.
        center_filters: center the filters in front of the layers that are converted, as
            `mbnorm.center_filters` does. None does so for "matched" in a net none of whose batch norms is
            trained, but not in first layers that are linear or 1x1 convolutions. Give False where weights
            are trained although no batch norm is.
        per_image: also normalize each image by itself, in groups of channels, behind each untrained layer of
            maps. This is a layer of its own. It takes over scale and shift, and stays after `revert`.
            The two become a `torch.nn.Sequential`: ``bn.weight`` is ``bn.1.weight`` from then on.
        example: an input of ``model``, or a tuple of its inputs, where torch.fx cannot trace the net to find
            the filters.
        **options: keyword options of the layers; they win over what follows from ``batch_size``.

    Returns:
        A report: each layer that was converted, and each that was not, with the reason.

    Raises:
        ValueError: ``method``, ``batch_size`` or an option is out of range; nothing is converted then.
            What ``model`` raises for ``example`` is raised before anything is converted, too.
        TypeError: the method has no such option; nothing is converted then.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(convert(model))
    2 converted, 0 skipped
      0: Conv2d -> CenteredConv2d, feeds 1
      1: BatchNorm2d -> MatchedBatchNorm2d, memory starts empty
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if batch_size is not None:
        check_numbers(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    table = dict(zip(_STOCK, _OURS[method], strict=True))
    options = _defaults(method, batch_size, options.get("sync")) | options
    conversion = _Conversion(table[nn.BatchNorm1d], options, batch_size if method == "momentum" else None)
    report = ConversionReport()
    pointwise_first = center_filters is not None
    if center_filters is None:
        center_filters = method == "matched" and _is_from_scratch(model)
    converted = {m for m in model.modules() if type(m) in table and _has_statistics(cast(_BatchNorm, m))}
    if center_filters and converted:
        # first, since an example may be wrong
        centered = centering.center_in_front_of(converted, model, example, pointwise_first=pointwise_first)
        _add_centered(centered, model, report)
    starts = set()
    idle = []
    of_maps: set[_BatchNorm] = set()
    for name, layer in named(model, _BatchNorm):
        target = table.get(type(layer))
        if target is None:
            report.skipped[name] = _why_not(layer, table, conversion)
        elif layer not in converted:
            report.skipped[name] = "track_running_stats=False keeps no statistics to remember"
        else:
            start = conversion.apply(layer, target)
            starts.add(start)
            report.converted[name] = (
                f"{_STOCK_OF[target].__name__} -> {target.__name__}, memory {start.value}"
            )
            idle += [name] if layer.momentum == 0 else []
            if start is _Start.EMPTY and not isinstance(layer, nn.BatchNorm1d):
                of_maps.add(layer)
    report.skipped.update(_foreign(model))
    if per_image:
        normalize_images(model, of_maps, report)
    report.notes += _notes(method, starts, idle, conversion)
    if not (report.converted or report.skipped):
        report.notes.append(without_batch_norm(model))
    return report


def _has_statistics(layer: _BatchNorm) -> bool:
    return layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None


def _is_from_scratch(model: nn.Module) -> bool:
    """Return whether there is something to center in a net, and none of its batch norms is trained."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, LazyModuleMixin)]
    statistics = ((norm.running_mean, norm.running_var) for norm in norms)
    trained = (mean is not None and var is not None and is_trained(mean, var) for mean, var in statistics)
    return any(isinstance(m, Feeder) for m in model.modules()) and not any(trained)


def _add_centered(centered: ConversionReport, model: nn.Module, report: ConversionReport) -> None:
    report.converted.update(centered.converted)
    not_centered: dict[str, list[str]] = {}
    modules = dict(named(model, nn.Module))
    for name, why in centered.skipped.items():
        if type(modules[name]) not in CENTERED.values():
            not_centered.setdefault(why, []).append(name)
    report.notes += [f"no centered filters for {_first(names)}: {why}" for why, names in not_centered.items()]


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def without_batch_norm(model: nn.Module) -> str:
    """Return what a model without batch norms has in their place, and how to build it with them."""
    names = [type(module).__name__ for module in model.modules() if not any(module.children())]
    found = Counter(name for name in names if "Norm" in name and not name.startswith("_"))
    if not found:
        return "the model has no batch norm, nor any other normalization layer"
    return (
        f"the model has no batch norm, but {', '.join(f'{count} {name}' for name, count in found.items())}: "
        'build it with batch norm (MONAI: norm="batch"; torchvision and timm: norm_layer=nn.BatchNorm2d)'
    )


class _Start(Enum):
    """What the memory of a converted layer holds."""

    EMPTY = "starts empty"
    SEEDED = "starts from the running statistics"
    POISONED = "starts empty: the running statistics are not finite"


class _Conversion:
    """How a layer becomes one of ours; wrong options raise here, before anything is converted.

    ``batch_size`` sets the momentum that the ECCV paper has for it.
    """

    def __init__(self, kind: type[HistoryBatchNorm], options: dict[str, Any], batch_size: int | None) -> None:
        self.memory_type = kind.memory_type
        known = (*self.memory_type.options, *LAYER_OPTIONS)
        for name in options:
            if name not in known:
                raise TypeError(f"{kind.__name__[:-2]} has no option {name!r}; it has {', '.join(known)}")
        self.of_the_memory = {name: v for name, v in options.items() if name not in LAYER_OPTIONS}
        self.of_the_layer = {name: v for name, v in options.items() if name in LAYER_OPTIONS}
        self.momentum: float | None = None
        if batch_size is not None:
            self.momentum = float(1 - INFERENCE_MOMENTUM ** (batch_size / IDEAL_BATCH_SIZE))
        kind(1, **options)

    def has_made(self, layer: HistoryBatchNorm) -> bool:
        """Return whether a layer is as it would be after `apply`."""
        same = all(getattr(layer, name) == value for name, value in self.of_the_layer.items())
        return isinstance(layer.memory, self.memory_type) and same and layer.memory.has(self.of_the_memory)

    def apply(self, layer: _BatchNorm, target: type[HistoryBatchNorm]) -> _Start:
        """Change the type of a layer; return how its memory starts."""
        mean, var = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
        trained, finite = is_trained(mean, var), known_finite(mean, var)
        layer.__class__ = target
        ours = cast(HistoryBatchNorm, layer)
        memory: Memory = self.memory_type(**self.of_the_memory)
        ours.set_up(memory, **self.of_the_layer)
        # 0 means never update, None a cumulative average: both stay
        if self.momentum is not None and ours.momentum:
            ours.torchs_momentum, ours.momentum = ours.momentum, self.momentum
        if self.momentum is not None:
            # a history weight of 0 is right for so large a batch: no warning
            cast(MomentumBatchNorm2d, ours).memory.scheduled = True
        if not trained:
            return _Start.EMPTY
        if not finite:
            return _Start.POISONED
        ours.seed()
        return _Start.SEEDED


def _notes(method: Method, starts: set[_Start], idle: list[str], conversion: _Conversion) -> Iterator[str]:
    if (
        method == "momentum"
        and conversion.momentum is None
        and not conversion.of_the_memory.get("history_weight")
    ):
        yield (
            "history_weight=0 is plain batch normalization until a MomentumSchedule steers it: attach one, "
            "or give batch_size or history_weight"
        )
    if method == "momentum" and _Start.SEEDED in starts:
        yield (
            "the memories start from the trained running statistics, but the paper's MomentumSchedule "
            'starts as plain batch normalization: use schedule="constant" to start where the net was'
        )
    if idle:
        yield (
            f"momentum=0 stores nothing, in torch and here: {', '.join(idle)} keep their statistics. "
            "Give them another momentum to train with a memory (0 is not what Keras means by a high momentum)"
        )


def revert(model: nn.Module) -> ConversionReport:
    """Turn the layers with a memory back into torch's batch norms, and centered ones into torch's, in place.

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
    rejoin(model)
    for name, layer in named(model, _BatchNorm):
        if not isinstance(layer, HistoryBatchNorm):
            continue
        stock = _STOCK_OF.get(type(layer))
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
    for name, module in named(model, nn.Module):
        kind = type(module).__name__
        if release(module):
            report.converted[name] = f"{kind} -> {type(module).__name__}"
    return report


def _defaults(method: Method, batch_size: int | None, sync: object) -> dict[str, Any]:
    if method == "matched":
        return {"gradient": default_gradient(sync)}
    if batch_size is None:
        return {}
    if method == "memorized":
        return {"memory_size": -(-SAMPLES_REMEMBERED // batch_size)}
    return {"history_weight": max(0.0, 1 - batch_size / IDEAL_BATCH_SIZE)}


def _foreign(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield batch norms that are not torch's, as FrozenBatchNorm2d, and why they stay."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "BatchNorm" in kind and "running_mean" in module._buffers and not isinstance(module, _NormBase):
            why = (
                f"{kind} is not a torch BatchNorm: build the net with those, or copy its statistics into one"
            )
            yield name or "(the model itself)", why


def _why_not(
    layer: _BatchNorm, table: dict[type[_BatchNorm], type[HistoryBatchNorm]], conversion: _Conversion
) -> str:
    kind = type(layer).__name__
    if isinstance(layer, HistoryBatchNorm):
        same = type(layer) in table.values() and conversion.has_made(layer)
        return f"already a {kind}" + ("" if same else " with other options: revert it first")
    if isinstance(layer, nn.SyncBatchNorm):
        return (
            "SyncBatchNorm shares statistics across ranks: leave convert_sync_batchnorm out, and give our "
            'layers process_group="world"'
        )
    if isinstance(layer, LazyModuleMixin):
        return f"{kind} has no channels yet: run a batch through the model first"
    return f"{kind} is a subclass that may do more than normalize"
