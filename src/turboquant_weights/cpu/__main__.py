"""``python -m turboquant_weights.cpu`` compiles the CPU engine where the package is installed."""

import sys

from .build import FOLDER, LIBRARY, CompilerError, build

try:
    build(FOLDER / LIBRARY)
except CompilerError as error:
    sys.exit(f"turboquant_weights: the CPU engine was not built: {error}")
print(f"built {FOLDER / LIBRARY}")
