"""Every layer beside the reference, in float64, while batch and map size change at each step."""

import pytest
import reference
import torch
from helpers import BACKENDS, make_input, make_parameters

import mbnorm

SIZES = [(3, 4), (2, 6), (5, 3), (1, 5), (4, 2)]
OPTIONS = {
    "Momentum": [
        {"history_weight": 0.0},
        {"history_weight": 0.75},
        {"history_weight": 0.75, "variance_rule": "pooled"},
        {"history_weight": 0.6, "momentum": 0.3},
    ],
    "Matched": [
        {},
        {"matched_batch_size": 64, "measured": False, "early_weight": 0.0},
        {"matched_batch_size": 8, "measured": False, "early_weight": 0.0, "momentum": 0.2},
        {"matched_batch_size": 64, "measured": False, "early_weight": 1.0},
        {"matched_batch_size": 64, "measured": False, "early_weight": 4.5, "momentum": 0.9},
        {"matched_batch_size": 64, "early_weight": 0.0},
        {"matched_batch_size": 8, "early_weight": 8.0, "momentum": 0.3},
        {"subtract_mean": False},
        {"matched_batch_size": 8, "subtract_mean": False, "early_weight": 0.0, "momentum": 0.3},
    ],
    "Memorized": [
        {"memory_size": 1},
        {"memory_size": 2},
        {"memory_size": 5},
        {"memory_size": 5, "variance_rule": "averaged"},
        {"memory_size": 5, "decay": 0.7},
        {"memory_size": 5, "decay": 0.7, "variance_rule": "averaged"},
        {"memory_size": 5, "inference": "ema"},
        {"memory_size": 5, "memory_values": 60},
        {"memory_size": 4, "memory_values": 1000, "decay": 0.9},
    ],
}
ANY_MOMENTUM = [None, 1.0, 0]


def name(options):
    return ",".join(f"{k}={v}" for k, v in options.items())


def pairs():
    options = [(kind, each) for kind, all_of_it in OPTIONS.items() for each in all_of_it]
    for momentum in ANY_MOMENTUM:
        options += [
            ("Momentum", {"history_weight": 0.75, "momentum": momentum}),
            ("Matched", {"matched_batch_size": 64, "momentum": momentum}),
            ("Matched", {"subtract_mean": False, "momentum": momentum}),
            ("Memorized", {"memory_size": 4, "momentum": momentum}),
            ("Memorized", {"memory_size": 4, "inference": "ema", "momentum": momentum}),
        ]
    return [pytest.param(kind, each, id=f"{kind}-{name(each)}") for kind, each in options]


def build(kind, rank, options, backend):
    """A layer with the exact gradient, which the reference has; test_gradient.py has the other."""
    options = {"gradient": "exact"} | options
    layer = getattr(mbnorm, f"{kind}BatchNorm{max(rank - 2, 1)}d")(
        3, dtype=torch.float64, backend=backend, **options
    )
    weight, bias = make_parameters(3, torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def step_input(rank, step):
    m, side = SIZES[step % len(SIZES)]
    return make_input((m, 3, *[side + d for d in range(rank - 2)]), torch.float64, seed=100 + step)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


# a layer without a weight says so
@pytest.mark.filterwarnings("ignore:Momentum layers train with history_weight=0")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize(("kind", "options"), pairs())
def test_outputs_gradients_and_state_follow_the_reference(kind, options, rank, backend):
    layer = build(kind, rank, options, backend)
    twin = getattr(reference, f"{kind}Norm")(3, **options)
    weight, bias = make_parameters(3, torch.float64)
    steps = 3 * options.get("memory_size", 5) + 2
    for step in range(steps):
        x = step_input(rank, step)
        without_past = options.get("memory_size") == 1 or options.get("history_weight") == 0
        if x.numel() == 3 and (without_past or layer.num_batches_tracked == 0):
            # one value per channel and nothing to read: torch's error, tested elsewhere
            continue
        leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = layer(leaf), twin(twin_leaf, weight, bias)
        close(y, want)
        cotangent = make_input(tuple(x.shape), torch.float64, seed=200 + step)
        close(torch.autograd.grad(y, leaf, cotangent), torch.autograd.grad(want, twin_leaf, cotangent))
        close(layer.running_mean, twin.running_mean)
        close(layer.running_var, twin.running_var)
        assert int(layer.num_batches_tracked) == twin.batches
    layer.eval()
    x = step_input(rank, 0)
    close(layer(x), twin.evaluate(x, weight, bias))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Momentum", {"history_weight": 0.01}),
        ("Matched", {"matched_batch_size": 2, "measured": False}),
        ("Memorized", {"memory_size": 2}),
        ("Memorized", {"memory_size": 64, "memory_values": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_one_value_per_channel_reads_the_least_past_there_is(kind, options):
    layer, twin = build(kind, 2, options, "auto"), getattr(reference, f"{kind}Norm")(3, **options)
    weight, bias = make_parameters(3, torch.float64)
    first, x, cotangent = (make_input((m, 3), torch.float64, seed=s) for s, m in enumerate((4, 1, 1)))
    layer(first)
    twin(first, weight, bias)
    leaf, twin_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = layer(leaf), twin(twin_leaf, weight, bias)
    close(y, want)
    close(torch.autograd.grad(y, leaf, cotangent), torch.autograd.grad(want, twin_leaf, cotangent))


@pytest.mark.parametrize("options", [o for o in OPTIONS["Memorized"] if o["memory_size"] > 1], ids=name)
def test_a_seeded_memory_follows_the_reference_until_real_batches_replace_it(options):
    layer = build("Memorized", 4, options, "auto")
    twin = reference.MemorizedNorm(3, **options)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    layer.seed()
    twin.seed(mean, var)
    weight, bias = make_parameters(3, torch.float64)
    for step in range(3 * options["memory_size"]):
        x = step_input(4, step)
        close(layer(x), twin(x, weight, bias))
        close(layer.running_var, twin.running_var)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_small_batches_have_the_statistics_of_one_large_batch(k, rank):
    layer = build("Memorized", rank, {"memory_size": 5}, "auto")
    batches = [step_input(rank, 0) + step for step in range(k)]
    for batch in batches:
        layer(batch)
    mean, var, _ = reference.batch_statistics(torch.cat(batches))
    close(layer.running_mean, mean)
    close(layer.running_var, var)


@pytest.mark.parametrize("counts", [(3, 1, 4), (2, 2, 7, 1, 5)])
def test_batches_of_unequal_size_weigh_by_their_values(counts):
    layer = build("Memorized", 4, {"memory_size": 5}, "auto")
    batches = [make_input((m, 3, m + 1, 2), torch.float64, seed=m) for m in counts]
    for batch in batches:
        layer(batch)
    everything = torch.cat([b.transpose(0, 1).flatten(1) for b in batches], dim=1).T
    mean, var, _ = reference.batch_statistics(everything)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_full_memory_forgets_what_is_older_than_k():
    layer = build("Memorized", 2, {"memory_size": 3}, "auto")
    layer(1e6 * step_input(2, 0))
    recent = [step_input(2, 0) + step for step in range(3)]
    for batch in recent:
        layer(batch)
    mean, _, _ = reference.batch_statistics(torch.cat(recent))
    close(layer.running_mean, mean)
