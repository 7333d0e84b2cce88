"""Lightning: one callback for Double-Forward and the schedule."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mbnorm.double_forward import DoubleForward
from mbnorm.schedule import MomentumSchedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("mbnorm.integrations.lightning needs Lightning: pip install lightning") from error


class BatchNormMemory(Callback):
    """Attach Double-Forward, the schedule or both while a `lightning.Trainer` fits; resume goes on with them.

    Args:
        module: name of what training_step calls, "net" for ``self.net(batch)``; "" for ``self(batch)``.
        double_forward: refresh the memories after each step (True, or 1), each n-th step (n), or never.
        schedule: options of `mbnorm.MomentumSchedule`, batch_size at least; total_steps is the Trainer's own.

    Raises:
        ValueError: nothing to attach; when the fit starts, several optimizers or no known last step.
    """

    def __init__(
        self, *, module: str = "", double_forward: int = False, schedule: Mapping[str, Any] | None = None
    ) -> None:
        if not double_forward and schedule is None:
            raise ValueError("nothing to attach: give double_forward=True, a schedule or both")
        self.module, self.double_forward, self.schedule = module, double_forward, schedule
        self._attached: dict[str, DoubleForward | MomentumSchedule] = {}
        self._handles: list[Any] = []
        self._loaded: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if (count := len(trainer.optimizers)) != 1:
            raise ValueError(f"needs one optimizer, got {count}: give each net its own mbnorm.DoubleForward")
        optimizer, scaler = trainer.optimizers[0], getattr(trainer.precision_plugin, "scaler", None)
        model = pl_module.get_submodule(self.module)
        if self.double_forward:
            self._handles.append(_DoubleForward(model, optimizer, scaler=scaler, every=self.double_forward))
            self._attached["double_forward"] = self._handles[0]
        if self.schedule is not None:
            options = {"total_steps": trainer.estimated_stepping_batches, **self.schedule}
            if not 0 < options["total_steps"] < float("inf"):
                raise ValueError("the Trainer knows no last step: add total_steps to the schedule")
            schedule = self._attached["schedule"] = MomentumSchedule(model, **options)
            # after Double-Forward, whose forwards have the history weight of the first ones
            self._handles.append(schedule.follow(optimizer, scaler=scaler))
        for name in self._attached.keys() & self._loaded.keys():
            self._attached[name].load_state_dict(self._loaded.pop(name))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        # StochasticWeightAveraging's last pass over data reads raw statistics, and steps once at its end
        if getattr(trainer.fit_loop, "_skip_backward", False):
            self.on_train_end()

    def on_train_end(self, *_: Any) -> None:  # noqa: D102
        while self._handles:
            self._handles.pop().remove()

    def on_exception(self, *_: Any) -> None:  # noqa: D102
        self.on_train_end()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {name: part.state_dict() for name, part in self._attached.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._loaded = state_dict


class _DoubleForward(DoubleForward):
    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # under DDP Lightning calls training_step by way of the module's forward: that is no forward
        if not getattr(model.forward, "__qualname__", "").startswith("_ForwardRedirection"):
            super().capture(model, args, kwargs)
