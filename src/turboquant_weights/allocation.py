"""Which layer gets how many bits: the smallest expected KL divergence that fits a number of bytes, everything counted.

A unit of weights (a layer, or several that a kernel wants alike) with sensitivity ``a`` (sensitivity.py) costs ``a
D(bits)`` nats, and units add up. ``D`` falls about fourfold per bit, so on the lower convex hull of a unit's choices
every further bit gains less per byte than the one before, and taking the steps of all units in the order of gain per
byte is optimal up to the last step (Shoham & Gersho 1988). The result is the rule ``bits = const + 1/2 log2(a /
weights)`` with the ends cut off, in whole bits and exact bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .errors import ConfigError
from .reference import packed_bytes

Bits = tuple[int, int]  # (bits, residual_bits)

# Expected relative squared error of a Gaussian matrix: reference.quantize_weight on 2048 x 2048 normal entries.
ERRORS: dict[Bits, float] = {
    (2, 0): 0.10484,
    (3, 0): 0.025584,
    (4, 0): 0.0058749,
    (4, 1): 0.0014027,
    (4, 2): 0.00034141,
    (4, 3): 0.000086232,
    (4, 4): 0.000021999,
}
_DENSE_BYTES = 2  # bf16


@dataclasses.dataclass(frozen=True)
class Unit:
    """Layers that get the same bits.

    ``names`` of the modules; ``shapes`` their (rows, columns), a weight shared by several once; ``sensitivity``: nats of KL
    divergence per unit of relative squared error, all layers together.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sensitivity: float

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    def bytes(self, bits: Bits | None) -> int:
        """Stored bytes of the weights; None: bf16."""
        if bits is None:
            return self.weights * _DENSE_BYTES
        return sum(packed_bytes(rows, columns, *bits) for rows, columns in self.shapes)

    def kl(self, bits: Bits | None) -> float:
        """Expected KL divergence in nats per token."""
        return 0.0 if bits is None else self.sensitivity * ERRORS[bits]

    def hull(self) -> list[tuple[int, float, Bits | None]]:
        """(bytes, kl, bits) of the choices worth making, by ascending bytes: the lower convex hull."""
        hull: list[tuple[int, float, Bits | None]] = []
        for bits in (*ERRORS, None):
            point = self.bytes(bits), self.kl(bits), bits
            if hull and point[0] <= hull[-1][0]:  # bf16 beside 4+4 of a tiny layer
                continue
            while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
                hull.pop()
            hull.append(point)
        return hull


def _gain(cheap: tuple[int, float, object], dear: tuple[int, float, object]) -> float:
    return (cheap[1] - dear[1]) / (dear[0] - cheap[0])


@dataclasses.dataclass(frozen=True)
class Allocation:
    """``bits`` of every module in the units (None: stays bf16), and what to expect of them."""

    bits: dict[str, Bits | None]
    total_bytes: int
    dense_bytes: int
    expected_kl: float

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than in bf16."""
        return self.dense_bytes / self.total_bytes


def steps(units: Sequence[Unit], other_bytes: int) -> list[Allocation]:
    """All allocations on the way from the smallest model to bf16, by ascending bytes: the curve of size against loss."""
    hulls = [unit.hull() for unit in units]
    choice = [0] * len(units)
    order = sorted(
        ((-_gain(hull[i], hull[i + 1]), u, i + 1) for u, hull in enumerate(hulls) for i in range(len(hull) - 1)),
    )
    out = [_allocation(units, hulls, choice, other_bytes)]
    for _, unit, step in order:
        choice[unit] = step
        out.append(_allocation(units, hulls, choice, other_bytes))
    return out


def allocate(
    units: Sequence[Unit], other_bytes: int, *, max_bytes: float | None = None, max_kl: float | None = None
) -> Allocation:
    """The allocation of least expected KL within ``max_bytes``, or of least bytes within ``max_kl``.

    Args:
        units: Everything that can be quantized.
        other_bytes: Of the rest of the file: norms, biases, headers.

    Raises:
        ConfigError: not even 2 bits everywhere fit; the message says what is possible.
    """
    hulls = [unit.hull() for unit in units]
    choice = [0] * len(units)
    order = sorted(
        ((-_gain(hull[i], hull[i + 1]), u, i + 1) for u, hull in enumerate(hulls) for i in range(len(hull) - 1)),
    )
    current = _allocation(units, hulls, choice, other_bytes)
    if max_bytes is not None and current.total_bytes > max_bytes:
        raise ConfigError(
            f"the budget is {max_bytes:,.0f} bytes for the whole file, but 2 bits everywhere take {current.total_bytes:,}: "
            f"at most {current.ratio:.2f} times smaller than bf16 is possible"
        )
    total, kl = current.total_bytes, current.expected_kl
    for _, unit, step in order:
        if max_kl is not None and kl <= max_kl:
            break
        before, after = hulls[unit][step - 1], hulls[unit][step]
        more = after[0] - before[0]
        # A step that does not fit ends its unit; smaller units may still use the rest.
        if choice[unit] != step - 1 or (max_bytes is not None and total + more > max_bytes):
            continue
        choice[unit] = step
        total += more
        kl += after[1] - before[1]
    return _allocation(units, hulls, choice, other_bytes)


def _allocation(
    units: Sequence[Unit], hulls: Sequence[list[tuple[int, float, Bits | None]]], choice: Sequence[int], other_bytes: int
) -> Allocation:
    chosen = [hull[i] for hull, i in zip(hulls, choice, strict=True)]
    return Allocation(
        {name: bits for unit, (_, _, bits) in zip(units, chosen, strict=True) for name in unit.names},
        sum(point[0] for point in chosen) + other_bytes,
        sum(unit.bytes(None) for unit in units) + other_bytes,
        sum(point[1] for point in chosen),
    )
