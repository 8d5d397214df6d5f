"""Quantized products under ``torch.func`` (grad, jvp, vmap and what is made of them) and forward-mode differentiation.

The gradient that an op of ``torch.library`` registers serves the ordinary backward pass only: functorch refuses it, and
forward mode would take the op for a constant and return zeros. Under a transform a product therefore runs as the autograd
function below, which says what every transform needs to know: the product is linear in its activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import QuantizationError

# Rows of activations [..., k], and integers [...] that choose a matrix for each row (or None) -> [..., n].
Map = Callable[[Tensor, "Tensor | None"], Tensor]


def is_active() -> bool:
    """Whether a transform of ``torch.func`` or a level of forward-mode differentiation is."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def run_over(*planes: Tensor | None) -> bool:
    """Whether ``vmap`` runs over one of these: then the op itself is called once per model.

    Raises:
        QuantizationError: forward-mode differentiation is active, too: it would find no derivative.
    """
    if not any(plane is not None and torch._C._functorch.is_batchedtensor(plane) for plane in planes):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        raise QuantizationError("forward-mode differentiation inside vmap over packed planes: run the models one by one")
    return True


def apply(forward: Map, adjoint: Map, x: Tensor, choice: Tensor | None = None) -> Tensor:
    """``forward(x, choice)``, linear in ``x``; ``adjoint`` is the transposed map."""
    return _LinearMap.apply(x, choice, forward, adjoint)


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, choice: Tensor | None, forward: Map, adjoint: Map) -> Tensor:
        return forward(x, choice)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, choice, ctx.map, ctx.adjoint = inputs
        ctx.has_choice = choice is not None
        ctx.save_for_backward(*([choice] if ctx.has_choice else []))
        ctx.save_for_forward(*([choice] if ctx.has_choice else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        choice = ctx.saved_tensors[0] if ctx.has_choice else None
        return _LinearMap.apply(grad, choice, ctx.adjoint, ctx.map), None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        choice = ctx.saved_tensors[0] if ctx.has_choice else None
        return _LinearMap.apply(x, choice, ctx.map, ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, choice: Tensor | None, forward: Map, adjoint: Map) -> Any:
        """Maps take any number of leading dimensions: the batch becomes the first of them."""
        x = _leading(x, in_dims[0], info.batch_size)
        choice = None if choice is None else _leading(choice, in_dims[1], info.batch_size)
        return _LinearMap.apply(x, choice, forward, adjoint), 0


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
