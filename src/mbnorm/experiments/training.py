"""One run: a net trained from a seed, then measured."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbnorm import DoubleForward, no_update
from mbnorm.experiments.data import Digits, digits, one_epoch
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.methods import (
    DOUBLE_FORWARD,
    OURS,
    after_training,
    batches_a_step,
    before_training,
    schedule_for,
    set_method,
)
from mbnorm.experiments.models import build

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
RATE_DROPS = (0.6, 0.85)
FIRST_FORWARD = 2
"""Images that memories are started with, by a forward before training, where batches have one image."""

Status: TypeAlias = Literal["ok", "diverged", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: accuracy in percent, mean losses; None is what is missing or not finite."""

    status: Status
    seconds: float
    error: str | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    train_mode_loss: float | None = None
    eval_mode_loss: float | None = None


def train(run: Run, accelerator: str = "cpu") -> Outcome:
    """Train and measure one run; the same run gives the same outcome, whatever ran before.

    A ValueError, which is how torch's batch norm refuses single values, is an outcome too: "failed".
    """
    start = time.perf_counter()
    try:
        model, data, train_loss = _fit(run, accelerator)
    except ValueError as error:
        return Outcome("failed", _seconds_since(start), error=str(error).partition("\n")[0])
    in_train_mode = train_mode_loss(model, data, run.setting)
    model.eval()
    with torch.no_grad():
        eval_mode_loss = F.cross_entropy(model(data.train_images), data.train_classes)
        right = model(data.test_images).argmax(1) == data.test_classes
    return Outcome(
        "ok" if math.isfinite(train_loss) else "diverged",
        _seconds_since(start),
        accuracy=100 * right.float().mean().item(),
        train_loss=_finite(train_loss),
        train_mode_loss=_finite(in_train_mode),
        eval_mode_loss=_finite(eval_mode_loss.item()),
    )


def _fit(run: Run, accelerator: str) -> tuple[nn.Module, Digits, float]:
    """Return the trained net, the digits it was trained on, and the mean loss of the last epoch."""
    # takes seconds, and the process that hands out the runs never trains
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=accelerator, devices=1)
    data = digits().to(fabric.device)
    setting = run.setting
    model = initial_model(run)
    accumulated = batches_a_step(run.method, setting.batch_size)
    plain_optimizer = torch.optim.SGD(
        model.parameters(),
        lr=setting.lr * accumulated,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    if run.method in DOUBLE_FORWARD:
        DoubleForward(model, plain_optimizer)
    net, optimizer = fabric.setup(model, plain_optimizer)

    before_training(run.method, model, data.train_images)
    if setting.batch_size == 1 and run.method in OURS:
        # a single value has no variance: there must be a past to blend it with
        with torch.no_grad():
            model.train()(data.train_images[:FIRST_FORWARD])

    draws = torch.Generator().manual_seed(run.seed)
    epochs = [
        one_epoch(setting.sampling, digits().train_classes, setting.batch_size, draws)
        for _ in range(setting.epochs)
    ]
    total_steps = sum(len(batches) for batches in epochs)
    drops = {int(share * total_steps) for share in RATE_DROPS}
    schedule = schedule_for(run.method, model, total_steps, setting.batch_size)
    step = 0
    for batches in epochs:
        epoch_loss = torch.zeros((), device=fabric.device)
        for images, classes in _gathered(data, batches):
            if step in drops:
                for group in plain_optimizer.param_groups:
                    group["lr"] *= 0.1
            loss = F.cross_entropy(net(images), classes)
            fabric.backward(loss / accumulated)
            epoch_loss += loss.detach()
            step += 1
            if step % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()
                if schedule is not None:
                    schedule.step()
    after_training(run.method, model, data.train_images)
    return model, data, epoch_loss.item() / len(batches)


def initial_model(run: Run) -> nn.Module:
    """Return the net of a run before training; for a seed all methods have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = build(run.setting.model)
    set_method(model, run.method, run.setting.batch_size)
    return model


def _gathered(data: Digits, batches: Tensor) -> "zip[tuple[Any, ...]]":
    # one gather an epoch instead of two a step
    return zip(data.train_images[batches], data.train_classes[batches], strict=True)


def train_mode_loss(model: nn.Module, data: Digits, setting: Setting) -> float:
    """Return the mean loss over training batches in train mode, with memories read but never written."""
    # torch's own batch norm would move its running statistics
    model = copy.deepcopy(model).train()
    draws = torch.Generator().manual_seed(0)
    batches = one_epoch(setting.sampling, data.train_classes.cpu(), setting.batch_size, draws)
    with torch.no_grad(), no_update(model):
        losses = [F.cross_entropy(model(images), classes) for images, classes in _gathered(data, batches)]
    return torch.stack(losses).mean().item()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 2)
