"""The rotation of activations (rotation.py) as one launch: signs, Hadamard, scale, order of columns.

A tile of 128 columns is multiplied by a 128 x 128 matrix of +1, -1 and 0: the block-diagonal Hadamard matrix whose columns
are already in the order that the consumer wants. Products with +-1 are exact in every dtype and sums are float32's.

For the matmul, each token is scaled by a power of two so that its largest entry lies in [2**10, 2**11): after the rotation
nothing can exceed 2**14.5, so half precision holds bfloat16's range with three more bits. The matmul undoes the scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rotation import hadamard, signs
from .decode import TILE, paired_column, paired_slice_column, physical_column, power_of_two, slice_column
from .nvidia import launch_dependents, wait_for_producer

# Orders of the columns within a tile of 128: as stored, and as the matmuls want them.
NATURAL, SPLITK, SLICES, PAIRED, PAIRED_SLICES = range(5)
_COLUMN: dict[int, Callable[[int], int]] = {
    NATURAL: int,
    SPLITK: physical_column,
    SLICES: slice_column,
    PAIRED: paired_column,
    PAIRED_SLICES: paired_slice_column,
}


@functools.lru_cache(maxsize=32)
def tile_matrix(block: int, order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[128, 128] of +1, -1, 0: block-diagonal Hadamard with its columns in ``order``."""
    one = (hadamard(block) * block**0.5).round()
    matrix = torch.block_diag(*[one] * (TILE // block))
    matrix = matrix[:, [_COLUMN[order](place) for place in range(TILE)]]
    return matrix.to(device=device, dtype=dtype).contiguous()


@functools.lru_cache(maxsize=32)
def outer_matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256]: the 16 x 16 factor of the Hadamard matrix that mixes the bits 0, 1, 5 and 6 of a column, for ``rotating.py``.

    In the order of a tensor-core fragment: thread ``g * 4 + t`` holds the rows ``32 * t + (0, 1, 2, 3)`` of the columns
    ``32 * (g // 2) + 2 * (g % 2)`` and the next.
    """
    matrix = tile_matrix(block, NATURAL, torch.device("cpu"), torch.float32)
    thread, item = torch.arange(32)[:, None], torch.arange(8)
    row = 32 * (thread % 4) + item % 4
    column = 32 * (thread // 8) + 2 * (thread // 4 % 2) + item // 4
    return matrix[row, column].flatten().to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=256)
def tile_signs(seed: int, tiles: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Signs of ``tiles * 128`` columns."""
    return signs(seed, tiles * TILE, device, dtype).contiguous()


@triton.jit(do_not_specialize=["tokens", "counters_size"])
def rotate_scaled_kernel(
    x, sign, matrix, out, token_scale, counters, x_stride, tokens, counters_size, columns, tiles, norm,
    TILES: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, part): rotates ``TILES`` tiles of a token into half precision, scaled by a power of two, then those of
    the tokens and parts that are the grid's size away.

    ``x`` [tokens, columns] rows ``x_stride`` apart; ``out`` float16 [tokens, tiles * 128]; ``token_scale`` float32 [tokens]
    is what the result must be multiplied by. Also zeroes the ``counters`` of the reduction that follows.
    """
    place = tl.arange(0, 128)
    square = tl.load(matrix + place[:, None] * 128 + place[None, :])
    if PDL:  # in this order: once the matmul starts, weights written by an earlier kernel are visible to it
        wait_for_producer()
        launch_dependents()
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for start in range(program * 128, counters_size, programs * 128):
        tl.store(counters + start + place, tl.zeros((128,), tl.int32), mask=start + place < counters_size)
    chunk = tl.arange(0, CHUNK)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = x + tl.cast(token, tl.int64) * x_stride
        target = out + tl.cast(token, tl.int64) * (tiles * 128)
        column = (tl.program_id(1) * TILES + tl.arange(0, TILES))[:, None] * 128 + place[None, :]
        values = tl.load(row + column, mask=column < columns, other=0.0)
        flips = tl.load(sign + column, mask=column < tiles * 128, other=0.0)
        largest = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, columns, CHUNK):
            piece = tl.load(row + start + chunk, mask=start + chunk < columns, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(piece))
        bits = tl.max(largest, 0).to(tl.int32, bitcast=True)
        exponent = tl.where(bits == 0, 10, tl.maximum((bits >> 23) - 127, -110))
        up = norm * power_of_two(10 - exponent)
        if tl.program_id(1) == 0:
            tl.store(token_scale + token, power_of_two(exponent - 10))
        for _ in range(tl.program_id(1), tl.cdiv(tiles, TILES), tl.num_programs(1)):
            rotated = tl.dot(values * flips, square, input_precision="ieee") * up
            tl.store(target + column, rotated.to(tl.float16), mask=column < tiles * 128)
            column += tl.num_programs(1) * TILES * 128
            values = tl.load(row + column, mask=column < columns, other=0.0)
            flips = tl.load(sign + column, mask=column < tiles * 128, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x, x_stride, sign, matrix, out, out_stride, rows, columns, tiles, out_columns, norm,
    TILES: tl.constexpr, INVERSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotates (INVERSE: rotates back) the ``rows = tokens * tiles`` tiles in the input's dtype, natural order of columns,
    ``TILES`` at a time."""
    place = tl.arange(0, 128)
    square = tl.load(matrix + place[:, None] * 128 + place[None, :])
    if PDL:
        wait_for_producer()
        launch_dependents()
    for start in tl.range(tl.program_id(0) * TILES, rows, tl.num_programs(0) * TILES):
        index = start + tl.arange(0, TILES)
        token, tile = (index // tiles).to(tl.int64)[:, None], index % tiles
        column = tile[:, None] * 128 + place[None, :]
        live = (index < rows)[:, None]
        values = tl.load(x + token * x_stride + column, mask=live & (column < columns), other=0.0)
        flips = tl.load(sign + column)
        if INVERSE:
            rotated = tl.dot(values, square, input_precision="ieee") * norm * flips.to(tl.float32)
        else:
            rotated = tl.dot(values * flips, square, input_precision="ieee") * norm
        address = out + token * out_stride + column
        tl.store(address, rotated.to(out.dtype.element_ty), mask=live & (column < out_columns))
