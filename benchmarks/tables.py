"""Prints those README tables that come from result files as they are: quality, quantizing, embeddings, CPUs, vLLM. linear.py
and decode.py write theirs.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import pathlib
import statistics

RESULTS = pathlib.Path(__file__).parent / "results"


def quality_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of one result of quality.py: the main text in full, perplexity and KL of the others."""
    record = json.loads(path.read_text())
    main, *others = record["texts"]
    heads = ["method", "bits per weight", "whole file", "perplexity", "KL, nats (range over seeds)", "top-1"]
    for text in others:
        heads += [f"{text}: perplexity", "KL"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in record["rows"]:
        cells = [row["method"], f"{statistics.mean(row['bits']):.3f}", f"{statistics.mean(row['ratio']):.2f}x"]
        for text in (main, *others):
            score, base = row["scores"][text], record["texts"][text]["reference_perplexity"]
            cells.append(f"{100 * (statistics.mean(score['perplexity']) / base - 1):+.2f} %")
            cells.append(_kl(score["kl_mean"], spread=text == main))
            if text == main:
                cells.append(f"{statistics.mean(score['top1']):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _kl(values: list[float], spread: bool) -> str:
    digits = 4 if statistics.mean(values) >= 0.01 else 5
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if spread and len(values) > 1 else "")


def speed_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of one result of quantize_speed.py."""
    record = json.loads(path.read_text())
    lines = ["| bits | seconds | stored bits per weight |", "|---|---|---|"]
    return lines + [f"| {r['setting']} | {r['seconds']:.1f} | {r['bits_per_weight']:.3f} |" for r in record["rows"]]


def embedding_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of one result of `embedding.py quality`."""
    lines = [
        "| bits of the embedding | bits per weight | whole model | perplexity | KL, nats | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads(path.read_text())["rows"]:
        cells = [row["bits"], f"{row['bits_per_weight']:.3f}", f"{row['whole_model_ratio']:.2f}x", row["perplexity"]]
        lines.append("| " + " | ".join([*cells, f"{row['kl']:.5f}", f"{row['top1']:.3f}"]) + " |")
    return lines


def vllm_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of one result of `vllm_throughput.py measure`."""
    rows = json.loads(path.read_text())["rows"]
    loads = [key for key in next(iter(rows.values())) if key.endswith("tokens/s")]
    lines = [f"| weights | file, MB | {' | '.join(loads)} |", "|---|---|" + "---|" * len(loads)]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['file_MB']:.0f} | " + " | ".join(f"{row[load]:.0f}" for load in loads) + " |")
    return lines


def cpu_layers_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of a part of `cpu.py layers`: the layers of a 7B model."""
    names = ("4 avx512", "4 avx2", "4+4 avx512", "4+4 avx2")
    lines = ["| rows x columns | threads | m | torch bf16, ms | read 4, ms | " + " | ".join(names) + " |", "|---" * 9 + "|"]
    for cell in json.loads(path.read_text())["cells"]:
        if {cell["rows"], cell["columns"]} - {18944, 3584} or cell["tokens"] not in (1, 16, 128):
            continue
        ms = cell["ms"]
        speeds = [f"{ms['torch bf16'] / ms[name]:.2f} ({ms[name]:.3g})" for name in names]
        first = [f"{cell['rows']} x {cell['columns']}", str(cell["threads"]), str(cell["tokens"])]
        lines.append("| " + " | ".join([*first, f"{ms['torch bf16']:.2f}", f"{ms['read']:.2f}", *speeds]) + " |")
    return lines


def cpu_decode_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of `cpu.py model`."""
    rows = json.loads(path.read_text())["cells"]
    rate = {(row["model"].split()[0], row["threads"]): row["tokens_per_s"] for row in rows}
    others = [name for name in ("bf16", "llama.cpp") if any(name == other for other, _ in rate)]
    heads = ["model", "threads", "tokens/s", *(f"of {name}" for name in others)]
    heads += ["ms in the engine", "around it", "elsewhere"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row['tokens_per_s'] / rate[other, row['threads']]:.2f}" for other in others]
        cells += [f"{row[name]:.1f}" if name in row else "" for name in ("engine_ms", "around_engine_ms", "elsewhere_ms")]
        lines.append("| " + " | ".join([row["model"], str(row["threads"]), f"{row['tokens_per_s']:.1f}", *cells]) + " |")
    return lines


def cpu_compiled_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of `cpu.py model --compile`."""
    lines = ["| model, compiled | threads | tokens/s | of bf16 | ms per token |", "|---" * 5 + "|"]
    rows = json.loads(path.read_text())["cells"]
    dense = {row["threads"]: row["tokens_per_s"] for row in rows if row["model"] == "bf16, compiled"}
    for row in rows:
        rate = row["tokens_per_s"]
        cells = [row["model"].removesuffix(", compiled"), str(row["threads"]), f"{rate:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{rate / dense[row['threads']]:.2f}", f"{row['ms']:.1f}"]) + " |")
    return lines


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        if path.name.startswith("quality-"):
            print(path.name, *quality_table(path), "", sep="\n")
        elif path.name.startswith("quantize-speed-"):
            print(path.name, *speed_table(path), "", sep="\n")
        elif path.name.startswith("embedding-quality"):
            print(path.name, *embedding_table(path), "", sep="\n")
        elif path.name.startswith("vllm-throughput"):
            print(path.name, *vllm_table(path), "", sep="\n")
        elif path.name == "cpu-layers.json":
            print(path.name, *cpu_layers_table(path), "", sep="\n")
        elif path.name.startswith("cpu-model-compiled"):
            print(path.name, *cpu_compiled_table(path), "", sep="\n")
        elif path.name.startswith("cpu-model"):
            print(path.name, *cpu_decode_table(path), "", sep="\n")


if __name__ == "__main__":
    main()
