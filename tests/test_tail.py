"""What stays dense behind the last block is tuned for the logits: against autograd through the whole model, and what may go
wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import tiny_llama
from torch import nn

from turboquant_weights import ConfigError, QuantizationReport, TurboQuantConfig, quantize_model, tail
from turboquant_weights.evaluation import kl_divergence
from turboquant_weights.stream import Batch


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


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("in_front", [False, True])
def test_a_tail_without_vectors_is_left_alone(in_front: bool, head: bool) -> None:
    """OLMo's norms have no gains; a vector in front of the blocks is outside of them, but not in the tail."""
    model = make(tied=False).requires_grad_(False)
    model.model.norm = nn.Identity()
    if in_front:
        model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, nn.LayerNorm(64, bias=False))
    _, report = quantized(model, config=TurboQuantConfig(bits=4, layer_bits={"lm_head": (4, 0)} if head else None))
    assert report.tuned is None


def test_overflowing_logits_undo_it() -> None:
    """Half precision has no number above 65,504; a gradient that is NaN must not become a norm that is."""
    model = make(tied=False)
    tokens = torch.randint(0, 97, (12, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5 / float(model(input_ids=tokens).logits.abs().max()))
    found, report = quantized(model, torch.float16, config=TurboQuantConfig(bits=4))
    assert report.tuned is None
    assert torch.equal(found.model.norm.weight, model.model.norm.weight.half())


def test_text_that_leaves_nothing_to_decide_with_tunes_nothing() -> None:
    model = make(tied=True)
    report = quantize_model(model, TurboQuantConfig(bits=3), progress=False, calibration=torch.randint(0, 97, (1, 64)))
    assert report.tuned is None


@pytest.mark.parametrize(("length", "sizes"), [(1, [1]), (1024, [1024]), (1025, [513, 512]), (3000, [1000] * 3)])
def test_pieces_are_as_long_as_each_other(length: int, sizes: list[int]) -> None:
    tokens = torch.arange(2 * length).view(2, length)
    one = Batch(tokens, tokens[..., None] + 0.25, [])
    other = Batch(tokens, tokens[..., None] + 0.5, [])
    pieces = list(tail._pieces([one], [other]))
    assert [piece[0].shape[1] for piece in pieces] == sizes * 2
    for index, whole in enumerate((one.tokens, one.hidden, other.hidden)):
        assert torch.equal(torch.cat([piece[index] for piece in pieces], 1), whole.flatten(0, 1)[None])


def test_pieces_are_spread_over_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_TOKENS", 64)
    batches = [Batch(torch.full((3, 8), i), torch.zeros(3, 8, 1), []) for i in range(8)]
    seen = [int(piece[0][0, 0]) for piece in tail._pieces(batches, batches)]
    assert len(seen) == 8
    assert seen == sorted(seen)
    assert seen[-1] == 7


def test_inference_mode_is_refused_before_anything_is_computed() -> None:
    model = make(tied=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        quantize_model(model, progress=False, calibration=torch.randint(0, 97, (4, 64)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        loaded = make(tied=True)
    with pytest.raises(ConfigError, match="inference_mode"):
        quantize_model(loaded, progress=False, calibration=torch.randint(0, 97, (4, 64)))


@pytest.mark.parametrize("settings", ["layers", "embedding", "head"])
def test_the_target_is_the_original_model_to_the_end(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its head nor its norm follows what is rounded and tuned; and a frozen norm is tuned and stays frozen."""
    monkeypatch.setattr(tail, "_RATE", 2e-2)
    wanted = []

    def record(one: torch.Tensor, other: torch.Tensor) -> float:
        wanted.append(one)
        return divergence(one, other)

    divergence = tail._divergence
    monkeypatch.setattr(tail, "_divergence", record)
    model = make(tied=settings != "head").requires_grad_(False)
    config = TurboQuantConfig(
        bits=3,
        embeddings={"*": (3, 0)} if settings == "embedding" else None,
        layer_bits={"lm_head": (3, 0)} if settings == "head" else None,
    )
    found, report = quantized(model, config=config)
    assert report.tuned is not None
    assert not found.model.norm.weight.requires_grad
    tokens = torch.randint(0, 97, (12, 64), generator=torch.Generator().manual_seed(1))
    exact = model(input_ids=tokens[::8]).logits
    for logits, window in zip(wanted, [*exact, *exact], strict=True):  # before and after
        torch.testing.assert_close(logits[0], window, rtol=1e-4, atol=1e-3)
