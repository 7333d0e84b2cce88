"""gradient="remembered": the backward pass with a past of its own."""

import copy
import pickle

import pytest
import reference
import torch
from helpers import BACKENDS, LAYOUTS, layout_id, make_input
from torch import nn
from torch.utils.checkpoint import checkpoint

import mbnorm
from mbnorm import DoubleForward, MatchedBatchNorm2d, MomentumBatchNorm2d, convert, no_update, revert
from mbnorm.functional import choose

KINDS = {
    "matched": ("Matched", {"matched_batch_size": 1024}),
    "uncentered": ("Matched", {"matched_batch_size": 16, "subtract_mean": False}),
    "momentum": ("Momentum", {"history_weight": 0.75}),
    "pooled": ("Momentum", {"history_weight": 0.75, "variance_rule": "pooled"}),
    "memorized": ("Memorized", {"memory_size": 3}),
    "averaged": ("Memorized", {"memory_size": 3, "variance_rule": "averaged"}),
}
KERNELS = [backend for backend in BACKENDS if backend != "auto"]
on_every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, rank=4, features=3, **options):
    name, own = KINDS[kind]
    options = {"gradient": "remembered", **own, **options}
    return getattr(mbnorm, f"{name}BatchNorm{max(rank - 2, 1)}d")(features, **options)


def batch(step, rank=4, dtype=torch.float32, m=2):
    shape = (m, 3, *range(4, 2 + rank))
    x = make_input(shape, dtype, seed=step) * (1 + step) + step
    return x.to(dtype), make_input(shape, dtype, seed=100 + step)


def past_of(layer, x):
    n = x.numel() // x.shape[1]
    mean, var, weight = layer.memory.read(layer.state, n, len(x))
    return mean.clone(), var.clone(), torch.as_tensor(weight).clone()


def trained(layer, steps=3):
    for step in range(steps):
        x, dy = batch(step)
        layer(x.requires_grad_()).backward(dy)
    return layer


def own(layer):
    return layer.gradient_mean.clone(), layer.gradient_scale.clone()


@pytest.mark.contract("GR-1")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@on_every_kind
def test_gradient_and_state_are_the_references(kind, rank, backend):
    """Over steps from the empty memory to the full and wrapped one, with batches of several sizes."""
    try:
        choose(batch(0, rank)[0], backend)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(str(reason))
    layer = build(kind, rank, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
    g = s = torch.zeros(3, dtype=torch.float64)
    for step in range(6):
        x, dy = batch(step, rank, torch.float64, m=2 + step % 3)
        mean, var, a = past_of(layer, x)
        rule = layer.memory.variance_rule
        mB, vB, _ = reference.batch_statistics(x, rule)
        blended = reference.mix(mB, vB, mean, var, a, rule)
        weight = layer.weight.detach()
        past = 1 - (1 - a) ** 4, g, s, rule, layer.eps
        dx, dw, db, g, s = reference.remembered_gradient(dy, x, weight, mB, *blended, *past)
        layer.weight.grad = layer.bias.grad = None
        x.requires_grad_()
        layer(x).backward(dy)
        for found, expected in (
            (x.grad, dx),
            (layer.weight.grad, dw),
            (layer.bias.grad, db),
            (layer.gradient_mean, g),
            (layer.gradient_scale, s),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def error(layer, dtype):
    """How far a gradient is from that of the same numbers and the same past in float64."""
    for step in range(3):
        x, dy = (t.to(dtype) for t in batch(step, m=4))
        precise = copy.deepcopy(layer).double()
        exact = x.double().requires_grad_()
        precise(exact).backward(dy.double())
        layer(x.requires_grad_()).backward(dy)
    return (x.grad.double() - exact.grad).abs().max().item()


@pytest.mark.contract("GR-1")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", KERNELS)
def test_lower_precision_errs_at_most_twice_as_much_as_batch_norm(backend, dtype):
    try:
        choose(batch(1)[0].to(dtype), backend)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(str(reason))
    ours = build("matched", backend=backend)
    assert error(ours, dtype) <= 2 * error(nn.BatchNorm2d(3), dtype)


@pytest.mark.contract("GR-1")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS, ids=layout_id)
@on_every_kind
def test_every_layout_has_the_references_gradient(kind, shape, memory_format, backend, affine):
    try:
        choose(make_input(shape, torch.float64), backend)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(str(reason))
    layer = build(kind, len(shape), shape[1], dtype=torch.float64, backend=backend, affine=affine)
    g = s = torch.zeros(shape[1], dtype=torch.float64)
    for step in range(4):
        x, dy = (make_input(shape, torch.float64, memory_format, seed) for seed in (step, 100 + step))
        mean, var, a = past_of(layer, x)
        rule = layer.memory.variance_rule
        mB, vB, _ = reference.batch_statistics(x, rule)
        blended = reference.mix(mB, vB, mean, var, a, rule)
        weight = layer.weight.detach() if affine else None
        past = 1 - (1 - a) ** 4, g, s, rule, layer.eps
        dx, _, _, g, s = reference.remembered_gradient(dy, x, weight, mB, *blended, *past)
        layer(x.requires_grad_()).backward(dy)
        torch.testing.assert_close(x.grad, dx, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.gradient_scale, s, rtol=1e-9, atol=1e-9)
    assert x.grad.is_contiguous(memory_format=memory_format)


@on_every_kind
def test_the_forward_is_that_of_the_exact_gradient(kind):
    ours, exact = build(kind), build(kind, gradient="exact")
    for step in range(4):
        x, dy = batch(step)
        y = ours(x.clone().requires_grad_())
        torch.testing.assert_close(y, exact(x), rtol=0, atol=0)
        y.backward(dy)


@pytest.mark.contract("GR-1")
@on_every_kind
def test_where_the_batch_counts_alone_it_is_the_exact_gradient(kind):
    """The first batch has no past in the forward either."""
    ours, exact = build(kind), build(kind, gradient="exact")
    (x, dy), (again, _) = batch(1), batch(1)
    ours(x.requires_grad_()).backward(dy)
    exact(again.requires_grad_()).backward(dy)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-6)


def test_a_full_past_keeps_the_gradient_orthogonal_to_shift_and_scale():
    """Of the same batch again and again what is taken out becomes all of its two means."""
    layer = build("pooled")
    x, dy = batch(1)
    for _ in range(200):
        x.grad = None
        layer(x.requires_grad_()).backward(dy)
    assert x.grad.sum((0, 2, 3)).abs().max() < 1e-5
    assert (x.grad * x.detach()).sum((0, 2, 3)).abs().max() < 1e-4


@pytest.mark.contract("GR-2")
def test_a_second_backward_of_a_forward_reads_the_same_and_writes_nothing():
    layer = trained(build("matched"))
    x, dy = batch(5)
    y = layer(x.requires_grad_())
    y.backward(dy, retain_graph=True)
    first, written = x.grad.clone(), own(layer)
    x.grad = None
    y.backward(dy)
    torch.testing.assert_close(x.grad, first, rtol=0, atol=0)
    assert all(map(torch.equal, own(layer), written))


@pytest.mark.contract("GR-2")
def test_two_losses_have_the_gradients_of_one_past():
    layer = trained(build("matched"))
    x, dy = batch(5)
    before = own(layer)
    y = layer(x.requires_grad_())
    y.backward(dy, retain_graph=True)
    x.grad = None
    y.backward(2 * dy)
    second = x.grad.clone()
    other = trained(build("matched"))
    with torch.no_grad():
        other.gradient_mean.copy_(before[0])
        other.gradient_scale.copy_(before[1])
    again, _ = batch(5)
    other(again.requires_grad_()).backward(2 * dy)
    torch.testing.assert_close(second, again.grad)


@pytest.mark.contract("GR-2")
def test_gradients_of_inputs_alone_are_remembered_too():
    layer, other = trained(build("matched")), trained(build("matched"))
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    torch.autograd.grad(layer(x.requires_grad_()), x, dy)
    other(again).backward(dy)
    assert all(map(torch.equal, own(layer), own(other)))


@pytest.mark.contract("GR-2")
def test_gradients_of_parameters_alone_are_remembered_too():
    layer, other = trained(build("matched")), trained(build("matched"))
    x, dy = batch(5)
    layer(x).backward(dy)
    other(x.clone().requires_grad_()).backward(dy)
    assert all(map(torch.equal, own(layer), own(other)))


@pytest.mark.contract("GR-2")
def test_several_forwards_before_their_backwards_are_remembered_in_the_order_of_these():
    layer = build("momentum")
    (x1, dy1), (x2, dy2) = batch(1), batch(2)
    y1, y2 = layer(x1.requires_grad_()), layer(x2.requires_grad_())
    y2.backward(dy2)
    after_second = own(layer)
    y1.backward(dy1)
    # the first forward had no past: its own means alone are left
    for found, mean in zip(own(layer), _means(y1, dy1), strict=True):
        torch.testing.assert_close(found, mean)
    assert not torch.allclose(after_second[0], own(layer)[0])


def _means(y, dy):
    return dy.mean((0, 2, 3)), (dy * y.detach()).mean((0, 2, 3))


@pytest.mark.contract("GR-3")
@pytest.mark.parametrize("how", ["no_update", "momentum=0"])
def test_what_is_not_stored_is_read_and_not_written(how):
    layer = trained(build("matched"))
    exact = copy.deepcopy(layer)
    exact.gradient_mean.zero_()
    exact.gradient_scale.zero_()
    before = own(layer)
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    if how == "momentum=0":
        layer.momentum = exact.momentum = 0
        layer(x.requires_grad_()).backward(dy)
        exact(again).backward(dy)
    else:
        with no_update(layer), no_update(exact):
            layer(x.requires_grad_()).backward(dy)
            exact(again).backward(dy)
    assert all(map(torch.equal, own(layer), before))
    assert not torch.allclose(x.grad, again.grad)


@pytest.mark.contract("GR-3")
def test_eval_mode_has_torchs_gradient():
    layer = trained(build("matched")).eval()
    before = own(layer)
    x, dy = batch(5)
    layer(x.requires_grad_()).backward(dy)
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(x.grad, dy * scale.view(1, -1, 1, 1))
    assert all(map(torch.equal, own(layer), before))


@pytest.mark.contract("GR-3")
def test_a_graph_of_the_gradient_is_of_the_exact_one_and_nothing_is_written():
    layer, exact = trained(build("matched")), build("matched", gradient="exact")
    exact.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("gradient")})
    before = own(layer)
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(x.requires_grad_()), x, dy, create_graph=True)
    (expected,) = torch.autograd.grad(exact(again), again, dy, create_graph=True)
    torch.testing.assert_close(found, expected)
    assert all(map(torch.equal, own(layer), before))


@pytest.mark.contract("GR-4")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_remembered(value):
    layer = trained(build("matched"))
    before = own(layer)
    x, dy = batch(5)
    dy[0, 1, 0, 0] = value
    layer(x.requires_grad_()).backward(dy)
    assert all(map(torch.equal, own(layer), before))


@pytest.mark.contract("GR-4")
def test_what_is_finite_in_the_inputs_precision_alone_is_not_remembered():
    layer = trained(build("matched"))
    before = own(layer)
    x, dy = batch(5, dtype=torch.float64)
    layer(x.requires_grad_()).backward(1e200 * dy)
    assert all(map(torch.equal, own(layer), before))
    trained(layer)
    assert not torch.equal(own(layer)[0], before[0])


@pytest.mark.contract("GR-2")
@pytest.mark.parametrize("backend", KERNELS)
@on_every_kind
def test_a_batch_that_is_not_stored_for_its_variance_is_not_remembered(kind, backend):
    try:
        choose(batch(0)[0], backend)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(str(reason))
    layer = trained(build(kind, backend=backend))
    before = own(layer)
    x, dy = batch(5)
    # one channel is too large for its square
    x[:, 1] *= 1e25
    layer(x.requires_grad_()).backward(dy)
    assert layer.num_batches_skipped == 1
    assert all(map(torch.equal, own(layer), before))


@pytest.mark.contract("GR-3")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("after", [False, True], ids=["first", "after a backward"])
@pytest.mark.parametrize("backend", ["traceable", "aten", "cpu"])
def test_gradients_that_are_mapped_are_exact_and_nothing_is_written(backend, after):
    try:
        choose(batch(0)[0], backend)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    layer = trained(build("matched", backend=backend))
    exact = build("matched", backend=backend, gradient="exact")
    exact.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("gradient")})
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    y, wanted = layer(x.requires_grad_()), exact(again)
    if after:
        y.backward(dy, retain_graph=True)
    before = own(layer)
    directions = torch.stack((dy, 2 * dy, dy.sin()))

    def mapped(output, leaf):
        def gradient(direction):
            return torch.autograd.grad(output, leaf, direction, retain_graph=True)[0]

        return torch.vmap(gradient)(directions)

    torch.testing.assert_close(mapped(y, x), mapped(wanted, again))
    assert all(map(torch.equal, own(layer), before))


def set_statistics(layer):
    layer.running_mean = torch.ones(3)
    layer.running_var = torch.full((3,), 2.0)
    layer.train()


def load(layer):
    # no weights: torch refuses a backward pass after these have changed
    layer.load_state_dict(dict(trained(build("matched")).named_buffers()), strict=False)


NEW_STARTS = {
    "reset": lambda layer: layer.reset_running_stats(),
    "loaded": load,
    "other statistics": set_statistics,
}


@pytest.mark.contract("GR-4")
@pytest.mark.parametrize("start", NEW_STARTS)
def test_no_pending_backward_writes_after_a_new_start_however_many_there_are(start):
    layer = trained(build("matched"))
    outputs = [
        (layer(x.requires_grad_()), dy) for x, dy in map(batch, range(mbnorm.recompute.CALLS_KEPT + 2))
    ]
    NEW_STARTS[start](layer)
    before = own(layer)
    for y, dy in outputs:
        y.backward(dy)
    assert all(map(torch.equal, own(layer), before))


@pytest.mark.contract("GR-4")
def test_no_pending_backward_of_a_replica_writes_after_a_reset():
    layer = trained(build("matched"))
    replica = layer._replicate_for_data_parallel()
    # as torch does on the first device
    replica._parameters, replica._buffers = dict(layer._parameters), dict(layer._buffers)
    x, dy = batch(5)
    y = replica(x.requires_grad_())
    layer.reset_running_stats()
    y.backward(dy)
    assert all((t == 0).all() for t in own(layer))


@pytest.mark.contract("GR-5")
@pytest.mark.parametrize("reentrant", [False, True])
@on_every_kind
def test_checkpointing_remembers_each_backward_once(kind, reentrant):
    plain, saving = build(kind), build(kind)
    for step in range(4):
        x, dy = batch(step)
        again = x.clone().requires_grad_()
        plain(x.requires_grad_()).backward(dy)
        checkpoint(saving, again, use_reentrant=reentrant).backward(dy)
        torch.testing.assert_close(x.grad, again.grad, rtol=0, atol=0)
        assert all(map(torch.equal, own(plain), own(saving)))


@pytest.mark.contract("GR-5")
def test_a_checkpoint_of_a_block_that_is_called_twice():
    plain, saving = trained(build("matched")), trained(build("matched"))
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    plain(plain(x.requires_grad_())).backward(dy)
    twice = checkpoint(saving, checkpoint(saving, again, use_reentrant=False), use_reentrant=False)
    twice.backward(dy)
    torch.testing.assert_close(x.grad, again.grad, rtol=0, atol=0)
    assert all(map(torch.equal, own(plain), own(saving)))


@pytest.mark.contract("GR-3")
def test_the_second_forward_leaves_it_alone():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), build("matched"))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    DoubleForward(net, optimizer)
    for step in range(3):
        x, dy = batch(step)
        optimizer.zero_grad()
        net(x).backward(dy)
        before = own(net[1])
        optimizer.step()
        assert all(map(torch.equal, own(net[1]), before))
        assert before[0].abs().max() > 0


@pytest.mark.contract("GR-6")
def test_resetting_forgets():
    layer = trained(build("matched"))
    layer.reset_running_stats()
    assert all((t == 0).all() for t in own(layer))


@pytest.mark.contract("GR-6")
def test_a_state_dict_brings_it_back():
    layer = trained(build("matched"))
    other = build("matched")
    other.load_state_dict(layer.state_dict())
    assert all(map(torch.equal, own(layer), own(other)))


@pytest.mark.contract("GR-6")
def test_a_checkpoint_of_exact_gradients_loads_with_nothing_remembered():
    exact, layer = trained(build("matched", gradient="exact")), trained(build("matched"))
    with pytest.warns(UserWarning, match="written with gradient='exact'"):
        layer.load_state_dict(exact.state_dict())
    assert all((t == 0).all() for t in own(layer))
    assert torch.equal(layer.memory_mean, exact.memory_mean)


@pytest.mark.contract("GR-6")
def test_a_layer_with_exact_gradients_loads_without_it():
    exact, layer = build("matched", gradient="exact"), trained(build("matched"))
    with pytest.warns(UserWarning, match="written with gradient='remembered'"):
        exact.load_state_dict(layer.state_dict())
    assert torch.equal(layer.memory_mean, exact.memory_mean)


@pytest.mark.contract("GR-6")
def test_a_stock_checkpoint_loads_with_nothing_remembered():
    layer = build("matched")
    stock = nn.BatchNorm2d(3)
    stock(batch(1)[0])
    layer.load_state_dict(stock.state_dict(), strict=False)
    assert all((t == 0).all() for t in own(layer))


@pytest.mark.contract("GR-6")
@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_their_own(way):
    layer = trained(build("matched"))
    other = way(layer)
    assert all(map(torch.equal, own(layer), own(other)))
    trained(other)
    assert not torch.equal(own(layer)[0], own(other)[0])


@pytest.mark.contract("GR-6")
def test_convert_and_revert():
    net = nn.Sequential(nn.BatchNorm2d(3))
    convert(net, gradient="remembered")
    assert {"gradient_mean", "gradient_scale"} <= dict(net[0].named_buffers()).keys()
    trained(net[0])
    revert(net)
    assert net.state_dict().keys() == nn.Sequential(nn.BatchNorm2d(3)).state_dict().keys()


def test_exact_gradients_keep_nothing():
    assert not any(
        name.startswith("gradient") for name, _ in build("matched", gradient="exact").named_buffers()
    )


@pytest.mark.contract("GR-6")
def test_half_keeps_it_in_float32():
    layer = trained(build("matched")).half()
    assert layer.gradient_mean.dtype == torch.float32


@pytest.mark.contract("GR-7")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@on_every_kind
def test_compiled_code_remembers_as_eager(kind, backend):
    torch._dynamo.reset()
    eager, other = build(kind, dtype=torch.float64), build(kind, dtype=torch.float64)
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    for step in range(5):
        x, dy = batch(step, dtype=torch.float64)
        if step == 2:
            dy[0, 0, 0, 0] = torch.nan
        again = x.clone().requires_grad_()
        eager(x.requires_grad_()).backward(dy)
        compiled(again).backward(dy)
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(dict(other.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.contract("GR-7")
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_that_calls_a_layer_twice_remembers_both():
    torch._dynamo.reset()
    eager, other = build("matched", dtype=torch.float64), build("matched", dtype=torch.float64)
    compiled = torch.compile(lambda x: other(x) + other(x * x), backend="aot_eager", fullgraph=True)
    for step in range(3):
        x, dy = batch(step, dtype=torch.float64)
        again = x.clone().requires_grad_()
        (eager(x.requires_grad_()) + eager(x * x)).backward(dy)
        compiled(again).backward(dy)
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dict(other.named_buffers()), dict(eager.named_buffers()))


TRANSFORMS = {
    "grad": lambda f, x, v: torch.func.grad(lambda x: (f(x) * v).sum())(x),
    "grad of grad": lambda f, x, v: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).tanh().square().sum())(x).mul(v).sum()
    )(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](v)[0],
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack((x, v))),
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(lambda x: f(x).tanh().sum()))(
        torch.stack((x, v))
    ),
}


@pytest.mark.contract("GR-3", "GR-7")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms_have_the_exact_gradient(transform):
    torch._dynamo.reset()
    layer = trained(build("matched", dtype=torch.float64))

    def call(x):
        with no_update(layer):
            return layer(x)

    def transformed(x, v):
        return TRANSFORMS[transform](call, x, v)

    x, v = batch(7, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x, v)
    torch.testing.assert_close(found, transformed(x, v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.state_dict(), before)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match=r"gradient must be one of .*got 'mine'"):
        MatchedBatchNorm2d(3, gradient="mine")


@pytest.mark.contract("GR-8")
def test_ranks_that_do_not_wait_have_exact_gradients():
    with pytest.raises(ValueError, match=r'sync="late" needs gradient="exact"'):
        MomentumBatchNorm2d(3, history_weight=0.5, gradient="remembered", process_group="world", sync="late")


def test_one_step_of_training_is_no_derivative_of_its_loss():
    """What remembers takes more out than the exact gradient does: that is its point."""
    layer, exact = trained(build("pooled")), trained(build("pooled", gradient="exact"))
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    layer(x.requires_grad_()).backward(dy)
    exact(again).backward(dy)
    assert torch.equal(layer.memory_mean, exact.memory_mean)
    assert not torch.allclose(x.grad, again.grad)


@pytest.mark.contract("GR-1")
@pytest.mark.parametrize(("own", "given"), [("float64", "float32"), ("float32", "float64")])
def test_layers_and_inputs_may_differ_in_precision(own, given):
    layer = build("matched", dtype=getattr(torch, own))
    for step in range(3):
        x, dy = batch(step, dtype=getattr(torch, given))
        layer(x.requires_grad_()).backward(dy)
    assert layer.gradient_mean.dtype == getattr(torch, own)
    assert layer.gradient_mean.abs().max() > 0


@pytest.mark.contract("GR-3")
def test_batched_gradients_are_exact_and_write_nothing():
    layer, exact = trained(build("matched")), trained(build("matched", gradient="exact"))
    before = own(layer)
    x, dy = batch(5)
    again = x.clone().requires_grad_()
    many = torch.stack([dy, 2 * dy])
    (found,) = torch.autograd.grad(layer(x.requires_grad_()), x, many, is_grads_batched=True)
    (expected,) = torch.autograd.grad(exact(again), again, many, is_grads_batched=True)
    torch.testing.assert_close(found, expected)
    assert all(map(torch.equal, own(layer), before))


@pytest.mark.contract("GR-6")
@pytest.mark.parametrize(
    "change", [lambda layer: layer.to("cpu"), lambda layer: layer.float(), nn.Module.eval]
)
def test_the_buffers_are_the_same_tensors_after_a_move_that_moves_nothing(change):
    layer = trained(build("matched"))
    buffers = layer.gradient_mean, layer.gradient_scale
    change(layer)
    layer.load_state_dict(layer.state_dict())
    assert layer.gradient_mean is buffers[0]
    assert layer.gradient_scale is buffers[1]


@pytest.mark.contract("GR-6")
def test_a_state_of_its_own_tensors_keeps_the_memory():
    layer = trained(build("matched"))
    state = layer.state_dict()
    layer.cpu()
    x, dy = batch(5)
    layer(x.requires_grad_()).backward(dy)
    memory = layer.memory_measured.clone()
    layer.load_state_dict(state)
    assert torch.equal(layer.memory_measured, memory)


@pytest.mark.contract("GR-8")
def test_sharing_late_is_refused_too():
    with pytest.raises(ValueError, match="needs gradient="):
        build("matched").share_with("world", "late")


def test_the_gradient_of_a_layer_cannot_be_changed():
    with pytest.raises(AttributeError):
        build("matched").gradient = "exact"


def test_the_repr_shows_what_is_remembered():
    assert "gradient=remembered" in repr(build("matched"))
    assert "gradient" not in repr(build("matched", gradient="exact"))


@pytest.mark.contract("GR-4")
@pytest.mark.parametrize("change", [MatchedBatchNorm2d.reset_running_stats, MatchedBatchNorm2d.seed])
def test_a_backward_pass_after_a_reset_or_a_new_start_writes_nothing(change):
    layer = trained(build("matched"))
    x, dy = batch(4)
    y = layer(x.requires_grad_())
    change(layer)
    before = own(layer)
    y.backward(dy)
    for got, want in zip(own(layer), before, strict=True):
        assert torch.equal(got, want)
