"""Time and memory of calibrated quantization on the shapes of a real model, with random weights.

    python benchmarks/calibrate_speed.py --shapes qwen2.5-7b --device cuda --out benchmarks/results/calibrate-speed-h100.json

The model stays in main memory in bf16; one block at a time is worked on by the device. Peak device memory counts
everything that torch allocated there: the block and its original, two sets of hidden states, second moments and their
factors, the embedding and the head. With --blocks only the first few blocks are built; the whole model's time is then
the time of a block times their number, and what is tuned behind the last block once, and the result says so. Random
tokens: the time does not depend on them. Host memory is the process's peak (resident), beside what it had with the model
built: what calibration needs there beyond the model does not depend on the number of blocks.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

from turboquant_weights import Calibration, TurboQuantConfig, quantize, quantize_model

SHAPES = {
    "qwen2.5-7b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
    ),
    "qwen2.5-32b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=152064,
            hidden_size=5120,
            intermediate_size=27648,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        ),
    ),
    "smollm2-135m": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
    ),
}


def _resized(config: PretrainedConfig, **changes: object) -> PretrainedConfig:
    """``config`` with ``changes``; what is listed per layer follows from them."""
    return type(config)(**{**config.to_dict(), "layer_types": None, **changes})


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class _Timed:
    """Calls ``function`` and keeps how long that took."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object) -> object:
        start = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--blocks", type=int, help="build only so many blocks")
    parser.add_argument("--samples", type=int, default=Calibration.samples)
    parser.add_argument("--length", type=int, default=Calibration.sample_length)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--residual-bits", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    kind, config = SHAPES[args.shapes]
    whole = config.num_hidden_layers
    config = _resized(config, num_hidden_layers=args.blocks or whole, dtype=getattr(torch, args.dtype))
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu").to(config.dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            for rows in parameter.data.split(1 << 14):  # random numbers come faster from the device
                rows.copy_(torch.randn(rows.shape, dtype=config.dtype, device=args.device) * 0.02)
        else:
            parameter.data.fill_(1.0)
    fresh = kind(_resized(config, num_hidden_layers=1, vocab_size=8))
    model.model.rotary_emb = fresh.model.rotary_emb  # its buffers are computed, not loaded
    model.tie_weights()
    tokens = torch.randint(0, config.vocab_size, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model_bytes, built = sum(parameter.nbytes for parameter in model.parameters()), _resident()
    start = time.perf_counter()
    settings = Calibration(tokens, args.samples, args.length, args.device)
    tail = _Timed(quantize.tune_tail)
    with mock.patch.object(quantize, "tune_tail", tail):
        report = quantize_model(model, TurboQuantConfig(args.bits, args.residual_bits), calibration=settings)
    seconds = time.perf_counter() - start
    record = {
        "command": " ".join(["calibrate_speed.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "shapes": args.shapes,
        "dtype": args.dtype,
        "setting": report.config.label,
        "tokens": tokens.numel(),
        "blocks": config.num_hidden_layers,
        "seconds": seconds,
        "seconds_tail": tail.seconds,
        "seconds_whole_model": (seconds - tail.seconds) / config.num_hidden_layers * whole + tail.seconds,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "model_bytes": model_bytes,
        "host_bytes_before": built,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
