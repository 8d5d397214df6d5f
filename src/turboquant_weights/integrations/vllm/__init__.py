"""vLLM: a quantization method under the name of our checkpoints, ``turboquant_weights``.

vLLM calls :func:`register` in each of its processes, through the entry point ``vllm.general_plugins``. ``vllm serve FOLDER``
then serves our checkpoints, and ``--quantization turboquant_weights`` quantizes a model while it loads. Options are
vLLM's own ``--additional-config '{"turboquant_weights": {...}}'``: ``"base_only": true`` for a checkpoint, the fields of
``TurboQuantConfig`` for a model that is quantized while it loads.

``shards.py`` computes, and imports no vLLM; ``config.py`` decides which layer gets which planes; ``methods.py`` loads them.
"""

from __future__ import annotations

import importlib.util
import warnings


def register() -> None:
    """Makes vLLM know ``quant_method: turboquant_weights``. A second call does nothing, and so does one without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return
    try:
        from . import config  # noqa: F401  # registers itself
    except ImportError as error:
        # Not an error: it would stop a vLLM that serves other models.
        warnings.warn(
            f"turboquant-weights cannot serve its checkpoints with this vLLM: it lacks an interface of 0.32 ({error}). "
            "Install a newer vLLM",
            stacklevel=2,
        )
