import pytest
import torch

from mbnorm.averages import InferenceAverages, InferenceUpdate, commit
from mbnorm.memory import AS_MANY_AS_THE_BATCH, MovingAverage, RecentBatches

YES, NO = torch.tensor(True), torch.tensor(False)
BATCH = torch.tensor([77.0]), torch.tensor([77.0])


def ring(k, channels=1):
    memory = RecentBatches(
        torch.empty(k, channels), torch.empty(k, channels), torch.empty(k), torch.empty((), dtype=torch.int64)
    )
    memory.clear()
    return memory


def moving(channels=1):
    memory = MovingAverage(torch.empty(channels), torch.empty(channels), torch.empty((), dtype=torch.int64))
    memory.clear()
    return memory


def store(memory, *means, n=2, finite=YES):
    for mean in means:
        statistics = torch.tensor([float(mean)]), torch.tensor([1.0])
        memory.commit(finite, statistics, statistics, n)


def read_mean(memory, n=2, limit=None, decay=1.0):
    past = memory.read(n, memory.size - 1 if limit is None else limit, decay, "averaged")
    return past.mean.item(), past.batch_weight.item()


def test_an_empty_ring_leaves_the_batch_all_the_weight():
    past = ring(3).read(2, 2, 1.0, "pooled")
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
    assert sorted(memory.mean.flatten().tolist()) == [1, 3, 7]
    assert read_mean(memory)[0] == 2.0


def test_decay_weighs_by_age():
    memory = ring(4)
    store(memory, 4, 8)
    mean, weight = read_mean(memory, decay=0.5)
    assert mean == pytest.approx((0.5 * 8 + 0.25 * 4) / 0.75)
    assert weight == torch.tensor(1 / 1.75).item()


def test_limit_reads_the_newest_entries_only():
    memory = ring(5)
    store(memory, 1, 2, 9)
    assert read_mean(memory, limit=1)[0] == 9
    assert read_mean(memory, limit=0)[1] == 1


def test_seeded_entries_weigh_as_much_as_the_batch_that_reads_them():
    memory = ring(3)
    memory.seed(torch.tensor([5.0]), torch.tensor([1.0]))
    assert memory.counts.tolist() == [AS_MANY_AS_THE_BATCH, AS_MANY_AS_THE_BATCH, 0]
    for n in (2, 50):
        assert read_mean(memory, n=n) == (5.0, torch.tensor(1 / 3).item())


def test_a_commit_that_is_not_finite_leaves_the_ring_as_it_was():
    memory = ring(3)
    store(memory, 1, 2, 3)
    before = [t.clone() for t in memory]
    store(memory, torch.nan, finite=NO)
    assert all(torch.equal(a, b) for a, b in zip(memory, before, strict=True))


def test_rewinding_a_ring_drops_what_was_stored_since():
    memory = ring(4)
    store(memory, 1, 2)
    then = memory.snapshot()
    store(memory, 30, 40)
    memory.rewind(then)
    assert read_mean(memory)[0] == 1.5
    store(memory, 3)
    assert read_mean(memory)[0] == 2.0


def test_rewinding_a_full_ring_does_not_bring_back_what_was_evicted():
    memory = ring(3)
    store(memory, 1, 2, 3)
    then = memory.snapshot()
    store(memory, 40)
    memory.rewind(then)
    assert sorted(memory.counts.tolist()) == [0, 2, 2]
    assert read_mean(memory) == (2.5, torch.tensor(1 / 3).item())


def test_rewinding_more_than_the_ring_holds_empties_it():
    memory = ring(3)
    store(memory, 1, 2)
    then = memory.snapshot()
    store(memory, 5, 6, 7, 8)
    memory.rewind(then)
    assert not memory.holds_anything()
    assert int(memory.position) == 2


def test_an_empty_average_leaves_the_batch_all_the_weight():
    assert moving().read(0.9).batch_weight.item() == 1


def test_an_average_reads_what_was_committed():
    memory = moving()
    memory.commit(YES, BATCH, (torch.tensor([3.0]), torch.tensor([2.0])), 2)
    past = memory.read(0.75)
    assert (past.mean.item(), past.var.item(), past.batch_weight.item()) == (3.0, 2.0, 0.25)


def test_reads_do_not_alias_the_state():
    average, recent = moving(), ring(2)
    average.commit(YES, BATCH, (torch.tensor([3.0]), torch.tensor([2.0])), 2)
    store(recent, 3)
    pasts = average.read(0.5), recent.read(2, 1, 1.0, "pooled")
    average.clear()
    recent.clear()
    assert [p.mean.item() for p in pasts] == [3.0, 3.0]


def test_a_commit_that_is_not_finite_leaves_the_average_empty():
    memory = moving()
    memory.commit(NO, BATCH, (torch.tensor([torch.nan]), torch.tensor([1.0])), 2)
    assert not memory.holds_anything()
    assert memory.mean.item() == 0


def test_rewinding_an_average_restores_it():
    memory = moving()
    then = memory.snapshot()
    memory.commit(YES, BATCH, (torch.tensor([3.0]), torch.tensor([2.0])), 2)
    memory.rewind(then)
    assert not memory.holds_anything()
    assert (memory.mean.item(), memory.var.item()) == (0.0, 1.0)


def averages():
    zero = torch.zeros((), dtype=torch.int64)
    return InferenceAverages(torch.zeros(1), torch.ones(1), zero, zero.clone())


def blend_in(state, mean, var, weight, variance="averaged", early=0.0):
    state.commit(YES, *state.after(torch.tensor([mean]), torch.tensor([var]), weight, variance, early))


def test_inference_averages_where_a_batch_weighs_as_much_as_any_before_are_cumulative():
    state = averages()
    for value in (1.0, 2.0, 6.0):
        blend_in(state, value, value, 0.0, early=1.0)
    assert (state.mean.item(), state.var.item(), int(state.batches)) == (3.0, 3.0, 3)


def test_the_first_of_early_batches_takes_all_the_weight_and_later_ones_less_down_to_the_given_one():
    state, found = averages(), []
    for _ in range(5):
        blend_in(state, 0.0, 1.0, 0.5, early=2.0)
        state.mean.fill_(0.0)
        found.append(state.after(torch.tensor([1.0]), torch.tensor([1.0]), 0.5, "averaged", 2.0)[0].item())
    # after 1, 2, ... batches; 2 / (3 + 2) would be less than 0.5
    assert found == [torch.tensor(2 / 3).item(), 0.5, 0.5, 0.5, 0.5]


def test_inference_averages_of_moments_count_the_spread_of_the_means():
    state = averages()
    blend_in(state, 2.0, 1.0, 0.5, "pooled")
    assert (state.mean.item(), state.var.item()) == (1.0, 1 + 0.25 * 4)


def test_inference_averages_ignore_what_is_not_finite():
    state = averages()
    state.commit(NO, torch.tensor([torch.inf]), torch.tensor([1.0]))
    assert (state.mean.item(), int(state.batches), int(state.skipped)) == (0.0, 0, 1)


def test_a_weight_of_one_replaces_even_what_is_not_finite():
    state = averages()
    state.var.fill_(torch.inf)
    blend_in(state, 2.0, 3.0, 1.0)
    assert (state.mean.item(), state.var.item()) == (2.0, 3.0)


def test_a_failed_rewind_can_be_taken_back():
    memory = ring(3)
    store(memory, 1)
    then = memory.snapshot()
    store(memory, 2, 3)
    now = memory.snapshot()
    memory.rewind(then)
    memory.restore(now)
    assert read_mean(memory)[0] == 2.5


@pytest.mark.parametrize(("n", "correction"), [(1, 1.0), (2, 2.0), (5, 1.25)])
def test_the_variance_for_inference_is_unbiased_where_there_is_more_than_one_value(n, correction):
    state = averages()
    update = InferenceUpdate(blended=False, unbiased=True, weight=1.0, variance="averaged")
    statistics = torch.tensor([3.0]), torch.tensor([4.0])
    commit(moving(), state, statistics, statistics, n, update)
    assert (state.mean.item(), state.var.item()) == (3.0, 4 * correction)


def test_a_failed_rewind_of_a_moving_average_can_be_taken_back():
    memory = moving()
    then = memory.snapshot()
    store(memory, 5)
    now = memory.snapshot()
    memory.rewind(then)
    memory.restore(now)
    assert (memory.mean.item(), int(memory.filled)) == (5.0, 1)
