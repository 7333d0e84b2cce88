"""One run: a net trained from a seed, then measured."""

import copy
import math
import time
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from mbnorm import DoubleForward, no_update
from mbnorm.experiments.data import Parts, load
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.losses import LOSSES, Loss
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
from mbnorm.experiments.records import processor
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.scores import overlaps, share

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
RATE_DROPS = (0.6, 0.85)
FIRST_FORWARD = 2
"""Images that memories are started with, by a forward before training, where batches have one image."""
AT_ONCE = 100
"""Inputs that are forwarded at once in eval mode; the maps of more would not fit into caches."""

Status: TypeAlias = Literal["ok", "diverged", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: scores in percent, mean losses; None is what is missing or not finite.

    Even and odd test images by themselves are for choices on the one half that the other confirms.

    Attributes:
        status: "diverged" where the training loss is not finite, "failed" where torch refused the batches.
        seconds: of training and measuring.
        error: why a run failed.
        accuracy: share of the test images, or of their pixels, whose class is found.
        dice: where pixels have classes, the mean over all classes but the first of
            2 |found and true| / (|found| + |true|), over all test images.
        test_error: half the 95 % interval that comes of the choice of test images; of `dice` if there is one,
            else of `accuracy`.
        processor: of the machine that trained.
        date: of the day when the run ended.
    """

    status: Status
    seconds: float
    error: str | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    train_mode_loss: float | None = None
    eval_mode_loss: float | None = None
    even_accuracy: float | None = None
    odd_accuracy: float | None = None
    dice: float | None = None
    test_error: float | None = None
    processor: str | None = None
    date: str | None = None

    @property
    def score(self) -> float | None:
        """What methods are compared by: `dice` where pixels have classes, else `accuracy`."""
        return self.accuracy if self.dice is None else self.dice


def train(run: Run, accelerator: str = "cpu") -> Outcome:
    """Train and measure one run; the same run gives the same outcome, whatever ran before.

    A ValueError, which is how torch's batch norm refuses single values, is an outcome too: "failed".
    """
    start = time.perf_counter()
    data = load(run.setting.data)
    origin: dict[str, Any] = {"processor": processor(), "date": date.today().isoformat()}
    try:
        model = initial_model(run)
        train_loss = fit(model, run, data, accelerator)
    except ValueError as error:
        return Outcome("failed", _seconds_since(start), error=str(error).partition("\n")[0], **origin)
    data = data.to(next(model.parameters()).device)
    in_train_mode = train_mode_loss(model, data, run.setting)
    in_eval_mode = eval_mode_loss(model, data, run.setting.loss)
    scores: dict[str, Any] = measured(model, data)
    return Outcome(
        "ok" if math.isfinite(train_loss) else "diverged",
        _seconds_since(start),
        None,
        train_loss=_finite(train_loss),
        train_mode_loss=_finite(in_train_mode),
        eval_mode_loss=_finite(in_eval_mode),
        **scores,
        **origin,
    )


@torch.no_grad()
def measured(model: nn.Module, data: Data) -> dict[str, float]:
    """Return a trained net's scores on the test data by their names in `Outcome`, in eval mode."""
    found = classes_of(model.eval(), data.test_inputs)
    right = (found == data.test_targets).flatten(1 if data.per_pixel else 0).float()
    of_each = right.mean(1) if data.per_pixel else right
    scores = {
        "accuracy": 100 * of_each.mean().item(),
        "even_accuracy": 100 * of_each[::2].mean().item(),
        "odd_accuracy": 100 * of_each[1::2].mean().item(),
    }
    if not data.per_pixel:
        return scores | {"test_error": share(of_each[:, None], torch.ones_like(of_each)[:, None])[1]}
    dice, error = share(*overlaps(found, data.test_targets, data.classes))
    return scores | {"dice": dice, "test_error": error}


def fit(model: nn.Module, run: Run, data: Data, accelerator: str = "cpu") -> float:
    """Train a net in place, and return the mean loss of the last epoch.

    Args:
        model: a net with the layers of the run's method.
        run: how to train; its seed decides the order of the inputs.
        data: what to train on.
        accelerator: where to train, and where the net is left.
    """
    # takes seconds, and the process that hands out the runs never trains
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=accelerator, devices=1)
    setting = run.setting
    targets = data.train_targets
    data = data.to(fabric.device)
    loss_of = LOSSES[setting.loss]
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

    before_training(run.method, model, data.train_inputs)
    if setting.batch_size == 1 and run.method in OURS:
        # a single value has no variance: there must be a past to blend it with
        with torch.no_grad():
            model.train()(data.train_inputs[:FIRST_FORWARD])

    draws = torch.Generator().manual_seed(run.seed)
    epochs = [one_epoch(setting.sampling, targets, setting.batch_size, draws) for _ in range(setting.epochs)]
    total_steps = sum(len(batches) for batches in epochs)
    drops = {int(part * total_steps) for part in RATE_DROPS}
    schedule = schedule_for(run.method, model, total_steps, setting.batch_size)
    step = 0
    model.train()
    for batches in epochs:
        epoch_loss = torch.zeros((), device=fabric.device)
        for inputs, classes in _gathered(data, batches):
            if step in drops:
                for group in plain_optimizer.param_groups:
                    group["lr"] *= 0.1
            loss = loss_of(net(inputs), classes)
            fabric.backward(loss / accumulated)
            epoch_loss += loss.detach()
            step += 1
            if step % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()
                if schedule is not None:
                    schedule.step()
    after_training(run.method, model, data.train_inputs)
    return epoch_loss.item() / len(batches)


def initial_model(run: Run) -> nn.Module:
    """Return the net of a run before training."""
    return net_for(run, load(run.setting.data))


def net_for(run: Run, data: Data | Parts) -> nn.Module:
    """Return an untrained net for these data; for a seed all methods have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = build(run.setting.model, data)
    set_method(model, run.method, run.setting.batch_size, data.shape)
    return model


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits of all inputs, computed in parts that fit into memory."""
    return torch.cat([model(part) for part in torch.split(inputs, AT_ONCE)])


def classes_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the class that is found for each input or pixel."""
    return torch.cat([model(part).argmax(1) for part in torch.split(inputs, AT_ONCE)])


@torch.no_grad()
def eval_mode_loss(model: nn.Module, data: Data, loss: Loss = "cross-entropy") -> float:
    """Return the loss on the training inputs in eval mode, which the model is left in."""
    logits = logits_of(model.eval(), data.train_inputs)
    return LOSSES[loss](logits, data.train_targets).item()


def _gathered(data: Data, batches: Tensor) -> "zip[tuple[Any, ...]]":
    # one gather an epoch instead of two a step
    return zip(data.train_inputs[batches], data.train_targets[batches], strict=True)


def train_mode_loss(model: nn.Module, data: Data, setting: Setting) -> float:
    """Return the mean loss over training batches in train mode, with memories read but never written."""
    # torch's own batch norm would move its running statistics
    model = copy.deepcopy(model).train()
    draws = torch.Generator().manual_seed(0)
    batches = one_epoch(setting.sampling, data.train_targets.cpu(), setting.batch_size, draws)
    loss_of = LOSSES[setting.loss]
    with torch.no_grad(), no_update(model):
        losses = [loss_of(model(inputs), targets) for inputs, targets in _gathered(data, batches)]
    return torch.stack(losses).mean().item()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 2)
