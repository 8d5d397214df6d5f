"""Which tile sizes a shape gets: a table measured per GPU, a heuristic for the rest. Nothing is timed at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Schedule(NamedTuple):
    """Tile of ``block_n`` rows x ``block_m`` tokens; ``split`` programs share the columns; ``stages`` tiles in flight."""

    block_m: int
    block_n: int
    split: int
    stages: int
    warps: int


# Programs of 4 and of 8 warps that fill an H100 well: about two, and one, waves. A share has at least four tiles of columns.
_PROGRAMS = {4: 1200, 8: 300}
_LEAST_COLUMNS = 512
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# Token counts at which the table has entries; a batch takes the next larger one.
_TOKENS = (1, 8, 16, 32, 64, 128, 256)
# GPU -> (rows, columns, residual bits) -> tokens -> schedule: from `benchmarks/linear.py --search`.
_TABLE: dict[str, dict[tuple[int, int, int], dict[int, tuple[int, int, int, int, int]]]] = {
    "NVIDIA H100 80GB HBM3": {
        (4096, 4096, 0): {
            1: (16, 64, 8, 1, 4),
            8: (16, 64, 8, 1, 4),
            16: (16, 128, 8, 1, 8),
            32: (32, 128, 8, 1, 8),
            64: (32, 128, 4, 1, 8),
            128: (64, 128, 4, 1, 4),
            256: (64, 128, 2, 3, 4),
        },
        (4096, 4096, 4): {
            1: (16, 64, 8, 1, 4),
            8: (16, 64, 8, 1, 4),
            16: (16, 64, 8, 1, 4),
            32: (32, 64, 8, 1, 4),
            64: (64, 128, 8, 1, 4),
            128: (64, 128, 4, 1, 4),
            256: (128, 128, 2, 1, 8),
        },
        (18944, 3584, 0): {
            1: (16, 64, 3, 1, 4),
            8: (16, 64, 4, 1, 4),
            16: (16, 64, 4, 1, 4),
            32: (32, 64, 4, 1, 4),
            64: (64, 128, 3, 1, 8),
            128: (64, 128, 1, 1, 8),
            256: (64, 128, 1, 1, 8),
        },
        (18944, 3584, 4): {
            1: (16, 128, 3, 1, 8),
            8: (16, 64, 3, 1, 4),
            16: (16, 64, 3, 1, 4),
            32: (32, 64, 3, 1, 4),
            64: (64, 128, 3, 3, 8),
            128: (64, 128, 2, 3, 8),
            256: (128, 128, 1, 1, 8),
        },
        (3584, 18944, 0): {
            1: (16, 64, 12, 1, 4),
            8: (16, 64, 12, 1, 4),
            16: (16, 64, 12, 1, 4),
            32: (32, 64, 12, 1, 4),
            64: (64, 128, 8, 1, 8),
            128: (64, 128, 4, 3, 4),
            256: (64, 128, 2, 3, 4),
        },
        (3584, 18944, 4): {
            1: (16, 64, 16, 1, 4),
            8: (16, 128, 8, 1, 8),
            16: (16, 64, 16, 1, 4),
            32: (32, 64, 16, 1, 4),
            64: (64, 128, 8, 3, 8),
            128: (128, 128, 4, 1, 8),
            256: (128, 128, 2, 1, 8),
        },
    },
}


def crossover(bits: int, residual_bits: int, columns: int) -> int:
    """Tokens above which a layer is dequantized for cuBLAS (measured on an H100)."""
    if bits != 4 or residual_bits == 3:
        return 32  # no assembly decoder
    return 256 if residual_bits == 0 and columns <= 8192 else 192


@functools.lru_cache(maxsize=8192)
def choose(gpu: str, tokens: int, rows: int, columns: int, residual_bits: int | None) -> Schedule:
    """The schedule of [tokens, columns] times [rows, columns]; ``residual_bits`` is None without an assembly decoder."""
    if residual_bits is not None:
        measured = _TABLE.get(gpu, {}).get((rows, columns, residual_bits))
        if measured is not None:
            return Schedule(*measured[next(t for t in _TOKENS if t >= tokens)])
    return _heuristic(tokens, rows, columns)


def _heuristic(tokens: int, rows: int, columns: int) -> Schedule:
    """What the table has in common."""
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    block_n, warps = (64, 4) if block_m <= 32 else (128, 8)
    programs = -(-rows // block_n) * -(-tokens // block_m)
    fitting = [s for s in _SPLITS if programs * s <= _PROGRAMS[warps] and columns >= s * _LEAST_COLUMNS]
    return Schedule(block_m, block_n, max(fitting, default=1), 1, warps)
