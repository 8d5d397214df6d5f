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
    OPTConfig,
    OPTForCausalLM,
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
    plan_bits,
    quantize_model,
    save,
)
from turboquant_weights.calibration import Calibrator
from turboquant_weights.evaluation import resident_bytes
from turboquant_weights.modules import save_module
from turboquant_weights.resume import BlockStore, fingerprint

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


@pytest.mark.parametrize("text", [None, tokens()])
def test_layers_that_share_a_weight_in_a_budget(text, tmp_path: Path) -> None:
    """One unit, in which every set of planes counts: one without calibration, one per layer with it."""
    torch.manual_seed(1)
    model = tiny_llama(vocab_size=131, hidden_size=128, intermediate_size=256, initializer_range=0.1)
    gates = [layer.mlp.gate_proj for layer in model.model.layers]
    gates[1].weight = gates[0].weight
    names = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    plan = plan_bits(model, tokens=text, progress=False)
    (unit,) = [unit for unit in plan.units if set(names) & set(unit.names)]
    assert set(names) <= set(unit.names)
    assert len(unit.shapes) == len(unit.names) - (text is None)
    assert unit.sensitivity > 0
    assert plan.dense_bytes == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.05)
    dense = 2 * sum(p.numel() for p in model.parameters())
    report = quantize_model(model, calibration=text, target_ratio=3.0, progress=False)
    assert report.dense_bytes == dense
    assert plan.dense_bytes - dense == plan.allocate(target_ratio=3.0).total_bytes - report.total_bytes  # the header
    a, b = (model.get_submodule(name) for name in names)
    assert isinstance(a, TurboQuantLinear)
    assert isinstance(b, TurboQuantLinear)
    assert (a.label, a.codes is b.codes) == (b.label, text is None)
    assert report.ratio >= 3.0
    assert torch.isfinite(model(input_ids=tokens()[:2]).logits).all()
    save_module(model, tmp_path / "out", False)  # Transformers refuses what shares memory and is not declared to
    allocation = plan.allocate(target_ratio=3.0)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == pytest.approx(allocation.total_bytes, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_a_budget_of_a_float32_model_counts_what_stays_dense_in_float32(tied, tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {**SMALL, "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 256}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied))
    model.register_buffer("table", torch.zeros(1000))
    parameters = sum(p.numel() for p in model.parameters())
    allocation = plan_bits(model, progress=False).allocate(target_ratio=1.3)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    report = quantize_model(model, target_ratio=1.3, progress=False)
    save(model, tmp_path / "out")
    size, dense = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "dense"))
    assert dense / size >= 1.3
    assert report.ratio >= 1.3
    # Of both, all but the headers.
    assert report.dense_bytes == 2 * (parameters + 1000)
    headers = allocation.total_bytes - report.total_bytes
    assert headers == allocation.dense_bytes - report.dense_bytes
    assert 0 < headers < 16000


def opt() -> nn.Module:
    config = OPTConfig(vocab_size=131, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
    config.word_embed_proj_dim, config.max_position_embeddings = 64, 300
    return OPTForCausalLM(config)


@pytest.mark.parametrize("text", [None, tokens()])
def test_an_embedding_that_cannot_be_quantized_stays_dense_in_a_budget(text) -> None:
    """OPT's positions are looked up by the attention mask."""
    torch.manual_seed(1)
    model = opt().eval()
    name = "model.decoder.embed_positions"
    plan = plan_bits(model, tokens=text, progress=False)
    assert plan.embeddings == {"model.decoder.embed_tokens"}
    assert plan.left == {name: f"{name} is a OPTLearnedPositionalEmbedding that packed planes cannot stand for"}
    original = copy.deepcopy(model)
    report = quantize_model(model, calibration=text, target_ratio=1.4, progress=False)
    assert report.reasons[f"{name}.weight"] == plan.left[name]
    assert torch.equal(model.get_parameter(f"{name}.weight"), original.get_parameter(f"{name}.weight"))
    assert distance(original, model) < 0.05


@pytest.mark.parametrize("text", [None, tokens()])
@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens", "*embed*"])
def test_a_tied_embedding_may_be_left_out_of_a_budget(pattern, text) -> None:
    torch.manual_seed(1)
    model = tiny_llama(**SMALL).eval()
    weight = model.lm_head.weight
    report = quantize_model(model, skip=[pattern], calibration=text, target_ratio=2.0, progress=False)
    assert report.ratio >= 2.0
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert not report.config.embeddings


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


def test_a_mistake_binds_no_resume_folder(tmp_path: Path) -> None:
    model = tiny_llama(**SMALL)
    settings = Calibration(tokens(2), resume=tmp_path / "r")
    for config, budget in ((TurboQuantConfig(layer_bits={"no such layer": (4, 1)}), {}), (None, {"target_ratio": 50})):
        with pytest.raises(ConfigError, match=r"no such layer|is possible"):
            quantize_model(model, config, calibration=settings, progress=False, **budget)
    (tmp_path / "r" / ".run.json.writing").write_text("{")  # killed while it wrote
    quantize_model(model, calibration=settings, progress=False)
    assert (tmp_path / "r" / "block-00001.safetensors").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no resume folder"):
        quantize_model(tiny_llama(), calibration=Calibration(tokens(2), resume=tmp_path / "other"), progress=False)


def test_a_resume_folder_is_for_one_process_and_one_way_to_cut_the_text(tmp_path: Path) -> None:
    text = tokens(4)
    model = tiny_llama(**SMALL)
    with (
        BlockStore(tmp_path / "r", fingerprint(model, {}, text)),
        pytest.raises(ConfigError, match="another process"),
    ):
        BlockStore(tmp_path / "r", fingerprint(model, {}, text))
    assert fingerprint(model, {}, text) != fingerprint(model, {}, text.view(8, -1))
    assert fingerprint(model, {}, text) == fingerprint(model, {}, text.clone())


def test_a_run_that_fails_leaves_nothing_that_only_looks_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(**SMALL)
    before = copy.deepcopy(model)

    def fail(self: Calibrator, *args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibrator, "_advance", fail)
    config = TurboQuantConfig(embeddings={"*": (4, 2)})
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, config, calibration=tokens(2), progress=False)
    assert isinstance(model.get_input_embeddings(), TurboQuantEmbedding)
    for name, parameter in before.model.layers.named_parameters():
        assert torch.equal(model.model.layers.get_parameter(name), parameter), name
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_model(model, config, calibration=tokens(2), progress=False)


def test_a_resumed_run_still_knows_what_the_text_did_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(**SMALL)
    for block in model.model.layers:
        block.spare = nn.Linear(64, 64)
    settings = Calibration(tokens(2), resume=tmp_path / "r")
    first = quantize_model(copy.deepcopy(model), calibration=settings, progress=False)
    monkeypatch.setattr(Calibrator, "_quantize_block", None)
    again = quantize_model(model, calibration=settings, progress=False)
    assert again.uncalibrated == first.uncalibrated == ["model.layers.0.spare", "model.layers.1.spare"]


class Routed(nn.Module):
    """Sends some tokens of the text to each of two layers, another choice once something was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        chosen = x[..., 0] > x[..., 1]
        for mask, expert in zip((chosen, ~chosen), self.experts, strict=True):
            if mask.any():
                out[mask] = expert(x[mask])
        return out


def test_layers_that_see_some_of_the_tokens() -> None:
    torch.manual_seed(0)
    model = tiny_llama(**SMALL).eval()
    for block in model.model.layers:
        block.mlp = Routed()
    report = quantize_model(model, calibration=tokens(6), progress=False)
    assert report.uncalibrated == []
    assert all(isinstance(expert, TurboQuantLinear) for block in model.model.layers for expert in block.mlp.experts)
    assert torch.isfinite(model(input_ids=tokens(2)).logits).all()


def test_embeddings_alone_can_be_calibrated_and_must_follow_nn_embedding() -> None:
    class Direct(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(input, self._parameters["weight"])

    config = TurboQuantConfig(skip=("*",), embeddings={"model.embed_tokens": (4, 2)})
    model = tiny_llama(**SMALL, tie_word_embeddings=False)
    quantize_model(model, config, calibration=tokens(2), progress=False)
    assert isinstance(model.get_input_embeddings(), TurboQuantEmbedding)
    model = tiny_llama(**SMALL, tie_word_embeddings=False)
    model.model.embed_tokens.__class__ = Direct
    with pytest.raises(QuantizationError, match="only embeddings whose forward"):
        quantize_model(model, config, calibration=tokens(2), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_ratio": 2, "max_kl": 1}, "exactly one"),
        ({"target_ratio": "2"}, "target_ratio is '2': it must be a positive number"),
        ({"target_bits": float("nan")}, "positive number"),
        ({"calibration": False}, "calibration is False: True for the built-in text"),
    ],
)
def test_arguments_are_looked_at_first(arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant_weights.quantize.plan_bits", None)
    with pytest.raises(ConfigError, match=message):
        quantize_model(tiny_llama(**SMALL), progress=False, **{"calibration": tokens(2), **arguments})


def test_a_budget_that_the_model_meets_as_it_is() -> None:
    with pytest.raises(ConfigError, match="target_bits is 20: the model fits as it is"):
        quantize_model(tiny_llama(**SMALL).bfloat16(), calibration=tokens(2), target_bits=20, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_model_calibrated_on_the_gpu_goes_home_whole() -> None:
    """Also what lies outside the blocks."""
    model = tiny_llama(**SMALL, tie_word_embeddings=False)
    settings = Calibration(tokens(2), device="cuda")
    quantize_model(model, TurboQuantConfig(embeddings={"*": (4, 2)}), skip=[], calibration=settings, progress=False)
    assert isinstance(model.lm_head, TurboQuantLinear)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert torch.isfinite(model(input_ids=tokens(2)).logits).all()


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
