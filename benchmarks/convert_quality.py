"""What a quantized model loses on the way to 4-bit formats that others serve: the choice behind ``convert --to int4``.

    python benchmarks/convert_quality.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw

The linear layers of the reference are quantized by this package (4+4 and 4 bits), decoded, and rounded again by each
format, as matrices; embedding and head stay as they are. "as converted" is the checkpoint that ``convert_checkpoint``
writes, read by the compressed-tensors package through Transformers. Float32, CPU.

A GGUF reference may lie on the grid of one of the formats: SmolLM2's is Q4_1, which then comes back without a loss. Such a
row says nothing about other models; the errors on Gaussian matrices, which are printed too, do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from cpu import machine
from torch import Tensor, nn

import turboquant_weights as tq
from turboquant_weights import evaluation
from turboquant_weights.int4 import GROUP_SIZES, PER_WORD, Int4Weight, round_to_int4
from turboquant_weights.integrations.transformers import load_dense

Rounding = Callable[[Tensor], Tensor]


def decode(weight: Int4Weight, columns: int) -> Tensor:
    """The matrix that compressed-tensors computes with."""
    fields = ((weight.packed[..., None] >> (4 * torch.arange(PER_WORD))) & 15) - 8
    return fields.flatten(1) * weight.scales.float().repeat_interleave(columns // weight.scales.shape[1], 1)


def group_of(weight: Tensor, at_most: int) -> int:
    return next(g for g in GROUP_SIZES if g <= at_most and weight.shape[1] % g == 0)


def shipped(at_most: int) -> Rounding:
    return lambda weight: decode(round_to_int4(weight, group_of(weight, at_most)), weight.shape[1])


def largest(at_most: int) -> Rounding:
    """Positive scales that just reach the largest magnitude."""

    def round_(weight: Tensor) -> Tensor:
        groups = weight.unflatten(1, (-1, group_of(weight, at_most)))
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
        return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)

    return round_


def min_max(at_most: int) -> Rounding:
    def round_(weight: Tensor) -> Tensor:
        groups = weight.unflatten(1, (-1, group_of(weight, at_most)))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).bfloat16().float()
        zero = (-8 - low / scale).round().clamp(-8, 7)
        return ((((groups / scale).round() + zero).clamp(-8, 7) - zero) * scale).flatten(1)

    return round_


def ggml(name: str) -> Rounding:
    kind = gguf.GGMLQuantizationType[name]
    return lambda weight: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind).copy())


# Groups of 128 are groups of 64 where the columns are SmolLM2's 576.
FORMATS: dict[str, Rounding] = {
    "bfloat16": lambda weight: weight.bfloat16().float(),
    "int4, 128, as shipped": shipped(128),
    "int4, 128, largest magnitude": largest(128),
    "int4, 128, zero points, min-max": min_max(128),
    "int4, 32, as shipped": shipped(32),
    "GGUF Q4_0": ggml("Q4_0"),
    "GGUF Q4_1": ggml("Q4_1"),
}


def relative_error(rounded: Tensor, weight: Tensor) -> float:
    return float((rounded - weight).square().sum() / weight.square().sum())


def measure(model: nn.Module, windows: Tensor, bits: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Each format after ``bits`` of this package; the reference is ``model``, which is put back."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    original = {name: layer.weight.data for name, layer in layers.items()}
    config = tq.TurboQuantConfig(*bits)
    decoded = {name: tq.TurboQuantLinear.from_linear(layer, config).dequantize() for name, layer in layers.items()}
    with torch.no_grad():
        expected = [model(window[None]).logits[0].log_softmax(-1) for window in windows]
    rows = {}
    for label, round_ in {"quantized": lambda weight: weight, **FORMATS}.items():
        errors = []
        for name, layer in layers.items():
            layer.weight.data = round_(decoded[name])
            errors.append(relative_error(layer.weight.data, decoded[name]))
        rows[label] = {"error": sum(errors) / len(errors), **divergence(model, windows, expected)}
        print(bits, label, rows[label], flush=True)
    for name, layer in layers.items():
        layer.weight.data = original[name]
    return rows


def divergence(model: nn.Module, windows: Tensor, expected: list[Tensor]) -> dict[str, float]:
    kl, top1 = [], []
    with torch.no_grad():
        for window, reference in zip(windows, expected, strict=True):
            logits = model(window[None]).logits[0].float().log_softmax(-1)
            kl.append((reference.exp() * (reference - logits)).sum(-1).mean())
            top1.append((reference.argmax(-1) == logits.argmax(-1)).float().mean())
    return {"kl": float(torch.stack(kl).mean()), "top1": float(torch.stack(top1).mean())}


def as_converted(model: nn.Module, windows: Tensor, bits: tuple[int, int]) -> dict[str, float]:
    """Through the files: ``quantize_model``, ``save``, ``convert_checkpoint``, and the reader of the format."""
    import transformers

    with torch.no_grad():
        expected = [model(window[None]).logits[0].log_softmax(-1) for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        tq.quantize_model(model, tq.TurboQuantConfig(*bits), progress=False)
        tq.save(model, f"{folder}/q")
        report = tq.convert_checkpoint(f"{folder}/q", f"{folder}/int4", "int4", progress=False)
        reader = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/int4", dtype=torch.float32)
        return {"error": report.error, "group_size": report.group_size, **divergence(reader, windows, expected)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    gaussian = torch.randn(1024, 1024)
    matrices = {label: relative_error(round_(gaussian), gaussian) for label, round_ in FORMATS.items()}
    print("Gaussian matrix:", json.dumps(matrices, indent=1))
    model, tokenizer = load_dense(args.gguf, dtype=torch.float32)
    text = args.text.read_text(encoding="utf-8")
    windows = evaluation.text_windows(tokenizer, text, args.window_length, args.windows)
    rows = {}
    for bits in ((4, 4), (4, 0)):
        rows["+".join(map(str, bits))] = measure(model, windows, bits)
    rows["4+4"]["as converted"] = as_converted(model, windows, (4, 4))
    print("as converted", rows["4+4"]["as converted"])
    if args.out:
        facts = {"command": " ".join(["convert_quality.py", *sys.argv[1:]]), **machine()}
        args.out.write_text(json.dumps({**facts, "gaussian": matrices, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
