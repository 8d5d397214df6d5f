"""What stays dense behind the last block is tuned for the logits: against autograd through the whole model, and what may go
wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import tiny_llama
from torch import nn

from turboquant_weights import QuantizationReport, TurboQuantConfig, quantize_model, tail
from turboquant_weights.evaluation import kl_divergence


def quantized(
    model: nn.Module, dtype: torch.dtype = torch.float32, **arguments: object
) -> tuple[nn.Module, QuantizationReport]:
    tokens = torch.randint(0, 97, (12, 64), generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(model).to(dtype)
    return model, quantize_model(model, progress=False, calibration=tokens, **arguments)


def make(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.3, tie_word_embeddings=tied, hidden_size=64).eval()
    model.model.norm.weight.data.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ["layers", "embedding", "head"])
def test_tuning_lowers_the_divergence(settings: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the whole text, from logits of the two whole models; and nothing else than the norm differs from an untuned run."""
    monkeypatch.setattr(tail, "_RATE", 2e-2)  # few steps, and bfloat16 rounds small ones away
    model = make(tied=settings != "head")
    config = TurboQuantConfig(
        bits=3,
        embeddings={"*": (3, 0)} if settings == "embedding" else None,
        layer_bits={"lm_head": (3, 0)} if settings == "head" else None,
    )
    tuned, report = quantized(model, dtype, config=config)
    assert report.tuned is not None
    assert report.tuned.names == ("model.norm.weight",)
    assert report.tuned.after < report.tuned.before
    assert "tuned model.norm.weight" in str(report)
    monkeypatch.setattr("turboquant_weights.quantize.tune_tail", lambda *args: None)
    plain, report = quantized(model, dtype, config=config)
    assert report.tuned is None
    for (name, one), two in zip(tuned.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, two) != (name == "model.norm.weight"), name
    tokens = torch.randint(0, 97, (12, 64), generator=torch.Generator().manual_seed(1))
    reference = model.to(dtype)
    with torch.no_grad():
        wanted = reference(input_ids=tokens).logits.flatten(0, 1)
        losses = [float(kl_divergence(wanted, m(input_ids=tokens).logits.flatten(0, 1)).mean()) for m in (tuned, plain)]
    assert losses[0] < losses[1]


def test_what_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_RATE", 5.0)
    model = make(tied=True)
    found, report = quantized(model, config=TurboQuantConfig(bits=4))
    assert report.tuned is None
    assert torch.equal(found.model.norm.weight, model.model.norm.weight)
    assert found.model.norm.weight.requires_grad


def test_an_interruption_leaves_the_norm_and_the_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tied=True)
    before = model.model.norm.weight.detach().clone()

    def stop(*args: object) -> None:
        model.model.norm.weight.data.mul_(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(tail, "_descend", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, TurboQuantConfig(bits=4), progress=False, calibration=torch.randint(0, 97, (8, 64)))
    assert torch.equal(model.model.norm.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_same_text_same_result() -> None:
    model = make(tied=True)
    (one, _), (two, _) = (quantized(model, config=TurboQuantConfig(bits=4)) for _ in range(2))
    assert torch.equal(one.model.norm.weight, two.model.norm.weight)
