"""``quantize_model``: the one entry for all ways of quantizing a model in memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .budget import plan_bits
from .calibration import Calibrator, as_calibration, layout
from .config import TurboQuantConfig, with_skip
from .embedding import TurboQuantEmbedding
from .errors import ConfigError
from .experts import DenseExperts, TurboQuantExperts, dense_stacks, replace_parameter
from .feedback import quantize_weight_calibrated
from .linear import TurboQuantLinear, dense_weight
from .model import (
    Job,
    LayerReport,
    QuantizationReport,
    embedding_report,
    experts_report,
    finish,
    linear_report,
    prepare,
    quantize_without_data,
)
from .reference import PackedWeight, Quantized, quantize_weight
from .resume import BlockStore, fingerprint
from .stream import BlockStream
from .tying import replace_embedding, replace_module

try:
    _VERSION = version("turboquant-weights")
except PackageNotFoundError:  # run from a source tree that was never installed
    _VERSION = "unknown"
# Weight of a lookup beside the output head in a tied embedding, in units of the mean square of the final hidden states:
# rounding SmolLM2's embedding costs 0.12 times as much KL in lookups as in the head.
_LOOKUP_SHARE = 0.1
_EMBEDDINGS = "embeddings"  # name of their file in a resume folder


def quantize_model(
    model: nn.Module,
    config: TurboQuantConfig | None = None,
    skip: Sequence[str] | None = None,
    progress: bool = True,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    target_ratio: float | None = None,
    target_bits: float | None = None,
    max_kl: float | None = None,
) -> QuantizationReport:
    """Quantizes a model in place: without data in seconds, better with a little text, and to a budget.

    Args:
        model: Any ``nn.Module`` on any device; ``nn.Linear`` and GPT-2's ``Conv1D`` layers are replaced, embeddings that
            ``config.embeddings`` names, too. ``calibration`` and budgets need a causal language model of Transformers.
        config: Bits, group size, seed; default 4 bits. With a budget its bits are not used.
        skip: Glob patterns of layers to leave alone; overrides ``config.skip``. None in both: the output head and what
            is tied to it (with a budget they take part). ``[]`` skips nothing.
        progress: Show progress bars on stderr.
        calibration: A text for error feedback (calibration.py): a string, a list of strings, a path, token ids [s, l], True
            for the built-in text, or a :class:`Calibration` with more settings.
        tokenizer: Needed unless ``calibration`` is token ids.
        target_ratio: How many times smaller than in bf16 the whole file gets at least, everything counted; bits are chosen
            layer by layer so that the expected KL divergence is least (budget.py).
        target_bits: The same as bits per parameter of the whole file, at most.
        max_kl: The other way round: the smallest file whose expected KL divergence, in nats per token, is at most this.

    Returns:
        A report: per layer bits, error, bytes and time; each skipped layer with the reason; the whole-model ratio.

    Raises:
        ConfigError: a skip pattern matches nothing, the model is quantized already, a budget cannot be met, more than one
            is given, or an argument is of another type.
        QuantizationError: nothing to quantize, a weight has NaN or Inf (names layer and position), or the model is none that
            can be calibrated; nothing was replaced then.
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is {model!r}: an nn.Module is needed. A folder or a name on the hub is for quantize_checkpoint, "
            "or for from_pretrained(..., quantization_config=TurboQuantConfig())"
        )
    if config is not None and not isinstance(config, TurboQuantConfig):
        raise ConfigError(f"config is {config!r}: it must be a TurboQuantConfig, e.g. TurboQuantConfig(bits=4)")
    config = with_skip(config or TurboQuantConfig(), skip)
    budget = {"target_ratio": target_ratio, "target_bits": target_bits, "max_kl": max_kl}
    if calibration is None:
        config, expected = _to_budget(model, config, budget, None, None, None, progress)
        job = prepare(model, config)
        layers = quantize_without_data(job, progress)
        return finish(job, layers, time.perf_counter() - start, expected_kl=expected)
    settings = as_calibration(calibration)
    tokens = settings.tokens(tokenizer)
    device = torch.device(settings.device) if settings.device is not None else next(model.parameters()).device
    prepare(model, dataclasses.replace(config, layer_bits=None, embeddings=None))  # finds what is wrong before minutes pass
    store = None
    if settings.resume is not None:
        request = {"config": config.to_dict(), "budget": budget, "version": _VERSION}
        store = BlockStore(settings.resume, fingerprint(model, request, tokens))
    config, expected = _to_budget(model, config, budget, tokens, device, store, progress)
    job = prepare(model, config)
    layers, uncalibrated = _calibrated(job, tokens, device, store, progress)
    return finish(job, layers, time.perf_counter() - start, expected_kl=expected, uncalibrated=uncalibrated)


def _to_budget(
    model: nn.Module,
    config: TurboQuantConfig,
    budget: Mapping[str, float | None],
    tokens: Tensor | None,
    device: torch.device | None,
    store: BlockStore | None,
    progress: bool,
) -> tuple[TurboQuantConfig, float | None]:
    """``config`` with the bits that the budget buys, and the KL divergence to expect; as it is without a budget."""
    if all(value is None for value in budget.values()):
        return config, None
    if store is not None and store.config is not None:
        return store.config, store.expected_kl
    plan = plan_bits(model, config, tokens=tokens, device=device, progress=progress)
    allocation = plan.allocate(**budget)
    config = plan.config(allocation, config)
    if store is not None:
        store.keep_config(config, allocation.expected_kl)
    return config, allocation.expected_kl


def _calibrated(
    job: Job, tokens: Tensor, device: torch.device, store: BlockStore | None, progress: bool
) -> tuple[list[LayerReport], list[str]]:
    """The layers that were replaced, and the names of those that the text did not reach."""
    model = job.model
    layers: list[LayerReport] = []
    last = time.perf_counter()

    def install(name: str, quantized: Quantized, own: TurboQuantConfig) -> None:
        nonlocal last
        if name in job.stacks:
            install_stack(name, quantized, own)
            last = time.perf_counter()
            return
        old = model.get_submodule(name)
        bias = old.bias if isinstance(old.bias, nn.Parameter) else None
        weight = dense_weight(old, name)
        planes = _on(quantized.weight, weight.device)
        new = TurboQuantLinear.from_packed(planes, weight.shape[1], bias, own)
        new.quantization_error, new.dense_dtype = quantized.error, weight.dtype
        replace_module(model, name, new.train(old.training))
        layers.append(linear_report(name, new, False, time.perf_counter() - last))
        last = time.perf_counter()

    def install_stack(name: str, quantized: Quantized, own: TurboQuantConfig) -> None:
        old = model.get_submodule(name)
        assert isinstance(old, DenseExperts)
        new = TurboQuantExperts.from_packed(_on(quantized.weight, old.device), old.in_features, old.layout, own)
        new.quantization_error, new.dense_dtype = quantized.error, old.dtype
        replace_parameter(model, name, new)
        layers.append(experts_report(name, new, time.perf_counter() - last))

    configs = {name: job.config.for_layer(name) for name in (*job.targets, *job.stacks)}
    with dense_stacks(model, job.stacks), BlockStream(model, tokens, device) as stream:
        calibrator = Calibrator(stream, configs, install)
        embeddings = _embeddings(job, calibrator, store, progress)
        if embeddings:
            calibrator.restart()
        calibrator.run(store, progress=progress)
    reports = []
    for name, new in embeddings.items():
        old = model.get_submodule(name)
        assert isinstance(old, nn.Embedding)
        replace_embedding(model, name, new.to(old.weight.device).train(old.training))
        reports.append(embedding_report(name, new, 0.0))
    return reports + layers, calibrator.unreached


@torch.no_grad()
def _embeddings(
    job: Job, calibrator: Calibrator, store: BlockStore | None, progress: bool
) -> dict[str, TurboQuantEmbedding]:
    """Rounds the embeddings and lets the dense ones, and what is tied to them, compute with the result."""
    kept = None if store is None or not job.embeddings else store.load(_EMBEDDINGS, job.embeddings)
    out = {}
    for name, config in job.embeddings.items():
        old = job.model.get_submodule(name)
        assert isinstance(old, nn.Embedding)
        heads = [head for head, embedding in job.tied.items() if embedding == name]
        if kept is not None:
            quantized = kept[name]
        elif heads:
            moments = calibrator.head_moments(heads[0], progress=progress)
            moments.add_white(_LOOKUP_SHARE)
            planes = quantize_weight_calibrated(
                old.weight, moments.feedback(config.group_size, config.seed), name=name, **layout(config)
            )
            quantized = Quantized(planes, reference.relative_error(old.weight, planes, **layout(config)))
        else:
            quantized = quantize_weight(old.weight, name=name, **layout(config))
        planes = _on(quantized.weight, old.weight.device)
        out[name] = TurboQuantEmbedding.from_packed(planes, old, config)
        out[name].quantization_error = quantized.error
        old.weight.data = out[name].dequantize(old.weight.dtype)
    if store is not None and kept is None and out:
        store.save(_EMBEDDINGS, {name: Quantized(new.packed, new.quantization_error or 0.0) for name, new in out.items()})
    return out


def _on(planes: PackedWeight, device: torch.device) -> PackedWeight:
    return planes.map(lambda plane: plane.to(device))
