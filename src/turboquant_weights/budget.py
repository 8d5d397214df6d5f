"""Bits under a budget: what of a model can be quantized, how sensitive each part is, and which bits a budget buys.

Sensitivities are measured with one backward pass over a little text (sensitivity.py); without a text, over random
tokens: their logarithms correlate at 0.85 with those of a text, good enough to rank layers, not to predict a loss.
Whoever calibrates gets smaller losses from the same bits, and how much smaller differs twentyfold between layers: that is
read from the second moments of their inputs, in one more pass over some of the text.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import sensitivity
from .allocation import Allocation, Unit, allocate, steps
from .calibration import LOOKUP_SHARE, input_groups
from .config import TurboQuantConfig
from .embedding import TurboQuantEmbedding, check_embedding, check_forward
from .errors import ConfigError, QuantizationError
from .experts import dense_stacks, find_stacks, weight_rows
from .feedback import feedback_gain, rotated_moments
from .linear import is_linear
from .model import HEAD, bf16_bytes, persistent_buffers, plan_layers
from .reference import quantize_weight
from .stream import BlockStream
from .tying import tied_heads, tied_modules

# Windows and their length for the sensitivities: 3,072 tokens.
SAMPLES, SAMPLE_LENGTH = 12, 256
_PROBE_TOKENS, _PROBE_ROWS = 8, 256
_SEED = 0
# Windows of the calibration text that tell how much feedback will help each layer, if there are as many: four times as many
# tokens as the widest layer has inputs, but at least 8,192.
_GAIN_TOKENS, _GAIN_TOKENS_PER_COLUMN = 8192, 4
# Share of the KL divergence of plain rounding that calibrated rounding leaves, where the inputs do not tell: experts, and an
# head tied to an embedding whose rows are not those of the logits. More text leaves less (DESIGN.md), so what a budget
# expects is on the safe side.
_CALIBRATED_LINEAR, _CALIBRATED_TIED = 0.40, 0.90
# Layers with one input whose sensitivities per weight differ by less than this want the same bits to within one: they
# stay alike, so that they can run as one matrix (gate and up, q and k).
_ALIKE = 4.0
# Of a tensor's entry in a safetensors header, without its name, and what else lies in the file.
_ENTRY_BYTES, _FILE_BYTES = 80, 1024


@dataclasses.dataclass(frozen=True)
class BitPlan:
    """What a budget can buy for a model.

    ``units`` can be quantized; ``other_bytes`` are the rest of the file, in the dtypes that the model has, because that is
    how it is stored; ``dense_bytes`` are the whole file in bf16, the yardstick whatever the dtypes; ``parameters``: all of
    the model's, tied ones once; ``tied``: heads on the planes of an embedding; ``left``: embeddings that stay as they are,
    and why; ``measured`` says whether a text was read, ``calibrated`` for which way of rounding the expectations are.
    """

    units: tuple[Unit, ...]
    other_bytes: int
    dense_bytes: int
    parameters: int
    embeddings: frozenset[str]
    skipped: tuple[str, ...]
    tied: Mapping[str, str]
    left: Mapping[str, str]
    measured: bool
    calibrated: bool

    def allocate(
        self, *, target_ratio: float | None = None, target_bits: float | None = None, max_kl: float | None = None
    ) -> Allocation:
        """The best allocation for one of three budgets.

        Args:
            target_ratio: How many times smaller than in bf16 the whole file must be at least.
            target_bits: Bits per parameter of the whole file at most.
            max_kl: Expected KL divergence, nats per token, at most; the smallest such file.

        Raises:
            ConfigError: not exactly one budget, a budget that is not positive, or that nothing meets.
        """
        name, value = one_budget({"target_ratio": target_ratio, "target_bits": target_bits, "max_kl": max_kl})
        if name == "max_kl":
            return allocate(self.units, self.other_bytes, self.dense_bytes, max_kl=value)
        limit = self.dense_bytes / value if name == "target_ratio" else self.parameters * value / 8
        return allocate(self.units, self.other_bytes, self.dense_bytes, max_bytes=limit)

    def curve(self) -> list[Allocation]:
        """Every allocation worth making, from 2 bits everywhere to the model as it is."""
        return steps(self.units, self.other_bytes, self.dense_bytes)

    def config(self, allocation: Allocation, base: TurboQuantConfig) -> TurboQuantConfig:
        """``base`` with the bits of ``allocation``."""
        bits = allocation.bits
        layers: dict[str, tuple[int, int]] = {
            name: choice  # type: ignore[misc]  # only embeddings have grades
            for name, choice in bits.items()
            if choice is not None and name not in self.embeddings
        }
        embeddings = {name: choice for name, choice in bits.items() if choice is not None and name in self.embeddings}
        dense = [name for name, choice in bits.items() if choice is None and name not in self.embeddings]
        dense += [head for head, embedding in self.tied.items() if embedding not in embeddings]
        return dataclasses.replace(
            base, bits=4, residual_bits=0, layer_bits=layers, embeddings=embeddings, skip=(*self.skipped, *dense)
        )


def one_budget(budgets: Mapping[str, Any]) -> tuple[str, float]:
    """The one that is given, and its name.

    Raises:
        ConfigError: not exactly one is, or it is no positive number.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"got {', '.join(given) or 'no budget'}: exactly one of {', '.join(budgets)} is needed")
    (name, value), *_ = given.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value!r}: it must be a positive number")
    return name, value


def plan_bits(
    model: nn.Module,
    config: TurboQuantConfig | None = None,
    skip: Sequence[str] | None = None,
    *,
    tokens: Tensor | None = None,
    calibrated: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> BitPlan:
    """Measures how sensitive each linear layer, expert stack and embedding of a language model is. The model is not changed.

    Args:
        model: A causal language model of Transformers with dense weights.
        config: Its ``skip`` is used if ``skip`` is None.
        skip: Glob patterns of linear layers and embeddings that stay as they are, and with an embedding what is tied to it.
            None: only what must not be quantized (exotic classes); output heads and embeddings take part.
        tokens: A text, int64 [s, l]: the first 12 windows of 256 tokens are read for the sensitivities, and 8,192 tokens or
            more, if it has them, for what calibration gains; a warning says if it has not. None: random tokens.
        calibrated: Whether rounding will be calibrated; None: if there is a text.
        device: Where to compute, None: where the model is.

    Raises:
        QuantizationError: not a decoder, or not one that can be run on tokens.
    """
    config = config or TurboQuantConfig()
    calibrated = tokens is not None if calibrated is None else calibrated
    patterns = config.skip if skip is None else skip
    embeddings, left = find_embeddings(model, config, patterns or ())
    heads = tied_heads(model, embeddings)
    found, _ = find_stacks(model, config)
    # Without patterns, what is tied to an embedding is skipped unless it is told to be on its planes.
    with_tied = patterns if patterns is None or isinstance(patterns, str) else [*patterns, *tied_heads(model, left)]
    targets, skipped = plan_layers(model, with_tied, tied=heads, stacks=found)
    if patterns is None:  # a budget is for the whole file: an output head of its own takes part
        targets += [name for name, reason in skipped.items() if reason == HEAD]
        skipped = {name: reason for name, reason in skipped.items() if reason != HEAD}
    stacks = {name: found[name] for name in targets if name in found}
    measured = tokens is not None
    if tokens is None:
        tokens = _random_tokens(model)
    text, tokens = tokens, tokens[:SAMPLES, :SAMPLE_LENGTH]
    where = torch.device(device) if device is not None else next(model.parameters()).device
    with dense_stacks(model, stacks):
        linears = {name: model.get_submodule(name) for name in targets}
        with BlockStream(model, tokens, where, windows=1) as stream:
            values = sensitivity.measure(stream, linears, embeddings, progress=progress)
        probe = tokens[:1, :_PROBE_TOKENS].to(next(model.parameters()).device)
        groups = input_groups(linears, lambda: model(input_ids=probe, use_cache=False))
        gains: dict[str, float] = {}
        rows: dict[str, Tensor] = {}
        if calibrated and measured:
            widest = max((weight_rows(module, name).shape[1] for name, module in linears.items()), default=1)
            wanted = max(_GAIN_TOKENS, _GAIN_TOKENS_PER_COLUMN * widest)
            if text.numel() < wanted:
                warnings.warn(
                    f"the budget's text has {text.numel():,} tokens, and this model needs {wanted:,} to tell how much "
                    "calibration helps each layer: the expected KL divergence will be too small, a quarter of the real one "
                    "with 256 tokens. Pass a longer text, or more samples",
                    stacklevel=2,
                )
            with BlockStream(model, text[: -(-wanted // text.shape[1])], where) as stream:
                gains = sensitivity.feedback_gains(stream, groups, linears, config, enough=wanted, progress=progress)
                rows = _row_sensitivities(stream, embeddings, heads, values, config, wanted)
    reached = {name for group in groups for name in group}
    groups += [[name] for name in linears if name not in reached]
    tied = {id(module.weight) for module in model.modules() if is_linear(module)}
    clusters = [names for group in groups for names in _alike(group, values, linears)]
    gains = {name: gains.get(name, _CALIBRATED_LINEAR) if calibrated else 1.0 for name in linears}
    kept = _kept(model, [*linears, *tied_modules(model, embeddings)], stacks)
    units = [_unit(names, linears, values, gains, kept, apart=calibrated) for names in _united(clusters, linears)]
    for name, embedding in embeddings.items():
        gain = _CALIBRATED_TIED if calibrated and id(embedding.weight) in tied else 1.0
        unit = _unit([name], embeddings, values, {name: gain}, kept, apart=False)
        if name in rows:
            unit = dataclasses.replace(unit, sensitivity=float(rows[name].sum()), rows=tuple(rows[name].tolist()))
        units.append(unit)
    return BitPlan(
        tuple(units),
        sum(tensor.nbytes for tensor in kept.values()) + _header_bytes(model, units),
        sum(map(bf16_bytes, _kept(model).values())) + _header_bytes(model, units),
        sum(parameter.numel() for parameter in model.parameters()),
        frozenset(embeddings),
        tuple(name for name in skipped if name in found or (is_linear(model.get_submodule(name)) and name not in heads)),
        heads,
        left,
        measured,
        calibrated,
    )


@torch.no_grad()
def _row_sensitivities(
    stream: BlockStream,
    embeddings: Mapping[str, nn.Embedding],
    heads: Mapping[str, str],
    values: Mapping[str, float],
    config: TurboQuantConfig,
    tokens: int,
) -> dict[str, Tensor]:
    """Of the embedding that the model's input goes through, the sensitivities of the rows, float64 [n] on the CPU, as one
    half of the text sees them, the rows in the order that the other half gives them.

    In the order of one and the same text, rows at the end would matter too little: another text uses other rare words. For
    SmolLM2 the 85 % of the rows that 8,192 tokens need least carry 6 % of what these tokens lose; of the other half's loss
    they carry 16 %, of WikiText-2's 22 %. ``stream`` has been run to the end of the blocks.
    """
    inputs = stream.model.get_input_embeddings()  # type: ignore[operator]  # a model of Transformers
    name = next((name for name, embedding in embeddings.items() if embedding.weight is inputs.weight), None)
    if name is None:
        return {}
    head = next((head for head, embedding in heads.items() if embedding == name), None)
    module = None if head is None else stream.model.get_submodule(head)
    found = []
    for first in range(2) if sum(len(batch.tokens) for batch in stream.batches) > 1 else (0, 0):
        use = sensitivity.vocabulary_use(stream, stream.batches, module, tokens, first=first, step=2)
        if use is None:
            return {}
        gain = 1.0
        if use.moments is not None:
            use.moments.add_white(LOOKUP_SHARE)
            gain = feedback_gain(rotated_moments(use.moments.now, config.group_size, config.seed))
        rows = sensitivity.row_sensitivities(inputs.weight, use, gain)
        if rows is None:
            return {}
        found.append(rows)
    one, other = found
    crossed = (one[other.argsort(descending=True)] + other[one.argsort(descending=True)]).cpu() / 2
    return {name: crossed if head is not None else crossed * (values[name] / crossed.sum())}


def find_embeddings(
    model: nn.Module, config: TurboQuantConfig, patterns: Sequence[str]
) -> tuple[dict[str, nn.Embedding], dict[str, str]]:
    """Embeddings by the first of their names, of those that share a weight the first; and those that stay dense, and why."""
    found: dict[int, tuple[str, nn.Embedding]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found.setdefault(id(module.weight), (name, module))
    left = {name: reason for name, _ in found.values() if (reason := _obstacle(model, name, config, patterns))}
    return {name: module for name, module in found.values() if name not in left}, left


def _obstacle(model: nn.Module, name: str, config: TurboQuantConfig, patterns: Sequence[str]) -> str | None:
    """Why the embedding ``name``, and whatever shares its weight, cannot be quantized or is not to be."""
    for other in tied_modules(model, [name]):
        pattern = next((pattern for pattern in patterns if fnmatch.fnmatchcase(other, pattern)), None)
        if pattern is not None:
            return f"{other} matches skip pattern {pattern!r}"
        module = model.get_submodule(other)
        if isinstance(module, nn.Embedding):
            try:
                check_embedding(module, other)
                _check_lookups(module, other, config.with_bits(2, 0))
            except QuantizationError:
                return f"{other} is a {type(module).__name__} that packed planes cannot stand for"
        elif type(module) is not nn.Linear:
            return f"shares its weight with {other}, a {type(module).__name__}, which cannot read packed planes"
    return None


def _check_lookups(embedding: nn.Embedding, name: str, config: TurboQuantConfig) -> None:
    """What quantizing an embedding of a class of its own would find out, before minutes pass: :func:`check_forward`.

    Raises:
        QuantizationError: its class computes something that packed planes do not follow.
    """
    if type(embedding) is nn.Embedding:
        return
    rows, columns = embedding.weight.shape
    # Rounding all rows would take long, and what they hold does not matter.
    values = torch.randn(min(rows, _PROBE_ROWS), columns, generator=torch.Generator().manual_seed(_SEED))
    few = quantize_weight(values, bits=config.bits, group_size=config.group_size, seed=config.seed, name=name).weight
    repeated = torch.arange(rows) % len(values)
    planes = few.map(lambda plane: plane[repeated].to(embedding.weight.device))
    check_forward(TurboQuantEmbedding.from_packed(planes, embedding, config), name)


def _random_tokens(model: nn.Module) -> Tensor:
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if not isinstance(embedding, nn.Embedding):
        raise QuantizationError(f"{type(model).__name__} has no input embedding: a budget needs a language model")
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(embedding.num_embeddings, (SAMPLES, SAMPLE_LENGTH), generator=generator)


def _alike(group: Sequence[str], values: Mapping[str, float], linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """Cuts layers with one input into those that want about the same bits."""
    per_weight = {name: values[name] / weight_rows(linears[name], name).numel() for name in group}
    clusters: list[list[str]] = []
    for name in sorted(group, key=lambda name: per_weight[name]):
        if clusters and per_weight[name] <= _ALIKE * per_weight[clusters[-1][0]]:
            clusters[-1].append(name)
        else:
            clusters.append([name])
    return [[name for name in group if name in cluster] for cluster in clusters]


def _united(clusters: Sequence[list[str]], linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """Joins clusters whose layers share a weight: without calibration they share its planes, too."""
    joined: dict[int, list[str]] = {}  # weight -> the cluster that it is in
    for names in clusters:
        known = {id(other): other for name in names if (other := joined.get(id(linears[name].weight)))}
        all_names = [name for other in known.values() for name in other] + names
        joined.update({id(linears[name].weight): all_names for name in all_names})
    return list({id(names): names for names in joined.values()}.values())


def _unit(
    names: Sequence[str],
    modules: Mapping[str, Any],
    values: Mapping[str, float],
    gains: Mapping[str, float],
    kept: Mapping[int, Tensor],
    *,
    apart: bool,
) -> Unit:
    """``kept``: what the file holds anyway, :func:`_kept`; ``apart``: whether modules that share a weight will have planes
    of their own, as calibrated layers do."""
    users = collections.Counter(id(modules[name].weight) for name in names)
    weights = {}
    shapes = []
    sensitivity = 0.0
    for name in names:
        module = modules[name]
        weight = module.weight if isinstance(module, nn.Embedding) else weight_rows(module, name)
        sensitivity += gains[name] * values[name] / users[id(module.weight)]  # the value is that of all its uses
        if apart or id(module.weight) not in weights:
            shapes.append((weight.shape[0], weight.shape[1]))
        weights[id(module.weight)] = 0 if id(module.weight) in kept else weight.nbytes
    return Unit(tuple(names), tuple(shapes), sensitivity, dense=sum(weights.values()))


def _kept(model: nn.Module, planned: Iterable[str] = (), stacks: Collection[str] = ()) -> dict[int, Tensor]:
    """Parameters and persistent buffers by identity, without the weights of the modules ``planned`` (those in ``stacks`` are
    parameters) unless another module has them, too."""
    names = list(planned)
    weights = {id(model.get_parameter(name)) for name in names if name in stacks}
    modules = {id(model.get_submodule(name)) for name in names if name not in stacks}
    kept: dict[int, Tensor] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            leaves = id(parameter) in weights or (id(module) in modules and key == "weight")
            if parameter is not None and not leaves:
                kept[id(parameter)] = parameter
    return kept | {id(buffer): buffer for buffer in persistent_buffers(model)}


def _header_bytes(model: nn.Module, units: Sequence[Unit]) -> int:
    """What describes each tensor in the file."""
    planes = {name for unit in units for name in unit.names}
    stored = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    entries = sum(len(name) + _ENTRY_BYTES for name in stored.values())
    entries += sum(3 * (len(name) + len(".exponents") + _ENTRY_BYTES) for name in planes)
    return entries + _FILE_BYTES
