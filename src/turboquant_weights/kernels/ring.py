"""Codes on their way through shared memory, for kernels whose warps work alone (``integer.py``, ``few.py``).

A load into registers for a later turn of a loop does not run ahead: ptxas gives all loads that are pending at the end of a
turn the same one of a warp's six scoreboards, and whoever waits for the first of them waits for the last. Copies into shared
memory (``cp.async``) are waited for by their number instead, and take no registers meanwhile.

Each warp has a ring of its own. A lane copies the codes that it decodes itself, the 32 columns of one scale in the rows g,
g + 8, ..., and one of four lanes the scales of a row, so that a warp waits for nobody but itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl


class Ring(NamedTuple):
    """PTX of :func:`start_ring` and :func:`receive`."""

    allocation: str
    copying: str
    waiting: str


def tile_bytes(bits: int, rows: int) -> int:
    """Of a warp's tile of ``rows`` x 128 codes with its scales."""
    return rows * (16 * bits + 4)


@functools.cache
def ring(bits: int, rows: int, warps: int, ahead: int) -> Ring:
    """A ring with ``ahead`` tiles of each warp on their way, besides the one that is decoded."""
    # Static shared memory: what Triton allocates it gives no address of.
    size = (ahead + 1) * warps * tile_bytes(bits, rows)
    allocation = f"{{ .shared .align 16 .b8 ring[{size}]; mov.u32 $0, ring; }}"
    # $1 and $2 are this lane's places for codes and scales, $3 and $4 their addresses, $5 the bytes to its next row of
    # codes; $6 rows are left from its first one on, $7 from the row of its scales, none without a tile.
    lines = ["{ .reg .pred p; .reg .b64 a; mov.b64 a, $3;"]
    for octet in range(rows // 8):
        lines.append(f"setp.gt.s32 p, $6, {8 * octet};")
        pieces = ((0, 4 * bits),) if bits != 3 else ((0, 4), (4, 4), (8, 4))
        for at, count in pieces:
            place = f"[$1 + {octet * warps * 128 * bits + at}]"
            lines.append(f"@p cp.async.{'cg' if count == 16 else 'ca'}.shared.global {place}, [a + {at}], {count};")
        lines.append("add.s64 a, a, $5;")
    lines.append("setp.gt.s32 p, $7, 0; @p cp.async.ca.shared.global [$2], [$4], 4; cp.async.commit_group; mov.b32 $0, 0; }")
    # $0 is $1: who reads the tile there depends on it.
    waiting = f"cp.async.wait_group {ahead - 1}; bar.warp.sync 0xffffffff; mov.b32 $0, $1;"
    return Ring(allocation, " ".join(lines), waiting)


@triton.jit
def _copy(located, step, stage, BITS: tl.constexpr, COPYING: tl.constexpr):
    """Sends for the tiles ``step`` tiles on, to ``stage``, as one group. A place without a tile keeps what it has."""
    _, places, left, ahead, octet = located
    live = step < ahead
    tl.inline_asm_elementwise(
        COPYING, "=r,r,r,l,l,l,r,r",
        [
            places[0] + stage, places[1] + stage, places[2] + step * (16 * BITS), places[3] + step * 4, octet,
            tl.where(live, left[0], 0), tl.where(live, left[1], 0),
        ],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def start_ring(
    codes, scales, code_stride, scale_stride, first, turns, tiles, first_row, rows,
    BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, ALLOCATION: tl.constexpr,
    COPYING: tl.constexpr,
):  # fmt: skip
    """Sends for the first ``AHEAD`` tiles of every warp; warp w has the tiles ``first + w``, ``first + w + WARPS`` and so on
    of ``tiles``, ``turns`` of them at most. What the functions below need to know of the program."""
    base = tl.inline_asm_elementwise(ALLOCATION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    thread = tl.arange(0, WARPS * 32)
    tile = first + thread // 32
    row = (thread // 4) % 8
    scale_row = row + thread % 4 * 8
    place = base + thread * (4 * BITS)
    scale_place = base + WARPS * ROWS * 16 * BITS + thread // 32 * (ROWS * 4) + scale_row * 4
    left = rows - first_row - row
    scale_left = tl.where(thread % 4 < ROWS // 8, rows - first_row - scale_row, 0)
    at = (
        codes.to(tl.int64) + (first_row + row).to(tl.int64) * code_stride + (tile * 4 + thread % 4).to(tl.int64) * (4 * BITS)
    )
    scale_at = scales.to(tl.int64) + (first_row + scale_row).to(tl.int64) * scale_stride + tile.to(tl.int64) * 4
    ahead = tl.minimum(tiles - tile, turns * WARPS)
    located = base, (place, scale_place, at, scale_at), (left, scale_left), ahead, tl.cast(code_stride, tl.int64) * 8
    for i in tl.static_range(AHEAD):
        _copy(located, i * WARPS, i * (WARPS * ROWS * (16 * BITS + 4)), BITS, COPYING)
    return located


@triton.jit
def receive(
    located, turn, stage, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    COPYING: tl.constexpr, WAITING: tl.constexpr,
):  # fmt: skip
    """Waits for the tile of this turn, sends for the one ``AHEAD`` turns on, and returns ``stage``, the tile's place, for
    :func:`take_codes` and the scales."""
    STAGE: tl.constexpr = WARPS * ROWS * (16 * BITS + 4)
    here = tl.inline_asm_elementwise(WAITING, "=r,r", [stage], dtype=tl.int32, is_pure=False, pack=1)
    # Into the place of the tile before, which the whole warp has read.
    _copy(located, (turn + AHEAD) * WARPS, tl.where(stage == 0, AHEAD * STAGE, stage - STAGE), BITS, COPYING)
    return here


@triton.jit
def advance(stage, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr):
    """The place of the next turn's tile. The first one's is 0."""
    STAGE: tl.constexpr = WARPS * ROWS * (16 * BITS + 4)
    return tl.where(stage == AHEAD * STAGE, 0, stage + STAGE)


@triton.jit
def _word(address):
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def take_codes(located, stage, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """:func:`decode.load_words` from ``stage``, which is from :func:`receive`."""
    OCTETS: tl.constexpr = ROWS // 8
    THREADS: tl.constexpr = WARPS * 32
    base = located[0] + stage
    if BITS == 3:
        address = base + tl.arange(0, OCTETS * THREADS) * 12
        words = _word(address), _word(address + 4), _word(address + 8)
    else:
        octet, word = tl.arange(0, OCTETS)[:, None], tl.arange(0, THREADS * BITS)[None, :]
        address = base + octet * (THREADS * 4 * BITS) + word * 4
        if BITS == 4:  # not four at a time: only pairs always lie side by side in the registers of a tensor
            words = tl.inline_asm_elementwise(
                "ld.shared.v2.b32 {$0, $1}, [$2];", "=&r,=&r,r,r", [address], dtype=tl.int32, is_pure=True, pack=2
            )
        else:
            words = _word(address)
    return words


@triton.jit
def take_scales(located, stage, place, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """A byte of the scales [WARPS, ROWS, 4] at ``place``, as int32."""
    address = located[0] + (stage + WARPS * ROWS * 16 * BITS) + place
    return tl.inline_asm_elementwise("ld.shared.u8 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def take_scale_words(located, stage, place, BITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """The four scales of a row at ``place`` of [WARPS, ROWS], as int32."""
    return _word(located[0] + (stage + WARPS * ROWS * 16 * BITS) + place * 4)
