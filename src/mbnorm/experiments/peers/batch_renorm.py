"""Batch Renormalization, a peer to compare with: batch norm corrected towards its moving averages."""

import torch
from torch import Tensor, nn

R_MAX, D_MAX = 3.0, 5.0
PLAIN, D_RELAXED, R_RELAXED = 5 / 160, 25 / 160, 40 / 160
"""Shares of a training: batch norm until the first, and the bounds at their widest from the others on."""


class BatchRenorm(nn.Module):
    r"""Normalize an (N, C, ...) input with its own statistics, corrected towards moving averages.

    .. math::
        y = w \Big(\frac{x - \mu_B}{\sigma_B}\,r + d\Big) + b, \qquad
        r = \mathrm{clip}_{[1/r_{max},\,r_{max}]}\frac{\sigma_B}{\sigma}, \qquad
        d = \mathrm{clip}_{[-d_{max},\,d_{max}]}\frac{\mu_B - \mu}{\sigma}

    with :math:`\sigma_B = \sqrt{v_B + \epsilon}` of the biased variance, and r and d constants for autograd.
    Afterwards :math:`\mu` and :math:`\sigma` move by ``momentum`` of the way to :math:`\mu_B` and
    :math:`\sigma_B`; eval mode normalizes with them. With the bounds 1 and 0, where a layer starts, this is
    batch norm; `RenormSchedule` relaxes them.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of a batch in the moving averages.

    Raises:
        ValueError: a training batch with a single value per channel.

    Source: Ioffe: Batch Renormalization, NeurIPS 2017, Algorithm 1.

    >>> BatchRenorm(8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.r_max, self.d_max = 1.0, 0.0
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, and in train mode move the averages."""
        if not self.training:
            scale = self.weight / self.running_std
            return self._affine(x, scale, self.bias - self.running_mean * scale)
        if x.numel() // x.shape[1] == 1:
            raise ValueError(
                f"expected more than one value per channel to train on, got shape {tuple(x.shape)}"
            )
        normalized, mean, inverse_std = torch.native_batch_norm(
            x, None, None, None, None, True, 0.0, self.eps
        )
        with torch.no_grad():
            std = 1 / inverse_std
            r = (std / self.running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / self.running_std).clamp(-self.d_max, self.d_max)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_std.lerp_(std, self.momentum)
        return self._affine(normalized, self.weight * r, self.weight * d + self.bias)

    @staticmethod
    def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.dim() - 2))
        return x * scale.view(shape) + shift.view(shape)


class RenormSchedule:
    """Relax the bounds of every `BatchRenorm` in ``model`` over a training, linearly in time.

    The paper trains 5 000 steps with r_max = 1 and d_max = 0, and reaches 5 for d_max after 25 000 and 3 for
    r_max after 40 000. Here these are shares of ``total_steps``, for which 160 000 stand.

    Args:
        model: its layers are set at once, and by each `step`.
        total_steps: number of optimizer steps.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, BatchRenorm)]
        self.total_steps = total_steps
        self.steps = -1
        self.step()

    def step(self) -> None:
        """Follow an optimizer step."""
        self.steps += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """Return the state to save in a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a saved state."""
        self.steps = state_dict["steps"]
        self._apply()

    def _apply(self) -> None:
        progress = self.steps / self.total_steps
        for layer in self.layers:
            layer.r_max = 1 + (R_MAX - 1) * _ramp(progress, PLAIN, R_RELAXED)
            layer.d_max = D_MAX * _ramp(progress, PLAIN, D_RELAXED)


def _ramp(progress: float, start: float, end: float) -> float:
    return min(max((progress - start) / (end - start), 0.0), 1.0)
