"""The fused matmul for two to four tokens and no residual on the integer tensor cores.

Levels and activations are the integers of ``integer.py``, whose trick of one scale per thread would want the products of
four scales for every token. Here a product goes over the 32 columns of one scale, and the eight columns of its right operand
are the high and the low bytes of four tokens.

**Words.** The four threads of a row must then hold 8 columns of every scale. Each loads and widens the 32 columns of one
scale, as everywhere, and the four transpose what they have: 4 shuffles and 12 selections for 32 weights of a thread.

**Sums.** With a sum of high bytes H and one of low bytes L a product is 256 * H + L. What matters of L is what is above its
lowest 8 bits, so H + (L >> 8) is the product over 256, with an error of 2e-5 of its usual size. Both sums start at a number
that makes this the bits of 1.5 * 2**23 when nothing is added: read as float32, the integer is that number plus the product.
The multiplication by the activations' factor takes it away, and adds half the sum of the activations, which the 0.5 of the
levels asks for, and the mean of what was cut off. So a sum costs three instructions: shift and add, factor and offset, and
scale.
"""

# Triton's tuples may be of any length:
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..codebook import HALF_INTEGER_LEVELS
from .decode import register, widen_codes
from .integer import (
    LARGEST,
    MAGIC,
    MAGIC_FLOAT,
    activation_bytes,
    byte_tables,
    bytes_of_words,
    decode_bytes,
    table,
)
from .nvidia import launch_dependents, prefetch, wait_for_producer
from .reduction import reduce_and_finish
from .ring import advance, receive, start_ring, take_codes, take_scale_words

FEW_TOKENS = 4
FEW_TILES = 16  # of a program of `rotate_few_kernel`
FEW_BYTES = 4 * (256 + 32)  # of a tile of 128 columns: of each token, present or not, the bytes and the factors
_TILE_WORDS = tl.constexpr(FEW_BYTES // 4)
# The factor is that much too small: 1.5 * 2**23 times any factor is a float32. `_LATE` has it, and the 2**12 of integer.py.
_SMALL = tl.constexpr(2.0**-17)
_LATE = tl.constexpr(2.0**29)
_START = tl.constexpr((MAGIC.value * 256 + 256) // 257)
assert _START.value + (_START.value >> 8) == MAGIC.value
# The mean of what is cut off from a low sum, an even number, less what is cut off from its start, in units of 256.
_CUT = tl.constexpr((127 - _START.value % 256) / 256)


def transposing() -> str:
    """PTX: word i of lane 4g + t in $4 to $7 -> word t of lane 4g + j in $j."""
    lines = ["{ .reg .b32 v, s0, s1, r0, r1, x0, x1, x2, x3; .reg .pred even, low; mov.u32 v, %laneid;"]
    lines.append("and.b32 s0, v, 1; setp.eq.u32 even, s0, 0; and.b32 s1, v, 2; setp.eq.u32 low, s1, 0;")

    def exchange(mask: int, predicate: str, source: list[str], target: list[str]) -> None:
        pairs = [(i, i + mask) for i in range(4) if not i & mask]
        lines.extend(f"selp.b32 s{n}, {source[b]}, {source[a]}, {predicate};" for n, (a, b) in enumerate(pairs))
        lines.extend(f"shfl.sync.bfly.b32 r{n}, s{n}, {mask}, 31, 0xffffffff;" for n in range(2))
        for n, (a, b) in enumerate(pairs):
            lines.append(f"selp.b32 {target[a]}, {source[a]}, r{n}, {predicate};")
            lines.append(f"selp.b32 {target[b]}, r{n}, {source[b]}, {predicate};")

    exchange(1, "even", ["$4", "$5", "$6", "$7"], ["x0", "x1", "x2", "x3"])
    exchange(2, "low", ["x0", "x1", "x2", "x3"], ["$0", "$1", "$2", "$3"])
    return " ".join([*lines, "}"])


_TRANSPOSING = tl.constexpr(transposing())


def small_table(bits: int) -> tuple[int, int]:
    """All levels of 2 or 3 bits, less a half, as bytes in two words."""
    positive = list(HALF_INTEGER_LEVELS[bits])
    return table(([~c for c in reversed(positive)] + positive) * (4 - bits))


_S0, _S1 = (tl.constexpr(words) for words in zip(*(small_table(max(bits, 2)) for bits in range(4)), strict=True))


def small_assembly() -> str:
    """Four words of 8 codes below 8 in $8-$11, then the table, each word four times -> of word p the levels of its first and
    of its last four columns in $2p and $2p + 1."""
    return "\n".join(
        f"{{ .reg .b32 q; shr.u32 q, ${8 + p}, 16;"
        f" prmt.b32 ${2 * p}, $12, $16, ${8 + p}; prmt.b32 ${2 * p + 1}, $12, $16, q; }}"
        for p in range(4)
    )


_SMALL_ASSEMBLY = tl.constexpr(small_assembly())
_SMALL_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))
# A scale byte is a half-precision number shifted right by 5: those of a word to $0 to $3.
_SCALES = tl.constexpr(
    "{ .reg .b32 v; .reg .b16 a, b;"
    " shl.b32 v, $4, 5; and.b32 v, v, 0x1fe01fe0; mov.b32 {a, b}, v; cvt.f32.f16 $0, a; cvt.f32.f16 $2, b;"
    " shr.u32 v, $4, 3; and.b32 v, v, 0x1fe01fe0; mov.b32 {a, b}, v; cvt.f32.f16 $1, a; cvt.f32.f16 $3, b; }"
)


@triton.jit
def _left(first, last, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Bytes of the first and of the last four columns of each thread -> left operand int8 [WARPS, ROWS, 32]."""
    # dims: octet, warp, g, t, i, h -> warp, rows (octet, g), columns (t, h, i)
    values = tl.join(first, last).reshape(ROWS // 8, WARPS, 8, 4, 4, 2).trans(1, 0, 2, 3, 5, 4)
    return values.reshape(WARPS, ROWS, 32)


@triton.jit
def _levels(codes, tables, ROWS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr):
    """:func:`decode.load_words` -> left operands of the four scales whose sum is ``c``: of 4 bits those of the negative
    levels and those of the positive ones, of fewer bits, whose levels are in one table, one of each."""
    words = tl.inline_asm_elementwise(
        _TRANSPOSING, "=&r,=&r,=&r,=&r,r,r,r,r", [widen_codes(codes, ROWS // 8, WARPS * 32, BITS, True)],
        dtype=tl.int32, is_pure=True, pack=4,
    )  # fmt: skip
    if BITS == 4:
        n0, n1, p0, p1, n2, n3, p2, p3, n4, n5, p4, p5, n6, n7, p6, p7 = decode_bytes(words, tables)
        operands = (
            _left(n0, n1, ROWS, WARPS), _left(n2, n3, ROWS, WARPS), _left(n4, n5, ROWS, WARPS), _left(n6, n7, ROWS, WARPS),
            _left(p0, p1, ROWS, WARPS), _left(p2, p3, ROWS, WARPS), _left(p4, p5, ROWS, WARPS), _left(p6, p7, ROWS, WARPS),
        )  # fmt: skip
    else:
        n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
            _SMALL_ASSEMBLY, _SMALL_CONSTRAINTS, [words, tables[0], tables[1]], dtype=(tl.int8,) * 8, is_pure=True, pack=4
        )
        operands = (
            _left(n0, n1, ROWS, WARPS), _left(n2, n3, ROWS, WARPS), _left(n4, n5, ROWS, WARPS), _left(n6, n7, ROWS, WARPS),
        )  # fmt: skip
    return operands


@triton.jit
def _right(first, last, WARPS: tl.constexpr):
    """Bytes of the first and of the last four columns of each thread -> right operand int8 [WARPS, 32, 8]."""
    # dims: warp, g, t, i, h -> warp, columns (t, h, i), g
    return tl.join(first, last).reshape(WARPS, 8, 4, 4, 2).trans(0, 2, 4, 3, 1).reshape(WARPS, 32, 8)


@triton.jit
def _factors(meta, WARPS: tl.constexpr):
    """Factors and offsets of two scales, float32 [WARPS, 8, 4] each."""
    # dims: warp, g, t, scale, kind
    factors, offsets = tl.split(meta.to(tl.float32, bitcast=True).reshape(WARPS, 8, 4, 2, 2))
    f0, f1 = tl.split(factors)
    o0, o1 = tl.split(offsets)
    return f0, f1, o0, o1


@triton.jit
def _spread_tokens(values, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Of a thread's token -> of its accumulators [WARPS, ROWS, 4]."""
    return tl.broadcast_to(values[:, None, :, :], (WARPS, ROWS // 8, 8, 4)).reshape(WARPS, ROWS, 4)


@triton.jit
def _multiply(acc, codes, scale, tokens, tables, ROWS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr):
    levels = _levels(codes, tables, ROWS, WARPS, BITS)
    scales = tl.inline_asm_elementwise(_SCALES, "=&r,=&r,=&r,=&r,r", [scale], dtype=(tl.float32,) * 4, is_pure=True, pack=1)
    a, b, c, d = bytes_of_words(tokens[0])
    e, f, g, h = bytes_of_words(tokens[1])
    right = _right(a, b, WARPS), _right(c, d, WARPS), _right(e, f, WARPS), _right(g, h, WARPS)
    f0, f1, o0, o1 = _factors(tokens[2], WARPS)
    f2, f3, o2, o3 = _factors(tokens[3], WARPS)
    factors, offsets = (f0, f1, f2, f3), (o0, o1, o2, o3)
    for j in tl.static_range(4):
        sums = tl.full((WARPS, ROWS, 8), _START, tl.int32)
        sums = tl.dot(levels[j], right[j], sums, out_dtype=tl.int32)
        if BITS == 4:
            sums = tl.dot(levels[j + 4], right[j], sums, out_dtype=tl.int32)
        high, low = tl.split(sums.reshape(WARPS, ROWS, 4, 2))
        total = (high + (low >> 8)).to(tl.float32, bitcast=True)
        factor = _spread_tokens(factors[j], ROWS, WARPS)
        offset = _spread_tokens(offsets[j], ROWS, WARPS)
        acc += (total * factor + offset) * scales[j].reshape(ROWS // 8, WARPS, 8, 4).trans(1, 0, 2, 3).reshape(
            WARPS, ROWS, 4
        )
    return acc


@triton.jit(do_not_specialize=["tokens", "scale_stride", "tiles", "splits"])
def few_kernel(
    x, token_scale, codes, residual, scales, exponents, bias, out, partial, counters,
    tokens, rows, tiles, code_stride, scale_stride, splits,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, ALLOCATION: tl.constexpr, COPYING: tl.constexpr, WAITING: tl.constexpr,
    REDUCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row tile, split): ``ROWS`` rows with ``AHEAD`` tiles of each warp on their way (``ring.py``). ``x`` is from
    ``rotate_few_kernel``, with zeros beyond ``tiles``; the rest as in ``slices.py``. No residual, whole tiles.
    """
    THREADS: tl.constexpr = WARPS * 32
    OCTETS: tl.constexpr = ROWS // 8
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    turns = tl.cdiv(tiles, splits * WARPS)
    first = split * turns * WARPS  # tile of this program's first warp
    tables = byte_tables(BITS) if BITS == 4 else (register(_S0[BITS]), register(_S1[BITS]))
    located = start_ring(
        codes, scales, code_stride, scale_stride, first, turns, tiles, tile_n * ROWS, rows,
        BITS, ROWS, WARPS, AHEAD, ALLOCATION, COPYING,
    )  # fmt: skip
    # A thread (warp, g, t) works for the rows g, g + 8, ...
    item = tl.arange(0, OCTETS * THREADS)
    scale_place = (item // 32) % WARPS * ROWS + item // THREADS * 8 + (item // 4) % 8

    # Activations: thread (g, t) loads 8 columns of each scale of the token g // 2, high or low bytes, and the factors of its
    # accumulators' token t. Absent tokens repeat the bytes of the last one.
    word = tl.arange(0, THREADS * 4)[None, :]  # not the shape of `item`: the compiler would treat both alike
    address = x.to(tl.pointer_type(tl.int32)) + ((first + word // 128) * _TILE_WORDS + word % 16)
    x_address = address + (tl.minimum(word // 32 % 4, tokens - 1) * 2 + word // 16 % 2) * 16
    meta_address = address + 256

    prefetch(exponents + tile_n * ROWS)
    if HAS_BIAS:
        prefetch(bias + tile_n * ROWS)
    if PDL:  # weights are on their way while the rotation still runs
        wait_for_producer()
    acc = tl.zeros((WARPS, ROWS, 4), tl.float32)
    stage = 0
    for turn in range(turns):
        step = turn * (WARPS * _TILE_WORDS)
        values = tl.load(x_address + step), tl.load(x_address + step + 128)
        values = values + (tl.load(meta_address + step), tl.load(meta_address + step + 16))  # noqa: RUF005
        here = receive(located, turn, stage, BITS, ROWS, WARPS, AHEAD, COPYING, WAITING)
        packed = take_codes(located, here, BITS, ROWS, WARPS)
        scale = take_scale_words(located, here, scale_place, BITS, ROWS, WARPS)
        acc = _multiply(acc, packed, scale, values, tables, ROWS, WARPS, BITS)
        stage = advance(stage, BITS, ROWS, WARPS, AHEAD)
    if PDL:  # the next layer's rotation may take its place; it waits for this kernel's end before it touches memory
        launch_dependents()
    reduce_and_finish(
        tl.sum(acc, 0), partial, counters, tile_n, split, splits, token_scale, exponents, bias, out, tl.arange(0, 4),
        tile_n * ROWS + tl.arange(0, ROWS), rows, tokens, ROWS, 4, REDUCE, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "counters_size"])
def rotate_few_kernel(
    x, sign, matrix, out, token_scale, counters, x_stride, tokens, counters_size, columns, tiles, norm,
    TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, j): columns ``32 * j`` to ``32 * j + 31`` of ``TILES`` of the tiles of all tokens, one token's after
    another's. ``x`` [tokens, columns] in rows ``x_stride`` apart; ``matrix`` [128, 128] is ``rotate.tile_matrix`` in natural
    order.

    ``out``: of each tile bytes [2, 4 tokens, (high, low), 4, 2 scales, 8] and float32 [2, 4 tokens, 2 scales, (factor,
    offset)]. A sum times its factor lacks the offset. ``tiles`` are as many as the product reads, those beyond ``columns``
    zeros. ``token_scale`` is a constant here. Also zeroes the ``counters`` of the reduction that follows.
    """
    place = tl.arange(0, 128)
    own = tl.arange(0, 32)
    group = tl.program_id(1)
    square = tl.load(matrix + place[:, None] * 128 + (group * 32 + own)[None, :])
    index = tl.program_id(0) * TILES + tl.arange(0, TILES)
    live = index < tokens * tiles
    token = index // tiles
    tile = index - token * tiles
    column = tile[:, None] * 128 + place[None, :]
    flips = tl.load(sign + column, mask=column < columns, other=0.0)
    if PDL:  # in this order: once the matmul starts, weights written by an earlier kernel are visible to it
        wait_for_producer()
        launch_dependents()
    row = x + token.to(tl.int64)[:, None] * x_stride
    values = tl.load(row + column, mask=live[:, None] & (column < columns), other=0.0)
    program = tl.program_id(0) * 4 + group
    for start in range(program * 128, counters_size, tl.num_programs(0) * 512):
        tl.store(counters + start + place, tl.zeros((128,), tl.int32), mask=start + place < counters_size)
    if program == 0:
        tl.store(token_scale + place, tl.full((128,), _LATE, tl.float32), mask=place < tokens)
    rotated = tl.dot(values * flips, square, input_precision="ieee") * norm
    largest, halves, high, low = activation_bytes(rotated, 2.0**-100)
    at = tile * (_TILE_WORDS * 4) + group // 2 * 512 + token * 128 + group % 2 * 8
    address = out.to(tl.pointer_type(tl.int8)) + at[:, None] + (own // 8 * 16 + own % 8)[None, :]
    tl.store(address, high.to(tl.int8), mask=live[:, None])
    tl.store(address + 64, low.to(tl.int8), mask=live[:, None])
    factor = largest * (128.0 / LARGEST * _SMALL)
    # In this order: next to 1.5 * 2**23 a float32 has no fraction.
    offset = (tl.sum(halves, 1).to(tl.float32) * (1.0 / 256.0) + _CUT) * factor - MAGIC_FLOAT * factor
    meta = out.to(tl.pointer_type(tl.float32)) + (tile * _TILE_WORDS + 256 + group // 2 * 16 + token * 4 + group % 2 * 2)
    tl.store(meta, factor, mask=live)
    tl.store(meta + 1, offset, mask=live)
