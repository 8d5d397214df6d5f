"""Calibrated rounding of one matrix: error feedback in the rotated basis (GPTQ, Frantar et al. 2022; LDLQ, Chee et al.
2023).

What: rounding ``W`` [n, k] for inputs ``x`` changes the output by ``(W - W') x``, on average over a text by ``tr((W -
W') H (W - W')^T)`` with ``H = E[x x^T]``. Columns are rounded in order, and the error of each is made up for in the
columns still to come: with ``U`` the upper Cholesky factor of ``H^-1``, ``W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:]``.
Afterwards the loss is the sum of ``((w_j - q_j) / U_jj)^2``, a plain sum over columns: that is what makes a good choice
of scales possible.

Ours: it runs in the basis in which weights are stored, and the rotation keeps compensated weights Gaussian, so the
fixed codebook stays right. The scale of a block of 32 columns is chosen when the block's turn comes, on its compensated
weights, by running the feedback inside the block for several candidates at once and keeping the one whose loss is
smallest: the search sees ``H``, not only the weights.

Order: the rotation makes the diagonal of ``H`` flat inside its own blocks, not across them. Blocks of 32 columns take
their turns by falling energy of their inputs (GPTQ's act-order, by blocks): the last ones have nothing after them that
could make up for their errors, and should matter least.

Sweeps: what the first pass leaves is improved by coordinate descent. Block by block, given the errors of all the others,
the best real values of a block are known; they are rounded as before, with feedback inside the block alone, and the result
is kept where the loss falls.

Drift: the inputs of a layer have changed, since the layers before it are quantized already. With ``x`` the original
inputs and ``x'`` what arrives now, the best target is not ``W`` but the ``W*`` that minimises ``E |W x - W* x'|^2``,
i.e. ``W + W (C - H) H^-1`` with ``C = E[x x'^T]`` and ``H = E[x' x'^T]`` (as in GPTAQ, Li et al. 2025, and Qronos,
Zhang et al. 2025). Rounding then makes up for earlier errors, too.

Cost: ``n k^2`` multiply-adds for the updates, twice that per sweep, and ``k^3`` for the factors, in float32 (factors of up
to 4,096 columns in float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .codebook import boundary_tensor, level_tensor
from .cpu import feedback as cpu
from .cpu.library import chosen
from .errors import QuantizationError
from .ops import has_triton
from .packing import pack
from .reference import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    TOP_OCTAVE,
    PackedWeight,
    check_matrix,
    nearest_index,
    rank_scales,
    scale_boundaries,
    scale_tensor,
)
from .rotation import SCALE_BLOCK, pad_columns, padded_features, rotate, rotation_block

DAMPING = 0.03  # of the mean diagonal of H; ten times more for each factorisation that fails
_ATTEMPTS = 6
_CANDIDATES = 4  # scales per block for which the feedback is run
_SWEEPS = 2  # of coordinate descent after it
_LARGEST_DOUBLE = 4096  # columns up to which the factors are computed in float64
_ROWS = 8192  # rows at a time: bounds the temporary memory of the search
# Second moments of few inputs are fitted by noise: white noise as strong as the inputs, divided by this many inputs per
# column, makes up for that where it matters.
ROWS_PER_COLUMN = 8
_STRIP = 256  # columns: on a CPU only what lies on or above the diagonal of `H` is summed up, in strips


class Moments:
    """Second moments of the inputs of a layer over a text, accumulated in float32: ``H = E[x' x'^T]``, ``C = E[x x'^T]``."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.drift = torch.zeros_like(self._upper)  # C - H
        self.count = 0
        # A GPU would rather have one large product.
        self._strip = _STRIP if device.type == "cpu" else max(1, in_features)

    @property
    def now(self) -> Tensor:
        """``H`` times the number of inputs, [k, k]."""
        return self._upper.triu() + self._upper.triu(1).T

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """``inputs`` [..., k] as they arrive now; ``original``, of the same shape, before anything was quantized."""
        columns = self._upper.shape[0]
        inputs = inputs.reshape(-1, columns).float()
        for start in range(0, columns, self._strip):
            strip = slice(start, start + self._strip)
            self._upper[strip, start:].addmm_(inputs[:, strip].T, inputs[:, start:])
        if original is not None:
            difference = original.reshape(inputs.shape).to(torch.float32, copy=True).sub_(inputs)
            self.drift.addmm_(difference.T, inputs)
        self.count += inputs.shape[0]

    def add_white(self, share: float) -> None:
        """Adds uncorrelated inputs with ``share`` of the mean square: each column then matters for itself, too."""
        self._upper.diagonal().add_(share * self._upper.diagonal().mean())

    def feedback(self, group_size: int, seed: int) -> Feedback:
        """What :func:`quantize_weight_calibrated` needs, for layers with these inputs."""
        hessian = rotated_moments(self.now, group_size, seed)
        order = block_order(hessian)
        columns = columns_of(order)
        factor, scale, damping = feedback_factor(hessian[columns[:, None], columns])
        correction = None
        if self.drift.any():
            # W + W (C - H) H^-1 is a regression of k unknowns per output on `count` samples: with few samples it would fit
            # noise, so its damping has the share k / count in addition.
            dtype = _working_dtype(factor.shape[0])
            damped = hessian.to(dtype) / scale
            damped.diagonal().add_(DAMPING + factor.shape[0] / self.count)
            drift = rotated_moments(self.drift, group_size, seed).to(dtype) / scale
            correction = torch.cholesky_solve(drift.T, torch.linalg.cholesky(damped)).T.float()
            del damped, drift
        hessian = hessian[columns[:, None], columns].div_(scale)  # once more: kept, it would be memory at the peak above
        hessian.diagonal().add_(damping)
        return Feedback(order, factor, hessian, correction)


class Feedback(NamedTuple):
    """Of a layer's rotated inputs, whose blocks of 32 columns take their turns in ``order`` int64 [c / 32]. In that order:
    ``hessian`` ``H`` [c, c] with a mean diagonal of one, damped, and ``factor`` ``U`` [c, c], the upper one of its inverse.
    In the natural order: ``correction`` [c, c]; the target is ``W + W correction``."""

    order: Tensor
    factor: Tensor
    hessian: Tensor
    correction: Tensor | None


def block_order(hessian: Tensor) -> Tensor:
    """Blocks of 32 columns by falling energy, int64 [c / 32]."""
    return hessian.diagonal().view(-1, SCALE_BLOCK).sum(1).argsort(descending=True, stable=True)


def columns_of(order: Tensor) -> Tensor:
    """The columns of blocks in ``order`` [b], int64 [b * 32]."""
    return (order[:, None] * SCALE_BLOCK + torch.arange(SCALE_BLOCK, device=order.device)).flatten()


def rotated_moments(moments: Tensor, group_size: int, seed: int) -> Tensor:
    """Second moments [k, k] of a layer's inputs -> those of the padded, rotated ones [c, c]. Same dtype."""
    columns, block = padded_features(moments.shape[0]), rotation_block(moments.shape[0], group_size)
    half = rotate(pad_columns(moments, columns), block, seed)
    return rotate(pad_columns(half.T.contiguous(), columns), block, seed).T.contiguous()


def _working_dtype(size: int) -> torch.dtype:
    return torch.float64 if size <= _LARGEST_DOUBLE else torch.float32


def feedback_factor(hessian: Tensor) -> tuple[Tensor, float, float]:
    """Upper Cholesky factor ``U`` [c, c] of ``(H / scale + damping)^-1 = U^T U`` in float32, ``scale``, the mean diagonal,
    and ``damping``.

    Inputs that never occurred (a zero diagonal) and rank-deficient Hessians (one token of text) are what the damping is
    for: it grows until the factorisation succeeds.

    Raises:
        QuantizationError: ``hessian`` has a NaN or Inf, or cannot be factorised whatever the damping.
    """
    return _factorised(hessian, _upper_factor_of_inverse)


def _upper_factor_of_inverse(damped: Tensor) -> tuple[Tensor, bool]:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return damped, False
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, not failed


def _conditional_deviations(damped: Tensor) -> tuple[Tensor, bool]:
    """``1 / U_jj`` [c]: of each input what those after it do not predict."""
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    return lower.diagonal().flip(0), not failed


def _factorised(hessian: Tensor, factorise: Callable[[Tensor], tuple[Tensor, bool]]) -> tuple[Tensor, float, float]:
    """``factorise`` of the damped matrix with a mean diagonal of one, in float32, that mean, and the damping."""
    if not torch.isfinite(hessian).all():
        raise QuantizationError(
            "the second moments of the calibration inputs have NaN or Inf: the model overflows in its dtype; load it in "
            "bfloat16 or float32"
        )
    size = hessian.shape[0]
    work = hessian.to(_working_dtype(size))
    mean = float(work.diagonal().mean())
    if mean <= 0:  # no input at all: nothing to feed back
        return factorise(torch.eye(size, dtype=torch.float32, device=hessian.device))[0], 1.0, 1.0
    work = work / mean
    damping = DAMPING
    for _ in range(_ATTEMPTS):
        found, succeeded = factorise(work + damping * torch.eye(size, dtype=work.dtype, device=work.device))
        if succeeded and torch.isfinite(found).all():
            return found.float(), mean, damping
        damping *= 10
    raise QuantizationError(
        f"the second moments of {size} calibration inputs cannot be factorised, even with {damping / 10:g} times "
        "their mean added to the diagonal: check the model for overflow"
    )


def feedback_gain(hessian: Tensor) -> float:
    """What feedback leaves of the loss of rounding, as the inputs alone tell it: the mean of ``1 / U_jj^2`` over the mean
    diagonal of ``H``, if the errors before feedback are white. The sweeps take about another twentieth of any layer's.

    ``1 / U_jj^2`` is what is left of input ``j`` when those after it have predicted it, so one Cholesky factor of ``H`` with
    its columns in reverse is enough.

    Raises:
        QuantizationError: as :func:`feedback_factor`.
    """
    columns = columns_of(block_order(hessian))
    return float(_factorised(hessian[columns[:, None], columns], _conditional_deviations)[0].square().mean())


@torch.no_grad()
def quantize_weight_calibrated(
    weight: Tensor,
    feedback: Feedback,
    *,
    bits: int = 4,
    residual_bits: int = 0,
    group_size: int = 128,
    seed: int = 0,
    name: str = "weight",
) -> PackedWeight:
    """Quantizes ``weight`` [n, k] with the error feedback of :meth:`Moments.feedback`.

    The relative error of the weight is higher than that of ``reference.quantize_weight``: it is the error of the outputs
    that is lower.

    Raises:
        QuantizationError: as ``reference.quantize_weight``.
    """
    check_matrix(weight, name)
    k = weight.shape[1]
    columns, block = padded_features(k), rotation_block(k, group_size)
    correction = feedback.correction
    assert feedback.factor.shape == (columns, columns), f"factor {tuple(feedback.factor.shape)} for {columns} columns"
    turns, places = columns_of(feedback.order), feedback.order.argsort()
    parts = []
    for rows in weight.split(_ROWS):
        rows = rows.float()
        shift = torch.frexp(rows.abs().amax(1))[1].clamp(-126, 126)
        rows = rotate(pad_columns(rows * torch.exp2(-shift.float())[:, None], columns), block, seed)
        if correction is not None:
            rows = rows + rows @ correction
        index, scales, exponents = _quantize_rows(rows[:, turns], feedback, bits, residual_bits)
        index, scales = index[:, columns_of(places)], scales[:, places]
        exponents = exponents + shift
        if int(exponents.max()) > MAX_EXPONENT:
            raise QuantizationError(
                f"{name}: entries up to {float(weight.abs().max()):.3g} are too large: about 1e34 is the limit. "
                "Repair the checkpoint, or leave the layer out with skip=[...]"
            )
        scales = torch.where((exponents < MIN_EXPONENT)[:, None], 0, scales)
        exponents = exponents.clamp(min=MIN_EXPONENT).to(torch.int8)
        residual = pack(index & ((1 << residual_bits) - 1), residual_bits) if residual_bits else None
        parts.append(PackedWeight(pack(index >> residual_bits, bits), residual, scales, exponents))
    return PackedWeight.join(parts)


def _quantize_rows(target: Tensor, feedback: Feedback, bits: int, residual_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated float32 rows [r, c], columns in the order of ``feedback`` -> index uint8 [r, c], scales uint8 [r, c / 32],
    exponents int32 [r]."""
    rows, factor = target.clone(), feedback.factor
    count, columns = rows.shape
    index = torch.empty(count, columns, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(count, columns // SCALE_BLOCK, dtype=torch.uint8, device=rows.device)
    exponents = _row_exponents(rows, bits, residual_bits)
    power = torch.exp2(exponents.float())
    for start in range(0, columns, SCALE_BLOCK):
        stop = start + SCALE_BLOCK
        codes, byte, errors, _ = _round_block(
            rows[:, start:stop], power, factor[start:stop, start:stop], bits, residual_bits
        )
        index[:, start:stop] = codes
        scales[:, start // SCALE_BLOCK] = byte
        if stop < columns:
            rows[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    del rows
    _sweep(target, index, scales, power, feedback.hessian, bits, residual_bits)
    return index, *_normalized(scales, exponents)


def _round_block(
    block: Tensor, power: Tensor, factor: Tensor, bits: int, residual_bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 32 columns of ``block`` [r, 32] with feedback among themselves and the scale of least loss.

    Returns codes uint8 [r, 32], scales uint8 [r], float32 errors over the diagonal of ``factor`` [r, 32], losses [r].
    """
    block = block.contiguous()
    ranked = rank_scales(block, block.square().mean(1).sqrt(), bits, residual_bits, _CANDIDATES)
    byte = nearest_index(ranked / power[:, None], scale_boundaries(block.device))
    scale = scale_tensor(block.device, torch.float32)[byte.long()] * power[:, None]
    codes, errors, losses = feed_back(block, scale, factor, bits, residual_bits)
    best = losses.argmin(1, keepdim=True)
    wide = best[:, :, None].expand(-1, -1, SCALE_BLOCK)
    return (
        codes.gather(1, wide)[:, 0],
        byte.gather(1, best)[:, 0].to(torch.uint8),
        errors.gather(1, wide)[:, 0],
        losses.gather(1, best)[:, 0],
    )


def _sweep(
    target: Tensor, index: Tensor, scales: Tensor, power: Tensor, hessian: Tensor, bits: int, residual_bits: int
) -> None:
    """Coordinate descent on ``tr(E H E^T)`` with ``E`` what is left of ``target`` [r, c]; ``index`` and ``scales`` in place.

    With the errors ``E_o`` of all the other blocks given, the best real values of block ``b`` are ``target_b + E_o H_ob
    H_bb^-1``, and the loss grows from there by ``H_bb``.
    """
    columns = target.shape[1]
    starts = range(0, columns, SCALE_BLOCK)
    inside = torch.stack([hessian[start : start + SCALE_BLOCK, start : start + SCALE_BLOCK] for start in starts])
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(inside.double()))
    factors = torch.linalg.cholesky(inverses, upper=True).float()
    inverses = inverses.float()
    levels = level_tensor(bits, residual_bits, target.device)
    values = scale_tensor(target.device, torch.float32)
    scale = values[scales.long()] * power[:, None]
    left = target - (levels[index.long()].view(*scale.shape, SCALE_BLOCK) * scale[:, :, None]).flatten(1)
    for _ in range(_SWEEPS):
        pull = left @ hessian
        for number, start in enumerate(starts):
            block = slice(start, start + SCALE_BLOCK)
            before = left[:, block].clone()
            wanted = pull[:, block] @ inverses[number]  # what is left of this block, and what the others would have it add
            best = target[:, block] + wanted - before
            codes, byte, _, losses = _round_block(best, power, factors[number], bits, residual_bits)
            better = losses < ((wanted @ inside[number]) * wanted).sum(1)
            codes = torch.where(better[:, None], codes, index[:, block])
            byte = torch.where(better, byte, scales[:, number])
            index[:, block], scales[:, number] = codes, byte
            after = target[:, block] - levels[codes.long()] * (values[byte.long()] * power)[:, None]
            left[:, block] = after
            pull.addmm_(after - before, hessian[block])


def feed_back(block: Tensor, scale: Tensor, factor: Tensor, bits: int, residual_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds the 32 columns of ``block`` [r, 32] in order, for each of the candidate scales [r, s].

    Returns codes uint8 [r, s, 32], errors over the diagonal of ``factor`` [32, 32] float32 [r, s, 32], losses [r, s].
    """
    table = level_tensor(bits, residual_bits, block.device)
    boundaries = boundary_tensor(bits, residual_bits, block.device)
    if block.device.type == "cuda" and has_triton():
        from .kernels import feedback as kernel

        return kernel.feed_back(block, scale, factor, boundaries, table)
    if block.device.type == "cpu" and (engine := chosen()) is not None:
        return cpu.feed_back(block, scale, factor, boundaries, table, engine)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    # Columns first: what one step reads and writes is contiguous.
    left = block.T[:, :, None].expand(-1, -1, scale.shape[1]).contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=block.device)
    errors = torch.empty_like(left)
    diagonal = factor.diagonal().tolist()
    for j in range(SCALE_BLOCK):
        nearest = nearest_index(left[j] * inverse, boundaries)
        codes[j] = nearest
        errors[j] = (left[j] - table[nearest] * scale) / diagonal[j]
        if j + 1 < SCALE_BLOCK:
            left[j + 1 :].sub_(factor[j, j + 1 :, None, None] * errors[j])
    return codes.permute(1, 2, 0), errors.permute(1, 2, 0), errors.square().sum(0)


def _row_exponents(rows: Tensor, bits: int, residual_bits: int) -> Tensor:
    """A power of two per row under which its largest scale lies one octave below the top: compensation makes some grow."""
    blocks = rows.view(-1, SCALE_BLOCK)
    first = rank_scales(blocks, blocks.square().mean(1).sqrt(), bits, residual_bits, 1)
    largest = first.view(rows.shape[0], -1).amax(1)
    return torch.where(largest > 0, torch.frexp(largest)[1] - TOP_OCTAVE, 0)


def _normalized(scales: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's scales up by octaves until the largest lies in the top one, as far as that is exact: it always is."""
    for _ in range(TOP_OCTAVE + 1):
        low = (scales.amax(1) < 224) & (scales.amax(1) > 0)  # byte 224 is the first of the top octave
        doubled = torch.where(scales >= 32, scales + 32, 2 * scales)
        scales = torch.where(low[:, None], doubled, scales)
        exponents = exponents - low.int()
    return scales, torch.where(scales.amax(1) > 0, exponents, 0)
