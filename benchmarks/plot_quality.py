"""Draws quality against size from results of quality.py.

    python benchmarks/plot_quality.py benchmarks/results/quality-{smollm2-h100,{calibrated,whole-file}-smollm2-h200}.json \\
        benchmarks/results/quality-peers-smollm2-cpu.json --out benchmarks/results/quality-smollm2.svg

Across: bits per parameter of the whole model, everything counted (bf16 is 16). Up: KL divergence from the reference on the
main text of the first result, logarithmic; mean of the seeds with their range. Results from several machines belong
together if the reference's perplexity agrees to 1e-4; of a row that several have, the first counts. Needs matplotlib (the
extra "bench").
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Pattern of a row's name -> legend, colour, marker, and whether its points are joined. The first that fits counts.
GROUPS: tuple[tuple[str, str, str, str, bool], ...] = (
    ("whole file", "ours, calibrated, whole model under a budget", "#c0392b", "*", True),
    (", calibrated", "ours, calibrated, linear layers", "#e67e22", "o", True),
    ("ours", "ours, data-free, linear layers", "#2c6fbb", "o", True),
    ("imatrix", "llama.cpp with imatrix (favoured: blocks of 32)", "#1e8449", "s", False),
    ("llama.cpp", "llama.cpp (favoured: blocks of 32)", "#58b27c", "s", False),
    ("GPTQ", "GPTQ", "#7d3c98", "^", False),
    ("HQQ", "HQQ", "#b9770e", "v", False),
    ("NF4", "NF4", "#616a6b", "D", False),
    ("RTN", "integer RTN", "#a6acaf", "D", False),
)
# Beyond this a model says nothing sensible any more.
LARGEST_KL = 1.0


def group(method: str) -> tuple[str, str, str, str, bool]:
    return next(entry for entry in GROUPS if entry[0] in method)


def short(method: str) -> str:
    for word in ("ours ", "llama.cpp ", ", calibrated", ", imatrix", " whole file", "integer RTN", "GPTQ", "HQQ", "NF4"):
        method = method.replace(word, "")
    return method.strip(", ")


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first record with the rows of the others."""
    first = records[0]
    text, base = next(iter(first["texts"].items()))
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        other = record["texts"][text]
        if record["model"] != first["model"] or (other["windows"], other["length"]) != (base["windows"], base["length"]):
            raise SystemExit(f"the results are of other models or windows: {record['command']}")
        if not math.isclose(other["reference_perplexity"], base["reference_perplexity"], rel_tol=1e-4):
            raise SystemExit(f"the reference has another perplexity here: {record['command']}")
        for row in record["rows"]:
            rows.setdefault(row["method"], row)
    hardware = ", ".join(dict.fromkeys(record["hardware"] for record in records))
    return first | {"rows": list(rows.values()), "hardware": hardware, "date": max(record["date"] for record in records)}


def draw(record: dict[str, Any], path: pathlib.Path) -> None:
    text = next(iter(record["texts"]))
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    for entry in GROUPS:
        _, legend, colour, marker, joined = entry
        rows = [row for row in record["rows"] if group(row["method"]) == entry]
        points = []
        for row in rows:
            kl = row["scores"][text]["kl_mean"]
            if statistics.mean(kl) <= LARGEST_KL:
                points.append(
                    (16 / statistics.mean(row["ratio"]), statistics.mean(kl), min(kl), max(kl), short(row["method"]))
                )
        if not points:
            continue
        points.sort()
        x, y, low, high, names = zip(*points, strict=True)
        errors = [
            [mean - least for mean, least in zip(y, low, strict=True)],
            [top - mean for mean, top in zip(y, high, strict=True)],
        ]
        axes.errorbar(
            x, y, yerr=errors, label=legend, color=colour, marker=marker, markersize=9 if marker == "*" else 6,
            linestyle="-" if joined else "none", linewidth=1, capsize=2,
        )  # fmt: skip
        for place_x, place_y, name in zip(x, y, names, strict=True):
            axes.annotate(name, (place_x, place_y), xytext=(6, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.set_yscale("log")
    axes.set_xlabel("bits per parameter of the whole model (bf16: 16)")
    axes.set_ylabel("KL divergence from the reference, nats per token")
    axes.grid(which="major", linewidth=0.4, alpha=0.5)
    base = record["texts"][text]
    axes.set_title(
        f"{record['model'].split('.')[0]}, {text}, {base['windows']} windows of {base['length']} tokens "
        f"({record['date']}, {record['hardware']})",
        fontsize=9,
    )
    axes.legend(fontsize=7)
    # The same figures give the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "turboquant-weights"
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="an .svg or .png file")
    args = parser.parse_args()
    draw(together([json.loads(path.read_text(encoding="utf-8")) for path in args.results]), args.out)


if __name__ == "__main__":
    main()
