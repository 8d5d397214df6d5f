"""The Transformers integration, on tiny random models: what is saved is what was quantized, and nothing is ever made up."""

import json
import logging
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.integrations.transformers import load_dense  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)


def _llama(tied=True, dtype=torch.bfloat16, **kwargs):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied, **kwargs)
    return transformers.LlamaForCausalLM(config).to(dtype)


def _qwen(dtype=torch.float16):  # biases on q, k and v
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)).to(dtype)


def _gpt2(dtype=torch.float32):  # Conv1D instead of nn.Linear
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": _llama, "llama-untied": lambda: _llama(tied=False), "qwen2": _qwen, "gpt2": _gpt2}


@pytest.fixture(scope="module", params=MODELS)
def dense(request, tmp_path_factory):
    """Folder of an unquantized model in several shards."""
    torch.manual_seed(1)
    model = MODELS[request.param]()
    with torch.no_grad():  # random biases and norms: fresh ones are all 0 and 1, which hides mix-ups
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("dense") / request.param
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A 4+2 Llama, saved by ``save`` in one file."""
    torch.manual_seed(2)
    model = _llama(attention_bias=True)
    tq.quantize_model(model, tq.TurboQuantConfig(residual_bits=2), progress=False)
    folder = tmp_path_factory.mktemp("saved") / "model"
    tq.save(model, folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy without the manifest, for tests that damage it."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "turboquant_weights.json").unlink()
    return folder


@pytest.fixture
def log(caplog):
    """What Transformers and the integration log, warnings and above."""
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.utils.logging.disable_propagation()


def _dense_model(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def assert_same_bits(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def _is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


TOKENS = torch.arange(12)[None] * 7 % 96


# -- quantizing while loading


@pytest.mark.parametrize("config", [tq.TurboQuantConfig(), tq.TurboQuantConfig(bits=3, residual_bits=2, seed=5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.float32}], ids=str)
def test_on_the_fly_equals_quantize_model(dense, config, options):
    loaded = _dense_model(dense, quantization_config=config, **options)
    reference = _dense_model(dense, **options)
    report = tq.quantize_model(reference, config, progress=False)
    assert_same_bits(loaded, reference)
    assert loaded.config.quantization_config.skip == tuple(report.skipped) == ("lm_head",)
    assert loaded.config.quantization_config == reference.config.quantization_config
    assert _is_tied(loaded) == loaded.config.tie_word_embeddings
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, reference.eval()(TOKENS).logits)


def test_skip_patterns_become_exact_names(dense):
    config = tq.TurboQuantConfig(skip=("*.0.*", "lm_head"))
    loaded = _dense_model(dense, quantization_config=config)
    saved = loaded.config.quantization_config.skip
    assert len(saved) in (5, 8)  # GPT-2's and Llama's linear layers in block 0, and the head
    assert all(".0." in name or name == "lm_head" for name in saved)
    for name in saved:
        assert not isinstance(loaded.get_submodule(name), tq.TurboQuantLinear)


def test_unmatched_skip_pattern_is_an_error(dense):
    with pytest.raises(tq.ConfigError, match="matches no linear layer"):
        _dense_model(dense, quantization_config=tq.TurboQuantConfig(skip=("nothing",)))


def test_quantizing_a_tied_head_on_the_fly_is_an_error(tmp_path):
    _llama(tied=True).save_pretrained(tmp_path)
    with pytest.raises(tq.ConfigError, match="lm_head shares its weight"):
        _dense_model(tmp_path, quantization_config=tq.TurboQuantConfig(skip=()))


def test_nan_is_reported_with_layer_and_position(tmp_path):
    model = _llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(tq.QuantizationError, match=r"model.layers.1.mlp.up_proj: weight\[3, 5\] is nan"):
        _dense_model(tmp_path, quantization_config=tq.TurboQuantConfig())


def test_a_layer_without_weight_stays_dense_with_a_warning(tmp_path, log):
    """A new classification head is initialised by Transformers, not quantized, and listed under skip."""
    _llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=tq.TurboQuantConfig()
    )
    assert "score stays dense" in log.text
    assert type(model.score) is torch.nn.Linear
    assert model.config.quantization_config.skip == ("score",)
    assert isinstance(model.model.layers[0].self_attn.q_proj, tq.TurboQuantLinear)


def test_disk_offload_on_the_fly_is_an_error(dense, tmp_path):
    with pytest.raises(tq.ConfigError, match="disk"):
        _dense_model(
            dense, quantization_config=tq.TurboQuantConfig(), device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        )


# -- saving and loading


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("how", ["on the fly", "quantize_model"])
def test_round_trip_is_bit_identical(dense, tmp_path, how, size, recwarn, log):
    config = tq.TurboQuantConfig(residual_bits=1)
    if how == "on the fly":
        model = _dense_model(dense, quantization_config=config)
    else:
        model = _dense_model(dense)
        tq.quantize_model(model, config, progress=False)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size != "50GB")
    log.clear()
    for loaded in (_dense_model(tmp_path), _dense_model(tmp_path, device_map="auto"), tq.load(tmp_path)):
        assert_same_bits(model, loaded)
        assert type(loaded) is type(model)
        assert _is_tied(loaded) == _is_tied(model)
        assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, tq.TurboQuantLinear) for p in [m.codes])
    assert "UNEXPECTED" not in log.text  # the tripwire is ours, not news
    assert "MISSING" not in log.text
    assert not recwarn.list


def _nomic():  # its files hold q, k and v as one matrix, which the loader cuts
    return transformers.NomicBertModel(transformers.NomicBertConfig(**SIZES))


def _moe():  # experts are three-dimensional parameters, stacked by the loader; they stay dense
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes, num_key_value_heads=2))


@pytest.mark.parametrize("build", [_nomic, _moe])
def test_models_whose_files_have_another_layout(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "dense")
    config = tq.TurboQuantConfig(residual_bits=1)
    loaded = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    tq.quantize_model(model, config, progress=False)
    assert_same_bits(loaded, model)
    for name, quantized in (("loaded", loaded), ("in place", model)):
        tq.save(quantized, tmp_path / name)
        assert_same_bits(quantized, tq.load(tmp_path / name))


def test_saving_twice_is_stable(checkpoint, tmp_path):
    tq.save(tq.load(checkpoint), tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again"))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_body_alone(checkpoint, log):
    body = transformers.AutoModel.from_pretrained(checkpoint)
    assert torch.equal(body.layers[1].mlp.up_proj.codes, tq.load(checkpoint).model.layers[1].mlp.up_proj.codes)
    assert "UNEXPECTED" not in log.text


def test_dtype_requests(checkpoint):
    model = tq.load(checkpoint, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.codes.dtype == torch.uint8
    assert model(TOKENS).logits.dtype == torch.float32
    assert tq.load(checkpoint).dtype == torch.bfloat16


def test_offload_to_disk(checkpoint, tmp_path):
    plain = tq.load(checkpoint)
    layers = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    offloaded = tq.load(
        checkpoint, device_map={**layers, "model.layers.0": "cpu", "model.layers.1": "disk"}, offload_folder=tmp_path
    )
    with torch.no_grad():
        assert torch.equal(offloaded(TOKENS).logits, plain(TOKENS).logits)


def test_base_only(checkpoint, log):
    full = tq.load(checkpoint)
    base = tq.load(checkpoint, base_only=True)
    assert "UNEXPECTED" not in log.text
    assert base.config.quantization_config.residual_bits == 0
    assert not [name for name in base.state_dict() if "residual" in name]
    for module in full.modules():
        if isinstance(module, tq.TurboQuantLinear):
            module.base_only_()
    with torch.no_grad():
        assert torch.equal(base(TOKENS).logits, full(TOKENS).logits)
    assert _dense_model(checkpoint).config.quantization_config.residual_bits == 2  # the request does not stick


def test_base_only_can_be_saved(checkpoint, tmp_path):
    base = tq.load(checkpoint, base_only=True)
    tq.save(base, tmp_path / "base")
    assert_same_bits(base, tq.load(tmp_path / "base"))


def _layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, tq.TurboQuantLinear)}


def _base_only(model):
    for layer in _layers(model).values():
        layer.base_only_()


def _one_dense(model):
    name, layer = next(iter(_layers(model).items()))
    dense = torch.nn.Linear(layer.in_features, layer.out_features, dtype=model.dtype)
    model.set_submodule(name, dense)


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
@pytest.mark.parametrize("change", [_base_only, _one_dense])
def test_a_changed_model_is_saved_as_it_is(checkpoint, tmp_path, change, way):
    model = tq.load(checkpoint)
    change(model)
    if way == "save":
        tq.save(model, tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "out")
    again = tq.load(tmp_path / "out")
    assert_same_bits(model, again)
    assert _layers(model).keys() == _layers(again).keys()
    assert model.config.quantization_config == again.config.quantization_config


MIXED = tq.TurboQuantConfig(layer_bits={"*.0.*proj": (4, 2), "*.1.*": (3, 1)})


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}], ids=str)
def test_bits_per_layer(dense, tmp_path, options, log):
    """On the fly and in place, saved and loaded, with the base planes alone and the body alone."""
    loaded = _dense_model(dense, quantization_config=MIXED, **options)
    reference = _dense_model(dense)
    report = tq.quantize_model(reference, MIXED, progress=False)
    assert_same_bits(loaded, reference)
    config = reference.config.quantization_config
    assert loaded.config.quantization_config == config
    labels = {layer.name: layer.label for layer in report.layers}
    assert {"4+2", "3+1"} <= set(labels.values()) <= {"4", "4+2", "3+1"}
    assert {name: config.for_layer(name).label for name in labels} == labels
    assert 0 < len(config.layer_bits) < len(labels)
    tq.save(loaded, tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert stored["layer_bits"] == {name: list(bits) for name, bits in config.layer_bits.items()}
    assert tq.TurboQuantConfig.from_dict(stored) == config
    log.clear()
    again = tq.load(tmp_path / "m", **options)
    assert_same_bits(loaded, again)
    assert again.config.quantization_config == config
    base = tq.load(tmp_path / "m", base_only=True)
    assert {(layer.bits, layer.residual_bits) for layer in _layers(base).values()} == {(4, 0), (3, 0)}
    tq.save(base, tmp_path / "base")
    assert_same_bits(base, tq.load(tmp_path / "base"))
    assert "UNEXPECTED" not in log.text
    body = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert sorted(layer.bits for layer in _layers(body).values()) == sorted(layer.bits for layer in _layers(base).values())
    assert re.search(r"3\+1 in \d layers", (tmp_path / "m" / "README.md").read_text())


def test_a_bits_pattern_without_a_layer_is_an_error(dense):
    for pattern, message in (("nothing", "matches no linear layer"), ("lm_hea?", "for itself .output head|shares its")):
        with pytest.raises(tq.ConfigError, match=message):
            _dense_model(dense, quantization_config=tq.TurboQuantConfig(layer_bits={pattern: (4, 1)}))


def test_layers_may_be_changed_one_by_one(checkpoint, tmp_path):
    model = tq.load(checkpoint)
    _, second, *_ = _layers(model)
    model.get_submodule(second).base_only_()
    tq.save(model, tmp_path / "out")
    again = tq.load(tmp_path / "out")
    assert again.config.quantization_config.layer_bits == {second: (4, 0)}
    assert_same_bits(model, again)


def test_layers_of_different_seeds_are_not_saved(checkpoint, tmp_path):
    model = tq.load(checkpoint)
    first, second, *_ = _layers(model)
    model.get_submodule(second).seed = 9
    with pytest.raises(tq.ConfigError, match=f"seed is 0 in {first}, but 9 in {second}"):
        tq.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_quantized_layers_is_not_saved(checkpoint, tmp_path):
    model = tq.load(checkpoint)
    for name, layer in _layers(model).items():
        model.set_submodule(name, torch.nn.Linear(layer.in_features, layer.out_features))
    with pytest.raises(tq.ConfigError, match="no quantized layer left"):
        tq.save(model, tmp_path / "out")


def test_quantized_head_is_untied_for_good(tmp_path):
    model = _llama(tied=True).eval()
    tq.quantize_model(model, tq.TurboQuantConfig(), skip=[], progress=False)
    tq.save(model, tmp_path / "m")
    loaded = tq.load(tmp_path / "m")
    assert isinstance(loaded.lm_head, tq.TurboQuantLinear)
    assert_same_bits(model, loaded)


def test_provenance(dense, tmp_path):
    model = _dense_model(dense, quantization_config=tq.TurboQuantConfig())
    model.save_pretrained(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["source"]
    assert source["model"] == dense.name  # of a local folder no path
    assert source["turboquant_weights"] == tq.__version__
    assert "import turboquant_weights" in source["load_with"]


# -- save()


def test_save_writes_card_and_manifest(checkpoint):
    card = (checkpoint / "README.md").read_text()
    assert "import turboquant_weights" in card
    assert "4+2-bit" in card
    assert "`lm_head`" in card
    assert (checkpoint / "turboquant_weights.json").is_file()


def test_failed_save_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    model = tq.load(checkpoint)
    target = tmp_path / "m"
    tq.save(model, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    for folder in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            tq.save(model, folder, tokenizer=Tokenizer(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    with pytest.raises(FileExistsError):
        tq.save(model, target)
    tq.save(model, target, overwrite=True)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), _llama()], ids=["module", "dense"])
def test_save_needs_a_quantized_transformers_model(model, tmp_path):
    with pytest.raises(tq.ConfigError, match="not quantized by this package"):
        tq.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_load_of_a_wrong_path_says_so(checkpoint, tmp_path, monkeypatch):
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "~/nowhere/at all", "no/such/folder"):
        with pytest.raises(tq.ConfigError, match=f"^no such folder: {path}$"):
            tq.load(path)
    with pytest.raises(tq.ConfigError, match=f"is a file: the model's folder is needed, {checkpoint}$"):
        tq.load(checkpoint / "config.json")


def test_load_needs_a_quantized_model(dense):
    with pytest.raises(tq.TurboQuantError, match="not a quantized model"):
        tq.load(dense)


def test_load_needs_a_quantized_model_on_the_hub_too(dense, monkeypatch):
    """Of a hub id only the config can be checked at first."""
    for check in ("validate", "check_values"):
        monkeypatch.setattr(f"turboquant_weights.integrations.transformers.{check}", lambda argument: None)
    with pytest.raises(tq.ConfigError, match="not quantized by this package"):
        tq.load(dense)


# -- nothing is made up


def _rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj"
DAMAGE = {
    "missing codes": lambda t: t.pop(f"{LAYER}.codes"),
    "missing residual": lambda t: t.pop(f"{LAYER}.residual"),
    "missing scales": lambda t: t.pop(f"{LAYER}.scales"),
    "missing exponents": lambda t: t.pop(f"{LAYER}.exponents"),
    "missing bias": lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"),
    "missing layer": lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)],
    "short codes": lambda t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"][:, :-4].contiguous()}),
    "float codes": lambda t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].float()}),
    "exponent out of range": lambda t: t[f"{LAYER}.exponents"].fill_(127),
    "unsigned exponents": lambda t: t.update({f"{LAYER}.exponents": t[f"{LAYER}.exponents"].view(torch.uint8)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_planes_are_an_error(copy, damage):
    _rewrite(copy, DAMAGE[damage])
    with pytest.raises(tq.FormatError, match=r"model.layers.1\.(mlp.up|self_attn.q)_proj\..* (is|holds) "):
        _dense_model(copy)
    with pytest.raises(tq.FormatError, match="_proj"):
        tq.load(copy)


def _edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_bits": 0},
        {"residual_bits": 3},
        {"bits": 3},
        {"layer_bits": {LAYER: [4, 0]}},
        {"layer_bits": {LAYER: [4, 3]}},
        {"skip": None},
        {"skip": []},
        {"skip": ["lm_head", LAYER]},
    ],
    ids=str,
)
def test_config_that_contradicts_the_files_is_an_error(copy, changes):
    _edit_config(copy, **changes)
    with pytest.raises(tq.TurboQuantError):
        _dense_model(copy)


@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize(
    "way", [tq.load, transformers.AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"]
)
def test_settings_are_compared_with_the_manifest(checkpoint, tmp_path, way, base_only):
    folder = tmp_path / "edited"
    shutil.copytree(checkpoint, folder)
    options = {"base_only": True} if base_only and way is tq.load else {}
    way(folder, **options)
    _edit_config(folder, seed=7)
    with pytest.raises(tq.FormatError, match=r"seed is 7, but 0 was saved.*save_pretrained"):
        way(folder, **options)


def test_a_partial_download_needs_only_the_files_it_loads(checkpoint, tmp_path):
    folder = tmp_path / "snapshot"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{"unknown": 1}, {"format_version": 2}, {"bits": 5}], ids=str)
def test_config_that_cannot_be_read_is_an_error(copy, changes):
    _edit_config(copy, **changes)
    with pytest.raises(tq.ConfigError):
        _dense_model(copy)


def test_config_beside_a_quantized_checkpoint_warns_and_is_ignored(checkpoint):
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        model = _dense_model(checkpoint, quantization_config=tq.TurboQuantConfig(bits=2))
    assert model.config.quantization_config.label == "4+2"


def test_other_quantization_beside_a_quantized_checkpoint_is_an_error(checkpoint):
    with pytest.raises(ValueError, match="TurboQuantConfig"):
        _dense_model(checkpoint, quantization_config=transformers.TorchAoConfig.__new__(transformers.TorchAoConfig))


def test_tripwire(tmp_path):
    """Without this package Transformers must refuse every checkpoint, not fill it with random weights."""
    for name, build in MODELS.items():
        model = build()
        tq.quantize_model(model, progress=False)
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-sharded", max_shard_size="20KB")
    code = f"""
import pathlib, sys, transformers
for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            auto.from_pretrained(folder)
        except RuntimeError:
            print("refused", folder.name)
assert "turboquant_weights" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * len(MODELS), done.stdout


def test_tripwire_is_one_empty_tensor(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    dense = {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}
    assert list(dense) == ["model.layers.0.self_attn.q_proj.weight"]
    assert dense.popitem()[1].shape == (0,)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "turboquant_weights": tq.__version__}


# -- using the model


def test_dequantize(dense, tmp_path):
    quantized = _dense_model(dense, quantization_config=tq.TurboQuantConfig(residual_bits=4), dtype=torch.float32)
    with torch.no_grad():
        expected = quantized(TOKENS).logits
        model = quantized.dequantize()
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_bits(model, _dense_model(tmp_path))
    original = _dense_model(dense, dtype=torch.float32)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_generate(checkpoint):
    model = tq.load(checkpoint)
    out = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > TOKENS.shape[1]
    with torch.no_grad():
        assert out[0, TOKENS.shape[1]] == model(TOKENS).logits[0, -1].argmax()


def test_compile(checkpoint):
    model = tq.load(checkpoint, dtype=torch.float32)
    compiled = torch.compile(lambda tokens: model(tokens, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS, use_cache=False).logits)


def test_adapters_can_be_trained_on_top(checkpoint):
    model = tq.load(checkpoint)
    assert model.hf_quantizer.is_trainable
    model.model.embed_tokens.weight.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


# -- dense sources


def test_load_dense(dense):
    model, tokenizer = load_dense(dense, dtype="float32")
    assert model.dtype == torch.float32
    assert tokenizer is None


def test_load_dense_refuses_quantized_models(checkpoint):
    with pytest.raises(tq.ConfigError, match="is quantized with turboquant_weights"):
        load_dense(checkpoint)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}], ids=str)
def test_on_the_fly_on_the_gpu_equals_quantize_model_there(dense, tmp_path, device_map):
    config = tq.TurboQuantConfig(residual_bits=2)
    loaded = _dense_model(dense, quantization_config=config, device_map=device_map)
    reference = _dense_model(dense, device_map=device_map)
    tq.quantize_model(reference, config, progress=False)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    assert_same_bits(loaded, reference)
    tq.save(loaded, tmp_path / "m")
    assert_same_bits(loaded, tq.load(tmp_path / "m", device_map=device_map))
