"""Prints the README's quality tables from the result files, so that no figure is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import pathlib
import statistics

RESULTS = pathlib.Path(__file__).parent / "results"


def quality_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of one result of quality.py."""
    record = json.loads(path.read_text())
    base = record["reference_perplexity"]
    lines = ["| method | bits per weight | perplexity | KL, nats (range over seeds) | top-1 |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        change = 100 * (statistics.mean(row["perplexity"]) / base - 1)
        kl, digits = row["kl"], 4 if statistics.mean(row["kl"]) >= 0.01 else 5
        spread = f" ({min(kl):.{digits}f}-{max(kl):.{digits}f})" if len(kl) > 1 else ""
        lines.append(
            f"| {row['method']} | {row['bits']:.3f} | {change:+.2f} % "
            f"| {statistics.mean(kl):.{digits}f}{spread} | {statistics.mean(row['top1']):.3f} |"
        )
    return lines


def speed_table(path: pathlib.Path) -> list[str]:
    """Markdown lines of one result of quantize_speed.py."""
    record = json.loads(path.read_text())
    lines = ["| bits | seconds | stored bits per weight |", "|---|---|---|"]
    return lines + [f"| {r['setting']} | {r['seconds']:.1f} | {r['bits_per_weight']:.3f} |" for r in record["rows"]]


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        if path.name.startswith("quality-"):
            print(path.name, *quality_table(path), "", sep="\n")
        elif path.name.startswith("quantize-speed-"):
            print(path.name, *speed_table(path), "", sep="\n")


if __name__ == "__main__":
    main()
