"""Tuning what stays dense behind the last block, most often one norm, after everything has been rounded.

The errors of all layers arrive there together, and the gains of the last norm are what can still answer them: they are
chosen so that the logits' KL divergence from the original model's is least on the calibration text (in the spirit of Norm
Tweaking, Li et al. 2023). Nothing but the tail is run: hidden states behind the last block are known for both models.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .stream import Batch, BlockStream

_TOKENS = 1 << 15  # read at most; every eighth piece of them decides whether the result is kept
_PIECE = 1024  # tokens at a time: bounds the memory for logits
_PIECES = 4  # per step
_CPU_LOGITS, _GPU_LOGITS = 1 << 20, 1 << 23  # that are in float32 at a time: a few tokens', which a CPU's cache should hold
_RATE, _BETAS = 2e-3, (0.9, 0.95)  # of Adam, on changes relative to the parameter

# Token ids, hidden states of the quantized model, and of the original one: [1, l, ...].
Piece = tuple[Tensor, Tensor, Tensor]


class Tuned(NamedTuple):
    """``names`` of the parameters; KL divergence, nats per token, on the part of the text that only decides."""

    names: tuple[str, ...]
    before: float
    after: float


class OriginalTail:
    """The modules behind the blocks that will be rounded, as they are now.

    Args:
        stream: Open. names: Of output heads and other layers; weights that are replaced, not written to, stay known here.
    """

    def __init__(self, stream: BlockStream, names: Iterable[str]) -> None:
        self.places: list[tuple[nn.Module, list[tuple[nn.Module, str]]]] = []  # twins, and where they belong
        for name in names:
            module = stream.model.get_submodule(name)
            places = [(owner, leaf) for owner in stream.model.modules() for leaf, m in owner._modules.items() if m is module]
            self.places.append((_twin(module), places))
        self.parameters = {
            name: parameter.detach().clone()
            for name, parameter in stream.outside_parameters()
            if parameter.dim() == 1 and parameter.is_floating_point()
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model's tail is the original one."""
        current = []
        for twin, places in self.places:
            for owner, leaf in places:
                current.append((owner, leaf, owner._modules[leaf]))
                owner._modules[leaf] = twin
        try:
            yield
        finally:
            for owner, leaf, module in current:
                owner._modules[leaf] = module


def _twin(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    return twin


def tune_tail(stream: BlockStream, original: Sequence[Batch], tail: OriginalTail) -> Tuned | None:
    """Changes the dense vectors behind the blocks in place where that lowers the KL divergence.

    Args:
        stream: Open, behind the last block of the quantized model. original: The same text behind that of the original one.

    Returns:
        None if there is nothing to tune, too little text to tell whether it helped, or nothing was gained: the parameters
        are then as they were.
    """
    pieces = list(_pieces(stream.batches, original))
    check, learn = pieces[::8], [piece for i, piece in enumerate(pieces) if i % 8]
    named = {n: p for n, p in stream.outside_parameters() if n in tail.parameters}
    if not (stream.has_logits and named and learn):
        return None
    originals = {name: tail.parameters[name] for name in named}

    def put(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            named[name].data.copy_(value)

    def logits(piece: Piece) -> tuple[Tensor, Tensor]:
        """[1, l, v] of the original model, and of the quantized one."""
        tokens, hidden, before = piece
        with torch.no_grad(), tail.in_place():
            mine = {name: named[name].detach().clone() for name in named}
            put(originals)
            wanted = stream.tail(tokens, before)
            put(mine)
        return wanted, stream.tail(tokens, hidden)

    @torch.no_grad()
    def mean_loss() -> float:
        return sum(_divergence(*logits(piece)) for piece in check) / len(check)

    def gradients(piece: Piece, names: Iterable[str]) -> tuple[Tensor | None, ...]:
        """Of the KL divergence; its derivative with respect to the logits is a difference of two softmaxes."""
        wanted, found = logits(piece)
        if not found.requires_grad:  # a tail without vectors, behind an embedding that has some
            return (None,) * len(named)
        with torch.no_grad():
            for p, q in _rows(wanted, found):  # in the place of `wanted`, which is as large as a piece's memory gets
                p.copy_(q.float().softmax(-1).sub_(p.float().softmax(-1)).div_(len(found.flatten(0, -2))))
        parameters = [named[name] for name in names]
        return torch.autograd.grad(found, parameters, wanted, allow_unused=True)

    wants = {name: parameter.requires_grad for name, parameter in named.items()}
    before = mean_loss()
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            used = [name for name, slope in zip(named, gradients(learn[0], named), strict=True) if slope is not None]
            if not used:
                return None
            _descend({name: named[name] for name in used}, learn, gradients)
        after = mean_loss()
        if not after < before:  # nor if either is NaN: half precision may overflow
            put(originals)
            return None
    except BaseException:
        put(originals)
        raise
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(wants[name])
    return Tuned(tuple(used), before, after)


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean of KL(wanted || found), nats, from logits [..., v]."""
    total = 0.0
    for one, other in _rows(wanted, found):
        p, q = (logits.float().log_softmax(-1) for logits in (one, other))
        total += float((p.exp() * (p - q)).sum())
    return total / len(found.flatten(0, -2))


def _rows(*logits: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views [r, v] of a few tokens each: float32 copies of all at once would be most of the memory."""
    most = _CPU_LOGITS if logits[0].is_cpu else _GPU_LOGITS
    return zip(*(t.flatten(0, -2).split(max(1, most // t.shape[-1])) for t in logits), strict=True)


def _descend(
    named: dict[str, nn.Parameter],
    learn: Sequence[Piece],
    gradients: Callable[[Piece, Iterable[str]], tuple[Tensor | None, ...]],
) -> None:
    """Adam on the relative changes, with the parameters rounded to their own dtype at every step: what is saved is tuned."""
    start = {name: parameter.detach().float().clone() for name, parameter in named.items()}
    change = {name: torch.zeros_like(value, requires_grad=True) for name, value in start.items()}
    adam = torch.optim.Adam(change.values(), lr=_RATE, betas=_BETAS)
    steps = [learn[i : i + _PIECES] for i in range(0, len(learn), _PIECES)]
    for number, pieces in enumerate(steps):
        for group in adam.param_groups:
            group["lr"] = _RATE * min(1, (number + 1) / 3) * 0.5 * (1 + math.cos(math.pi * number / len(steps)))
        slopes = {name: torch.zeros_like(value) for name, value in start.items()}
        for piece in pieces:
            for name, slope in zip(named, gradients(piece, named), strict=True):
                assert slope is not None  # of the ones that were asked for, because they have one
                slopes[name] += slope.float() * start[name] / len(pieces)
        for name, slope in slopes.items():
            change[name].grad = slope
        adam.step()
        for name, parameter in named.items():
            parameter.data.copy_(start[name] * (1 + change[name].detach()))


def _pieces(now: Sequence[Batch], before: Sequence[Batch]) -> Iterator[Piece]:
    """(tokens, hidden states of the quantized model, of the original one) [1, l], l <= 1,024, spread over the text."""
    length = now[0].tokens.shape[1]
    parts = math.ceil(length / _PIECE)  # as long as each other: they count the same
    total = sum(len(batch.tokens) for batch in now)
    stride = max(1, total * length // _TOKENS)
    number = 0
    for one, other in zip(now, before, strict=True):
        for row in range(len(one.tokens)):
            if number % stride == 0:
                whole = (one.tokens, one.hidden, other.hidden)
                yield from zip(*(t[row : row + 1].tensor_split(parts, 1) for t in whole), strict=True)
            number += 1
