import copy
import functools
import pickle
from itertools import pairwise

import pytest
import reference
import torch
import torch.distributed as dist
from helpers import budget, make_input, make_parameters, native_errors, relative_error
from test_checkpoint import OwnCheckpoint, save_all
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mbnorm
from mbnorm import MatchedBatchNorm1d, MemorizedBatchNorm1d

LAYERS = {
    "momentum": ("Momentum", {"history_weight": 0.7}),
    "momentum-pooled": ("Momentum", {"history_weight": 0.7, "variance_rule": "pooled"}),
    "matched": ("Matched", {"matched_batch_size": 64, "measured": False, "early_weight": 8.0}),
    "measured": ("Matched", {"matched_batch_size": 64, "measured": True, "early_weight": 0.0}),
    "uncentered": ("Matched", {"matched_batch_size": 64, "subtract_mean": False}),
    "memorized": ("Memorized", {"memory_size": 3}),
    "averaged": ("Memorized", {"memory_size": 3, "variance_rule": "averaged"}),
    "ema": ("Memorized", {"memory_size": 4, "memory_values": 40, "decay": 0.9}),
}
on_every_layer = pytest.mark.parametrize("name", LAYERS)
REMEMBERING = {
    "momentum, remembered": ("Momentum", {"history_weight": 0.9, "gradient": "remembered"}),
    "matched, remembered": ("Matched", {"matched_batch_size": 512, "gradient": "remembered"}),
    "uncentered, remembered": (
        "Matched",
        {"matched_batch_size": 64, "subtract_mean": False, "gradient": "remembered"},
    ),
    "averaged, remembered": (
        "Memorized",
        {"memory_size": 9, "variance_rule": "averaged", "gradient": "remembered"},
    ),
}
"""Not with sync="late"."""

SHAPES = {1: (), 2: (3, 2), 3: (2, 1, 2)}
PARTS = [(3, 3), (5, 2), (0, 4), (1, 1), (4, 0), (2, 6)]
"""Samples of both ranks, step by step: even, uneven, none."""
CHANNELS = 5


def make_layer(name, dims=2, **options):
    kind, own = (LAYERS | REMEMBERING)[name]
    own = {"gradient": "exact"} | own
    layer = getattr(mbnorm, f"{kind}BatchNorm{dims}d")(CHANNELS, dtype=torch.float64, **own, **options)
    weight, bias = make_parameters(CHANNELS, torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def whole_batches(dims=2, parts=PARTS):
    """The batch of all ranks at each step, and the cotangent of its output."""
    shapes = [(sum(samples), CHANNELS, *SHAPES[dims]) for samples in parts]
    return [
        tuple(make_input(shape, torch.float64, seed=seed + offset) for offset in (0, 100))
        for seed, shape in enumerate(shapes)
    ]


def part_of(rank, samples, *batch):
    first = sum(samples[:rank])
    return [t[first : first + samples[rank]] for t in batch]


def step(layer, x, cotangent):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(cotangent)
    return y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()


def state(layer):
    return {name: t.clone() for name, t in layer.state_dict().items()}


def collectives():
    return dist.group.WORLD._get_sequence_number_for_group()


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def train(rank, name, dims, sync, options):
    layer = make_layer(name, dims, process_group="world", sync=sync, **options)
    trace = []
    for samples, batch in zip(PARTS, whole_batches(dims), strict=True):
        trace.append((*step(layer, *part_of(rank, samples, *batch)), state(layer)))
    return trace


@pytest.mark.contract("DD-3", "DD-5", "GR-8")
@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("name", LAYERS | REMEMBERING)
def test_pooled_ranks_are_one_process_with_the_whole_batch(two_ranks, name, dims):
    traces = two_ranks(train, name, dims, True, {})
    layer = make_layer(name, dims)
    for samples, batch, *ranks in zip(PARTS, whole_batches(dims), *traces, strict=True):
        y, dx, dw, db = step(layer, *batch)
        for rank, (part_y, part_dx, *_) in enumerate(ranks):
            assert_close([part_y, part_dx], part_of(rank, samples, y, dx))
        assert_close(ranks[0][2] + ranks[1][2], dw)
        assert_close(ranks[0][3] + ranks[1][3], db)
        for *_, part_state in ranks:
            assert_close(part_state, state(layer))


@pytest.mark.contract("DD-3")
@pytest.mark.parametrize("sync", [True, "late"])
@on_every_layer
def test_the_memories_of_all_ranks_are_identical(two_ranks, name, sync):
    for *_, first, second in ([*a, b[-1]] for a, b in zip(*two_ranks(train, name, 2, sync, {}), strict=True)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


class Late:
    """The rule of sync="late" by hand: a reference of the whole batch is the memory, each rank reads it."""

    def __init__(self, name):
        self.kind, options = LAYERS[name]
        self.whole = getattr(reference, f"{self.kind}Norm")(CHANNELS, **options)
        self.weight, self.bias = make_parameters(CHANNELS, torch.float64)

    def read(self, n, m):
        """M, V, a for a part of m samples with n values."""
        whole = self.whole
        if self.kind != "Memorized":
            if whole.M is None:
                return torch.zeros(CHANNELS), torch.ones(CHANNELS), 1.0
            return whole.M, whole.V, 1 - whole.weight_of_the_past(n, m)
        limit = whole.memory_size - 1
        if whole.memory_values:
            limit = min(-(-whole.memory_values // max(n, 1)), whole.memory_size) - 1
        entries = whole.entries[:limit]
        if not entries:
            return torch.zeros(CHANNELS), torch.ones(CHANNELS), 1.0
        weights = torch.tensor(
            [e.n * whole.decay**age for age, e in enumerate(entries, 1)], dtype=torch.float64
        )
        means, variances = (torch.stack([getattr(e, key) for e in entries]) for key in ("mean", "var"))
        share = (weights / weights.sum())[:, None]
        mean, var = (share * means).sum(0), (share * variances).sum(0)
        if whole.variance_rule == "pooled":
            var = var + (share * (means - mean) ** 2).sum(0)
        return mean, var, n / (n + float(weights.sum()))

    def step(self, x, cotangent):
        x, w, b = (t.clone().requires_grad_() for t in (x, self.weight, self.bias))
        if x.numel() == 0:
            return x.detach(), torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(b)
        n = x.numel() // CHANNELS
        y, *_ = reference.blended_batch_norm(
            x, w, b, *self.read(n, len(x)), self.whole.variance_rule, self.whole.eps
        )
        return y.detach(), *torch.autograd.grad(y, (x, w, b), cotangent)

    def commit(self, batch):
        self.whole(batch)


@pytest.mark.contract("DD-3", "DD-5")
@pytest.mark.parametrize(
    ("dims", "backend"), [*((dims, "auto") for dims in SHAPES), (2, "aten"), (2, "traceable")]
)
@on_every_layer
def test_late_ranks_read_the_memory_of_all_and_their_own_part(two_ranks, name, dims, backend):
    # one value has no variance, and no rank has a past in the first step
    traces = two_ranks(train, name, dims, "late", {"backend": backend})
    late = Late(name)
    for samples, batch, *ranks in zip(PARTS, whole_batches(dims), *traces, strict=True):
        for rank, (*numbers, _) in enumerate(ranks):
            assert_close(tuple(numbers), late.step(*part_of(rank, samples, *batch)))
        late.commit(batch[0])
        for *_, after in ranks:
            assert_close(after["running_mean"], late.whole.running_mean)
            assert_close(after["running_var"], late.whole.running_var)
            assert int(after["num_batches_tracked"]) == late.whole.batches


@pytest.mark.contract("DD-3")
@on_every_layer
def test_late_and_pooled_ranks_remember_the_same(two_ranks, name):
    late, pooled = (two_ranks(train, name, 2, sync, {})[0] for sync in ("late", True))
    for (*_, a), (*_, b) in zip(late, pooled, strict=True):
        assert_close(a, b)


def entries(ages):
    return int((ages > 0).sum())


def buffers_and_state(rank):
    layer = make_layer("memorized", process_group="world", sync="late")
    (x, _), (again, _), *_ = whole_batches()
    seen = []
    for batch in (x, again):
        layer(batch)
        seen.append((entries(layer.memory_ages), entries(layer.state_dict()["memory_ages"])))
    return seen


def test_the_buffers_are_a_batch_behind_and_the_state_dict_is_not(two_ranks):
    assert two_ranks(buffers_and_state) == [[(0, 1), (1, 2)]] * 2


def train_while_rank_0_looks(rank, name, looks):
    layer = make_layer(name, process_group="world", sync="late")
    for samples, batch in zip(PARTS, whole_batches(), strict=True):
        step(layer, *part_of(rank, samples, *batch))
        if rank == 0 and looks:
            before = {key: b.clone() for key, b in layer.named_buffers()}
            layer.state_dict(), copy.deepcopy(layer), pickle.dumps(layer)
            y = layer.eval()(batch[0])
            fresh = make_layer(name)
            fresh.load_state_dict(layer.state_dict())
            assert torch.equal(y, fresh.eval()(batch[0]))
            layer.train()
            assert all(torch.equal(b, before[key]) for key, b in layer.named_buffers())
    return state(layer)


@pytest.mark.contract("DD-4")
@pytest.mark.parametrize("name", ["matched", "memorized"])
def test_evaluating_and_saving_on_one_rank_changes_nothing(two_ranks, name):
    looked, alone = (two_ranks(train_while_rank_0_looks, name, looks) for looks in (True, False))
    for after in looked:
        assert all(torch.equal(t, alone[0][key]) for key, t in after.items())


def copies(rank):
    layer = make_layer("memorized", process_group="world", sync="late")
    layer(whole_batches()[0][0])
    return [state(layer), state(copy.deepcopy(layer)), state(pickle.loads(pickle.dumps(layer)))]


def test_copies_and_pickles_have_the_late_batch(two_ranks):
    want, *others = two_ranks(copies)[0]
    assert entries(want["memory_ages"]) == 1
    for other in others:
        assert all(torch.equal(t, want[key]) for key, t in other.items())


def count_collectives(rank, sync):
    layer = make_layer("matched", process_group="world", sync=sync)
    numbers = [collectives()]
    for batch, cotangent in whole_batches()[:2]:
        x = batch.clone().requires_grad_()
        y = layer(x)
        numbers.append(collectives())
        y.backward(cotangent)
        numbers.append(collectives())
    layer.eval()(batch)
    layer.state_dict()
    numbers.append(collectives())
    return [b - a for a, b in pairwise(numbers)]


@pytest.mark.contract("DD-4")
def test_pooling_communicates_once_in_forward_and_backward_and_never_in_eval(two_ranks):
    assert two_ranks(count_collectives, True) == [[1, 1, 1, 1, 0]] * 2


@pytest.mark.contract("DD-4")
def test_late_ranks_communicate_once_in_the_forward(two_ranks):
    assert two_ranks(count_collectives, "late") == [[1, 0, 1, 0, 0]] * 2


def read_only(rank, sync):
    layer = make_layer("memorized", process_group="world", sync=sync)
    plain = make_layer("memorized")
    batches = [batch for batch, _ in whole_batches()]
    for batch in batches[:2]:
        layer(part_of(rank, (3, 4), batch)[0])
        plain(batch)
    before = state(layer)
    with mbnorm.no_update(layer), mbnorm.no_update(plain):
        y = layer(part_of(rank, (2, 2), batches[2])[0])
        want = plain(batches[2])
    assert all(torch.equal(t, before[key]) for key, t in state(layer).items())
    return y.detach(), part_of(rank, (2, 2), want.detach())[0]


@pytest.mark.parametrize("sync", [True, "late"])
def test_no_update_reads_and_stores_nothing(two_ranks, sync):
    for y, want in two_ranks(read_only, sync):
        if sync is True:
            assert_close(y, want)


def poisoned(rank, sync):
    layer = make_layer("matched", process_group="world", sync=sync)
    x = whole_batches()[0][0]
    layer(x)
    before = state(layer)
    layer(torch.full_like(x, torch.nan) if rank else x)
    after = state(layer)
    changed = [key for key in after if not torch.equal(after[key], before[key])]
    layer(x)
    return changed, int(layer.state_dict()["num_batches_tracked"])


@pytest.mark.contract("NI-1")
@pytest.mark.parametrize("sync", [True, "late"])
def test_a_nan_on_one_rank_is_stored_on_none(two_ranks, sync):
    assert two_ranks(poisoned, sync) == [(["num_batches_skipped"], 2)] * 2


def all_empty(rank, sync):
    layer = make_layer("memorized", process_group="world", sync=sync)
    x = torch.empty(0, CHANNELS, 3, 2, dtype=torch.float64, requires_grad=True)
    before = state(layer)
    y = layer(x)
    y.sum().backward()
    return y.shape[0], [key for key, t in state(layer).items() if not torch.equal(t, before[key])]


@pytest.mark.contract("DD-5", "B1-4")
@pytest.mark.parametrize("sync", [True, "late"])
def test_a_batch_that_is_empty_on_all_ranks_stores_nothing(two_ranks, sync):
    assert two_ranks(all_empty, sync) == [(0, [])] * 2


def one_value(rank):
    layer, fresh = (MatchedBatchNorm1d(CHANNELS, measured=False, process_group="world") for _ in range(2))
    finite = bool(torch.isfinite(layer(torch.randn(1, CHANNELS) + rank)).all())
    try:
        fresh(torch.randn(1 - rank, CHANNELS))
    except ValueError as error:
        return finite, str(error)


@pytest.mark.contract("B1-1")
def test_one_value_on_each_rank_is_enough_to_start_and_one_on_all_is_not(two_ranks):
    (finite, error), other = two_ranks(one_value)
    assert finite
    assert "Expected more than 1 value per channel when training" in error
    assert other == (finite, error)


CHECKPOINTS = {
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "plain": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "selective": lambda block, x: checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_all),
    ),
    "not torch's": lambda block, x: OwnCheckpoint.apply(block, x, *block.parameters()),
}


def checkpointed(rank, sync, variant):
    results = []
    for repeats in (False, True):
        first = make_layer("memorized", process_group="world", sync=sync)
        second = make_layer("matched", process_group="world", sync=sync)
        block = nn.Sequential(first, second, nn.Tanh())
        start = collectives()
        for samples, (batch, cotangent) in zip(PARTS[:2], whole_batches(), strict=False):
            x, dy = part_of(rank, samples, batch, cotangent)
            x = x.clone().requires_grad_()
            y = CHECKPOINTS[variant](block, x) if repeats else block(x)
            y.backward(dy)
        results.append((x.grad, first.weight.grad, state(first), state(second), collectives() - start))
    return results


@pytest.mark.contract("CK-1", "CK-2", "CK-5")
@pytest.mark.parametrize("variant", CHECKPOINTS)
@pytest.mark.parametrize("sync", [True, "late"])
def test_a_recompute_gives_the_same_and_communicates_nothing(two_ranks, sync, variant):
    for (*plain, sent), (*repeated, sent_again) in two_ranks(checkpointed, sync, variant):
        assert_close(repeated, plain)
        assert sent_again == sent


def same_input_again(rank, sync, order):
    runs = []
    for repeats in (False, True):
        layer = make_layer("memorized", process_group="world", sync=sync)
        (first, _), (batch, cotangent), *_ = whole_batches()
        layer(first)
        x, dy = part_of(rank, PARTS[1], batch, cotangent)
        leaves = [x.clone().requires_grad_() for _ in order]
        outputs = [
            checkpoint(layer, leaf, use_reentrant=False) if repeats else layer(leaf) for leaf in leaves
        ]
        for i in order:
            outputs[i].backward(dy)
        runs.append([leaf.grad for leaf in leaves])
    return runs


@pytest.mark.contract("CK-1")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("sync", [True, "late"])
def test_the_same_input_again_is_recomputed_with_what_each_forward_had_read(two_ranks, sync, order):
    for (once, again), repeated in two_ranks(same_input_again, sync, order):
        assert not torch.allclose(once, again)
        assert_close(repeated, [once, again])


def raw_statistics(rank, momentum):
    layer = make_layer("memorized", process_group="world", sync="late", momentum=momentum)
    for samples, (batch, _) in zip(PARTS[:2], whole_batches(), strict=False):
        layer(part_of(rank, samples, batch)[0])
    return layer.running_mean.clone(), layer.running_var.clone()


@pytest.mark.contract("EM-1")
@pytest.mark.parametrize("momentum", [None, 1.0])
def test_tools_that_read_raw_statistics_find_them_in_time(two_ranks, momentum):
    plain = nn.BatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64)
    for batch, _ in whole_batches()[:2]:
        plain(batch)
    for found in two_ranks(raw_statistics, momentum):
        assert_close(found, (plain.running_mean, plain.running_var))


def momentum_set_to_0_between(rank):
    layer = make_layer("ema", process_group="world", sync="late")
    (x, _), (other, _), *_ = whole_batches()
    layer(part_of(rank, (3, 3), x)[0])
    layer.momentum = 0
    layer(part_of(rank, (3, 3), other)[0])
    layer.momentum = 0.1
    return state(layer)


@pytest.mark.contract("DF-6")
def test_a_late_batch_enters_with_the_momentum_of_its_forward(two_ranks):
    plain = make_layer("ema")
    plain(whole_batches()[0][0])
    for found in two_ranks(momentum_set_to_0_between):
        assert_close(found, state(plain))


def history_weight_changed_between(rank):
    layer = make_layer("momentum", process_group="world", sync="late")
    for weight, samples, (batch, _) in zip((0.1, 0.9, 0.5), PARTS, whole_batches(), strict=False):
        layer.history_weight.fill_(weight)
        layer(part_of(rank, samples, batch)[0])
    layer.history_weight.fill_(0.0)
    return state(layer)


def test_a_late_batch_enters_with_the_history_weight_of_its_forward(two_ranks):
    plain = make_layer("momentum")
    for weight, (batch, _) in zip((0.1, 0.9, 0.5), whole_batches(), strict=False):
        plain.history_weight.fill_(weight)
        plain(batch)
    for found in two_ranks(history_weight_changed_between):
        assert_close(found, state(plain))


def forwards_kept(rank, sync, backend):
    layer = make_layer("momentum", process_group="world", sync=sync, backend=backend)
    for samples, batch in zip(PARTS, whole_batches(), strict=True):
        step(layer, *part_of(rank, samples, *batch))
    layer.settle()
    return len(layer._calls.calls)


@pytest.mark.contract("CK-3")
@pytest.mark.parametrize(
    ("sync", "backend"), [(True, "aten"), ("late", "auto"), ("late", "aten"), ("late", "traceable")]
)
def test_a_forward_whose_backward_has_run_is_forgotten(two_ranks, sync, backend):
    assert two_ranks(forwards_kept, sync, backend) == [1, 1]


def taken_back(rank, sync, backend):
    layer = make_layer("memorized", process_group="world", sync=sync, backend=backend)
    kept, dropped, following = (part_of(rank, (4, 3), batch)[0] for batch, _ in whole_batches()[:3])
    layer(kept)
    twin = copy.deepcopy(layer)
    before = layer.snapshot()
    layer(dropped)
    layer.rewind(before)
    return layer(following).detach(), twin(following).detach()


@pytest.mark.parametrize(
    ("sync", "backend"), [(True, "aten"), ("late", "auto"), ("late", "aten"), ("late", "traceable")]
)
def test_a_rewind_drops_the_forwards_after_the_snapshot(two_ranks, sync, backend):
    for got, want in two_ranks(taken_back, sync, backend):
        assert_close(got, want)


def start_again(rank):
    layer = make_layer("memorized", process_group="world", sync="late")
    saved = state(layer)
    x = whole_batches()[0][0]
    left = []
    for restart in (layer.reset_running_stats, lambda: layer.load_state_dict(saved)):
        layer(x)
        restart()
        left.append(entries(layer.state_dict()["memory_ages"]))
    return left


def test_a_reset_and_a_load_drop_the_late_batch(two_ranks):
    assert two_ranks(start_again) == [[0, 0]] * 2


def reverted(rank):
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, dtype=torch.float64))
    mbnorm.convert(model, "memorized", process_group="world", sync="late", memory_size=3)
    model(whole_batches()[0][0])
    mbnorm.revert(model)
    return type(model[0]).__name__, sorted(set(vars(model[0])) - set(vars(nn.BatchNorm2d(1)))), state(model)


def test_convert_takes_the_ranks_and_revert_waits_for_the_late_batch(two_ranks):
    plain = MemorizedBatchNorm2d = make_layer("memorized")
    MemorizedBatchNorm2d(whole_batches()[0][0])
    for kind, rest, found in two_ranks(reverted):
        assert (kind, rest) == ("BatchNorm2d", [])
        assert_close(found["0.running_var"], plain.running_var)


def given_group(rank):
    group = dist.new_group([0, 1])
    layer = make_layer("matched", process_group=group)
    layer(torch.randn(2, CHANNELS, 3, 2, dtype=torch.float64) + rank)
    twin = copy.deepcopy(layer)
    with pytest.raises(TypeError, match="process group cannot be pickled"):
        pickle.dumps(layer)
    lonely = dist.new_subgroups(1)[0]
    alone = make_layer("matched", process_group=lonely)
    alone(torch.randn(2, CHANNELS, 3, 2, dtype=torch.float64) + rank)
    return twin.process_group is group, layer.running_mean.clone(), alone.running_mean.clone()


def test_a_group_is_who_shares(two_ranks):
    (first, mean, alone), (second, other_mean, other_alone) = two_ranks(given_group)
    assert first
    assert second
    assert torch.equal(mean, other_mean)
    assert not torch.equal(alone, other_alone)


def messages_of_a_step(rank, sync):
    group = dist.new_group([0, 1])
    layer = make_layer("matched", process_group=group, sync=sync)
    in_world = collectives()
    step(layer, *part_of(rank, PARTS[0], *whole_batches()[0]))
    layer.settle()
    return collectives() - in_world, group._get_sequence_number_for_group()


@pytest.mark.parametrize(("sync", "messages"), [(True, 2), ("late", 1)])
def test_messages_stay_in_the_group(two_ranks, sync, messages):
    assert two_ranks(messages_of_a_step, sync) == [(0, messages)] * 2


def differentiate_twice(rank):
    layer = make_layer("matched", process_group="world")
    x = whole_batches()[0][0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.contract("MF-4")
def test_a_second_derivative_of_a_pooled_batch_is_refused(two_ranks):
    two_ranks(differentiate_twice)


def half(rank, dtype):
    layer = MemorizedBatchNorm1d(CHANNELS, memory_size=3, process_group="world")
    parts = [part_of(rank, (5, 3), make_input((8, CHANNELS), dtype, seed=seed))[0] for seed in range(3)]
    outputs = [layer(x) for x in parts]
    return outputs[-1].detach().double(), outputs[-1].dtype, layer.memory_mean.dtype


@pytest.mark.contract("AM-1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_pools_in_float32(two_ranks, dtype):
    exact = reference.MemorizedNorm(CHANNELS, memory_size=3)
    for seed in range(3):
        x = make_input((8, CHANNELS), dtype, seed=seed)
        want = exact(x.double())
    answers = two_ranks(half, dtype)
    ones, zeros = torch.ones(CHANNELS, dtype=dtype), torch.zeros(CHANNELS, dtype=dtype)
    native, *_ = native_errors(x, ones, zeros, torch.ones_like(x), exact.eps)
    assert relative_error(torch.cat([y for y, *_ in answers]), want) <= budget(dtype, native)
    assert [kinds for _, *kinds in answers] == [[dtype, torch.float32]] * 2


@pytest.mark.contract("DD-1")
@pytest.mark.parametrize("sync", [True, "late"])
@on_every_layer
def test_without_a_process_group_the_layers_are_as_ever(name, sync):
    assert not dist.is_initialized()
    layer, plain = make_layer(name, process_group="world", sync=sync), make_layer(name)
    for batch in whole_batches():
        assert all(torch.equal(a, b) for a, b in zip(step(layer, *batch), step(plain, *batch), strict=True))
        assert all(torch.equal(t, state(plain)[key]) for key, t in state(layer).items())


def test_wrong_options_are_named():
    with pytest.raises(TypeError, match="process_group must be None"):
        make_layer("matched", process_group=3)
    with pytest.raises(ValueError, match="sync must be True or"):
        make_layer("matched", process_group="world", sync="soon")
    with pytest.raises(ValueError, match="needs the ranks"):
        make_layer("matched", sync="late")
    with pytest.raises(ValueError, match="computes with ATen"):
        make_layer("memorized", process_group="world", backend="traceable")


@pytest.mark.parametrize("sync", [True, "late"])
def test_a_memory_can_be_shared_later(sync):
    layer = make_layer("memorized")
    layer.share_with("world", sync)
    assert (layer.process_group, layer.sync) == ("world", sync)


def test_what_cannot_be_shared_is_named_when_it_is_to_be():
    with pytest.raises(ValueError, match="computes with ATen"):
        make_layer("memorized", backend="traceable").share_with("world")


def test_the_description_names_who_shares():
    assert "process_group=world, sync=late" in repr(make_layer("matched", process_group="world", sync="late"))
    assert "sync" not in repr(make_layer("matched"))


def test_compiling_a_synced_layer_into_one_graph_is_refused():
    layer = make_layer("matched", process_group="world")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="process_group= needs eager mode"):
        torch.compile(layer, fullgraph=True, backend="eager")(whole_batches()[0][0])
