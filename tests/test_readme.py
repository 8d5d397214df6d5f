"""Everything README.md tells people to run is run, with a tiny model in place of the real one.

```python blocks run in order in one namespace, inside an empty folder; ```python notest ones do not. In ```sh blocks the
``turboquant-weights`` lines run in the same folder (after the Python blocks), and ``make`` targets must exist.
"""

import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny_model

from turboquant_weights.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M"
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(info):
    """(line number, code) of each fenced block with this info string."""
    text = README.read_text(encoding="utf-8")
    found = [match for match in FENCE.finditer(text) if match["info"].strip() == info]
    return [(text.count("\n", 0, match.start()) + 2, match["code"]) for match in found]


def shell_lines():
    joined = "\n".join(code for _, code in blocks("sh") + blocks("bash")).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in joined.splitlines() if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """An empty current folder, and the tiny model beside it."""
    folder = tmp_path_factory.mktemp("readme")
    model = tiny_model.write(folder / "tiny")
    (folder / "work").mkdir()
    before, handler = Path.cwd(), signal.getsignal(signal.SIGTERM)
    os.chdir(folder / "work")
    yield str(model)
    os.chdir(before)
    signal.signal(signal.SIGTERM, handler)


def test_python_blocks_run(workspace):
    found = blocks("python")
    assert found, "README.md has no python block"
    namespace = {"__name__": "readme"}
    for line, code in found:
        # The line numbers of an error are those of README.md.
        exec(compile("\n" * (line - 1) + code.replace(MODEL, workspace), str(README), "exec"), namespace)


def test_commands_run(workspace, monkeypatch):
    commands = [shlex.split(line) for line in shell_lines() if line.startswith("turboquant-weights ")]
    assert commands, "README.md shows no command"
    for command in commands:
        monkeypatch.setattr(sys, "argv", [word.replace(MODEL, workspace) for word in command])
        with pytest.raises(SystemExit) as exit:
            main()
        assert not exit.value.code, command


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [word for line in shell_lines() if line.startswith("make ") for word in shlex.split(line)[1:] if "=" not in word]
    assert {"demo", "test"} <= set(shown), "README.md must show both commands"
    assert set(shown) <= set(targets)
