"""Launching the engine: from tensors to addresses. Called by the CPU dispatch of ``ops.py``.

Every argument is checked here before an address crosses into C; the C side trusts what it gets.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codebook import POLYNOMIALS, levels
from ..errors import QuantizationError
from ..packing import packed_columns
from ..reference import PackedWeight
from ..rotation import SCALE_BLOCK, keeps_precision, padded_features, rotation_block, signs
from . import pages
from .library import TYPES, Call, Engine, Layer, always_exact, chosen, library

try:
    from . import _call as calls
except ImportError:  # built without Python's headers, or an interpreter without the stable ABI: layers call `product` below
    calls = None  # type: ignore[assignment]
if calls is not None and not hasattr(calls, "kernel"):
    warnings.warn(f"{calls.__file__} is of an older version: run `python -m turboquant_weights.cpu`", stacklevel=2)
    calls = None  # type: ignore[assignment]

DTYPES = tuple(TYPES)
_INTEGER, _EXACT, _TILED = 0, 1, 2  # as in engine.c
# Tokens from which rows are decoded once into a tile: for the engine's own bfloat16 product, where it has one, or for
# PyTorch's BLAS in float32.
_TILED_TOKENS = 24
_TILED_NESTED_TOKENS = 16
_BLAS_TOKENS = 32
_FEW = min(_TILED_TOKENS, _TILED_NESTED_TOKENS, _BLAS_TOKENS)  # fewer are for the engine alone
_TILE_BYTES = 4 << 20

Parameters = Mapping[str, Any]  # by the names of a layer's attributes, "bias" included; absent ones are None
Product = Callable[[Tensor, Parameters], "Tensor | None"]


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


def _plane(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
        raise QuantizationError(
            f"{name} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}: "
            f"{dtype} {shape} on the CPU is needed here"
        )
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Bound:
    """A layer whose tensors were checked, ready to be called again and again. It holds none of their memory.

    ``product(x, parameters)``, for ``x`` a plain tensor on a CPU, is what :func:`multiply` returns, or None: if these
    parameters are not those that were checked, or if the layer does not take such an ``x``. ``at_once``, the same in C for a
    few tokens, also asks what ``is_direct`` of ops.py asks, and returns None wherever ``product`` should look.
    """

    __slots__ = ("at_once", "product")

    def __init__(self, product: Product, at_once: Product) -> None:
        self.product, self.at_once = product, at_once

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # the copy of a layer, in this process or another one, has addresses of its own


def bind(parameters: Parameters, in_features: int, layout: tuple[int, ...], engine: Engine | None = None) -> Bound | None:
    """Checks the tensors of a layer. None: there is no engine, or a tensor is not for it as it is.

    What is left for each call is written for speed: a small layer takes ten microseconds, and Python easily as many.
    """
    engine = engine or chosen()
    planes = tuple(parameters[name] for name in PackedWeight._fields)
    bias = parameters["bias"]
    if engine is None or not all(t is None or (t.is_cpu and t.is_contiguous()) for t in (*planes, bias)):
        return None
    if bias is not None and bias.dtype not in TYPES:
        return None
    layer, address, _, _ = _checked(PackedWeight(*planes), bias, in_features, *layout)
    pages.ask(*planes)
    c = library()
    assert c is not None
    structures = {}
    for dtype, number in TYPES.items():
        mode = _EXACT if dtype == torch.float32 or always_exact() else _INTEGER
        structures[dtype] = Call(address, in_features * dtype.itemsize, engine.number, mode, number)
    addresses = {dtype: ctypes.addressof(call) for dtype, call in structures.items()}
    # Of the tensors that were checked: the layer may have others by now, from another thread.
    known: list[Any] = [None if t is None else (t.data_ptr(), t.nbytes, t.dtype) for t in (*planes, bias)]
    codes_known, residual_known, scales_known, exponents_known, bias_known = known
    codes_at, codes_bytes, _ = codes_known  # bytes whatever their type
    scales_at, scales_bytes, _ = scales_known
    exponents_at, exponents_bytes, _ = exponents_known
    run, rows, empty, threads, few = c.tq_linear, layer.rows, torch.empty, torch.get_num_threads, _FEW

    def product(x: Tensor, parameters: Parameters) -> Tensor | None:
        # Each is asked for once and held to the end: another thread may give the layer others while the engine reads these.
        codes, scales, exponents = parameters["codes"], parameters["scales"], parameters["exponents"]
        residual, bias = parameters["residual"], parameters["bias"]
        shape, dtype = x.shape, x.dtype
        # Of a tensor that is where it was, as large and without gaps, every byte may be read.
        if (
            not shape or shape[-1] != in_features or dtype not in addresses
            or codes.data_ptr() != codes_at or codes.nbytes != codes_bytes or not codes.is_contiguous()
            or scales.data_ptr() != scales_at or scales.nbytes != scales_bytes or not scales.is_contiguous()
            or exponents.data_ptr() != exponents_at or exponents.nbytes != exponents_bytes or not exponents.is_contiguous()
        ):  # fmt: skip
            return None
        for tensor, at in ((residual, residual_known), (bias, bias_known)):
            if tensor is None:
                if at is not None:
                    return None
            elif (tensor.data_ptr(), tensor.nbytes, tensor.dtype) != at or not tensor.is_contiguous():
                return None
        tokens = x.numel() // in_features
        if not 0 < tokens < few or not x.is_contiguous():
            packed = PackedWeight(codes, residual, scales, exponents)
            return multiply(x, packed, bias, in_features, layout, engine, None)
        # Three dimensions are what models have; a slice of the shape costs half a microsecond.
        out = empty(shape[0], shape[1], rows, dtype=dtype) if len(shape) == 3 else empty(*shape[:-1], rows, dtype=dtype)
        if run(addresses[dtype], x.data_ptr(), out.data_ptr(), tokens, threads()):
            raise MemoryError("no memory for the rotated activations")
        return out

    product.owned = layer, structures  # type: ignore[attr-defined]  # whose addresses it passes on
    at_once = None
    if calls is not None and _has_calls():
        owner = layer, structures, run
        run_at = ctypes.cast(run, ctypes.c_void_p).value
        assert run_at is not None
        at_once = calls.bind(run_at, tuple(addresses.values()), (*planes, bias), in_features, layout, rows, few, owner)
    return Bound(product, at_once or _elsewhere)


def _elsewhere(x: Tensor, parameters: Parameters) -> None:
    """``at_once`` where there are no calls in C."""


_watchers: tuple[Callable[[], Any], ...] = ()


def watch(*functions: Callable[[], Any]) -> None:
    """Says what must all return something false before a call in C may leave the dispatcher out; see ``is_direct``."""
    global _watchers
    _watchers = functions


@functools.cache
def _has_calls() -> bool:
    """Prepares calls in C. PyTorch older than 2.10 does not say in C where a tensor lies."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    keywords = tuple({"dtype": dtype} for dtype in TYPES)
    return exchange is not None and calls.prepare(
        Tensor, torch.nn.Parameter, exchange, torch.empty, keywords, torch.get_num_threads, torch.is_grad_enabled,
        _watchers, vars(torch.autograd.forward_ad),
    )  # fmt: skip


Kernel = Callable[..., Tensor]  # with the schema of ops.py's "linear"


def kernel(other: Kernel) -> Kernel:
    """A kernel for the dispatcher: ``other``, to which a layer goes that is met for the first time, and after that, for a
    few tokens, the layer's call in C."""
    if calls is None or not _has_calls():
        return other
    known: dict[int, Product] = {}  # by the addresses of the codes, which are checked in each call

    def meet(
        x: Tensor,
        codes: Tensor,
        residual: Tensor | None,
        scales: Tensor,
        exponents: Tensor,
        bias: Tensor | None,
        in_features: int,
        *layout: int,
    ) -> Tensor:
        out = other(x, codes, residual, scales, exponents, bias, in_features, *layout)
        if x.dtype in TYPES and x.is_contiguous() and 0 < x.numel() < _FEW * in_features:
            tensors = dict(codes=codes, residual=residual, scales=scales, exponents=exponents, bias=bias)
            bound = bind(tensors, in_features, layout)
            if bound is not None and bound.at_once is not _elsewhere:
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                known[codes.data_ptr()] = bound.at_once
        return out

    return calls.kernel(known, meet)


class _Described(NamedTuple):
    layer: Layer
    address: int
    bias: Tensor | None
    kept: tuple[Tensor | None, ...]  # copies of planes with gaps; empty if the caller's tensors are used


_known: dict[tuple[Any, ...], _Described] = {}
_MOST_KNOWN = 8192


def _describe(packed: PackedWeight, bias: Tensor | None, in_features: int, layout: tuple[int, ...]) -> _Described:
    """Checks a layer's tensors, once for each set of addresses, sizes and types, and returns its C description."""
    codes, residual, scales, exponents = packed
    key: tuple[Any, ...] = (
        codes.data_ptr(), codes.shape, codes.dtype, scales.data_ptr(), scales.shape, scales.dtype,
        exponents.data_ptr(), exponents.shape, exponents.dtype, in_features, layout,
        None if residual is None else (residual.data_ptr(), residual.shape, residual.dtype, residual.is_contiguous()),
        None if bias is None else (bias.data_ptr(), bias.shape, bias.dtype, bias.is_contiguous()),
        codes.is_contiguous() and scales.is_contiguous() and exponents.is_contiguous(), codes.device,
    )  # fmt: skip
    found = _known.get(key)
    if found is None:
        found = _checked(packed, bias, in_features, *layout)
        if not found.kept:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            pages.ask(*packed)
            # Without the bias, whose memory the description must not keep alive.
            _known[key] = found._replace(bias=None)
        return found
    return found._replace(bias=bias) if bias is not None else found


def _checked(
    packed: PackedWeight,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> _Described:
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
    used = (codes, residual, scales, exponents, bias)
    sign, book = signs(seed, columns, "cpu", torch.float32), _codebook(bits, residual_bits)
    layer = Layer(
        *(None if tensor is None else tensor.data_ptr() for tensor in used), sign.data_ptr(), ctypes.addressof(book),
        rows, columns // SCALE_BLOCK, in_features,
        codes.stride(0), 0 if residual is None else residual.stride(0), scales.stride(0),
        rotation_block(in_features, group_size), 0 if bias is None else TYPES[bias.dtype],
    )  # fmt: skip
    layer.owned = (sign, book)
    contiguous = all(tensor is None or tensor.is_contiguous() for tensor in (*packed, bias))
    return _Described(layer, ctypes.addressof(layer), bias, () if contiguous else used)


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
    """:func:`multiply` with names; ``engine`` defaults to the chosen one, which must exist."""
    engine = engine or chosen()
    assert engine is not None
    return multiply(x, packed, bias, in_features, (bits, residual_bits, group_size, seed), engine, exact)


def multiply(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    in_features: int,
    layout: tuple[int, ...],
    engine: Engine,
    exact: bool | None,
) -> Tensor:
    """``x @ W.T + bias`` with ``x`` [..., in_features] float16, bfloat16 or float32, any strides; same dtype out.

    ``layout`` is (bits, residual_bits, group_size, seed). ``exact`` computes in float32 throughout; None means what the
    dtype needs: True for float32, and for half precision False (activations as integers of 14 or 15 bits) unless the
    environment asks for it.
    """
    dtype, shape = x.dtype, x.shape
    if dtype not in TYPES or not x.is_cpu or shape[-1:] != (in_features,):
        raise QuantizationError(
            f"x is a {dtype} tensor of shape {tuple(shape)} on {x.device}: "
            f"float32, float16 or bfloat16 [..., {in_features}] on the CPU is needed here"
        )
    described = _describe(packed, bias, in_features, layout)
    if exact is None:
        exact = dtype == torch.float32 or always_exact()
    if x.is_contiguous():
        flat, stride = x, in_features
    else:
        flat = x.reshape(-1, in_features)
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        stride = flat.stride(0)
    out = torch.empty((*shape[:-1], described.layer.rows), dtype=dtype)
    tokens = x.numel() // in_features
    tiled = engine.has_tiled and dtype == torch.bfloat16 and not exact
    if tiled and tokens >= (_TILED_NESTED_TOKENS if layout[1] else _TILED_TOKENS):
        mode = _TILED
    elif tokens >= _BLAS_TOKENS and not tiled:
        return _with_blas(flat.view(tokens, in_features), described, out, engine)
    elif tokens == 0:
        return out
    else:
        mode = _EXACT if exact else _INTEGER
    c = library()
    assert c is not None
    call = Call(described.address, stride * flat.element_size(), engine.number, mode, TYPES[dtype])
    if c.tq_linear(ctypes.addressof(call), flat.data_ptr(), out.data_ptr(), tokens, torch.get_num_threads()):
        raise MemoryError("no memory for the rotated activations")
    return out


@keeps_precision
def _with_blas(flat: Tensor, described: _Described, result: Tensor, engine: Engine) -> Tensor:
    """Many tokens: rows are decoded once into a float32 tile that stays in the cache, and PyTorch's BLAS multiplies it."""
    c = library()
    assert c is not None
    layer, address, bias, _ = described
    threads, out = torch.get_num_threads(), result.view(-1, layer.rows)
    width = -(-layer.blocks * SCALE_BLOCK // engine.step) * engine.step
    rotated, factors = torch.empty((flat.shape[0], width)), torch.empty((flat.shape[0], 1))
    failed = c.tq_rotate(
        engine.number, address, flat.data_ptr(), flat.stride(0) * flat.element_size(), TYPES[flat.dtype], flat.shape[0],
        rotated.data_ptr(), factors.data_ptr(), threads,
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the rotated activations")
    step = max(64, _TILE_BYTES // (4 * width))
    tile = torch.empty((min(step, layer.rows), width))
    for start in range(0, layer.rows, step):
        rows = min(step, layer.rows - start)
        c.tq_decode_rows(engine.number, address, start, rows, tile.data_ptr(), threads)
        part = torch.mm(rotated, tile[:rows].T) * factors
        if bias is not None:
            part += bias[start : start + rows]
        out[:, start : start + rows] = part
    return result


def look_up(ids: Tensor, packed: PackedWeight, in_features: int, layout: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of the weight: ``W[ids]`` [*ids.shape, in_features] of ``dtype``, one of ``DTYPES``, for int32 or int64 ids."""
    described = _describe(packed, None, in_features, layout)
    flat = ids.reshape(-1).long().contiguous()
    if not flat.is_cpu:
        raise QuantizationError(f"ids are on {ids.device}: the CPU is needed here")
    out = torch.empty((*ids.shape, in_features), dtype=dtype)
    c = library()
    assert c is not None
    failed = c.tq_look_up(
        described.address, flat.data_ptr(), flat.numel(), out.data_ptr(), TYPES[dtype], torch.get_num_threads()
    )
    if failed == 2:
        raise IndexError(f"ids are {flat.min()} to {flat.max()}: rows 0 to {described.layer.rows - 1} are there")
    if failed:
        raise MemoryError("no memory for rows of an embedding")
    return out
