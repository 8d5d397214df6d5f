"""lm-eval on our checkpoints, by its own command line, with a task that needs no download. `make test-lm-eval` runs this."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: `make test-lm-eval` installs it and runs this file")

import tiny_model
from transformers import AutoTokenizer

import turboquant_weights as tq
from turboquant_weights.integrations.transformers import load_dense

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no", "maybe"]
metric_list: [{{metric: acc}}]
"""
QUESTIONS = ["Is it?", "Was it so?", "Will it be?", "Why?", "Who?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    model, tokenizer = load_dense(tiny_model.write(folder / "dense"))
    tq.quantize_model(model, tq.TurboQuantConfig(4, 2, embeddings={"model.embed_tokens": (4, 4)}), progress=False)
    tq.save(model, folder / "quantized", tokenizer=tokenizer)
    return folder / "quantized"


def run(folder, work):
    """The finished process and lm-eval's own samples."""
    (work / "task").mkdir()
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": i % 3}) + "\n" for i, q in enumerate(QUESTIONS)))
    (work / "task" / "tiny.yaml").write_text(TASK.format(data=data))
    command = [sys.executable, "-m", "turboquant_weights.lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},dtype=float32"]
    command += ["--tasks", "tiny_choice", "--include_path", str(work / "task"), "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(work / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    samples = [json.loads(line) for file in (work / "out").rglob("samples_*.jsonl") for line in file.open()]
    return done, samples


def test_scores_are_those_of_the_quantized_model(checkpoint, tmp_path):
    done, samples = run(checkpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    assert len(samples) == len(QUESTIONS)
    model = tq.load(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for sample in samples:
        for choice, (response, *_) in zip(("yes", "no", "maybe"), sample["resps"], strict=True):
            question = tokenizer(sample["doc"]["question"]).input_ids
            ids = torch.tensor([question + tokenizer(" " + choice).input_ids])
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)[0, len(question) - 1 : -1]
            expected = scores.gather(1, ids[0, len(question) :, None]).sum().item()
            assert math.isclose(float(response[0]), expected, rel_tol=1e-4)
