"""Decoding planes in registers: shared by the matmul and the dequantization.

**Order of columns.** A thread loads the 32 columns of one scale: as many 32-bit words of a plane as it has bits per column,
widened in registers to four words of eight nibbles. In a tile of 128 columns,
column ``t*32 + p*8 + h*4 + i0*2 + i1`` (thread ``t`` of 4, word ``p`` of 4, the rest inside a 32-bit word) takes place
``(p*2 + h)*16 + i1*8 + t*2 + i0`` of the contraction: the place at which that thread's registers sit in a tensor-core
fragment. ``rotate.py`` writes activations in this order. Where activations, too, come straight from memory into registers
(``slices.py``), a thread wants its own 32 columns in four loads of 16 bytes: order ``slice_column``.

**Base plane alone.** Half-integer levels in half precision: ``prmt`` looks up the two bytes of four magnitudes at a
time, one more turns four sign bits into bytes, four join the bytes into half2 pairs, and a packed multiply applies the
scale: 2.75 instructions per weight at 4 bits.

**b + r bits.** The index of 3 to 8 bits becomes a half by planting it into the mantissa of 1024; the codebook's odd
polynomial follows in packed FMAs, the arithmetic that defines the levels (codebook.py).

**Table in shared memory** (``streamk.py``, ``slices.py``). A byte is the number of a word in a table: of two codes, for the
levels of two neighbouring columns, which is an order of its own, ``paired_column``; or of an index of b + r bits. It decodes
every other word, arithmetic the rest, or all of them.

**Other widths than 4.** Eight fields of ``w`` bits become nibbles in three steps that each move the upper half of every
part up: 0.8 instructions per weight at 3 bits. No vector has three words, so a thread loads those one by one.

The assembly is PTX and NVIDIA's only; :func:`decode_gather` is the portable path, correct for every pair of planes.
"""

# Triton's tuples may be of any length:
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import triton
import triton.language as tl

from ..codebook import HALF_INTEGER_LEVELS, POLYNOMIALS, levels

TILE = 128  # columns per step of the contraction
TABLE_BYTES = 32 << 10  # of the table of :func:`lookup_words` in shared memory, each word 32 times


def physical_column(place: int) -> int:
    """The column, within its tile of 128, at ``place`` of the contraction.

    >>> sorted(map(physical_column, range(128))) == list(range(128))
    True
    """
    p, h, i1, t, i0 = place >> 5, (place >> 4) & 1, (place >> 3) & 1, (place >> 1) & 3, place & 1
    return t * 32 + p * 8 + h * 4 + i0 * 2 + i1


def paired_column(place: int) -> int:
    """The column, within its tile of 128, at ``place`` of the contraction where :func:`lookup_assembly` decodes base planes.

    >>> sorted(map(paired_column, range(128))) == list(range(128))
    True
    """
    p, h, i1, t, i0 = place >> 5, (place >> 4) & 1, (place >> 3) & 1, (place >> 1) & 3, place & 1
    return t * 32 + p * 8 + h * 4 + i1 * 2 + i0


def slice_column(place: int) -> int:
    """The column, within its tile of 128, at ``place`` of an activation that ``slices.py`` reads.

    >>> sorted(map(slice_column, range(128))) == list(range(128))
    True
    """
    p, t, h, i1, i0 = place >> 5, (place >> 3) & 3, (place >> 2) & 1, (place >> 1) & 1, place & 1
    return t * 32 + p * 8 + h * 4 + i0 * 2 + i1


def paired_slice_column(place: int) -> int:
    """The column, within its tile of 128, at ``place`` of an activation where ``slices.py`` looks base planes up.

    >>> sorted(map(paired_slice_column, range(128))) == list(range(128))
    True
    """
    p, t, column = place >> 5, (place >> 3) & 3, place & 7
    return t * 32 + p * 8 + column


def _half_bits(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]


def _pair(value: float) -> str:
    return f"0x{_half_bits(value) * 0x10001:08x}"


def _bfloat_bits(value: float) -> int:
    """Of a value that bfloat16 has."""
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def _base_tables(bits: int, to_bits: Callable[[float], int] = _half_bits) -> tuple[int, ...]:
    """High bytes, low bytes of the (at most eight) magnitudes in half precision, and the byte of a sign: five signed 32-bit
    words."""
    magnitudes = [to_bits(c + 0.5) for c in HALF_INTEGER_LEVELS[bits]]
    high, low = bytes(m >> 8 for m in magnitudes), bytes(m & 255 for m in magnitudes)
    words = (high[:4], high[4:], low[:4], low[4:], b"\x80\0\0\0")
    return tuple(int.from_bytes(word, "little", signed=True) for word in words)


# The assembly decodes two 32-bit words of eight codes in a nibble each into eight half2 registers: of each word the weights
# (0,2), (1,3), (4,6), (5,7), scaled. Operands, each for both words: $0-$7 results (early-clobber: they are written while
# operands are still to be read), $8 $9 codes, then without a residual $10 the scale twice as half2 and $12 $14 $16 $18 $20
# the tables; with one $10 $11 the residual, widened, too, $12 the scale and $14 a byte four times. Without a residual it
# does not matter what a nibble has above its code.
_BASE_WORD = """{{
    .reg .b32 t, u, v, s, u2, s2, h0, h1, l0, l1, g0, g1, a, b, c, d;
    and.b32 t, ${word}, {sign}; shr.u32 u, t, {shift}; mul.lo.u32 v, u, {ones};
    lop3.b32 s, ${word}, v, {magnitude}, 0x82;  // index of the magnitude: the bits below the sign, flipped below zero
    shr.u32 s2, s, 16; shr.u32 u2, u, 16;
    prmt.b32 h0, ${h0}, ${h1}, s; prmt.b32 l0, ${l0}, ${l1}, s;
    prmt.b32 h1, ${h0}, ${h1}, s2; prmt.b32 l1, ${l0}, ${l1}, s2;
    prmt.b32 g0, ${negative}, 0, u; prmt.b32 g1, ${negative}, 0, u2;
    xor.b32 h0, h0, g0; xor.b32 h1, h1, g1;
    prmt.b32 a, l0, h0, {first}; prmt.b32 b, l0, h0, {second};
    prmt.b32 c, l1, h1, {first}; prmt.b32 d, l1, h1, {second};
    mul.rn.f16x2 ${r0}, a, $10; mul.rn.f16x2 ${r1}, b, $10; mul.rn.f16x2 ${r2}, c, $10; mul.rn.f16x2 ${r3}, d, $10;
}}
"""


def _masks(bits: int) -> dict[str, object]:
    """Of the sign and of what is below it, in each nibble."""
    ones = (1 << (bits - 1)) - 1
    return dict(sign=f"0x{0x11111111 << (bits - 1):08x}", shift=bits - 1, ones=ones, magnitude=f"0x{0x11111111 * ones:08x}")


def _base_word(word: int, bits: int, tables: int, picks: tuple[str, str] = ("0x6240", "0x7351")) -> str:
    """``tables``: the first of their operands; ``picks``: bytes that make the first and the second of two half2."""
    registers = {f"r{i}": 4 * word + i for i in range(4)}
    names = {name: tables + 2 * i for i, name in enumerate(("h0", "h1", "l0", "l1", "negative"))}
    return _BASE_WORD.format(word=8 + word, first=picks[0], second=picks[1], **registers, **names, **_masks(bits))


def _base_assembly(bits: int) -> str:
    return "".join(_base_word(word, bits, tables=12) for word in (0, 1))


def _nested_word(bits: int, residual_bits: int, codes: str, rest: str, high: str) -> list[str]:
    """The level pairs of the columns (0, 2), (1, 3), (4, 6), (5, 7) of a word in the registers y0 to y3; ``high`` holds the
    high byte of the half 1024 four times. A residual of less than 4 bits comes twice as large as it is.

    Then the bytes of e, for even columns, and o, for odd ones, are indices twice as large, and one FMA makes them x, since
    1024 + 2**total - 1 is a half. Indices of 4 + 4 bits need an addition first: 1024 + 2**(total - 1) - 0.5 is none.
    """
    total = bits + residual_bits
    if residual_bits < 4:
        factor, offset, shifted = 2.0 ** (1 - total), -(1023.0 + 2**total) * 2.0 ** (1 - total), ""
    else:
        factor, offset = 2.0 ** (2 - total), -(2.0 ** (1 - total))
        shifted = f"mov.b32 g, {_pair(-(1023.0 + 2 ** (total - 1)))}; add.rn.f16x2 x, x, g; "
    coefficients = [_pair(c) for c in POLYNOMIALS[bits, residual_bits]]
    lines = [
        ".reg .b32 e, f, g, o, q, x, y0, y1, y2, y3, factor, offset;",
        f"mov.b32 factor, {_pair(factor)}; mov.b32 offset, {_pair(offset)};",
        *_index_bytes(codes, rest, residual_bits),
    ]
    for pair, (source, pick) in enumerate((("e", "0x4140"), ("o", "0x4140"), ("e", "0x4342"), ("o", "0x4342"))):
        y = f"y{pair}"
        lines.append(f"prmt.b32 x, {source}, {high}, {pick}; {shifted}fma.rn.f16x2 x, x, factor, offset;")
        lines.append("mul.rn.f16x2 q, x, x;")
        lines.append(f"mov.b32 {y}, {coefficients[-2]}; mov.b32 g, {coefficients[-1]}; fma.rn.f16x2 {y}, q, g, {y};")
        lines += [f"mov.b32 g, {c}; fma.rn.f16x2 {y}, {y}, q, g;" for c in coefficients[-3::-1]]
        lines.append(f"mul.rn.f16x2 {y}, {y}, x;")
    return lines


def _nested_half(word: int, bits: int, residual_bits: int, high: str) -> str:
    lines = ["{", *_nested_word(bits, residual_bits, f"${8 + word}", f"${10 + word}", high)]
    lines += [f"mul.rn.f16x2 ${4 * word + pair}, y{pair}, $12;" for pair in range(4)] + ["}"]
    return "\n".join(lines)


def _nested_assembly(bits: int, residual_bits: int) -> str:
    return "\n".join(_nested_half(word, bits, residual_bits, "$14") for word in (0, 1))


def _index_bytes(codes: str, rest: str, residual_bits: int) -> list[str]:
    """Indices of the even columns of a word in the bytes of e, of the odd ones in those of o, twice as large unless the
    residual has 4 bits."""
    shift = residual_bits + (residual_bits < 4)
    keep = f"0x{(0xF << shift) * 0x01010101:08x}"
    odd = f"mov.b32 o, {codes}" if shift == 4 else f"shr.u32 o, {codes}, {4 - shift}"
    return [
        f"shl.b32 e, {codes}, {shift}; lop3.b32 e, e, {rest}, {keep}, 0xE4;",
        f"{odd}; shr.u32 f, {rest}, 4; lop3.b32 o, o, f, {keep}, 0xE4;",
    ]


def _looked_up(residual_bits: int, word: int) -> str:
    lines = ["{ .reg .b32 e, f, o, a, b, c, d;"]
    if residual_bits:
        lines += _index_bytes(f"${8 + word}", f"${10 + word}", residual_bits)
        for pair, (source, byte) in enumerate((("e", 0), ("o", 0), ("e", 2), ("o", 2))):
            for at, level in ((byte, "c"), (byte + 1, "d")):
                lines.append(f"prmt.b32 a, {source}, 0, 0x444{at}; mad.lo.u32 b, a, $16, $14; ld.shared.b32 {level}, [b];")
            lines.append(f"prmt.b32 c, c, d, 0x5410; mul.rn.f16x2 ${4 * word + pair}, c, $12;")
    else:
        for pair in range(4):
            lines.append(f"prmt.b32 a, ${8 + word}, 0, 0x444{pair}; mad.lo.u32 b, a, $14, $12; ld.shared.b32 c, [b];")
            lines.append(f"mul.rn.f16x2 ${4 * word + pair}, c, $10;")
    return "\n".join([*lines, "}"])


@functools.cache
def lookup_assembly(bits: int, residual_bits: int, words: int = 1) -> str:
    """PTX of a decoder for two words of each plane, widened, that looks up the levels of the first ``words`` of them in
    shared memory (:func:`lookup_words`) and computes the other's: often neither alone is as fast as half of each.

    The operands are those of :func:`assembly`, but before the tables come the address of this lane's column of the table in
    shared memory, and the bytes from one value of an index byte to the next. Without a residual a register has the weights
    (0, 1), (2, 3), (4, 5), (6, 7) of a word, with one (0, 2), (1, 3), (4, 6), (5, 7).
    """
    parts = [_looked_up(residual_bits, word) for word in range(words)]
    for word in range(words, 2):
        if residual_bits:
            parts.append(_nested_half(word, bits, residual_bits, "$18"))
        else:
            parts.append(_base_word(word, bits, tables=16, picks=("0x5140", "0x7362")))
    return "\n".join(parts)


@functools.cache
def lookup_words(bits: int, residual_bits: int) -> tuple[int, ...]:
    """The 256 words of the table in signed integers: two nibbles' levels in half precision, the lower nibble's in the lower
    half, or, with a residual, the level of an index, twice."""
    if residual_bits:
        values = [_half_bits(level) * 0x10001 for level in levels(bits, residual_bits)]
        values += [0] * (256 - len(values))
    else:
        halves = [_half_bits(level) for level in levels(bits)] * (16 >> bits)
        values = [halves[byte & 15] | halves[byte >> 4] << 16 for byte in range(256)]
    return tuple(value - (value >> 31 << 32) for value in values)


def lookup_stride(residual_bits: int) -> int:
    """Index bytes are twice as large as an index where a residual of less than 4 bits is."""
    return 64 if 0 < residual_bits < 4 else 128


LOOKUP_STRIDES = tl.constexpr(tuple(lookup_stride(residual_bits) for residual_bits in range(5)))
# Static shared memory: what the compiler allocates it gives no address of, and lookups want one.
LOOKUP_TABLE = tl.constexpr(f"{{ .shared .align 128 .b8 levels[{TABLE_BYTES}]; mov.u32 $0, levels; }}")
# The word $1 to row $2 of the table at $4, 32 times. Eight neighbours, by their number $3, write different 16 bytes of their
# rows at a time: otherwise they would all want the same banks.
FILL_TABLE = tl.constexpr(
    "{ .reg .b32 a, b; mad.lo.u32 a, $2, 128, $4; mov.b32 $0, 0;"
    + "".join(
        f" add.u32 b, $3, {i}; and.b32 b, b, 7; mad.lo.u32 b, b, 16, a; st.shared.v4.b32 [b], {{$1, $1, $1, $1}};"
        for i in range(8)
    )
    + " }"
)


@functools.cache
def assembly(bits: int, residual_bits: int) -> str:
    """PTX of the decoder of a pair of planes, for two words of each, widened."""
    return _nested_assembly(bits, residual_bits) if residual_bits else _base_assembly(bits)


# Widening eight columns to nibbles with the registers t, v and w; ``up``: so many places above the bottom of a nibble.


def _widened_pairs(out: str, up: int = 0) -> str:
    """Of two bits, four in each half of v."""
    last = f"shl.b32 w, v, {2 + up}; shl.b32 v, v, {up};" if up else "shl.b32 w, v, 2;"
    last += f" or.b32 v, v, w; and.b32 {out}, v, 0x{0x33333333 << up:08x};"
    return f"shl.b32 w, v, 4; or.b32 v, v, w; and.b32 v, v, 0x0f0f0f0f; {last}"


def _widened_threes(out: str, mask: str) -> str:
    """Of three bits, from the bottom of v on, or from the next bit on; without a mask anything may stand beside them."""
    steps = []
    for shift, lower in ((4, "0x0000ffff"), (2, "0x00ff00ff"), (1, "0x0f0f0f0f")):
        steps.append(f"shl.b32 w, v, {shift}; lop3.b32 {out if shift == 1 else 'v'}, v, w, {lower}, 0xE4;")
    return " ".join([*steps, f"and.b32 {out}, {out}, {mask};" if mask else ""])


# The bits of two columns select the byte that has them, twice as large, four bits apart.
_SINGLES = "mov.b32 t, 0x22200200;"


# For the dequantization: the word of codes $4 -> $0-$3, its eight weights in bfloat16, in the order of the columns. $5 is
# the factor in float32, $6 a further power of two, twice in bfloat16. Without a residual $7-$11 are the tables, in bfloat16:
# 8 significant bits times the 6 of a scale, rounded once. With one $7 has the residual of the eight columns and $8 a byte
# four times.
_BFLOAT_BASE = """{{
    .reg .b32 t, u, v, s, u2, s2, h0, h1, l0, l1, g0, g1, f, zero;
    and.b32 t, {codes}, {sign}; shr.u32 u, t, {shift}; mul.lo.u32 v, u, {ones};
    lop3.b32 s, {codes}, v, {magnitude}, 0x82;
    shr.u32 s2, s, 16; shr.u32 u2, u, 16;
    prmt.b32 h0, $7, $8, s; prmt.b32 l0, $9, $10, s;
    prmt.b32 h1, $7, $8, s2; prmt.b32 l1, $9, $10, s2;
    prmt.b32 g0, $11, 0, u; prmt.b32 g1, $11, 0, u2;
    xor.b32 h0, h0, g0; xor.b32 h1, h1, g1;
    mov.b32 zero, 0x80008000; prmt.b32 f, $5, $5, 0x3232;  // zero: -0
    prmt.b32 $0, l0, h0, 0x5140; prmt.b32 $1, l0, h0, 0x7362;
    prmt.b32 $2, l1, h1, 0x5140; prmt.b32 $3, l1, h1, 0x7362;
    fma.rn.bf16x2 $0, $0, f, zero; fma.rn.bf16x2 $1, $1, f, zero;
    fma.rn.bf16x2 $2, $2, f, zero; fma.rn.bf16x2 $3, $3, f, zero;
    fma.rn.bf16x2 $0, $0, $6, zero; fma.rn.bf16x2 $1, $1, $6, zero;
    fma.rn.bf16x2 $2, $2, $6, zero; fma.rn.bf16x2 $3, $3, $6, zero;
}}"""


def _widened_codes(bits: int, mask: str) -> str:
    """Of eight columns, from $4 to n."""
    return {
        2: f"prmt.b32 v, $4, 0, 0x4140; {_widened_pairs('n')}",
        3: f"mov.b32 v, $4; {_widened_threes('n', mask)}",
        4: "mov.b32 n, $4;",
    }[bits]


def _widened_residual(bits: int) -> str:
    """Of eight columns, from $7 to r."""
    return {
        1: f"mov.b32 v, $7; {_widened_pairs('v')} {_SINGLES} prmt.b32 r, t, 0, v;",
        2: f"prmt.b32 v, $7, 0, 0x4140; {_widened_pairs('r', up=1)}",
        3: f"shl.b32 v, $7, 1; {_widened_threes('r', '0xeeeeeeee')}",
        4: "mov.b32 r, $7;",
    }[bits]


def _bfloat_base(bits: int) -> str:
    if bits == 4:
        return _BFLOAT_BASE.format(codes="$4", **_masks(bits))
    return f"{{ .reg .b32 n, v, w; {_widened_codes(bits, '')}\n{_BFLOAT_BASE.format(codes='n', **_masks(bits))} }}"


def _bfloat_nested(bits: int, residual_bits: int) -> str:
    lines = ["{ .reg .b32 n, r, t, v, w, zero; .reg .b16 low, high; .reg .f32 a, b, c, d;"]
    lines += [_widened_codes(bits, "0x77777777"), _widened_residual(residual_bits)]
    lines += [*_nested_word(bits, residual_bits, "n", "r", "$8"), "mov.b32 zero, 0x80008000;"]
    for i in (0, 1):
        for pair, (first, second) in enumerate((("a", "c"), ("b", "d"))):
            lines.append(f"mov.b32 {{low, high}}, y{2 * i + pair}; cvt.f32.f16 {first}, low; cvt.f32.f16 {second}, high;")
            lines.append(f"mul.rn.f32 {first}, {first}, $5; mul.rn.f32 {second}, {second}, $5;")
        for out, (low, high) in enumerate((("a", "b"), ("c", "d")), 2 * i):
            lines.append(f"cvt.rn.bf16x2.f32 ${out}, {high}, {low}; fma.rn.bf16x2 ${out}, ${out}, $6, zero;")
    return "\n".join([*lines, "}"])


@functools.cache
def bfloat_assembly(bits: int, residual_bits: int) -> str:
    """PTX for ``dequantize_words_kernel``, which hands over the bits of eight columns as they are stored."""
    return _bfloat_nested(bits, residual_bits) if residual_bits else _bfloat_base(bits)


# Widening the columns of a word, or, of 3 bits, of three words.
_HALVES = ("0x4140", "0x4342")  # bring the lower or the upper two bytes each into a half


def widen_2(up: int) -> str:
    words = (f"prmt.b32 v, $2, 0, {half}; {_widened_pairs(f'${i}', up)}" for i, half in enumerate(_HALVES))
    return " ".join(["{ .reg .b32 v, w;", *words, "}"])


def _widen_1() -> str:
    lines = [f"{{ .reg .b32 t, v, w; {_SINGLES}"]
    for i, half in enumerate(_HALVES):
        lines.append(f"prmt.b32 v, $4, 0, {half}; {_widened_pairs('v')}")
        lines.append(f"prmt.b32 ${2 * i}, t, 0, v; shr.u32 v, v, 16; prmt.b32 ${2 * i + 1}, t, 0, v;")
    return " ".join([*lines, "}"])


def widen_3(a: str, b: str, c: str, up: int, mask: str) -> str:
    """The words ``a``, ``b`` and ``c`` to $0 to $3, with the registers v and w."""
    first = f"shl.b32 v, {a}, 1;" if up else f"mov.b32 v, {a};"
    second, third = f"shf.r.wrap.b32 v, {a}, {b}, {24 - up};", f"shf.r.wrap.b32 v, {b}, {c}, {16 - up};"
    windows = (first, second, third, f"shr.u32 v, {c}, {8 - up};")
    return " ".join(f"{window} {_widened_threes(f'${i}', mask)}" for i, window in enumerate(windows))


# Place and mask of codes alone, of codes with a residual, and of residuals.
THREES = (0, ""), (0, "0x77777777"), (1, "0xeeeeeeee")
_CODES_3, _CLEAN_CODES_3, _RESIDUAL_3 = (
    tl.constexpr(f"{{ .reg .b32 v, w; {widen_3('$4', '$5', '$6', *three)} }}") for three in THREES
)
_CODES_2, _RESIDUAL_2, _RESIDUAL_1 = tl.constexpr(widen_2(0)), tl.constexpr(widen_2(1)), tl.constexpr(_widen_1())
# A scale byte is a half-precision number shifted right by 5, times 2**-12: $2 selects it, twice.
_SCALE = tl.constexpr(
    "{ .reg .b32 t, c; mov.b32 c, 0x6c006c00; prmt.b32 t, $1, 0, $2; shl.b32 t, t, 5; mul.rn.f16x2 $0, t, c; }"
)
_RESULTS = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r"
_BASE_CONSTRAINTS = tl.constexpr(_RESULTS + ",r" * 14)
_NESTED_CONSTRAINTS = tl.constexpr(_RESULTS + ",r" * 8)
_LOOKUP_BASE_CONSTRAINTS = tl.constexpr(_RESULTS + ",r" * 18)
_LOOKUP_NESTED_CONSTRAINTS = tl.constexpr(_RESULTS + ",r" * 12)
_BFLOAT_BASE_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 8)
_BFLOAT_NESTED_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 5)
_HIGH = tl.constexpr(0x64646464)  # the high byte of the half 1024, into whose mantissa an index is planted


def _by_bits(to_bits: Callable[[float], int]) -> list[tl.constexpr]:
    tables = (_base_tables(max(bits, 2), to_bits) for bits in range(5))
    return [tl.constexpr(words) for words in zip(*tables, strict=True)]


_H0, _H1, _L0, _L1, _SIGN = _by_bits(_half_bits)
_BH0, _BH1, _BL0, _BL1, _ = _by_bits(_bfloat_bits)


@triton.jit
def register(WORD: tl.constexpr):
    """A constant that the compiler does not recognise: it would put it into a uniform register and copy it back per use."""
    return tl.inline_asm_elementwise(
        "{ .reg .u32 zero; mov.u32 zero, %laneid; shr.u32 zero, zero, 5; add.u32 $0, $1, zero; }", "=r,r",
        [tl.cast(WORD, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def tables(BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr):
    """Operands of the decoder, to be made once per program."""
    if RESIDUAL_BITS > 0:
        words = (register(_HIGH),)
    elif BITS == 4:
        words = (register(_H0[4]), register(_H1[4]), register(_L0[4]), register(_L1[4]), register(_SIGN[4]))
    else:  # no index reaches the second half of a table
        high, low = register(_H0[BITS]), register(_L0[BITS])
        words = (high, high, low, low, register(_SIGN[BITS]))
    return words


@triton.jit
def bfloat_tables(BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr):
    """Operands of :func:`bfloat_assembly`."""
    if RESIDUAL_BITS > 0:
        words = (register(_HIGH),)
    elif BITS == 4:
        words = (register(_BH0[4]), register(_BH1[4]), register(_BL0[4]), register(_BL1[4]), register(_SIGN[4]))
    else:
        high, low = register(_BH0[BITS]), register(_BL0[BITS])
        words = (high, high, low, low, register(_SIGN[BITS]))
    return words


@triton.jit
def scale_pairs(scale, pick):
    """Byte ``pick`` of int32 words of scale bytes -> int32 holding the half-precision number ``value * 2**-7`` twice."""
    return tl.inline_asm_elementwise(
        _SCALE, "=r,r,r", [scale, pick * 0x101 + 0x4040], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def stride_in_words(stride, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """From row to row of a plane, in words. Unless the compiler knows it to be a multiple of 16 bytes (``ALIGNED``), it is
    so written that the compiler sees that a thread's words lie together."""
    return stride // 4 if ALIGNED else stride // (4 * BITS) * BITS


@triton.jit
def load_words(address, mask, other, BITS: tl.constexpr, ONCE: tl.constexpr = True):
    """The words of 32 columns of a plane for each thread. Elements of ``address`` are all of them, of 3 bits the first ones,
    and then it has one dimension: of two, neither contiguous, Triton would choose which one the threads of a warp lie along.
    ``ONCE``: nothing else is to leave the caches for them."""
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    if BITS == 3:
        words = (
            tl.load(address, mask=mask, other=other, eviction_policy=POLICY),
            tl.load(address + 1, mask=mask, other=other, eviction_policy=POLICY),
            tl.load(address + 2, mask=mask, other=other, eviction_policy=POLICY),
        )
    else:
        words = tl.load(address, mask=mask, other=other, eviction_policy=POLICY)
    return words


@triton.jit
def two_words(packed, ROWS: tl.constexpr, THREADS: tl.constexpr, ASSEMBLY: tl.constexpr):
    w0, w1 = tl.inline_asm_elementwise(ASSEMBLY, "=&r,=&r,r", [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    return tl.join(w0, w1).reshape(ROWS, THREADS * 4)


@triton.jit
def three_words(packed, ROWS: tl.constexpr, THREADS: tl.constexpr, ASSEMBLY: tl.constexpr):
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        ASSEMBLY, "=&r,=&r,=&r,=&r,r,r,r", [packed[0], packed[1], packed[2]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, THREADS * 4)


@triton.jit
def widen_codes(packed, ROWS: tl.constexpr, THREADS: tl.constexpr, BITS: tl.constexpr, CLEAN: tl.constexpr):
    """int32 [ROWS, THREADS * BITS], of 3 bits three times [ROWS * THREADS] -> a nibble per column, int32 [ROWS, THREADS *
    4]. Unless CLEAN, anything may stand above a code."""
    if BITS == 3:
        words = three_words(packed, ROWS, THREADS, _CLEAN_CODES_3 if CLEAN else _CODES_3)
    elif BITS == 2:
        words = two_words(packed, ROWS, THREADS, _CODES_2)
    else:
        words = packed
    return words


@triton.jit
def widen_residual(packed, ROWS: tl.constexpr, THREADS: tl.constexpr, RESIDUAL_BITS: tl.constexpr):
    """The same for a residual: a nibble has twice its value, unless that is of 4 bits."""
    if RESIDUAL_BITS == 3:
        words = three_words(packed, ROWS, THREADS, _RESIDUAL_3)
    elif RESIDUAL_BITS == 2:
        words = two_words(packed, ROWS, THREADS, _RESIDUAL_2)
    elif RESIDUAL_BITS == 1:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _RESIDUAL_1, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, THREADS * 4)
    else:
        words = packed
    return words


@triton.jit
def decode_words(
    codes, residual, pairs, words, ROWS: tl.constexpr, THREADS: tl.constexpr,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr, LOOKUP: tl.constexpr = False,
):  # fmt: skip
    """Both planes as they are widened, :func:`scale_pairs` [ROWS, THREADS], :func:`tables` -> half
    [ROWS, THREADS * 4, 2, 2, 2].

    Dimensions: row, (thread, high bit of ``p``, ``i0``), low bit of ``p``, ``h``, ``i1``. LOOKUP: as
    :func:`decode_looked_up`; without a residual ``i0`` and ``i1`` change places.
    """
    pairs = tl.broadcast_to(tl.expand_dims(pairs, 2), (ROWS, THREADS, 4)).reshape(ROWS, THREADS * 4)
    codes = widen_codes(codes, ROWS, THREADS, BITS, RESIDUAL_BITS > 0)
    refined = codes
    if RESIDUAL_BITS > 0:
        refined = widen_residual(residual, ROWS, THREADS, RESIDUAL_BITS)
    if LOOKUP:
        weight = decode_looked_up(codes, refined, pairs, words, RESIDUAL_BITS, ASSEMBLY)
    else:
        weight = decode_wide(codes, refined, pairs, words, RESIDUAL_BITS, ASSEMBLY)
    return weight


@triton.jit
def decode_wide(codes, refined, pairs, words, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """:func:`decode_words` for any share of a thread's words, with both planes widened and a scale per word."""
    if RESIDUAL_BITS == 0:
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASSEMBLY, _BASE_CONSTRAINTS, [codes, pairs, words[0], words[1], words[2], words[3], words[4]],
            dtype=(tl.float16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASSEMBLY, _NESTED_CONSTRAINTS, [codes, refined, pairs, words[0]], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )  # fmt: skip
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.join(even, odd)


@triton.jit
def decode_looked_up(codes, refined, pairs, words, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """:func:`decode_wide` with :func:`lookup_assembly`: before :func:`tables` come an address and a distance."""
    if RESIDUAL_BITS == 0:
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASSEMBLY, _LOOKUP_BASE_CONSTRAINTS,
            [codes, pairs, words[0], words[1], words[2], words[3], words[4], words[5], words[6]],
            dtype=(tl.float16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            ASSEMBLY, _LOOKUP_NESTED_CONSTRAINTS, [codes, refined, pairs, words[0], words[1], words[2]],
            dtype=(tl.float16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.join(even, odd)


@triton.jit
def decode_bfloat(codes, rest, times, after, words, RESIDUAL_BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The bits of eight codes, of their residual, the factors of :func:`bfloat_assembly`, :func:`bfloat_tables` -> four
    words each of two bfloat16 numbers, in the order of the columns."""
    if RESIDUAL_BITS == 0:
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY, _BFLOAT_BASE_CONSTRAINTS, [codes, times, after, words[0], words[1], words[2], words[3], words[4]],
            dtype=(tl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY, _BFLOAT_NESTED_CONSTRAINTS, [codes, times, after, rest, words[0]],
            dtype=(tl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def plane_field(plane, row, column, valid, BITS: tl.constexpr):
    """The ``BITS`` bits of ``column`` in the rows at ``plane`` + ``row`` (a byte offset): any width, any column."""
    bit = column * BITS
    byte = row + (bit >> 3)
    word = tl.load(plane + byte, mask=valid, other=0).to(tl.int32)
    if 8 % BITS != 0:  # the field may reach into the next byte; when it does, that byte exists
        crosses = valid & ((bit & 7) + BITS > 8)
        word |= tl.load(plane + byte + 1, mask=crosses, other=0).to(tl.int32) << 8
    return (word >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def decode_gather(
    codes, residual, scales, levels, code_row, residual_row, scale_row, column, valid,
    BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr,
):  # fmt: skip
    """Level times scale (value * 2**-7) in float32 for any planes: row offsets and columns broadcast against each other.

    ``levels`` is the codebook in float32; entries that are not ``valid`` are zero.
    """
    index = plane_field(codes, code_row, column, valid, BITS)
    if RESIDUAL_BITS > 0:
        index = (index << RESIDUAL_BITS) | plane_field(residual, residual_row, column, valid, RESIDUAL_BITS)
    byte = tl.load(scales + scale_row + (column >> 5), mask=valid, other=0)
    scale = (byte.to(tl.int16) << 5).to(tl.float16, bitcast=True).to(tl.float32) * 4096.0
    return tl.load(levels + index) * scale


@triton.jit
def power_of_two(exponent):
    """2**exponent in float32 for int32 exponents from -126 to 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
