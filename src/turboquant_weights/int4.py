"""Four-bit integers with one scale per group of columns, as ``compressed-tensors`` stores them ("pack-quantized").

A weight is ``q * scale`` with ``q`` in -8 to 7 and a bfloat16 scale per row and group. Eight values fill one int32, the
first in its lowest bits, as ``q + 8``.

The scale is searched over both signs: a negative one puts the lone -8 on the group's other side. Of the scales around the
one that just reaches the largest weight, the one with the least squared error wins, and is then fitted to its own rounding.
For Gaussian groups of 128 that leaves an error of 0.0093; positive scales leave 0.0102, zero points 0.0090.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import QuantizationError
from .reference import check_matrix

GROUP_SIZES = (128, 64, 32)
PER_WORD = 8
_LOW, _HIGH = -8, 7
# Scales that are tried, over (largest magnitude / 7.5): Gaussian groups like a little clipping.
_FACTORS = tuple(0.6 + 0.025 * step for step in range(21))
_CHUNK = 1 << 20  # elements handled at a time


class Int4Weight(NamedTuple):
    """``packed`` int32 [n, k / 8], ``scales`` bfloat16 [n, k / group_size]; ``error`` is ``||W - W'||^2 / ||W||^2``,
    ``energy`` is ``||W||^2``."""

    packed: Tensor
    scales: Tensor
    error: float
    energy: float


@torch.no_grad()
def round_to_int4(weight: Tensor, group_size: int, name: str = "weight") -> Int4Weight:
    """Rounds a matrix [n, k] from its float32 values; ``group_size`` divides k."""
    check_matrix(weight, name)
    k = weight.shape[1]
    if k % group_size or group_size not in GROUP_SIZES:
        raise QuantizationError(f"{name}: {k} columns cannot be cut into groups of {group_size} (of {GROUP_SIZES})")
    packed, scales = [], []
    error = energy = 0.0
    for rows in weight.split(max(1, _CHUNK // k)):
        groups = rows.float().unflatten(1, (-1, group_size))
        scale, own = _search(groups)
        packed.append(_pack(_round(groups, scale).flatten(1)))
        scales.append(scale.bfloat16())
        error += float(own.sum(dtype=torch.float64))
        energy += float(groups.square().sum(dtype=torch.float64))
    return Int4Weight(torch.cat(packed), torch.cat(scales), error / energy if energy else 0.0, energy)


def _search(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups [r, groups, g] -> scales, float32 numbers that bfloat16 holds, and squared errors [r, groups]."""
    reach = groups.abs().amax(-1) / ((_HIGH - _LOW) / 2)
    best = torch.zeros_like(reach), groups.square().sum(-1)
    for factor in _FACTORS:
        for sign in (1, -1):
            best = _better(groups, sign * factor * reach, *best)
    q = _round(groups, best[0])
    return _better(groups, (q * groups).sum(-1) / q.square().sum(-1).clamp(min=1), *best)


def _better(groups: Tensor, scale: Tensor, best: Tensor, best_error: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale.bfloat16().float()
    error = (_round(groups, scale) * scale[..., None] - groups).square().sum(-1)
    better = error < best_error
    return torch.where(better, scale, best), torch.where(better, error, best_error)


def _round(groups: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale[..., None] != 0, groups / scale[..., None], 0).round_().clamp_(_LOW, _HIGH)


def _pack(q: Tensor) -> Tensor:
    """[r, c] to int32 [r, c / 8]."""
    words = ((q.to(torch.int64) - _LOW).unflatten(1, (-1, PER_WORD)) << (4 * torch.arange(PER_WORD, device=q.device))).sum(
        -1
    )
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
