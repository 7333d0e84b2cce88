"""mmengine: the layers in its registry, and a hook for Double-Forward and the schedule."""

from collections.abc import Mapping
from typing import Any

import mbnorm

try:
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS, MODELS
except ImportError as error:
    raise ImportError("mbnorm.integrations.mmengine needs MMEngine: pip install mmengine") from error


class BatchNormMemoryHook(Hook):
    """Attach Double-Forward, the schedule or both while a Runner trains; resume goes on with them.

    Args:
        double_forward: refresh the memories after each step (True, or 1), each n-th step (n), or never.
        schedule: options of `mbnorm.MomentumSchedule`, batch_size and total_steps at least.

    Raises:
        ValueError: nothing to attach; when training starts, several optimizers.
    """

    def __init__(self, double_forward: int = False, schedule: Mapping[str, Any] | None = None) -> None:
        if not double_forward and schedule is None:
            raise ValueError("nothing to attach: give double_forward=True, a schedule or both")
        self.double_forward, self.schedule = double_forward, schedule
        self._attached: dict[str, mbnorm.DoubleForward | mbnorm.MomentumSchedule] = {}
        self._handles: list[Any] = []
        self._loaded: dict[str, Any] = {}

    def before_train(self, runner: Any) -> None:  # noqa: D102
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if optimizer is None:
            raise ValueError("needs one optimizer: give each net of several its own mbnorm.DoubleForward")
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        if self.double_forward:
            again = mbnorm.DoubleForward(runner.model, optimizer, scaler=scaler, every=self.double_forward)
            self._attached["double_forward"] = again
            self._handles.append(again)
        if self.schedule is not None:
            schedule = self._attached["schedule"] = mbnorm.MomentumSchedule(runner.model, **self.schedule)
            # after Double-Forward, whose forwards have the history weight of the first ones
            self._handles.append(schedule.follow(optimizer, scaler=scaler))
        # a checkpoint that is loaded to train from step 0 on brings its weights alone
        for name in self._attached.keys() & self._loaded.keys() if runner.iter else ():
            self._attached[name].load_state_dict(self._loaded[name])

    def after_train(self, runner: Any) -> None:  # noqa: D102
        while self._handles:
            self._handles.pop().remove()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        checkpoint["mbnorm"] = {name: part.state_dict() for name, part in self._attached.items()}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:  # noqa: D102
        self._loaded = dict(checkpoint.get("mbnorm", {}))


def register() -> None:
    """Add the layers as "MatchedBN", "MomentumBN" and "MemorizedBN", with "1d" or "3d" behind, and the hook.

    Then ``norm_cfg=dict(type="MatchedBN")`` or ``dict(type="MemorizedBN", memory_size=64)``, and
    ``custom_hooks=[dict(type="BatchNormMemoryHook", double_forward=True)]``. Norms are called bn1, bn2 as
    torch's are, so that pretrained weights find them. May be called again.
    """
    for kind in ("Matched", "Momentum", "Memorized"):
        for ending, dim in (("", "2d"), ("1d", "1d"), ("2d", "2d"), ("3d", "3d")):
            layer = getattr(mbnorm, f"{kind}BatchNorm{dim}")
            layer._abbr_ = "bn"
            MODELS.register_module(f"{kind}BN{ending}", force=True, module=layer)
    HOOKS.register_module(force=True, module=BatchNormMemoryHook)
