"""Online Normalization, a peer to compare with: sample after sample, in both passes."""

from typing import Any

import torch
from torch import Tensor, nn


class OnlineNorm(nn.Module):
    r"""Normalize each sample of an (N, C, ...) input with the statistics of those before it.

    For one sample after the other, with means and variances over its positions and
    :math:`s = \sqrt{v + \epsilon}`,

    .. math::
        y &= \frac{x - \mu}{s}, \qquad
        \delta = \mathrm{E} x - \mu, \qquad
        v \leftarrow f v + (1 - f) \mathrm{Var}\, x + f (1 - f) \delta^2, \qquad
        \mu \leftarrow \mu + (1 - f) \delta \\
        g &= dy - (1 - b) V y, \qquad
        V \leftarrow V + \mathrm{E}[g y], \qquad
        dx = \frac{g}{s} - (1 - b) U, \qquad
        U \leftarrow U + \mathrm{E}[dx]

    Then come scale and shift, and the guard against errors of the statistics: each sample is divided by the
    root of its mean square over channels and positions. Eval mode normalizes with :math:`\mu` and v.

    Args:
        num_features: number of channels C.
        forward_decay: f.
        backward_decay: b.
        eps: added to variances and mean squares.

    Source: Chiley et al.: Online Normalization for Training Neural Networks, NeurIPS 2019, sections 3 and 4;
    the guard is the authors' "layer scaling".

    >>> OnlineNorm(8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    running_mean: Tensor
    running_var: Tensor
    mean_control: Tensor
    scale_control: Tensor

    def __init__(
        self,
        num_features: int,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.forward_decay, self.backward_decay, self.eps = forward_decay, backward_decay, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("mean_control", torch.zeros(num_features))
        self.register_buffer("scale_control", torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, and in train mode move the statistics."""
        # the positions of a sample in one axis; a vector has one
        values = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if self.training:
            y: Tensor = _Controlled.apply(values, self)  # type: ignore[no-untyped-call]
        else:
            mean, inverse = self.running_mean[:, None], (self.running_var[:, None] + self.eps).rsqrt()
            y = (values - mean) * inverse
        y = y * self.weight[:, None] + self.bias[:, None]
        y = y * (y.square().mean((1, 2), keepdim=True) + self.eps).rsqrt()
        return y.view(x.shape)

    @torch.no_grad()
    def moved(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each sample is normalized with, shape (N, C) each, and move on past all of them."""
        f, mean, var = self.forward_decay, self.running_mean.clone(), self.running_var.clone()
        means, variances = [], []
        for own_mean, own_var in zip(values.mean(2), values.var(2, correction=0), strict=True):
            means.append(mean)
            variances.append(var)
            delta = own_mean - mean
            var = f * var + (1 - f) * own_var + f * (1 - f) * delta**2
            mean = mean + (1 - f) * delta
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return torch.stack(means), torch.stack(variances)

    def controlled(self, dy: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
        """Return the gradient of the samples, and move the controls on past all of them."""
        rate, u, v = 1 - self.backward_decay, self.mean_control.clone(), self.scale_control.clone()
        mean_controls, scale_controls = [], []
        # means of g y and of dx follow from those of dy, dy y, y and y^2, which need no loop
        means = (dy.mean(2), (dy * y).mean(2), y.mean(2), y.square().mean(2), inverse)
        for mean_dy, mean_dy_y, mean_y, mean_y2, own_inverse in zip(*means, strict=True):
            mean_controls.append(u)
            scale_controls.append(v)
            u = u + (mean_dy - rate * v * mean_y) * own_inverse - rate * u
            v = v + mean_dy_y - rate * v * mean_y2
        self.mean_control.copy_(u)
        self.scale_control.copy_(v)
        g = dy - rate * torch.stack(scale_controls)[..., None] * y
        return g * inverse[..., None] - rate * torch.stack(mean_controls)[..., None]


class _Controlled(torch.autograd.Function):
    """The normalization of samples of shape (N, C, positions), by a layer's statistics and controls."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: OnlineNorm) -> Tensor:
        means, variances = layer.moved(values)
        inverse = (variances + layer.eps).rsqrt()
        y = (values - means[..., None]) * inverse[..., None]
        ctx.save_for_backward(y, inverse)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        layer: OnlineNorm = ctx.layer
        return layer.controlled(dy, y, inverse), None
