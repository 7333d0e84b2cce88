"""The CPU operators that read a memory and commit: what only they do, and what they refuse."""

from functools import partial

import pytest
import remembering
import torch
from helpers import make_input, make_parameters
from remembering import (
    BAD,
    EPS,
    KINDS,
    SHAPE,
    UPDATES,
    assert_close,
    held,
    in_both_precisions,
    of_every_kind,
    with_rule,
)
from torch.library import opcheck

from mbnorm.backends import cpu
from mbnorm.blend import VARIANCE_RULES, number_of
from mbnorm.distributed import local_statistics, sums_of
from mbnorm.memories.memory import InferenceUpdate
from mbnorm.memories.recent_batches import RecentBatches

fused, step_by_step = partial(remembering.fused, cpu), partial(remembering.step_by_step, cpu)
UPDATE = InferenceUpdate(0.1)

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


def commit(held, sums, update):
    operator = getattr(cpu, f"commit_to_{held.memory.kernels}")
    n, m = int(sums[-2]), int(sums[-1])
    operator(sums, *held.arguments(update, n, m), number_of(held.memory.variance_rule))


@in_both_precisions
@pytest.mark.parametrize("variance_rule", VARIANCE_RULES)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", KINDS)
def test_one_operator_commits_the_batch_of_all_ranks(name, update, variance_rule, dtype):
    ours = held(with_rule(KINDS[name], variance_rule), dtype)
    wanted = ours.copy()
    for step in range(12):
        x = make_input((2 + step % 3, *SHAPE[1:]), dtype, seed=step)
        if step % 4 == 1:
            x[-1, step % SHAPE[1], -1] = BAD[step % 3]
        ranks = [
            sums_of(local_statistics(part), part.numel() // SHAPE[1], len(part))
            for part in (x[:1], x[1:], x[:0])
        ]
        commit(ours, sum(ranks), update)
        step_by_step(x, (None, None), wanted, update)
        assert_close(ours.tensors, wanted.tensors)
    assert (int(ours.averages.batches), int(ours.averages.skipped)) == (9, 3)


def versions(held):
    return [t._version for t in held.tensors]


def writes(held):
    """How many writes each tensor has to know of after one: none if it is a history weight."""
    return [int(name != "history_weight") for name in held.memory.buffers] + [1, 1, 1, 1]


@of_every_kind
def test_a_forward_raises_the_versions_of_what_it_writes(memory):
    ours = held(memory, torch.float32)
    before = versions(ours)
    fused(make_input(SHAPE, torch.float32), (None, None), ours, UPDATE, store=False)
    assert versions(ours) == before
    fused(make_input(SHAPE, torch.float32), (None, None), ours, UPDATE)
    assert [after - then for after, then in zip(versions(ours), before, strict=True)] == writes(ours)


@of_every_kind
def test_a_commit_raises_the_versions_of_what_it_writes(memory):
    ours = held(memory, torch.float32)
    before = versions(ours)
    commit(ours, sums_of(local_statistics(make_input(SHAPE, torch.float32)), 18, 6), UPDATE)
    assert [after - then for after, then in zip(versions(ours), before, strict=True)] == writes(ours)


@of_every_kind
def test_a_graph_notices_that_a_state_it_saved_was_overwritten(memory):
    ours = held(memory, torch.float32)
    leaf = torch.ones(SHAPE[1], requires_grad=True)
    for saved in (ours.state[0], ours.averages.mean):
        product = (leaf * saved).sum()
        fused(make_input(SHAPE, torch.float32), (None, None), ours, UPDATE)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@of_every_kind
def test_states_made_in_inference_mode_are_written_there(memory):
    with torch.inference_mode():
        ours = held(memory, torch.float32)
        fused(make_input(SHAPE, torch.float32), (None, None), ours, UPDATE)
    assert int(ours.averages.batches) == 1


def test_states_that_do_not_fit_are_refused():
    ours, x = held(RecentBatches(5), torch.float32), make_input(SHAPE, torch.float32)
    mean, *rest = ours.state
    averages = ours.averages
    for changed, message in (
        (ours._replace(state=(mean.double(), *rest)), "of 55 values, in float64 for a float64 input"),
        (ours._replace(state=ours.state[:3]), "a ring of 4 tensors and 2 numbers, got 3 and 2"),
        (ours._replace(averages=averages._replace(mean=averages.mean[1:])), "state of 11 values"),
        (ours._replace(averages=averages._replace(skipped=averages.mean)), "int64 counters"),
        (ours._replace(averages=averages[:3]), "averages of 4 tensors, got 3"),
        (ours._replace(averages=()), "expected averages, got none"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused(x, (None, None), changed, UPDATE)
    with pytest.raises(RuntimeError, match="update of 6 numbers, got 5"):
        fused(x, (None, None), ours, UPDATE[:5])


def test_an_average_of_other_tensors_is_refused():
    ours, x = held(KINDS["measured"], torch.float32), make_input(SHAPE, torch.float32)
    message = "an average of 4 tensors and no numbers, or of 5 and 3, got 4 and 3"
    with pytest.raises(RuntimeError, match=message):
        fused(x, (None, None), ours._replace(state=ours.state[:4]), UPDATE)


def test_an_input_without_values_is_refused():
    ours = held(KINDS["average"], torch.float32, channels=11)
    for shape in ((4, 0, 3), (0, 11, 3)):
        with pytest.raises(RuntimeError, match="expected an input with values"):
            cpu.forward_with_average(
                torch.empty(shape), None, None, *ours.arguments(UPDATE, 1, 1), False, EPS, True
            )


@in_both_precisions
@pytest.mark.parametrize("name", ["ring", "average", "measured"])
def test_the_operators_are_well_formed(name, dtype):
    x, parameters = make_input(SHAPE, dtype), make_parameters(SHAPE[1], dtype)
    ours, operators = held(KINDS[name], dtype), torch.ops.mbnorm_cpu
    arguments = ours.arguments(InferenceUpdate(0.1, 2.0), 18, 2)
    kind = ours.memory.kernels
    forward = getattr(operators, f"forward_with_{kind}").default
    opcheck(forward, (x, *parameters, *arguments, True, EPS, True))
    sums = sums_of(local_statistics(x), 18, 6)
    opcheck(getattr(operators, f"commit_to_{kind}").default, (sums, *arguments, True))
