"""Many tokens at once with 8-bit activations: twice the arithmetic that bfloat16 gets out of the tensor cores. Opt-in.

Three launches. Planes become one signed byte per weight, with one scale per row instead of one per 32 columns; rotated
activations become one signed byte each, with one scale per token, which is what a rotation is good for: nothing sticks out.
The product adds up in int32, exactly, and multiplies by the two scales at its end.

Both roundings are uniform, to 127 steps up to the largest level of the row, and to 127 up to the largest entry of the token:
together 1.2 % of the output at 4 bits, which by themselves cost 7.7 %, but 1.5 % at 4+4, which cost 0.5 % (Gaussian data).
That is why it must be asked for.
"""

# Triton's tuples grow in unrolled loops, and a name may be a number and a tensor in turn:
# mypy: disable-error-code="assignment, attr-defined, operator"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode_gather, decode_words, load_words, power_of_two, stride_in_words, tables
from .nvidia import launch_dependents, wait_for_producer

_MAGIC = tl.constexpr(1.5 * 2.0**23)  # added to a float32, it leaves the rounded number in the lowest bits
_HALF_MAGIC = tl.constexpr(1.5 * 2.0**10)  # the same in half precision
WEIGHT_ROWS = 4  # of a program of `round_weights_kernel`


@triton.jit
def _load_blocks(
    plane, first_row, start, rows, groups, stride, ROWS: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """A plane's words of ``ROWS`` rows and 32 groups from ``start`` on, as ``decode.widen`` takes them; beyond the last row
    and group some others."""
    UNITS: tl.constexpr = 1 if BITS == 3 else BITS
    word = tl.arange(0, ROWS * 32) if BITS == 3 else tl.arange(0, 32 * UNITS)[None, :]
    row = first_row + (word // 32 if BITS == 3 else tl.arange(0, ROWS)[:, None])
    group = start + (word % 32 if BITS == 3 else word // UNITS)
    address = plane.to(tl.pointer_type(tl.int32))
    address += tl.minimum(row, rows - 1).to(tl.int64) * stride_in_words(stride, BITS, ALIGNED)
    return load_words(address + tl.minimum(group, groups - 1) * BITS + word % UNITS, None, None, BITS)


@triton.jit(do_not_specialize=["rows", "scale_stride", "groups"])
def round_weights_kernel(
    codes, residual, scales, exponents, levels, out, row_scale,
    rows, groups, code_stride, residual_stride, scale_stride, out_stride, largest,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (``ROWS`` rows): ``out`` int8 [rows, out_stride], rotated, in natural order; ``row_scale`` float32 [rows].

    ``largest`` is the largest level. ``GROUPS`` is a power of two, ``groups`` at least."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    group = tl.arange(0, GROUPS)
    bytes_ = tl.load(scales + safe_row[:, None] * scale_stride + group[None, :], mask=(group < groups)[None, :], other=0)
    # Bytes and the scales that they stand for have the same order.
    top = (tl.max(bytes_.to(tl.int32), 1) << 5).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 4096.0
    exponent = tl.load(exponents + safe_row).to(tl.int32) + 7
    low = exponent >> 1
    tl.store(row_scale + row, top * (largest / 127.0) * power_of_two(low) * power_of_two(exponent - low), mask=row < rows)
    inverse = tl.where(top == 0.0, 0.0, 127.0 / tl.maximum(largest * top, 2.0**-100))
    if ASSEMBLY == "":
        place = tl.arange(0, 128)
        at = safe_row[:, None]
        for tile in range(tl.cdiv(groups, 4)):
            column = tile * 128 + place[None, :]
            weight = decode_gather(
                codes, residual, scales, levels, at * code_stride, at * residual_stride, at * scale_stride,
                column, column < groups * 32, BITS, RESIDUAL_BITS,
            )  # fmt: skip
            rounded = (weight * inverse[:, None] + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
            live = (row < rows)[:, None] & (column < groups * 32)
            tl.store(out + row.to(tl.int64)[:, None] * out_stride + column, rounded, mask=live)
    else:
        words = tables(BITS, RESIDUAL_BITS)
        first_row = tl.program_id(0) * ROWS
        block = tl.arange(0, 32)[None, :]
        place = tl.arange(0, 1024)[None, :]
        address = out + row.to(tl.int64)[:, None] * out_stride
        for start in range(0, groups, 32 * UNITS):
            packed, rest, byte = (), (), ()  # all on their way before the first is used
            for i in tl.static_range(UNITS):
                at = start + i * 32
                packed += (_load_blocks(codes, first_row, at, rows, groups, code_stride, ROWS, BITS, BITS == 4),)
                if RESIDUAL_BITS > 0:
                    rest += (
                        _load_blocks(residual, first_row, at, rows, groups, residual_stride, ROWS, RESIDUAL_BITS, False),
                    )
                safe_group = tl.minimum(at + block, groups - 1)
                byte += (tl.load(scales + safe_row[:, None] * scale_stride + safe_group),)
            for i in tl.static_range(UNITS):
                scale = (byte[i].to(tl.int16) << 5).to(tl.float16, bitcast=True).to(tl.float32)
                factor = (scale * (inverse * 4096.0)[:, None]).to(tl.float16).to(tl.int16, bitcast=True)
                pairs = (factor.to(tl.int32) & 0xFFFF) * 0x10001
                refined = packed[i]
                if RESIDUAL_BITS > 0:
                    refined = rest[i]
                weight = decode_words(packed[i], refined, pairs, words, ROWS, 32, BITS, RESIDUAL_BITS, ASSEMBLY)
                rounded = (weight + _HALF_MAGIC).to(tl.int16, bitcast=True).to(tl.int8)
                # dims: row, pair of words, i0, word, h, i1 -> row, columns (pair, word, h, i0, i1)
                rounded = rounded.reshape(ROWS, 64, 2, 2, 2, 2).trans(0, 1, 3, 4, 2, 5).reshape(ROWS, 1024)
                column = (start + i * 32) * 32 + place
                tl.store(address + column, rounded, mask=(row < rows)[:, None] & (column < groups * 32))
    if PDL:
        wait_for_producer()


@triton.jit(do_not_specialize=["tokens"])
def rotate_round_kernel(
    x, sign, matrix, out, token_scale, tokens, x_stride, columns, tiles, out_columns, norm,
    TILES: tl.constexpr, TOGETHER: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: ``TOGETHER`` tokens at a time, of which ``CHUNKS`` times ``TILES`` tiles stay in registers until the largest
    entry is known.

    ``x`` [tokens, columns] rows ``x_stride`` apart -> ``out`` int8 [tokens, out_columns], rotated, in natural order;
    ``token_scale`` float32 [tokens]."""
    place = tl.arange(0, 128)
    square = tl.load(matrix + place[:, None] * 128 + place[None, :])
    item = tl.arange(0, TOGETHER * TILES)
    column = (item % TILES)[:, None] * 128 + place[None, :]
    flips = tl.load(sign + column, mask=column < tiles * 128, other=0.0)
    if PDL:
        wait_for_producer()
        launch_dependents()
    token = tl.program_id(0) * TOGETHER + item // TILES
    values = tl.load(
        x + token.to(tl.int64)[:, None] * x_stride + column, mask=(token < tokens)[:, None] & (column < columns), other=0.0
    )
    for first in range(tl.program_id(0) * TOGETHER, tokens, tl.num_programs(0) * TOGETHER):
        token = first + item // TILES
        live = (token < tokens)[:, None]
        row = x + token.to(tl.int64)[:, None] * x_stride
        pieces = (tl.dot(values * flips, square, input_precision="ieee") * norm,)
        for i in tl.static_range(1, CHUNKS):
            at = column + i * TILES * 128
            values = tl.load(row + at, mask=live & (at < columns), other=0.0)
            other = tl.load(sign + at, mask=at < tiles * 128, other=0.0)
            pieces += (tl.dot(values * other, square, input_precision="ieee") * norm,)
        # The next ones are on their way.
        token += tl.num_programs(0) * TOGETHER
        following = x + token.to(tl.int64)[:, None] * x_stride
        values = tl.load(following + column, mask=(token < tokens)[:, None] & (column < columns), other=0.0)
        bits = tl.zeros((TOGETHER,), tl.int32)
        for i in tl.static_range(CHUNKS):  # as bits of a float32: those of a NaN are the largest
            magnitude = tl.max(tl.abs(pieces[i]).to(tl.int32, bitcast=True), 1)
            bits = tl.maximum(bits, tl.max(magnitude.reshape(TOGETHER, TILES), 1))
        largest = bits.to(tl.float32, bitcast=True)
        member = first + tl.arange(0, TOGETHER)
        tl.store(token_scale + member, largest / 127.0, mask=member < tokens)
        inverse = 127.0 / tl.maximum(largest, 2.0**-120)
        inverse = tl.broadcast_to(inverse[:, None], (TOGETHER, TILES)).reshape(TOGETHER * TILES)
        target = out + (first + item // TILES).to(tl.int64)[:, None] * out_columns
        for i in tl.static_range(CHUNKS):
            rounded = (pieces[i] * inverse[:, None] + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
            at = column + i * TILES * 128
            tl.store(target + at, rounded, mask=live & (at < out_columns))


@triton.jit(do_not_specialize=["tokens"])
def multiply_bytes_kernel(
    x, weight, token_scale, row_scale, bias, out, tokens, rows, columns, out_stride,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile of ``BLOCK_M`` tokens x ``BLOCK_N`` rows): ``x`` int8 [tokens, columns] and ``weight`` int8
    [rows, columns] are tensor descriptors; ``out`` [tokens, out_stride]. Programs that run at once share weights."""
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    first_token = tl.program_id(0) % token_tiles * BLOCK_M
    first_row = tl.program_id(0) // token_tiles * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, columns, BLOCK_K):
        left = x.load([first_token, start])
        right = weight.load([first_row, start])
        acc = tl.dot(left, right.T, acc, out_dtype=tl.int32)
    token = first_token + tl.arange(0, BLOCK_M)
    row = first_row + tl.arange(0, BLOCK_N)
    total = acc.to(tl.float32) * tl.load(token_scale + token, mask=token < tokens, other=0.0)[:, None]
    total *= tl.load(row_scale + row, mask=row < rows, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    address = out + token.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(address, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])
