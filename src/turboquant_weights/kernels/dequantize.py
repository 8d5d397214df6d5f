"""Planes -> a dense matrix in scratch memory: for many tokens at once, where cuBLAS beats decoding in the loop."""

# Triton's tuples grow in unrolled loops, and a name may be a number and a tensor in turn:
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from .decode import (
    bfloat_tables,
    decode_bfloat,
    decode_gather,
    decode_words,
    load_words,
    power_of_two,
    scale_pairs,
    stride_in_words,
    tables,
)
from .nvidia import wait_for_producer


@triton.jit
def _load_tile(plane, first, tile, rows, groups, stride, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """A plane's words of 32 rows and 128 columns, for ``decode.decode_words``."""
    UNITS: tl.constexpr = 1 if BITS == 3 else BITS
    word = tl.arange(0, 128) if BITS == 3 else tl.arange(0, 128 * BITS)[None, :]
    row = tl.minimum(first + word // (4 * UNITS), rows - 1).to(tl.int64)
    group = tl.minimum(tile * 4 + (word // UNITS) % 4, groups - 1)
    address = plane.to(tl.pointer_type(tl.int32)) + row * stride_in_words(stride, BITS, ALIGNED)
    return load_words(address + group * BITS + word % UNITS, None, None, BITS, ONCE=False)


@triton.jit(do_not_specialize=["rows", "scale_stride", "groups"])
def dequantize_kernel(
    codes, residual, scales, exponents, levels, out,
    rows, groups, code_stride, residual_stride, scale_stride, out_stride,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (32 rows, 128 columns): ``out`` [rows, out_stride] in natural order, still rotated, row exponents applied."""
    first = tl.program_id(0) * 32
    tile = tl.program_id(1)
    place = tl.arange(0, 128)
    row = first + tl.arange(0, 32)
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    columns = tile * 128 + place[None, :]
    if ASSEMBLY == "":
        at = safe_row[:, None]
        weight = decode_gather(
            codes, residual, scales, levels, at * code_stride, at * residual_stride, at * scale_stride,
            columns, columns < groups * 32, BITS, RESIDUAL_BITS,
        )  # fmt: skip
    else:
        words = tables(BITS, RESIDUAL_BITS)
        packed = _load_tile(codes, first, tile, rows, groups, code_stride, BITS, BITS == 4)
        thread = tl.arange(0, 128)
        scale_row = tl.minimum(first + thread // 4, rows - 1).to(tl.int64)
        scale_group = tl.minimum(tile * 4 + thread % 4, groups - 1)
        scale = tl.load(scales + (scale_row * scale_stride + scale_group)[None, :])
        refined = packed
        if RESIDUAL_BITS > 0:
            refined = _load_tile(residual, first, tile, rows, groups, residual_stride, RESIDUAL_BITS, False)
        pairs = scale_pairs(scale.to(tl.int32), 0)
        weight = decode_words(packed, refined, pairs, words, 1, 128, BITS, RESIDUAL_BITS, ASSEMBLY)
        # dims: row 32, t, p1, i0, p0, h, i1 -> row, columns (t, p, h, i0, i1)
        weight = weight.reshape(32, 4, 2, 2, 2, 2, 2).trans(0, 1, 2, 4, 5, 3, 6).reshape(32, 128).to(tl.float32)
    exponent = tl.load(exponents + safe_row).to(tl.int32) + 7
    low = exponent >> 1
    weight = weight * power_of_two(low)[:, None] * power_of_two(exponent - low)[:, None]
    address = out + row.to(tl.int64)[:, None] * out_stride + columns
    tl.store(address, weight.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (columns < groups * 32))
    if PDL:
        wait_for_producer()


@triton.jit
def _octets(plane, row, word, stride, BITS: tl.constexpr):
    """The addresses of the bits of eight columns in a plane: of 3 bits, which are three bytes, those of two words."""
    if BITS == 3:
        address = plane.to(tl.pointer_type(tl.int32)) + row * (stride // 4)
        addresses = address + word * 3 // 4, address + (word * 3 + 2) // 4
    else:
        ELEMENT: tl.constexpr = tl.int32 if BITS == 4 else tl.uint16 if BITS == 2 else tl.uint8
        addresses = (plane.to(tl.pointer_type(ELEMENT)) + row * (stride // BITS) + word,)
    return addresses


@triton.jit
def _load_octets(addresses, step, word, live, BITS: tl.constexpr):
    """``step`` times 64 words on."""
    ahead = step * (48 if BITS == 3 else 64)
    octets = tl.load(addresses[0] + ahead, mask=live, other=0, eviction_policy="evict_first")
    if BITS == 3:
        high = tl.load(addresses[1] + ahead, mask=live, other=0, eviction_policy="evict_first")
        octets = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [octets, high, word * 24], dtype=tl.int32, is_pure=True, pack=1
        )
    return octets


@triton.jit(do_not_specialize=["rows", "scale_stride", "groups"])
def dequantize_words_kernel(
    codes, residual, scales, exponents, out, rows, groups, code_stride, residual_stride, scale_stride, out_stride,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same in bfloat16, from planes that :func:`bfloat_assembly` decodes: program (4 rows, ``UNITS * 512`` columns). In
    each unit a thread reads 8 codes and writes 16 bytes next to its neighbour's: no shared memory."""
    thread = tl.arange(0, 256)
    row = tl.program_id(0) * 4 + thread // 64
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    word = tl.program_id(1) * (UNITS * 64) + thread % 64
    code_address = _octets(codes, safe_row, word, code_stride, BITS)
    scale_address = scales + safe_row * scale_stride + word // 4
    rest_address = _octets(residual, safe_row, word, residual_stride, max(RESIDUAL_BITS, 1))
    packed, rest, scale = (), (), ()  # all on their way before the first is used
    for i in tl.static_range(UNITS):
        live = word + i * 64 < groups * 4
        packed += (_load_octets(code_address, i, word, live, BITS),)
        scale += (tl.load(scale_address + i * 16, mask=live, other=0),)
        if RESIDUAL_BITS > 0:
            rest += (_load_octets(rest_address, i, word, live, RESIDUAL_BITS),)
    # A scale byte is a half shifted right by 5, times 2**12 (and 2**7); what would leave float32's range comes afterwards.
    exponent = tl.load(exponents + safe_row).to(tl.int32) + 19
    excess = tl.maximum(exponent - 124, 0)
    factor = power_of_two(exponent - excess)
    after = ((excess + 127) << 7) * 0x10001
    place = tl.arange(0, 1024)
    out_row = tl.program_id(0) * 4 + place // 256
    column = tl.program_id(1) * (UNITS * 256) + place % 256
    address = out.to(tl.pointer_type(tl.int32)) + out_row.to(tl.int64) * (out_stride // 2) + column
    words = bfloat_tables(BITS, RESIDUAL_BITS)
    for i in tl.static_range(UNITS):
        times = (scale[i].to(tl.int16) << 5).to(tl.float16, bitcast=True).to(tl.float32) * factor
        octet = packed[i].to(tl.int32)
        refined = octet
        if RESIDUAL_BITS > 0:
            refined = rest[i].to(tl.int32)
        pairs = decode_bfloat(octet, refined, times.to(tl.int32, bitcast=True), after, words, RESIDUAL_BITS, ASSEMBLY)
        pairs = pairs.reshape(1024)
        tl.store(address + i * 256, pairs, mask=(out_row < rows) & (column + i * 256 < groups * 16))
    if PDL:
        wait_for_producer()
