"""Seconds and peak memory of data-free quantization.

    python benchmarks/quantize_speed.py --shapes qwen2.5-7b --device cuda
    python benchmarks/quantize_speed.py --shapes smollm2-135m --device cpu

Random bf16 weights in a model's shapes, built layer by layer, quantized on the device. The time is of quantization alone (a
layer is created before its clock starts); the bound beside it is one read of the weights at the device's copy bandwidth.
Peak memory is what the device's allocator (CPU: the process) needed beyond the layer itself and the finished planes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import resource
import sys
import time

import torch

import turboquant_weights
from turboquant_weights.reference import quantize_weight

# (out_features, in_features) of one decoder block, and the number of blocks.
SHAPES = {
    "smollm2-135m": ([(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)], 30),
    "qwen2.5-0.5b": ([(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)], 24),
    "qwen2.5-7b": ([(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)], 28),
}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy."""
    source = torch.empty(1 << (29 if device.type == "cuda" else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--setting", nargs="+", default=["4", "4+2", "4+4"], help="base+residual bits")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()

    device = torch.device(args.device)
    cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    block, count = SHAPES[args.shapes]
    weights = sum(n * k for n, k in block) * count
    bandwidth = copy_bandwidth(device)
    bound = 2 * weights / bandwidth
    print(f"{args.shapes}: {weights / 1e9:.3f} G weights on {hardware}, torch {torch.__version__}; bound {bound:.3f} s")
    results = []
    for setting in args.setting:
        bits, residual_bits = (int(part) for part in (setting + "+0").split("+")[:2])
        torch.manual_seed(0)
        quantize_weight(torch.randn(256, 256, device=device), bits=bits, residual_bits=residual_bits)
        seconds, temporary, finished = 0.0, 0, 0
        for _ in range(count):
            for n, k in block:
                weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                synchronize(device)
                start = time.perf_counter()
                result = quantize_weight(weight, bits=bits, residual_bits=residual_bits)
                synchronize(device)
                seconds += time.perf_counter() - start
                if cuda:
                    temporary = max(temporary, torch.cuda.max_memory_allocated() - before - result.weight.nbytes)
                finished += result.weight.nbytes
        if not cuda:
            temporary = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"setting": setting, "seconds": seconds, "bits_per_weight": 8 * finished / weights, "peak_bytes": temporary}
        results.append(row)
        kind = "temporary device memory" if cuda else "peak memory of the process"
        print(f"{setting:>4}: {seconds:6.2f} s, {row['bits_per_weight']:.3f} bits/weight, {kind} {temporary / 1e6:.0f} MB")
    if args.out:
        record = {
            "command": " ".join(pathlib.Path(a).name if "/" in a else a for a in sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware,
            "torch": torch.__version__,
            "turboquant_weights": turboquant_weights.__version__,
            "shapes": args.shapes,
            "weights": weights,
            "bound_seconds": bound,
            "rows": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
