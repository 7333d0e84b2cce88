"""The gradients of a forward by the CPU operators that read a memory and normalize."""

import pytest
import torch
from helpers import make_input, make_parameters
from remembering import EPS, KINDS, held, seeds, with_rule
from torch.autograd import forward_ad
from torch.library import opcheck

import mbnorm
from mbnorm.backends import cpu, traceable
from mbnorm.blend import VARIANCE_RULES, number_of
from mbnorm.functional import FusedRun, run_differentiably
from mbnorm.memories.memory import InferenceUpdate

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

SHAPE = (4, 11, 3)
VALUES = 12


def arguments_after_parameters(variance_rule="pooled", store=False):
    memory = with_rule(KINDS["average"], variance_rule)
    ours = held(memory, torch.float64)
    memory.seed(ours.state, *seeds(SHAPE[1], torch.float64))
    return *ours.arguments(InferenceUpdate(0.1), VALUES, SHAPE[0]), number_of(variance_rule), EPS, store


def forward(x, weight, bias, variance_rule="pooled"):
    arguments = arguments_after_parameters(variance_rule)
    run = FusedRun(cpu, cpu.forward_with_average, arguments, variance_rule, EPS)
    return run_differentiably(run, x, weight, bias), run.rows


def leaves(*needs):
    x = make_input(SHAPE, torch.float64)
    return [
        t.requires_grad_(need)
        for t, need in zip((x, *make_parameters(11, torch.float64)), needs, strict=True)
    ]


def plain_formulas(tensors, record, variance_rule="pooled"):
    past_mean, past_var, a = record[4:].clone()
    return traceable.forward(*tensors, past_mean, past_var, a[0], variance_rule, EPS)[0]


@pytest.mark.parametrize("variance_rule", VARIANCE_RULES)
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_those_of_the_plain_formulas(variance_rule, needs, twice):
    tensors = leaves(*needs)
    y, record = forward(*tensors, variance_rule)
    wanted = [t for t in tensors if t.requires_grad]
    cotangent = make_input(SHAPE, torch.float64, seed=1).requires_grad_()
    found = []
    for output in (y, plain_formulas(tensors, record, variance_rule)):
        gradients = torch.autograd.grad(output, wanted, cotangent, create_graph=twice)
        if twice:
            weighed = sum((g * make_input((1, *g.shape), g.dtype, seed=2)).sum() for g in gradients)
            # through the output once more, as a penalty beside a loss does
            loss = weighed + (output * cotangent).sum()
            gradients = torch.autograd.grad(loss, [*wanted, cotangent])
        found.append(gradients)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_without_parameters():
    tensors = leaves(True, False, False)[0], None, None
    y, record = forward(*tensors)
    cotangent = make_input(SHAPE, torch.float64, seed=1)
    outputs = y, plain_formulas(tensors, record)
    found = [torch.autograd.grad(output, tensors[0], cotangent) for output in outputs]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_there_is_a_node_only_where_a_gradient_is_wanted():
    assert forward(*leaves(False, False, False))[0].grad_fn is None
    with torch.no_grad():
        y, _ = forward(*leaves(True, True, True))
    assert not y.requires_grad
    y, record = forward(*leaves(False, False, True))
    assert (y.requires_grad, record.requires_grad) == (True, False)


def test_a_graph_is_used_once():
    y, _ = forward(*leaves(True, True, True))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_an_input_that_was_changed_is_refused():
    x, *parameters = leaves(False, True, True)
    y, _ = forward(x, *parameters)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_refused_where_the_kernels_are_asked_for():
    layer = mbnorm.MomentumBatchNorm1d(11, history_weight=0.5, backend="cpu", dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(make_input(SHAPE, torch.float64), torch.ones(SHAPE, dtype=torch.float64))
        with pytest.raises(NotImplementedError):
            layer(x)


def test_the_operators_are_well_formed_where_gradients_are_wanted():
    opcheck(
        torch.ops.mbnorm_cpu.forward_with_average.default,
        (*leaves(True, True, True), *arguments_after_parameters(store=True)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
