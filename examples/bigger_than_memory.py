"""Quantizes a model that does not fit into the memory that the process may use, and runs the result.

    python examples/bigger_than_memory.py                            # a random Llama, no download
    python examples/bigger_than_memory.py FOLDER_OR_HUB_ID OUT

Weights pass through one at a time. Stop it when you like (Ctrl-C, kill -9) and run the second form again: it goes on where
it was. Without arguments the process forbids itself more than 180 MB of memory (Linux; mapped files count), shows that a
model of 201 MB cannot be loaded then, quantizes it, and runs the result.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import turboquant_weights as tq

LIMIT = 180_000_000


def write_model(folder: Path) -> int:
    """A random bf16 Llama in files of 40 MB; returns its bytes."""
    sizes = dict(vocab_size=16384, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=16)
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="40MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def forbid_more_than(extra: int) -> None:
    """Any further allocation beyond ``extra`` bytes fails from now on."""
    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + extra, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def demonstrate(folder: Path) -> None:
    size = write_model(folder / "dense")
    forbid_more_than(LIMIT)
    try:
        AutoModelForCausalLM.from_pretrained(folder / "dense")
        sys.exit(f"loading {size / 1e6:.0f} MB should have failed with {LIMIT / 1e6:.0f} MB of memory")
    except (MemoryError, RuntimeError, OSError) as error:
        print(f"a model of {size / 1e6:.0f} MB cannot be loaded: {str(error).splitlines()[0]}")
    config = tq.TurboQuantConfig(bits=4, embeddings={"model.embed_tokens": (4, 2)})
    print(tq.quantize_checkpoint(folder / "dense", folder / "quantized", config, progress=False))
    model = tq.load(folder / "quantized")
    logits = model(torch.arange(8)[None]).logits
    print(f"the quantized one runs: {type(model).__name__}, logits of shape {tuple(logits.shape)}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        source, out = sys.argv[1:]
        print(tq.quantize_checkpoint(source, out, tokenizer=AutoTokenizer.from_pretrained(source)))
    elif len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as temporary:
            demonstrate(Path(temporary))
    else:
        sys.exit(__doc__)
