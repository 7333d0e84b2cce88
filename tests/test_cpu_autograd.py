"""The node of autograd of the operators that read a memory and normalize."""

import pytest
import torch
from helpers import make_input, make_parameters
from torch.autograd import forward_ad
from torch.library import opcheck

import mbnorm
from mbnorm.backends import cpu, traceable

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

SHAPE = (4, 11, 3)
EPS = 1e-3


def arguments_after_parameters(variance="pooled", channels=SHAPE[1]):
    mean, var = make_parameters(channels, torch.float64)
    memory = (mean, var.abs() + 0.5, torch.tensor(1))
    averages = (torch.zeros_like(mean), torch.ones_like(var), torch.tensor(0), torch.tensor(0))
    update = (False, False, 0.1, False, 0.0)
    return variance == "pooled", EPS, *memory, None, None, 0.7, *averages, None, None, 0, False, *update


def leaves(*needs):
    x = make_input(SHAPE, torch.float64)
    return [
        t.requires_grad_(need)
        for t, need in zip((x, *make_parameters(11, torch.float64)), needs, strict=True)
    ]


def plain_formulas(tensors, record, variance="pooled"):
    past_mean, past_var, a = record[4:].clone()
    return traceable.blended_batch_norm(*tensors, past_mean, past_var, a[0], variance, EPS)[0]


@pytest.mark.parametrize("variance", ["averaged", "pooled"])
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_those_of_the_plain_formulas(variance, needs, twice):
    tensors = leaves(*needs)
    y, record = cpu.forward_with_average(*tensors, *arguments_after_parameters(variance))
    wanted = [t for t in tensors if t.requires_grad]
    cotangent = make_input(SHAPE, torch.float64, seed=1).requires_grad_()
    found = []
    for output in (y, plain_formulas(tensors, record, variance)):
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
    y, record = cpu.forward_with_average(*tensors, *arguments_after_parameters())
    cotangent = make_input(SHAPE, torch.float64, seed=1)
    outputs = y, plain_formulas(tensors, record)
    found = [torch.autograd.grad(output, tensors[0], cotangent) for output in outputs]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_there_is_a_node_only_where_a_gradient_is_wanted():
    assert (
        cpu.forward_with_average(*leaves(False, False, False), *arguments_after_parameters())[0].grad_fn
        is None
    )
    with torch.no_grad():
        y, _ = cpu.forward_with_average(*leaves(True, True, True), *arguments_after_parameters())
    assert not y.requires_grad
    y, record = cpu.forward_with_average(*leaves(False, False, True), *arguments_after_parameters())
    assert (y.requires_grad, record.requires_grad) == (True, False)


def test_the_record_counts_backward_passes():
    tensors = leaves(True, True, True)
    y, record = cpu.forward_with_average(*tensors, *arguments_after_parameters())
    versions = [record._version]
    for _ in range(2):
        y.sum().backward(retain_graph=True)
        versions.append(record._version)
    assert versions == [0, 1, 2]


def test_a_record_knows_whether_a_backward_pass_comes_through_it():
    x, *parameters = leaves(True, True, True)
    (first, one), (second, other) = (
        cpu.forward_with_average(x, *parameters, *arguments_after_parameters()) for _ in range(2)
    )
    seen = []
    through = first * 1.0
    through.register_hook(lambda _: seen.append((cpu.awaits_backward(one), cpu.awaits_backward(other))))
    through.sum().backward(retain_graph=True)
    torch.autograd.grad(through.sum() + second.sum(), parameters[0], retain_graph=True)
    del first, through
    assert seen == [(True, False), (True, True)]
    # the node is gone, and nothing is known
    assert cpu.awaits_backward(one)


def test_a_graph_is_used_once():
    y, _ = cpu.forward_with_average(*leaves(True, True, True), *arguments_after_parameters())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_an_input_without_values_is_refused():
    for shape in ((4, 0, 3), (0, 11, 3)):
        with pytest.raises(RuntimeError, match="expected an input with values"):
            cpu.forward_with_average(torch.empty(shape), None, None, *arguments_after_parameters())


def test_an_input_that_was_changed_is_refused():
    x, *parameters = leaves(False, True, True)
    y, _ = cpu.forward_with_average(x, *parameters, *arguments_after_parameters())
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_refused_where_the_kernels_are_asked_for():
    layer = mbnorm.MomentumBatchNorm1d(11, backend="cpu", dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(make_input(SHAPE, torch.float64), torch.ones(SHAPE, dtype=torch.float64))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(x)


def test_the_differentiable_operators_are_well_formed():
    opcheck(
        torch.ops.mbnorm_cpu.forward_with_average.default,
        (*leaves(True, True, True), *arguments_after_parameters()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
