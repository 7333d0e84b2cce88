"""The dynamic momentum of Momentum batch normalization."""

import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mbnorm.layers.momentum import _MomentumBatchNorm
from mbnorm.optimizer_steps import check_hooks, was_skipped
from mbnorm.state import memorizing_layers, why_none

Schedule: TypeAlias = Literal["paper", "constant"]


class MomentumSchedule:
    r"""Change the history weight of a model's Momentum layers over training.

    .. math::
        \lambda_t = r^{1-p} - r, \quad r = \min(m/m_0, 1), \quad
        p = \min\!\big(\tfrac{t-1}{\max(T-1, 1)}, 1\big), \qquad 1 - \mathrm{momentum} = \tau_0^{m/m_0}

    :math:`\lambda` starts at 0, plain batch normalization, and ends at 1 - m/m0. Construction sets
    t = 1; call `step` after each optimizer step, or `follow` the optimizer. Matched and Memorized layers
    need no schedule and are left alone.

    Args:
        model: holds the layers; each shared layer counts once.
        total_steps: T, optimizer steps of the whole training.
        batch_size: m, samples that each layer sees at a time (per process, per micro-batch).
        ideal_batch_size: m0.
        inference_momentum: :math:`\tau_0`, weight of the old value in running_mean and running_var at
            batch size m0.
        schedule: "paper" as above, or "constant": :math:`\lambda = 1 - r` from the first step on
            (ours; better in short runs).

    Raises:
        ValueError: an option out of range, or no Momentum layer in ``model``.

    Source: Yong et al., ECCV 2020, section "dynamic momentum"; t counts steps instead of epochs.

    >>> import torch
    >>> from mbnorm import MomentumBatchNorm1d
    >>> layer = MomentumBatchNorm1d(4)
    >>> schedule = MomentumSchedule(layer, total_steps=2, batch_size=8)
    >>> schedule.step()
    >>> layer.history_weight
    tensor(0.7500)
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        batch_size: int,
        ideal_batch_size: int = 32,
        inference_momentum: float = 0.9,
        schedule: Schedule = "paper",
    ) -> None:
        for name, value in (
            ("total_steps", total_steps),
            ("batch_size", batch_size),
            ("ideal_batch_size", ideal_batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < inference_momentum < 1:
            raise ValueError(f"inference_momentum must be in (0, 1), got {inference_momentum}")
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {schedule!r}")
        self.layers = [layer for layer in model.modules() if isinstance(layer, _MomentumBatchNorm)]
        if not self.layers:
            reason = (
                "those it has need no schedule" if memorizing_layers(model) else why_none(model, "momentum")
            )
            raise ValueError(f"the model has no Momentum layer to steer: {reason}")
        self.model = model
        self._checked = False
        self.total_steps = total_steps
        self.ratio = min(batch_size / ideal_batch_size, 1.0)
        self.schedule: Schedule = schedule
        self.t = 1
        for layer in self.layers:
            # 0 means never update, None a cumulative average: both stay
            if layer.momentum:
                if layer.torchs_momentum is None:
                    layer.torchs_momentum = layer.momentum
                layer.momentum = float(1 - inference_momentum ** (batch_size / ideal_batch_size))
        self._apply()

    @property
    def history_weight(self) -> float:
        """The paper's lambda at the present step."""
        if self.schedule == "constant":
            return 1 - self.ratio
        progress = min((self.t - 1) / max(self.total_steps - 1, 1), 1.0)
        return float(self.ratio ** (1 - progress) - self.ratio)

    def step(self) -> None:
        """Advance by one optimizer step."""
        if not self._checked:
            self._check_layers()
        self.t += 1
        self._apply()

    def follow(
        self, optimizer: torch.optim.Optimizer, *, scaler: "torch.amp.GradScaler | None" = None
    ) -> RemovableHandle:
        """Step after each step of ``optimizer`` that was not skipped, in place of calls of `step`.

        Hooks run in the order in which they are made: let it follow after `DoubleForward` is attached,
        so that the second forward has the history weight of the first.

        Args:
            optimizer: the optimizer whose steps count.
            scaler: the `torch.amp.GradScaler` in use, if any.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            TypeError: ``optimizer`` has no step hooks.
        """
        check_hooks(optimizer)

        def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            if not was_skipped(stepped, scaler):
                self.step()

        return optimizer.register_step_post_hook(after_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {"t": self.t}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.t = int(state_dict["t"])
        self._apply()

    def _check_layers(self) -> None:
        self._checked = True
        if not set(self.layers) & set(self.model.modules()):
            warnings.warn(
                "the Momentum layers that the schedule steers have left its model: "
                f"{why_none(self.model, 'momentum')}",
                stacklevel=3,
            )

    def _apply(self) -> None:
        for layer in self.layers:
            layer.set_history_weight(self.history_weight)
