"""The command ``turboquant-weights``. Typer and rich come with the extra ``cli``, so they are imported when it runs."""

from __future__ import annotations

import signal
import sys

from safetensors import SafetensorError

from ..errors import TurboQuantError


def main() -> None:
    """Runs the command line: exit code 0, 1 for an error (one line on stderr), 2 for wrong usage."""
    # A terminated process cleans up like an interrupted one: no half-written folder stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        from .app import app
    except ModuleNotFoundError as error:
        _fail(f"the command line needs the package {error.name!r}: pip install 'turboquant-weights[cli]'")
    try:
        app()
    except (TurboQuantError, OSError, SafetensorError) as error:
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> None:
    print("turboquant-weights: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(1)
