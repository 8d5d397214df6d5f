"""Imports point one way, importing the package is free of side effects, and the public names are exactly these."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import turboquant_weights

PACKAGE = Path(turboquant_weights.__file__).parent

# A module may import from lower levels only, and from its own package (kernels, integrations, cli).
LEVELS = [
    {"config", "errors"},
    {"packing", "rotation", "codebook"},
    {"reference"},
    {"kernels", "cpu", "int4"},
    {"transforms"},
    {"ops"},
    {"planes"},
    {"linear", "embedding"},
    {"experts", "graded"},
    {"tying"},
    {"feedback"},
    {"stream", "replay"},
    {"tail"},
    {"calibration", "sensitivity", "allocation"},
    {"model", "fusion"},
    {"budget", "resume"},
    {"quantize"},
    {"header"},
    {"writer"},
    {"checkpoint"},
    {"partial", "modules"},
    {"evaluation"},
    {"integrations"},
    {"cli", "lm_eval", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# Who may import a heavy library, directly or inside a function.
MAY_IMPORT = {
    "triton": {"kernels"},
    "transformers": {"integrations", "cli"},
    "vllm": {"integrations"},
    "peft": {"integrations"},
    "typer": {"cli"},
    "rich": {"cli"},
}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth; imports for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = ["turboquant_weights", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = _part(path)
    assert part in LEVEL, f"{part} has no place in the order of modules: give it one here"
    for name in _imports(path):
        top, _, rest = name.partition(".")
        if top == "turboquant_weights":
            imported = rest.split(".")[0]
            if imported in LEVEL and imported != part:
                assert LEVEL[imported] <= LEVEL[part], f"{path.name} imports {name}, which stands above it"
        elif top in MAY_IMPORT:
            assert part in MAY_IMPORT[top], f"{path.name} imports {top}: only {MAY_IMPORT[top]} may"


def test_the_package_itself_imports_nothing_heavy_at_the_top_of_evaluation():
    assert not {name for name in _imports(PACKAGE / "evaluation.py") if name.startswith("transformers")}


def test_importing_has_no_side_effects():
    code = """
import sys
import turboquant_weights
heavy = {"triton", "transformers", "accelerate", "peft", "typer", "rich", "gguf", "vllm"} & set(sys.modules)
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_the_plugin_of_vllm_is_silent_without_vllm():
    """Importing or calling its entry point does nothing then."""
    code = """
import sys
sys.modules["vllm"] = None  # as if it were not installed, also where it is
from turboquant_weights.integrations.vllm import register
register()
register()
assert not [name for name in sys.modules if name.startswith("vllm.")]
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_public_names():
    assert sorted(turboquant_weights.__all__) == [
        "BitPlan",
        "Calibration",
        "ConfigError",
        "FormatError",
        "LayerReport",
        "MergeReport",
        "QuantizationError",
        "QuantizationReport",
        "ScheduleError",
        "TurboQuantConfig",
        "TurboQuantEmbedding",
        "TurboQuantError",
        "TurboQuantExperts",
        "TurboQuantLinear",
        "convert_checkpoint",
        "fuse_projections",
        "load",
        "merge_report",
        "plan_bits",
        "quantize_checkpoint",
        "quantize_model",
        "save",
        "unfuse_projections",
    ]
    for name in turboquant_weights.__all__:
        assert getattr(turboquant_weights, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("first", ["transformers", "turboquant_weights"])
def test_registers_in_either_order(first):
    """Also when Transformers' registry is imported already, and never twice."""
    second = {"transformers": "turboquant_weights", "turboquant_weights": "transformers"}[first]
    code = f"""
import importlib
import {first}
if {first == "transformers"}:
    import transformers.quantizers.auto
import {second}
import transformers.quantizers.auto as auto
assert "turboquant_weights" in auto.AUTO_QUANTIZER_MAPPING
importlib.reload(importlib.import_module("turboquant_weights.integrations")).register_lazily()
config = auto.AutoQuantizationConfig.from_dict({{"quant_method": "turboquant_weights", "bits": 3}})
assert type(config) is __import__("turboquant_weights").TurboQuantConfig and config.bits == 3
from turboquant_weights.model import on_quantized
assert len(on_quantized) == 1, on_quantized
"""
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
