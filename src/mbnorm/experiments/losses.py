"""What a training makes small."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

Loss: TypeAlias = Literal["cross-entropy", "dice"]


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return cross-entropy plus what the classes' overlaps lack, for classes of few pixels.

    .. math:: L = \mathrm{CE} + 1 - \frac{1}{K - 1} \sum_{k=1}^{K-1}
        \frac{2 \sum p_k t_k + 1}{\sum p_k + \sum t_k + 1}

    with sums over the pixels of the batch; the first class, the background, has no term.

    Args:
        logits: shape (N, K, ...).
        targets: shape (N, ...), a class each.

    Source: Milletari et al.: V-Net, 3DV 2016, section 3; the 1 makes the loss of an absent class finite.

    >>> import torch
    >>> dice_loss(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]]).movedim(0, 1), torch.tensor([[0, 1]])) < 1e-3
    tensor(True)
    """
    axes = [0, *range(2, logits.dim())]
    found = logits.softmax(1)[:, 1:]
    true = F.one_hot(targets, logits.shape[1]).movedim(-1, 1)[:, 1:].to(found.dtype)
    both, sizes = (found * true).sum(axes), (found + true).sum(axes)
    return F.cross_entropy(logits, targets) + 1 - ((2 * both + 1) / (sizes + 1)).mean()


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "dice": dice_loss,
}
