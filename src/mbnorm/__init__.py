"""Batch normalization that works at batch sizes 1 to 8."""

from mbnorm import functional
from mbnorm.centering import center_filters
from mbnorm.checkpoint import checkpoint_context_fn
from mbnorm.conversion import ConversionReport
from mbnorm.convert import convert, revert
from mbnorm.diagnose import diagnose
from mbnorm.diagnosis import Diagnosis, LayerDiagnosis
from mbnorm.double_forward import DoubleForward
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
from mbnorm.recalibrate import recalibrate
from mbnorm.schedule import MomentumSchedule
from mbnorm.state import no_update

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "Diagnosis",
    "DoubleForward",
    "LayerDiagnosis",
    "MatchedBatchNorm1d",
    "MatchedBatchNorm2d",
    "MatchedBatchNorm3d",
    "MemorizedBatchNorm1d",
    "MemorizedBatchNorm2d",
    "MemorizedBatchNorm3d",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
    "MomentumSchedule",
    "center_filters",
    "checkpoint_context_fn",
    "convert",
    "diagnose",
    "functional",
    "no_update",
    "recalibrate",
    "revert",
]
