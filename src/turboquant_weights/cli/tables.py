"""Results as tables for people; ``--json`` prints the same facts for programs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..allocation import Allocation
from ..budget import BitPlan
from ..checkpoint import CheckpointInfo
from ..config import EmbeddingBits, is_graded
from ..errors import ConfigError
from ..evaluation import Evaluation

if TYPE_CHECKING:
    from ..integrations.conversion import ConversionReport


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


def print_conversion(report: ConversionReport) -> None:
    """The error of each matrix, then the whole."""
    out = console()
    matrices = table("matrix", "relative squared error")
    for name, error in report.layers.items():
        matrices.add_row(name, f"{error:.2e}")
    out.print(matrices)
    out.print(str(report), markup=False)


def checkpoint_dict(info: CheckpointInfo, errors: dict[str, float] | None = None) -> dict[str, Any]:
    """JSON-able form of what ``inspect`` shows; ``errors`` by layer where they are known."""
    return {
        "checkpoint": str(info.folder),
        "architecture": info.architecture,
        "config": info.config.to_dict(),
        "bits_per_weight": info.bits_per_weight,
        "quantized_bytes": info.quantized_bytes,
        "other_bytes": info.other_bytes,
        "dense_bytes": info.dense_bytes(),
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
        per_weight = 8 * layer.nbytes / layer.weights
        cells = [
            layer.name if layer.kind == "linear" else f"{layer.name} ({layer.kind})",
            layer.label,
            f"{layer.experts} x {layer.out_features}" if layer.kind == "experts" else str(layer.out_features),
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
    kinds = info.dense_bytes()
    if kinds:
        out.print("not quantized: " + ", ".join(f"{megabytes(size)} {kind}" for kind, size in kinds.items()))
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


# Rows of the table of `plan`: from little loss to much.
_RATIOS = (2.0, 2.5, 3.0, 3.2, 3.5, 3.7, 4.0, 4.5, 5.0, 6.0)


def ladder(plan: BitPlan) -> list[Allocation]:
    """What the ratios of the table give, as far as they are possible."""
    best = plan.curve()[0].ratio
    return [plan.allocate(target_ratio=ratio) for ratio in _RATIOS if ratio <= best]


def plan_dict(model: str, plan: BitPlan, allocations: Sequence[Allocation]) -> dict[str, Any]:
    """JSON-able form of what ``plan`` shows."""
    return {
        "model": model,
        "measured_on": "text" if plan.measured else "random tokens",
        "rounding": "calibrated" if plan.calibrated else "data-free",
        "parameters": plan.parameters,
        "dense_bytes": plan.dense_bytes,
        "units": [
            {"names": list(unit.names), "weights": unit.weights, "sensitivity": unit.sensitivity} for unit in plan.units
        ],
        "allocations": [
            {
                "ratio": a.ratio,
                "bits_per_parameter": 8 * a.total_bytes / plan.parameters,
                "total_bytes": a.total_bytes,
                "expected_kl": a.expected_kl,
                "bits": {name: None if bits is None else list(bits) for name, bits in a.bits.items()},
            }
            for a in allocations
        ],
    }


def print_plan(model: str, plan: BitPlan, allocations: Sequence[Allocation], layers: bool) -> None:
    """One line per allocation, then the layers of the last one if wanted."""
    out = console()
    rows = table("times smaller", "bits/parameter", "file", "expected KL (nats)", "embedding", "layers (bits: count)")
    for allocation in allocations:
        kinds = collections.Counter(
            bits_label(bits) for name, bits in allocation.bits.items() if name not in plan.embeddings
        )
        rows.add_row(
            f"{allocation.ratio:.2f}",
            f"{8 * allocation.total_bytes / plan.parameters:.3f}",
            megabytes(allocation.total_bytes),
            f"{allocation.expected_kl:.5f}",
            ", ".join(bits_label(allocation.bits[name]) for name in sorted(plan.embeddings)) or "-",
            "  ".join(f"{label}: {kinds[label]}" for label in sorted(kinds)),
        )
    out.print(f"{model}: {plan.parameters / 1e6:,.1f} M parameters, {megabytes(plan.dense_bytes)} in bf16", markup=False)
    out.print(rows)
    if layers:
        each = table("layer", "bits", "weights", "sensitivity (nats per unit of error)")
        for unit in plan.units:
            for name in unit.names:
                label = bits_label(allocations[-1].bits[name])
                each.add_row(
                    name, label, f"{unit.weights:,}", f"{unit.sensitivity:.4f}" + " (shared)" * (len(unit.names) > 1)
                )
        out.print(each)
    if plan.measured:
        out.print("For calibrated rounding; sensitivities from a text. Check the result with `turboquant-weights eval`.")
    else:
        out.print(
            "For data-free rounding; sensitivities from random tokens, which rank layers but do not predict the loss. "
            "Add --calibrate for figures to rely on."
        )


def bits_label(bits: EmbeddingBits | None) -> str:
    """``4``, ``4+2`` or ``bf16``; of grades with their shares of the rows: ``4+2 (12 %), 4 (88 %)``."""
    if bits is None:
        return "bf16"
    if is_graded(bits):
        total = sum(rows for rows, _, _ in bits)  # type: ignore[misc]
        return ", ".join(f"{bits_label((b, r))} ({100 * rows / total:.0f} %)" for rows, b, r in bits)  # type: ignore[misc]
    return f"{bits[0]}+{bits[1]}" if bits[1] else str(bits[0])


def check_plot(path: Path) -> None:
    """Finds what would keep :func:`plot_plan` from writing ``path``.

    Raises:
        ConfigError: no matplotlib, no such kind of file, or no such folder.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install 'turboquant-weights[plot]'") from None
    matplotlib.use("Agg")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}")


def plot_plan(plan: BitPlan, path: Path, title: str) -> None:
    """Draws size against expected KL divergence, from 2 bits everywhere to bf16."""
    check_plot(path)
    import matplotlib.pyplot as plt

    curve = [point for point in plan.curve() if point.expected_kl > 0]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([8 * point.total_bytes / plan.parameters for point in curve], [point.expected_kl for point in curve])
    axes.set(
        xlabel="bits per parameter, whole file",
        ylabel="expected KL divergence (nats per token)",
        yscale="log",
        title=f"{title}: {'calibrated' if plan.calibrated else 'data-free'} rounding",
    )
    axes.axvline(5.0, linewidth=0.8, linestyle=":", color="gray")
    axes.annotate("3.2x smaller", (5.0, axes.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8, color="gray")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
