"""Every backend and layer on a GPU: numbers against the reference, which runs in float64 on the CPU.

Skipped without a GPU; `make test-gpu` runs them. Not yet run on a GPU.
"""

import copy
import itertools
from importlib.util import find_spec

import pytest
import reference
import test_host_syncs
import test_lockstep
import torch
from helpers import (
    CONTIGUOUS,
    DTYPES,
    LAYOUTS,
    budget,
    gradients,
    layout_id,
    make_input,
    make_parameters,
    native_errors,
    near_statistics,
    relative_error,
)
from test_layers import METHODS, build, same_state, shape_of, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import WARM_UP, captured
from mbnorm import DoubleForward, convert
from mbnorm.blend import VARIANCE_RULES
from mbnorm.functional import backend_for, blended_batch_norm

DEVICE = "cuda"
TRITON = find_spec("triton") is not None
BACKENDS = ["traceable", "aten", *(["triton"] if TRITON else [])]
LAST = torch.channels_last
# beside the small ones: maps that one program takes whole, maps that are split, many channels
SHAPES = [
    *LAYOUTS,
    *itertools.product([(2, 64, 56, 56), (2, 3, 150, 150), (2, 512, 7, 7)], [CONTIGUOUS, LAST]),
]
EPS = 1e-5

# a hang in the driver answers no signal, so the timeout ends the process, under the name of the test
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(120, method="thread"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_every_method = pytest.mark.parametrize("method", METHODS)


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def errors(found, wanted):
    return [relative_error(f.detach().cpu(), w.detach()) for f, w in zip(found, wanted, strict=True)]


def allowed_errors(dtype, native, peer):
    """Twice torch's own error on this device, or that of the formulas on the CPU, and one rounding."""
    if dtype == torch.float64:
        return [1e-11] * len(native)
    return [budget(dtype, max(pair)) for pair in zip(native, peer, strict=True)]


def native_errors_on_device(x, parameters, cotangent):
    return native_errors(*(t.to(DEVICE) for t in (x, *parameters, cotangent)), EPS)


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_triton_runs_where_no_backend_is_asked_for():
    assert backend_for(torch.empty(2, 3, device=DEVICE)) == "triton"


@on_every_backend
@pytest.mark.parametrize("variance", VARIANCE_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=layout_id)
def test_the_operator_matches_the_reference(shape, layout, dtype, variance, backend):
    x, cotangent = (make_input(shape, dtype, layout, seed=seed) for seed in (0, 5))
    parameters = make_parameters(shape[1], state_dtype(dtype))
    past = [t.to(state_dtype(dtype)) for t in near_statistics(x)]

    def run(backend, device):
        leaves = [t.detach().to(device, copy=True).requires_grad_() for t in (x, *parameters)]
        y, *statistics = blended_batch_norm(
            *leaves, *(t.to(device) for t in past), 0.3, variance=variance, eps=EPS, backend=backend
        )
        return (y, *gradients(y, tuple(leaves), cotangent.to(device))), statistics

    exact = [t.double().requires_grad_() for t in (x, *parameters)]
    want, *wanted_statistics = reference.blended_batch_norm(
        *exact, *map(torch.Tensor.double, past), 0.3, variance, EPS
    )
    wanted = (want, *gradients(want, tuple(exact), cotangent.double()))
    found, statistics = run(backend, DEVICE)
    peer, peer_statistics = run("aten", "cpu")
    allowed = allowed_errors(dtype, native_errors_on_device(x, parameters, cotangent), errors(peer, wanted))
    measured = errors(found, wanted)
    assert all(e <= most for e, most in zip(measured, allowed, strict=True)), (measured, allowed)
    assert found[0].dtype == dtype
    var, mean = torch.var_mean(x.to(DEVICE, state_dtype(dtype)).transpose(0, 1).flatten(1), 1, correction=0)
    own = 2 * errors((mean, var), wanted_statistics[:2])
    allowed = allowed_errors(state_dtype(dtype), own, errors(peer_statistics, wanted_statistics))
    measured = errors(statistics, wanted_statistics)
    assert all(e <= most for e, most in zip(measured, allowed, strict=True)), (measured, allowed)


# every seventh: each kind of layer meets every layout, dtype and backend, but not all of them at once
FOLLOWED = list(itertools.product(test_lockstep.pairs(), LAYOUTS, DTYPES, BACKENDS))[::7]
CHANNELS = 3


@pytest.mark.parametrize(
    ("pair", "shape", "layout", "dtype", "backend"),
    [(pair, *shape_and_layout, dtype, backend) for pair, shape_and_layout, dtype, backend in FOLLOWED],
    ids=lambda value: getattr(value, "id", None) or layout_id(value),
)
def test_layers_follow_the_reference_with_their_state(pair, shape, layout, dtype, backend):
    kind, twin_type, options = pair.values
    layer = test_lockstep.build(kind, len(shape), options, backend).to(DEVICE, state_dtype(dtype))
    peer = test_lockstep.build(kind, len(shape), options, "aten").to(state_dtype(dtype))
    twin = twin_type(CHANNELS, **options)
    parameters = make_parameters(CHANNELS, state_dtype(dtype))
    # the memory is empty, filling, full, and a ring is full twice
    for step in range(2 * options.get("memory_size", 4) + 2):
        shape_now = (3 + step % 3, CHANNELS, *shape[2:])
        x = make_input(shape_now, dtype, layout, seed=100 + step)
        cotangent = make_input(shape_now, dtype, layout, seed=200 + step)
        if step == 3:
            bad = x.clone()
            bad[(-1,) * bad.dim()] = torch.nan
            layer(bad.to(DEVICE))
            peer(bad)
        exact = [t.double().requires_grad_() for t in (x, *parameters)]
        want = twin(*exact)
        wanted = (want, *gradients(want, tuple(exact), cotangent.double()))
        of_peer = errors(outputs_and_gradients(peer, x, cotangent), wanted)
        allowed = allowed_errors(dtype, native_errors_on_device(x, parameters, cotangent), of_peer)
        found = errors(outputs_and_gradients(layer, x.to(DEVICE), cotangent.to(DEVICE)), wanted)
        # of few values in low precision those of the parameters' gradients are chance
        compared = 4 if dtype == torch.float64 else 2
        within = (e <= most for e, most in zip(found[:compared], allowed, strict=False))
        assert all(within), (step, found, allowed)
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        for name in ("running_mean", "running_var"):
            stored, average = getattr(layer, name).cpu().double(), getattr(twin, name)
            torch.testing.assert_close(stored, average, rtol=tolerance, atol=tolerance)
    assert int(layer.num_batches_tracked) == twin.batches
    # with a momentum of 0 a layer counts nothing
    assert int(layer.num_batches_skipped) == (options.get("momentum") != 0)
    x = make_input(shape_now, dtype, layout, seed=300)
    evaluated = layer.eval()(x.to(DEVICE)).detach().cpu()
    torch.testing.assert_close(evaluated, twin.evaluate(x.double(), *parameters).detach().to(dtype))


def outputs_and_gradients(layer, x, cotangent):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    return (y, *gradients(y, (leaf, layer.weight, layer.bias), cotangent))


def batch(seed, dtype=torch.float64, m=4):
    return make_input(shape_of(4, m), dtype, seed=seed).to(DEVICE)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def same_states(net, twin):
    close(net.state_dict(), twin.state_dict())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@on_every_backend
@on_every_method
def test_checkpoints_change_neither_gradients_nor_state(method, backend, reentrant):
    # a recompute ends with the last thing to be saved, which is to come after all that the layer does
    block = nn.Sequential(build(method, backend=backend), nn.Sigmoid()).double().to(DEVICE)
    twin = copy.deepcopy(block)
    x, cotangent = batch(1), batch(9)
    found = []
    for net, around in ((block, lambda x: checkpoint(block, x, use_reentrant=reentrant)), (twin, twin)):
        net(batch(0))
        leaf = x.clone().requires_grad_()
        around(leaf).backward(cotangent)
        found.append((leaf.grad, *(p.grad for p in net.parameters())))
    close(*found)
    same_states(block, twin)


def trainer(net, refreshed):
    """A training step of a net on an input that stays the same."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    if refreshed:
        DoubleForward(net, optimizer)
    weight = next(net.parameters())
    x = make_input((2, 3, 6, 6), weight.dtype, seed=4).to(weight.device)

    def step():
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    return step


def net_of(method, backend, device=DEVICE):
    torch.manual_seed(0)
    layers = (test_host_syncs.layer_of(method, backend) for _ in range(2))
    first, second = layers
    return nn.Sequential(nn.Conv2d(3, 3, 3), first, nn.ReLU(), nn.Conv2d(3, 3, 3), second).double().to(device)


of_every_kind = pytest.mark.parametrize("method", test_host_syncs.METHODS)
with_and_without_refresh = pytest.mark.parametrize("refreshed", [False, True], ids=["", "double forward"])


@with_and_without_refresh
@on_every_backend
@of_every_kind
def test_a_net_trains_as_on_the_cpu(method, backend, refreshed):
    net, twin = net_of(method, backend), net_of(method, "traceable", "cpu")
    for each in (net, twin):
        step = trainer(each, refreshed)
        for _ in range(7):
            step()
    same_states(net.cpu(), twin)


@with_and_without_refresh
@on_every_backend
@of_every_kind
def test_a_training_step_never_waits_for_the_device(method, backend, refreshed):
    step = trainer(net_of(method, backend), refreshed)
    # the first steps may ask whether a memory is empty
    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@with_and_without_refresh
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "traceable"])
@of_every_kind
def test_a_cuda_graph_trains_as_the_steps_that_it_holds(method, backend, refreshed):
    net = net_of(method, backend)
    twin = copy.deepcopy(net)
    replay, step = captured(trainer(net, refreshed)), trainer(twin, refreshed)
    for _ in range(5):
        replay()
    # a capture runs nothing, but what warms it up does
    for _ in range(WARM_UP + 5):
        step()
    same_states(net, twin)


@pytest.mark.skipif(not TRITON, reason="torch.compile needs the package triton for a GPU")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.timeout(300, method="thread")
@pytest.mark.parametrize("method", ["matched", "momentum", "memorized"])
def test_a_compiled_net_trains_as_an_eager_one(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    convert(net, method, batch_size=2)
    net.double().to(DEVICE)
    twin = copy.deepcopy(net)
    step = trainer(twin, False)
    # the graph is made of the net that the optimizer has
    compiled = torch.compile(net, fullgraph=True)
    compiled_step = trainer(compiled, False)
    for _ in range(5):
        compiled_step()
        step()
    same_states(net, twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=layout_id)
@on_every_method
def test_autocast_leaves_the_state_in_float32(method, dtype):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), build(method)).to(DEVICE)
    stock = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).to(DEVICE)
    x = make_input((2, 3, 6, 6), torch.float32).to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        y, native = net(x), stock(x)
    assert y.dtype == native.dtype
    y.float().square().mean().backward()
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@on_every_backend
@on_every_method
def test_an_empty_batch_changes_nothing(method, backend):
    layer = build(method, backend=backend).double().to(DEVICE)
    layer(batch(0))
    before = state_of(layer)
    assert layer(batch(1, m=0)).numel() == 0
    assert same_state(layer, before)
