"""The command line of lm-evaluation-harness, with this package imported first so that it can load quantized checkpoints:

    python -m turboquant_weights.lm_eval run --model hf --model_args pretrained=smollm2-4bit --tasks lambada_openai

All arguments are lm-eval's own. Without the import it stops at a quantization type that it does not know.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs lm-eval with the arguments of this process."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f'lm-eval cannot be imported ({error}): pip install "turboquant-weights[lm-eval]"')
    cli_evaluate()


if __name__ == "__main__":
    main()
