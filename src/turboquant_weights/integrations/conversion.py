"""``convert_checkpoint``: out of this package's format, to folders that others read. One weight at a time, like the way in.

Weights are decoded to what the planes mean and written under the names, and in the layout, that the model's own files have:
Transformers' conversions run backwards (stacks of experts become one matrix per expert again).

* ``bf16``: plain Transformers. The error is that of rounding to bfloat16.
* ``int4``: ``compressed-tensors``, "pack-quantized", symmetric, with one scale per group of 128 columns (64 or 32 where 128
  does not divide them), which vLLM and Transformers load. Rounded once, from the levels of all planes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import atomic_folder, check_replaceable
from ..errors import ConfigError
from ..experts import TurboQuantExperts
from ..graded import GRADED, grade_names
from ..int4 import GROUP_SIZES, PER_WORD, round_to_int4
from ..linear import is_conv1d
from ..planes import PackedPlanes
from ..writer import ShardWriter, TensorSpec, plan_shards, write_index
from .streaming import MAX_SHARD_SIZE, check_disk, write_small_files
from .transformers import load_quantized

FORMATS = ("bf16", "int4")
_WEIGHT = ".weight"
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_checkpoint` did. Errors are ``||W - W'||^2 / ||W||^2`` with ``W`` the quantized model's weight.

    ``layers``: error by the name of the stored matrix; ``error``: over all of them; ``kept``: in ``int4``, quantized weights
    that became bfloat16 all the same, and why; ``group_size``: of ``int4``, else 0; ``bytes``: of all safetensors files.
    """

    format: str
    layers: dict[str, float]
    error: float
    kept: dict[str, str]
    group_size: int
    bytes: int

    def __str__(self) -> str:
        target = self.format if not self.group_size else f"{self.format} in groups of {self.group_size}"
        lines = [
            f"{len(self.layers)} matrices to {target}: relative squared error {self.error:.2e} against the quantized model",
            *(f"bfloat16: {name} ({reason})" for name, reason in self.kept.items()),
        ]
        return "\n".join(lines)


class Conversion:
    """All that will be written, known from shapes.

    Args:
        model: The quantized model; its planes may be mapped files.
        format: ``"bf16"`` or ``"int4"``.
    """

    def __init__(self, model: Any, format: str) -> None:
        self.model = model
        self.skeleton = _skeleton(model)
        self._state = model.state_dict()
        self._layers = _dense_names(model)
        self.groups = _find_groups(self.skeleton)
        shapes = {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}
        with torch.device("meta"):
            stored = {key: self._rename({n: torch.empty(shapes[n]) for n in names}) for key, names in self.groups.items()}
        self.kept: dict[str, str] = {}
        self._integers: dict[str, int] = {}  # columns of what becomes int4
        if format == "int4":
            self._choose(stored)
        self.group_size = next((g for g in GROUP_SIZES if all(k % g == 0 for k in self._integers.values())), 0)
        if not self._integers:
            self.group_size = 0
        else:
            self.skeleton.config.quantization_config = self._compressed_tensors(stored)
        self.specs = [
            [spec for name, tensor in tensors.items() for spec in self._specs(key, name, tensor.shape)]
            for key, tensors in stored.items()
        ]

    def compute(self, key: str) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
        """The tensors of a group as they are stored, and of each quantized matrix the error and its square norm."""
        out: dict[str, Tensor] = {}
        errors = {}
        for name, tensor in self._rename({name: self._dense(name) for name in self.groups[key]}).items():
            matrix = name.removesuffix(_WEIGHT)
            if name in self._integers:
                rounded = round_to_int4(tensor, self.group_size, matrix)
                out[f"{name}_packed"], out[f"{name}_scale"] = rounded.packed, rounded.scales
                out[f"{name}_shape"] = torch.tensor(tensor.shape)
                errors[matrix] = (rounded.error, rounded.energy)
                continue
            out[name] = tensor.to(self._dtype(key))
            if self._is_quantized(key):
                errors[matrix] = _error(out[name], tensor)
        return out, errors

    def _is_quantized(self, key: str) -> bool:
        return any(name in self._layers for name in self.groups[key])

    def _dtype(self, key: str) -> torch.dtype:
        """What the model computes in becomes bfloat16; what it keeps in another type on purpose stays."""
        if self._is_quantized(key):
            return torch.bfloat16
        dtype = self._state[self.groups[key][0]].dtype
        return torch.bfloat16 if dtype == self.model.dtype else dtype

    def _dense(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        if layer is None:
            return self._state[name]
        weight = layer.dequantize(torch.float32)
        return weight.T.contiguous() if self._is_conv1d(name) else weight

    def _is_conv1d(self, name: str) -> bool:
        return name.endswith(_WEIGHT) and is_conv1d(self.skeleton.get_submodule(name.removesuffix(_WEIGHT)))

    def _rename(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.skeleton, tensors)

    def _choose(self, stored: dict[str, dict[str, Tensor]]) -> None:
        for key, tensors in stored.items():
            for name, tensor in tensors.items():
                reason = self._obstacle(key, name, tensor)
                if reason is None:
                    self._integers[name] = tensor.shape[1]
                elif self._is_quantized(key):
                    self.kept[name.removesuffix(_WEIGHT)] = reason
        if not self._integers:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.kept.items())[:3])
            raise ConfigError(f"no weight of this {type(self.model).__name__} can become int4 ({some}): convert it to bf16")

    def _obstacle(self, key: str, name: str, tensor: Tensor) -> str | None:
        """Why a stored tensor cannot be int4."""
        layers = [self._layers.get(part) for part in self.groups[key]]
        if None in layers:
            return "stored in one with weights that are not quantized"
        if any(isinstance(layer, nn.Embedding) for layer in layers):
            return "an embedding"
        if any(self._is_conv1d(part) for part in self.groups[key]) or tensor.dim() != 2 or not name.endswith(_WEIGHT):
            return "no matrix of an nn.Linear"
        if tensor.shape[1] % GROUP_SIZES[-1]:
            return f"{tensor.shape[1]} columns, no multiple of {GROUP_SIZES[-1]}"
        return None

    def _specs(self, key: str, name: str, shape: torch.Size) -> list[TensorSpec]:
        if name not in self._integers:
            return [TensorSpec(name, self._dtype(key), tuple(shape))]
        rows, columns = shape
        return [
            TensorSpec(f"{name}_packed", torch.int32, (rows, columns // PER_WORD)),
            TensorSpec(f"{name}_scale", torch.bfloat16, (rows, columns // self.group_size)),
            TensorSpec(f"{name}_shape", torch.int64, (2,)),
        ]

    def _compressed_tensors(self, stored: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """``quantization_config`` of that format."""
        becomes_int4 = {
            part.removesuffix(_WEIGHT)
            for key, tensors in stored.items()
            for part in self.groups[key]
            if all(name in self._integers for name in tensors)
        }
        modules = self.skeleton.named_modules()
        ignore = [name for name, module in modules if isinstance(module, nn.Linear) and name not in becomes_int4]
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.group_size}
        group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignore,
        }


def _error(rounded: Tensor, weight: Tensor) -> tuple[float, float]:
    """Relative squared error and square norm, without a temporary of the weight's size."""
    error = energy = 0.0
    for part, exact in zip(rounded.flatten().split(_CHUNK), weight.flatten().split(_CHUNK), strict=True):
        error += float((part.float() - exact).square().sum(dtype=torch.float64))
        energy += float(exact.square().sum(dtype=torch.float64))
    return error / energy if energy else 0.0, energy


def _skeleton(model: Any) -> Any:
    """The dense model on the meta device, ready to have Transformers' conversions run backwards."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config).bfloat16()
    if model.can_generate():
        skeleton.generation_config = model.generation_config
    conversions = get_model_conversion_mapping(skeleton, add_legacy=False)
    # As save_pretrained does for a model that was built; prefixes are those of files that were loaded.
    skeleton._weight_conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    return skeleton


def _dense_names(model: Any) -> dict[str, Any]:
    """Name of a dense model's tensor -> the quantized layer that stands for it."""
    grades = grade_names(model)
    return {
        name if isinstance(module, TurboQuantExperts) else f"{name}{_WEIGHT}": module
        for name, module in model.named_modules()
        if isinstance(module, (PackedPlanes, *GRADED)) and name not in grades
    }


def _find_groups(skeleton: Any) -> dict[str, list[str]]:
    """Names of the tensors that one conversion takes together, by the name that it gives the first; tied ones once."""
    from transformers.core_model_loading import WeightConverter

    backwards = [entry.reverse_transform() for entry in skeleton._weight_conversions[::-1]]
    converters = [entry for entry in backwards if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in skeleton.state_dict():
        if name not in skeleton.all_tied_weights_keys:
            renamed = (entry.rename_source_key(name) for entry in converters)
            groups.setdefault(next((new for new, pattern in renamed if pattern is not None), name), []).append(name)
    return groups


def convert_quantized(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    tokenizer: Any = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """``turboquant_weights.convert_checkpoint``, which documents it."""
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}: it must be one of {', '.join(FORMATS)}")
    check_replaceable(Path(os.path.realpath(out)), overwrite)
    conversion = Conversion(load_quantized(folder), format)
    shards = plan_shards(conversion.specs, max_shard_size, {"format": "pt"})
    errors: dict[str, tuple[float, float]] = {}
    with atomic_folder(out, overwrite) as temporary:
        check_disk(temporary, shards)
        writer = ShardWriter(temporary, shards)
        for key in tqdm(conversion.groups, desc=f"converting to {format}", unit="weight", disable=not progress):
            tensors, own = conversion.compute(key)
            writer.write(tensors)
            errors.update(own)
        if len(shards) > 1:
            write_index(temporary, shards)
        write_small_files(conversion.skeleton, temporary, tokenizer)
    energy = sum(norm for _, norm in errors.values())
    total = sum(error * norm for error, norm in errors.values()) / energy if energy else 0.0
    layers = {name: error for name, (error, _) in errors.items()}
    size = sum(shard.size for shard in shards)
    return ConversionReport(format, layers, total, conversion.kept, conversion.group_size, size)
