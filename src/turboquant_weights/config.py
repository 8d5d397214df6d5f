"""What is stored in a checkpoint's ``quantization_config``: only what changes bytes on disk.

Letters used throughout the package: ``m`` tokens, ``n`` out_features, ``k`` in_features, ``g`` group size.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .errors import ConfigError

QUANT_METHOD = "turboquant_weights"
FORMAT_VERSION = 1
MAX_SEED = 2**32 - 1
BASE_BITS = (2, 3, 4)
RESIDUAL_BITS = (0, 1, 2, 3, 4)
GROUP_SIZES = (32, 64, 128)
LAYOUTS = ("out_in", "in_out")
_GLOB = frozenset("*?[")

Value = TypeVar("Value", covariant=True)


class ByName(Mapping[str, Value]):
    """An immutable, hashable mapping from names or glob patterns (``fnmatch``) to settings, in order."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)
        self._globs = [name for name in self._values if not _GLOB.isdisjoint(name)]  # a checkpoint has none, and many names

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)

    def pattern_for(self, name: str) -> str | None:
        """The key that decides about ``name``: the name itself, else the first pattern that matches it."""
        if name in self._values:
            return name
        return next((pattern for pattern in self._globs if fnmatch.fnmatchcase(name, pattern)), None)


class BitsByName(ByName[tuple[int, int]]):
    """``(bits, residual_bits)`` by name."""


# Rows of a graded embedding that have the same bits: (rows, bits, residual_bits), in the order in which they are stored.
Grade = tuple[int, int, int]
Grades = tuple[Grade, ...]
EmbeddingBits = tuple[int, int] | Grades


class EmbeddingsByName(ByName[EmbeddingBits]):
    """Of each embedding ``(bits, residual_bits)``, or its grades."""


class LayoutByName(ByName[str]):
    """Which way the matrices of an expert stack lie, by name: one of :data:`LAYOUTS`."""


@dataclasses.dataclass(frozen=True)
class TurboQuantConfig:
    """How weights are quantized. Immutable; equal configs and equal weights give equal bytes.

    Args:
        bits: Bits of the base plane, 2, 3 or 4.
        residual_bits: Bits of the nested residual plane, 0 (none) to 4. ``bits=4, residual_bits=4`` costs next to nothing.
        group_size: Columns that one Hadamard rotation mixes: 32, 64 or 128. A layer whose ``in_features`` it does not
            divide uses the largest smaller power of two that fits (FORMAT.md section 3).
        seed: Seed of the random signs, 0 to 2**32 - 1. Layers with the same seed and input share one rotation.
        skip: Glob patterns (``fnmatch``) of module names that stay as they are, e.g. ``("lm_head", "*.router")``.
            In a saved checkpoint these are the exact names of the layers that were left alone. ``None`` means the
            default: the output head and whatever shares its weight.
        layer_bits: Layers that get other bits: glob pattern -> ``(bits, residual_bits)``, e.g. ``{"*.down_proj": (4, 2)}``.
            A layer's own name comes before patterns, among those the first match wins; a layer that nothing matches has
            ``bits`` and ``residual_bits``. In a saved checkpoint: exact names of the layers that differ.
        embeddings: Embeddings to quantize, by default none: glob pattern -> ``(bits, residual_bits)``, e.g.
            ``{"model.embed_tokens": (4, 2)}``. An output head tied to one shares its planes. Or grades, ``((rows, bits,
            residual_bits), ...)``: so many rows, those that matter most to the calibration text first, have these bits; a
            budget finds them. In a saved checkpoint: exact names.
        experts: Parameters [experts, ., .] that hold a matrix per expert, for models whose own are not recognised: glob
            pattern -> ``"out_in"`` if each matrix is [out_features, in_features], ``"in_out"`` if it is the transpose. In a
            saved checkpoint: exact names of all stacks that are quantized.
        source: Provenance written by this package into checkpoints (model, revision, package version). Not an input
            of the algorithm.
        format_version: Version of FORMAT.md. This package reads and writes version 1.

    Raises:
        ConfigError: a value is out of range; the message names the field and the allowed values.
    """

    bits: int = 4
    residual_bits: int = 0
    group_size: int = 128
    seed: int = 0
    skip: tuple[str, ...] | None = None
    layer_bits: Mapping[str, tuple[int, int]] | None = None
    embeddings: Mapping[str, EmbeddingBits] | None = None
    experts: Mapping[str, str] | None = None
    source: dict[str, str] | None = dataclasses.field(default=None, compare=False)
    format_version: int = FORMAT_VERSION
    # A class attribute, not a field: Transformers dispatches on it and nobody may change it.
    quant_method = QUANT_METHOD

    def __post_init__(self) -> None:
        _require_member("bits", self.bits, BASE_BITS)
        _require_member("residual_bits", self.residual_bits, RESIDUAL_BITS)
        _require_member("group_size", self.group_size, GROUP_SIZES)
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed!r}: it must be an integer from 0 to {MAX_SEED}")
        if self.format_version != FORMAT_VERSION or type(self.format_version) is not int:
            raise ConfigError(
                f"format_version is {self.format_version!r}: this package reads version {FORMAT_VERSION}; "
                "install a newer turboquant-weights if the checkpoint is newer"
            )
        if self.skip is not None:
            if not isinstance(self.skip, (list, tuple)) or not all(isinstance(p, str) for p in self.skip):
                raise ConfigError(f"skip is {self.skip!r}: it must be a list of glob patterns such as ['lm_head']")
            object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "layer_bits", _bits_by_name("layer_bits", self.layer_bits, "*.down_proj"))
        object.__setattr__(self, "embeddings", _embeddings_by_name(self.embeddings))
        object.__setattr__(self, "experts", _layout_by_name(self.experts))
        if self.source is not None and not (
            isinstance(self.source, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in self.source.items())
        ):
            raise ConfigError(f"source is {self.source!r}: it must map strings to strings")

    @property
    def total_bits(self) -> int:
        """Bits per weight of both planes, without scales."""
        return self.bits + self.residual_bits

    @property
    def label(self) -> str:
        """Short name in tables, of linear layers: ``4``, ``4+2``, or ``mixed`` if the bits depend on the layer."""
        if self.layer_bits:
            return "mixed"
        return f"{self.bits}+{self.residual_bits}" if self.residual_bits else str(self.bits)

    def for_layer(self, name: str) -> TurboQuantConfig:
        """The config of the linear layer or expert stack ``name`` alone: its own bits, and nothing by name."""
        return self._own_bits(self.layer_bits, name) or dataclasses.replace(
            self, layer_bits=None, embeddings=None, experts=None
        )

    def for_embedding(self, name: str) -> TurboQuantConfig | None:
        """The config of the embedding ``name`` alone; None if it is not quantized, or graded. ``<name>.<i>`` is grade ``i``
        of a graded one, and an embedding of its own."""
        bits = self._embedding_bits(name)
        if bits is None:
            parent, _, index = name.rpartition(".")
            grades = self.grades(parent)
            if grades is None or not index.isdecimal() or int(index) >= len(grades) or index != str(int(index)):
                return None
            bits = grades[int(index)][1:]
        return None if is_graded(bits) else self.with_bits(*bits)

    def grades(self, name: str) -> Grades | None:
        """Those of the embedding ``name``, if it is graded."""
        bits = self._embedding_bits(name)
        return bits if bits is not None and is_graded(bits) else None  # type: ignore[return-value]

    def _embedding_bits(self, name: str) -> EmbeddingBits | None:
        pattern = self.embeddings.pattern_for(name) if isinstance(self.embeddings, EmbeddingsByName) else None
        return None if pattern is None or self.embeddings is None else self.embeddings[pattern]

    def _own_bits(self, by_name: Mapping[str, tuple[int, int]] | None, name: str) -> TurboQuantConfig | None:
        pattern = by_name.pattern_for(name) if isinstance(by_name, BitsByName) else None
        return None if by_name is None or pattern is None else self.with_bits(*by_name[pattern])

    def with_bits(self, bits: int, residual_bits: int) -> TurboQuantConfig:
        """That of one layer: these bits, and nothing by name."""
        return dataclasses.replace(
            self, bits=bits, residual_bits=residual_bits, layer_bits=None, embeddings=None, experts=None
        )

    def exact(
        self,
        layers: Iterable[str],
        skip: Iterable[str],
        embeddings: Mapping[str, EmbeddingBits] | None = None,
        experts: Mapping[str, str] | None = None,
    ) -> TurboQuantConfig:
        """As a checkpoint stores it: patterns resolved to the names of the quantized ``layers`` (linear ones, and stacks of
        ``experts``), the skipped ones, and the quantized ``embeddings``.

        If no layer has ``bits`` and ``residual_bits``, those become what most layers have.
        """
        own = {name: (config.bits, config.residual_bits) for name in layers for config in [self.for_layer(name)]}
        default = (self.bits, self.residual_bits)
        if own and default not in own.values():
            default = collections.Counter(own.values()).most_common(1)[0][0]
        layer_bits = {name: own[name] for name in sorted(own) if own[name] != default}
        return dataclasses.replace(
            self,
            bits=default[0],
            residual_bits=default[1],
            skip=tuple(skip),
            layer_bits=layer_bits,
            embeddings=dict(sorted((embeddings or {}).items())),
            experts=dict(sorted((experts or {}).items())),
        )

    def base_only(self) -> TurboQuantConfig:
        """The same without any residual plane."""
        layer_bits = {name: (bits, 0) for name, (bits, _) in (self.layer_bits or {}).items()}
        embeddings: dict[str, EmbeddingBits] = {
            name: tuple((rows, b, 0) for rows, b, _ in bits) if is_graded(bits) else (bits[0], 0)  # type: ignore[misc]
            for name, bits in (self.embeddings or {}).items()
        }
        return dataclasses.replace(self, residual_bits=0, layer_bits=layer_bits, embeddings=embeddings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary, as stored under ``quantization_config`` in ``config.json``."""
        out: dict[str, Any] = {"quant_method": QUANT_METHOD}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (BitsByName, EmbeddingsByName)):
                out[field.name] = {name: _as_lists(bits) for name, bits in value.items()}
            elif isinstance(value, LayoutByName):
                out[field.name] = dict(value)
            elif field.name not in ("layer_bits", "embeddings", "experts"):  # absent is how a checkpoint says "none"
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TurboQuantConfig:
        """Inverse of :meth:`to_dict`. An unknown key is an error, never ignored: it could change the bytes."""
        if not isinstance(values, dict):
            raise ConfigError(f"quantization_config is {type(values).__name__}: it must be a JSON object")
        values = dict(values)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method is {method!r}: this package reads {QUANT_METHOD!r}")
        version = values.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:  # before unknown keys: a newer version explains them
            cls(format_version=version)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"quantization_config has unknown keys {unknown}: allowed are {sorted(known)}. "
                "Remove them, or install the turboquant-weights that wrote this checkpoint"
            )
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def with_skip(config: TurboQuantConfig, skip: Sequence[str] | None) -> TurboQuantConfig:
    """``config`` with these patterns instead of its own; None changes nothing."""
    if skip is None:
        return config
    return dataclasses.replace(config, skip=skip if isinstance(skip, str) else tuple(skip))  # type: ignore[arg-type]


def _require_member(name: str, value: object, allowed: tuple[int, ...]) -> None:
    if type(value) is not int or value not in allowed:
        raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}")


def _bits_by_name(field: str, value: object, example: str) -> BitsByName | None:
    """Checked and frozen; None for an empty one."""
    if value is None or isinstance(value, BitsByName):
        return value or None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{field} is {value!r}: it must map names to (bits, residual_bits), e.g. {{{example!r}: (4, 2)}}")
    out = {name: _bits(f"{field}[{name!r}]", pair) for name, pair in value.items()}
    return BitsByName(out) if out else None


def _bits(where: str, pair: object) -> tuple[int, int]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ConfigError(f"{where} is {pair!r}: it must be (bits, residual_bits), e.g. (4, 2)")
    _require_member(f"{where}: bits", pair[0], BASE_BITS)
    _require_member(f"{where}: residual_bits", pair[1], RESIDUAL_BITS)
    return pair[0], pair[1]


def is_graded(bits: EmbeddingBits) -> bool:
    """Whether these are grades, and not one pair for all rows."""
    return isinstance(bits[0], tuple)


def _embeddings_by_name(value: object) -> EmbeddingsByName | None:
    """The same for embeddings, which may be graded."""
    if value is None or isinstance(value, EmbeddingsByName):
        return value or None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(
            f"embeddings is {value!r}: it must map names to (bits, residual_bits), e.g. {{'model.embed_tokens': (4, 2)}}"
        )
    out: dict[str, EmbeddingBits] = {}
    for name, bits in value.items():
        where = f"embeddings[{name!r}]"
        if not isinstance(bits, (tuple, list)) or not bits or not isinstance(bits[0], (tuple, list)):
            out[name] = _bits(where, bits)
            continue
        grades = []
        for i, grade in enumerate(bits):
            if not isinstance(grade, (tuple, list)) or len(grade) != 3 or type(grade[0]) is not int or grade[0] < 1:
                raise ConfigError(
                    f"{where}[{i}] is {grade!r}: a grade must be (rows, bits, residual_bits) with at least one row, e.g. "
                    "(8000, 4, 2)"
                )
            grades.append((grade[0], *_bits(f"{where}[{i}]", grade[1:])))
        out[name] = tuple(grades)
    return EmbeddingsByName(out) if out else None


def _as_lists(bits: EmbeddingBits) -> list[Any]:
    return [list(part) if isinstance(part, tuple) else part for part in bits]


def _layout_by_name(value: object) -> LayoutByName | None:
    """The same for the layouts of expert stacks."""
    if value is None or isinstance(value, LayoutByName):
        return value or None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"experts is {value!r}: it must map names to 'out_in' or 'in_out', e.g. {{'*.w_up': 'out_in'}}")
    for name, layout in value.items():
        if not isinstance(layout, str) or layout not in LAYOUTS:
            raise ConfigError(
                f"experts[{name!r}] is {layout!r}: it must be 'out_in' (each matrix [out_features, in_features]) or 'in_out'"
            )
    return LayoutByName(value) if value else None
