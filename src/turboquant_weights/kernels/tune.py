"""Searching the schedule of a shape on the GPU at hand. Nothing here runs unless asked for: the command ``tune``."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from ..codebook import HALF_INTEGER_LEVELS, POLYNOMIALS
from ..errors import ScheduleError
from ..reference import PackedWeight
from .few import FEW_TOKENS
from .linear import fused, has_warp_groups
from .schedule import (
    SLICE_ROWS,
    TOKENS,
    Integer,
    Rotating,
    Schedule,
    Slices,
    SplitK,
    StreamK,
    choose,
    entry_of,
    gpu_name,
    read,
    streamk_stages,
)
from .slices import MOST_TOKENS

_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_TILES = {  # block_m -> (block_n, warps, stages)
    16: ((64, 4, 1), (128, 8, 1)),
    32: ((64, 4, 1), (128, 8, 1)),
    64: ((64, 4, 3), (128, 8, 1), (128, 8, 3)),
    128: ((64, 4, 2), (64, 4, 3)),
}
_COLD_BYTES = 160 << 20  # more than any L2 cache holds


def random_planes(
    rows: int, columns: int, bits: int, residual_bits: int, seed: int = 0, device: torch.device | str = "cuda"
) -> PackedWeight:
    """A layer of random codes; ``columns`` is a multiple of 32."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, device=device, dtype=dtype, generator=generator)

    return PackedWeight(
        codes=draw(0, 256, (rows, columns * bits // 8)),
        residual=draw(0, 256, (rows, columns * residual_bits // 8)) if residual_bits else None,
        scales=draw(170, 240, (rows, columns // 32)),
        exponents=draw(-22, -18, (rows,), torch.int8),
    )


def cold_copies(rows: int, columns: int, bits: int, residual_bits: int) -> list[PackedWeight]:
    """Layers enough that none is in the L2 cache when its turn comes."""
    count = -(-_COLD_BYTES // (rows * columns * (bits + residual_bits) // 8))
    return [random_planes(rows, columns, bits, residual_bits, i) for i in range(max(3, min(24, count)))]


def graph_time(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Median microseconds per call in a CUDA graph."""
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


def schedule_time(
    x: Tensor, planes: Sequence[PackedWeight], bits: int, residual_bits: int, schedule: Schedule, repeats: int
) -> float:
    """Microseconds of one layer, rotation included."""
    out = x.new_empty(x.shape[0], planes[0].codes.shape[0])
    layout = (x.shape[1], bits, residual_bits, 128, 0)
    return graph_time([lambda p=p: fused(x, p, None, out, *layout, schedule) for p in planes], repeats)  # type: ignore[misc]


def candidates(
    tokens: int, rows: int, columns: int, bits: int, residual_bits: int, warp_groups: bool = False
) -> list[Schedule]:
    """Every schedule worth timing: enough programs for an H100, not more than a few waves. ``warp_groups``: `streamk.py`
    runs."""
    tiles = -(-columns // 128)
    out: list[Schedule] = []
    if tokens == 1:
        out += [Rotating(warps) for warps in (1, 2, 4, 8) if warps == 1 or 2 * warps <= tiles]
    if tokens <= FEW_TOKENS and not residual_bits and Integer.serves(columns):
        for height, warps, split in itertools.product((16, 32), (2, 4, 8), _SPLITS):
            total, integer = -(-rows // height) * warps * split, Integer(height, warps, split, 2)
            if total >= 1000 and (split == 1 or total <= 4000) and 2 * warps * split <= tiles and integer.fits(bits):
                out.append(integer)
    if tokens <= MOST_TOKENS:
        for warps, split in itertools.product((2, 4, 8), _SPLITS):
            total = -(-rows // SLICE_ROWS) * warps * split
            if 1000 <= total <= 10_000 and warps * split <= tiles:
                out.append(Slices(SLICE_ROWS, warps, split, 0))
                if warps == 4:  # a table takes the room of more programs of two, and of eight is none faster
                    heights = (16, 32) if total >= 2000 else (16,)
                    out += [Slices(height, warps, split, looked_up) for height in heights for looked_up in (1, 2)]
    if warp_groups and (tokens > 1 or residual_bits):
        block_m = min(256, max(16, triton.next_power_of_2(tokens)))
        for tile in ((block_m, 2), (max(16, block_m // 2), 2), (min(block_m, 128), 3)):
            schedule = StreamK(*tile, streamk_stages(*tile, rows * columns, bits, residual_bits))
            out += [schedule] if schedule.serves(columns) else []
    largest = min(128, max(16, triton.next_power_of_2(tokens)))
    for block_m in {largest, max(16, largest // 2)}:
        for block_n, warps, stages in _TILES[block_m]:
            for split in _SPLITS:
                programs = -(-rows // block_n) * -(-tokens // block_m) * split
                if programs >= 100 and programs * warps <= 132 * 56 and 2 * split <= tiles:
                    out.append(SplitK(block_m, block_n, split, stages, warps))
    return out


def tune(
    tokens: int, rows: int, columns: int, bits: int, residual_bits: int, planes: Sequence[PackedWeight] | None = None
) -> tuple[Schedule, float]:
    """The fastest schedule and its microseconds: a quick round over all candidates, a careful one over the best three."""
    planes = planes or cold_copies(rows, columns, bits, residual_bits)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    warp_groups = has_warp_groups(x.device, columns)
    default = choose(gpu_name(x.device), tokens, rows, columns, bits, residual_bits, warp_groups)
    quick = []
    for schedule in dict.fromkeys([default, *candidates(tokens, rows, columns, bits, residual_bits, warp_groups)]):
        try:
            quick.append((schedule_time(x, planes, bits, residual_bits, schedule, 3), schedule))
        except triton.runtime.errors.OutOfResources:
            continue  # a tile too large for this GPU's shared memory
    quick.sort(key=lambda pair: pair[0])
    careful = [(schedule_time(x, planes, bits, residual_bits, schedule, 9), schedule) for _, schedule in quick[:3]]
    microseconds, best = min(careful, key=lambda pair: pair[0])
    return best, microseconds


def tune_file(
    shapes: Sequence[tuple[int, int]], bits: int, residual_bits: int, tokens: Sequence[int] | None, path: Path
) -> Iterator[str]:
    """Adds the best schedules of ``shapes`` (rows, columns) to the JSON file ``path``; yields a line for each."""
    unknown = set(tokens or ()) - set(TOKENS)
    exist = bits in HALF_INTEGER_LEVELS if residual_bits == 0 else (bits, residual_bits) in POLYNOMIALS
    if not exist or unknown:
        raise ScheduleError(
            f"bits {bits}+{residual_bits}, tokens {sorted(unknown)}: tuning knows 2 to 4 bits, residuals of 0 to 4 bits, "
            f"and tokens {', '.join(map(str, TOKENS))}"
        )
    entries = []
    if path.exists():
        read(path)  # raises unless it is a file of schedules
        entries = json.loads(path.read_text(encoding="utf-8"))
    gpu = gpu_name(torch.device("cuda", torch.cuda.current_device()))
    for rows, columns in shapes:
        planes = cold_copies(rows, columns, bits, residual_bits)
        for count in tokens or TOKENS:
            best, microseconds = tune(count, rows, columns, bits, residual_bits, planes)
            key = dict(gpu=gpu, rows=rows, columns=columns, bits=bits, residual_bits=residual_bits, tokens=count)
            entries = [entry for entry in entries if any(entry[name] != value for name, value in key.items())]
            entries.append(key | entry_of(best))
            path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
            yield f"{rows} x {columns}, {count} tokens: {microseconds:.1f} us with {best}"
