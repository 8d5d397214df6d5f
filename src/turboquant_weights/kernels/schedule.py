"""Which kernel and tile sizes a shape gets: a table measured per GPU, a heuristic for the rest. Nothing is timed at run
time.

``turboquant-weights tune`` measures shapes on the GPU at hand and writes a JSON file; the environment variable
``TURBOQUANT_WEIGHTS_SCHEDULES`` names such a file, whose entries come before the table's.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import ScheduleError
from .decode import TABLE_BYTES
from .few import FEW_TOKENS
from .ring import tile_bytes
from .slices import MOST_TOKENS

_Kind = TypeVar("_Kind", bound=tuple[int, ...])


def _told_apart(kind: type[_Kind]) -> type[_Kind]:
    """Tuples of the same numbers are equal; a plan that is kept for a schedule must not be taken for one of another kind."""

    def equal(self: _Kind, other: object) -> bool:
        return type(self) is type(other) and tuple.__eq__(self, other)

    def differ(self: _Kind, other: object) -> bool:
        return not equal(self, other)

    kind.__eq__, kind.__ne__ = equal, differ  # type: ignore[method-assign, assignment]
    return kind


@_told_apart
class Rotating(NamedTuple):
    """``rotating.py``: one token, 16 rows per program, ``warps`` slices of the columns; one launch, rotation included."""

    warps: int


@_told_apart
class Slices(NamedTuple):
    """``slices.py``: ``rows`` rows (16 or 32) x 8 tokens per program, ``warps * split`` slices of the columns; ``looked_up``
    (0, 1 or 2) of the two words of a thread's pair get their levels from a table in shared memory."""

    rows: int
    warps: int
    split: int
    looked_up: int


@_told_apart
class Integer(NamedTuple):
    """``integer.py`` for one token, ``few.py`` for 2 to 4: no residual, ``rows`` rows per program, ``warps * split`` slices
    of the columns, ``ahead`` tiles of each warp in flight."""

    rows: int
    warps: int
    split: int
    ahead: int

    @staticmethod
    def serves(columns: int) -> bool:
        """A ring has whole tiles."""
        return columns % 128 == 0

    def fits(self, bits: int) -> bool:
        """Whether ring and sums fit into the shared memory that needs no permission."""
        ring, sums = (self.ahead + 1) * tile_bytes(bits, self.rows), 32 * self.rows
        return self.warps * (ring + sums) <= _DEFAULT_BYTES


@_told_apart
class StreamK(NamedTuple):
    """``streamk.py``, on sm_90: tiles of ``64 * groups`` rows x ``block_m`` tokens, one program per multiprocessor with
    ``stages`` steps in flight."""

    block_m: int
    groups: int
    stages: int

    @property
    def step(self) -> int:
        """Columns of a step: few tokens leave room for two tiles of 128, and so for whole cache lines of codes."""
        return 256 if self.block_m <= 64 else 128

    def bytes(self, bits: int, residual_bits: int) -> int:
        """Of shared memory: as many steps as are in flight, as `streamk.py` copies them."""
        tiles, plane = self.step // 128, sum(4 if width == 3 else width for width in (bits, residual_bits))
        step = tiles * (64 * self.groups * 16 * plane + 256 * self.block_m + 4 * 128 * (self.groups - 1))
        return self.stages * step

    def wants_table(self, weights: int, residual_bits: int) -> bool:
        """Whether a table of levels in shared memory, which takes room and 0.2 us of a program, makes decoding faster
        (measured on an H100 at 4 to 4+4 bits): products of 128 tokens and more hide arithmetic, unless it is much."""
        if residual_bits:
            return self.block_m <= 64 or (self.block_m == 128 and residual_bits in (2, 4))
        return self.block_m <= 64 and weights >= _STREAMK_WEIGHTS[32]

    def looks_up(self, weights: int, bits: int, residual_bits: int) -> bool:
        """Whether it gets the table. Triton asks the driver for more than its default of 48 KB if the ring alone needs more,
        and knows nothing of the table."""
        room = _DEFAULT_BYTES < self.bytes(bits, residual_bits) <= _SHARED_BYTES - TABLE_BYTES
        return room and self.wants_table(weights, residual_bits)

    def serves(self, columns: int) -> bool:
        """The copy engine must not be sent to columns that all lie beyond the end."""
        return columns % self.step == 0

    def share(self, tiles: int, steps: int, programs: int) -> int:
        """Steps of each program: whole tiles, which nobody has to add up, unless that leaves programs idle."""
        even = -(-tiles * steps // programs)
        whole = -(-tiles // programs) * steps
        return whole if whole <= _WHOLE_TILES * even else even


@_told_apart
class SplitK(NamedTuple):
    """``splitk.py``: a tile of ``block_n`` rows x ``block_m`` tokens; ``split`` programs share the columns; ``stages`` tiles
    in flight through shared memory (1: through registers)."""

    block_m: int
    block_n: int
    split: int
    stages: int
    warps: int


class Rotation(NamedTuple):
    """``rotate_scaled_kernel``: ``parts`` programs of ``warps`` warps share a token; each looks for the largest entry in
    ``chunk`` columns at a time, then rotates ``tiles`` tiles of 128 columns at a time."""

    parts: int
    tiles: int
    chunk: int
    warps: int


Schedule = Rotating | Slices | StreamK | Integer | SplitK
# By the names that files give them.
_KINDS: dict[str, type[Schedule]] = {
    "rotating": Rotating,
    "slices": Slices,
    "integer": Integer,
    "streamk": StreamK,
    "splitk": SplitK,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_MOST_OF_KIND: dict[type[Schedule], int] = {Rotating: 1, Slices: MOST_TOKENS, Integer: FEW_TOKENS}  # tokens
_VALUES = {"rows": (16, 32), "warps": (1, 2, 4, 8), "looked_up": (0, 1, 2)}  # of fields that take none but these

SLICE_ROWS = 16
# What an H100 wants: programs of `rotating.py`, at most, by residual bits and warps, and the columns up to which it is of
# use with a residual; warps of `slices.py`, at least and at most, and the activations beyond which it is of no use; programs
# of `splitk.py`, by block_m. (A search on an H200 gave those of one token with a residual of 1 to 3 bits.)
_ROTATING_PROGRAMS = {
    0: {8: 264, 4: 660},
    1: {8: 288, 4: 660},
    2: {8: 288, 4: 660},
    3: {8: 288, 4: 660},
    4: {8: 132, 4: 660},
}
_ROTATING_COLUMNS = 8192
# Weights from which on a second launch for the rotation pays, for one token unless all programs of `rotating.py` run at once
# with 8 warps; warps of `integer.py` and of `few.py` that run at once; the fewest that are enough (the last two: H200).
_INTEGER_WEIGHTS = 15 << 20
_INTEGER_WARPS = (3100, 3600)
_FEWEST_WARPS = 1000
# Warps of 32 rows of `slices.py` with a table, and columns from which on a program has so many (H200).
_LOOKING_WARPS, _WIDE_COLUMNS = 2100, 4096
_SLICE_WARPS = (1700, 4800)
_SLICE_ACTIVATIONS = 1 << 15
_PROGRAMS = {16: 1200, 32: 1200, 64: 600, 128: 300}
_WHOLE_TILES = 1.05  # how much longer `streamk.py` may take to avoid partial sums
# `streamk.py`: the fewest weights of a layer by the most tokens; tokens from which on cuBLAS is faster (small layers and
# those with long rows; all others), without and with a residual; weights below which tiles of half the tokens are faster,
# because fewer programs share one, by tokens of a tile and residual; shared memory of a program.
_STREAMK_WEIGHTS = {32: 1 << 25, 256: 3 << 22}
_STREAMK_MOST = ((1024, 512), (2048, 1024))
_HALF_TILES = {(128, False): 5 << 22, (256, False): 1 << 25, (256, True): 5 << 22}
_SHARED_BYTES, _ROTATION_BYTES, _DEFAULT_BYTES = 226 << 10, 90 << 10, 48 << 10
_LEAST_COLUMNS = 512  # of a share
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
ROTATION_PROGRAMS = 264  # two per multiprocessor
# Tokens from which on activations of 8 bits, where they are allowed, are faster than any other way (measured on an H100).
INT8_TOKENS = 1024
# Token counts at which the table has entries; a batch takes the next larger one, up to 4 tokens that of 8 if there is none
# for 4 and `few.py` does not serve the layer.
TOKENS = (1, FEW_TOKENS, MOST_TOKENS, 16, 32, 64, 128, 256)
Layer = tuple[int, int, int, int]  # rows, columns, bits, residual bits
Table = dict[str, dict[Layer, dict[int, Schedule]]]  # GPU -> layer -> tokens -> schedule
_TABLE: Table = {
    "NVIDIA H100 80GB HBM3": {
        (4096, 4096, 4, 0): {
            1: Rotating(8),
            16: SplitK(16, 64, 8, 1, 4),
            32: SplitK(32, 64, 6, 1, 4),
            64: StreamK(64, 2, 2),
            128: StreamK(64, 2, 2),
            256: StreamK(128, 2, 3),
        },
        (4096, 4096, 4, 4): {
            1: Rotating(8),
            8: Slices(16, 8, 1, 0),
            16: SplitK(16, 64, 8, 1, 4),
            32: SplitK(32, 64, 8, 1, 4),
            64: StreamK(64, 2, 2),
            128: SplitK(128, 64, 4, 3, 4),
            256: StreamK(128, 2, 3),
        },
        (3584, 18944, 4, 0): {256: StreamK(128, 2, 3)},
    },
}


ENVIRONMENT = "TURBOQUANT_WEIGHTS_SCHEDULES"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """What the table calls a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def entry_of(schedule: Schedule) -> dict[str, Any]:
    """A schedule as files hold it: the name of its kind, and its fields in order."""
    return dict(kind=_NAMES[type(schedule)], schedule=list(schedule))


def _schedule_of(entry: dict[str, Any]) -> Schedule:
    """What ``entry_of`` made a part of the entry; checks it, and that it serves the entry's layer and tokens."""
    name, values, tokens = entry.get("kind"), entry["schedule"], int(entry["tokens"])
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"{entry}: a kind is one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    if not isinstance(values, list) or len(values) != len(kind._fields) or not all(map(_is_value, kind._fields, values)):
        limits = "".join(f"; {field} one of {_VALUES[field]}" for field in kind._fields if field in _VALUES)
        rule = f"[{', '.join(kind._fields)}], positive integers{limits}"
        raise ValueError(f"{entry}: a schedule of the kind {name} is {rule}")
    if tokens not in TOKENS:
        raise ValueError(f"{entry}: tokens are one of {TOKENS}")
    if tokens > _MOST_OF_KIND.get(kind, tokens):
        raise ValueError(f"{entry}: tokens of the kind {name} are at most {_MOST_OF_KIND[kind]}")
    schedule = kind(*values)
    if isinstance(schedule, Integer):
        if int(entry["residual_bits"]) or not schedule.serves(int(entry["columns"])):
            raise ValueError(f"{entry}: the kind {name} is for layers without a residual and a multiple of 128 columns")
        if not schedule.fits(int(entry["bits"])):
            raise ValueError(f"{entry}: rows, warps and tiles ahead need more than {_DEFAULT_BYTES} bytes of shared memory")
    return schedule


def _is_value(field: str, value: object) -> bool:
    return type(value) is int and (value in _VALUES[field] if field in _VALUES else value > 0)


def read(path: Path) -> Table:
    """A file of ``tune``: a list of objects with the keys gpu, rows, columns, bits, residual_bits, tokens, kind (rotating,
    slices, integer, streamk or splitk) and schedule (the fields of that kind, in order)."""
    table: Table = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            layer = (int(entry["rows"]), int(entry["columns"]), int(entry["bits"]), int(entry["residual_bits"]))
            table.setdefault(str(entry["gpu"]), {}).setdefault(layer, {})[int(entry["tokens"])] = _schedule_of(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScheduleError(
            f"{path} ({ENVIRONMENT}) is no file of schedules: {error!r}. Write a new one with `turboquant-weights tune`, "
            "or unset the variable"
        ) from error
    return table


@functools.cache
def _own_table() -> Table:
    path = os.environ.get(ENVIRONMENT)
    return read(Path(path)) if path else {}


def crossover(residual_bits: int, rows: int, columns: int, warp_groups: bool = False) -> int:
    """Tokens above which a layer with an assembly decoder is dequantized for cuBLAS (measured on an H100, 4 bits)."""
    if warp_groups:
        return _STREAMK_MOST[columns <= 8192 and rows * columns >= 1 << 25][residual_bits > 0]
    return 256 if columns <= 8192 else 192


@functools.lru_cache(maxsize=8192)
def choose(
    gpu: str,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    residual_bits: int | None,
    warp_groups: bool = False,
    whole: bool = True,
) -> Schedule:
    """The schedule of [tokens, columns] times [rows, columns]; ``residual_bits`` is None without an assembly decoder,
    ``warp_groups`` says that `streamk.py` can serve the layer, ``whole`` that its scales can be copied by words."""
    if residual_bits is not None:
        whole = whole and Integer.serves(columns)
        are_few = 1 < tokens <= FEW_TOKENS and not residual_bits and rows * columns >= _INTEGER_WEIGHTS and whole
        at = next((t for t in TOKENS if t >= tokens), 0)
        served_by = (at, MOST_TOKENS) if at == FEW_TOKENS and not are_few else (at,)
        for table, entry_tokens in itertools.product((_own_table(), _TABLE), served_by):
            schedule = table.get(gpu, {}).get((rows, columns, bits, residual_bits), {}).get(entry_tokens)
            if isinstance(schedule, StreamK):
                if warp_groups and schedule.serves(columns):
                    return schedule
            elif schedule is not None and (whole or not isinstance(schedule, Integer)):
                return schedule
        if are_few or (tokens == 1 and residual_bits == 0 and whole and _is_for_integers(rows, columns)):
            return _integer(tokens, rows, columns)
        # Other GPUs have less shared memory, or were not measured.
        looking = _looking(tokens, rows, columns, bits, residual_bits) if warp_groups else None
        if looking is not None:
            return looking
        # Rotating takes registers, which a residual needs, too: over long rows, and over many, two launches are faster.
        if tokens == 1 and (not residual_bits or _rotates_in_one_wave(rows, columns)):
            return rotating(rows, columns, residual_bits)
        streamk = _streamk(tokens, rows * columns, bits, residual_bits)
        streams = warp_groups and streamk.serves(columns) and _is_enough(tokens, rows * columns)
        # It hides what decoding a residual costs, which is the same for one token and for eight.
        if streams and (residual_bits == 4 or (residual_bits and columns > _ROTATING_COLUMNS)):
            return streamk
        # Every 16 rows read all activations: without a residual to hide it, only from L1.
        if tokens <= MOST_TOKENS and (residual_bits or tokens * columns < _SLICE_ACTIVATIONS) and _slices_fit(rows, columns):
            return _slices(rows, columns, (bits, residual_bits) == (4, 0))
        if streams:
            return streamk
    return _splitk(tokens, rows, columns)


def rotation(tokens: int, columns: int) -> Rotation:
    """A program that has much to do keeps the GPU busier than many that all look for the largest entry of the same row."""
    tiles, chunk = (16, 1 << 14) if tokens < 16 else (64, 1 << 13)
    parts = min(-(-columns // (tiles * 128)), max(1, ROTATION_PROGRAMS // tokens))
    return Rotation(parts, tiles, min(chunk, max(1024, 1 << (columns - 1).bit_length())), 8)


def bytes_tile(tokens: int, rows: int, multiprocessors: int) -> tuple[int, int, int, int, int]:
    """Tokens, rows and columns of a tile of ``multiply_bytes_kernel``, its warps and stages; ``multiprocessors`` of an
    sm_90, 0 for others."""
    if not multiprocessors:
        return 128, 128, 64, 8, 3  # fits into 96 KB of shared memory
    token_tiles = -(-tokens // 128)
    large, small = (-(-token_tiles * -(-rows // width) // multiprocessors) for width in (256, 128))
    # A tile half as wide takes 0.6 of the time, and pays where it gives programs something to do that have nothing.
    return (128, 128, 128, 4, 4) if 0.6 * small < large else (128, 256, 128, 8, 4)


def rotating(rows: int, columns: int, residual_bits: int) -> Rotating:
    """As many warps per program as let all programs run at once, each with two tiles at least; for more programs, two."""
    row_tiles, tiles = -(-rows // SLICE_ROWS), -(-columns // 128)
    fitting = (w for w, most in _ROTATING_PROGRAMS[residual_bits].items() if row_tiles <= most and 2 * w <= tiles)
    return Rotating(next(fitting, min(2, tiles)))


def _is_for_integers(rows: int, columns: int) -> bool:
    one_wave = rows <= SLICE_ROWS * _ROTATING_PROGRAMS[0][8] and columns <= _ROTATING_COLUMNS
    return rows * columns >= _INTEGER_WEIGHTS and not one_wave


def _rotates_in_one_wave(rows: int, columns: int) -> bool:
    return rows <= SLICE_ROWS * _ROTATING_PROGRAMS[4][4] and columns <= _ROTATING_COLUMNS


def _integer(tokens: int, rows: int, columns: int) -> Integer:
    """Four warps per program, or two where that lets all programs run at once. Long rows are split, into as many parts as
    let all warps run at once; others only where there would be few warps."""
    row_tiles, tiles = -(-rows // SLICE_ROWS), -(-columns // 128)
    warps = 2 if 2 * row_tiles <= _INTEGER_WARPS[1] < 4 * row_tiles else 4
    fitting = [s for s in _SPLITS if 2 * warps * s <= tiles]
    if columns > _ROTATING_COLUMNS:
        split = max((s for s in fitting if warps * row_tiles * s <= _INTEGER_WARPS[tokens > 1]), default=1)
    else:
        split = next((s for s in fitting if warps * row_tiles * s >= _FEWEST_WARPS), max(fitting, default=1))
    return Integer(SLICE_ROWS, warps, split, 2)


def _looking(tokens: int, rows: int, columns: int, bits: int, residual_bits: int) -> Slices | None:
    """`slices.py` with a table of levels, where that is the fastest (on an H200): of 4 bits half of them are looked up, over
    longer rows with 32 of them to share activations; of 4+4 bits and one token all."""
    if bits != 4 or columns > _ROTATING_COLUMNS or not _slices_fit(rows, columns):
        return None
    row_tiles, tiles, weights = -(-rows // SLICE_ROWS), -(-columns // 128), rows * columns
    if residual_bits == 4 and tokens == 1 and weights >= _STREAMK_WEIGHTS[32]:
        return Slices(SLICE_ROWS if 4 * row_tiles <= _SLICE_WARPS[1] else 2 * SLICE_ROWS, 4, 1, 2)
    if residual_bits or not 1 < tokens <= MOST_TOKENS or weights < _INTEGER_WEIGHTS:
        return None
    if columns < _WIDE_COLUMNS:  # very many programs do not want to fill a table each
        return Slices(SLICE_ROWS, 4, 1, int(4 * row_tiles <= _SLICE_WARPS[1]))
    fitting = [s for s in _SPLITS if 2 * row_tiles * s <= _LOOKING_WARPS and 8 * s <= tiles]
    return Slices(2 * SLICE_ROWS, 4, max(fitting, default=1), 1)


def _slices_fit(rows: int, columns: int) -> bool:
    """Programs of eight warps run at once, or there are so many that a last wave does not matter; else `splitk.py` is
    faster."""
    return rows <= SLICE_ROWS * _ROTATING_PROGRAMS[0][8] or rows * columns >= _STREAMK_WEIGHTS[32]


def _slices(rows: int, columns: int, plain: bool) -> Slices:
    """As many warps per program as fit into one wave; more programs if the GPU would be idle. ``plain``: 4 bits alone.
    Others have more to decode: over long rows they want small programs, and many."""
    fewest, most = _SLICE_WARPS
    row_tiles, tiles = -(-rows // SLICE_ROWS), -(-columns // 128)
    if not plain and columns > _ROTATING_COLUMNS:
        fitting = [s for s in _SPLITS if row_tiles * 2 * s <= most and s * 4 <= tiles]
        return Slices(SLICE_ROWS, 2, max(fitting, default=1), 0)
    warps = next((w for w in (8, 4) if row_tiles * w <= most), 2 if plain else 4)
    while warps > 1 and warps > tiles:
        warps //= 2
    fitting = [s for s in _SPLITS if s * warps * 2 <= tiles]
    split = next((s for s in fitting if row_tiles * warps * s >= fewest), max(fitting, default=1))
    return Slices(SLICE_ROWS, warps, split, 0)


def _splitk(tokens: int, rows: int, columns: int) -> SplitK:
    """What the table has in common."""
    block_m = next((b for b in (16, 32, 64) if tokens <= b), 128)
    programs = -(-rows // 64) * -(-tokens // block_m)
    fitting = [s for s in _SPLITS if programs * s <= _PROGRAMS[block_m] and columns >= s * _LEAST_COLUMNS]
    return SplitK(block_m, 64, max(fitting, default=1), 1 if block_m <= 32 else 3, 4)


def _is_enough(tokens: int, weights: int) -> bool:
    """Whether `streamk.py`, which takes longer to start and to end, is the faster one."""
    return weights >= next((least for most, least in _STREAMK_WEIGHTS.items() if tokens <= most), 0)


def _streamk(tokens: int, weights: int, bits: int, residual_bits: int) -> StreamK:
    """Tiles of 256 tokens take 1.8 times as long as tiles of 128; what the table has in common."""
    if tokens <= 128 or -(-tokens // 128) * 5 < -(-tokens // 256) * 9:
        block_m = next(b for b in (16, 32, 64, 128) if tokens <= b or b == 128)
    else:
        block_m = 256
    if tokens <= 256 and weights < _HALF_TILES.get((block_m, residual_bits > 0), 0):
        block_m //= 2
    return StreamK(block_m, 2, streamk_stages(block_m, 2, weights, bits, residual_bits))


def streamk_stages(block_m: int, groups: int, weights: int, bits: int, residual_bits: int) -> int:
    """Two or three, if they fit into shared memory, up to 64 tokens beside what the rotation wants of it: with more on their
    way at once a layer takes longer. 2 bits are so few bytes that as many as fit."""
    one = StreamK(block_m, groups, 1)
    room, beside = _SHARED_BYTES - TABLE_BYTES * one.wants_table(weights, residual_bits), 0
    most = 3
    if block_m <= 64:
        few = residual_bits and (residual_bits < 4 or weights < _STREAMK_WEIGHTS[32])
        most, beside = 6 if bits + residual_bits == 2 else 2 if few else 3, _ROTATION_BYTES
        if residual_bits == 4 and not few:
            beside //= 2
    step = one.bytes(bits, residual_bits)
    return max(min(most, (room - beside) // step), min(2, room // step))
