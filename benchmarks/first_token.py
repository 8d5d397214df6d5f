"""Time to the first tokens on a GPU with nothing compiled: Qwen2.5 shapes with random weights, an empty Triton cache.

    python benchmarks/first_token.py --output benchmarks/results/first-token-h100.json

Each row is a process of its own with a cache folder of its own. It counts from the model being on the GPU to the first token
of a prompt being known on the host, which compiles the kernels for many tokens, and to the second, which compiles those for
one; then the same prompt again, with everything compiled. bf16 shows what CUDA and cuBLAS take by themselves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from decode import SHAPES, WEIGHTS, build


def measure(shape: str, weights: str, prompt: int) -> dict:
    model = build(shape, weights)
    ids = torch.randint(model.config.vocab_size, (1, prompt), device="cuda")
    row: dict = dict(shape=shape, weights=weights, prompt=prompt)
    with torch.inference_mode():
        for name in ("cold", "again"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            token.item()
            first = time.perf_counter()
            model(token, past_key_values=out.past_key_values, use_cache=True).logits[:, -1].argmax(-1).item()
            second = time.perf_counter()
            row |= {f"{name}_first_s": round(first - start, 2), f"{name}_second_s": round(second - first, 2)}
    return row


def table(report: dict) -> str:
    lines = [
        f"{report['gpu']}, {report['cpus']} CPU cores, PyTorch {report['torch']}, Triton {report['triton']}, "
        f"{report['date']}; `{report['command']}`. Seconds.",
        "",
        "| shape | weights | prompt | first token, nothing compiled | second | first, compiled | second |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        times = [row[f"{name}_{which}_s"] for name in ("cold", "again") for which in ("first", "second")]
        lines.append(f"| {row['shape']} | {row['weights']} | {row['prompt']} | " + " | ".join(map(str, times)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bf16", "4 fused", "4+4 fused", WEIGHTS[-1]])
    parser.add_argument("--prompts", nargs="+", type=int, default=[32], help="tokens")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a table goes beside it")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/first_token.py needs a CUDA GPU")
    if arguments.child:
        shape, weights, prompt = arguments.child
        print(json.dumps(measure(shape, weights, int(prompt))))
        return
    report: dict = dict(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        cpus=os.cpu_count(),
        date=datetime.date.today().isoformat(),
        command=shlex.join(["python", "benchmarks/first_token.py", *sys.argv[1:]]),
        rows=[],
    )
    for shape in arguments.shapes:
        for weights in arguments.weights:
            for prompt in arguments.prompts:
                with tempfile.TemporaryDirectory() as folder:
                    command = [sys.executable, __file__, "--child", shape, weights, str(prompt)]
                    environment = os.environ | dict(TRITON_CACHE_DIR=folder)
                    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                report["rows"].append(json.loads(said.splitlines()[-1]))
                print(report["rows"][-1], flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
