"""Moving average batch normalization, a peer to compare with: no means, and both passes remembered."""

from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 100
"""Steps in which a batch has its own statistics, or as many as are remembered if these are more."""
UNCORRECTED = 1000
"""Steps in which r is 1."""
BOUND = 5.0
"""r is between the bound and its inverse."""


class MABN(nn.Module):
    r"""Normalize an (N, C, ...) input with the mean squares of the last batches, in both passes.

    With E over a batch's values of a channel and k = ``simulated`` / ``batch_size``,

    .. math::
        s^2 &= \text{mean of the last } k \text{ of } \mathrm{E}[x^2], \qquad
        z = \frac{x}{\sqrt{s^2 + \epsilon}}, \qquad
        r = \mathrm{clip}_{[1/5,\,5]} \sqrt{\frac{s^2 + \epsilon}{R + \epsilon}}, \qquad
        y = w\,r\,z + b \\
        g &= w\,r\,dy, \qquad
        P = \text{mean of the last } k \text{ of } \mathrm{E}[g z], \qquad
        dx = \frac{g - z P}{\sqrt{s^2 + \epsilon}}

    this batch among the last k. Afterwards R moves by 0.02 of the way to :math:`s^2`; eval mode normalizes
    with it. In the first max(k, 100) steps :math:`s^2` and P are this batch's, in the first 1000 r is 1.

    No mean is subtracted: the filters of the layer in front are to be centered, by
    `mbnorm.experiments.peers.filters.center`.

    Args:
        num_features: number of channels C.
        batch_size: samples of a batch.
        simulated: samples of the batch whose statistics are wanted.
        eps: added to mean squares.
        momentum: weight of past batches in R.

    Source: Yan et al.: Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
    ICLR 2020.

    >>> MABN(8, batch_size=2)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    running_square: Tensor
    squares: Tensor
    products: Tensor
    steps: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int,
        simulated: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.98,
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.remembered = max(1, simulated // batch_size)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_square", torch.ones(num_features))
        self.register_buffer("squares", torch.zeros(self.remembered, num_features))
        self.register_buffer("products", torch.zeros(self.remembered, num_features))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, and in train mode remember its mean squares."""
        if not self.training:
            scale = self.weight * (self.running_square + self.eps).rsqrt()
            return x * _per_channel(scale, x) + _per_channel(self.bias, x)
        with torch.no_grad():
            self.steps += 1
            step = int(self.steps)
            slot, alone = step % self.remembered, step <= max(self.remembered, WARM_UP)
            own = x.square().mean(_all_but_channels(x))
            self.squares[slot] = own
            square = own if alone else self.squares.mean(0)
            r = ((square + self.eps) / (self.running_square + self.eps)).sqrt().clamp(1 / BOUND, BOUND)
            if step <= UNCORRECTED:
                r = torch.ones_like(r)
            self.running_square.lerp_(square, 1 - self.momentum)
            inverse = (square + self.eps).rsqrt()
        y: Tensor = _Normalized.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, inverse, r, self.products, slot, alone
        )
        return y


class _Normalized(torch.autograd.Function):
    """y = w r z + b; the backward reads and writes what is remembered of E[g z]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        inverse: Tensor,
        r: Tensor,
        products: Tensor,
        slot: int,
        alone: bool,
    ) -> Tensor:
        z = x * _per_channel(inverse, x)
        ctx.save_for_backward(z, weight, inverse, r)
        ctx.products, ctx.slot, ctx.alone = products, slot, alone
        return z * _per_channel(weight * r, x) + _per_channel(bias, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, inverse, r = ctx.saved_tensors
        axes = _all_but_channels(z)
        g = dy * _per_channel(weight * r, z)
        own = (g * z).mean(axes)
        ctx.products[ctx.slot] = own
        product = own if ctx.alone else ctx.products.mean(0)
        dx = (g - z * _per_channel(product, z)) * _per_channel(inverse, z)
        return dx, (dy * z).sum(axes) * r, dy.sum(axes), None, None, None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.dim() - 2))
