"""A linear layer or an embedding of a tensor-parallel engine, on packed planes. Imports no engine, so it is tested without.

An engine merges layers with one input (q/k/v, gate/up) into one and gives every rank a part: some rows of each layer
(column parallel) or a range of its columns (row parallel). Rows of a quantized matrix are independent, so any of them
may be kept alone or beside others with the same bits; these make up a :class:`Run`, one op call and one rotation. A range
of columns is cut where the rotation allows, at multiples of its block. A block that two ranks share is kept by both; each
puts zeros where its part of the activation ends, so the sum over the ranks is exact and no weight is ever quantized again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...config import Grades, TurboQuantConfig
from ...errors import FormatError
from ...graded import is_order, lookup
from ...planes import PLANES
from ...reference import MAX_EXPONENT, MIN_EXPONENT, packed_shapes, quantize_weight
from ...rotation import SIGN_WORD, padded_features, rotation_block, seed_from_column


class Shard(NamedTuple):
    """One layer of the checkpoint inside a merged one: its ``name`` there, ``rows`` on this rank, and its own bits (None: it
    is dense)."""

    name: str
    rows: int
    config: TurboQuantConfig | None


class Window(NamedTuple):
    """The columns of a matrix [n, in_features] that one rank keeps, and how to multiply with them.

    ``first`` to ``last - 1`` are the stored columns; ``before`` and ``after`` zeros complete the activation; the other
    three are what the op is told: the kept matrix is an ordinary one of this size, block and seed.
    """

    first: int
    last: int
    before: int
    after: int
    in_features: int
    group_size: int
    seed: int


def window(in_features: int, group_size: int, seed: int, start: int = 0, stop: int | None = None) -> Window:
    """The window of a rank whose activation has the columns ``start`` to ``stop - 1`` (default: all)."""
    stop = in_features if stop is None else stop
    columns, block = padded_features(in_features), rotation_block(in_features, group_size)
    aligned = max(block, SIGN_WORD)  # signs can be counted from such a column, and only from such
    first, last = start // aligned * aligned, min(columns, -(-stop // block) * block)
    end = min(last, in_features)
    return Window(first, last, start - first, end - stop, end - first, block, seed_from_column(seed, first))


class Run(nn.Module):
    """Neighbouring shards with the same bits: one matrix of planes."""

    def __init__(self, rows: int, config: TurboQuantConfig, cut: Window) -> None:
        super().__init__()
        self.bits, self.residual_bits = config.bits, config.residual_bits
        shapes = packed_shapes(rows, cut.in_features, config.bits, config.residual_bits)
        for plane in PLANES:
            parameter = None
            if plane in shapes:
                shape, dtype = shapes[plane]
                parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(plane, parameter)
        self.layout = (cut.in_features, config.bits, config.residual_bits, cut.group_size, cut.seed)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        planes: Any = self._parameters  # not attributes: nn.Module needs half a microsecond to find one
        return ops.linear(x, planes["codes"], planes["residual"], planes["scales"], planes["exponents"], bias, *self.layout)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, [*ids.shape, in_features]."""
        planes = self._parameters
        return ops.embedding(
            ids, planes["codes"], planes["residual"], planes["scales"], planes["exponents"], *self.layout, dtype
        )

    @property
    def rows(self) -> int:
        codes = self.codes
        assert isinstance(codes, Tensor)
        return codes.shape[0]

    def keep(self, rows: Tensor, padding: int) -> None:
        """Drops all rows but these, and puts so many rows of zeros behind them."""
        for name, plane in self._parameters.items():
            if plane is not None:
                kept = plane.new_zeros(len(rows) + padding, *plane.shape[1:])
                torch.index_select(plane.data, 0, rows, out=kept[: len(rows)])
                self.register_parameter(name, nn.Parameter(kept, requires_grad=False))


class DenseRun(nn.Module):
    """Neighbouring shards that the checkpoint leaves dense, beside quantized ones."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, bias)


class Shards(nn.Module):
    """The part of one rank of a merged layer: ``x W^T + bias`` with ``W`` [sum of rows, in_features] of the shards.

    Args:
        shards: In the order of the outputs.
        in_features: k of the whole layer; ``start``, ``stop``: the columns of this rank's activation.
        dtype: of dense shards. New tensors are made on the default device; planes start zeroed.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        in_features: int,
        group_size: int,
        seed: int,
        dtype: torch.dtype,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__()
        self.shards = tuple(shards)
        self.in_features = in_features
        self.group_size = group_size
        self.seed = seed
        self.columns = (start, in_features if stop is None else stop)
        self.window = window(in_features, group_size, seed, start, stop)
        self.runs = nn.ModuleList()
        self.places: list[tuple[int, int]] = []  # of each shard: its run, and its first row there
        self.awaited: dict[tuple[int, str], None] = {}  # planes to come, in order
        self.spans: list[tuple[int, int]] = []  # of each run: its rows in the output
        position = 0
        for config, members in itertools.groupby(self.shards, lambda shard: shard.config):
            rows = 0
            for shard in members:
                for plane in PLANES if config is not None else ("weight",):
                    if plane != "residual" or config is None or config.residual_bits:
                        self.awaited[len(self.places), plane] = None
                self.places.append((len(self.runs), rows))
                rows += shard.rows
            width = self.columns[1] - self.columns[0]
            self.runs.append(DenseRun(rows, width, dtype) if config is None else Run(rows, config, self.window))
            self.spans.append((position, position + rows))
            position += rows

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., columns of this rank]; returns [..., rows]. ``bias`` [rows] or None."""
        cut = self.window
        if cut.before or cut.after:
            x = torch.nn.functional.pad(x, (cut.before, cut.after))
        if len(self.runs) == 1:
            return self.runs[0](x, bias)
        return torch.cat(
            [
                run(x, None if bias is None else bias[begin:end])
                for run, (begin, end) in zip(self.runs, self.spans, strict=True)
            ],
            -1,
        )

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, [*ids.shape, in_features], of an embedding."""
        (run,) = self.runs
        return run.lookup(ids, dtype)  # type: ignore[operator]

    def put(self, index: int, plane: str, stored: Tensor, row: int, count: int) -> None:
        """Copies ``count`` rows from ``row`` on of a tensor of the checkpoint, as it is stored there, into the shard.

        Raises:
            FormatError: this shard has no such plane, or the tensor has another shape, type or an exponent out of range.
        """
        shard = self.shards[index]
        name = f"{shard.name}.{plane}"
        run, offset = self.places[index]
        target = getattr(self.runs[run], plane, None)
        if target is None:
            raise FormatError(
                f"{name} is stored, but config.json gives {shard.name} no such tensor: restore its config.json"
            )
        if shard.config is not None:
            kept = cut_plane(name, plane, stored, shard.config, self.in_features, self.window)
        else:
            if stored.dim() != 2 or stored.shape[1] != self.in_features or not stored.is_floating_point():
                raise FormatError(_belongs_elsewhere(name, stored, f"floating point with rows of {self.in_features}"))
            kept = stored[:, slice(*self.columns)]
        if row + count > kept.shape[0] or count > shard.rows:
            raise FormatError(_belongs_elsewhere(name, stored, f"a tensor with rows {row} to {row + count - 1}"))
        target.data[offset : offset + count].copy_(kept[row : row + count])
        self.awaited.pop((index, plane), None)

    def quantize(self, index: int, weight: Tensor, row: int, count: int) -> None:
        """Quantizes rows of a dense matrix [n, in_features] of the checkpoint into the shard.

        All columns are quantized before they are cut, so the planes are those that the package would have stored.
        """
        shard = self.shards[index]
        assert shard.config is not None
        config = shard.config
        device = next(self.runs[self.places[index][0]].parameters()).device
        packed = quantize_weight(
            weight[row : row + count].to(device),
            bits=config.bits,
            residual_bits=config.residual_bits,
            group_size=config.group_size,
            seed=config.seed,
            name=shard.name,
        ).weight
        for plane, tensor in packed._asdict().items():
            if tensor is not None:
                self.put(index, plane, tensor, 0, count)

    def check_complete(self) -> None:
        """Raises a FormatError that names what the checkpoint did not hold."""
        if self.awaited:
            index, plane = next(iter(self.awaited))
            raise FormatError(_incomplete(f"{self.shards[index].name}.{plane}"))


class GradedShards(Shards):
    """An embedding in grades, each a shard; ``order`` int32 [rows] says where the row of each token lies.

    Which rows are those of a rank's tokens is in ``order``, which the checkpoint may give last. So every rank loads all
    rows, and :meth:`keep` drops those of the others.
    """

    def __init__(self, name: str, grades: Grades, config: TurboQuantConfig, in_features: int, dtype: torch.dtype) -> None:
        shards = [Shard(f"{name}.{i}", grade[0], config.with_bits(*grade[1:])) for i, grade in enumerate(grades)]
        super().__init__(shards, in_features, config.group_size, config.seed, dtype)
        self.name = name
        self.order = nn.Parameter(torch.zeros(sum(grade[0] for grade in grades), dtype=torch.int32), requires_grad=False)
        self.has_order = False

    def put_order(self, stored: Tensor) -> None:
        """Copies ``order`` as the checkpoint holds it.

        Raises:
            FormatError: it is not one of these rows, or does not name each of them once.
        """
        if stored.dtype != torch.int32 or stored.shape != self.order.shape:
            raise FormatError(_belongs_elsewhere(f"{self.name}.order", stored, f"torch.int32 {list(self.order.shape)}"))
        if not is_order(stored):
            raise FormatError(f"{self.name}.order does not name every row once: the checkpoint is damaged; fetch it again")
        self.order.data.copy_(stored)
        self.has_order = True

    def check_complete(self) -> None:
        super().check_complete()
        if not self.has_order:
            raise FormatError(_incomplete(f"{self.name}.order"))

    def keep(self, start: int, stop: int, rows: int) -> None:
        """Drops the rows of all tokens but ``start`` to ``stop - 1``, which become 0, 1, ...: those of a rank. Tokens behind
        them, up to ``rows`` of all, have rows of zeros, as in any padded vocabulary."""
        order = self.order.data[start:stop].long()
        sizes = []
        for run, (begin, end) in zip(self.runs, self.spans, strict=True):
            assert isinstance(run, Run)
            kept = order[(order >= begin) & (order < end)].sort().values - begin
            run.keep(kept, rows - len(order) if end == len(self.order) else 0)
            sizes.append(run.rows)
        stored = torch.arange(rows, dtype=torch.int32, device=order.device)
        stored[order.argsort()] = stored[: len(order)].clone()
        self.order = nn.Parameter(stored, requires_grad=False)
        self.runs = nn.ModuleList(run for run, size in zip(self.runs, sizes, strict=True) if size)
        ends = list(itertools.accumulate(size for size in sizes if size))
        self.spans = list(zip([0, *ends], ends, strict=False))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As that of the base class, with the rows in the order of the tokens."""
        out = super().forward(x).index_select(-1, self.order)
        return out if bias is None else out + bias

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        runs: list[Any] = list(self.runs)
        grades = [(run.rows, functools.partial(run.lookup, dtype=dtype)) for run in runs]
        return lookup(ids, self.order, grades)


def cut_plane(name: str, plane: str, stored: Tensor, config: TurboQuantConfig, in_features: int, kept: Window) -> Tensor:
    """The columns of ``kept`` of a plane as the checkpoint holds it, of one matrix or of a stack of them.

    Raises:
        FormatError: it is not a plane of a matrix [n, in_features].
    """
    (_, *tail), dtype = packed_shapes(1, in_features, config.bits, config.residual_bits)[plane]
    if stored.dtype != dtype or list(stored.shape[stored.dim() - len(tail) :]) != tail or stored.dim() <= len(tail):
        raise FormatError(
            _belongs_elsewhere(name, stored, f"{dtype}, {f'with rows of {tail[0]}' if tail else 'one per row'}")
        )
    if plane != "exponents":
        columns = padded_features(in_features)
        return stored[..., tail[0] * kept.first // columns : tail[0] * kept.last // columns]
    if int(stored.max()) > MAX_EXPONENT:
        raise FormatError(
            f"{name} holds {int(stored.max())}: exponents must be {MIN_EXPONENT} to {MAX_EXPONENT}. "
            "The checkpoint is damaged; fetch it again"
        )
    return stored


def _incomplete(name: str) -> str:
    return f"{name} did not come with the checkpoint: it is incomplete or belongs to another model; fetch it again"


def _belongs_elsewhere(name: str, stored: Tensor, rule: str) -> str:
    return (
        f"{name} is {stored.dtype} {list(stored.shape)}: it must be {rule}. The checkpoint belongs to another model, or is "
        "damaged; fetch it again"
    )
