"""PEFT: LoRA, and its variants, on quantized layers.

PEFT asks a config's table of custom modules before its own dispatch. Every ``LoraConfig``, new or read with an adapter, gets
an entry for each of our layers, so that ``get_peft_model`` and ``PeftModel.from_pretrained`` need nothing else.

Running and training are PEFT's own code: a quantized layer is an ``nn.Linear`` to it. What it cannot do is change a weight
that is computed from planes. Merging therefore lets PEFT work on a dense stand-in in float32 and rounds the result with the
layer's own settings. The planes from before are kept: unmerging puts them back, bit for bit.

Only submodules of PEFT that are complete when ``peft.tuners.lora`` is may be imported here: an import hook loads this file.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..embedding import TurboQuantEmbedding
from ..errors import ConfigError
from ..linear import TurboQuantLinear
from ..planes import PackedPlanes
from ..reference import PackedWeight, quantize_weight
from .merging import MergeError


class _Original(NamedTuple):
    """What a layer was before anything was merged into it; the parameters themselves, so that tied ones are tied again."""

    planes: PackedWeight
    bias: Tensor | None
    settings: dict[str, Any]
    quantization_error: float | None

    def check(self, base: PackedPlanes) -> None:
        if base.settings != self.settings:
            raise ConfigError(
                f"the layer has {base.settings} now and had {self.settings} when an adapter was merged into it: the planes "
                "from before cannot be used. Load the model again"
            )


class _OnPlanes(lora.LoraLayer):
    """Merging for PEFT's LoRA layers, in front of which it stands in the method resolution order."""

    base_layer: nn.Module
    merged_adapters: list[str]
    _original: _Original | None = None

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter."""
        if getattr(getattr(self.get_base_layer(), "_hf_hook", None), "offload", False):
            raise ConfigError(
                "the model's device map keeps this layer on disk or in main memory until it runs: PEFT would make its "
                "adapter without values. Load the model where it fits, or leave such layers out of target_modules"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters and rounds the result again; ``turboquant_weights.merge_report`` says what the rounding cost.

        Adapters that were merged before are merged anew, from the original planes: the weight is rounded once.
        """
        base = self.base_layer
        if not isinstance(base, PackedPlanes):  # PEFT works on the stand-in and calls itself
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        own = {*self.lora_A, *self.lora_embedding_A}
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in own]
        if not names:
            return
        bias = getattr(base, "bias", None)
        original = self._original or _Original(
            base.packed,
            None if bias is None else bias.detach().clone(),
            base.settings,
            base.quantization_error,
        )
        original.check(base)
        merged = list(self.merged_adapters)
        dense = _stand_in(base, original)
        before = dense.weight.detach().clone()
        self.base_layer, self.merged_adapters = dense, []
        try:
            super().merge(safe_merge=safe_merge, adapter_names=[*merged, *names])
            weight = dense.weight.detach()
            rounded = quantize_weight(weight, **base.settings, name=f"the weight with {', '.join([*merged, *names])} merged")
        except BaseException:
            self.merged_adapters = merged
            raise
        finally:
            self.base_layer = base
        self._original = original
        base._set_planes(rounded.weight)
        base.quantization_error = rounded.error
        base.merge_error = MergeError.between(before, weight, base.dequantize(weight.dtype))
        if bias is not None:
            bias.data = dense.bias.detach().to(bias)
        if base.merge_error.lost > 0.5:
            warnings.warn(
                "merging adapters: in some layers more than half of the update is lost in rounding it to the layer's bits. "
                "print(turboquant_weights.merge_report(model)) says how much. Keep the adapter apart, or merge it into the "
                "original model and quantize that",
                stacklevel=2,
            )

    def unmerge(self) -> None:
        """Puts back the planes and the bias from before merging, bit for bit."""
        base, original = self.base_layer, self._original
        if not isinstance(base, PackedPlanes) or original is None:
            super().unmerge()
            return
        original.check(base)
        device = base.codes.device
        for plane in original.planes:
            if plane is not None:
                plane.data = plane.data.to(device)
        base._set_planes(original.planes)
        base.quantization_error, base.merge_error = original.quantization_error, None
        if original.bias is not None:
            bias = base.get_parameter("bias")
            bias.data = original.bias.to(bias)
        self.merged_adapters.clear()
        self._original = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """One error for an adapter of other shapes, before PyTorch lists every tensor of it."""
        assert isinstance(self, nn.Module)
        for name, own in self.named_parameters():
            stored = None if name.startswith("base_layer.") else state_dict.get(prefix + name)
            if stored is not None and stored.shape != own.shape:
                raise ConfigError(
                    f"{prefix}{name} of the adapter is {list(stored.shape)}, the model needs {list(own.shape)}: the adapter "
                    "was trained on a model of other sizes, or with another config. Load it onto the model it was trained on"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoraLinear(_OnPlanes, lora.Linear):
    """LoRA on a :class:`TurboQuantLinear`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        # A quantized Conv1D computes with [out_features, in_features] like any linear layer, whatever the config says.
        if "config" in kwargs:
            kwargs["config"] = copy.copy(kwargs["config"])
            kwargs["config"].fan_in_fan_out = False
        else:  # PEFT 0.18
            kwargs["fan_in_fan_out"] = False
        super().__init__(base_layer, adapter_name, **kwargs)


class LoraEmbedding(_OnPlanes, lora.Embedding):
    """LoRA on a :class:`TurboQuantEmbedding`."""


def _stand_in(base: PackedPlanes, original: _Original) -> Any:
    """A dense module with the weight and bias that ``base`` had, in float32 or more."""
    probe = copy.copy(base)
    probe._parameters = dict(base._parameters)
    probe._set_planes(original.planes.map(lambda plane: plane.to(base.codes.device)))
    dtype = torch.promote_types(base.dense_dtype, torch.float32)
    if isinstance(probe, TurboQuantEmbedding):
        return probe.to_embedding(dtype)
    assert isinstance(probe, TurboQuantLinear)
    dense = nn.Linear(probe.in_features, probe.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(probe.dequantize(dtype), requires_grad=False)
    if original.bias is not None:
        dense.bias = nn.Parameter(original.bias.to(base.codes.device, dtype, copy=True), requires_grad=False)
    return dense


def register() -> None:
    """Makes every ``LoraConfig`` know our layers. A second call does nothing."""
    original = LoraConfig.__post_init__
    if hasattr(original, "_turboquant_weights"):
        return

    @functools.wraps(original)
    def post_init(self: LoraConfig) -> None:
        original(self)
        self._register_custom_module({TurboQuantLinear: LoraLinear, TurboQuantEmbedding: LoraEmbedding})

    post_init._turboquant_weights = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = post_init
