"""Real runs of Lightning's Trainer, bit for bit those of a loop by hand."""

import contextlib
import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mbnorm import DoubleForward, MomentumSchedule, convert

with warnings.catch_warnings():
    # its dependencies', at import
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install lightning")
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy

    from mbnorm.integrations.lightning import BatchNormMemory
    from mbnorm.integrations.lightning_sync import MemorySyncBatchNorm

pytestmark = [
    # of data on fewer workers than there are cores, and fewer batches than steps between logs
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning's own, of torch's pytree
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.:FutureWarning"),
]

METHODS = {"momentum": {"batch_size": 2}, "matched": {}, "memorized": {"memory_size": 6}}
on_every_method = pytest.mark.parametrize("method", METHODS)
EPOCHS = 3


def net(method, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 4)
    ).to(dtype)
    model.append(nn.BatchNorm1d(4, dtype=dtype))
    if method is not None:
        convert(model, method, **METHODS[method])
    return model


def data(rank=0, m=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1 + rank)
    return [
        (torch.randn(m, 2, 6, 6, generator=generator, dtype=dtype), torch.arange(m) % 4) for _ in range(7)
    ]


class Classifier(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class CallsItsNet(Classifier):
    forward = lightning.LightningModule.forward

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def trainer(tmp_path, **options):
    return lightning.Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def callback(method, **options):
    schedule = {"batch_size": 2} if method == "momentum" else None
    return BatchNormMemory(**{"double_forward": True, "schedule": schedule, **options})


def train_by_hand(model, method, batches, *, accumulate=1, clip=None, autocast=False, wrapper=None):
    """What the Trainer does, without it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    called = wrapper or model
    DoubleForward(model, optimizer)
    if method == "momentum":
        steps = EPOCHS * -(-len(batches) // accumulate)
        MomentumSchedule(model, steps, batch_size=2).follow(optimizer)
    for _ in range(EPOCHS):
        # which draws from the random stream, too
        for i, (x, y) in enumerate(loader(batches), start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(called(x), y)
            (loss / accumulate).backward()
            if i % accumulate == 0 or i == len(batches):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()


def assert_same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


SETTINGS = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipping": ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "bfloat16": ({"precision": "bf16-mixed"}, {"autocast": True}),
}


@on_every_method
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_fit_is_the_loop_by_hand(method, setting, tmp_path):
    options, by_hand = SETTINGS[setting]
    model, twin = net(method), net(method)
    torch.manual_seed(1)
    trainer(tmp_path, callbacks=[callback(method)], **options).fit(Classifier(model), loader(data()))
    torch.manual_seed(1)
    train_by_hand(twin, method, data(), **by_hand)
    assert_same(model, twin)


@on_every_method
def test_a_net_that_training_step_calls_itself_is_named(method, tmp_path):
    model, twin = net(method), net(method)
    torch.manual_seed(1)
    fit = trainer(tmp_path, callbacks=[callback(method, module="net")])
    fit.fit(CallsItsNet(model), loader(data()))
    torch.manual_seed(1)
    train_by_hand(twin, method, data())
    assert_same(model, twin)


def test_a_module_that_is_never_called_is_told_of(tmp_path):
    module = CallsItsNet(net("matched"))
    with pytest.warns(UserWarning, match="refreshes nothing: it has seen no training forward of its model"):
        trainer(tmp_path, callbacks=[callback("matched")], max_epochs=1).fit(module, loader(data()))


class Siamese(Classifier):
    def training_step(self, batch, _):
        x, _ = batch
        return (self(x) - self(-x)).square().mean()


@on_every_method
def test_all_forwards_of_a_training_step_are_refreshed(method, tmp_path):
    model = net(method)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    trainer(tmp_path, callbacks=[callback(method)], max_epochs=1).fit(Siamese(model), loader(data()[:1]))
    x = data()[0][0]
    assert all(torch.equal(a, b) for a, b in zip(calls, [x, -x, x, -x], strict=True))
    assert int(model[1].num_batches_tracked) == 2


class StopsAfter(lightning.Callback):
    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@on_every_method
def test_a_resumed_fit_is_the_one_that_never_stopped(method, tmp_path):
    path = tmp_path / "stopped.ckpt"
    # refreshed each second step, and stopped after an odd number of them
    whole, first, second = (net(method) for _ in range(3))
    options = {"double_forward": 2}
    for model in (whole, first, second):
        model[3].p = 0.0
    trainer(tmp_path, callbacks=[callback(method, **options)]).fit(Classifier(whole), loader(data()))
    stopped = trainer(tmp_path, callbacks=[callback(method, **options), StopsAfter(7, path)])
    stopped.fit(Classifier(first), loader(data()))
    assert stopped.global_step == 7
    resumed = trainer(tmp_path, callbacks=[callback(method, **options)])
    resumed.fit(Classifier(second), loader(data()), ckpt_path=path)
    assert resumed.global_step == 7 * EPOCHS
    assert_same(second, whole)


class Overflows(Classifier):
    def training_step(self, batch, i):
        loss = super().training_step(batch, i)
        return loss * (float("inf") if i == 3 else 1.0)


@on_every_method
def test_a_step_that_the_scaler_skips_refreshes_nothing(method, tmp_path):
    model = net(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    ours = callback(method)
    fit = trainer(
        tmp_path,
        callbacks=[ours],
        max_epochs=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )
    fit.fit(Overflows(model), loader(data()))
    assert scaler.get_scale() == 4.0
    # the next step has both batches to refresh
    assert forwards == [True, False] * 3 + [True] + [True, False, False] + [True, False] * 2
    if method == "momentum":
        assert ours.state_dict()["schedule"] == {"t": 1 + 6}


@on_every_method
def test_swa_ends_with_the_mean_of_the_raw_statistics(method, tmp_path):
    model = net(method)
    raw = []

    def note(module, args):
        if module.momentum is None:
            raw.append(torch.var_mean(args[0].detach(), (0, 2, 3)))

    model[1].register_forward_pre_hook(note)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    with warnings.catch_warnings():
        # Lightning steps the schedule of its own learning rates twice
        warnings.simplefilter("ignore")
        fit = trainer(tmp_path, callbacks=[callback(method), swa], max_epochs=4)
        fit.fit(Classifier(model), loader(data()))
    # more than the memory holds, and no second forward although Lightning 2.6 ends this pass with a step
    assert len(raw) == len(data())
    torch.testing.assert_close(model[1].running_mean, torch.stack([m for _, m in raw]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([v for v, _ in raw]).mean(0))


class Fails(Classifier):
    def training_step(self, batch, i):
        raise RuntimeError("out of luck")


@pytest.mark.parametrize("kind", [Classifier, Fails])
def test_nothing_stays_attached_after_a_fit_that_ends_or_fails(kind, tmp_path):
    module = kind(net("matched"))
    fit = trainer(tmp_path, callbacks=[callback("matched")], max_epochs=1)
    with pytest.raises(RuntimeError, match="luck") if kind is Fails else contextlib.nullcontext():
        fit.fit(module, loader(data()))
    assert not module._forward_pre_hooks
    assert not fit.optimizers[0]._optimizer_step_post_hooks


class TwoOptimizers(Classifier):
    automatic_optimization = False

    def __init__(self, model):
        super().__init__(model)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


def test_several_optimizers_are_refused(tmp_path):
    fit = trainer(tmp_path, callbacks=[callback("matched")])
    with pytest.raises(ValueError, match="needs one optimizer, got 2: give each net its own"):
        fit.fit(TwoOptimizers(net("matched")), loader(data()))


def test_a_schedule_needs_an_end(tmp_path):
    fit = trainer(tmp_path, callbacks=[callback("momentum")], max_epochs=-1)
    with pytest.raises(ValueError, match="knows no last step: add total_steps"):
        fit.fit(Classifier(net("momentum")), loader(data()))


def test_a_callback_with_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="nothing to attach"):
        BatchNormMemory()


class Started(LightningEnvironment):
    """Two processes that share a group already, as under torchrun."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    creates_processes_externally = property(lambda self: True)

    def local_rank(self):
        return self.rank

    def global_rank(self):
        return self.rank

    def world_size(self):
        return 2


def ddp_trainer(rank, tmp_path, **options):
    strategy = DDPStrategy(cluster_environment=Started(rank), process_group_backend="gloo")
    return trainer(tmp_path, strategy=strategy, devices=2, use_distributed_sampler=False, **options)


def check_ddp(rank, method, module, tmp_path):
    model, twin = net(method), net(method)
    torch.manual_seed(1)
    kind = CallsItsNet if module else Classifier
    fit = ddp_trainer(rank, tmp_path, callbacks=[callback(method, module=module)])
    fit.fit(kind(model), loader(data(rank)))
    torch.manual_seed(1)
    train_by_hand(twin, method, data(rank), wrapper=DistributedDataParallel(twin))
    assert_same(model, twin)


@on_every_method
@pytest.mark.parametrize("module", ["", "net"])
def test_a_fit_on_two_ranks_is_the_loop_by_hand(method, module, two_ranks, tmp_path):
    two_ranks(check_ddp, method, module, tmp_path)


def check_sync(rank, method, tmp_path):
    # dropout draws differently on parts
    model = net(method, torch.float64)
    model[3].p = 0.0
    twin = copy.deepcopy(model)
    whole = data(m=4, dtype=torch.float64)
    part = [(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]) for x, y in whole]
    fit = ddp_trainer(
        rank,
        tmp_path,
        callbacks=[callback(method)],
        sync_batchnorm=True,
        plugins=[MemorySyncBatchNorm()],
    )
    fit.fit(Classifier(model), loader(part))
    train_by_hand(twin, method, whole)
    # in units of a rank's loss, of which DDP takes the mean
    want = {n: 2 * t if ".gradient_" in n else t for n, t in twin.state_dict().items()}
    torch.testing.assert_close(dict(model.state_dict()), want, rtol=1e-9, atol=1e-12)
    assert [type(m) for m in model] == [type(m) for m in twin]
    assert model[1].process_group is None


@on_every_method
def test_sync_batchnorm_on_two_ranks_is_one_process_with_the_whole_batch(method, two_ranks, tmp_path):
    two_ranks(check_sync, method, tmp_path)


def test_the_sync_plugin_shares_ours_as_asked_and_replaces_the_rest():
    model = nn.ModuleDict({"ours": net("memorized"), "stock": net(None)})
    model["ours"][6].share_with("world")
    plugin = MemorySyncBatchNorm("late")
    applied = plugin.apply(model)
    assert applied is model
    assert [(m.process_group, m.sync) for m in (model["ours"][1], model["ours"][6])] == [
        ("world", "late"),
        ("world", True),
    ]
    assert [type(model["stock"][i]) for i in (1, 6)] == [nn.SyncBatchNorm] * 2
    plugin.revert(model)
    assert [m.process_group for m in (model["ours"][1], model["ours"][6])] == [None, "world"]
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


FORKED = """
import sys, warnings

warnings.simplefilter("ignore")
import lightning.pytorch as lightning
import torch
from torch import nn

from mbnorm import convert
from mbnorm.integrations.lightning import BatchNormMemory
from mbnorm.integrations.lightning_sync import MemorySyncBatchNorm


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        convert(self.net, "memorized", memory_size=3)

    def training_step(self, batch, number):
        return self.net(batch + self.global_rank).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_end(self):
        torch.save(self.net.state_dict(), f"{sys.argv[1]}/rank{self.global_rank}.pt")


torch.set_num_threads(1)
lightning.Trainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp_fork", sync_batchnorm=True,
    plugins=[MemorySyncBatchNorm()], callbacks=[BatchNormMemory(module="net", double_forward=True)],
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    use_distributed_sampler=False,
).fit(Net(), torch.utils.data.DataLoader(torch.randn(10, 4), batch_size=2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_ranks_share_their_memories(tmp_path):
    # a process of its own: this one has threads, which a fork would lose
    loopback = {**os.environ, **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})}
    subprocess.run(
        [sys.executable, "-c", FORKED, tmp_path], check=True, timeout=300, cwd=tmp_path, env=loopback
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert int(first["1.num_batches_tracked"]) == 10
