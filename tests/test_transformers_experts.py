"""Mixtures of experts of Transformers: quantized in place, while loading, saved, loaded; the routing is the model's own."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.checkpoint import verify  # noqa: E402
from turboquant_weights.evaluation import layer_errors  # noqa: E402
from turboquant_weights.experts import ExpertStack, find_stacks  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TOKENS = torch.arange(12)[None] * 7 % 96
CONFIG = tq.TurboQuantConfig(4, 2, seed=5, layer_bits={"*.experts.down_proj": (3, 1)})


def mixtral():  # its files hold w1, w2, w3 of each expert
    return transformers.MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=4)


def qwen2_moe():  # a shared expert beside the routed ones
    sizes = dict(intermediate_size=96, moe_intermediate_size=48, shared_expert_intermediate_size=64)
    return transformers.Qwen2MoeConfig(**SIZES, **sizes, num_experts=6, num_experts_per_tok=2)


def qwen3_moe():  # a dense block, a sparse one, and a tied head
    sizes = dict(intermediate_size=96, moe_intermediate_size=32, head_dim=16, mlp_only_layers=[0])
    return transformers.Qwen3MoeConfig(**SIZES, **sizes, num_experts=8, num_experts_per_tok=3, tie_word_embeddings=True)


def gpt_oss():  # transposed, with biases, gate and up interleaved; a square stack
    return transformers.GptOssConfig(
        **SIZES,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        layer_types=["full_attention"] * 2,
    )


def llama4():  # outside of Transformers' interface: a product with all experts at once
    sizes = dict(intermediate_size=48, intermediate_size_mlp=96, head_dim=16)
    return transformers.Llama4TextConfig(**SIZES, **sizes, num_local_experts=4)


def jetmoe():  # one stack per module, experts in attention, too
    return transformers.JetMoeConfig(
        **SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, kv_channels=16
    )


def nemotron_h():  # no gate: up and down alone
    sizes = dict(intermediate_size=96, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, head_dim=16)
    routing = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    sizes |= {**SIZES, "num_hidden_layers": 2}
    return transformers.NemotronHConfig(**sizes, **routing, layers_block_type=["attention", "moe"])


FAMILIES = {f.__name__: f for f in (mixtral, qwen2_moe, qwen3_moe, gpt_oss, llama4, jetmoe, nemotron_h)}
STACKS = {"qwen3_moe": 2, "jetmoe": 8, "nemotron_h": 2}


def build(name):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.bfloat16)
    with torch.no_grad():  # some classes leave experts empty, and zero biases hide mix-ups
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.dim() == 1))
    return model.eval()


def config_for(name):
    return CONFIG if name not in ("jetmoe", "nemotron_h") else tq.TurboQuantConfig(4, 2, seed=5)


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("dense") / request.param
    build(request.param).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(2)
    model = build("mixtral")
    tq.quantize_model(model, CONFIG, progress=False)
    folder = tmp_path_factory.mktemp("saved") / "model"
    tq.save(model, folder)
    return folder


@pytest.fixture
def log(caplog):
    transformers.utils.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        yield caplog
    transformers.utils.logging.disable_propagation()


def load_model(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def assert_same_bits(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def stacks_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def test_round_trip(dense, tmp_path, log):
    """On the fly equals in place; what is saved and loaded in any way is bit-identical and computes the same."""
    name = dense.name
    model = load_model(dense)
    report = tq.quantize_model(model, config_for(name), progress=False)
    stacks = stacks_of(model)
    assert len(stacks) == STACKS.get(name, 4)
    assert list(report.config.experts) == sorted(stacks)
    assert not [key for key, parameter in model.named_parameters() if parameter.dim() == 3 and parameter.is_floating_point()]
    stored = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    assert report.total_bytes == sum(stored.values())
    on_the_fly = load_model(dense, quantization_config=config_for(name))
    assert_same_bits(on_the_fly, model)
    assert on_the_fly.config.quantization_config == report.config
    tq.save(model, tmp_path / "saved")
    info = verify(tmp_path / "saved").info
    assert {layer.name for layer in info.layers if layer.kind == "experts"} == set(stacks)
    assert sum(layer.nbytes for layer in info.layers) == sum(row.bytes for row in report.layers)
    on_the_fly.save_pretrained(tmp_path / "plain")
    expected = logits(model)
    for folder, options in [("saved", {}), ("plain", {}), ("saved", {"device_map": "auto"})]:
        again = load_model(tmp_path / folder, **options)
        assert_same_bits(again, model)
        assert torch.equal(logits(again), expected)
    assert not [record for record in log.records if "experts" in record.message or "MISSING" in record.message]


def test_computes_what_its_decoded_weights_do(dense, tmp_path):
    """Against the model's own code on dense parameters: routing, gates, biases and orientation are right."""
    model = load_model(dense, quantization_config=config_for(dense.name), dtype=torch.float32)
    expected = load_model(dense, dtype=torch.float32)
    original = logits(expected)
    if hasattr(expected, "set_experts_implementation"):
        expected.set_experts_implementation("eager")
    got = logits(model)
    errors = layer_errors(model, expected)
    assert set(stacks_of(model)) <= set(errors)
    assert max(errors.values()) < 0.01
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, ExpertStack):
                expected.get_parameter(name).copy_(module.dequantize())
            elif isinstance(module, tq.TurboQuantLinear):
                expected.get_submodule(name).weight.copy_(module.dequantize())
    torch.testing.assert_close(got, logits(expected), rtol=0, atol=3e-4 * float(original.abs().max()))
    back = model.dequantize()
    assert not stacks_of(back)
    torch.testing.assert_close(logits(back), logits(expected), rtol=0, atol=3e-4 * float(original.abs().max()))
    back.save_pretrained(tmp_path / "dense")
    loaded = load_model(tmp_path / "dense").state_dict()
    assert loaded.keys() == back.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in back.state_dict().items())


def test_base_planes_alone(checkpoint):
    model, base = tq.load(checkpoint), tq.load(checkpoint, base_only=True)
    for name, stack in stacks_of(base).items():
        assert stack.residual is None
        assert torch.equal(stack.codes, stacks_of(model)[name].codes)
    assert not torch.equal(logits(base), logits(model))
    assert base.config.quantization_config.layer_bits == dict.fromkeys(
        (name for name in stacks_of(base) if name.endswith("down_proj")), (3, 0)
    )


def test_any_setting_of_the_models_own_implementation(checkpoint):
    """What the model would choose for dense experts does not reach quantized ones; generation and training go through."""
    model = tq.load(checkpoint)
    expected = logits(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert torch.equal(logits(model), expected)
        again = load_model(checkpoint, experts_implementation=implementation)
        assert torch.equal(logits(again), expected)
    out = model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 15)
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    model(inputs_embeds=embedded).logits.float().square().sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_compiles_whole(checkpoint):
    model = tq.load(checkpoint, dtype=torch.float32)
    compiled = torch.compile(model.model.layers[0].mlp.experts, fullgraph=True, backend="aot_eager")
    x, chosen, weights = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
    expected = model.model.layers[0].mlp.experts(x, chosen, weights)
    torch.testing.assert_close(compiled(x, chosen, weights), expected)


def test_a_dense_stack_beside_a_quantized_one(tmp_path):
    torch.manual_seed(3)
    for name in ("gpt_oss", "qwen3_moe"):
        model = build(name)
        model.save_pretrained(tmp_path / name)
        config = tq.TurboQuantConfig(4, 4, skip=("lm_head", "*.gate_up_proj"))
        on_the_fly = load_model(tmp_path / name, quantization_config=config)
        report = tq.quantize_model(model, config, progress=False)
        assert len(report.config.skip) == 1 + STACKS.get(name, 4) // 2
        assert report.skipped_bytes > 0
        assert on_the_fly.config.quantization_config == report.config
        assert_same_bits(on_the_fly, model)
        tq.save(model, tmp_path / f"{name}-q")
        again = tq.load(tmp_path / f"{name}-q")
        assert again.config.quantization_config == report.config
        assert torch.equal(logits(again), logits(model))


def test_only_experts_quantized(tmp_path):
    """The tripwire then has the name of a stack, and a Transformers without this package stops at it."""
    torch.manual_seed(4)
    model = build("qwen3_moe")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    report = tq.quantize_model(model, tq.TurboQuantConfig(4), skip=linears, progress=False)
    assert {row.kind for row in report.layers} == {"experts"}
    tq.save(model, tmp_path / "out")
    wires = [key for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items() if tensor.numel() == 0]
    assert wires in [[name] for name in report.config.experts]
    assert torch.equal(logits(tq.load(tmp_path / "out")), logits(model))
    assert_stops_without_the_package(tmp_path / "out")


def assert_stops_without_the_package(folder):
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


def test_without_the_package_loading_stops(checkpoint):
    assert_stops_without_the_package(checkpoint)


def test_the_body_alone(checkpoint):
    body = transformers.AutoModel.from_pretrained(checkpoint).eval()
    model = tq.load(checkpoint)
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_embeddings_heads_and_experts_together(tmp_path):
    torch.manual_seed(5)
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "dense")
    config = tq.TurboQuantConfig(4, 1, embeddings={"*.embed_tokens": (4, 2)})
    tq.quantize_model(model, config, progress=False)
    assert_same_bits(load_model(tmp_path / "dense", quantization_config=config), model)
    tq.save(model, tmp_path / "out")
    again = tq.load(tmp_path / "out")
    assert again.lm_head.codes is again.model.embed_tokens.codes
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("part", ["codes", "residual", "scales", "exponents"])
def test_a_missing_or_wrong_plane_is_an_error(checkpoint, tmp_path, part):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("turboquant_weights.json"))
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.1.mlp.experts.gate_up_proj.{part}"
    plane = tensors.pop(key)
    for change in ({}, {key: plane[1:]}, {key: plane.float()}):
        save_file({**tensors, **change}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(tq.FormatError, match=r"gate_up_proj\."):
            tq.load(folder)
        with pytest.raises(tq.FormatError, match=r"gate_up_proj\."):
            load_model(folder)


def test_a_stack_that_the_config_forgets_is_an_error(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("turboquant_weights.json"))
    content = json.loads((folder / "config.json").read_text())
    experts = content["quantization_config"].pop("experts")
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(tq.FormatError, match=r"experts"):
        load_model(folder)
    experts["model.layers.7.mlp.experts.down_proj"] = "out_in"
    content["quantization_config"]["experts"] = experts
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(tq.FormatError, match="holds no quantized layer of that name"):
        tq.load(folder)


def test_bad_weights_while_loading_name_expert_and_position(tmp_path):
    model = build("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5, 7] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(tq.QuantizationError, match=r"experts\.down_proj\[2\]: weight|experts\.down_proj\[2\]\["):
        load_model(tmp_path, quantization_config=tq.TurboQuantConfig())


def test_stacks_left_dense_while_loading_are_warned_of(tmp_path, log):
    """With the reason and the bytes; never in silence."""
    model = build("mixtral")
    model.model.layers[0].mlp.extra = torch.nn.Parameter(torch.ones(3, 8, 8, dtype=torch.bfloat16))
    stacks, left = find_stacks(model, CONFIG)
    assert list(left) == ["model.layers.0.mlp.extra"]
    assert len(stacks) == 4
    model.save_pretrained(tmp_path)
    load_model(tmp_path, quantization_config=tq.TurboQuantConfig(skip=("lm_head", "*.experts.down_proj")))
    assert not [record for record in log.records if "stays dense" in record.message]


def test_files_with_prefix_patterns_for_conversions(checkpoint):
    """A conversion whose pattern is the beginning of a plane's name must not touch the plane."""
    from transformers.core_model_loading import Transpose, WeightConverter

    from turboquant_weights.integrations.transformers import _without_conversions_of

    model = tq.load(checkpoint)
    bad = WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(1, 2)])
    good = WeightConverter(["q.weight", "k.weight"], "qk.weight", [Transpose(0, 1)])
    assert good in _without_conversions_of(model, [bad, good])
    matched = bad.rename_source_key("model.layers.0.mlp.experts.gate_up_proj.codes")[1] is not None
    assert (bad not in _without_conversions_of(model, [bad, good])) == matched
