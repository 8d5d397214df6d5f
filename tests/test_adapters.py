"""PEFT on quantized layers, on tiny random models: ``get_peft_model`` is all it needs, and merging says what it costs."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_model import tiny_llama  # noqa: E402

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.integrations.peft import LoraEmbedding, LoraLinear  # noqa: E402

TOKENS = torch.arange(24).view(2, 12) * 7 % 97
EMBEDDINGS = {"model.embed_tokens": (4, 2)}


def quantized(bits=(4, 0), embeddings=None, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = tiny_llama(**{"attention_bias": True, **settings}).to(dtype).eval()
    with torch.no_grad():  # fresh biases are zero
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tq.quantize_model(model, tq.TurboQuantConfig(*bits, embeddings=embeddings), progress=False)
    return model


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def trained(model, steps=6, rate=3e-2, **options):
    """With an adapter that is worth something; returns the first and the last loss too."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, lora(**options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def layers(model, kind=tq.TurboQuantLinear):
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, kind)
    }


def planes(model):
    return {
        f"{name}.{plane}": tensor.clone()
        for name, layer in {**layers(model), **layers(model, tq.TurboQuantEmbedding)}.items()
        for plane, tensor in (*layer.packed._asdict().items(), ("bias", getattr(layer, "bias", None)))
        if tensor is not None
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "bias of lora": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding dora": {"target_modules": ["embed_tokens"], "use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_merge_unmerge_unload(variant):
    """Training lowers the loss; the merged layers are PEFT's own dense merge, rounded; unmerging restores every bit."""
    model = quantized(embeddings=EMBEDDINGS)
    before = planes(model)
    adapted, losses = trained(model, **VARIANTS[variant])
    assert losses[-1] < losses[0] - 0.05
    assert_same(planes(adapted), before)
    assert {type(m) for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} <= {LoraLinear, LoraEmbedding}
    expected = logits(adapted)

    dense = copy.deepcopy(adapted)  # the same adapters on the decoded weights, merged by PEFT
    for wrapper in dense.modules():
        base = getattr(wrapper, "base_layer", None)
        if isinstance(base, tq.TurboQuantEmbedding):
            wrapper.base_layer = base.to_embedding()
        elif isinstance(base, tq.TurboQuantLinear):
            linear = torch.nn.Linear(base.in_features, base.out_features)
            linear.weight, linear.bias = torch.nn.Parameter(base.dequantize()), copy.copy(base.bias)
            wrapper.base_layer = linear
    dense = dense.merge_and_unload()

    adapted.merge_adapter()
    merged = logits(adapted)
    assert 0 < (merged - expected).norm() / expected.norm() < 0.2
    report = tq.merge_report(adapted)
    for name, error in report.layers.items():
        layer = adapted.get_base_model().get_submodule(name).base_layer
        weight = dense.get_submodule(name).weight.detach()
        again = tq.TurboQuantLinear.from_linear(_linear(weight), tq.TurboQuantConfig(**layer.settings))
        assert torch.equal(layer.codes, again.codes)
        assert torch.equal(layer.scales, again.scales)
        assert error.rounding == pytest.approx(layer.quantization_error, rel=1e-3)
        if getattr(layer, "bias", None) is not None:
            torch.testing.assert_close(layer.bias, dense.get_submodule(name).bias)
    unload = copy.deepcopy(adapted).merge_and_unload()
    assert torch.equal(logits(unload), merged)
    assert "merged into" in str(tq.merge_report(unload))

    adapted.unmerge_adapter()
    assert_same(planes(adapted), before)
    assert torch.equal(logits(adapted), expected)
    with pytest.raises(tq.ConfigError, match="no adapter was merged"):
        tq.merge_report(adapted)


def _linear(weight):
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    return linear


def test_adapters_are_merged_in_turn_and_rounded_once():
    adapted, _ = trained(quantized((4, 4)))
    torch.manual_seed(2)
    adapted.add_adapter("second", lora())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".second." in name:
                parameter.normal_(std=0.05)
    before = planes(adapted)
    adapted.base_model.set_adapter(["default", "second"])
    adapted.merge_adapter()
    at_once = planes(adapted)
    adapted.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that there is more than one
        adapted.merge_adapter(["default"])
        adapted.merge_adapter(["second"])
    assert_same(planes(adapted), at_once)
    adapted.unmerge_adapter()
    assert_same(planes(adapted), before)


def test_a_merge_that_fails_changes_nothing():
    adapted, _ = trained(quantized(), target_modules=["q_proj"])
    before = planes(adapted)
    layer = next(m for m in adapted.modules() if isinstance(m, LoraLinear))
    with torch.no_grad():
        layer.lora_B["default"].weight[3] = torch.nan
    for safe in (True, False):
        with pytest.raises(ValueError, match=r"NaNs detected|the weight with default merged: weight\[3, 0\] is nan"):
            adapted.merge_adapter(safe_merge=safe)
        assert_same(planes(adapted), before)
        assert not layer.merged


def test_a_layer_that_was_changed_while_merged_cannot_be_unmerged():
    adapted, _ = trained(quantized((4, 2)), target_modules=["q_proj"])
    adapted.merge_adapter()
    for layer in layers(adapted).values():
        layer.base_only_()
    with pytest.raises(tq.ConfigError, match="the planes from before cannot be used"):
        adapted.unmerge_adapter()


def test_an_update_that_rounding_hides_is_a_warning():
    adapted, _ = trained(quantized(), steps=1, rate=1e-3)
    with pytest.warns(UserWarning, match="more than half of the update is lost"):
        adapted.merge_adapter()
    report = tq.merge_report(adapted)
    assert 0.5 < report.lost < 3
    finer, _ = trained(quantized((4, 4)), steps=1, rate=1e-3)
    finer.merge_adapter()
    assert tq.merge_report(finer).lost < report.lost / 10


def test_a_small_update_survives_in_the_original_model():
    """What the warning recommends: not the planes, which lie on the grid already, but the weights that they came from."""
    torch.manual_seed(0)
    original = tiny_llama().eval()
    base = copy.deepcopy(original)
    config = tq.TurboQuantConfig(4)
    tq.quantize_model(base, config, progress=False)
    adapted, _ = trained(copy.deepcopy(base), rate=1e-4)
    updates = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLinear)
    }
    with pytest.warns(UserWarning, match="merge it into the original model"):
        merged = copy.deepcopy(adapted).merge_and_unload()
    fresh = peft.get_peft_model(copy.deepcopy(original), lora())
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(adapted))
    fresh = fresh.merge_and_unload()
    tq.quantize_model(fresh, config, progress=False)

    def share(model):
        """Of the update, how much of it the weights of ``model`` have beyond those of ``base``."""
        change = {n: model.get_submodule(n).dequantize() - base.get_submodule(n).dequantize() for n in updates}
        norm = sum(update.square().sum() for update in updates.values())
        return float(sum((change[name] * update).sum() for name, update in updates.items()) / norm)

    assert abs(share(merged)) < 0.3
    assert share(fresh) > 0.7


def test_save_and_reload(tmp_path):
    """On a model loaded from its files, a trained adapter gives the same outputs; merged, the model is saved as ours."""
    tq.save(quantized(embeddings=EMBEDDINGS), tmp_path / "base")
    adapted, _ = trained(tq.load(tmp_path / "base"), target_modules=["embed_tokens", "q_proj", "down_proj"])
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(tq.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert len([m for m in again.modules() if isinstance(m, (LoraLinear, LoraEmbedding))]) == 5
    with torch.no_grad(), again.disable_adapter():
        assert torch.equal(logits(again), logits(tq.load(tmp_path / "base")))
    with pytest.raises(tq.ConfigError, match="has an adapter: save that alone"):
        tq.save(again, tmp_path / "merged")
    merged = again.merge_and_unload()
    tq.save(merged, tmp_path / "merged")
    assert torch.equal(logits(tq.load(tmp_path / "merged")), logits(merged))


def test_an_adapter_merged_into_a_tied_embedding_leaves_the_head_alone(tmp_path, caplog):
    """PEFT warns of tied weights, and for dense ones rightly: the head would change too."""
    model = quantized((4, 4), embeddings={"model.embed_tokens": (4, 4)})
    head = model.lm_head.dequantize()
    adapted, _ = trained(model, target_modules=["embed_tokens"])
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.lm_head.dequantize(), head)
    assert (logits(merged) - expected).norm() < 0.02 * expected.norm()
    transformers.utils.logging.enable_propagation()
    tq.save(merged, tmp_path / "m")
    transformers.utils.logging.disable_propagation()
    assert "lm_head was tied" in caplog.text
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(tq.load(tmp_path / "m")), logits(merged))


def test_transformers_own_adapters(tmp_path):
    """``model.add_adapter``, ``save_pretrained``, ``load_adapter``."""
    model = quantized()
    tq.save(model, tmp_path / "base")
    try:
        model.add_adapter(lora(init_lora_weights=False))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"Transformers {transformers.__version__} and PEFT {peft.__version__}: {error}")
    assert {type(m) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {LoraLinear}
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    again = tq.load(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    with pytest.raises(tq.ConfigError, match="has an adapter"):
        tq.save(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_an_adapter_for_other_shapes_is_one_clear_error(tmp_path):
    adapted, _ = trained(quantized(hidden_size=64), steps=1)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(tq.ConfigError, match=r"of the adapter is \[4, 64\], the model needs \[4, 32\]") as caught:
        peft.PeftModel.from_pretrained(quantized(), tmp_path)
    assert "\n" not in str(caught.value)


def test_models_with_adapters_are_not_quantized():
    model = peft.get_peft_model(tiny_llama(), lora())
    with pytest.raises(tq.ConfigError, match="q_proj has an adapter: merge it, or quantize first"):
        tq.quantize_model(model, progress=False)


def test_other_methods_train_and_say_that_they_cannot_be_merged():
    before = planes(quantized())
    for config in (
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ):
        adapted = peft.get_peft_model(quantized(), config)
        adapted(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        with pytest.raises(tq.QuantizationError, match="decoded from packed planes and cannot be written to"):
            adapted.merge_adapter()
        assert_same(planes(adapted), before)


def test_inits_that_rewrite_the_base_weight_are_refused():
    for init in ("pissa", "olora"):
        with pytest.raises(tq.QuantizationError, match="cannot be written to"):
            peft.get_peft_model(quantized(), lora(init_lora_weights=init, target_modules=["q_proj"]))


def test_conv1d_and_scaled_embeddings():
    """GPT-2's layers are stored transposed, Gemma's embedding multiplies what it looks up."""
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4))
    gemma = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=16
        )
    )
    cases = (
        (gpt, ["c_attn", "c_proj"], {}, True),
        (gemma, ["embed_tokens", "q_proj"], {"model.embed_tokens": (4, 4)}, False),
    )
    for model, targets, embeddings, fan_in_fan_out in cases:
        config = tq.TurboQuantConfig(4, 4, embeddings=embeddings)
        tq.quantize_model(model.eval(), config, progress=False)
        adapted, losses = trained(model, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
        assert losses[-1] < losses[0]
        expected = logits(adapted)
        merged = adapted.merge_and_unload()
        assert (logits(merged) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_autocast(reentrant):
    """The same gradients with checkpointing; under bf16 autocast nearly so. Adapters stay in float32."""

    def gradients(checkpointing, autocast):
        torch.manual_seed(1)
        model = quantized()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        adapted = peft.get_peft_model(model, lora(init_lora_weights="gaussian")).train()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.02, 0.02, parameter.numel()).view_as(parameter))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            adapted(TOKENS, labels=TOKENS).loss.backward()
        return torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])

    plain = gradients(False, False)
    assert plain.norm() > 0
    torch.testing.assert_close(gradients(True, False), plain)
    half = gradients(True, True)
    assert half.dtype == torch.float32
    assert (half - plain).norm() < 0.05 * plain.norm()


def test_half_precision_models_train():
    adapted, losses = trained(quantized(dtype=torch.bfloat16))
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_fused_projections(tmp_path):
    """Fused first, then adapted: the same results, gradients and merges as without fusing; and back."""
    separate, separate_losses = trained(quantized())
    model = quantized()
    assert len(tq.fuse_projections(model)) == 4
    fused, losses = trained(model)
    assert losses == pytest.approx(separate_losses, rel=1e-4)
    peft.set_peft_model_state_dict(fused, peft.get_peft_model_state_dict(separate))
    torch.testing.assert_close(logits(fused), logits(separate))
    before = planes(fused)
    separate.merge_adapter()
    fused.merge_adapter()
    torch.testing.assert_close(logits(fused), logits(separate))
    fused.unmerge_adapter()
    assert_same(planes(fused), before)
    assert tq.fuse_projections(separate.get_base_model()) == []  # inside adapters nothing is fused
    merged = fused.merge_and_unload()
    expected = logits(merged)
    tq.save(merged, tmp_path / "m")
    torch.testing.assert_close(logits(tq.load(tmp_path / "m")), expected)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_trainer(tmp_path, precision):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"input_ids": TOKENS[index % 2], "labels": TOKENS[index % 2]}

    adapted = peft.get_peft_model(quantized(), lora())
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=8, per_device_train_batch_size=2, learning_rate=3e-2, logging_steps=1,
        gradient_checkpointing=True, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **precision,
    )  # fmt: skip
    trainer = transformers.Trainer(model=adapted, args=arguments, train_dataset=Data())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    tolerance = dict(atol=2e-2, rtol=0) if precision else {}  # the trainer leaves autocast on in the model that it trained
    torch.testing.assert_close(logits(again), logits(adapted.eval()), **tolerance)
    with pytest.raises(ValueError, match=r"fine-tun|quantized"):  # Transformers' own word for it
        transformers.Trainer(model=quantized(), args=arguments, train_dataset=Data())


def test_registers_when_the_package_is_imported_first():
    """This file imports PEFT first."""
    code = """
import turboquant_weights as tq, torch
from peft import LoraConfig, get_peft_model
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
tq.quantize_model(model, progress=False)
adapted = get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
assert [type(layer).__module__ for layer in adapted.base_model.model] == ["turboquant_weights.integrations.peft"] * 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
