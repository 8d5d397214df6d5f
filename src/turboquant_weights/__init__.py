"""TurboQuant for weights: rotated Lloyd-Max codebooks for the linear layers of language models."""

from importlib.metadata import version as _version

from .config import TurboQuantConfig
from .errors import ConfigError, FormatError, QuantizationError, TurboQuantError
from .integrations import load, register_lazily, save
from .linear import TurboQuantLinear
from .model import LayerReport, QuantizationReport, quantize_model

__all__ = [
    "ConfigError",
    "FormatError",
    "LayerReport",
    "QuantizationError",
    "QuantizationReport",
    "TurboQuantConfig",
    "TurboQuantError",
    "TurboQuantLinear",
    "load",
    "quantize_model",
    "save",
]

__version__ = _version("turboquant-weights")

register_lazily()
