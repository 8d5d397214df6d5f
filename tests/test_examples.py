"""The programs in examples/ run: as they are shown where they need no download, the others on a tiny model."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import tiny_model
from transformers import AutoTokenizer

import turboquant_weights as tq
from turboquant_weights.integrations.transformers import load_dense

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model.write(tmp_path_factory.mktemp("examples") / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example with arguments in an empty folder; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - {"chat.py", "lora.py"}))
def test_runs_without_arguments(name, tmp_path):
    done = subprocess.run([sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat(model, tmp_path, run):
    said = ("--say", "Hello", "--say", "Really?", "--max-new-tokens", 5)
    out = run("chat.py", model, "--bits", "4+1", *said)
    assert out.index("> Hello") < out.index("> Really?")
    dense, tokenizer = load_dense(model)
    tq.quantize_model(dense, tq.TurboQuantConfig(4, 1), progress=False)
    prompt = tokenizer("user: Hello\na:", return_tensors="pt")
    answer = dense.generate(**prompt, max_new_tokens=5)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() in out
    tq.save(dense, tmp_path / "quantized", tokenizer=tokenizer)
    again = run("chat.py", tmp_path / "quantized", *said)
    assert again.splitlines()[1:] == out.splitlines()[1:]


def test_lora(model, tmp_path, run):
    pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 12)
    out = run("lora.py", model, "--text", text, "--steps", 12, "--length", 32, "--output", "out")
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", out).groups())
    assert after < before - 0.05
    assert float(re.search(r"reloaded: ([\d.]+)", out)[1]) == pytest.approx(after, abs=2e-4)
    assert "adapters merged into 14 layers" in out
    assert float(re.search(r"merged into 4 bits: ([\d.]+)", out)[1]) < before
    assert float(re.search(r"then quantized: ([\d.]+)", out)[1]) < before
    tq.load(tmp_path / "out" / "merged")
