"""Quality of data-free quantization: perplexity, KL divergence and top-1 agreement beside simple peers.

Example (the README's table):

    python benchmarks/quality.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw --device cuda

Protocol: WikiText-2 raw test, the first 32 windows of 1,024 tokens, BOS where the model wants it; reference = the GGUF
de-quantized to float32; all linear layers of the decoder are quantized, embeddings and output head are not. Rotated methods
are the mean of several rotation seeds, the spread is shown. "bits" count everything stored for the quantized layers.
The peers are integer RTN (asymmetric min-max) and NF4; their block is the largest power of two that divides the columns,
at most 128 (NF4: 64). Reference weights lie on a grid of 32-column blocks, so peers with blocks of 32 would look lossless.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn

import turboquant_weights
from turboquant_weights import TurboQuantConfig, quantize_model
from turboquant_weights.evaluation import Evaluation, compare, noise_floor, text_windows
from turboquant_weights.integrations.transformers import load_dense
from turboquant_weights.model import plan_layers

SETTINGS = ("2", "3", "4", "4+1", "4+2", "4+3", "4+4")


@dataclasses.dataclass
class Row:
    """One line of the table; lists hold one figure per seed."""

    method: str
    bits: float
    error: list[float]
    perplexity: list[float]
    kl: list[float]
    kl_p99: list[float]
    top1: list[float]
    seconds: float


def largest_block(columns: int, limit: int) -> int:
    return min(limit, columns & -columns)


def rtn(weight: Tensor, bits: int = 4, limit: int = 128) -> tuple[Tensor, float]:
    """Asymmetric min-max integers: fp16 scale and ``bits``-bit zero point per block. Returns weight and bits per weight."""
    block = largest_block(weight.shape[1], limit)
    blocks = weight.float().view(-1, block)
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    index = (blocks / scale + zero).round().clamp(0, 2**bits - 1)
    return ((index - zero) * scale).view(weight.shape), bits + (16 + bits) / block


def nf4(weight: Tensor, limit: int = 64) -> tuple[Tensor, float]:
    """NormalFloat4 (Dettmers et al. 2023) with an fp16 absolute maximum per block."""
    positive = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    table = torch.cat([negative, torch.zeros(1), positive]).sort().values
    table = (table / table.max()).to(weight.device)
    block = largest_block(weight.shape[1], limit)
    blocks = weight.float().view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).half().float().clamp(min=1e-8)
    index = torch.bucketize(blocks / scale, (table[1:] + table[:-1]) / 2)
    return (table[index] * scale).view(weight.shape), 4 + 16 / block


def fake_quantized(reference: nn.Module, method: Callable[[Tensor], tuple[Tensor, float]]) -> tuple[nn.Module, float, float]:
    """A copy with every planned layer replaced by its rounded weight; bits per weight and mean relative error."""
    model = copy.deepcopy(reference)
    bits = weights = 0.0
    errors = []
    with torch.no_grad():
        for name in plan_layers(model)[0]:
            weight = model.get_submodule(name).weight
            rounded, per_weight = method(weight)
            errors.append(((rounded - weight).square().sum() / weight.square().sum()).item())
            bits += per_weight * weight.numel()
            weights += weight.numel()
            weight.copy_(rounded)
    return model, bits / weights, statistics.mean(errors)


def rows(reference: nn.Module, windows: Tensor, settings: list[str], seeds: int, with_peers: bool) -> Iterator[Row]:
    peers = {
        "integer RTN, 128": lambda w: rtn(w, 4, 128),
        "integer RTN, 64": lambda w: rtn(w, 4, 64),
        "NF4, 64": nf4,
        "integer RTN 8 bits, 128": lambda w: rtn(w, 8, 128),
    }
    for name, method in peers.items() if with_peers else ():
        start = time.perf_counter()
        model, bits, error = fake_quantized(reference, method)
        seconds = time.perf_counter() - start
        score = compare(reference, {name: model}, windows, progress=False)[name]
        yield _row(name, bits, [error], [score], seconds)
    for setting in settings:
        bits, residual_bits = (int(part) for part in (setting + "+0").split("+")[:2])
        scores, errors, seconds = [], [], []
        for seed in range(seeds):
            model = copy.deepcopy(reference)
            config = TurboQuantConfig(bits=bits, residual_bits=residual_bits, seed=seed)
            report = quantize_model(model, config, progress=False)
            scores.append(compare(reference, {config.label: model}, windows, progress=False)[config.label])
            errors.append(report.error)
            seconds.append(report.seconds)
        yield _row(f"ours {config.label}", report.bits_per_weight, errors, scores, statistics.median(seconds))


def _row(method: str, bits: float, errors: list[float], scores: list[Evaluation], seconds: float) -> Row:
    return Row(
        method,
        bits,
        errors,
        [s.perplexity for s in scores],
        [s.kl_mean or 0.0 for s in scores],
        [s.kl_p99 or 0.0 for s in scores],
        [s.top1 or 0.0 for s in scores],
        seconds,
    )


def format_row(row: Row, base: float) -> str:
    change = [100 * (p / base - 1) for p in row.perplexity]
    return (
        f"| {row.method} | {row.bits:.3f} | {statistics.mean(row.error):.5f} | {statistics.mean(change):+.2f} % "
        f"| {statistics.mean(row.kl):.5f} ({min(row.kl):.5f}-{max(row.kl):.5f}) | {statistics.mean(row.kl_p99):.4f} "
        f"| {statistics.mean(row.top1):.3f} | {row.seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, help="GGUF file of the reference model")
    parser.add_argument("--text", required=True, help="UTF-8 text file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bos", action="store_true", help="start each window with BOS, whatever the tokenizer does")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to use instead of the GGUF's (Gemma before 5.20)")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--setting", nargs="+", default=SETTINGS, help="base+residual bits")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure the peers too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_dense(args.gguf, dtype=torch.float32)
    model = model.eval().to(args.device)
    if args.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    text = pathlib.Path(args.text).read_text(encoding="utf-8")
    windows = text_windows(tokenizer, text, args.length, args.windows, bos=args.bos or None)
    hardware = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{pathlib.Path(args.gguf).name} on {hardware}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    floor = noise_floor(model, windows[: min(4, len(windows))], progress=False)
    base = compare(model, {}, windows, progress=False)["reference"].perplexity
    print(f"reference perplexity {base:.4f}; noise floor KL {floor.kl_mean:.1e}", flush=True)
    print("| method | bits | rel. MSE | perplexity | KL (over seeds) | KL p99 | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    for row in rows(model, windows, args.setting, args.seeds, args.peers):
        print(format_row(row, base), flush=True)
        results.append(dataclasses.asdict(row))
    if args.out:
        record = {
            "command": " ".join(pathlib.Path(a).name if "/" in a else a for a in sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "turboquant_weights": turboquant_weights.__version__,
            "reference_perplexity": base,
            "noise_floor_kl": floor.kl_mean,
            "rows": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
