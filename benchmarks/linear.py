"""Time of one linear layer on a GPU: ours and peers against bf16 cuBLAS, rotation included.

    python benchmarks/linear.py --output benchmarks/results/linear-h100.json
    python benchmarks/linear.py --search ...      # times every sensible schedule instead of using the shipped table
    python benchmarks/linear.py --bits 2 3 4+1 4+2 4+3 ...

CUDA-graph replay over rotating copies of the weights, more than twice the L2 cache in all, so every layer reads its weights
from memory as it does in a model. Medians, microseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from turboquant_weights import TurboQuantLinear
from turboquant_weights.kernels import linear as kernels
from turboquant_weights.kernels import tune
from turboquant_weights.kernels.schedule import INT8_TOKENS, choose, crossover, entry_of, gpu_name
from turboquant_weights.reference import PackedWeight

SHAPES = {
    "lab": ((4096, 4096), (18944, 3584), (3584, 18944), (8192, 8192)),
    "0.5b": ((896, 896), (1152, 896), (9728, 896), (896, 4864)),
    "1.5b": ((1536, 1536), (2048, 1536), (17920, 1536), (1536, 8960)),
    "7b": ((3584, 3584), (4608, 3584), (37888, 3584), (3584, 18944)),
    "32b": ((5120, 5120), (7168, 5120), (55296, 5120), (5120, 27648)),
    "72b": ((8192, 8192), (10240, 8192), (59136, 8192), (8192, 29568)),
}
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
BITS = ("4", "4+4")


def bits_of(label: str) -> tuple[int, int]:
    """
    >>> bits_of("3"), bits_of("4+2")
    ((3, 0), (4, 2))
    """
    bits, _, residual_bits = label.partition("+")
    return int(bits), int(residual_bits or 0)


def tinygemm(weights: list[Tensor]) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """PyTorch's own int4 kernel (torchao's default on this path): uniform grid, groups of 128."""
    packed = []
    for weight in weights:
        codes = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 2), device="cuda", dtype=torch.uint8)
        scales = torch.rand(weight.shape[1] // 128, weight.shape[0], 2, device="cuda", dtype=torch.bfloat16)
        packed.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales))
    return lambda i: lambda x: torch.ops.aten._weight_int4pack_mm(x, packed[i][0], 128, packed[i][1])


def bitsandbytes_nf4(weights: list[Tensor]) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """NF4 in blocks of 64."""
    import bitsandbytes

    packed = [bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64) for weight in weights]
    return lambda i: lambda x: bitsandbytes.matmul_4bit(x, packed[i][0].t(), quant_state=packed[i][1])


# Adapter: bf16 weights -> index -> function of the activation. One that cannot be built is skipped with a line.
PEERS = {"tinygemm": tinygemm, "bitsandbytes": bitsandbytes_nf4}


def compile_share(labels: list[str], index: int, count: int) -> None:
    """Fills Triton's cache on disk with one worker's share of all variants."""
    jobs = dict.fromkeys(
        (bits_of(label), tokens, schedule._replace(split=2) if getattr(schedule, "split", 1) > 2 else schedule)
        for label in labels
        for tokens in (1, 16, 32, 64, 128)
        for schedule in tune.candidates(tokens, 8192, 8192, *bits_of(label))
    )
    for bits, tokens, schedule in list(jobs)[index::count]:
        x = torch.randn(tokens, 8192, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        kernels.fused(x, tune.random_planes(1024, 8192, *bits), None, out, 8192, *bits, 128, 0, schedule)
    torch.cuda.synchronize()


def scratch_time(x: Tensor, planes: list[PackedWeight], rows: int, bits: tuple[int, int]) -> float:
    out = x.new_empty(x.shape[0], rows)
    layout = (x.shape[1], *bits, 128, 0)
    return tune.graph_time([lambda p=p: kernels.through_scratch(x, p, None, out, *layout) for p in planes])


def bytes_time(x: Tensor, planes: list[PackedWeight], rows: int, bits: tuple[int, int]) -> float:
    """With activations of 8 bits."""
    out = x.new_empty(x.shape[0], rows)
    layout = (x.shape[1], *bits, 128, 0)
    return tune.graph_time([lambda p=p: kernels.through_bytes(x, p, None, out, *layout) for p in planes])


def measure_ours(x: Tensor, planes: list[PackedWeight], rows: int, bits: tuple[int, int], searching: bool) -> dict:
    tokens, columns = x.shape
    warp_groups = kernels.has_warp_groups(x.device, columns)
    if tokens > crossover(bits[1], rows, columns, warp_groups):
        return dict(ours_us=scratch_time(x, planes, rows, bits), kind=None, schedule=None)
    if searching:
        schedule, microseconds = tune.tune(tokens, rows, columns, *bits, planes)
    else:
        schedule = choose(gpu_name(x.device), tokens, rows, columns, *bits, warp_groups)
        microseconds = tune.schedule_time(x, planes, *bits, schedule, 15)
    return dict(ours_us=microseconds, **entry_of(schedule))


def measure(
    rows: int, columns: int, tokens: tuple[int, ...], labels: list[str], searching: bool, copy_gbps: float
) -> list[dict]:
    cells = []
    copies = max(2, min(8, -(-(160 << 20) // (2 * rows * columns))))
    dense = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    inputs = [torch.randn(m, columns, device="cuda", dtype=torch.bfloat16) for m in tokens]
    bf16 = [tune.graph_time([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense * 2]) for x in inputs]
    peers: dict[str, list[float | None]] = {}
    for name, adapter in PEERS.items():
        try:
            layer = adapter([*dense, *dense])
            # Beyond 256 tokens these kernels take milliseconds.
            layers = [layer(i) for i in range(2 * copies)]
            peers[name] = [
                tune.graph_time([lambda f=f, x=x: f(x) for f in layers], 5) if len(x) <= 256 else None for x in inputs
            ]
        except Exception as error:  # whatever a foreign package raises: a line, and the others go on
            print(f"{name}: skipped for {rows} x {columns}: {error!r:.120}", flush=True)
    del dense
    for label in labels:
        bits = bits_of(label)
        planes = tune.cold_copies(rows, columns, *bits)
        for i, (x, reference) in enumerate(zip(inputs, bf16, strict=True)):
            ours = measure_ours(x, planes, rows, bits, searching)
            rate = planes[0].nbytes / ours["ours_us"] / 1e3
            cell = dict(rows=rows, columns=columns, bits=label, tokens=len(x), bf16_us=round(reference, 2))
            cell.update(ours_us=round(ours["ours_us"], 2), speedup=round(reference / ours["ours_us"], 3))
            cell.update(kind=ours["kind"], schedule=ours["schedule"])
            cell.update(weight_GBps=round(rate), of_copy=round(rate / copy_gbps, 3))
            if len(x) >= INT8_TOKENS:
                cell["int8_us"] = round(bytes_time(x, planes, rows, bits), 2)
            cell["peers_us"] = {name: times[i] and round(times[i], 2) for name, times in peers.items()}
            cells.append(cell)
            print(cell, flush=True)
    return cells


def table(report: dict) -> str:
    """Markdown: speed over bf16, one line per layer and format, then one per peer."""
    tokens = report["tokens"]
    lines = [
        f"{report['gpu']}, PyTorch {report['torch']}, Triton {report['triton']}, {report['date']}; `{report['command']}`.",
        f"Speed over bf16 cuBLAS (microseconds), rotation included, weights cold. Copy: {report['copy_GBps']} GB/s. "
        f"Host time per eager call: {report['host_us']['ours']} us, nn.Linear {report['host_us']['linear']} us.",
        "",
        "| rows x columns | weights | " + " | ".join(f"m = {m}" for m in tokens) + " |",
        "|---|---|" + "---|" * len(tokens),
    ]
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in report["cells"]:
        shape = f"{cell['rows']} x {cell['columns']}"
        times = {cell["bits"]: cell["ours_us"]}
        if max(tokens) >= INT8_TOKENS:
            times[f"{cell['bits']}, int8 activations"] = cell.get("int8_us")
        if cell["bits"] == report["cells"][0]["bits"]:  # peers once
            times |= cell["peers_us"]
        for label, time_us in times.items():
            text = f"{cell['bf16_us'] / time_us:.2f} ({time_us:.1f})" if time_us else ""
            rows.setdefault((shape, label), []).append(text)
    lines += [f"| {shape} | {label} | " + " | ".join(values) + " |" for (shape, label), values in rows.items()]
    return "\n".join(lines) + "\n"


def host_time(call: Callable[[], object], count: int = 300) -> float:
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


def host_times() -> dict[str, float]:
    """Of modules of 1024 x 1024, small enough that the GPU is never behind."""
    dense = torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16)
    ours = TurboQuantLinear.from_linear(dense)
    x = torch.randn(1, 1, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        return {name: round(host_time(lambda m=m: m(x)), 1) for name, m in (("ours", ours), ("linear", dense))}


def copy_bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / tune.graph_time([lambda: target.copy_(source)] * 2) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="time all schedules instead of using the shipped table")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["lab", "7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--bits", nargs="+", default=list(BITS), help="of the weights, e.g. 3 4+2")
    parser.add_argument("--no-peers", action="store_true", help="time bf16 and ours only")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further shape after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/linear.py needs a CUDA GPU")
    started = time.time()
    if arguments.no_peers:
        PEERS.clear()
    if arguments.search:
        count = max(1, min(14, (os.cpu_count() or 2) - 2))
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=compile_share, args=(arguments.bits, i, count)) for i in range(count)]
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
        command=" ".join(["python", "benchmarks/linear.py", *sys.argv[1:]]),
        tokens=arguments.tokens,
        copy_GBps=round(copy_bandwidth()),
        host_us=host_times(),
        cells=[],
    )
    print(report, flush=True)
    for rows, columns in dict.fromkeys(shape for name in arguments.shapes for shape in SHAPES[name]):
        if time.time() - started > arguments.seconds:
            print(f"{rows} x {columns}: skipped, --seconds is over")
            continue
        report["cells"] += measure(
            rows, columns, tuple(arguments.tokens), arguments.bits, arguments.search, report["copy_GBps"]
        )
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
