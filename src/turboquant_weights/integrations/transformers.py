"""Transformers: quantizing while loading, saving, loading, and the registration that makes ``from_pretrained`` know us.

Two ways into ``from_pretrained``. *On the fly* the model is built with its dense layers on the meta device; as each float
weight arrives on its device, :class:`QuantizeLinear` replaces the layer by a quantized one and drops the weight, so memory
holds the quantized model plus one layer. *Pre-quantized* the dense layers are replaced before loading, and the file headers
are compared with the planes that the model will need before a tensor is read: a plane that is missing, or of the wrong
shape or type, is a FormatError and never a random or converted weight.

The tripwire. A Transformers that does not know this package (``import turboquant_weights`` forgotten) ignores the
quantization config with a log line, and would fill every quantized layer with random numbers. So each saved checkpoint
holds one tensor too many: ``<first quantized layer>.weight`` of shape [0] and the model's dtype. To a reader that expects
the dense weight it is a size mismatch, which Transformers refuses to load; this package ignores it.

Only classes that exist while Transformers' registry is being imported are imported at the top: this module is loaded by
an import hook in the middle of that.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

import turboquant_weights

from .. import experts
from .. import model as walker
from ..checkpoint import (
    CONFIG_FILE,
    MANIFEST_FILE,
    atomic_folder,
    check_is_folder_or_hub_id,
    check_values,
    compare_manifest,
    validate,
    write_manifest,
)
from ..config import QUANT_METHOD, TurboQuantConfig
from ..embedding import TurboQuantEmbedding
from ..errors import ConfigError, FormatError, QuantizationError, TurboQuantError
from ..experts import TurboQuantExperts, find_stacks, replace_parameter
from ..graded import GRADED, GradedEmbedding, GradedHead, grade_names, is_order
from ..header import TensorInfo, read_header, read_json
from ..linear import TurboQuantLinear, is_conv1d, is_linear
from ..modules import stored_config
from ..planes import PLANES, PackedPlanes
from ..reference import MAX_EXPONENT, quantize_weight
from ..tying import plan_embeddings, replace_embedding, replace_module, tied_heads, tied_modules
from .devices import check_device_map
from .experts import use_stacks
from .model_card import LOAD_WITH, model_card
from .tied import settle_ties, stored_modules, tie_planes, untie_planes

logger = logging.get_logger(__name__)

# Safetensors' names of the dtypes that a parameter may be stored in.
_FLOATS = ("F16", "BF16", "F32")
_DTYPES = {torch.uint8: ("U8",), torch.int8: ("I8",), torch.int32: ("I32",)}
# True while `load(base_only=True)` runs: the quantizer is built deep inside from_pretrained, out of reach of arguments.
_base_only: contextvars.ContextVar[bool] = contextvars.ContextVar("turboquant_base_only", default=False)


class ConfigReader(QuantizationConfigMixin):
    """What Transformers' registry asks to read ``config.json``. Its product is the package's own config."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = TurboQuantConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def register() -> None:
    """Makes Transformers know ``quant_method: turboquant_weights``. A second call does nothing."""
    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(ConfigReader)
    register_quantizer(QUANT_METHOD)(TurboQuantHfQuantizer)
    walker.on_quantized.append(_attach_if_pretrained)
    experts.on_change.append(use_stacks)


class QuantizeLinear(ConversionOps):
    """Transformers' loader hands it each dense weight that :meth:`TurboQuantHfQuantizer.param_needs_quantization` names."""

    def __init__(self, quantizer: TurboQuantHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """``{"<layer>.weight": dense}`` to ``{"<layer>.codes": ..., ...}``; other tensors pass through."""
        missing: set[str] = kwargs.get("missing_keys") or set()
        out: dict[str, list[Tensor]] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            layer, _, parameter = key.rpartition(".")
            if parameter == "weight" and layer in self.quantizer.embeddings:
                planes, names = self.quantizer.quantize_embedding(kwargs["model"], layer, tensor)
                out.update((name, [plane]) for name, plane in planes.items())
                missing.difference_update(names)
            elif key in self.quantizer.stacks:
                planes = self.quantizer.quantize_stack(kwargs["model"], key, tensor)
                out.update((name, [plane]) for name, plane in planes.items())
                missing.discard(key)
            elif parameter == "weight" and layer in self.quantizer.pending:
                planes, names = self.quantizer.quantize_layer(kwargs["model"], layer, tensor)
                out.update((name, [plane]) for name, plane in planes.items())
                missing.difference_update(names)
            else:
                out[key] = [tensor]
        return out


class TurboQuantHfQuantizer(HfQuantizer):
    """See the module's docstring. ``quantization_config`` is the frozen config; its final form (exact skips, provenance) is
    known when loading ends."""

    quantization_config: TurboQuantConfig  # type: ignore[assignment]  # no subclass of Transformers' mixin; it is not needed

    def __init__(self, quantization_config: TurboQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]
        # On the fly: layers to be quantized -> everywhere they occur (parent, child name); emptied as their weights arrive.
        self.pending: dict[str, list[tuple[nn.Module, str]]] = {}
        # Name of each module that shares its weight with an embedding to be quantized, itself included -> that embedding.
        self.embeddings: dict[str, str] = {}
        # Expert stacks to be quantized -> their layouts; emptied as they arrive.
        self.stacks: dict[str, str] = {}
        self._arriving: list[str] = []
        self._left: dict[str, str] = {}
        self.drops_residual = self.pre_quantized and _base_only.get()
        self._skipped: list[str] = []
        self._planned: dict[str, tuple[int, int]] = {}
        self._failure: TurboQuantError | None = None
        self._loading: tuple[Any, list[str]] | None = None
        self._stored_config = quantization_config
        if self.drops_residual:
            self.quantization_config = quantization_config.base_only()

    # -- what Transformers asks

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients flow to the inputs of the frozen layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "device_map sends layers to disk: quantizing while loading needs them in memory. Quantize and save where "
                "the quantized model fits, then load that checkpoint with this device_map"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        layer, _, parameter = param_name.rpartition(".")
        return param_name in self.stacks or (parameter == "weight" and (layer in self.pending or layer in self.embeddings))

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element, so that ``device_map="auto"`` plans with the quantized size."""
        if self.param_needs_quantization(model, param_name):
            config = self._config_of(param_name if param_name in self.stacks else param_name.rpartition(".")[0])
            return (config.total_bits + 0.25) / 8  # a scale byte per 32 columns is 0.25 bit
        return param.element_size()

    def _config_of(self, name: str) -> TurboQuantConfig:
        embedding = self.embeddings.get(name)
        if embedding is None:
            return self.quantization_config.for_layer(name)
        bits, residual_bits = self._planned[embedding]
        config = dataclasses.replace(self.quantization_config, layer_bits=None, embeddings=None)
        return dataclasses.replace(config, bits=bits, residual_bits=residual_bits)

    def get_quantize_ops(self) -> QuantizeLinear:
        return QuantizeLinear(self)

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        _send_weights_to_meta(model)
        if self.pre_quantized:
            self._declare_layers(model)
            self._loading = (model, checkpoint_files or [])
        else:
            for file in checkpoint_files or []:
                if str(file).endswith(".safetensors"):
                    read_header(Path(file))  # safetensors does not say which of the files is cut short
            self._plan(model)
        check_device_map(model, device_map)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any | None = None) -> list[Any]:
        """The one moment at which Transformers has the final names and has read no tensor yet.

        Our checkpoints have the model's own names, so what would merge, split or transpose tensors on the way has no work to
        do; but some of its patterns are beginnings of names and would take ``experts.gate_up_proj.codes`` for
        ``experts.gate_up_proj``. Such conversions are left out.
        """
        if self._loading is not None:
            model, files = self._loading
            weight_conversions = _without_conversions_of(model, weight_conversions)
            _check_manifest(self._stored_config, files)
            _check_files(model, files, weight_conversions, self.drops_residual)
            self._loading = None
        return weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        config = self.quantization_config
        if self.pre_quantized:
            _check_exponents(model)
        else:
            unseen = {name for name in self._planned if not isinstance(model.get_submodule(name), TurboQuantEmbedding)}
            for name in (*self.pending, *self.stacks, *unseen):
                logger.warning(f"{name} stays dense: the checkpoint has no weight for it, so there was nothing to quantize")
            dense = walker.dense_parameters(model, self._skipped)
            for name, reason in walker.dense_reasons(model, dense, self._left).items():
                if model.get_parameter(name).dim() > 2 and name not in self.stacks:  # embeddings are no surprise
                    logger.warning(f"{name} stays dense ({dense[name] / 1e6:.1f} MB in bf16): {reason}")
            skipped = {
                *self._skipped,
                *self.pending,
                *self.stacks,
                *(name for name, source in self.embeddings.items() if source in unseen),
            }
            order = [name for name, module in model.named_modules() if name in skipped and is_linear(module)]
            order += [name for name, _ in model.named_parameters() if name in skipped]
            embeddings = {name: bits for name, bits in self._planned.items() if name not in unseen}
            modules = stored_modules(model)
            stacks = {name: module for name in self._arriving if isinstance(module := modules.get(name), TurboQuantExperts)}
            layouts = {name: stack.layout for name, stack in stacks.items()}
            for name, stack in stacks.items():  # they arrive in any order: state dicts list them in the model's
                replace_parameter(model, name, stack)
            layers = [name for name, module in modules.items() if not isinstance(module, TurboQuantEmbedding)]
            config = dataclasses.replace(config.exact(layers, order, embeddings, layouts), source=_provenance(model))
            self.pending, self.embeddings, self.stacks = {}, {}, {}
            self.pre_quantized = True
        self.quantization_config = config
        model.config.quantization_config = config
        tie_planes(model)
        use_stacks(model)
        _save_own_names(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with the tripwire (see the module's docstring). ``config.json`` is written after this call."""
        for name in settle_ties(model):
            logger.warning(f"{name} was tied, but an adapter was merged into one side only: both are stored from now on")
        state = model.state_dict()
        config, first = _live_config(model, self.quantization_config)
        if not getattr(model, "_hf_peft_config_loaded", False):  # then only adapters are saved, and they are no skips
            self.quantization_config = model.config.quantization_config = config
        stack = isinstance(model.get_submodule(first), TurboQuantExperts)
        state[first if stack else f"{first}.weight"] = torch.empty(0, dtype=model.dtype)
        return state, {QUANT_METHOD: turboquant_weights.__version__}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        with torch.device("meta"):  # says which layers were Conv1D, and what is tied
            skeleton = type(model)(copy.deepcopy(model.config))
        tied = {key.rpartition(".")[0]: source.rpartition(".")[0] for key, source in model.all_tied_weights_keys.items()}
        weights: dict[str, nn.Parameter] = {}  # sources come before what is tied to them
        grades = grade_names(model)
        modules: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (PackedPlanes, *GRADED)) and name not in grades
        }
        for name, module in sorted(modules.items(), key=lambda item: item[0] in tied):
            if isinstance(module, TurboQuantExperts):
                replace_parameter(model, name, nn.Parameter(module.dequantize(dtype)))
                continue
            dense = _dense_layer(module, skeleton.get_submodule(name), dtype, weights.get(tied.get(name, "")))
            weights[name] = dense.get_parameter("weight")
            replace_module(model, name, dense)
        use_stacks(model)
        untie_planes(model, skeleton)
        return model

    # -- on the fly

    def _plan(self, model: Any) -> None:
        config = self.quantization_config
        self._planned = walker.refuse_grades(plan_embeddings(model, config))
        heads = tied_heads(model, self._planned)
        stacks, self._left = find_stacks(model, config)
        targets, skipped = walker.plan_layers(model, config.skip, config.layer_bits, heads, stacks, self._planned)
        if not targets and not self._planned:
            raise QuantizationError(walker.nothing_to_quantize(model, skipped, self._left))
        self.stacks = {name: stacks[name] for name in targets if name in stacks}
        self._arriving = list(self.stacks)
        targets = [name for name in targets if name not in stacks]
        modules = dict(model.named_modules(remove_duplicate=False))
        tied = {  # a module in two places is replaced in both
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if modules.get(target.rpartition(".")[0]) is not modules.get(source.rpartition(".")[0])
        }
        both = {f"{name}.weight" for name in targets} & {*tied.keys(), *tied.values()}
        if both:
            name = min(both).removesuffix(".weight")
            raise ConfigError(
                f"{name} shares its weight with another module: quantizing it while loading would untie them. "
                "Add it to skip, or load the model first and call quantize_model"
            )
        names = {id(model.get_submodule(name)): name for name in targets}
        self.pending = {name: [] for name in targets}
        for parent in model.modules():
            for child_name, child in parent._modules.items():  # named_children leaves out a second name
                if id(child) in names:
                    self.pending[names[id(child)]].append((parent, child_name))
        self.embeddings = tied_modules(model, self._planned)
        self._skipped = list(skipped)

    def quantize_embedding(self, model: Any, name: str, weight: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """Quantizes the ``weight`` of an embedding and puts it, and the heads tied to it, in place.

        The file may hold it under any of their names, or, needlessly, under several: then they must be equal.

        Returns:
            The planes by name, and the names of the dense weights that will not come any more.
        """
        embedding = self.embeddings[name]
        weights = {f"{other}.weight" for other, source in self.embeddings.items() if source == embedding}
        if self._failure is not None:
            return {}, weights
        old = model.get_submodule(embedding)
        assert isinstance(old, nn.Embedding)
        try:
            if isinstance(old, TurboQuantEmbedding):
                again = quantize_weight(weight, **old.settings, name=name).weight
                planes = [plane for plane in PLANES if getattr(again, plane) is not None]
                if not all(torch.equal(getattr(old, plane), getattr(again, plane)) for plane in planes):
                    raise ConfigError(
                        f"{name} and {embedding} are stored with different weights, but the model's config ties them: set "
                        "tie_word_embeddings to false in its config.json"
                    )
                return {}, weights
            new = TurboQuantEmbedding.from_embedding(old, self._config_of(name), weight=weight, name=embedding)
        except TurboQuantError as error:
            self._failure = error
            return {}, weights
        replace_embedding(model, embedding, new)
        _mark_as_initialized(model)
        tie_planes(model)
        return {f"{embedding}.{plane}": tensor for plane in PLANES if (tensor := getattr(new, plane)) is not None}, weights

    def quantize_layer(self, model: Any, name: str, weight: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """Quantizes ``weight`` as the checkpoint holds it and puts the new layer in place, in all its places.

        An error is kept for the end of loading: raised here, Transformers would swallow it into a table of its own.

        Returns:
            The planes by name, and the names of the dense weights that will not come any more.
        """
        if self._failure is not None:
            return {}, {f"{name}.weight"}
        parent, child_name = self.pending[name][0]
        dense = parent.get_submodule(child_name)
        placeholder = dense.weight  # of the requested dtype; the weight comes as it was stored
        assert isinstance(placeholder, Tensor)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        try:
            layer = TurboQuantLinear.from_linear(dense, self.quantization_config.for_layer(name), name=name)
        except TurboQuantError as error:
            self._failure = error
            return {}, {f"{name}.weight"}
        layer.dense_dtype = placeholder.dtype
        layer._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to initialise
        places = self.pending.pop(name)
        for parent, child_name in places:
            setattr(parent, child_name, layer)
        names = {name}
        if len(places) > 1:
            names = {other for other, module in model.named_modules(remove_duplicate=False) if module is layer}
            tie_planes(model)
        planes = {f"{name}.{plane}": tensor for plane in PLANES if (tensor := getattr(layer, plane)) is not None}
        return planes, {f"{other}.weight" for other in names}

    def quantize_stack(self, model: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The same for the parameter ``name`` that holds a matrix per expert."""
        if self._failure is not None:
            return {}
        placeholder = model.get_parameter(name)
        try:
            config = self.quantization_config.for_layer(name)
            stack = TurboQuantExperts.from_parameter(weight, self.stacks[name], config, name=name)
        except TurboQuantError as error:
            self._failure = error
            return {}
        stack.dense_dtype = placeholder.dtype
        stack._is_hf_initialized = True  # type: ignore[assignment]
        del self.stacks[name]
        replace_parameter(model, name, stack)
        return {f"{name}.{plane}": tensor for plane in PLANES if (tensor := getattr(stack, plane)) is not None}

    # -- pre-quantized

    def _declare_layers(self, model: Any) -> None:
        """Puts empty quantized layers on the meta device where the checkpoint has planes: at ``embeddings``, and everywhere
        else but at ``skip``."""
        config = self.quantization_config
        if config.skip is None:
            raise FormatError("config.json: skip is null: a checkpoint must list the linear layers that are not quantized")
        skip = set(_with_and_without_prefix(model, config.skip))
        layer_bits = _with_and_without_prefix(model, config.layer_bits or {})
        config = dataclasses.replace(
            config, layer_bits=layer_bits, embeddings=_with_and_without_prefix(model, config.embeddings or {})
        )
        layouts = _with_and_without_prefix(model, config.experts or {})
        for name, parameter in list(model.named_parameters()):
            if name in layouts and parameter.dim() == 3:
                replace_parameter(model, name, TurboQuantExperts.like(parameter, layouts[name], config.for_layer(name)))
        for name, module in list(model.named_modules()):
            own, grades = config.for_embedding(name), config.grades(name)
            if isinstance(module, nn.Embedding) and grades is not None:
                replace_embedding(model, name, GradedEmbedding.like(module, config, grades))
            elif isinstance(module, nn.Embedding) and own is not None:
                replace_embedding(model, name, TurboQuantEmbedding.like(module, own))
        for name, module in list(model.named_modules()):
            if is_linear(module) and name not in skip:
                replace_module(model, name, TurboQuantLinear.like(module, config.for_layer(name)))
        tie_planes(model)
        _mark_as_initialized(model)


def _send_weights_to_meta(model: Any) -> None:
    """They are there already, unless model code names a device or something keeps device contexts from working. They come
    from the files all the same, and only on the meta device are ties seen that are yet to be made."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if is_linear(module) or isinstance(module, nn.Embedding) else None
        if weight is not None and not weight.is_meta:
            meta = nn.Parameter(weight.to("meta"), requires_grad=weight.requires_grad)
            module._parameters["weight"] = moved.setdefault(id(weight), meta)


def _mark_as_initialized(model: Any) -> None:
    """There is nothing to initialise in linear layers and experts: :func:`_check_files` sees to it that all planes come. An
    embedding may have a scale that Transformers must set; its weight carries a mark of its own."""
    for module in model.modules():
        if isinstance(module, (TurboQuantLinear, TurboQuantExperts, GradedHead)):
            module._is_hf_initialized = True  # type: ignore[assignment]


def _with_and_without_prefix(model: Any, names: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """By name (values are kept). A layer is named with or without this prefix when only the body, or a body with a new
    head, is loaded."""
    prefix = f"{model.base_model_prefix}."
    values = names if isinstance(names, Mapping) else dict.fromkeys(names)
    return {alias: v for name, v in values.items() for alias in (name, prefix + name, name.removeprefix(prefix))}


def _check_files(model: Any, files: list[str], conversions: list[Any], drops_residual: bool) -> None:
    """Compares the headers of a checkpoint's files with what the quantized layers of ``model`` (on meta) need.

    Also tells Transformers which keys are rightly left over: the tripwire, and residual planes that are not wanted.
    """
    stored = _stored_tensors(model, files, conversions)
    layers = stored_modules(model)
    packed = {name for name, module in model.named_modules() if isinstance(module, (PackedPlanes, *GRADED))}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] in packed and name not in model.all_tied_weights_keys:
            got = stored.get(name)
            dtypes, shape = _DTYPES.get(parameter.dtype, _FLOATS), tuple(parameter.shape)
            if got is None or got.shape != shape or got.dtype not in dtypes:
                found = "missing" if got is None else f"{got.dtype} {list(got.shape)}"
                raise FormatError(
                    f"{name} is {found}: this {type(model).__name__} needs {'/'.join(dtypes)} {list(shape)}. "
                    "The checkpoint is incomplete or belongs to another model; fetch it again"
                )
    # Keys without a parameter keep their name on disk, which may lack or have a prefix that the layer's planes do not.
    on_disk = {tensor.name: name for name, tensor in stored.items()}
    dense = {
        name
        for name, module in model.named_modules()
        if is_linear(module) or (isinstance(module, nn.Embedding) and not isinstance(module, (PackedPlanes, *GRADED)))
    } | {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    stacks = {name for name, module in layers.items() if isinstance(module, TurboQuantExperts)}
    expected = set()
    for name, tensor in stored.items():
        disk_layer, _, part = tensor.name.rpartition(".")
        owner = layers.get(on_disk.get(f"{disk_layer}.codes", "").removesuffix(".codes"))
        if part == "codes" and {disk_layer, f"{model.base_model_prefix}.{disk_layer}"} & dense:
            raise FormatError(
                f"{tensor.name} is stored, but config.json lists {disk_layer} under skip, or an embedding not under "
                "embeddings, or a stack not under experts: restore its config.json"
            )
        if owner is not None and part == "residual" and owner.residual is None:
            if not drops_residual:
                raise FormatError(
                    f"{name} is stored, but config.json gives this layer no residual bits: restore its config.json"
                )
            expected.add(name)
        elif tensor.shape == (0,) and (name in stacks or (owner is not None and part == "weight")):
            expected.add(name)
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(name)}$" for name in expected}


def _without_conversions_of(model: Any, conversions: list[Any]) -> list[Any]:
    """``conversions`` without those that would change a plane on its way from the file."""
    from transformers.core_model_loading import WeightConverter

    names = [f"{name}.{plane}" for name in stored_modules(model) for plane in PLANES]

    def takes_plane(conversion: Any) -> bool:
        conversion = copy.deepcopy(conversion)  # it counts its uses
        return any(conversion.rename_source_key(name)[1] is not None for name in names)

    return [entry for entry in conversions if not isinstance(entry, WeightConverter) or not takes_plane(entry)]


def _check_manifest(config: TurboQuantConfig, files: list[str]) -> None:
    """Compares ``config.json``, sizes and headers with the manifest if there is one: a changed seed is seen nowhere else."""
    folders = {Path(file).parent for file in files}
    if len(folders) != 1 or not (folder := folders.pop()).joinpath(MANIFEST_FILE).is_file():
        return
    if all(str(file).endswith(".safetensors") for file in files):  # if not, _check_files explains
        headers = {Path(file).name: read_header(Path(file)) for file in files}
        compare_manifest(folder, config, headers, complete=False)


def _check_exponents(model: Any) -> None:
    """The range rules of the format, for a model that came through ``from_pretrained`` without :func:`load_quantized`."""
    for name, layer in model.named_modules():
        if isinstance(layer, PackedPlanes) and not layer.exponents.is_meta and layer.packed.exponents.max() > MAX_EXPONENT:
            raise FormatError(
                f"{name}.exponents holds {int(layer.packed.exponents.max())}: exponents must be at most {MAX_EXPONENT}. "
                "The checkpoint is damaged; fetch it again"
            )
        if isinstance(layer, GradedEmbedding) and not layer.order.is_meta and not is_order(layer.order):
            raise FormatError(f"{name}.order does not name every row once: the checkpoint is damaged; fetch it again")


def _stored_tensors(model: Any, files: list[str], conversions: list[Any]) -> dict[str, TensorInfo]:
    """Name in ``model`` -> header entry, for all tensors of the safetensors ``files``, renamed as the loader will."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise FormatError(
            f"got {', '.join(map(str, files)) or 'no files'}: quantized models are loaded from .safetensors files"
        )
    conversions = copy.deepcopy(conversions)  # they count their uses
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    meta, prefix = model.state_dict(), model.base_model_prefix
    tensors = {tensor.name: tensor for file in files for tensor in read_header(Path(file)).tensors}
    stored = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, _ = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in meta and key in meta:
            name, _ = rename_source_key(key, [], [], prefix, meta)
        stored[name] = tensors[key]
    return stored


def _dense_layer(
    layer: PackedPlanes | GradedEmbedding | GradedHead,
    original: nn.Module,
    dtype: torch.dtype | None,
    shared: nn.Parameter | None,
) -> nn.Module:
    """A dense layer of the class of ``original`` (on meta) with the weights of ``layer``, or the ``shared`` ones."""
    if isinstance(layer, (TurboQuantEmbedding, GradedEmbedding)):
        embedding = layer.to_embedding(dtype)
        if shared is not None:
            embedding.weight = shared
        return embedding
    assert isinstance(layer, (TurboQuantLinear, GradedHead))
    dense = copy.deepcopy(original)
    if shared is not None:
        dense.weight = shared
    else:
        weight = layer.dequantize(dtype)
        dense.weight = nn.Parameter(weight.T.contiguous() if is_conv1d(original) else weight)
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense.train(layer.training)


def _live_config(model: Any, config: TurboQuantConfig) -> tuple[TurboQuantConfig, str]:
    """``config`` as the layers of ``model`` are now, which the user may have changed, and the first quantized one's name."""
    modules = stored_modules(model)
    if not modules:
        raise ConfigError(
            f"this {type(model).__name__} has no quantized layer left: call model.dequantize() before saving a dense model"
        )
    for target, source in model.all_tied_weights_keys.items():
        name, other = target.rpartition(".")[0], source.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PackedPlanes) and other in modules and module.settings != modules[other].settings:
            raise ConfigError(
                f"{name} and {other} share their planes, but read them as {module.label} and {modules[other].label} bits: "
                "make them alike, e.g. with base_only_() on both"
            )
    return stored_config(model, modules, config)


def _provenance(model: Any) -> dict[str, str]:
    """Where the weights came from. Of a local folder only the last component: its path says nothing to others."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    source = {"turboquant_weights": turboquant_weights.__version__, "load_with": LOAD_WITH}
    if name:
        source["model"] = os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name
    revision = getattr(model.config, "_commit_hash", None)
    if revision:
        source["revision"] = str(revision)
    return source


def _save_own_names(model: Any) -> None:
    """Makes ``save_pretrained`` use the model's own names, as ``skip`` does. For some models it would restore older names
    and fuse layers (q, k and v into one) on the way, which planes and the tripwire do not survive."""
    model._weight_conversions = []


def attach(model: Any, config: TurboQuantConfig) -> None:
    """Tells Transformers that ``model``, whose layers are quantized already, is: so that ``save_pretrained`` works."""
    config = dataclasses.replace(config, source={**_provenance(model), **(config.source or {})})
    model.hf_quantizer = TurboQuantHfQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    model.config.quantization_config = config
    _save_own_names(model)
    tie_planes(model)
    tied = model.all_tied_weights_keys
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedPlanes)}
    for target, source in list(tied.items()):
        if target in packed or source in packed:
            # Quantized apart (skip=[]): from now on the head is a matrix of its own, also for whoever loads the files.
            del tied[target]
            model.config.tie_word_embeddings = False
            model.config.get_text_config().tie_word_embeddings = False


def _attach_if_pretrained(model: Any, config: TurboQuantConfig) -> None:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        attach(model, config)


def load_quantized(
    folder: str | os.PathLike[str], *, base_only: bool = False, device_map: Any = None, dtype: Any = None, **kwargs: Any
) -> Any:
    """``turboquant_weights.load``, which documents it."""
    import transformers
    from transformers.utils.hub import cached_file

    check_is_folder_or_hub_id(folder)
    if os.path.isdir(folder):
        check_values(validate(folder))
        content = read_json(Path(folder) / CONFIG_FILE, allow_nonfinite=True)
        if "model_type" not in content:
            name = (content.get("architectures") or ["module"])[0]
            raise ConfigError(
                f"{folder} holds a {name}, which is no Transformers model: load(folder, model=...) with a dense module of "
                "that architecture"
            )
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token", "trust_remote_code") if key in kwargs}
    config = transformers.AutoConfig.from_pretrained(folder, **hub)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ConfigError(f"{folder} is not quantized by this package: quantize it first, or load it with Transformers")
    if not os.path.isdir(folder):  # the manifest must lie beside the weights when these are checked
        source = {key: value for key, value in hub.items() if key != "trust_remote_code"}
        cached_file(folder, MANIFEST_FILE, _raise_exceptions_for_missing_entries=False, **source)
    kwargs.update({key: value for key, value in (("device_map", device_map), ("dtype", dtype)) if value is not None})
    with _setting(_base_only, base_only):
        return model_class(config).from_pretrained(folder, **kwargs)


def model_class(config: Any) -> Any:
    """The class that a checkpoint was saved from: also one that Transformers does not export, e.g. an encoder alone."""
    import transformers

    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    if getattr(config, "auto_map", None):  # code of the checkpoint's own
        return transformers.AutoModelForCausalLM
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    with contextlib.suppress(ImportError):
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found
    raise ConfigError(
        f"the checkpoint holds a {name}, which is no class of Transformers {transformers.__version__}: import it and call "
        "its from_pretrained, or load(folder, model=...) with a module of the same architecture"
    )


@contextlib.contextmanager
def _setting(variable: contextvars.ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def save_quantized(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
) -> None:
    """``turboquant_weights.save``, which documents it."""
    if not isinstance(getattr(model, "hf_quantizer", None), TurboQuantHfQuantizer):
        raise ConfigError(
            f"got a {type(model).__name__} that is not quantized by this package: a Transformers model from quantize_model, "
            "load or from_pretrained(quantization_config=TurboQuantConfig(...)) is needed"
        )
    adapted = walker.adapted_layer(model)
    if adapted is not None:
        raise ConfigError(
            f"{adapted} has an adapter: save that alone with the model's save_pretrained, or merge it (merge_and_unload) "
            "and save what that returns"
        )
    with atomic_folder(folder, overwrite) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        card = model_card(os.path.basename(os.path.realpath(folder)), model.hf_quantizer.quantization_config)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_manifest(temporary)


def load_dense(
    model: str | os.PathLike[str], *, gguf_file: str | None = None, dtype: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """Loads an unquantized causal language model, ready for ``quantize_model`` and :func:`save_quantized`.

    Args:
        model: Hub id, local folder, or the path of a ``.gguf`` file, whose weights are expanded to ``dtype``.
        gguf_file: Name of a GGUF file inside a folder or hub repository.
        dtype: As in ``from_pretrained``.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        (model, tokenizer); the tokenizer is None, with a warning, if none can be loaded.

    Raises:
        ConfigError: the model is quantized (other than as GGUF).
    """
    import transformers
    from transformers.utils import quantization_config as configs

    path = Path(model)
    if gguf_file is None and path.suffix == ".gguf":
        model, gguf_file = path.parent, path.name
    if dtype is not None:
        kwargs["dtype"] = dtype
    source: dict[str, Any] = {}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
        if hasattr(configs, "GgufConfig"):  # newer versions can keep GGUF blocks packed
            kwargs["quantization_config"] = configs.GgufConfig(dequantize=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model, **source, **kwargs)
    if gguf_file is not None:
        _forget_gguf(dense, gguf_file)
    elif getattr(dense.config, "quantization_config", None) is not None:
        method = getattr(dense, "quantization_method", "another method")
        raise ConfigError(f"{model} is quantized with {method}: a model with its original weights is needed")
    return dense, load_tokenizer(model, **source)


def load_tokenizer(model: str | os.PathLike[str], **source: Any) -> Any:
    """The tokenizer, or None with a warning."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **source)
        if tokenizer.vocab_size < 2:  # what Transformers builds for some models from no files at all
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError) as error:
        logger.warning(f"{model} has no tokenizer that can be loaded ({error})")
        return None
    return tokenizer


def _forget_gguf(model: Any, gguf_file: str) -> None:
    """Removes what the GGUF loader leaves behind: the weights are dense now, and saving must not claim otherwise."""
    model.config._name_or_path = gguf_file
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


register()
