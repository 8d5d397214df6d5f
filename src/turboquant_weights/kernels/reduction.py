"""The end of every matmul: sums of split-K shares in a fixed order, exponents, token scales, bias, one rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import power_of_two


@triton.jit
def finish(acc, token_scale, exponents, bias, out, token, row, rows, tokens, HAS_BIAS: tl.constexpr):
    """Writes ``acc`` [rows of the tile, tokens of the tile]. Exponents in two halves: 2**127 * 2**7 is no float32."""
    live = (row < rows)[:, None] & (token < tokens)[None, :]
    exponent = tl.load(exponents + row, mask=row < rows, other=0).to(tl.int32) + 7
    low = exponent >> 1
    scale = tl.load(token_scale + token, mask=token < tokens, other=0.0)
    acc = acc * power_of_two(low)[:, None] * scale[None, :] * power_of_two(exponent - low)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    address = out + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(address, acc.to(out.dtype.element_ty), mask=live)


@triton.jit
def reduce_and_finish(
    acc, partial, counters, slot, split, splits, token_scale, exponents, bias, out, token, row, rows, tokens,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, REDUCE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``acc`` is share ``split`` of tile ``slot``. The program that arrives last adds all shares by index, so the result
    does not depend on timing. ``counters`` start at zero; ``partial`` is float32 [slots, splits, ROWS, TOKENS]."""
    if REDUCE:
        base = partial + slot.to(tl.int64) * splits * (ROWS * TOKENS)
        at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(base + split * (ROWS * TOKENS) + at, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + slot, 1, sem="acq_rel")
        if arrived == splits - 1:
            acc = tl.zeros((ROWS, TOKENS), tl.float32)
            for i in range(splits):
                acc += tl.load(base + i * (ROWS * TOKENS) + at, cache_modifier=".cg")
            finish(acc, token_scale, exponents, bias, out, token, row, rows, tokens, HAS_BIAS)
    else:
        finish(acc, token_scale, exponents, bias, out, token, row, rows, tokens, HAS_BIAS)
