"""Launching the kernels: from tensors to grids. Called by the CUDA dispatch of ``ops.py``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..codebook import level_tensor
from ..reference import PackedWeight
from ..rotation import SCALE_BLOCK, rotation_block
from .decode import FAST, TILE, assembly
from .dequantize import dequantize_kernel
from .rotate import rotate_kernel, rotate_scaled_kernel, tile_matrix, tile_signs
from .schedule import Schedule, choose, crossover
from .splitk import splitk_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROTATE_TILES = 16
_SCRATCH_BYTES = 1 << 28


@functools.cache
def _capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, else 0 (the portable path)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _assembly_for(bits: int, residual_bits: int, codes: Tensor) -> str:
    return assembly(bits, residual_bits) if _capability(codes.device) >= 80 else ""


def linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    in_features: int,
    *,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> Tensor:
    """``x @ W.T + bias`` with ``x`` [..., in_features] float16, bfloat16 or float32, any strides; same dtype out."""
    rows = packed.codes.shape[0]
    flat = x.reshape(-1, in_features)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    tokens = flat.shape[0]
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if tokens == 0 or rows == 0:
        return out.view(*x.shape[:-1], rows)
    if x.dtype == torch.float32 or tokens > crossover(bits, residual_bits):
        _through_scratch(flat, packed, bias, out, in_features, bits, residual_bits, group_size, seed)
    else:
        columns = packed.scales.shape[1] * SCALE_BLOCK
        schedule = choose(tokens, rows, columns, (bits, residual_bits) in FAST)
        fused(flat, packed, bias, out, in_features, bits, residual_bits, group_size, seed, schedule)
    return out.view(*x.shape[:-1], rows)


def fused(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
    schedule: Schedule,
) -> None:
    """Rotation and split-K matmul of ``x`` [tokens, in_features] into the contiguous ``out`` [tokens, rows]."""
    codes, residual, scales, exponents = packed
    tokens, (rows, groups) = x.shape[0], scales.shape
    block_m, block_n, split, stages, warps = schedule
    tiles = -(-groups // 4)
    row_tiles, token_tiles = -(-rows // block_n), -(-tokens // block_m)
    pdl = _capability(x.device) >= 90
    block = rotation_block(in_features, group_size)

    # One allocation for everything that lives between the two launches; each part starts at a multiple of 256 bytes.
    sizes = (2 * tokens * tiles * TILE, 4 * tokens, 4 * row_tiles * token_tiles)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    shares = 4 * row_tiles * token_tiles * split * block_n * block_m if split > 1 else 0
    workspace = torch.empty(starts[3] + shares, dtype=torch.uint8, device=x.device)
    rotated = workspace[: starts[1]].view(torch.float16)
    token_scale = workspace[starts[1] : starts[2]].view(torch.float32)
    counters = workspace[starts[2] : starts[3]].view(torch.int32)
    partial = workspace[starts[3] :].view(torch.float32) if split > 1 else token_scale

    rotate_scaled_kernel[(tokens, -(-tiles // _ROTATE_TILES))](
        x, x.stride(0), tile_signs(seed, tiles, x.device, x.dtype), tile_matrix(block, True, x.device, x.dtype),
        rotated, token_scale, counters, tokens, row_tiles * token_tiles, in_features, tiles, block**-0.5,
        TILES=_ROTATE_TILES, CHUNK=4096, PDL=pdl, num_warps=8,
    )  # fmt: skip
    options = {"launch_pdl": True} if pdl else {}
    splitk_kernel[(row_tiles, split, token_tiles)](
        rotated, token_scale, codes, codes if residual is None else residual, scales, exponents,
        token_scale if bias is None else bias, level_tensor(bits, residual_bits, x.device), out, partial, counters,
        tokens, rows, groups, tiles * TILE, codes.stride(0), 0 if residual is None else residual.stride(0), scales.stride(0),
        split, BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=_assembly_for(bits, residual_bits, codes),
        HAS_BIAS=bias is not None, TAIL=groups % 4 != 0, BLOCK_M=block_m, BLOCK_N=block_n, REDUCE=split > 1, STAGES=stages,
        PDL=pdl, num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip


def dequantize_rotated(packed: PackedWeight, bits: int, residual_bits: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix [rows, columns] that the planes hold, rotated as stored, in ``dtype``."""
    codes, residual, scales, exponents = packed
    rows, groups = scales.shape
    out = torch.empty((rows, groups * SCALE_BLOCK), dtype=dtype, device=codes.device)
    # Assembly rounds level * scale to half precision: too coarse for float32.
    decoder = "" if dtype == torch.float32 else _assembly_for(bits, residual_bits, codes)
    dequantize_kernel[(-(-rows // 32), -(-groups // 4))](
        codes, codes if residual is None else residual, scales, exponents, level_tensor(bits, residual_bits, codes.device),
        out, rows, groups, codes.stride(0), 0 if residual is None else residual.stride(0), scales.stride(0), out.stride(0),
        BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decoder, num_warps=4,
    )  # fmt: skip
    return out


def rotate(x: Tensor, columns: int, block: int, seed: int) -> Tensor:
    """``x`` [tokens, in_features] padded to ``columns`` and rotated, in its dtype: ``rotation.rotate``, one launch."""
    tokens, tiles = x.shape[0], -(-columns // TILE)
    out = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    rotate_kernel[(-(-tokens * tiles // 64),)](
        x, x.stride(0), tile_signs(seed, tiles, x.device, x.dtype), tile_matrix(block, False, x.device, x.dtype),
        out, columns, tokens * tiles, x.shape[1], tiles, columns, block**-0.5, TILES=64, num_warps=8,
    )  # fmt: skip
    return out


def _through_scratch(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> None:
    """Dequantizes the rotated weight, a chunk of rows at a time, and leaves the matmul to cuBLAS."""
    rows, groups = packed.scales.shape
    columns = groups * SCALE_BLOCK
    rotated = rotate(x, columns, rotation_block(in_features, group_size), seed)
    step = max(1, _SCRATCH_BYTES // (columns * x.element_size()))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = PackedWeight(*(None if plane is None else plane[start:stop] for plane in packed))  # type: ignore[arg-type]
        dense = dequantize_rotated(part, bits, residual_bits, x.dtype)
        target = out if step >= rows else out[:, start:stop]
        if bias is None:
            torch.mm(rotated, dense.T, out=target)
        else:
            torch.addmm(bias[start:stop].to(x.dtype), rotated, dense.T, out=target)
