"""Quantized embeddings in Transformers models: heads tied to them run on the same planes, before and after saving."""

import copy
import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.evaluation import layer_errors, resident_bytes  # noqa: E402
from turboquant_weights.planes import PLANES  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
TOKENS = torch.arange(12)[None] * 7 % 96


def llama(tied=True):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def gemma():  # scales what it looks up
    config = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    return transformers.Gemma3ForCausalLM(config).to(torch.bfloat16)


def qwen():  # untied, with biases
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    return transformers.Qwen2ForCausalLM(config).to(torch.float16)


def gpt2():  # Conv1D, and a second embedding, of positions
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def t5():  # three embeddings on one weight
    sizes = dict(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, tie_word_embeddings=True))


MODELS = {"llama": llama, "gemma3": gemma, "qwen2": qwen, "gpt2": gpt2}
TIED = {"llama", "gemma3", "gpt2"}
EMBEDDING = {"gpt2": "transformer.wte"}


@pytest.fixture(scope="module", params=MODELS)
def dense(request, tmp_path_factory):
    """Folder of an unquantized model in several shards."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("dense") / request.param
    MODELS[request.param]().save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama with mixed bits whose embedding is quantized to 4+2."""
    torch.manual_seed(2)
    model = llama()
    config = tq.TurboQuantConfig(layer_bits={"*.down_proj": (4, 1)}, embeddings={"*.embed_tokens": (4, 2)})
    tq.quantize_model(model, config, progress=False)
    folder = tmp_path_factory.mktemp("saved") / "model"
    tq.save(model, folder)
    return folder


@pytest.fixture
def log(caplog):
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.utils.logging.disable_propagation()


def config_for(folder, **options):
    return tq.TurboQuantConfig(residual_bits=1, embeddings={EMBEDDING.get(folder.name, "*.embed_tokens"): (4, 2)}, **options)


def load_model(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same_bits(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def assert_tied(model):
    """The head reads the very planes of the embedding, and Transformers knows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, tq.TurboQuantEmbedding)
    assert isinstance(head, tq.TurboQuantLinear)
    for plane in PLANES:
        assert getattr(embedding, plane) is getattr(head, plane)
    assert len(model.all_tied_weights_keys) == 4 - (embedding.residual is None)
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert embedding.codes is head.codes


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"dtype": torch.float32}], ids=str)
def test_round_trip(dense, tmp_path, options, log):
    """On the fly equals in place; what is saved and loaded in any way is bit-identical, tied, and computes the same."""
    original = load_model(dense, **options)
    size = resident_bytes(original)
    reference = load_model(dense, **options)
    report = tq.quantize_model(reference, config_for(dense), progress=False)
    loaded = load_model(dense, quantization_config=config_for(dense), **options)
    assert_same_bits(loaded, reference)
    assert loaded.config.quantization_config == reference.config.quantization_config
    tq.save(loaded, tmp_path / "one")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    log.clear()
    models = [
        loaded,
        reference,
        tq.load(tmp_path / "one", **options),
        load_model(tmp_path / "sharded", **options),
        load_model(tmp_path / "one", **{"device_map": "cpu", **options}),
    ]
    expected = logits(reference)
    tied = dense.name in TIED
    for model in models:
        assert_same_bits(model, reference)
        assert torch.equal(logits(model), expected)
        assert resident_bytes(model) == resident_bytes(models[2]) < size / (1.2 if options.get("dtype") else 1.05)
        assert not any(parameter.is_meta for parameter in model.parameters())
        if tied:
            assert_tied(model)
        else:
            assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert not [word for word in ("UNEXPECTED", "MISSING", "newly initialized") if word in log.text]
    assert report.tied == ({"lm_head": EMBEDDING.get(dense.name, "model.embed_tokens")} if tied else {})
    assert ("lm_head" in reference.config.quantization_config.skip) == (not tied)
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert not [name for name in stored if name.startswith("lm_head") and tied]
    relative = (expected - logits(original)).norm() / logits(original).norm()
    assert relative < 0.15


def test_size_is_counted_right(dense):
    model = load_model(dense)
    before = sum(p.numel() for p in model.parameters()) * 2
    report = tq.quantize_model(model, config_for(dense), progress=False)
    assert report.dense_bytes == before
    assert report.total_bytes == sum(p.nbytes for p in model.parameters())
    row = report.layers[0]
    assert (row.kind, row.label, row.out_features, row.in_features) == ("embedding", "4+2", 96, 64)
    assert {layer.kind for layer in report.layers[1:]} == {"linear"}
    assert f"{row.name} at 4+2" in str(report)
    assert row.name + ".weight" not in report.dense
    assert not [name for name in report.dense if name.endswith((".codes", ".scales"))]
    assert set(report.dense) <= {"transformer.wpe.weight"}


def test_nothing_is_decoded_while_loading_or_running(dense, tmp_path, monkeypatch):
    """Transformers initialises what it finds in an embedding, and scaled ones ask for the dtype of their weight."""
    tq.save(load_model(dense, quantization_config=config_for(dense)), tmp_path / "m")
    monkeypatch.setattr(tq.TurboQuantEmbedding, "dequantize", None)
    logits(tq.load(tmp_path / "m"))
    logits(load_model(dense, quantization_config=config_for(dense)) if dense.name != "gemma3" else tq.load(tmp_path / "m"))


def test_untied_heads_are_linear_layers(tmp_path):
    model = llama(tied=False)
    config = tq.TurboQuantConfig(layer_bits={"lm_head": (4, 4)}, embeddings={"model.embed_tokens": (3, 0)})
    tq.quantize_model(model, config, progress=False)
    tq.save(model, tmp_path / "m")
    loaded = tq.load(tmp_path / "m")
    assert_same_bits(model, loaded)
    assert (loaded.lm_head.label, loaded.model.embed_tokens.label) == ("4+4", "3")
    assert loaded.config.quantization_config == model.config.quantization_config


def test_three_embeddings_and_a_head_on_one_weight(tmp_path):
    model = t5().eval()
    report = tq.quantize_model(model, tq.TurboQuantConfig(embeddings={"*.embed_tokens": (4, 2)}), progress=False)
    assert [layer.name for layer in report.layers if layer.kind == "embedding"] == ["shared"]
    assert report.tied == {"lm_head": "shared"}
    tq.save(model, tmp_path / "m")
    loaded = tq.load(tmp_path / "m")
    assert_same_bits(model, loaded)
    embeddings = [loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens, loaded.lm_head]
    assert len({module.codes.data_ptr() for module in embeddings}) == 1
    with torch.no_grad():
        options = dict(input_ids=TOKENS, decoder_input_ids=TOKENS)
        assert torch.equal(loaded(**options).logits, model(**options).logits)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert [name for name in stored if name.endswith(".codes") and ("embed" in name or "shared" in name)] == ["shared.codes"]


def test_a_head_with_a_bias(tmp_path):
    torch.manual_seed(4)
    config = transformers.PhiConfig(**SIZES, tie_word_embeddings=True)
    model = transformers.PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    before = sum(p.numel() for p in model.parameters()) * 2
    report = tq.quantize_model(model, tq.TurboQuantConfig(embeddings={"*": (4, 4)}), progress=False)
    assert report.dense_bytes == before
    tq.save(model, tmp_path / "m")
    loaded = tq.load(tmp_path / "m")
    assert_tied(loaded)
    assert_same_bits(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_a_head_that_reads_the_weight_of_the_embedding():
    """Correct, though it decodes the whole vocabulary each time."""
    model = llama().eval()
    tq.quantize_model(model, tq.TurboQuantConfig(embeddings={"*": (4, 4)}), progress=False)
    hidden = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        through = torch.nn.functional.linear(hidden, model.model.embed_tokens.weight)
        torch.testing.assert_close(through, model.lm_head(hidden), rtol=0.05, atol=0.05)


def test_offload_to_disk(checkpoint, tmp_path):
    plain = tq.load(checkpoint)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    assert torch.equal(logits(tq.load(checkpoint, device_map=places, offload_folder=tmp_path)), logits(plain))


def test_base_only(checkpoint, tmp_path):
    base = tq.load(checkpoint, base_only=True)
    assert_tied(base)
    assert {base.model.embed_tokens.label, base.model.layers[0].mlp.down_proj.label} == {"4"}
    full = tq.load(checkpoint)
    for module in full.modules():
        if isinstance(module, (tq.TurboQuantLinear, tq.TurboQuantEmbedding)):
            module.base_only_()
    assert torch.equal(logits(full), logits(base))
    for name, model in (("base", base), ("full", full)):
        tq.save(model, tmp_path / name)
        again = tq.load(tmp_path / name)
        assert_tied(again)
        assert_same_bits(again, base)
    assert again.config.quantization_config.embeddings == {"model.embed_tokens": (4, 0)}


def test_planes_read_in_two_ways_are_not_saved(checkpoint, tmp_path):
    model = tq.load(checkpoint)
    model.model.embed_tokens.base_only_()
    with pytest.raises(
        tq.ConfigError, match=r"lm_head and model.embed_tokens share their planes, but read them as 4\+2 and 4"
    ):
        tq.save(model, tmp_path / "m")


def test_body_alone(checkpoint, tmp_path, log):
    body = transformers.AutoModel.from_pretrained(checkpoint)
    assert torch.equal(body.embed_tokens.codes, tq.load(checkpoint).model.embed_tokens.codes)
    assert "UNEXPECTED" not in log.text
    tq.save(body, tmp_path / "body")
    again = tq.load(tmp_path / "body")
    assert_same_bits(again, body)
    assert again.config.quantization_config.embeddings == {"embed_tokens": (4, 2)}


def test_a_model_whose_only_quantized_layer_is_an_embedding(tmp_path):
    model = llama()
    tq.quantize_model(model, tq.TurboQuantConfig(embeddings={"*": (4, 2)}, skip=("*_proj",)), progress=False)
    tq.save(model, tmp_path / "m")
    loaded = tq.load(tmp_path / "m")
    assert_tied(loaded)
    assert_same_bits(model, loaded)


def test_dequantize(dense, tmp_path):
    model = load_model(dense, quantization_config=config_for(dense), dtype=torch.float32)
    expected = logits(model)
    model = model.dequantize()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    original = load_model(dense, dtype=torch.float32)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    assert model.all_tied_weights_keys == original.all_tied_weights_keys
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (dense.name in TIED)
    model.save_pretrained(tmp_path)
    assert_same_bits(model, load_model(tmp_path))


def test_generate_and_compile(checkpoint):
    model = tq.load(checkpoint, dtype=torch.float32)
    out = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out[0, TOKENS.shape[1]] == logits(model)[0, -1].argmax()
    compiled = torch.compile(lambda tokens: model(tokens, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), logits(model))


def test_moving_and_casting_keep_the_tie(checkpoint):
    model = copy.deepcopy(tq.load(checkpoint))
    torch.nn.Module.to(model, torch.float32)  # Transformers' own refuses for quantized models
    assert_tied(model)
    assert logits(model).dtype == torch.float32


def test_layer_errors_of_embeddings(dense):
    model, original = load_model(dense), load_model(dense)
    report = tq.quantize_model(model, config_for(dense), progress=False)
    errors = layer_errors(model, original)
    for layer in report.layers:
        assert errors[layer.name] == pytest.approx(layer.error, rel=0.02)


# -- the file has the weight under another name, or twice


def rewrite(folder, change):
    """Puts all tensors of a dense folder in one file, changed."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(5)
    folder = tmp_path / "llama"
    llama().save_pretrained(folder)
    return folder


def test_the_weight_may_come_under_the_name_of_the_head(folder):
    expected = load_model(folder, quantization_config=config_for(folder))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    loaded = load_model(folder, quantization_config=config_for(folder))
    assert_tied(loaded)
    assert_same_bits(loaded, expected)


def test_the_weight_may_come_twice(folder):
    expected = load_model(folder, quantization_config=config_for(folder))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_model(folder, quantization_config=config_for(folder))
    assert_tied(loaded)
    assert_same_bits(loaded, expected)


def test_two_weights_that_the_config_ties_are_an_error(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(tq.ConfigError, match=r"stored with different weights.*tie_word_embeddings"):
        load_model(folder, quantization_config=config_for(folder))


def test_a_bad_weight_is_reported_with_its_position(folder):
    rewrite(folder, lambda t: t["model.embed_tokens.weight"][3].fill_(torch.nan))
    with pytest.raises(tq.QuantizationError, match=r"model.embed_tokens: weight\[3, 0\] is nan"):
        load_model(folder, quantization_config=config_for(folder))


def test_weights_that_are_not_built_on_the_meta_device(folder, tmp_path, monkeypatch):
    """A model may name a device, or `torch.empty` be replaced: what the config ties is tied all the same."""
    expected = load_model(folder, quantization_config=config_for(folder))
    build = transformers.LlamaForCausalLM.__init__
    seen = []

    def on_cpu(self, config):
        build(self, config)
        for module in (self.lm_head, self.model.embed_tokens):
            module.weight = torch.nn.Parameter(torch.zeros(96, 64, dtype=torch.bfloat16, device="cpu"))
            seen.append(module.weight.device.type)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", on_cpu)
    loaded = load_model(folder, quantization_config=config_for(folder))
    assert_tied(loaded)
    assert_same_bits(loaded, expected)
    tq.save(loaded, tmp_path / "m")
    again = tq.load(tmp_path / "m")
    assert_tied(again)
    assert_same_bits(again, expected)
    assert set(seen) == {"cpu"}


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"embeddings": {"nothing": (4, 2)}},
            "'nothing' matches no embedding of LlamaForCausalLM: it has model.embed_tokens",
        ),
        ({"embeddings": {"*": (4, 2)}, "skip": ["lm_head"]}, "skip pattern 'lm_head' matches lm_head, which shares"),
        ({"embeddings": {"*": (4, 2)}, "layer_bits": {"lm_head": (4, 2)}}, "its planes are the embedding's"),
    ],
)
@pytest.mark.parametrize("way", ["on the fly", "in place"])
def test_settings_that_contradict_each_other(folder, options, message, way):
    config = tq.TurboQuantConfig(**options)
    quantize = {
        "in place": lambda: tq.quantize_model(llama(), config, progress=False),
        "on the fly": lambda: load_model(folder, quantization_config=config),
    }
    with pytest.raises(tq.ConfigError, match=message):
        quantize[way]()


@pytest.mark.parametrize("part", ["codes", "residual", "scales", "exponents"])
def test_missing_planes_of_an_embedding_are_an_error(checkpoint, tmp_path, part):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "turboquant_weights.json").unlink()
    rewrite(folder, lambda t: t.pop(f"model.embed_tokens.{part}"))
    with pytest.raises(tq.FormatError, match=rf"model.embed_tokens.{part} is missing"):
        load_model(folder)
    with pytest.raises(tq.FormatError, match=r"model\.embed_tokens"):
        tq.load(folder)


@pytest.mark.parametrize("change", [{"embeddings": {}}, {"embeddings": {"model.embed_tokens": [4, 1]}}], ids=str)
def test_config_that_contradicts_the_files_is_an_error(checkpoint, tmp_path, change):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "turboquant_weights.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(content))
    for way in (load_model, tq.load):
        with pytest.raises(tq.FormatError, match=r"model\.embed_tokens|lm_head\.codes"):
            way(folder)


def test_tripwire(tmp_path):
    """A Transformers without this package refuses checkpoints with quantized embeddings too."""
    for name, build in MODELS.items():
        for kind, skip in (("all", None), ("embedding", ("*_proj", "*.c_*"))):
            model = build()
            options = dict(embeddings={EMBEDDING.get(name, "*.embed_tokens"): (4, 2)})
            if skip:
                options["skip"] = [pattern for pattern in skip if ("c_" in pattern) == (name == "gpt2")]
                options["skip"] += ["lm_head"] if name not in TIED else []
            tq.quantize_model(model, tq.TurboQuantConfig(**options), progress=False)
            model.save_pretrained(tmp_path / f"{name}-{kind}")
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_on_the_gpu(dense, tmp_path, device_map):
    loaded = load_model(dense, quantization_config=config_for(dense), device_map=device_map)
    tq.save(loaded, tmp_path / "m")
    again = tq.load(tmp_path / "m", device_map=device_map)
    assert_same_bits(loaded, again)
    if dense.name in TIED:
        assert_tied(again)
