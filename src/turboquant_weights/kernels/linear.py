"""Launching the kernels: from tensors to grids. Called by the CUDA dispatch of ``ops.py``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
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
_ROTATE_PROGRAMS = 528
_LARGEST_CHUNK = 1 << 15
_SCRATCH_BYTES = 1 << 30


@functools.cache
def _capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, else 0 (the portable path)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether all start at a multiple of 16 bytes, as every allocation does; views may not."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits & 15 == 0


def _assembly_for(packed: PackedWeight, bits: int, residual_bits: int) -> str:
    # Assembly reads whole words: codes at odd addresses (a view that the user cut out of bytes) take the portable path.
    if _capability(packed.codes.device) < 80 or not _aligned(packed.codes, packed.residual):
        return ""
    return assembly(bits, residual_bits)


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
    """``x @ W.T + bias`` with ``x`` [..., in_features] float16, bfloat16 or float32, any strides; same dtype out.

    Constants (signs, Hadamard tiles, levels) are made on the first call per device: run a layer once before capturing it
    into a CUDA graph.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return linear(
                x, packed, bias, in_features, bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed
            )
    rows, columns = packed.scales.shape[0], packed.scales.shape[1] * SCALE_BLOCK
    flat = x.reshape(-1, in_features)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    tokens = flat.shape[0]
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if tokens == 0:
        pass
    elif x.dtype == torch.float32 or tokens > crossover(bits, residual_bits, columns):
        _through_scratch(flat, packed, bias, out, in_features, bits, residual_bits, group_size, seed)
    else:
        fast = (bits, residual_bits) in FAST
        schedule = choose(_gpu(x.device), tokens, rows, columns, residual_bits if fast else None)
        fused(flat, packed, bias, out, in_features, bits, residual_bits, group_size, seed, schedule)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], rows)


class _Plan(NamedTuple):
    """Everything about the two launches of :func:`fused` that does not depend on addresses."""

    sizes: tuple[int, int, int, int]  # bytes: offsets of token scales, counters, partial sums; total
    sign: Tensor
    matrix: Tensor
    levels: Tensor
    rotate_grid: tuple[int, int]
    rotate_tail: tuple[Any, ...]
    grid: tuple[int, int, int]
    tail: tuple[Any, ...]
    warps: int
    stages: int
    pdl: bool
    compiled: dict[str, Any]


@functools.lru_cache(maxsize=8192)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    tokens: int,
    x_stride: int,
    rows: int,
    groups: int,
    strides: tuple[int, int, int],
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
    schedule: Schedule,
    decoder: str,
) -> _Plan:
    block_m, block_n, split, stages, warps = schedule
    tiles = -(-groups // 4)
    row_tiles, token_tiles = -(-rows // block_n), -(-tokens // block_m)
    block = rotation_block(in_features, group_size)
    pdl = _capability(device) >= 90
    offsets = [0]
    for size in (2 * tokens * tiles * TILE, 4 * tokens, 4 * row_tiles * token_tiles):
        offsets.append(offsets[-1] + -(-size // 256) * 256)
    shares = 4 * row_tiles * token_tiles * split * block_n * block_m if split > 1 else 0
    chunk = min(_LARGEST_CHUNK, max(1024, triton.next_power_of_2(in_features)))
    return _Plan(
        sizes=(offsets[1], offsets[2], offsets[3], offsets[3] + shares),
        sign=tile_signs(seed, tiles, device, dtype),
        matrix=tile_matrix(block, True, device, dtype),
        levels=level_tensor(bits, residual_bits, device),
        rotate_grid=(tokens, -(-tiles // _ROTATE_TILES)),
        # In the order of the kernels' parameters, constexprs included.
        rotate_tail=(tokens, row_tiles * token_tiles, in_features, tiles, block**-0.5, _ROTATE_TILES, chunk, pdl),
        grid=(row_tiles, split, token_tiles),
        tail=(
            *(tokens, rows, groups, tiles * TILE, *strides, split, bits, residual_bits, decoder),
            *(bias_dtype is not None, groups % 4 != 0, block_m, block_n, split > 1, stages, pdl),
        ),
        warps=warps,
        stages=stages,
        pdl=pdl,
        compiled={},
    )


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
    rows, groups = scales.shape
    rest = codes if residual is None else residual
    plan = _plan(
        x.device, x.dtype, None if bias is None else bias.dtype, x.shape[0], x.stride(0), rows, groups,
        (codes.stride(0), rest.stride(0), scales.stride(0)), in_features, bits, residual_bits, group_size, seed, schedule,
        _assembly_for(packed, bits, residual_bits),
    )  # fmt: skip
    scale_at, counters_at, partial_at, total = plan.sizes
    # One allocation for all that lives between the launches: rotated tokens, their scales, counters, partial sums.
    workspace = torch.empty(total, dtype=torch.uint8, device=x.device)
    if plan.compiled and _aligned(x, codes, residual, scales, exponents, bias):
        base = workspace.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        _relaunch(
            plan.compiled["rotate"], (*plan.rotate_grid, 1), stream, x, x.stride(0), plan.sign, plan.matrix, base,
            base + scale_at, base + counters_at, *plan.rotate_tail,
        )  # fmt: skip
        _relaunch(
            plan.compiled["splitk"], plan.grid, stream, base, base + scale_at, codes, rest, scales, exponents,
            exponents if bias is None else bias, plan.levels, out, base + partial_at, base + counters_at, *plan.tail,
        )  # fmt: skip
        return
    rotated = workspace[:scale_at].view(torch.float16)
    token_scale = workspace[scale_at:counters_at].view(torch.float32)
    counters = workspace[counters_at:partial_at].view(torch.int32)
    partial = workspace[partial_at:].view(torch.float32)
    options = {"launch_pdl": True} if plan.pdl else {}
    rotate = rotate_scaled_kernel[plan.rotate_grid](
        x, x.stride(0), plan.sign, plan.matrix, rotated, token_scale, counters, *plan.rotate_tail, num_warps=8, **options
    )
    splitk = splitk_kernel[plan.grid](
        rotated, token_scale, codes, rest, scales, exponents, exponents if bias is None else bias, plan.levels, out,
        partial, counters, *plan.tail, num_warps=plan.warps, num_stages=plan.stages, **options,
    )  # fmt: skip
    # Triton's own launch path costs tens of microseconds of Python. The kernels were compiled for aligned addresses (and
    # for a plan's strides), so that is when they may be launched directly; the interpreter returns no kernel.
    if rotate is not None and _aligned(x, codes, residual, scales, exponents, bias):
        plan.compiled.update(rotate=rotate, splitk=splitk)


def _relaunch(kernel: Any, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
    """What ``JITFunction.run`` ends with; addresses may be integers."""
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


def dequantize_rotated(packed: PackedWeight, bits: int, residual_bits: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix [rows, columns] that the planes hold, rotated as stored, in ``dtype``."""
    codes, residual, scales, exponents = packed
    rows, groups = scales.shape
    rest = codes if residual is None else residual
    out = torch.empty((rows, groups * SCALE_BLOCK), dtype=dtype, device=codes.device)
    # Assembly rounds level * scale to half precision: too coarse for float32.
    decoder = "" if dtype == torch.float32 else _assembly_for(packed, bits, residual_bits)
    dequantize_kernel[(-(-rows // 32), -(-groups // 4))](
        codes, rest, scales, exponents, level_tensor(bits, residual_bits, codes.device), out,
        rows, groups, codes.stride(0), rest.stride(0), scales.stride(0), out.stride(0),
        BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decoder, num_warps=4,
    )  # fmt: skip
    return out


def rotate(x: Tensor, columns: int, block: int, seed: int) -> Tensor:
    """``x`` [tokens, in_features] padded to ``columns`` and rotated, in its dtype: ``rotation.rotate``, one launch."""
    tokens, tiles = x.shape[0], -(-columns // TILE)
    out = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    rotate_kernel[(min(_ROTATE_PROGRAMS, -(-tokens * tiles // 64)),)](
        x, x.stride(0), tile_signs(seed, tiles, x.device, x.dtype), tile_matrix(block, False, x.device, x.dtype),
        out, columns, tokens * tiles, x.shape[1], tiles, columns, block**-0.5, TILES=64, num_warps=4,
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
    """Dequantizes the rotated weight into scratch memory and leaves the matmul to cuBLAS."""
    rows, groups = packed.scales.shape
    columns = groups * SCALE_BLOCK
    rotated = rotate(x, columns, rotation_block(in_features, group_size), seed)
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, _SCRATCH_BYTES // (columns * x.element_size()))
    if rows <= step:
        dense = dequantize_rotated(packed, bits, residual_bits, x.dtype)
        if bias is None:
            torch.mm(rotated, dense.T, out=out)
        else:
            torch.addmm(bias, rotated, dense.T, out=out)
        return
    for start in range(0, rows, step):  # rarely: output heads of the largest models
        part = PackedWeight(*(None if plane is None else plane[start : start + step] for plane in packed))  # type: ignore[arg-type]
        dense = dequantize_rotated(part, bits, residual_bits, x.dtype)
        # Not out=: cuBLAS takes a path ten times slower into rows that lie apart.
        out[:, start : start + step] = torch.nn.functional.linear(
            rotated, dense, None if bias is None else bias[start : start + step]
        )
