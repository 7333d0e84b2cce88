"""A run that is stopped and resumed, or interrupted by a validation, is the run that never stopped."""

import copy
import functools
import io
import itertools
import pickle
import warnings

import pytest
import torch
from helpers import make_input
from torch import nn

from mbnorm import DoubleForward, MemorizedBatchNorm1d, MomentumSchedule, convert, revert
from mbnorm.layers import HistoryBatchNorm
from mbnorm.memories.recent_batches import RecentBatches

STEPS = 9
MICRO_BATCHES = 2
METHODS = {
    "momentum": ("momentum", {"batch_size": 3}),
    "matched": ("matched", {}),
    "memorized": ("memorized", {"memory_size": 12}),
    "memorized-values": ("memorized", {"memory_size": 12, "memory_values": 200}),
}
# entries in the memory of 12: none, half of them, all, and more than once around
STOPS = [0, 1, 3, 6, 8]
on_every_method = pytest.mark.parametrize("method", METHODS)


def stock_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
    )


def converted_net(method):
    model = stock_net()
    name, options = METHODS[method]
    convert(model, name, **options)
    return model


@functools.cache
def micro_batches():
    return [make_input((3, 2, 6, 6), torch.float32, seed=s) for s in range(STEPS * MICRO_BATCHES)]


class Training:
    """All objects of a training run, built afresh; `run` does some of its steps."""

    def __init__(self, method, model=None, every=1):
        self.model = model = converted_net(method) if model is None else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.double_forward = DoubleForward(model, self.optimizer, every=every)
        self.stateful = {"model": self.model, "optimizer": self.optimizer, "double": self.double_forward}
        if method == "momentum":
            self.stateful["schedule"] = MomentumSchedule(model, STEPS, batch_size=3)
            self.stateful["schedule"].follow(self.optimizer)

    def run(self, start, end):
        for step in range(start, end):
            for x in micro_batches()[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]:
                # the dropout of a step is the same in every run
                torch.manual_seed(step)
                self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def save(self):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.stateful.items()}, file)
        file.seek(0)
        return file

    def load(self, file, leave_out=()):
        for name, state in torch.load(file).items():
            if name not in leave_out:
                self.stateful[name].load_state_dict(state)
        return self

    def state(self):
        momenta = [p.get("momentum_buffer") for p in self.optimizer.state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *momenta]


@functools.cache
def unstopped(method, every=1):
    return Training(method, every=every).run(0, STEPS)


def same(first, second):
    pairs = itertools.zip_longest(first.state(), second.state())
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.contract("ST-3")
@pytest.mark.parametrize("stop", STOPS)
@on_every_method
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, stop):
    file = Training(method).run(0, stop).save()
    resumed = Training(method).load(file).run(stop, STEPS)
    assert same(resumed, unstopped(method))


@pytest.mark.contract("ST-3")
@pytest.mark.parametrize("stop", [3, 6])
@on_every_method
def test_a_memory_that_is_not_loaded_is_missed(method, stop):
    """The other tests would see a state that does not come back: this one loses it."""
    file = Training(method).run(0, stop).save()
    resumed = Training(method).load(file)
    for module in resumed.model.modules():
        if isinstance(module, HistoryBatchNorm):
            module.memory.clear(module.state)
    assert not same(resumed.run(stop, STEPS), unstopped(method))


@pytest.mark.contract("ST-3")
@pytest.mark.parametrize("stop", [2, 3])
def test_double_forward_every_other_step_keeps_its_count(stop):
    file = Training("memorized", every=2).run(0, stop).save()
    assert same(Training("memorized", every=2).load(file).run(stop, STEPS), unstopped("memorized", every=2))


@pytest.mark.contract("ST-3")
def test_the_count_of_double_forward_is_needed():
    file = Training("memorized", every=2).run(0, 3).save()
    resumed = Training("memorized", every=2).load(file, leave_out=["double"])
    assert not same(resumed.run(3, STEPS), unstopped("memorized", every=2))


@pytest.mark.contract("ST-3", "ST-7")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("stop", [3, 8])
@on_every_method
def test_a_run_goes_on_with_a_copy_of_the_model(method, stop, copied):
    stopped = Training(method).run(0, stop)
    file = stopped.save()
    resumed = Training(method, copied(stopped.model)).load(file, leave_out=["model"])
    assert same(resumed.run(stop, STEPS), unstopped(method))


@pytest.mark.contract("ST-7")
@on_every_method
def test_a_copy_leaves_the_original_run_alone(method):
    stopped = Training(method).run(0, 3)
    Training(method, copy.deepcopy(stopped.model)).run(3, STEPS)
    assert same(stopped.run(3, STEPS), unstopped(method))


def run_by_hand(model, start, end):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    double_forward = DoubleForward(model)
    for step in range(start, end):
        x = micro_batches()[step]
        torch.manual_seed(step)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        double_forward.refresh()
    double_forward.remove()


@pytest.mark.contract("ST-3")
@pytest.mark.parametrize("stop", [1, 6])
@on_every_method
def test_a_run_refreshed_by_hand_is_resumed_bit_for_bit(method, stop):
    never_stopped, stopped, resumed = (converted_net(method) for _ in range(3))
    run_by_hand(never_stopped, 0, STEPS)
    run_by_hand(stopped, 0, stop)
    resumed.load_state_dict(stopped.state_dict())
    run_by_hand(resumed, stop, STEPS)
    want = never_stopped.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.state_dict().items())


@pytest.mark.contract("EM-5")
@on_every_method
def test_validation_in_the_middle_leaves_the_training_state_alone(method):
    validated = Training(method)
    for step in range(STEPS):
        validated.run(step, step + 1)
        validated.model.eval()
        with torch.no_grad():
            validated.model(micro_batches()[-1])
        # with gradients, as some losses of a validation want them
        validated.model(micro_batches()[0])
        validated.model.train()
    assert same(validated, unstopped(method))


@pytest.mark.contract("EM-5")
@on_every_method
def test_validation_between_a_forward_and_its_step_leaves_the_refresh_alone(method):
    plain, validated = Training(method), Training(method)
    for training in (plain, validated):
        for step in range(STEPS):
            torch.manual_seed(step)
            loss = training.model(micro_batches()[step]).square().mean()
            if training is validated:
                training.model.eval()(micro_batches()[-1])
                training.model.train()
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
    assert same(validated, plain)


@pytest.mark.contract("ST-2", "ST-4")
@on_every_method
def test_a_checkpoint_without_the_memory_has_the_stock_keys_and_seeds_the_memory(method):
    training = Training(method).run(0, STEPS)
    slim = copy.deepcopy(training.model)
    revert(slim)
    saved = slim.state_dict()
    assert list(saved) == list(stock_net().state_dict())
    resumed = converted_net(method)
    resumed.load_state_dict(saved, strict=True)
    x = micro_batches()[0]
    assert torch.equal(resumed.eval()(x), training.model.eval()(x))
    for layer in (resumed[1], resumed[4], resumed[8]):
        assert bool(layer.memory.holds_anything(layer.state))
        assert torch.equal(layer.memory_mean.view(-1, layer.num_features)[0], layer.running_mean)


def ring_after(size, batches, dtype=torch.float64):
    ring = RecentBatches(size).new(torch.empty(2, dtype=dtype))
    for batch in range(batches):
        store(ring, batch)
    return ring


def store(ring, batch):
    statistics = torch.tensor([batch, -batch]).to(ring[0]), torch.tensor([1.0 + batch, 2.0]).to(ring[0])
    RecentBatches(len(ring[3])).commit(ring, torch.tensor(True), statistics, statistics, n=3 + batch % 4)


def resized(ring, size):
    memory = RecentBatches(size)
    saved = dict(zip(memory.buffers, (t.clone() for t in ring), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory.fit(saved)
    return tuple(saved.values())


def read(ring, n, limit, decay):
    memory = RecentBatches(len(ring[3]), decay=decay)
    memory.entries_read = lambda n: limit
    return tuple(memory.read(ring, n, n))


def entries(ring):
    """What a ring holds, newest first, wherever in the ring that is."""
    order = [slot for slot in ring[3].argsort().tolist() if ring[3][slot] > 0]
    return [t[order] for t in ring]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(entries(first), entries(second), strict=True))


@pytest.mark.contract("ST-5")
@pytest.mark.parametrize("batches", [0, 1, 3, 5, 6, 7, 12, 31])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_a_shrunk_ring_is_the_ring_that_was_always_short(size, batches):
    assert equal(resized(ring_after(6, batches), size), ring_after(size, batches))


@pytest.mark.contract("ST-5")
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 6, 31])
@pytest.mark.parametrize("size", [5, 6, 9])
def test_a_grown_ring_reads_what_it_read_and_fills_up(size, batches):
    short, grown = ring_after(4, batches), resized(ring_after(4, batches), size)
    for limit in range(5):
        got, want = (read(ring, 7, limit, 0.9) for ring in (grown, short))
        torch.testing.assert_close(got, want)
    assert int((grown[2] != 0).sum()) == min(batches, 4)
    for batch in range(batches, batches + size):
        store(grown, batch)
    assert equal(grown, ring_after(size, batches + size))


@pytest.mark.contract("ST-5")
def test_a_resized_ring_shares_no_tensor():
    ring = ring_after(4, 3)
    before = [t.clone() for t in ring]
    for size in (3, 8):
        memory = RecentBatches(size)
        saved = dict(zip(memory.buffers, ring, strict=True))
        with pytest.warns(UserWarning, match="newest"):
            memory.fit(saved)
        memory.clear(tuple(saved.values()))
        assert all(map(torch.equal, ring, before))


@pytest.mark.contract("ST-5")
def test_what_a_rewind_dropped_stays_dropped_in_a_resized_ring():
    ring = ring_after(4, 6)
    memory = RecentBatches(4)
    mark = memory.snapshot(ring)
    store(ring, 100)
    memory.rewind(ring, mark, torch.tensor(1))
    for size in (3, 8):
        past = read(resized(ring, size), 5, size - 1, 1.0)
        torch.testing.assert_close(past, read(ring, 5, min(size - 1, 4), 1.0))


def memorized(size):
    model = stock_net()
    convert(model, "memorized", memory_size=size)
    return model


@pytest.mark.contract("ST-5")
@pytest.mark.parametrize("batches", [2, 5, 11])
@pytest.mark.parametrize(("old", "new"), [(8, 3), (3, 8), (8, 1), (1, 4)])
def test_another_memory_size_keeps_the_newest_batches_and_says_so(old, new, batches):
    source, target = memorized(old), memorized(new)
    for x in micro_batches()[:batches]:
        source(x)
    kept = min(old, new)
    words = rf"memory_size={old} and .* memory_size={new}: the newest {kept} batches are kept"
    with pytest.warns(UserWarning, match=words):
        target.load_state_dict(source.state_dict())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(target[1], name), getattr(source[1], name))
    assert equal(target[1].state, resized(source[1].state, new))
    x = micro_batches()[0]
    assert torch.equal(target.eval()(x), source.eval()(x))
    target.train()
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    with DoubleForward(target, optimizer):
        for x in micro_batches()[:10]:
            target(x).square().mean().backward()
            optimizer.step()
    assert all(torch.isfinite(t).all() for t in target.state_dict().values())


@pytest.mark.contract("ST-5")
@pytest.mark.parametrize("assign", [False, True])
def test_another_memory_size_leaves_the_checkpoint_alone(assign):
    source, target = memorized(4), memorized(6)
    source(micro_batches()[0])
    saved = copy.deepcopy(source.state_dict())
    with pytest.warns(UserWarning, match="memory_size"):
        target.load_state_dict(saved, assign=assign)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in saved.items())
    assert target[1].memory_mean.shape == (6, 3)


@pytest.mark.contract("ST-5")
def test_another_memory_size_is_told_of_once_a_model():
    saved = memorized(4).state_dict()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        memorized(6).load_state_dict(saved)
    assert len(told) == 1


@pytest.mark.contract("ST-5")
def test_another_number_of_channels_is_torchs_error():
    saved = MemorizedBatchNorm1d(3, memory_size=4).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for memory_mean"):
        MemorizedBatchNorm1d(5, memory_size=6).load_state_dict(saved)


def saved_and_loaded(method, options, change):
    source, target = stock_net(), stock_net()
    convert(source, method, **options)
    convert(target, method, **(options | change))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))


@pytest.mark.contract("ST-6")
@pytest.mark.parametrize(
    ("method", "options", "change", "words"),
    [
        ("memorized", {}, {"decay": 0.9}, r"decay=1\.0 and .* decay=0\.9"),
        (
            "memorized",
            {},
            {"variance_rule": "averaged"},
            "variance_rule='pooled' and .* variance_rule='averaged'",
        ),
        ("memorized", {}, {"inference": "ema"}, "inference='memory' and .* inference='ema'"),
        (
            "memorized",
            {"memory_values": 64},
            {"memory_values": 32},
            "memory_values=64 and .* memory_values=32",
        ),
        ("matched", {"matched_batch_size": 64}, {}, None),
        (
            "matched",
            {"matched_batch_size": 64},
            {"matched_batch_size": 96},
            "matched_batch_size=64 and .*=96",
        ),
        ("matched", {"measured": True}, {"measured": False}, "measured=True and .* measured=False"),
        ("matched", {"measured": False}, {"measured": True}, "measured=False and .* measured=True"),
        ("momentum", {}, {"history_weight": 0.5}, None),
        (
            "momentum",
            {},
            {"variance_rule": "pooled"},
            "variance_rule='averaged' and .* variance_rule='pooled'",
        ),
    ],
)
def test_other_options_than_those_of_the_checkpoint_are_told_of_once(method, options, change, words):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        saved_and_loaded(method, options, change)
    assert len(told) == (words is not None)
    if words is not None:
        with pytest.warns(UserWarning, match=words):
            saved_and_loaded(method, options, change)


@pytest.mark.contract("ST-6")
@on_every_method
def test_another_eps_than_that_of_the_checkpoint_is_told_of(method):
    source, target = converted_net(method), converted_net(method)
    target[1].eps = 1e-3
    with pytest.warns(UserWarning, match=r"eps=1e-05 and .* eps=0\.001"):
        target.load_state_dict(source.state_dict())
    assert target[1].eps == 1e-3
