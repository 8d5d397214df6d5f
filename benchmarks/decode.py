"""Whole-model decoding and prefill on a GPU: Qwen2.5 shapes with random weights built on the GPU, ours against bf16.

    python benchmarks/decode.py --shapes 7b --output benchmarks/results/decode-h100.json

A token in three modes: `eager`, as Python runs it; `graph`, a CUDA graph of the eager step; `compiled`, a CUDA graph of the
step after `torch.compile` of the whole model, the kernels of `generate` with a static cache. `--contexts` are the tokens in
the cache before the one that is measured; Transformers' default attention (sdpa) reads the whole cache, which has `ROOM`
more. The output head stays in bf16, as in a quantized checkpoint by default, unless a row names its bits. `3.2x mix` has
layers of 3 to 4+3 bits, as a budget of 3.2x for the whole file gives them: 5.0 stored bits per weight. Medians.

`--profile` adds the device time of a compiled step by group of kernels. Compiling takes half a minute per row, context and
batch; the same command again finds the kernels in inductor's cache.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import gc
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from turboquant_weights import TurboQuantConfig, TurboQuantLinear, fuse_projections
from turboquant_weights.kernels.tune import random_planes

SHAPES = {
    "tiny": dict(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "7b": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
    "32b": dict(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8
    ),
}
WEIGHTS = (
    *("bf16", "4", "4 fused", "4 fused, head 4+2", "4 fused, head 4"),
    *("4+4", "4+4 fused", "4+4 fused, head 4+4"),
    *("3.2x mix, head 4+2", "3.2x mix fused, head 4+2"),
)
# Bits by projection, in each four consecutive layers. Projections that are fused share theirs.
_QKV, _GATE_UP = ("4+3", "4+2", "4+2", "4+2"), ("4+1", "4+1", "4", "3")
MIX = dict(
    q_proj=_QKV, k_proj=_QKV, v_proj=_QKV, o_proj=("4+2", "4+2", "4+1", "4+2"),
    gate_proj=_GATE_UP, up_proj=_GATE_UP, down_proj=("4+1", "4+2", "4+1", "4+1"),
)  # fmt: skip
MODES = ("eager", "graph", "compiled")
ROOM = 256  # of the cache: steps that can be measured before it is full
# Kernels by what their names contain, in this order; the rest are the model's norms, rotary embedding, additions and copies.
GROUPS = {
    "ours": (
        *("rotating_kernel", "integer_kernel", "slices_kernel", "splitk_kernel", "streamk_kernel"),
        *("rotate_scaled_kernel", "rotate_bytes_kernel", "rotate_kernel", "dequantize_kernel", "dequantize_words_kernel"),
    ),
    "attention": ("fmha", "flash", "attention", "cudnn"),
    "cuBLAS": ("gemm", "gemv", "nvjet", "cublas", "splitKreduce"),
}


def bits_of(label: str) -> TurboQuantConfig:
    """
    >>> bits_of("4+2").residual_bits
    2
    """
    bits, _, residual_bits = label.partition("+")
    return TurboQuantConfig(bits=int(bits), residual_bits=int(residual_bits or 0))


def label_of(body: str, name: str) -> str:
    """The bits of the linear layer ``name`` in weights called ``body``.

    >>> label_of("4+2 fused", "layers.7.mlp.up_proj"), label_of("3.2x mix", "layers.7.mlp.up_proj")
    ('4+2', '3')
    """
    label = body.split()[0]
    if label != "3.2x":
        return label
    _, layer, _, leaf = name.split(".")
    return MIX[leaf][int(layer) % 4]


def quantized(linear: torch.nn.Module, settings: TurboQuantConfig, device: str) -> TurboQuantLinear:
    """A layer of random codes with the shape of ``linear``, its bias still on the meta device."""
    shape: tuple[int, int] = (linear.out_features, linear.in_features)  # type: ignore[assignment]
    planes = random_planes(*shape, settings.bits, settings.residual_bits, device=device)
    return TurboQuantLinear.from_packed(planes, linear.in_features, linear.bias, settings)  # type: ignore[arg-type]


def build(shape: str, weights: str, device: str = "cuda") -> Any:
    """A model with random weights; unless they are bf16, the linear layers of its decoder hold random codes."""
    config = transformers.Qwen2Config(**dict(vocab_size=152064, max_position_embeddings=32768) | SHAPES[shape])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    body, _, head = weights.partition(", head ")
    if body != "bf16":
        for name, module in list(model.model.named_modules()):
            if type(module) is torch.nn.Linear:
                parent, _, leaf = name.rpartition(".")
                setattr(model.model.get_submodule(parent), leaf, quantized(module, bits_of(label_of(body, name)), device))
    if head:
        model.lm_head = quantized(model.lm_head, bits_of(head), device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if body.endswith("fused"):
        fuse_projections(model)
    return model


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


class Step:
    """One token for each of ``batch`` sequences that have ``context`` in a static cache."""

    def __init__(self, model: Any, batch: int, context: int, device: str = "cuda") -> None:
        self.model, self.context = model, context
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=context + ROOM)
        self.tokens = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
        self.position = torch.tensor([[context]], device=device)
        self()  # allocates the cache

    def rewind(self) -> None:
        """Every call appends to the cache; forgets what came after the context."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)  # type: ignore[union-attr]

    def __call__(self) -> torch.Tensor:
        out: torch.Tensor = self.model(
            self.tokens, past_key_values=self.cache, position_ids=self.position, use_cache=True
        ).logits
        return out


def compiled(step: Step, backend: str | Callable[..., Any] = "inductor") -> tuple[Callable[[], torch.Tensor], float]:
    """The step with its model compiled as one graph, and the seconds that took."""
    torch._dynamo.reset()
    # By itself inductor times two versions of each elementwise kernel, and noise decides. For the one that repeats keys and
    # values of 2,304 tokens it was 6.6 or 11.2 us, 56 times in a step: every row is to have the same.
    options = {"triton.autotune_pointwise": False} if backend == "inductor" else None
    model = torch.compile(step.model, backend=backend, options=options, fullgraph=True, dynamic=False)
    arguments = dict(past_key_values=step.cache, position_ids=step.position, use_cache=True)

    def call() -> torch.Tensor:
        out: torch.Tensor = model(step.tokens, **arguments).logits
        return out

    start = time.perf_counter()
    step.rewind()
    call()
    synchronize()
    return call, time.perf_counter() - start


def graph_of(step: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def group_of(kernel: str) -> str:
    """
    >>> group_of("nvjet_sm90_tst_64x8"), group_of("triton_red_fused_add_mean_0"), group_of("fmha_cutlassF_bf16")
    ('cuBLAS', 'rest', 'attention')
    """
    return next((group for group, parts in GROUPS.items() if any(part in kernel for part in parts)), "rest")


def profile(replay: Callable[[], object], repeats: int = 5) -> dict[str, Any]:
    """Microseconds of device time and kernels per step by group, and the longest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = collections.defaultdict(list)
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.device_time)
    groups: dict[str, dict[str, float]] = {}
    for name, times in kernels.items():
        group = groups.setdefault(group_of(name), dict(us=0.0, kernels=0))
        group["us"] = round(group["us"] + sum(times) / repeats, 1)
        group["kernels"] += len(times) // repeats
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:24]
    return dict(
        groups=groups,
        longest=[dict(name=n[:120], us=round(statistics.mean(t), 2), per_step=len(t) // repeats) for n, t in longest],
    )


def decoding(model: Any, batch: int, context: int, modes: Sequence[str], profiled: bool) -> dict[str, Any]:
    step = Step(model, batch, context)
    row: dict[str, Any] = dict(context=context, batch=batch)

    def timed(call: Callable[[], object], repeats: int) -> float:
        step.rewind()
        return round(milliseconds(call, repeats), 3)

    if "eager" in modes:
        row["eager_ms"] = timed(step, 10)
    if "graph" in modes:
        row["graph_ms"] = timed(graph_of(step), 30)
    if "compiled" in modes:
        call, row["compile_s"] = compiled(step)
        replay = graph_of(call)
        row["compiled_ms"] = timed(replay, 100)
        if profiled:
            step.rewind()
            row["profile"] = profile(replay)
    return row


@torch.inference_mode()
def measure(shape: str, weights: str, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build(shape, weights)
    linear_bytes = sum(
        parameter.nbytes
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear)
        for parameter in module.parameters()
    )
    row: dict[str, Any] = dict(shape=shape, weights=weights, linear_GB=round(linear_bytes / 1e9, 3))
    row["resident_GB"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    row["decode"] = [
        decoding(model, batch, context, [m for m in arguments.modes if m != "compiled" or batch == 1], arguments.profile)
        for context in arguments.contexts
        for batch in arguments.batches
    ]
    prompt = torch.randint(0, model.config.vocab_size, (1, 2048), device="cuda")
    row["prefill_2048_ms"] = round(milliseconds(lambda: model(prompt, logits_to_keep=1), 5), 2)
    row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def table(report: dict[str, Any]) -> str:
    """Markdown: tokens/s with the ratio to bf16 of the same shape, context, batch and mode; then device time by group."""
    milliseconds_of = {
        (row["shape"], row["weights"], cell["context"], cell["batch"], mode): cell[f"{mode}_ms"]
        for row in report["rows"]
        for cell in row["decode"]
        for mode in MODES
        if f"{mode}_ms" in cell
    }
    modes = [mode for mode in reversed(MODES) if any(key[-1] == mode for key in milliseconds_of)]

    def speed(shape: str, weights: str, context: int, batch: int, mode: str) -> str:
        mine, base = (milliseconds_of.get((shape, w, context, batch, mode)) for w in (weights, "bf16"))
        if mine is None:
            return ""
        return f"{batch / mine * 1e3:.0f}" + (f" ({base / mine:.2f})" if base and weights != "bf16" else "")

    lines = [
        f"{report['gpu']}, PyTorch {report['torch']}, Triton {report['triton']}, Transformers {report['transformers']}, "
        f"{report['date']}; `{report['command']}`. Tokens/s (over bf16).",
        "",
        "| shape | weights | context | batch | " + " | ".join(modes) + " | linear layers, GB | resident / peak, GB "
        "| prefill of 2,048, ms |",
        "|---|---|---|---|" + "---|" * (len(modes) + 3),
    ]  # fmt: skip
    for row in report["rows"]:
        for i, cell in enumerate(row["decode"]):
            key = row["shape"], row["weights"], cell["context"], cell["batch"]
            cells = " | ".join(speed(*key, mode) for mode in modes)
            memory = "" if i else f"{row['resident_GB']:.1f} / {row['peak_GB']:.1f}"
            linear, prefill = ("", "") if i else (f"{row['linear_GB']:.2f}", f"{row['prefill_2048_ms']:.1f}")
            lines.append(f"| {' | '.join(map(str, key))} | {cells} | {linear} | {memory} | {prefill} |")
    profiles = [(row, cell) for row in report["rows"] for cell in row["decode"] if "profile" in cell]
    if profiles:
        names = [*GROUPS, "rest"]
        lines += ["", "Device time of a compiled step, microseconds (kernels):", ""]
        lines += ["| shape | weights | context | step | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for row, cell in profiles:
        groups = cell["profile"]["groups"]
        parts = [f"{groups[n]['us']:.0f} ({groups[n]['kernels']})" if n in groups else "" for n in names]
        step = f"{cell['compiled_ms'] * 1e3:.0f}"
        lines.append(f"| {row['shape']} | {row['weights']} | {cell['context']} | {step} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "7b", "32b"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="compiled: at batch 1 only")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a table goes beside it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/decode.py needs a CUDA GPU")
    settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("TURBOQUANT_WEIGHTS_")]
    report: dict[str, Any] = dict(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        transformers=transformers.__version__,
        date=datetime.date.today().isoformat(),
        command=shlex.join([*settings, "python", "benchmarks/decode.py", *sys.argv[1:]]),
        rows=[],
    )
    for shape in arguments.shapes:
        for weights in arguments.weights:
            report["rows"].append(measure(shape, weights, arguments))
            gc.collect()
            print(report["rows"][-1], flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
