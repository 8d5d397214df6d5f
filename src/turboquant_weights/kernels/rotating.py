"""The matmul for one token with the rotation inside: one launch, no workspace.

Warps work as in ``slices.py``. What makes the rotation free is that a Hadamard matrix is a Kronecker product, ``A x B`` with
16 x 16 and 8 x 8 factors, and that a tensor core wants at least 8 columns on the right where one token has one. Let ``z``
[8, 16] be a tile of 128 activations after ``A``, which is two matrix instructions for two tiles. Then

    sum over (j, i) of W[n, (j, i)] * y[j, i]    with    y[j, i] = sum over b of B[j, b] * z[b, i]

is the sum over ``b`` of a product with *eight* columns, ``B[j, b] * z[b, i]``: the entries of ``B`` are signs, and the sum
over ``b`` can wait until the very end. No value changes its thread between the two matrix instructions: an accumulator of
the first lies exactly where the second wants its right operand.

Each pair of tiles is scaled by a power of two of its own, so half precision holds any activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import decode_words, power_of_two, scale_pairs, stride_in_words, tables
from .nvidia import launch_dependents, prefetch, wait_for_producer
from .slices import fetch, locate


@triton.jit
def _load_pair(address, column, limit, step, TILES: tl.constexpr, TAIL: tl.constexpr):
    """Values of two tiles, ``step`` pairs ahead; zeros from column ``limit`` on."""
    ahead = step * (TILES * 128)
    return tl.load(address + ahead, mask=column < limit - ahead, other=0.0) if TAIL else tl.load(address + ahead)


@triton.jit
def _rotate(values, outer, WARPS: tl.constexpr):
    """Activations of two tiles, times their signs -> ``z`` of both [WARPS, b, i1, t, i0], their exponent [WARPS]."""
    # dims: tile, warp, g, t, bits 1 and 0 -> warp, (tile, g), (bit 1, t, bit 0)
    left = values.reshape(2, WARPS, 8, 4, 2, 2).trans(1, 0, 2, 4, 3, 5).reshape(WARPS, 16, 16)
    z = tl.dot(left, outer, out_dtype=tl.float32)
    bits = tl.max(tl.abs(z).reshape(WARPS, 256).to(tl.int32, bitcast=True), 1)
    exponent = tl.where(bits == 0, 0, tl.maximum((bits >> 23) - 127, -110))
    z = (z.reshape(WARPS, 256) * power_of_two(14 - exponent)[:, None]).to(tl.float16)
    # dims: warp, tile, b, i1, t, i0
    even, odd = tl.split(z.reshape(WARPS, 2, 8, 2, 4, 2).trans(0, 2, 3, 4, 5, 1))
    return even, odd, exponent


@triton.jit
def _expand(z, flips, WARPS: tl.constexpr):
    """``z`` times the signs of ``B``, a right operand [WARPS, 128, 8]; ``flips`` are the rows 1, 2 and 4 of ``B``."""
    f1, f2, f4 = flips
    z1, z2, z4 = z * f1, z * f2, z * f4
    z3, z5, z6 = z1 * f2, z1 * f4, z2 * f4
    low = tl.join(tl.join(z, z4), tl.join(z2, z6))
    high = tl.join(tl.join(z1, z5), tl.join(z3, z3 * f4))
    # dims: warp, b, i1, t, i0, p1, p0, h -> warp, (p1, p0, h, t, i1, i0), b
    return tl.join(low, high).trans(0, 5, 6, 7, 3, 2, 4, 1).reshape(WARPS, 128, 8)


@triton.jit
def _weight(
    fetched, words, OCTETS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    codes, rest, scale = fetched
    weight = decode_words(
        codes, rest, scale_pairs(scale.to(tl.int32), 0), words, OCTETS, WARPS * 32, BITS, RESIDUAL_BITS, ASSEMBLY
    )
    # dims: 16 rows, b1, warp, g, t, p1, i0, p0, h, i1 -> warp, rows (16 rows, b1, g), columns (p, h, t, i1, i0)
    weight = weight.reshape(OCTETS // 2, 2, WARPS, 8, 4, 2, 2, 2, 2, 2).trans(2, 0, 1, 3, 5, 7, 8, 4, 9, 6)
    return weight.reshape(WARPS, OCTETS * 8, 128)


@triton.jit
def _product(
    x, sign, matrix, codes, residual, scales, exponents, tile_n,
    rows, columns, groups, code_stride, residual_stride, scale_stride, norm,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """[ROWS] float32: the rows of tile ``tile_n`` times ``x``. WAIT: ``x`` may not be there yet."""
    THREADS: tl.constexpr = WARPS * 32
    OCTETS: tl.constexpr = ROWS // 8
    REST: tl.constexpr = max(RESIDUAL_BITS, 1)
    turns = tl.cdiv(tl.cdiv(groups, 4), WARPS)
    words = tables(BITS, RESIDUAL_BITS)
    first_row = tile_n * ROWS
    code_address, code_group = locate(codes, 0, first_row, rows, code_stride, OCTETS, THREADS, BITS, BITS == 4)
    rest_address, rest_group = locate(residual, 0, first_row, rows, residual_stride, OCTETS, THREADS, REST, False)
    thread = tl.arange(0, THREADS)[None, :]
    scale_row = tl.minimum(tl.arange(0, OCTETS)[:, None] * 8 + first_row + (thread // 4) % 8, rows - 1).to(tl.int64)
    scale_group = (thread // 32) * 4 + thread % 4
    group = code_group, rest_group, scale_group
    scale_address = scales + scale_row * scale_stride + scale_group
    # Activations of two tiles: thread (warp, g, t) loads 4 neighbours of each.
    item = tl.arange(0, THREADS * 4)
    tile_column = (item // 128) * 128 + ((item // 4) % 4) * 32 + ((item // 16) % 8) * 4 + item % 4
    pair_column = tile_column[None, :] + tl.arange(0, 2)[:, None] * (WARPS * 128)
    x_address = x + pair_column
    sign_address = sign + pair_column
    # dims: warp, g, t, high bit of the column, bit 1, bit 0 -> warp, (bit 1, t, bit 0), column
    outer = tl.load(matrix + tl.arange(0, THREADS * 8) % 256).reshape(WARPS, 8, 4, 2, 2, 2)
    outer = outer.trans(0, 4, 2, 5, 3, 1).reshape(WARPS, 16, 16)
    b = tl.arange(0, 8)[None, :, None, None, None]
    low, middle, high = b & 1, (b >> 1) & 1, b >> 2
    f1, f2, f4 = (1 - 2 * low).to(tl.float16), (1 - 2 * middle).to(tl.float16), (1 - 2 * high).to(tl.float16)
    flips = f1, f2, f4

    prefetch(exponents + tile_n * ROWS)
    if WAIT:
        wait_for_producer()
    limit = groups
    even = fetch(code_address, rest_address, scale_address, group, limit, 0, THREADS, BITS, RESIDUAL_BITS, TAIL)
    odd = even
    if turns > 1:
        odd = fetch(code_address, rest_address, scale_address, group, limit, 1, THREADS, BITS, RESIDUAL_BITS, TAIL)
    values = _load_pair(x_address, pair_column, columns, 0, WARPS * 2, TAIL)
    signs = _load_pair(sign_address, pair_column, columns, 0, WARPS * 2, TAIL)
    acc = tl.zeros((WARPS, ROWS, 8), tl.float32)
    for turn in range(0, turns, 2):
        z_even, z_odd, exponent = _rotate(values * signs, outer, WARPS)
        product = tl.zeros((WARPS, ROWS, 8), tl.float32)
        weight = _weight(even, words, OCTETS, WARPS, BITS, RESIDUAL_BITS, ASSEMBLY)
        product = tl.dot(weight, _expand(z_even, flips, WARPS), product)
        if turn + 2 < turns:
            even = fetch(
                code_address, rest_address, scale_address, group, limit, turn + 2, THREADS, BITS, RESIDUAL_BITS, TAIL
            )
            values = _load_pair(x_address, pair_column, columns, turn // 2 + 1, WARPS * 2, TAIL)
            signs = _load_pair(sign_address, pair_column, columns, turn // 2 + 1, WARPS * 2, TAIL)
        weight = _weight(odd, words, OCTETS, WARPS, BITS, RESIDUAL_BITS, ASSEMBLY)
        product = tl.dot(weight, _expand(z_odd, flips, WARPS), product)
        if turn + 3 < turns:
            odd = fetch(
                code_address, rest_address, scale_address, group, limit, turn + 3, THREADS, BITS, RESIDUAL_BITS, TAIL
            )
        # In two halves: 2**(127 - 46) would leave no room for the weights' own magnitude, 2**-156 is no float32.
        down = exponent - 46
        first = power_of_two(down >> 1)
        second = power_of_two(down - (down >> 1))
        acc += product * first[:, None, None] * second[:, None, None]
    if PDL:
        launch_dependents()
    total = tl.sum(tl.sum(acc, 2), 0)
    row = tile_n * ROWS + tl.arange(0, ROWS)
    exponent = tl.load(exponents + row, mask=row < rows, other=0).to(tl.int32) + (7 + 32)
    half = exponent >> 1
    return total * power_of_two(half) * norm * power_of_two(exponent - half)


@triton.jit(do_not_specialize=["residual_stride", "scale_stride", "groups"])
def rotating_kernel(
    x, sign, matrix, codes, residual, scales, exponents, bias, out,
    rows, columns, groups, code_stride, residual_stride, scale_stride, norm,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row tile). ``x`` [columns] half or bfloat16; ``sign`` [columns, padded to whole tiles] and ``matrix``
    (``rotate.outer_matrix``) of the same dtype; ``out`` [rows]; ``norm`` is the rotation's factor; planes as on disk.

    TAIL: the columns of a row are not a multiple of ``256 * WARPS``.
    """
    tile_n = tl.program_id(0)
    if HAS_BIAS:
        prefetch(bias + tile_n * ROWS)
    total = _product(
        x, sign, matrix, codes, residual, scales, exponents, tile_n,
        rows, columns, groups, code_stride, residual_stride, scale_stride, norm,
        BITS, RESIDUAL_BITS, ASSEMBLY, TAIL, ROWS, WARPS, PDL, PDL,
    )  # fmt: skip
    row = tile_n * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["residual_stride", "scale_stride", "groups", "count", "residual_apart", "scales_apart"])
def routed_kernel(
    x, experts, sign, matrix, codes, residual, scales, exponents, out,
    count, x_stride, rows, columns, groups, code_stride, residual_stride, scale_stride, norm,
    codes_apart, residual_apart, scales_apart, exponents_apart,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row tile, token): ``out[i] = x[i] W[experts[i]]^T`` for a stack of ``count`` matrices, whose planes are
    ``codes_apart``, ... bytes apart; zeros for experts that are negative or from ``count`` on. The rest as above."""
    tile_n = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    if PDL:
        wait_for_producer()
    expert = tl.load(experts + token).to(tl.int64)
    which = tl.minimum(tl.maximum(expert, 0), count - 1)
    REST: tl.constexpr = max(RESIDUAL_BITS, 1)
    rest = residual.to(tl.pointer_type(tl.int32)) + which * stride_in_words(residual_apart, REST, False)
    if BITS == 4:
        plane = codes + which * codes_apart
    else:
        plane = codes.to(tl.pointer_type(tl.int32)) + which * stride_in_words(codes_apart, BITS, False)
    total = _product(
        x + token * x_stride, sign, matrix, plane, rest,
        scales + which * scales_apart, exponents + which * exponents_apart, tile_n,
        rows, columns, groups, code_stride, residual_stride, scale_stride, norm,
        BITS, RESIDUAL_BITS, ASSEMBLY, TAIL, ROWS, WARPS, False, PDL,
    )  # fmt: skip
    row = tile_n * ROWS + tl.arange(0, ROWS)
    total = tl.where((expert >= 0) & (expert < count), total, 0.0)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=row < rows)
