"""TurboQuant for weights: rotated Lloyd-Max codebooks for the linear layers of language models."""

from importlib.metadata import version as _version

from .config import TurboQuantConfig
from .linear import TurboQuantLinear

__version__ = _version("turboquant-weights")
