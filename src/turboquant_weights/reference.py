"""The specification, in plain PyTorch: how a weight matrix becomes planes and scales, and back. Runs on every device.

Shapes: weight ``[n, k]``; ``c = padded_features(k)`` stored columns; ``codes`` uint8 ``[n, c*bits/8]``; ``residual`` uint8
``[n, c*residual_bits/8]`` or None; ``scales`` uint8 ``[n, c/32]``; ``exponents`` int8 ``[n]``. Then::

    rotate(W)[i, j] = level(index[i, j]) * scale_value(scales[i, j // 32]) * 2**exponents[i]

Scales are bytes: ``v = m`` for ``e = 0`` and ``(32 + m) << (e - 1)`` otherwise, with ``e`` the high 3 and ``m`` the low 5
bits, i.e. the half-precision number with the bits ``byte << 5``, times 2**19. A power of two per row puts the largest
scale of the row into the top octave. So every tensor is an integer tensor (``.half()`` leaves it alone), a scale costs
0.25 bit per weight, and a GPU decodes it with one shift.

The scale of a block is searched, not computed from its norm: of the representable scales around the norm's, the one with
the least squared error wins. That takes a quarter of the error away at 4 bits. The search is exact for the three best of a
ranking that reads each entry's error from a table over magnitudes (one ``embedding_bag`` per chunk of rows).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .codebook import UNIT, boundary_tensor, level_tensor, levels
from .errors import QuantizationError
from .packing import pack, packed_columns, unpack
from .rotation import (
    SCALE_BLOCK,
    cached_constant,
    keeps_precision,
    pad_columns,
    padded_features,
    rotate,
    rotation_block,
    unrotate,
)

# Elements handled at a time: bounds the temporary memory, 32 to 40 bytes per element at the peak of the search. A CPU is
# fastest where its caches hold the chunk, a GPU where launches do not count.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, (1 << 19, 1 << 21)
_CHECK_CHUNK = 1 << 20
_DECODE_CHUNK = 1 << 21
# Search window, scale over RMS, by total bits: finer codebooks clip less and want smaller scales.
_WINDOW = {
    2: (0.60, 1.60),
    3: (0.64, 1.45),
    4: (0.66, 1.38),
    5: (0.62, 1.26),
    6: (0.60, 1.20),
    7: (0.56, 1.16),
    8: (0.54, 1.16),
}
_BINS = 2048
_EXACT = 3
TOP_OCTAVE = 11  # the largest scale value lies in [2**11, 2**12)
# Of the int8 exponents, those above 100 are forbidden: decoded values and their sums over a block stay finite in float32.
MIN_EXPONENT, MAX_EXPONENT = -128, 100


class PackedWeight(NamedTuple):
    """One quantized matrix, in the canonical byte order of FORMAT.md."""

    codes: Tensor
    residual: Tensor | None
    scales: Tensor
    exponents: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if t is not None)

    @classmethod
    def join(cls, parts: list[PackedWeight]) -> PackedWeight:
        """One matrix from parts of its rows."""
        residuals = [part.residual for part in parts if part.residual is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat(residuals) if residuals else None,
            torch.cat([part.scales for part in parts]),
            torch.cat([part.exponents for part in parts]),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        """``change`` applied to every plane."""
        residual = None if self.residual is None else change(self.residual)
        return PackedWeight(change(self.codes), residual, change(self.scales), change(self.exponents))

    @classmethod
    def stack(cls, parts: list[PackedWeight]) -> PackedWeight:
        """Matrices of one shape behind one another: planes with a dimension more."""
        residuals = [part.residual for part in parts if part.residual is not None]
        return cls(
            torch.stack([part.codes for part in parts]),
            torch.stack(residuals) if residuals else None,
            torch.stack([part.scales for part in parts]),
            torch.stack([part.exponents for part in parts]),
        )

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Rows ``start`` to ``stop - 1`` as a matrix of their own."""
        return self.map(lambda plane: plane[start:stop])


class Quantized(NamedTuple):
    """Result of :func:`quantize_weight`; ``error`` is ``||W - W'||^2 / ||W||^2`` (0 for a zero matrix)."""

    weight: PackedWeight
    error: float


def packed_shapes(
    out_features: int, in_features: int, bits: int, residual_bits: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the stored tensors of one layer."""
    columns = padded_features(in_features)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((out_features, packed_columns(columns, bits)), torch.uint8),
        "scales": ((out_features, columns // SCALE_BLOCK), torch.uint8),
        "exponents": ((out_features,), torch.int8),
    }
    if residual_bits:
        shapes["residual"] = ((out_features, packed_columns(columns, residual_bits)), torch.uint8)
    return shapes


def packed_bytes(out_features: int, in_features: int, bits: int, residual_bits: int) -> int:
    """Stored bytes of one matrix: planes, scales and exponents."""
    shapes = packed_shapes(out_features, in_features, bits, residual_bits).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def empty_planes(
    out_features: int, in_features: int, bits: int, residual_bits: int, device: torch.device | str
) -> PackedWeight:
    """Planes of one matrix, to be written."""
    shapes = packed_shapes(out_features, in_features, bits, residual_bits)
    planes = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    return PackedWeight(planes["codes"], planes.get("residual"), planes["scales"], planes["exponents"])


@functools.cache
def scale_values() -> tuple[int, ...]:
    """The 256 values of a scale byte, ascending: 0, 1, ..., 63, 64, 66, ..., 4032."""
    return tuple(b & 31 if b < 32 else (32 + (b & 31)) << ((b >> 5) - 1) for b in range(256))


@cached_constant
def scale_tensor(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(scale_values(), dtype=dtype, device=device)


@cached_constant
def scale_boundaries(device: torch.device) -> Tensor:
    values = torch.tensor(scale_values(), dtype=torch.float32)
    return ((values[1:] + values[:-1]) / 2).to(device)


def nearest_index(x: Tensor, boundaries: Tensor) -> Tensor:
    return torch.bucketize(x, boundaries, out_int32=True)


@cached_constant
def _search_table(bits: int, residual_bits: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Candidate scales [96] (three octaves around 1), squared error [bins, 96] of a magnitude bin, bins per unit."""
    candidates = torch.cat([(32 + torch.arange(32)) / 32 * octave for octave in (0.5, 1.0, 2.0)])
    largest = 2 * UNIT[bits] * SCALE_BLOCK**0.5  # a block's RMS, in these units, is below 2 * UNIT
    magnitudes = (torch.arange(_BINS) + 0.5) * (largest / _BINS)
    ratio = magnitudes[:, None] / candidates[None, :]
    nearest = level_tensor(bits, residual_bits)[nearest_index(ratio, boundary_tensor(bits, residual_bits)).long()]
    errors = ((ratio - nearest) * candidates[None, :]).square()
    return candidates.to(device), errors.to(device), _BINS / largest


def rank_scales(blocks: Tensor, rms: Tensor, bits: int, residual_bits: int, count: int = _EXACT) -> Tensor:
    """Blocks [b, 32] with their RMS [b]: the most promising scales [b, count], best first (of a zero block: zeros)."""
    candidates, errors, bins_per_unit = _search_table(bits, residual_bits, blocks.device)
    unit_rms = rms / UNIT[bits]
    octave = torch.exp2(torch.frexp(unit_rms)[1].float() - 1)  # power of two: unit_rms / octave lies in [1, 2)
    step = torch.where(rms > 0, bins_per_unit / octave, 0)
    bins = (blocks.abs() * step[:, None]).int().clamp_(max=_BINS - 1)
    estimate = torch.nn.functional.embedding_bag(bins, errors, mode="sum")
    del bins  # the peak of the memory comes now
    low, high = _WINDOW[bits + residual_bits]
    fraction = candidates[None, :] * (octave / unit_rms)[:, None]
    estimate.masked_fill_(fraction < low, torch.inf).masked_fill_(fraction > high, torch.inf)
    del fraction
    best = estimate.topk(count, 1, largest=False).indices
    return torch.where(rms > 0, octave, 0)[:, None] * candidates[best]


def _quantize_rows(rows: Tensor, bits: int, residual_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated float32 rows [r, c] of magnitude about one -> index uint8 [r, c], scales uint8 [r, c/32], exponents
    int32 [r], squared error float32 [r]."""
    table = level_tensor(bits, residual_bits, rows.device)
    boundaries = boundary_tensor(bits, residual_bits, rows.device)
    values = scale_tensor(rows.device, torch.float32)
    blocks = rows.view(-1, SCALE_BLOCK)
    ranked = rank_scales(blocks, blocks.square().mean(1).sqrt(), bits, residual_bits)
    largest = ranked[:, 0].view(rows.shape[0], -1).amax(1)
    exponents = torch.where(largest > 0, torch.frexp(largest)[1] - 1 - TOP_OCTAVE, 0)
    per_block = torch.exp2(exponents.float()).repeat_interleave(rows.shape[1] // SCALE_BLOCK)

    best: tuple[Tensor, Tensor, Tensor] | None = None  # error, byte, index
    for choice in range(_EXACT):
        byte = nearest_index(ranked[:, choice] / per_block, scale_boundaries(rows.device))
        scale = (values[byte.long()] * per_block)[:, None]
        index = nearest_index(torch.where(scale > 0, blocks / scale, 0), boundaries)
        error = table[index.long()].mul_(scale).sub_(blocks).square_().sum(1)
        index = index.to(torch.uint8)
        if best is None:
            best = error, byte, index
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, byte, best[1]),
                torch.where(better[:, None], index, best[2]),
            )
    assert best is not None
    error, byte, index = best
    return (
        index.view(rows.shape),
        byte.to(torch.uint8).view(rows.shape[0], -1),
        exponents,
        error.view(rows.shape[0], -1).sum(1),
    )


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of ``tensor`` [r, ...] that are small enough to be converted to another dtype."""
    return tensor.split(max(1, _CHECK_CHUNK // max(1, tensor[:1].numel())))


def squared_norm(matrix: Tensor) -> float:
    """Sum of the squares of all entries, in bounded memory."""
    return float(torch.stack([part.float().square().sum(dtype=torch.float64) for part in _parts(matrix)]).sum())


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises QuantizationError, with the position, unless every entry of ``tensor`` is finite in float32."""
    # The sum is finite only if every entry is, up to overflow; the slow search runs when something looks wrong. In parts: a
    # CPU converts all that it sums before it begins, and a layer in float32 is twice what the checkpoint has.
    parts = _parts(tensor)
    if torch.isfinite(torch.stack([part.sum(dtype=torch.float32) for part in parts])).all():
        return
    start = 0
    for part in parts:
        wrong = (~torch.isfinite(part.float())).nonzero()
        if len(wrong):
            position = [int(i) for i in wrong[0]]
            position[0] += start
            raise QuantizationError(
                f"{name}{position} is {tensor[tuple(position)].item()}: weights must be finite in float32. "
                "Repair the checkpoint, or leave the layer out with skip=[...]"
            )
        start += part.shape[0]


def check_matrix(weight: Tensor, name: str) -> None:
    """Raises QuantizationError unless ``weight`` is a non-empty, finite, floating-point matrix."""
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise QuantizationError(
            f"{name}: got a {weight.dtype} tensor of shape {tuple(weight.shape)}: "
            "a non-empty floating-point matrix [out_features, in_features] is needed"
        )
    check_finite(weight, f"{name}: weight")


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    *,
    bits: int = 4,
    residual_bits: int = 0,
    group_size: int = 128,
    seed: int = 0,
    name: str = "weight",
) -> Quantized:
    """Quantizes a floating-point matrix ``[n, k]`` without data, on the device it is on, from its float32 values.

    Rows are independent: quantizing rows apart and concatenating the results gives the same planes up to the rounding of
    the rotation. ``name`` is used in errors.

    Raises:
        QuantizationError: not a matrix, not floating point, or an entry is NaN, infinite or above about 1e34.
    """
    check_matrix(weight, name)
    if weight.device.type == "mps":  # Metal has neither float64 nor frexp, and shares the processor's memory
        layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
        planes, relative = quantize_weight(weight.cpu(), **layout, name=name)
        return Quantized(planes.map(lambda plane: plane.to(weight.device)), relative)
    k = weight.shape[1]
    columns, block = padded_features(k), rotation_block(k, group_size)
    # Planes are written where they will stay: collected and joined, those of a large layer would be there twice.
    planes = empty_planes(weight.shape[0], k, bits, residual_bits, weight.device)
    # On the device: asking for a number would make a GPU wait for each chunk.
    error = norm = torch.zeros((), dtype=torch.float64, device=weight.device)
    largest = torch.full((), MIN_EXPONENT, dtype=torch.int32, device=weight.device)
    step = max(1, _chunk(weight) // columns)
    for start in range(0, weight.shape[0], step):
        chunk = weight[start : start + step]
        part, chunk_error, chunk_norm, exponent = _quantize_chunk(chunk, columns, block, bits, residual_bits, seed)
        for plane, rows in zip(planes, part, strict=True):
            if plane is not None and rows is not None:
                plane[start : start + step] = rows
        error, norm, largest = error + chunk_error, norm + chunk_norm, torch.maximum(largest, exponent)
    if int(largest) > MAX_EXPONENT:
        raise QuantizationError(
            f"{name}: entries up to {float(weight.abs().max()):.3g} are too large: about 1e34 is the limit. "
            "Repair the checkpoint, or leave the layer out with skip=[...]"
        )
    return Quantized(planes, float(error / norm) if norm else 0.0)


def _chunk(weight: Tensor) -> int:
    """Elements handled at a time. A GPU takes 2.8 ms of launches for a chunk of any size, so chunks grow with the matrix:
    the working space is about as large as the matrix itself in bf16, within bounds."""
    if weight.device.type == "cpu":
        return _CPU_CHUNK
    least, most = _GPU_CHUNK
    return min(max(weight.numel() // 16, least), most)


def _quantize_chunk(
    weight: Tensor, columns: int, block: int, bits: int, residual_bits: int, seed: int
) -> tuple[PackedWeight, Tensor, Tensor, Tensor]:
    """Rows [r, k] -> their planes, squared error and squared norm (float64), and largest exponent before it is cut."""
    k = weight.shape[1]
    rows = weight.float()
    # Powers of two per row keep squares inside float32 for any magnitude, and change no digit.
    shift = torch.frexp(rows.abs().amax(1))[1].clamp(-126, 126)
    rows = rotate(pad_columns(rows * torch.exp2(-shift.float())[:, None], columns), block, seed)
    index, scales, exponents, row_error = _quantize_rows(rows, bits, residual_bits)
    exponents = exponents + shift
    largest = exponents.max()
    # Below 2**-128 there is no exponent left: such a row is zero (its entries are below 1e-34), and the error says so.
    lost = exponents < MIN_EXPONENT
    scales = torch.where(lost[:, None], 0, scales)
    row_error = torch.where(lost, rows.square().sum(1), row_error)
    exponents = exponents.clamp(MIN_EXPONENT, MAX_EXPONENT).to(torch.int8)
    codes = pack(index >> residual_bits if residual_bits else index, bits)
    residual = pack(index & ((1 << residual_bits) - 1), residual_bits) if residual_bits else None
    part = PackedWeight(codes, residual, scales, exponents)
    if columns != k:  # what fell on the padding is dropped by whoever decodes: it is no error
        difference = unrotate(rows, block, seed)
        difference -= unrotate(_decode_rows(part, bits, residual_bits) * torch.exp2(-shift.float())[:, None], block, seed)
        row_error = difference[:, :k].square().sum(1)
    # Relative to the matrix: put the rows' powers of two back, in float64.
    weights = torch.exp2(2 * shift.double())
    error = (row_error.double() * weights).sum()
    return part, error, (rows.square().sum(1).double() * weights).sum(), largest


@cached_constant
def _pair_table(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 8 / bits]: all levels of a packed byte at once, for widths that divide 8."""
    byte = torch.arange(256)
    fields = torch.stack([(byte >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1)
    return torch.tensor(levels(bits), dtype=dtype)[fields].to(device)


def _decode_rows(packed: PackedWeight, bits: int, residual_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotated weights [n, c] of ``dtype``. The product level * scale is rounded once to ``dtype``."""
    codes = packed.codes
    if packed.residual is not None:
        index = (unpack(codes, bits) << residual_bits) | unpack(packed.residual, residual_bits)
        decoded = level_tensor(bits, residual_bits, codes.device)[index.int()]
    elif 8 % bits == 0:
        table = _pair_table(bits, codes.device, torch.float32)
        decoded = torch.nn.functional.embedding(codes.int(), table).flatten(-2)
    else:
        decoded = level_tensor(bits, 0, codes.device)[unpack(codes, bits).int()]
    scale = scale_tensor(codes.device, torch.float32)[packed.scales.int()]
    scale = torch.ldexp(scale, packed.exponents[:, None].int())
    blocks = decoded.unflatten(-1, (-1, SCALE_BLOCK)) * scale[..., None]
    return blocks.flatten(-2).to(dtype)


def dequantize_weight(
    packed: PackedWeight,
    in_features: int,
    *,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix ``[n, k]`` that the planes stand for, computed in float32 and rounded once to ``dtype``."""
    block = rotation_block(in_features, group_size)

    def decode(part: PackedWeight) -> Tensor:
        rows = unrotate(_decode_rows(part, bits, residual_bits), block, seed)[:, :in_features].to(dtype)
        return rows.contiguous()  # as the op's fake kernel says, and without the padding

    parts = _row_chunks(packed, _DECODE_CHUNK)
    if len(parts) == 1:
        return decode(packed)
    out = torch.empty(packed.scales.shape[0], in_features, dtype=dtype, device=packed.codes.device)
    for target, part in zip(out.split(parts[0].scales.shape[0]), parts, strict=True):
        target.copy_(decode(part))
    return out


def embedding(
    ids: Tensor,
    packed: PackedWeight,
    embedding_dim: int,
    *,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """``W[ids]`` of ``dtype`` for ids of any shape: only the planes of those rows are read and decoded."""
    flat = ids.reshape(-1)
    rows = packed.map(lambda plane: plane.index_select(0, flat))
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
    return dequantize_weight(rows, embedding_dim, **layout, dtype=dtype).view(*ids.shape, embedding_dim)


def relative_error(
    weight: Tensor, packed: PackedWeight, *, bits: int, residual_bits: int, group_size: int, seed: int
) -> float:
    """``||W - W'||^2 / ||W||^2`` of planes that stand for ``weight`` [n, k]; 0 for a zero matrix."""
    error = norm = 0.0
    start = 0
    for part in _row_chunks(packed):
        rows = weight[start : start + part.scales.shape[0]].double()
        start += part.scales.shape[0]
        decoded = dequantize_weight(
            part, weight.shape[1], bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed
        )
        error += float((rows - decoded).square().sum())
        norm += float(rows.square().sum())
    return error / norm if norm else 0.0


@keeps_precision
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
    """``x @ W.T + bias`` with ``x`` [..., k] of any floating dtype; the result has that dtype.

    The activation is rotated in float32 and rounded once; the decoded weight is rounded to the activation's dtype.
    """
    block = rotation_block(in_features, group_size)
    columns = packed.scales.shape[-1] * SCALE_BLOCK
    rotated = rotate(pad_columns(x.float(), columns), block, seed).to(x.dtype)
    parts = [rotated @ _decode_rows(part, bits, residual_bits, x.dtype).T for part in _row_chunks(packed)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out if bias is None else out + bias.to(out.dtype)


@keeps_precision
def linear_in_bytes(
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
    """:func:`linear` with one signed byte per weight and activation: what a GPU computes for many tokens if it is asked to.

    The largest level of a row becomes 127, and so does the largest entry of a rotated token.
    """
    block = rotation_block(in_features, group_size)
    columns = packed.scales.shape[-1] * SCALE_BLOCK
    rotated = rotate(pad_columns(x.float(), columns), block, seed)
    token_scale = rotated.abs().amax(-1, keepdim=True) / 127
    rotated = (rotated / token_scale.clamp(min=2.0**-120)).round()
    top = scale_tensor(x.device, torch.float32)[packed.scales.int()].amax(-1) * levels(bits, residual_bits)[-1]
    row_scale = torch.ldexp(top / 127, packed.exponents.int())
    weight = (_decode_rows(packed, bits, residual_bits) / row_scale.clamp(min=1e-38)[:, None]).round()
    out = (rotated.double() @ weight.double().T).float() * token_scale * row_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


@keeps_precision
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
    """``grad @ W`` with ``grad`` [..., n]: the gradient of :func:`linear` with respect to ``x``."""
    block = rotation_block(in_features, group_size)
    total = None
    start = 0
    for part in _row_chunks(packed):
        stop = start + part.scales.shape[0]
        term = (grad[..., start:stop] @ _decode_rows(part, bits, residual_bits, grad.dtype)).float()
        total = term if total is None else total + term
        start = stop
    assert total is not None
    return unrotate(total, block, seed)[..., :in_features].to(grad.dtype).contiguous()


def routed(x: Tensor, experts: Tensor, count: int, width: int, multiply: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``x`` [s, k] and the expert of each row, integers [s], to [s, width]: ``multiply(rows, e)`` is called once for each
    expert that has rows. A row whose expert is negative or from ``count`` on (what expert parallelism gives away) becomes
    zeros.

    The rows are sorted by expert first; their number per expert is the only thing that is waited for on a GPU.
    """
    experts = experts.where(experts >= 0, count)
    order = experts.argsort(stable=True)
    sizes = torch.bincount(experts, minlength=count)[:count].tolist()
    given = x[order]
    parts = []
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            parts.append(multiply(given[start : start + size], expert))
            start += size
    if start < len(order):
        parts.append(x.new_zeros(len(order) - start, width))
    if not parts:
        return x.new_zeros(0, width)
    # Put back by a gather, not by writing into an empty tensor: that has a gradient, and no duplicates.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return torch.cat(parts)[inverse]


def _row_chunks(packed: PackedWeight, elements: int = 1 << 24) -> list[PackedWeight]:
    """Cuts the rows so that decoding needs bounded memory."""
    step = max(1, elements // max(1, packed.scales.shape[1] * SCALE_BLOCK))
    if packed.scales.shape[0] <= step:
        return [packed]
    columns = [(None,) * len(range(0, packed.scales.shape[0], step)) if t is None else t.split(step) for t in packed]
    return [PackedWeight(*part) for part in zip(*columns, strict=True)]
