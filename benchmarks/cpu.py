"""Time of linear layers and of whole-model decoding on a CPU: ours beside PyTorch and llama.cpp.

    python benchmarks/cpu.py layers --output benchmarks/results/cpu-layers.json
    python benchmarks/cpu.py model --gguf SmolLM2-135M-Instruct.Q4_1.gguf --output benchmarks/results/cpu-model.json
    python benchmarks/cpu.py model --gguf SmolLM2-135M-Instruct.Q4_1.gguf --compile

Layers rotate over copies of the weights, 200 MB in all, so each reads its weights from memory as it does in a model. All
kinds of layers take turns, call by call, so that whatever else the machine does hits them alike; those that share copies
are at different ones, since what one has read may be in the cache for the next. Times are medians in milliseconds. Beside
them stands a yardstick: the time in which PyTorch sums up the planes of 4 bits. A file that exists is completed: cells
measured again are replaced, so that a long run may be done in pieces.

`model` decodes greedily, the models taking turns token by token, and says where the time goes: in the engine, in the Python
around it, and in all else (Transformers, attention, norms). With `--compile` each model's step is one graph of
`torch.compile` around a static cache, as large as the text becomes. Run on an idle machine: another busy process costs
OpenMP programs, ours and PyTorch's, whole time slices.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from turboquant_weights import TurboQuantConfig, TurboQuantLinear, load, quantize_model
from turboquant_weights.cpu import library
from turboquant_weights.cpu.linear import bind
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


Calls = list[Callable[[], object]]


def dense_calls(rows: int, columns: int, m: int, dtype: torch.dtype) -> Calls:
    count = max(2, -(-COLD_BYTES // (rows * columns * dtype.itemsize)))
    block = torch.randn(1 << 20).to(dtype)
    weights = [
        block.repeat(-(-rows * columns // (1 << 20)))[: rows * columns].clone().view(rows, columns) for _ in range(count)
    ]
    x = torch.randn(m, columns, dtype=dtype)
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def our_calls(copies: list[PackedWeight], x: Tensor, residual_bits: int, engine: library.Engine) -> Calls:
    """What TurboQuantLinear does after its first call."""

    def layer(planes: PackedWeight) -> Callable[[], object]:
        parameters = {**planes._asdict(), "bias": None}
        bound = bind(parameters, x.shape[1], (4, residual_bits, 128, 0), engine)
        assert bound is not None

        def call() -> Tensor | None:
            out = bound.at_once(x, parameters)
            return bound.product(x, parameters) if out is None else out

        return call

    return [layer(planes) for planes in copies]


def int4_calls(rows: int, columns: int, m: int) -> Calls:
    count = max(2, -(-COLD_BYTES // (rows * columns // 2)))
    one = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, columns), dtype=torch.int32), 1)
    scales, x = torch.ones(columns // 32, rows, 2, dtype=torch.bfloat16), torch.randn(m, columns, dtype=torch.bfloat16)
    weights = [one.clone() for _ in range(count)]
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 32, scales) for w in weights]  # type: ignore[misc]


def interleaved_ms(kinds: dict[str, Calls], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Sorted times of each kind, which take turns for so many seconds per kind, but at least so often."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for calls in kinds.values():
        calls[0]()
    started, turn = time.perf_counter(), 0
    order = list(kinds.items())
    while turn < least or time.perf_counter() - started < seconds * len(kinds):
        random.Random(turn).shuffle(order)  # nobody always follows the same neighbour
        for name, calls in order:
            start = time.perf_counter()
            calls[turn % len(calls)]()
            times[name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    return {name: sorted(values) for name, values in times.items()}


def apart(calls: Calls, number: int, of: int = 6) -> Calls:
    """The same calls, beginning at another one for each number below ``of``."""
    start = len(calls) * number // of
    return calls[start:] + calls[:start]


def measure(rows: int, columns: int, tokens: list[int], seconds: float) -> list[dict]:
    planes = {}
    for residual_bits in (0, 4):
        count = max(2, -(-COLD_BYTES // (rows * columns * (4 + residual_bits) // 8)))
        planes[residual_bits] = [random_planes(rows, columns, residual_bits, i) for i in range(min(count, 400))]
    cells = []
    for m in tokens:
        kinds = {"torch bf16": dense_calls(rows, columns, m, torch.bfloat16)}
        kinds["torch fp32"] = dense_calls(rows, columns, m, torch.float32)
        if m <= 16:  # it is for few tokens
            kinds["aten int4"] = int4_calls(rows, columns, m)
        sharing = dict.fromkeys(planes, 0)  # kinds of layers that read the same planes
        for residual_bits, copies in planes.items():
            for engine in library.engines():
                for dtype in (torch.bfloat16, torch.float32):
                    if engine.name == "portable" or (dtype == torch.float32 and engine is not library.engines()[0]):
                        continue
                    x = torch.randn(m, columns, dtype=dtype)
                    name = f"{'4+4' if residual_bits else '4'} {engine.name}{' fp32' if dtype == torch.float32 else ''}"
                    sharing[residual_bits] += 1
                    kinds[name] = apart(our_calls(copies, x, residual_bits, engine), sharing[residual_bits])
        kinds["read"] = [lambda p=p: (p.codes.view(torch.int64).sum(), p.scales.view(torch.int32).sum()) for p in planes[0]]  # type: ignore[misc]
        times = interleaved_ms(kinds, seconds)
        cell = dict(rows=rows, columns=columns, tokens=m, threads=torch.get_num_threads(), ms={}, quartiles={})
        for name, values in times.items():
            cell["ms"][name] = round(statistics.median(values), 4)
            cell["quartiles"][name] = [round(values[len(values) // 4], 4), round(values[3 * len(values) // 4], 4)]
        cells.append(cell)
        print({name: value for name, value in cell.items() if name != "quartiles"}, flush=True)
    return cells


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return dict(date=datetime.date.today().isoformat(), cpu=model or platform.processor(), torch=torch.__version__)


def table(report: dict) -> str:
    others = dict.fromkeys(name for cell in report["cells"] for name in cell["ms"])
    names = sorted((name for name in others if name not in ("torch bf16", "read")), key=lambda name: (name[0] == "4", name))
    lines = [
        f"{report['cpu']}, torch {report['torch']}, {report['date']}; `{report['command']}`.",
        'Speed over torch bf16 (milliseconds in brackets), weights cold, rotation included, medians; "read" is the time of',
        'reading the planes of 4 bits, and "noise" the distance of the quartiles of torch bf16 over its median.',
        "",
        "| rows x columns | threads | m | torch bf16, ms | noise | read, ms | " + " | ".join(names) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(names),
    ]
    for cell in report["cells"]:
        ms = cell["ms"]
        dense, (low, high) = ms["torch bf16"], cell["quartiles"]["torch bf16"]
        speeds = [f"{dense / ms[name]:.2f} ({ms[name]:.3g})" if name in ms else "" for name in names]
        lines.append(
            f"| {cell['rows']} x {cell['columns']} | {cell['threads']} | {cell['tokens']} | {dense:.3f} | "
            f"{(high - low) / dense:.0%} | {ms['read']:.3f} | " + " | ".join(speeds) + " |"
        )
    return "\n".join(lines) + "\n"


def decode(models: dict[str, torch.nn.Module], ids: Tensor, tokens: int) -> list[dict]:
    """Greedy decoding, model by model in turns, and where each one's time goes, measured in a run of its own."""
    steps: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        state = [model(ids, use_cache=True)]

        def step(model: torch.nn.Module = model, state: list = state) -> None:
            last = state[0]
            state[0] = model(last.logits[:, -1:].argmax(-1), past_key_values=last.past_key_values, use_cache=True)

        steps[name] = step
    times = interleaved_ms({name: [step] for name, step in steps.items()}, 0, tokens)
    rows = []
    for name, step in steps.items():
        ms = statistics.median(times[name])
        row = dict(model=name, threads=torch.get_num_threads(), tokens_per_s=round(1e3 / ms, 2), ms=round(ms, 3))
        rows.append({**row, **(profile(models[name], step) if name != "bf16" else {})})
        print(rows[-1], flush=True)
    return rows


def decode_compiled(models: dict[str, torch.nn.Module], ids: Tensor, tokens: int) -> list[dict]:
    """The same with each model's step compiled, without the Python that the profile would show."""
    from torch._dynamo.utils import counters
    from transformers import StaticCache

    torch._dynamo.reset()  # the number of threads is part of compiled code
    counters.clear()
    warm, steps = 3, {}
    for name, model in models.items():
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + warm + 1 + tokens)
        last = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        def one(token: Tensor, position: Tensor, cache: StaticCache = cache, model: torch.nn.Module = model) -> Tensor:
            out = model(token, position_ids=position, past_key_values=cache, use_cache=True)
            return out.logits[:, -1:].argmax(-1)

        compiled, state = torch.compile(one, fullgraph=True), [last, torch.tensor([[ids.shape[1]]])]

        def step(compiled: Callable[..., Tensor] = compiled, state: list[Tensor] = state) -> None:
            state[:] = compiled(*state), state[1] + 1

        for _ in range(warm):
            step()
        steps[name] = [step]
    times = interleaved_ms(steps, 0, tokens)
    assert counters["stats"]["unique_graphs"] == len(models), "compiled again"
    rows = []
    for name, values in times.items():
        ms = statistics.median(values)
        rate = dict(threads=torch.get_num_threads(), tokens_per_s=round(1e3 / ms, 2), ms=round(ms, 3))
        rows.append(dict(model=f"{name}, compiled", **rate))
        print(rows[-1], flush=True)
    return rows


def unbind(model: torch.nn.Module) -> None:
    """Lets quantized layers look the engine's functions up again."""
    for module in model.modules():
        if isinstance(module, TurboQuantLinear):
            module._bound = None


def profile(model: torch.nn.Module, step: Callable[[], object], count: int = 12) -> dict[str, float]:
    """Milliseconds per token: in the engine, in quantized layers around it, and outside of them; medians. The clock's own
    Python, some three microseconds per layer, counts as around it."""
    c = library.library()
    engine, forward, spent = c.tq_linear, TurboQuantLinear.__call__, {"engine": 0.0, "layers": 0.0}

    def timed(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    rows = []
    c.tq_linear = ctypes.CFUNCTYPE(engine.restype, *engine.argtypes)(timed("engine", engine))  # calls in C can call it, too
    TurboQuantLinear.__call__ = timed("layers", forward)  # type: ignore[method-assign]
    unbind(model)
    step()
    try:
        for _ in range(count):
            spent.update(engine=0.0, layers=0.0)
            start = time.perf_counter()
            step()
            rows.append((spent["engine"], spent["layers"] - spent["engine"], time.perf_counter() - start - spent["layers"]))
    finally:
        c.tq_linear = engine
        del TurboQuantLinear.__call__
        unbind(model)
    parts = [round(statistics.median(column) * 1e3, 3) for column in zip(*rows, strict=True)]
    return dict(zip(("engine_ms", "around_engine_ms", "elsewhere_ms"), parts, strict=True))


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


def whole_model(
    gguf: Path, tokens: int, thread_counts: list[int], compiled: bool, checkpoints: Sequence[Path] = ()
) -> list[dict]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(PROMPT, return_tensors="pt")["input_ids"]
    head = {"model.embed_tokens": (4, 2)}
    configs = {
        "4": TurboQuantConfig(),
        "4, head 4+2": TurboQuantConfig(embeddings=head),
        "4+4, head 4+2": TurboQuantConfig(residual_bits=4, embeddings=head),
    }
    dense = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16).eval()
    models = {"bf16": dense, **{label: copy.deepcopy(dense) for label in configs}}
    for label, config in configs.items():
        quantize_model(models[label], config, progress=False)
    models |= {folder.name: load(folder).eval() for folder in checkpoints}
    rows = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            rows += (decode_compiled if compiled else decode)(models, ids, tokens)
        if compiled:  # llama.cpp is beside the others
            continue
        try:
            rate = llama_rate(gguf, threads, tokens)
        except ImportError:
            print("llama.cpp: not measured (llama-cpp-python is not installed)")
            continue
        rows.append(dict(model=f"llama.cpp {gguf.name}", threads=threads, tokens_per_s=round(rate, 2)))
        print(rows[-1], flush=True)
    return rows


def complete(report: dict, path: Path) -> None:
    """Adds what an earlier run left in the file, but for cells that were measured again."""
    if not path.exists():
        return
    names = [name for name in ("rows", "columns", "tokens", "model", "threads") if name in report["cells"][0]]
    again = {tuple(cell[name] for name in names) for cell in report["cells"]}
    earlier = json.loads(path.read_text(encoding="utf-8"))["cells"]
    report["cells"] += [cell for cell in earlier if tuple(cell[name] for name in names) not in again]
    report["cells"].sort(key=lambda cell: [cell[name] for name in names if name != "model"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "model"))
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES), help="whose layers")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.3, help="per kind of layer")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], help="saved models, in turns with the others")
    parser.add_argument("--compile", action="store_true", help="the model's step")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    command = "python benchmarks/cpu.py layers"
    report: dict = dict(**machine(), command=command, cells=[])
    if arguments.what == "model":
        report["command"] = f"python benchmarks/cpu.py model --gguf {arguments.gguf.name}"
        if arguments.compile:
            report["command"] += " --compile"
        report["cells"] = whole_model(arguments.gguf, 32, arguments.threads, arguments.compile, arguments.checkpoints)
    else:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name in arguments.models:
                for rows, columns in SHAPES[name]:
                    report["cells"] += measure(rows, columns, arguments.tokens, arguments.seconds)
    if arguments.output:
        complete(report, arguments.output)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if arguments.what == "layers":
            arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
