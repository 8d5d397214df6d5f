"""Launching the engine: from tensors to addresses. Called by the CPU dispatch of ``ops.py``.

Every argument is checked here before an address crosses into C; the C side trusts what it gets.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ..codebook import POLYNOMIALS, levels
from ..errors import QuantizationError
from ..packing import packed_columns
from ..reference import PackedWeight
from ..rotation import SCALE_BLOCK, keeps_precision, padded_features, rotation_block, signs
from .library import TYPES, Engine, Layer, always_exact, chosen, library

DTYPES = tuple(TYPES)
_INTEGER, _EXACT, _TILED = 0, 1, 2  # as in engine.c
# Tokens from which rows are decoded once into a tile: for the engine's own bfloat16 product, where it has one, or for
# PyTorch's BLAS in float32.
_TILED_TOKENS = 24
_BLAS_TOKENS = 32
_TILE_BYTES = 1 << 20


@functools.cache
def _codebook(bits: int, residual_bits: int) -> ctypes.Array[Any]:
    c = library()
    assert c is not None
    values = levels(bits, residual_bits)
    coefficients = (*POLYNOMIALS.get((bits, residual_bits), ()), *([0.0] * 5))[:5]
    book = ctypes.create_string_buffer(c.tq_codebook_size())
    c.tq_codebook_init(
        book, (ctypes.c_float * len(values))(*values), (ctypes.c_float * 5)(*coefficients), bits, residual_bits
    )
    return book


@functools.lru_cache(maxsize=8192)
def _layer(
    addresses: tuple[int | None, ...],
    strides: tuple[int, ...],
    rows: int,
    bias_dtype: torch.dtype | None,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> Layer:
    """The C description of a layer: a function of nothing but addresses and numbers, so it never goes stale."""
    columns = padded_features(in_features)
    sign = signs(seed, columns, "cpu", torch.float32)
    book = _codebook(bits, residual_bits)
    layer = Layer(
        *addresses, sign.data_ptr(), ctypes.addressof(book), rows, columns // SCALE_BLOCK, in_features, *strides,
        rotation_block(in_features, group_size), 0 if bias_dtype is None else TYPES[bias_dtype],
    )  # fmt: skip
    layer.owned = (sign, book)
    return layer


def _plane(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
        raise QuantizationError(
            f"{name} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}: "
            f"{dtype} {shape} on the CPU is needed here"
        )
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def describe(
    packed: PackedWeight,
    bias: Tensor | None,
    in_features: int,
    *,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> tuple[Layer, tuple[Tensor | None, ...]]:
    """Checks a layer's tensors; returns its C description and the tensors whose memory it points to."""
    rows, columns = packed.codes.shape[0], padded_features(in_features)
    codes = _plane("codes", packed.codes, torch.uint8, (rows, packed_columns(columns, bits)))
    scales = _plane("scales", packed.scales, torch.uint8, (rows, columns // SCALE_BLOCK))
    exponents = _plane("exponents", packed.exponents, torch.int8, (rows,))
    residual = packed.residual
    if (residual is not None) != (residual_bits > 0):
        raise QuantizationError(
            f"residual_bits is {residual_bits}, but a residual plane is {'absent' if residual is None else 'given'}: "
            "both or neither"
        )
    if residual is not None:
        residual = _plane("residual", residual, torch.uint8, (rows, packed_columns(columns, residual_bits)))
    if bias is not None and (bias.dtype not in TYPES or bias.shape != (rows,) or bias.device.type != "cpu"):
        raise QuantizationError(
            f"bias is a {bias.dtype} tensor of shape {tuple(bias.shape)} on {bias.device}: "
            f"float32, float16 or bfloat16 ({rows},) on the CPU is needed here"
        )
    if bias is not None:
        bias = bias.contiguous()
    kept = (codes, residual, scales, exponents, bias)
    layer = _layer(
        tuple(None if tensor is None else tensor.data_ptr() for tensor in kept),
        (codes.stride(0), 0 if residual is None else residual.stride(0), scales.stride(0)),
        rows, None if bias is None else bias.dtype, in_features, bits, residual_bits, group_size, seed,
    )  # fmt: skip
    return layer, kept


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
    engine: Engine | None = None,
    exact: bool | None = None,
) -> Tensor:
    """``x @ W.T + bias`` with ``x`` [..., in_features] float16, bfloat16 or float32, any strides; same dtype out.

    ``engine`` defaults to the chosen one, which must exist. ``exact`` computes in float32 throughout; it defaults to what
    the dtype needs: True for float32, and for half precision False (activations as integers of 14 or 15 bits) unless the
    environment asks for it.
    """
    if x.dtype not in TYPES or x.device.type != "cpu" or x.shape[-1:] != (in_features,):
        raise QuantizationError(
            f"x is a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}: "
            f"float32, float16 or bfloat16 [..., {in_features}] on the CPU is needed here"
        )
    layer, kept = describe(
        packed, bias, in_features, bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed
    )
    engine = engine or chosen()
    assert engine is not None
    if exact is None:
        exact = x.dtype == torch.float32 or always_exact()
    flat = x.reshape(-1, in_features)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    out = torch.empty((*x.shape[:-1], layer.rows), dtype=x.dtype)
    tokens = flat.shape[0]
    tiled = engine.has_tiled and x.dtype == torch.bfloat16 and not exact
    if tiled and tokens >= _TILED_TOKENS:
        multiply(flat, layer, out, engine, _TILED)
    elif tokens >= _BLAS_TOKENS and not tiled:
        _with_blas(flat, layer, out.view(tokens, layer.rows), kept[-1], engine)
    elif out.numel():
        multiply(flat, layer, out, engine, _EXACT if exact else _INTEGER)
    return out


def multiply(flat: Tensor, layer: Layer, out: Tensor, engine: Engine, mode: int) -> None:
    """The engine's own products."""
    c = library()
    assert c is not None
    failed = c.tq_linear(
        engine.index, ctypes.addressof(layer), mode, flat.data_ptr(), flat.stride(0) * flat.element_size(), out.data_ptr(),
        TYPES[out.dtype], flat.shape[0], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the rotated activations")


@keeps_precision
def _with_blas(flat: Tensor, layer: Layer, out: Tensor, bias: Tensor | None, engine: Engine) -> Tensor:
    """Many tokens: rows are decoded once into a float32 tile that stays in the cache, and PyTorch's BLAS multiplies it."""
    c = library()
    assert c is not None
    threads, address = torch.get_num_threads(), ctypes.addressof(layer)
    width = -(-layer.blocks * SCALE_BLOCK // engine.step) * engine.step
    rotated, factors = torch.empty((flat.shape[0], width)), torch.empty((flat.shape[0], 1))
    failed = c.tq_rotate(
        engine.index, address, flat.data_ptr(), flat.stride(0) * flat.element_size(), TYPES[flat.dtype], flat.shape[0],
        rotated.data_ptr(), factors.data_ptr(), threads,
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the rotated activations")
    step = max(64, _TILE_BYTES // (4 * width))
    tile = torch.empty((min(step, layer.rows), width))
    for start in range(0, layer.rows, step):
        rows = min(step, layer.rows - start)
        c.tq_decode_rows(engine.index, address, start, rows, tile.data_ptr(), threads)
        part = torch.mm(rotated, tile[:rows].T) * factors
        if bias is not None:
            part += bias[start : start + rows]
        out[:, start : start + rows] = part
    return out
