"""The command line as users meet it: exit codes, one clean line for an error, pure JSON on stdout, nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

import tiny_model  # noqa: E402
from tiny_checkpoint import snapshot  # noqa: E402

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.cli import main  # noqa: E402
from turboquant_weights.writer import ShardWriter  # noqa: E402


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(dense, tmp_path_factory):
    model, tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(dense),
        transformers.AutoTokenizer.from_pretrained(dense),
    )
    tq.quantize_model(model, tq.TurboQuantConfig(bits=3, residual_bits=2), progress=False)
    folder = tmp_path_factory.mktemp("checkpoint") / "quantized"
    tq.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["turboquant-weights", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        output = capsys.readouterr()
        return exit.value.code or 0, output.out, output.err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_quantize_equals_the_library(cli, dense, tmp_path):
    code, out, err = cli("quantize", dense, tmp_path / "out", "--bits", 3, "--residual-bits", 1, "--seed", 7, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["config"]["bits"] == 3
    assert "lm_head" in report["skipped"]
    assert report["folder_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    tq.quantize_model(model, tq.TurboQuantConfig(bits=3, residual_bits=1, seed=7), progress=False)
    loaded = tq.load(tmp_path / "out")
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [68, 69]


def test_quantize_prints_what_it_did(cli, dense, tmp_path):
    code, out, _ = cli("quantize", dense, tmp_path / "out", "--skip", "*.mlp.*", "--skip", "lm_head", "--dtype", "float32")
    assert code == 0
    assert "8 layers at 4 bits" in out
    assert "left as it was: model.layers.0.mlp.up_proj (matches skip pattern '*.mlp.*')" in out
    assert f"turboquant_weights.load('{tmp_path / 'out'}')" in out


def test_bits_per_layer(cli, dense, tmp_path):
    mixed = ["--layer-bits", "*.1.*.down_proj=4+2", "--layer-bits", "*.down_proj=3"]
    code, _, err = cli("quantize", dense, tmp_path / "out", "--bits", 2, *mixed)
    assert code == 0, err
    code, out, _ = cli("inspect", tmp_path / "out", "--json")
    labels = {layer["name"]: layer["label"] for layer in json.loads(out)["layers"]}
    assert labels.pop("model.layers.1.mlp.down_proj") == "4+2"
    assert labels.pop("model.layers.0.mlp.down_proj") == "3"
    assert set(labels.values()) == {"2"}
    for wrong, message in (
        ("down_proj", "PATTERN=BITS is needed"),
        ("*.x=5", "bits is 5"),
        ("*.x=4", "matches no linear layer"),
    ):
        code, _, err = cli("quantize", dense, tmp_path / "no", "--layer-bits", wrong)
        assert (code, message in err) == (1, True), err
    assert not (tmp_path / "no").exists()


def test_a_quantized_embedding(cli, dense, tmp_path):
    code, out, err = cli("quantize", dense, tmp_path / "out", "--embedding-bits", "4+2")
    assert code == 0, err
    assert "model.embed_tokens at 4+2" in out
    assert "shares the planes of model.embed_tokens: lm_head" in out
    code, out, _ = cli("inspect", tmp_path / "out", "--reference", dense)
    assert (code, "model.embed_tokens (embedding)" in out) == (0, True)
    code, out, _ = cli("inspect", tmp_path / "out", "--json")
    first = json.loads(out)["layers"][0]
    assert (first["name"], first["kind"], first["label"]) == ("model.embed_tokens", "embedding", "4+2")
    assert cli("verify", tmp_path / "out")[0] == 0
    code, out, err = cli("generate", tmp_path / "out", "ab", "--max-new-tokens", 2)
    assert (code, out.startswith("ab")) == (0, True), err
    code, _, err = cli("quantize", dense, tmp_path / "no", "--embedding-bits", "four")
    assert (code, "--embedding-bits has the bits 'four'" in err) == (1, True)
    for option, bits in (("--embedding-bits", "4"), ("--bits", 4), ("--residual-bits", 0), ("--layer-bits", "*=4")):
        code, _, err = cli("quantize", dense, tmp_path / "no", option, bits, "--target-ratio", 3)
        assert (code, "a budget chooses the bits" in err) == (1, True), option


def test_inspect_and_verify(cli, checkpoint):
    code, out, _ = cli("inspect", checkpoint)
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in out
    assert "3+2" in out
    code, out, _ = cli("inspect", checkpoint, "--json")
    values = json.loads(out)
    assert (code, len(values["layers"]), values["config"]["residual_bits"]) == (0, 14, 2)
    assert values["quantized_bytes"] == sum(layer["nbytes"] for layer in values["layers"])
    assert values["layers"][0]["error"] is None
    code, out, _ = cli("verify", checkpoint)
    assert (code, "14 quantized layers" in out) == (0, True)
    code, out, _ = cli("verify", checkpoint, "--json")
    values = json.loads(out)
    assert (code, values["manifest_checked"]) == (0, True)
    assert "model.safetensors" in values["sha256"]


def test_inspect_says_what_is_not_quantized_and_why(cli):
    folder = Path(__file__).parent / "fixtures" / "v1" / "experts"
    code, out, _ = cli("inspect", folder)
    assert code == 0
    assert "experts.down_proj (experts)" in out
    assert "3 x 32" in out
    assert "not quantized: " in out
    assert "MB in layers that were skipped" in out
    assert "modules that are no linear layers" in out
    code, out, _ = cli("inspect", folder, "--json")
    found = json.loads(out)
    assert sum(found["dense_bytes"].values()) == found["other_bytes"]


def test_inspect_with_the_reference_shows_errors(cli, dense, checkpoint):
    code, out, err = cli("inspect", checkpoint, "--reference", dense, "--json")
    assert code == 0, err
    assert all(1e-4 < layer["error"] < 1e-2 for layer in json.loads(out)["layers"])
    code, out, _ = cli("inspect", checkpoint, "--reference", dense)
    assert (code, "error" in out) == (0, True)


def test_verify_finds_a_changed_byte(cli, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    code, out, err = cli("verify", folder)
    assert (code, out) == (1, "")
    assert err.startswith("turboquant-weights: error: model.safetensors")
    assert err.count("\n") == 1


def test_eval_against_a_reference(cli, dense, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 10, encoding="utf-8")
    common = ("--text", text, "--window-length", 64)
    code, out, err = cli("eval", checkpoint, "--reference", dense, *common, "--windows", 3, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert (values["windows"], values["window_length"], values["result"]["tokens"]) == (3, 64, 189)
    assert 0 < values["result"]["kl_mean"] < 0.1
    # A model against itself, and alone.
    code, out, _ = cli("eval", dense, "--reference", dense, *common, "--json")
    values = json.loads(out)
    assert (values["windows"], values["result"]["kl_max"], values["result"]["top1"]) == (7, 0.0, 1.0)
    code, out, _ = cli("eval", dense, *common, "--json")
    alone = json.loads(out)
    assert (code, alone["result"]["perplexity"]) == (0, values["reference_perplexity"])
    assert alone["result"]["kl_mean"] is None
    code, out, _ = cli("eval", checkpoint, "--reference", dense, *common)
    assert "perplexity" in out
    assert "reference" in out


def test_eval_uses_the_text_of_the_package(cli, dense):
    code, out, _ = cli("eval", dense, "--windows", 1, "--window-length", 32, "--json")
    assert (code, json.loads(out)["text"]) == (0, "sample")


def test_convert(cli, checkpoint, tmp_path):
    code, out, err = cli("convert", checkpoint, tmp_path / "bf16")
    assert code == 0, err
    assert "model.layers.1.mlp.down_proj" in out
    assert "14 matrices to bf16" in out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert not hasattr(model.config, "quantization_config")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "bf16")("ab").input_ids == [68, 69]
    code, out, err = cli("convert", checkpoint, tmp_path / "int4", "--to", "int4", "--json")
    values = json.loads(out)
    assert (code, values["group_size"], len(values["layers"])) == (0, 32, 14), err
    assert 1e-3 < values["error"] < 2e-2


def test_generate(cli, checkpoint):
    code, out, err = cli("generate", checkpoint, "abc", "--max-new-tokens", 4)
    assert code == 0, err
    assert out.startswith("abc")
    code, as_json, _ = cli("generate", checkpoint, "abc", "--max-new-tokens", 4, "--json")
    values = json.loads(as_json)
    assert (code, values["prompt"] + values["text"] + "\n") == (0, out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{tmp}/nowhere"], "not a folder"),
        (["verify", "{dense}"], "quantize it first"),
        (["quantize", "{checkpoint}", "{tmp}/out"], "is quantized already"),
        (["quantize", "{tmp}/nowhere.gguf", "{tmp}/out"], "no such file"),
        (["quantize", "{tmp}/nowhere", "{tmp}/out"], "no such folder: "),
        (["generate", "{tmp}/nowhere", "a"], "no such folder: "),
        (["generate", "{dense}/config.json", "a"], "the model's folder is needed"),
        (["quantize", "{dense}", "{checkpoint}"], "--overwrite"),
        (["quantize", "{dense}", "{tmp}/out", "--group-size", "48"], "group_size is 48"),
        (["quantize", "{dense}", "{tmp}/out", "--skip", "nothing.*"], "'nothing.*'"),
        (["eval", "{dense}", "--text", "{tmp}/nowhere.txt"], "nowhere.txt"),
        (["eval", "{dense}", "--window-length", "500000"], "windows of 500000"),
        (["generate", "{dense}", ""], "no tokens"),
        (["convert", "{dense}", "{tmp}/out"], "quantize it first"),
        (["convert", "{checkpoint}", "{dense}"], "allow overwriting"),
        (["convert", "{tmp}/nowhere", "{tmp}/out"], "no such folder: "),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(cli, dense, checkpoint, tmp_path, arguments, words):
    code, out, err = cli(*(a.format(tmp=tmp_path, dense=dense, checkpoint=checkpoint) for a in arguments))
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]  # progress bars may stand above it
    assert last.startswith("turboquant-weights: error: ")
    assert words in last
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["quantize", "a", "b", "--bits", "5"],
        ["quantize", "a", "b", "--dtype", "int8"],
        ["nonsense"],
        ["eval", "a", "-x"],
    ],
)
def test_wrong_usage_is_exit_code_2(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Error" in err


def test_version_and_help(cli):
    assert cli("--version") == (0, f"turboquant-weights {tq.__version__}\n", "")
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("quantize", "inspect", "eval", "generate", "verify"):
        assert command in out
        code, text, _ = cli(command, "--help")
        assert (code, "Example: turboquant-weights" in text) == (0, True)


def half_written(action):
    """A ``save_pretrained`` that writes part of a file and then lets ``action`` happen."""

    def save_pretrained(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        action()
        raise AssertionError("not interrupted")

    return save_pretrained


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def interruptible():
    """Ctrl-C is heard: a shell starts its background jobs with SIGINT ignored, and Python keeps it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), {1, 130}),
        (lambda: signal.raise_signal(signal.SIGTERM), {143}),
        (full_disk, {1}),
    ],
    ids=["ctrl-c", "terminated", "full disk"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_saving_changes_nothing(cli, dense, checkpoint, tmp_path, monkeypatch, action, expected, existing):
    out = tmp_path / "out"
    if existing:
        shutil.copytree(checkpoint, out)
    before = snapshot(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", half_written(action))
    code, text, err = cli("quantize", dense, out, "--overwrite", "--target-ratio", 2.5)  # a budget needs the model in memory
    assert code in expected
    assert "Traceback" not in err
    assert text == ""
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_interrupted_quantizing_goes_on(cli, dense, checkpoint, tmp_path, monkeypatch, caplog, number):
    out = shutil.copytree(checkpoint, tmp_path / "out")
    before = snapshot(out)
    write, calls = ShardWriter.write, []

    def interrupt(writer, tensors):
        calls.append(tensors)
        if len(calls) == 8:
            signal.raise_signal(number)
        return write(writer, tensors)

    monkeypatch.setattr(ShardWriter, "write", interrupt)
    code, text, err = cli("quantize", dense, out, "--overwrite")
    assert code in {1, 130, 143}
    assert (text, "Traceback" in err, "the same call goes on" in caplog.text) == ("", False, True), err
    assert snapshot(out) == before
    code, _, err = cli("quantize", dense, out, "--overwrite")
    assert (code, "has 6 finished parts" in caplog.text) == (0, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert cli("verify", out)[0] == 0


def test_a_real_write_error_is_clean(dense, tmp_path):
    """A file size limit instead of a full disk: the same path through the libraries that write the file."""
    code = (
        "import resource, sys; from turboquant_weights.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); main()"
    )
    command = [sys.executable, "-c", code, "quantize", str(dense), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("turboquant-weights: error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_a_checkpoint(cli, dense, checkpoint, tmp_path):
    out = shutil.copytree(checkpoint, tmp_path / "out")
    code, _, err = cli("quantize", dense, out, "--overwrite", "--bits", 2)
    assert code == 0, err
    assert tq.load(out).config.quantization_config.bits == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plan_shows_budgets_without_changing_anything(cli, dense, tmp_path):
    before = snapshot(dense)
    code, out, err = cli("plan", dense, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["measured_on"] == "random tokens"
    ratios = [allocation["ratio"] for allocation in plan["allocations"]]
    assert ratios == sorted(ratios)
    expected = [allocation["expected_kl"] for allocation in plan["allocations"]]
    assert expected == sorted(expected)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    plot = tmp_path / "plan.svg"
    code, out, err = cli(
        "plan", dense, "--calibration-text", text, "--target-bits", 6, "--layers", "--plot", plot, "--skip", "*.up_proj"
    )
    assert code == 0, err
    assert "For calibrated rounding" in out
    assert "model.layers.1.mlp.down_proj" in out
    assert "up_proj" not in out
    assert plot.read_text().count("<svg") == 1
    assert snapshot(dense) == before
    assert cli("plan", dense, "--layers")[::2] == (
        1,
        "turboquant-weights: error: --layers needs a budget: add --target-ratio, --target-bits or --max-kl\n",
    )
    code, _, err = cli("plan", dense, "--target-ratio", 99)
    assert code == 1
    assert "is possible" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--plot", "plan.jpg"),
        ("--plot", "no such folder/plan.svg"),
        ("--target-ratio", 3, "--max-kl", 1),
        ("--target-ratio", 0),
        ("--samples", 4),
    ],
)
def test_plan_finds_mistakes_before_it_measures(cli, dense, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("turboquant_weights.budget.plan_bits", lambda *args, **kwargs: pytest.fail("minutes pass"))
    code, out, err = cli("plan", dense, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("turboquant-weights: error: ")


def test_plan_shows_the_bits_that_quantize_chooses(cli, dense, tmp_path):
    """It has to read as much text: what feedback leaves of a layer's loss is measured on more tokens than sensitivities."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}, and {n} is what we began with. " for n in range(400)))
    for options in ((), ("--samples", 40, "--sample-length", 128, "--group-size", 32, "--seed", 5)):
        arguments = ("--calibration-text", text, "--target-ratio", 3, "--json", *options)
        code, planned, err = cli("plan", dense, *arguments)
        assert code == 0, err
        code, done, err = cli("quantize", dense, tmp_path / "out", "--overwrite", *arguments)
        assert code == 0, err
        (allocation,) = json.loads(planned)["allocations"]
        report = json.loads(done)
        assert report["expected_kl"] == allocation["expected_kl"]
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        of_layers = tq.TurboQuantConfig.from_dict(config).for_layer
        for name, bits in allocation["bits"].items():
            own = of_layers(name)
            assert config["embeddings"].get(name, [own.bits, own.residual_bits]) == bits


def test_quantize_calibrated_to_a_budget(cli, dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Nothing is so painful to the human mind as a great and sudden change. " * 60)
    arguments = ("--calibration-text", text, "--samples", 4, "--sample-length", 64, "--resume", tmp_path / "resume")
    code, out, err = cli("quantize", dense, tmp_path / "out", *arguments, "--target-ratio", 3, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["ratio"] >= 3
    assert report["expected_kl"] > 0
    assert report["config"]["embeddings"].keys() == {"model.embed_tokens"}
    assert not (tmp_path / "resume").exists(), "the finished blocks are of no more use"
    code, out, _ = cli("inspect", tmp_path / "out", "--json")
    assert code == 0
    assert len({layer["label"] for layer in json.loads(out)["layers"]}) > 1
    assert cli("quantize", dense, tmp_path / "other", "--resume", tmp_path / "resume")[0] == 1
    assert "add --calibrate" in cli("quantize", dense, tmp_path / "other", "--samples", 4)[2]
    assert cli("quantize", dense, tmp_path / "other", "--target-ratio", 3, "--max-kl", 1)[0] == 1
    assert not (tmp_path / "other").exists()
