"""MONAI: the layers as norms of its factory."""

from typing import Any

from mbnorm.layers import (
    MatchedBatchNorm1d,
    MatchedBatchNorm2d,
    MatchedBatchNorm3d,
    MemorizedBatchNorm1d,
    MemorizedBatchNorm2d,
    MemorizedBatchNorm3d,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
)

MATCHED = (MatchedBatchNorm1d, MatchedBatchNorm2d, MatchedBatchNorm3d)
MOMENTUM = (MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d)
MEMORIZED = (MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d)


def register() -> None:
    """Add the norms "momentum", "memorized" and "matched" to MONAI's factory.

    Then ``UNet(..., norm="matched")`` or ``UNet(..., norm=("memorized", {"memory_size": 64}))``, with the
    options of the layers. May be called again.

    Raises:
        ImportError: MONAI is not installed.
    """
    try:
        from monai.networks.layers.factories import Norm
    except ImportError as error:
        raise ImportError("mbnorm.integrations.monai needs MONAI: pip install monai") from error

    def momentum(dim: int) -> Any:
        """Momentum batch normalization in ``dim`` dimensions."""
        return MOMENTUM[dim - 1]

    def memorized(dim: int) -> Any:
        """Memorized batch normalization in ``dim`` dimensions."""
        return MEMORIZED[dim - 1]

    def matched(dim: int) -> Any:
        """Matched batch normalization in ``dim`` dimensions."""
        return MATCHED[dim - 1]

    for function in (momentum, memorized, matched):
        if function.__name__.upper() not in Norm.names:
            Norm.add_factory_callable(function.__name__, function)
