"""What each ingredient of calibrated quantization is worth, measured alone, at equal bits.

    python benchmarks/calibration_ablation.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw second.txt
    --device cuda

Protocol of quality.py: the first 32 windows of 1,024 tokens of each text, KL divergence from the de-quantized GGUF in
float32, one rotation seed. Each line changes one thing of "as shipped".
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from turboquant_weights import Calibration, TurboQuantConfig, feedback, quantize, quantize_model
from turboquant_weights.calibration import Calibrator
from turboquant_weights.evaluation import compare, text_windows
from turboquant_weights.integrations.transformers import load_dense
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
# Of the embedding and head alone, at 4 bits: the share of the lookups beside the head.
EMBEDDING = {"embedding for lookups only (data-free)": None, **{f"embedding, lookup share {s}": s for s in (0.0, 0.1, 0.5)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--text", required=True, nargs="+", type=pathlib.Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns")
    parser.add_argument("--windows", type=int, default=32)
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
    for name in (*LINEAR, *EMBEDDING):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows):
            continue
        quantized = copy.deepcopy(model)
        start = time.perf_counter()
        if name in LINEAR:
            change, settings = LINEAR[name]
            with change() if change else mock.patch.object(feedback, "DAMPING", feedback.DAMPING):
                quantize_model(quantized, calibration=Calibration(**settings), tokenizer=tokenizer, progress=False)
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
        record["rows"][name] = {"seconds": seconds, **row}
        print("| " + " | ".join([*cells, f"{seconds:.1f}"]) + " |", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
