"""Transformers models that are no language models: image, speech and text encoders; modules in two places."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.evaluation import resident_bytes  # noqa: E402

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
IMAGE, SOUND, TOKENS = torch.randn(2, 3, 32, 32), torch.randn(1, 16, 40), torch.arange(9)[None]


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), dict(pixel_values=IMAGE)


def _whisper():
    sizes = dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes |= dict(encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16, max_source_positions=20, max_target_positions=32)
    tokens = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **tokens))


def whisper():
    return _whisper(), dict(input_features=SOUND, decoder_input_ids=TOKENS[:, :5])


def whisper_encoder():  # a class that Transformers does not export
    return _whisper().model.encoder, dict(input_features=SOUND)


def t5_encoder():
    config = transformers.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config), dict(input_ids=TOKENS)


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=96, **SIZES)), dict(input_ids=TOKENS)


MODELS = {f.__name__.strip("_"): f for f in (vit, whisper, whisper_encoder, t5_encoder, bert)}


def result(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def build(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():  # biases and norms that a mix-up would show in
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), inputs


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model, inputs = build(name)
    model.save_pretrained(tmp_path / "dense")
    original = result(model, inputs)
    config = tq.TurboQuantConfig(4, 4)
    on_the_fly = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    report = tq.quantize_model(model, config, progress=False)
    got = result(model, inputs)
    assert len(report.layers) >= 12
    assert all(report.reasons[key] for key in report.dense)
    assert (got - original).norm() < 0.05 * original.norm()
    assert torch.equal(result(on_the_fly, inputs), got)
    tq.save(model, tmp_path / "saved")
    for again in (tq.load(tmp_path / "saved"), type(model).from_pretrained(tmp_path / "saved")):
        assert type(again) is type(model)
        assert torch.equal(result(again, inputs), got)


@pytest.mark.parametrize("name", ["vit", "whisper", "whisper_encoder", "t5_encoder"])
def test_what_cannot_be_calibrated_says_so(name):
    for options in (dict(calibration=TOKENS), dict(target_ratio=2.0)):
        model, inputs = build(name)
        before = result(model, inputs)
        with pytest.raises(tq.QuantizationError, match=r"language model|without calibration"):
            tq.quantize_model(model, progress=False, **options)
        assert torch.equal(result(model, inputs), before)
        assert model.training is False


def test_an_encoder_of_plain_blocks_can_be_calibrated():
    model, inputs = build("bert")
    report = tq.quantize_model(model, tq.TurboQuantConfig(4, 2), calibration=torch.randint(96, (4, 16)), progress=False)
    assert report.uncalibrated == ["pooler.dense"] or report.uncalibrated == []
    assert len(report.layers) == 13
    assert result(model, inputs).isfinite().all()
    with pytest.raises(tq.QuantizationError, match="returns no logits"):
        tq.quantize_model(build("bert")[0], target_ratio=2.0, progress=False)


class Twice(transformers.PreTrainedModel):
    """One module under two names, as detection models have their heads."""

    config_class = transformers.BertConfig
    _tied_weights_keys = {"second.weight": "first.weight", "second.bias": "first.bias"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.inner = nn.Linear(64, 64)
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.post_init()

    def forward(self, x):
        return self.second(self.inner(self.first(x)).relu())


def test_a_module_in_two_places(tmp_path):
    """Stored once, and still shared when it comes back."""
    torch.manual_seed(0)
    model = Twice(transformers.BertConfig(**SIZES, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "dense")
    on_the_fly = Twice.from_pretrained(tmp_path / "dense", quantization_config=tq.TurboQuantConfig()).eval()
    report = tq.quantize_model(model, progress=False)
    assert [row.name for row in report.layers] == ["inner", "first"]
    assert model.second is model.first
    size = resident_bytes(model)
    tq.save(model, tmp_path / "out")
    x = torch.randn(3, 64)
    assert not [key for key in load_file(tmp_path / "out" / "model.safetensors") if key.startswith("second")]
    for other in (Twice.from_pretrained(tmp_path / "out").eval(), on_the_fly):
        assert other.second is other.first
        assert torch.equal(other(x), model(x))
        assert resident_bytes(other) == size
