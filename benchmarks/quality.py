"""Quality of quantization: perplexity, KL divergence and top-1 agreement of our modes and of other quantizers.

Example (the README's tables; second.txt is made by second_text.py):

    python benchmarks/quality.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw second.txt --device cuda \\
        --out benchmarks/results/quality-smollm2-h100.json

Protocol: of each text the first 32 windows of 1,024 tokens, BOS where the model wants it; reference = the GGUF de-quantized
to float32, and every row is measured against it in the same run. Rotated methods are the mean of several rotation seeds,
the spread is shown. "bits" count everything stored for the tensors that a method quantizes, per weight of theirs (the
linear layers of the decoder, and in the whole-file rows and llama.cpp's the embedding); the ratio is the whole model in
bf16 over the whole model as stored, tensors only. The peers are in peers.py and llama_cpp_peer.py. Calibrated methods read
the package's own calibration text, with --calibration-text others in addition, and never an evaluation text.

Reference weights lie on a grid of 32-column blocks, so peers with blocks of 32 look better than they are: llama.cpp's
Q4_0, Q5_0, Q5_1, IQ4_NL and Q8_0 are such; blocks of other peers are 64 and 128.

--rows takes patterns, so the work can be split over processes; merge_quality.py puts the parts together:

    for seed in 0 1 2; do
        python benchmarks/quality.py ... --rows 'ours*' --first-seed $seed --seeds 1 --out $seed.json &
    done; wait
    python benchmarks/merge_quality.py 0.json 1.json 2.json --out all.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from llama_cpp_peer import llama_cpp_rows
from peers import PEERS, Peer
from torch import Tensor, nn

import turboquant_weights
from turboquant_weights import Calibration, TurboQuantConfig, quantize_model
from turboquant_weights.calibration import calibration_text
from turboquant_weights.evaluation import evaluate, noise_floor, text_windows
from turboquant_weights.integrations.transformers import load_dense

DATA_FREE = ("2", "3", "4", "4+1", "4+2", "4+3", "4+4")
CALIBRATED = ("4", "4+2", "4+4")
WHOLE_FILE = (3.2, 3.7)
# What an evaluation contributes to a row.
FIGURES = ("perplexity", "kl_mean", "kl_stderr", "kl_p99", "kl_max", "top1")


@dataclasses.dataclass
class Row:
    """One line of the table. Lists hold one figure per seed; ``scores`` has of each text the figures per seed."""

    method: str
    note: str
    seeds: list[int]
    bits: list[float]
    bytes: list[int]
    ratio: list[float]
    error: list[float]
    seconds: list[float]
    scores: dict[str, dict[str, list[float]]]


@dataclasses.dataclass
class Result:
    """A quantized model on its way to a row."""

    model: nn.Module
    bits: float
    bytes: int
    error: float
    note: str = ""


class Remembered(nn.Module):
    """The reference, whose decoder runs once per window: what the output head reads is kept, and the head runs again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        head = self.model.get_output_embeddings()
        key = input_ids.cpu().numpy().tobytes()
        if key in self.seen:
            return SimpleNamespace(logits=head(self.seen[key]))
        with contextlib.closing(_Hook(head)) as hook:
            logits = self.model(input_ids=input_ids, use_cache=use_cache).logits
        if not self.seen and not torch.equal(logits, head(hook.input)):
            raise SystemExit("the reference changes its logits after the output head: its decoder cannot be run only once")
        self.seen[key] = hook.input
        return SimpleNamespace(logits=logits)


class _Hook:
    def __init__(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(self.keep)

    def keep(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.input = args[0]

    def close(self) -> None:
        self.handle.remove()


def our_rows(tokenizer: object, calibration: Calibration) -> dict[str, tuple[dict[str, object], dict[str, object]]]:
    """Row name -> arguments of TurboQuantConfig and of quantize_model."""
    calibrated = {"calibration": calibration, "tokenizer": tokenizer}
    rows: dict[str, tuple[dict[str, object], dict[str, object]]] = {f"ours {s}": (_bits(s), {}) for s in DATA_FREE}
    rows |= {f"ours {s}, calibrated": (_bits(s), calibrated) for s in CALIBRATED}
    # The value projections are 3 % of this model's linear weights and most of what 4 bits lose: 4.32 bits in all.
    rows["ours 4, v_proj 4+2, calibrated"] = ({"bits": 4, "layer_bits": {"*.v_proj": (4, 2)}}, calibrated)
    rows |= {f"ours {r}x whole file": ({}, calibrated | {"target_ratio": r}) for r in WHOLE_FILE}
    return rows


def _bits(setting: str) -> dict[str, object]:
    bits, _, residual = setting.partition("+")
    return {"bits": int(bits), "residual_bits": int(residual or 0)}


def quantize_ours(
    reference: nn.Module, config: dict[str, object], arguments: dict[str, object], seed: int, dtype: torch.dtype
) -> Result:
    model = copy.deepcopy(reference)
    report = quantize_model(model, TurboQuantConfig(seed=seed, **config), progress=False, **arguments)
    size = report.total_bytes - report.other_bytes + report.other_dense_bytes  # float32 is for measuring: bf16 is stored
    return Result(model.to(dtype), report.bits_per_weight, size, report.error)


def quantize_peer(reference: nn.Module, build: Callable[[nn.Module, Tensor], Peer], calibration: Tensor) -> Result:
    peer = build(reference, calibration)
    new = peer.model.state_dict()
    errors = [
        ((new[name] - old).square().sum() / old.square().sum()).item()
        for name, old in reference.state_dict().items()
        if old.dim() == 2 and not torch.equal(new[name], old)
    ]
    # A peer may quantize without loss what lies on its grid.
    error = statistics.mean(errors) if errors else 0.0
    return Result(peer.model, 8 * peer.stored / peer.weights, round(peer.total), error, peer.note)


def measure(
    name: str, build: Callable[[int], Result], seeds: list[int], reference: Remembered, texts: dict[str, Tensor]
) -> Row:
    dense = 2 * sum(parameter.numel() for parameter in reference.model.parameters())
    row = Row(name, "", list(seeds), [], [], [], [], [], {text: {figure: [] for figure in FIGURES} for text in texts})
    for seed in seeds:
        start = time.perf_counter()
        result = build(seed)
        row.seconds.append(time.perf_counter() - start)
        row.note = result.note
        row.bits.append(result.bits)
        row.bytes.append(result.bytes)
        row.ratio.append(dense / result.bytes)
        row.error.append(result.error)
        for text, windows in texts.items():
            score = evaluate(result.model, windows, reference, progress=False).to_dict()
            for figure in FIGURES:
                row.scores[text][figure].append(score[figure])
    return row


def format_row(row: Row, texts: dict[str, dict[str, float]]) -> str:
    cells = [row.method, f"{statistics.mean(row.bits):.3f}", f"{statistics.mean(row.ratio):.2f}x"]
    cells.append(f"{statistics.mean(row.error):.5f}")
    for text, base in texts.items():
        score = row.scores[text]
        kl = score["kl_mean"]
        cells += [
            f"{100 * (statistics.mean(score['perplexity']) / base['reference_perplexity'] - 1):+.2f} %",
            f"{statistics.mean(kl):.5f} ± {statistics.mean(score['kl_stderr']):.5f} ({min(kl):.5f}-{max(kl):.5f})",
            f"{statistics.mean(score['kl_p99']):.4f}",
            f"{statistics.mean(score['top1']):.3f}",
        ]
    return "| " + " | ".join([*cells, f"{statistics.median(row.seconds):.1f}", row.note]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, help="GGUF file of the reference model")
    parser.add_argument(
        "--text", required=True, nargs="+", type=pathlib.Path, help="UTF-8 text files; the first is the main one"
    )
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to measure, such as 'ours*' 'GPTQ*'")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="in which our rows run")
    parser.add_argument("--bos", action="store_true", help="start each window with BOS, whatever the tokenizer does")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to use instead of the GGUF's (Gemma before 5.20)")
    parser.add_argument("--windows", type=int, default=32, help="windows of each text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--calibration-windows", type=int, default=128, help="windows of each text that calibrated rows read"
    )
    parser.add_argument(
        "--calibration-text",
        nargs="*",
        type=pathlib.Path,
        default=[],
        help="UTF-8 files to read after the package's own text",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of rotation seeds of our rows")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file, after every row")
    args = parser.parse_args()
    peers = PEERS | llama_cpp_rows(args.gguf)
    names = [*peers, *our_rows(None, Calibration())]
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.rows)]
    if args.list or not chosen:
        print(*(chosen or names), sep="\n")
        sys.exit(0 if chosen else f"no row matches {args.rows}; the rows are listed above")

    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_dense(args.gguf, dtype=torch.float32)
    model = model.eval().to(args.device)
    if args.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    sources = [calibration_text(), *(path.read_text(encoding="utf-8") for path in args.calibration_text)]
    calibration = torch.cat(
        [text_windows(tokenizer, text, args.length, args.calibration_windows, bos=args.bos or None) for text in sources]
    )
    ours = our_rows(tokenizer, Calibration(calibration, samples=len(calibration), sample_length=calibration.shape[1]))

    texts = {
        path.stem: text_windows(tokenizer, path.read_text(encoding="utf-8"), args.length, args.windows, bos=args.bos or None)
        for path in args.text
    }
    on_gpu = args.device.startswith("cuda")
    hardware = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    reference = Remembered(model)
    bases = {
        name: {
            "windows": len(windows),
            "length": windows.shape[1],
            "reference_perplexity": evaluate(reference, windows, progress=False).perplexity,
            "noise_floor_kl": noise_floor(model, windows[:4], progress=False).kl_mean,
        }
        for name, windows in texts.items()
    }
    settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("TURBOQUANT_WEIGHTS_")]
    record = {
        "command": " ".join([*settings, *(pathlib.Path(a).name if "/" in a else a for a in sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "model": pathlib.Path(args.gguf).name,
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "turboquant_weights": turboquant_weights.__version__,
        "texts": bases,
        "rows": [],
    }
    print(f"{record['model']} on {hardware}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, base in bases.items():
        print(
            f"{name}: reference perplexity {base['reference_perplexity']:.4f}; noise floor KL {base['noise_floor_kl']:.1e}"
        )
    heads = [f"{name}: perplexity | KL ± standard error (over seeds) | KL p99 | top-1" for name in texts]
    print("| method | bits | ratio | rel. MSE |", " | ".join(heads), "| seconds | note |", flush=True)
    print("|---" * (6 + 4 * len(texts)) + "|", flush=True)
    for name in chosen:
        if name in peers:
            seeds, build = [0], lambda _, name=name: quantize_peer(model, peers[name], calibration)
        else:
            seeds = list(range(args.first_seed, args.first_seed + args.seeds))
            build = lambda seed, name=name: quantize_ours(model, *ours[name], seed, getattr(torch, args.dtype))  # noqa: E731
        row = measure(name, build, seeds, reference, texts)
        print(format_row(row, bases), flush=True)
        record["rows"].append(dataclasses.asdict(row))
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
