"""The experts that one rank keeps of a block: two stacks of matrices on packed planes. Like ``shards.py``, without vLLM.

Tensor parallel ranks have a part of every expert: the same rows of gate and up, and those columns of down that multiply
with them. With expert parallelism a rank has whole experts instead, some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...config import TurboQuantConfig
from ...errors import FormatError
from ...planes import PLANES
from ...reference import packed_shapes, quantize_weight
from .shards import cut_plane, window


class StackPart(NamedTuple):
    """What a rank keeps of a stack [experts, n, in_features]: of its experts these, by their number in the checkpoint; of
    the rows of each these ranges, one behind the other; of the columns those from ``start`` to ``stop``."""

    name: str
    config: TurboQuantConfig
    in_features: int
    experts: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    start: int
    stop: int


class Stack(nn.Module):
    """Planes of a :class:`StackPart`. New tensors are made on the default device and start zeroed."""

    codes: nn.Parameter
    residual: nn.Parameter | None
    scales: nn.Parameter
    exponents: nn.Parameter

    def __init__(self, part: StackPart) -> None:
        super().__init__()
        self.part = part
        config = part.config
        cut = self.window = window(part.in_features, config.group_size, config.seed, part.start, part.stop)
        rows = sum(stop - start for start, stop in part.rows)
        shapes = packed_shapes(rows, cut.in_features, config.bits, config.residual_bits)
        for plane in PLANES:
            parameter = None
            if plane in shapes:
                shape, dtype = shapes[plane]
                data = torch.zeros((len(part.experts), *shape), dtype=dtype)
                parameter = nn.Parameter(data, requires_grad=False)
            self.register_parameter(plane, parameter)
        self.layout = (cut.in_features, config.bits, config.residual_bits, cut.group_size, cut.seed)
        slots = range(len(part.experts) * len(part.rows))
        self.awaited = {(slot, plane) for slot in slots for plane in shapes}

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """``x`` [s, columns of this rank] and the place of each row's expert here, [s]; returns [s, rows]. Rows with a place
        behind the last expert become zeros."""
        cut = self.window
        if cut.before or cut.after:
            x = torch.nn.functional.pad(x, (cut.before, cut.after))
        return ops.experts(x, experts, self.codes, self.residual, self.scales, self.exponents, *self.layout)

    def put(self, plane: str, stored: Tensor) -> None:
        """Copies this rank's part of a plane of the whole stack, as the checkpoint holds it.

        Raises:
            FormatError: the stack has no such plane, or the tensor another shape, type or an exponent out of range.
        """
        name = f"{self.part.name}.{plane}"
        target = getattr(self, plane, None)
        if target is None:
            raise FormatError(f"{name} is stored, but config.json gives it no such plane: restore its config.json")
        kept = cut_plane(name, plane, stored, self.part.config, self.part.in_features, self.window)
        for place, expert in enumerate(self.part.experts):
            offset = 0
            for slot, (start, stop) in enumerate(self.part.rows):
                target.data[place, offset : offset + stop - start].copy_(kept[expert, start:stop])
                self.awaited.discard((place * len(self.part.rows) + slot, plane))
                offset += stop - start

    def quantize(self, expert: int, slot: int, weight: Tensor, start: int) -> None:
        """Quantizes a dense matrix [n, in_features] of one expert into its range of rows ``slot``; ``start`` is the row of
        ``weight`` at which the range begins. All columns are quantized before they are cut."""
        part = self.part
        place = part.experts.index(expert)
        sizes = [stop - start for start, stop in part.rows]
        packed = quantize_weight(
            weight[start : start + sizes[slot]].to(self.codes.device),
            bits=part.config.bits,
            residual_bits=part.config.residual_bits,
            group_size=part.config.group_size,
            seed=part.config.seed,
            name=f"{part.name}[{expert}]",
        ).weight
        offset = sum(sizes[:slot])
        for plane, tensor in packed._asdict().items():
            if tensor is not None:
                kept = cut_plane(part.name, plane, tensor, part.config, part.in_features, self.window)
                getattr(self, plane).data[place, offset : offset + sizes[slot]].copy_(kept)
                self.awaited.discard((place * len(part.rows) + slot, plane))

    def check_complete(self) -> None:
        """Raises a FormatError that names what the checkpoint did not hold."""
        if self.awaited:
            slot, plane = min(self.awaited)
            expert = self.part.experts[slot // len(self.part.rows)]
            raise FormatError(
                f"{self.part.name}.{plane} did not come with the checkpoint for expert {expert}: it is incomplete or "
                "belongs to another model; fetch it again"
            )


class Experts(nn.Module):
    """Both stacks of a block. ``up`` has the rows of gate and up, or of up alone."""

    def __init__(
        self,
        names: Sequence[str],
        configs: Sequence[TurboQuantConfig],
        experts: Sequence[int],
        sizes: tuple[int, int],
        gated: bool,
        start: int,
        stop: int,
    ) -> None:
        """
        Args:
            names, configs: Of the two stacks.
            experts: Those of this rank, by their number in the checkpoint.
            sizes: Hidden and intermediate size of the whole block; ``start`` to ``stop`` of the latter are this rank's.
            gated: Whether ``up`` holds gates before the rest.
        """
        super().__init__()
        hidden, intermediate = sizes
        starts = (start, intermediate + start) if gated else (start,)
        rows = tuple((first, first + stop - start) for first in starts)
        self.up = Stack(StackPart(names[0], configs[0], hidden, tuple(experts), rows, 0, hidden))
        self.down = Stack(StackPart(names[1], configs[1], intermediate, tuple(experts), ((0, hidden),), start, stop))
        self.start = start

    def check_complete(self) -> None:
        self.up.check_complete()
        self.down.check_complete()
