"""The fused matmul for few tokens: every warp works alone on its slice of the columns.

Up to 8 tokens fill one tensor-core column block, so there is nothing to share between warps: a warp loads 16 or 32 rows x
128 columns of codes and its activations straight into the registers of an ``mma.sync`` fragment. The ``WARPS`` warps of a
program take every ``WARPS``-th tile of 128 columns (a batched dot product with one batch per warp); the end sums them up.

Levels are computed, or half or all of them looked up in a table in shared memory (``decode.py``), which moves the work from
the integer ALU to the L1 cache's pipe.

Loads must be ahead of their use, and ptxas moves a load that only the next iteration needs down to the end of the loop. It
does not move it into another basic block: hence the conditions around loads, one tile before its turn. Who waits for one of
them still waits for all; a ring (``ring.py``) would not, but gains 0 to 7 % here and takes room from the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import (
    FILL_TABLE,
    LOOKUP_STRIDES,
    LOOKUP_TABLE,
    decode_words,
    load_words,
    register,
    scale_pairs,
    stride_in_words,
    tables,
)
from .nvidia import launch_dependents, prefetch, wait_for_producer
from .reduction import reduce_and_finish

MOST_TOKENS = 8


@triton.jit
def fetch(
    code_address, rest_address, scale_address, group, limit, step,
    THREADS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Codes, residual and scale bytes of the tile ``step`` turns ahead; zeros beyond ``limit`` groups."""
    if TAIL:
        code_group, rest_group, scale_group = group
        ahead = limit - step * (THREADS // 8)
        codes = load_words(code_address + step * (THREADS // 8 * BITS), code_group < ahead, 0, BITS)
        scale = tl.load(scale_address + step * (THREADS // 8), mask=scale_group < ahead, other=0)
        rest = codes
        if RESIDUAL_BITS > 0:
            rest = load_words(rest_address + step * (THREADS // 8 * RESIDUAL_BITS), rest_group < ahead, 0, RESIDUAL_BITS)
    else:
        codes = load_words(code_address + step * (THREADS // 8 * BITS), None, None, BITS)
        scale = tl.load(scale_address + step * (THREADS // 8))
        rest = codes
        if RESIDUAL_BITS > 0:
            rest = load_words(rest_address + step * (THREADS // 8 * RESIDUAL_BITS), None, None, RESIDUAL_BITS)
    return codes, rest, scale


@triton.jit
def locate(
    plane, first, first_row, rows, stride, OCTETS: tl.constexpr, THREADS: tl.constexpr, BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Address and group of the words of a plane that the threads of a program read from the tile ``first`` on, for
    ``decode.load_words``: a thread (warp, g, t) reads the 32 columns of one scale in the rows g, g + 8, ..."""
    UNITS: tl.constexpr = 1 if BITS == 3 else BITS
    if BITS == 3:
        item = tl.arange(0, OCTETS * THREADS)
        octet, word = item // THREADS, item % THREADS
    else:
        octet, word = tl.arange(0, OCTETS)[:, None], tl.arange(0, THREADS * BITS)[None, :]
    row = tl.minimum(octet * 8 + first_row + (word // (4 * UNITS)) % 8, rows - 1).to(tl.int64)
    group = (first + word // (32 * UNITS)) * 4 + (word // UNITS) % 4
    address = plane.to(tl.pointer_type(tl.int32)) + row * stride_in_words(stride, BITS, ALIGNED)
    return address + (group * BITS + word % UNITS), group


@triton.jit
def _fetch_tokens(x_address, x_group, limit, step, THREADS: tl.constexpr, TAIL: tl.constexpr):
    if TAIL:
        mask = (x_group < limit - step * (THREADS // 8))[None, :]
        tokens = tl.load(x_address + step * (THREADS * 2), mask=mask, other=0)
    else:
        tokens = tl.load(x_address + step * (THREADS * 2))
    return tokens


@triton.jit
def _right(tokens, WARPS: tl.constexpr):
    """int32 [4, THREADS * 4] -> right operand [WARPS, 128, 8]. Words, not halves, go through the loop: the compiler would
    take halves apart and put them together again."""
    even, odd = tl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, $3;", "=&r,=&r,r,r", [tokens], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )
    # dims: p, warp, g, t, h, i0, i1 -> warp, columns, tokens
    right = tl.join(even, odd).reshape(4, WARPS, 8, 4, 2, 2, 2)
    return right.trans(1, 0, 4, 3, 6, 5, 2).reshape(WARPS, 128, 8)


@triton.jit
def _fill_table(levels, THREADS: tl.constexpr):
    """The address of this lane's column of the table in shared memory."""
    table = tl.inline_asm_elementwise(LOOKUP_TABLE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    row = tl.arange(0, 256)
    tl.inline_asm_elementwise(
        FILL_TABLE, "=r,r,r,r,r", [tl.load(levels + row), row, row // max(256 // THREADS, 1), table],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()
    # Not pure: nobody is to read before the barrier.
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, %laneid; mad.lo.u32 $0, a, 4, $1; }",
        "=r,r",
        [table],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _multiply(
    acc, fetched, tokens, words, OCTETS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    codes, rest, scale = fetched
    pairs = scale_pairs(scale.to(tl.int32), 0)
    weight = decode_words(codes, rest, pairs, words, OCTETS, WARPS * 32, BITS, RESIDUAL_BITS, ASSEMBLY, LOOKUP)
    # dims: 16 rows, b1, warp, g, t, p1, i0, p0, h, i1 -> warp, rows (16 rows, b1, g), columns (p, h, t, i1, i0)
    weight = weight.reshape(OCTETS // 2, 2, WARPS, 8, 4, 2, 2, 2, 2, 2).trans(2, 0, 1, 3, 5, 7, 8, 4, 9, 6)
    return tl.dot(weight.reshape(WARPS, OCTETS * 8, 128), _right(tokens, WARPS), acc)


@triton.jit(do_not_specialize=["tokens", "residual_stride", "scale_stride", "groups", "splits"])
def slices_kernel(
    x, token_scale, codes, residual, scales, exponents, bias, levels, out, partial, counters,
    tokens, rows, groups, x_stride, code_stride, residual_stride, scale_stride, splits,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, LOOKUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, REDUCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row tile, split). ``x`` float16 [tokens <= 8, x_stride] from ``rotate_scaled_kernel``, in the order
    ``decode.slice_column``; ``out`` [tokens, rows]; the rest as in ``splitk.py``. LOOKUP: ASSEMBLY looks levels up in a
    table of the words ``levels``; without a residual activations are then in the order ``decode.paired_slice_column``.

    TAIL: the columns of a row are not a multiple of ``128 * WARPS * splits``. Strides of scales and residual are not
    specialized: with unknown alignment a thread loads its own byte or words, as the decoder wants it.
    """
    THREADS: tl.constexpr = WARPS * 32
    OCTETS: tl.constexpr = ROWS // 8
    REST: tl.constexpr = max(RESIDUAL_BITS, 1)
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    turns = tl.cdiv(tl.cdiv(groups, 4), splits * WARPS)
    first = split * turns * WARPS  # tile of this program's first warp
    limit = tl.minimum((first + turns * WARPS) * 4, groups)
    words = tables(BITS, RESIDUAL_BITS)
    first_row = tile_n * ROWS
    code_address, code_group = locate(codes, first, first_row, rows, code_stride, OCTETS, THREADS, BITS, BITS == 4)
    rest_address, rest_group = locate(residual, first, first_row, rows, residual_stride, OCTETS, THREADS, REST, False)
    thread = tl.arange(0, THREADS)[None, :]
    scale_row = tl.minimum(tl.arange(0, OCTETS)[:, None] * 8 + first_row + (thread // 4) % 8, rows - 1).to(tl.int64)
    scale_group = (first + thread // 32) * 4 + thread % 4
    group = code_group, rest_group, scale_group
    scale_address = scales + scale_row * scale_stride + scale_group
    # Activations: 4 loads of 8 halves by thread (g, t) of the warp; g is the token, absent ones repeat the last.
    word = tl.arange(0, THREADS * 4)
    x_group = (first + word // 128) * 4 + (word // 4) % 4
    x_row = tl.minimum((word // 16) % 8, tokens - 1) * (x_stride // 2)
    x_column = (first + word // 128) * 64 + word % 16
    x_address = x.to(tl.pointer_type(tl.int32)) + (x_row + x_column)[None, :] + tl.arange(0, 4)[:, None] * 16

    prefetch(exponents + tile_n * ROWS)
    if HAS_BIAS:
        prefetch(bias + tile_n * ROWS)
    even = fetch(code_address, rest_address, scale_address, group, limit, 0, THREADS, BITS, RESIDUAL_BITS, TAIL)
    odd = even
    if turns > 1:
        odd = fetch(code_address, rest_address, scale_address, group, limit, 1, THREADS, BITS, RESIDUAL_BITS, TAIL)
    if LOOKUP:
        words = (_fill_table(levels, THREADS), register(LOOKUP_STRIDES[RESIDUAL_BITS])) + words  # noqa: RUF005 Triton knows no stars
    if PDL:  # weights are on their way while the rotation still runs
        wait_for_producer()
    values = _fetch_tokens(x_address, x_group, limit, 0, THREADS, TAIL)
    acc = tl.zeros((WARPS, ROWS, 8), tl.float32)
    for turn in range(0, turns, 2):
        acc = _multiply(acc, even, values, words, OCTETS, WARPS, BITS, RESIDUAL_BITS, ASSEMBLY, LOOKUP)
        if turn + 1 < turns:
            values = _fetch_tokens(x_address, x_group, limit, turn + 1, THREADS, TAIL)
            if turn + 2 < turns:
                even = fetch(
                    code_address, rest_address, scale_address, group, limit, turn + 2, THREADS, BITS, RESIDUAL_BITS, TAIL
                )
            acc = _multiply(acc, odd, values, words, OCTETS, WARPS, BITS, RESIDUAL_BITS, ASSEMBLY, LOOKUP)
            if turn + 2 < turns:
                values = _fetch_tokens(x_address, x_group, limit, turn + 2, THREADS, TAIL)
            if turn + 3 < turns:
                odd = fetch(
                    code_address, rest_address, scale_address, group, limit, turn + 3, THREADS, BITS, RESIDUAL_BITS, TAIL
                )
    if PDL:  # the next layer's rotation may take its place; it waits for this kernel's end before it touches memory
        launch_dependents()
    reduce_and_finish(
        tl.sum(acc, 0), partial, counters, tile_n, split, splits, token_scale, exponents, bias, out, tl.arange(0, 8),
        tile_n * ROWS + tl.arange(0, ROWS), rows, tokens, ROWS, 8, REDUCE, HAS_BIAS,
    )  # fmt: skip
