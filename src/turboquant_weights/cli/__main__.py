"""``python -m turboquant_weights.cli``: the same command without its launcher."""

from . import main

main()
