"""Peak memory of loading, against the floor: the quantized model plus its largest layer; and of quantizing a checkpoint that
is never loaded, and of converting the result to bf16, where the floor is the largest layer alone.

    python benchmarks/load_memory.py                   # a random bf16 Llama of 0.5 GB in shards of 100 MB
    python benchmarks/load_memory.py --megabytes 2000 --bits 4 --residual-bits 4
    python benchmarks/load_memory.py --device cuda     # adds the peak that PyTorch allocated on the GPU

Each way runs in a process of its own, and then every weight is read once. "anonymous" is the peak of the memory
that the process allocated, sampled every 2 ms; "resident" is the kernel's high-water mark (VmHWM), which also counts the
pages of the weight files that are mapped: the kernel drops those whenever it needs the space. Weights that stay as they are
on disk (all of them, in the first and last row) are never copied on a CPU. Both are above what the process used before
loading. Quantizing a layer takes a working space besides, of fixed size. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from cpu import machine

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 8192
WAYS = ("dense", "on the fly", "pre-quantized", "streamed", "converted")


def write_model(folder: Path, megabytes: int) -> None:
    """A Llama of about this size, random and in bf16; built without holding more than one copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    block = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((megabytes * 1e6 - 2 * VOCABULARY * HIDDEN) / block))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")
    finally:
        torch.set_default_dtype(default)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


class Sampler(threading.Thread):
    """Peak of RssAnon while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, memory("RssAnon"))


def measure(way: str, folder: str, bits: int, residual_bits: int, device: str) -> dict[str, float]:
    """Loads, or quantizes to another folder, once in this process; bytes and seconds."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  # imports the model code now

    import turboquant_weights as tq

    config = tq.TurboQuantConfig(bits=bits, residual_bits=residual_bits)
    warm_up = torch.nn.Linear(256, 256, device=device).bfloat16()  # threads, tables, BLAS buffers: not the model's
    tq.TurboQuantLinear.from_linear(warm_up, config)
    options = {"quantization_config": config} if way == "on the fly" else {}
    if device != "cpu":
        options["device_map"] = device
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    resident, anonymous = memory("VmRSS"), memory("RssAnon")
    sampler = Sampler()
    sampler.start()
    start = time.perf_counter()
    if way == "streamed":
        report = tq.quantize_checkpoint(folder, f"{folder}-streamed", config, device=device, progress=False)
        size, largest = 0, max(HIDDEN * VOCABULARY, HIDDEN * INTERMEDIATE) * 2
        assert len(report.layers) > 6
    elif way == "converted":
        tq.convert_checkpoint(folder, f"{folder}-bf16", progress=False)
        size, largest = 0, max(HIDDEN * VOCABULARY, HIDDEN * INTERMEDIATE) * 2
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        for parameter in model.parameters():  # mapped pages count once they are touched
            parameter.detach().view(torch.uint8).flatten()[::4096].sum()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        largest = max(m.in_features * m.out_features * 2 for m in model.modules() if isinstance(m, torch.nn.Linear))
    seconds = time.perf_counter() - start
    sampler.done.set()
    sampler.join()
    return {
        "model": size,
        "largest_layer": largest,
        "peak_device": 0 if device == "cpu" else torch.cuda.max_memory_allocated(),
        "peak_anonymous": sampler.peak - anonymous,
        "peak_resident": memory("VmHWM") - resident,
        "seconds": seconds,
    }


def run_all(megabytes: int, bits: int, residual_bits: int, device: str) -> dict[str, dict[str, float]]:
    """Each way in a fresh process, on one random model in a temporary folder."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        dense, quantized = Path(name) / "dense", Path(name) / "quantized"
        write_model(dense, megabytes)
        for way in WAYS:
            if way == "pre-quantized":
                code = (
                    "import turboquant_weights as tq, transformers as t, sys; "
                    f"tq.save(t.AutoModelForCausalLM.from_pretrained({str(dense)!r}, quantization_config="
                    f"tq.TurboQuantConfig(bits={bits}, residual_bits={residual_bits})), {str(quantized)!r})"
                )
                subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
            folder = quantized if way in ("pre-quantized", "converted") else dense
            command = [sys.executable, __file__, "--measure", way, str(folder)]
            command += ["--bits", str(bits), "--residual-bits", str(residual_bits), "--device", device]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[way] = json.loads(done.stdout.splitlines()[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--residual-bits", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.bits, args.residual_bits, args.device)))
        return
    results = run_all(args.megabytes, args.bits, args.residual_bits, args.device)
    print(f"{'MB':14} {'model':>8} {'+ layer':>8} {'anonymous':>10} {'resident':>9} {'GPU':>8} {'seconds':>8}")
    for way, r in results.items():
        floor = r["model"] + r["largest_layer"]
        columns = [r["model"], floor, r["peak_anonymous"], r["peak_resident"], r["peak_device"]]
        print(f"{way:14} " + " ".join(f"{c / 1e6:{w}.0f}" for c, w in zip(columns, (8, 8, 10, 9, 8), strict=True)), end="")
        print(f" {r['seconds']:8.1f}")
    if args.out:
        command = "load_memory.py " + " ".join(sys.argv[1:])
        figures = {"command": command, **machine(), "device": args.device, "bytes": results}
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
