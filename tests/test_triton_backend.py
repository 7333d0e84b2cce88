"""The Triton kernels' numbers: on a GPU where there is one, else interpreted (`make test-triton`)."""

import os
from importlib.util import find_spec

import pytest
import reference
import torch
from helpers import (
    CONTIGUOUS,
    budget,
    gradients,
    layout_id,
    make_input,
    make_parameters,
    native_errors,
    near_statistics,
    relative_error,
)

from mbnorm.backends import aten
from mbnorm.backends import triton as kernels
from mbnorm.blend import VARIANCE_RULES
from mbnorm.gradient import stacked, write

if find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)


from mbnorm.backends import triton_cut

assert kernels.missing() is None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
SHAPES = [
    ((6, 5), CONTIGUOUS),
    ((40, 20), CONTIGUOUS),
    ((12, 1), CONTIGUOUS),
    ((4, 3, 5), CONTIGUOUS),
    ((40, 5, 3), CONTIGUOUS),
    ((5, 9, 1), CONTIGUOUS),
    ((2, 19, 7, 7), CONTIGUOUS),
    ((2, 19, 7, 7), LAST),
    ((3, 3, 4, 6), LAST),
    ((2, 1, 9, 9), LAST),
    ((2, 3, 13, 17), CONTIGUOUS),
    ((2, 3, 13, 17), LAST),
    ((2, 5, 3, 4, 3), CONTIGUOUS),
    ((2, 11, 3, 4, 3), LAST_3D),
]
on_every_shape = pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=layout_id)
# no map, a small map with many channels, a split map, with channels first and last
on_each_kind = pytest.mark.parametrize(
    ("shape", "layout"), [SHAPES[1], SHAPES[6], SHAPES[7], SHAPES[10], SHAPES[11]], ids=layout_id
)
NUMBERS = [
    (torch.float64, 0.3, "averaged"),
    (torch.float64, 0.3, "pooled"),
    (torch.float32, 0.3, "averaged"),
    (torch.float32, 1.0, "averaged"),
    (torch.bfloat16, 0.3, "pooled"),
    (torch.float16, 0.3, "averaged"),
]


@pytest.fixture(params=["tiles as they are", "small tiles"], autouse=True)
def tiles(request, monkeypatch):
    """Small tiles: small inputs, which are quick to interpret, cross all borders and are split."""
    if request.param == "small tiles":
        for size, small in (("TILE", 64), ("WIDEST", 64), ("NARROWEST", 16), ("STEPS_OF_ONE", 3)):
            monkeypatch.setattr(triton_cut, size, small)
    triton_cut.cut.cache_clear()
    yield
    triton_cut.cut.cache_clear()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs and buffers start as NaN, so that what is not written shows."""
    if DEVICE == "cpu":
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
        new_empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def operate(backend, x, weight, bias, past, a, variance_rule, dy, need_dx=True):
    """Everything that a backend's two operators return: the record, and the output and the gradients."""
    dtype = state_dtype(x.dtype)
    past_mean, past_var = (p.to(x.device, dtype) for p in past)
    a = torch.tensor(a, dtype=dtype, device=x.device)
    y, record = backend.forward(x, weight, bias, past_mean, past_var, a, variance_rule, EPS)
    return record, (y, *backend.backward(dy, x, weight, record, variance_rule, EPS, need_dx))


def run(x, dy, variance_rule="averaged", a=0.3, need_dx=True):
    """Everything that the two operators return for an input, in a row."""
    parameters = (p.to(DEVICE) for p in make_parameters(x.shape[1], state_dtype(x.dtype)))
    past = near_statistics(x.cpu())
    record, results = operate(kernels, x, *parameters, past, a, variance_rule, dy, need_dx)
    return *record, *results


def made_for_device(*arguments, **options):
    # on the CPU first: a copy to the device keeps strides
    return make_input(*arguments, **options).to(DEVICE)


@pytest.mark.parametrize(("dtype", "a", "variance_rule"), NUMBERS, ids=layout_id)
@on_every_shape
def test_everything_matches_the_reference(shape, layout, dtype, a, variance_rule):
    x = make_input(shape, dtype, layout)
    parameters = make_parameters(shape[1], state_dtype(dtype))
    past = near_statistics(x)
    cotangent = make_input(shape, dtype, layout, seed=5)
    on_device = [t.to(DEVICE) for t in (x, *parameters)]
    exact = [t.double().clone().requires_grad_() for t in (x, *parameters)]

    want, *wanted_statistics = reference.blended_batch_norm(*exact, *past, a, variance_rule, EPS)
    wanted = [w.detach() for w in (want, *gradients(want, tuple(exact), cotangent.double()))]
    record, got = operate(kernels, *on_device, past, a, variance_rule, cotangent.to(DEVICE))
    peer_record, peers = operate(aten, x, *parameters, past, a, variance_rule, cotangent)

    # dw of blended statistics is worse off than native's by the rounding of the saved mean
    native = native_errors(x, *parameters, cotangent, EPS)
    composed = (relative_error(p, w) for p, w in zip(peers, wanted, strict=True))
    allowed = [budget(dtype, max(pair)) for pair in zip(native, composed, strict=True)]
    if dtype == torch.float64:
        allowed = [most + 2 * error for most, error in zip(allowed, native, strict=True)]
    errors = [relative_error(g.cpu(), w) for g, w in zip(got, wanted, strict=True)]
    assert all(e <= most for e, most in zip(errors, allowed, strict=True)), (errors, allowed)
    # they are summed in their own precision, as native's on a GPU are: a few roundings
    for found, peer, exactly in zip(record[:4], peer_record[:4], wanted_statistics, strict=True):
        most = 2 * relative_error(peer, exactly.detach()) + 4 * torch.finfo(found.dtype).eps
        assert relative_error(found.cpu(), exactly.detach()) <= most
    weights = torch.full((shape[1],), a, dtype=torch.float64)
    for found, given in zip(record[4:], (*past, weights), strict=True):
        assert torch.equal(found.cpu(), given.to(found.dtype))


@pytest.mark.parametrize("variance_rule", VARIANCE_RULES)
@on_every_shape
def test_a_remembered_gradient_is_the_references(shape, layout, variance_rule):
    x, dy = (make_input(shape, torch.float64, layout, seed=seed) for seed in (0, 5))
    weight, bias = make_parameters(shape[1], torch.float64)
    mean, scale = make_input((2, shape[1]), torch.float64, seed=6)
    past, a, b = near_statistics(x), 0.3, 0.8
    of_forward = *(t.to(DEVICE) for t in (*past, torch.tensor(a, dtype=torch.float64))), variance_rule, EPS
    x_there, dy_there, weight_there, bias_there = (t.to(DEVICE) for t in (x, dy, weight, bias))
    _, record = kernels.forward(x_there, weight_there, bias_there, *of_forward)
    read = torch.stack((mean, scale, torch.full_like(mean, b))).to(DEVICE)
    found = kernels.backward(dy_there, x_there, weight_there, record, variance_rule, EPS, True, read)
    blended = reference.mix(*reference.batch_statistics(x)[:2], *past, a, variance_rule)
    batch_mean, *_ = reference.batch_statistics(x)
    wanted = reference.remembered_gradient(
        dy, x, weight, batch_mean, *blended, b, mean, scale, variance_rule, EPS
    )
    for got, want in zip(found, wanted, strict=False):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("store", "spoiled"), [(True, False), (False, False), (True, True)])
@on_each_kind
def test_a_backward_that_remembers_does_as_one_after_a_read_and_before_a_write(shape, layout, store, spoiled):
    x, dy = (made_for_device(shape, torch.float32, layout, seed=seed) for seed in (0, 5))
    weight, bias = (p.to(DEVICE) for p in make_parameters(shape[1], torch.float32))
    mean, scale = made_for_device((2, shape[1]), torch.float32, seed=6)
    if spoiled:
        dy[0, 0] = torch.inf
    past = *(p.to(DEVICE, torch.float32) for p in near_statistics(x.cpu())), torch.tensor(0.3, device=DEVICE)
    _, record = kernels.forward(x, weight, bias, *past, "pooled", EPS)
    remembered = mean.clone(), scale.clone()
    *found, read = kernels.remembering_backward(dy, x, weight, record, remembered, "pooled", EPS, True, store)
    torch.testing.assert_close(read, stacked(mean, scale, record[-1]))
    wanted = kernels.backward(dy, x, weight, record, "pooled", EPS, True, read)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    if store:
        write(mean, scale, read, (found[2], found[1]), x.numel() // shape[1], record[:4])
    assert not spoiled or torch.equal(mean, read[0])
    torch.testing.assert_close(remembered, (mean, scale))


@pytest.mark.parametrize("variance_rule", VARIANCE_RULES)
@on_each_kind
def test_parameters_are_optional(shape, layout, variance_rule):
    x = make_input(shape, torch.float64, layout)
    past = near_statistics(x)
    cotangent = make_input(shape, torch.float64, layout, seed=5)
    exact = x.clone().requires_grad_()
    want = reference.blended_batch_norm(exact, None, None, *past, 0.3, variance_rule, EPS)[0]
    _, (y, dx, _, _) = operate(
        kernels, x.to(DEVICE), None, None, past, 0.3, variance_rule, cotangent.to(DEVICE)
    )
    assert relative_error(y.cpu(), want.detach()) < 1e-12
    (wanted,) = gradients(want, (exact,), cotangent)
    assert relative_error(dx.cpu(), wanted) < 1e-12


@on_each_kind
def test_parameters_get_the_same_gradients_without_one_of_the_input(shape, layout):
    x, dy = (
        made_for_device(shape, torch.float32, layout),
        made_for_device(shape, torch.float32, layout, seed=6),
    )
    *_, dw, db = run(x, dy)
    *_, dx, same_dw, same_db = run(x, dy, need_dx=False)
    assert dx is None
    assert torch.equal(dw, same_dw)
    assert torch.equal(db, same_db)


@on_each_kind
def test_a_second_run_gives_the_same_bits(shape, layout):
    x, dy = (
        made_for_device(shape, torch.float32, layout),
        made_for_device(shape, torch.float32, layout, seed=6),
    )
    assert all(map(torch.equal, run(x, dy), run(x, dy)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=layout_id)
@on_each_kind
def test_equal_values_have_no_variance(shape, layout, dtype):
    x = torch.full(shape, 0.1, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)
    batch_mean, batch_var = run(x, x)[:2]
    assert torch.equal(batch_var, torch.zeros_like(batch_var))
    assert torch.equal(batch_mean, x.flatten()[0].to(batch_mean.dtype).expand_as(batch_mean))


# and the roundings allowed: an outlier's whole variance may go through one lane of small tiles
ADVERSARIES = {
    "far off centre": (lambda noise: 1e4 + noise, 1),
    "an outlier first": (lambda noise: noise.index_fill(-1, torch.tensor(0), 1e5), 2),
    "two halves": (lambda noise: noise + 1e3 * (torch.arange(noise.shape[-1]) % 64 < 32), 1),
    "a ramp": (lambda noise: noise + torch.arange(float(noise.shape[-1])), 1),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
def test_statistics_are_as_accurate_as_native(name, layout):
    spoil, roundings = ADVERSARIES[name]
    x = spoil(make_input((2, 2, 2, 900), torch.float64)).float().contiguous(memory_format=layout)
    exact_mean, exact_var, _ = reference.batch_statistics(x.double())
    past = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    _, (mean, var, *_) = kernels.forward(x.to(DEVICE), None, None, *past, "averaged", EPS)
    # on the CPU native sums in double
    native_mean, native_var = torch.batch_norm_update_stats(x, None, None, 0.0)
    for got, native, exact in ((mean, native_mean, exact_mean), (var, native_var, exact_var)):
        error = (got.cpu().double() - exact).abs() / exact.abs()
        native_error = ((native.double() - exact).abs() / exact.abs()).max()
        assert error.max() <= 2 * native_error + roundings * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@on_each_kind
def test_what_is_not_finite_stays_in_its_channel(shape, layout, bad):
    clean = made_for_device(shape, torch.float32, layout)
    dy = made_for_device(shape, torch.float32, layout, seed=6)
    wanted = run(clean, dy)
    channel = shape[1] // 2
    x = clean.clone()
    x.select(1, channel)[(-1,) * (len(shape) - 1)] = bad
    parameters = (p.to(DEVICE) for p in make_parameters(shape[1], torch.float32))
    record, results = operate(kernels, x, *parameters, near_statistics(clean.cpu()), 0.3, "averaged", dy)
    others = torch.arange(shape[1]) != channel
    for got, want in zip((*record, *results), wanted, strict=True):
        along = 1 if got.dim() > 1 else 0
        assert torch.equal(got.cpu().movedim(along, 0)[others], want.cpu().movedim(along, 0)[others])
    assert not torch.isfinite(record[1][channel])
    assert torch.isnan(results[0].select(1, channel)).all()


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
def test_the_output_and_the_gradient_keep_the_layout(layout):
    x = made_for_device((2, 5, 4, 6), torch.float32, layout)
    *_, y, dx, _, _ = run(x, x)
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)


def test_any_strides_will_do():
    x = made_for_device((4, 6, 5, 8), torch.float64)
    dy = made_for_device((4, 6, 5, 8), torch.float64, seed=6)
    wanted = run(x, dy)
    strange = torch.stack((x, x), -1)[..., 0]
    for values, gradient in (
        (strange, dy),
        (x.transpose(2, 3).contiguous().transpose(2, 3), dy),
        (x, torch.stack((dy, dy), 2)[:, :, 0]),
        (x.contiguous(memory_format=LAST), dy),
    ):
        for got, want in zip(run(values, gradient), wanted, strict=True):
            assert relative_error(got.cpu(), want.cpu()) < 1e-12
