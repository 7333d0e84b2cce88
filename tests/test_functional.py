import pytest
import reference
import torch
from helpers import (
    BACKENDS,
    CONTIGUOUS,
    DTYPES,
    LAYOUTS,
    budget,
    gradients,
    layout_id,
    make_input,
    make_parameters,
    native_errors,
    near_statistics,
    relative_error,
)

from mbnorm import functional
from mbnorm.backends import cpu
from mbnorm.blend import VARIANCE_RULES
from mbnorm.functional import backend_for, blended_batch_norm

EPS = 1e-3
on_every_layout = pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=layout_id)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_all_rules = pytest.mark.parametrize("variance_rule", VARIANCE_RULES)


def operate(x, weight, bias, past, a, variance_rule, backend):
    return blended_batch_norm(
        x, weight, bias, *past, a, variance_rule=variance_rule, eps=EPS, backend=backend
    )


@on_every_backend
@with_all_rules
@pytest.mark.parametrize("a", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_layout
def test_output_and_gradients_match_the_reference(shape, layout, dtype, a, variance_rule, backend):
    x = make_input(shape, dtype, layout)
    # torch's batch norm takes float32 parameters with half inputs
    parameters = make_parameters(shape[1], torch.float64 if dtype == torch.float64 else torch.float32)
    past = near_statistics(x)
    cotangent = make_input(shape, dtype, layout, seed=5)
    allowed = [budget(dtype, e) for e in native_errors(x, *parameters, cotangent, EPS)]

    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    exact = [t.double().requires_grad_() for t in (x, *parameters)]
    y = operate(*leaves, past, a, variance_rule, backend).y
    want = reference.blended_batch_norm(*exact, *past, a, variance_rule, EPS)[0]
    got = (y, *gradients(y, tuple(leaves), cotangent))
    wanted = (want, *gradients(want, tuple(exact), cotangent.double()))

    errors = [relative_error(g.detach(), w.detach()) for g, w in zip(got, wanted, strict=True)]
    assert all(e <= most for e, most in zip(errors, allowed, strict=True)), (errors, allowed)


@on_every_backend
@with_all_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_layout
def test_statistics_match_the_reference(shape, layout, dtype, variance_rule, backend):
    x = make_input(shape, dtype, layout)
    past = near_statistics(x)
    got = operate(x, None, None, past, 0.3, variance_rule, backend)[1:]
    wanted = reference.blended_batch_norm(x.double(), None, None, *past, 0.3, variance_rule, EPS)[1:]
    # half inputs are exact in float32, so their statistics have float32's precision
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert max(relative_error(g, w) for g, w in zip(got, wanted, strict=True)) < tolerance


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_layout
def test_dtypes_and_layout_are_kept(shape, layout, dtype, backend):
    x = make_input(shape, dtype, layout).requires_grad_()
    result = operate(x, None, None, near_statistics(x), 0.5, "pooled", backend)
    (dx,) = gradients(result.y, (x,), make_input(shape, dtype, layout, seed=3))
    state = torch.float64 if dtype == torch.float64 else torch.float32
    assert (result.y.dtype, dx.dtype) == (dtype, dtype)
    assert {s.dtype for s in result[1:]} == {state}
    assert result.y.stride() == dx.stride() == x.stride()


@on_every_backend
@with_all_rules
@on_every_layout
def test_cotangents_of_any_layout_give_the_same_gradient(shape, layout, variance_rule, backend):
    x = make_input(shape, torch.float64, layout).requires_grad_()
    y = operate(x, None, None, near_statistics(x), 0.4, variance_rule, backend).y
    cotangent = make_input(shape, torch.float64, seed=4)
    wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    wide.copy_(cotangent)
    (straight,) = gradients(y, (x,), cotangent.contiguous(memory_format=layout), retain_graph=True)
    (strided,) = gradients(y, (x,), wide)
    torch.testing.assert_close(strided, straight, rtol=1e-13, atol=1e-13)


@on_every_backend
def test_expanded_cotangent(backend):
    x = make_input((3, 5, 4, 6), torch.float64).requires_grad_()
    weight = make_parameters(5, torch.float64)[0].requires_grad_()
    y = operate(x, weight, None, near_statistics(x), 0.4, "averaged", backend).y
    per_sample = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 5, 4, 6)
    got = gradients(y, (x, weight), per_sample, retain_graph=True)
    wanted = gradients(y, (x, weight), per_sample.contiguous())
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@on_every_backend
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (3, 6, 7)])
def test_inputs_of_odd_strides(shape, backend):
    dims = [0, 1, *reversed(range(2, len(shape)))]
    x = make_input(shape, torch.float64).permute(dims)
    past = near_statistics(x)
    got = operate(x, None, None, past, 0.4, "pooled", backend).y
    wanted = reference.blended_batch_norm(x, None, None, *past, 0.4, "pooled", EPS)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@on_every_backend
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_without_weight_or_bias(missing, backend):
    x = make_input((4, 3, 5), torch.float64).requires_grad_()
    weight, bias = make_parameters(3, torch.float64)
    weight = None if missing != "bias" else weight
    bias = None if missing != "weight" else bias
    past = near_statistics(x.detach())
    cotangent = make_input((4, 3, 5), torch.float64, seed=9)
    y = operate(x, weight, bias, past, 0.6, "averaged", backend).y
    want = reference.blended_batch_norm(x, weight, bias, *past, 0.6, "averaged", EPS)[0]
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        gradients(y, (x,), cotangent), gradients(want, (x,), cotangent), rtol=1e-12, atol=1e-13
    )


@on_every_backend
@with_all_rules
@pytest.mark.parametrize("a", [1.0, 0.3])
@on_every_layout
def test_gradcheck(shape, layout, a, variance_rule, backend):
    x = make_input(shape, torch.float64, layout).requires_grad_()
    weight, bias = (p.requires_grad_() for p in make_parameters(shape[1], torch.float64))
    past = near_statistics(x.detach())
    assert torch.autograd.gradcheck(
        lambda *inputs: operate(*inputs, past, a, variance_rule, backend).y, (x, weight, bias), fast_mode=True
    )


@on_every_backend
@with_all_rules
@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3), (2, 2, 2, 2), (2, 2, 2, 1, 2)], ids=layout_id)
def test_gradgradcheck(shape, variance_rule, backend):
    x = make_input(shape, torch.float64).requires_grad_()
    weight, bias = (p.requires_grad_() for p in make_parameters(shape[1], torch.float64))
    past = near_statistics(x.detach())
    assert torch.autograd.gradgradcheck(
        lambda *inputs: operate(*inputs, past, 0.3, variance_rule, backend).y, (x, weight, bias)
    )


def test_double_backward_of_a_frozen_weight():
    x = make_input((4, 3, 5), torch.float64).requires_grad_()
    weight, bias = make_parameters(3, torch.float64)
    past = near_statistics(x.detach())
    penalties = []
    for backend in BACKENDS:
        y = operate(x, weight, bias, past, 0.3, "pooled", backend).y
        (dx,) = gradients(y, (x,), make_input((4, 3, 5), torch.float64, seed=8), create_graph=True)
        penalties.append(gradients(dx.square().sum(), (x,), torch.ones((), dtype=torch.float64))[0])
    torch.testing.assert_close(penalties[0], penalties[1], rtol=1e-12, atol=1e-12)


@on_every_backend
def test_statistics_are_constants(backend):
    x = make_input((4, 3), torch.float64).requires_grad_()
    result = operate(x, None, None, near_statistics(x.detach()), 0.3, "pooled", backend)
    assert not any(s.requires_grad for s in result[1:])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
def test_one_value_per_channel_is_normalized_by_the_past(dtype, backend):
    x = make_input((1, 3), dtype)
    past = (torch.zeros(3), torch.full((3,), 4.0))
    y = operate(x, None, None, past, 0.25, "pooled", backend).y
    want = reference.blended_batch_norm(
        x.double(), None, None, *(p.double() for p in past), 0.25, "pooled", EPS
    )[0]
    assert relative_error(y, want) < 2 * torch.finfo(dtype).eps


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 2, 2, 2)])
def test_an_empty_batch_has_an_empty_output_and_zero_gradients(shape, backend):
    x = torch.randn(shape).requires_grad_()
    weight = torch.ones(3, requires_grad=True)
    result = operate(x, weight, None, (torch.zeros(3), torch.ones(3)), 0.5, "pooled", backend)
    dx, dw = gradients(result.y, (x, weight), torch.empty(shape))
    assert result.y.shape == dx.shape == shape
    assert torch.equal(dw, torch.zeros(3))
    assert torch.isnan(result.mean).all()


@on_every_backend
def test_non_finite_values_show_in_the_output(backend):
    x = make_input((4, 3), torch.float32)
    x[1, 2] = torch.inf
    y = operate(x, None, None, (torch.zeros(3), torch.ones(3)), 0.5, "pooled", backend).y
    assert torch.isfinite(y[:, :2]).all()
    assert torch.isnan(y[:, 2]).any()


@on_every_backend
@pytest.mark.parametrize("layout", [CONTIGUOUS, torch.channels_last], ids=layout_id)
def test_statistics_of_far_off_centre_data_are_as_accurate_as_native(layout, backend):
    noise = make_input((4, 3, 9, 9), torch.float64)
    x = (1e4 * (1 + torch.arange(3.0).view(1, 3, 1, 1)) + noise).float().contiguous(memory_format=layout)
    _, exact_var, _ = reference.batch_statistics(x.double())
    var = operate(x, None, None, (torch.zeros(3), torch.ones(3)), 1.0, "pooled", backend).batch_var
    _, native = torch.batch_norm_update_stats(x, None, None, 0.0)
    assert relative_error(var, exact_var) <= 2 * relative_error(native, exact_var) + 1e-6


def test_half_values_beyond_the_range_of_their_variance():
    x = 3e4 * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float16)
    for backend in BACKENDS:
        result = operate(x, None, None, (torch.zeros(1), torch.ones(1)), 1.0, "pooled", backend)
        torch.testing.assert_close(result.batch_var, x.float().square().mean(0))
        assert result.y.tolist() == [[1.0], [-1.0], [1.0], [-1.0]]


def saved_full_size_tensors(run, numel):
    saved = {}

    def pack(tensor):
        if tensor.numel() >= numel:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return len(saved)


@with_all_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_kernels_save_one_full_size_tensor(backend, dtype, variance_rule):
    x = make_input((4, 3, 8, 8), dtype).requires_grad_()
    past = near_statistics(x.detach())
    weight, bias = (p.requires_grad_() for p in make_parameters(3, torch.float32))
    run = lambda: operate(x, weight, bias, past, 0.5, variance_rule, backend)  # noqa: E731
    assert saved_full_size_tensors(run, x.numel()) == 1


def test_parameters_of_the_inputs_precision_get_gradients_of_theirs():
    x = make_input((4, 3), torch.bfloat16)
    weight, bias = (p.requires_grad_() for p in make_parameters(3, torch.bfloat16))
    y = operate(x, weight, bias, near_statistics(x), 0.5, "pooled", "auto").y
    assert {g.dtype for g in gradients(y, (weight, bias), torch.ones_like(y))} == {torch.bfloat16}


def test_auto_is_the_best_backend_on_the_cpu_and_says_so():
    assert backend_for(torch.randn(2, 3)) == BACKENDS[-1]


@pytest.mark.contract("KB-5")
def test_auto_is_aten_where_nothing_can_be_compiled_and_says_so_once(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler: c++ was not found")
    functional._warn_of_slow_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"about 2 times as long as .*: no C\+\+ compiler: c\+\+ was not"):
        assert backend_for(torch.randn(2, 3)) == "aten"
    # as an error where it came again
    assert backend_for(torch.randn(2, 3)) == "aten"


def test_the_compiled_kernels_are_refused_where_nothing_can_be_compiled(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler: c++ was not found")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used: no C"):
        operate(torch.randn(2, 3), None, None, (torch.zeros(3), torch.ones(3)), 0.5, "pooled", "cpu")


@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_a_backend_is_refused_where_it_does_not_run(backend):
    past = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=f"backend '{backend}' .*got .*meta"):
        operate(torch.empty(2, 3, device="meta"), None, None, past, 0.5, "pooled", backend)


def test_auto_is_traceable_elsewhere():
    assert backend_for(torch.empty(2, 3, device="meta")) == "traceable"


def test_auto_is_traceable_under_compile():
    past = torch.zeros(3), torch.ones(3)

    def run(x):
        return operate(x, None, None, past, 0.5, "pooled", "auto").y

    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    x = make_input((4, 3), torch.float32)
    torch.testing.assert_close(torch.compile(run, backend=backend, fullgraph=True)(x), run(x))
    assert len(graphs) == 1
    assert "var_mean" in graphs[0]
    torch._dynamo.reset()


def test_meta_tensors_have_the_output_shape():
    x = torch.empty(2, 3, 4, device="meta")
    past = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    assert operate(x, None, None, past, 0.5, "pooled", "auto").y.shape == x.shape


@pytest.mark.parametrize("m", [0, 2])
def test_all_that_is_returned_is_on_the_device_of_the_input(m):
    past = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    result = operate(torch.empty(m, 3, device="meta"), None, None, past, 0.5, "pooled", "auto")
    assert {t.device.type for t in result} == {"meta"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3)}, ValueError, "2 to 5 dimensions, got shape \\(3,\\)"),
        ({"x": torch.zeros(1, 3, 1, 1, 1, 1)}, ValueError, "2 to 5 dimensions"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "torch.int32"),
        ({"weight": torch.ones(4)}, ValueError, "weight of shape \\(3,\\).*got \\(4,\\)"),
        ({"bias": torch.ones(1, 3)}, ValueError, "bias of shape"),
        ({"past_mean": torch.zeros(2)}, ValueError, "past_mean of shape"),
        ({"past_var": torch.zeros(2)}, ValueError, "past_var of shape"),
        ({"variance_rule": "biased"}, ValueError, "variance_rule must be one of .*got 'biased'"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of .*got 'cudnn'"),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    arguments = {
        "x": torch.zeros(2, 3),
        "weight": None,
        "bias": None,
        "past_mean": torch.zeros(3),
        "past_var": torch.ones(3),
        "batch_weight": 0.5,
        "variance_rule": "pooled",
        "eps": EPS,
    }
    with pytest.raises(error, match=words):
        blended_batch_norm(**(arguments | change))


@on_every_backend
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_weight_that_the_input_depends_on_is_counted_once(create_graph, backend):
    x = make_input((4, 3, 5), torch.float64).requires_grad_()
    weight, bias = (p.requires_grad_() for p in make_parameters(3, torch.float64))
    past = near_statistics(x.detach())
    cotangent = make_input((4, 3, 5), torch.float64, seed=4)

    def twice(norm):
        return norm(torch.tanh(norm(x)))

    y = twice(lambda v: operate(v, weight, bias, past, 0.3, "pooled", backend).y)
    want = twice(lambda v: reference.blended_batch_norm(v, weight, bias, *past, 0.3, "pooled", EPS)[0])
    torch.testing.assert_close(
        gradients(y, (x, weight, bias), cotangent, create_graph=create_graph),
        gradients(want, (x, weight, bias), cotangent, create_graph=create_graph),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in its first use
def test_forward_mode_differentiation():
    x, tangent = make_input((4, 3), torch.float64), make_input((4, 3), torch.float64, seed=3)
    past = near_statistics(x)
    with torch.autograd.forward_ad.dual_level():
        y = operate(
            torch.autograd.forward_ad.make_dual(x, tangent), None, None, past, 0.3, "pooled", "auto"
        ).y
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    step = 1e-6
    ends = [operate(x + s * tangent, None, None, past, 0.3, "pooled", "auto").y for s in (step, -step)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_function_transforms():
    x = make_input((4, 3), torch.float64)
    past = near_statistics(x)

    def loss(v):
        return operate(v, None, None, past, 0.3, "pooled", "auto").y.sin().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_empty_batch_has_statistics_of_the_usual_dtype(dtype):
    past = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    result = blended_batch_norm(
        torch.empty(0, 3, dtype=dtype), None, None, *past, 0.5, variance_rule="pooled", eps=1e-5
    )
    full = blended_batch_norm(
        torch.ones(2, 3, dtype=dtype), None, None, *past, 0.5, variance_rule="pooled", eps=1e-5
    )
    assert [s.dtype for s in result[1:]] == [s.dtype for s in full[1:]]
