"""TurboQuant for weights: rotated Lloyd-Max codebooks for the linear layers of language models."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from .budget import BitPlan, plan_bits
from .calibration import Calibration
from .config import TurboQuantConfig
from .embedding import TurboQuantEmbedding
from .errors import ConfigError, FormatError, QuantizationError, ScheduleError, TurboQuantError
from .experts import TurboQuantExperts
from .fusion import fuse_projections, unfuse_projections
from .integrations import convert_checkpoint, load, quantize_checkpoint, register_lazily, save
from .integrations.merging import MergeReport, merge_report
from .linear import TurboQuantLinear
from .model import LayerReport, QuantizationReport
from .quantize import quantize_model

__all__ = [
    "BitPlan",
    "Calibration",
    "ConfigError",
    "FormatError",
    "LayerReport",
    "MergeReport",
    "QuantizationError",
    "QuantizationReport",
    "ScheduleError",
    "TurboQuantConfig",
    "TurboQuantEmbedding",
    "TurboQuantError",
    "TurboQuantExperts",
    "TurboQuantLinear",
    "convert_checkpoint",
    "fuse_projections",
    "load",
    "merge_report",
    "plan_bits",
    "quantize_checkpoint",
    "quantize_model",
    "save",
    "unfuse_projections",
]

try:
    __version__ = _version("turboquant-weights")
except _PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

register_lazily()
