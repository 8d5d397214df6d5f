"""Checkpoint folders: written whole or not at all, and checked before anything is allocated (FORMAT.md)."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .config import Grades, TurboQuantConfig
from .errors import ConfigError, FormatError
from .header import Header, TensorInfo, read_header, read_json, short
from .planes import PLANES
from .reference import MAX_EXPONENT, MIN_EXPONENT, packed_shapes
from .rotation import SCALE_BLOCK

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "turboquant_weights.json"
SUFFIX = ".safetensors"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8"}
_FLOATS = ("F16", "BF16", "F32")
_ORDER = ".order"  # ends the name of the tensor that says where the rows of a graded embedding lie


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a new empty folder beside ``path``; it becomes ``path`` when the block ends, or vanishes if the block raises.

    Any exception counts, Ctrl-C and a full disk included. Until the end nothing at ``path`` changes. A folder that is
    replaced is moved aside first and deleted last, so one complete checkpoint exists at every moment.

    Args:
        path: The folder to create; its parents are created too. An existing empty folder is no obstacle.
        overwrite: Replace an existing model folder (one with a ``config.json``), whatever else is in it.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false, or it is not a model folder.
        OSError: from the file system, e.g. a full disk.
    """
    target = Path(os.path.realpath(path))  # through a link: replace what it points to, keep the link
    check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.writing-{secrets.token_hex(4)}"
    temporary.mkdir()  # not tempfile: its folders are readable by their owner only
    try:
        yield temporary
        publish(temporary, target, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Turns the complete folder ``temporary`` into ``target``, beside which it must lie; see :func:`atomic_folder`."""
    _settle(temporary)
    check_replaceable(target, overwrite)  # it may have appeared meanwhile
    replaced = target.parent / f".{target.name}.replaced-{secrets.token_hex(4)}"
    try:
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def check_is_folder_or_hub_id(model: str | os.PathLike[str]) -> None:
    """Raises a ConfigError for a file, and for what can only be a path but leads nowhere: the hub would not know it."""
    text = os.fspath(model)
    if os.path.isfile(text):
        raise ConfigError(f"{text} is a file: the model's folder is needed, {os.path.dirname(text) or '.'}")
    looks_like_path = not isinstance(model, str) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    if looks_like_path and not os.path.exists(text):
        raise ConfigError(f"no such folder: {text}")


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises a FileExistsError if something is at ``target`` that may not be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder, or allow overwriting it")
    if not (target / CONFIG_FILE).is_file():
        raise FileExistsError(
            f"{target} is not a model folder (it has no {CONFIG_FILE}): only those are overwritten. "
            "Choose another, or delete it"
        )


def _settle(folder: Path) -> None:
    """Forces the files to disk (after a power cut the renamed folder must not hold empty files) and lets all read them
    who may read the folder: safetensors makes its files readable by their owner only."""
    readable = folder.stat().st_mode & 0o666
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            file.chmod(file.stat().st_mode | readable)
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One quantized layer as stored; ``columns`` is in_features rounded up to a multiple of 32, ``nbytes`` has the bias.
    ``kind`` is "linear", "embedding" or "experts"; ``out_features`` of an embedding is the number of its rows; of an expert
    stack both sizes are those of one of the ``experts``."""

    name: str
    out_features: int
    columns: int
    label: str
    nbytes: int
    kind: str
    experts: int = 1

    @property
    def weights(self) -> int:
        """Of all experts; padding columns count."""
        return self.experts * self.out_features * self.columns


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checked folder holds. ``files`` maps file names to bytes, ``others`` the tensors that are not quantized."""

    folder: Path
    config: TurboQuantConfig
    architecture: str
    layers: tuple[LayerInfo, ...]
    others: tuple[TensorInfo, ...]
    files: dict[str, int]
    has_manifest: bool

    @property
    def quantized_bytes(self) -> int:
        """Bytes of all quantized layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def other_bytes(self) -> int:
        """Bytes of all other tensors: embeddings, norms, skipped layers."""
        return sum(tensor.nbytes for tensor in self.others)

    def dense_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that are not quantized, by the reason: what the file alone can tell."""
        skip = set(self.config.skip or ())
        kinds: dict[str, int] = {}
        for tensor in self.others:
            if {tensor.name, tensor.name.rpartition(".")[0]} & skip:
                kind = "in layers that were skipped"
            elif len(tensor.shape) > 2:
                kind = "in tensors of three or more dimensions that are no known stack of experts (convolutions, ...)"
            elif len(tensor.shape) == 2:
                kind = "in matrices of modules that are no linear layers (embeddings, routers, ...)"
            else:
                kind = "in vectors (norms, biases, ...)"
            kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    @property
    def total_bytes(self) -> int:
        """Bytes of the files that a model is loaded from."""
        return sum(self.files.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, everything counted (weights: out_features x stored columns)."""
        return 8 * self.quantized_bytes / sum(layer.weights for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Result of :func:`verify`. ``checksums`` are SHA-256 by file; ``manifest_checked`` says whether they were compared."""

    info: CheckpointInfo
    checksums: dict[str, str]
    manifest_checked: bool


def validate(folder: str | os.PathLike[str]) -> CheckpointInfo:
    """Checks names, shapes, dtypes, versions and sizes of a checkpoint from its JSON files and tensor headers alone.

    No tensor is read and nothing is allocated for one. The first rule of FORMAT.md that is broken is reported.

    Raises:
        FormatError: with the file, the tensor, what was found, the rule and the cure.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FormatError(f"{root}: not a folder: a checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    config, architecture = _read_config(root)
    headers = read_headers(root)
    tensors = {tensor.name: tensor for header in headers.values() for tensor in header.tensors}
    layers, others = check_tensors(tensors, config)
    names = [CONFIG_FILE, *([INDEX_FILE] if (root / INDEX_FILE).exists() else []), *headers]
    has_manifest = (root / MANIFEST_FILE).exists()
    if has_manifest:
        compare_manifest(root, config, headers)
    files = {name: (root / name).stat().st_size for name in names}
    return CheckpointInfo(root, config, architecture, layers, others, files, has_manifest)


def verify(folder: str | os.PathLike[str]) -> Verification:
    """:func:`validate`, then reads every byte: checksums against the manifest if there is one, and exponents.

    Without a manifest (a folder that ``save_pretrained`` wrote) a changed byte cannot be told from a right one:
    ``manifest_checked`` is False then.

    Raises:
        FormatError: a file differs from what was saved, or a value is out of range.
    """
    info = validate(folder)
    listed = _read_manifest(info.folder)["files"] if info.has_manifest else {}
    checksums = {name: _sha256(info.folder / name) for name in {**info.files, **listed}}
    for name, entry in listed.items():
        if checksums[name] != entry["sha256"]:
            raise FormatError(
                f"{name}: SHA-256 is {checksums[name]}, but {MANIFEST_FILE} says {entry['sha256']}: the file was changed or "
                f"damaged after saving. Fetch it again (or delete {MANIFEST_FILE} if you changed it on purpose)"
            )
    check_values(info)
    return Verification(info, checksums, info.has_manifest)


def check_values(info: CheckpointInfo) -> None:
    """Reads the only stored values that can be out of range (FORMAT.md section 7): exponents, and orders of graded
    embeddings. A loader must call it.

    Raises:
        FormatError: an exponent is forbidden, or an order does not name every row once.
    """
    orders = {name + _ORDER for name in info.config.embeddings or () if info.config.grades(name) is not None}
    for name in info.files:
        if name.endswith(SUFFIX):
            _check_exponents(info.folder / name)
            if orders:
                _check_orders(info.folder / name, orders)


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Writes ``turboquant_weights.json``: size and SHA-256 of each file, so that :func:`verify` can find a changed byte.

    Call it last. The folder is validated first; the model card and hidden files are not listed, they may be edited.
    """
    root = Path(folder)
    (root / MANIFEST_FILE).unlink(missing_ok=True)
    config = validate(root).config
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(root.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".md":
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            if path.suffix == SUFFIX:
                files[path.name]["header_sha256"] = read_header(path).sha256
    manifest = {"format_version": config.format_version, "quantization_config": config.to_dict(), "files": files}
    (root / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_config(root: Path) -> tuple[TurboQuantConfig, str]:
    values = read_json(root / CONFIG_FILE, allow_nonfinite=True)  # some models store an infinite limit
    quantization = values.get("quantization_config")
    if not isinstance(quantization, dict):
        raise FormatError(
            f"{CONFIG_FILE}: quantization_config is {short(quantization)}: an object is needed. "
            "This is not a quantized model; quantize it first"
        )
    config = _parse_config(quantization, CONFIG_FILE)
    if config.skip is None:
        raise FormatError(f"{CONFIG_FILE}: skip is null: a checkpoint must list the linear layers that are not quantized")
    match values.get("architectures"):
        case [str(architecture), *_]:
            return config, architecture
    return config, "unknown"


def _parse_config(values: dict[str, Any], file: str) -> TurboQuantConfig:
    for key in ("quant_method", "format_version", "bits", "residual_bits", "group_size", "seed"):
        if key not in values:
            raise FormatError(f"{file}: quantization_config has no {key!r}: a reader must not guess it. Restore the file")
    try:
        return TurboQuantConfig.from_dict(values)
    except ConfigError as error:
        text = str(error)  # it quotes the file, at any length
        raise FormatError(f"{file}: {text if len(text) < 500 else f'{text[:250]} ... {text[-250:]}'}") from None
    except RecursionError:
        raise FormatError(f"{file}: quantization_config is nested too deeply") from None


def read_headers(root: Path) -> dict[str, Header]:
    """File name -> header, of every safetensors file the checkpoint consists of."""
    single, index = root / WEIGHTS_FILE, root / INDEX_FILE
    if single.exists() == index.exists():
        raise FormatError(
            f"{root}: {f'both {WEIGHTS_FILE} and' if single.exists() else f'neither {WEIGHTS_FILE} nor'} {INDEX_FILE} "
            f"exist{'' if single.exists() else 's'}: exactly one must. "
            + ("Delete the older one" if single.exists() else "Only safetensors files are read; save the model with them")
        )
    if single.exists():
        return {WEIGHTS_FILE: read_header(single)}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX_FILE}: weight_map is {short(weight_map)}: it must map tensor names to file names")
    expected: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise FormatError(
                f"{INDEX_FILE}: {short(tensor)} is in {short(file)}: it must be the name of a {SUFFIX} file in this folder"
            )
        expected.setdefault(file, set()).add(tensor)
    headers = {file: read_header(root / file) for file in sorted(expected)}
    for file, header in headers.items():
        found = {tensor.name for tensor in header.tensors}
        if found != expected[file]:
            name = min(found ^ expected[file])
            has, lacks = (file, INDEX_FILE) if name in found else (INDEX_FILE, file)
            raise FormatError(
                f"{file}: {short(name)} is listed by {has} but not for this file by {lacks}: both must agree. "
                "Fetch both again"
            )
    return headers


def check_tensors(
    tensors: dict[str, TensorInfo], config: TurboQuantConfig
) -> tuple[tuple[LayerInfo, ...], tuple[TensorInfo, ...]]:
    """Splits the tensors into quantized layers, each complete and consistent, and the rest."""
    quantized: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        layer, _, plane = name.rpartition(".")
        if plane in PLANES:
            if not layer:
                raise FormatError(f"{name!r}: a plane must belong to a layer: its name must be <layer>.{plane}")
            quantized.setdefault(layer, {})[plane] = tensor
    if not quantized:
        raise FormatError("no tensor is called <layer>.codes: the checkpoint holds no quantized layer")
    others = []
    graded = {name: grades for name in config.embeddings or () if (grades := config.grades(name)) is not None}
    for name, grades in graded.items():
        _check_grades(name, grades, tensors, quantized)
    for name, tensor in tensors.items():
        owner = _owner(name, quantized)
        if name.endswith(_ORDER) and name.removesuffix(_ORDER) in graded:
            quantized[f"{name.removesuffix(_ORDER)}.0"]["order"] = tensor
            continue
        if owner is None and name in quantized and name in (config.experts or {}):
            quantized[name]["weight"] = tensor  # a stack has the name of its parameter, and so has its tripwire
        elif owner is None:
            others.append(tensor)
        elif (part := name[len(owner) + 1 :]) in ("bias", "weight") and owner not in (config.experts or {}):
            quantized[owner][part] = tensor
        elif part not in PLANES:
            kind, bias = ("stack of experts", "") if owner in (config.experts or {}) else ("quantized layer", " and bias")
            raise FormatError(f"{short(name)}: a {kind} has no such tensor: allowed are {', '.join(PLANES)}{bias}")
    own = {f"{name}.{i}": name for name, grades in graded.items() for i in range(len(grades))}
    for field in ("layer_bits", "embeddings", "experts"):
        for name in getattr(config, field) or ():
            if name in own:
                raise FormatError(
                    f"{CONFIG_FILE}: {field} has {short(name)}, a grade of {short(own[name])}: its bits are said there"
                )
            if name not in quantized and name not in graded:
                raise FormatError(
                    f"{CONFIG_FILE}: {field} has {short(name)}, but the checkpoint holds no quantized layer of that name: "
                    "only exact names of quantized layers are allowed"
                )
            if field != "embeddings" and name in (config.embeddings or {}):
                raise FormatError(f"{CONFIG_FILE}: {short(name)} is under {field} and under embeddings: it must be one")
    layers = tuple(_check_layer(name, parts, config) for name, parts in sorted(quantized.items()))
    return layers, tuple(others)


def _check_grades(
    name: str, grades: Grades, tensors: dict[str, TensorInfo], quantized: Mapping[str, dict[str, TensorInfo]]
) -> None:
    """A graded embedding: each grade has its rows, ``order`` one entry per row of all, and there is nothing else."""
    own = {f"{name}.{i}" for i in range(len(grades))}
    for layer in quantized:
        inside, _, rest = layer.rpartition(".")
        if layer == name or (inside == name and rest.isdecimal() and layer not in own):
            raise FormatError(
                f"{short(layer)} has planes, but {CONFIG_FILE} says that {short(name)} consists of {len(grades)} grades: "
                f"only {short(name)}.0 to {short(name)}.{len(grades) - 1} may have any"
            )
    for i, (rows, _, _) in enumerate(grades):
        scales = quantized.get(f"{name}.{i}", {}).get("scales")
        if scales is None or scales.shape[:1] != (rows,):
            found = "missing" if scales is None else f"of shape {list(scales.shape)}"
            raise FormatError(f"{short(f'{name}.{i}.scales')} is {found}: {CONFIG_FILE} says that grade {i} has {rows} rows")
    total = sum(rows for rows, _, _ in grades)
    order = tensors.get(name + _ORDER)
    if order is None or order.shape != (total,) or order.dtype != "I32":
        got = None if order is None else (order.shape, order.dtype)
        raise FormatError(f"{short(name + _ORDER)} is {_describe(got)}: with these grades it must be I32 [{total}]")


def _owner(name: str, layers: Container[str]) -> str | None:
    """The quantized layer inside which a tensor's name lies."""
    end = name.rfind(".")
    while end >= 0:
        if name[:end] in layers:
            return name[:end]
        end = name.rfind(".", 0, end)
    return None


def _check_layer(name: str, parts: dict[str, TensorInfo], config: TurboQuantConfig) -> LayerInfo:
    assert config.skip is not None
    if name in config.skip:
        raise FormatError(f"{short(name)} is quantized, but listed under skip in {CONFIG_FILE}: it must be one or the other")
    scales = parts.get("scales")
    stacked = name in (config.experts or {})
    if scales is None or len(scales.shape) != 2 + stacked or 0 in scales.shape:
        shape_text = "missing" if scales is None else f"of shape {list(scales.shape)}"
        rule_text = "tensor [experts, out_features, columns / 32]" if stacked else "matrix [out_features, columns / 32]"
        raise FormatError(f"{short(name + '.scales')} is {shape_text}: it must be a uint8 {rule_text}")
    embedding = config.for_embedding(name)
    config = embedding or config.for_layer(name)
    if embedding is not None and "bias" in parts:
        raise FormatError(f"{short(f'{name}.bias')}: an embedding has no bias: allowed are {', '.join(PLANES)}")
    count, rows = scales.shape[0] if stacked else 1, scales.shape[-2]
    columns = scales.shape[-1] * SCALE_BLOCK
    expected = {
        plane: (((count, *shape) if stacked else shape), _DTYPE_NAMES[dtype])
        for plane, (shape, dtype) in packed_shapes(rows, columns, config.bits, config.residual_bits).items()
    }
    for plane in PLANES:
        tensor, rule = parts.get(plane), expected.get(plane)
        got = None if tensor is None else (tensor.shape, tensor.dtype)
        if got != rule:
            raise FormatError(
                f"{short(f'{name}.{plane}')} is {_describe(got)}: with {config.label} bits and scales {list(scales.shape)} "
                f"it must be {_describe(rule)}. The config does not belong to these tensors, or one of them is damaged"
            )
    for part, size in (("bias", rows), ("weight", 0)):
        dense = parts.get(part)
        if dense is not None and (dense.shape != (size,) or dense.dtype not in _FLOATS):
            raise FormatError(
                f"{short(f'{name}.{part}')} is {_describe((dense.shape, dense.dtype))}: in a quantized layer it must be "
                f"one of {', '.join(_FLOATS)} and of shape [{size}]"
            )
    kind = "experts" if stacked else "linear" if embedding is None else "embedding"
    return LayerInfo(name, rows, columns, config.label, sum(tensor.nbytes for tensor in parts.values()), kind, count)


def _describe(tensor: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if tensor is None else f"{tensor[1]} {list(tensor[0])}"


def _check_exponents(path: Path) -> None:
    with path.open("rb") as stream:
        for tensor in read_header(path).tensors:
            if not tensor.name.endswith(".exponents"):
                continue
            stream.seek(tensor.begin)
            # As unsigned bytes, the forbidden exponents MAX_EXPONENT + 1 .. 127 are those same numbers.
            largest = max((byte for byte in stream.read(tensor.nbytes) if byte < 128), default=0)
            if largest > MAX_EXPONENT:
                raise FormatError(
                    f"{path.name}: {short(tensor.name)} holds {largest}: exponents must be {MIN_EXPONENT} to {MAX_EXPONENT}"
                )


def _check_orders(path: Path, names: Container[str]) -> None:
    with path.open("rb") as stream:
        for tensor in read_header(path).tensors:
            if tensor.name not in names:
                continue
            stream.seek(tensor.begin)
            order = array.array("i", stream.read(tensor.nbytes))
            if sys.byteorder == "big":
                order.byteswap()
            if sorted(order) != list(range(len(order))):
                raise FormatError(
                    f"{path.name}: {short(tensor.name)} does not name every row once: the checkpoint is damaged; fetch it "
                    "again"
                )


def _read_manifest(root: Path) -> dict[str, Any]:
    manifest, hint = read_json(root / MANIFEST_FILE), "restore the file, or delete it"
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("quantization_config"), dict):
        raise FormatError(f"{MANIFEST_FILE}: files and quantization_config must be objects: {hint}")
    for name, entry in files.items():
        if "/" in name or "\\" in name or "\0" in name or not isinstance(entry, dict):
            raise FormatError(f"{MANIFEST_FILE}: {short(name)} must name a file and hold an object: {hint}")
        if not isinstance(entry.get("sha256"), str) or type(entry.get("bytes")) is not int:
            raise FormatError(f"{MANIFEST_FILE}: {short(name)} needs bytes and sha256: {hint}")
    return manifest


def compare_manifest(root: Path, config: TurboQuantConfig, headers: dict[str, Header], *, complete: bool = True) -> None:
    """The checks against the manifest that need no tensor: settings, file sizes, headers.

    Args:
        root: The folder, which holds a manifest.
        config: As ``config.json`` has it.
        headers: By file name, of the files that are loaded.
        complete: Whether every listed file must be there. A download may have left out those that nobody asked for.

    Raises:
        FormatError: something differs.
    """
    manifest = _read_manifest(root)
    hint = (
        f"if the change is meant, or the folder was saved again with save_pretrained, delete {MANIFEST_FILE} "
        "(turboquant_weights.save writes a new one)"
    )
    saved = _parse_config(manifest["quantization_config"], MANIFEST_FILE)
    for field in dataclasses.fields(config):
        now, then = getattr(config, field.name), getattr(saved, field.name)
        if now != then and field.compare:
            raise FormatError(
                f"{CONFIG_FILE}: {field.name} is {short(now)}, but {short(then)} was saved: restore it; {hint}"
            )
    for name, entry in manifest["files"].items():
        try:
            size = (root / name).stat().st_size
        except (OSError, ValueError):  # ValueError: the name cannot be one
            size = None
        if size is None and not complete and name not in headers:
            continue
        if name != CONFIG_FILE and size != entry["bytes"]:
            got = "missing" if size is None else f"{size} bytes long"
            raise FormatError(f"{short(name)} is {got}: {MANIFEST_FILE} says {entry['bytes']} bytes. Fetch it again; {hint}")
    for name, header in headers.items():
        entry = manifest["files"].get(name, {})
        if entry.get("header_sha256") != header.sha256:
            raise FormatError(f"{name}: its header is not the one that {MANIFEST_FILE} describes: fetch it again; {hint}")


def _sha256(path: Path) -> str:
    try:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror})") from None
