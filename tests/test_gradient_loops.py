"""What training loops do to a gradient that is remembered."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mbnorm import MatchedBatchNorm1d, MatchedBatchNorm2d, convert, no_update

CHANNELS = 6


def encoder(seed=0, outputs=2):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, CHANNELS), MatchedBatchNorm1d(CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, outputs)
    )


def data(count, m=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, 4, generator=generator) for _ in range(count)]


def trained(net, batches=4):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for x in data(batches, seed=9):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net


def remembered(net):
    return [b.clone() for name, b in net.named_buffers() if "gradient_" in name]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.contract("GR-2")
def test_the_two_forwards_of_a_siamese_net_are_remembered_latest_first():
    one, two = trained(encoder()), trained(encoder())
    (left, right), (dy, other) = data(2), (torch.randn(3, 2), torch.randn(3, 2))
    ((one(left) * dy).sum() + (one(right) * other).sum()).backward()
    y_left, y_right = two(left), two(right)
    y_right.backward(other)
    y_left.backward(dy)
    assert same(remembered(one), remembered(two))


@pytest.mark.contract("GR-3")
@pytest.mark.parametrize("kept_out", [True, False])
def test_the_generators_turn_is_remembered_by_the_discriminator_unless_it_is_kept_out(kept_out):
    generator, discriminator = trained(encoder(0, outputs=4)), trained(encoder(1))
    (noise,) = data(1)
    before = remembered(generator), remembered(discriminator)
    fake = generator(noise)
    if kept_out:
        with no_update(discriminator):
            F.softplus(-discriminator(fake)).mean().backward()
    else:
        F.softplus(-discriminator(fake)).mean().backward()
    assert not same(remembered(generator), before[0])
    assert same(remembered(discriminator), before[1]) == kept_out


@pytest.mark.contract("GR-3")
def test_a_gradient_penalty_adds_nothing_to_what_is_remembered():
    critic = trained(encoder())
    twin = copy.deepcopy(critic)
    real, mixed = data(2)
    with no_update(critic):
        x = mixed.requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = (slope.norm(2, dim=1) - 1).square().mean()
    (critic(real).mean() + 10 * penalty).backward()
    twin(real).mean().backward()
    assert same(remembered(critic), remembered(twin))
    assert all(torch.isfinite(p.grad).all() for p in critic.parameters())


def as_exact(net):
    """A net with the same state whose layer has the exact gradient."""
    exact = encoder()
    exact[1] = MatchedBatchNorm1d(CHANNELS, gradient="exact")
    exact.load_state_dict({k: v for k, v in net.state_dict().items() if "gradient_" not in k})
    return exact


def penalty_of(critic, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.norm(2, dim=1) - 1).square().mean()


def hessian_times_itself(net, x):
    parameters = list(net.parameters())
    first = torch.autograd.grad(net(x).square().mean(), parameters, create_graph=True)
    return torch.autograd.grad(sum((g * g.detach()).sum() for g in first), parameters)


@pytest.mark.contract("GR-3")
def test_a_gradient_penalty_is_differentiated_exactly_and_writes_nothing():
    critic = trained(encoder())
    exact, before = as_exact(critic), remembered(critic)
    (x,) = data(1)
    for model in (critic, exact):
        model.zero_grad()
        penalty_of(model, x).backward()
    torch.testing.assert_close([p.grad for p in critic.parameters()], [p.grad for p in exact.parameters()])
    assert same(remembered(critic), before)


@pytest.mark.contract("GR-3")
def test_products_with_the_hessian_are_exact_and_write_nothing():
    net = trained(encoder())
    exact, before = as_exact(net), remembered(net)
    (x,) = data(1)
    torch.testing.assert_close(hessian_times_itself(net, x), hessian_times_itself(exact, x))
    assert same(remembered(net), before)


@pytest.mark.contract("GR-2")
def test_gradients_of_each_task_as_pcgrad_takes_them_read_one_past():
    shared = trained(encoder())
    alone = copy.deepcopy(shared)
    (x,) = data(1)
    parameters = list(shared.parameters())
    y = shared(x)
    first = torch.autograd.grad(y[:, 0].square().mean(), parameters, retain_graph=True)
    after_first = remembered(shared)
    second = torch.autograd.grad(y[:, 1].square().mean(), parameters)
    assert same(remembered(shared), after_first)
    wanted = torch.autograd.grad(alone(x)[:, 1].square().mean(), list(alone.parameters()))
    torch.testing.assert_close(second, wanted)
    assert not torch.allclose(first[0], second[0])


@pytest.mark.contract("GR-2")
def test_each_evaluation_of_a_closure_is_remembered():
    net = trained(encoder())
    twin = copy.deepcopy(net)
    (x,) = data(1)
    weights = []
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        weights.append(copy.deepcopy(dict(net.named_parameters())))
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    for each in weights:
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(each[name])
        twin(x).square().mean().backward()
    assert len(weights) > 1
    torch.testing.assert_close(remembered(net), remembered(twin))


@pytest.mark.contract("GR-3")
def test_the_second_pass_of_sam_with_momentum_0_is_not_remembered():
    net = trained(encoder())
    (x,) = data(1)
    net(x).square().mean().backward()
    after_first = remembered(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * parameter.grad / parameter.grad.norm())
    net[1].momentum = 0
    net(x).square().mean().backward()
    assert same(remembered(net), after_first)


@pytest.mark.contract("GR-2")
def test_gradient_clipping_comes_after_it():
    net, clipped = trained(encoder()), trained(encoder())
    (x,) = data(1)
    for model in (net, clipped):
        model(x).square().mean().backward()
    nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
    assert same(remembered(net), remembered(clipped))


@pytest.mark.contract("GR-2")
@pytest.mark.parametrize("on", ["output", "module"])
def test_what_hooks_make_of_the_gradient_is_remembered(on):
    net, twin = trained(encoder()), trained(encoder())
    (x,) = data(1)
    if on == "module":
        net[2].register_full_backward_hook(lambda _, inputs, __: (2 * inputs[0],))
    else:
        net[1].register_forward_hook(lambda _, __, y: y.register_hook(lambda g: 2 * g) and None)
    net(x).sum().backward()
    (2 * twin(x).sum()).backward()
    assert same(remembered(net), remembered(twin))


@pytest.mark.contract("GR-9")
def test_a_loss_scale_of_a_power_of_two_scales_what_is_remembered_and_nothing_else():
    plain, scaled = encoder(), encoder()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for x in data(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain(x).square().mean().backward()
        optimizers[0].step()
        scaler.scale(scaled(x).square().mean()).backward()
        scaler.step(optimizers[1])
        scaler.update()
    assert same(plain.parameters(), scaled.parameters())
    assert same([1024 * t for t in remembered(plain)], remembered(scaled))


@pytest.mark.contract("GR-4", "GR-9")
def test_a_step_that_overflows_is_not_remembered_and_training_goes_on():
    net = trained(encoder())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)
    scales, spoiled = [], []
    for x in data(12):
        before = remembered(net)
        optimizer.zero_grad()
        scaler.scale(1e4 * net(x).square().mean()).backward()
        spoiled.append(not torch.isfinite(net[1].bias.grad).all())
        assert same(remembered(net), before) == spoiled[-1]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert {True, False} == set(spoiled)
    assert min(scales) < max(scales)
    assert all(torch.isfinite(t).all() for t in net.state_dict().values())


@pytest.mark.contract("GR-2")
def test_accumulated_gradients_are_remembered_batch_by_batch():
    net, twin = trained(encoder()), trained(encoder())
    for x in data(3):
        (net(x).square().mean() / 3).backward()
    for x in data(3):
        twin.zero_grad()
        (twin(x).square().mean() / 3).backward()
    assert same(remembered(net), remembered(twin))


@pytest.mark.contract("GR-2")
def test_threads_that_train_one_after_the_other_are_one_loop():
    net, twin = trained(encoder()), trained(encoder())
    for x in data(3):
        thread = threading.Thread(target=lambda x=x: net(x).square().mean().backward())
        thread.start()
        thread.join()
        twin(x).square().mean().backward()
    assert same(remembered(net), remembered(twin))


@pytest.mark.contract("GR-6")
def test_a_run_that_is_resumed_goes_on_bit_for_bit():
    def run(net, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    whole, first, second = (encoder() for _ in range(3))
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (whole, first, second)]
    batches = data(8)
    run(whole, optimizers[0], batches)
    run(first, optimizers[1], batches[:4])
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    run(second, optimizers[2], batches[4:])
    assert same(whole.state_dict().values(), second.state_dict().values())


@pytest.mark.contract("GR-6")
def test_an_average_of_weights_holds_the_average_of_what_is_remembered():
    net = trained(encoder())
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    average.update_parameters(net)
    first = remembered(net)
    trained(net)
    average.update_parameters(net)
    wanted = [(a + b) / 2 for a, b in zip(first, remembered(net), strict=True)]
    torch.testing.assert_close(remembered(average.module), wanted)


@pytest.mark.contract("GR-6")
def test_channels_last_and_bfloat16_under_autocast_remember_in_float32():
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU())
    convert(net)
    net.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(net)
    for seed in range(4):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(x.contiguous(memory_format=torch.channels_last)).float().sum().backward()
        plain(x).sum().backward()
    assert isinstance(net[1], MatchedBatchNorm2d)
    assert all(t.dtype == torch.float32 for t in remembered(net))
    for found, wanted in zip(remembered(net), remembered(plain), strict=True):
        assert (found - wanted).norm() < 0.1 * wanted.norm()
