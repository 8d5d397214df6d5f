"""The fused matmul for 9 tokens and more: planes decoded in registers, tensor cores, split-K, exponents, bias in one launch.

It computes ``out^T = W x^T``: the decoded weight is the left operand and never leaves registers, tokens are the small right
operand. Program (row tile, split, token tile) sums its share of the columns; the last program of a tile to arrive adds the
shares in the order of their index, so results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode_gather, decode_words, load_words, scale_pairs, stride_in_words, tables
from .nvidia import launch_dependents, prefetch, wait_for_producer
from .reduction import reduce_and_finish


@triton.jit
def _at(tile, index, BITS: tl.constexpr, groups, TAIL: tl.constexpr):
    """Offset in a row for threads that read ``BITS`` elements each: thread ``t`` of 4 reads group ``4 * tile + t``."""
    UNITS: tl.constexpr = 1 if BITS == 3 else BITS
    group = tile * 4 + (index // UNITS) % 4
    if TAIL:  # beyond the last column x is zero: any finite weight will do
        group = tl.minimum(group, groups - 1)
    return group * BITS + index % UNITS


@triton.jit
def _locate(plane, first_row, rows, stride, BLOCK_N: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the rows of a plane begin and which word of a tile is read, for each word that the threads read of a tile.

    A tile of 64 rows x 128 columns is 2 x 128 x BITS words, BITS for each of 128 threads (warp 4, lane 8, t 4). Registers 0
    and 1 of a fragment are rows 8 apart there and 32 apart here: loads stay simple, `row` knows."""
    HALVES: tl.constexpr = BLOCK_N // 32
    UNITS: tl.constexpr = 1 if BITS == 3 else BITS
    if BITS == 3:
        item = tl.arange(0, HALVES * 128)
        half, word = item // 128, item % 128
    else:
        half, word = tl.arange(0, HALVES)[:, None], tl.arange(0, 128 * BITS)[None, :]
    half_row = first_row + (half % (BLOCK_N // 64)) * 64 + (half // (BLOCK_N // 64)) * 32
    row = tl.minimum(half_row + word // (4 * UNITS), rows - 1).to(tl.int64)
    return plane.to(tl.pointer_type(tl.int32)) + row * stride_in_words(stride, BITS, ALIGNED), word


@triton.jit
def _weight(
    packed, refined, pairs, words, HALVES: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The decoded tile [HALVES * 32, 128] as a left operand."""
    weight = decode_words(packed, refined, pairs, words, HALVES, 128, BITS, RESIDUAL_BITS, ASSEMBLY)
    # dims: b1, tile of 64 rows, warp, g, t, p1, i0, p0, h, i1 -> rows (tile, warp, b1, g), columns (p, h, i1, t, i0)
    weight = weight.reshape(2, HALVES // 2, 4, 8, 4, 2, 2, 2, 2, 2).trans(1, 2, 0, 3, 5, 7, 8, 9, 4, 6)
    return weight.reshape(HALVES * 32, 128)


@triton.jit(do_not_specialize=["tokens", "residual_stride", "scale_stride", "groups", "splits"])
def splitk_kernel(
    x, token_scale, codes, residual, scales, exponents, bias, levels, out, partial, counters,
    tokens, rows, groups, x_stride, code_stride, residual_stride, scale_stride, splits,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REDUCE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``x`` float16 [tokens, x_stride] from ``rotate_scaled_kernel``; planes as on disk; ``out`` [tokens, rows].

    ``groups`` is the number of scales per row; TAIL says that it is not a multiple of 4. STAGES > 1 is the depth of a
    pipeline through shared memory. ``partial`` float32 [row tiles, token tiles, splits, BLOCK_N, BLOCK_M] and zeroed
    ``counters`` int32 [row tiles, token tiles] serve REDUCE (splits > 1).
    """
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    tile_m = tl.program_id(2)
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.arange(0, 128)
    inner = tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(groups, 4), splits)
    first = split * share
    last = tl.minimum(first + share, tl.cdiv(groups, 4))
    x_address = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * x_stride + place[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    if ASSEMBLY == "":  # any planes, any GPU: a gather per weight and plane
        row = tile_n * BLOCK_N + inner
        at = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
        # decode.physical_column
        column = ((place >> 1) & 3) * 32 + (place >> 5) * 8 + ((place >> 4) & 1) * 4 + (place & 1) * 2 + ((place >> 3) & 1)
        if PDL:
            wait_for_producer()
        for tile in tl.range(first, last):
            columns = tile * 128 + column[None, :]
            weight = decode_gather(
                codes, residual, scales, levels, at * code_stride, at * residual_stride, at * scale_stride,
                columns, columns < groups * 32, BITS, RESIDUAL_BITS,
            )  # fmt: skip
            acc = tl.dot(weight.to(tl.float16), tl.trans(tl.load(x_address + tile * 128)), acc)
    else:
        HALVES: tl.constexpr = BLOCK_N // 32
        row = tile_n * BLOCK_N + (inner // 64) * 64 + ((inner // 8) % 2) * 32 + ((inner // 16) % 4) * 8 + inner % 8
        words = tables(BITS, RESIDUAL_BITS)
        half = tl.arange(0, HALVES)
        half_row = tile_n * BLOCK_N + (half % (BLOCK_N // 64)) * 64 + (half // (BLOCK_N // 64)) * 32
        thread = tl.arange(0, 128)
        inner_row = tl.arange(0, 32)
        REST: tl.constexpr = max(RESIDUAL_BITS, 1)
        scale_row = tl.minimum(half_row[:, None] + (thread // 4)[None, :], rows - 1).to(tl.int64)
        code_address, word = _locate(codes, tile_n * BLOCK_N, rows, code_stride, BLOCK_N, BITS, BITS == 4)
        rest_address, rest = _locate(residual, tile_n * BLOCK_N, rows, residual_stride, BLOCK_N, REST, False)
        prefetch(exponents + tile_n * BLOCK_N)
        if HAS_BIAS:
            prefetch(bias + tile_n * BLOCK_N)
        if STAGES == 1:
            # The next tile of codes is on its way to registers while this one is decoded, and the first while the rotation
            # still runs.
            scale_address = scales + scale_row * scale_stride
            tile = tl.minimum(first, tl.cdiv(groups, 4) - 1)
            packed = load_words(code_address + _at(tile, word, BITS, groups, TAIL), None, None, BITS)
            scale = tl.load(scale_address + _at(tile, thread, 1, groups, TAIL)[None, :])
            refined = packed
            if RESIDUAL_BITS > 0:
                refined = load_words(rest_address + _at(tile, rest, REST, groups, TAIL), None, None, REST)
            if PDL:
                wait_for_producer()
            for tile in range(first, last):
                tokens_tile = tl.load(x_address + tile * 128)
                ahead = tile + 1
                more = ahead < last
                next_packed = load_words(code_address + _at(ahead, word, BITS, groups, TAIL), more, None, BITS)
                next_scale = tl.load(scale_address + _at(ahead, thread, 1, groups, TAIL)[None, :], mask=more)
                next_refined = next_packed
                if RESIDUAL_BITS > 0:
                    next_refined = load_words(rest_address + _at(ahead, rest, REST, groups, TAIL), more, None, REST)
                pairs = scale_pairs(scale.to(tl.int32), 0)
                weight = _weight(packed, refined, pairs, words, HALVES, BITS, RESIDUAL_BITS, ASSEMBLY)
                acc = tl.dot(weight, tl.trans(tokens_tile), acc)
                packed, scale, refined = next_packed, next_scale, next_refined
        else:
            # Many tokens: Triton's pipeline, everything through shared memory. It wants at least 4 bytes per thread: the
            # four scales of a row and tile come as one word (so no TAIL).
            scale_row = tl.minimum(half_row[:, None] + inner_row[None, :], rows - 1).to(tl.int64)
            scale_address = scales.to(tl.pointer_type(tl.int32)) + scale_row * (scale_stride // 4)
            if PDL:
                wait_for_producer()
            for tile in tl.range(first, last, num_stages=STAGES):
                tokens_tile = tl.load(x_address + tile * 128)
                packed = load_words(code_address + _at(tile, word, BITS, groups, False), None, None, BITS)
                scale = tl.load(scale_address + tile)
                refined = packed
                if RESIDUAL_BITS > 0:
                    refined = load_words(rest_address + _at(tile, rest, REST, groups, False), None, None, REST)
                scale = tl.broadcast_to(tl.expand_dims(scale, 2), (HALVES, 32, 4)).reshape(HALVES, 128)
                pairs = scale_pairs(scale, (thread % 4)[None, :])
                weight = _weight(packed, refined, pairs, words, HALVES, BITS, RESIDUAL_BITS, ASSEMBLY)
                acc = tl.dot(weight, tl.trans(tokens_tile), acc)

    if PDL:  # the next layer's rotation may take its place; it waits for this kernel's end before it touches memory
        launch_dependents()
    slot = tile_n * tl.num_programs(2) + tile_m
    reduce_and_finish(
        acc, partial, counters, slot, split, splits, token_scale, exponents, bias, out, token, row, rows, tokens,
        BLOCK_N, BLOCK_M, REDUCE, HAS_BIAS,
    )  # fmt: skip
