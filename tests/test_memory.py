import pytest
import torch

from mbnorm.averages import InferenceAverages, commit
from mbnorm.memories.measured_average import MeasuredAverage
from mbnorm.memories.memory import CUMULATIVE, InferenceUpdate
from mbnorm.memories.moving_average import MovingAverage
from mbnorm.memories.recent_batches import AS_MANY_AS_THE_BATCH, RecentBatches

YES, NO = torch.tensor(True), torch.tensor(False)
BATCH = torch.tensor([77.0]), torch.tensor([77.0])


class Held:
    """A memory and a state of it."""

    def __init__(self, memory, channels=1):
        self.memory = memory
        self.state = memory.new(torch.empty(channels))

    def __getattr__(self, name):
        function = getattr(self.memory, name)
        return lambda *arguments: function(self.state, *arguments)


def ring(k, **options):
    return Held(RecentBatches(k, variance_rule="averaged", **options))


def moving(weight=0.0):
    return Held(MovingAverage(weight))


def store(held, *means, n=2, finite=YES):
    for mean in means:
        statistics = torch.tensor([float(mean)]), torch.tensor([1.0])
        held.commit(finite, statistics, statistics, n)


def read_mean(held, n=2):
    past = held.read(n, n)
    return past.mean.item(), past.batch_weight.item()


def test_an_empty_ring_leaves_the_batch_all_the_weight():
    past = ring(3).read(2, 2)
    assert past.batch_weight.item() == 1
    assert torch.isfinite(past.mean).all()


def test_a_filling_ring_weighs_entries_by_their_values():
    memory = ring(4)
    store(memory, 1.0, n=2)
    store(memory, 5.0, n=6)
    assert read_mean(memory, n=8) == ((2 * 1 + 6 * 5) / 8, 0.5)


def test_a_full_ring_reads_all_but_the_oldest():
    memory = ring(3)
    store(memory, 100, 1, 3)
    assert read_mean(memory) == (2.0, torch.tensor(1 / 3).item())


def test_a_wrapped_ring_overwrites_the_oldest():
    memory = ring(3)
    store(memory, 100, 100, 100, 7, 1, 3)
    assert sorted(memory.state[0].flatten().tolist()) == [1, 3, 7]
    assert read_mean(memory)[0] == 2.0


def test_decay_weighs_by_age():
    memory = ring(4, decay=0.5)
    store(memory, 4, 8)
    mean, weight = read_mean(memory)
    assert mean == pytest.approx((0.5 * 8 + 0.25 * 4) / 0.75)
    assert weight == torch.tensor(1 / 1.75).item()


def test_memory_values_reads_the_newest_entries_only():
    memory = ring(5, memory_values=4)
    store(memory, 1, 2, 9)
    assert read_mean(memory, n=2)[0] == 9
    assert read_mean(memory, n=4)[1] == 1


def test_seeded_entries_weigh_as_much_as_the_batch_that_reads_them():
    memory = ring(3)
    memory.seed(torch.tensor([5.0]), torch.tensor([1.0]))
    _, _, counts, ages = memory.state
    assert counts.tolist() == [AS_MANY_AS_THE_BATCH, AS_MANY_AS_THE_BATCH, 0]
    assert ages.tolist() == [2, 1, 0]
    for n in (2, 50):
        assert read_mean(memory, n=n) == (5.0, torch.tensor(1 / 3).item())


def test_a_commit_that_is_not_finite_leaves_the_ring_as_it_was():
    memory = ring(3)
    store(memory, 1, 2, 3)
    before = [t.clone() for t in memory.state]
    store(memory, torch.nan, finite=NO)
    assert all(torch.equal(a, b) for a, b in zip(memory.state, before, strict=True))


def test_rewinding_a_ring_drops_what_was_stored_since():
    memory = ring(4)
    store(memory, 1, 2)
    then = memory.snapshot()
    store(memory, 30, 40)
    memory.rewind(then, torch.tensor(2))
    assert read_mean(memory)[0] == 1.5
    store(memory, 3)
    assert read_mean(memory)[0] == 2.0


def test_rewinding_a_full_ring_does_not_bring_back_what_was_evicted():
    memory = ring(3)
    store(memory, 1, 2, 3)
    then = memory.snapshot()
    store(memory, 40)
    memory.rewind(then, torch.tensor(1))
    assert sorted(memory.state[2].tolist()) == [0, 2, 2]
    assert read_mean(memory) == (2.5, torch.tensor(1 / 3).item())


def test_rewinding_more_than_the_ring_holds_empties_it():
    memory = ring(3)
    store(memory, 1, 2)
    then = memory.snapshot()
    store(memory, 5, 6, 7, 8)
    memory.rewind(then, torch.tensor(4))
    assert not memory.holds_anything()
    assert memory.state[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("stored", [1, 2, 3, 4, 5, 7])
def test_what_is_stored_again_after_a_rewind_is_where_it_was(stored):
    memory = ring(3)
    store(memory, 1, 2)
    then = memory.snapshot()
    store(memory, *range(10, 10 + stored))
    before = [t.clone() for t in memory.state]
    memory.rewind(then, torch.tensor(stored))
    store(memory, *range(10, 10 + stored))
    assert all(map(torch.equal, memory.state, before))


def test_an_empty_average_leaves_the_batch_all_the_weight():
    assert moving(0.9).read(2, 2).batch_weight.item() == 1


def test_an_average_reads_what_was_committed():
    memory = moving(0.75)
    memory.commit(YES, BATCH, (torch.tensor([3.0]), torch.tensor([2.0])), 2)
    past = memory.read(2, 2)
    assert (past.mean.item(), past.var.item(), past.batch_weight.item()) == (3.0, 2.0, 0.25)


def test_reads_do_not_alias_the_state():
    average, recent = moving(0.5), ring(2)
    average.commit(YES, BATCH, (torch.tensor([3.0]), torch.tensor([2.0])), 2)
    store(recent, 3)
    pasts = average.read(2, 2), recent.read(2, 2)
    average.clear()
    recent.clear()
    assert [p.mean.item() for p in pasts] == [3.0, 3.0]


def test_a_commit_that_is_not_finite_leaves_the_average_empty():
    memory = moving()
    memory.commit(NO, BATCH, (torch.tensor([torch.nan]), torch.tensor([1.0])), 2)
    assert not memory.holds_anything()
    assert memory.state[0].item() == 0


def test_rewinding_an_average_restores_it():
    memory = moving()
    then = memory.snapshot()
    memory.commit(YES, BATCH, (torch.tensor([3.0]), torch.tensor([2.0])), 2)
    memory.rewind(then, torch.tensor(1))
    assert not memory.holds_anything()
    assert [t.item() for t in memory.state[:2]] == [0.0, 1.0]


def averages():
    zero = torch.zeros((), dtype=torch.int64)
    return InferenceAverages(torch.zeros(1), torch.ones(1), zero, zero.clone())


def blend_in(state, mean, var, update):
    state.commit(YES, *state.after(torch.tensor([mean]), torch.tensor([var]), update, state.batches))


def test_inference_averages_where_a_batch_weighs_as_much_as_any_before_are_cumulative():
    state = averages()
    for value in (1.0, 2.0, 6.0):
        blend_in(state, value, value, CUMULATIVE)
    assert (state.mean.item(), state.var.item(), int(state.batches)) == (3.0, 3.0, 3)


def test_the_first_of_early_batches_takes_all_the_weight_and_later_ones_less_down_to_the_given_one():
    state, found = averages(), []
    for _ in range(5):
        blend_in(state, 0.0, 1.0, InferenceUpdate(0.5, early=2.0))
        state.mean.fill_(0.0)
        one = torch.tensor([1.0])
        found.append(state.after(one, one, InferenceUpdate(0.5, early=2.0), state.batches)[0].item())
    # after 1, 2, ... batches; 2 / (3 + 2) would be less than 0.5
    assert found == [torch.tensor(2 / 3).item(), 0.5, 0.5, 0.5, 0.5]


def test_inference_averages_of_moments_count_the_spread_of_the_means():
    state = averages()
    blend_in(state, 2.0, 1.0, InferenceUpdate(0.5, pooled=True))
    assert (state.mean.item(), state.var.item()) == (1.0, 1 + 0.25 * 4)


def test_inference_averages_ignore_what_is_not_finite():
    state = averages()
    state.commit(NO, torch.tensor([torch.inf]), torch.tensor([1.0]))
    assert (state.mean.item(), int(state.batches), int(state.skipped)) == (0.0, 0, 1)


def test_a_weight_of_one_replaces_even_what_is_not_finite():
    state = averages()
    state.var.fill_(torch.inf)
    blend_in(state, 2.0, 3.0, InferenceUpdate(1.0))
    assert (state.mean.item(), state.var.item()) == (2.0, 3.0)


def test_a_failed_rewind_can_be_taken_back():
    memory = ring(3)
    store(memory, 1)
    then = memory.snapshot()
    store(memory, 2, 3)
    now = memory.snapshot()
    memory.rewind(then, torch.tensor(2))
    memory.restore(now)
    assert read_mean(memory)[0] == 2.5


@pytest.mark.parametrize(("n", "correction"), [(1, 1.0), (2, 2.0), (5, 1.25)])
def test_the_variance_for_inference_is_unbiased_where_there_is_more_than_one_value(n, correction):
    state = averages()
    statistics = torch.tensor([3.0]), torch.tensor([4.0])
    held = moving()
    commit(held.memory, held.state, state, statistics, statistics, n, InferenceUpdate(1.0, unbiased=True))
    assert (state.mean.item(), state.var.item()) == (3.0, 4 * correction)


def test_a_failed_rewind_of_a_moving_average_can_be_taken_back():
    memory = moving()
    then = memory.snapshot()
    store(memory, 5)
    now = memory.snapshot()
    memory.rewind(then, torch.tensor(1))
    memory.restore(now)
    assert [t.item() for t in memory.state[:3:2]] == [5.0, 1.0]


@pytest.mark.parametrize(("batches", "seen"), [(0, 400), (24, 400), (1000, 1000)])
def test_a_seeded_average_has_seen_400_batches_or_as_many_as_were_counted(batches, seen):
    held = Held(MeasuredAverage())
    assert held.batches_seen(torch.tensor(7)) == 0
    held.seed(torch.tensor([5.0]), torch.tensor([1.0]), batches)
    assert held.batches_seen(torch.tensor(7)) == seen
    store(held, 5)
    assert held.batches_seen(torch.tensor(8)) == seen + 1


def test_what_a_measured_average_has_seen_counts_its_batches():
    held = Held(MeasuredAverage())
    for t in range(4):
        assert held.batches_seen(torch.tensor(0)) == t
        store(held, t)
