"""Whole-model decoding and prefill on a GPU: Qwen2.5 shapes with random weights built on the GPU, ours against bf16.

    python benchmarks/decode.py --shapes 7b --output benchmarks/results/decode-h100.json

One decoding step is a CUDA graph over a static cache, as a server would run it; `eager` is the same step without a graph.
The output head stays in bf16, as it does in a quantized checkpoint. Medians.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from turboquant_weights import TurboQuantConfig, TurboQuantLinear, fuse_projections
from turboquant_weights.kernels.tune import random_planes

SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "7b": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
    "32b": dict(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8
    ),
}
WEIGHTS = ("bf16", "4", "4 fused", "4+4", "4+4 fused")
CACHE = 2304


def build(shape: str, weights: str) -> Any:
    """A model with random weights on the GPU; unless they are bf16, its linear layers, but the head, hold random codes."""
    config = transformers.Qwen2Config(vocab_size=152064, max_position_embeddings=32768, **SHAPES[shape])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if weights != "bf16":
        settings = TurboQuantConfig(bits=4, residual_bits=4 if weights.startswith("4+4") else 0)
        for name, module in list(model.model.named_modules()):
            if type(module) is torch.nn.Linear:
                planes = random_planes(module.out_features, module.in_features, settings.residual_bits)
                bias = None if module.bias is None else torch.empty(module.out_features, device="meta", dtype=torch.bfloat16)
                layer = TurboQuantLinear.from_packed(planes, module.in_features, bias, settings)
                parent, _, leaf = name.rpartition(".")
                setattr(model.model.get_submodule(parent), leaf, layer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
    if weights.endswith("fused"):
        fuse_projections(model)
    return model


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def decode_step(model: Any, batch: int) -> Callable[[], object]:
    """One token for each of ``batch`` sequences, 2,048 tokens into a static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE)
    tokens = torch.randint(0, 152064, (batch, 1), device="cuda")
    position = torch.tensor([2048], device="cuda")
    arguments = dict(past_key_values=cache, cache_position=position, position_ids=position[None], use_cache=True)
    return lambda: model(tokens, **arguments).logits


def graph_of(step: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def measure(shape: str, weights: str, batches: list[int]) -> dict:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build(shape, weights)
    linear_bytes = sum(
        parameter.nbytes
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear)
        for parameter in module.parameters()
    )
    row: dict = dict(shape=shape, weights=weights, linear_GB=round(linear_bytes / 1e9, 3), decode={})
    row["resident_GB"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    for batch in batches:
        step = decode_step(model, batch)
        step()
        eager = milliseconds(step, 10)
        graph = milliseconds(graph_of(step), 20)
        row["decode"][batch] = dict(
            graph_ms=round(graph, 3), eager_ms=round(eager, 3), tokens_per_s=round(batch / graph * 1e3, 1)
        )
    prompt = torch.randint(0, 152064, (1, 2048), device="cuda")
    row["prefill_2048_ms"] = round(milliseconds(lambda: model(prompt, logits_to_keep=1), 5), 2)
    row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def table(report: dict) -> str:
    """Markdown."""
    batches = list(report["rows"][0]["decode"])
    lines = [
        f"{report['gpu']}, PyTorch {report['torch']}, Triton {report['triton']}, Transformers {report['transformers']}, "
        f"{report['date']}; `{report['command']}`.",
        "",
        "| shape | weights | linear layers, GB | " + " | ".join(f"tokens/s, batch {b} (eager)" for b in batches)
        + " | prefill of 2,048, ms | resident / peak, GB |",
        "|---|---|---|" + "---|" * (len(batches) + 2),
    ]  # fmt: skip
    for row in report["rows"]:
        speed = " | ".join(f"{d['tokens_per_s']:.0f} ({int(b) / d['eager_ms'] * 1e3:.0f})" for b, d in row["decode"].items())
        lines.append(
            f"| {row['shape']} | {row['weights']} | {row['linear_GB']:.2f} | {speed} | {row['prefill_2048_ms']:.1f} "
            f"| {row['resident_GB']:.1f} / {row['peak_GB']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "7b", "32b"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--output", type=Path, help="JSON file for the results; a table goes beside it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/decode.py needs a CUDA GPU")
    report: dict = dict(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today().isoformat(),
        command=" ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        rows=[],
    )
    for shape in arguments.shapes:
        for weights in arguments.weights:
            report["rows"].append(measure(shape, weights, arguments.batches))
            gc.collect()
            print(report["rows"][-1], flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
