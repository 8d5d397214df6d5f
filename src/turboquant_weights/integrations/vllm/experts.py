"""vLLM's side of a block of experts. See ``methods.py``: this is the same for ``stacks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from ...config import TurboQuantConfig
from ...errors import ConfigError, FormatError
from ...planes import PLANES
from .stacks import Experts, Stack

# Those that need their input alone. Others want gate and up interleaved, limits or factors.
_ACTIVATIONS = (
    *(MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH),
    *(MoEActivation.SILU_NO_MUL, MoEActivation.GELU_NO_MUL, MoEActivation.GELU_TANH_NO_MUL, MoEActivation.RELU2_NO_MUL),
)


class TurboQuantExpertsMethod(FusedMoEMethodBase):
    """Of the routed experts of one block.

    Args:
        moe: vLLM's description of the block.
        names: Of its two stacks in the checkpoint, gate and up (or up alone) and down. configs: Their own settings.
        online: The checkpoint is dense and quantized while it loads.
    """

    def __init__(self, moe: Any, names: Sequence[str], configs: Sequence[TurboQuantConfig], online: bool) -> None:
        super().__init__(moe)
        self.names = list(names)
        self.configs = list(configs)
        self.online = online
        _check_engine(self.names[0], moe)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        moe = self.moe
        ranks, whole = moe.moe_parallel_config.tp_size, moe.intermediate_size
        if intermediate_size_per_partition * ranks != whole or hidden_size != moe.hidden_dim_unpadded:
            raise ConfigError(
                f"{layer.layer_name}: vLLM gives each of {ranks} ranks {intermediate_size_per_partition} of {whole} "
                f"intermediate columns and pads {moe.hidden_dim_unpadded} hidden ones to {hidden_size}: packed planes "
                f"are not padded. Use a number of ranks that divides {whole}, and no all-to-all backend that pads"
            )
        local = {g: layer._map_global_expert_id_to_local_expert_id(g) for g in range(moe.num_experts)}
        here = sorted((place, expert) for expert, place in local.items() if place >= 0)
        start = moe.moe_parallel_config.tp_rank * intermediate_size_per_partition
        layer.turboquant = Experts(
            self.names,
            self.configs,
            [expert for _, expert in here],
            (hidden_size, whole),
            moe.is_act_and_mul,
            start,
            start + intermediate_size_per_partition,
        )
        if self.online:
            for name in ("w13_weight", "w2_weight"):
                slot = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
                layer.register_parameter(name, slot)
                set_weight_attrs(slot, {"weight_loader": _quantizer(layer.turboquant)})
        else:
            layer.load_weights = _loader(layer.layer_name, self.names, layer.turboquant)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.turboquant.check_complete()
        for name in ("w13_weight", "w2_weight"):
            if name in layer._parameters:
                delattr(layer, name)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """``x`` [tokens, hidden]; ``topk_weights`` and ``topk_ids`` [tokens, choices]; returns [tokens, hidden]."""
        tokens, choices = topk_ids.shape
        experts = topk_ids.reshape(-1).long()
        if layer.expert_map is not None:  # -1: on another rank. The op gives rows behind its last expert zeros.
            experts = layer.expert_map[experts].long()
            experts = torch.where(experts < 0, layer.turboquant.up.codes.shape[0], experts)
        weights = topk_weights.reshape(-1, 1).to(x.dtype)
        rows = x.repeat_interleave(choices, 0)
        if layer.apply_router_weight_on_input:
            rows = rows * weights
        up = layer.turboquant.up(rows, experts)
        width = up.shape[-1] // 2 if layer.activation.is_gated else up.shape[-1]
        inner = apply_moe_activation(layer.activation, up.new_empty(up.shape[0], width), up)
        out = layer.turboquant.down(inner, experts)
        if not layer.apply_router_weight_on_input:
            out = out * weights
        return out.view(tokens, choices, -1).sum(1)


def _check_engine(name: str, moe: Any) -> None:
    """What a block of experts may not ask for, and the engine neither."""
    if moe.has_bias or moe.activation not in _ACTIVATIONS or moe.swiglu_limit is not None:
        raise ConfigError(
            f"{name}: experts with biases, limits or the activation {moe.activation.value} are not supported in vLLM yet: "
            "leave these stacks dense (skip) to serve the model"
        )
    graphs = get_current_vllm_config().compilation_config.cudagraph_mode
    if current_platform.is_cuda_alike() and graphs != CUDAGraphMode.NONE:
        raise ConfigError(
            f"{name}: quantized experts cannot be captured in a CUDA graph yet, because the number of rows of each "
            "expert is waited for. Start vLLM with --enforce-eager"
        )


def _loader(prefix: str, names: Sequence[str], experts: Experts) -> Callable[[Iterable[tuple[str, Tensor]]], Iterable[str]]:
    """Takes the place of the layer's ``load_weights``, which would look for one matrix after the other."""
    stacks: dict[str, tuple[str, Stack]] = {
        name.rpartition(".")[2]: (place, stack)
        for name, place, stack in zip(names, ("up", "down"), (experts.up, experts.down), strict=True)
    }

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        for name, tensor in weights:
            key, _, plane = name.rpartition(".")
            if name in stacks and tensor.shape == (0,):
                continue  # the tripwire
            if key not in stacks or plane not in PLANES:
                raise FormatError(
                    f"{prefix}.{name} is stored, but the experts of {prefix} are quantized: restore config.json"
                )
            place, stack = stacks[key]
            if plane == "residual" and not stack.part.config.residual_bits:
                continue  # the base plane alone is wanted
            stack.put(plane, tensor)
            yield f"turboquant.{place}.{plane}"

    return load_weights


def _quantizer(experts: Experts) -> Callable[..., bool | None]:
    """Loads matrices of a dense checkpoint, one expert at a time, as vLLM hands them on."""

    def load(
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if expert_id not in experts.up.part.experts:
            return False if return_success else None
        if shard_id == "w2":
            experts.down.quantize(expert_id, 0, loaded_weight, 0)
        else:
            experts.up.quantize(expert_id, {"w1": 0, "w3": 1}[shard_id], loaded_weight, experts.start)
        return True if return_success else None

    return load
