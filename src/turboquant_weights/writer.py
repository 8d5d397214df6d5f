"""Writes safetensors files tensor by tensor: the layout is known before the first byte, and the bytes repeat.

The ``safetensors`` library wants all tensors of a file at once and writes its metadata in random order. Here the header is
written first, the file gets its full size, and each tensor goes to its place when it is ready. Tensors lie in the
library's order (larger element types first, then by name), so that every tensor is aligned to its element size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .header import TensorInfo

# Safetensors' names of torch's dtypes.
DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNMENT = 8  # of the first tensor's byte
_CHUNK = 1 << 20


class TensorSpec(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        return cls(name, tensor.dtype, tuple(tensor.shape))


class Shard(NamedTuple):
    """One file: its header's bytes, length prefix included, and where in the file each tensor lies."""

    file: str
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_bytes: int, metadata: Mapping[str, str]) -> list[Shard]:
    """Distributes the tensors over files of at most ``max_bytes`` of data each, in order; a group is never divided, so a
    larger one gets a file of its own. One file is called ``model.safetensors``, several ``model-00001-of-0000n...``."""
    files: list[list[TensorSpec]] = []
    size = 0
    for group in groups:
        nbytes = sum(spec.nbytes for spec in group)
        if not files or size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].extend(group)
        size += nbytes
    if len(files) == 1:
        return [_layout("model.safetensors", files[0], metadata)]
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    return [_layout(name, specs, metadata) for name, specs in zip(names, files, strict=True)]


def _layout(file: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, DTYPE_NAMES[spec.dtype], spec.name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for spec in ordered:
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors = {}
    start = len(header)
    for spec in ordered:
        tensors[spec.name] = TensorInfo(spec.name, DTYPE_NAMES[spec.dtype], spec.shape, start, spec.nbytes)
        start += spec.nbytes
    return Shard(file, header, tensors, start)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """``model.safetensors.index.json`` of several files."""
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """Files of a folder that are being filled. What a file holds outside the tensors written here stays as it is: a run
    that was interrupted goes on in the same files."""

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        self._folder = folder
        self._shards = {shard.file: shard for shard in shards}
        self._file_of = {name: shard.file for shard in self._shards.values() for name in shard.tensors}

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Puts tensors in their places and forces them to disk. Returns the SHA-256 of each one's bytes."""
        digests: dict[str, str] = {}
        for file, names in self._by_file(tensors).items():
            shard = self._shards[file]
            path = self._folder / file
            with path.open("r+b" if path.exists() else "w+b") as stream:
                stream.write(shard.header)
                stream.truncate(shard.size)
                for name in names:
                    digests[name] = _write(stream, shard.tensors[name], tensors[name])
                stream.flush()
                os.fsync(stream.fileno())
        return digests

    def holds(self, digests: Mapping[str, str]) -> bool:
        """Whether the files hold exactly these bytes of these tensors, and their headers."""
        for file, names in self._by_file(digests).items():
            shard, path = self._shards[file], self._folder / file
            if not path.is_file() or path.stat().st_size != shard.size:
                return False
            with path.open("rb") as stream:
                if stream.read(len(shard.header)) != shard.header:
                    return False
                if any(_digest(stream, shard.tensors[name]) != digests[name] for name in names):
                    return False
        return True

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self._file_of[name], []).append(name)
        return files


def _write(stream: BinaryIO, place: TensorInfo, tensor: Tensor) -> str:
    got = (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape))
    assert got == (place.dtype, place.shape), f"{place.name} is {got}, planned was {place}"
    digest = hashlib.sha256()
    stream.seek(place.begin)
    # As bytes: numpy knows neither bfloat16 nor float8.
    for part in tensor.detach().cpu().contiguous().flatten().view(torch.uint8).split(_CHUNK):
        data = part.numpy().data
        digest.update(data)
        stream.write(data)
    return digest.hexdigest()


def _digest(stream: BinaryIO, place: TensorInfo) -> str:
    digest, left = hashlib.sha256(), place.nbytes
    stream.seek(place.begin)
    while left and (data := stream.read(min(left, _CHUNK))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()
