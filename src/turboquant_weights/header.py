"""Reads what a safetensors file says it contains, without reading any tensor, and believes none of it unchecked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FormatError

MAX_JSON_BYTES = 100_000_000  # of a safetensors header; the limit of the safetensors library
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63 - 1
# Bytes per element of each dtype name.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


class TensorInfo(NamedTuple):
    """One tensor of a safetensors file; ``begin`` is its byte offset in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Header(NamedTuple):
    """A checked safetensors header: its tensors in the order of the file's bytes, and the digest of its bytes."""

    tensors: tuple[TensorInfo, ...]
    sha256: str


def parse_json(data: bytes, where: str, *, allow_nonfinite: bool = False) -> dict[str, Any]:
    """A JSON object; duplicate keys, anything but an object, and NaN or Infinity are a FormatError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise FormatError(f"{where}: the key {short(key)} occurs twice: one of the two values would be lost")
            out[key] = value
        return out

    def nonfinite(token: str) -> float:
        if allow_nonfinite:
            return float(token)
        raise FormatError(f"{where}: {token} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=nonfinite)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error}): the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: got a JSON {type(value).__name__}: it must be an object")
    return value


def read_json(path: Path, *, allow_nonfinite: bool = False) -> dict[str, Any]:
    """:func:`parse_json` of a file."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path.name, allow_nonfinite=allow_nonfinite)


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file, which must not be larger than ``limit`` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise FormatError(f"{path.name}: {size} bytes: at most {limit} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror}): the checkpoint needs it") from None


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size: every byte belongs to exactly one tensor.

    Raises:
        FormatError: any rule of the safetensors format is broken; the message names the file and the tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise FormatError(
                    f"{path.name}: a header of {length} bytes in a file of {size}: it must fit the file and "
                    f"{MAX_JSON_BYTES} bytes. The file is truncated or no safetensors file; fetch it again"
                )
            data = stream.read(length)
            if stream.seek(0, os.SEEK_END) != size or len(data) != length:
                raise FormatError(f"{path.name}: the file changed while it was read")
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror}): the checkpoint needs it") from None
    entries = parse_json(data, f"{path.name} (header)")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path.name}: __metadata__ is {short(metadata)}: it must map strings to strings")
    start = 8 + length
    tensors = sorted(
        (_tensor(path.name, start, name, entry) for name, entry in entries.items()), key=lambda t: (t.begin, t.nbytes)
    )
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            raise FormatError(
                f"{path.name}: {short(tensor.name)} begins at byte {tensor.begin}, where byte {position} is next: "
                "tensors must follow one another without gap or overlap"
            )
        position += tensor.nbytes
    if position != size:
        raise FormatError(
            f"{path.name}: {size} bytes, but its header describes {position}: the file is truncated or damaged; "
            "fetch it again"
        )
    return Header(tuple(tensors), hashlib.sha256(data).hexdigest())


def _tensor(file: str, start: int, name: str, entry: object) -> TensorInfo:
    where = f"{file}: {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} is described by {short(entry)}: dtype, shape and data_offsets are needed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{where} has dtype {short(dtype)}: known are {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{where} has shape {short(shape)}: it must be a list of at most {_MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{where} has data_offsets {short(offsets)}: they must be [begin, end]")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise FormatError(
            f"{where} has {end - begin} bytes, but shape {shape} and dtype {dtype} need {nbytes}: the header is damaged; "
            "fetch the file again"
        )
    return TensorInfo(name, dtype, tuple(shape), start + begin, nbytes)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def short(value: object) -> str:
    """A ``repr`` for messages, bounded in length and depth: the value comes from a file nobody has vouched for."""
    return _REPR.repr(value)
