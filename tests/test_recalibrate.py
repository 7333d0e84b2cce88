import copy
import itertools
import warnings
from collections import UserDict, namedtuple

import pytest
import torch
from helpers import make_input
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from mbnorm import DoubleForward, convert, recalibrate

METHODS = {
    "stock": None,
    "momentum": ("momentum", {"history_weight": 0.75}),
    "matched": ("matched", {}),
    "memorized": ("memorized", {"memory_size": 4}),
    "memorized-ema": ("memorized", {"memory_size": 4, "inference": "ema"}),
    "memory_size=1": ("memorized", {"memory_size": 1}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)
CUTS = [[12], [1] * 12, [2, 1, 5, 4], [11, 1]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(2)
        self.conv1 = nn.Conv2d(2, 3, 3)
        self.bn1 = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        self.bn2 = nn.BatchNorm2d(4, affine=False)

    def forward(self, x, scale=1.0):
        x = torch.relu(self.bn1(self.conv1(self.bn0(x * scale))))
        return self.bn2(self.conv2(self.drop(x)))


def net(method, dtype=torch.float32, trained=True):
    torch.manual_seed(0)
    model = Net().to(dtype)
    if METHODS[method] is not None:
        name, options = METHODS[method]
        convert(model, name, **options)
    if trained:
        for seed in range(5):
            model(make_input((3, 2, 6, 6), dtype, seed=seed + 50))
    return model


def data(count=12, dtype=torch.float32, seed=0):
    # no two samples are alike, so that every cut has other batch statistics
    x = make_input((count, 2, 6, 6), dtype, seed=seed)
    return x * torch.linspace(0.5, 3, count, dtype=dtype).view(-1, 1, 1, 1) + 20


def norms(model):
    return [model.bn0, model.bn1, model.bn2]


def running(model):
    return [t.clone() for n in norms(model) for t in (n.running_mean, n.running_var)]


def rest_of(model):
    state = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    return {n: t for n, t in state.items() if "running_" not in n}


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def statistics(x, correction=1):
    return reversed(torch.var_mean(x.double(), (0, 2, 3), correction=correction))


@pytest.mark.contract("EM-3")
@pytest.mark.parametrize("cut", CUTS, ids=str)
@on_every_method
def test_a_first_layer_gets_the_statistics_of_the_whole_data_however_it_is_cut(method, cut):
    model, x = net(method, torch.float64), data(dtype=torch.float64)
    recalibrate(model, x.split(cut))
    mean, var = statistics(x)
    torch.testing.assert_close(model.bn0.running_mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(model.bn0.running_var, var, rtol=1e-13, atol=0)


@pytest.mark.contract("EM-3")
@on_every_method
def test_float32_layers_get_the_float64_statistics_rounded_once(method):
    model, x = net(method), data() + 1000
    recalibrate(model, x.split([2, 1, 5, 4]))
    mean, var = statistics(x)
    torch.testing.assert_close(model.bn0.running_mean, mean.float(), rtol=0, atol=0)
    torch.testing.assert_close(model.bn0.running_var, var.float(), rtol=2e-7, atol=0)


def by_hand(model, batches):
    """Each layer's values in a pass where it normalizes with all of its values so far, by concatenation."""
    w1, w2 = model.conv1.weight, model.conv2.weight.detach()
    seen = [[], [], []]

    def norm(index, x):
        seen[index].append(x)
        mean, var = statistics(torch.cat(seen[index]), correction=0)
        layer = norms(model)[index]
        return F.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)

    for x in batches:
        y = F.conv2d(norm(0, x), w1, model.conv1.bias)
        norm(2, F.conv2d(norm(1, y).relu(), w2, model.conv2.bias))
    return [t for layer in seen for t in statistics(torch.cat(layer))]


@pytest.mark.contract("EM-3")
@pytest.mark.parametrize("cut", CUTS, ids=str)
@on_every_method
def test_deeper_layers_get_the_statistics_of_all_that_they_were_given(method, cut):
    model = net(method, torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batches = data(dtype=torch.float64).split(cut)
    want = by_hand(model.eval(), batches)
    recalibrate(model, batches)
    torch.testing.assert_close(running(model), want, rtol=1e-10, atol=1e-12)


@pytest.mark.contract("EM-3")
@on_every_method
def test_one_batch_of_everything_is_normalized_in_eval_mode_as_in_training(method):
    model, x = net(method, torch.float64, trained=False), data(dtype=torch.float64)
    model.drop.p = 0.0
    recalibrate(model.eval(), [x])
    for layer, positions in zip(norms(model), (36, 16, 4), strict=True):
        # the unbiased estimate lies between the modes
        layer.running_var *= 1 - 1 / (12 * positions)
    y = model(x)
    for layer in norms(model):
        layer.momentum = 0
    torch.testing.assert_close(model.train()(x), y)


@pytest.mark.contract("EM-3")
@on_every_method
def test_one_batch_leaves_what_update_bn_leaves(method):
    model, x = net(method, torch.float64), data(dtype=torch.float64)
    model.drop.p = 0.0
    model.conv2 = nn.Conv2d(3, 4, 3).double()
    other = copy.deepcopy(model)
    recalibrate(model, [x])
    update_bn([x], other)
    torch.testing.assert_close(running(model), running(other))


def mlp(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    if METHODS[method] is not None:
        name, options = METHODS[method]
        convert(model, name, **options)
    return model.double()


def error(mean, var, layer):
    """The larger error of mean and variance, in the standard errors that so many values would have."""
    n, spread = 1000, layer.running_var
    of_mean = (mean - layer.running_mean).abs() / (spread / n).sqrt()
    of_var = (var / spread - 1).abs() / (2 / n) ** 0.5
    return float(torch.maximum(of_mean, of_var).max())


@pytest.mark.contract("EM-3")
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("method", ["stock", "memorized"])
def test_batches_of_one_or_two_values_show_deep_layers_what_eval_mode_will(method, m):
    model, whole = mlp(method), mlp(method)
    x = torch.randn(1000, 3, dtype=torch.float64)
    recalibrate(model, x.split(m))
    recalibrate(whole, [x])
    assert error(model[4].running_mean, model[4].running_var, whole[4]) < 3


def test_pairs_normalized_by_themselves_would_not():
    model, whole = mlp("stock"), mlp("stock")
    x = torch.randn(1000, 3, dtype=torch.float64)
    recalibrate(whole, [x])
    deep = torch.cat([model[:4](pair) for pair in x.split(2)]).detach()
    var, mean = torch.var_mean(deep, 0)
    assert error(mean, var, whole[4]) > 6


@pytest.mark.contract("EM-3")
@pytest.mark.parametrize("training", [True, False])
@on_every_method
def test_nothing_but_the_running_statistics_changes(method, training):
    model = net(method).train(training)
    model.drop.train()
    kept, modes = rest_of(model), [m.training for m in model.modules()]
    tensors = [id(b) for b in model.buffers()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    before, state = running(model), torch.get_rng_state()
    # with a loader that draws, too
    loader = torch.utils.data.DataLoader(data(), batch_size=4, shuffle=True)
    recalibrate(model, loader)
    assert not any(torch.equal(a, b) for a, b in zip(before, running(model), strict=True))
    assert equal(rest_of(model).values(), kept.values())
    assert [m.training for m in model.modules()] == modes
    assert [id(b) for b in model.buffers()] == tensors
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.contract("EM-3", "EM-5")
@on_every_method
def test_a_pass_in_the_middle_leaves_training_alone(method):
    models = net(method), net(method)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if method != "stock":
            DoubleForward(model, optimizer)
        torch.manual_seed(1)
        for x in data().split(2):
            model(x).square().mean().backward()
            if model is models[1]:
                # between a forward and the step that Double-Forward repeats it after
                recalibrate(model, [data(seed=3)])
            optimizer.step()
    assert equal(rest_of(models[0]).values(), rest_of(models[1]).values())


class Broken(Exception):
    pass


def broken_loader():
    yield data(4)
    raise Broken


def broken_forward(model, batch):
    model(batch)
    raise Broken


@pytest.mark.contract("EM-3")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {"batches": broken_loader()},
        {"batches": [data(4)], "forward": broken_forward},
        {"batches": [data(4), torch.zeros(2, 7, 6, 6)]},
        {"batches": [data(4), torch.zeros(2, 6, 6)]},
    ],
    ids=["loader", "forward", "channels", "rank"],
)
@on_every_method
def test_if_anything_raises_nothing_at_all_has_changed(method, arguments, training):
    arguments = dict(arguments)
    if not isinstance(arguments["batches"], list):
        arguments["batches"] = broken_loader()
    model = net(method).train(training)
    model.drop.train()
    modes, before, kept = [m.training for m in model.modules()], running(model), rest_of(model)
    tensors, state = [id(b) for b in model.buffers()], torch.get_rng_state()
    with pytest.raises((Broken, ValueError, RuntimeError)):
        recalibrate(model, **arguments)
    assert equal(running(model), before)
    assert equal(rest_of(model).values(), kept.values())
    assert [m.training for m in model.modules()] == modes
    assert [id(b) for b in model.buffers()] == tensors
    assert not any(m._forward_pre_hooks for m in norms(model))
    assert torch.equal(torch.get_rng_state(), state)


Pair = namedtuple("Pair", ["image", "label"])
LABELS = torch.zeros(4)
FORMATS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, LABELS),
    "list": lambda x: [x, LABELS],
    "namedtuple": lambda x: Pair(x, LABELS),
    "mapping": lambda x: {"x": x, "scale": 1.0},
    "user dict": lambda x: UserDict(x=x),
}


@pytest.mark.contract("EM-3")
@pytest.mark.parametrize("form", FORMATS)
def test_batches_come_in_every_usual_form(form):
    plain, model = net("memorized"), net("memorized")
    recalibrate(plain, data().split(4))
    recalibrate(model, (FORMATS[form](x) for x in data().split(4)), device="cpu")
    assert equal(running(model), running(plain))


@pytest.mark.contract("EM-3")
def test_a_list_of_samples_goes_to_the_model_as_it_is():
    """The form of detection models."""

    class Detector(Net):
        def forward(self, samples):
            return super().forward(torch.stack([s["image"] for s in samples]))

    torch.manual_seed(0)
    plain, model = Net(), Detector()
    model.load_state_dict(plain.state_dict())
    recalibrate(plain, [data()])
    recalibrate(model, [[{"image": x, "boxes": LABELS} for x in data()]])
    assert equal(running(model), running(plain))


@pytest.mark.contract("EM-3")
def test_forward_says_how_to_call_the_model():
    plain, model = net("matched"), net("matched")
    recalibrate(plain, (x * 2 for x in data().split(4)))
    recalibrate(
        model,
        [(LABELS, {"image": x}) for x in data().split(4)],
        forward=lambda called, batch: called(batch[1]["image"], scale=2),
        device="cpu",
    )
    assert equal(running(model), running(plain))


@pytest.mark.contract("EM-3")
def test_batches_are_moved_to_the_device():
    moved = []
    with pytest.raises(ValueError, match="no batch norm has run"):
        recalibrate(
            net("matched"),
            [{"x": [data()]}],
            device="meta",
            forward=lambda _, batch: moved.append(batch["x"][0].device.type),
        )
    assert moved == ["meta"]


@pytest.mark.contract("EM-3")
def test_islice_takes_a_number_of_an_endless_loader():
    model, first = net("matched"), net("matched")
    recalibrate(model, itertools.islice(itertools.cycle(data().split(4)), 2))
    recalibrate(first, data()[:8].split(4))
    assert equal(running(model), running(first))


@pytest.mark.contract("EM-3", "NI-1")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@on_every_method
def test_a_batch_that_is_not_finite_does_not_count(method, bad):
    poison = data(3)
    poison[1, 0, 2, 2] = bad
    model, clean = net(method), net(method)
    a, b = data().split(6)
    recalibrate(model, [poison, a, poison, b])
    recalibrate(clean, [a, b])
    assert equal(running(model), running(clean))


@pytest.mark.contract("EM-3")
@on_every_method
def test_an_empty_batch_does_not_count(method):
    model, clean = net(method), net(method)
    a, b = data().split(6)
    recalibrate(model, [a[:0], a, b[:0], b])
    recalibrate(clean, [a, b])
    assert equal(running(model), running(clean))


@pytest.mark.contract("NI-5")
@on_every_method
def test_a_poisoned_checkpoint_evaluates_again(method):
    model, clean = net(method), net(method)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "bn" in name:
            buffer.fill_(torch.nan)
    for m in (model, clean):
        recalibrate(m, data().split(4))
    assert equal(running(model), running(clean))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "batches is empty"),
        ([torch.zeros(0, 2, 6, 6)], "batches is empty"),
        (
            [torch.full((2, 2, 6, 6), torch.nan)],
            "finite values .* no variance, in bn0, bn1, bn2",
        ),
    ],
    ids=["empty", "empty batch", "nan"],
)
@on_every_method
def test_no_data_is_an_error_and_changes_nothing(method, batches, words):
    model = net(method)
    before = running(model)
    with pytest.raises(ValueError, match=words):
        recalibrate(model, batches)
    assert equal(running(model), before)


def test_one_value_has_no_variance():
    with pytest.raises(ValueError, match=r"no variance, in \(the model itself\)"):
        recalibrate(nn.BatchNorm1d(3), [torch.randn(1, 3)])


def test_a_model_without_batch_norms_to_set_is_refused():
    for model in (
        nn.Linear(2, 2),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.BatchNorm1d(2, momentum=0),
    ):
        with pytest.raises(ValueError, match="no batch norm with running statistics"):
            recalibrate(model, [torch.randn(4, 2)])


@pytest.mark.contract("FT-3")
@pytest.mark.parametrize("freeze", ["eval", "momentum", "track"])
@on_every_method
def test_frozen_layers_keep_their_statistics_and_normalize_with_them(method, freeze):
    model, x = net(method, torch.float64), data(dtype=torch.float64)
    if freeze == "eval":
        model.bn0.eval()
    elif freeze == "momentum":
        model.bn0.momentum = 0
    else:
        model.bn0.track_running_stats = False
    before = running(model)
    recalibrate(model, x.split(4))
    assert equal(running(model)[:2], before[:2])
    y = model.conv1(F.batch_norm(x, *before[:2], model.bn0.weight, model.bn0.bias, eps=model.bn0.eps))
    torch.testing.assert_close(running(model)[2:4], list(statistics(y.detach())))


@pytest.mark.contract("EM-3")
@on_every_method
def test_a_model_in_eval_mode_has_no_frozen_layers(method):
    first, second = net(method).train(), net(method).eval()
    for model in (first, second):
        recalibrate(model, data().split(4))
    assert equal(running(first), running(second))


@pytest.mark.contract("EM-3")
@on_every_method
def test_layers_out_of_reach_keep_their_statistics(method):
    model = net(method)
    before = running(model)
    recalibrate(model, [data()], forward=lambda called, x: called.bn0(x))
    assert equal(running(model)[2:], before[2:])
    assert not torch.equal(model.bn0.running_mean, before[0])


@pytest.mark.contract("EM-3")
def test_a_layer_called_twice_gets_the_values_of_both_calls():
    layer = nn.BatchNorm2d(2).double()
    x, z = data(dtype=torch.float64), data(5, torch.float64, seed=9)

    def forward(model, batch):
        model(input=batch)
        model(z)

    recalibrate(layer, [x], forward=forward)
    torch.testing.assert_close([layer.running_mean, layer.running_var], list(statistics(torch.cat((x, z)))))


def test_what_a_layers_own_hook_makes_of_its_input_counts():
    layer = nn.BatchNorm2d(2).double()
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    recalibrate(layer, [data(dtype=torch.float64)])
    mean, var = statistics(data(dtype=torch.float64) * 3)
    torch.testing.assert_close([layer.running_mean, layer.running_var], [mean, var])


def test_subclasses_and_sync_batch_norm_are_set():
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(BatchNormAct(2), nn.SyncBatchNorm(2)).double()
    x = data(dtype=torch.float64)
    recalibrate(model, [x])
    torch.testing.assert_close([model[0].running_mean, model[0].running_var], list(statistics(x)))
    assert model[1].running_mean.min() > 0.1


def test_half_statistics_stay_half():
    model = nn.BatchNorm2d(2).half()
    recalibrate(model, [data(dtype=torch.float16)])
    assert model.running_mean.dtype == torch.float16
    mean, _ = statistics(data(dtype=torch.float16))
    assert torch.equal(model.running_mean, mean.half())


@pytest.mark.contract("EM-3")
@on_every_method
def test_a_model_compiled_and_run_before_is_recalibrated(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, eager = net(method), net(method)
        compiled = torch.compile(model, backend="eager")
        for mode in (True, False):
            compiled.train(mode)
            eager.train(mode)
            compiled(data())
            torch.manual_seed(0)
        eager.train()(data())
        eager.eval()
        recalibrate(compiled, data().split(4))
        recalibrate(eager, data().split(4))
    assert equal(running(model), running(eager))


@pytest.mark.contract("EM-2", "EM-3")
@pytest.mark.parametrize("use_buffers", [False, True])
@on_every_method
def test_averaged_weights_get_their_own_statistics(method, use_buffers):
    model = net(method)
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data().split(2):
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    alone = net(method, trained=False)
    for a, b in zip(alone.parameters(), averaged.module.parameters(), strict=True):
        a.data.copy_(b.data)
    alone.conv2.load_state_dict(averaged.module.conv2.state_dict())
    for m in (averaged, alone):
        recalibrate(m, data().split(4))
    assert equal(running(averaged.module), running(alone))


def statistics_of_part(rank, parts):
    model = net("memorized", torch.float64)
    recalibrate(model, parts[rank], process_group=torch.distributed.group.WORLD)
    return [t.tolist() for t in running(model)]


@pytest.mark.contract("EM-3")
def test_processes_with_unequal_parts_agree_on_the_statistics_of_the_whole(two_ranks):
    x = data(dtype=torch.float64)
    first, second = two_ranks(statistics_of_part, [list(x[:7].split(3)), [x[7:]]])
    assert first == second
    want = [t.tolist() for t in statistics(x)]
    torch.testing.assert_close(first[:2], want)
