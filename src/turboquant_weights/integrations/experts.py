"""Quantized stacks of experts in Transformers' expert modules.

Transformers sends most of its expert modules through an interface of interchangeable implementations. They multiply with
tensors, so a module that holds quantized stacks is given one of its own, whatever the model is set to: it leaves the
routing of rows to one op, which decodes the experts that are used and is opaque to ``torch.compile``. Modules outside of
that interface run their own forward; ``turboquant_weights.experts`` serves what it asks of the stacks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import QUANT_METHOD
from ..experts import DenseExperts, ExpertStack


class _Config:
    """The config of an expert module as before, but for the implementation that the module's decorator asks it for."""

    _experts_implementation = QUANT_METHOD

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.original, name)


def register() -> None:
    """Makes Transformers know the implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(QUANT_METHOD, experts_forward)


def use_stacks(model: nn.Module) -> None:
    """Gives every expert module of ``model`` that holds stacks this implementation, and takes it away from the others."""
    module: Any
    for module in model.modules():
        if not isinstance(getattr(module, "is_transposed", None), bool) or not hasattr(module, "_apply_gate"):
            continue
        ours = isinstance(module.config, _Config)
        if any(isinstance(child, ExpertStack) for child in module.children()):
            if not ours:
                register()
                module.config = _Config(module.config)
        elif ours:
            module.config = module.config.original


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``hidden_states`` [tokens, d], ``top_k_index`` and ``top_k_weights`` [tokens, choices] to [tokens, d].

    One row per token and choice goes through the stacks, in this order, so that the sum over choices has a fixed order.
    """
    tokens, choices = top_k_index.shape
    experts = top_k_index.reshape(-1)
    rows = hidden_states.repeat_interleave(choices, 0)
    absent = (experts >= self.num_experts)[:, None]  # what expert parallelism computes elsewhere
    up = _product(self, "gate_up_proj" if self.has_gate else "up_proj", rows, experts)
    up = self._apply_gate(up) if self.has_gate else self.act_fn(up)
    out = _product(self, "down_proj", up, experts)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    out = (out * top_k_weights.reshape(-1, 1)).masked_fill(absent, 0)
    return out.view(tokens, choices, -1).sum(1).to(hidden_states.dtype)


def _product(module: Any, name: str, rows: Tensor, experts: Tensor) -> Tensor:
    stack = getattr(module, name)
    if not isinstance(stack, ExpertStack):  # left dense
        stack = DenseExperts(stack, "in_out" if module.is_transposed else "out_in")
    out = stack(rows, experts)
    if module.has_bias:
        bias = getattr(module, f"{name}_bias")
        out = out + bias[experts.clamp(max=module.num_experts - 1)]
    return out
