"""Gradient accumulation, several forwards a step, several optimizers."""

import copy

import pytest
import torch
from torch import nn

from mbnorm import DoubleForward, MomentumSchedule, convert, no_update

METHODS = ["momentum", "matched", "memorized"]
on_every_method = pytest.mark.parametrize("method", METHODS)


def encoder(method, features=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, features), nn.BatchNorm1d(features))
    convert(net, method, **({"batch_size": 4} if method != "matched" else {}))
    return net


def data(count, m=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, 4, generator=generator) for _ in range(count)]


def counting(net):
    calls = []
    net.register_forward_hook(lambda module, args, y: calls.append(args[0]))
    return calls


@pytest.mark.contract("GA-3")
def test_a_schedule_advances_with_optimizer_steps_not_forwards():
    net = encoder("momentum")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = MomentumSchedule(net, 10, batch_size=4)
    schedule.follow(optimizer)
    DoubleForward(net, optimizer)
    for i, x in enumerate(data(9), start=1):
        net(x).square().mean().backward()
        if i % 3 == 0:
            optimizer.step()
    assert schedule.t == 1 + 3


@pytest.mark.contract("GA-3")
@pytest.mark.parametrize(("method", "options"), [("matched", {}), ("memorized", {"inference": "ema"})])
def test_averages_of_moments_weigh_micro_batches_by_their_samples(method, options):
    x = data(1, m=4)[0]
    kept = []
    for parts in (1, 4):
        layer = nn.BatchNorm1d(4).double()
        convert(layer, method, **options)
        # the same values again and again: what is left of the start shows the weight alone
        for _ in range(parts):
            layer(torch.cat([x.double()] * (8 // parts)))
        kept.append((layer.running_mean / x.double().mean(0)).mean())
    torch.testing.assert_close(kept[0], kept[1])


@pytest.mark.contract("GA-4")
@on_every_method
def test_an_incomplete_last_window_is_refreshed_as_it_is(method):
    net = encoder(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    calls = counting(net)
    xs = data(5)
    replayed = []
    for window in (xs[:2], xs[2:4], xs[4:]):
        for x in window:
            net(x).square().mean().backward()
        done = len(calls)
        optimizer.step()
        replayed.append(len(calls) - done)
    assert replayed == [2, 2, 1]
    assert int(net[1].num_batches_tracked) == 5


@pytest.mark.contract("MF-1")
@on_every_method
def test_siamese_forwards_are_replayed_in_order(method):
    net = encoder(method)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    calls = counting(net)
    left, right = data(2)
    (net(left) - net(right)).square().mean().backward()
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(calls, [left, right, left, right], strict=True)] == [True] * 4
    assert int(net[1].num_batches_tracked) == 2


def gan_step(generator, discriminator, optimizers, real, noise):
    for optimizer in optimizers:
        optimizer.zero_grad()
    fake = generator(noise)
    (discriminator(real).mean() - discriminator(fake.detach()).mean()).square().backward()
    optimizers[1].step()
    optimizers[0].zero_grad()
    discriminator(fake).square().mean().backward()
    optimizers[0].step()


@pytest.mark.contract("MF-5")
@on_every_method
def test_in_a_gan_each_net_is_refreshed_by_its_own_optimizer(method):
    generator, discriminator = encoder(method), encoder(method)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (generator, discriminator)]
    for net, optimizer in zip((generator, discriminator), optimizers, strict=True):
        DoubleForward(net, optimizer)
    calls = counting(generator), counting(discriminator)
    real, noise = data(2)
    gan_step(generator, discriminator, optimizers, real, noise)
    # the generator: its forward and one replay; the discriminator: three, and a replay of the first two
    assert (len(calls[0]), len(calls[1])) == (2, 5)
    gan_step(generator, discriminator, optimizers, real, noise)
    # and now of the generator's turn with it, too: all since its optimizer's last step
    assert (len(calls[0]), len(calls[1])) == (4, 11)
    assert int(generator[1].num_batches_tracked) == 2
    assert int(discriminator[1].num_batches_tracked) == 6


@pytest.mark.contract("MF-3", "MF-5")
@on_every_method
def test_a_forward_for_the_generator_can_be_kept_out_of_the_discriminators_memory(method):
    discriminator = encoder(method)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    DoubleForward(discriminator, optimizer)
    calls = counting(discriminator)
    real, fake = data(2)
    with no_update(discriminator):
        discriminator(fake).square().mean().backward()
    optimizer.zero_grad()
    discriminator(real).square().mean().backward()
    optimizer.step()
    assert len(calls) == 3
    assert torch.equal(calls[-1], real)
    assert int(discriminator[1].num_batches_tracked) == 1


@pytest.mark.contract("MF-5")
@on_every_method
def test_two_optimizers_of_one_model(method):
    net, alone = encoder(method), encoder(method)
    both = [torch.optim.SGD([net[i].weight, net[i].bias], lr=0.1) for i in (0, 1)]
    one = torch.optim.SGD(alone.parameters(), lr=0.1)
    for optimizer in both:
        DoubleForward(net, optimizer)
    DoubleForward(alone, one)
    for x in data(4):
        for model, optimizers in ((net, both), (alone, [one])):
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(net.state_dict(), alone.state_dict())


@pytest.mark.contract("DF-8")
@on_every_method
def test_branches_that_were_not_taken_are_left_alone(method):
    class EarlyExit(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = encoder(method), encoder(method)

        def forward(self, x):
            y = self.first(x)
            return y if x.mean() > -10 else self.second(y)

    net = EarlyExit()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    DoubleForward(net, optimizer)
    before = {n: b.clone() for n, b in net.second.named_buffers()}
    for x in data(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert net.second[0].weight.grad is None
    assert all(torch.equal(b, before[n]) for n, b in net.second.named_buffers())
    assert int(net.first[1].num_batches_tracked) == 3


@pytest.mark.contract("DF-5")
@on_every_method
def test_lbfgs_stores_the_last_evaluation_once_a_step(method):
    net = encoder(method).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5, lr=0.1)
    DoubleForward(net, optimizer)
    for count, x in enumerate(data(3), start=1):
        batch = x.double()

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = net(batch).square().sum() + net[0].weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert int(net[1].num_batches_tracked) == count
    reread = copy.deepcopy(net[0])(batch)
    if method == "memorized":
        # the entry stored last is that of the weights after the step
        newest = net[1].memory_ages == 1
        torch.testing.assert_close(net[1].memory_mean[newest], reread.mean(0, keepdim=True))


@pytest.mark.contract("DF-5", "MF-1")
@pytest.mark.parametrize("evaluations", [1, 5])
@on_every_method
def test_all_forwards_of_the_last_evaluation_of_a_closure_are_replayed(method, evaluations):
    net = encoder(method)
    # strong convexity: no evaluation is the last by chance
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=evaluations, lr=0.1)
    DoubleForward(net, optimizer)
    calls = counting(net)
    left, right = data(2)

    def closure():
        optimizer.zero_grad()
        loss = (net(left) - net(right)).square().mean() + net[0].weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) == 2 * evaluations + 2
    assert all(torch.equal(a, b) for a, b in zip(calls[-2:], [left, right], strict=True))
    assert int(net[1].num_batches_tracked) == 2
