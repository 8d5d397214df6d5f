"""An unquantized safetensors checkpoint that is never loaded: its model on the meta device, and its weights one at a time.

Transformers itself says what the model is: it loads the checkpoint onto the meta device, which reads headers only and checks
names and shapes. Weights are then read as its loader would: renamed, and converted where the file's layout is another than
the model's (experts stored one by one are stacked), but one conversion at a time.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

from ..checkpoint import INDEX_FILE, WEIGHTS_FILE, check_is_folder_or_hub_id, read_headers
from ..errors import ConfigError, FormatError
from ..header import TensorInfo
from ..writer import DTYPE_NAMES
from .transformers import model_class

logger = logging.get_logger(__name__)
GENERATION_CONFIG = "generation_config.json"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class DenseCheckpoint:
    """``model``: on the meta device. ``folder``: where the files are. ``parts``: name of each piece that is read alone to
    the names of the model's tensors that it gives, in the order of the model.

    Args:
        model: Hub id or local folder.
        dtype: As in ``from_pretrained``: of the tensors that are read.

    Raises:
        ConfigError: the model is quantized, or its class is not part of Transformers.
        FormatError: a file is missing, truncated or contradicts the index, or a weight of the model is nowhere.
    """

    def __init__(self, model: str | os.PathLike[str], dtype: Any = "auto") -> None:
        import transformers

        check_is_folder_or_hub_id(model)
        config = transformers.AutoConfig.from_pretrained(model)
        if getattr(config, "quantization_config", None) is not None:
            method = dict(config.quantization_config).get("quant_method")
            raise ConfigError(f"{model} is quantized already, with {method}: a model with its original weights is needed")
        self.folder = Path(model) if os.path.isdir(model) else _download(model)
        self.headers = read_headers(self.folder)
        self._tensors = {tensor.name: tensor for header in self.headers.values() for tensor in header.tensors}
        for file in self.headers:
            _check_hub_checksum(self.folder / file)
        self.model = self._skeleton(model, config, dtype)
        self._file_of = {tensor.name: file for file, header in self.headers.items() for tensor in header.tensors}
        self._conversions = list(self.model._weight_conversions)
        # The loader's answers depend on names and dtypes of the dense model, which the caller may change.
        self._dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        self._parts = self._collect()
        order = {name: i for i, name in enumerate(self._dtypes)}
        with torch.device("meta"):
            names = {part: list(self._convert(part, lambda info, dtype: _empty(info).to(dtype))) for part in self._parts}
        self.parts = dict(sorted(names.items(), key=lambda item: min(order.get(name, 0) for name in item[1])))
        self._settle_ties()

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part under the model's names. Their pages belong to the file: they cost no memory of their own
        unless they are converted."""
        return self._convert(part, self._load)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these files from others without reading them all: sizes, times of change, headers."""
        stats = {file: (self.folder / file).stat() for file in self.headers}
        return {file: [stats[file].st_size, stats[file].st_mtime_ns, header.sha256] for file, header in self.headers.items()}

    def _skeleton(self, name: str | os.PathLike[str], config: Any, dtype: Any) -> Any:
        from transformers import GenerationConfig

        # Not from the files: the loader would map them all, and where mapped memory is limited that is too much.
        tensors = {info.name: _empty(info) for info in self._tensors.values()}
        model, info = model_class(config).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, device_map="meta", output_loading_info=True
        )
        if info["missing_keys"]:
            some = ", ".join(sorted(info["missing_keys"])[:3])
            raise FormatError(
                f"{name}: its files lack {len(info['missing_keys'])} weights of {type(model).__name__} ({some}): they would "
                "be random numbers. Fetch the checkpoint again, or correct architectures in its config.json"
            )
        model.config.name_or_path = os.fspath(name)
        if (self.folder / GENERATION_CONFIG).is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model

    def _collect(self) -> dict[str, list[tuple[str, str, str | None]]]:
        """Name of a part -> its tensors: (name in the file, name in the model, pattern of the converter or None)."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix, meta = self.model.base_model_prefix, dict.fromkeys(self._dtypes, True)
        parts: dict[str, list[tuple[str, str, str | None]]] = {}
        for key in sorted(self._tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            if name not in meta and key in meta:
                name, pattern = rename_source_key(key, [], [], prefix, meta)
            if name in meta:  # what is not, Transformers has reported
                parts.setdefault(name, []).append((key, name, pattern))
        return parts

    def _convert(self, part: str, load: Callable[[TensorInfo, torch.dtype], Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        sources = self._parts[part]
        pattern = sources[0][2]
        mapping: Any
        if pattern is None:
            mapping = WeightRenaming(sources[-1][0], part)
            sources = sources[-1:]
        else:
            converters = (entry for entry in self._conversions if isinstance(entry, WeightConverter))
            mapping = copy.deepcopy(next(entry for entry in converters if pattern in entry.source_patterns))
        for key, name, own in sources:
            mapping.add_tensor(name, key, own or key, load(self._tensors[key], self._dtypes[name]))
        converted = mapping.convert(part, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _load(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        with safe_open(self.folder / self._file_of[info.name], framework="pt") as file:
            return file.get_tensor(info.name).to(dtype)

    def _settle_ties(self) -> None:
        """Weights that the config ties but the files hold twice: equal ones become one, as the loader does, which could not
        compare them on the meta device."""
        part_of = {name: part for part, names in self.parts.items() for name in names}
        for target, source in list(self.model.all_tied_weights_keys.items()):
            if target not in part_of or source not in part_of:
                continue
            first, second = self.read(part_of[source])[source], self.read(part_of[target])[target]
            if torch.equal(first, second):
                layer, _, attribute = target.rpartition(".")
                setattr(self.model.get_submodule(layer), attribute, self.model.get_parameter(source))
                del self.parts[part_of[target]]
            else:
                logger.warning(f"{target} and {source} are stored with different weights, though the config ties them")
                del self.model.all_tied_weights_keys[target]


def _empty(info: TensorInfo) -> Tensor:
    if info.dtype not in _DTYPES:
        raise FormatError(f"{info.name} has dtype {info.dtype}: known are {', '.join(_DTYPES)}")
    return torch.empty(info.shape, dtype=_DTYPES[info.dtype], device="meta")


def _download(model: str | os.PathLike[str]) -> Path:
    """The folder in the hub's cache, with the weights there."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    missing = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(model, WEIGHTS_FILE, **missing)
    if file is None:
        file = cached_file(model, INDEX_FILE, **missing)
        if file is None:
            raise FormatError(f"{model} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: only safetensors files are read")
        get_checkpoint_shard_files(model, file)
    cached_file(model, GENERATION_CONFIG, **missing)
    return Path(file).parent


def _check_hub_checksum(path: Path) -> None:
    """A file of the hub's cache is a link to one that is named after its SHA-256: a damaged download is found here."""
    blob = path.resolve()
    if not path.is_symlink() or blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    digest = hashlib.sha256()
    with blob.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        raise FormatError(
            f"{path.name}: its SHA-256 is {digest.hexdigest()}, but the hub's cache names it {blob.name}: the download is "
            f"damaged. Delete {blob} and fetch it again"
        )
