"""``quantize_model``: which layers are replaced, what is reported, and what is an error."""

import json
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from turboquant_weights import ConfigError, QuantizationError, TurboQuantConfig, TurboQuantLinear, quantize_model
from turboquant_weights.model import on_quantized, plan_embeddings, plan_layers

SIZES = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=1, **options)
    return transformers.LlamaForCausalLM(config).eval()


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 40, bias=False), nn.Linear(40, 5))


def quantized_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, TurboQuantLinear)]


def test_every_linear_layer_but_the_head_is_replaced():
    model = llama()
    report = quantize_model(model, progress=False)
    assert quantized_names(model) == [layer.name for layer in report.layers]
    assert len(report.layers) == 14
    assert type(model.lm_head) is nn.Linear
    assert list(report.skipped) == ["lm_head"]
    assert "lm_head" in str(report)
    assert list(report.dense) == ["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" in str(report)


@pytest.mark.parametrize("tied", [True, False])
def test_report_counts_every_byte(tied):
    model = llama(tie_word_embeddings=tied).bfloat16()
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    report = quantize_model(model, TurboQuantConfig(bits=4, residual_bits=2), progress=False)
    assert report.dense_bytes == dense
    assert report.total_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.ratio == dense / report.total_bytes
    weights = sum(layer.out_features * layer.in_features for layer in report.layers)
    stored = sum(module.packed.nbytes for module in model.modules() if isinstance(module, TurboQuantLinear))
    assert report.bits_per_weight == pytest.approx(8 * stored / weights)
    assert json.loads(json.dumps(report.to_dict()))["ratio"] == report.ratio


def test_what_stays_dense_counts_as_it_is_stored():
    """A float32 model is compared with bf16, but its norms, biases and buffers are saved in float32."""
    model = stack()
    model.register_buffer("table", torch.zeros(50))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("temporary", torch.zeros(999), persistent=False)
    parameters = sum(p.numel() for p in model.parameters())
    report = quantize_model(model, skip=["3"], progress=False)
    assert report.total_bytes == sum(t.nbytes for t in model.state_dict().values())
    assert report.dense_bytes == 2 * (parameters + 50) + 3 * 8
    assert report.other_bytes == 4 * (40 * 5 + 5 + 50) + 3 * 8
    assert report.skipped_bytes == 4 * (40 * 5 + 5)


def test_reported_error_is_that_of_the_weights():
    model = stack()
    before = [model[i].weight.detach().double() for i in (0, 2, 3)]
    report = quantize_model(model, progress=False)
    for layer, i, weight in zip(report.layers, (0, 2, 3), before, strict=True):
        error = (model[i].dequantize(torch.float32).double() - weight).square().sum() / weight.square().sum()
        assert layer.error == pytest.approx(error.item(), rel=1e-4)
        assert layer.error > 0


def test_skip_patterns():
    model = stack()
    report = quantize_model(model, skip=["2", "3"], progress=False)
    assert quantized_names(model) == ["0"]
    assert list(report.skipped) == ["2", "3"]
    assert "'2'" in report.skipped["2"]
    assert report.config.skip == ("2", "3")


def test_bits_per_layer():
    model = stack()
    config = TurboQuantConfig(bits=3, layer_bits={"3": (2, 0), "[23]": (4, 2)})
    report = quantize_model(model, config, progress=False)
    assert [layer.label for layer in report.layers] == ["3", "4+2", "2"]
    assert [model[i].bits for i in (0, 2, 3)] == [3, 4, 2]
    assert model[2].residual_bits == 2
    assert report.config.layer_bits == {"2": (4, 2), "3": (2, 0)}
    assert report.config.skip == ()
    assert "3 layers at mixed bits" in str(report)


def test_layer_bits_quantize_an_untied_head_by_its_name_only():
    model = llama()
    report = quantize_model(model, TurboQuantConfig(layer_bits={"lm_head": (4, 4)}), progress=False)
    assert report.skipped == {}
    assert model.lm_head.residual_bits == 4
    assert list(quantize_model(llama(), TurboQuantConfig(layer_bits={"*": (4, 4)}), progress=False).skipped) == ["lm_head"]


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (
            llama,
            {"layer_bits": {"*.nothing": (4, 1)}},
            r"'\*.nothing' matches no linear layer of LlamaForCausalLM: .*q_proj",
        ),
        (
            lambda: llama(tie_word_embeddings=True),
            {"layer_bits": {"lm_head": (4, 1)}},
            "shares its weight with an embedding",
        ),
        (llama, {"skip": ("lm_head",), "layer_bits": {"lm_head": (4, 1)}}, "matches skip pattern 'lm_head'"),
    ],
)
def test_layer_bits_that_would_do_nothing_are_an_error(build, config, message):
    with pytest.raises(ConfigError, match=message):
        quantize_model(build(), TurboQuantConfig(**config), progress=False)


def test_the_argument_overrides_the_config_and_an_empty_list_skips_nothing():
    model = llama()
    report = quantize_model(model, TurboQuantConfig(skip=("*.q_proj",)), skip=[], progress=False)
    assert report.skipped == {}
    assert isinstance(model.lm_head, TurboQuantLinear)


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing():
    model = stack()
    with pytest.raises(ConfigError, match=r"'7' matches no linear layer of Sequential: .* 0, 2, 3"):
        quantize_model(model, skip=["0", "7"], progress=False)
    assert quantized_names(model) == []


def test_planning_needs_no_weights():
    with torch.device("meta"):
        model = llama(tie_word_embeddings=True)
    targets, skipped = plan_layers(model)
    assert len(targets) == 14
    assert list(skipped) == ["lm_head"]


def test_a_module_used_twice_stays_one_module():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(32, 32))})
    report = quantize_model(model, progress=False)
    assert model["a"] is model["b"][0]
    assert [layer.name for layer in report.layers] == ["a", "b.1"]


def test_layers_with_one_weight_share_their_planes():
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(32, 48))
    model[1].weight = model[0].weight
    report = quantize_model(model, progress=False)
    assert model[0].codes is model[1].codes
    assert model[0].bias is not model[1].bias
    assert report.layers[1].bytes == 48 * 4  # the bias as it is, in float32
    assert report.dense_bytes == (32 * 48 + 48 + 48) * 2


def test_layers_with_one_weight_need_the_same_bits():
    def build():
        model = nn.ModuleDict({name: nn.Linear(32, 48) for name in "abc"})
        model["b"].weight = model["a"].weight
        return model

    model = build()
    config = TurboQuantConfig(layer_bits={"a": (4, 2), "b": (4, 0)})
    with pytest.raises(ConfigError, match=r"a and b share one weight, but layer_bits gives them 4\+2 and 4 bits: give both"):
        quantize_model(model, config, progress=False)
    assert quantized_names(model) == []
    with pytest.raises(ConfigError, match="a and b share one weight"):  # b: what bits say
        quantize_model(model, TurboQuantConfig(layer_bits={"a": (4, 2)}), progress=False)
    quantize_model(model, TurboQuantConfig(layer_bits={"[ab]": (4, 2)}), progress=False)
    assert model["a"].codes is model["b"].codes
    assert torch.equal(model["a"].dequantize(), model["b"].dequantize())
    assert torch.isfinite(model["b"](torch.randn(2, 32))).all()


def test_a_weight_shared_with_an_embedding_is_skipped_without_transformers_help():
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(16, 32), "body": nn.Linear(32, 32), "out": nn.Linear(32, 16, bias=False)}
    )
    model["out"].weight = model["embedding"].weight
    report = quantize_model(model, progress=False)
    assert report.skipped == {"out": "shares its weight with an embedding"}
    assert model["out"].weight is model["embedding"].weight


class Tied(nn.Module):
    """A model of no library: an embedding twice under one weight, a head with a bias, and something odd."""

    def __init__(self, odd=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.again = nn.Embedding(16, 32), nn.Embedding(16, 32)
        self.body, self.out = nn.Linear(32, 32), nn.Linear(32, 16)
        self.again.weight = self.out.weight = self.embedding.weight
        if odd is not None:
            self.odd = odd
            self.odd.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.body(self.embedding(ids) + self.again(ids)))


def test_an_embedding_and_what_is_tied_to_it_become_one_set_of_planes():
    model = Tied()
    ids = torch.tensor([[0, 15, 3]])
    expected, dense = model(ids), sum(p.numel() for p in model.parameters()) * 2
    report = quantize_model(model, TurboQuantConfig(embeddings={"again": (4, 4)}, residual_bits=4), progress=False)
    assert (report.tied, report.config.embeddings) == ({"out": "embedding"}, {"embedding": (4, 4)})
    assert [(layer.name, layer.kind) for layer in report.layers] == [("embedding", "embedding"), ("body", "linear")]
    assert model.embedding.codes is model.again.codes is model.out.codes
    assert report.dense_bytes == dense
    assert report.total_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (model(ids) - expected).norm() < 0.03 * expected.norm()
    assert plan_embeddings(Tied(), TurboQuantConfig()) == {}


def test_a_tied_head_may_be_left_out_of_skip_only():
    model = Tied()
    report = quantize_model(model, TurboQuantConfig(embeddings={"*": (4, 2)}, skip=("body",)), progress=False)
    assert list(report.skipped) == ["body"]
    assert len(report.layers) == 1
    with pytest.raises(ConfigError, match="'out' matches out, which shares its weight"):
        quantize_model(Tied(), TurboQuantConfig(embeddings={"*": (4, 2)}, skip=("out",)), progress=False)


def test_skip_may_name_an_embedding_that_stays_as_it_is():
    model = Tied()
    report = quantize_model(model, skip=["again", "out"], progress=False)
    assert [layer.name for layer in report.layers] == ["body"]
    assert type(model.again) is nn.Embedding
    for pattern, name in (("emb*", "embedding"), ("again", "again")):
        with pytest.raises(ConfigError, match=f"matches {name}, which embeddings quantizes: remove one of the two"):
            quantize_model(Tied(), TurboQuantConfig(embeddings={"emb*": (4, 2)}, skip=(pattern,)), progress=False)


@pytest.mark.parametrize(
    ("build", "embeddings", "message"),
    [
        (Tied, {"nothing": (4, 2)}, "'nothing' matches no embedding of Tied: it has embedding, again"),
        (Tied, {"embedding": (4, 2), "again": (4, 1)}, r"again and embedding share one weight, .* \(4, 1\) and \(4, 2\)"),
        (lambda: Tied(nn.Bilinear(1, 32, 16)), {"*": (4, 2)}, "shares its weight with odd, a Bilinear"),
        (lambda: Tied(nn.Embedding(16, 32, max_norm=1.0)), {"*": (4, 2)}, "odd has max_norm"),
        (stack, {"*": (4, 2)}, "matches no embedding of Sequential: it has none at all"),
    ],
)
def test_embeddings_that_cannot_be_planned_change_nothing(build, embeddings, message):
    model = build()
    with pytest.raises((ConfigError, QuantizationError), match=message):
        quantize_model(model, TurboQuantConfig(embeddings=embeddings), progress=False)
    assert quantized_names(model) == []


def test_a_bad_embedding_is_found_before_anything_is_replaced():
    model = Tied()
    with torch.no_grad():
        model.embedding.weight[2, 3] = torch.nan
    with pytest.raises(QuantizationError, match=r"^embedding: weight\[2, 3\] is nan"):
        quantize_model(model, TurboQuantConfig(embeddings={"*": (4, 2)}), progress=False)
    assert quantized_names(model) == []


def test_conv1d():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(24, 64), nn.Linear(24, 3))
    x = torch.randn(5, 64)
    expected = model(x)
    quantize_model(model, TurboQuantConfig(bits=4, residual_bits=4), progress=False)
    assert model[0].out_features == 24
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_bad_weights_name_layer_and_position(value):
    model = stack()
    with torch.no_grad():
        model[2].weight[3, 7] = value
    with pytest.raises(QuantizationError, match=r"^2: weight\[3, 7\] is (nan|-inf)"):
        quantize_model(model, progress=False)
    assert type(model[2]) is nn.Linear


def test_nothing_is_replaced_if_a_later_layer_is_bad():
    model = stack()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"^3: weight"):
        quantize_model(model, progress=False)
    assert quantized_names(model) == []
    quantize_model(model, skip=["3"], progress=False)


def test_a_bad_bias_is_an_error():
    model = stack()
    with torch.no_grad():
        model[0].bias[2] = float("inf")
    with pytest.raises(QuantizationError, match=r"^0: bias\[2\] is inf"):
        quantize_model(model, progress=False)


def test_a_model_that_is_one_layer_is_an_error():
    with pytest.raises(QuantizationError, match="from_linear"):
        quantize_model(nn.Linear(8, 8), progress=False)


def test_subclasses_of_linear_are_listed_and_can_be_named_in_skip():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "out": nn.Linear(32, 32)})
    report = quantize_model(model, progress=False)
    assert list(report.skipped) == ["attention.out_proj"]
    assert "NonDynamicallyQuantizableLinear" in report.skipped["attention.out_proj"]
    assert list(report.dense) == ["attention.in_proj_weight"]
    plan_layers(nn.ModuleDict({"a": nn.MultiheadAttention(32, 2), "b": nn.Linear(3, 3)}), ["a.out_proj"])


def test_a_string_is_no_list_of_patterns():
    with pytest.raises(ConfigError, match="list of glob patterns"):
        quantize_model(stack(), skip="0", progress=False)


def test_arguments_of_another_type():
    with pytest.raises(ConfigError, match=r"model is 'some/model': .* quantize_checkpoint"):
        quantize_model("some/model")
    with pytest.raises(ConfigError, match=r"config is 4: it must be a TurboQuantConfig, e.g. TurboQuantConfig\(bits=4\)"):
        quantize_model(torch.nn.Linear(4, 4), 4)


def test_twice_is_an_error():
    model = stack()
    quantize_model(model, progress=False)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_model(model, progress=False)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(QuantizationError, match="no linear layer"):
        quantize_model(nn.Sequential(nn.ReLU()), progress=False)


def test_dense_weights_are_freed_as_the_walk_goes():
    model = stack()
    first = weakref.ref(model[0].weight)
    alive = []
    original = TurboQuantLinear.from_linear.__func__

    def watching(cls, linear, config=None, *, name="linear"):
        alive.append((name, first() is not None))
        return original(cls, linear, config, name=name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TurboQuantLinear, "from_linear", classmethod(watching))
        quantize_model(model, progress=False)
    assert alive == [("0", True), ("2", False), ("3", False)]


def test_hooks_learn_of_the_model_and_the_exact_config():
    calls = []
    on_quantized.append(lambda model, config: calls.append((model, config.skip)))
    try:
        model = stack()
        quantize_model(model, skip=["[23]"], progress=False)
    finally:
        on_quantized.pop()
    assert calls == [(model, ("2", "3"))]


def test_progress_goes_to_stderr(capsys):
    quantize_model(stack())
    out, err = capsys.readouterr()
    assert out == ""
    assert "quantizing to 4 bits" in err
