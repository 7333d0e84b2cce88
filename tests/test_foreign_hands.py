"""What tools outside do to a batch norm: one test a row of the table of foreign hands."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import make_input
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from mbnorm import DoubleForward, MomentumSchedule, convert, no_update, revert

METHODS = {
    "momentum": ("momentum", {"history_weight": 0.75}),
    "matched": ("matched", {}),
    "matched, plain": ("matched", {"measured": False}),
    "memorized": ("memorized", {"memory_size": 4}),
    "memorized-ema": ("memorized", {"memory_size": 4, "inference": "ema"}),
}
on_every_method = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def nets(method):
    """A stock net and its converted copy."""
    torch.manual_seed(0)
    stock = Net()
    model = copy.deepcopy(stock)
    name, options = METHODS[method]
    convert(model, name, **options)
    # the same filters, which may be centered
    stock.load_state_dict({n: t for n, t in model.state_dict().items() if n in stock.state_dict()})
    return stock, model


def batches(count=6, m=3):
    return [make_input((m, 2, 6, 6), torch.float32, seed=s) for s in range(count)]


def norms(model):
    return [model.bn1, model.bn2]


def state_of(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def same(model, state):
    return all(torch.equal(b, state[n]) for n, b in model.named_buffers())


def train(model, xs, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def disable_running_stats(model):
    """The recipe that goes around with SAM."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.backup_momentum = module.momentum
            module.momentum = 0


def enable_running_stats(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and hasattr(module, "backup_momentum"):
            module.momentum = module.backup_momentum


class SAM:
    """Sharpness-aware minimization around a base optimizer."""

    def __init__(self, base, rho=0.05):
        self.base, self.rho = base, rho

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.base.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        self.moves = [(p, p.grad * self.rho / (norm + 1e-12)) for p in parameters]
        for p, move in self.moves:
            p.add_(move)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, move in self.moves:
            p.sub_(move)
        self.base.step()
        self.base.zero_grad()


def sam_step(model, sam, x, second):
    model(x).square().mean().backward()
    sam.first_step()
    second(model, x)
    sam.second_step()


def second_by_momentum(model, x):
    disable_running_stats(model)
    model(x).square().mean().backward()
    enable_running_stats(model)


def second_by_no_update(model, x):
    with no_update(model):
        model(x).square().mean().backward()


@pytest.mark.contract("A2", "DF-6")
@pytest.mark.parametrize("second", [second_by_momentum, second_by_no_update])
@on_every_method
def test_sam_leaves_the_memory_at_perturbed_weights_alone(method, second):
    _, model = nets(method)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.05))
    for count, x in enumerate(batches(), start=1):
        sam_step(model, sam, x, second)
        assert [int(n.num_batches_tracked) for n in norms(model)] == [count, count]
        assert all(n.momentum == 0.1 for n in norms(model))


@pytest.mark.contract("DF-6")
@pytest.mark.parametrize("second", [second_by_momentum, second_by_no_update])
@on_every_method
def test_sam_with_double_forward_refreshes_once_after_the_second_step(method, second):
    _, model = nets(method)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    DoubleForward(model, base)
    by_hand = copy.deepcopy(model)
    double_forward = DoubleForward(by_hand)
    sams = SAM(base), SAM(torch.optim.SGD(by_hand.parameters(), lr=0.05))
    for x in batches():
        sam_step(model, sams[0], x, second)
        sam_step(by_hand, sams[1], x, second)
        double_forward.refresh()
        assert same(model, state_of(by_hand))


@pytest.mark.contract("A2", "EM-1")
@on_every_method
def test_update_bn_leaves_what_it_leaves_in_a_stock_norm(method):
    stock, model = nets(method)
    train(model, batches())
    loader = batches(8)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if k in stock.state_dict()})
    for net in (stock, model):
        update_bn(loader, net)
    torch.testing.assert_close(model.bn1.running_mean, stock.bn1.running_mean)
    torch.testing.assert_close(model.bn1.running_var, stock.bn1.running_var)
    assert [n.momentum for n in norms(model)] == [0.1, 0.1]
    assert int(model.bn1.num_batches_tracked) == 8


@pytest.mark.contract("A2", "EM-1")
@on_every_method
def test_precise_bn_finds_the_raw_batch_statistics(method):
    with warnings.catch_warnings():
        # its dependencies', at import
        warnings.simplefilter("ignore")
        precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    stock, model = nets(method)
    loader = batches(8)
    for net in (stock, model):
        precise_bn.update_bn_stats(net, loader, num_iters=8, progress=None)
    torch.testing.assert_close(model.bn1.running_mean, stock.bn1.running_mean)
    torch.testing.assert_close(model.bn1.running_var, stock.bn1.running_var)
    # it puts new tensors in place of the buffers: training goes on with them
    train(model, batches())
    assert torch.isfinite(model.eval()(loader[0])).all()


@pytest.mark.contract("A2")
@on_every_method
def test_lightning_swa_ends_with_the_mean_of_the_raw_statistics(method, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")
    _, model = nets(method)
    raw = []

    def note(module, args):
        if module.momentum is None:
            raw.append(torch.var_mean(args[0].detach(), (0, 2, 3)))

    model.bn1.register_forward_pre_hook(note)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, _):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    loader = batches(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)],
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(loader, batch_size=None))
    assert len(raw) >= len(loader)
    torch.testing.assert_close(model.bn1.running_mean, torch.stack([m for _, m in raw]).mean(0))
    torch.testing.assert_close(model.bn1.running_var, torch.stack([v for v, _ in raw]).mean(0))
    assert [n.momentum for n in norms(model)] == [0.1, 0.1]


@pytest.mark.contract("A4")
@on_every_method
def test_lightning_finetuning_stops_the_writes_of_frozen_norms(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")
    _, model = nets(method)
    train(model, batches())
    lightning.callbacks.BaseFinetuning.freeze(model, train_bn=False)
    before = state_of(model)
    with torch.no_grad():
        model(batches(1)[0])
    assert same(model, before)


@pytest.mark.contract("A4")
@on_every_method
def test_freeze_bn_freezes_and_double_forward_skips_it(method):
    _, model = nets(method)
    train(model, batches())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DoubleForward(model, optimizer)
    before = state_of(model)
    model(batches(1)[0]).square().mean().backward()
    optimizer.step()
    assert same(model, before)


@pytest.mark.contract("CV-7")
@on_every_method
def test_conversion_to_sync_batch_norm_is_named(method):
    _, model = nets(method)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="convert_sync_batchnorm"):
        DoubleForward(model, optimizer)
    with pytest.raises(ValueError, match="convert_sync_batchnorm"):
        MomentumSchedule(model, 10, batch_size=2)


AVERAGES = pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])


@pytest.mark.contract("EM-2")
@pytest.mark.parametrize("use_buffers", [False, True])
@AVERAGES
@on_every_method
def test_averaged_models_evaluate_as_averages_of_stock_models(method, average, use_buffers):
    stock, model = nets(method)
    options = {"use_buffers": use_buffers, "multi_avg_fn": average}
    averaged, averaged_stock = AveragedModel(model, **options), AveragedModel(stock, **options)
    for x in batches(12):
        train(model, [x])
        averaged.update_parameters(model)
        stock.load_state_dict({k: v for k, v in model.state_dict().items() if k in stock.state_dict()})
        averaged_stock.update_parameters(stock)
    x = batches(1)[0]
    torch.testing.assert_close(averaged.eval()(x), averaged_stock.eval()(x))


@torch.no_grad()
def copy_into_each(average, model, decay):
    """What timm's ModelEmaV2 does: blend every entry of the state_dict, whole numbers too."""
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for mine, theirs in pairs:
        mine.copy_(decay * mine + (1 - decay) * theirs)


@torch.no_grad()
def lerp_floats(average, model, decay):
    """What timm's ModelEmaV3 does: lerp what is floating point, copy the rest."""
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for mine, theirs in pairs:
        if mine.is_floating_point():
            mine.lerp_(theirs, 1 - decay)
        else:
            mine.copy_(theirs)


@torch.no_grad()
def scale_floats_alone(average, model, decay):
    """What ultralytics' ModelEMA does: scale and add in what is floating point, leave the rest."""
    theirs = model.state_dict()
    for name, mine in average.state_dict().items():
        if mine.is_floating_point():
            mine.mul_(decay).add_((1 - decay) * theirs[name])


UPDATES = pytest.mark.parametrize("update", [copy_into_each, lerp_floats, scale_floats_alone])


@pytest.mark.contract("EM-2")
@UPDATES
@on_every_method
def test_other_ema_codes_evaluate_as_averages_of_stock_models(method, update):
    stock, model = nets(method)
    average, average_stock = copy.deepcopy(model).eval(), copy.deepcopy(stock).eval()
    for x in batches(12):
        train(model, [x])
        update(average, model, 0.9)
        stock.load_state_dict({k: v for k, v in model.state_dict().items() if k in stock.state_dict()})
        update(average_stock, stock, 0.9)
    x = batches(1)[0]
    torch.testing.assert_close(average(x), average_stock(x))
    # also where its weights go on to another place
    reloaded = nets(method)[1]
    reloaded.load_state_dict(average.state_dict())
    assert torch.equal(reloaded.eval()(x), average(x))


@pytest.mark.contract("EM-2")
@UPDATES
@on_every_method
def test_what_other_ema_codes_leave_in_the_memory_can_train_on(method, update):
    _, model = nets(method)
    average = copy.deepcopy(model)
    for x in batches(12):
        train(model, [x], lr=0.001)
        update(average, model, 0.9)
    past = average.bn1.read(100, 100)
    weight = torch.as_tensor(past.batch_weight)
    assert 0 < weight <= 1
    assert past.var.min() > 0
    train(average, batches(6))
    assert all(torch.isfinite(t).all() for t in average.state_dict().values())


@pytest.mark.contract("EM-2")
@AVERAGES
@on_every_method
def test_averaged_models_train_on_from_where_they_evaluate(method, average):
    _, model = nets(method)
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=average)
    for _ in range(10):
        for x in batches(6):
            train(model, [x], lr=0.001)
            averaged.update_parameters(model)
    past = averaged.module.bn1.read(1000, 1000)
    spread = averaged.module.bn1.running_var.sqrt()
    assert ((past.mean - averaged.module.bn1.running_mean).abs() < spread).all()
    assert all(torch.isfinite(averaged(x)).all() for x in batches(6))


@pytest.mark.contract("EM-2")
def test_an_average_of_seeded_and_real_entries_has_no_negative_weight():
    _, model = nets("memorized")
    for n in norms(model):
        n.seed()
    averaged = AveragedModel(model, use_buffers=True)
    for x in batches(2):
        model(x)
        averaged.update_parameters(model)
    past = averaged.module.bn1.read(100, 100)
    assert 0 < past.batch_weight < 1
    assert past.var.min() > 0


@pytest.mark.contract("A4")
@on_every_method
def test_replace_all_batch_norm_modules_leaves_batch_statistics(method):
    stock, model = nets(method)
    for net in (stock, model):
        torch.func.replace_all_batch_norm_modules_(net)
    x = batches(1)[0]
    torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(model.eval()(x), stock.eval()(x))


@pytest.mark.contract("AM-2")
@on_every_method
def test_half_and_back_keeps_the_statistics(method):
    _, model = nets(method)
    train(model, batches())
    before = state_of(model)
    model.half().float()
    assert same(model, before)


@pytest.mark.contract("DD-2")
@on_every_method
def test_buffers_overwritten_between_forwards_do_not_break_the_backward(method):
    _, model = nets(method)
    other = copy.deepcopy(model)
    loss = 0.0
    for x in batches():
        with torch.no_grad():
            # as DistributedDataParallel does with rank 0's before each forward
            for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
                mine.copy_(theirs)
        loss = loss + model(x).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.contract("TC-5")
@on_every_method
def test_extra_training_forwards_can_be_undone(method):
    _, model = nets(method)
    train(model, batches())
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for x in batches(9):
            model(x)
    model.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


@pytest.mark.contract("FT-5")
@on_every_method
def test_parameter_filters_find_the_norms(method):
    stock, model = nets(method)

    def no_decay(net):
        by_type = [id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        return [n for n, p in net.named_parameters() if id(p) in by_type or "bn" in n]

    assert no_decay(model) == no_decay(stock) != []


@pytest.mark.contract("CV-6")
@on_every_method
def test_exact_type_checks_find_reverted_norms(method):
    _, model = nets(method)
    assert [type(m) is nn.BatchNorm2d for m in norms(model)] == [False, False]
    revert(model)
    assert [type(m) is nn.BatchNorm2d for m in norms(model)] == [True, True]


@pytest.mark.contract("EX-1")
@on_every_method
def test_fuse_conv_bn_eval(method):
    _, model = nets(method)
    train(model, batches())
    model.eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(model.conv1, model.bn1)
    x = batches(1)[0]
    torch.testing.assert_close(fused(x), model.bn1(model.conv1(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.contract("A4")
@on_every_method
def test_functional_call_writes_into_the_given_buffers_alone(method):
    _, model = nets(method)
    train(model, batches())
    before = state_of(model)
    given = {n: b.clone() for n, b in model.named_buffers()}
    x = batches(1)[0]
    y = torch.func.functional_call(model, (dict(model.named_parameters()), given), x)
    assert same(model, before)
    assert not torch.equal(given["bn1.running_mean"], before["bn1.running_mean"])
    assert torch.equal(model(x), y)
    assert same(model, given)


@pytest.mark.contract("A4")
@on_every_method
def test_vmap_in_eval_mode(method):
    _, model = nets(method)
    train(model, batches())
    model.eval()
    x = torch.stack(batches(3))
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(b) for b in x]))


@pytest.mark.contract("ST-7")
@on_every_method
def test_deepcopy_and_pickle_after_training(method):
    _, model = nets(method)
    train(model, batches())
    x = batches(1)[0]
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    want = model(x)
    for twin in twins:
        assert torch.equal(twin(x), want)
        assert same(twin, state_of(model))


@pytest.mark.contract("ST-7")
@on_every_method
def test_torch_save_of_the_whole_model(method, tmp_path):
    _, model = nets(method)
    train(model, batches())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(batches(1)[0]), model(batches(1)[0]))


@pytest.mark.contract("ST-7")
@on_every_method
def test_share_memory_shares_the_state(method):
    _, model = nets(method)
    model.share_memory()
    assert all(b.is_shared() for b in model.buffers())
    train(model, batches())
    assert all(b.is_shared() for b in model.buffers())


@pytest.mark.contract("ST-7")
@on_every_method
def test_meta_device_and_back(method):
    name, options = METHODS[method]
    with torch.device("meta"):
        model = Net()
    convert(model, name, center_filters=False, **options)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    twin = Net()
    convert(twin, name, center_filters=False, **options)
    twin.load_state_dict(model.state_dict())
    for x in batches():
        assert torch.equal(model(x), twin(x))


@pytest.mark.contract("A9")
@on_every_method
def test_deterministic_algorithms_mode(method):
    _, model = nets(method)
    _, twin = nets(method)
    train(twin, batches())
    torch.use_deterministic_algorithms(True)
    try:
        train(model, batches())
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(model, state_of(twin))


def test_a_schedule_of_ones_own_fills_the_history_weight_in_place():
    layer = nn.BatchNorm1d(3)
    convert(layer, "momentum")
    x = make_input((4, 3), torch.float32)
    layer.history_weight.fill_(0.5)
    # no warning that it would be plain batch norm
    layer(x)
    mean = layer.memory_mean.clone()
    layer(x + 1)
    torch.testing.assert_close(layer.memory_mean, mean + 0.5)


@pytest.mark.contract("A2")
@pytest.mark.parametrize(
    ("method", "options"), [("momentum", {"history_weight": 0.5}), ("memorized", {"memory_size": 1})]
)
def test_momentum_changed_while_training_is_read_at_each_forward(method, options):
    # settings in which the running mean is torch's own
    stock = nn.BatchNorm1d(3)
    layer = copy.deepcopy(stock)
    convert(layer, method, **options)
    for momentum, seed in zip([0.5, 0.1, 0.01, 0.5], range(4), strict=True):
        stock.momentum = layer.momentum = momentum
        for norm in (stock, layer):
            norm(make_input((4, 3), torch.float32, seed=seed))
    torch.testing.assert_close(layer.running_mean, stock.running_mean)
