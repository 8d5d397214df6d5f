"""Walks a model, swaps its linear layers for quantized ones in place, and reports what was done and what was not."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from . import reference
from .config import EmbeddingBits, Grades, TurboQuantConfig, is_graded
from .embedding import TurboQuantEmbedding
from .errors import ConfigError, QuantizationError
from .experts import TurboQuantExperts, changed, find_stacks, replace_parameter
from .graded import GradedEmbedding
from .linear import TurboQuantLinear, dense_weight, is_linear
from .planes import PackedPlanes
from .tail import Tuned
from .tying import plan_embeddings, replace_embedding, replace_module, tied_heads, tied_modules

# Bytes per weight of the yardstick: sizes are compared with the model in bf16, whatever dtype it is loaded in. What stays
# dense is counted in the dtype that it has, because that is how it is saved.
_DENSE_BYTES = 2
HEAD = "output head; quantize it with skip=[], or by its name in layer_bits"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer. ``error`` is ``||W - W'||^2 / ||W||^2``; ``bytes`` are those of planes, scales, exponents, bias
    as stored, ``dense_bytes`` the same layer's in bf16. Of an embedding ``out_features`` is the number of rows; of an expert
    stack both sizes are those of one of the ``experts``."""

    name: str
    label: str
    out_features: int
    in_features: int
    error: float
    bytes: int
    dense_bytes: int
    seconds: float
    kind: str = "linear"  # or "embedding", or "experts"
    experts: int = 1

    @property
    def weights(self) -> int:
        return self.experts * self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the layer (bias included), over its weights."""
        return 8 * self.bytes / self.weights


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What ``quantize_model`` did.

    ``layers`` in model order, embeddings first; ``tied`` maps each output head that runs on the planes of a quantized
    embedding to that embedding; ``skipped`` maps each linear layer and expert stack left alone to the reason; ``dense`` maps
    every other parameter of two or more dimensions that stays dense (embeddings, convolutions, routers) to its bytes,
    ``reasons`` the same names to why; ``other_bytes`` are those of every parameter outside the quantized layers and of what
    else a file holds (persistent buffers), each tied tensor once and in its own dtype, ``other_dense_bytes`` the same in
    bf16, ``skipped_bytes`` those of the skipped layers among them;
    ``expected_kl`` is what a budget's allocation expects, nats per token; ``uncalibrated`` are layers that the
    calibration text did not reach, so that they were rounded without data; ``tuned`` are the vectors behind the last block
    that calibration changed, with the KL divergence before and after, on a part of its text.
    """

    config: TurboQuantConfig
    layers: list[LayerReport]
    skipped: dict[str, str]
    dense: dict[str, int]
    other_bytes: int
    other_dense_bytes: int
    seconds: float
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    expected_kl: float | None = None
    uncalibrated: list[str] = dataclasses.field(default_factory=list)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped_bytes: int = 0
    tuned: Tuned | None = None

    @property
    def total_bytes(self) -> int:
        """The whole model as a file holds it, without the file's header: quantized layers packed, the rest in the dtypes
        that it has. A budget counts the same, and the header."""
        return sum(layer.bytes for layer in self.layers) + self.other_bytes

    @property
    def dense_bytes(self) -> int:
        """The whole model in bf16, whatever its dtypes."""
        return sum(layer.dense_bytes for layer in self.layers) + self.other_dense_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller the whole model, as stored, is than in bf16: below 1 is possible in float32."""
        return self.dense_bytes / self.total_bytes

    @property
    def bits_per_weight(self) -> float:
        """Over the quantized layers, everything counted."""
        return 8 * sum(layer.bytes for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def error(self) -> float:
        """Mean relative squared error of the quantized layers."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary with the per-layer list."""
        return {
            "config": self.config.to_dict(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "skipped": self.skipped,
            "dense": self.dense,
            "reasons": self.reasons,
            "other_bytes": self.other_bytes,
            "other_dense_bytes": self.other_dense_bytes,
            "skipped_bytes": self.skipped_bytes,
            "tied": self.tied,
            "total_bytes": self.total_bytes,
            "dense_bytes": self.dense_bytes,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "expected_kl": self.expected_kl,
            "uncalibrated": self.uncalibrated,
            "tuned": None if self.tuned is None else self.tuned._asdict(),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        embeddings = [layer for layer in self.layers if layer.kind == "embedding"]
        stacks = [layer for layer in self.layers if layer.kind == "experts"]
        lines = [
            f"{len(self.layers) - len(embeddings) - len(stacks)} layers at {self.config.label} bits"
            + (f", {len(stacks)} stacks of {max(layer.experts for layer in stacks)} experts" if stacks else "")
            + "".join(f", {layer.name} at {layer.label}" for layer in embeddings)
            + f": {self.bits_per_weight:.3f} bits per weight, relative squared error {self.error:.2e}, {self.seconds:.1f} s",
            f"whole model {self.total_bytes / 1e6:.1f} MB, {self.ratio:.2f}x smaller than bf16",
            self._left(),
        ]
        if self.expected_kl is not None:
            lines.append(f"expected KL divergence {self.expected_kl:.5f} nats per token")
        if self.tuned is not None:
            names, before, after = self.tuned
            lines.append(f"tuned {', '.join(names)}: KL divergence {before:.5f} to {after:.5f} nats on the calibration text")
        lines += [f"rounded without data, the text did not reach it: {name}" for name in self.uncalibrated]
        lines += [f"shares the planes of {embedding}: {head}" for head, embedding in self.tied.items()]
        lines += [f"left as it was: {name} ({reason})" for name, reason in self.skipped.items()]
        lines += [f"left as it was: {name}, {size / 1e6:.1f} MB ({self.reasons[name]})" for name, size in self.dense.items()]
        return "\n".join(lines)

    def _left(self) -> str:
        """How many bytes are not quantized, by kind."""
        dense = sum(self.dense.values())
        small = self.other_bytes - self.skipped_bytes - dense
        return (
            f"{self.other_bytes / 1e6:.1f} MB of it stay as they were: {self.skipped_bytes / 1e6:.1f} MB skipped layers, "
            f"{dense / 1e6:.1f} MB other matrices (embeddings, routers, ...), {small / 1e6:.2f} MB norms and biases"
        )


# Called with (model, config) after a model was quantized in place. The Transformers integration registers itself here,
# so that save_pretrained works, without this module importing Transformers.
on_quantized: list[Callable[[nn.Module, TurboQuantConfig], None]] = []


def plan_layers(
    model: nn.Module,
    skip: Sequence[str] | None = None,
    layer_bits: Mapping[str, tuple[int, int]] | None = None,
    tied: Collection[str] = (),
    stacks: Collection[str] = (),
    embeddings: Collection[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Which linear layers and expert stacks to quantize, and which not and why. Needs no weights: works on the meta device.

    ``skip``: glob patterns of module names; None skips the output head, unless ``layer_bits`` has its exact name, and layers
    that share their weight with another kind of module (tied embeddings), because quantizing those would untie them. A
    module that occurs under several names is planned once, under the first. ``tied``: layers that get the planes of a
    quantized embedding; they are neither to quantize nor skipped. ``stacks``: names of expert stacks, which come last.
    ``embeddings``: the quantized ones; a pattern of ``skip`` may name any other, which changes nothing without a budget.

    Raises:
        ConfigError: a pattern of ``skip`` matches nothing, a tied layer or a quantized embedding only, or one of
            ``layer_bits`` no layer that is quantized for itself.
    """
    if isinstance(skip, str):
        raise ConfigError(f"skip is {skip!r}: it must be a list of glob patterns such as ['lm_head']")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_linear(module)}
    skipped: dict[str, str] = {}
    if skip is None:
        skipped = _default_skips(model, {name: module for name, module in linears.items() if is_linear(module)})
        for name in layer_bits or ():
            if skipped.get(name) == HEAD:
                del skipped[name]
    for pattern in skip or ():
        matches = [name for name in (*linears, *stacks) if fnmatch.fnmatchcase(name, pattern)]
        named = [] if matches else _embeddings_like(model, pattern)
        quantized = tied_modules(model, embeddings) if named else {}
        for name in named:
            if name in quantized:
                raise ConfigError(
                    f"skip pattern {pattern!r} matches {name}, which embeddings quantizes: remove one of the two"
                )
        if not matches and not named:
            some = ", ".join([*list(linears)[:3], *list(stacks)[:1]]) or "none at all"
            raise ConfigError(
                f"skip pattern {pattern!r} matches no linear layer of {type(model).__name__}: layers are named like {some}"
            )
        for name in matches:
            if name in tied:
                raise ConfigError(
                    f"skip pattern {pattern!r} matches {name}, which shares its weight with an embedding that embeddings "
                    "quantizes: remove one of the two"
                )
            skipped[name] = f"matches skip pattern {pattern!r}"
    for name, module in linears.items():
        if not is_linear(module):
            skipped[name] = f"a {type(module).__name__}, which may compute something else than nn.Linear"
    for name in tied:
        skipped.pop(name, None)
    targets = [name for name in (*linears, *stacks) if name not in skipped and name not in tied]
    for pattern in layer_bits or ():
        _check_bits_pattern(model, pattern, targets, {**dict.fromkeys(tied, "its planes are the embedding's"), **skipped})
    if "" in targets:
        raise QuantizationError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: "
            "use TurboQuantLinear.from_linear(model, config)"
        )
    return targets, {name: skipped[name] for name in (*linears, *stacks) if name in skipped}


def _embeddings_like(model: nn.Module, pattern: str) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and fnmatch.fnmatchcase(name, pattern)
    ]


def _check_bits_pattern(model: nn.Module, pattern: str, targets: list[str], skipped: dict[str, str]) -> None:
    if pattern in targets or any(fnmatch.fnmatchcase(name, pattern) for name in targets):
        return
    left_alone = next((name for name in skipped if name == pattern or fnmatch.fnmatchcase(name, pattern)), None)
    if left_alone is not None:
        raise ConfigError(
            f"layer_bits has {pattern!r}, but {left_alone} is not quantized for itself ({skipped[left_alone]}): "
            "remove it from layer_bits, or give skip without it"
        )
    raise ConfigError(
        f"layer_bits pattern {pattern!r} matches no linear layer of {type(model).__name__}: layers are named like "
        + ", ".join(targets[:3])
    )


def _default_skips(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    skipped = {}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    # On the meta device tied parameters are not shared yet: then Transformers' own list says what will be.
    declared = set(getattr(model, "_tied_weights_keys", None) or ())
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        declared = set()
    users: dict[int, int] = {}
    for module in model.modules():
        if not is_linear(module):
            for parameter in module.parameters(recurse=False):
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for name, module in linears.items():
        if id(module.weight) in users or f"{name}.weight" in declared:
            skipped[name] = "shares its weight with an embedding"
        elif module is head:
            skipped[name] = HEAD
    return skipped


def adapted_layer(model: nn.Module) -> str | None:
    """Name of the first layer that PEFT has wrapped; known by an attribute, so that PEFT need not be there."""
    return next((name for name, module in model.named_modules() if hasattr(module, "merged_adapters")), None)


def dense_parameters(model: nn.Module, skipped: Collection[str] = ()) -> dict[str, int]:
    """Name -> bytes of the parameters with two or more dimensions that are in no linear layer and not quantized.

    ``skipped``: layers that have been reported already; expert stacks among them are left out.
    """
    linear = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Linear, PackedPlanes)) or is_linear(module)
        for parameter in module.parameters(recurse=False)
    }
    return {
        name: parameter.nbytes
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in linear and name not in skipped
    }


def bf16_bytes(tensor: Tensor) -> int:
    """Of the tensor if the model were in bf16."""
    return tensor.numel() * _DENSE_BYTES if tensor.is_floating_point() else tensor.nbytes


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Those that a file holds, each once."""
    found = {
        id(buffer): buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return list(found.values())


def dense_reasons(model: nn.Module, names: Collection[str], left: Mapping[str, str]) -> dict[str, str]:
    """Why each of these parameters stays dense; ``left``: the reasons that are known already (:class:`Job`)."""
    reasons = {}
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        if name in left:
            reasons[name] = left[name]
        elif type(owner) is nn.Embedding:
            reasons[name] = "an embedding; name it in embeddings to quantize it"
        elif isinstance(owner, nn.Embedding):
            reasons[name] = f"a {type(owner).__name__}; name it in embeddings to quantize it, if its class allows that"
        else:
            reasons[name] = f"in a {type(owner).__name__}, which is no linear layer"
    return reasons


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done to a model: :func:`prepare` has checked that it can be. ``config`` is that of the checkpoint;
    ``targets``: linear layers; ``stacks``: expert stacks and their layouts; ``embeddings``: names and settings, ``grades``:
    the same of those that are graded; ``tied``: heads that get an embedding's planes; ``left``: parameters that might be
    stacks, and embeddings that a budget could not buy, and why they are not quantized; ``twins``: linear layers that had the
    weight of an earlier one, and its name."""

    model: nn.Module
    config: TurboQuantConfig
    targets: list[str]
    skipped: dict[str, str]
    embeddings: dict[str, TurboQuantConfig]
    grades: dict[str, Grades]
    tied: dict[str, str]
    stacks: dict[str, str]
    left: dict[str, str]
    twins: dict[str, str]


def prepare(model: nn.Module, config: TurboQuantConfig, *, has_text: bool = False) -> Job:
    """Everything that can be wrong is found here, before anything is replaced.

    Raises:
        ConfigError: a pattern matches nothing, the model is quantized already, or it has adapters.
        QuantizationError: nothing to quantize, or a weight has NaN or Inf (names layer and position).
    """
    job = plan_job(model, config, has_text=has_text)
    for name in job.targets:
        reference.check_finite(dense_weight(model.get_submodule(name), name), f"{name}: weight")
    for name in (*job.embeddings, *job.grades):
        reference.check_finite(model.get_parameter(f"{name}.weight"), f"{name}: weight")
    for name in job.stacks:
        for index, matrix in enumerate(model.get_parameter(name)):
            reference.check_finite(matrix, f"{name}[{index}]")
    return job


def plan_job(model: nn.Module, config: TurboQuantConfig, *, has_text: bool = False) -> Job:
    """:func:`prepare` without a look at the weights: works on the meta device."""
    if any(isinstance(module, PackedPlanes) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} is quantized already: load the original model to quantize it again")
    adapted = adapted_layer(model)
    if adapted is not None:
        raise ConfigError(
            f"{adapted} has an adapter: merge it, or quantize first and put the adapter on the quantized model"
        )
    embeddings = plan_embeddings(model, config)
    if not has_text:
        refuse_grades(embeddings)
    tied = tied_heads(model, embeddings)
    found, left = find_stacks(model, config)
    layers, skipped = plan_layers(model, config.skip, config.layer_bits, tied, found, embeddings)
    if not layers and not embeddings:
        raise QuantizationError(nothing_to_quantize(model, skipped, left))
    stacks = {name: found[name] for name in layers if name in found}
    targets = [name for name in layers if name not in stacks]
    kept = (name for name in skipped if name in found or is_linear(model.get_submodule(name)))
    config = config.exact(layers, kept, embeddings, stacks)
    twins = _twins(model, targets)
    if not has_text:
        _check_twins(config, twins)
    own = {name: settings for name in embeddings if (settings := config.for_embedding(name)) is not None}
    grades = {name: own_grades for name in embeddings if (own_grades := config.grades(name)) is not None}
    return Job(model, config, targets, skipped, own, grades, tied, stacks, left, twins)


def _twins(model: nn.Module, targets: Sequence[str]) -> dict[str, str]:
    """Name of each layer whose weight an earlier one has -> name of the first that has it."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(model.get_submodule(name).weight), name) for name in targets}
    return {name: other for name, other in found.items() if name != other}


def _check_twins(config: TurboQuantConfig, twins: Mapping[str, str]) -> None:
    """Raises a ConfigError if layers that share one weight, and so will share its planes, get different bits."""
    for name, other in twins.items():
        wanted, found = config.for_layer(other), config.for_layer(name)
        if wanted != found:
            raise ConfigError(
                f"{other} and {name} share one weight, but layer_bits gives them {wanted.label} and {found.label} bits: "
                "give both the same, or quantize with calibration=..., which stores them apart"
            )


def refuse_grades(embeddings: Mapping[str, EmbeddingBits]) -> dict[str, tuple[int, int]]:
    """The same; raises a ConfigError if one of them is graded: without a text nobody knows which rows matter."""
    out: dict[str, tuple[int, int]] = {}
    for name, bits in embeddings.items():
        if is_graded(bits):
            raise ConfigError(
                f"embeddings gives {name} grades, and a calibration text must say which rows come first: quantize a loaded "
                "model with calibration=..., or give it one pair of bits"
            )
        out[name] = bits  # type: ignore[assignment]
    return out


def nothing_to_quantize(model: nn.Module, skipped: Mapping[str, str], left: Mapping[str, str]) -> str:
    """The message of an error."""
    why = f"{len(skipped)} were skipped ({', '.join(skipped)})"
    return f"{type(model).__name__} has no linear layer to quantize: {why}" + "".join(
        f"; {name}: {reason}" for name, reason in left.items()
    )


def quantize_without_data(job: Job, progress: bool) -> list[LayerReport]:
    """Quantizes the layers of ``job`` one at a time: peak memory is the model plus one layer (plus two for an embedding of a
    class of its own)."""
    model, config = job.model, job.config
    weights = [id(model.get_submodule(name).weight) for name in job.targets]
    shared = {weight for weight in weights if weights.count(weight) > 1} if len(set(weights)) < len(weights) else set()
    done: dict[int, tuple[object, TurboQuantLinear]] = {}  # of shared weights only; keeps the weight, so its id, alive
    layers = []
    for name, own in job.embeddings.items():
        start = time.perf_counter()
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        new_embedding = TurboQuantEmbedding.from_embedding(embedding, own, name=name)
        replace_embedding(model, name, new_embedding)
        layers.append(embedding_report(name, new_embedding, time.perf_counter() - start))
    for name in tqdm(job.targets, desc=f"quantizing to {config.label} bits", unit="layer", disable=not progress):
        start = time.perf_counter()
        old = model.get_submodule(name)
        twin = done.get(id(old.weight))
        if twin is None:
            new = TurboQuantLinear.from_linear(old, config.for_layer(name), name=name)
            if id(old.weight) in shared:
                done[id(old.weight)] = (old.weight, new)
        else:  # linear layers tied to each other stay tied: one set of planes
            bias = old.bias if isinstance(old.bias, nn.Parameter) else None
            new = TurboQuantLinear.from_packed(twin[1].packed, twin[1].in_features, bias, config.for_layer(name))
            new.quantization_error = twin[1].quantization_error
        replace_module(model, name, new)
        layers.append(linear_report(name, new, twin is not None, time.perf_counter() - start))
        del old
    for name, layout in tqdm(
        job.stacks.items(), desc="quantizing experts", unit="stack", disable=not progress or not job.stacks
    ):
        start = time.perf_counter()
        stack = TurboQuantExperts.from_parameter(model.get_parameter(name), layout, config.for_layer(name), name=name)
        replace_parameter(model, name, stack)
        layers.append(experts_report(name, stack, time.perf_counter() - start))
    return layers


def finish(job: Job, layers: list[LayerReport], seconds: float, **notes: Any) -> QuantizationReport:
    """Tells Transformers, and sums up. ``layers`` have been replaced."""
    announce(job)
    return summarize(job, layers, seconds, **notes)


def announce(job: Job) -> None:
    """Lets integrations prepare the quantized model for saving."""
    changed(job.model)
    for hook in on_quantized:
        hook(job.model, job.config)


def summarize(job: Job, layers: list[LayerReport], seconds: float, **notes: Any) -> QuantizationReport:
    """The report on a quantized model, which may be on the meta device."""
    model = job.model
    counted = {id(p) for layer in layers for p in model.get_submodule(layer.name).parameters()}
    layers = [_as_twin(model, layer) if layer.name in job.twins else layer for layer in layers]
    other = [p for p in model.parameters() if id(p) not in counted] + persistent_buffers(model)
    dense = dense_parameters(model, job.skipped)
    reasons = dense_reasons(model, dense, job.left)
    kept = {id(p): p.nbytes for name in job.skipped for p in _parameters(model, name)}
    for name in dense:
        kept.pop(id(model.get_parameter(name)), None)  # a head tied to an embedding
    return QuantizationReport(
        job.config,
        layers,
        job.skipped,
        dense,
        sum(tensor.nbytes for tensor in other),
        sum(map(bf16_bytes, other)),
        seconds,
        job.tied,
        reasons=reasons,
        skipped_bytes=sum(kept.values()),
        **notes,
    )


def _as_twin(model: nn.Module, layer: LayerReport) -> LayerReport:
    """In bf16 the weight is there once, also where calibration gave both planes of their own."""
    bias = model.get_submodule(layer.name).bias
    return dataclasses.replace(layer, dense_bytes=bf16_bytes(bias) if isinstance(bias, Tensor) else 0)


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Those of the layer or stack of this name."""
    path, _, key = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters.get(key)
    return list(model.get_submodule(name).parameters()) if parameter is None else [parameter]


def experts_report(name: str, new: TurboQuantExperts, seconds: float) -> LayerReport:
    """Of an expert stack that is in place."""
    assert new.quantization_error is not None
    weights = new.num_experts * new.out_features * new.in_features
    return LayerReport(
        name=name,
        label=new.label,
        out_features=new.out_features,
        in_features=new.in_features,
        error=new.quantization_error,
        bytes=new.packed.nbytes,
        dense_bytes=weights * _DENSE_BYTES,
        seconds=seconds,
        kind="experts",
        experts=new.num_experts,
    )


def embedding_report(name: str, new: TurboQuantEmbedding | GradedEmbedding, seconds: float) -> LayerReport:
    """Of an embedding that is in place."""
    assert new.quantization_error is not None
    return LayerReport(
        name=name,
        label=new.label,
        out_features=new.num_embeddings,
        in_features=new.embedding_dim,
        error=new.quantization_error,
        bytes=new.nbytes,
        dense_bytes=new.num_embeddings * new.embedding_dim * _DENSE_BYTES,
        seconds=seconds,
        kind="embedding",
    )


def linear_report(name: str, layer: TurboQuantLinear, tied: bool, seconds: float) -> LayerReport:
    """Of a layer that is in place; ``tied``: its planes are counted elsewhere."""
    bias = 0 if layer.bias is None else layer.bias.nbytes
    dense_bias = 0 if layer.bias is None else bf16_bytes(layer.bias)
    planes = 0 if tied else layer.packed.nbytes
    dense = 0 if tied else layer.out_features * layer.in_features * _DENSE_BYTES
    assert layer.quantization_error is not None
    return LayerReport(
        name=name,
        label=layer.label,
        out_features=layer.out_features,
        in_features=layer.in_features,
        error=layer.quantization_error,
        bytes=planes + bias,
        dense_bytes=dense + dense_bias,
        seconds=seconds,
    )
