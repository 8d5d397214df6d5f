"""Checkpoints of models that are no Transformers models: any ``nn.Module``, in the same folders and bytes.

Transformers rebuilds a model from its ``config.json``; for any other the caller brings a module of the same architecture,
whose own weights do not matter (it may be on the meta device). What that module shares, the loaded one shares: a module that
occurs in two places, or a weight of several, is stored once.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import turboquant_weights

from .checkpoint import (
    CONFIG_FILE,
    SUFFIX,
    WEIGHTS_FILE,
    CheckpointInfo,
    atomic_folder,
    check_is_folder_or_hub_id,
    check_values,
    validate,
    write_manifest,
)
from .config import EmbeddingBits, TurboQuantConfig
from .embedding import TurboQuantEmbedding
from .errors import ConfigError, FormatError
from .experts import TurboQuantExperts, changed, replace_parameter
from .graded import GradedEmbedding, grade_names
from .header import read_header
from .linear import TurboQuantLinear, is_conv1d, is_linear
from .planes import PLANES, PackedPlanes
from .tying import replace_embedding, replace_module


def stored_config(
    model: nn.Module, modules: Mapping[str, PackedPlanes], base: TurboQuantConfig
) -> tuple[TurboQuantConfig, str]:
    """``base`` as the quantized ``modules`` of ``model``, by the names they are stored under, are now; and the name of the
    one that carries the tripwire.

    Raises:
        ConfigError: they differ in what a checkpoint has only one of.
    """
    layouts = {name: module.layout for name, module in modules.items() if isinstance(module, TurboQuantExperts)}
    linears = {name: module for name, module in modules.items() if isinstance(module, TurboQuantLinear)}
    parents = grade_names(model)
    embeddings = [name for name in modules if name not in linears and name not in layouts]
    first = next(iter(linears or embeddings or layouts))
    shared = {field: modules[first].settings[field] for field in ("group_size", "seed")}
    for name, module in modules.items():
        for field, value in shared.items():
            if module.settings[field] != value:
                raise ConfigError(
                    f"{field} is {value} in {first}, but {module.settings[field]} in {name}: a checkpoint has one {field} "
                    "for all layers. Quantize them with one config"
                )
    bits = {name: (module.bits, module.residual_bits) for name, module in modules.items()}
    layers = [*linears, *layouts]
    live = dataclasses.replace(base, layer_bits={name: bits[name] for name in layers}, **shared)
    skip = [name for name, module in model.named_modules() if is_linear(module)]
    parameters = {name for name, _ in model.named_parameters()}
    skip += [name for name in base.skip or () if name in parameters]  # stacks that were left dense
    own: dict[str, EmbeddingBits] = {name: bits[name] for name in embeddings if name not in parents}
    for name in embeddings:
        if name in parents:
            own[parents[name]] = model.get_submodule(parents[name]).grades  # type: ignore[assignment]
    return live.exact(layers, skip, own, layouts), first


def save_module(model: nn.Module, folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Writes a quantized module: whole, or not at all.

    Raises:
        ConfigError: nothing in it is quantized, or its state holds something that is no tensor.
    """
    state: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of a tensor under several names the first
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name} in the state of this {type(model).__name__} is no tensor: it cannot be saved")
        if names.setdefault(id(tensor), name) == name:
            state[name] = tensor.detach()
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedPlanes) and f"{name}.codes" in state
    }
    if not modules:
        raise ConfigError(f"got a {type(model).__name__} that is not quantized by this package: call quantize_model first")
    one = next(iter(modules.values()))
    base = TurboQuantConfig(one.bits, one.residual_bits, source={"turboquant_weights": turboquant_weights.__version__})
    config, first = stored_config(model, modules, base)
    stack = isinstance(modules[first], TurboQuantExperts)
    state[first if stack else f"{first}.weight"] = torch.empty(0)  # the tripwire
    content = {"architectures": [type(model).__name__], "quantization_config": config.to_dict()}
    with atomic_folder(folder, overwrite) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file({name: _own(tensor) for name, tensor in state.items()}, temporary / WEIGHTS_FILE, {"format": "pt"})
        write_manifest(temporary)


def _own(tensor: Tensor) -> Tensor:
    """With memory of its own, as safetensors demands: what is fused holds views of one tensor."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def load_module(
    folder: str | os.PathLike[str], like: nn.Module, *, base_only: bool = False, device: Any = None
) -> nn.Module:
    """A quantized module with the architecture of ``like``, which is not changed, and the weights of the checkpoint.

    Args:
        folder: From :func:`save_module`; it is checked completely before anything is allocated.
        like: The dense module, of any weights, also on the meta device. The result has its dtype.
        base_only: Leave the residual planes on disk.
        device: Where to put it; None: the CPU.

    Raises:
        ConfigError: ``like`` is quantized. FormatError: the checkpoint breaks a rule, or belongs to another architecture.
    """
    check_is_folder_or_hub_id(folder)
    if any(isinstance(module, PackedPlanes) for module in like.modules()):
        raise ConfigError(
            f"the {type(like).__name__} is quantized: load needs the dense architecture, as before quantize_model"
        )
    info = validate(folder)
    check_values(info)
    # Parameters without memory; buffers that are not stored (a table of frequencies) keep their values.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in like.parameters()
    }
    model = copy.deepcopy(like, memo)
    _declare(model, info, base_only)
    targets = _targets(model)
    _compare(model, targets, info, base_only)
    for file_name in _weight_files(info):
        with safe_open(info.folder / file_name, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if key in targets:
                    _put(targets[key], file.get_tensor(key))
    changed(model)
    return model if device is None else model.to(device)


# (module, "_parameters" or "_buffers", key there): the places of one tensor.
Place = tuple[nn.Module, str, str]


def _declare(model: nn.Module, info: CheckpointInfo, base_only: bool) -> None:
    """Puts empty quantized modules on the meta device where the checkpoint has planes."""
    config = info.config.base_only() if base_only else info.config
    stored = {layer.name for layer in info.layers}
    for layer in info.layers:
        path, _, key = layer.name.rpartition(".")
        modules = dict(model.named_modules())
        module, parameter = modules.get(layer.name), getattr(modules.get(path), "_parameters", {}).get(key)
        own = config.for_embedding(layer.name)
        parent = layer.name.rpartition(".")[0]
        grades, whole = config.grades(parent), modules.get(parent)
        if grades is not None and isinstance(whole, nn.Embedding):
            if not isinstance(whole, GradedEmbedding):
                replace_embedding(model, parent, GradedEmbedding.like(whole, config, grades))
            continue
        layout = (config.experts or {}).get(layer.name)
        if layout is not None and parameter is not None and parameter.dim() == 3:
            rows, columns = parameter.shape[1:] if layout == "out_in" else parameter.shape[:0:-1]
            settings = config.for_layer(layer.name)
            stack = TurboQuantExperts(len(parameter), columns, rows, layout, settings, "meta", parameter.dtype)
            replace_parameter(model, layer.name, stack)
        elif own is not None and isinstance(module, nn.Embedding):
            replace_embedding(model, layer.name, TurboQuantEmbedding.like(module, own))
        elif own is None and layout is None and module is not None and is_linear(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
            rows, columns = weight.shape[::-1] if is_conv1d(module) else weight.shape
            planes = TurboQuantLinear(columns, rows, False, config.for_layer(layer.name), "meta", weight.dtype).packed
            for name, other in modules.items():  # linear layers tied to each other
                if not is_linear(other) or other.weight is not weight:
                    continue
                if name != layer.name and name in stored:  # has planes of its own: calibration rounds each for its inputs
                    continue
                new = TurboQuantLinear(columns, rows, False, config.for_layer(layer.name), "meta", weight.dtype)
                new._set_planes(planes)
                new.bias = other.bias
                replace_module(model, name, new.train(other.training))
        else:
            kind = {"linear": "linear layer", "embedding": "embedding", "experts": "3-D parameter"}[layer.kind]
            raise FormatError(f"{layer.name} is stored, but this {type(model).__name__} has no {kind} of that name")


def _targets(model: nn.Module) -> dict[str, list[Place]]:
    """Every name that a tensor may be stored under -> everywhere the model holds it."""
    places: dict[int, list[Place]] = {}
    names: dict[str, int] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                if tensor is None or (kind == "_buffers" and key in module._non_persistent_buffers_set):
                    continue
                names[f"{prefix}.{key}" if prefix else key] = id(tensor)
                if (module, kind, key) not in places.setdefault(id(tensor), []):
                    places[id(tensor)].append((module, kind, key))
    return {name: places[identity] for name, identity in names.items()}


def _compare(model: nn.Module, targets: Mapping[str, list[Place]], info: CheckpointInfo, base_only: bool) -> None:
    """Every tensor of the checkpoint has a place of its shape, and every place gets one."""
    dtypes = {torch.uint8: "U8", torch.int8: "I8"}
    planes = {f"{layer.name}.{plane}": layer for layer in info.layers for plane in PLANES}
    headers = [read_header(info.folder / name) for name in _weight_files(info)]
    shapes = {tensor.name: (tensor.shape, tensor.dtype) for header in headers for tensor in header.tensors}
    where = f"this {type(model).__name__}"
    filled: set[tuple[int, str, str]] = set()
    for name, (shape, dtype) in shapes.items():
        if shape == (0,) and name.removesuffix(".weight") in {layer.name for layer in info.layers}:
            continue  # the tripwire
        if name not in targets:
            if base_only and name in planes and name.endswith(".residual"):
                continue
            raise FormatError(f"{name} is stored, but {where} has no tensor of that name: it has another architecture")
        owner, kind, key = targets[name][0]
        tensor = getattr(owner, kind)[key]
        wrong = dtypes.get(tensor.dtype) != dtype if name in planes else tensor.is_floating_point() != ("F" in dtype)
        if tuple(tensor.shape) != shape or wrong:
            raise FormatError(
                f"{name} is {dtype} {list(shape)}, but {where} needs {tensor.dtype} {list(tensor.shape)}: it has another "
                "architecture"
            )
        filled.update((id(owner), kind, key) for owner, kind, key in targets[name])
    for name, places in targets.items():
        if any((id(owner), kind, key) not in filled for owner, kind, key in places):
            raise FormatError(f"{name} is missing: {where} needs it. The checkpoint belongs to another architecture")


def _put(places: list[Place], tensor: Tensor) -> None:
    """One parameter or buffer, wherever the model holds it, in the dtype that it has there."""
    owner, kind, key = places[0]
    old = getattr(owner, kind)[key]
    new = tensor.to(old.dtype)
    if kind == "_parameters":
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for owner, kind, key in places:
        getattr(owner, kind)[key] = new


def _weight_files(info: CheckpointInfo) -> list[str]:
    return [name for name in info.files if name.endswith(SUFFIX)]
