"""vLLM's configuration of the method: which of its layers holds which layers of the checkpoint, and with which bits.

A checkpoint in a folder is checked completely, headers and manifest, before vLLM builds the model; one on the hub as far as
its headers go. vLLM's names differ from those of the checkpoint: models merge layers (``packed_modules_mapping``) and
rename them (``apply_vllm_mapper``).
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from ...checkpoint import LayerInfo, check_tensors, check_values, validate
from ...config import QUANT_METHOD, TurboQuantConfig
from ...errors import ConfigError, FormatError
from ...header import DTYPE_BYTES, TensorInfo
from ...rotation import padded_features
from .experts import TurboQuantExpertsMethod
from .methods import TurboQuantLinearMethod, TurboQuantVocabMethod

logger = init_logger(__name__)

_BASE_ONLY = "base_only"
# Embeddings and heads that a model builds without telling their names.
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@register_quantization_config(QUANT_METHOD)
class TurboQuantVllmConfig(QuantizationConfig):
    """``stored`` is the configuration of a quantized checkpoint; None means that a dense one is quantized while it loads."""

    def __init__(self, stored: TurboQuantConfig | None = None) -> None:
        super().__init__()
        self.stored = stored
        # By vLLM's names: the quantized layers of the checkpoint; its embeddings, with all grades if it has some.
        self.layers: dict[str, LayerInfo] = {}
        self.embeddings: dict[str, tuple[LayerInfo, ...]] = {}
        self.skip: tuple[str, ...] = stored.skip or () if stored else ()
        self.ties_head = False
        self.claimed: set[str] = set()  # of the names in the checkpoint
        self.is_partial = False  # whether vLLM may rightly build a part of the model
        self.decided: dict[str, TurboQuantConfig | None] = {}  # while loading: every layer that could be quantized
        self._settings: TurboQuantConfig | None = None

    # -- what vLLM asks

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TurboQuantVllmConfig:
        return cls(TurboQuantConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads and checks the headers of the checkpoint: the one call before the model is built that has its name."""
        text = hf_config.get_text_config() if hf_config is not None else None
        self.ties_head = bool(getattr(text, "tie_word_embeddings", False))
        if self.stored is None:
            return
        layers: Sequence[LayerInfo]
        if os.path.isdir(model_name):
            info = validate(model_name)
            check_values(info)
            layers = info.layers
        else:
            layers = _layers_on_the_hub(model_name, revision, self.stored)
        self.layers = {layer.name: layer for layer in layers if layer.kind != "embedding"}
        self.embeddings = {}
        for layer in layers:
            if layer.kind == "embedding":
                name = _embedding_of(layer, self.stored)
                self.embeddings[name] = (*self.embeddings.get(name, ()), layer)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.embeddings = hf_to_vllm_mapper.apply_dict(self.embeddings)
        self.skip = tuple(hf_to_vllm_mapper.apply_list(list(self.skip)))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # asked when the model is built
        if self.stored is None:
            self.check_patterns()
        else:
            self.check_claimed()
        return WeightsMapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        engine = get_current_vllm_config()
        multimodal = engine.model_config is not None and engine.model_config.is_multimodal_model
        self.is_partial = multimodal or engine.parallel_config.pipeline_parallel_size > 1
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        return None

    # -- decisions

    @property
    def settings(self) -> TurboQuantConfig:
        """What the layers are computed with: that of the checkpoint, perhaps without residual planes, or the user's."""
        if self._settings is None:
            additional = get_current_vllm_config().additional_config
            options = additional.get(QUANT_METHOD, {}) if isinstance(additional, dict) else {}
            if not isinstance(options, dict):
                raise ConfigError(f"additional_config has {QUANT_METHOD} = {options!r}: it must be an object of settings")
            options = dict(options)
            if self.stored is None:
                self._settings = _from_options(options)
            else:
                base_only = options.pop(_BASE_ONLY, False)
                if options or not isinstance(base_only, bool):
                    raise ConfigError(
                        f"additional_config has {QUANT_METHOD} = {options or {_BASE_ONLY: base_only}}: for a quantized "
                        f"checkpoint it may hold {_BASE_ONLY!r}, true or false, alone; the rest is in the checkpoint"
                    )
                self._settings = self.stored.base_only() if base_only else self.stored
        return self._settings

    def _linear(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        parent, _, last = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(last, [last])
        names = [f"{parent}.{member}" if parent else member for member in members]
        if self.stored is not None:
            infos = [self.layers.get(name) for name in names]
            configs = [None if info is None else self._claim(info) for info in infos]
            names = [name if info is None else info.name for name, info in zip(names, infos, strict=True)]
            for info in infos:
                if info is not None:
                    _check_columns(info, layer.input_size, prefix)
        else:
            configs = [self._decide(name, is_router=isinstance(layer, GateLinear)) for name in names]
        if not any(configs):
            return UnquantizedLinearMethod()
        return TurboQuantLinearMethod(names, configs, self.settings, self.stored is None)

    def _vocabulary(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        is_head = isinstance(layer, ParallelLMHead)
        if self.stored is None:
            return self._new_vocabulary(is_head, prefix)
        if is_head:
            head = self.layers.get(prefix or _HEAD)
            if head is None:
                tied = self.embeddings and (prefix or _HEAD) not in self.skip
                return TurboQuantVocabMethod(None, None, False) if tied else None
            infos: tuple[LayerInfo, ...] = (head,)
        elif prefix:
            if prefix not in self.embeddings:
                return None
            infos = self.embeddings[prefix]
        else:
            if len(self.embeddings) > 1:
                raise ConfigError(
                    f"the checkpoint has quantized embeddings {', '.join(self.embeddings)}, and this model does not tell "
                    "vLLM which is which: leave embeddings dense to serve it"
                )
            if not self.embeddings:
                return None
            (infos,) = self.embeddings.values()
        for info in infos:
            _check_columns(info, layer.embedding_dim, prefix or info.name)
        config, *_ = (self._claim(info) for info in infos)
        name = _embedding_of(infos[0], self.settings)
        return TurboQuantVocabMethod(name, config, False, self.settings.grades(name))

    def _new_vocabulary(self, is_head: bool, prefix: str) -> QuantizeMethodBase | None:
        if not is_head:
            name = prefix or _EMBEDDING
            config = self.decided[name] = self.settings.for_embedding(name)
            return None if config is None else TurboQuantVocabMethod(name, config, True)
        if self.ties_head:
            return TurboQuantVocabMethod(None, None, True) if self.settings.embeddings else None
        name = prefix or _HEAD
        config = self._decide(name, is_router=False)
        if config is None or self.settings.skip is None:  # as everywhere: a head is quantized only if it is asked for
            self.decided[name] = None
            return None
        return TurboQuantVocabMethod(name, config, True)

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        up = "gate_up_proj" if layer.moe_config.is_act_and_mul else "up_proj"
        names = [f"{prefix}.{up}", f"{prefix}.down_proj"]
        configs: list[TurboQuantConfig | None]
        if self.stored is None:
            configs = [self._decide(name, is_router=False) for name in names]
        else:
            infos = [self.layers.get(name) for name in names]
            configs = [None if info is None else self._claim(info) for info in infos]
            moe = layer.moe_config
            rows = moe.intermediate_size * (2 if moe.is_act_and_mul else 1)
            shapes = [
                (moe.num_experts, rows, layer.hidden_size),
                (moe.num_experts, layer.hidden_size, moe.intermediate_size),
            ]
            for info, shape in zip(infos, shapes, strict=True):
                if info is not None:
                    _check_stack(info, shape)
            names = [name if info is None else info.name for name, info in zip(names, infos, strict=True)]
        both = [config for config in configs if config is not None]
        if not both:
            return None
        if len(both) < 2:
            raise ConfigError(
                f"{names[configs.index(None)]} is dense, and the other stack of {prefix} quantized: vLLM computes both in "
                "one step. Quantize both or skip both"
            )
        return TurboQuantExpertsMethod(layer.moe_config, names, both, self.stored is None)

    def _decide(self, name: str, is_router: bool) -> TurboQuantConfig | None:
        """The settings of a layer of a dense checkpoint; None: it stays dense. A router does: it decides by small
        differences, and is small."""
        skipped = is_router or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.settings.skip or ())
        self.decided[name] = None if skipped else self.settings.for_layer(name)
        return self.decided[name]

    def _claim(self, info: LayerInfo) -> TurboQuantConfig:
        self.claimed.add(info.name)
        own = self.settings.for_embedding(info.name)
        return own or self.settings.for_layer(info.name)

    def check_patterns(self) -> None:
        """Tells what is quantized while loading.

        Raises:
            ConfigError: a pattern of the user's has no effect.
        """
        dense = [name for name, config in self.decided.items() if config is None]
        logger.info(
            "turboquant_weights: %d layers are quantized while they load (%s bits); dense stay: %s",
            len(self.decided) - len(dense),
            self.settings.label,
            ", ".join(dense) or "none",
        )
        for field in ("skip", "layer_bits", "embeddings"):
            for pattern in getattr(self.settings, field) or ():
                if not self.is_partial and not any(fnmatch.fnmatchcase(name, pattern) for name in self.decided):
                    raise ConfigError(
                        f"{field} pattern {pattern!r} matches no layer of vLLM's model: it has "
                        f"{', '.join(list(self.decided)[:5]) or 'none at all'}, ..."
                    )

    def check_claimed(self) -> None:
        """Every quantized layer of the checkpoint must have a place in the model, or vLLM would compute without it.

        Raises:
            FormatError: one has none.
        """
        infos = itertools.chain(self.layers.values(), *self.embeddings.values())
        lost = [info.name for info in infos if info.name not in self.claimed]
        if not lost:
            return
        message = f"{len(lost)} quantized layers have no place in vLLM's model, e.g. {lost[0]}"
        if self.is_partial:
            logger.info(message)
            return
        raise FormatError(
            f"{message}: vLLM merges or names layers in a way that this package does not know, or the checkpoint belongs to "
            "another model. Quantize the model without these layers (skip), and tell us which model it is"
        )


def _from_options(options: dict[str, Any]) -> TurboQuantConfig:
    """Settings of a model that is quantized while it loads."""
    if _BASE_ONLY in options:
        raise ConfigError(
            f"additional_config has {_BASE_ONLY!r}: this checkpoint is not quantized yet. Give the bits instead, e.g. "
            f'{{"{QUANT_METHOD}": {{"bits": 4, "residual_bits": 0}}}}'
        )
    for name in ("source", "format_version", "experts"):
        if name in options:
            raise ConfigError(f"additional_config has {name!r}: nothing is to be said about it here, leave it out")
    config = TurboQuantConfig.from_dict(options)
    for name in config.embeddings or ():
        if config.grades(name) is not None:
            raise ConfigError(
                f"additional_config has grades for {name!r}: a calibration text must say which rows come first, and there "
                "is none while a model loads. Give one pair of bits, e.g. [4, 2], or quantize the model before"
            )
    return config


def _embedding_of(info: LayerInfo, config: TurboQuantConfig) -> str:
    """Name of the embedding of which ``info`` is a grade; its own name if it is none."""
    parent = info.name.rpartition(".")[0]
    return info.name if config.grades(parent) is None else parent


def _check_columns(info: LayerInfo, in_features: int, prefix: str) -> None:
    if padded_features(in_features) != info.columns:
        raise FormatError(
            f"{info.name} is stored with {info.columns} columns: {prefix} of this model has {in_features} inputs, "
            f"{padded_features(in_features)} columns. The checkpoint belongs to another model; fetch it again"
        )


def _check_stack(info: LayerInfo, shape: tuple[int, int, int]) -> None:
    count, rows, columns = shape
    if (info.experts, info.out_features, info.columns) != (count, rows, padded_features(columns)):
        raise FormatError(
            f"{info.name} is stored as {info.experts} experts of {info.out_features} x {info.columns}: this model has "
            f"{count} of {rows} x {columns}. The checkpoint belongs to another model; fetch it again"
        )


def _layers_on_the_hub(model_name: str, revision: str | None, config: TurboQuantConfig) -> Sequence[LayerInfo]:
    """The quantized layers, from the headers of the files, which nobody has downloaded yet."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    tensors = {}
    for name, entry in get_safetensors_params_metadata(model_name, revision=revision).items():
        if name == "__metadata__":
            continue
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        tensors[name] = TensorInfo(name, dtype, shape, 0, math.prod(shape) * DTYPE_BYTES.get(dtype, 0))
    if not tensors:
        raise FormatError(
            f"{model_name}: the headers of its files cannot be read from the hub. Download it, and serve the folder"
        )
    return check_tensors(tensors, config)[0]
