"""What each ingredient of calibrated quantization is worth, measured alone, at equal bits or equal bytes of the whole file.

    python benchmarks/calibration_ablation.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw second.txt
    --device cuda

Protocol of quality.py: the first 32 windows of 1,024 tokens of each text, KL divergence from the de-quantized GGUF in
float32, one rotation seed. Each line changes one thing of "as shipped". "3.2x" lines have a budget for the whole file; what
they change is how the sensitivities of linear layers are found that bits are chosen by. Those that are measured replace
a layer's prediction by the KL divergence of the whole model with this unit alone rounded to 4 bits, on windows of the
calibration text, over the error of 4 bits.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fnmatch
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from turboquant_weights import Calibration, TurboQuantConfig, budget, feedback, quantize, quantize_model
from turboquant_weights.allocation import ERRORS, Unit
from turboquant_weights.budget import BitPlan, plan_bits
from turboquant_weights.calibration import Calibrator, layout
from turboquant_weights.evaluation import compare, text_windows
from turboquant_weights.integrations.transformers import load_dense
from turboquant_weights.linear import dense_weight
from turboquant_weights.reference import dequantize_weight, quantize_weight
from turboquant_weights.rotation import SCALE_BLOCK

Change = Callable[[], Any]


def without_drift() -> Any:
    add = feedback.Moments.add
    return mock.patch.object(feedback.Moments, "add", lambda self, now, original=None: add(self, now))


def full_drift() -> Any:
    """The drift's regression damped like the factor, whatever the number of samples."""

    def count(self: feedback.Moments, inputs: Tensor, original: Tensor | None = None) -> None:
        add(self, inputs, original)
        self.count = 1 << 60

    add = feedback.Moments.add
    return mock.patch.object(feedback.Moments, "add", count)


def without_order() -> Any:
    """All layers of a block see the inputs of the block's unquantized layers."""
    decode = Calibrator._decode_into
    later: list[tuple[Any, ...]] = []
    advance = Calibrator._advance

    def flush(self: Calibrator, *args: Any) -> None:
        for item in later:
            decode(*item)
        later.clear()
        advance(self, *args)

    stack = mock.patch.multiple(Calibrator, _decode_into=lambda *args: later.append(args), _advance=flush)
    return stack


def natural_order() -> Any:
    blocks = lambda hessian: torch.arange(len(hessian) // SCALE_BLOCK, device=hessian.device)  # noqa: E731
    return mock.patch.object(feedback, "block_order", blocks)


LINEAR: dict[str, tuple[Change | None, dict[str, int]]] = {
    "as shipped": (None, {}),
    "without drift": (without_drift, {}),
    "drift without regard to the number of tokens": (full_drift, {}),
    "one candidate per scale": (lambda: mock.patch.object(feedback, "_CANDIDATES", 1), {}),
    "eight candidates per scale": (lambda: mock.patch.object(feedback, "_CANDIDATES", 8), {}),
    "blocks in natural order": (natural_order, {}),
    "no sweeps": (lambda: mock.patch.object(feedback, "_SWEEPS", 0), {}),
    "three sweeps": (lambda: mock.patch.object(feedback, "_SWEEPS", 3), {}),
    "norm behind the last block not tuned": (lambda: mock.patch.object(quantize, "tune_tail", return_value=None), {}),
    "damping 0.1": (lambda: mock.patch.object(feedback, "DAMPING", 0.1), {}),
    "block by block, not layer by layer": (without_order, {}),
    "16 samples": (None, {"samples": 16}),
    "48 samples": (None, {"samples": 48}),
    "all 231 samples": (None, {"samples": 231}),
}
_MEASURED_WINDOWS = 4  # of the calibration text, for one unit


def without_gains() -> Any:
    """The same share of its loss is left of every layer, whatever its inputs."""
    return mock.patch.object(budget.sensitivity, "feedback_gains", lambda stream, *args, **kwargs: _to_the_end(stream) or {})


def _to_the_end(stream: Any) -> None:
    with torch.no_grad():
        for index in range(len(stream.blocks)):
            with stream.block(index):
                for batch in stream.batches:
                    batch.hidden = stream.run(index, batch)


@contextmanager
def measured(calibrated: bool) -> Iterator[None]:
    """KL of each unit alone, rounded without data and times what its inputs say that feedback leaves of it, or as the
    calibrated rounding of all layers at 4 bits rounded it."""

    def plan(model: nn.Module, config: TurboQuantConfig, *, tokens: Tensor, **settings: Any) -> BitPlan:
        found = plan_bits(model, config, tokens=tokens, **settings)
        plain = plan_bits(model, config, tokens=tokens, **{**settings, "calibrated": False})
        alone = {unit.names: unit.sensitivity for unit in plain.units}
        rounded = model
        if calibrated:
            rounded = copy.deepcopy(model)
            quantize_model(rounded, calibration=tokens, progress=False)
        units, pairs = [], []
        for unit in found.units:
            if found.embeddings.isdisjoint(unit.names):
                kl = _divergence(model, _rounded(unit, model, rounded), tokens[:_MEASURED_WINDOWS]) / ERRORS[4, 0]
                predicted = unit.sensitivity if calibrated else alone[unit.names]
                pairs.append((predicted, kl))
                unit = dataclasses.replace(unit, sensitivity=kl * unit.sensitivity / predicted)
            units.append(unit)
        _report(pairs)
        return dataclasses.replace(found, units=tuple(units))

    with mock.patch.object(quantize, "plan_bits", plan):
        yield


def _rounded(unit: Unit, model: nn.Module, rounded: nn.Module) -> dict[str, Tensor]:
    """The weights of ``unit`` after 4 bits: without data, or as in ``rounded``, if that is another model."""
    settings, found = layout(TurboQuantConfig()), {}
    for name in unit.names:
        weight = dense_weight(model.get_submodule(name), name)
        if rounded is model:
            planes = quantize_weight(weight, **settings).weight
            found[name] = dequantize_weight(planes, weight.shape[1], dtype=weight.dtype, **settings)
        else:
            found[name] = rounded.get_submodule(name).dequantize().to(weight.dtype)
    return found


@torch.no_grad()
def _divergence(model: nn.Module, weights: dict[str, Tensor], tokens: Tensor) -> float:
    """Mean KL divergence, nats per token, that ``weights`` in place of the model's own would cost."""
    tokens = tokens.to(next(model.parameters()).device)
    dense = {name: model.get_submodule(name).weight for name in weights}
    total = 0.0
    for window in tokens:
        wanted = model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
        for name, weight in weights.items():
            model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        found = model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
        for name, own in dense.items():
            model.get_submodule(name).weight = own
        total += float((wanted.exp() * (wanted - found)).sum())
    return total / tokens.numel()


def _report(pairs: list[tuple[float, float]]) -> None:
    """How the predictions for single units compare with what is measured."""
    x, y = ([math.log(max(pair[i], 1e-12)) for pair in pairs] for i in range(2))
    ratios = sorted(math.exp(b - a) for a, b in zip(x, y, strict=True))
    low, middle, high = (ratios[len(ratios) * tenth // 10] for tenth in (1, 5, 9))
    print(
        f"{len(pairs)} units: measured over predicted {low:.2f}, {middle:.2f}, {high:.2f} (tenth, median, ninth tenth), "
        f"correlation of the logarithms {statistics.correlation(x, y):.3f}",
        flush=True,
    )


BUDGET: dict[str, Change | None] = {
    "3.2x, as shipped": None,
    "3.2x, Fisher information alone": without_gains,
    "3.2x, measured layer by layer, data-free": lambda: measured(False),
    "3.2x, measured layer by layer, calibrated": lambda: measured(True),
}
# Of the embedding and head alone, at 4 bits: the share of the lookups beside the head.
EMBEDDING = {"embedding for lookups only (data-free)": None, **{f"embedding, lookup share {s}": s for s in (0.0, 0.1, 0.5)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", required=True, nargs="+", type=pathlib.Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=231, help="of the calibration text in the lines with a budget")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    model, tokenizer = load_dense(args.gguf, dtype=torch.float32)
    model = model.eval().to(args.device)
    texts = {t.stem: text_windows(tokenizer, t.read_text(encoding="utf-8"), 1024, args.windows) for t in args.text}
    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "torch": torch.__version__,
        "rows": {},
    }
    print("| change | " + " | ".join(f"{name}: perplexity | KL" for name in texts) + " | seconds |", flush=True)
    for name in (*LINEAR, *BUDGET, *EMBEDDING):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows):
            continue
        quantized = copy.deepcopy(model)
        start = time.perf_counter()
        expected = None  # KL divergence
        if name in LINEAR:
            change, settings = LINEAR[name]
            with change() if change else nullcontext():
                quantize_model(quantized, calibration=Calibration(**settings), tokenizer=tokenizer, progress=False)
        elif name in BUDGET:
            change = BUDGET[name]
            with change() if change else nullcontext():
                built_in = Calibration(samples=args.samples)
                report = quantize_model(
                    quantized, calibration=built_in, tokenizer=tokenizer, progress=False, target_ratio=3.2
                )
            expected = report.expected_kl
        else:
            config = TurboQuantConfig(embeddings={"*": (4, 0)}, skip=("model.*",))
            share = EMBEDDING[name]
            calibration = {} if share is None else {"calibration": True, "tokenizer": tokenizer}
            with mock.patch.object(quantize, "LOOKUP_SHARE", share):
                quantize_model(quantized, config, progress=False, **calibration)
        seconds = time.perf_counter() - start
        cells, row = [name], {}
        for text, windows in texts.items():
            scores = compare(model, {"model": quantized}, windows, progress=False)
            change_of = scores["model"].perplexity / scores["reference"].perplexity - 1
            row[text] = {"perplexity_change": change_of, **scores["model"].to_dict()}
            cells += [f"{100 * change_of:+.2f} %", f"{scores['model'].kl_mean:.5f}"]
        record["rows"][name] = {"seconds": seconds, "expected_kl": expected, **row}
        print("| " + " | ".join([*cells, f"{seconds:.1f}"]) + " |", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
