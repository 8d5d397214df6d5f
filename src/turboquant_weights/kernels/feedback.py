"""The sequential part of calibrated rounding in one launch: 32 columns, several candidate scales, all rows.

In PyTorch every column is nine small kernels, and their launches take longer than their work on any matrix of a small model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # of a program


@triton.jit(do_not_specialize=["rows"])
def feed_back_kernel(
    block, scale, factor, boundaries, levels, codes, errors, losses, rows, candidates,
    LOG_LEVELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, candidate). ``block`` [rows, 32], ``scale`` and ``losses`` [rows, candidates], ``factor``
    [32, 32],
    ``codes`` and ``errors`` [rows, candidates, 32]; all but the uint8 codes float32 and contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    candidate = tl.program_id(1)
    live = row < rows
    column = tl.arange(0, 32)
    row = row.to(tl.int64)
    left = tl.load(block + row[:, None] * 32 + column[None, :], mask=live[:, None], other=0.0)
    step = tl.load(scale + row * candidates + candidate, mask=live, other=0.0)
    inverse = tl.where(step > 0, 1 / tl.where(step > 0, step, 1.0), 0.0)
    found = tl.zeros((ROWS, 32), tl.int32)
    error = tl.zeros((ROWS, 32), tl.float32)
    loss = tl.zeros((ROWS,), tl.float32)
    for j in tl.range(32):
        here = (column == j)[None, :]
        value = tl.sum(tl.where(here, left, 0.0), 1)
        target = value * inverse
        index = tl.zeros((ROWS,), tl.int32)
        # Binary search, as bucketize: the number of boundaries below the target.
        for bit in tl.static_range(LOG_LEVELS):
            middle = index + (1 << (LOG_LEVELS - 1 - bit))
            index = tl.where(target > tl.load(boundaries + middle - 1), middle, index)
        wrong = (value - tl.load(levels + index) * step) / tl.load(factor + j * 33)
        loss += wrong * wrong
        ahead = tl.load(factor + j * 32 + column, mask=column > j, other=0.0)
        left -= wrong[:, None] * ahead[None, :]
        found = tl.where(here, index[:, None], found)
        error = tl.where(here, wrong[:, None], error)
    out = (row[:, None] * candidates + candidate) * 32 + column[None, :]
    tl.store(codes + out, found.to(tl.uint8), mask=live[:, None])
    tl.store(errors + out, error, mask=live[:, None])
    tl.store(losses + row * candidates + candidate, loss, mask=live)


def feed_back(
    block: Tensor, scale: Tensor, factor: Tensor, boundaries: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``feedback.feed_back``: codes uint8 and errors float32 [rows, candidates, 32], losses [rows, candidates]."""
    if block.is_cuda and block.get_device() != torch.cuda.current_device():  # where Triton launches
        with torch.cuda.device(block.device):
            return feed_back(block, scale, factor, boundaries, levels)
    rows, candidates = scale.shape
    codes = torch.empty(rows, candidates, 32, dtype=torch.uint8, device=block.device)
    errors = torch.empty(rows, candidates, 32, dtype=torch.float32, device=block.device)
    losses = torch.empty_like(scale)
    feed_back_kernel[(triton.cdiv(rows, _ROWS), candidates)](
        block.contiguous(), scale.contiguous(), factor.contiguous(), boundaries, levels, codes, errors, losses, rows,
        candidates, LOG_LEVELS=len(levels).bit_length() - 1, ROWS=_ROWS,
    )  # fmt: skip
    return codes, errors, losses
