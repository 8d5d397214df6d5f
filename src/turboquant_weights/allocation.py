"""Which layer gets how many bits: the smallest expected KL divergence that fits a number of bytes, everything counted.

A unit of weights (a layer, or several that a kernel wants alike) with sensitivity ``a`` (sensitivity.py) costs ``a
D(bits)`` nats, and units add up. ``D`` falls about fourfold per bit, so on the lower convex hull of a unit's choices
every further bit gains less per byte than the one before, and taking the steps of all units in the order of gain per
byte is optimal up to the last step (Shoham & Gersho 1988). The result is the rule ``bits = const + 1/2 log2(a /
weights)`` with the ends cut off, in whole bits and exact bytes. Where the last step leaves much of the budget, or takes
more than it has to (few units, or large ones), exchanges follow: one unit changes, or one gives and another takes, as long
as that pays.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from .config import EmbeddingBits, Grades, is_graded
from .errors import ConfigError
from .reference import packed_bytes

Bits = tuple[int, int]  # (bits, residual_bits)
Point = tuple[int, float, EmbeddingBits | None]  # bytes, expected KL divergence, bits

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
_DENSE_BYTES = 2  # of a weight in bf16
_ORDER_BYTES = 4  # per row of a graded embedding
# Grades that an embedding may have at once (each is a product of its own in a tied head), where one may end, and how many
# compromises between bytes and loss are tried for them.
_GRADES: tuple[Bits, ...] = ((3, 0), (4, 0), (4, 1), (4, 2), (4, 3))
_MOST_GRADES = 4
_ROW_STEP, _ROW_RATIO = 64, 1.25
_COMPROMISES = 64


@dataclasses.dataclass(frozen=True)
class Unit:
    """Layers that get the same bits.

    ``names`` of the modules; ``shapes``: (rows, columns) of the planes that they will have, those that several share once;
    ``sensitivity``: nats of KL divergence per unit of relative squared error, all layers together. ``rows``: of an embedding
    that may be graded, that of each row, in the order in which they would be graded. ``dense``: bytes of the weights as they
    are, one that several share once; None: bf16, nothing shared.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sensitivity: float
    rows: tuple[float, ...] = ()
    dense: int | None = None

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    def bytes(self, bits: EmbeddingBits | None) -> int:
        """Stored bytes of the weights; None: as they are."""
        if bits is None:
            return self.weights * _DENSE_BYTES if self.dense is None else self.dense
        if is_graded(bits):
            ((rows, columns),) = self.shapes
            return sum(packed_bytes(count, columns, *own) for count, *own in bits) + _ORDER_BYTES * rows  # type: ignore[misc]
        return sum(packed_bytes(rows, columns, *bits) for rows, columns in self.shapes)

    def kl(self, bits: EmbeddingBits | None) -> float:
        """Expected KL divergence in nats per token."""
        if bits is None:
            return 0.0
        if not is_graded(bits):
            return self.sensitivity * ERRORS[bits]  # type: ignore[index]
        total, start = 0.0, 0
        for count, base, residual in bits:  # type: ignore[misc]
            total += sum(self.rows[start : start + count]) * ERRORS[base, residual]
            start += count
        return total

    def hull(self) -> list[Point]:
        """(bytes, kl, bits) of the choices worth making, by ascending bytes: the lower convex hull."""
        choices: list[EmbeddingBits | None] = [*ERRORS, *self._grades(), None]
        points = sorted(((self.bytes(bits), self.kl(bits), bits) for bits in choices), key=lambda point: point[:2])
        hull: list[Point] = []
        for point in points:
            # As it is beside 4+4 of a tiny layer; or beyond that, where layers will not share planes as they share a weight.
            if hull and (point[0] <= hull[-1][0] or hull[-1][2] is None):
                continue
            while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
                hull.pop()
            hull.append(point)
        return hull

    def _grades(self) -> list[Grades]:
        """For many prices of a byte the grades that pay: runs of rows get the bits of least ``kl + price * bytes``."""
        if not self.rows:
            return []
        ((count, columns),) = self.shapes
        ends: list[int] = []
        width = float(_ROW_STEP)
        while not ends or ends[-1] < count:
            ends.append(min(count, (ends[-1] if ends else 0) + round(width / _ROW_STEP) * _ROW_STEP))
            width *= _ROW_RATIO
        starts = [0, *ends[:-1]]
        runs: list[tuple[int, float]] = []
        for start, end in zip(starts, ends, strict=True):
            runs.append((end - start, sum(self.rows[start:end])))
            # A later run is never worth more bits than an earlier one: where it seems so, they are one.
            while len(runs) > 1 and runs[-2][1] * runs[-1][0] <= runs[-1][1] * runs[-2][0]:
                (rows, share), (before, first) = runs.pop(), runs.pop()
                runs.append((rows + before, share + first))
        costs = {bits: packed_bytes(1, columns, *bits) for bits in _GRADES}
        highest = max(share / rows for rows, share in runs) * ERRORS[_GRADES[0]]
        found: dict[Grades, None] = {}
        for i in range(_COMPROMISES):
            price = highest / min(costs.values()) * 2.0 ** (-i / 3)
            best = [min(_GRADES, key=lambda b: share * ERRORS[b] + price * rows * costs[b]) for rows, share in runs]
            grades: list[list[int]] = []
            for (rows, _), bits in zip(runs, best, strict=True):
                if grades and tuple(grades[-1][1:]) == bits:
                    grades[-1][0] += rows
                else:
                    grades.append([rows, *bits])
            while len(grades) > _MOST_GRADES:  # the smallest but the first joins the one before it, which has more bits
                least = min(range(1, len(grades)), key=lambda g: grades[g][0])
                grades[least - 1][0] += grades.pop(least)[0]
            if len(grades) > 1:
                found[tuple((rows, base, residual) for rows, base, residual in grades)] = None
        return list(found)


def _gain(cheap: tuple[int, float, object], dear: tuple[int, float, object]) -> float:
    return (cheap[1] - dear[1]) / (dear[0] - cheap[0])


@dataclasses.dataclass(frozen=True)
class Allocation:
    """``bits`` of every module in the units (None: stays as it is), and what to expect of them: ``total_bytes`` of the whole
    file, which had ``dense_bytes`` in bf16."""

    bits: dict[str, EmbeddingBits | None]
    total_bytes: int
    dense_bytes: int
    expected_kl: float

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than in bf16."""
        return self.dense_bytes / self.total_bytes


def steps(units: Sequence[Unit], other_bytes: int, dense_bytes: int | None = None) -> list[Allocation]:
    """All allocations on the way from the smallest model to the dense one, by ascending bytes: the curve of size against
    loss. Arguments as of :func:`allocate`."""
    hulls = [unit.hull() for unit in units]
    choice = [0] * len(units)
    order = sorted(
        ((-_gain(hull[i], hull[i + 1]), u, i + 1) for u, hull in enumerate(hulls) for i in range(len(hull) - 1)),
    )
    out = [_allocation(units, hulls, choice, other_bytes, dense_bytes)]
    for _, unit, step in order:
        choice[unit] = step
        out.append(_allocation(units, hulls, choice, other_bytes, dense_bytes))
    return out


def allocate(
    units: Sequence[Unit],
    other_bytes: int,
    dense_bytes: int | None = None,
    *,
    max_bytes: float | None = None,
    max_kl: float | None = None,
) -> Allocation:
    """The allocation of least expected KL within ``max_bytes``, or of least bytes within ``max_kl``.

    Args:
        units: Everything that can be quantized.
        other_bytes: Of the rest of the file: norms, biases, headers.
        dense_bytes: Of the whole file in bf16, which its size is compared with. None: as everything is.

    Raises:
        ConfigError: not even 2 bits everywhere fit; the message says what is possible.
    """
    hulls = [unit.hull() for unit in units]
    choice = [0] * len(units)
    order = sorted(
        ((-_gain(hull[i], hull[i + 1]), u, i + 1) for u, hull in enumerate(hulls) for i in range(len(hull) - 1)),
    )
    current = _allocation(units, hulls, choice, other_bytes, dense_bytes)
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
    if max_bytes is not None:
        _exchange(hulls, choice, limited=0, room=max_bytes - total)
    elif max_kl is not None:
        _exchange(hulls, choice, limited=1, room=max_kl * (1 - 1e-9) - kl)  # sums are rounded
    return _allocation(units, hulls, choice, other_bytes, dense_bytes)


def _exchange(hulls: Sequence[list[Point]], choice: list[int], *, limited: int, room: float) -> None:
    """Changes ``choice``, a unit or two at a time, always the change that lowers the one of (bytes, kl) most that is not
    ``limited`` while the other rises by at most ``room``, until none does."""
    owner = torch.tensor([u for u, hull in enumerate(hulls) for _ in hull])
    place = [i for hull in hulls for i in range(len(hull))]
    points = torch.tensor([point[:2] for hull in hulls for point in hull], dtype=torch.float64)
    starts = [end - len(hull) for end, hull in zip(itertools.accumulate(map(len, hulls)), hulls, strict=True)]
    while True:
        now = points[torch.tensor([start + i for start, i in zip(starts, choice, strict=True)])]
        change = points - now[owner]  # of one unit to each of its points; to the one that it is at: none
        spent, won = change[:, limited], change[:, 1 - limited]
        total = won[:, None] + won[None, :]
        total.masked_fill_(spent[:, None] + spent[None, :] > room, torch.inf)
        total.masked_fill_(owner[:, None] == owner[None, :], torch.inf)
        best = int(total.argmin())
        pair = divmod(best, len(points))
        if len(hulls) < 2 or float(total.flatten()[best]) >= -1e-9 * float(now[:, 1 - limited].sum()):
            return
        for point in pair:
            choice[int(owner[point])] = place[point]
            room -= float(spent[point])


def _allocation(
    units: Sequence[Unit],
    hulls: Sequence[list[Point]],
    choice: Sequence[int],
    other_bytes: int,
    dense_bytes: int | None,
) -> Allocation:
    chosen = [hull[i] for hull, i in zip(hulls, choice, strict=True)]
    return Allocation(
        {name: bits for unit, (_, _, bits) in zip(units, chosen, strict=True) for name in unit.names},
        sum(point[0] for point in chosen) + other_bytes,
        sum(unit.bytes(None) for unit in units) + other_bytes if dense_bytes is None else dense_bytes,
        sum(point[1] for point in chosen),
    )
