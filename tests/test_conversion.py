"""Ways out: what other software reads is what the planes mean, up to the rounding that is reported."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

transformers = pytest.importorskip("transformers")

import test_streaming as models  # noqa: E402

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.int4 import round_to_int4  # noqa: E402

CASES = {
    "llama": (models._llama, dict(residual_bits=2, embeddings={"model.embed_tokens": (4, 2)}), {}),
    "head apart": (models._llama, dict(residual_bits=4), dict(skip=[])),
    "float32": (models._llama, dict(), dict(dtype=torch.float32)),
    "qwen2": (models._qwen, dict(layer_bits={"lm_head": (4, 2)}), {}),
    "gpt2": (models._gpt2, dict(embeddings={"transformer.wte": (4, 1)}), {}),
    "gemma3": (models._gemma, dict(embeddings={"model.embed_tokens": (3, 2)}), {}),
    "albert": (models._albert, dict(), {}),
    "vit": (models._vit, dict(residual_bits=2), {}),
    "qwen3 moe": (lambda: models._moe("Qwen3Moe"), dict(layer_bits={"*.down_proj": (4, 2)}), {}),
    "gpt-oss": (lambda: models._moe("GptOss", num_local_experts=4), {}, {}),
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    build, settings, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    models.write(folder / "dense", build())
    tq.quantize_checkpoint(folder / "dense", folder / "q", tq.TurboQuantConfig(**settings), progress=False, **options)
    return folder / "q"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(4)
    models.write(folder / "dense", models._llama(hidden_size=128, num_attention_heads=4))
    config = tq.TurboQuantConfig(residual_bits=4, embeddings={"model.embed_tokens": (4, 2)})
    tq.quantize_checkpoint(folder / "dense", folder / "q", config, progress=False)
    return folder / "q"


def architecture(folder):
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def stored(folder):
    """Name -> tensor of all files."""
    out = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


def quantized_weights(model):
    return [m for m in model.modules() if isinstance(m, tq.TurboQuantLinear | tq.TurboQuantEmbedding | tq.TurboQuantExperts)]


def test_bf16_is_the_model_of_the_planes(checkpoint, tmp_path):
    report = tq.convert_checkpoint(checkpoint, tmp_path / "out", max_shard_size=60_000, progress=False)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("bfloat16", False)
    quantized = tq.load(checkpoint)
    tied = getattr(quantized.config, "tie_word_embeddings", False)
    squares = {module: module.dequantize(torch.float32).square().sum() for module in quantized_weights(quantized)}
    errors = [
        (module.dequantize(torch.bfloat16).float() - module.dequantize(torch.float32)).square().sum() / squares[module]
        for module in squares
    ]
    assert min(errors) * 0.99 < report.error < max(errors) * 1.01 < 4e-6
    expected = quantized.dequantize(torch.bfloat16)
    loaded, info = architecture(tmp_path / "out").from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    left, right = expected.state_dict(), loaded.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor.to(right[name].dtype), right[name]), name
    if tied:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_file_has_the_names_of_the_dense_one(checkpoint, tmp_path):
    """So that what reads the original model reads the converted one: experts one by one, too."""
    tq.convert_checkpoint(checkpoint, tmp_path / "out", progress=False)
    dense, out = stored(checkpoint.with_name("dense")), stored(tmp_path / "out")
    untied = {"lm_head.weight"} if "head" in str(checkpoint) else set()
    config = json.loads((checkpoint / "config.json").read_text())
    if not config.get("tie_word_embeddings", True) or untied:
        assert dense.keys() <= out.keys()
    else:
        assert dense.keys() == out.keys()
    assert all(out[name].shape == tensor.shape for name, tensor in dense.items())


def test_bf16_loads_without_this_package(llama, tmp_path):
    tq.convert_checkpoint(llama, tmp_path / "out", progress=False)
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'turboquant_weights' not in sys.modules\n"
        "print(model(torch.arange(8)[None]).logits.float().square().mean().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = tq.load(llama)(torch.arange(8)[None]).logits.float().square().mean().item()
    assert float(done.stdout) == pytest.approx(ours, rel=0.03)


# -- int4


def unpack(words, columns):
    """The format in numpy: the first value in the lowest four bits, stored as value + 8."""
    words = words.numpy().view(np.uint32)
    fields = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    return torch.from_numpy(fields.reshape(words.shape[0], -1)[:, :columns].astype(np.int64) - 8)


def decode(packed, scales, columns, group_size):
    return unpack(packed, columns) * scales.float().repeat_interleave(group_size, 1)


@pytest.mark.parametrize("group_size", [128, 64, 32])
def test_rounding_to_int4(group_size):
    torch.manual_seed(group_size)
    weight = torch.randn(50, 384) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    weight[8, 3] = 100
    weight[9] = weight[9].abs()
    rounded = round_to_int4(weight, group_size)
    assert (rounded.packed.dtype, rounded.scales.dtype) == (torch.int32, torch.bfloat16)
    decoded = decode(rounded.packed, rounded.scales, 384, group_size).double()
    error = (decoded - weight).square().sum() / weight.double().square().sum()
    assert float(error) == pytest.approx(rounded.error, rel=1e-3)
    assert decoded[7].abs().max() == 0
    # Near the best scale that a finer search finds for each group, and better than the one that just avoids clipping.
    groups = weight[:7].unflatten(1, (-1, group_size))
    own = (decoded[:7].float().unflatten(1, (-1, group_size)) - groups).square().sum(-1)
    largest = groups.abs().amax(-1, keepdim=True)
    finest = torch.full_like(own, torch.inf)
    for factor in torch.linspace(-1.3, 1.3, 521):
        scale = (largest * factor / 7.5).bfloat16().float()
        error = (groups / scale).round().nan_to_num().clamp(-8, 7) * scale - groups
        finest = torch.minimum(finest, error.square().sum(-1))
    unsearched = (groups / (largest / 7)).round() * (largest / 7) - groups
    assert own.sum() < 1.03 * finest.sum()
    assert own.sum() < 0.85 * unsearched.square().sum()


def test_int4_files(llama, tmp_path):
    """Bytes, config and report, by a reader of our own."""
    report = tq.convert_checkpoint(llama, tmp_path / "out", "int4", progress=False)
    assert report.group_size == 32  # of 128 and 160 columns
    assert report.kept == {"model.embed_tokens": "an embedding"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    tensors, model = stored(tmp_path / "out"), tq.load(llama)
    errors = total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, tq.TurboQuantLinear) and name != "lm_head":
            rows, columns = tensors[f"{name}.weight_shape"].tolist()
            decoded = decode(tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"], columns, 32)
            weight = module.dequantize(torch.float32)
            assert weight.shape == (rows, columns)
            error, square = (decoded - weight).square().sum(), weight.square().sum()
            assert float(error / square) == pytest.approx(report.layers[name], rel=1e-3)
            errors, total = errors + error, total + square
    embedding = model.model.embed_tokens.dequantize(torch.float32)
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding.bfloat16())
    errors, total = errors + (embedding.bfloat16().float() - embedding).square().sum(), total + embedding.square().sum()
    assert report.error == pytest.approx(float(errors / total), rel=1e-3)
    assert str(report).startswith("15 matrices to int4 in groups of 32")


@pytest.mark.parametrize("case", ["llama", "qwen3 moe"])
def test_int4_is_read_by_compressed_tensors(case, tmp_path):
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(3)
    build = models._llama if case == "llama" else lambda: models._moe("Qwen3Moe")
    models.write(tmp_path / "dense", build())
    tq.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", tq.TurboQuantConfig(residual_bits=4), progress=False)
    report = tq.convert_checkpoint(tmp_path / "q", tmp_path / "int4", "int4", progress=False)
    ours = tq.load(tmp_path / "q")
    theirs, info = architecture(tmp_path / "int4").from_pretrained(tmp_path / "int4", output_loading_info=True)
    assert not any(info.values())
    tokens = torch.arange(24)[None]
    expected, got = ours(tokens).logits.float(), theirs(tokens).logits.float()  # which decompresses
    assert (got - expected).norm() < 0.25 * expected.norm()
    names = {name.removesuffix(".weight"): name for name in theirs.state_dict()}
    errors = total = 0.0
    for name, module in ours.named_modules():
        if isinstance(module, tq.TurboQuantLinear | tq.TurboQuantExperts):
            weight = module.dequantize(torch.float32)
            errors += (theirs.get_parameter(names[name]).detach().float() - weight).square().sum()
            total += weight.square().sum()
    assert float(errors / total) == pytest.approx(report.error, rel=0.01)


def test_what_cannot_be_converted(llama, tmp_path):
    models.write(tmp_path / "dense", models._gpt2())
    tq.quantize_checkpoint(tmp_path / "dense", tmp_path / "gpt2", progress=False)
    shutil.copytree(llama, tmp_path / "out")
    before = models.snapshot(tmp_path)
    with pytest.raises(tq.ConfigError, match="no weight of this GPT2LMHeadModel can become int4"):
        tq.convert_checkpoint(tmp_path / "gpt2", tmp_path / "new", "int4", progress=False)
    with pytest.raises(tq.ConfigError, match="must be one of bf16, int4"):
        tq.convert_checkpoint(llama, tmp_path / "new", "gguf")
    with pytest.raises(FileExistsError, match="allow overwriting"):
        tq.convert_checkpoint(llama, tmp_path / "out")
    with pytest.raises(tq.FormatError, match="quantize it first"):
        tq.convert_checkpoint(tmp_path / "dense", tmp_path / "new")
    assert models.snapshot(tmp_path) == before
    assert not (tmp_path / "new").exists()
