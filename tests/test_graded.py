"""Embeddings in grades: their rows, the head on them, what a text says about rows, and the way to disk and back."""

from __future__ import annotations

import copy
import json
import pickle
import struct

import pytest
import torch
import transformers
from tiny_model import tiny_llama
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from turboquant_weights import (
    ConfigError,
    FormatError,
    QuantizationError,
    TurboQuantConfig,
    convert_checkpoint,
    load,
    quantize_model,
    save,
)
from turboquant_weights.allocation import ERRORS, Unit, allocate
from turboquant_weights.budget import plan_bits
from turboquant_weights.checkpoint import validate, verify
from turboquant_weights.evaluation import layer_errors
from turboquant_weights.graded import GradedEmbedding, GradedHead, split_rows
from turboquant_weights.reference import packed_bytes
from turboquant_weights.sensitivity import VocabularyUse, row_sensitivities, vocabulary_use
from turboquant_weights.stream import BlockStream

GRADES = ((40, 4, 2), (100, 4, 0), (60, 3, 0))
NAME = "model.embed_tokens"


def dense(**settings):
    torch.manual_seed(0)
    return tiny_llama(vocab_size=200, hidden_size=64, intermediate_size=96, **settings).eval()


def text(tokens=6, length=48):
    """Ids that follow a power law."""
    generator = torch.Generator().manual_seed(1)
    return (200 * torch.rand(tokens, length, generator=generator) ** 4).long()


@pytest.fixture(scope="module")
def graded():
    model = dense()
    original = copy.deepcopy(model)
    report = quantize_model(model, TurboQuantConfig(embeddings={NAME: GRADES}, seed=5), calibration=text(), progress=False)
    return model, original, report


def test_rows_are_split_by_importance_and_keep_their_order():
    importance = torch.tensor([1.0, 9.0, 3.0, 3.0, 7.0])
    order, rows = split_rows(importance, ((2, 4, 2), (3, 4, 0)))
    assert [part.tolist() for part in rows] == [[1, 4], [0, 2, 3]]
    assert order.tolist() == [2, 0, 3, 4, 1]
    assert order.dtype == torch.int32


def test_lookups_and_head_read_the_same_weight(graded):
    model, _, _ = graded
    embedding, head = model.model.embed_tokens, model.lm_head
    weight = embedding.dequantize()
    ids = torch.randint(200, (3, 7))
    torch.testing.assert_close(embedding(ids), weight[ids])  # where there is an engine, its sums have another order
    assert torch.equal(embedding(ids.int()), embedding(ids))
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(head(x), x @ weight.T, atol=1e-5, rtol=1e-5)
    assert head.order is embedding.order
    assert all(a.codes is b.codes and a.residual is b.residual for a, b in zip(head.parts, embedding.parts, strict=True))
    assert embedding.weight.shape == (200, 64)
    assert torch.equal(embedding.weight + 0, weight)


@pytest.mark.parametrize("id_", [-1, 200])
def test_an_id_out_of_range_is_an_error(graded, id_):
    with pytest.raises(IndexError):
        graded[0].model.embed_tokens(torch.tensor([id_]))
    with pytest.raises(QuantizationError, match="int32 or int64"):
        graded[0].model.embed_tokens(torch.tensor([1.0]))


def test_each_grade_has_its_error_and_the_report_all_bytes(graded):
    model, original, report = graded
    embedding, weight = model.model.embed_tokens, original.model.embed_tokens.weight
    assert embedding.grades == GRADES
    change = (embedding.dequantize() - weight).square().sum(1)
    rows = embedding.order.argsort()
    relative = [
        float(change[part].sum() / weight[part].square().sum()) for part in rows.split([grade[0] for grade in GRADES])
    ]
    assert relative[0] < relative[1] / 8 < relative[2] / 16
    entry = next(layer for layer in report.layers if layer.name == NAME)
    assert entry.error == pytest.approx(float(change.sum() / weight.square().sum()), rel=1e-4)
    assert entry.bytes == sum(packed_bytes(n, 64, b, r) for n, b, r in GRADES) + 4 * 200
    assert entry.label == "4+2/4/3"
    assert layer_errors(model, original)[NAME] == pytest.approx(entry.error, rel=1e-4)


def test_a_head_with_a_bias_adds_it_in_the_order_of_the_tokens(graded):
    bias = nn.Parameter(torch.randn(200))
    head = GradedHead(graded[0].model.embed_tokens, bias)
    x = torch.randn(4, 64)
    torch.testing.assert_close(head(x), graded[0].lm_head(x) + bias)


def test_sensitivity_of_rows_is_the_kl_divergence_of_their_noise():
    """Noise of a known size on some rows of a head: measured KL against the sum of the rows' sensitivities."""
    model = dense(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(60 * torch.rand(200, 1) ** 2 + 3)  # logits that differ
    ids = text(8, 64)
    with BlockStream(model, ids, torch.device("cpu")) as stream:
        for batch in stream.batches:
            for index in range(len(stream.blocks)):
                batch.hidden = stream.run(index, batch)
        use = vocabulary_use(stream, stream.batches, model.lm_head, 10**6)
    weight = model.lm_head.weight.detach()
    head = row_sensitivities(weight, use, 1.0) - row_sensitivities(weight, use, 0.0)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        p = model.lm_head(hidden).log_softmax(-1)
        assert torch.allclose(use.frequency, p.exp().double().mean((0, 1)), atol=1e-6)
        level = 1e-4
        for chosen in (slice(0, 20), slice(100, 200)):
            expected = level * float(head[chosen].sum())
            measured = 0.0
            for seed in range(20):
                noise = torch.zeros_like(weight)
                generator = torch.Generator().manual_seed(seed)
                rows = weight[chosen]
                noise[chosen] = (
                    torch.randn(rows.shape, generator=generator) * (level * rows.square().mean(1)).sqrt()[:, None]
                )
                q = (hidden @ (weight + noise).T).log_softmax(-1)
                measured += float((p.exp() * (p - q)).sum(-1).mean()) / 20
            assert measured == pytest.approx(expected, rel=0.25)


def test_without_a_head_rows_count_by_frequency_and_norm():
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    use = VocabularyUse(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), None, None)
    assert row_sensitivities(weight, use, 1.0).tolist() == [0.25, 0.5, 0.0]
    assert row_sensitivities(weight[:2], use, 1.0) is None


def unit(rows=1024, columns=64):
    shares = tuple((i + 1) ** -1.5 for i in range(rows))
    return Unit((NAME,), ((rows, columns),), sum(shares), shares)


def test_grades_of_a_unit():
    one = unit()
    for count, _, bits in one.hull():
        assert count == one.bytes(bits)
    grades = [bits for _, _, bits in one.hull() if bits is not None and isinstance(bits[0], tuple)]
    assert grades
    for own in grades:
        assert sum(n for n, _, _ in own) == 1024
        assert len(own) <= 4
        assert [(b, r) for _, b, r in own] == sorted(((b, r) for _, b, r in own), reverse=True)
        start, kl = 0, 0.0
        for n, b, r in own:
            kl += sum(one.rows[start : start + n]) * ERRORS[b, r]
            start += n
        assert one.kl(own) == pytest.approx(kl)
        assert one.bytes(own) == sum(packed_bytes(n, 64, b, r) for n, b, r in own) + 4 * 1024
    # What they are for: half the loss of one pair of bits for all rows, at no more bytes.
    one = unit(8192)
    best = allocate([one], 0, max_bytes=one.bytes((4, 1)))
    assert isinstance(best.bits[NAME][0], tuple)
    assert best.expected_kl < 0.5 * one.kl((4, 1))


def test_grades_never_get_more_bits_on_the_way_down():
    """Also where the rows' sensitivities, estimated from another text than their order, go up again."""
    shares = tuple((i + 1) ** -1.5 * (40 if 1000 <= i < 2000 else 1) for i in range(8192))
    one = Unit((NAME,), ((8192, 64),), sum(shares), shares)
    grades = [bits for _, _, bits in one.hull() if bits is not None and isinstance(bits[0], tuple)]
    assert grades
    for own in grades:
        assert [(b, r) for _, b, r in own] == sorted(((b, r) for _, b, r in own), reverse=True)


def test_rows_are_weighed_by_the_half_of_the_text_that_did_not_rank_them():
    model = dense()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30 * torch.rand(200, 1) ** 3 + 1)
    unit_ = next(unit for unit in plan_bits(model, tokens=text(40, 256), progress=False).units if NAME in unit.names)
    # Each half's own order would be falling, and so would the mean of two such lists.
    assert list(unit_.rows) != sorted(unit_.rows, reverse=True)
    assert sum(unit_.rows) == pytest.approx(unit_.sensitivity)


def test_a_budget_grades_the_embedding():
    model = dense()
    with torch.no_grad():  # so that it predicts something
        model.model.embed_tokens.weight.mul_(30 * torch.rand(200, 1) ** 3 + 1)
    report = quantize_model(model, target_ratio=3.0, calibration=text(40, 256), progress=False)
    assert report.ratio >= 3.0
    assert isinstance(model.model.embed_tokens, GradedEmbedding)
    assert isinstance(model.lm_head, GradedHead)
    assert model.config.quantization_config.grades(NAME) == model.model.embed_tokens.grades


def test_data_free_budgets_give_all_rows_the_same_bits():
    model = dense()
    quantize_model(model, target_ratio=3.0, progress=False)
    assert not isinstance(model.model.embed_tokens, GradedEmbedding)


def test_there_and_back(graded, tmp_path):
    model, _, _ = graded
    ids = text(2, 9)
    logits = model(ids).logits
    save(model, tmp_path / "a")
    names = [layer.name for layer in verify(tmp_path / "a").info.layers if layer.kind == "embedding"]
    assert names == [f"{NAME}.{i}" for i in range(3)]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["embeddings"] == {
        NAME: [list(grade) for grade in GRADES]
    }
    loaded = load(tmp_path / "a")
    assert torch.equal(loaded(ids).logits, logits)
    assert loaded.lm_head.order is loaded.model.embed_tokens.order
    assert loaded.lm_head.parts[1].codes is loaded.model.embed_tokens.parts[1].codes
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")(ids).logits, logits)
    body = transformers.AutoModel.from_pretrained(tmp_path / "a")
    assert torch.equal(body.embed_tokens.dequantize(), model.model.embed_tokens.dequantize())
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b")(ids).logits, logits)

    base = load(tmp_path / "a", base_only=True)
    assert base.model.embed_tokens.grades == ((40, 4, 0), (100, 4, 0), (60, 3, 0))
    assert not torch.equal(base(ids).logits, logits)
    save(base, tmp_path / "c")
    assert torch.equal(load(tmp_path / "c")(ids).logits, base(ids).logits)

    convert_checkpoint(tmp_path / "a", tmp_path / "d", "bf16")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32)
    weight = model.model.embed_tokens.dequantize()
    torch.testing.assert_close(plain.model.embed_tokens.weight.data, weight.bfloat16().float())
    back = load(tmp_path / "b").dequantize()
    assert type(back.lm_head) is nn.Linear
    assert back.lm_head.weight is back.model.embed_tokens.weight
    torch.testing.assert_close(back(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_there_and_back_without_transformers(graded, tmp_path):
    from turboquant_weights.modules import load_module, save_module

    model, original, _ = graded
    save_module(model, tmp_path / "a", overwrite=False)
    ids = text(2, 9)
    assert torch.equal(load_module(tmp_path / "a", original)(ids).logits, model(ids).logits)


def damage(folder, change):
    """``change(header, data)`` of the safetensors file, and no manifest."""
    path = folder / "model.safetensors"
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header, data = json.loads(blob[8 : 8 + length]), bytearray(blob[8 + length :])
    change(header, data)
    text_ = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text_)) + text_ + data)
    (folder / "turboquant_weights.json").unlink()


def twice(header, data):
    begin = header[f"{NAME}.order"]["data_offsets"][0]
    data[begin : begin + 4] = data[begin + 4 : begin + 8]


def as_int64(header, data):
    header[f"{NAME}.order"].update(dtype="I64", shape=[100])


def renamed(header, data):
    header["model.order"] = header.pop(f"{NAME}.order")


@pytest.mark.parametrize(
    ("change", "message"),
    [(twice, "does not name every row once"), (as_int64, r"I64 \[100\].*I32 \[200\]"), (renamed, "order' is absent")],
)
def test_a_damaged_order(graded, tmp_path, change, message):
    save(graded[0], tmp_path / "a")
    damage(tmp_path / "a", change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "a")
    if change is twice:
        with pytest.raises(FormatError, match=message):
            verify(tmp_path / "a")
        with pytest.raises(FormatError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([[40, 4, 2], [101, 4, 0], [60, 3, 0]], "grade 1 has 101 rows"),
        ([[40, 4, 2], [100, 4, 0]], r"embed_tokens.2. has planes, but config.json says .* consists of 2 grades"),
        ([[40, 4, 2], [100, 4, 0], [60, 4, 0]], "2.codes"),
        ([[40, 4, 2], [100, 4, 0], [60, 3, 0], [1, 2, 0]], "3.scales.* is missing"),
    ],
)
def test_grades_that_are_not_those_of_the_tensors(graded, tmp_path, grades, message):
    save(graded[0], tmp_path / "a")
    (tmp_path / "a" / "turboquant_weights.json").unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["embeddings"] = {NAME: grades}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        validate(tmp_path / "a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, 4, 2]], "at least one row"),
        ([[10, 4]], r"\[0\] is \[10, 4\]"),
        ([[10, 5, 0]], "bits is 5"),
        ([[10, 4, 0], 7], r"\[1\] is 7"),
        ([], "must be"),
    ],
)
def test_bad_grades(value, message):
    with pytest.raises(ConfigError, match=message):
        TurboQuantConfig(embeddings={NAME: value})


def test_what_needs_a_text_says_so(tmp_path):
    config = TurboQuantConfig(embeddings={NAME: GRADES})
    with pytest.raises(ConfigError, match="calibration text must say which rows come first"):
        quantize_model(dense(), config, progress=False)
    dense().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="calibration text must say which rows come first"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ConfigError, match="have 140 rows: it has 200"):
        quantize_model(dense(), TurboQuantConfig(embeddings={NAME: GRADES[:2]}), calibration=text(), progress=False)


def test_a_run_that_was_interrupted_gives_the_same_planes(tmp_path, monkeypatch):
    from turboquant_weights import Calibration
    from turboquant_weights.resume import BlockStore

    config = TurboQuantConfig(embeddings={NAME: GRADES})
    whole, part = dense(), dense()
    quantize_model(whole, config, calibration=text(), progress=False)
    saved = BlockStore.save

    def stop(self, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        saved(self, index, *args)

    monkeypatch.setattr(BlockStore, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(part, config, calibration=Calibration(text(), resume=tmp_path / "r"), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr("turboquant_weights.quantize._round_embeddings", None)  # is not called again
    again = dense()
    quantize_model(again, config, calibration=Calibration(text(), resume=tmp_path / "r"), progress=False)
    assert whole.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_an_embedding_of_a_class_of_its_own(graded):
    torch.manual_seed(0)
    scaled = Gemma3TextScaledWordEmbedding(200, 64, padding_idx=0, embed_scale=3.0)
    plain = graded[0].model.embed_tokens
    packed = [part.packed for part in plain.parts]
    module = GradedEmbedding.from_packed(packed, plain.order, scaled, TurboQuantConfig(seed=5), GRADES)
    ids = torch.randint(200, (2, 3))
    torch.testing.assert_close(module(ids), 3.0 * plain(ids))
    assert isinstance(module, Gemma3TextScaledWordEmbedding)
    back = module.to_embedding()
    assert type(back) is Gemma3TextScaledWordEmbedding
    assert not list(back.children())
    torch.testing.assert_close(back(ids), module(ids))
    assert torch.equal(pickle.loads(pickle.dumps(module))(ids), module(ids))


def test_dtypes_compile_and_gradient(graded):
    model = copy.deepcopy(graded[0])
    ids = text(2, 9)
    logits = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, logits)
    x = torch.randn(3, 64, requires_grad=True)
    model.lm_head(x).square().sum().backward()
    weight = model.model.embed_tokens.dequantize()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T) @ weight, atol=1e-3, rtol=1e-3)
    model.bfloat16()
    assert model(ids).logits.dtype == model.model.embed_tokens(ids).dtype == torch.bfloat16
    assert model.model.embed_tokens.order.dtype == torch.int32


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_train_and_do_not_merge(graded, target):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(graded[0]), LoraConfig(target_modules=[target], r=2, init_lora_weights=False))
    ids = text(2, 9)
    logits = adapted(ids).logits
    assert not torch.equal(logits, graded[0](ids).logits)
    logits.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(QuantizationError, match="cannot be written to"):
        adapted.merge_and_unload()
