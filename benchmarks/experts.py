"""What a block of quantized experts costs beside the dense one: bytes, time of a forward pass, error of its output.

    python benchmarks/experts.py --device cuda
    python benchmarks/experts.py --device cpu --experts 16

One block of Qwen3-30B-A3B's shapes (128 experts of 768 x 2048, 8 per token) with random weights, in bf16, beside what
Transformers offers for dense experts. Routing is random: every token chooses 8 experts. Milliseconds of the wall, the best
of 5 rounds. ``decoded``: experts whose planes a pass reads, of all. ``error``: norm of the difference from float32 experts
with the same decoded weights, over the norm of the output; the dense row's is that of bf16 itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import platform
import sys
import time

import torch
import transformers
from torch import Tensor, nn

import turboquant_weights as tq
from turboquant_weights.experts import TurboQuantExperts

SETTINGS = {"4": (4, 0), "4+4": (4, 4)}


def block(experts: int, hidden: int, inner: int, device: torch.device) -> nn.Module:
    config = transformers.Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = "grouped_mm"
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    with device:
        made = Qwen3MoeExperts(config).bfloat16()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        parameter.requires_grad_(False)
    return nn.ModuleDict({"experts": made})


@torch.no_grad()
def milliseconds(module: nn.Module, arguments: tuple[Tensor, ...], repeats: int) -> float:
    cuda = arguments[0].is_cuda
    module(*arguments)
    best = float("inf")
    for _ in range(5):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            module(*arguments)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return round(best * 1e3, 3)


@torch.no_grad()
def measure(experts: int, hidden: int, inner: int, choices: int, tokens: list[int], device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    dense = block(experts, hidden, inner, device)
    modules = {"bf16": dense}
    for label, bits in SETTINGS.items():
        modules[label] = copy.deepcopy(dense)
        tq.quantize_model(modules[label], tq.TurboQuantConfig(*bits), progress=False)
    rows = []
    for count in tokens:
        x = torch.randn(count, hidden, device=device, dtype=torch.bfloat16)
        chosen = torch.rand(count, experts, device=device).topk(choices).indices
        weights = torch.rand(count, choices, device=device, dtype=torch.bfloat16)
        for label, module in modules.items():
            layer = module["experts"]
            row = {"weights": label, "tokens": count, "decoded": f"{chosen.unique().numel()} of {experts}"}
            row["megabytes"] = round(sum(p.nbytes for p in layer.parameters()) / 1e6, 4)
            row["ms"] = milliseconds(layer, (x, chosen, weights), 20 if count < 256 else 5)
            if label == "bf16":
                layer.config._experts_implementation = "batched_mm"
                row["ms_batched"] = milliseconds(layer, (x, chosen, weights), 5) if count <= 16 else None
                layer.config._experts_implementation = "grouped_mm"
            row["error"] = round(error(layer, (x, chosen, weights)), 5)
            print(row, flush=True)
            rows.append(row)
    return rows


def error(layer: nn.Module, arguments: tuple[Tensor, ...]) -> float:
    """Against a loop over the experts in float32."""
    x, chosen, weights = arguments
    up, down = (
        w.dequantize(torch.float32) if isinstance(w, TurboQuantExperts) else w for w in (layer.gate_up_proj, layer.down_proj)
    )
    expected = torch.zeros(x.shape, device=x.device)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        gate, value = (x[rows].float() @ up[expert].float().T).chunk(2, -1)
        out = (nn.functional.silu(gate) * value) @ down[expert].float().T
        expected[rows] += out * weights[rows, place, None].float()
    return float((layer(*arguments).float() - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    rows = measure(args.experts, args.hidden, args.inner, args.choices, args.tokens, args.device)
    cuda = args.device.type == "cuda"
    facts = {
        "command": " ".join(pathlib.Path(a).name if "/" in a else a for a in sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": {key: getattr(args, key) for key in ("experts", "hidden", "inner", "choices")},
        "rows": rows,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
