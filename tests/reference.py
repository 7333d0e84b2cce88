"""The methods in plain differentiable PyTorch, in the notation of the method page: the tests' oracle.

Notation, for one channel: m samples, n values, batch mean mB, biased batch variance vB, past mean M, past
variance V, weight a of the batch, lambda and tau weights of the old. Nothing here is shared with the
library, nothing is fast, and everything works in float64.

Sources: Guo et al., AAAI 2018 (Memorized BN, Double-Forward); Yong et al., ECCV 2020 (Momentum BN).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def batch_statistics(x: Tensor, variance_rule: str = "pooled") -> tuple[Tensor, Tensor, int]:
    """Return mB, vB, n of an input of shape (N, C, ...); "uncentered" takes mB for 0."""
    values = x.transpose(0, 1).flatten(1)
    n = values.shape[1]
    mB = values.sum(1) / n
    if variance_rule == "uncentered":
        mB = torch.zeros_like(mB)
    vB = ((values - mB[:, None]) ** 2).sum(1) / n
    return mB, vB, n


def mix(
    mB: Tensor, vB: Tensor, M: Tensor, V: Tensor, a: float | Tensor, variance_rule: str
) -> tuple[Tensor, Tensor]:
    """Return a mB + (1-a) M and the variance of the rule "averaged", "pooled" or "uncentered"."""
    mean = a * mB + (1 - a) * M
    var = a * vB + (1 - a) * V
    if variance_rule == "pooled":
        var = var + a * (1 - a) * (mB - M) ** 2
    return mean, var


def normalize(x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Return w (x - mean) / sqrt(var + eps) + b per channel."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = (x - mean.view(shape)) / torch.sqrt(var + eps).view(shape)
    if w is not None:
        y = y * w.view(shape)
    if b is not None:
        y = y + b.view(shape)
    return y


def blended_batch_norm(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    M: Tensor,
    V: Tensor,
    a: float | Tensor,
    variance_rule: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, mB, vB, mean, var of the one operator for all methods."""
    mB, vB, _ = batch_statistics(x, variance_rule)
    mean, var = mix(mB, vB, M, V, a, variance_rule)
    return normalize(x, mean, var, w, b, eps), mB, vB, mean, var


def noisy(
    x: Tensor, mu: Tensor, sigma2: Tensor, w: Tensor, b: Tensor, u: Tensor, s2: Tensor, eps: float
) -> Tensor:
    """Return w (xhat + u) / sqrt(s2) + b: population statistics mu and sigma2, with a batch's noise u and s2.

    The noise of a real batch is u = (mu - mB) / sigma and s2 = vB / sigma2, with eps in sigma2 and vB.
    """
    shape = (1, -1) + (1,) * (x.dim() - 2)
    xhat = normalize(x, mu, sigma2, None, None, eps)
    return w.view(shape) * (xhat + u.view(shape)) / s2.sqrt().view(shape) + b.view(shape)


def noise_of_values(n: float, channels: int) -> tuple[Tensor, Tensor]:
    """Draw u ~ N(0, 1/n) and s2 ~ chi-square(n-1) / n, the noise of n independent normal values."""
    u = torch.randn(channels, dtype=torch.float64) / n**0.5
    half = torch.full((channels,), (n - 1) / 2, dtype=torch.float64)
    return u, 2 * torch.distributions.Gamma(half, 1.0).sample() / n


def effective_sample_size(x: Tensor) -> float:
    """Return n_eff of batches of shape (B, N, C, ...): variance of a value over that of a batch's mean."""
    means = torch.stack([batch_statistics(batch)[0] for batch in x])
    _, sigma2, _ = batch_statistics(x.flatten(0, 1))
    return float(1 / (means.var(0) / sigma2).mean())


def paper_lambda(t: int, T: int, m: int, m0: int = 32) -> float:
    """Return lambda_t of the dynamic momentum, t = 1..T, as the ECCV paper writes it (T = 1: its limit)."""
    r = min(m / m0, 1.0)
    if T == 1:
        return 1.0 - r if t > 1 else 0.0
    rho = r ** (1 / T)
    return float(rho ** (T / (T - 1) * max(T - t, 0)) - rho**T)


def inference_tau(m: int, m0: int = 32, tau0: float = 0.9) -> float:
    """Return the inference averages' weight of the old value."""
    return float(tau0 ** (m / m0))


@dataclass
class Entry:
    """One batch in the memory."""

    mean: Tensor
    var: Tensor
    n: int | None  # None: as many values as the batch that reads it


class _Norm:
    """State that all methods share: the inference averages and the weight contract of `momentum`."""

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        self.eps = eps
        self.momentum = momentum
        self.running_mean = torch.zeros(channels, dtype=torch.float64)
        self.running_var = torch.ones(channels, dtype=torch.float64)
        self.batches = 0

    def _average(self, mB: Tensor, vB: Tensor, tau: float, *, moments: bool) -> None:
        old_mean, old_var = self.running_mean, self.running_var
        self.running_mean = tau * old_mean + (1 - tau) * mB
        self.running_var = tau * old_var + (1 - tau) * vB
        if moments:
            self.running_var = self.running_var + tau * (1 - tau) * (mB - old_mean) ** 2

    def _raw_average(self, mB: Tensor, vB: Tensor, n: int) -> bool:
        """Store raw statistics where momentum is None (cumulative) or 1.0; return whether it was so."""
        if self.momentum is not None and self.momentum != 1.0:
            return False
        tau = 0.0 if self.momentum == 1.0 else 1 - 1 / self.batches
        self._average(mB, self.unbiased(vB, n), tau, moments=False)
        return True

    def unbiased(self, vB: Tensor, n: int) -> Tensor:
        """Return the variance of which vB is the biased estimate, if more than one value is known."""
        return vB * n / (n - 1) if n > 1 else vB

    def evaluate(self, x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Return the output of eval mode."""
        return normalize(x, self.running_mean, self.running_var, w, b, self.eps)

    def _forward(
        self,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        M: Tensor,
        V: Tensor,
        a: float,
        variance_rule: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        y, *statistics = blended_batch_norm(x, w, b, M, V, a, variance_rule, self.eps)
        mB, vB, mean, var = (s.detach() for s in statistics)
        return y, mB, vB, mean, var


class MomentumNorm(_Norm):
    """Momentum BN (ECCV 2020) with a history weight."""

    def __init__(
        self,
        channels: int,
        *,
        history_weight: float = 0.0,
        variance_rule: str = "averaged",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.history_weight = history_weight
        self.variance_rule = variance_rule
        self.M: Tensor | None = None
        self.V: Tensor | None = None

    def seed(self, mean: Tensor, var: Tensor, batches: int = 0) -> None:
        """Start from known statistics."""
        self.M, self.V = mean.double(), var.double()

    def weight_of_the_past(self, n: int, m: int) -> float:
        """Return lambda for a batch of m samples with n values per channel."""
        return self.history_weight

    def measure(self, new: Tensor, unit: Tensor, n: int, old: Tensor) -> None:
        """Take a batch's statistic into what is measured, with its unit and what is remembered of it."""

    def _average_moments_or_not(self, mB: Tensor, vB: Tensor, m: int) -> None:
        assert self.momentum is not None
        self._average(mB, vB, 1 - self.momentum, moments=False)

    def __call__(self, x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Return the output of a training forward, and store it."""
        n = x.numel() // x.shape[1]
        lam = self.weight_of_the_past(n, x.shape[0])
        M, V = self.M, self.V
        if M is None or V is None:
            lam, M, V = 0.0, self.running_mean, self.running_var
        y, mB, vB, mean, var = self._forward(x, w, b, M, V, 1 - lam, self.variance_rule)
        if self.momentum == 0:
            return y
        self.batches += 1
        if not self._raw_average(mB, vB, n):
            self._average_moments_or_not(mB, vB, x.shape[0])
        if self.variance_rule == "uncentered":
            self.measure(vB, var**2, n, V)
        else:
            self.measure(mB, var, n, M)
        self.M, self.V = mean, var
        return y

    def mark(self) -> tuple[Any, ...]:
        """Return the state to rewind to."""
        return self.M, self.V, self.running_mean, self.running_var, self.batches

    def rewind(self, mark: tuple[Any, ...]) -> None:
        """Go back to a mark."""
        self.M, self.V, self.running_mean, self.running_var, self.batches = mark


class MatchedNorm(MomentumNorm):
    """Matched BN: a moving average whose weight follows from N, and from what is measured.

    N counts samples: the statistics shall be as accurate as those of so many.
    """

    def __init__(
        self,
        channels: int,
        *,
        matched_batch_size: int = 128,
        measured: bool = True,
        early_weight: float = 8.0,
        subtract_mean: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        rule = "pooled" if subtract_mean else "uncentered"
        super().__init__(channels, variance_rule=rule, eps=eps, momentum=momentum)
        self.matched_batch_size = matched_batch_size
        self.subtract_mean = subtract_mean
        self.measured = measured
        self.early_weight = early_weight
        self.last: tuple[Tensor, int] | None = None  # m', n'
        self.r = 0.0  # a batch of n values is worth n / r
        self.e = 1.0  # squared error of M, in variances
        self.samples = 0
        self.seen = 0  # batches that running_mean and running_var stand for

    def seed(self, mean: Tensor, var: Tensor, batches: int = 0) -> None:
        """Start from known statistics."""
        super().seed(*((mean, var) if self.subtract_mean else (0 * mean, var + mean**2)))
        self.e = 0.0
        self.seen = max(400, batches)

    def unbiased(self, vB: Tensor, n: int) -> Tensor:
        """Return the variance; a mean square has no bias."""
        return super().unbiased(vB, n) if self.subtract_mean else vB

    def weight_of_the_past(self, n: int, m: int) -> float:
        """Return lambda for a batch of m samples with n values per channel."""
        N = self.matched_batch_size
        if not self.measured:
            return max(0.0, (N - m) / (N + m))
        n_eff = max(n / max(self.r, 1.0), 1.0) if self.samples > 0 else 1.0
        worth = min(m, n_eff)
        kalman = (1 / n_eff) / (1 / n_eff + max(self.e, 0.0))
        return min(kalman, max(0.0, (N - worth) / (N + worth)))

    def measure(self, new: Tensor, unit: Tensor, n: int, old: Tensor) -> None:
        """Take a batch into r and e: its mean, or its mean square where that is all it has."""
        if self.last is None and self.M is not None:
            # seeded: right, and known as well as after so many batches
            self.r, self.e, self.samples = float(n), 0.0, self.seen
        elif self.last is not None:
            before, n_before = self.last
            d = float(((new - before) ** 2 / unit).mean())
            D = float(((new - old) ** 2 / unit).mean())
            beta = max(0.02, 8 / (self.samples + 8))
            r = d / (1 / n + 1 / n_before)
            self.r = (1 - beta) * self.r + beta * r
            self.e = (1 - beta) * self.e + beta * (D - r / n)
            self.samples += 1
        self.last = new, n
        self.seen += 1

    def _average_moments_or_not(self, mB: Tensor, vB: Tensor, m: int) -> None:
        assert self.momentum is not None
        tau = (1 - self.momentum) ** (m / 32)
        if self.early_weight:
            tau = min(tau, self.seen / (self.seen + self.early_weight))
        self._average(mB, vB, tau, moments=True)

    def mark(self) -> tuple[Any, ...]:
        """Return the state to rewind to."""
        return super().mark(), (self.last, self.r, self.e, self.samples, self.seen)

    def rewind(self, mark: tuple[Any, ...]) -> None:
        """Go back to a mark."""
        average, (self.last, self.r, self.e, self.samples, self.seen) = mark
        super().rewind(average)


class MemorizedNorm(_Norm):
    """Memorized BN (AAAI 2018)."""

    def __init__(
        self,
        channels: int,
        *,
        memory_size: int = 64,
        memory_values: int | None = None,
        decay: float = 1.0,
        variance_rule: str = "pooled",
        inference: str = "memory",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.memory_size = memory_size
        self.memory_values = memory_values
        self.decay = decay
        self.variance_rule = variance_rule
        self.inference = "ema" if memory_values else inference
        self.entries: list[Entry] = []  # newest first
        self.stored = 0

    def seed(self, mean: Tensor, var: Tensor) -> None:
        """Start from a trained batch norm's running statistics."""
        self.running_mean, self.running_var = mean, var
        self.entries = [Entry(mean, var, None) for _ in range(self.memory_size - 1)]

    def __call__(self, x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Return the output of a training forward, and store it."""
        n = x.numel() // x.shape[1]
        k = self.memory_size
        limit = k - 1
        if self.memory_values:
            limit = min(-(-self.memory_values // n), k) - 1
        past = self.entries[:limit]
        weights = [float(n)] + [
            (n if e.n is None else e.n) * self.decay**age for age, e in enumerate(past, start=1)
        ]
        w_past = [weight / sum(weights) for weight in weights[1:]]
        a = weights[0] / sum(weights)
        M, V = self.running_mean, self.running_var
        if past:
            M = sum((wi * e.mean for wi, e in zip(w_past, past, strict=True)), torch.zeros_like(M)) / sum(
                w_past
            )
            V = sum((wi * e.var for wi, e in zip(w_past, past, strict=True)), torch.zeros_like(V)) / sum(
                w_past
            )
            if self.variance_rule == "pooled":
                spread = (wi * (e.mean - M) ** 2 for wi, e in zip(w_past, past, strict=True))
                V = V + sum(spread, torch.zeros_like(V)) / sum(w_past)
        y, mB, vB, mean, var = self._forward(x, w, b, M, V, a, self.variance_rule)
        if self.momentum == 0:
            return y
        self.entries = [Entry(mB, vB, n), *self.entries][:k]
        self.stored += 1
        self.batches += 1
        if self._raw_average(mB, vB, n):
            return y
        assert self.momentum is not None
        if k == 1:
            self._average(mB, vB * n / (n - 1) if n > 1 else vB, 1 - self.momentum, moments=False)
        elif self.inference == "memory":
            self.running_mean, self.running_var = mean, var
        else:
            self._average(mB, vB, (1 - self.momentum) ** (x.shape[0] / 32), moments=True)
        return y

    def mark(self) -> tuple[int, Tensor, Tensor, int]:
        """Return the state to rewind to."""
        return self.stored, self.running_mean, self.running_var, self.batches

    def rewind(self, mark: tuple[int, Tensor, Tensor, int]) -> None:
        """Drop the entries stored since a mark; what they evicted stays lost."""
        stored, self.running_mean, self.running_var, self.batches = mark
        self.entries = self.entries[self.stored - stored :]
        self.stored = stored


def remembered_gradient(
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    mB: Tensor,
    mean: Tensor,
    var: Tensor,
    a: float | Tensor,
    G: Tensor,
    S: Tensor,
    variance_rule: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dw, db and the new G, S of a forward whose gradient remembers the two means of dy."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    xhat = normalize(x, mean, var, None, None, eps)
    z = xhat if variance_rule == "pooled" else normalize(x, mB, var, None, None, eps)
    mean_dy, _, n = batch_statistics(dy)
    mean_dy_xhat, _, _ = batch_statistics(dy * xhat)
    g = a * mean_dy + (1 - a) * G
    s = a * mean_dy_xhat + (1 - a) * S
    scale = 1 / torch.sqrt(var + eps) if w is None else w / torch.sqrt(var + eps)
    subtracted = 0 * g if variance_rule == "uncentered" else g
    dx = scale.view(shape) * (dy - subtracted.view(shape) - z * s.view(shape))
    return dx, mean_dy_xhat * n, mean_dy * n, g, s
