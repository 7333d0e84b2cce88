import contextlib
import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from mbnorm import (
    DoubleForward,
    MatchedBatchNorm1d,
    MemorizedBatchNorm1d,
    MomentumBatchNorm1d,
    MomentumSchedule,
    convert,
    no_update,
    revert,
)


def matched(measured, early_weight):
    options = {"matched_batch_size": 64, "measured": measured, "early_weight": early_weight}
    # the reference has the exact gradient; test_gradient.py has the other
    layer = functools.partial(MatchedBatchNorm1d, gradient="exact")
    return layer, reference.MatchedNorm, options


METHODS = {
    "momentum": (MomentumBatchNorm1d, reference.MomentumNorm, {"history_weight": 0.75}),
    "matched": matched(measured=False, early_weight=0.0),
    "matched-early": matched(measured=False, early_weight=8.0),
    "measured": matched(measured=True, early_weight=0.0),
    "memorized": (MemorizedBatchNorm1d, reference.MemorizedNorm, {"memory_size": 7}),
    "memorized-ema": (
        MemorizedBatchNorm1d,
        reference.MemorizedNorm,
        {"memory_size": 7, "inference": "ema"},
    ),
}
on_every_method = pytest.mark.parametrize("method", METHODS)


def small_net(method, dtype=torch.float64):
    torch.manual_seed(0)
    layer, _, options = METHODS[method]
    return nn.Sequential(
        nn.Linear(4, 6), layer(6, **options), nn.ReLU(), nn.Linear(6, 5), layer(5, **options)
    ).to(dtype)


def batches(count, m=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss_of(y):
    target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return (y - target).square().mean()


def reference_run(method, steps, micro_batches, inputs):
    """A hand-written Double-Forward loop over the reference; yields both norms after each step."""
    _, twin, options = METHODS[method]
    net = small_net(method)
    first, second = net[0], net[3]
    norms = twin(6, **options), twin(5, **options)
    parameters = [p.detach().clone().requires_grad_() for p in net.parameters()]
    w1, b1, g1, h1, w2, b2, g2, h2 = parameters
    assert torch.equal(w1, first.weight)
    assert torch.equal(w2, second.weight)

    def forward(x):
        hidden = norms[0](F.linear(x, w1, b1), g1, h1)
        return norms[1](F.linear(hidden.relu(), w2, b2), g2, h2)

    for step in range(steps):
        step_batches = inputs[step * micro_batches : (step + 1) * micro_batches]
        marks = [norm.mark() for norm in norms]
        loss = sum(loss_of(forward(x)) for x in step_batches)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 0.05 * g
            for norm, mark in zip(norms, marks, strict=True):
                norm.rewind(mark)
            for x in step_batches:
                forward(x)
        yield norms, parameters


@pytest.mark.contract("GA-1", "GA-5")
@pytest.mark.parametrize("micro_batches", [1, 3])
@on_every_method
def test_50_steps_equal_a_hand_written_loop_over_the_reference(method, micro_batches):
    steps = 50
    inputs = batches(steps * micro_batches)
    net = small_net(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    wanted = reference_run(method, steps, micro_batches, inputs)
    with DoubleForward(net, optimizer):
        for step, (norms, parameters) in zip(range(steps), wanted, strict=True):
            optimizer.zero_grad()
            for x in inputs[step * micro_batches : (step + 1) * micro_batches]:
                loss_of(net(x)).backward()
            optimizer.step()
            for layer, norm in zip((net[1], net[4]), norms, strict=True):
                torch.testing.assert_close(layer.running_mean, norm.running_mean, rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(layer.running_var, norm.running_var, rtol=1e-9, atol=1e-10)
                assert int(layer.num_batches_tracked) == norm.batches
            for p, want in zip(net.parameters(), parameters, strict=True):
                torch.testing.assert_close(p, want, rtol=1e-9, atol=1e-10)


@pytest.mark.contract("DF-7")
@pytest.mark.parametrize("micro_batches", [1, 3])
@on_every_method
def test_refresh_by_hand_equals_the_same_loop(method, micro_batches):
    steps = 20
    inputs = batches(steps * micro_batches)
    net = small_net(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    double_forward = DoubleForward(net)
    for step, (norms, _) in enumerate(reference_run(method, steps, micro_batches, inputs)):
        optimizer.zero_grad()
        for x in inputs[step * micro_batches : (step + 1) * micro_batches]:
            loss_of(net(x)).backward()
        optimizer.step()
        double_forward.refresh()
        for layer, norm in zip((net[1], net[4]), norms, strict=True):
            torch.testing.assert_close(layer.running_mean, norm.running_mean, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(layer.running_var, norm.running_var, rtol=1e-9, atol=1e-10)
            assert int(layer.num_batches_tracked) == norm.batches


class Mixed(nn.Module):
    """A net with everything that a refresh must leave alone."""

    def __init__(self, method):
        super().__init__()
        self.body = small_net(method, torch.float32)
        self.plain = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("reassigned", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.reassigned = self.reassigned + 1
        return self.plain(self.dropout(self.body(x)))


def everything_but_memories(net, optimizer):
    memorizing = {id(b) for layer in (net.body[1], net.body[4]) for b in layer.buffers()}
    tensors = {n: b.clone() for n, b in net.named_buffers() if id(b) not in memorizing}
    tensors |= {n: p.detach().clone() for n, p in net.named_parameters()}
    tensors |= {f"{n}.grad": p.grad.clone() for n, p in net.named_parameters()}
    for i, state in enumerate(optimizer.state.values()):
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    tensors["rng"] = torch.get_rng_state()
    modes = {n: m.training for n, m in net.named_modules()}
    return tensors, modes, torch.is_grad_enabled()


@pytest.mark.contract("DF-1", "DF-3")
@on_every_method
def test_a_refresh_changes_nothing_but_the_memories(method):
    net = Mixed(method)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(everything_but_memories(net, optimizer)))
    DoubleForward(net, optimizer)
    optimizer.register_step_post_hook(lambda *_: seen.append(everything_but_memories(net, optimizer)))
    net.body[0].eval()
    for x in batches(6):
        optimizer.zero_grad()
        loss_of(net(x.float())).backward()
        before = net.body[1].memory_mean.clone()
        optimizer.step()
        (tensors, *rest), (tensors_after, *rest_after) = seen
        assert rest == rest_after
        assert tensors.keys() == tensors_after.keys()
        assert all(torch.equal(t, tensors_after[n]) for n, t in tensors.items())
        assert not torch.equal(net.body[1].memory_mean, before)
        seen.clear()


def test_buffers_saved_for_a_pending_backward_stay_usable():
    net = nn.Sequential(nn.Linear(4, 4), MemorizedBatchNorm1d(4), nn.BatchNorm1d(4).eval())
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    net.train()
    net[2].eval()
    loss = loss_of(net(torch.randn(4, 4)))
    loss.backward(retain_graph=True, inputs=list(net[2].parameters()))
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    optimizer.step()
    (gradient,) = torch.autograd.grad(loss, net[2].weight)
    assert torch.isfinite(gradient).all()


@pytest.mark.contract("DF-2")
@on_every_method
def test_no_graph_is_built_in_the_second_forward(method):
    net = small_net(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    outputs = []
    net.register_forward_hook(lambda module, args, y: outputs.append(y))
    DoubleForward(net, optimizer)
    loss_of(net(batches(1)[0])).backward()
    optimizer.step()
    assert [y.requires_grad for y in outputs] == [True, False]


def steps_of_refresh(net, optimizer, run):
    calls = []
    handle = net.register_forward_hook(lambda module, args, y: calls.append(args[0]))
    run()
    handle.remove()
    return calls


def train_step(net, optimizer, *inputs):
    optimizer.zero_grad()
    for x in inputs:
        loss_of(net(x)).backward()
    optimizer.step()


def test_removing_stops_it_and_releases_the_inputs():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = batches(1)[0]
    with DoubleForward(net, optimizer):
        loss_of(net(x)).backward()
    reference_to_x = weakref.ref(x)
    assert len(steps_of_refresh(net, optimizer, optimizer.step)) == 0
    del x
    gc.collect()
    assert reference_to_x() is None


@pytest.mark.contract("DF-2")
def test_inputs_are_released_after_each_step():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    x = batches(1)[0]
    train_step(net, optimizer, x)
    reference_to_x = weakref.ref(x)
    del x
    gc.collect()
    assert reference_to_x() is None


@pytest.mark.contract("DF-2")
def test_inputs_are_kept_without_their_graph_and_not_copied():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    made_by_another_net = batches(1)[0].requires_grad_() * 2
    calls = steps_of_refresh(net, optimizer, lambda: train_step(net, optimizer, made_by_another_net))
    assert [x.requires_grad for x in calls] == [True, False]
    assert calls[0].data_ptr() == calls[1].data_ptr()


@pytest.mark.parametrize("by_hand", [False, True])
def test_hooks_of_the_users_see_the_inputs_once_in_each_forward(by_hand):
    net = nn.Sequential(MemorizedBatchNorm1d(4))
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = batches(1)[0].float()
    double_forward = DoubleForward(net, None if by_hand else optimizer)
    train_step(net, optimizer, x)
    if by_hand:
        double_forward.refresh()
    torch.testing.assert_close(net[0].running_mean, x.mean(0) + 1)


def test_a_model_on_the_meta_device_can_be_stepped():
    net = small_net("memorized").to("meta")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    net(batches(1)[0].to("meta")).square().mean().backward()
    assert len(steps_of_refresh(net, optimizer, optimizer.step)) == 1


@pytest.mark.contract("GA-1")
def test_every_counts_optimizer_steps_and_replays_the_last_steps_batches():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer, every=2)
    inputs = batches(4)
    replayed = []
    for pair in (inputs[:2], inputs[2:]):
        calls = steps_of_refresh(net, optimizer, lambda pair=pair: train_step(net, optimizer, *pair))
        replayed.append(calls[2:])
    assert replayed[0] == []
    assert [torch.equal(a, b) for a, b in zip(replayed[1], inputs[2:], strict=True)] == [True, True]


def test_eval_and_no_grad_forwards_are_not_replayed():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    x, *others = batches(3)
    loss_of(net(x)).backward()
    net.eval()
    net(others[0])
    net.train()
    calls = steps_of_refresh(net, optimizer, optimizer.step)
    assert len(calls) == 1
    assert torch.equal(calls[0], x)


def test_no_more_forwards_are_kept_than_the_memory_holds():
    net = nn.Sequential(MemorizedBatchNorm1d(4, memory_size=3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    inputs = batches(5)
    calls = steps_of_refresh(net, optimizer, lambda: train_step(net, optimizer, *(x.float() for x in inputs)))
    assert len(calls) == 5 + 3
    assert torch.equal(calls[-1], inputs[-1].float())


@pytest.mark.contract("DF-5")
def test_of_a_closures_forwards_the_last_is_kept():
    net = small_net("memorized")
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=6)
    DoubleForward(net, optimizer)
    x = batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net(x))
        loss.backward()
        return loss

    calls = steps_of_refresh(net, optimizer, lambda: optimizer.step(closure))
    assert len(calls) > 3
    assert int(net[1].num_batches_tracked) == 1
    assert int((net[1].memory_counts > 0).sum()) == 1


def test_keyword_inputs_are_replayed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MemorizedBatchNorm1d(4)

        def forward(self, *, x, scale):
            return self.norm(x["a"][0]) * scale

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    x = torch.randn(4, 4)
    loss_of(net(x={"a": [x]}, scale=2)).backward()
    optimizer.step()
    assert int(net.norm.num_batches_tracked) == 1
    torch.testing.assert_close(net.norm.running_mean, x.mean(0))


@pytest.mark.contract("DF-2", "AM-5")
def test_the_replay_runs_under_the_forwards_autocast():
    net = nn.Sequential(nn.Linear(4, 4), MemorizedBatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dtypes = []
    net[1].register_forward_hook(lambda module, args, y: dtypes.append(y.dtype))
    DoubleForward(net, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net(torch.randn(4, 4)))
    loss.backward()
    optimizer.step()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


@pytest.mark.contract("AM-5")
def test_the_replay_runs_in_a_dtype_that_is_not_autocasts_default():
    net = nn.Sequential(nn.Linear(4, 4), MemorizedBatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(net(torch.randn(4, 4)))
    loss.backward()
    outputs = []
    net[1].register_forward_hook(lambda module, args, y: outputs.append(y.dtype))
    optimizer.step()
    assert outputs == [torch.float16]


@pytest.mark.contract("AM-5")
def test_a_step_under_autocast_replays_a_forward_outside_it_without():
    net = nn.Sequential(nn.Linear(4, 4), MemorizedBatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    loss_of(net(torch.randn(4, 4))).backward()
    outputs = []
    net[1].register_forward_hook(lambda module, args, y: outputs.append(y.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    assert outputs == [torch.float32]


@pytest.mark.contract("AM-5")
def test_a_replay_under_an_outer_autocast_uses_the_new_weights():
    net = nn.Sequential(nn.Linear(4, 4), MemorizedBatchNorm1d(4, inference="memory"))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    DoubleForward(net, optimizer)
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(net(x)).backward()
        optimizer.step()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        fresh = net[0](x).float().mean(0)
    torch.testing.assert_close(net[1].running_mean, fresh)


@pytest.mark.contract("AM-3")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_refreshes_nothing(fused):
    net = small_net("memorized", torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    DoubleForward(net, optimizer, scaler=scaler)
    x = batches(1)[0].float()

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(loss_of(net(x)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    assert len(steps_of_refresh(net, optimizer, lambda: step(torch.inf))) == 1
    net.zero_grad()
    assert len(steps_of_refresh(net, optimizer, lambda: step(1.0))) >= 2


class TakesScaler(torch.optim.SGD):
    """An optimizer of the kind that is given the scaler and looks for infinities itself."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        if not sum(grad_scaler._check_inf_per_device(self).values()):
            super().step(closure)


@pytest.mark.contract("AM-3")
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_a_step_that_the_optimizer_itself_skips_for_the_scaler_refreshes_nothing():
    net = small_net("momentum", torch.float32)
    optimizer = TakesScaler(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    DoubleForward(net, optimizer, scaler=scaler)
    schedule = MomentumSchedule(net, 10, batch_size=4)
    schedule.follow(optimizer, scaler=scaler)
    x = batches(1)[0].float()

    def step():
        scaler.scale(loss_of(net(x)) * torch.inf).backward()
        scaler.step(optimizer)

    assert len(steps_of_refresh(net, optimizer, step)) == 1
    assert schedule.t == 1


def test_frozen_layers_are_not_refreshed():
    net = small_net("momentum", torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    net[1].eval()
    before = {n: b.clone() for n, b in net[1].named_buffers()}
    train_step(net, optimizer, batches(1)[0].float())
    assert all(torch.equal(b, before[n]) for n, b in net[1].named_buffers())


def test_a_loaded_state_is_not_rewound():
    net = small_net("momentum", torch.float32)
    donor = copy.deepcopy(net)
    for x in batches(3):
        donor(x.float())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    DoubleForward(net, optimizer)
    net(batches(1)[0].float())
    net.load_state_dict(donor.state_dict())
    train_step(net, optimizer, batches(1, seed=5)[0].float())
    # a rewind would have brought back the count of 0 from before the load
    assert int(net[1].num_batches_tracked) > int(donor[1].num_batches_tracked)


def test_copies_and_pickles_of_the_model_are_not_attached():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attached = DoubleForward(net, optimizer)
    loss_of(net(batches(1)[0])).backward()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin(batches(1)[0])
        assert len(attached._calls) == 1


def test_a_schedule_and_double_forward_work_together():
    net = nn.Sequential(nn.Linear(4, 4), MomentumBatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = MomentumSchedule(net, 5, batch_size=4)
    DoubleForward(net, optimizer)
    for x in batches(5):
        train_step(net, optimizer, x.float())
        schedule.step()
    assert int(net[1].num_batches_tracked) == 5


def test_a_failing_replay_leaves_modes_hooks_and_rng_in_order():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MemorizedBatchNorm1d(4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            if not torch.is_grad_enabled():
                torch.rand(1)
                raise RuntimeError("out of luck")
            return self.norm(self.linear(x))

    net = Fails()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    loss_of(net(torch.randn(4, 4))).backward()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    # the failure has lost nothing: the forward is still stored
    assert int(net.norm.num_batches_tracked) == 1
    assert int((net.norm.memory_counts > 0).sum()) == 1


@pytest.mark.parametrize("times", [2, 5])
@on_every_method
def test_shared_layers_are_rewound_to_the_start_of_the_forward(method, times):
    layer, _, options = METHODS[method]

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer(4, **options)

        def forward(self, x):
            for _ in range(times):
                x = self.norm(x) + x
            return x

    hooked, by_hand = Shared(), Shared()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (hooked, by_hand)]
    DoubleForward(hooked, optimizers[0])
    double_forward = DoubleForward(by_hand)
    for x in batches(4):
        train_step(hooked, optimizers[0], x.float())
        train_step(by_hand, optimizers[1], x.float())
        double_forward.refresh()
    assert int(by_hand.norm.num_batches_tracked) == 4 * times
    for name, tensor in hooked.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name])


@pytest.mark.contract("DF-7")
@on_every_method
def test_by_hand_is_as_attached_to_an_optimizer(method):
    attached, by_hand = small_net(method), small_net(method)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (attached, by_hand)]
    DoubleForward(attached, optimizers[0])
    double_forward = DoubleForward(by_hand)
    inputs = batches(9)
    for first in (0, 3, 6):
        train_step(attached, optimizers[0], *inputs[first : first + 3])
        train_step(by_hand, optimizers[1], *inputs[first : first + 3])
        double_forward.refresh()
        torch.testing.assert_close(by_hand.state_dict(), attached.state_dict(), rtol=0, atol=0)


@pytest.mark.contract("DF-7")
def test_an_optimizers_step_alone_refreshes_nothing_by_hand():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net)
    assert len(steps_of_refresh(net, optimizer, lambda: train_step(net, optimizer, *batches(2)))) == 2


@pytest.mark.contract("DF-7")
@on_every_method
def test_refresh_goes_back_to_the_first_forward_after_the_last_refresh(method):
    net = small_net(method)
    double_forward = DoubleForward(net)
    x, y, z = batches(3)
    net(x)
    double_forward.refresh()
    twin = copy.deepcopy(net)
    net(y)
    net(z)
    with torch.no_grad():
        for n in (net, twin):
            n[0].weight.mul_(2)
    double_forward.refresh()
    twin(y)
    twin(z)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.contract("DF-7")
@on_every_method
def test_a_forgotten_step_stays_as_it_was_stored(method):
    net = small_net(method)
    double_forward = DoubleForward(net)
    x, y = batches(2)
    net(x)
    double_forward.forget()
    twin = copy.deepcopy(net)
    net(y)
    with torch.no_grad():
        for n in (net, twin):
            n[0].weight.mul_(2)
    double_forward.refresh()
    twin(y)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_forgetting_releases_the_inputs():
    net = small_net("memorized")
    double_forward = DoubleForward(net)
    x = batches(1)[0]
    net(x).sum().backward()
    reference_to_x = weakref.ref(x)
    double_forward.forget()
    del x
    gc.collect()
    assert reference_to_x() is None


@on_every_method
def test_attaching_in_the_middle_of_training_takes_back_nothing_before(method):
    net = small_net(method)
    x, y = batches(2)
    net(x)
    twin = copy.deepcopy(net)
    double_forward = DoubleForward(net)
    net(y)
    double_forward.refresh()
    twin(y)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("over", [DoubleForward.refresh, DoubleForward.forget, None])
def test_refresh_without_a_forward_is_refused(over):
    layer = MemorizedBatchNorm1d(4)
    double_forward = DoubleForward(layer)
    if over is not None:
        layer(torch.randn(4, 4))
        over(double_forward)
    before = {n: b.clone() for n, b in layer.named_buffers()}
    with pytest.raises(RuntimeError, match="nothing to refresh: no training forward was seen"):
        double_forward.refresh()
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())


def test_refresh_in_eval_mode_is_refused_and_loses_nothing():
    layer = MemorizedBatchNorm1d(4)
    double_forward = DoubleForward(layer)
    layer(torch.randn(4, 4))
    layer.eval()
    with pytest.raises(ValueError, match="train mode"):
        double_forward.refresh()
    layer.train()
    double_forward.refresh()
    assert int(layer.num_batches_tracked) == 1


def test_a_model_without_memory_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'no layer with a memory .*mbnorm\.convert\(model, "matched"\)'):
        DoubleForward(model, optimizer)
    convert(model, "memorized")
    DoubleForward(model, optimizer)


def test_wrong_options_are_named():
    net = small_net("memorized")
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, got 0"):
        DoubleForward(net, torch.optim.SGD(net.parameters()), every=0)
    with pytest.raises(TypeError, match="step hooks, got object"):
        DoubleForward(net, object())
    for options in ({"every": 2}, {"scaler": torch.amp.GradScaler("cpu")}):
        with pytest.raises(ValueError, match="every and scaler need an optimizer"):
            DoubleForward(net, **options)


@pytest.mark.contract("MF-3")
@on_every_method
def test_no_update_nests_and_survives_errors(method):
    net = small_net(method)
    net(batches(1)[0])
    before = {n: b.clone() for n, b in net.named_buffers()}
    with contextlib.suppress(KeyError), no_update(net):
        with no_update(net):
            net(batches(1, seed=2)[0])
        net(batches(1, seed=3)[0])
        raise KeyError
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    net(batches(1, seed=4)[0])
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


@on_every_method
def test_momentum_0_around_the_step_does_not_stop_the_refresh(method):
    net, wanted = small_net(method), small_net(method)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05) for n in (net, wanted)]
    for n, optimizer in zip((net, wanted), optimizers, strict=True):
        DoubleForward(n, optimizer)
    for x in batches(4):
        for n, optimizer in zip((net, wanted), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(n(x)).backward()
            for layer in (n[1], n[4]):
                layer.momentum = 0 if n is net else 0.1
            optimizer.step()
            assert [n[1].momentum, n[4].momentum] == [0 if n is net else 0.1] * 2
            n[1].momentum = n[4].momentum = 0.1
    torch.testing.assert_close(net.state_dict(), wanted.state_dict(), rtol=0, atol=0)


def test_a_layer_frozen_before_the_step_keeps_what_it_has():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DoubleForward(net, optimizer)
    loss_of(net(batches(1)[0])).backward()
    net[1].eval()
    before = {n: b.clone() for n, b in net[1].named_buffers()}
    optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in net[1].named_buffers())
    assert int(net[4].num_batches_tracked) == 1


def test_a_step_under_no_update_refreshes_nothing_and_loses_nothing():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DoubleForward(net, optimizer)
    loss_of(net(batches(1)[0])).backward()
    with no_update(net):
        optimizer.step()
    assert int((net[1].memory_counts > 0).sum()) == 1


def test_a_closure_that_raises_does_not_disturb_the_accumulation_after_it():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DoubleForward(net, optimizer)

    def closure():
        raise RuntimeError("out of luck")

    def step():
        # a frame that has the optimizer's method's name
        train_step(net, optimizer, *batches(3))

    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step(closure)
    assert len(steps_of_refresh(net, optimizer, step)) == 6


def test_a_step_without_a_seen_forward_is_told_once():
    net = nn.ModuleDict({"inner": small_net("memorized")})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DoubleForward(net, optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in batches(3):
            train_step(net["inner"], optimizer, x)
    assert ["has seen no training forward" in str(w.message) for w in told] == [True]


def test_inputs_changed_in_place_are_told():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DoubleForward(net, optimizer)
    x = batches(1)[0]
    loss_of(net(x)).backward()
    x.zero_()
    with pytest.warns(UserWarning, match="changed in place"):
        optimizer.step()


def test_a_failed_refresh_by_hand_loses_nothing_and_may_be_repeated():
    net = small_net("memorized")
    double_forward = DoubleForward(net)
    net(batches(1)[0])
    before = {n: b.clone() for n, b in net.named_buffers()}

    def fail(*_):
        raise RuntimeError("out of luck")

    handle = net[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        double_forward.refresh()
    handle.remove()
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert int((net[1].memory_counts > 0).sum()) == 1
    double_forward.refresh()
    assert int(net[1].num_batches_tracked) == 1
    assert int((net[1].memory_counts > 0).sum()) == 1


@pytest.mark.parametrize("change", ["loaded", "reset"])
def test_refresh_after_a_load_or_a_reset_is_refused(change):
    layer = MemorizedBatchNorm1d(4)
    double_forward = DoubleForward(layer)
    layer(torch.randn(4, 4))
    if change == "loaded":
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    else:
        layer.reset_running_stats()
    with pytest.raises(RuntimeError, match="since the state was loaded or reset"):
        double_forward.refresh()


def test_reverting_an_attached_model_is_no_error():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DoubleForward(net, optimizer)
    loss_of(net(batches(1)[0])).backward()
    revert(net)
    optimizer.step()
    assert type(net[1]) is nn.BatchNorm1d


def test_a_copy_made_under_no_update_stores():
    layer = MemorizedBatchNorm1d(4)
    with no_update(layer):
        twin = copy.deepcopy(layer)
    twin(torch.randn(4, 4))
    assert int(twin.num_batches_tracked) == 1


def test_a_compiled_model_is_refreshed():
    torch._dynamo.reset()
    net, wanted = small_net("memorized"), small_net("memorized")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for n, called in ((net, compiled), (wanted, wanted)):
        optimizer = torch.optim.SGD(n.parameters(), lr=0.05)
        DoubleForward(called, optimizer)
        for x in batches(4):
            optimizer.zero_grad()
            loss_of(called(x)).backward()
            optimizer.step()
    torch.testing.assert_close(net.state_dict(), wanted.state_dict(), rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()


def test_refresh_by_hand_works_after_another_was_detached():
    net = small_net("memorized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with DoubleForward(net, optimizer):
        train_step(net, optimizer, batches(1)[0])
    double_forward = DoubleForward(net)
    net(batches(1, seed=3)[0])
    double_forward.refresh()
    assert int(net[1].num_batches_tracked) == 2


def test_a_detached_one_has_nothing_to_refresh():
    net = small_net("memorized")
    with DoubleForward(net) as double_forward:
        net(batches(1)[0])
    with pytest.raises(RuntimeError, match="nothing to refresh"):
        double_forward.refresh()
