"""torch.compile: a graph to train, one to refresh, one to evaluate, and they compute what eager mode does."""

import copy
import gc
from functools import partial

import pytest
import torch
from helpers import make_input
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

from mbnorm import (
    DoubleForward,
    MatchedBatchNorm1d,
    MatchedBatchNorm2d,
    MatchedBatchNorm3d,
    MemorizedBatchNorm1d,
    MomentumBatchNorm1d,
    MomentumSchedule,
    convert,
    no_update,
    recompute,
)
from mbnorm.backends import cpu

METHODS = {
    "momentum": ("momentum", {"history_weight": 0.75}),
    "matched": ("matched", {}),
    "matched, plain": ("matched", {"measured": False}),
    "matched, uncentered": ("matched", {"subtract_mean": False}),
    "memorized": ("memorized", {"memory_size": 32}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)
# torch's compiler warns of what it does itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def at_most(graphs):
    """Let torch.compile(fullgraph=True) raise when it needs more graphs of one function than this."""
    return torch._dynamo.config.patch(recompile_limit=graphs)


class Counted:
    """A backend that counts the graphs that run: one may be thrown away when Dynamo starts over."""

    def __init__(self):
        self.ran = set()

    def __call__(self, graph, inputs):
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*args):
            self.ran.add(run)
            return compiled(*args)

        return run

    @property
    def graphs(self):
        return len(self.ran)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm2d = nn.BatchNorm2d(3)
        self.linear = nn.Linear(48, 4)
        self.norm1d = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm1d(self.linear(torch.relu(self.norm2d(self.conv(x))).flatten(1)))


def nets(method, dtype=torch.float64, **options):
    """A net with a 2d and a 1d norm, and its twin."""
    torch.manual_seed(0)
    net = Net()
    name, defaults = METHODS[method]
    convert(net, name, **defaults | options)
    net.to(dtype)
    return net, copy.deepcopy(net)


def images(seed, m=2, dtype=torch.float64):
    return make_input((m, 2, 6, 6), dtype, seed=seed)


def backward(net, y, seed):
    net.zero_grad()
    y.backward(make_input(tuple(y.shape), torch.float64, seed=1000 + seed).to(y.dtype))


def gradients_of(net):
    return {name: p.grad for name, p in net.named_parameters()}


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def assert_same(net, twin):
    """Compare parameters and state: also buffers that a state_dict leaves out."""
    assert_close(dict(net.named_parameters()), dict(twin.named_parameters()))
    assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.contract("TC-1", "TC-3", "TC-4")
@on_every_method
def test_three_graphs_train_refresh_and_evaluate_as_eager_mode_does(method):
    steps, poisoned = 70, (0, 20, 50)  # the memory of 32 is empty, half full, wrapped twice
    net, twin = nets(method)
    counted = Counted()
    compiled = torch.compile(net, backend=counted, fullgraph=True)
    optimizers, schedules = {}, []
    for called, model in ((compiled, net), (twin, twin)):
        optimizers[called] = torch.optim.SGD(model.parameters(), lr=0.001)
        DoubleForward(called, optimizers[called])
        if method == "momentum":
            schedules.append(MomentumSchedule(model, steps, batch_size=2))
    with at_most(3):
        for step in range(steps):
            x = images(step)
            if step in poisoned:
                x[0, 0, 0, 0] = torch.nan
            outputs = []
            for called, model in ((compiled, net), (twin, twin)):
                outputs.append(called(x))
                if step not in poisoned:
                    backward(model, outputs[-1], step)
                    optimizers[called].step()
            torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10, equal_nan=True)
            if step not in poisoned:
                assert_close(gradients_of(net), gradients_of(twin))
                for schedule in schedules:
                    schedule.step()
            assert_same(net, twin)
            if step % 16 == 5:
                with torch.no_grad():
                    assert_close(compiled.eval()(x), twin.eval()(x))
                compiled.train(), twin.train()
    assert counted.graphs == 3
    assert int(net.norm2d.num_batches_skipped) == len(poisoned)


@pytest.mark.contract("TC-4")
@pytest.mark.skipif(cpu.missing() is not None, reason="inductor needs a C++ compiler")
@on_every_method
def test_inductor_computes_what_eager_mode_does(method):
    layer = nets(method, **({"memory_size": 3} if method == "memorized" else {}))[0].norm1d
    twin = copy.deepcopy(layer)
    schedules = [MomentumSchedule(one, 8, batch_size=2) for one in (layer, twin) if method == "momentum"]
    compiled = torch.compile(layer, backend="inductor", fullgraph=True)
    for step in range(8):
        x = make_input((2, 4), torch.float64, seed=step)
        if step == 4:
            x[0, 0] = torch.inf
        leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = compiled(leaf), twin(twin_leaf)
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-10, equal_nan=True)
        if step != 4:
            backward(layer, y, step)
            backward(twin, want, step)
            assert_close(leaf.grad, twin_leaf.grad)
            assert_close(gradients_of(layer), gradients_of(twin))
        assert_same(layer, twin)
        for schedule in schedules:
            schedule.step()


CHEAP_TO_READ = {
    "averaged": lambda: MomentumBatchNorm1d(3, history_weight=0.75),
    "pooled": lambda: MomentumBatchNorm1d(3, history_weight=0.75, variance_rule="pooled"),
    "matched": lambda: MatchedBatchNorm1d(3, matched_batch_size=64, measured=False, early_weight=0),
    "measured": lambda: MatchedBatchNorm1d(3, matched_batch_size=64, early_weight=0),
    "memory of 2": lambda: MemorizedBatchNorm1d(3, memory_size=2),
    "memory of 4, decaying": lambda: MemorizedBatchNorm1d(3, memory_size=4, decay=0.9),
}


@pytest.mark.contract("TC-4")
@pytest.mark.parametrize("kind", CHEAP_TO_READ)
def test_the_backward_uses_what_the_forward_had_read(kind):
    # what is cheap to compute torch.compile computes again in the backward: here, from overwritten buffers
    layer = CHEAP_TO_READ[kind]().double()
    if torch.__version__.startswith("2.10.") and layer.gradient == "remembered":
        pytest.skip("torch 2.10 refuses several forwards before a backward that writes buffers")
    twin = copy.deepcopy(layer)
    # inductor's way of parting forward from backward
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    for step in range(3):
        # several forwards before a backward, as in accumulation
        batches = [make_input((4, 3), torch.float64, seed=10 * step + i) + step + i for i in range(3)]
        found = []
        for call in (compiled, twin):
            leaves = [x.clone().requires_grad_() for x in batches]
            loss = sum((call(x) * make_input((4, 3), torch.float64, seed=9)).sum() for x in leaves)
            found.append(torch.autograd.grad(loss, [*leaves, *call.parameters()]))
        assert_close(*found)


@pytest.mark.contract("TC-4")
@pytest.mark.parametrize("backend", ["cpu", "aten", "traceable"])
def test_the_compiler_makes_the_kernels_whichever_backend_a_layer_has(backend):
    if backend == "cpu" and cpu.missing() is not None:
        pytest.skip("needs a C++ compiler")
    layer = MatchedBatchNorm2d(3, backend=backend).double()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x = make_input((2, 3, 4, 4), torch.float64, seed=step)
        leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        backward(layer, compiled(leaf), step)
        backward(twin, twin(twin_leaf), step)
        assert_close(leaf.grad, twin_leaf.grad)
        assert_same(layer, twin)


@pytest.mark.contract("TC-4")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 3), (2, 3, 5), (2, 3, 4, 4), (2, 3, 2, 4, 4)])
def test_every_rank_and_precision_compiles_to_what_eager_mode_does(shape, dtype):
    kinds = {4: MatchedBatchNorm2d, 5: MatchedBatchNorm3d}
    layer = kinds.get(len(shape), MatchedBatchNorm1d)(3)
    layer = layer.double() if dtype == torch.float64 else layer
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    # one rounding of the output and of its gradient; the state is not rounded
    once = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-5}
    for step in range(3):
        x = make_input(shape, dtype, seed=step)
        leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = compiled(leaf), twin(twin_leaf)
        backward(layer, y, step)
        backward(twin, want, step)
        torch.testing.assert_close((y, leaf.grad), (want, twin_leaf.grad), **once)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


@on_every_method
def test_a_compiled_empty_batch_changes_nothing(method):
    norm = nets(method)[0].norm2d
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    compiled(make_input((2, 3, 4, 4), torch.float64)).sum().backward()
    before = copy.deepcopy(norm.state_dict())
    x = torch.empty(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert_close(norm.state_dict(), before)


def graphs_of_a_step(layer, x):
    """Return the operators of the forward and the backward graph of a compiled step."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    split = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=split, decompositions=select_decomp_table
    )
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    y.backward(torch.randn_like(y))
    return [[n for n in graph.nodes if n.op == "call_function"] for graph in graphs]


@on_every_method
def test_a_compiled_backward_takes_the_two_sums_of_batch_norms_own(method):
    x = make_input((2, 3, 64, 64), torch.float32).requires_grad_()
    _, backward = graphs_of_a_step(nets(method)[0].norm2d.float(), x)
    over_the_input = [
        n
        for n in backward
        if n.meta["val"].numel() * x[0, 0].numel() <= x.numel()
        and any(a.meta["val"].numel() == x.numel() for a in n.all_input_nodes)
    ]
    assert [n.target for n in over_the_input] == 2 * [torch.ops.aten.sum.dim_IntList]


@on_every_method
def test_a_compiled_layer_saves_its_input_alone_also_with_a_relu_behind_it(method):
    net = nn.Sequential(nets(method)[0].norm2d.float(), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    x = make_input((2, 3, 16, 16), torch.float32).requires_grad_()
    returned = graphs_of_a_step(net, x)[0][-1].graph.output_node().args[0]
    large = [n.meta["val"] for n in returned if n.meta["val"].numel() >= x.numel()]
    assert [(t.shape, t.dtype) for t in large] == [(x.shape, x.dtype)]


@on_every_method
def test_a_compiled_forward_concatenates_nothing(method):
    # what is concatenated inductor writes in kernels of their own, and reads again
    forward, _ = graphs_of_a_step(
        nets(method)[0].norm2d.float(), make_input((2, 3, 4, 4), torch.float32).requires_grad_()
    )
    assert torch.ops.aten.cat.default not in [n.target for n in forward]


@pytest.mark.contract("TC-1", "B1-3")
@on_every_method
def test_changing_batch_sizes_take_a_graph_for_the_first_one_for_all_others_and_one_for_1(method):
    net, twin = nets(method, **({"memory_size": 4} if method == "memorized" else {}))
    norm, twin_norm = net.norm2d, twin.norm2d
    if method == "momentum":
        norm.history_weight.fill_(0.5)
        twin_norm.history_weight.fill_(0.5)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    with at_most(3):
        for step, m in enumerate([2, 2, 3, 5, 1, 2, 4, 1, 7, 64, 3]):
            x = make_input((m, 3, 4, 4), torch.float64, seed=step)
            leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, want = compiled(leaf), twin_norm(twin_leaf)
            assert_close(y, want)
            backward(norm, y, step)
            backward(twin_norm, want, step)
            assert_close(leaf.grad, twin_leaf.grad)
            assert_same(norm, twin_norm)


@pytest.mark.contract("TC-1", "TC-4", "AM-5")
@on_every_method
def test_autocast_takes_no_graph_more_and_rounds_no_state(method):
    nets_ = [nn.Sequential(net.conv, net.norm2d) for net in nets(method, torch.float32)]
    counted = Counted()
    compiled = torch.compile(nets_[0], backend=counted, fullgraph=True)
    outputs = []
    with at_most(3):
        for called, net in ((compiled, nets_[0]), (nets_[1], nets_[1])):
            # rate 0: the rounding of one step is not to move the next
            optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
            DoubleForward(called, optimizer)
            for step in range(6):
                x = images(step, dtype=torch.float32)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = called(x)
                backward(net, y, step)
                optimizer.step()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                called.eval()(x)
            outputs.append(y.detach())
    assert counted.graphs == 3
    assert outputs[0].dtype == torch.bfloat16
    # both round the same float32 values, that differ in the order of sums: by one step of bfloat16 at most
    torch.testing.assert_close(*outputs, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    torch.testing.assert_close(*(dict(net.named_buffers()) for net in nets_))


@pytest.mark.contract("TC-2")
@on_every_method
def test_compiled_code_writes_the_state_in_place(method):
    layer = nets(method)[0].norm1d
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    state = dict(layer.named_buffers())
    places = {name: b.data_ptr() for name, b in state.items()}
    before = {name: b.clone() for name, b in state.items()}
    for step in range(3):
        compiled(make_input((2, 4), torch.float64, seed=step))
    assert all(b is state[name] for name, b in layer.named_buffers())
    assert {name: b.data_ptr() for name, b in state.items()} == places
    assert not torch.equal(state["memory_var"], before["memory_var"])
    assert int(state["num_batches_tracked"]) == 3


@pytest.mark.contract("TC-6")
@on_every_method
def test_compiled_code_looks_for_no_recompute_and_remembers_no_forward(method, monkeypatch):
    net, _ = nets(method)
    monkeypatch.setattr(recompute, "backward_runs", lambda: pytest.fail("looked for a recompute"))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for step in range(2):
        backward(net, compiled(images(step)), step)
    assert len(net.norm2d._calls.calls) == 0
    assert int(net.norm2d.num_batches_tracked) == 2


def test_no_update_stores_nothing_in_compiled_code():
    net, _ = nets("memorized")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    compiled(images(0))
    before = {name: b.clone() for name, b in net.named_buffers()}
    with no_update(net):
        compiled(images(1))
    assert_close(dict(net.named_buffers()), before)
    compiled(images(2))
    assert int(net.norm2d.num_batches_tracked) == 2


@pytest.mark.contract("TC-1")
@on_every_method
def test_a_compiled_layer_in_an_eager_net_takes_three_graphs(method):
    net, twin = nets(method)
    counted = Counted()
    net.norm2d.compile(backend=counted, fullgraph=True)
    with at_most(3):
        for model in (net, twin):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
            DoubleForward(model, optimizer)
            for step in range(4):
                backward(model, model(images(step)), step)
                optimizer.step()
                with torch.no_grad():
                    model.eval()(images(step))
                model.train()
            model.zero_grad()
    assert counted.graphs == 3
    assert_same(net, twin)


@pytest.mark.contract("TC-1")
@on_every_method
def test_compiling_in_place_takes_one_graph_to_train_and_one_to_evaluate(method):
    net, twin = nets(method)
    counted = Counted()
    net.compile(backend=counted, fullgraph=True)
    with at_most(2):
        for step in range(4):
            for model in (net, twin):
                backward(model.train(), model(images(step)), step)
            assert_close(gradients_of(net), gradients_of(twin))
            with torch.no_grad():
                assert_close(net.eval()(images(step)), twin.eval()(images(step)))
    assert counted.graphs == 2
    assert_same(net, twin)


def test_double_forward_says_where_it_belongs_with_a_net_compiled_in_place():
    net, _ = nets("memorized")
    net.compile(backend="eager", fullgraph=True)
    DoubleForward(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(Unsupported, match=r"attach DoubleForward to what torch\.compile\(model\) returns"):
        net(images(0))


def test_double_forward_of_a_net_compiled_in_place_breaks_the_graph_and_refreshes():
    net, twin = nets("memorized")
    net.compile(backend="eager")
    for model in (net, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        DoubleForward(model, optimizer)
        for step in range(4):
            backward(model, model(images(step)), step)
            optimizer.step()
    assert_same(net, twin)


@pytest.mark.contract("DF-7")
@on_every_method
def test_a_compiled_net_is_refreshed_by_hand(method):
    net, twin = nets(method)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for called, model in ((compiled, net), (twin, twin)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        double_forward = DoubleForward(called)
        for step in range(4):
            backward(model, called(images(step)), step)
            optimizer.step()
            double_forward.refresh()
    assert_same(net, twin)


@pytest.mark.contract("TC-6", "CK-1", "CK-2")
@pytest.mark.parametrize("use_reentrant", [False, True])
@on_every_method
def test_compiled_code_that_an_eager_checkpoint_calls_is_left_to_eager_mode(method, use_reentrant):
    net, twin = nets(method)
    compiled = torch.compile(net, backend="aot_eager")
    for step in range(3):
        x, twin_x = images(step).requires_grad_(), images(step).requires_grad_()
        backward(net, checkpoint(compiled, x, use_reentrant=use_reentrant), step)
        backward(twin, twin(twin_x), step)
        assert_close(x.grad, twin_x.grad)
        assert_same(net, twin)


@pytest.mark.contract("TC-6")
def test_a_whole_graph_that_an_eager_checkpoint_calls_is_refused():
    net, _ = nets("memorized")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="compile the function that calls checkpoint"):
        checkpoint(compiled, images(0), use_reentrant=False)
    # torch 2.10 and 2.11 have their hooks on until the checkpoint is collected
    gc.collect()


@pytest.mark.contract("TC-4")
@pytest.mark.parametrize("setting", [{"aggressive_recomputation": True}, {"activation_memory_budget": 0.0}])
def test_settings_that_recompute_what_was_overwritten_leave_the_layers_to_eager_mode(setting):
    net, twin = nets("matched")
    compiled = torch.compile(net, backend="aot_eager")
    with torch._functorch.config.patch(**setting):
        for step in range(3):
            backward(net, compiled(images(step)), step)
            backward(twin, twin(images(step)), step)
            assert_close(gradients_of(net), gradients_of(twin))
        torch._dynamo.reset()
        with pytest.raises(Unsupported, match="activation_memory_budget"):
            torch.compile(net, backend="eager", fullgraph=True)(images(0))


@pytest.mark.skipif(cpu.missing() is not None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("method", ["matched", "memorized"])
def test_the_mode_that_replays_graphs_trains_as_eager_mode_does(method):
    # one layer, since each takes inductor seconds
    layer = nets(method, **({"memory_size": 3} if method == "memorized" else {}))[0].norm1d
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    # eager forwards in between write the same state
    for step, call in enumerate([compiled, compiled, layer, compiled, layer, compiled]):
        x = make_input((2, 4), torch.float64, seed=step)
        leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = call(leaf), twin(twin_leaf)
        assert_close(y, want)
        backward(layer, y, step)
        backward(twin, want, step)
        assert_close(leaf.grad, twin_leaf.grad)
        assert_close(gradients_of(layer), gradients_of(twin))
        assert_same(layer, twin)
