"""States that went through arithmetic: federated means, soups, moving averages, samples, task vectors."""

import copy
import random

import pytest
import torch
from hands import (
    assert_memory,
    copies,
    data_of_a,
    data_of_b,
    memory_of,
    on_every_method,
    ours,
    seed_of,
    stock,
    trained,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
on_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def mean_of(states, sizes, dtype=torch.float32):
    """As federated learning adds up states, whole numbers too: the weights add to 0.99999994 or so."""
    total = float(sum(sizes))
    found = {}
    for name in states[0]:
        found[name] = 0
        for state, size in zip(states, sizes, strict=True):
            value = state[name]
            value = value.to(dtype) if value.is_floating_point() else value
            found[name] = found[name] + value * (size / total)
    return found


def held(model):
    return bool(model[0].memory.holds_anything(model[0].state))


@pytest.mark.contract("SH-9")
@on_every_dtype
@on_every_method
def test_100_rounds_of_federated_means_lose_no_memory(method, dtype):
    generator = random.Random(1)
    server = ours(method)
    for _ in range(100):
        clients = copies(server, 10)
        for client in clients:
            client(data_of_a(2))
        sizes = [generator.randint(50, 1000) for _ in clients]
        states = [client.state_dict() for client in clients]
        mean = mean_of(states, sizes, dtype)
        server.load_state_dict(mean)
        torch.testing.assert_close(server[0].memory_mean, mean["0.memory_mean"].float())
        assert held(server)


@pytest.mark.contract("SH-9")
@on_every_method
def test_a_mean_of_states_is_the_mean_of_their_memories(method):
    # as in a soup of nets that were fine-tuned from one
    start = ours(method, trained(stock(), data_of_a))
    cooks = [trained(cook, data_of_a, steps=7) for cook in copies(start, 5)]
    memories = [memory_of(cook) for cook in cooks]
    expected = {
        name: torch.stack([memory[name].double() for memory in memories]).mean(0).to(value.dtype)
        for name, value in memories[0].items()
    }
    start.load_state_dict(mean_of([cook.state_dict() for cook in cooks], [1] * 5))
    assert_memory(start, expected, rtol=1e-5)


@pytest.mark.contract("SH-9")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@on_every_method
def test_a_mean_of_full_and_empty_memories_restarts_from_the_mean_statistics(method, share):
    full, empty = trained(ours(method), data_of_a), ours(method)
    mean = mean_of([full.state_dict(), empty.state_dict()], [share, 1 - share])
    mean["0.num_batches_tracked"] = torch.tensor(60)
    empty.load_state_dict(mean)
    expected = stock()
    expected[0].running_mean.copy_(mean["0.running_mean"])
    expected[0].running_var.copy_(mean["0.running_var"])
    expected[0].num_batches_tracked.fill_(60)
    assert_memory(empty, seed_of(method, expected))


@pytest.mark.contract("SH-9")
@pytest.mark.parametrize("steps", [(60, 61), (60, 62), (3, 4), (1, 60), (6, 9)])
@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("method", ["memorized", "memorized-ema"])
def test_a_mean_of_rings_at_other_places_restarts_from_the_mean_statistics(method, steps, share):
    one, other = (trained(ours(method), data_of_a, steps=count) for count in steps)
    mean = mean_of([one.state_dict(), other.state_dict()], [share, 1 - share])
    one.load_state_dict(mean)
    assert_memory(one, seed_of(method, one))


@pytest.mark.contract("SH-9")
@pytest.mark.parametrize("method", ["momentum", "matched"])
def test_moving_averages_of_other_lengths_are_averaged(method):
    one, other = (trained(ours(method), data_of_a, steps=count) for count in (5, 60))
    mean = mean_of([one.state_dict(), other.state_dict()], [0.3, 0.7])
    one.load_state_dict(mean)
    torch.testing.assert_close(one[0].memory_mean, mean["0.memory_mean"])
    assert held(one)


@pytest.mark.contract("SH-9")
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
@on_every_method
def test_averaged_models_are_saved_loaded_and_trained_on(method, average, use_buffers):
    model = trained(ours(method), data_of_a, steps=20)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    for _ in range(9):
        model(data_of_a(2))
        averaged.update_parameters(model)
    loaded = AveragedModel(ours(method), use_buffers=use_buffers)
    loaded.load_state_dict(averaged.state_dict())
    x = data_of_a(2)
    assert torch.equal(loaded.eval()(x), averaged.eval()(x))
    if use_buffers and method.startswith("memorized"):
        # of entries at all places of the ring
        expected = seed_of(method, averaged.module)
    else:
        expected = memory_of(averaged.module)
    assert_memory(loaded.module, expected)
    before = float(loaded.module[0].running_mean.mean())
    for _ in range(9):
        loaded(data_of_a(2))
    # a memory that starts from elsewhere would carry them off
    assert abs(float(loaded.module[0].running_mean.mean()) - before) < 1


@pytest.mark.contract("SH-9")
@on_every_method
def test_a_teacher_that_is_loaded_with_its_own_moving_average(method):
    student = trained(ours(method), data_of_a)
    teacher = copy.deepcopy(student)
    for _ in range(5):
        student(data_of_a(2))
        theirs, mine = student.state_dict(), teacher.state_dict()
        new = {
            name: 0.99 * mine[name] + 0.01 * theirs[name] if mine[name].is_floating_point() else theirs[name]
            for name in mine
        }
        teacher.load_state_dict(new)
        assert held(teacher)
        torch.testing.assert_close(teacher[0].running_mean, new["0.running_mean"])
    past = teacher[0].memory.read(teacher[0].state, 32, 32)
    assert (past.mean - 3).abs().max() < 1


@pytest.mark.contract("SH-9")
@on_every_method
def test_a_task_vector_is_added_to_the_memory(method):
    start = trained(ours(method), data_of_a)
    tuned = trained(copy.deepcopy(start), data_of_a, steps=6)
    base, found = copy.deepcopy(start.state_dict()), tuned.state_dict()
    start.load_state_dict({name: base[name] + (found[name] - base[name]) for name in base})
    assert_memory(start, memory_of(tuned), rtol=1e-4)


@pytest.mark.contract("SH-9")
@on_every_dtype
@on_every_method
def test_a_state_in_any_precision_is_that_state(method, dtype):
    # 180,000 values a channel: more than float16 can count
    model = ours(method)
    with torch.no_grad():
        for _ in range(8):
            model(3 + torch.randn(2, 8, 300, 300))
    saved = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    loaded = ours(method)
    loaded.load_state_dict(saved)
    for name in ("memory_mean", "memory_var"):
        torch.testing.assert_close(
            getattr(loaded[0], name), getattr(model[0], name), rtol=torch.finfo(dtype).eps, atol=0
        )
    x = 3 + torch.randn(2, 8, 300, 300)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0.02)
    assert all(torch.isfinite(t).all() for t in loaded.state_dict().values())


@pytest.mark.contract("SH-9")
@on_every_method
def test_small_noise_in_a_state_keeps_the_memory(method):
    model = trained(ours(method), data_of_a)
    noisy = {
        name: t + 1e-4 * torch.randn_like(t) if name.endswith(("mean", "var")) else t
        for name, t in model.state_dict().items()
    }
    model.load_state_dict(noisy)
    torch.testing.assert_close(model[0].memory_mean, noisy["0.memory_mean"])


@pytest.mark.contract("SH-9", "SH-6")
@on_every_method
def test_another_net_of_the_same_kind_is_told_apart(method):
    mine, theirs = trained(ours(method), data_of_a), trained(ours(method), data_of_b)
    saved = {n: t for n, t in theirs.state_dict().items() if not n.endswith(("running_mean", "running_var"))}
    expected = seed_of(method, mine)
    mine.load_state_dict(saved, strict=False)
    assert_memory(mine, expected)
