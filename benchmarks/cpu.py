"""Time of linear layers and of whole-model decoding on a CPU: ours beside PyTorch and llama.cpp.

    python benchmarks/cpu.py layers --output benchmarks/results/cpu-layers.json
    python benchmarks/cpu.py model --gguf SmolLM2-135M-Instruct.Q4_1.gguf --output benchmarks/results/cpu-model.json

Layers rotate over copies of the weights, 200 MB of dense ones in all, so each reads its weights from memory as it does in a
model. Times are medians in milliseconds. Run on an idle machine: another busy process costs OpenMP programs, ours and
PyTorch's, whole time slices.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from turboquant_weights import TurboQuantConfig, quantize_model
from turboquant_weights.cpu import library
from turboquant_weights.cpu.linear import linear
from turboquant_weights.reference import PackedWeight

SHAPES = {  # rows x columns
    "0.5b": ((4864, 896), (896, 4864), (896, 896)),
    "1.5b": ((8960, 1536), (1536, 8960), (1536, 1536)),
    "7b": ((18944, 3584), (3584, 18944), (3584, 3584)),
}
TOKENS = (1, 4, 16, 128, 512)
COLD_BYTES = 200 << 20
PROMPT = "The history of the steam engine begins with"


def random_planes(rows: int, columns: int, residual_bits: int, seed: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=generator)

    return PackedWeight(
        codes=draw(0, 256, (rows, columns // 2)),
        residual=draw(0, 256, (rows, columns * residual_bits // 8)) if residual_bits else None,
        scales=draw(170, 240, (rows, columns // 32)),
        exponents=draw(-22, -18, (rows,), torch.int8),
    )


def median_ms(calls: list[Callable[[], object]], seconds: float) -> float:
    """Per call; the list is run over and over for about this long."""
    times: list[float] = []
    calls[0]()
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < seconds:
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) / len(calls) * 1e3)
    return statistics.median(times)


def measure(rows: int, columns: int, tokens: tuple[int, ...], seconds: float) -> list[dict]:
    copies = max(2, min(8, -(-COLD_BYTES // (2 * rows * columns))))
    cells = {m: dict(rows=rows, columns=columns, tokens=m, threads=torch.get_num_threads(), ms={}) for m in tokens}
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        dense = [torch.randn(rows, columns, dtype=dtype) for _ in range(copies)]
        for m in tokens:
            x = torch.randn(m, columns, dtype=dtype)
            cells[m]["ms"][name] = median_ms([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense], seconds)
    del dense
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, columns), dtype=torch.int32), 1)
        for _ in range(copies)
    ]
    scales = torch.ones(columns // 32, rows, 2, dtype=torch.bfloat16)
    for m in tokens:
        x = torch.randn(m, columns, dtype=torch.bfloat16)
        calls = [lambda w=w, x=x, s=scales: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 32, s) for w in packed]
        cells[m]["ms"]["aten int4"] = median_ms(calls, seconds)
    del packed
    for residual_bits in (0, 4):
        count = min(24, -(-COLD_BYTES // (rows * columns * (4 + residual_bits) // 8)))
        planes = [random_planes(rows, columns, residual_bits, i) for i in range(max(2, count))]
        layout = dict(bits=4, residual_bits=residual_bits, group_size=128, seed=0)
        for engine in library.engines():
            for dtype, label in ((torch.bfloat16, ""), (torch.float32, " fp32")):
                for m in tokens[:1] if engine.name == "portable" else tokens:
                    x = torch.randn(m, columns, dtype=dtype)
                    calls = [lambda p=p, x=x, e=engine, n=layout: linear(x, p, None, columns, **n, engine=e) for p in planes]
                    name = f"{'4+4' if residual_bits else '4'} {engine.name}{label}"
                    cells[m]["ms"][name] = median_ms(calls, seconds)
    for cell in cells.values():
        cell["ms"] = {name: round(value, 4) for name, value in cell["ms"].items()}
        print(cell, flush=True)
    return list(cells.values())


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return dict(date=datetime.date.today().isoformat(), cpu=model or platform.processor(), torch=torch.__version__)


def table(report: dict) -> str:
    names = ["torch fp32", "aten int4", "4 avx512", "4 avx2", "4+4 avx512", "4+4 avx2", "4 avx512 fp32", "4+4 avx512 fp32"]
    lines = [
        f"{report['cpu']}, torch {report['torch']}, {report['date']}; `{report['command']}`.",
        "Speed over torch bf16 (milliseconds of torch bf16 in the fourth column), weights cold, rotation included.",
        "",
        "| rows x columns | threads | m | torch bf16, ms | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for cell in report["cells"]:
        ms = cell["ms"]
        speeds = [f"{ms['torch bf16'] / ms[name]:.2f}" if name in ms else "" for name in names]
        lines.append(
            f"| {cell['rows']} x {cell['columns']} | {cell['threads']} | {cell['tokens']} | {ms['torch bf16']:.3f} | "
            + " | ".join(speeds) + " |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def decode_rate(model: torch.nn.Module, prompt: dict, tokens: int) -> float:
    """Tokens per second of greedy decoding, prefill taken out: the best of three."""
    best = 0.0
    for _ in range(3):
        seconds = []
        for count in (1, tokens + 1):
            start = time.perf_counter()
            model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            seconds.append(time.perf_counter() - start)
        best = max(best, tokens / (seconds[1] - seconds[0]))
    return best


def llama_rate(path: Path, threads: int, tokens: int) -> float:
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = llama.tokenize(PROMPT.encode())
    best = 0.0
    for _ in range(3):
        llama.reset()
        stream = llama.generate(prompt, temp=0.0)
        next(stream)
        start = time.perf_counter()
        for _ in range(tokens):
            next(stream)
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def whole_model(gguf: Path, tokens: int) -> list[dict]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompt = dict(tokenizer(PROMPT, return_tensors="pt"))
    rows = []
    for label, config in (("bf16", None), ("4", TurboQuantConfig()), ("4+4", TurboQuantConfig(residual_bits=4))):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16).eval()
        if config:
            quantize_model(model, config)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows.append(dict(model=label, threads=threads, tokens_per_s=round(decode_rate(model, prompt, tokens), 2)))
            print(rows[-1], flush=True)
    for threads in (1, 2):
        try:
            rate = llama_rate(gguf, threads, tokens)
        except ImportError:
            print("llama.cpp: not measured (llama-cpp-python is not installed)")
            break
        rows.append(dict(model=f"llama.cpp {gguf.name}", threads=threads, tokens_per_s=round(rate, 2)))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "model"))
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES), help="whose layers")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.3, help="per time")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    command = f"python benchmarks/cpu.py {arguments.what} --models {' '.join(arguments.models)}"
    report: dict = dict(**machine(), command=command, cells=[])
    if arguments.what == "model":
        report["cells"] = whole_model(arguments.gguf, 48)
    else:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name in arguments.models:
                for rows, columns in SHAPES[name]:
                    report["cells"] += measure(rows, columns, tuple(arguments.tokens), arguments.seconds)
        if arguments.output:
            arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
