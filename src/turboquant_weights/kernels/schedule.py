"""Which tile sizes a shape gets: a table measured per GPU, a heuristic for the rest. Nothing is timed at run time."""

from __future__ import annotations

from typing import NamedTuple


class Schedule(NamedTuple):
    """Tile of ``block_n`` rows x ``block_m`` tokens; ``split`` programs share the columns; ``stages`` tiles in flight."""

    block_m: int
    block_n: int
    split: int
    stages: int
    warps: int


# Programs that fill a GPU several times over, so that one's loads hide another's arithmetic.
_PROGRAMS = 528
_MAX_SPLIT = 16


def crossover(bits: int, residual_bits: int) -> int:
    """Tokens above which a layer is dequantized for cuBLAS."""
    return 256 if bits == 4 and residual_bits != 3 else 32


def choose(tokens: int, rows: int, columns: int, fast: bool) -> Schedule:
    """The schedule of [tokens, columns] times [rows, columns]; ``fast`` if the planes have an assembly decoder."""
    block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64 if tokens <= 64 else 128
    if not fast:
        block_m, block_n, warps = min(block_m, 32), 64, 4
    elif block_m <= 32:
        block_n, warps = 64, 4
    else:
        block_n, warps = 128, 8
    tiles = -(-rows // block_n) * -(-tokens // block_m)
    limit = max(1, min(_MAX_SPLIT, -(-columns // 256)))
    split = 1
    while split < limit and tiles * split * 2 <= _PROGRAMS * 4 // warps:
        split *= 2
    return Schedule(block_m, block_n, split, 3, warps)
