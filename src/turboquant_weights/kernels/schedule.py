"""Which kernel and tile sizes a shape gets: a table measured per GPU, a heuristic for the rest. Nothing is timed at run
time.

``turboquant-weights tune`` measures shapes on the GPU at hand and writes a JSON file; the environment variable
``TURBOQUANT_WEIGHTS_SCHEDULES`` names such a file, whose entries come before the table's.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import ScheduleError
from .slices import MOST_TOKENS


class Rotating(NamedTuple):
    """``rotating.py``: one token, 16 rows per program, ``warps`` slices of the columns; one launch, rotation included."""

    warps: int


class Slices(NamedTuple):
    """``slices.py``: 16 rows x 8 tokens per program, ``warps * split`` slices of the columns."""

    warps: int
    split: int


class SplitK(NamedTuple):
    """``splitk.py``: a tile of ``block_n`` rows x ``block_m`` tokens; ``split`` programs share the columns; ``stages`` tiles
    in flight through shared memory (1: through registers)."""

    block_m: int
    block_n: int
    split: int
    stages: int
    warps: int


Schedule = Rotating | Slices | SplitK
_KINDS: dict[int, type[Schedule]] = {1: Rotating, 2: Slices, 5: SplitK}  # by their number of fields

SLICE_ROWS = 16
# What an H100 wants: programs of `rotating.py`, at most, by warps (without and with a residual), and the columns up to which
# it is of use with one; warps of `slices.py`, at least and at most, and the activations beyond which it is of no use;
# programs of `splitk.py`, by block_m.
_ROTATING_PROGRAMS = ({8: 264, 4: 660}, {8: 132, 4: 660})
_ROTATING_COLUMNS = 8192
_SLICE_WARPS = (1700, 4800)
_SLICE_ACTIVATIONS = 1 << 15
_PROGRAMS = {16: 1200, 32: 1200, 64: 600, 128: 300}
_LEAST_COLUMNS = 512  # of a share
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# Token counts at which the table has entries; a batch takes the next larger one.
TOKENS = (1, 8, 16, 32, 64, 128, 256)
# GPU -> (rows, columns, residual bits) -> tokens -> the schedule with as many fields.
_TABLE: dict[str, dict[tuple[int, int, int], dict[int, tuple[int, ...]]]] = {
    "NVIDIA H100 80GB HBM3": {
        (4096, 4096, 0): {
            1: (8,),
            8: (16, 64, 8, 1, 4),
            16: (16, 128, 8, 1, 8),
            32: (32, 128, 8, 1, 8),
            64: (64, 64, 6, 3, 4),
            128: (128, 64, 4, 3, 4),
            256: (128, 64, 2, 3, 4),
        },
        (4096, 4096, 4): {
            1: (8,),
            8: (8, 1),
            16: (16, 64, 8, 1, 4),
            32: (32, 64, 8, 1, 4),
            64: (64, 64, 6, 3, 4),
            128: (128, 64, 4, 3, 4),
            256: (128, 64, 2, 3, 4),
        },
        (18944, 3584, 0): {
            1: (2,),
            8: (4, 1),
            16: (16, 64, 4, 1, 4),
            32: (32, 64, 4, 1, 4),
            64: (64, 64, 2, 3, 4),
            128: (128, 64, 1, 2, 4),
            256: (128, 64, 1, 2, 4),
        },
        (18944, 3584, 4): {
            1: (2,),
            8: (4, 1),
            16: (16, 64, 3, 1, 4),
            32: (32, 64, 3, 1, 4),
            64: (64, 64, 3, 3, 4),
            128: (128, 64, 2, 3, 4),
            256: (128, 64, 1, 2, 4),
        },
        (3584, 18944, 0): {
            1: (8,),
            8: (16, 64, 12, 1, 4),
            16: (16, 64, 12, 1, 4),
            32: (32, 64, 12, 1, 4),
            64: (64, 128, 8, 1, 8),
            128: (128, 64, 4, 3, 4),
            256: (128, 64, 2, 3, 4),
        },
        (3584, 18944, 4): {
            1: (8, 1),
            8: (4, 4),
            16: (16, 64, 16, 1, 4),
            32: (32, 64, 16, 1, 4),
            64: (64, 64, 6, 3, 4),
            128: (128, 64, 4, 3, 4),
            256: (128, 64, 2, 3, 4),
        },
    },
}


ENVIRONMENT = "TURBOQUANT_WEIGHTS_SCHEDULES"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """What the table calls a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read(path: Path) -> dict[str, dict[tuple[int, int, int], dict[int, tuple[int, ...]]]]:
    """A file of ``tune``: a list of objects with the keys gpu, rows, columns, residual_bits, tokens and schedule."""
    table: dict[str, dict[tuple[int, int, int], dict[int, tuple[int, ...]]]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            shape = (int(entry["rows"]), int(entry["columns"]), int(entry["residual_bits"]))
            schedule = tuple(int(value) for value in entry["schedule"])
            if int(entry["tokens"]) not in TOKENS or len(schedule) not in _KINDS or min(schedule) < 1:
                raise ValueError(f"{entry}: tokens must be one of {TOKENS}, a schedule 1, 2 or 5 positive integers")
            table.setdefault(str(entry["gpu"]), {}).setdefault(shape, {})[int(entry["tokens"])] = schedule
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScheduleError(
            f"{path} ({ENVIRONMENT}) is no file of schedules: {error!r}. Write it with `turboquant-weights tune`, "
            "or unset the variable"
        ) from error
    return table


@functools.cache
def _own_table() -> dict[str, dict[tuple[int, int, int], dict[int, tuple[int, ...]]]]:
    path = os.environ.get(ENVIRONMENT)
    return read(Path(path)) if path else {}


def crossover(bits: int, residual_bits: int, columns: int) -> int:
    """Tokens above which a layer is dequantized for cuBLAS (measured on an H100)."""
    if bits != 4 or residual_bits == 3:
        return 32  # no assembly decoder
    return 256 if columns <= 8192 else 192


@functools.lru_cache(maxsize=8192)
def choose(gpu: str, tokens: int, rows: int, columns: int, residual_bits: int | None) -> Schedule:
    """The schedule of [tokens, columns] times [rows, columns]; ``residual_bits`` is None without an assembly decoder."""
    if residual_bits is not None:
        shape, at = (rows, columns, residual_bits), next(t for t in TOKENS if t >= tokens)
        for table in (_own_table(), _TABLE):
            entry = table.get(gpu, {}).get(shape, {}).get(at)
            if entry is not None:
                return _KINDS[len(entry)](*entry)
        # Rotating takes registers, which a residual needs, too: over long rows two launches are faster then.
        if tokens == 1 and (not residual_bits or columns <= _ROTATING_COLUMNS):
            return rotating(rows, columns, residual_bits)
        # Every 16 rows read all activations: without a residual to hide it, only from L1.
        if tokens <= MOST_TOKENS and (residual_bits or tokens * columns < _SLICE_ACTIVATIONS):
            return _slices(rows, columns)
    return _splitk(tokens, rows, columns)


def rotating(rows: int, columns: int, residual_bits: int) -> Rotating:
    """As many warps per program as let all programs run at once, each with two tiles at least; for more programs, two."""
    row_tiles, tiles = -(-rows // SLICE_ROWS), -(-columns // 128)
    fitting = (w for w, most in _ROTATING_PROGRAMS[residual_bits > 0].items() if row_tiles <= most and 2 * w <= tiles)
    return Rotating(next(fitting, min(2, tiles)))


def _slices(rows: int, columns: int) -> Slices:
    """As many warps per program as fit into one wave; more programs if the GPU would be idle."""
    fewest, most = _SLICE_WARPS
    row_tiles, tiles = -(-rows // SLICE_ROWS), -(-columns // 128)
    warps = next((w for w in (8, 4) if row_tiles * w <= most), 2)
    while warps > 1 and warps > tiles:
        warps //= 2
    fitting = [s for s in _SPLITS if s * warps * 2 <= tiles]
    return Slices(warps, next((s for s in fitting if row_tiles * warps * s >= fewest), max(fitting, default=1)))


def _splitk(tokens: int, rows: int, columns: int) -> SplitK:
    """What the table has in common."""
    block_m = next((b for b in (16, 32, 64) if tokens <= b), 128)
    programs = -(-rows // 64) * -(-tokens // block_m)
    fitting = [s for s in _SPLITS if programs * s <= _PROGRAMS[block_m] and columns >= s * _LEAST_COLUMNS]
    return SplitK(block_m, 64, max(fitting, default=1), 1 if block_m <= 32 else 3, 4)
