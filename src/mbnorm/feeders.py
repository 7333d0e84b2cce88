"""Which convolutions and linear layers feed the batch norms of a net."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mbnorm.values import has_values

Feeder: TypeAlias = _ConvNd | nn.Linear


@dataclass
class Feeders:
    """The layers that feed batch norms and nothing else, and the batch norms that have none.

    Attributes:
        norms_of: the batch norms that each layer feeds.
        without: batch norms, and what stands in front of them.
    """

    norms_of: dict[Feeder, list[_BatchNorm]] = field(default_factory=dict)
    without: dict[_BatchNorm, str] = field(default_factory=dict)


def feeders(model: nn.Module, example: Any = None) -> Feeders:
    """Find the layers whose outputs, untouched, are the inputs of batch norms.

    Args:
        model: any module.
        example: an input of ``model``, or a tuple of its inputs. Where torch.fx cannot trace the net, one
            forward of it in eval mode shows what feeds what, but not what else is done with an output.
            Without one the parts of the net are traced that can be, each by itself.
    """
    unseen = "no call of it is seen in a forward"
    try:
        found = _in_graph(model)
    except _CannotTrace as error:
        if example is None:
            found = _in_parts(model)
            unseen = f"{error}: give an input of the net as example="
            # what comes into a part may be the output of a layer outside
            found.without = dict.fromkeys(found.without, unseen)
        else:
            found = _in_forward(model, example)
    seen = {norm for norms in found.norms_of.values() for norm in norms} | found.without.keys()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module not in seen:
            found.without[module] = unseen
    return found


class _CannotTrace(Exception):
    """torch.fx cannot trace a net, and why."""


def _in_parts(model: nn.Module) -> Feeders:
    found = Feeders()
    for part in model.children():
        try:
            inside = _in_graph(part)
        except _CannotTrace:
            inside = _in_parts(part)
        found.norms_of |= inside.norms_of
        found.without |= inside.without
    return found


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Undo what a trace does beside its graph: a forward may keep proxies, count, or draw random numbers."""
    # those of TorchScript are no dictionaries, and a trace stays out of them
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(module, dict(vars(module))) for module in modules]
    registered: list[tuple[Any, dict[str, Any]]] = [
        (entries, dict(entries))
        for module in modules
        for entries in (module._parameters, module._buffers, module._modules)
    ]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if has_values(buffer)]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for entries, entries_before in registered:
            entries.clear()
            entries.update(entries_before)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def _in_graph(model: nn.Module) -> Feeders:
    try:
        with _left_as_it_is(model):
            graph = _Tracer().trace(model)
    # what a net's own code raises for a proxy can be anything
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _CannotTrace(f"torch.fx cannot trace {type(model).__name__} ({reason})") from error
    modules = dict(model.named_modules(remove_duplicate=False))

    def called(node: Any) -> nn.Module | None:
        return modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    uses: list[tuple[_BatchNorm, Feeder | None]] = []
    elsewhere: set[Feeder] = set()
    for node in graph.nodes:
        module = called(node)
        if isinstance(module, _BatchNorm):
            feeder = called(node.args[0]) if node.args else None
            uses.append((module, feeder if isinstance(feeder, (_ConvNd, nn.Linear)) else None))
        elif isinstance(module, (_ConvNd, nn.Linear)) and not all(
            isinstance(called(user), _BatchNorm) for user in node.users
        ):
            elsewhere.add(module)
    # weights that a forward reads by themselves
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {id(parameters.get(str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    elsewhere |= {m for m in modules.values() if isinstance(m, (_ConvNd, nn.Linear)) and id(m.weight) in read}
    return _sorted(uses, elsewhere)


@torch.no_grad()
def _in_forward(model: nn.Module, example: Any) -> Feeders:
    # kept, so that no other tensor takes the place of one; in-place operations change the version
    outputs: list[tuple[Tensor, int, Feeder]] = []
    uses: list[tuple[_BatchNorm, Feeder | None]] = []
    fed_outputs: set[int] = set()

    def remember(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((output, output._version, cast(Feeder, layer)))

    def recognize(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        fed = (f for t, version, f in outputs if inputs and t is inputs[0] and version == t._version)
        feeder = next(fed, None)
        uses.append((cast(_BatchNorm, layer), feeder))
        if feeder is not None:
            fed_outputs.add(id(inputs[0]))

    modes = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_hook(remember) for m in modes if isinstance(m, (_ConvNd, nn.Linear))]
    hooks += [m.register_forward_pre_hook(recognize) for m in modes if isinstance(m, _BatchNorm)]
    try:
        model.eval()(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    # a layer one of whose outputs is no norm's input feeds something else, too
    return _sorted(uses, {feeder for output, _, feeder in outputs if id(output) not in fed_outputs})


def _sorted(uses: Iterable[tuple[_BatchNorm, Feeder | None]], elsewhere: set[Feeder]) -> Feeders:
    """Keep the layers that feed norms alone."""
    found = Feeders()
    for norm, feeder in uses:
        if feeder is None:
            found.without.setdefault(norm, "no convolution or linear layer feeds it directly")
        elif feeder in elsewhere:
            found.without.setdefault(norm, "the layer that feeds it feeds something else, too")
        elif norm not in found.norms_of.setdefault(feeder, []):
            found.norms_of[feeder].append(norm)
    return found
