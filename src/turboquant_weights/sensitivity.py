"""How much each weight matters: the KL divergence that rounding a unit of weights will cost, before it is rounded.

For a small change ``E`` of the weights, the KL divergence of the model from itself is ``1/2 vec(E)^T F vec(E)`` per
token, with ``F`` the Fisher information. Rounding errors in the rotated basis are close to white, with a variance
proportional to the row's mean square, so the expectation needs only the trace of ``F`` row by row::

    KL(unit) = D * a,     a = 1/2 sum_rows E[sum_columns (dL / dW)^2] * ||w_row||^2 / k      per token

with ``D`` the relative squared error of the codebook and ``L`` the log-likelihood of labels *drawn from the model
itself*: for these the expected squared gradient is the Fisher information, whatever the text (the labels of the text
would give another matrix). One backward pass over a few windows gives ``a`` of every unit at once; that small
independent errors add up is HIGGS' linearity theorem (Malinovskii et al. 2024). For SmolLM2-135M at 4 bits without data
the sum over all layers predicts 0.232 nats, and 0.236 are measured.

The backward pass is streamed like the forward one: block by block, recomputing each block from its stored input, so
that a model needs memory for one block and its gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import TurboQuantConfig
from .errors import QuantizationError
from .experts import DenseExperts
from .feedback import ROWS_PER_COLUMN, Moments, feedback_gain, rotated_moments
from .linear import is_conv1d
from .stream import Batch, BlockStream

_SEED = 0  # of the labels
# What rounding the rows of a tied embedding costs where they are looked up, over what it costs in the head: SmolLM2's.
_LOOKUP_COST = 0.12
_LOGIT_ROWS = 512  # tokens at a time: bounds the memory for probabilities


class Fisher:
    """Sums of squared gradients by row of named weights, window by window."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.sums = {name: torch.zeros(weight.shape[0], dtype=torch.float64) for name, weight in self.weights.items()}
        self.tokens = 0

    def add(self, name: str, gradient: Tensor) -> None:
        self.sums[name] += gradient.float().square().sum(1).double().cpu()

    def sensitivities(self) -> dict[str, float]:
        """``a`` of each weight: expected KL divergence in nats per token, per unit of relative squared error."""
        out = {}
        for name, weight in self.weights.items():
            norms = weight.detach().float().square().mean(1).double().cpu()
            out[name] = 0.5 * float((self.sums[name] * norms).sum()) / max(1, self.tokens)
        return out


def measure(
    stream: BlockStream, linears: Mapping[str, nn.Module], embeddings: Mapping[str, nn.Embedding], *, progress: bool = True
) -> dict[str, float]:
    """Sensitivity of each linear layer and embedding, from the windows of ``stream``, whose hidden states are not changed.

    Args:
        stream: Open, in front of the first block, with one window per batch; a few thousand tokens are enough.
        linears, embeddings: By name; the former may be dense stacks of experts, too.

    Layers outside the blocks count with what the tail's gradient says; those that the text does not reach get 0. Modules
    that share one weight have one value, which is that of all its uses; uses in different blocks count as independent.
    """
    modules = {**linears, **embeddings}
    first: dict[int, str] = {}  # of the names of one weight
    for name, module in modules.items():
        first.setdefault(id(module.weight), name)
    measured = {name: modules[name] for name in first.values()}
    fisher = Fisher({name: _matrix(module) for name, module in measured.items()})
    inside = {id(module) for block in stream.blocks for module in block.modules()}
    rest = {id(p) for module in stream.model.modules() if id(module) not in inside for p in module._parameters.values()}
    outside = {name: module for name, module in measured.items() if id(module.weight) in rest}
    names: list[dict[str, nn.Module]] = []
    for block in stream.blocks:
        held = {id(parameter) for parameter in block.parameters()}
        names.append({name: module for name, module in measured.items() if id(module.weight) in held})
    generator = torch.Generator(device=stream.device).manual_seed(_SEED)
    assert all(len(batch.tokens) == 1 for batch in stream.batches)
    with _frozen(stream.model):
        for batch in tqdm(stream.batches, desc="measuring sensitivities", unit="window", disable=not progress):
            _backward(stream, dataclasses.replace(batch), names, outside, fisher, generator)
    values = fisher.sensitivities()
    return {name: values[first[id(module.weight)]] for name, module in modules.items()}


@torch.no_grad()
def feedback_gains(
    stream: BlockStream,
    groups: Sequence[Sequence[str]],
    linears: Mapping[str, nn.Module],
    config: TurboQuantConfig,
    *,
    enough: int,
    progress: bool = True,
) -> dict[str, float]:
    """What error feedback will leave of the loss of each layer inside the blocks, as its inputs tell (feedback.py): 0.03 to
    0.56 in SmolLM2. Least where a few directions carry the inputs. One forward pass; the stream ends behind the blocks.

    Args:
        stream: Open, in front of the first block. groups: Names of layers with the same input. linears: By name; stacks of
        experts are left out, because each of their experts has inputs of its own. enough: Tokens that tell; of fewer, the
        less is believed the fewer they are, because the directions of 256 tokens say little of those of another text.
    """
    gains: dict[str, float] = {}
    for index in tqdm(range(len(stream.blocks)), desc="measuring inputs", unit="block", disable=not progress):
        with stream.block(index) as block:
            members = {id(module) for module in block.modules()}
            seen: dict[str, Moments] = {}
            handles = []
            for names in groups:
                module = linears[names[0]]
                if id(module) in members and not isinstance(module, DenseExperts):
                    seen[names[0]] = moments = Moments(_matrix(module).shape[1], stream.device)
                    handles.append(module.register_forward_pre_hook(lambda module, args, m=moments: m.add(args[0])))
            try:
                for batch in stream.batches:
                    batch.hidden = stream.run(index, batch)
            finally:
                for handle in handles:
                    handle.remove()
            for names in groups:
                if names[0] in seen:
                    moments = seen.pop(names[0])
                    missing = 1 / max(1, moments.count) - 1 / enough
                    if missing > 0:
                        moments.add_white(len(moments.now) / ROWS_PER_COLUMN * missing)
                    rotated = rotated_moments(moments.now, config.group_size, config.seed)
                    gains.update(dict.fromkeys(names, feedback_gain(rotated)))
    return gains


class VocabularyUse(NamedTuple):
    """What a text makes of the rows of a vocabulary.

    ``frequency`` float64 [n]: the mean probability of each token, which is a smoother estimate than a count. Of an output
    head also ``outputs`` float64 [n], the mean of ``p (1 - p) |h|^2`` with ``h`` its input, and ``moments`` of ``h``.
    """

    frequency: Tensor
    outputs: Tensor | None
    moments: Moments | None


@torch.no_grad()
def vocabulary_use(
    stream: BlockStream, batches: Sequence[Batch], head: nn.Module | None, tokens: int, *, first: int = 0, step: int = 1
) -> VocabularyUse | None:
    """Measures it. None if the model does not return logits.

    Args:
        stream: Open. batches: Behind the last block. head: The output head whose inputs count. tokens: Read at most.
        first, step: The windows that are read, counted over all batches: ``first``, ``first + step``, ...
    """
    if not stream.has_logits:
        return None
    seen: list[Tensor] = []
    handle = None if head is None else head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    frequency: Tensor | None = None
    outputs: Tensor | None = None
    moments: Moments | None = None
    count = 0
    try:
        windows = ((batch.tokens[i : i + 1], batch.hidden[i : i + 1]) for batch in batches for i in range(len(batch.tokens)))
        for ids, hidden in itertools.islice(windows, first, None, step):
            if count >= tokens:
                break
            logits = stream.tail(ids, hidden).flatten(0, -2)
            inputs = seen.pop().flatten(0, -2) if head is not None else None
            for start in range(0, len(logits), _LOGIT_ROWS):
                p = logits[start : start + _LOGIT_ROWS].float().softmax(-1)
                if frequency is None:
                    frequency = torch.zeros(p.shape[1], dtype=torch.float64, device=p.device)
                    outputs = torch.zeros_like(frequency)
                frequency += p.sum(0)
                if inputs is not None:
                    assert outputs is not None
                    energy = inputs[start : start + _LOGIT_ROWS].float().square().sum(1)
                    outputs += energy @ (p * (1 - p))
            if inputs is not None:
                moments = moments or Moments(inputs.shape[1], inputs.device)
                moments.add(inputs)
            count += len(logits)
    finally:
        if handle is not None:
            handle.remove()
    if frequency is None or outputs is None:
        return None
    return VocabularyUse(frequency / count, outputs / count if head is not None else None, moments)


def row_sensitivities(weight: Tensor, use: VocabularyUse, gain: float) -> Tensor | None:
    """Sensitivity of each row of a tied embedding, float64 [n], nats per token and unit of relative squared error; of an
    embedding alone in any unit. None if the logits are not those of its rows.

    An error ``e`` of row ``v`` changes a logit by ``e h``, and the KL divergence, to second order, by half the variance of
    that under ``p``: ``1/2 p (1 - p) (e h)^2`` for errors that are independent between rows.

    Args:
        weight: [n, k]. gain: What error feedback leaves of the head's part; a lookup has none.
    """
    if weight.shape[0] != len(use.frequency):
        return None
    norms = weight.float().square().mean(1).double()
    lookups = norms * use.frequency.to(norms.device)
    if use.outputs is None:
        return lookups
    head = 0.5 * norms * use.outputs.to(norms.device)
    return gain * head + lookups * (_LOOKUP_COST * head.sum() / lookups.sum().clamp(min=torch.finfo(torch.float64).tiny))


def _backward(
    stream: BlockStream,
    window: Batch,
    names: Sequence[Mapping[str, nn.Module]],
    outside: Mapping[str, nn.Module],
    fisher: Fisher,
    generator: torch.Generator,
) -> None:
    inputs = []
    with torch.no_grad():
        for index in range(len(stream.blocks)):
            inputs.append(window.hidden)
            with stream.block(index):
                window.hidden = stream.run(index, window)
    outer = {name: _parameter(module) for name, module in outside.items()}
    for weight in outer.values():
        weight.requires_grad_(True)
    hidden = window.hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = stream.tail(window.tokens, hidden).float()
        if not stream.has_logits or logits.shape[:-1] != window.tokens.shape:
            raise QuantizationError(
                f"{type(stream.model).__name__} returns no logits for every token: budgets need a language model with a head"
            )
        logits = logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    wanted = [hidden, *outer.values()]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    gradient, totals = gradients[0], dict(zip(outer, gradients[1:], strict=True))
    del logits, loss
    for index in range(len(stream.blocks) - 1, -1, -1):
        with stream.block(index), torch.enable_grad():
            window.hidden = inputs[index].detach().requires_grad_(True)
            weights = {name: _parameter(module) for name, module in names[index].items()}
            for weight in weights.values():
                weight.requires_grad_(True)
            output = stream.run(index, window)
            found = torch.autograd.grad(output, [window.hidden, *weights.values()], gradient, allow_unused=True)
            gradient = found[0]
            for name, value in zip(weights, found[1:], strict=True):
                weights[name].requires_grad_(False)
                if value is not None:
                    fisher.add(name, _as_matrix(names[index][name], value))
    with torch.enable_grad():
        embedded = stream.embed(window.tokens)
        if outer and embedded.requires_grad:
            found = torch.autograd.grad(embedded, list(outer.values()), gradient, allow_unused=True)
            for name, value in zip(outer, found, strict=True):
                if value is not None:
                    totals[name] = value if totals[name] is None else totals[name] + value
    for name, value in totals.items():
        outer[name].requires_grad_(False)
        if value is not None:
            fisher.add(name, _as_matrix(outside[name], value))
    fisher.tokens += window.tokens.numel()


def _parameter(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _matrix(module: nn.Module) -> Tensor:
    return _as_matrix(module, _parameter(module))


def _as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight of ``module`` or its gradient, with outputs as rows."""
    if isinstance(module, DenseExperts):
        return module.rows(weight)
    return weight.T if is_conv1d(module) else weight


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside the block, unless it is asked for."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, value in before.items():
            parameter.requires_grad_(value)
