"""Centering of the filters that feed a model's batch norms."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.centered import CENTERED, is_depthwise, is_pointwise, keep_centered
from mbnorm.conversion import ConversionReport, named
from mbnorm.feeders import Feeder, feeders
from mbnorm.values import has_values, is_trained


def center_filters(model: nn.Module, example: Any = None) -> ConversionReport:
    r"""Center the filters in front of a net's batch norms, in place, and keep them centered.

    .. math:: w_{oi} \leftarrow w_{oi} - \frac{1}{I} \sum_j w_{oj}

    for each filter o over its I inputs, now and after each step of a `torch.optim.Optimizer`. After a ReLU
    inputs are positive and share a large part, which a centered filter does not pass on. The values of a
    channel are then less correlated, and the effective sample size of a batch is larger. Use it for nets
    that are trained from scratch, with any batch norm.

    Left alone, and named in the report: layers that feed something other than batch norms, depthwise
    convolutions, layers of other classes than torch's own, and those in front of a trained batch norm.

    The net's ``forward`` runs once with torch.fx's proxies, to find which layers feed batch norms. What it
    changes in the net is undone. Weights that are written in other ways than by ``load_state_dict`` are
    centered after the next step; an optimizer's hooks see them before.

    The layers become subclasses of their classes, with the same parameters and state_dict. If filters are
    loaded that are not centered, their layer stays so. `revert` makes the layers torch's own again, with the
    weights they have: call it before tools that look for torch's classes, as quantization and export.
    FSDP with flat parameters, and optimizers with copies of the weights, cannot keep them centered.

    Args:
        model: any module, its batch norms torch's or ours.
        example: an input of ``model``, or a tuple of its inputs, for nets that torch.fx cannot trace. One
            forward shows which layers feed batch norms, but not all other uses of an output. Without an
            example only the parts of the net are searched that torch.fx can trace.

    Returns:
        A report: each layer that was centered, and each that was not, with the reason.

    Source: Qiao et al.: Micro-Batch Training with Batch-Channel Normalization and Weight Standardization,
    2019; Yan et al.: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
    ICLR 2020.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(center_filters(model))
    1 converted, 0 skipped
      0: Conv2d -> CenteredConv2d, feeds 1
    >>> model[0].weight.sum((1, 2, 3)).abs().max() < 1e-5
    tensor(True)
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return center_in_front_of(norms, model, example, pointwise_first=True)


def center_in_front_of(
    norms: Collection[nn.Module], model: nn.Module, example: Any, *, pointwise_first: bool
) -> ConversionReport:
    """Do as `center_filters` in front of some batch norms.

    Without ``pointwise_first`` linear layers and convolutions of one position are left alone whose inputs are
    the net's own, or those of a part that is seen alone. Centered, such a layer does not see the sum of its
    inputs, which may be what is asked for of coordinates or features.
    """
    found = feeders(model, example)
    report = ConversionReport()
    names = {module: name for name, module in named(model, nn.Module)}
    others = {id(p) for m in names if m not in found.norms_of for p in m.parameters(recurse=False)}
    for layer, fed_norms in found.norms_of.items():
        if not any(norm in norms for norm in fed_norms):
            continue
        reason = _why_not(layer, fed_norms, others)
        if reason is None and not pointwise_first and layer in found.raw and is_pointwise(layer):
            reason = "it is a first layer, and the sum of its inputs may count"
        if reason is None:
            kind = type(layer).__name__
            keep_centered(layer)
            fed = ", ".join(names[norm] for norm in fed_norms)
            report.converted[names[layer]] = f"{kind} -> {type(layer).__name__}, feeds {fed}"
        else:
            report.skipped[names[layer]] = reason
    report.skipped.update({names[norm]: reason for norm, reason in found.without.items() if norm in norms})
    return report


def _why_not(layer: Feeder, norms: Sequence[_BatchNorm], others: set[int]) -> str | None:
    kind = type(layer)
    if kind in CENTERED.values():
        return f"already a {kind.__name__}"
    if kind not in CENTERED:
        return f"{kind.__name__} is a subclass that may use its weights in another way"
    if "weight" not in layer._parameters:
        return "its weight is computed from others: remove the parametrization or pruning first"
    if id(layer.weight) in others:
        return "another layer, which feeds no batch norm, has the same weight"
    if not layer.weight.requires_grad:
        return "its weight is frozen"
    if is_depthwise(layer):
        return "each of its filters has one input channel"
    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        if mean is not None and var is not None and has_values(mean) and is_trained(mean, var):
            return "it feeds a trained batch norm: centered filters are for training from scratch"
    return None
