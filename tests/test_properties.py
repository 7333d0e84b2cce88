"""Invariances of the operator and the layers over drawn shapes, layouts, options and batches."""

import copy
from typing import Any, NamedTuple

import pytest
import reference
import torch
from helpers import BACKENDS, CONTIGUOUS, gradients, make_input, make_parameters, near_statistics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import mbnorm
from mbnorm import DoubleForward, convert, no_update, revert
from mbnorm.functional import blended_batch_norm
from mbnorm.memories.moving_average import MovingAverage

TOO_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
BRIEF = settings(
    max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=TOO_SLOW
)
THOROUGH = settings(max_examples=800, deadline=None, print_blob=True, suppress_health_check=TOO_SLOW)
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
seeds = st.integers(0, 2**31)
backends = st.sampled_from(BACKENDS)


def for_all(*strategies, **named):
    """Make two tests of a property: a brief one, the same each time, and a thorough one."""

    def make(check):
        runs = [
            pytest.param(BRIEF(given(*strategies, **named)(check)), id="briefly"),
            pytest.param(
                THOROUGH(given(*strategies, **named)(check)), id="thoroughly", marks=pytest.mark.thorough
            ),
        ]

        @pytest.mark.parametrize("run", runs)
        def test(run):
            run()

        return test

    return make


@st.composite
def shapes(draw, rank=None):
    """Shapes with at least two values per channel."""
    rank = draw(st.integers(2, 5)) if rank is None else rank
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4)), *draw(sides(rank))
    return shape if shape[0] > 1 or shape[2:].count(1) < rank - 2 else (2, *shape[1:])


def sides(rank):
    return st.tuples(*[st.integers(1, 3)] * (rank - 2))


@st.composite
def inputs(draw, shape=None):
    shape = draw(shapes()) if shape is None else shape
    layout = draw(st.sampled_from([CONTIGUOUS, LAYOUTS.get(len(shape), CONTIGUOUS)]))
    x = make_input(shape, torch.float64, layout, draw(seeds))
    if draw(st.integers(0, 7)) == 0:
        # a channel without variance
        x[:, 0] = x[:1, :1].flatten()[0]
    return x


class Operation(NamedTuple):
    """Arguments of the operator, and a cotangent of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    past_mean: Tensor
    past_var: Tensor
    batch_weight: float
    variance_rule: Any
    eps: float
    backend: Any
    cotangent: Tensor

    def run(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the results, and the gradients of x, weight and bias."""
        leaves = [t.detach().clone().requires_grad_() for t in self[:3]]
        options = {"variance_rule": self.variance_rule, "eps": self.eps, "backend": self.backend}
        y, *statistics = blended_batch_norm(*leaves, *self[3:6], **options)
        return (y.detach(), *statistics), gradients(y, tuple(leaves), self.cotangent)

    def reordered(self, *, samples=None, channels=None) -> "Operation":
        if samples is not None:
            return self._replace(x=self.x[samples], cotangent=self.cotangent[samples])
        per_channel = {name: getattr(self, name)[channels] for name in self._fields[1:5]}
        return self._replace(x=self.x[:, channels], cotangent=self.cotangent[:, channels], **per_channel)


@st.composite
def operations(draw, batch_weights=None):
    batch_weights = st.floats(0.02, 1) if batch_weights is None else batch_weights
    x = draw(inputs())
    return Operation(
        x,
        *make_parameters(x.shape[1], torch.float64, draw(seeds)),
        *near_statistics(x, draw(seeds)),
        draw(batch_weights),
        draw(st.sampled_from(["averaged", "pooled"])),
        draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        draw(backends),
        make_input(tuple(x.shape), torch.float64, seed=draw(seeds)),
    )


class Training(NamedTuple):
    """A layer's type and options, and the batches that it is to see."""

    kind: type[nn.Module]
    options: dict[str, Any]
    batches: list[Tensor]

    def layer(self, **others: Any) -> nn.Module:
        layer = self.kind(self.batches[0].shape[1], dtype=torch.float64, **(self.options | others))
        with torch.no_grad():
            for parameter, value in zip(
                layer.parameters(), make_parameters(layer.num_features, torch.float64), strict=True
            ):
                parameter.copy_(value)
        if layer.memory_type is MovingAverage:
            # a constant weight is asked for: the warning of a missing schedule is of no use here
            layer.memory.scheduled = True
        return layer

    def run(self, layer: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [layer(batch) for batch in self.batches]


OPTIONS = {
    "Momentum": st.fixed_dictionaries(
        {
            "history_weight": st.floats(0, 0.99),
            "variance_rule": st.sampled_from(["averaged", "pooled"]),
        }
    ),
    "Matched": st.fixed_dictionaries(
        {
            "matched_batch_size": st.integers(1, 200),
            "measured": st.booleans(),
            "early_weight": st.sampled_from([0.0, 1.0, 8.0]),
            "subtract_mean": st.booleans(),
        }
    ),
    "Memorized": st.fixed_dictionaries(
        {
            "memory_size": st.integers(1, 6),
            "memory_values": st.one_of(st.none(), st.integers(1, 60)),
            "decay": st.sampled_from([1.0, 0.9, 0.4]),
            "variance_rule": st.sampled_from(["averaged", "pooled"]),
            "inference": st.sampled_from(["memory", "ema"]),
        }
    ),
}


@st.composite
def trainings(draw, methods=tuple(OPTIONS), fewest=1, most=9, **fixed):
    method, rank = draw(st.sampled_from(methods)), draw(st.integers(2, 5))
    channels = draw(st.integers(1, 3))
    drawn = draw(OPTIONS[method])
    others = {"backend": draw(backends), "momentum": draw(st.sampled_from([0.1, 0.7, 1.0, None]))}
    batches = [
        draw(inputs((draw(st.integers(2, 4)), channels, *draw(sides(rank)))))
        for _ in range(draw(st.integers(fewest, most)))
    ]
    kind = getattr(mbnorm, f"{method}BatchNorm{max(rank - 2, 1)}d")
    return Training(kind, drawn | others | fixed, batches)


def stock_like(x, **options):
    """torch's own layer for an input."""
    kind = getattr(nn, f"BatchNorm{max(x.dim() - 2, 1)}d")
    return kind(x.shape[1], dtype=torch.float64, **options)


def close(got, wanted):
    """Equal to rounding, in units of the largest value."""
    if not isinstance(got, Tensor):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            close(one, other)
        return
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * scale)


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same_state(layer, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@for_all(operations())
def test_every_backend_gives_the_reference(operation):
    results, slopes = operation.run()
    leaves = [t.detach().clone().requires_grad_() for t in operation[:3]]
    y, *statistics = reference.blended_batch_norm(*leaves, *operation[3:8])
    close(results, (y.detach(), *(s.detach() for s in statistics)))
    close(slopes, gradients(y, tuple(leaves), operation.cotangent))


@for_all(operations(), seeds)
def test_permuting_the_samples_permutes_output_and_gradient(operation, seed):
    order = shuffled(len(operation.x), seed)
    (y, *statistics), (dx, *rest) = operation.run()
    close(operation.reordered(samples=order).run(), ((y[order], *statistics), (dx[order], *rest)))


@for_all(operations(), seeds)
def test_permuting_the_channels_permutes_everything(operation, seed):
    order = shuffled(operation.x.shape[1], seed)
    (y, *statistics), (dx, *rest) = operation.run()
    wanted = (y[:, order], *(s[order] for s in statistics)), (dx[:, order], *(r[order] for r in rest))
    close(operation.reordered(channels=order).run(), wanted)


@for_all(operations(), st.floats(0.05, 20), st.floats(-5, 5))
def test_the_unit_and_the_origin_of_the_input_do_not_matter(operation, scale, shift):
    moved = operation._replace(
        x=scale * operation.x + shift,
        past_mean=scale * operation.past_mean + shift,
        past_var=scale**2 * operation.past_var,
        eps=scale**2 * operation.eps,
    )
    (y, batch_mean, batch_var, mean, var), (dx, *rest) = operation.run()
    (got, *statistics), (slope, *others) = moved.run()
    close((got, slope * scale, *others), (y, dx, *rest))
    wanted = scale * batch_mean + shift, scale**2 * batch_var, scale * mean + shift, scale**2 * var
    close(statistics, wanted)


@pytest.mark.contract("A6")
@for_all(operations(batch_weights=st.just(1.0)))
def test_a_batch_with_all_the_weight_is_batch_normalization(operation):
    results, slopes = operation.run()
    leaves = [t.detach().clone().requires_grad_() for t in operation[:3]]
    y = F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, operation.eps)
    close(results[0], y.detach())
    close(slopes, gradients(y, tuple(leaves), operation.cotangent))


@for_all(inputs(), st.integers(1, 4), backends)
def test_pooling_a_batch_with_the_statistics_of_another_gives_those_of_both(x, samples, backend):
    other = make_input((samples, *x.shape[1:]), torch.float64, seed=samples)
    past = reference.batch_statistics(other)[:2]
    share = len(x) / (len(x) + samples)
    result = blended_batch_norm(
        x, None, None, *past, share, variance_rule="pooled", eps=1e-5, backend=backend
    )
    close(result[3:], reference.batch_statistics(torch.cat((x, other)))[:2])


@for_all(trainings(), seeds)
def test_training_takes_the_samples_of_a_batch_in_any_order(training, seed):
    orders = [shuffled(len(batch), seed + i) for i, batch in enumerate(training.batches)]
    reordered = training._replace(batches=[b[o] for b, o in zip(training.batches, orders, strict=True)])
    first, second = training.layer(), training.layer()
    outputs = [y[o] for y, o in zip(training.run(first), orders, strict=True)]
    close(reordered.run(second), outputs)
    close(list(second.buffers()), list(first.buffers()))


@for_all(trainings(), seeds)
def test_training_treats_every_channel_by_itself(training, seed):
    order = shuffled(training.batches[0].shape[1], seed)
    first, second = training.layer(), training.layer()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.copy_(parameter[order])
    outputs = [y[:, order] for y in training.run(first)]
    close(training._replace(batches=[b[:, order] for b in training.batches]).run(second), outputs)
    for name in ("running_mean", "running_var", "memory_mean", "memory_var"):
        close(getattr(second, name), getattr(first, name)[..., order])


@for_all(trainings(), st.floats(0.05, 20), st.floats(-5, 5))
def test_training_does_not_depend_on_unit_and_origin(training, scale, shift):
    moved = training._replace(batches=[scale * b + shift for b in training.batches])
    close(moved.run(training.layer(eps=scale**2 * 1e-3)), training.run(training.layer(eps=1e-3)))


@pytest.mark.contract("A6")
@for_all(trainings(["Memorized"], memory_size=1))
def test_a_memory_of_one_batch_is_torchs_layer(training):
    ours = training.layer()
    stock = stock_like(training.batches[0], momentum=ours.momentum)
    stock.load_state_dict({name: ours.state_dict()[name] for name in stock.state_dict()})
    close(training.run(ours), training.run(stock))
    close([ours.get_buffer(name) for name, _ in stock.named_buffers()], list(stock.buffers()))


@for_all(trainings(most=1), st.integers(2, 8))
def test_equal_batches_are_normalized_as_the_first_of_them(training, count):
    first, *others = training._replace(batches=training.batches * count).run(training.layer())
    close(others, [first] * (count - 1))


@for_all(
    trainings(
        ["Memorized"],
        memory_size=12,
        memory_values=None,
        decay=1.0,
        variance_rule="pooled",
        inference="memory",
        momentum=0.1,
    ),
    seeds,
)
def test_a_batch_in_parts_leaves_the_statistics_of_the_whole(training, seed):
    layer = training.layer()
    training.run(layer)
    values = torch.cat([b.transpose(0, 1).flatten(1) for b in training.batches], dim=1).T
    mean, var, _ = reference.batch_statistics(values)
    close((layer.running_mean, layer.running_var), (mean, var))
    shuffled_batches = [training.batches[i] for i in shuffled(len(training.batches), seed)]
    other = training.layer()
    training._replace(batches=shuffled_batches).run(other)
    close((other.running_mean, other.running_var), (mean, var))


@pytest.mark.contract("DF-7")
@for_all(trainings(), st.integers(1, 3))
def test_refreshing_with_unchanged_parameters_changes_nothing(training, forwards):
    # no more are kept than the memory holds
    forwards = min(forwards, training.options.get("memory_size", forwards))
    layer = training.layer()
    training._replace(batches=training.batches[:-forwards]).run(layer)
    double_forward = DoubleForward(layer)
    for batch in training.batches[-forwards:]:
        layer(batch)
    before = state_of(layer)
    double_forward.refresh()
    assert same_state(layer, before)


@pytest.mark.contract("A4", "MF-3")
@for_all(trainings(fewest=2))
def test_only_training_forwards_write(training):
    *before, last = training.batches
    layer = training.layer()
    training._replace(batches=before).run(layer)
    state = state_of(layer)
    with torch.no_grad(), no_update(layer):
        read = layer(last)
    layer.eval()(last)
    assert same_state(layer, state)
    with torch.no_grad():
        assert torch.equal(layer.train()(last), read)


@pytest.mark.contract("NI-2")
@for_all(trainings(fewest=2), st.data(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_batch_that_is_not_finite_might_as_well_not_have_been(training, data, value):
    where = data.draw(st.integers(0, len(training.batches)))
    bad = training.batches[0].clone()
    bad[tuple(data.draw(st.integers(0, size - 1)) for size in bad.shape)] = value
    spoiled = training._replace(batches=[*training.batches[:where], bad, *training.batches[where:]])
    first, second = training.layer(), training.layer()
    outputs = training.run(first)
    got = spoiled.run(second)
    assert all(torch.equal(a, b) for a, b in zip(outputs, got[:where] + got[where + 1 :], strict=True))
    assert int(second.num_batches_skipped) == 1
    assert same_state(second, state_of(first) | {"num_batches_skipped": second.num_batches_skipped})


@for_all(trainings(fewest=2), st.data())
def test_saving_and_loading_at_any_step_changes_nothing(training, data):
    step = data.draw(st.integers(0, len(training.batches)))
    whole, begun, resumed = training.layer(), training.layer(), training.layer()
    outputs = training.run(whole)
    training._replace(batches=training.batches[:step]).run(begun)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    rest = training._replace(batches=training.batches[step:]).run(resumed)
    assert all(torch.equal(a, b) for a, b in zip(rest, outputs[step:], strict=True))
    assert same_state(resumed, state_of(whole))


@pytest.mark.contract("CV-6")
@for_all(inputs(), st.sampled_from(["momentum", "memorized", "matched"]))
def test_converting_and_reverting_leaves_a_stock_layer_as_it_was(x, method):
    stock = stock_like(x)
    with torch.no_grad():
        stock(x)
    state, wanted = state_of(stock), stock.eval()(x)
    convert(stock, method)
    assert torch.equal(stock(x), wanted)
    revert(stock)
    assert stock.state_dict().keys() == state.keys()
    assert same_state(stock, state)
    assert torch.equal(stock(x), wanted)


@pytest.mark.contract("CV-6")
@for_all(trainings())
def test_reverting_keeps_the_output_of_eval_mode(training):
    layer = training.layer()
    training.run(layer)
    wanted = layer.eval()(training.batches[-1])
    revert(layer)
    assert torch.equal(layer(training.batches[-1]), wanted)
