import copy
import functools
import inspect
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import BACKENDS, DTYPES, LAYOUTS, gradients, layout_id, make_input
from torch import nn
from torch.nn import functional as F

import mbnorm
from mbnorm import (
    MatchedBatchNorm2d,
    MemorizedBatchNorm1d,
    MemorizedBatchNorm2d,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
)

METHODS = {
    "momentum": ("Momentum", {"history_weight": 0.75}),
    "plain-rule": ("Matched", {"matched_batch_size": 64, "measured": False, "early_weight": 0.0}),
    "matched": ("Matched", {"matched_batch_size": 64}),
    "memorized": ("Memorized", {"memory_size": 4}),
    "memorized-ema": ("Memorized", {"memory_size": 4, "inference": "ema"}),
}
PLAIN = {
    "history_weight=0": ("Momentum", {}),
    "memory_size=1": ("Memorized", {"memory_size": 1}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)
in_every_rank = pytest.mark.parametrize("rank", [2, 3, 4, 5])


def layer_class(kind, rank):
    return getattr(mbnorm, f"{kind}BatchNorm{max(rank - 2, 1)}d")


def stock_class(rank):
    return getattr(nn, f"BatchNorm{max(rank - 2, 1)}d")


def build(method, rank=4, features=3, **options):
    kind, own = METHODS[method]
    return layer_class(kind, rank)(features, **(own | options))


def shape_of(rank, m=4):
    return (m, 3, *range(4, 2 + rank))


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:Momentum layers train with history_weight=0")
@pytest.mark.contract("A5", "A6")
@in_every_rank
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plain", PLAIN)
def test_without_a_past_layers_are_torchs_batch_norm(plain, dtype, rank):
    kind, options = PLAIN[plain]
    ours, torchs = layer_class(kind, rank)(3, dtype=dtype, **options), stock_class(rank)(3, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for step in range(5):
        x = make_input(shape_of(rank, m=2 + step), dtype, seed=step)
        cotangent = make_input(tuple(x.shape), dtype, seed=50 + step)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = ours(leaves[0]), torchs(leaves[1])
        close(y, want)
        close(
            gradients(y, (leaves[0], ours.weight, ours.bias), cotangent),
            gradients(want, (leaves[1], torchs.weight, torchs.bias), cotangent),
        )
        close(ours.running_mean, torchs.running_mean)
        assert torch.equal(ours.num_batches_tracked, torchs.num_batches_tracked)
        if kind == "Memorized":
            close(ours.running_var, torchs.running_var)
        else:
            torchs.running_var.copy_(ours.running_var)


@pytest.mark.filterwarnings("ignore:Momentum layers train with history_weight=0")
@pytest.mark.contract("A6")
def test_history_weight_0_averages_the_biased_variance():
    layer = MomentumBatchNorm1d(1, dtype=torch.float64)
    layer(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    assert layer.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 1)


@pytest.mark.contract("A6")
@pytest.mark.parametrize("momentum", [None, 1.0, 0.3])
def test_memory_size_1_has_torchs_running_averages_for_every_momentum(momentum):
    ours = MemorizedBatchNorm1d(3, memory_size=1, momentum=momentum)
    torchs = nn.BatchNorm1d(3, momentum=momentum)
    for step in range(5):
        x = make_input((2 + step, 3), torch.float32, seed=step)
        ours(x)
        torchs(x)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.contract("A1")
@in_every_rank
@on_every_method
def test_layers_are_torchs_by_type(method, rank):
    assert isinstance(build(method, rank), stock_class(rank))


@pytest.mark.contract("A1")
@pytest.mark.parametrize("name", [n for n in mbnorm.__all__ if "BatchNorm" in n])
def test_constructors_begin_with_torchs_arguments(name):
    ours = list(inspect.signature(getattr(mbnorm, name)).parameters.values())
    torchs = list(inspect.signature(nn.BatchNorm2d.__init__).parameters.values())[1:]
    positional = [p for p in torchs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in ours[: len(positional)]] == [(p.name, p.default) for p in positional]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(positional) :])


@pytest.mark.contract("A1")
@on_every_method
def test_layers_build_from_a_partial(method):
    kind, options = METHODS[method]
    norm = functools.partial(layer_class(kind, 4), eps=1e-3, **options)
    assert norm(8).eps == 1e-3


@on_every_method
def test_bias_can_be_left_out(method):
    layer = build(method, bias=False)
    assert layer.bias is None
    layer(make_input(shape_of(4), torch.float32))
    layer.reset_parameters()
    assert "bias" not in layer.state_dict()


@on_every_method
def test_affine_can_be_left_out(method):
    layer = build(method, affine=False)
    y = layer(make_input(shape_of(4), torch.float32))
    assert list(layer.parameters()) == []
    assert torch.isfinite(y).all()


@pytest.mark.contract("A7")
@on_every_method
@pytest.mark.parametrize("rank", [2, 3])
def test_1d_takes_two_and_three_dimensions(method, rank):
    assert build(method, rank)(make_input(shape_of(rank), torch.float32)).dim() == rank


@pytest.mark.contract("A7")
@pytest.mark.parametrize(
    ("rank", "wrong", "words"),
    [(2, 4, "expected 2D or 3D input"), (4, 3, "expected 4D input"), (5, 4, "expected 5D input")],
)
@on_every_method
def test_inputs_of_wrong_rank_get_torchs_error(method, rank, wrong, words):
    with pytest.raises(ValueError, match=words):
        build(method, rank)(make_input(shape_of(wrong), torch.float32))


@on_every_method
def test_inputs_with_wrong_channels_are_named(method):
    with pytest.raises(ValueError, match=r"expected 3 channels, got an input of shape \(2, 4, 3, 3\)"):
        build(method)(torch.zeros(2, 4, 3, 3))


@pytest.mark.contract("AM-1")
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=layout_id)
@on_every_method
def test_output_keeps_dtype_and_layout_in_both_modes(method, shape, layout, dtype):
    layer = build(method, len(shape), features=shape[1])
    layer = layer.double() if dtype == torch.float64 else layer
    x = make_input(shape, dtype, layout)
    for mode in (True, True, False):
        y = layer.train(mode)(x)
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())


@pytest.mark.contract("AM-2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=layout_id)
@on_every_method
def test_half_layers_keep_their_state_in_float32(method, dtype):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    layer.running_var.fill_(1e5)
    before = state_of(layer)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert all(b.dtype in (torch.float32, torch.int64) for b in layer.buffers())
    assert torch.equal(layer.running_var, before["running_var"])
    assert torch.equal(layer.memory_mean, before["memory_mean"])
    for mode in (True, False):
        assert layer.train(mode)(make_input(shape_of(4), dtype)).dtype == dtype


@on_every_method
def test_double_and_float_move_the_state_along(method):
    layer = build(method).double()
    assert {b.dtype for b in layer.buffers()} == {torch.float64, torch.int64}
    assert {b.dtype for b in layer.float().buffers()} == {torch.float32, torch.int64}
    assert {b.dtype for b in layer.double().half().buffers()} == {torch.float32, torch.int64}


@on_every_method
def test_half_constructor_keeps_the_state_in_float32(method):
    layer = build(method, dtype=torch.float16)
    assert layer.weight.dtype == torch.float16
    assert layer.running_mean.dtype == layer.memory_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
def test_the_history_weight_has_the_dtype_of_the_state(dtype):
    layer = MomentumBatchNorm2d(3, history_weight=0.75, dtype=dtype)
    assert layer.history_weight.dtype == layer.running_mean.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_method
def test_eval_is_torchs_batch_norm_on_the_running_averages(method, dtype):
    layer = build(method).to(torch.float64 if dtype == torch.float64 else torch.float32)
    state = layer.running_mean.dtype
    for step in range(3):
        layer(make_input(shape_of(4), state, seed=step))
    x = make_input(shape_of(4), dtype, seed=9)
    want = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0, layer.eps
    )
    assert torch.equal(layer.eval()(x), want)


@pytest.mark.contract("A4")
@on_every_method
def test_eval_writes_nothing(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    before = state_of(layer)
    layer.eval()(make_input(shape_of(4), torch.float32, seed=1))
    layer.train()
    assert same_state(layer, before)


@pytest.mark.contract("A9")
@on_every_method
def test_train_mode_without_gradients_stores_as_torch_does(method):
    layer = build(method)
    with torch.no_grad():
        layer(make_input(shape_of(4), torch.float32))
    assert int(layer.num_batches_tracked) == 1


@in_every_rank
@on_every_method
def test_an_empty_batch_changes_nothing(method, rank):
    layer = build(method, rank)
    x = torch.empty(shape_of(rank, m=0), requires_grad=True)
    for _ in range(2):
        before = state_of(layer)
        y = layer(x)
        dx, dw, db = gradients(y, (x, layer.weight, layer.bias), torch.empty_like(x))
        assert y.shape == dx.shape == x.shape
        assert torch.equal(dw, torch.zeros(3))
        assert torch.equal(db, torch.zeros(3))
        assert same_state(layer, before)
        layer(make_input(shape_of(rank), torch.float32))


@on_every_method
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_one_value_per_channel_raises_torchs_error_first_and_works_later(method, shape):
    layer = build(method, len(shape))
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(x)
    assert int(layer.num_batches_tracked) == 0
    layer(make_input((4, *shape[1:]), torch.float32))
    for _ in range(6):
        y = layer(x)
        (dx,) = gradients(y, (x,), torch.randn(shape))
        assert torch.isfinite(y).all()
        assert torch.isfinite(layer.running_var).all()
        assert dx.abs().min() > 0
    assert int(layer.num_batches_tracked) == 7


@on_every_method
def test_one_value_per_channel_raises_again_after_a_reset(method):
    layer = build(method, 2)
    layer(torch.randn(4, 3))
    layer(torch.randn(1, 3))
    layer.reset_running_stats()
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        layer(torch.randn(1, 3))


@pytest.mark.parametrize("options", [{"memory_size": 1}, {"memory_values": 1}])
def test_one_value_per_channel_raises_where_no_past_is_ever_read(options):
    layer = MemorizedBatchNorm1d(3, **options)
    layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        layer(torch.randn(1, 3))


@pytest.mark.contract("MF-1")
@on_every_method
def test_several_forwards_then_one_backward(method):
    # a remembered gradient depends on the order of the backward passes
    layer = build(method, gradient="exact").double()
    twin = copy.deepcopy(layer)
    leaves = [make_input(shape_of(4), torch.float64, seed=s).requires_grad_() for s in range(5)]
    cotangents = [make_input(shape_of(4), torch.float64, seed=20 + s) for s in range(5)]
    together = gradients(
        sum((layer(x) * c).sum() for x, c in zip(leaves, cotangents, strict=True)),
        (*leaves, layer.weight),
        torch.ones((), dtype=torch.float64),
    )
    one_by_one = [gradients(twin(x), (x, twin.weight), c) for x, c in zip(leaves, cotangents, strict=True)]
    torch.testing.assert_close(together[:-1], tuple(g[0] for g in one_by_one))
    torch.testing.assert_close(together[-1], sum(g[1] for g in one_by_one))


@pytest.mark.contract("MF-1")
@pytest.mark.parametrize("backend", BACKENDS)
@on_every_method
def test_a_forward_in_eval_mode_then_one_in_train_mode_then_one_backward(method, backend):
    layer = build(method, backend=backend).double()
    layer(make_input(shape_of(4), torch.float64))
    x = make_input(shape_of(4), torch.float64, seed=1).requires_grad_()
    cotangent = make_input(shape_of(4), torch.float64, seed=20)
    wanted = gradients(layer.eval()(x), (x, layer.weight), cotangent)
    y = layer(x)
    layer.train()(make_input(shape_of(4), torch.float64, seed=2))
    torch.testing.assert_close(gradients(y, (x, layer.weight), cotangent), wanted, rtol=0, atol=0)


@pytest.mark.contract("MF-1")
@pytest.mark.parametrize("backend", BACKENDS)
@on_every_method
def test_a_graph_that_holds_state_does_not_read_it_after_a_forward_has_written_it(method, backend):
    layer = build(method, backend=backend)
    scale = torch.ones(3, requires_grad=True)
    loss = (scale * layer.running_var).sum()
    with mbnorm.no_update(layer):
        layer(make_input(shape_of(4), torch.float32))
    loss.backward(retain_graph=True)
    layer(make_input(shape_of(4), torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_every_method
def test_an_ensemble_trains_under_vmap(method):
    layers = [build(method).double() for _ in range(3)]
    for seed, layer in enumerate(layers):
        layer(make_input(shape_of(4), torch.float64, seed=seed))
    base = copy.deepcopy(layers[0])
    parameters, buffers = torch.func.stack_module_state(layers)
    x = make_input(shape_of(4), torch.float64, seed=9)

    def forward(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    for _ in range(2):
        y = torch.func.vmap(forward)(parameters, buffers)
        torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))
    for i, layer in enumerate(layers):
        for name, buffer in layer.named_buffers():
            # nobody seals state that is given for a transform
            if name != "memory_seal":
                torch.testing.assert_close(buffers[name][i], buffer)
    # nothing of the transform is kept
    assert not base._calls.calls


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "traceable"])
@on_every_method
def test_an_input_that_cannot_be_saved_for_a_backward_is_not_stored(method, backend):
    layer = build(method, backend=backend)
    layer(make_input(shape_of(4), torch.float32))
    before = state_of(layer)
    with torch.inference_mode():
        x = make_input(shape_of(4), torch.float32)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(x)
    assert same_state(layer, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_that_train_one_layer_do_not_disturb_each_other(backend):
    layer = build("matched", backend=backend)
    x = make_input(shape_of(4), torch.float32)

    def train(_):
        for _ in range(100):
            layer(x).sum().backward()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(train, range(6)))
    finally:
        sys.setswitchinterval(interval)


@on_every_method
def test_replicas_of_data_parallel_share_no_log(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    replica(make_input(shape_of(4), torch.float32, seed=1))
    assert len(layer._calls.calls) == len(replica._calls.calls) == 1


@pytest.mark.contract("MF-4")
@on_every_method
def test_double_backward_through_a_layer_with_a_past(method):
    layer = build(method, 3).double()
    layer(make_input(shape_of(3), torch.float64))
    x = make_input(shape_of(3), torch.float64, seed=1).requires_grad_()
    with mbnorm.no_update(layer):
        assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.contract("A2")
@on_every_method
def test_momentum_0_stores_nothing(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    before = state_of(layer)
    layer.momentum = 0
    layer(make_input(shape_of(4), torch.float32, seed=1))
    assert same_state(layer, before)


@pytest.mark.contract("A2")
@on_every_method
def test_momentum_1_leaves_the_raw_batch_statistics(method):
    layer = build(method, momentum=1.0)
    layer(make_input(shape_of(4), torch.float32))
    x = make_input(shape_of(4), torch.float32, seed=1)
    layer(x)
    var, mean = torch.var_mean(x, (0, 2, 3))
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


@pytest.mark.contract("A2")
@on_every_method
def test_momentum_none_is_the_cumulative_mean_of_raw_statistics(method):
    layer = build(method, momentum=None)
    inputs = [make_input(shape_of(4, m=2 + s), torch.float32, seed=s) for s in range(7)]
    for x in inputs:
        layer(x)
    raw = [torch.var_mean(x, (0, 2, 3)) for x in inputs]
    torch.testing.assert_close(layer.running_mean, torch.stack([m for _, m in raw]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([v for v, _ in raw]).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@on_every_method
def test_untracked_from_the_start_is_plain_batch_norm(method, dtype):
    layer = build(method, track_running_stats=False, dtype=dtype)
    x = make_input(shape_of(4), dtype)
    want = F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0, layer.eps)
    assert torch.equal(layer(x), want)
    assert torch.equal(layer.eval()(x), want)
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.contract("A4")
@on_every_method
def test_untracked_later_reads_the_memory_and_writes_nothing(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    twin = copy.deepcopy(layer)
    before = state_of(layer)
    layer.track_running_stats = False
    x = make_input(shape_of(4), torch.float32, seed=1)
    assert torch.equal(layer(x), twin(x))
    assert same_state(layer, before)


@pytest.mark.contract("A3")
@on_every_method
def test_reset_clears_all_state(method):
    layer = build(method)
    fresh = state_of(layer)
    for step in range(6):
        layer(make_input(shape_of(4), torch.float32, seed=step))
    layer.reset_parameters()
    assert same_state(layer, fresh)


@pytest.mark.contract("A3")
def test_reset_gives_the_history_weight_its_first_value():
    layer = MomentumBatchNorm2d(3, history_weight=0.75)
    layer.history_weight.fill_(0.5)
    layer.reset_parameters()
    assert layer.history_weight == 0.75


@pytest.mark.contract("ST-3")
@on_every_method
def test_a_checkpoint_restores_the_run_bit_for_bit(method):
    layer = build(method)
    for step in range(6):
        layer(make_input(shape_of(4), torch.float32, seed=step))
    resumed = build(method)
    resumed.load_state_dict(state_of(layer))
    for step in range(6, 12):
        x = make_input(shape_of(4), torch.float32, seed=step)
        assert torch.equal(layer(x), resumed(x))
    assert same_state(layer, state_of(resumed))


@on_every_method
def test_state_dict_is_versioned(method):
    layer = build(method)
    assert layer.state_dict()._metadata[""]["version"] == 3


@on_every_method
def test_a_state_dict_can_keep_the_parameters_themselves(method):
    layer = build(method)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    assert not layer.state_dict()["weight"].requires_grad


@on_every_method
def test_own_checkpoints_must_be_whole(method):
    layer = build(method)
    state = layer.state_dict()
    del state["memory_mean"]
    with pytest.raises(RuntimeError, match=r"Missing key.*memory_mean"):
        build(method).load_state_dict(state)


@pytest.mark.contract("ST-1", "ST-4")
@pytest.mark.parametrize("assign", [False, True])
@on_every_method
def test_a_trained_stock_checkpoint_loads_strictly_and_seeds_the_memory(method, assign):
    stock = nn.BatchNorm2d(3).double()
    for step in range(30):
        stock(make_input(shape_of(4, m=8), torch.float64, seed=step))
    layer = build(method).double()
    layer.load_state_dict(stock.state_dict(), strict=True, assign=assign)
    x = make_input(shape_of(4, m=2), torch.float64, seed=99)
    assert torch.equal(layer.eval()(x), stock.eval()(x))
    past = layer.read(8, 8)
    torch.testing.assert_close(past.mean, stock.running_mean)
    torch.testing.assert_close(past.var, stock.running_var)
    assert past.batch_weight < 1


@pytest.mark.contract("ST-1")
@on_every_method
def test_an_untrained_stock_checkpoint_leaves_the_memory_empty(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert layer.read(8, 8).batch_weight == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("matched", {"eps": np.float32(1e-3), "matched_batch_size": np.int64(64)}),
        ("memorized", {"decay": np.float64(0.5), "memory_values": np.int64(64), "memory_size": np.int64(4)}),
    ],
)
def test_options_may_be_numpys_numbers(method, options, tmp_path):
    torch.save(build(method, **options).state_dict(), tmp_path / "checkpoint")
    build(method, **options).load_state_dict(torch.load(tmp_path / "checkpoint"))


def test_a_half_checkpoint_loads_into_float32_state():
    layer = MomentumBatchNorm2d(3, history_weight=0.5)
    layer.load_state_dict(nn.BatchNorm2d(3).half().state_dict(), assign=True)
    assert layer.running_mean.dtype == layer.memory_mean.dtype == torch.float32


def test_loading_a_stock_checkpoint_leaves_the_callers_dict_alone():
    state = nn.BatchNorm2d(3).state_dict()
    keys = list(state)
    MemorizedBatchNorm2d(3).load_state_dict(state)
    assert list(state) == keys


@pytest.mark.contract("ST-7")
@on_every_method
def test_copies_and_pickles_are_equal_and_independent(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = state_of(layer)
        assert same_state(twin, before)
        x = make_input(shape_of(4), torch.float32, seed=1)
        y = twin(x)
        assert same_state(layer, before)
        with mbnorm.no_update(layer):
            assert torch.equal(layer(x), y)


@on_every_method
def test_meta_layers_train_without_values(method):
    layer = build(method, rank=2, device="meta")
    for _ in range(3):
        y = layer(torch.empty(2, 3, device="meta"))
    assert y.is_meta
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.empty(1, 3, device="meta"))


@pytest.mark.contract("ST-7")
@on_every_method
def test_meta_layers_materialize(method):
    with torch.device("meta"):
        layer = build(method)
    assert "memory" in repr(layer)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    twin = build(method)
    for step in range(5):
        x = make_input(shape_of(4), torch.float32, seed=step)
        assert torch.equal(layer(x), twin(x))


@pytest.mark.contract("ST-7")
@pytest.mark.parametrize("affine", [True, False])
@on_every_method
def test_parameters_and_state_are_made_on_the_device_asked_for(method, affine):
    layer = build(method, device="meta", affine=affine)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}


@pytest.mark.contract("ST-1", "ST-7")
@on_every_method
def test_a_stock_checkpoint_without_values_leaves_all_state_on_its_device(method):
    layer = build(method, device="meta")
    layer.load_state_dict(nn.BatchNorm2d(3, device="meta").state_dict(), assign=True)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}


@on_every_method
def test_state_is_written_in_place(method):
    layer = build(method)
    storages = {name: b.data_ptr() for name, b in layer.named_buffers()}
    for step in range(6):
        layer(make_input(shape_of(4), torch.float32, seed=step))
    layer.reset_running_stats()
    assert {name: b.data_ptr() for name, b in layer.named_buffers()} == storages


@pytest.mark.contract("ST-7")
@on_every_method
def test_state_holds_no_graph(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32).requires_grad_())
    assert not any(b.requires_grad for b in layer.buffers())


@pytest.mark.contract("A8")
def test_the_memorys_cost_is_shown():
    layer = MemorizedBatchNorm2d(16, memory_size=8)
    assert layer.memory_bytes == 2 * 8 * 16 * 4 + 2 * 8 * 4
    assert repr(layer) == (
        f"MemorizedBatchNorm2d({nn.BatchNorm2d(16).extra_repr()}, memory_size=8, decay=1.0, "
        "variance_rule=pooled, inference=memory, backend=auto, memory=1088 bytes)"
    )


@pytest.mark.contract("A8")
def test_the_method_is_shown():
    assert "history_weight=0.75, variance_rule=averaged" in repr(MomentumBatchNorm2d(3, history_weight=0.75))
    assert "matched_batch_size=128, early_weight=8, gradient=remembered, backend" in repr(
        MatchedBatchNorm2d(3)
    )
    assert "matched_batch_size=64, measured=False, early_weight=0" in repr(
        MatchedBatchNorm2d(3, matched_batch_size=64, measured=False, early_weight=0)
    )
    assert "history_weight=0 (plain batch norm without a weight or schedule)" in repr(MomentumBatchNorm2d(3))
    assert "memory_values=128, decay=1.0, variance_rule=pooled, inference=ema" in repr(
        MemorizedBatchNorm2d(3, memory_values=128)
    )


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("Momentum", {"history_weight": 1.0}, r"history_weight must be in \[0, 1\), got 1.0"),
        ("Momentum", {"history_weight": -0.1}, "history_weight must be"),
        ("Matched", {"matched_batch_size": 0}, "matched_batch_size must be at least 1, got 0"),
        ("Matched", {"early_weight": -1.0}, "early_weight must be 0 or more, and finite, got -1.0"),
        ("Matched", {"early_weight": float("inf")}, "early_weight must be .*got inf"),
        ("Momentum", {"variance_rule": "mixed"}, "variance_rule must be one of .*got 'mixed'"),
        ("Momentum", {"backend": "cudnn"}, "backend must be one of .*got 'cudnn'"),
        ("Memorized", {"memory_size": 0}, "memory_size must be a whole number of at least 1, got 0"),
        ("Memorized", {"memory_values": 0}, "memory_values must be at least 1, got 0"),
        ("Memorized", {"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
        ("Memorized", {"decay": 1.1}, "decay must be"),
        ("Memorized", {"inference": "best"}, "inference must be .*got 'best'"),
        ("Memorized", {"variance_rule": "mixed"}, "variance_rule must be one of"),
    ],
)
def test_wrong_options_are_named(kind, options, words):
    with pytest.raises(ValueError, match=words):
        layer_class(kind, 4)(3, **options)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Momentum", "history_weight"),
        ("Matched", "matched_batch_size"),
        ("Matched", "early_weight"),
        ("Memorized", "memory_values"),
        ("Memorized", "decay"),
    ],
)
@pytest.mark.parametrize("value", ["128", "", torch.ones(2)], ids=["text", "empty", "two numbers"])
def test_options_that_are_no_numbers_are_named(kind, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got "):
        layer_class(kind, 4)(3, **{name: value})


@on_every_method
def test_a_partial_checkpoint_leaves_the_memory_alone(method):
    layer = build(method)
    layer(make_input(shape_of(4), torch.float32))
    before = state_of(layer)
    layer.load_state_dict({"weight": torch.ones(3), "bias": torch.zeros(3)}, strict=False)
    assert same_state(layer, before)


@pytest.mark.contract("ST-1")
@pytest.mark.parametrize("own", [True, False])
@on_every_method
def test_checkpoints_are_assigned_to_meta_layers(method, own):
    stock = nn.BatchNorm2d(3)
    stock(make_input(shape_of(4), torch.float32))
    source = build(method)
    source.load_state_dict(stock.state_dict())
    with torch.device("meta"):
        layer = build(method)
    layer.load_state_dict(copy.deepcopy((source if own else stock).state_dict()), assign=True)
    x = make_input(shape_of(4), torch.float32, seed=1)
    assert torch.equal(layer(x), source(x))


@on_every_method
def test_checkpoints_load_into_layers_made_empty_from_meta(method):
    source = build(method)
    source(make_input(shape_of(4), torch.float32))
    with torch.device("meta"):
        layer = build(method)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = make_input(shape_of(4), torch.float32, seed=1)
    assert torch.equal(layer(x), source(x))


@pytest.mark.filterwarnings("ignore:Momentum layers train with history_weight=0")
@pytest.mark.parametrize(("kind", "options"), [("Momentum", {}), ("Matched", {"matched_batch_size": 1})])
def test_one_value_per_channel_raises_where_the_past_has_no_weight(kind, options):
    layer = layer_class(kind, 2)(3, **options)
    layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        layer(torch.randn(1, 3))
