"""A net in training that can be saved at any step, to go on as if it had not stopped."""

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mbnorm import DoubleForward
from mbnorm.experiments.data import parts
from mbnorm.experiments.losses import LOSSES
from mbnorm.experiments.methods import (
    DOUBLE_FORWARD,
    OURS,
    after_training,
    before_training,
    schedule_for,
)
from mbnorm.experiments.plan import Plan
from mbnorm.experiments.sampling import one_epoch
from mbnorm.experiments.training import FIRST_FORWARD, MOMENTUM, WEIGHT_DECAY, net_for

if TYPE_CHECKING:
    # takes seconds
    from lightning_fabric import Fabric

EVAL_BATCH = 256
MOST_SEEN = 1000
"""Inputs whose statistics frozen and recalibrated layers get."""

Batch: TypeAlias = tuple[Tensor, Tensor]
Record: TypeAlias = dict[str, float]


class Training:
    """A net in training, with all that must be saved to go on from any step.

    What is random in a step, the order of an epoch included, depends on the seed, the step and the rank
    alone: so no random stream has to be saved. Under DDP the ranks follow rank 0's memories, which is why
    its checkpoint is that of all.

    Args:
        plan: what to train and how.
        fabric: the device, the precision and the ranks.
        out: the folder of the checkpoint.

    Raises:
        ValueError: the data or the net cannot be had, the checkpoint is damaged or one of another training.
    """

    def __init__(self, plan: Plan, fabric: "Fabric", out: Path) -> None:
        run, setting = plan.run, plan.run.setting
        self.plan, self.fabric, self.path = plan, fabric, out / "checkpoint.pt"
        self.loss_of = LOSSES[setting.loss]
        self.data = parts(setting.data)
        self.model = net_for(run, self.data)
        self.steps_of_epoch = self._order(0).shape[0]
        if self.steps_of_epoch == 0:
            raise ValueError(
                f"{setting.data}: {len(self.data.train_targets)} images do not fill a step of "
                f"{fabric.world_size} x {plan.batches_a_step} batches of {setting.batch_size}"
            )
        self.total_steps = setting.epochs * self.steps_of_epoch
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=setting.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.double_forward = None
        if run.method in DOUBLE_FORWARD:
            self.double_forward = DoubleForward(self.model, self.optimizer, scaler=self.scaler)
        self.net, self.stepper = fabric.setup(self.model, self.optimizer)
        self.schedule = schedule_for(run.method, self.model, self.total_steps, setting.batch_size)
        self.step = 0
        self.saved_step: int | None = None
        # loss, right answers and their number since the epoch began
        self.sums = self._zeros()
        if self.path.exists():
            self._load()
        else:
            self._start()

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0 on."""
        return self.step // self.steps_of_epoch

    @property
    def between_epochs(self) -> bool:
        """Whether no step of the epoch is done."""
        return self.step % self.steps_of_epoch == 0

    def batches(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step that is left of the epoch, on the device."""
        order = self._order(self.epoch)[self.step % self.steps_of_epoch :, :, self.fabric.global_rank]
        loader: DataLoader[Any] = DataLoader(
            self.data.train,
            batch_sampler=order.flatten(0, 1).tolist(),
            generator=torch.Generator(),
        )
        found = iter(loader)
        for _ in range(len(order)):
            yield [self.fabric.to_device(next(found)) for _ in range(order.shape[1])]

    def advance(self, batches: list[Batch]) -> None:
        """Do an optimizer step."""
        torch.manual_seed(_mixed(self.plan.run.seed, self.step, self.fabric.global_rank))
        dropped = sum(self.step >= int(share * self.total_steps) for share in self.plan.drops)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.run.setting.lr * 0.1**dropped
        self.net.train()
        for number, (inputs, targets) in enumerate(batches, 1):
            with self.fabric.no_backward_sync(self.net, enabled=number < len(batches)):
                logits = self.net(inputs)
                loss = self.loss_of(logits, targets)
                self.fabric.backward(loss / len(batches))
            self.sums += _sums(loss.detach(), logits.detach(), targets)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1

    def end_epoch(self) -> Record:
        """Measure the net and start to count anew."""
        if self.step == self.total_steps:
            after_training(self.plan.run.method, self.model, self._some_inputs())
        trained, tested = self._over_ranks(self.sums), self._over_ranks(self._test())
        self.sums = self._zeros()
        return {
            "epoch": self.step // self.steps_of_epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": trained[0] / trained[2],
            "train_accuracy": 100 * trained[1] / trained[2],
            "test_loss": tested[0] / tested[2],
            "test_accuracy": 100 * tested[1] / tested[2],
        }

    def save(self) -> None:
        """Write the checkpoint; at no moment is there none or half of one."""
        if not self.fabric.is_global_zero:
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"plan": self._record(), "step": self.step, "sums": self.sums}
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)
        self.saved_step = self.step

    def _load(self) -> None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = state["plan"]
        # damaged files raise nearly anything
        except Exception as error:
            raise ValueError(
                f"{self.path} is no checkpoint of mbnorm train ({type(error).__name__})"
            ) from error
        for name, value in self._record().items():
            if saved.get(name) != value:
                raise ValueError(
                    f"{self.path} is of another training: {name} {saved.get(name)}, not {value}; give "
                    "another --out"
                )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.saved_step = state["step"]
        self.step, self.sums = state["step"], state["sums"].to(self.fabric.device)

    def _start(self) -> None:
        before_training(self.plan.run.method, self.model, self._some_inputs())
        if self.plan.run.setting.batch_size == 1 and self.plan.run.method in OURS:
            # a single value has no variance: there must be a past to blend it with
            with torch.no_grad():
                self.model.train()(self._some_inputs(FIRST_FORWARD))

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "double_forward": self.double_forward,
            "scaler": self.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _record(self) -> dict[str, Any]:
        return self.plan.record(self.fabric.world_size)

    def _order(self, epoch: int) -> Tensor:
        """Return what an epoch trains on: the indices by step, batch, rank and image."""
        setting, ranks = self.plan.run.setting, self.fabric.world_size
        draws = torch.Generator().manual_seed(_mixed(self.plan.run.seed, epoch))
        order = one_epoch(setting.sampling, self.data.train_targets, setting.batch_size, draws)
        batches = self.plan.batches_a_step * ranks
        order = order[: len(order) // batches * batches]
        return order.view(-1, self.plan.batches_a_step, ranks, setting.batch_size)

    def _some_inputs(self, most: int = MOST_SEEN) -> Tensor:
        count = min(most, len(self.data.train_targets))
        order = torch.randperm(len(self.data.train_targets), generator=torch.Generator().manual_seed(0))
        inputs = torch.stack([self.data.train[int(index)][0] for index in order[:count]])
        return inputs.to(self.fabric.device)

    def _test(self) -> Tensor:
        """Return the sums over this rank's share of what is tested on."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                # rank 0's statistics are the model's
                torch.distributed.broadcast(buffer, 0)
        count = len(self.data.test)  # type: ignore[arg-type]
        share = Subset(self.data.test, range(self.fabric.global_rank, count, self.fabric.world_size))
        sums = self._zeros()
        self.model.eval()
        with torch.no_grad(), self.fabric.autocast():
            for batch in DataLoader(share, EVAL_BATCH, generator=torch.Generator()):
                inputs, targets = self.fabric.to_device(batch)
                logits = self.model(inputs)
                sums += _sums(self.loss_of(logits, targets), logits, targets)
        return sums

    def _zeros(self) -> Tensor:
        # Apple's GPUs know no other
        dtype = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=dtype, device=self.fabric.device)

    def _over_ranks(self, sums: Tensor) -> list[float]:
        total = self.fabric.all_reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        values: list[float] = total.tolist()
        return values


def _sums(loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    right = (logits.argmax(1) == targets).sum()
    count = targets.numel()
    return torch.stack([loss * count, right, right.new_tensor(count)])


def _mixed(*numbers: int) -> int:
    """Return a seed that differs wherever one of the numbers does."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")
