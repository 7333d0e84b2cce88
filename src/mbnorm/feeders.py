"""Which convolutions and linear layers feed the batch norms of a net."""

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from mbnorm.values import has_values

Feeder: TypeAlias = _ConvNd | nn.Linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass
class Feeders:
    """The layers that feed batch norms and nothing else, and the batch norms that have none.

    Attributes:
        norms_of: the batch norms that each layer feeds.
        without: batch norms, and what stands in front of them.
        raw: layers whose inputs no other layer has made: those of the net, or of a part that is seen alone.
    """

    norms_of: dict[Feeder, list[_BatchNorm]] = field(default_factory=dict)
    without: dict[_BatchNorm, str] = field(default_factory=dict)
    raw: set[Feeder] = field(default_factory=set)


@dataclass
class _Seen:
    """What a trace or a forward has shown.

    Attributes:
        uses: batch norms, and the layer whose output, untouched, is the input of each.
        elsewhere: layers that feed something else, too.
        raw: layers whose inputs no other layer has made.
    """

    uses: list[tuple[_BatchNorm, Feeder | None]] = field(default_factory=list)
    elsewhere: set[Feeder] = field(default_factory=set)
    raw: set[Feeder] = field(default_factory=set)

    def add(self, other: "_Seen") -> None:
        self.uses += other.uses
        self.elsewhere |= other.elsewhere
        self.raw |= other.raw

    def sorted(self) -> Feeders:
        """Keep the layers that feed norms alone."""
        found = Feeders(raw=self.raw)
        for norm, feeder in self.uses:
            if feeder is None:
                found.without.setdefault(norm, "no convolution or linear layer feeds it directly")
            elif feeder in self.elsewhere:
                found.without.setdefault(norm, "the layer that feeds it feeds something else, too")
            elif norm not in found.norms_of.setdefault(feeder, []):
                found.norms_of[feeder].append(norm)
        return found


def feeders(model: nn.Module, example: Any = None) -> Feeders:
    """Find the layers whose outputs, untouched, are the inputs of batch norms; leave the model as it was.

    Args:
        model: any module.
        example: an input of ``model``, or a tuple of its inputs. Where torch.fx cannot trace the net, one
            forward of it in eval mode shows what feeds what, but not what else is done with an output.
            Without one the parts of the net are traced that can be, each by itself.
    """
    unseen = "no call of it is seen in a forward"
    with _left_as_it_is(model):
        try:
            found = _in_graph(model).sorted()
        except _CannotTrace as error:
            if example is None:
                found = _in_parts(model).sorted()
                unseen = f"{error}: give mbnorm.center_filters an input of the net as example="
                # what comes into a part may be the output of a layer outside
                found.without = dict.fromkeys(found.without, unseen)
            else:
                found = _in_forward(model, example).sorted()
    seen = {norm for norms in found.norms_of.values() for norm in norms} | found.without.keys()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module not in seen:
            found.without[module] = unseen
    return found


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Undo what a forward does beside its output: it may keep what it sees, count, or draw random numbers."""
    # those of TorchScript are no dictionaries, and a trace stays out of them
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(module, dict(vars(module))) for module in modules]
    registered: list[tuple[Any, dict[str, Any]]] = [
        (entries, dict(entries))
        for module in modules
        for entries in (module._parameters, module._buffers, module._modules)
    ]
    tensors = (t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t) and has_values(t))
    values = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    for module in modules:
        own = vars(module)
        own.update({name: OrderedDict() for name in _HOOKS})
        own.update({name: copy.copy(v) for name, v in own.items() if type(v) in (list, dict, set)})
    on_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if on_gpus else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for entries, entries_before in registered:
            entries.clear()
            entries.update(entries_before)
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        random.setstate(drawn[0])
        if numpy is not None:
            numpy.random.set_state(drawn[1])


class _CannotTrace(Exception):
    """torch.fx cannot trace a net, and why."""


def _in_parts(model: nn.Module) -> _Seen:
    found = _Seen()
    for part in model.children():
        try:
            inside = _in_graph(part)
        except _CannotTrace:
            inside = _in_parts(part)
        found.add(inside)
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def _in_graph(model: nn.Module) -> _Seen:
    try:
        graph = _Tracer().trace(model)
    # what a net's own code raises for a proxy can be anything
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _CannotTrace(f"torch.fx cannot trace {type(model).__name__} ({reason})") from error
    modules = dict(model.named_modules(remove_duplicate=False))

    def called(node: Any) -> nn.Module | None:
        return modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    found = _Seen()
    made: set[fx.Node] = set()
    for node in graph.nodes:
        module = called(node)
        after_a_layer = any(before in made for before in node.all_input_nodes)
        if after_a_layer or (module is not None and _mixes(module)):
            made.add(node)
        if isinstance(module, _BatchNorm):
            feeder = called(node.args[0]) if node.args else None
            found.uses.append((module, feeder if isinstance(feeder, (_ConvNd, nn.Linear)) else None))
        elif isinstance(module, (_ConvNd, nn.Linear)):
            if not after_a_layer:
                found.raw.add(module)
            if not all(isinstance(called(user), _BatchNorm) for user in node.users):
                found.elsewhere.add(module)
    # weights that a forward reads by themselves
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {
        id(parameters[str(n.target)]) for n in graph.nodes if n.op == "get_attr" and n.target in parameters
    }
    layers = (m for m in modules.values() if isinstance(m, (_ConvNd, nn.Linear)))
    # the dictionary itself: a parametrized weight is computed whenever it is asked for
    found.elsewhere |= {m for m in layers if id(m._parameters.get("weight")) in read}
    return found


def _mixes(module: nn.Module) -> bool:
    """Return whether a module has matrices: norms and activations have numbers per channel at most."""
    return any(is_lazy(parameter) or parameter.dim() > 1 for parameter in module.parameters())


@contextmanager
def _gradients_of_matrices_alone(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not is_lazy(p) and p.dim() < 2 and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_()


def _in_forward(model: nn.Module, example: Any) -> _Seen:
    # kept, so that no other tensor takes the place of one; in-place operations change the version
    outputs: list[tuple[Tensor, int, Feeder]] = []
    fed_outputs: set[int] = set()
    found = _Seen()

    def remember(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((output, output._version, cast(Feeder, layer)))
        # what a layer has made has a gradient
        if not any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            found.raw.add(cast(Feeder, layer))

    def recognize(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        fed = (f for t, version, f in outputs if inputs and t is inputs[0] and version == t._version)
        feeder = next(fed, None)
        found.uses.append((cast(_BatchNorm, layer), feeder))
        if feeder is not None:
            fed_outputs.add(id(inputs[0]))

    for module in model.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.register_forward_hook(remember)
        elif isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(recognize)
    with _gradients_of_matrices_alone(model):
        model.eval()(*(example if isinstance(example, tuple) else (example,)))
    # a layer one of whose outputs is no norm's input feeds something else, too
    found.elsewhere = {feeder for output, _, feeder in outputs if id(output) not in fed_outputs}
    return found
