"""What vLLM's layers call, on a GPU without vLLM: a CUDA graph gives the eager result, in the time of ``TurboQuantLinear``.

    python benchmarks/vllm_apply.py --output benchmarks/results/vllm-apply-h100.json

Layers of Qwen2.5-7B as vLLM merges and cuts them. For each: the result replayed from a CUDA graph must be that of an eager
call bit for bit, on new input too; parts of two ranks must add up to the whole; and the replay is timed beside that of one
``TurboQuantLinear`` with the same rows and columns, over copies that are more than the L2 cache. Ends with status 1 if a
result differs or a layer that is one matrix costs more than 3 % over ``TurboQuantLinear``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from turboquant_weights import TurboQuantConfig, TurboQuantLinear
from turboquant_weights.integrations.vllm.shards import Shard, Shards
from turboquant_weights.kernels import tune
from turboquant_weights.reference import PackedWeight

TOKENS = (1, 8, 32, 256)
# name: rows and residual bits of each member, columns, and ranks that share the columns
LAYERS = {
    "qkv, 4": (((3584, 0), (512, 0), (512, 0)), 3584, 1),
    "qkv, 4+4": (((3584, 4), (512, 4), (512, 4)), 3584, 1),
    "qkv, 4 4 4+2": (((3584, 0), (512, 0), (512, 2)), 3584, 1),
    "gate and up, 4": (((18944, 0), (18944, 0)), 3584, 1),
    "down, 4+4, one of 2 ranks": (((3584, 4),), 18944, 2),
    "down of 0.5B, 4, one of 2 ranks": (((896, 0),), 4864, 2),
    "o of 0.5B, 4, one of 2 ranks (7 blocks)": (((896, 0),), 896, 2),
}


def build(members: list[tuple[PackedWeight, int]], columns: int, start: int, stop: int) -> Shards:
    config = {residual: TurboQuantConfig(4, residual) for _, residual in members}
    shards = [Shard(f"layer{i}", len(planes.codes), config[residual]) for i, (planes, residual) in enumerate(members)]
    with torch.device("cuda"):
        layer = Shards(shards, columns, 128, 0, torch.bfloat16, start, stop)
    for index, (planes, _) in enumerate(members):
        for plane, tensor in planes._asdict().items():
            if tensor is not None:
                layer.put(index, plane, tensor, 0, len(tensor))
    layer.check_complete()
    return layer


def captured(layer: torch.nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    return graph, out


def host_time(layer: torch.nn.Module, x: Tensor) -> float:
    """Microseconds of an eager call on the host."""
    for _ in range(20):
        layer(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        layer(x)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / 200 * 1e6


@torch.inference_mode()
def measure(name: str) -> list[dict]:
    shapes, columns, ranks = LAYERS[name]
    kept = columns // ranks
    copies = max(3, min(24, -(-(160 << 20) // (sum(rows for rows, _ in shapes) * kept // 2))))
    sets = [
        [
            (tune.random_planes(rows, columns, 4, residual, 10 * copy + i), residual)
            for i, (rows, residual) in enumerate(shapes)
        ]
        for copy in range(copies)
    ]
    parts = [[build(members, columns, rank * kept, rank * kept + kept) for members in sets] for rank in range(ranks)]
    cells = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        mine = x[:, -kept:].contiguous()
        last = parts[-1][0]  # of the last rank: the one that starts in the middle of a block
        graph, out = captured(last, mine)
        same = True
        for _ in range(3):
            mine.normal_()
            graph.replay()
            same &= torch.equal(out, last(mine))
        whole = [build(sets[0], columns, 0, columns)(x)] if ranks > 1 else [out]
        total = sum(part[0](x[:, r * kept : (r + 1) * kept]).double() for r, part in enumerate(parts))
        error = float((total - whole[0].double()).norm() / whole[0].double().norm()) if ranks > 1 else 0.0
        plain = []
        if len({residual for _, residual in shapes}) == 1:
            residual = shapes[0][1]
            config, rows = TurboQuantConfig(4, residual), sum(rows for rows, _ in shapes)
            plain = [
                TurboQuantLinear.from_packed(tune.random_planes(rows, kept, 4, residual, copy), kept, None, config)
                for copy in range(copies)
            ]
        times = [[], []]  # alternating, so that both see the same clocks
        for _ in range(3):
            times[0].append(tune.graph_time([lambda p=p, x=mine: p(x) for p in parts[-1]]))
            if plain:
                times[1].append(tune.graph_time([lambda p=p, x=mine: p(x) for p in plain]))
        ours, theirs = min(times[0]), min(times[1], default=None)
        cell = dict(layer=name, tokens=tokens, graph_equals_eager=same, error_of_the_sum=round(error, 5))
        cell.update(vllm_us=round(ours, 2), linear_us=theirs and round(theirs, 2), host_us=round(host_time(last, mine), 1))
        cell.update(linear_host_us=round(host_time(plain[0], mine), 1) if plain else None)
        # Parts that share a block have up to two blocks more, and a pad: they are told, not judged.
        cell["judged"] = bool(plain) and last.window.before == last.window.after == 0
        cell["passes"] = same and error < 0.01 and (not cell["judged"] or ours < 1.03 * theirs + 0.2)
        cells.append(cell)
        print(cell, flush=True)
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cells = [cell for name in args.layers for cell in measure(name)]
    report = dict(
        date=datetime.date.today().isoformat(),
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        command="python " + " ".join(sys.argv),
        cells=cells,
    )
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [cell for cell in cells if not cell["passes"]]
    print(f"{len(cells) - len(failed)} of {len(cells)} pass")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
