"""Packed planes: a row is one little-endian bit stream, FORMAT.md section 5.

Column ``j`` of a ``w``-bit plane occupies bits ``j*w .. j*w + w - 1`` of its row, bit 0 being the least significant bit
of byte 0. One rule for every width; rows never share a byte, and 32 columns always fill ``4*w`` whole bytes, so planes
can be concatenated and cut along both dimensions (along columns at multiples of 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Eight columns fill exactly `w` bytes whatever w is: the unit in which both functions work.
_UNIT = 8


def packed_columns(columns: int, width: int) -> int:
    """Bytes per row of a plane with ``columns`` columns (a multiple of 8) of ``width`` bits."""
    return columns * width // 8


def pack(indices: Tensor, width: int) -> Tensor:
    """Packs ``indices`` [..., c] (any integer dtype, values below ``2**width``) into uint8 [..., c * width / 8].

    ``c`` must be a multiple of 8; ``width`` is 1 to 8.
    """
    _check(indices.shape[-1], width)
    if width == 8:
        return indices.to(torch.uint8)
    if 8 % width == 0:  # a byte holds whole fields: no need of wider words
        per_byte = 8 // width
        fields = indices.to(torch.uint8).unflatten(-1, (-1, per_byte))
        out = fields[..., 0]
        for i in range(1, per_byte):
            out = out | (fields[..., i] << (i * width))
        return out.contiguous()
    fields = indices.to(torch.int64).unflatten(-1, (-1, _UNIT))
    word = fields[..., 0]
    for i in range(1, _UNIT):
        word = word | (fields[..., i] << (i * width))
    planes = [(word >> (8 * b)) & 0xFF for b in range(width)]
    return torch.stack(planes, -1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, width: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 [..., bytes] to uint8 [..., bytes * 8 / width]."""
    _check(packed.shape[-1] * 8 // width, width)
    if width == 8:
        return packed
    mask = (1 << width) - 1
    if 8 % width == 0:
        fields = [(packed >> (i * width)) & mask for i in range(8 // width)]
        return torch.stack(fields, -1).flatten(-2)
    lanes = packed.unflatten(-1, (-1, width)).to(torch.int64)
    word = lanes[..., 0]
    for b in range(1, width):
        word = word | (lanes[..., b] << (8 * b))
    fields = [(word >> (i * width)) & mask for i in range(_UNIT)]
    return torch.stack(fields, -1).to(torch.uint8).flatten(-2)


def _check(columns: int, width: int) -> None:
    assert 1 <= width <= 8, f"field width {width}"
    assert columns % _UNIT == 0, f"{columns} columns are not a multiple of {_UNIT}"
