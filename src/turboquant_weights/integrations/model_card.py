"""The README.md inside a saved checkpoint. Its first job: nobody should load the folder without this package."""

from __future__ import annotations

import collections

from ..config import EmbeddingBits, TurboQuantConfig, is_graded

LOAD_WITH = "turboquant_weights.load(folder), or `import turboquant_weights` before from_pretrained"

_CARD = """\
---
library_name: transformers
tags: [turboquant-weights, quantized]
{front}---

# {title}, {label}-bit TurboQuant Weights

**Loading this model needs the package `turboquant-weights`.** Without it Transformers does not know the format and refuses
to load the file (a size mismatch at a tensor of shape `[0]`, stored for exactly this purpose).

```bash
pip install "turboquant-weights[transformers]"
```

```python
import turboquant_weights
from transformers import AutoTokenizer

model = turboquant_weights.load("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

`AutoModelForCausalLM.from_pretrained` works too once `turboquant_weights` is imported.{base_only}

| | |
|---|---|
| bits of linear layers (base plane + residual plane) | {bits} |
| columns per rotation | up to {config.group_size} |
| seed | {config.seed} |
| embeddings | {embeddings} |
{experts}| linear layers left as they were | {skipped} |
{provenance}"""

_BASE_ONLY = "\n`turboquant_weights.load(folder, base_only=True)` loads the base planes alone."


def model_card(title: str, config: TurboQuantConfig) -> str:
    """Markdown for the folder called ``title``; ``config`` is the one that is stored in it."""
    source = dict(config.source or {})
    source.pop("load_with", None)
    model = source.get("model", "")
    # Hub ids only: the hub rejects a card that names a file or folder here.
    front = f"base_model: {model}\n" if model.count("/") == 1 else ""
    return _CARD.format(
        title=title,
        label=config.label,
        front=front,
        config=config,
        bits=_bits(config),
        embeddings=", ".join(f"`{name}`: {_embedding_label(bits)}" for name, bits in (config.embeddings or {}).items())
        or "left as they were",
        experts=f"| quantized stacks of experts | {len(config.experts)} |\n" if config.experts else "",
        base_only=_BASE_ONLY if config != config.base_only() else "",
        skipped=", ".join(f"`{name}`" for name in config.skip or ()) or "none",
        provenance="".join(f"| {key} | `{value}` |\n" for key, value in source.items()),
    )


def _embedding_label(bits: EmbeddingBits) -> str:
    if not is_graded(bits):
        return _label(*bits)
    return ", ".join(f"{_label(b, r)} in {rows} rows" for rows, b, r in bits)  # type: ignore[misc]


def _label(bits: int, residual_bits: int) -> str:
    return f"{bits}+{residual_bits}" if residual_bits else str(bits)


def _bits(config: TurboQuantConfig) -> str:
    """``4+2``, or what most layers have and how many differ."""
    default, *others = [_label(*pair) for pair in [(config.bits, config.residual_bits), *(config.layer_bits or {}).values()]]
    counts = "; ".join(
        f"{label} in {count} layer{'s' if count > 1 else ''}" for label, count in sorted(collections.Counter(others).items())
    )
    return f"{default}; {counts}" if counts else default
