"""Launching the sequential part of calibrated rounding. Called by ``feedback.py`` of the package for tensors on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..rotation import SCALE_BLOCK
from .library import Engine, Feedback, library


def feed_back(
    block: Tensor, scale: Tensor, factor: Tensor, boundaries: Tensor, levels: Tensor, engine: Engine
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``feedback.feed_back``: codes uint8 and errors float32 [rows, candidates, 32], losses [rows, candidates]."""
    (rows, candidates), count = scale.shape, len(levels)
    assert block.shape == (rows, SCALE_BLOCK), f"block {tuple(block.shape)} for {rows} rows"
    assert factor.shape == (SCALE_BLOCK, SCALE_BLOCK), f"factor {tuple(factor.shape)}"
    assert len(boundaries) == count - 1, f"{len(boundaries)} boundaries of {count} levels"
    assert count & (count - 1) == 0, f"{count} levels: a power of two is needed"
    inputs = tuple(tensor.contiguous() for tensor in (block, scale, factor, boundaries, levels))
    assert all(tensor.dtype == torch.float32 and tensor.is_cpu for tensor in inputs), "float32 on the CPU is needed"
    codes = torch.empty(rows, candidates, SCALE_BLOCK, dtype=torch.uint8)
    errors, losses = torch.empty(codes.shape), torch.empty(scale.shape)
    c = library()
    assert c is not None
    addresses = (tensor.data_ptr() for tensor in (*inputs, codes, errors, losses))
    c.tq_feed_back(engine.number, ctypes.byref(Feedback(*addresses, rows, candidates, count)), torch.get_num_threads())
    return codes, errors, losses
