"""Launching the kernels: from tensors to grids. Called by the CUDA dispatch of ``ops.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..codebook import level_tensor
from ..reference import PackedWeight
from ..rotation import SCALE_BLOCK, rotation_block
from .decode import TILE, assembly
from .dequantize import dequantize_kernel
from .rotate import NATURAL, SLICES, SPLITK, rotate_kernel, rotate_scaled_kernel, tile_matrix, tile_signs
from .schedule import SLICE_ROWS, Schedule, Slices, choose, crossover, gpu_name
from .slices import MOST_TOKENS, slices_kernel
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _in_words(codes: int, residual: int, scales: int) -> bool:
    """Whether assembly can read planes at these addresses: it loads 16 bytes of a plane and 4 scales at a time, and a view
    that the user cut out of bytes may start anywhere (it takes the portable path)."""
    return (codes | residual | scales << 2) & 15 == 0


def _on_device_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Triton launches on the current device: makes that the device of the first argument."""

    @functools.wraps(function)
    def guarded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return function(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return guarded


@_on_device_of
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
    rows, groups = packed.scales.shape
    tokens = x.numel() // in_features
    out = x.new_empty((*x.shape[:-1], rows))
    if tokens == 0:
        return out
    if not x.is_contiguous():
        x = x.reshape(-1, in_features)
        x = x if x.stride(-1) == 1 else x.contiguous()
    layout = (in_features, bits, residual_bits, group_size, seed)
    if x.dtype == torch.float32 or tokens > crossover(bits, residual_bits, groups * SCALE_BLOCK):
        through_scratch(x.view(tokens, in_features), packed, bias, out.view(tokens, rows), *layout)
    else:
        fused(x, packed, bias, out, *layout)
    return out


class _Plan(NamedTuple):
    """Everything about the two launches of :func:`fused` that does not depend on addresses."""

    sizes: tuple[int, int, int, int]  # bytes: offsets of token scales, counters, partial sums; total
    constants: tuple[Tensor, Tensor]  # signs, Hadamard tile
    levels: tuple[Tensor, ...]
    addresses: tuple[tuple[int, int], tuple[int, ...]]  # of constants and levels
    rotate_grid: tuple[int, int, int]
    rotate_tail: tuple[Any, ...]
    matmul: Any
    grid: tuple[int, int, int]
    tail: tuple[Any, ...]
    warps: int
    pdl: bool
    compiled: list[Any]


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
    words: bool,
    schedule: Schedule | None,
) -> _Plan:
    """``words``: assembly can read the planes. ``schedule`` is None to let the table decide."""
    decoder = assembly(bits, residual_bits) if words and _capability(device) >= 80 else ""
    if schedule is None:
        schedule = choose(gpu_name(device), tokens, rows, groups * SCALE_BLOCK, residual_bits if decoder else None)
    tiles = -(-groups // 4)
    block = rotation_block(in_features, group_size)
    pdl = _capability(device) >= 90
    sizes = (tokens, rows, groups, tiles * TILE, *strides)
    split = schedule.split
    if isinstance(schedule, Slices):
        row_tiles, token_tiles, rows_per_tile, tokens_per_tile = -(-rows // SLICE_ROWS), 1, SLICE_ROWS, MOST_TOKENS
        grid = (row_tiles, split, 1)
        tail = groups % 4 != 0 or tiles % (schedule.warps * split) != 0
        matmul, order = slices_kernel, SLICES
        levels: tuple[Tensor, ...] = ()
        arguments: tuple[Any, ...] = (
            *(*sizes, split, residual_bits, decoder, bias_dtype is not None, tail),
            *(SLICE_ROWS, schedule.warps, split > 1, pdl),
        )
    else:
        rows_per_tile, tokens_per_tile = schedule.block_n, schedule.block_m
        row_tiles, token_tiles = -(-rows // rows_per_tile), -(-tokens // tokens_per_tile)
        grid = (row_tiles, split, token_tiles)
        tail = groups % 4 != 0
        matmul, order, levels = splitk_kernel, SPLITK, (level_tensor(bits, residual_bits, device),)
        arguments = (
            *(*sizes, split, bits, residual_bits, decoder, bias_dtype is not None, tail),
            *(tokens_per_tile, rows_per_tile, split > 1, 1 if tail else schedule.stages, pdl),
        )
    constants = tile_signs(seed, tiles, device, dtype), tile_matrix(block, order, device, dtype)
    slots = row_tiles * token_tiles if split > 1 else 0
    offsets = [0]
    for size in (2 * tokens * tiles * TILE, 4 * tokens, 4 * slots):
        offsets.append(offsets[-1] + -(-size // 256) * 256)
    total = offsets[3] + 4 * slots * split * rows_per_tile * tokens_per_tile
    chunk = min(_LARGEST_CHUNK, max(1024, triton.next_power_of_2(in_features)))
    return _Plan(
        sizes=(offsets[1], offsets[2], offsets[3], total),
        constants=constants,
        levels=levels,
        addresses=((constants[0].data_ptr(), constants[1].data_ptr()), tuple(t.data_ptr() for t in levels)),
        rotate_grid=(tokens, -(-tiles // _ROTATE_TILES), 1),
        # In the order of the kernels' parameters, constexprs included.
        rotate_tail=(tokens, slots, in_features, tiles, block**-0.5, _ROTATE_TILES, chunk, pdl),
        matmul=matmul,
        grid=grid,
        tail=arguments,
        warps=schedule.warps,
        pdl=pdl,
        compiled=[],
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
    schedule: Schedule | None = None,
) -> None:
    """Rotation and matmul of ``x`` [..., in_features] (contiguous, or a matrix with contiguous rows) into the contiguous
    ``out`` [..., rows]."""
    codes, residual, scales, exponents = packed
    rows, groups = scales.shape
    rest = codes if residual is None else residual
    tokens = x.numel() // in_features
    stride = x.stride(0) if x.dim() == 2 else in_features
    at_codes, at_residual, at_scales, at_x = codes.data_ptr(), _address(residual), scales.data_ptr(), x.data_ptr()
    at_exponents, at_bias, at_out = exponents.data_ptr(), _address(bias), out.data_ptr()
    plan = _plan(
        x.device, x.dtype, None if bias is None else bias.dtype, tokens, stride,
        rows, groups, (codes.stride(0), rest.stride(0), scales.stride(0)), in_features, bits, residual_bits, group_size,
        seed, _in_words(at_codes, at_residual, at_scales), schedule,
    )  # fmt: skip
    scale_at, counters_at, partial_at, total = plan.sizes
    # One allocation for all that lives between the launches: rotated tokens, their scales, counters, partial sums.
    workspace = x.new_empty(total, dtype=torch.uint8)
    aligned = (at_codes | at_residual | at_scales | at_x | at_exponents | at_bias | at_out) & 15 == 0
    if plan.compiled and aligned:
        base = workspace.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        rotate, matmul = plan.compiled
        constants, levels = plan.addresses  # an integer costs the launcher less than a tensor
        _relaunch(
            rotate, plan.rotate_grid, stream, at_x, stride, *constants, base, base + scale_at, base + counters_at,
            *plan.rotate_tail,
        )  # fmt: skip
        _relaunch(
            matmul, plan.grid, stream, base, base + scale_at, at_codes, at_residual or at_codes, at_scales, at_exponents,
            at_bias or at_exponents, *levels, at_out, base + partial_at, base + counters_at, *plan.tail,
        )  # fmt: skip
        return
    rotated = workspace[:scale_at].view(torch.float16)
    token_scale = workspace[scale_at:counters_at].view(torch.float32)
    counters = workspace[counters_at:partial_at].view(torch.int32)
    partial = workspace[partial_at:].view(torch.float32)
    options = {"launch_pdl": True} if plan.pdl else {}
    rotate = rotate_scaled_kernel[plan.rotate_grid](
        x, stride, *plan.constants, rotated, token_scale, counters, *plan.rotate_tail,
        num_warps=8, **options,
    )  # fmt: skip
    matmul = plan.matmul[plan.grid](
        rotated, token_scale, codes, rest, scales, exponents, exponents if bias is None else bias, *plan.levels, out,
        partial, counters, *plan.tail, num_warps=plan.warps, num_stages=1, **options,
    )  # fmt: skip
    # Triton's own launch path costs tens of microseconds of Python. The kernels were compiled for aligned addresses (and
    # for a plan's strides), so that is when they may be launched directly; the interpreter returns no kernel.
    if rotate is not None and aligned and not plan.compiled:
        plan.compiled.extend((rotate, matmul))


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
    words = _capability(codes.device) >= 80 and _in_words(codes.data_ptr(), _address(residual), 0)
    decoder = assembly(bits, residual_bits) if words and dtype != torch.float32 else ""
    dequantize_kernel[(-(-rows // 32), -(-groups // 4))](
        codes, rest, scales, exponents, level_tensor(bits, residual_bits, codes.device), out,
        rows, groups, codes.stride(0), rest.stride(0), scales.stride(0), out.stride(0),
        BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decoder, num_warps=4,
    )  # fmt: skip
    return out


def rotate(x: Tensor, columns: int, block: int, seed: int) -> Tensor:
    """``x`` [tokens, in_features] padded to ``columns`` and rotated, in its dtype: ``rotation.rotate``, one launch."""
    return _rotate(x, columns, columns, block, seed, inverse=False)


def unrotate(x: Tensor, in_features: int, block: int, seed: int) -> Tensor:
    """``x`` [tokens, columns] rotated back and cut to ``in_features``, in its dtype."""
    return _rotate(x, x.shape[1], in_features, block, seed, inverse=True)


def _rotate(x: Tensor, columns: int, out_columns: int, block: int, seed: int, inverse: bool) -> Tensor:
    tokens, tiles = x.shape[0], -(-columns // TILE)
    out = torch.empty((tokens, out_columns), dtype=x.dtype, device=x.device)
    rotate_kernel[(min(_ROTATE_PROGRAMS, -(-tokens * tiles // 64)),)](
        x, x.stride(0), tile_signs(seed, tiles, x.device, x.dtype), tile_matrix(block, NATURAL, x.device, x.dtype),
        out, out_columns, tokens * tiles, x.shape[1], tiles, out_columns, block**-0.5,
        TILES=64, INVERSE=inverse, num_warps=4,
    )  # fmt: skip
    return out


def _row_parts(packed: PackedWeight, bytes_per_row: int) -> Iterator[tuple[slice, PackedWeight]]:
    """All rows at once, or, for output heads of the largest models, parts whose dense form fits the scratch memory."""
    rows, step = packed.scales.shape[0], max(1, _SCRATCH_BYTES // bytes_per_row)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        whole = step >= rows
        yield part, packed if whole else PackedWeight(*(None if p is None else p[part] for p in packed))  # type: ignore[arg-type]


def through_scratch(
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
    """Dequantizes the rotated weight into scratch memory and leaves the matmul of ``x`` [tokens, in_features] to cuBLAS."""
    rows, groups = packed.scales.shape
    columns = groups * SCALE_BLOCK
    rotated = rotate(x, columns, rotation_block(in_features, group_size), seed)
    bias = None if bias is None else bias.to(x.dtype)
    for part, planes in _row_parts(packed, columns * x.element_size()):
        dense = dequantize_rotated(planes, bits, residual_bits, x.dtype)
        if len(dense) < rows:
            # Not out=: cuBLAS takes a path ten times slower into rows that lie apart.
            out[:, part] = torch.nn.functional.linear(rotated, dense, None if bias is None else bias[part])
        elif bias is None:
            torch.mm(rotated, dense.T, out=out)
        else:
            torch.addmm(bias, rotated, dense.T, out=out)


@_on_device_of
def linear_input_gradient(
    grad: Tensor,
    packed: PackedWeight,
    in_features: int,
    *,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> Tensor:
    """``grad @ W`` with ``grad`` [..., rows] float16, bfloat16 or float32: dequantization, cuBLAS, rotation back."""
    rows, groups = packed.scales.shape
    columns, shape = groups * SCALE_BLOCK, (*grad.shape[:-1], in_features)
    if grad.numel() == 0:
        return grad.new_zeros(shape)
    flat = grad.reshape(-1, rows)
    parts = [
        flat[:, part] @ dequantize_rotated(planes, bits, residual_bits, grad.dtype)
        for part, planes in _row_parts(packed, columns * grad.element_size())
    ]
    total = parts[0] if len(parts) == 1 else torch.stack(parts).float().sum(0).to(grad.dtype)
    return unrotate(total, in_features, rotation_block(in_features, group_size), seed).view(shape)
