"""What a quantized embedding costs: loss and size of SmolLM2 with nothing else quantized, and the time of a lookup.

    python benchmarks/embedding.py quality --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/embedding.py lookup --device cpu

``quality``: the tied embedding (and so the output head) at several bits, all other layers in float32, against the dense
model in float32, on the text that the package ships. ``lookup``: rows of a bf16 embedding of 49,152 x 576 by the ids of
1 to 1,024 tokens, beside ``nn.Embedding``; microseconds of the process (CPU) or of the wall (GPU), the best of 5 rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import platform
import time

import torch
from torch import nn

import turboquant_weights as tq
from turboquant_weights.evaluation import compare, sample_text, text_windows
from turboquant_weights.integrations.transformers import load_dense

ROWS, COLUMNS = 49152, 576
SETTINGS = {"4": (4, 0), "4+1": (4, 1), "4+2": (4, 2), "4+4": (4, 4)}
TOKENS = (1, 16, 128, 1024)


def quality(gguf: pathlib.Path, windows: int, length: int) -> list[dict]:
    dense, tokenizer = load_dense(gguf, dtype=torch.float32)
    tokens = text_windows(tokenizer, sample_text(), length, windows)
    rows = []
    for label, bits in SETTINGS.items():
        model = copy.deepcopy(dense)
        config = tq.TurboQuantConfig(embeddings={"model.embed_tokens": bits}, skip=("model.layers.*",))
        report = tq.quantize_model(model, config, progress=False)
        result = compare(dense, {label: model}, tokens)
        loss = result[label].perplexity / result["reference"].perplexity - 1
        row = dict(
            bits=label, bits_per_weight=round(report.layers[0].bits_per_weight, 3), whole_model_ratio=round(report.ratio, 3)
        )
        row |= dict(perplexity=f"{loss:+.2%}", kl=round(result[label].kl_mean, 5), top1=round(result[label].top1, 4))
        print(row, flush=True)
        rows.append(row)
    return rows


def lookup(device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    dense = nn.Embedding(ROWS, COLUMNS, device=device, dtype=torch.bfloat16)
    modules = {label: tq.TurboQuantEmbedding.from_embedding(dense, tq.TurboQuantConfig(*b)) for label, b in SETTINGS.items()}
    rows = []
    for tokens in TOKENS:
        ids = torch.randint(0, ROWS, (1, tokens), device=device)
        row = {"tokens": tokens, "dense": microseconds(dense, ids)}
        row |= {label: microseconds(module, ids) for label, module in modules.items()}
        print(row, flush=True)
        rows.append(row)
    return rows


@torch.no_grad()
def microseconds(module: nn.Module, ids: torch.Tensor) -> float:
    cuda = ids.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    best = float("inf")
    for _ in range(5):
        start = clock()
        for _ in range(20):
            module(ids)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, (clock() - start) / 20)
    return round(best * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "lookup"])
    parser.add_argument("--gguf", type=pathlib.Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.what == "quality":
        if args.gguf is None:
            parser.error("quality needs --gguf")
        rows = quality(args.gguf, args.windows, args.window_length)
    else:
        rows = lookup(args.device)
    hardware = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    )
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "torch": torch.__version__,
        "command": f"python benchmarks/embedding.py {args.what}",
        "rows": rows,
    }
    if args.what == "quality":
        facts |= {"windows": args.windows, "window_length": args.window_length}
    if args.out is not None:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
