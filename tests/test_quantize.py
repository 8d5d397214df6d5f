"""quantize_model with a text and with budgets: what it chooses, what it saves, and that an interrupted run goes on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_llama
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from turboquant_weights import (
    Calibration,
    ConfigError,
    QuantizationError,
    TurboQuantConfig,
    TurboQuantEmbedding,
    TurboQuantLinear,
    load,
    quantize_model,
    save,
)
from turboquant_weights.calibration import Calibrator
from turboquant_weights.evaluation import resident_bytes

SMALL = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


def gemma() -> nn.Module:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    )


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=131, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))


def tokens(count: int = 12) -> torch.Tensor:
    return torch.randint(0, 131, (count, 24), generator=torch.Generator().manual_seed(2))


def distance(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        a, b = (m.eval()(input_ids=tokens(16)[12:]).logits for m in (model, other))
    return float((a - b).square().mean() / a.square().mean())


@pytest.mark.parametrize("build", [tiny_llama, gemma, qwen2, gpt2, moe])
def test_any_decoder_is_calibrated_and_saved(build, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = (build(**SMALL) if build is tiny_llama else build()).eval()
    original = copy.deepcopy(model)
    config = TurboQuantConfig(bits=4, residual_bits=2, embeddings={"*": (4, 4)})
    report = quantize_model(model, config, calibration=tokens(), progress=False)
    assert report.uncalibrated == []
    assert {layer.name for layer in report.layers if layer.kind == "linear"} == {
        name
        for name, module in original.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    assert distance(original, model) < 5e-3
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()[:2]).logits, model(input_ids=tokens()[:2]).logits)


def test_tied_head_is_rounded_for_the_head_and_stays_tied(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_llama(**SMALL).eval()
    original = copy.deepcopy(model)
    config = TurboQuantConfig(bits=4, residual_bits=4, embeddings={"*": (3, 0)})
    free = copy.deepcopy(model)
    quantize_model(free, config, progress=False)
    quantize_model(model, config, calibration=tokens(), progress=False)
    assert isinstance(model.lm_head, TurboQuantLinear)
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert isinstance(model.model.embed_tokens, TurboQuantEmbedding)
    assert distance(original, model) < distance(original, free)


@pytest.mark.parametrize("build", [tiny_llama, qwen2])
@pytest.mark.parametrize("text", [None, tokens()])
def test_a_budget_is_kept_on_disk(build, text, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build(vocab_size=2000, hidden_size=128, intermediate_size=256) if build is tiny_llama else build()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense")
    report = quantize_model(model, calibration=text, target_ratio=3.0, progress=False)
    save(model, tmp_path / "out")
    size, dense = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "dense"))
    if build is tiny_llama:  # of the other one, half the file is headers
        assert 3.0 <= dense / size < 3.3
    assert report.expected_kl is not None
    assert len({layer.label for layer in report.layers}) > 1
    assert report.config.layer_bits
    again = load(tmp_path / "out", device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()[:2]).logits, model(input_ids=tokens()[:2]).logits)
    if build is tiny_llama:
        assert resident_bytes(again) < resident_bytes(model) * 1.01


def test_bits_and_kl_budgets() -> None:
    model = tiny_llama(vocab_size=2000, hidden_size=128, intermediate_size=256)
    sizes = []
    for budget in ({"target_bits": 5.5}, {"target_bits": 4.5}, {"max_kl": 1e-7}, {"max_kl": 1e-3}):
        copied = copy.deepcopy(model)
        report = quantize_model(copied, calibration=tokens(), progress=False, **budget)
        sizes.append(report.total_bytes)
        if "max_kl" in budget:
            assert report.expected_kl <= budget["max_kl"]
        else:
            assert 8 * report.total_bytes <= budget["target_bits"] * sum(p.numel() for p in model.parameters())
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[3]
    for budget, message in (
        ({"target_bits": 5, "max_kl": 1}, "exactly one"),
        ({"target_ratio": -1}, "positive"),
        ({"target_ratio": 20.0}, "times smaller than bf16 is possible"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize_model(model, progress=False, **budget)
    assert not any(isinstance(module, TurboQuantLinear) for module in model.modules()), "nothing was replaced"


def test_an_interrupted_run_goes_on_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = tiny_llama(**{**SMALL, "num_hidden_layers": 4}).eval()
    config = TurboQuantConfig(embeddings={"*": (4, 2)})
    whole = copy.deepcopy(model)
    quantize_model(whole, config, calibration=tokens(), progress=False)
    settings = Calibration(tokens(), resume=tmp_path / "resume")
    done = []
    quantize_block = Calibrator._quantize_block

    def interrupted(self: Calibrator, index: int, *args: object) -> object:
        if index == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(index)
        return quantize_block(self, index, *args)

    monkeypatch.setattr(Calibrator, "_quantize_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(copy.deepcopy(model), config, calibration=settings, progress=False)
    done.append(None)
    again = copy.deepcopy(model)
    quantize_model(again, config, calibration=settings, progress=False)
    assert done == [0, 1, None, 2, 3], "finished blocks are not done again"
    wanted, found = whole.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.weight.data += 1
    for changed, settings_of_it in ((other, config), (copy.deepcopy(model), TurboQuantConfig(bits=3))):
        with pytest.raises(ConfigError, match="another run"):
            quantize_model(changed, settings_of_it, calibration=settings, progress=False)
    (tmp_path / "resume" / "block-00001.safetensors").write_bytes(b"12345678")
    with pytest.raises(ConfigError, match="block-00001"):
        quantize_model(copy.deepcopy(model), config, calibration=settings, progress=False)


def test_one_token_of_text_is_enough_not_to_fail() -> None:
    model = tiny_llama()
    quantize_model(model, calibration=torch.zeros(1, 1, dtype=torch.int64), progress=False)
    assert torch.isfinite(model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits).all()


def test_what_cannot_be_calibrated_is_an_error_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(QuantizationError, match="blocks"):
        quantize_model(model, calibration=torch.zeros(1, 4, dtype=torch.int64), skip=[], progress=False)
    with pytest.raises(QuantizationError, match="no input embedding"):
        quantize_model(model, target_ratio=3.0, skip=[], progress=False)
    with pytest.raises(ConfigError, match="tokenizer="):
        quantize_model(tiny_llama(), calibration="some text", progress=False)
    assert type(model[0]) is nn.Linear
