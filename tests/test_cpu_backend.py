import math

import pytest
import reference
import torch
from helpers import (
    CONTIGUOUS,
    DTYPES,
    budget,
    gradients,
    layout_id,
    make_input,
    make_parameters,
    native_errors,
    near_statistics,
    relative_error,
)
from torch.library import opcheck

from mbnorm.backends import cpu
from mbnorm.blend import VARIANCE_RULES
from mbnorm.functional import blended_batch_norm

EPS = 1e-3
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
SHAPES = [
    ((6, 5), CONTIGUOUS),
    ((9, 17), CONTIGUOUS),
    ((70, 40), CONTIGUOUS),
    ((12, 1), CONTIGUOUS),
    ((4, 3, 5), CONTIGUOUS),
    ((3, 17, 130), CONTIGUOUS),
    ((5, 9, 1), CONTIGUOUS),
    ((2, 17, 7, 7), CONTIGUOUS),
    ((2, 17, 7, 7), LAST),
    ((3, 3, 4, 6), CONTIGUOUS),
    ((3, 3, 4, 6), LAST),
    ((2, 1, 9, 9), LAST),
    ((4, 40, 1, 1), LAST),
    ((2, 33, 27, 31), CONTIGUOUS),
    ((2, 33, 27, 31), LAST),
    ((2, 24, 37, 41), LAST),
    # walked row by row
    ((2, 75, 43, 43), LAST),
    ((2, 512, 17, 17), LAST),
    ((2, 5, 3, 4, 3), CONTIGUOUS),
    ((2, 11, 3, 4, 3), LAST_3D),
]
on_every_shape = pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=layout_id)
with_all_rules = pytest.mark.parametrize("variance_rule", VARIANCE_RULES)

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


def operate(backend, x, weight, bias, past, a, variance_rule):
    rules = {"variance_rule": variance_rule, "eps": EPS, "backend": backend}
    return blended_batch_norm(x, weight, bias, *past, a, **rules)


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def unaligned(x):
    """The same values in the same strides, one value further from an aligned address."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage.as_strided(x.shape, x.stride(), 1).copy_(x)


@with_all_rules
@pytest.mark.parametrize("a", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_everything_matches_the_reference(shape, layout, dtype, a, variance_rule):
    everything_matches_the_reference(shape, layout, dtype, a, variance_rule)


PAST_THE_CACHES = [
    ((2, 16, 400, 400), LAST, torch.float32),
    ((2, 9, 487, 489), CONTIGUOUS, torch.float32),
    ((1, 24, 50, 70, 110), LAST_3D, torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), PAST_THE_CACHES, ids=layout_id)
def test_outputs_written_past_the_caches_match_the_reference(shape, layout, dtype):
    assert math.prod(shape) * dtype.itemsize >= 16 << 20
    everything_matches_the_reference(shape, layout, dtype, 0.3, "pooled")


def everything_matches_the_reference(shape, layout, dtype, a, variance_rule):
    x = make_input(shape, dtype, layout)
    parameters = make_parameters(shape[1], state_dtype(dtype))
    # the reference blends with what the kernels are given, not with what that was before it was rounded
    past = [p.to(state_dtype(dtype)).double() for p in near_statistics(x)]
    a = float(torch.tensor(a, dtype=state_dtype(dtype)))
    cotangent = make_input(shape, dtype, layout, seed=5)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    exact = [t.double().requires_grad_() for t in (x, *parameters)]

    want, *wanted_statistics = reference.blended_batch_norm(*exact, *past, a, variance_rule, EPS)
    wanted = [w.detach() for w in (want, *gradients(want, tuple(exact), cotangent.double()))]
    y, *statistics = operate("cpu", *leaves, past, a, variance_rule)
    got = (y, *gradients(y, tuple(leaves), cotangent))
    peer = operate("aten", *leaves, past, a, variance_rule)[0]
    peers = (peer, *gradients(peer, tuple(leaves), cotangent))

    # dw of blended statistics is worse off than native's by the rounding of the saved mean
    native = native_errors(x, *parameters, cotangent, EPS)
    composed = (relative_error(p.detach(), w) for p, w in zip(peers, wanted, strict=True))
    allowed = [budget(dtype, max(pair)) for pair in zip(native, composed, strict=True)]
    if dtype == torch.float64:
        allowed = [most + 2 * error for most, error in zip(allowed, native, strict=True)]
    errors = [relative_error(g.detach(), w) for g, w in zip(got, wanted, strict=True)]
    assert all(e <= most for e, most in zip(errors, allowed, strict=True)), (errors, allowed)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    pairs = zip(statistics, wanted_statistics, strict=True)
    assert max(relative_error(g, w.detach()) for g, w in pairs) < tolerance
    assert y.stride() == got[1].stride() == x.stride()
    assert (y.dtype, got[1].dtype) == (dtype, dtype)
    assert {t.dtype for t in statistics} == {state_dtype(dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_unaligned_tensors_give_the_same_bits(shape, layout, dtype):
    x, dy = make_input(shape, dtype, layout), make_input(shape, dtype, layout, seed=5)
    assert_same_bits(run(x, dy), run(unaligned(x), unaligned(dy)))


def run(x, dy, variance_rule="averaged"):
    dtype = state_dtype(x.dtype)
    weight, bias = make_parameters(x.shape[1], dtype)
    past = [t.to(dtype) for t in near_statistics(x)]
    a = torch.tensor(0.3, dtype=dtype)
    y, record = cpu.forward(x, weight, bias, *past, a, variance_rule, EPS)
    gradient = cpu.backward(dy, x, weight, record, variance_rule, EPS, True)
    return (y, *record, *gradient)


def assert_same_bits(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


@on_every_shape
def test_cotangents_of_any_strides_give_the_same_bits(shape, layout):
    x, dy = make_input(shape, torch.float32, layout), make_input(shape, torch.float32, seed=4)
    wide = torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(dy)
    wanted = run(x, dy.contiguous(memory_format=layout))
    assert_same_bits(run(x, wide), wanted)
    assert_same_bits(run(x, dy), wanted)
    one = torch.tensor(0.7)
    assert_same_bits(run(x, one.expand(shape)), run(x, torch.full_like(x, 0.7)))


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
def test_inputs_of_other_strides(dtype):
    base = make_input((4, 20, 6, 5), dtype)
    for x in (base.mT, base.mT[:, ::2], make_input((4, 6, 20, 6), dtype).transpose(1, 2)[..., 1:]):
        dy = make_input(tuple(x.shape), dtype, seed=3)
        got = run(x, dy)
        assert_same_bits(got, run(x.contiguous(), dy))
        assert got[0].stride() == got[8].stride() == torch.empty_like(x).stride()


@with_all_rules
@pytest.mark.parametrize("affine", [True, False])
def test_no_gradient_of_the_input(affine, variance_rule):
    x, dy = make_input((3, 12, 5, 4), torch.float32), make_input((3, 12, 5, 4), torch.float32, seed=2)
    weight = make_parameters(12, torch.float32)[0] if affine else None
    a, zeros, ones = torch.tensor(0.4), torch.zeros(12), torch.ones(12)
    _, record = cpu.forward(x, weight, None, zeros, ones, a, variance_rule, EPS)
    arguments = dy, x, weight, record, variance_rule, EPS
    dx, *without = cpu.backward(*arguments, False)
    assert dx is None
    assert_same_bits(without, cpu.backward(*arguments, True)[1:])


ADVERSARIES = {
    "far off centre": lambda noise: 1e4 + noise,
    "huge": lambda noise: 1e18 * noise,
    "an outlier first": lambda noise: noise.index_fill(-1, torch.tensor(0), 1e5),
    "two halves": lambda noise: noise + 1e3 * (torch.arange(noise.shape[-1]) % 64 < 32),
    "a ramp": lambda noise: noise + torch.arange(float(noise.shape[-1])),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
def test_statistics_are_as_accurate_as_native(name, layout):
    noise = make_input((2, 24, 3, 900), torch.float64)
    x = ADVERSARIES[name](noise).float().contiguous(memory_format=layout)
    exact_mean, exact_var, _ = reference.batch_statistics(x.double())
    zeros, ones, a = torch.zeros(24), torch.ones(24), torch.tensor(1.0)
    _, (mean, var, *_) = cpu.forward(x, None, None, zeros, ones, a, "pooled", EPS)
    native_mean, native_var = torch.batch_norm_update_stats(x, None, None, 0.0)
    one_rounding = torch.finfo(torch.float32).eps
    for got, native, exact in ((mean, native_mean, exact_mean), (var, native_var, exact_var)):
        error = (got.double() - exact).abs() / exact.abs()
        allowed = 2 * ((native.double() - exact).abs() / exact.abs()).max() + one_rounding
        assert error.max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_equal_values_have_no_variance(shape, layout, dtype):
    for value in (0.1, -3e4, 1e-3):
        x = torch.full(shape, value, dtype=dtype).contiguous(memory_format=layout)
        batch_mean, batch_var = run(x, x)[1:3]
        assert torch.equal(batch_var, torch.zeros_like(batch_var))
        assert torch.equal(batch_mean, x.flatten()[0].to(batch_mean.dtype).expand_as(batch_mean))


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
def test_half_values_near_the_end_of_their_range(layout):
    signs = torch.tensor([1.0, -1.0]).repeat(32).view(1, 1, 8, 8).expand(2, 16, 8, 8)
    x = (6.5e4 * signs).half().contiguous(memory_format=layout)
    zeros, ones, a = torch.zeros(16), torch.ones(16), torch.tensor(1.0)
    y, (mean, var, *_) = cpu.forward(x, None, None, zeros, ones, a, "pooled", 1e-5)
    assert torch.equal(y.float(), signs)
    assert torch.equal(mean, zeros)
    torch.testing.assert_close(var, ones * x.float()[0, 0, 0, 0] ** 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_what_is_not_finite_stays_in_its_channel(shape, layout, dtype, bad):
    clean, dy = make_input(shape, dtype, layout), make_input(shape, dtype, layout, seed=6)
    wanted = run(clean, dy)
    channel = shape[1] // 2
    x = clean.clone()
    x.select(1, channel).flatten()[-1:] = bad
    x.select(1, channel)[(-1,) * (len(shape) - 1)] = bad
    weight, bias = make_parameters(shape[1], state_dtype(dtype))
    past = [t.to(state_dtype(dtype)) for t in near_statistics(clean)]
    a = torch.tensor(0.3, dtype=state_dtype(dtype))
    y, record = cpu.forward(x, weight, bias, *past, a, "averaged", EPS)
    gradient = cpu.backward(dy, x, weight, record, "averaged", EPS, True)
    others = torch.arange(shape[1]) != channel
    for got, want in zip((y, *record, *gradient), wanted, strict=True):
        along = 1 if got.dim() > 1 else 0
        assert torch.equal(got.movedim(along, 0)[others], want.movedim(along, 0)[others])
    assert not torch.isfinite(record[1][channel])
    assert torch.isnan(y.select(1, channel)).all()


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
@pytest.mark.parametrize("channels", [3, 9, 24])
def test_a_nan_of_any_bits_stays_a_nan_in_bfloat16(channels, layout):
    ones = torch.full((channels,), -1, dtype=torch.int32).view(torch.float32)
    x = make_input((2, channels, 5, 7), torch.bfloat16, layout)
    past = [t.float() for t in near_statistics(x)]
    y, _ = cpu.forward(x, None, ones, *past, torch.tensor(0.5), "pooled", EPS)
    assert y.isnan().all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
@pytest.mark.parametrize("shape", [(2, 67, 60, 50), (3, 300, 14, 14)])
def test_any_number_of_threads_gives_the_same_bits(shape, layout, dtype, threads):
    x, dy = make_input(shape, dtype, layout), make_input(shape, dtype, layout, seed=7)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(x, dy))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((6, 5), CONTIGUOUS), ((3, 9, 4, 5), CONTIGUOUS), ((3, 9, 4, 5), LAST)],
    ids=layout_id,
)
def test_the_operators_are_well_formed(shape, layout, dtype):
    x = make_input(shape, dtype, layout)
    weight, bias = make_parameters(shape[1], state_dtype(dtype))
    past = [t.to(state_dtype(dtype)) for t in near_statistics(x)]
    a = torch.tensor(0.3, dtype=state_dtype(dtype))
    operators = torch.ops.mbnorm_cpu
    opcheck(operators.forward.default, (x, weight, bias, *past, a, True, EPS))
    opcheck(operators.forward.default, (x, None, None, *past, a, False, EPS))
    record = torch.stack((*past, *past, *past, a.expand(shape[1])))
    for need_dx, past_gradient in ((True, None), (False, None), (True, torch.stack((*past, past[1])))):
        opcheck(operators.backward.default, (x, x, weight, record, past_gradient, True, EPS, need_dx))


def test_sizes_that_do_not_fit_are_refused():
    x = make_input((3, 9), torch.float32)
    past, a = [t.float() for t in near_statistics(x)], torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="parameters of 9 values"):
        cpu.forward(x, torch.ones(8), None, *past, a, "pooled", EPS)
    with pytest.raises(RuntimeError, match="shape of x"):
        cpu.backward(x[:2], x, None, torch.ones(7, 9), "pooled", EPS, True)
    with pytest.raises(RuntimeError, match="parameters of 63 values"):
        cpu.backward(x, x, None, torch.ones(4, 9), "pooled", EPS, True)
    with pytest.raises(RuntimeError, match="parameters of 27 values"):
        cpu.backward(x, x, None, torch.ones(7, 9), "pooled", EPS, True, torch.ones(9))


def test_statistics_of_another_precision_are_refused():
    x = make_input((3, 9), torch.float32)
    with pytest.raises(RuntimeError, match="float64 for a float64 input"):
        cpu.forward(x, None, None, *near_statistics(x), torch.tensor(1.0), "pooled", EPS)
    with pytest.raises(RuntimeError, match="expected a float32"):
        cpu.forward(x.int(), None, None, *near_statistics(x), torch.tensor(1.0), "pooled", EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
def test_the_record_ends_with_what_the_batch_was_blended_with(dtype):
    x = make_input((3, 9, 4, 5), dtype)
    past = [t.to(state_dtype(dtype)) for t in near_statistics(x)]
    a = torch.tensor(0.3, dtype=state_dtype(dtype))
    _, record = cpu.forward(x, None, None, *past, a, "pooled", EPS)
    assert_same_bits(record[4:], (*past, a.expand(9)))
