"""Codebooks: what an index means (FORMAT.md section 6).

A rotated block of weights looks Gaussian, so one fixed codebook serves every layer: the Lloyd-Max quantizer of N(0, 1)
(Max 1960, Lloyd 1982). Two kinds of levels are stored:

* **base plane alone** (2, 3 or 4 bits): half-integers ``+-(c + 1/2)`` with ``c`` an int8. Each level is exact in bf16, and
  ``c`` feeds int8 tensor cores, dp4a or ``pshufb``. The best such grid costs 0.045 % of the MSE at 4 bits.
* **base + residual** (``b + r`` bits): the odd polynomial ``y(x)`` of degree 7 (r = 1) or 9, at ``x = (2 i + 1 - 2**B) /
  2**(B - 1)`` for index ``i`` of ``B = b + r`` bits, evaluated in IEEE half precision with fused multiply-adds (Horner in
  ``x**2``). A GPU decodes it with packed half arithmetic, no table: about 3 instructions per weight at any ``r``. The
  coefficients were fitted to minimise the MSE plus 0.3 times the loss of the base plane read alone, so the planes are
  nested: the top ``b`` bits are, to 1-5 %, the best ``b``-bit index. (benchmarks/codebooks.py derives them again.)

Levels are in *level units*: a block of unit variance has scale ``1 / UNIT[bits]``, whichever planes are read.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from .rotation import cached_constant

# Level units per standard deviation, and the int8 magnitudes c; a level is +-(c + 1/2).
UNIT = {2: 78.45, 3: 50.9, 4: 41.85}
HALF_INTEGER_LEVELS = {2: (35, 118), 3: (12, 38, 68, 109), 4: (5, 16, 27, 39, 52, 67, 86, 114)}

# (bits, residual_bits) -> coefficients of x, x^3, x^5, ...; every number is exact in half precision.
POLYNOMIALS = {
    (2, 1): (74.6875, 3.306640625, 1.103515625, 0.0126190185546875),
    (2, 2): (77.9375, 0.4052734375, 5.62109375, -1.8876953125, 0.302734375),
    (2, 3): (80.125, -3.703125, 11.2890625, -4.3203125, 0.673828125),
    (2, 4): (81.9375, -9.203125, 18.328125, -7.390625, 1.1318359375),
    (3, 1): (50.0625, 4.34765625, -0.923828125, 0.43798828125),
    (3, 2): (51.0, 1.2431640625, 3.267578125, -1.41796875, 0.288818359375),
    (3, 3): (51.625, -1.7568359375, 7.30859375, -3.22265625, 0.5654296875),
    (3, 4): (52.5625, -4.671875, 11.1015625, -4.953125, 0.8330078125),
    (4, 1): (42.46875, 5.21875, -2.1796875, 0.703125),
    (4, 2): (44.3125, -2.90625, 7.1796875, -3.16796875, 0.53515625),
    (4, 3): (44.84375, -5.3984375, 10.40625, -4.66796875, 0.76806640625),
    (4, 4): (45.34375, -7.6484375, 13.359375, -6.046875, 0.9833984375),
}


def _half(value: float) -> float:
    """Rounds to the nearest IEEE half (ties to even); the argument is exact in double precision."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


@functools.cache
def levels(bits: int, residual_bits: int = 0) -> tuple[float, ...]:
    """The ``2**(bits + residual_bits)`` levels in ascending order, in level units, each exact in half precision."""
    if residual_bits == 0:
        positive = [c + 0.5 for c in HALF_INTEGER_LEVELS[bits]]
    else:
        total = bits + residual_bits
        positive = [
            _polynomial(POLYNOMIALS[bits, residual_bits], (2 * i + 1) / 2 ** (total - 1)) for i in range(2 ** (total - 1))
        ]
    return tuple(-level for level in reversed(positive)) + tuple(positive)


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    # Each product of two halves has 22 bits, so a double holds product plus addend exactly: one rounding, as in an FMA.
    square = _half(x * x)
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = _half(value * square + coefficient)
    return _half(value * x)


@cached_constant
def _level_tensor(bits: int, residual_bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(levels(bits, residual_bits), dtype=torch.float64).to(device=device, dtype=dtype)


def level_tensor(
    bits: int, residual_bits: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Levels [2**(bits + residual_bits)] as a tensor. float32 and float16 hold them exactly, bfloat16 the base plane's."""
    return _level_tensor(bits, residual_bits, torch.device(device), dtype)


@cached_constant
def _boundary_tensor(bits: int, residual_bits: int, device: torch.device) -> Tensor:
    values = torch.tensor(levels(bits, residual_bits), dtype=torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(device=device, dtype=torch.float32)


def boundary_tensor(bits: int, residual_bits: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Midpoints between neighbouring levels, float32 [2**(bits + residual_bits) - 1]: where the index changes."""
    return _boundary_tensor(bits, residual_bits, torch.device(device))
