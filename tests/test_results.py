"""The README's tables are those of the committed result files."""

import importlib
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))


def check(lines):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in lines if line not in readme]
    assert not missing, "run `python benchmarks/tables.py` and put its output into README.md"


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-h100",
        "calibrated-smollm2-h200",
        "whole-file-smollm2-h200",
        "whole-file-wikitext-smollm2-h200",
        "peers-smollm2-cpu",
        "gemma3-h100",
        "gemma3-calibrated-h200",
    ],
)
def test_quality(name):
    check(TABLES["quality_table"](ROOT / f"benchmarks/results/quality-{name}.json"))


def test_quantization_speed():
    check(TABLES["speed_table"](ROOT / "benchmarks/results/quantize-speed-h100.json"))


def test_embeddings():
    check(TABLES["embedding_table"](ROOT / "benchmarks/results/embedding-quality-cpu.json"))


def test_kernel_speed():
    lines = (ROOT / "benchmarks/results/linear-h100.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 13
    check(rows)
    lines = (ROOT / "benchmarks/results/linear-bits-h100.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| 18944 x 3584 |")]
    assert len(rows) == 7
    check(rows)


def test_first_tokens(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks/results/first-token-h200.json"
    table = importlib.import_module("first_token").table(json.loads(path.read_text(encoding="utf-8")))
    assert table == path.with_suffix(".md").read_text(encoding="utf-8")
    check([line for line in table.splitlines() if line.startswith("|")])


def test_activations_of_8_bits():
    """The README's sentence has the KL divergences of both runs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    means = []
    for name in ("int8", "bfloat16"):
        report = json.loads((ROOT / f"benchmarks/results/quality-{name}-smollm2-h200.json").read_text(encoding="utf-8"))
        scores = [row["scores"]["wiki.test"]["kl_mean"] for row in report["rows"]]
        means.append([sum(values) / len(values) for values in scores])
    (a, b, c), (d, e, f) = means
    wanted = f"{a:.3f} instead of {d:.3f} at 4 bits, {b:.4f} instead of {e:.4f} at 4+2, {c:.4f} instead of {f:.4f} at 4+4"
    assert f"KL divergence {wanted}" in readme


@pytest.mark.parametrize("name", ["decode-h100", "decode-compiled-h100", "decode-compiled-again-h100", "decode-h200"])
def test_decoding_speed(name, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / f"benchmarks/results/{name}.json"
    table = importlib.import_module("decode").table(json.loads(path.read_text(encoding="utf-8")))
    assert table == path.with_suffix(".md").read_text(encoding="utf-8")
    if "again" not in name:  # the README links to it
        check([line for line in table.splitlines() if line.startswith("|")])


def test_cpu_speed():
    check(TABLES["cpu_layers_table"](ROOT / "benchmarks/results/cpu-layers.json"))
    for name in ("cpu-model", "cpu-model-cascade-lake", "cpu-model-whole-file-cascade-lake"):
        check(TABLES["cpu_decode_table"](ROOT / f"benchmarks/results/{name}.json"))
    check(TABLES["cpu_compiled_table"](ROOT / "benchmarks/results/cpu-model-compiled-cascade-lake.json"))


def test_serving_speed():
    check(TABLES["vllm_table"](ROOT / "benchmarks/results/vllm-throughput-cpu.json"))
