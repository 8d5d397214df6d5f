"""Time of one linear layer on a GPU: ours against bf16 cuBLAS, rotation included.

    python benchmarks/linear.py --output benchmarks/results/linear-h100.json
    python benchmarks/linear.py --search ...      # times every sensible schedule: the source of the table in schedule.py

CUDA-graph replay over rotating copies of the weights, more than twice the L2 cache in all, so every layer reads its weights
from memory as it does in a model. Medians, microseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import triton
from torch import Tensor

from turboquant_weights.kernels import linear as kernels
from turboquant_weights.kernels.schedule import Schedule, choose, crossover
from turboquant_weights.reference import PackedWeight

SHAPES = ((4096, 4096), (18944, 3584), (3584, 18944), (37888, 3584), (4608, 3584), (3584, 3584), (8192, 8192))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 2048)
RESIDUALS = (0, 4)
TILES = {  # block_m -> (block_n, warps, stages)
    16: ((64, 4, 1), (128, 4, 1), (128, 8, 1)),
    32: ((64, 4, 1), (128, 4, 1), (128, 8, 1)),
    64: ((128, 4, 1), (128, 4, 3), (128, 8, 1), (128, 8, 3)),
    128: ((128, 8, 1), (128, 8, 3)),
}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
COLD_BYTES = 160 << 20
PEERS = ("bitsandbytes", "torchao", "gemlite", "humming")


def random_planes(rows: int, columns: int, residual_bits: int, seed: int = 0) -> PackedWeight:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, device="cuda", dtype=dtype, generator=generator)

    return PackedWeight(
        codes=draw(0, 256, (rows, columns // 2)),
        residual=draw(0, 256, (rows, columns * residual_bits // 8)) if residual_bits else None,
        scales=draw(170, 240, (rows, columns // 32)),
        exponents=draw(-22, -18, (rows,), torch.int8),
    )


def graph_time(calls: list, repeats: int = 15) -> float:
    """Median microseconds per call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[2:])


def candidates(tokens: int, rows: int, columns: int) -> list[Schedule]:
    largest = min(128, max(16, triton.next_power_of_2(tokens)))
    out = []
    for block_m in {largest, max(16, largest // 2)}:
        for block_n, warps, stages in TILES[block_m]:
            for split in SPLITS:
                programs = -(-rows // block_n) * -(-tokens // block_m) * split
                if programs >= 100 and programs * warps <= 132 * 56 and split <= columns // 256:
                    out.append(Schedule(block_m, block_n, split, stages, warps))
    return out


def fused(x: Tensor, packed: PackedWeight, out: Tensor, residual_bits: int, schedule: Schedule) -> None:
    kernels.fused(x, packed, None, out, x.shape[1], 4, residual_bits, 128, 0, schedule)


def compile_share(index: int, count: int) -> None:
    """Fills Triton's cache on disk with one worker's share of all variants."""
    jobs = [
        (residual, block_m, block_n, warps, stages, split)
        for residual in RESIDUALS
        for block_m, tiles in TILES.items()
        for block_n, warps, stages in tiles
        for split in (1, 2)
    ]
    for residual, block_m, block_n, warps, stages, split in jobs[index::count]:
        x = torch.randn(block_m, 4096, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(block_m, 4096, device="cuda", dtype=torch.bfloat16)
        try:
            fused(x, random_planes(4096, 4096, residual), out, residual, Schedule(block_m, block_n, split, stages, warps))
        except Exception as error:
            print(f"cannot compile {(residual, block_m, block_n, warps, stages, split)}: {error!r:.120}", file=sys.stderr)
    torch.cuda.synchronize()


def fused_time(x: Tensor, planes: list[PackedWeight], out: Tensor, residual_bits: int, schedule: Schedule, n: int) -> float:
    return graph_time([lambda q=q: fused(x, q, out, residual_bits, schedule) for q in planes], n)


def scratch_time(x: Tensor, planes: list[PackedWeight], out: Tensor, residual_bits: int, n: int) -> float:
    arguments = (None, out, x.shape[1], 4, residual_bits, 128, 0)
    return graph_time([lambda q=q: kernels._through_scratch(x, q, *arguments) for q in planes], n)


def search(x: Tensor, planes: list[PackedWeight], out: Tensor, residual_bits: int) -> Schedule:
    """The fastest of all candidates: a quick round for all, a careful one for the best three."""
    columns, rows = x.shape[1], out.shape[1]
    heuristic = choose("unknown", x.shape[0], rows, columns, residual_bits)
    times = []
    for schedule in {heuristic, *candidates(x.shape[0], rows, columns)}:
        try:
            times.append((fused_time(x, planes, out, residual_bits, schedule, 3), schedule))
        except Exception as error:
            print(f"{schedule}: {error!r:.120}", file=sys.stderr)
    return min((fused_time(x, planes, out, residual_bits, schedule, 9), schedule) for _, schedule in sorted(times)[:3])[1]


def measure_cell(x: Tensor, planes: list[PackedWeight], rows: int, residual_bits: int, bf16: float, searching: bool) -> dict:
    tokens, columns = x.shape
    out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
    schedule = scratch = None
    if tokens <= crossover(4, residual_bits, columns) or (searching and tokens <= 512):
        schedule = choose(torch.cuda.get_device_name(), tokens, rows, columns, residual_bits)
        if searching:
            schedule = search(x, planes, out, residual_bits)
        ours = fused_time(x, planes, out, residual_bits, schedule, 15)
        if searching and tokens >= 128:
            scratch = scratch_time(x, planes, out, residual_bits, 5)
    else:
        ours = scratch_time(x, planes, out, residual_bits, 15)
    bytes_ = planes[0].nbytes
    cell = dict(rows=rows, columns=columns, residual_bits=residual_bits, tokens=tokens, bf16_us=round(bf16, 2))
    cell.update(ours_us=round(ours, 2), speedup=round(bf16 / ours, 3), weight_GBps=round(bytes_ / ours / 1e3))
    cell.update(schedule=schedule and list(schedule), scratch_us=scratch and round(scratch, 1))
    print(
        f"{rows}x{columns} {'4+4' if residual_bits else '4'} m={tokens}: bf16 {bf16:.1f} ours {ours:.1f} "
        f"({bf16 / ours:.2f}x) {tuple(schedule or ())}{f' scratch {scratch:.1f}' if scratch else ''}",
        flush=True,
    )
    return cell


def measure(rows: int, columns: int, searching: bool) -> list[dict]:
    cells = []
    copies = max(2, min(8, -(-COLD_BYTES // (2 * rows * columns))))
    dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    inputs = [torch.randn(m, columns, device="cuda", dtype=torch.bfloat16) for m in TOKENS]
    bf16 = [graph_time([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense * 2]) for x in inputs]
    del dense
    for residual_bits in RESIDUALS:
        count = -(-COLD_BYTES // (rows * columns * (4 + residual_bits) // 8))
        planes = [random_planes(rows, columns, residual_bits, i) for i in range(max(3, min(24, count)))]
        for x, reference in zip(inputs, bf16, strict=True):
            cells.append(measure_cell(x, planes, rows, residual_bits, reference, searching))
    return cells


def table(report: dict) -> str:
    """Markdown: speed over bf16, one line per layer and format."""
    lines = [
        f"{report['gpu']}, PyTorch {report['torch']}, Triton {report['triton']}, {report['date']}; `{report['command']}`.",
        f"Speed over bf16 cuBLAS (our microseconds), rotation included, weights cold. Copy: {report['copy_GBps']} GB/s. "
        f"Host time per eager call: {report['host_us']['ours']} us, nn.Linear {report['host_us']['linear']} us.",
        "",
        "| rows x columns | bits | " + " | ".join(f"m = {m}" for m in TOKENS) + " |",
        "|---|---|" + "---|" * len(TOKENS),
    ]
    rows: dict[tuple, list[str]] = {}
    for cell in report["cells"]:
        key = (f"{cell['rows']} x {cell['columns']}", f"4+{cell['residual_bits']}" if cell["residual_bits"] else "4")
        best = min(t for t in (cell["ours_us"], cell["scratch_us"]) if t)
        rows.setdefault(key, []).append(f"{cell['bf16_us'] / best:.2f} ({best:.1f})")
    lines += [f"| {shape} | {label} | " + " | ".join(values) + " |" for (shape, label), values in rows.items()]
    return "\n".join(lines) + "\n"


def host_time(call, count: int = 300) -> float:
    """Microseconds of host time per call in eager mode."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / count * 1e6


def copy_bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_time([lambda: target.copy_(source)] * 2) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="time all schedules instead of using the shipped table")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further shape after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/linear.py needs a CUDA GPU")
    for peer in PEERS:
        print(f"{peer}: not measured (no adapter yet)")
    started = time.time()
    if arguments.search:
        count = max(1, min(14, (os.cpu_count() or 2) - 2))
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=compile_share, args=(i, count)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(f"compiled in {time.time() - started:.0f} s", flush=True)
    report: dict = dict(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.date.today().isoformat(),
        command=" ".join(["python", "benchmarks/linear.py", *(["--search"] if arguments.search else [])]),
        copy_GBps=round(copy_bandwidth()),
        cells=[],
    )
    packed = random_planes(4096, 4096, 0)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    dense = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = dict(in_features=4096, bits=4, residual_bits=0, group_size=128, seed=0)
    op = torch.ops.turboquant_weights.linear
    report["host_us"] = dict(
        ours=round(host_time(lambda: op(x, *packed, None, *layer.values())), 1), linear=round(host_time(lambda: dense(x)), 1)
    )
    print(report, flush=True)
    for rows, columns in SHAPES:
        if time.time() - started > arguments.seconds:
            print(f"{rows}x{columns}: skipped, --seconds is over")
            continue
        report["cells"] += measure(rows, columns, arguments.search)
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
