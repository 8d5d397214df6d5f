"""Throughput of vLLM on CPUs: bf16, ours, and what vLLM's CPU build has for int8 and int4. Same prompts, same threads.

    python benchmarks/vllm_throughput.py prepare FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/vllm_throughput.py measure FOLDER --output benchmarks/results/vllm-throughput-cpu.json

`prepare` writes one checkpoint per row. The peers' weights are rounded to nearest: nothing here is about quality.
`measure` starts vLLM's engine in this process for one row after the other, without compilation (which takes minutes for
every row on two cores), takes the faster of two runs of each load, and adds its rows to the file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu import machine
from torch import Tensor, nn

# Requests, prompt tokens and new tokens of each; what is counted.
LOADS = {
    "1 request, tokens/s": (1, 32, 32, "new"),
    "16 requests, tokens/s": (16, 32, 32, "new"),
    "prompts, tokens/s": (4, 256, 1, "prompt"),
}
GROUP = 64  # divides SmolLM2's 576 columns


def ours(model: nn.Module, folder: Path, **settings: object) -> None:
    from turboquant_weights import TurboQuantConfig, quantize_model, save

    quantize_model(model, TurboQuantConfig(**settings), progress=False)
    save(model, folder)  # type: ignore[arg-type]


def write_peer(
    model: nn.Module, folder: Path, settings: dict, tensors_of: Callable[[str, Tensor], dict[str, Tensor]]
) -> None:
    """A checkpoint of another method: the decoder's linear layers replaced by ``tensors_of(name, weight)``."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)  # type: ignore[operator]
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            state.update(tensors_of(name, state.pop(f"{name}.weight").float()))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}), encoding="utf-8")


def int8(model: nn.Module, folder: Path) -> None:
    """compressed-tensors W8A8: a scale per row, activations rounded to int8 token by token."""

    def tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return {f"{name}.weight": codes, f"{name}.weight_scale": scale.bfloat16()}

    def spec(strategy: str, dynamic: bool) -> dict:
        return dict(num_bits=8, type="int", symmetric=True, strategy=strategy, dynamic=dynamic)

    group = dict(targets=["Linear"], weights=spec("channel", False), input_activations=spec("token", True))
    settings = dict(
        quant_method="compressed-tensors", format="int-quantized", config_groups={"group_0": group}, ignore=["lm_head"]
    )
    write_peer(model, folder, settings, tensors)


def gptq(model: nn.Module, folder: Path) -> None:
    """GPTQ's format, 4 bits, a scale per 64 columns."""

    def tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        groups = weight.view(rows, -1, GROUP)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = ((groups / scale).round().clamp(-8, 7) + 8).long().view(rows, columns // 8, 8)
        packed = (codes << torch.arange(0, 32, 4)).sum(-1).T  # [columns / 8, rows], the first column in the lowest bits
        zeros = torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32)
        return {
            f"{name}.qweight": torch.where(packed >= 2**31, packed - 2**32, packed).int(),
            f"{name}.scales": scale[..., 0].T.bfloat16(),
            f"{name}.qzeros": zeros,
            f"{name}.g_idx": torch.arange(columns).int() // GROUP,
        }

    settings = dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=True, checkpoint_format="gptq")
    write_peer(model, folder, settings, tensors)


ROWS: dict[str, Callable[[nn.Module, Path], None]] = {
    "bf16": lambda model, folder: model.save_pretrained(folder),  # type: ignore[operator]
    "ours 4": lambda model, folder: ours(model, folder, bits=4),
    "ours 4+4": lambda model, folder: ours(model, folder, bits=4, residual_bits=4),
    "ours 4, embedding and head 4+2": lambda model, folder: ours(model, folder, embeddings={"*.embed_tokens": (4, 2)}),
    "int8 W8A8 (compressed-tensors)": int8,
    "int4 (GPTQ format)": gptq,
}


def prepare(folder: Path, gguf: Path) -> None:
    from turboquant_weights.integrations.transformers import load_dense

    model, _ = load_dense(gguf, dtype=torch.bfloat16)
    for index, (name, write) in enumerate(ROWS.items()):
        write(copy.deepcopy(model), folder / str(index))
        print(name, flush=True)


def measure_row(folder: Path, threads: int) -> dict:
    """Tokens per second of each load, and the bytes of all parameters."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(folder), dtype="bfloat16", max_model_len=512, gpu_memory_utilization=0.2, skip_tokenizer_init=True,
        enable_prefix_caching=False, max_num_seqs=16, enforce_eager=True,
    )  # fmt: skip
    out: dict = {}
    for load, (requests, prompt, new, counted) in LOADS.items():
        generator = torch.Generator().manual_seed(0)
        prompts = [
            {"prompt_token_ids": torch.randint(100, 40000, (prompt,), generator=generator).tolist()} for _ in range(requests)
        ]
        seconds = []
        for tokens in (1, new, new):  # the first one warms up
            sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            results = llm.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
            assert all(len(result.outputs[0].token_ids) == tokens for result in results)
        out[load] = round(requests * (new if counted == "new" else prompt) / min(seconds[1:]), 1)
    (out["MB"],) = llm.apply_model(parameter_megabytes)
    out["threads"] = torch.get_num_threads()
    assert out["threads"] == threads, out
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return out


def parameter_megabytes(model: nn.Module) -> float:
    # vLLM's dense layers on CPUs keep their weight in a layout of their own, outside of the parameters.
    tensors = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return round(sum(tensors.values()) / 1e6, 1)


def measure(folder: Path, names: list[str], threads: int, output: Path | None) -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output and output.exists() else {}
    for index, name in enumerate(ROWS):
        if name in names:
            start = time.perf_counter()
            rows[name] = measure_row(folder / str(index), threads)
            files = sum(path.stat().st_size for path in (folder / str(index)).glob("*.safetensors"))
            rows[name]["file_MB"] = round(files / 1e6, 1)
            print(name, rows[name], f"{time.perf_counter() - start:.0f} s", flush=True)
            if output:
                report = dict(
                    **machine(),
                    vllm=importlib.metadata.version("vllm-cpu"),
                    threads=threads,
                    command="python benchmarks/vllm_throughput.py measure FOLDER",
                    rows={known: rows[known] for known in ROWS if known in rows},
                )
                output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["prepare", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model that `prepare` reads")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.mode == "prepare":
        prepare(args.folder, args.gguf)
    else:
        measure(args.folder, args.rows, args.threads, args.output)


if __name__ == "__main__":
    main()
