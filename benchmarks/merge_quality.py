"""Puts results of quality.py together that were measured in parts: other rows, or other seeds of the same rows.

    python benchmarks/merge_quality.py part0.json part1.json --out all.json

The parts must agree in everything but rows and command: model, texts, reference perplexity, hardware, versions. With
--allow-hardware parts from other machines are taken too, where the reference's perplexity agrees to 1e-4; each row then
says where it was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from typing import Any

# Lists with one entry per seed.
_PER_SEED = ("seeds", "bits", "bytes", "ratio", "error", "seconds")
_ENVIRONMENT = ("hardware", "torch", "transformers")


def merge(records: list[dict[str, Any]], allow_hardware: bool = False) -> dict[str, Any]:
    first = records[0]
    for record in records[1:]:
        for key in ("model", "turboquant_weights", *(() if allow_hardware else _ENVIRONMENT)):
            if record[key] != first[key]:
                raise ValueError(f"the parts differ in {key}: {first[key]!r} and {record[key]!r}")
        for text, base in first["texts"].items():
            other = record["texts"].get(text, {})
            if any(base[key] != other.get(key) for key in ("windows", "length")):
                raise ValueError(f"the parts differ in the text {text!r}: {base} and {other}")
            if not math.isclose(base["reference_perplexity"], other["reference_perplexity"], rel_tol=1e-4):
                raise ValueError(f"the parts have references of other perplexity on {text!r}: {base} and {other}")
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        for row in record["rows"]:
            if allow_hardware:
                row = row | {"environment": ", ".join(f"{key} {record[key]}" for key in _ENVIRONMENT)}
            rows[row["method"]] = _joined(rows[row["method"]], row) if row["method"] in rows else row
    return first | {"command": "; ".join(record["command"] for record in records), "rows": list(rows.values())}


def _joined(row: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if set(row["seeds"]) & set(more["seeds"]):
        raise ValueError(f"{row['method']} has the seeds {row['seeds']} in one part and {more['seeds']} in another")
    joined = row | {key: row[key] + more[key] for key in _PER_SEED}
    joined["scores"] = {
        text: {figure: values + more["scores"][text][figure] for figure, values in scores.items()}
        for text, scores in row["scores"].items()
    }
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--allow-hardware", action="store_true")
    args = parser.parse_args()
    merged = merge([json.loads(path.read_text(encoding="utf-8")) for path in args.parts], args.allow_hardware)
    args.out.write_text(json.dumps(merged, indent=1) + "\n")


if __name__ == "__main__":
    main()
