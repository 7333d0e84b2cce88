import copy
import functools

import pytest
import torch
from helpers import BACKENDS
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

import mbnorm
from mbnorm import DoubleForward, MatchedBatchNorm1d, MemorizedBatchNorm1d, MomentumBatchNorm1d, recompute

METHODS = {
    "momentum": functools.partial(MomentumBatchNorm1d, history_weight=0.75),
    "matched": functools.partial(MatchedBatchNorm1d, matched_batch_size=64, measured=False, early_weight=0),
    "measured": functools.partial(MatchedBatchNorm1d, matched_batch_size=64, early_weight=0),
    "uncentered": functools.partial(MatchedBatchNorm1d, matched_batch_size=64, subtract_mean=False),
    "memorized": functools.partial(MemorizedBatchNorm1d, memory_size=5),
    "memorized-ema": functools.partial(MemorizedBatchNorm1d, memory_size=5, inference="ema"),
}
on_every_method = pytest.mark.parametrize("method", METHODS)
in_both_variants = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def block(method, backend="auto"):
    torch.manual_seed(0)
    norm = METHODS[method]
    return nn.Sequential(
        nn.Linear(4, 4), norm(4, backend=backend), nn.Tanh(), nn.Linear(4, 4), norm(4, backend=backend)
    ).double()


def inputs(count, same=False):
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(count, 6, 4, generator=generator, dtype=torch.float64)
    return [first[0 if same else i].clone().requires_grad_() for i in range(count)]


def plainly(model):
    return model


def checkpointed(model, **options):
    return lambda x: checkpoint(model, x, **options)


def nested(model, **options):
    first, second = model[:3], model[3:]

    def outer(x):
        return checkpoint(second, checkpoint(first, x, **options) + x, **options)

    return lambda x: checkpoint(outer, x, **options)


def nested_plainly(model):
    return lambda x: model[3:](model[:3](x) + x)


def train_step(model, forward, xs):
    """Gradients of one loss over several calls, each call with its own cotangent, and the state after."""
    model.zero_grad()
    loss = 0.0
    for i, x in enumerate(xs):
        cotangent = torch.linspace(-1, 2 + i, x.numel(), dtype=x.dtype).view(x.shape).sin()
        loss = loss + (forward(x) * cotangent).sum()
    loss.backward()
    gradients = [x.grad.clone() for x in xs] + [p.grad.clone() for p in model.parameters()]
    return gradients, [b.clone() for b in model.buffers()]


def assert_same_runs(model, plain, wrapped, xs_of_step, steps=3):
    twin = copy.deepcopy(model)
    for step in range(steps):
        xs = xs_of_step(step)
        wanted = train_step(twin, plain(twin), [x.detach().clone().requires_grad_() for x in xs])
        got = train_step(model, wrapped(model), [x.detach().clone().requires_grad_() for x in xs])
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.contract("CK-1", "CK-2", "CK-3")
@in_both_variants
@on_every_backend
@pytest.mark.parametrize("same", [False, True], ids=["different", "same"])
@pytest.mark.parametrize("times", [1, 2, 3])
@on_every_method
def test_gradients_and_state_are_those_without_checkpointing(method, times, same, backend, reentrant):
    assert_same_runs(
        block(method, backend),
        plainly,
        functools.partial(checkpointed, use_reentrant=reentrant),
        lambda step: inputs(times, same),
    )


@pytest.mark.contract("CK-1")
@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch's, of its inner checkpoint
@in_both_variants
@pytest.mark.parametrize("same", [False, True], ids=["different", "same"])
@pytest.mark.parametrize("times", [1, 2, 3])
@on_every_method
def test_nested_checkpoints(method, times, same, reentrant):
    assert_same_runs(
        block(method),
        nested_plainly,
        functools.partial(nested, use_reentrant=reentrant),
        lambda step: inputs(times, same),
    )


@pytest.mark.contract("CK-1")
@in_both_variants
@on_every_method
def test_a_layer_called_twice_inside_a_block(method, reentrant):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = METHODS[method](4)

        def forward(self, x):
            return self.norm(torch.tanh(self.norm(x)))

    assert_same_runs(
        Twice().double(),
        plainly,
        functools.partial(checkpointed, use_reentrant=reentrant),
        lambda step: inputs(2),
    )


@pytest.mark.contract("CK-1")
@on_every_method
def test_checkpoint_sequential(method):
    model = nn.Sequential(*[block(method) for _ in range(3)])
    assert_same_runs(
        model,
        plainly,
        lambda m: lambda x: torch_checkpoint.checkpoint_sequential(m, 3, x, use_reentrant=False),
        lambda step: inputs(2),
    )


@pytest.mark.contract("CK-1")
@on_every_method
def test_a_second_backward_through_a_retained_graph(method):
    model = block(method)
    xs = inputs(2, same=True)
    losses = [checkpoint(model, x, use_reentrant=False).square().sum() * (i + 1) for i, x in enumerate(xs)]
    loss = sum(losses)
    first = torch.autograd.grad(loss, xs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, xs)))


@pytest.mark.contract("CK-1")
@pytest.mark.parametrize("same", [False, True], ids=["another input", "the same input"])
@on_every_method
def test_a_retained_graph_is_repeated_after_another_forward(method, same):
    def gradients(wrap):
        net = block(method)
        x, other = inputs(2, same)
        y = wrap(net)(x)
        y.sum().backward(retain_graph=True)
        net(other).square().sum().backward()
        (y**3).sum().backward()
        return x.grad

    plain = gradients(plainly)
    torch.testing.assert_close(gradients(functools.partial(checkpointed, use_reentrant=False)), plain)


@pytest.mark.contract("CK-1")
@on_every_method
def test_a_retained_graph_is_repeated_beside_a_forward_of_the_same_input(method):
    def gradients(wrap):
        net = block(method)
        x, same = inputs(2, same=True)
        y = wrap(net)(x)
        y.square().sum().backward(retain_graph=True)
        z = net(same)
        (y.pow(3).sum() + z.square().sum()).backward()
        return x.grad, same.grad

    plain = gradients(plainly)
    torch.testing.assert_close(gradients(functools.partial(checkpointed, use_reentrant=False)), plain)


@pytest.mark.contract("CK-1")
def test_a_retained_graph_that_cannot_be_told_from_others_is_refused():
    layer = MomentumBatchNorm1d(4, history_weight=0.5, backend="traceable")
    x = torch.randn(6, 4, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward(retain_graph=True)
    layer(torch.randn(6, 4)).square().sum().backward()
    with pytest.raises(RuntimeError, match="none of the last 32"):
        y.pow(3).sum().backward()


@pytest.mark.contract("CK-1")
@in_both_variants
@on_every_method
def test_a_forward_is_repeated_after_a_reset(method, reentrant):
    def gradients(wrap):
        net = block(method)
        (x,) = inputs(1)
        net(2 * x.detach())
        y = wrap(net)(x)
        for layer in (net[1], net[4]):
            layer.reset_running_stats()
        y.square().sum().backward()
        return x.grad, [b.clone() for b in net.buffers()]

    wrapped = functools.partial(checkpointed, use_reentrant=reentrant)
    torch.testing.assert_close(gradients(wrapped), gradients(plainly))


@pytest.mark.contract("CK-1")
@on_every_method
def test_one_value_per_channel_is_recomputed(method):
    model = nn.Sequential(nn.Linear(4, 4), METHODS[method](4)).double()
    model(inputs(1)[0])
    assert_same_runs(
        model,
        plainly,
        functools.partial(checkpointed, use_reentrant=False),
        lambda step: [x[:1].detach().requires_grad_() for x in inputs(2)],
    )


@pytest.mark.contract("CK-1", "CK-3")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, under no_grad
@in_both_variants
@pytest.mark.parametrize("micro_batches", [1, 2])
@on_every_method
def test_with_double_forward(method, micro_batches, reentrant):
    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.body = block(method)
            self.wrap = wrap

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.wrap else self.body(x)

    nets = Net(True), Net(False)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        DoubleForward(net, optimizer)
        for _ in range(8):
            train_step(net, net, inputs(micro_batches))
            optimizer.step()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-12, atol=1e-13)


@pytest.mark.contract("CK-2", "CK-6")
@in_both_variants
@on_every_method
def test_each_forward_is_stored_once(method, reentrant):
    model = block(method)
    for _ in range(3):
        train_step(model, checkpointed(model, use_reentrant=reentrant), inputs(2))
    assert [int(model[i].num_batches_tracked) for i in (1, 4)] == [6, 6]


@pytest.mark.contract("CK-6")
def test_the_momentum_trick_against_double_updates_is_not_corrected_again():
    layer = MomentumBatchNorm1d(4, momentum=1 - (1 - 0.1) ** 0.5, history_weight=0.5).double()
    x = inputs(1)[0]
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(layer.running_mean, layer.momentum * x.mean(0).detach())


@pytest.mark.contract("CK-3")
@pytest.mark.parametrize("same", [False, True], ids=["different", "same"])
@pytest.mark.parametrize("times", [1, 3])
@on_every_method
def test_explicit_context_function(method, times, same):
    assert_same_runs(
        block(method),
        plainly,
        lambda m: checkpointed(m, use_reentrant=False, context_fn=mbnorm.checkpoint_context_fn(m)),
        lambda step: inputs(times, same),
    )


@pytest.mark.contract("CK-3")
@on_every_method
def test_explicit_context_function_nests(method):
    assert_same_runs(
        block(method),
        nested_plainly,
        lambda m: nested(m, use_reentrant=False, context_fn=mbnorm.checkpoint_context_fn(m)),
        lambda step: inputs(2, same=True),
    )


@pytest.mark.contract("CK-3")
def test_explicit_context_function_serves_many_calls():
    model = block("momentum")
    count = recompute.CALLS_KEPT + 5
    xs = inputs(count)
    assert_same_runs(
        model,
        plainly,
        lambda m: checkpointed(m, use_reentrant=False, context_fn=mbnorm.checkpoint_context_fn(m)),
        lambda step: xs,
        steps=1,
    )


@pytest.mark.contract("CK-3")
def test_more_calls_than_are_kept_are_refused_not_guessed():
    model = block("momentum")
    forward = checkpointed(model, use_reentrant=False)
    loss = sum(forward(x).square().sum() for x in inputs(recompute.CALLS_KEPT + 5))
    with pytest.raises(RuntimeError, match="checkpoint_context_fn"):
        loss.backward()


class OwnCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint of a user's own, as many code bases have."""

    @staticmethod
    def forward(ctx, function, x, *parameters):
        ctx.function, ctx.parameters = function, parameters
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return None, *torch.autograd.grad(y, (x, *ctx.parameters), gradient)


class CheckpointWithoutContext(OwnCheckpoint):
    """The same in the style that functorch asks for."""

    @staticmethod
    def forward(function, x, *parameters):
        with torch.no_grad():
            return function(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, x, *ctx.parameters = inputs
        ctx.save_for_backward(x)


@pytest.mark.contract("CK-1", "CK-2", "CK-3")
@pytest.mark.parametrize("own", [OwnCheckpoint, CheckpointWithoutContext])
@pytest.mark.parametrize("times", [1, 3])
@on_every_backend
@on_every_method
def test_checkpoints_that_are_not_torchs(method, backend, times, own):
    assert_same_runs(
        block(method, backend),
        plainly,
        lambda model: lambda x: own.apply(model, x, *model.parameters()),
        lambda step: [(step + 1) * x.detach() + step for x in inputs(times)],
    )


def save_products(context, operator, *args, **kwargs):
    saved = (torch.ops.aten.addmm.default, torch.ops.aten.mul.Tensor)
    policies = torch_checkpoint.CheckpointPolicy
    return policies.MUST_SAVE if operator in saved else policies.PREFER_RECOMPUTE


def save_all(context, operator, *args, **kwargs):
    return torch_checkpoint.CheckpointPolicy.MUST_SAVE


def save_nothing(context, operator, *args, **kwargs):
    return torch_checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.contract("CK-1", "CK-2", "CK-3")
@pytest.mark.parametrize("policy", [save_products, save_all, save_nothing])
@on_every_backend
@on_every_method
def test_selective_checkpoints(method, backend, policy):
    contexts = functools.partial(torch_checkpoint.create_selective_checkpoint_contexts, policy)

    class Scaled(nn.Sequential):
        def forward(self, x):
            # an operator of the layers' own backends, too, whose results must not be mixed up with theirs
            return super().forward(x) * x

    assert_same_runs(
        Scaled(*block(method, backend)),
        plainly,
        lambda model: checkpointed(model, use_reentrant=False, context_fn=contexts),
        lambda step: [(step + 1) * x.detach() + step for x in inputs(3)],
    )


@pytest.mark.contract("CK-4")
@pytest.mark.parametrize("explicit", [True, False], ids=["context_fn", "automatic"])
@on_every_method
def test_compiled_checkpointing(method, explicit):
    torch._dynamo.reset()

    def compiled(model):
        options = {"context_fn": mbnorm.checkpoint_context_fn(model)} if explicit else {}
        forward = checkpointed(model, use_reentrant=False, **options)
        # without the context function torch.compile leaves the block to eager mode
        return torch.compile(forward, backend="aot_eager", fullgraph=explicit)

    model = block(method)
    forward = compiled(model)
    assert_same_runs(
        model,
        plainly,
        lambda _: forward,
        lambda step: [(step + 1) * x.detach() + step for x in inputs(1)],
    )
    torch._dynamo.reset()


@pytest.mark.contract("CK-4")
def test_a_checkpoint_in_one_graph_needs_the_context_function():
    torch._dynamo.reset()
    forward = torch.compile(
        checkpointed(block("momentum"), use_reentrant=False), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="checkpoint_context_fn"):
        forward(inputs(1)[0])
    torch._dynamo.reset()


@pytest.mark.contract("CK-3")
def test_what_is_kept_for_a_recompute_is_bounded_and_dropped():
    layer = MomentumBatchNorm1d(4, history_weight=0.5)
    with torch.no_grad():
        for _ in range(5):
            layer(torch.randn(3, 4))
    assert len(layer._calls.calls) == 0
    outputs = [layer(torch.randn(3, 4)) for _ in range(3 * recompute.CALLS_KEPT)]
    assert len(layer._calls.calls) == recompute.CALLS_KEPT
    del outputs
    for _ in range(5):
        layer(torch.randn(3, 4)).square().sum().backward()
    assert len(layer._calls.calls) == 1
    assert not any("call" in name for name in layer.state_dict())


@pytest.mark.contract("CK-3")
def test_a_reentrant_recompute_of_other_values_is_refused():
    layer = MomentumBatchNorm1d(4, history_weight=0.5)
    x = torch.randn(3, 4, requires_grad=True)
    y = checkpoint(lambda x: layer(x * torch.rand(4)), x, use_reentrant=True, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="the recompute is not deterministic"):
        y.square().sum().backward()


@pytest.mark.contract("CK-3")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["input", "weight", "bias", "all"])
def test_a_forward_whose_backward_has_run_is_forgotten(trained, backend):
    layer = MomentumBatchNorm1d(4, history_weight=0.5, backend=backend)
    leaves = {"input": torch.randn(3, 4), "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(trained in (name, "all"))
    for _ in range(3):
        layer(leaves["input"]).square().sum().backward()
    assert len(layer._calls.calls) == 1


@pytest.mark.contract("CK-3")
def test_a_new_forward_inside_a_backward_is_a_forward_like_any_other():
    layer = MomentumBatchNorm1d(4, history_weight=0.5)
    for calls in (1, 2):
        loss = sum(layer(torch.randn(3, 4)).square().sum() for _ in range(calls))
        twin = copy.deepcopy(layer)
        seen = []
        x = torch.randn(3, 4, requires_grad=True)
        another = torch.randn(3, 4)
        x.register_hook(lambda _, seen=seen, another=another: seen.append(layer(another)))
        (loss + x.square().sum()).backward()
        assert torch.equal(seen[0], twin(another))
        assert int(layer.num_batches_tracked) == int(twin.num_batches_tracked)


@pytest.mark.contract("CK-3")
@in_both_variants
@pytest.mark.parametrize("test", [recompute.backward_runs, recompute._recompute_runs])
def test_both_tests_for_a_recompute_agree_with_what_torch_does(test, reentrant):
    answers = []

    def probe(x):
        answers.append(test())
        return x.sin()

    checkpoint(probe, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert answers == [False, True]


@pytest.mark.contract("CK-3")
def test_torch_still_has_the_private_test_that_is_relied_upon():
    assert hasattr(torch._C, "_current_graph_task_id"), "the slower fallback is in use: see recompute.py"
    assert recompute._graph_task is torch._C._current_graph_task_id
    assert recompute.backward_runs is not recompute._recompute_runs


@pytest.mark.contract("CK-1")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@on_every_method
def test_one_backward_each_in_any_order_for_the_same_input(method, order):
    model = block(method)
    twin = copy.deepcopy(model)
    runs = []
    for net, forward in ((model, checkpointed(model, use_reentrant=False)), (twin, twin)):
        xs = inputs(2, same=True)
        losses = [(forward(x) * (i + 1)).sin().sum() for i, x in enumerate(xs)]
        for i in order:
            losses[i].backward()
        runs.append([x.grad for x in xs] + [p.grad for p in net.parameters()])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-13)


@pytest.mark.contract("CK-1")
@on_every_backend
@on_every_method
def test_inputs_that_need_no_gradient(method, backend):
    layer = METHODS[method](4, backend=backend).double()
    twin = copy.deepcopy(layer)
    xs = [x.detach() for x in inputs(2, same=True)]
    for net, forward in ((layer, checkpointed(layer, use_reentrant=False)), (twin, twin)):
        loss = sum((forward(x) * x.sin() * (i + 1)).sum() for i, x in enumerate(xs))
        loss.backward()
        assert net.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.contract("CK-4")
def test_a_context_function_made_once_does_not_hide_a_checkpoint_without_it():
    torch._dynamo.reset()
    model = block("momentum")
    mbnorm.checkpoint_context_fn(model)
    forward = torch.compile(checkpointed(model, use_reentrant=False), backend="aot_eager")
    assert_same_runs(
        model, plainly, lambda _: forward, lambda step: [(step + 1) * x.detach() for x in inputs(1)]
    )
    torch._dynamo.reset()
