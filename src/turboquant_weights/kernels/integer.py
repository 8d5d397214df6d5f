"""The fused matmul for one token and no residual on the integer tensor cores: half the instructions of ``rotating.py``.

A level is ``c + 0.5`` times a scale with ``c`` a signed byte (codebook.py), so the tensor cores can add bytes times bytes,
and the scale follows once for the 32 columns that share it, instead of once per weight.

**Decoding.** ``prmt`` looks up a byte for each of four codes, by their lower three bits; where the highest bit of a code is
set it gives the sign of that byte instead, eight times. Negative levels, which have codes below 8, are in one table,
positive ones, after flipping that bit, in another. The first gives -1 for a code that is not its own, the second, whose
bytes are positive, 0. So ``c`` is the sum of the two, if the positive bytes are one too large, and the tensor cores add it
up, which have nothing better to do. That is 7 instructions for 8 weights. Codes of 2 and 3 bits are widened to the top of a
nibble; what is below them does not matter, because the tables repeat their entries.

**Activations** are even integers ``v`` of 16 bits times a factor for each 32 columns, so that outliers cost the precision of
their neighbours only. A product takes two bytes, ``v = 256 * high + low``, and half a sum of even numbers, which the 0.5 of
the levels asks for, is an integer, too.

**One scale per thread.** Thread ``t`` of four holds the 32 columns of scale ``t`` of its rows. A product over all 128
columns would mix the four, so the right operand has eight columns: for each scale one with the high and one with the low
bytes, zero in the rows of the other scales. Then the sums of scale ``t`` arrive in thread ``t``, where that scale is.

Sums of at most 32 * 128 * 115 on top of 1.5 * 2**23, read as float32, are exactly 1.5 * 2**23 plus the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codebook import HALF_INTEGER_LEVELS
from .decode import register, three_words, two_words, widen_2, widen_3
from .nvidia import launch_dependents, prefetch, wait_for_producer
from .reduction import reduce_and_finish
from .ring import advance, receive, start_ring, take_codes, take_scales

BYTES_TILES = 16  # of a program of `rotate_bytes_kernel`: the fewest rows of a matrix product
META_BYTES = 32  # of a tile of 128 activations, beside its 256 bytes
MAGIC = tl.constexpr(0x4B400000)  # the bits of 1.5 * 2**23 in float32
MAGIC_FLOAT = tl.constexpr(1.5 * 2.0**23)
_CORRECTION = tl.constexpr(-1.5 * 2.0**23)
LARGEST = tl.constexpr(16128.0)  # half of v at most: its high byte is then at most 126
# A scale byte is a half-precision number shifted right by 5, times 2**19: as_float(byte << 18) lacks 2**131. Most of it goes
# to the scales, which leaves room for activations of any magnitude, 2**7 to row exponents, the rest is the token's scale.
_EARLY = tl.constexpr(2.0**112)
_LATE = tl.constexpr(2.0**12)


def table(values: list[int]) -> tuple[int, int]:
    """Eight bytes as two signed words."""
    data = bytes(value & 255 for value in values)
    first, second = (int.from_bytes(data[i : i + 4], "little", signed=True) for i in (0, 4))
    return first, second


def tables(bits: int) -> tuple[int, ...]:
    """The negative and the positive levels' bytes, two words each."""
    levels = [int(level) for level in HALF_INTEGER_LEVELS[bits] for _ in range(8 // len(HALF_INTEGER_LEVELS[bits]))]
    return *table([~c for c in reversed(levels)]), *table([c + 1 for c in levels])


_N0, _N1, _P0, _P1 = (
    tl.constexpr(words) for words in zip(*(tables(max(bits, 2)) for bits in range(5)), strict=True)
)  # by bits
_TOP_2 = tl.constexpr(widen_2(2))
_TOP_3 = tl.constexpr(f"{{ .reg .b32 v, w; {widen_3('$4', '$5', '$6', 1, '')} }}")


def assembly() -> str:
    """Four words of codes $16-$19, then the tables, each word four times -> of word p the negative levels of its first and
    of its last four columns, then the positive ones, in $4p to $4p+3."""
    lines = []
    for p in range(4):
        code, out = f"${16 + p}", [f"${4 * p + i}" for i in range(4)]
        lines.append(
            "{ .reg .b32 flipped, q, r;"
            f" xor.b32 flipped, {code}, 0x88888888; shr.u32 q, {code}, 16; shr.u32 r, flipped, 16;"
            f" prmt.b32 {out[0]}, $20, $24, {code}; prmt.b32 {out[1]}, $20, $24, q;"
            f" prmt.b32 {out[2]}, $28, $32, flipped; prmt.b32 {out[3]}, $28, $32, r; }}"
        )
    return "\n".join(lines)


_ASSEMBLY = tl.constexpr(assembly())
_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 20))


@triton.jit
def byte_tables(BITS: tl.constexpr):
    return register(_N0[BITS]), register(_N1[BITS]), register(_P0[BITS]), register(_P1[BITS])


@triton.jit
def decode_bytes(codes, tables):
    """Words of codes at the top of nibbles -> :func:`assembly`'s results, in their order."""
    return tl.inline_asm_elementwise(
        _ASSEMBLY, _CONSTRAINTS, [codes, tables[0], tables[1], tables[2], tables[3]],
        dtype=(tl.int8,) * 16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def bytes_of_words(values):
    """The bytes of four words at a time. Words go through loops: bytes the compiler would take apart and put together again
    in every turn."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;", "=&r,=&r,=&r,=&r,r,r,r,r", [values],
        dtype=(tl.int8,) * 4, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def activation_bytes(rotated, SMALLEST: tl.constexpr):
    """float32 [tiles, 32] -> their largest magnitudes, ``SMALLEST`` at least, then ``v / 2`` and the two bytes of ``v``, as
    int32."""
    # As integers: of a NaN the bits are the largest.
    largest = tl.max(tl.abs(rotated).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    largest = tl.where(largest < SMALLEST, SMALLEST, largest)
    halves = (rotated * (1.0 / largest)[:, None] * LARGEST + MAGIC_FLOAT).to(tl.int32, bitcast=True) - MAGIC
    high = (halves + 64) >> 7
    return largest, halves, high, halves * 2 - (high << 8)


@triton.jit
def _join8(a, b, c, d, e, f, g, h):
    """New last dimensions: bits 2, 1 and 0 of the operand's number."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit
def _levels(codes, words, ROWS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr):
    """:func:`decode.load_words` -> two left operands int8 [WARPS, ROWS, 128], whose sum is ``c``."""
    if BITS == 3:
        codes = three_words(codes, ROWS // 8, WARPS * 32, _TOP_3)
    elif BITS == 2:
        codes = two_words(codes, ROWS // 8, WARPS * 32, _TOP_2)
    n0, n1, p0, p1, n2, n3, p2, p3, n4, n5, p4, p5, n6, n7, p6, p7 = decode_bytes(codes, words)
    negative = _join8(n0, n1, n2, n3, n4, n5, n6, n7)
    positive = _join8(p0, p1, p2, p3, p4, p5, p6, p7)
    # dims: octet, warp, g, t, i, p1, p0, h -> warp, rows (octet, g), columns (p1, p0, t, h, i)
    negative = negative.reshape(ROWS // 8, WARPS, 8, 4, 4, 2, 2, 2).trans(1, 0, 2, 5, 6, 3, 7, 4)
    positive = positive.reshape(ROWS // 8, WARPS, 8, 4, 4, 2, 2, 2).trans(1, 0, 2, 5, 6, 3, 7, 4)
    return negative.reshape(WARPS, ROWS, 128), positive.reshape(WARPS, ROWS, 128)


@triton.jit
def _right(values, WARPS: tl.constexpr):
    """int32 [2, threads * 4] -> right operand int8 [WARPS, 128, 8]."""
    a, b, c, d = bytes_of_words(values)
    # dims: p1, warp, g, t, i, p0, h -> warp, columns (p1, p0, t, h, i), g
    values = tl.join(tl.join(a, c), tl.join(b, d)).reshape(2, WARPS, 8, 4, 4, 2, 2)
    return values.trans(1, 0, 5, 3, 6, 4, 2).reshape(WARPS, 128, 8)


@triton.jit
def _fetch_token(token, step, THREADS: tl.constexpr, TAIL: tl.constexpr):
    x_address, x_mask, x_ahead, meta_address, meta_ahead = token
    x_address += step * (THREADS * 2)
    meta_address += step * (THREADS // 8)
    if TAIL:
        values = tl.load(x_address, mask=x_mask & (step * (THREADS // 32) < x_ahead)[None, :], other=0)
        meta = tl.load(meta_address, mask=step * (THREADS // 32) < meta_ahead, other=0)
    else:
        values = tl.load(x_address, mask=x_mask, other=0)
        meta = tl.load(meta_address)
    return values, meta


@triton.jit
def _multiply(codes, scale, right, meta, words, ROWS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr):
    """The product of a warp's tile, float32 [WARPS, ROWS, (t, byte)]."""
    negative, positive = _levels(codes, words, ROWS, WARPS, BITS)
    sums = tl.full((WARPS, ROWS, 8), MAGIC, tl.int32)
    sums = tl.dot(negative, right, sums, out_dtype=tl.int32)
    sums = tl.dot(positive, right, sums, out_dtype=tl.int32)
    # dims: warp, octet, g, t, byte -> warp, rows, (t, byte)
    OCTETS: tl.constexpr = ROWS // 8
    meta = meta.reshape(WARPS, 1, 8, 4)
    half_sum = meta.to(tl.int32).to(tl.float32, bitcast=True)
    factor = (meta >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    correction = tl.join(tl.full((WARPS, 1, 8, 4), _CORRECTION, tl.float32), half_sum)
    correction = tl.broadcast_to(correction, (WARPS, OCTETS, 8, 4, 2)).reshape(WARPS, ROWS, 8)
    factor = tl.broadcast_to(factor[:, :, :, :, None], (WARPS, OCTETS, 8, 4, 2)).reshape(WARPS, ROWS, 8)
    scale = (scale << 18).to(tl.float32, bitcast=True) * _EARLY
    scale = scale.reshape(OCTETS, WARPS, 8, 4).trans(1, 0, 2, 3)[:, :, :, :, None]
    scale = tl.broadcast_to(scale, (WARPS, OCTETS, 8, 4, 2)).reshape(WARPS, ROWS, 8)
    return (sums.to(tl.float32, bitcast=True) + correction) * scale * factor


@triton.jit(do_not_specialize=["scale_stride", "tiles", "splits"])
def integer_kernel(
    x, token_scale, codes, residual, scales, exponents, bias, out, partial, counters,
    rows, tiles, code_stride, scale_stride, splits,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, ALLOCATION: tl.constexpr, COPYING: tl.constexpr, WAITING: tl.constexpr,
    REDUCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row tile, split): ``ROWS`` rows with ``AHEAD`` tiles of each warp on their way (``ring.py``). ``x`` is from
    ``rotate_bytes_kernel``, the rest as in ``slices.py``. No residual, whole tiles of 128 columns.

    TAIL: the columns of a row are not a multiple of ``128 * WARPS * splits``.
    """
    THREADS: tl.constexpr = WARPS * 32
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    turns = tl.cdiv(tiles, splits * WARPS)
    first = split * turns * WARPS  # tile of this program's first warp
    words = byte_tables(BITS)
    located = start_ring(
        codes, scales, code_stride, scale_stride, first, turns, tiles, tile_n * ROWS, rows,
        BITS, ROWS, WARPS, AHEAD, ALLOCATION, COPYING,
    )  # fmt: skip
    # A thread (warp, g, t) has the 32 columns of scale t in the rows g, g + 8, ...
    word = tl.arange(0, THREADS * 4)
    thread = tl.arange(0, THREADS)
    octet = tl.arange(0, ROWS // 8)[:, None]
    scale_place = (thread // 32 * (ROWS * 4) + (thread // 4) % 8 * 4 + thread % 4)[None, :] + octet * 32
    # Activations: thread (g, t) loads 32 bytes, if g is t's column of the high or of the low bytes.
    x_mask = ((word // 32) % 4 == (word // 4) % 4)[None, :]
    x_tile = first + word // 128
    x_address = x.to(tl.pointer_type(tl.int32)) + (tl.arange(0, 2) * 4)[:, None]
    x_address += (x_tile * 64 + ((word // 16) % 8) * 8 + word % 4)[None, :]
    meta_tile = first + thread // 32
    meta_address = x.to(tl.pointer_type(tl.int64)) + tiles * 32 + meta_tile * 4 + thread % 4
    token = x_address, x_mask, tiles - x_tile, meta_address, tiles - meta_tile

    prefetch(exponents + tile_n * ROWS)
    if HAS_BIAS:
        prefetch(bias + tile_n * ROWS)
    if PDL:  # weights are on their way while the rotation still runs
        wait_for_producer()
    following = _fetch_token(token, 0, THREADS, TAIL)
    acc = tl.zeros((WARPS, ROWS, 8), tl.float32)
    stage = 0
    for turn in range(turns):
        here = receive(located, turn, stage, BITS, ROWS, WARPS, AHEAD, COPYING, WAITING)
        packed = take_codes(located, here, BITS, ROWS, WARPS)
        scale = take_scales(located, here, scale_place, BITS, ROWS, WARPS)
        values, meta = following
        right = _right(values, WARPS)  # before the next ones are loaded: they take these registers
        if turn + 1 < turns:
            following = _fetch_token(token, turn + 1, THREADS, TAIL)
        acc += _multiply(packed, scale, right, meta, words, ROWS, WARPS, BITS)
        stage = advance(stage, BITS, ROWS, WARPS, AHEAD)
    if PDL:  # the next layer's rotation may take its place; it waits for this kernel's end before it touches memory
        launch_dependents()
    high, low = tl.split(tl.sum(acc, 0).reshape(ROWS, 4, 2))
    total = tl.sum(high * 256.0 + low, 1)
    reduce_and_finish(
        total[:, None], partial, counters, tile_n, split, splits, token_scale, exponents, bias, out, tl.arange(0, 1),
        tile_n * ROWS + tl.arange(0, ROWS), rows, 1, ROWS, 1, REDUCE, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["counters_size"])
def rotate_bytes_kernel(
    x, sign, matrix, out, token_scale, counters, counters_size, columns, tiles, norm, TILES: tl.constexpr, PDL: tl.constexpr
):
    """Program (part, t): columns ``32 * t`` to ``32 * t + 31`` of ``TILES`` tiles of the token ``x`` [columns]. ``matrix``
    [128, 128] is ``rotate.tile_matrix`` in natural order.

    ``out``: of each tile and scale 32 high and 32 low bytes, and behind all of them for each tile and scale, in float32,
    half the sum of its integers less 1.5 * 2**23, and their factor. ``token_scale`` is a constant here. Also zeroes the
    ``counters`` of the reduction that follows.
    """
    place = tl.arange(0, 128)
    group = tl.program_id(1)
    target = group * 32 + tl.arange(0, 32)
    square = tl.load(matrix + place[:, None] * 128 + target[None, :])
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * 128 + place[None, :]
    flips = tl.load(sign + column, mask=column < tiles * 128, other=0.0)
    if PDL:  # in this order: once the matmul starts, weights written by an earlier kernel are visible to it
        wait_for_producer()
        launch_dependents()
    values = tl.load(x + column, mask=column < columns, other=0.0)
    program = tl.program_id(0) * 4 + group
    for start in range(program * 128, counters_size, tl.num_programs(0) * 512):
        tl.store(counters + start + place, tl.zeros((128,), tl.int32), mask=start + place < counters_size)
    if program == 0:
        tl.store(token_scale, _LATE)
    rotated = tl.dot(values * flips, square, input_precision="ieee") * norm
    largest, halves, high, low = activation_bytes(rotated, 2.0**-110)
    live = tile < tiles
    address = out.to(tl.pointer_type(tl.int8)) + (tile * 256 + group * 64)[:, None] + tl.arange(0, 32)[None, :]
    tl.store(address, high.to(tl.int8), mask=live[:, None])
    tl.store(address + 32, low.to(tl.int8), mask=live[:, None])
    meta = out.to(tl.pointer_type(tl.float32)) + tiles * 64 + tile * 8 + group * 2
    tl.store(meta, tl.sum(halves, 1).to(tl.float32) + _CORRECTION, mask=live)
    tl.store(meta + 1, largest * (0.5 / LARGEST), mask=live)
