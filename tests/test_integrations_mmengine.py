"""Runs of mmengine's Runner, bit for bit those of a loop by hand, and the layers as mmcv builds them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mbnorm import (
    DoubleForward,
    MatchedBatchNorm2d,
    MemorizedBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumSchedule,
    convert,
)

with warnings.catch_warnings():
    # its dependencies', at import
    warnings.simplefilter("ignore")
    pytest.importorskip("mmengine.runner", reason="needs MMEngine: pip install mmengine")
    from mmengine.model import BaseModel
    from mmengine.registry import HOOKS, MODELS
    from mmengine.runner import Runner

    from mbnorm.integrations.mmengine import BatchNormMemoryHook, register

METHODS = {"momentum": {"batch_size": 2}, "matched": {}, "memorized": {"memory_size": 6}}
on_every_method = pytest.mark.parametrize("method", METHODS)
EPOCHS = 3


@pytest.fixture(autouse=True)
def mmengine_can_load_its_checkpoints(monkeypatch):
    # 0.10.7 writes more than weights, and leaves torch.load at its default, which reads weights alone
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


class Classifier(BaseModel):
    def __init__(self, method):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        convert(self, method, **METHODS[method])

    def forward(self, x, y, mode="tensor"):
        return {"loss": F.cross_entropy(self.net(x), y)} if mode == "loss" else self.net(x)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(2, 5, generator=generator), "y": torch.tensor([i % 4, (i + 1) % 4])}
        for i in range(7)
    ]


def hook(method, double_forward=True):
    steps = EPOCHS * 7
    schedule = {"batch_size": 2, "total_steps": steps} if method == "momentum" else None
    return BatchNormMemoryHook(double_forward=double_forward, schedule=schedule)


def run(model, tmp_path, hooks, wrapper="OptimWrapper", **options):
    with warnings.catch_warnings():
        # of mmengine's own loading, scheduling and logging
        warnings.simplefilter("ignore")
        runner = Runner(
            model=model,
            work_dir=str(tmp_path),
            train_dataloader=torch.utils.data.DataLoader(batches(), collate_fn=lambda items: items[0]),
            train_cfg={"by_epoch": True, "max_epochs": EPOCHS},
            optim_wrapper={
                "type": wrapper,
                "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9},
                **options.pop("optim", {}),
            },
            custom_hooks=hooks,
            default_hooks={"logger": None, "checkpoint": {"type": "CheckpointHook", "interval": 1}},
            default_scope="mmengine",
            experiment_name=f"{tmp_path.name}-{id(model)}",
            log_level="ERROR",
            **options,
        )
        runner.train()
    return runner


def assert_same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


@on_every_method
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_is_the_loop_by_hand(method, accumulate, tmp_path):
    model, twin = Classifier(method), Classifier(method)
    run(model, tmp_path, [hook(method)], optim={"accumulative_counts": accumulate})
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    DoubleForward(twin, optimizer)
    if method == "momentum":
        MomentumSchedule(twin, EPOCHS * 7, batch_size=2).follow(optimizer)
    for i, batch in enumerate(batches() * EPOCHS, start=1):
        (twin(**batch, mode="loss")["loss"] / accumulate).backward()
        # mmengine's windows go across epochs
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, twin)
    assert not model._forward_pre_hooks


@on_every_method
def test_a_resumed_run_is_the_one_that_never_stopped(method, tmp_path):
    whole, second = Classifier(method), Classifier(method)
    # each second of 7 steps an epoch
    run(whole, tmp_path / "whole", [hook(method, 2)])
    run(
        second,
        tmp_path / "second",
        [hook(method, 2)],
        load_from=str(tmp_path / "whole" / "epoch_1.pth"),
        resume=True,
    )
    assert_same(second, whole)


def test_weights_loaded_for_a_new_run_do_not_bring_the_old_ones_schedule(tmp_path):
    run(Classifier("momentum"), tmp_path / "old", [hook("momentum")])
    new = hook("momentum")
    start = []
    new.before_train_iter = lambda runner, *_, **__: start.append(new._attached["schedule"].t)
    run(Classifier("momentum"), tmp_path / "new", [new], load_from=str(tmp_path / "old" / "epoch_1.pth"))
    assert start[0] == 1


def test_a_hook_with_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="nothing to attach"):
        BatchNormMemoryHook()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"type": "MatchedBN"}, MatchedBatchNorm2d),
        ({"type": "MatchedBN2d", "matched_batch_size": 128}, MatchedBatchNorm2d),
        ({"type": "MomentumBN", "history_weight": 0.9}, MomentumBatchNorm2d),
        ({"type": "MomentumBN2d", "history_weight": 0.9}, MomentumBatchNorm2d),
        ({"type": "MemorizedBN1d", "memory_size": 64}, MemorizedBatchNorm1d),
    ],
)
def test_the_registry_has_the_layers_as_mmcv_builds_them(config, kind):
    register()
    register()
    # build_norm_layer: the class by its type, its abbreviation, the channels and the rest of norm_cfg
    config = dict(config)
    layer_type = MODELS.get(config.pop("type"))
    assert layer_type is kind
    assert layer_type._abbr_ == "bn"
    layer = layer_type(6, **config, eps=1e-5)
    assert layer.num_features == 6
    assert HOOKS.get("BatchNormMemoryHook") is BatchNormMemoryHook
