"""The package's exceptions: every message says where, what was got, the rule, and the cure."""


class TurboQuantError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(TurboQuantError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class QuantizationError(TurboQuantError, ValueError):
    """A tensor or module cannot be quantized (NaN, Inf, wrong rank, ...)."""


class FormatError(TurboQuantError, ValueError):
    """A checkpoint breaks a MUST rule of FORMAT.md."""


class ScheduleError(TurboQuantError, ValueError):
    """A file of kernel schedules cannot be read."""
