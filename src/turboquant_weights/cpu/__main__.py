"""``python -m turboquant_weights.cpu`` compiles the CPU engine where the package is installed."""

import sys

from .build import CALLS, FOLDER, LIBRARY, CompilerError, build, build_calls

try:
    build(FOLDER / LIBRARY)
except CompilerError as error:
    sys.exit(f"turboquant_weights: the CPU engine was not built: {error}")
print(f"built {FOLDER / LIBRARY}")
try:
    build_calls(FOLDER / CALLS)
    print(f"built {FOLDER / CALLS}")
except CompilerError as error:
    print(f"not built, so that each call takes some 20 us longer: {FOLDER / CALLS}: {error}")
