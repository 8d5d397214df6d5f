"""Launching the kernels: from tensors to grids. Called by the CUDA dispatch of ``ops.py``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor as Descriptor

from ..codebook import level_tensor, levels
from ..errors import QuantizationError
from ..reference import PackedWeight
from ..rotation import SCALE_BLOCK, is_autocast_enabled, keeps_precision, rotation_block
from .decode import TILE, assembly, bfloat_assembly, lookup_assembly, lookup_words
from .dequantize import dequantize_kernel, dequantize_words_kernel
from .few import FEW_BYTES, FEW_TILES, FEW_TOKENS, few_kernel, rotate_few_kernel
from .integer import BYTES_TILES, META_BYTES, integer_kernel, rotate_bytes_kernel
from .prefill import WEIGHT_ROWS, multiply_bytes_kernel, rotate_round_kernel, round_weights_kernel
from .ring import ring
from .rotate import (
    NATURAL,
    PAIRED,
    PAIRED_SLICES,
    SLICES,
    SPLITK,
    outer_matrix,
    rotate_kernel,
    rotate_scaled_kernel,
    tile_matrix,
    tile_signs,
)
from .rotating import rotating_kernel, routed_kernel
from .schedule import (
    INT8_TOKENS,
    ROTATION_PROGRAMS,
    SLICE_ROWS,
    Integer,
    Rotating,
    Schedule,
    Slices,
    StreamK,
    bytes_tile,
    choose,
    crossover,
    gpu_name,
    rotating,
    rotation,
)
from .slices import MOST_TOKENS, slices_kernel
from .splitk import splitk_kernel

# Another Triton may mean something else by the arguments of its C function and by the names of Gluon, which is experimental.
_IS_KNOWN_LAUNCHER = triton.__version__.startswith("3.6.")
streamk_kernel: Any = None
if _IS_KNOWN_LAUNCHER:
    with contextlib.suppress(ImportError):  # a Triton without NVIDIA's part
        from triton.backends.nvidia.driver import make_tensordesc_arg
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from .streamk import plane_block, registers, streamk_kernel, x_block

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT8_VARIABLE = "TURBOQUANT_WEIGHTS_INT8_PREFILL"
_SCRATCH_BYTES = 1 << 30
_GATHERED = 32  # tokens above which planes without an assembly decoder are dequantized for cuBLAS (H100)
_MAPS = 4096  # tensor maps that a layer's launches remember


@functools.cache
def _capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, else 0 (the portable path)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _in_words(
    codes: int, residual: int, scales: int, code_stride: int, residual_stride: int, bits: int, residual_bits: int
) -> bool:
    """Whether assembly can read planes at these addresses, with these bytes from row to row: it loads up to 16 bytes of a
    plane and 4 scales at a time, and a view that the user cut out of bytes may start anywhere (it takes the portable path).
    """
    at = codes | residual | scales << 2
    return at & 15 == 0 and code_stride % (4 * bits) == 0 and residual_stride % (4 * (residual_bits or bits)) == 0


def _with_unit_steps(packed: PackedWeight, bias: Tensor | None) -> tuple[PackedWeight, Tensor | None]:
    """Planes and bias whose last dimension has no gaps, which kernels take for granted; copies of those that have."""
    codes, residual, scales, exponents = packed
    if (
        codes.stride(-1) == scales.stride(-1) == exponents.stride(-1) == 1
        and (residual is None or residual.stride(-1) == 1)
        and (bias is None or bias.stride(0) == 1)
    ):
        return packed, bias
    whole = packed.map(lambda plane: plane if plane.stride(-1) == 1 else plane.contiguous())
    return whole, bias if bias is None or bias.stride(0) == 1 else bias.contiguous()


def _check_devices(x: Tensor, packed: PackedWeight, other: Tensor | None, name: str) -> None:
    """Kernels are launched by addresses: one of another device would end the process."""
    device = x.get_device()
    codes, residual, scales, exponents = packed
    if (
        codes.get_device() == scales.get_device() == exponents.get_device() == device
        and (residual is None or residual.get_device() == device)
        and (other is None or other.get_device() == device)
    ):
        return
    tensors = {"codes": codes, "residual": residual, "scales": scales, "exponents": exponents, name: other}
    found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
    raise QuantizationError(
        f"x is on {x.device}, but the layer has {found}: move the layer or its input, so that all are on one"
    )


def has_warp_groups(device: torch.device, columns: int) -> bool:
    """Whether ``streamk_kernel`` runs on a GPU and can serve contiguous planes."""
    return streamk_kernel is not None and _capability(device) == 90 and columns % TILE == 0


def _streams(device: torch.device, groups: int, words: bool, strides: tuple[int, int, int]) -> bool:
    """Whether ``streamk_kernel`` can serve a layer: the copy engine wants rows of codes at multiples of 16 bytes."""
    aligned = words and (strides[0] | strides[1] | strides[2] << 2) % 16 == 0
    return aligned and has_warp_groups(device, groups * SCALE_BLOCK)


def _goes_through_scratch(tokens: int, packed: PackedWeight, bits: int, residual_bits: int) -> bool:
    codes, residual, scales, _ = packed
    rows, groups = scales.shape
    columns = groups * SCALE_BLOCK
    if tokens <= _GATHERED:
        return False
    rest = codes if residual is None else residual
    strides = codes.stride(0), rest.stride(0), scales.stride(0)
    words = _in_words(codes.data_ptr(), _address(residual), scales.data_ptr(), *strides[:2], bits, residual_bits)
    if not words or _capability(codes.device) < 80:
        return True
    return tokens > crossover(residual_bits, rows, columns, _streams(codes.device, groups, words, strides))


@functools.cache
def _rounds_activations() -> bool:
    """Whether many tokens at once may be rounded to 8 bits."""
    value = os.environ.get(INT8_VARIABLE, "0")
    if value not in ("0", "1"):
        raise QuantizationError(f"{INT8_VARIABLE} is {value!r}: 0 or 1 is needed")
    return value == "1"


def _on_device_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Triton launches on the current device: makes that the device of the first argument."""

    @functools.wraps(function)
    def guarded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Not torch.cuda.current_device, which asks first whether CUDA is initialized: there is a tensor on it.
        if x.is_cuda and x.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(x.device):
                return function(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return guarded


# Allocates without the dispatcher, as the code that torch.compile generates does: 1 us instead of 5.
_empty_strided: Callable[..., Tensor] | None = getattr(
    getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None
)


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.new_empty(shape)`` on the current device; the shape has no zero."""
    if _empty_strided is None or not x.is_cuda:
        return x.new_empty(shape)
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return _empty_strided(tuple(shape), tuple(reversed(strides)), x.dtype)


def _empty_bytes(x: Tensor, count: int) -> Tensor:
    if _empty_strided is None or not x.is_cuda:
        return x.new_empty(count, dtype=torch.uint8)
    return _empty_strided((count,), (1,), torch.uint8)


@_on_device_of
def linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> Tensor:
    """``x @ W.T + bias`` with ``x`` [..., in_features] float16, bfloat16 or float32, any strides; same dtype out.

    Constants (signs, Hadamard tiles, levels) are made on the first call per device, format and kernel: before capturing a
    layer into a CUDA graph, run it once with as many tokens.
    """
    _check_devices(x, packed, bias, "bias")
    packed, bias = _with_unit_steps(packed, bias)
    rows = packed.scales.shape[0]
    shape = list(x.shape)
    shape[-1] = rows
    tokens = x.numel() // in_features
    if tokens == 0:
        return x.new_empty(shape)
    out = _empty(x, shape)
    if not x.is_contiguous():
        x = x.reshape(-1, in_features)
        x = x if x.stride(-1) == 1 else x.contiguous()
    layout = (in_features, bits, residual_bits, group_size, seed)
    if tokens >= INT8_TOKENS and x.dtype != torch.float32 and _rounds_activations():
        through_bytes(x.view(tokens, in_features), packed, bias, out.view(tokens, rows), *layout)
    elif x.dtype == torch.float32 or _goes_through_scratch(tokens, packed, bits, residual_bits):
        precise = torch.autocast(x.device.type, enabled=False) if is_autocast_enabled(x) else contextlib.nullcontext()
        with precise:
            through_scratch(x.view(tokens, in_features), packed, bias, out.view(tokens, rows), *layout)
    else:
        fused(x, packed, bias, out, *layout)
    return out


class _Launch:
    """A kernel, its grid and the arguments after its tensors.

    Triton's own launch path costs tens of microseconds of Python, so a kernel that it has compiled is launched directly from
    then on, by addresses: an integer costs the launcher less than a tensor.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tail: tuple[Any, ...],
        warps: int,
        pdl: bool,
        registers: int | None = None,
    ) -> None:
        self.kernel = kernel[grid]
        self.grid = grid
        self.tail = tail
        self.options = dict(num_warps=warps, num_stages=1, **({"launch_pdl": True} if pdl else {}))
        if registers is not None:
            self.options["maxnreg"] = registers
        self.run: Any = None  # once the kernel is compiled
        self.handles: tuple[Any, ...] = ()

    def first(self, tensors: tuple[Any, ...], aligned: bool) -> Any:
        """Through Triton. ``aligned``: what is compiled for these tensors is what :meth:`again` wants."""
        compiled = self.kernel(*tensors, *self.tail, **self.options)
        if not aligned or compiled is None:  # the interpreter returns none
            return compiled
        # What JITFunction.run ends with: metadata and hooks of the launch, which there are none of, are None.
        run = compiled.run
        handles: tuple[Any, ...] = (compiled.function, compiled.packed_metadata, None, None, None)
        if _IS_KNOWN_LAUNCHER and type(run).__name__ == "CudaLauncher":
            # And what CudaLauncher.__call__ ends with, 3 us of Python later. No kernel here needs Triton's scratch memory.
            assert run.global_scratch_size == run.profile_scratch_size == 0
            handles = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *handles[1:])
            run = run.launch
        self._ready(compiled, run, handles)
        return compiled

    def _ready(self, compiled: Any, run: Any, handles: tuple[Any, ...]) -> None:
        """``run`` last: another thread that sees it launches."""
        if self.run is None:
            self.handles = handles
            self.run = run

    def again(self, stream: int, *addresses: int) -> None:
        """For addresses that are multiples of 16."""
        self.run(*self.grid, stream, *self.handles, *addresses, *self.tail)


class _Matrix(NamedTuple):
    """What a tensor map says about an operand, but for its address; ``layout`` is that of a block in shared memory."""

    dtype: torch.dtype
    rows: int
    columns: int
    stride: int
    block: list[int]
    layout: Any


class _MappedLaunch(_Launch):
    """A launch of ``streamk_kernel``, which reads three of its operands through tensor maps of the copy engine."""

    def __init__(self, *arguments: Any, matrices: dict[int, _Matrix]) -> None:
        super().__init__(*arguments)
        self.matrices = matrices  # by position among the tensors
        self.encodings: list[dict[str, Any]] = []
        self.known: dict[tuple[int, int, int], tuple[Any, ...]] = {}  # addresses of the matrices -> arguments

    def first(self, tensors: tuple[Tensor, ...], aligned: bool) -> Any:
        operands: list[Any] = list(tensors)
        for i, matrix in self.matrices.items():
            base = tensors[i].view(matrix.dtype)
            shape, strides = [matrix.rows, matrix.columns], [matrix.stride, 1]
            operands[i] = TensorDescriptor(base, shape, strides, matrix.block, matrix.layout)
        return super().first(tuple(operands), aligned)

    def _ready(self, compiled: Any, run: Any, handles: tuple[Any, ...]) -> None:
        # Triton encodes the maps in every launch, in Python; its C function takes them ready.
        self.encodings = compiled.metadata.tensordesc_meta
        super()._ready(compiled, inspect.getclosurevars(run).nonlocals["launcher"], handles)

    def _encoded(self, addresses: tuple[int, ...]) -> tuple[Any, ...]:
        """The maps, each with its shape and strides, as the kernel's C function wants them. An address decides all of it."""
        out: list[Any] = []
        for address, matrix, encoding in zip(addresses, self.matrices.values(), self.encodings, strict=True):
            base = SimpleNamespace(data_ptr=lambda at=address: at)
            sizes = dict(shape=[matrix.rows, matrix.columns], strides=[matrix.stride, 1], padding="zero")
            out += make_tensordesc_arg(SimpleNamespace(base=base, **sizes), encoding)
        return tuple(out)

    def again(self, stream: int, *addresses: int) -> None:
        x, scale, codes, residual, *others = addresses
        key = (x, codes, residual)
        known = self.known.get(key)
        if known is None:
            if len(self.known) >= _MAPS:
                self.known.clear()
            known = self.known[key] = self._encoded(key)
        self.run(*self.grid, stream, *self.handles, *known[:5], scale, *known[5:], *others, *self.tail)


class _Plan(NamedTuple):
    """Everything about the launches of :func:`fused` that does not depend on addresses."""

    product: _Launch
    rotation: _Launch | None  # None: the product rotates
    constants: tuple[Tensor, ...]  # signs and Hadamard tile, for the kernel that rotates
    levels: tuple[Tensor, ...]
    constant_addresses: tuple[int, ...]
    level_addresses: tuple[int, ...]
    sizes: tuple[int, int, int, int] = (0, 0, 0, 0)  # bytes: offsets of token scales, counters, partial sums; total


@functools.cache
def _lookup_table(bits: int, residual_bits: int, device: torch.device) -> Tensor:
    return torch.tensor(lookup_words(bits, residual_bits), dtype=torch.int32, device=device)


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
    columns = groups * SCALE_BLOCK
    if schedule is None:
        streams = _streams(device, groups, words, strides)
        planes = bits, residual_bits if decoder else None
        schedule = choose(gpu_name(device), tokens, rows, columns, *planes, streams, strides[2] % 4 == 0)
    tiles = -(-groups // 4)
    block = rotation_block(in_features, group_size)
    pdl = _capability(device) >= 90
    has_bias = bias_dtype is not None
    sign = tile_signs(seed, tiles, device, dtype)
    # The arguments of a launch are in the order of the kernel's parameters, constexprs included.
    if isinstance(schedule, Rotating):
        constants: tuple[Tensor, ...] = (sign, outer_matrix(block, device, dtype))
        sizes: tuple[int, ...] = (rows, in_features, groups, *strides)
        tail = in_features != columns or groups % 4 != 0 or tiles % (2 * schedule.warps) != 0
        constexprs = (bits, residual_bits, decoder, has_bias, tail, SLICE_ROWS, schedule.warps, pdl)
        grid = (-(-rows // SLICE_ROWS), 1, 1)
        return _Plan(
            product=_Launch(rotating_kernel, grid, (*sizes, block**-0.5, *constexprs), schedule.warps, pdl),
            rotation=None,
            constants=constants,
            levels=(),
            constant_addresses=tuple(t.data_ptr() for t in constants),
            level_addresses=(),
        )
    sizes = (tokens, rows, groups, tiles * TILE, *strides)
    rotated = 2 * tokens * tiles * TILE
    levels: tuple[Tensor, ...] = ()
    arguments: tuple[Any, ...]
    if isinstance(schedule, Integer):
        assert tokens <= FEW_TOKENS
        assert decoder
        assert schedule.serves(columns)
        assert strides[2] % 4 == 0
        assert not residual_bits
        split, slots = schedule.split, -(-rows // schedule.rows)
        step = schedule.warps * split
        order = NATURAL
        way = schedule.ahead, *ring(bits, schedule.rows, schedule.warps, schedule.ahead)
        layer = rows, tiles, strides[0], strides[2], split, bits, has_bias
        how = schedule.rows, schedule.warps, *way, split > 1, pdl
        if tokens == 1:
            part = schedule.rows
            rotated += META_BYTES * tiles
            product = _Launch(integer_kernel, (slots, split, 1), (*layer, tiles % step != 0, *how), schedule.warps, pdl)
        else:
            part = schedule.rows * FEW_TOKENS
            padded = -(-tiles // step) * step
            rotated = FEW_BYTES * padded
            product = _Launch(few_kernel, (slots, split, 1), (tokens, *layer, *how), schedule.warps, pdl)
        parts = slots * split if split > 1 else 0
    elif isinstance(schedule, Slices):
        assert decoder
        split, slots, part = schedule.split, -(-rows // schedule.rows), schedule.rows * MOST_TOKENS
        tail = groups % 4 != 0 or tiles % (schedule.warps * split) != 0
        looks_up = schedule.looked_up > 0
        order = PAIRED_SLICES if looks_up and not residual_bits else SLICES
        levels = (_lookup_table(bits, residual_bits, device),)
        if looks_up:
            decoder = lookup_assembly(bits, residual_bits, schedule.looked_up)
        arguments = (
            *(*sizes, split, bits, residual_bits, decoder, looks_up, has_bias, tail),
            *(schedule.rows, schedule.warps, split > 1, pdl),
        )
        product = _Launch(slices_kernel, (slots, split, 1), arguments, schedule.warps, pdl)
        parts = slots * split if split > 1 else 0
    elif isinstance(schedule, StreamK):
        row_tiles, token_tiles = -(-rows // (64 * schedule.groups)), -(-tokens // schedule.block_m)
        assert schedule.serves(columns)
        steps = columns // schedule.step
        units = row_tiles * token_tiles * steps
        share = schedule.share(row_tiles * token_tiles, steps, _multiprocessors(device))
        programs = -(-units // share)
        looks_up = schedule.looks_up(rows * columns, bits, residual_bits)
        order = PAIRED if looks_up and not residual_bits else SPLITK
        levels = (_lookup_table(bits, residual_bits, device),)
        rest = residual_bits or bits
        tile = schedule.block_m, schedule.groups
        matrices = {
            0: _Matrix(torch.float16, tokens, tiles * TILE, tiles * TILE, *x_block(schedule.block_m)),
            2: _Matrix(torch.int32, rows, tiles * 4 * bits, strides[0] // 4, *plane_block(*tile, bits)),
            3: _Matrix(torch.int32, rows, tiles * 4 * rest, strides[1] // 4, *plane_block(*tile, rest)),
        }
        arguments = (
            *(tokens, rows, steps, token_tiles, strides[2], share, units),
            *(*schedule, bits, residual_bits, has_bias, looks_up, pdl),
        )
        product = _MappedLaunch(streamk_kernel, (programs, 1, 1), arguments, 4, pdl, registers(*tile), matrices=matrices)
        slots, part = row_tiles * token_tiles * schedule.groups, 64 * schedule.block_m
        parts = 2 * programs * schedule.groups if share % steps else 0
    else:
        split, row_tiles, token_tiles = schedule.split, -(-rows // schedule.block_n), -(-tokens // schedule.block_m)
        tail = groups % 4 != 0
        order, levels = SPLITK, (level_tensor(bits, residual_bits, device),)
        arguments = (
            *(*sizes, split, bits, residual_bits, decoder, has_bias, tail),
            # Stages load the four scales of a row and tile as one word.
            *(schedule.block_m, schedule.block_n, split > 1, 1 if tail or strides[2] % 4 else schedule.stages, pdl),
        )
        product = _Launch(splitk_kernel, (row_tiles, split, token_tiles), arguments, schedule.warps, pdl)
        slots, part = row_tiles * token_tiles, schedule.block_n * schedule.block_m
        parts = slots * split if split > 1 else 0
    constants = (sign, tile_matrix(block, order, device, dtype))
    slots = slots if parts else 0  # nobody counts
    offsets = [0]
    for size in (rotated, 4 * tokens, 4 * slots):
        offsets.append(offsets[-1] + -(-size // 256) * 256)
    total = offsets[3] + 4 * parts * part
    if isinstance(schedule, Integer) and tokens > 1:
        turning = _Launch(
            rotate_few_kernel, (-(-tokens * padded // FEW_TILES), 4, 1),
            (x_stride, tokens, slots, in_features, padded, block**-0.5, FEW_TILES, pdl), 4, pdl,
        )  # fmt: skip
    elif isinstance(schedule, Integer):
        turning = _Launch(
            rotate_bytes_kernel, (-(-tiles // BYTES_TILES), 4, 1),
            (slots, in_features, tiles, block**-0.5, BYTES_TILES, pdl), 4, pdl,
        )  # fmt: skip
    else:
        turn = rotation(tokens, tiles * TILE)
        turning = _Launch(
            rotate_scaled_kernel, (min(tokens, ROTATION_PROGRAMS), turn.parts, 1),
            (x_stride, tokens, slots, in_features, tiles, block**-0.5, turn.tiles, turn.chunk, pdl), turn.warps, pdl,
        )  # fmt: skip
    return _Plan(
        product=product,
        rotation=turning,
        constants=constants,
        levels=levels,
        constant_addresses=tuple(t.data_ptr() for t in constants),
        level_addresses=tuple(t.data_ptr() for t in levels),
        sizes=(offsets[1], offsets[2], offsets[3], total),
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
    stride = x.stride(0) if x.dim() == 2 else in_features
    at_codes, at_residual, at_scales, at_x = codes.data_ptr(), _address(residual), scales.data_ptr(), x.data_ptr()
    at_exponents, at_bias, at_out = exponents.data_ptr(), _address(bias), out.data_ptr()
    plan = _plan(
        x.device, x.dtype, None if bias is None else bias.dtype, x.numel() // in_features, stride,
        rows, groups, (codes.stride(0), rest.stride(0), scales.stride(0)), in_features, bits, residual_bits, group_size,
        seed, _in_words(at_codes, at_residual, at_scales, codes.stride(0), rest.stride(0), bits, residual_bits), schedule,
    )  # fmt: skip
    product, rotation = plan.product, plan.rotation
    aligned = (at_codes | at_residual | at_scales | at_x | at_exponents | at_bias | at_out) & 15 == 0
    planes = codes, rest, scales, exponents, exponents if bias is None else bias
    plane_addresses = at_codes, at_residual or at_codes, at_scales, at_exponents, at_bias or at_exponents
    if rotation is None:
        if aligned and product.run is not None:
            stream = torch._C._cuda_getCurrentRawStream(x.get_device())
            product.again(stream, at_x, *plan.constant_addresses, *plane_addresses, at_out)
        else:
            product.first((x, *plan.constants, *planes, out), aligned)
        return
    scale_at, counters_at, partial_at, total = plan.sizes
    # One allocation for all that lives between the launches: rotated tokens, their scales, counters, partial sums.
    workspace = _empty_bytes(x, total)
    if aligned and product.run is not None and rotation.run is not None:
        base = workspace.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        scale, counters, partial = base + scale_at, base + counters_at, base + partial_at
        rotation.again(stream, at_x, *plan.constant_addresses, base, scale, counters)
        product.again(stream, base, scale, *plane_addresses, *plan.level_addresses, at_out, partial, counters)
        return
    rotated = workspace[:scale_at].view(torch.float16)
    token_scale = workspace[scale_at:counters_at].view(torch.float32)
    counter_views = workspace[counters_at:partial_at].view(torch.int32), workspace[partial_at:].view(torch.float32)
    rotation.first((x, *plan.constants, rotated, token_scale, counter_views[0]), aligned)
    product.first((rotated, token_scale, *planes, *plan.levels, out, counter_views[1], counter_views[0]), aligned)


# Weights that are decoded in the time that the loop over experts needs for one of them.
_WEIGHTS_PER_EXPERT = 110_000_000
_LARGEST_GRID = 65535  # in the second dimension


def is_routed_at_once(
    x: Tensor, packed: PackedWeight, in_features: int, bits: int, residual_bits: int, group_size: int, seed: int
) -> bool:
    """Whether :func:`routed` is to multiply ``x`` [s, in_features] with experts out of a stack, instead of a loop over them.

    It decodes a matrix for each row, a loop once for each expert, but that takes the host 35 us (H100) and a look at the
    number of rows per expert, which a CUDA graph that is being captured cannot have.
    """
    codes, residual, _, _ = packed
    rest = codes if residual is None else residual
    able = (
        x.dtype in (torch.float16, torch.bfloat16)
        and _capability(x.device) >= 80
        and codes.stride(0) % (4 * bits) == 0
        and (residual is None or residual.stride(0) % (4 * residual_bits) == 0)
        and _in_words(codes.data_ptr(), _address(residual), 0, codes.stride(1), rest.stride(1), bits, residual_bits)
    )
    if not able:
        return False
    rows, count = len(x), codes.shape[0]
    if rows > _LARGEST_GRID:
        return False
    few = rows * codes.shape[1] * in_features <= min(rows, count) * _WEIGHTS_PER_EXPERT
    return few or (x.is_cuda and torch.cuda.is_current_stream_capturing())


@functools.lru_cache(maxsize=1024)
def _routed_plan(
    device: torch.device,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    tokens: int,
    x_stride: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    apart: tuple[int, int, int, int],
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> _Plan:
    count, rows, groups = shape
    tiles = -(-groups // 4)
    block = rotation_block(in_features, group_size)
    pdl = _capability(device) >= 90
    warps = rotating(rows * tokens, groups * SCALE_BLOCK, residual_bits).warps
    tail = in_features != groups * SCALE_BLOCK or tiles % (2 * warps) != 0 or groups % 4 != 0
    arguments = (
        *(count, x_stride, rows, in_features, groups, *strides, block**-0.5, *apart),
        *(bits, residual_bits, assembly(bits, residual_bits), tail, SLICE_ROWS, warps, pdl),
    )
    constants = tile_signs(seed, tiles, device, dtype), outer_matrix(block, device, dtype)
    return _Plan(
        product=_Launch(routed_kernel, (-(-rows // SLICE_ROWS), tokens, 1), arguments, warps, pdl),
        rotation=None,
        constants=constants,
        levels=(),
        constant_addresses=tuple(t.data_ptr() for t in constants),
        level_addresses=(),
    )


@_on_device_of
def routed(
    x: Tensor,
    experts: Tensor,
    packed: PackedWeight,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> Tensor:
    """``y[i] = x[i] W[experts[i]]^T``, one launch for ``x`` [s, in_features] and a stack of planes, in any dtype and shape
    that :func:`is_routed_at_once` accepts; zeros for experts beyond the stack."""
    _check_devices(x, packed, experts, "experts")
    packed, _ = _with_unit_steps(packed, None)
    codes, residual, scales, exponents = packed
    rest = codes if residual is None else residual
    out = x.new_empty((len(x), codes.shape[1]))
    if not len(x):
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    experts = experts.contiguous()
    plan = _routed_plan(
        x.device, x.dtype, experts.dtype, len(x), x.stride(0),
        tuple(scales.shape), (codes.stride(1), rest.stride(1), scales.stride(1)),
        (codes.stride(0), rest.stride(0), scales.stride(0), exponents.stride(0)),
        in_features, bits, residual_bits, group_size, seed,
    )  # fmt: skip
    tensors = (x, experts, *plan.constants, codes, rest, scales, exponents, out)
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    aligned = functools.reduce(operator.or_, addresses) & 15 == 0
    if aligned and plan.product.run is not None:
        plan.product.again(torch._C._cuda_getCurrentRawStream(x.get_device()), *addresses)
    else:
        plan.product.first(tensors, aligned)
    return out


def dequantize_rotated(packed: PackedWeight, bits: int, residual_bits: int, dtype: torch.dtype, pdl: bool = False) -> Tensor:
    """The dense matrix [rows, columns] that the planes hold, rotated as stored, in ``dtype``. With ``pdl`` it runs beside
    the launch before it, a :func:`_rotate` with ``pdl``."""
    codes, residual, scales, exponents = packed
    rows, groups = scales.shape
    rest = codes if residual is None else residual
    out = torch.empty((rows, groups * SCALE_BLOCK), dtype=dtype, device=codes.device)
    aligned = _in_words(codes.data_ptr(), _address(residual), 0, codes.stride(0), rest.stride(0), bits, residual_bits)
    words = _capability(codes.device) >= 80 and aligned
    strides = codes.stride(0), rest.stride(0), scales.stride(0), out.stride(0)
    decoder = bfloat_assembly(bits, residual_bits) if words and dtype == torch.bfloat16 else ""
    if decoder:
        units = min(8, triton.next_power_of_2(-(-groups // 16)))
        dequantize_words_kernel[(-(-rows // 4), -(-groups // (16 * units)))](
            codes, rest, scales, exponents, out, rows, groups, *strides,
            BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decoder, UNITS=units, num_warps=8, **_dependent(pdl),
        )  # fmt: skip
        return out
    # Assembly rounds level * scale to half precision: too coarse for float32.
    decoder = assembly(bits, residual_bits) if words and dtype != torch.float32 else ""
    dequantize_kernel[(-(-rows // 32), -(-groups // 4))](
        codes, rest, scales, exponents, level_tensor(bits, residual_bits, codes.device), out, rows, groups, *strides,
        BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decoder, num_warps=4, **_dependent(pdl),
    )  # fmt: skip
    return out


def rotate(x: Tensor, columns: int, block: int, seed: int) -> Tensor:
    """``x`` [tokens, in_features] padded to ``columns`` and rotated, in its dtype: ``rotation.rotate``, one launch."""
    return _rotate(x, columns, columns, block, seed, inverse=False)


def unrotate(x: Tensor, in_features: int, block: int, seed: int) -> Tensor:
    """``x`` [tokens, columns] rotated back and cut to ``in_features``, in its dtype."""
    return _rotate(x, x.shape[1], in_features, block, seed, inverse=True)


def _rotate(
    x: Tensor, columns: int, out_columns: int, block: int, seed: int, inverse: bool, scale: float = 1.0, pdl: bool = False
) -> Tensor:
    tokens, tiles = x.shape[0], -(-columns // TILE)
    out = torch.empty((tokens, out_columns), dtype=x.dtype, device=x.device)
    rotate_kernel[(min(ROTATION_PROGRAMS, -(-tokens * tiles // 64)),)](
        x, x.stride(0), tile_signs(seed, tiles, x.device, x.dtype), tile_matrix(block, NATURAL, x.device, x.dtype),
        out, out_columns, tokens * tiles, x.shape[1], tiles, out_columns, scale * block**-0.5,
        TILES=64, INVERSE=inverse, num_warps=8, **_dependent(pdl),
    )  # fmt: skip
    return out


def _dependent(pdl: bool) -> dict[str, bool]:
    """Launch options: ``pdl`` lets a launch begin before the one in front of it has ended (sm_90)."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _row_parts(packed: PackedWeight, bytes_per_row: int) -> Iterator[tuple[slice, PackedWeight]]:
    """All rows at once, or, for output heads of the largest models, parts whose dense form fits the scratch memory."""
    rows, step = packed.scales.shape[0], max(1, _SCRATCH_BYTES // bytes_per_row)
    if step > 4:  # four rows of any plane are a multiple of 16 bytes, at which assembly wants a plane to begin
        step -= step % 4
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
    block = rotation_block(in_features, group_size)
    pdl = _capability(x.device) >= 90
    scale = 1.0
    if x.dtype == torch.float16:
        # A rotation makes entries up to 128 ** 0.5 times as large, and float16 ends at 65504: 3 bits of the range are the
        # weights' for this product.
        scale = 0.125
        packed = packed._replace(exponents=(packed.exponents.int() + 3).clamp(max=127).to(torch.int8))
    bias = None if bias is None else bias.to(x.dtype)
    # Right before the first dequantization, which needs all that was launched until now, but nothing of the rotation.
    rotated = _rotate(x, columns, columns, block, seed, inverse=False, scale=scale, pdl=pdl)
    for part, planes in _row_parts(packed, columns * x.element_size()):
        dense = dequantize_rotated(planes, bits, residual_bits, x.dtype, pdl)
        pdl = False
        if len(dense) < rows:
            # Not out=: cuBLAS takes a path ten times slower into rows that lie apart.
            out[:, part] = torch.nn.functional.linear(rotated, dense, None if bias is None else bias[part])
        elif bias is None:
            torch.mm(rotated, dense.T, out=out)
        else:
            torch.addmm(bias, rotated, dense.T, out=out)


def through_bytes(
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
    """``reference.linear_in_bytes`` of ``x`` [tokens, in_features], half precision, into ``out`` [tokens, rows]."""
    codes, residual, scales, exponents = packed
    groups = scales.shape[1]
    tokens, columns, device = len(x), groups * SCALE_BLOCK, x.device
    tiles, block = -(-groups // 4), rotation_block(in_features, group_size)
    pdl = _capability(device) >= 90
    rotated = torch.empty((tokens, columns), dtype=torch.int8, device=device)
    token_scale = torch.empty(tokens, dtype=torch.float32, device=device)
    of_token = min(64, triton.next_power_of_2(tiles))
    together, chunks = 64 // of_token, -(-tiles // of_token)
    rotate_round_kernel[(min(-(-tokens // together), ROTATION_PROGRAMS),)](
        x, tile_signs(seed, tiles, device, x.dtype), tile_matrix(block, NATURAL, device, x.dtype), rotated, token_scale,
        tokens, x.stride(0), in_features, tiles, columns, block**-0.5,
        TILES=of_token, TOGETHER=together, CHUNKS=chunks, num_warps=8 if chunks <= 2 else 16, **_dependent(pdl),
    )  # fmt: skip
    rest = codes if residual is None else residual
    aligned = _in_words(codes.data_ptr(), _address(residual), 0, codes.stride(0), rest.stride(0), bits, residual_bits)
    decoder = assembly(bits, residual_bits) if aligned and _capability(device) >= 80 else ""
    programs = _multiprocessors(device) if _capability(device) == 90 else 0
    for part, planes in _row_parts(packed, columns):
        codes, residual, scales, exponents = planes
        rest = codes if residual is None else residual
        count = part.stop - part.start
        tile_m, tile_n, tile_k, warps, stages = bytes_tile(tokens, count, programs)
        weight = torch.empty((count, columns), dtype=torch.int8, device=device)
        row_scale = torch.empty(count, dtype=torch.float32, device=device)
        round_weights_kernel[(-(-count // WEIGHT_ROWS),)](
            codes, rest, scales, exponents, level_tensor(bits, residual_bits, device), weight, row_scale,
            count, groups, codes.stride(0), rest.stride(0), scales.stride(0), columns, levels(bits, residual_bits)[-1],
            BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decoder, GROUPS=triton.next_power_of_2(groups),
            ROWS=WEIGHT_ROWS, UNITS=min(4, triton.next_power_of_2(-(-groups // 32))), num_warps=4, **_dependent(pdl),
        )  # fmt: skip
        pdl = False
        multiply_bytes_kernel[(-(-tokens // tile_m) * -(-count // tile_n),)](
            Descriptor.from_tensor(rotated, [tile_m, tile_k]), Descriptor.from_tensor(weight, [tile_n, tile_k]),
            token_scale, row_scale, row_scale if bias is None else bias[part], out[:, part],
            tokens, count, columns, out.stride(0),
            HAS_BIAS=bias is not None, BLOCK_M=tile_m, BLOCK_N=tile_n, BLOCK_K=tile_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip


@_on_device_of
@keeps_precision
def linear_input_gradient(
    grad: Tensor,
    packed: PackedWeight,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
) -> Tensor:
    """``grad @ W`` with ``grad`` [..., rows] float16, bfloat16 or float32: dequantization, cuBLAS, rotation back."""
    _check_devices(grad, packed, None, "")
    packed, _ = _with_unit_steps(packed, None)
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
