"""FORMAT.md once more, from its text: slow, exact, plain Python. Shares no code with the package it judges.

Exact numbers are ``Fraction``; matrices are float64 tensors [rows, columns].
"""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from pathlib import Path

import torch

DOCUMENT = (Path(__file__).parent.parent / "FORMAT.md").read_text(encoding="utf-8")
COMBINATIONS = [(bits, residual) for bits in (2, 3, 4) for residual in range(5)]


def label(bits: int, residual_bits: int) -> str:
    return f"{bits}+{residual_bits}" if residual_bits else str(bits)


@functools.cache
def level_table() -> dict[str, tuple[list[Fraction], str]]:
    """Label -> (numbers of the table in section 6, SHA-256)."""
    rows = re.findall(r"^\| (\d(?:\+\d)?) \| (?:±\(d \+ ½\), d = )?([-\d., ]+) \| `([0-9a-f]{64})` \|$", DOCUMENT, re.M)
    assert len(rows) == 15
    return {name: ([Fraction(number) for number in numbers.split(", ")], digest) for name, numbers, digest in rows}


def half(x: Fraction) -> Fraction:
    """Rounds to IEEE binary16, ties to even."""
    if not x:
        return x
    exponent = math.frexp(float(x))[1] - 1
    quantum = Fraction(2) ** max(exponent - 10, -24)
    return round(x / quantum) * quantum


@functools.cache
def levels(bits: int, residual_bits: int) -> list[Fraction]:
    numbers = level_table()[label(bits, residual_bits)][0]
    if not residual_bits:
        upper = [number + Fraction(1, 2) for number in numbers]
        return [-level for level in reversed(upper)] + upper
    total = bits + residual_bits
    out = []
    for index in range(2**total):
        x = Fraction(2 * index + 1 - 2**total, 2 ** (total - 1))
        square = half(x * x)
        value = numbers[-1]
        for number in numbers[-2::-1]:
            value = half(value * square + number)
        out.append(half(value * x))
    return out


def sign(seed: int, column: int) -> int:
    mask = 2**64 - 1
    z = (seed + (column // 64 + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return -1 if ((z ^ (z >> 31)) >> (column % 64)) & 1 else 1


def columns_and_block(k: int, group_size: int) -> tuple[int, int]:
    columns = next(c for c in range(k, k + 32) if c % 32 == 0)
    return columns, next(b for b in (128, 64, 32) if b <= group_size and columns % b == 0)


@functools.cache
def rotation(k: int, group_size: int, seed: int) -> torch.Tensor:
    """The matrix R [c, c] with ``Q = W_padded R``; its inverse is its transpose."""
    columns, block = columns_and_block(k, group_size)
    out = torch.zeros(columns, columns, dtype=torch.float64)
    hadamard = torch.tensor([[(-1.0) ** ((i & j).bit_count()) for j in range(block)] for i in range(block)]).double()
    for start in range(0, columns, block):
        flips = torch.tensor([float(sign(seed, start + i)) for i in range(block)]).double()
        out[start : start + block, start : start + block] = flips[:, None] * hadamard / math.sqrt(block)
    return out


def fields(row: bytes, width: int) -> list[int]:
    stream = int.from_bytes(row, "little")
    return [(stream >> (j * width)) & (2**width - 1) for j in range(len(row) * 8 // width)]


def scale_value(byte: int) -> int:
    e, m = byte >> 5, byte & 31
    return m if e == 0 else (32 + m) * 2 ** (e - 1)


def rows_of(tensor: torch.Tensor) -> list[bytes]:
    return [bytes(value % 256 for value in row) for row in tensor.reshape(tensor.shape[0], -1).tolist()]


def decode(packed, bits: int, residual_bits: int) -> list[list[Fraction]]:
    """Q of section 9, exact."""
    table = levels(bits, residual_bits)
    out = []
    for i, row in enumerate(rows_of(packed.codes)):
        index = fields(row, bits)
        if residual_bits:
            low = fields(rows_of(packed.residual)[i], residual_bits)
            index = [high * 2**residual_bits + rest for high, rest in zip(index, low, strict=True)]
        scales = [scale_value(byte) * Fraction(2) ** int(packed.exponents[i]) for byte in packed.scales[i].tolist()]
        out.append([table[field] * scales[j // 32] for j, field in enumerate(index)])
    return out


def dequantize(packed, k: int, bits: int, residual_bits: int, group_size: int, seed: int) -> torch.Tensor:
    """W [n, k] in float64."""
    rotated = torch.tensor([[float(v) for v in row] for row in decode(packed, bits, residual_bits)], dtype=torch.float64)
    return (rotated @ rotation(k, group_size, seed).T)[:, :k]
