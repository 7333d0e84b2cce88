"""Drop-in batch normalization layers that remember past batches."""

from mbnorm.layers.layer import HistoryBatchNorm
from mbnorm.layers.matched import MatchedBatchNorm1d, MatchedBatchNorm2d, MatchedBatchNorm3d
from mbnorm.layers.memorized import MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d
from mbnorm.layers.momentum import MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d

__all__ = [
    "HistoryBatchNorm",
    "MatchedBatchNorm1d",
    "MatchedBatchNorm2d",
    "MatchedBatchNorm3d",
    "MemorizedBatchNorm1d",
    "MemorizedBatchNorm2d",
    "MemorizedBatchNorm3d",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
]
