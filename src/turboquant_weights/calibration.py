"""Calibrated quantization of a decoder: a text goes through the model block by block, and each layer is rounded for its
inputs.

Two streams of hidden states run side by side: the original one, and the one that the already quantized blocks produce.
Inside a block the layers are taken in the order in which the block calls them, layers with the same input together; the
second moments of what arrives at them now, and its drift from what arrived there originally, are all that
:mod:`.feedback` needs. A finished block is replaced by its quantized layers, so memory falls as the work proceeds: one
block, its copy and two sets of hidden states lie on the fast device, the model stays where it was.

The experts of a stack are rounded one by one, each for the rows that are routed to it; one that the text does not reach is
quantized without data.

Nothing here knows an architecture. Layers outside the blocks that the tail calls (an output head of its own) come last;
layers that the text does not reach are quantized without data, and the report says so.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import lzma
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import reference
from .config import TurboQuantConfig
from .errors import ConfigError
from .experts import DenseExperts, TurboQuantExperts
from .feedback import ROWS_PER_COLUMN, Feedback, Moments, quantize_weight_calibrated
from .linear import dense_weight, is_conv1d
from .reference import PackedWeight, Quantized, quantize_weight
from .replay import Replay
from .stream import Batch, BlockStream, Stop


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a calibrated quantization reads.

    Args:
        text: A string, several, a path of a UTF-8 file, token ids [s, l], or None for the text that the package ships (about
            1 MB: encyclopedia, novels, documentation, source code). The text should resemble what the model will see.
        samples: Windows of the text that are used; a shorter text gives fewer. Time and memory are proportional.
        sample_length: Tokens per window.
        device: Where the blocks are worked on, e.g. ``"cuda"``; None: where the model is. The model itself may stay in main
            memory: one block at a time is moved.
        resume: A folder for finished blocks. An interrupted run that is repeated with the same folder continues there and
            gives the same result; delete it when the result is saved.
    """

    text: str | os.PathLike[str] | Sequence[str] | Tensor | None = None
    samples: int = 128
    sample_length: int = 1024
    device: torch.device | str | None = None
    resume: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.sample_length < 1:
            raise ConfigError(f"{self.samples} samples of {self.sample_length} tokens: at least 1 of each is needed")

    def tokens(self, tokenizer: Any) -> Tensor:
        """int64 [s, l], s <= samples.

        Raises:
            ConfigError: no tokenizer where one is needed, or no token at all.
        """
        if isinstance(self.text, Tensor):
            if self.text.dim() != 2 or self.text.is_floating_point() or 0 in self.text.shape:
                raise ConfigError(
                    f"calibration tokens are {self.text.dtype} of shape {tuple(self.text.shape)}: integers [s, l] are needed"
                )
            return self.text[: self.samples, : self.sample_length].long()
        if tokenizer is None:
            raise ConfigError("calibration with a text needs tokenizer=, or give token ids [s, l] instead of the text")
        ids: list[int] = []
        for text in self._texts():
            ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return windows(torch.tensor(ids, dtype=torch.int64), self.sample_length, self.samples, first_token(tokenizer))

    def _texts(self) -> list[str]:
        if self.text is None:
            return [calibration_text()]
        if isinstance(self.text, str):
            return [self.text]
        if isinstance(self.text, os.PathLike):
            try:
                return [Path(self.text).read_text(encoding="utf-8")]
            except UnicodeDecodeError as error:
                raise ConfigError(f"{self.text} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        texts = list(self.text)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError("calibration is a list with something else than strings in it: strings are needed")
        return texts


def calibration_text() -> str:
    """The text that calibration uses unless another is given, about 1 MB of encyclopedia, novels, documentation and
    source code in short turns, so that any prefix has the same mixture. benchmarks/calibration_text.py built it;
    data/NOTICE has the licences.
    """
    data = (resources.files(__package__) / "data" / "calibration.txt.xz").read_bytes()
    return lzma.decompress(data).decode("utf-8")


def as_calibration(value: Any) -> Calibration:
    """What users may write for ``calibration=``: a Calibration, True for the built-in text, or anything that is a text."""
    if isinstance(value, Calibration):
        return value
    if value is not True and not isinstance(value, (str, os.PathLike, Sequence, Tensor)):
        raise ConfigError(
            f"calibration is {value!r}: True for the built-in text, a string, a list of strings, a path, token ids [s, l] "
            "or a Calibration is needed"
        )
    return Calibration(None if value is True else value)


def first_token(tokenizer: Any) -> int | None:
    """The BOS token, if the tokenizer starts a text with it."""
    token = tokenizer.bos_token_id
    return token if token is not None and tokenizer("a").input_ids[:1] == [token] else None


def windows(ids: Tensor, length: int, count: int, first: int | None) -> Tensor:
    """Cuts token ids [t] into at most ``count`` windows [s, length], each with ``first`` in front.

    A text too short for one gives one shorter window.
    """
    if not len(ids):
        raise ConfigError("the calibration text has no token: give a longer text")
    step = min(length - (first is not None), len(ids)) or 1
    cut = ids[: len(ids) // step * step].view(-1, step)[:count]
    return cut if first is None else torch.cat([torch.full((len(cut), 1), first), cut], 1)


# Of the original inputs of a block's layers that are kept while it is rounded; beyond, they are computed once per layer.
_KEPT_BYTES = 4 << 30
# Of results inside a block that one pass over it leaves to the next on a CPU. On a GPU memory is dearer than passes.
_REPLAYED_BYTES = 4 << 30

# Of second moments of the experts of a stack that are gathered in one pass.
_MOMENTS_BYTES = 4 << 30

# Weight of a lookup beside the output head when a tied embedding is rounded, in units of the head's mean squared input.
LOOKUP_SHARE = 0.1

# Called with (layer name, packed weight with its error, layer's config): puts the quantized layer in place.
Install = Callable[[str, Quantized, TurboQuantConfig], None]


class Calibrator:
    """One run over the blocks of ``model``; see the module's docstring.

    Args:
        stream: Open, its batches in front of the first block, made while the model was dense.
        configs: Name of each linear layer or (dense) stack of experts to quantize -> its settings.
        install: Called once per layer.
    """

    def __init__(self, stream: BlockStream, configs: Mapping[str, TurboQuantConfig], install: Install) -> None:
        self.stream = stream
        self.configs = configs
        self.install = install
        self.names = {id(stream.model.get_submodule(name)): name for name in configs}
        self.unreached: list[str] = []
        # The stream's own batches carry the quantized model's hidden states.
        self.original = [dataclasses.replace(batch) for batch in stream.batches]
        self._outputs: dict[int, Tensor] = {}  # of the original block at hand, by batch, where it has run to its end already

    def run(self, store: Any = None, *, progress: bool = True) -> None:
        """Quantizes everything. ``store`` (see ``resume.py``) keeps finished blocks."""
        done: set[str] = set()
        bar = tqdm(range(len(self.stream.blocks)), desc="calibrating", unit="block", disable=not progress)
        for index in bar:
            with self.stream.block(index) as block:
                layers = self._layers(block)
                original = copy.deepcopy(block)
                replay = Replay(block, layers.values(), _REPLAYED_BYTES if self.stream.device.type == "cpu" else 0)
                try:
                    found = None if store is None else store.load(index, layers)
                    if found is None:
                        before = len(self.unreached)
                        found = self._quantize_block(index, block, original, replay)
                        if store is not None:
                            store.save(index, found, self.unreached[before:])
                    else:
                        self.unreached += store.unreached(index)
                        for name, quantized in found.items():
                            self._decode_into(name, quantized)
                    self._advance(index, block, original, replay)
                except BaseException:
                    twins = dict(zip(map(id, block.modules()), original.modules(), strict=True))
                    for layer in layers.values():  # they look dense, and must not compute with rounded weights
                        layer.weight = twins[id(layer)].weight
                    raise
                del original
                for name, quantized in found.items():
                    self.install(name, quantized, self.configs[name])
                    done.add(name)
        self._quantize_tail([name for name in self.configs if name not in done])

    @torch.no_grad()
    def last_hidden(self, *, progress: bool = True) -> list[Batch]:
        """The text behind the last block of the original model: one more pass over the blocks.

        For a head that is tied to the embedding and so must be rounded before the first block is.
        """
        batches = [dataclasses.replace(batch) for batch in self.original]
        for index in tqdm(range(len(self.stream.blocks)), desc="inputs of the head", unit="block", disable=not progress):
            with self.stream.block(index):
                for batch in batches:
                    batch.hidden = self.stream.run(index, batch)
        return batches

    @torch.no_grad()
    def head_moments(self, head: str, batches: Sequence[Batch]) -> Moments:
        """Second moments of what arrives at an output head; ``batches`` from :meth:`last_hidden`."""
        layer = self.stream.model.get_submodule(head)
        moments = Moments(dense_weight(layer, head).shape[1], self.stream.device)
        for batch in batches:
            x = input_of(layer, functools.partial(self.stream.tail, batch.tokens, batch.hidden))
            if x is not None:
                moments.add(x)
        return moments

    @torch.no_grad()
    def restart(self) -> None:
        """Embeds the text again, for the stream of the quantized model: its embedding has changed."""
        for batch in self.stream.batches:
            batch.hidden = self.stream.embed(batch.tokens)

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        return {self.names[id(child)]: child for child in module.modules() if id(child) in self.names}

    @torch.no_grad()
    def _quantize_block(self, index: int, block: nn.Module, original: nn.Module, replay: Replay) -> dict[str, Quantized]:
        layers = self._layers(block)
        twins = dict(zip(map(id, block.modules()), original.modules(), strict=True))

        def run_original(batch: Batch) -> None:
            self._outputs[id(batch)] = self.stream.run(index, batch, original)

        found = self._quantize_in_order(
            layers,
            {name: twins[id(layer)] for name, layer in layers.items()},
            lambda batch: replay.run(id(batch), lambda: self.stream.run(index, batch, block)),
            run_original,
            replay.final,
        )
        for name in layers:
            if name not in found:
                replay.forget()  # not called does not mean that nothing reads its weight
                self.unreached.append(name)
                found[name] = self._quantize_alone(name)
                self._decode_into(name, found[name])
        return {name: found[name] for name in layers}

    def _quantize_in_order(
        self,
        layers: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        run: Callable[[Batch], object],
        run_original: Callable[[Batch], object],
        final: Callable[[Iterable[nn.Module]], None] = lambda layers: None,
    ) -> dict[str, Quantized]:
        """Quantizes the ``layers`` that ``run`` calls; ``run_original`` calls the ``originals`` of the same names.

        ``final`` is told when layers have been rounded.
        """
        found: dict[str, Quantized] = {}
        groups: list[list[str]] = []
        for batch in self.stream.batches:  # one is enough, unless layers see a part of the tokens only
            missing = {name: layer for name, layer in layers.items() if not any(name in group for group in groups)}
            if not missing:
                break
            groups += input_groups(missing, functools.partial(run, batch))
        kept = _inputs_of([originals[first] for first, *_ in groups], self.original, run_original)
        for number, group in enumerate(groups):
            stack, before_it = layers[group[0]], originals[group[0]]
            if isinstance(stack, DenseExperts) and isinstance(before_it, DenseExperts):
                found[group[0]] = self._quantize_stack(group[0], stack, before_it, run, run_original)
                self._decode_into(group[0], found[group[0]])
                final([stack])
                continue
            moments: Moments | None = None
            for index, (now, before) in enumerate(zip(self.stream.batches, self.original, strict=True)):
                x = input_of(layers[group[0]], functools.partial(run, now))
                if x is not None:
                    moments = moments or Moments(x.shape[-1], x.device)
                    original = kept[index][number] if kept else None
                    if original is None:
                        original = input_of(originals[group[0]], functools.partial(run_original, before))
                    # Of a layer that sees a part of the tokens nobody knows whether these are the same ones.
                    whole = x.shape[:-1].numel() == now.tokens.numel() and original is not None and original.shape == x.shape
                    moments.add(x, original if whole else None)
            assert moments is not None
            found.update(self._quantize_group(group, moments))
            final([layers[name] for name in group])
        return found

    def _quantize_group(self, group: Sequence[str], moments: Moments) -> dict[str, Quantized]:
        """Layers with one input: those with the same settings are rounded as one matrix, rows being independent."""
        found = {}
        alike: dict[TurboQuantConfig, list[str]] = {}
        for name in group:
            alike.setdefault(self.configs[name], []).append(name)
        feedback: dict[tuple[int, int], Feedback] = {}
        for config, names in alike.items():
            key = config.group_size, config.seed
            if key not in feedback:
                feedback[key] = moments.feedback(*key)
            weights = [self._weight(name) for name in names]
            planes = quantize_weight_calibrated(
                torch.cat(weights), feedback[key], name=" and ".join(names), **layout(config)
            )
            start = 0
            for name, weight in zip(names, weights, strict=True):
                part = planes.rows(start, start + weight.shape[0])
                start += weight.shape[0]
                found[name] = Quantized(part, reference.relative_error(weight, part, **layout(config)))
                self._decode_into(name, found[name])
        return found

    def _quantize_stack(
        self,
        name: str,
        stack: DenseExperts,
        original: DenseExperts,
        run: Callable[[Batch], object],
        run_original: Callable[[Batch], object],
    ) -> Quantized:
        """Each expert for its own inputs; as many at a time as there is room for their moments."""
        config = self.configs[name]
        room = max(1, _MOMENTS_BYTES // (8 * stack.in_features**2))
        parts: list[Quantized] = []
        alone: list[int] = []
        for start in range(0, stack.num_experts, room):
            moments = {
                expert: Moments(stack.in_features, stack.device)
                for expert in range(start, min(start + room, stack.num_experts))
            }
            for now, before in zip(self.stream.batches, self.original, strict=True):
                _add_routed(
                    moments,
                    _calls_of(stack, functools.partial(run, now)),
                    _calls_of(original, functools.partial(run_original, before)),
                )
            for expert, seen in moments.items():
                where = f"{name}[{expert}]"
                matrix = stack.matrix_of(expert)
                if not seen.count:
                    alone.append(expert)
                    parts.append(quantize_weight(matrix, name=where, **layout(config)))
                    continue
                # Few rows know little about what else will come: the fewer, the more every column counts for itself.
                seen.add_white(stack.in_features / (ROWS_PER_COLUMN * seen.count))
                feedback = seen.feedback(config.group_size, config.seed)
                planes = quantize_weight_calibrated(matrix, feedback, name=where, **layout(config))
                parts.append(Quantized(planes, reference.relative_error(matrix, planes, **layout(config))))
        if alone:
            self.unreached.append(f"{name}{alone}")
        return _stacked(parts, stack)

    def _weight(self, name: str) -> Tensor:
        return dense_weight(self.stream.model.get_submodule(name), name)

    def _quantize_alone(self, name: str) -> Quantized:
        module, settings = self.stream.model.get_submodule(name), layout(self.configs[name])
        if isinstance(module, DenseExperts):
            experts = range(module.num_experts)
            parts = [quantize_weight(module.matrix_of(e), name=f"{name}[{e}]", **settings) for e in experts]
            return _stacked(parts, module)
        return quantize_weight(self._weight(name), name=name, **settings)

    def _decode_into(self, name: str, quantized: Quantized) -> None:
        """Lets the dense layer compute with the quantized weight: faster here than the quantized layer, and the same."""
        module, config = self.stream.model.get_submodule(name), self.configs[name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, DenseExperts):
            packed = quantized.weight.map(lambda plane: plane.to(weight.device))
            stack = TurboQuantExperts.from_packed(packed, module.in_features, module.layout, config)
            module.weight = nn.Parameter(stack.dequantize(weight.dtype), requires_grad=False)
            return
        shape = weight.T.shape if is_conv1d(module) else weight.shape
        device = weight.device
        planes = quantized.weight.map(lambda plane: plane.to(device))
        decoded = reference.dequantize_weight(planes, shape[1], dtype=weight.dtype, **layout(config))
        # A new parameter: the old one may be shared with the copy that runs the original stream.
        module.weight = nn.Parameter(decoded.T.contiguous() if is_conv1d(module) else decoded, requires_grad=False)

    @torch.no_grad()
    def _advance(self, index: int, block: nn.Module, original: nn.Module, replay: Replay) -> None:
        for now, before in zip(self.stream.batches, self.original, strict=True):
            known = self._outputs.pop(id(before), None)
            before.hidden = self.stream.run(index, before, original) if known is None else known
            now.hidden = replay.run(id(now), functools.partial(self.stream.run, index, now, block))
            replay.forget(id(now))

    @torch.no_grad()
    def _quantize_tail(self, rest: Sequence[str]) -> None:
        """Linear layers after the blocks, with the final hidden states as input; whatever is left has no input at all."""
        layers = {name: self.stream.model.get_submodule(name) for name in rest}

        def run(batch: Batch) -> object:
            return self.stream.tail(batch.tokens, batch.hidden)

        found = self._quantize_in_order(layers, layers, run, run) if layers else {}
        for name in rest:
            if name not in found:
                self.unreached.append(name)
                found[name] = self._quantize_alone(name)
            self.install(name, found[name], self.configs[name])


def layout(config: TurboQuantConfig) -> dict[str, int]:
    return dict(bits=config.bits, residual_bits=config.residual_bits, group_size=config.group_size, seed=config.seed)


def _stacked(parts: Sequence[Quantized], stack: DenseExperts) -> Quantized:
    """One expert behind the other, with the error of all together."""
    norms = [reference.squared_norm(stack.matrix_of(e)) for e in range(stack.num_experts)]
    error = sum(norm * part.error for norm, part in zip(norms, parts, strict=True)) / (sum(norms) or 1.0)
    return Quantized(PackedWeight.stack([part.weight for part in parts]), error)


# Rows of a stack's input and the expert of each, or of all.
Call = tuple[Tensor, "Tensor | int"]


def _calls_of(stack: DenseExperts, run: Callable[[], object]) -> list[Call]:
    """Every call of ``stack`` while ``run`` runs."""
    calls: list[Call] = []
    handle = stack.register_forward_pre_hook(lambda module, args: calls.append((args[0].clone(), args[1])))
    try:
        run()
    finally:
        handle.remove()
    return calls


def _add_routed(moments: Mapping[int, Moments], now: Sequence[Call], before: Sequence[Call]) -> None:
    """Adds the rows of each expert; rows of zeros, which some models send to experts that are not chosen, say nothing.

    A row counts for the drift if the original stream sent the row at this place to the same expert; models that call expert
    by expert do not say which row is which.
    """
    paired = [(a, b) for (_, a), (_, b) in zip(now, before, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    comparable = len(paired) == len(now) == len(before) and all(a.shape == b.shape for a, b in paired)
    for index, (rows, experts) in enumerate(now):
        alive = (rows != 0).any(-1)
        if isinstance(experts, int):
            if experts in moments and alive.any():
                moments[experts].add(rows[alive])
            continue
        originals = rows
        if comparable:
            same = (experts == before[index][1])[:, None]
            originals = torch.where(same, before[index][0], rows)
        for expert, seen in moments.items():
            mine = (experts == expert) & alive
            if mine.any():
                seen.add(rows[mine], originals[mine])


@torch.no_grad()
def input_groups(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """The layers that ``run`` calls, in the order of their first calls; those called with the same tensor are one group."""
    groups: list[tuple[Tensor, list[str]]] = []
    seen: set[str] = set()

    def note(name: str, args: tuple[Any, ...]) -> None:
        if name in seen:
            return
        seen.add(name)
        for known, names in groups:
            if known is args[0]:
                names.append(name)
                return
        groups.append((args[0], [name]))

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, args)) for name, module in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in groups]


def _inputs_of(layers: Sequence[nn.Module], batches: Sequence[Batch], run: Callable[[Batch], object]) -> list[list[Tensor]]:
    """What each of ``layers`` is called with first, for every batch: one run each instead of one per layer.

    Empty if all of it would take too much memory, or if a layer is not called.
    """
    kept: list[list[Tensor]] = []
    for batch in batches:
        seen: dict[int, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], seen: dict[int, Tensor] = seen) -> None:
            if id(module) not in seen:
                seen[id(module)] = args[0].clone()  # what the block does with it afterwards is its own affair

        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            run(batch)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < len(layers):
            return []
        kept.append([seen[id(layer)] for layer in layers])
        if len(batches) * sum(x.numel() * x.element_size() for x in kept[0]) > _KEPT_BYTES:
            return []
    return kept


def input_of(layer: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """What ``layer`` is called with first while ``run`` runs, which ends there; None if it is not called."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Stop

    handle = layer.register_forward_pre_hook(note)
    try:
        run()
    except Stop:
        return seen[0]
    finally:
        handle.remove()
    return None
