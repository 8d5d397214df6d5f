"""``quantize_model``: the one entry for all ways of quantizing a model in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .budget import find_embeddings, one_budget, plan_bits
from .calibration import LOOKUP_SHARE, Calibrator, as_calibration, layout
from .config import TurboQuantConfig, with_skip
from .embedding import TurboQuantEmbedding, check_forward
from .errors import ConfigError, QuantizationError
from .experts import DenseExperts, TurboQuantExperts, dense_stacks, replace_parameter
from .feedback import Moments, feedback_gain, quantize_weight_calibrated, rotated_moments
from .graded import GradedEmbedding, split_rows
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
from .sensitivity import row_sensitivities, vocabulary_use
from .stream import Batch, BlockStream
from .tail import OriginalTail, Tuned, tune_tail
from .tying import replace_embedding, replace_module

try:
    _VERSION = version("turboquant-weights")
except PackageNotFoundError:  # run from a source tree that was never installed
    _VERSION = "unknown"
# Tokens that rank the rows of a graded embedding, at most: what a rare row matters needs more text than anything else.
_RANKING_TOKENS = 1 << 18
_EMBEDDINGS, _ORDERS = "embeddings", "orders"  # names of their files in a resume folder


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
            is given, an argument is of another type, or calibration meets ``torch.inference_mode()``.
        QuantizationError: nothing to quantize, a weight has NaN or Inf (names layer and position), or the model is none that
            can be calibrated; nothing was replaced then.

    A calibrated run that fails later or is interrupted leaves quantized what it had finished: the embeddings and the first
    blocks. Load the model again, and repeat the call.
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
    has_budget = any(value is not None for value in budget.values())
    if has_budget:
        one_budget(budget)
    # From the model, not from the plan: a run that is resumed has the plan's bits only.
    left = find_embeddings(model, config, config.skip or ())[1] if has_budget else {}
    notes = {f"{name}.weight": reason for name, reason in left.items()}
    if calibration is None:
        config, expected = _to_budget(model, config, budget, None, None, None, progress)
        job = prepare(model, config)
        job.left.update(notes)
        layers = quantize_without_data(job, progress)
        return finish(job, layers, time.perf_counter() - start, expected_kl=expected)
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError(
            "calibration computes gradients, which torch.inference_mode() rules out: load and quantize the model outside it"
        )
    settings = as_calibration(calibration)
    tokens = settings.tokens(tokenizer)
    device = torch.device(settings.device) if settings.device is not None else next(model.parameters()).device
    # Finds what is wrong before minutes pass. A budget chooses bits of its own.
    prepare(model, dataclasses.replace(config, layer_bits=None, embeddings=None) if has_budget else config, has_text=True)
    with contextlib.ExitStack() as stack:
        store = None
        if settings.resume is not None:
            request = {"config": config.to_dict(), "budget": budget, "version": _VERSION}
            store = stack.enter_context(BlockStore(settings.resume, fingerprint(model, request, tokens)))
        config, expected = _to_budget(model, config, budget, tokens, device, store, progress)
        job = prepare(model, config, has_text=True)
        job.left.update(notes)
        layers, uncalibrated, tuned = _calibrated(job, tokens, device, store, progress)
    seconds = time.perf_counter() - start
    return finish(job, layers, seconds, expected_kl=expected, uncalibrated=uncalibrated, tuned=tuned)


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
    if all(choice is None for choice in allocation.bits.values()):
        name, value = one_budget(budget)
        raise ConfigError(f"{name} is {value}: the model fits as it is, and nothing would be quantized")
    config = plan.config(allocation, config)
    if store is not None:
        store.keep_config(config, allocation.expected_kl)
    return config, allocation.expected_kl


def _calibrated(
    job: Job, tokens: Tensor, device: torch.device, store: BlockStore | None, progress: bool
) -> tuple[list[LayerReport], list[str], Tuned | None]:
    """The layers that were replaced, the names of those that the text did not reach, and what was tuned behind them."""
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
    homes = {name: dense_weight(model.get_submodule(name), name).device for name in job.targets}
    embeddings: dict[str, TurboQuantEmbedding | GradedEmbedding] = {}
    reports = []
    try:
        with dense_stacks(model, job.stacks), BlockStream(model, tokens, device) as stream:
            calibrator = Calibrator(stream, configs, install)
            outside = {id(module) for module in stream.outside()}
            behind = [name for name in job.targets if id(model.get_submodule(name)) in outside]
            tail = OriginalTail(stream, [*behind, *job.tied])
            _embeddings(job, calibrator, store, progress, embeddings)
            if embeddings:
                calibrator.restart()
            calibrator.run(store, progress=progress)
            tuned = tune_tail(stream, calibrator.original, tail)
    finally:  # also of a run that failed: their dense weights are rounded already
        for name, new in embeddings.items():
            old = model.get_submodule(name)
            assert isinstance(old, nn.Embedding)
            replace_embedding(model, name, new.to(old.weight.device).train(old.training))
            reports.append(embedding_report(name, new, 0.0))
        for name, home in homes.items():  # the stream moved those outside the blocks while they were dense
            model.get_submodule(name).to(home)
    return reports + layers, calibrator.unreached, tuned


@torch.no_grad()
def _embeddings(
    job: Job,
    calibrator: Calibrator,
    store: BlockStore | None,
    progress: bool,
    out: dict[str, TurboQuantEmbedding | GradedEmbedding],
) -> None:
    """Rounds the embeddings into ``out`` and lets the dense ones, and what is tied to them, compute with the result."""
    stored = [*job.embeddings, *(f"{name}.{i}" for name, grades in job.grades.items() for i in range(len(grades)))]
    kept = None if store is None or not stored else store.load(_EMBEDDINGS, stored)
    orders = None if store is None or not job.grades else store.load_tensors(_ORDERS, job.grades)
    if kept is None or (job.grades and orders is None):
        kept, orders = _round_embeddings(job, calibrator, progress) if stored else ({}, {})
        if store is not None and orders:
            store.save_tensors(_ORDERS, orders)
        if store is not None and kept:
            store.save(_EMBEDDINGS, kept)
    for name in (*job.embeddings, *job.grades):
        old = job.model.get_submodule(name)
        assert isinstance(old, nn.Embedding)
        where = old.weight.device
        new: TurboQuantEmbedding | GradedEmbedding
        if name in job.grades:
            grades = job.grades[name]
            parts = [kept[f"{name}.{i}"] for i in range(len(grades))]
            planes = [_on(part.weight, where) for part in parts]
            assert orders is not None
            new = GradedEmbedding.from_packed(planes, orders[name].to(where), old, job.config, grades)
            for module, part in zip(new.parts, parts, strict=True):
                module.quantization_error = part.error
            new.quantization_error = _error_of(new, old.weight)
        else:
            new = TurboQuantEmbedding.from_packed(_on(kept[name].weight, where), old, job.embeddings[name])
            new.quantization_error = kept[name].error
        check_forward(new, name)
        out[name] = new
        old.weight.data = new.dequantize(old.weight.dtype)


def _round_embeddings(job: Job, calibrator: Calibrator, progress: bool) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """Planes of each embedding or grade, and the order of the rows of each graded one."""
    found: dict[str, Quantized] = {}
    orders: dict[str, Tensor] = {}
    batches: Sequence[Batch] = ()
    if job.grades or any(name in job.tied.values() for name in job.embeddings):
        batches = calibrator.last_hidden(progress=progress)
    for name in (*job.embeddings, *job.grades):
        old = job.model.get_submodule(name)
        assert isinstance(old, nn.Embedding)
        head = next((head for head, embedding in job.tied.items() if embedding == name), None)
        moments: Moments | None
        if name in job.grades:
            orders[name], rows, moments = _graded_rows(job, calibrator, name, head, batches)
            settings = [job.config.with_bits(*grade[1:]) for grade in job.grades[name]]
            parts = [(f"{name}.{i}", old.weight[rows[i]], own) for i, own in enumerate(settings)]
        else:
            moments = None if head is None else calibrator.head_moments(head, batches)
            if moments is not None:
                moments.add_white(LOOKUP_SHARE)
            parts = [(name, old.weight, job.embeddings[name])]
        for part, weight, config in parts:
            if moments is None:
                found[part] = quantize_weight(weight, name=part, **layout(config))
                continue
            feedback = moments.feedback(config.group_size, config.seed)
            planes = quantize_weight_calibrated(weight, feedback, name=part, **layout(config))
            found[part] = Quantized(planes, reference.relative_error(weight, planes, **layout(config)))
    return found, orders


def _graded_rows(
    job: Job, calibrator: Calibrator, name: str, head: str | None, batches: Sequence[Batch]
) -> tuple[Tensor, list[Tensor], Moments | None]:
    """Of the graded embedding ``name``: ``order`` [n] on the CPU, the rows of each grade, and moments to round them for."""
    weight = job.model.get_parameter(f"{name}.weight")
    module = None if head is None else job.model.get_submodule(head)
    use = vocabulary_use(calibrator.stream, batches, module, _RANKING_TOKENS)
    moments, gain, importance = None if use is None else use.moments, 1.0, None
    if moments is not None:
        moments.add_white(LOOKUP_SHARE)
        gain = feedback_gain(rotated_moments(moments.now, job.config.group_size, job.config.seed))
    if use is not None:
        importance = row_sensitivities(weight, use, gain)
    if importance is None:
        raise QuantizationError(
            f"{name} has grades, but {type(job.model).__name__} returns no logits for its rows, which would rank them: give "
            "it one pair of bits"
        )
    order, rows = split_rows(importance, job.grades[name])
    return order.cpu(), rows, moments


def _error_of(new: GradedEmbedding, weight: Tensor) -> float:
    """Of all grades together: their own errors weighted with the energies of their rows."""
    energy = weight.float().square().sum(1).double()[new.order.argsort()]
    total = float(energy.sum())
    parts = energy.split([part.shape[0] for part in new.parts])
    errors = (float(part.sum()) * module.quantization_error for part, module in zip(parts, new.parts, strict=True))
    return sum(errors) / total if total else 0.0


def _on(planes: PackedWeight, device: torch.device) -> PackedWeight:
    return planes.map(lambda plane: plane.to(device))
