import copy
import inspect
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import make_input
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import mbnorm
from mbnorm import DoubleForward, MomentumSchedule
from mbnorm.gradient import GRADIENT_BUFFERS

OPTIONS = {
    "matched": {},
    "momentum": {"batch_size": 4},
    "memorized": {"memory_size": 3},
}
on_every_method = pytest.mark.parametrize("method", OPTIONS)
SAMPLES = 4


def net(method, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    ).double()
    mbnorm.convert(model, method, **OPTIONS[method], **options)
    return model


def data(rank, number):
    return make_input((SAMPLES, 3, 6, 6), torch.float64, seed=10 * number + rank)


def loss_of(y):
    return (y - torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).square().mean()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def collectives():
    return dist.group.WORLD._get_sequence_number_for_group()


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def train(rank, method, forwards, steps, double_forward=False, options=None, ddp_options=None):
    model = net(method, **options or {})
    ddp = DistributedDataParallel(model, **ddp_options or {})
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    if double_forward:
        DoubleForward(ddp, optimizer)
    trace = []
    for number in range(steps):
        optimizer.zero_grad()
        outputs = [ddp(data(rank, number * forwards + i)) for i in range(forwards)]
        sum(loss_of(y) for y in outputs).backward()
        optimizer.step()
        trace.append((outputs[-1].detach(), [p.grad.clone() for p in model.parameters()], state(model)))
    return trace


def simulated(method, forwards, steps, double_forward=False):
    """The same in one process: two models, the buffers of the first copied to the second at each forward."""
    models = [net(method) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    if double_forward:
        for model, optimizer in zip(models, optimizers, strict=True):
            DoubleForward(model, optimizer)
    traces = [], []
    for number in range(steps):
        outputs = [], []
        for i in range(forwards):
            for target, source in zip(models[1].buffers(), models[0].buffers(), strict=True):
                target.copy_(source)
            for rank, model in enumerate(models):
                outputs[rank].append(model(data(rank, number * forwards + i)))
        for optimizer, ys in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            sum(loss_of(y) for y in ys).backward()
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            a.grad = b.grad = (a.grad + b.grad) / 2
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.step()
            gradients = [p.grad.clone() for p in model.parameters()]
            traces[rank].append((outputs[rank][-1].detach(), gradients, state(model)))
    return traces


@pytest.mark.contract("MF-1", "DD-2")
@pytest.mark.parametrize("forwards", [1, 3])
@on_every_method
def test_with_default_arguments_the_memory_of_rank_0_wins_at_each_forward(two_ranks, method, forwards):
    assert_close(two_ranks(train, method, forwards, 5), list(simulated(method, forwards, 5)))


@pytest.mark.contract("DD-6", "MF-1")
@pytest.mark.parametrize("forwards", [1, 2])
@on_every_method
def test_a_second_forward_refreshes_what_ddp_wraps(two_ranks, method, forwards):
    assert_close(two_ranks(train, method, forwards, 4, True), list(simulated(method, forwards, 4, True)))


def train_with_the_first_rank_ahead(rank, keyword):
    model = net("memorized")
    if rank == 0:
        model(data(5, 5))
    ddp = DistributedDataParallel(model, **keyword)
    start = state(model)
    for number in range(2):
        ddp(data(rank, number))
    return start, state(model)


@pytest.mark.contract("DD-3")
@pytest.mark.skipif(
    "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters,
    reason="torch has it since 2.13",
)
def test_without_the_broadcast_each_rank_goes_on_from_the_start_of_rank_0_alone(two_ranks):
    (start, first), (other_start, second) = two_ranks(
        train_with_the_first_rank_ahead, {"forward_sync_buffers": False}
    )
    assert_close(start, other_start)
    for rank, found in enumerate((first, second)):
        alone = net("memorized")
        alone.load_state_dict(start)
        for number in range(2):
            alone(data(rank, number))
        assert_close(found, state(alone))


def train_whole(method, steps, double_forward=False):
    model = net(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if double_forward:
        DoubleForward(model, optimizer)
    for number in range(steps):
        optimizer.zero_grad()
        y = model(torch.cat([data(0, number), data(1, number)]))
        sum(loss_of(part) for part in y.chunk(2)).div(2).backward()
        optimizer.step()
    return model


def in_units_of_a_rank(found):
    """The state of one process as two ranks have it: DDP averages over ranks what the losses of each give."""
    return {name: 2 * t if name.split(".")[-1] in GRADIENT_BUFFERS else t for name, t in found.items()}


@pytest.mark.contract("DD-3")
@pytest.mark.parametrize("double_forward", [False, True])
@on_every_method
def test_pooled_layers_under_ddp_train_as_one_process_with_the_whole_batch(two_ranks, method, double_forward):
    want = in_units_of_a_rank(state(train_whole(method, 4, double_forward)))
    for trace in two_ranks(train, method, 1, 4, double_forward, {"process_group": "world"}):
        assert_close(trace[-1][-1], want)


def late_by_hand(rank, method, steps, double_forward):
    """Late layers' training, beside a copy per step that is given each rank's own part by hand."""
    model = net(method, process_group="world", sync="late")
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    if double_forward:
        DoubleForward(ddp, optimizer)
    # the first norm's input is known: its memory must be what the whole batches leave there
    conv, norm = copy.deepcopy(model[0]), net(method)[1]
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(ddp(data(rank, number))).backward()
        if not double_forward:
            conv.load_state_dict(model[0].state_dict())
        optimizer.step()
        if double_forward:
            conv.load_state_dict(model[0].state_dict())
        with torch.no_grad():
            norm(conv(torch.cat([data(0, number), data(1, number)])))
    return state(model[1]), state(norm), state(model)


@pytest.mark.contract("DD-3", "DD-6")
@pytest.mark.parametrize("double_forward", [False, True])
@pytest.mark.parametrize("method", ["matched", "memorized"])
def test_late_layers_under_ddp_remember_the_whole_batches(two_ranks, method, double_forward):
    (found, want, first), (_, _, second) = two_ranks(late_by_hand, method, 5, double_forward)
    for name in ("running_mean", "running_var", "num_batches_tracked", "memory_mean", "memory_var"):
        assert_close(found[name], want[name])
    assert_close(first, second)


def count_around_the_step(rank, options):
    model = net("memorized", **options)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    DoubleForward(ddp, optimizer)
    loss_of(ddp(data(rank, 0))).backward()
    before = collectives()
    optimizer.step()
    refreshed = collectives()
    model.eval()(data(rank, 1))
    return refreshed - before, collectives() - refreshed


@pytest.mark.contract("DD-4")
def test_neither_the_refresh_nor_eval_communicates(two_ranks):
    assert two_ranks(count_around_the_step, {}) == [(0, 0)] * 2


@pytest.mark.contract("DD-4")
@pytest.mark.parametrize("sync", [True, "late"])
def test_the_refresh_of_synced_layers_pools_once_a_layer(two_ranks, sync):
    options = {"process_group": "world", "sync": sync}
    assert two_ranks(count_around_the_step, options) == [(2, 0)] * 2


def refresh_by_hand(rank):
    model = net("memorized")
    ddp = DistributedDataParallel(model)
    double_forward = DoubleForward(ddp)
    ddp(data(rank, 1))
    with torch.no_grad():
        model[0].weight.mul_(2)
    before = collectives()
    double_forward.refresh()
    return collectives() - before, state(model)


@pytest.mark.contract("DD-4", "DD-6", "DF-7")
def test_a_refresh_by_hand_takes_the_wrapped_model_and_does_not_communicate(two_ranks):
    for rank, (communicated, found) in enumerate(two_ranks(refresh_by_hand)):
        alone = net("memorized")
        with torch.no_grad():
            alone[0].weight.mul_(2)
        alone(data(rank, 1))
        assert communicated == 0
        assert_close(found, state(alone))


def overflow_on_rank_1(rank):
    model = net("memorized")
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    forwards, replays = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    DoubleForward(ddp, optimizer, scaler=scaler)
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = loss_of(ddp(data(rank, 0)))
        scaler.scale(loss * torch.inf if bad and rank == 1 else loss).backward()
        before = len(forwards)
        scaler.step(optimizer)
        replays.append(len(forwards) - before)
        scaler.update()
    return replays


@pytest.mark.contract("DD-6", "AM-3")
def test_ranks_agree_on_skipping_a_refresh(two_ranks):
    # the next step makes up for the batch whose step was skipped
    assert two_ranks(overflow_on_rank_1) == [[1, 0, 2]] * 2


def uneven(rank, options, stop_all):
    ddp = DistributedDataParallel(net("matched", **options))
    done = 0
    try:
        with Join([ddp], throw_on_early_termination=stop_all):
            for number in range(2 + 2 * rank):
                loss_of(ddp(data(rank, number))).backward()
                done += 1
    except RuntimeError as error:
        return done, "exhausted" in str(error)
    return done, False


@pytest.mark.contract("DD-5")
def test_ranks_with_fewer_batches_join(two_ranks):
    assert two_ranks(uneven, {}, False) == [(2, False), (4, False)]


@pytest.mark.contract("DD-5")
@pytest.mark.parametrize("sync", [True, "late"])
def test_synced_ranks_stop_together_where_join_throws(two_ranks, sync):
    options = {"process_group": "world", "sync": sync}
    assert two_ranks(uneven, options, True) == [(2, True), (2, True)]


def test_a_conversion_to_sync_batch_norm_after_attaching_is_named():
    model = net("memorized")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DoubleForward(model, optimizer):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.eval()(data(0, 0))
        model.train()
        with pytest.warns(UserWarning, match="convert_sync_batchnorm"):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()


def test_a_schedule_names_a_conversion_to_sync_batch_norm_after_it():
    model = net("momentum")
    schedule = MomentumSchedule(model, 10, batch_size=4)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match="convert_sync_batchnorm"):
        schedule.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_a_checkpoint_of_ours_does_not_load_into_a_sync_batch_norm_unseen():
    model = net("memorized")
    saved = state(model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*memory_mean"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model).load_state_dict(saved)


def test_a_sync_batch_norm_is_not_converted_and_the_report_says_what_helps():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    assert "process_group" in mbnorm.convert(model, "matched").skipped["0"]
