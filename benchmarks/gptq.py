"""GPTQ (Frantar et al. 2022) as a peer: integers with error feedback, block after block on the inputs that the quantized
blocks before it produce, and inside a block layer after layer ("true sequential").

Columns are quantized in the order of falling Hessian diagonal ("act-order"); groups keep their columns and have the scale
of the uncompensated weights ("static groups"), so nothing but integers, scales and zero points has to be stored.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

# Columns whose errors are handed on together.
_LAZY = 128
_DAMPING = 0.01
_BATCH = 8


class _Reached(Exception):
    """The layers whose inputs were wanted have run."""


def integer_grid(groups: Tensor, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """fp16 scale and zero point of each group [..., g]: min-max, or the shrunken range of least squared error."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)

    def grid(shrink: float) -> tuple[Tensor, Tensor]:
        scale = (shrink * (high - low) / (2**bits - 1)).half().float().clamp(min=1e-7)
        return scale, (-shrink * low / scale).round().clamp(0, 2**bits - 1)

    best = grid(1.0)
    if search:
        least = torch.full_like(low, torch.inf)
        for shrink in torch.linspace(1, 0.5, 51).tolist():
            candidate = grid(shrink)
            error = (round_to_grid(groups, *candidate, bits) - groups).square().sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))
    return best


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def quantize_weight(weight: Tensor, hessian: Tensor, bits: int, group: int, search: bool) -> Tensor:
    """``weight`` [n, k] on its grid, with each column's error compensated by the columns after it."""
    n, k = weight.shape
    weight = weight.float().clone()
    scale, zero = (t.expand(-1, -1, group).reshape(n, k) for t in integer_grid(weight.view(n, -1, group), bits, search))
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    order = diagonal.argsort(descending=True)
    weight, scale, zero, hessian = weight[:, order], scale[:, order], zero[:, order], hessian[order][:, order]
    hessian.diagonal().add_(_DAMPING * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for start in range(0, k, _LAZY):
        end = min(start + _LAZY, k)
        errors = torch.empty(n, end - start, device=weight.device)
        for i in range(start, end):
            rounded = round_to_grid(weight[:, i], scale[:, i], zero[:, i], bits)
            errors[:, i - start] = (weight[:, i] - rounded) / factor[i, i]
            weight[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
            weight[:, i] = rounded
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight[:, order.argsort()]


@torch.no_grad()
def quantize_blocks(model: nn.Module, names: list[str], windows: Tensor, bits: int, group: int, search: bool) -> None:
    """Quantizes the linear layers ``names`` of a Transformers decoder in place; ``windows`` [w, l] are calibration tokens.

    The group of a layer is the largest power of two that divides its columns, at most ``group``.
    """
    blocks, hidden, arguments = _block_inputs(model, windows)
    prefixes = {id(module): name for name, module in model.named_modules()}
    for block, kwargs in zip(blocks, arguments, strict=True):
        prefix = prefixes[id(block)] + "."
        waiting = [name for name in names if name.startswith(prefix)]
        while waiting:
            layers, hessian = _next_hessian(block, kwargs, hidden, {name: model.get_submodule(name) for name in waiting})
            weights = [model.get_submodule(name).weight for name in layers]
            columns = len(hessian)
            rounded = quantize_weight(torch.cat(weights), hessian, bits, min(group, columns & -columns), search)
            for weight, new in zip(weights, rounded.split([len(weight) for weight in weights]), strict=True):
                weight.copy_(new)
            waiting = [name for name in waiting if name not in layers]
        for i, batch in enumerate(hidden):
            hidden[i] = _output(block(batch, **kwargs))


def _block_inputs(model: nn.Module, windows: Tensor) -> tuple[nn.ModuleList, list[Tensor], list[dict[str, Any]]]:
    """The decoder's blocks, what the first one reads (in batches), and the other arguments that each gets."""
    blocks = model.get_decoder().layers
    device = next(model.parameters()).device
    arguments: list[dict[str, Any]] = [{} for _ in blocks]
    first: list[Tensor] = []

    def remember(index: int, args: tuple, kwargs: dict[str, Any]) -> None:
        if index == 0:
            first.append(kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0])
        arguments[index] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            hook = block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: remember(index, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        # All windows are equally long, so what the blocks get besides the hidden states is the same for all batches
        # but for its batch size: one whole batch after the other.
        if len(windows) % _BATCH:
            raise ValueError(f"{len(windows)} calibration windows: a multiple of {_BATCH} is needed")
        model(input_ids=windows[:_BATCH].to(device), use_cache=False, logits_to_keep=1)
        for batch in windows[_BATCH:].view(-1, _BATCH, windows.shape[1]):
            with contextlib.suppress(_Reached):
                stop = blocks[0].register_forward_pre_hook(_stop, with_kwargs=True)
                try:
                    model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)
                finally:
                    stop.remove()
    return blocks, first, arguments


def _stop(*_: Any) -> None:
    raise _Reached


def _next_hessian(
    block: nn.Module, kwargs: dict[str, Any], hidden: list[Tensor], waiting: dict[str, nn.Module]
) -> tuple[list[str], Tensor]:
    """The first of ``waiting`` that run, all with the same input, and the mean of x x^T over that input."""
    layers: list[str] = []
    inputs: list[Tensor] = []

    def look(name: str, x: Tensor) -> None:
        if not inputs:
            inputs.append(x)
        if x is not inputs[0]:
            raise _Reached
        if name not in layers:
            layers.append(name)

    with contextlib.ExitStack() as stack:
        for name, layer in waiting.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
            stack.callback(hook.remove)
        hessian, tokens = torch.zeros(()), 0
        for batch in hidden:
            inputs.clear()
            with contextlib.suppress(_Reached):
                block(batch, **kwargs)
            x = inputs[0].flatten(0, 1).float()
            hessian = hessian.to(x.device) + x.T @ x
            tokens += len(x)
    return layers, hessian / tokens


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
