"""The figures of evaluation.py against hand-computed values, Transformers' own loss, and a model compared with itself."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from turboquant_weights import quantize_model
from turboquant_weights.errors import ConfigError, TurboQuantError
from turboquant_weights.evaluation import (
    compare,
    evaluate,
    kl_divergence,
    layer_errors,
    noise_floor,
    resident_bytes,
    sample_text,
    text_windows,
)


class Bigram(nn.Module):
    """Logits of a position depend on its token only; ``batch_shift`` adds noise that depends on the batch size."""

    def __init__(self, table: Tensor, batch_shift: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.batch_shift = batch_shift

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        logits = self.table[input_ids].clone()
        logits[..., 0] += self.batch_shift * (len(input_ids) - 1)
        return SimpleNamespace(logits=logits)


class Tokenizer:
    """One token per character; ``bos`` says whether ordinary texts start with BOS."""

    bos_token_id = 1

    def __init__(self, bos: bool) -> None:
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        ids = [ord(c) for c in text]
        return SimpleNamespace(input_ids=[1, *ids] if self.bos and add_special_tokens else ids)


def log_table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_kl_and_perplexity_by_hand() -> None:
    reference = Bigram(log_table([0.5, 0.5], [0.25, 0.75]))
    model = Bigram(log_table([0.25, 0.75], [0.9, 0.1]) + 3.0)  # logits are log-probabilities up to a constant
    windows = torch.tensor([[0, 1, 1], [0, 0, 1]])
    result = evaluate(model, windows, reference, progress=False)
    kl_0 = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    kl_1 = 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.75 / 0.1)
    assert result.kl_mean == pytest.approx((kl_0 + kl_1) / 2, rel=1e-5)
    assert result.kl_max == pytest.approx(max(kl_0, kl_1), rel=1e-5)
    assert result.kl_stderr == pytest.approx(abs(kl_0 - kl_1) / 2 * math.sqrt(6 / 5) / math.sqrt(6), rel=1e-3)
    # Predicted: 0->1 (.75), 1->1 (.1); 0->0 (.25), 0->1 (.75). The last token of a window predicts nothing.
    assert result.perplexity == pytest.approx((0.75 * 0.1 * 0.25 * 0.75) ** -0.25, rel=1e-6)
    assert (result.tokens, result.positions) == (4, 6)


def test_top1_counts_positions() -> None:
    reference = Bigram(log_table([0.9, 0.1], [0.2, 0.8]))
    model = Bigram(log_table([0.6, 0.4], [0.7, 0.3]))
    assert evaluate(model, torch.tensor([[0, 0, 0, 1]]), reference, progress=False).top1 == 0.75


def test_percentile_and_many_rows() -> None:
    """More positions than rows handled at once; one position in a hundred and a bit is bad."""
    torch.manual_seed(0)
    reference = Bigram(torch.randn(300, 300))
    changed = reference.table.detach().clone()
    changed[:4] *= 5
    windows = torch.randperm(300)[None]
    result = evaluate(Bigram(changed), windows, reference, progress=False)
    kl = kl_divergence(reference.table.detach(), changed)
    assert result.kl_p99 == pytest.approx(kl.sort().values[296].item())
    assert result.kl_max == pytest.approx(kl.max().item())
    loss = nn.functional.cross_entropy(changed[windows[0, :-1]].double(), windows[0, 1:])
    assert result.perplexity == pytest.approx(loss.exp().item(), rel=1e-6)


def test_model_against_itself() -> None:
    model = Bigram(torch.randn(50, 50))
    result = evaluate(model, torch.randint(0, 50, (3, 40)), model, progress=False)
    assert (result.kl_mean, result.kl_max, result.top1) == (0.0, 0.0, 1.0)


def test_compare_gives_each_model_its_own_figures() -> None:
    tables = [torch.randn(9, 9) for _ in range(3)]
    windows = torch.randint(0, 9, (2, 12))
    reference, a, b = (Bigram(table) for table in tables)
    results = compare(reference, {"a": a, "b": b}, windows, progress=False)
    assert list(results) == ["reference", "a", "b"]
    assert results["reference"] == evaluate(reference, windows, progress=False)
    assert results["a"] == evaluate(a, windows, reference, progress=False)
    assert results["b"] == evaluate(b, windows, reference, progress=False)
    assert results["reference"].kl_mean is None


def test_noise_floor_sees_the_batch_shape_only() -> None:
    windows = torch.randint(0, 9, (3, 12))
    table = torch.randn(9, 9)
    assert noise_floor(Bigram(table), windows, progress=False).kl_max == 0.0
    assert noise_floor(Bigram(table, batch_shift=0.5), windows, progress=False).kl_mean > 1e-3
    assert noise_floor(Bigram(table), windows, progress=False).positions == 36


def test_dropout_is_off_and_the_mode_restored() -> None:
    class Noisy(Bigram):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not self.training
            return super().forward(input_ids, use_cache)

    model = Noisy(torch.randn(5, 5)).train()
    evaluate(model, torch.randint(0, 5, (1, 4)), progress=False)
    assert model.training


def test_perplexity_is_transformers_loss() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    windows = torch.randint(0, 60, (2, 20))
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    assert evaluate(model, windows, progress=False).perplexity == pytest.approx(loss.exp().item(), rel=1e-5)


def test_windows_without_and_with_bos() -> None:
    text = "abcdefghij"
    ids = torch.tensor([ord(c) for c in text])
    plain = text_windows(Tokenizer(bos=False), text, 4)
    assert plain.tolist() == [ids[:4].tolist(), ids[4:8].tolist()]
    with_bos = text_windows(Tokenizer(bos=True), text, 4)
    assert with_bos.tolist() == [[1, *ids[i : i + 3].tolist()] for i in (0, 3, 6)]
    assert text_windows(Tokenizer(bos=False), text, 4, count=1).tolist() == plain[:1].tolist()


@pytest.mark.parametrize(("length", "count"), [(11, None), (4, 3), (1, None), (4, 0)])
def test_too_few_windows(length: int, count: int | None) -> None:
    with pytest.raises(ConfigError, match="windows"):
        text_windows(Tokenizer(bos=False), "abcdefghij", length, count)


def test_bad_arguments_are_named() -> None:
    model = Bigram(torch.randn(5, 5))
    windows = torch.randint(0, 5, (1, 4))
    for bad in (windows[0], windows.int(), windows[:, :1], windows[:0]):
        with pytest.raises(ConfigError, match=r"int64 \[w, l\]"):
            evaluate(model, bad, progress=False)
    with pytest.raises(ConfigError, match="same vocabulary"):
        evaluate(Bigram(torch.randn(5, 6)), windows, model, progress=False)
    with pytest.raises(ConfigError, match="'reference'"):
        compare(model, {"reference": model}, windows, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_raise(value: float) -> None:
    table = torch.randn(5, 5)
    table[2, 3] = value
    with pytest.raises(TurboQuantError, match="NaN or Inf"):
        evaluate(Bigram(table), torch.tensor([[1, 2, 3]]), progress=False)


def test_resident_bytes_counts_shared_storage_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)])
    assert resident_bytes(model) == 4 * (12 + 3 + 12)
    model[1].weight = model[0].weight
    model.register_buffer("counts", torch.zeros(5, dtype=torch.int8))
    assert resident_bytes(model) == 4 * (12 + 3) + 5


def test_sample_text_is_the_licensed_excerpt() -> None:
    text = sample_text()
    assert text.startswith(" = Robert Boulter = \n")
    assert "\n = Du Fu = \n" in text
    assert 16_000 < len(text.encode()) < 40_000


def test_layer_errors_are_those_of_the_report() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(32, 5, bias=False))
    reference = copy.deepcopy(model)
    report = quantize_model(model, skip=[], progress=False)
    assert layer_errors(model, reference) == pytest.approx({layer.name: layer.error for layer in report.layers}, rel=1e-3)
    with pytest.raises(ConfigError, match="does not fit"):
        layer_errors(model, nn.Sequential(nn.Linear(64, 8)))
    with pytest.raises(ConfigError, match=r"\[8, 32\]"):
        layer_errors(model, nn.Sequential(nn.Linear(32, 8), nn.Linear(32, 5)))
