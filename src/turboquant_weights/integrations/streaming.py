"""``quantize_checkpoint``: from safetensors files to a quantized checkpoint, one weight at a time.

The model is never built. Its layers are known from the meta device, and the layout of the result from their shapes; then
each weight is read, quantized and written to its place. Memory holds one weight and its planes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

import turboquant_weights

from ..checkpoint import check_replaceable, write_manifest
from ..config import TurboQuantConfig
from ..embedding import TurboQuantEmbedding
from ..errors import FormatError
from ..experts import TurboQuantExperts, replace_parameter
from ..linear import TurboQuantLinear, is_conv1d
from ..model import (
    Job,
    LayerReport,
    QuantizationReport,
    announce,
    embedding_report,
    experts_report,
    linear_report,
    plan_job,
    summarize,
)
from ..partial import PartialFolder
from ..planes import PackedPlanes
from ..reference import check_finite, quantize_weight
from ..tying import replace_embedding, replace_module
from ..writer import Shard, ShardWriter, TensorSpec, plan_shards, write_index
from .dense import DenseCheckpoint
from .devices import check_device
from .model_card import model_card
from .tied import stored_modules

logger = logging.get_logger(__name__)
MAX_SHARD_SIZE = 5_000_000_000
_SMALL_FILES = 50_000_000  # of disk space, for config, tokenizer, manifest and journal


class _Use(NamedTuple):
    """What becomes of a weight: the planes of ``layer``, or (None) itself."""

    layer: str | None
    outputs: list[str]


class StreamingJob:
    """All that will be written, known before a weight is read.

    Args:
        source: Its model becomes the quantized one, on the meta device.
        config: As for ``quantize_model``.
        max_shard_size: Bytes of one file.
    """

    def __init__(self, source: DenseCheckpoint, config: TurboQuantConfig, max_shard_size: int) -> None:
        self.source, self.model = source, source.model
        dense = self.model.state_dict(keep_vars=True)
        self.job = plan_job(self.model, config)
        self._transposed = {name for name in self.job.targets if is_conv1d(self.model.get_submodule(name))}
        self._embeddings = {name: self.model.get_submodule(name) for name in self.job.embeddings}
        self._twins = _declare(self.job)
        announce(self.job)  # settles what is tied
        state, metadata = self.model.hf_quantizer.get_state_dict_and_metadata(self.model)
        kept = self.model.state_dict(keep_vars=True)
        specs = {name: TensorSpec.of(name, kept[name]) for name in _stored_names(self.model, kept)}
        self._uses = self._find_uses(dense, specs)
        self.outputs = {
            part: [output for name in names for use in self._uses[name] for output in use.outputs]
            for part, names in source.parts.items()
        }
        self.tripwire = {name: tensor for name, tensor in state.items() if name not in kept}
        groups = [[TensorSpec.of(name, tensor) for name, tensor in self.tripwire.items()]]
        groups += [[specs.pop(name) for name in names] for names in self.outputs.values()]
        if specs:
            raise FormatError(f"{source.folder}: no file holds a weight for {', '.join(sorted(specs)[:3])}")
        self.shards = plan_shards(groups, max_shard_size, {**metadata, "format": "pt"})

    def compute(self, part: str, device: str | None) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
        """The stored tensors of a part, and the error and the seconds of each layer that was quantized."""
        out: dict[str, Tensor] = {}
        layers = {}
        for name, tensor in self.source.read(part).items():
            for use in self._uses[name]:
                if use.layer is None:
                    self._check_bias(use.outputs[0], tensor)
                    out[use.outputs[0]] = tensor
                    continue
                start = time.perf_counter()
                planes, error = self._quantize(use.layer, tensor if device is None else tensor.to(device))
                out.update(planes)
                layers[use.layer] = (error, time.perf_counter() - start)
        return out, layers

    def report(self, layers: dict[str, tuple[float, float]], seconds: float) -> QuantizationReport:
        """``layers``: error and seconds by name."""
        reports: list[LayerReport] = []
        for name in (*self.job.embeddings, *self.job.targets, *self.job.stacks):
            module = self.model.get_submodule(name)
            module.quantization_error, own = layers[self._twins.get(name, name)]
            if isinstance(module, TurboQuantEmbedding):
                reports.append(embedding_report(name, module, own))
            elif isinstance(module, TurboQuantExperts):
                reports.append(experts_report(name, module, own))
            else:
                assert isinstance(module, TurboQuantLinear)
                reports.append(linear_report(name, module, name in self._twins, own))
        return summarize(self.job, reports, seconds)

    def _find_uses(self, dense: dict[str, Tensor], specs: dict[str, TensorSpec]) -> dict[str, list[_Use]]:
        layers = stored_modules(self.model)
        names: dict[int, list[str]] = {}  # of one weight that is tied, all of them
        for name, tensor in dense.items():
            names.setdefault(id(tensor), []).append(name)
        uses: dict[str, list[_Use]] = {}
        for name, tensor in dense.items():
            uses[name] = []
            for alias in names[id(tensor)]:
                layer = alias if alias in self.job.stacks else alias.removesuffix(".weight")
                if layer in layers and alias in (layer, f"{layer}.weight"):
                    planes = layers[layer].packed._asdict()
                    uses[name].append(_Use(layer, [f"{layer}.{plane}" for plane in planes if planes[plane] is not None]))
                elif alias in specs:
                    uses[name].append(_Use(None, [alias]))
        return uses

    def _quantize(self, name: str, weight: Tensor) -> tuple[dict[str, Tensor], float]:
        settings = self.model.get_submodule(name).settings
        own = TurboQuantConfig(**settings)
        new: PackedPlanes
        if name in self._embeddings:  # compares its lookups with those of the original class
            new = TurboQuantEmbedding.from_embedding(self._embeddings[name], own, weight=weight, name=name)
            packed, error = new.packed, new.quantization_error
        elif name in self.job.stacks:
            new = TurboQuantExperts.from_parameter(weight, self.job.stacks[name], own, name=name)
            packed, error = new.packed, new.quantization_error
        else:
            packed, error = quantize_weight(weight.T if name in self._transposed else weight, **settings, name=name)
        assert error is not None
        return {f"{name}.{plane}": tensor for plane, tensor in packed._asdict().items() if tensor is not None}, error

    def _check_bias(self, name: str, tensor: Tensor) -> None:
        layer, _, attribute = name.rpartition(".")
        if isinstance(self.model.get_submodule(layer), TurboQuantLinear):
            check_finite(tensor, f"{layer}: {attribute}")


def quantize_dense(
    source: DenseCheckpoint,
    out: str | os.PathLike[str],
    config: TurboQuantConfig,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """``turboquant_weights.quantize_checkpoint``, which documents it, of an opened checkpoint."""
    start = time.perf_counter()
    target = Path(os.path.realpath(out))
    check_replaceable(target, overwrite)
    if device is not None:
        check_device(device, "device is")
    job = StreamingJob(source, config, max_shard_size)
    layers: dict[str, tuple[float, float]] = {}
    with PartialFolder(target, _request(job, device), overwrite) as partial:
        check_disk(partial.path, job.shards)
        writer = ShardWriter(partial.path, job.shards)
        writer.write(job.tripwire)
        for part in tqdm(job.outputs, desc=f"quantizing to {config.label} bits", unit="weight", disable=not progress):
            known = partial.finished.get(part)
            if known is not None and not writer.holds(known["sha256"]):
                logger.warning(f"{part} is not on disk as it was written: once more")
                known = None
            if known is None:
                tensors, errors = job.compute(part, device)
                known = {"layers": errors, "sha256": writer.write(tensors)}
                partial.record(part, known)
            layers.update(known["layers"])
        if len(job.shards) > 1:
            write_index(partial.path, job.shards)
        write_small_files(job.model, partial.path, tokenizer)
        (partial.path / "README.md").write_text(
            model_card(target.name, job.model.config.quantization_config), encoding="utf-8"
        )
        write_manifest(partial.path)
        partial.publish()
    return job.report(layers, time.perf_counter() - start)


def write_small_files(model: Any, folder: Path, tokenizer: Any) -> None:
    """What ``save_pretrained`` writes beside the weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_disk(folder: Path, shards: Sequence[Shard]) -> None:
    """Raises an OSError unless ``folder`` has room for what it does not hold yet of ``shards``."""
    there = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file())
    needed = sum(shard.size for shard in shards) + _SMALL_FILES - there
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder.parent} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are needed: make room, or choose "
            "another folder",
        )


def _request(job: StreamingJob, device: str | None) -> dict[str, Any]:
    """All that decides the bytes."""
    layout = hashlib.sha256(b"".join(shard.header for shard in job.shards)).hexdigest()
    versions = [turboquant_weights.__version__, torch.__version__]
    kind = "cpu" if device is None else torch.device(device).type
    config = job.job.config.to_dict()
    return {"config": config, "files": job.source.fingerprint(), "layout": layout, "versions": versions, "device": kind}


def _declare(job: Job) -> dict[str, str]:
    """Puts quantized layers on the meta device in the place of dense ones. Returns the linear layers that share the planes
    of an earlier one, and its name."""
    model = job.model
    for name, own in job.embeddings.items():
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        replace_embedding(model, name, TurboQuantEmbedding.like(embedding, own))
    first: dict[int, tuple[Tensor, str]] = {}  # keeps the weight, so its id, alive
    twins = {}
    for name in job.targets:
        old = model.get_submodule(name)
        new = TurboQuantLinear.like(old, job.config.for_layer(name))
        twin = first.setdefault(id(old.weight), (old.weight, name))[1]  # type: ignore[arg-type]
        if twin != name:
            twins[name] = twin
            new._set_planes(model.get_submodule(twin).packed)  # type: ignore[arg-type]
        replace_module(model, name, new)
    for name, layout in job.stacks.items():
        stack = TurboQuantExperts.like(model.get_parameter(name), layout, job.config.for_layer(name))
        replace_parameter(model, name, stack)
    return twins


def _stored_names(model: Any, state: dict[str, Tensor]) -> list[str]:
    """Names under which a file holds the tensors of ``state``: tied ones once, under the name that is not declared tied."""
    chosen: dict[int, str] = {}
    for name, tensor in state.items():
        if id(tensor) not in chosen or chosen[id(tensor)] in model.all_tied_weights_keys:
            chosen[id(tensor)] = name
    ignored = set(model._keys_to_ignore_on_save or ())
    return [name for name, tensor in state.items() if chosen[id(tensor)] == name and name not in ignored]
