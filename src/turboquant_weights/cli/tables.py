"""Results as tables for people; ``--json`` prints the same facts for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..checkpoint import CheckpointInfo
from ..evaluation import Evaluation


def megabytes(size: int) -> str:
    """``12.3 MB`` (a million bytes)."""
    return f"{size / 1e6:,.1f} MB"


def console() -> Console:
    """Standard output. In a pipe rich would assume 80 columns and cut names short."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns after the first hold numbers."""
    out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i else "left", no_wrap=True, overflow="fold")
    return out


def checkpoint_dict(info: CheckpointInfo, errors: dict[str, float] | None = None) -> dict[str, Any]:
    """JSON-able form of what ``inspect`` shows; ``errors`` by layer where they are known."""
    return {
        "checkpoint": str(info.folder),
        "architecture": info.architecture,
        "config": info.config.to_dict(),
        "bits_per_weight": info.bits_per_weight,
        "quantized_bytes": info.quantized_bytes,
        "other_bytes": info.other_bytes,
        "files": info.files,
        "has_manifest": info.has_manifest,
        "layers": [{**dataclasses.asdict(layer), "error": (errors or {}).get(layer.name)} for layer in info.layers],
        "others": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": t.nbytes} for t in info.others],
    }


def print_checkpoint(info: CheckpointInfo, errors: dict[str, float] | None = None) -> None:
    """Settings, one line per layer, then the sizes."""
    out = console()
    config = info.config
    out.print(
        f"{info.folder}: {info.architecture}, {config.label} bits, groups of {config.group_size}, seed {config.seed}, "
        f"format version {config.format_version}"
    )
    for key, value in (config.source or {}).items():
        out.print(f"  {key}: {value}", markup=False)
    layers = table(
        "quantized layer", "bits", "rows", "stored columns", "bytes", "bits/weight", *(["error"] if errors else [])
    )
    for layer in info.layers:
        per_weight = 8 * layer.nbytes / (layer.out_features * layer.columns)
        cells = [
            layer.name,
            layer.label,
            str(layer.out_features),
            str(layer.columns),
            f"{layer.nbytes:,}",
            f"{per_weight:.3f}",
        ]
        layers.add_row(*cells, *([f"{errors[layer.name]:.2e}"] if errors else []))
    out.print(layers)
    others = table("other tensor", "dtype", "shape", "bytes")
    for tensor in info.others:
        others.add_row(tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)), f"{tensor.nbytes:,}")
    out.print(others)
    for name in config.skip or ():
        out.print(f"left as it was: {name}", markup=False)
    out.print(
        f"{len(info.layers)} layers quantized: {megabytes(info.quantized_bytes)}, {info.bits_per_weight:.3f} bits per "
        f"weight; the rest {megabytes(info.other_bytes)}; files {megabytes(info.total_bytes)}"
    )


def print_evaluations(results: dict[str, Evaluation], title: str) -> None:
    """One line per model."""
    scores = table("model", "perplexity", "KL mean (nats)", "KL 99 %", "KL max", "top-1", title=title)
    for name, result in results.items():
        scores.add_row(name, f"{result.perplexity:.3f}", *distance_cells(result))
    console().print(scores)


def distance_cells(result: Evaluation) -> list[str]:
    """KL mean with standard error, 99th percentile, maximum and top-1; dashes for a model compared with nothing."""
    if result.kl_mean is None or result.kl_p99 is None or result.kl_max is None or result.top1 is None:
        return ["-"] * 4
    return [
        f"{result.kl_mean:.5f} ± {result.kl_stderr:.5f}",
        f"{result.kl_p99:.4f}",
        f"{result.kl_max:.3f}",
        f"{result.top1:.1%}",
    ]
