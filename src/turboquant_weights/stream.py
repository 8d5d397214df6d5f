"""A text on its way through a decoder, one block at a time: what calibration and sensitivities need, with one block in
fast memory.

A decoder is an embedding, a list of blocks that pass on one tensor of hidden states, and a tail (norm, output head).
Which module list that is, is found from the model, not from a table of architectures; that the blocks really pass on
nothing but hidden states is checked by running a few tokens both ways. Everything else a block is called with (masks,
position embeddings, its layer type) is recorded once per batch by running the model with blocks that do nothing, and
stored once where batches agree.

Letters: ``s`` samples, ``l`` tokens per sample, ``d`` hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import QuantizationError
from .linear import is_linear

# Tokens that go through a block together, on a CPU and elsewhere: enough to keep matrix products busy.
_CPU_TOKENS, _GPU_TOKENS = 2048, 8192
_CHECKED_TOKENS = 16
_TOLERANCE = 0.02  # of the norm of the hidden states: bf16 differs that little between two ways of calling a block


class Stop(Exception):
    """Ends a forward pass early: what was wanted of it has been seen."""


@dataclasses.dataclass
class Batch:
    """``tokens`` int64 [s, l]; ``hidden`` [s, l, d]: the next block's input; ``calls``: each block's other arguments."""

    tokens: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: the module list that holds most of the weights of linear layers.

    Raises:
        QuantizationError: there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(any(map(is_linear, block.modules())) for block in module):
            weights = sum(parameter.numel() for parameter in module.parameters())
            if len(module) and (best is None or weights > best[0]):
                best = weights, name, module
    if best is None:
        raise QuantizationError(
            f"{type(model).__name__} has no list of blocks with linear layers: calibration needs a decoder made of blocks. "
            "Quantize it without calibration"
        )
    return best[1], best[2]


class BlockStream:
    """The hidden states of ``tokens`` in front of the first block; :meth:`run` takes them further.

    While the stream is open, everything outside the blocks lies on ``device``, and the block inside :meth:`block` does;
    the rest stays where it was. :meth:`close` puts everything back. Use it as a context manager.

    Args:
        model: A decoder. tokens: int64 [s, l]. device: Where to compute.
        windows: Rows of ``tokens`` in a batch. None: enough to keep matrix products busy. What a block is called with
            belongs to its batch as a whole: of a tensor [s * heads, 1, l] only the model knows what is whose.

    Raises:
        QuantizationError: the model has no blocks, cannot be run on tokens, or its blocks pass on more than hidden states.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, device: torch.device, *, windows: int | None = None) -> None:
        self.model = model
        self.device = device
        self.name, self.blocks = find_blocks(model)
        self._inside = {id(t) for block in self.blocks for t in (*block.parameters(), *block.buffers())}
        self._homes: list[tuple[Any, str, torch.device]] = []
        self._training = model.training
        model.eval()
        self._rest: tuple[Any, ...] | None = None
        self.has_logits = True
        self.batches: list[Batch] = []
        try:
            self._check(tokens[:1, :_CHECKED_TOKENS])
            self._move_outside(device)
            if windows is None:
                windows = max(1, (_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS) // tokens.shape[1])
            with torch.no_grad():
                for part in tokens.split(windows):
                    self.batches.append(self._record(part.to(device)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts the modules outside the blocks back where they were."""
        for owner, name, home in self._homes:
            _move(owner, name, home)
        self._homes = []
        self.model.train(self._training)

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` on the stream's device; copies of it compute as it does."""
        block = self.blocks[index]
        homes = {parameter.device for parameter in block.parameters()}
        home = next(iter(homes)) if len(homes) == 1 else None
        if home != self.device:
            block.to(self.device)
        try:
            with _in_hardware(block.modules()):
                yield block
        finally:
            if home is not None and home != self.device:
                block.to(home)

    def run(self, index: int, batch: Batch, block: nn.Module | None = None) -> Tensor:
        """The output [s, l, d] of block ``index`` (or of ``block`` in its place) for ``batch.hidden``."""
        args, kwargs = batch.calls[index]
        return self._hidden((block or self.blocks[index])(batch.hidden, *args, **kwargs))

    def tail(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model returns if ``hidden`` [s, l, d] is the output of the last block: logits [s, l, v], or the final
        hidden states if it has no head. Differentiable."""
        stubs = [lambda given, *args, **kwargs: self._output(given)] * (len(self.blocks) - 1)
        last = lambda *args, **kwargs: self._output(hidden)  # noqa: E731
        with self._forwards([*stubs, last]), _in_hardware(self.outside()):
            output = self.model(input_ids=tokens, use_cache=False)
        return output.logits if self.has_logits else output[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input [s, l, d] of the first block; differentiable with respect to the embedding."""
        seen: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            seen.append(_split(args, kwargs)[0])
            raise Stop

        with self._forwards([first, *[first] * (len(self.blocks) - 1)]), contextlib.suppress(Stop):
            self.model(input_ids=tokens, use_cache=False)
        return seen[0]

    def outside(self) -> list[nn.Module]:
        """The model's modules, without its blocks and what is in them now."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        return [module for module in self.model.modules() if id(module) not in inside]

    def outside_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Of the model, without those of its blocks as they are now."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return [(name, value) for name, value in self.model.named_parameters() if id(value) not in inside]

    def _hidden(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def _output(self, hidden: Tensor) -> Any:
        """What a block would return if its hidden states were ``hidden``."""
        return hidden if self._rest is None else (hidden, *self._rest)

    @contextlib.contextmanager
    def _forwards(self, functions: list[Callable[..., Any]]) -> Iterator[None]:
        """Calls ``functions`` instead of the blocks, whose attributes stay readable: models ask for their layer type."""
        own = [block.__dict__.get("forward") for block in self.blocks]
        for block, function in zip(self.blocks, functions, strict=True):
            block.forward = function
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _record(self, tokens: Tensor) -> Batch:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def record(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            if index == 0:
                first.append(hidden)
            known = self.batches[0].calls[index] if self.batches else (calls[-1] if calls else None)
            calls.append(_shared((args, _on_device(kwargs, self.device)), known))
            if index + 1 == len(self.blocks):
                raise Stop  # the tail would multiply with the whole vocabulary for nothing
            return self._output(hidden)

        with self._forwards([functools.partial(record, i) for i in range(len(self.blocks))]), contextlib.suppress(Stop):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except IndexError as error:  # of a table of positions, say; a GPU's error says less
                longest = getattr(getattr(self.model, "config", None), "max_position_embeddings", "unknown")
                kind = type(self.model).__name__
                raise QuantizationError(
                    f"{kind} cannot be run on {tokens.shape[1]} tokens at once ({error}): samples may be as long as its "
                    f"table of positions (max_position_embeddings: {longest}), and token ids must be in its vocabulary"
                ) from error
        return Batch(tokens, first[0], calls)

    @torch.no_grad()
    def _check(self, tokens: Tensor) -> None:
        """Learns what a block returns, and that a few tokens come out of the last block as they do in the model."""
        outputs: list[Any] = []
        seen: list[Any] = []
        handles = [
            self.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output)),
            self.blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output)),
        ]
        tokens = tokens.to(next(self.model.parameters()).device)
        try:
            self.has_logits = hasattr(self.model(input_ids=tokens, use_cache=False), "logits")
        except Exception as error:  # whatever the model's code makes of arguments that it does not want
            raise QuantizationError(
                f"{type(self.model).__name__} cannot be run on tokens alone ({type(error).__name__}: {error}): calibration "
                "and budgets need a language model. Quantize it without them"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not outputs or not seen:
            raise QuantizationError(
                f"{type(self.model).__name__} does not run its largest list of blocks, {self.name}, on text"
            )
        if isinstance(seen[0], tuple):
            self._rest = tuple(None if isinstance(item, Tensor) else item for item in seen[0][1:])
        batch = self._record(tokens)
        hidden = batch.hidden
        reason = "run one by one they give something else than in the model"
        try:
            for index, block in enumerate(self.blocks):
                args, kwargs = batch.calls[index]
                where = next(block.parameters()).device
                hidden = self._hidden(block(hidden.to(where), *_on_device(args, where), **_on_device(kwargs, where)))
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            hidden, reason = hidden * torch.nan, f"run one by one they fail ({error})"
        expected = self._hidden(outputs[0]).float()
        distance = torch.linalg.vector_norm(hidden.to(expected.device).float() - expected)
        if not distance <= _TOLERANCE * torch.linalg.vector_norm(expected):
            raise QuantizationError(
                f"the blocks of {type(self.model).__name__} ({self.name}) pass on more than hidden states: {reason}. "
                "Quantize it without calibration"
            )

    def _move_outside(self, device: torch.device) -> None:
        for module in self.model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self._inside and tensor.device != device:
                    self._homes.append((module, name, tensor.device))
                    _move(module, name, device)


@contextlib.contextmanager
def _in_hardware(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block linear layers whose products this processor would emulate compute in float32."""
    emulated = [layer for layer in modules if type(layer) is nn.Linear and _is_emulated(layer)]
    for layer in emulated:
        # A partial, because its arguments are copied with it.
        layer.forward = functools.partial(_in_float32, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in emulated:
            del layer.forward


def _is_emulated(layer: nn.Linear) -> bool:
    """Whether its half precision lacks instructions of this processor, which makes it several times slower than float32.

    Of other processors than x86 nothing is known.
    """
    if not layer.weight.is_cpu or "forward" in layer.__dict__ or not _processor_has("avx2"):
        return False
    native = _processor_has("avx512_bf16") or _processor_has("amx_tile")
    return layer.weight.dtype == torch.float16 or (layer.weight.dtype == torch.bfloat16 and not native)


def _processor_has(feature: str) -> bool:
    """As PyTorch knows it; False if this PyTorch does not."""
    ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return ask is not None and bool(ask())


def _in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's forward: half precision sums up in float32 wherever it is computed, and rounds at the end."""
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(x.float(), layer.weight.float(), bias).to(x.dtype)


def _move(module: nn.Module, name: str, device: torch.device) -> None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.data = parameter.data.to(device)  # tied parameters stay one
    elif (buffer := module._buffers.get(name)) is not None:
        module._buffers[name] = buffer.to(device)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states a block is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_on_device(item, device) for item in value)
    if type(value) is dict:
        return {key: _on_device(item, device) for key, item in value.items()}
    return value


def _shared(value: Any, known: Any) -> Any:
    """``value`` with every tensor that equals the one at the same place of ``known`` replaced by that one."""
    if isinstance(value, Tensor):
        same = isinstance(known, Tensor) and known.shape == value.shape and known.dtype == value.dtype
        return known if same and torch.equal(known, value) else value
    if type(value) in (tuple, list) and isinstance(known, (tuple, list)) and len(known) == len(value):
        return type(value)(_shared(item, other) for item, other in zip(value, known, strict=True))
    if type(value) is dict and type(known) is dict:
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    return value
