"""How well test images are recognized, and how far the choice of test images moves it."""

import torch
from torch import Tensor

NORMAL_QUANTILE = 1.96


def overlaps(found: Tensor, true: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return twice the pixels where both have a class, and the sum of each one's, shape (N, classes - 1).

    The first class is the background.
    """
    both, sizes = [], []
    for c in range(1, classes):
        of_found, of_true = (found == c).flatten(1), (true == c).flatten(1)
        both.append(2 * (of_found & of_true).sum(1))
        sizes.append(of_found.sum(1) + of_true.sum(1))
    return torch.stack(both, 1), torch.stack(sizes, 1)


def share(parts: Tensor, wholes: Tensor) -> tuple[float, float]:
    r"""Return a score in percent over all images, and half its 95 % interval over the choice of images.

    .. math:: S = \frac{100}{K} \sum_k \frac{\sum_i p_{ik}}{\sum_i q_{ik}}, \qquad
        1.96 \sqrt{\sum_i e_i^2}, \qquad
        e_i = \frac{100}{K} \sum_k \frac{p_{ik} - q_{ik} S_k}{\sum_j q_{jk}}

    with :math:`S_k` the share of class k. To first order this is what drawing other images would change.

    Args:
        parts: p, shape (N, K).
        wholes: q, of the same shape.

    >>> share(torch.tensor([[1.0], [0.0], [1.0], [1.0]]), torch.ones(4, 1))
    (75.0, 42.4...)
    """
    parts, wholes = parts.double(), wholes.double()
    sums = wholes.sum(0).clamp_min(1)
    shares = parts.sum(0) / sums
    errors = 100 * ((parts - wholes * shares) / sums).mean(1)
    return 100 * shares.mean().item(), NORMAL_QUANTILE * errors.square().sum().sqrt().item()
