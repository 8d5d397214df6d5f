"""How scale bits are best spent: the experiment behind the format's one byte per 32 columns (DESIGN.md, "Scales").

    python benchmarks/scale_formats.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw --device cuda

Every variant uses the same rotation and 4-bit codebook and searches its representable scales exhaustively; only the storage
of the scales differs. Weights are rounded in place (no packing), so all variants meet the same dense kernels.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from turboquant_weights.codebook import UNIT, boundary_tensor, level_tensor
from turboquant_weights.evaluation import compare, text_windows
from turboquant_weights.integrations.transformers import load_dense
from turboquant_weights.model import plan_layers
from turboquant_weights.rotation import rotate, rotation_block, unrotate

BITS = 4
_WINDOW = (0.66, 1.38)


def search(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [b, s] and candidate scales [b, c] (units of a standard deviation): rounded blocks and the chosen candidate."""
    levels = level_tensor(BITS, 0, blocks.device) / UNIT[BITS]
    boundaries = boundary_tensor(BITS, 0, blocks.device) / UNIT[BITS]
    best_error = torch.full_like(blocks[:, 0], torch.inf)
    best, choice = torch.zeros_like(blocks), torch.zeros_like(best_error)
    for candidate in range(scales.shape[1]):
        scale = scales[:, candidate : candidate + 1].clamp(min=1e-30)
        rounded = levels[torch.bucketize(blocks / scale, boundaries)] * scale
        error = (blocks - rounded).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[:, None], rounded, best)
        choice = torch.where(better, scale[:, 0], choice)
    return best, choice


def rms(blocks: Tensor) -> Tensor:
    return blocks.square().mean(1, keepdim=True).sqrt().clamp(min=1e-20)


def minifloat(mantissa_bits: int, size: int) -> Callable[[Tensor], Tensor]:
    """8-bit scales with this many mantissa bits, one per ``size`` columns (the exponent range is not the question here)."""

    def apply(rotated: Tensor) -> Tensor:
        blocks = rotated.view(-1, size)
        unit = torch.exp2(torch.floor(torch.log2(rms(blocks))))
        steps = 1 + torch.arange(2**mantissa_bits, device=blocks.device) / 2**mantissa_bits
        candidates = unit * torch.cat([steps / 2, steps, steps * 2])
        fraction = candidates / rms(blocks)
        nearest = rms(blocks).expand_as(candidates)
        inside = (fraction >= _WINDOW[0]) & (fraction <= _WINDOW[1])
        # Candidates outside the window repeat an inside one: a search over a rectangle needs no ragged rows.
        first = candidates.gather(1, inside.int().argmax(1, keepdim=True)).expand_as(nearest)
        return search(blocks, torch.where(inside, candidates, first))[0].view(rotated.shape)

    return apply


def fp16(size: int) -> Callable[[Tensor], Tensor]:
    def apply(rotated: Tensor) -> Tensor:
        block = min(size, rotated.shape[1] & -rotated.shape[1])
        blocks = rotated.view(-1, block)
        candidates = rms(blocks) * torch.linspace(*_WINDOW, 48, device=blocks.device)
        return search(blocks, candidates)[0].view(rotated.shape)

    return apply


def sub_scales(size: int, sub: int) -> Callable[[Tensor], Tensor]:
    """fp16 per ``size`` columns (from the norm) and a searched 4-bit logarithmic factor per ``sub`` columns."""

    def apply(rotated: Tensor) -> Tensor:
        block = min(size, rotated.shape[1] & -rotated.shape[1])
        parent = rms(rotated.view(-1, block)).repeat_interleave(block // sub, 0)
        factors = torch.exp2(torch.linspace(-1.1, 0.75, 16, device=rotated.device))
        return search(rotated.view(-1, sub), parent * factors)[0].view(rotated.shape)

    return apply


VARIANTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]] = {
    "fp16 per group (128, or 64)": (fp16(128), lambda k: 16 / min(128, k & -k)),
    "fp16 per group + 4 bits per 32": (sub_scales(128, 32), lambda k: 16 / min(128, k & -k) + 4 / 32),
    "8 bits (4 + 4) per 32": (minifloat(4, 32), lambda k: 8 / 32),
    "8 bits (3 + 5) per 32, chosen": (minifloat(5, 32), lambda k: 8 / 32),
    "float32 per 32, the limit": (fp16(32), lambda k: 8 / 32),
    "8 bits (3 + 5) per 64": (minifloat(5, 64), lambda k: 8 / 64),
    "8 bits (3 + 5) per 16": (minifloat(5, 16), lambda k: 8 / 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bos", action="store_true", help="start each window with BOS, whatever the tokenizer does")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    reference, tokenizer = load_dense(args.gguf, dtype=torch.float32)
    reference = reference.eval().to(args.device)
    windows = text_windows(
        tokenizer, pathlib.Path(args.text).read_text(encoding="utf-8"), 1024, args.windows, bos=args.bos or None
    )
    names = plan_layers(reference)[0]
    print("| scales | bits per weight | rel. MSE | KL (over seeds) | top-1 |\n|---|---|---|---|---|", flush=True)
    for label, (method, cost) in VARIANTS.items():
        errors, scores, bits, weights = [], [], 0.0, 0
        for seed in range(args.seeds):
            model = copy.deepcopy(reference)
            with torch.no_grad():
                for name in names:
                    weight = model.get_submodule(name).weight
                    block = rotation_block(weight.shape[1], 128)
                    rounded = unrotate(method(rotate(weight, block, seed)), block, seed)
                    errors.append(((rounded - weight).square().sum() / weight.square().sum()).item())
                    bits += (BITS + cost(weight.shape[1])) * weight.numel()
                    weights += weight.numel()
                    weight.copy_(rounded)
            scores.append(compare(reference, {"model": model}, windows, progress=False)["model"])
        kl = [score.kl_mean or 0.0 for score in scores]
        print(
            f"| {label} | {bits / weights:.3f} | {statistics.mean(errors):.5f} | {statistics.mean(kl):.4f} "
            f"({min(kl):.4f}-{max(kl):.4f}) | {statistics.mean(score.top1 or 0.0 for score in scores):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
