"""Where a quantized model can live: spread by ``device_map``, on disk, in another dtype; and maps that cannot work."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from tiny_model import tiny_llama  # noqa: E402

import turboquant_weights as tq  # noqa: E402
from turboquant_weights import reference  # noqa: E402

TOKENS = torch.arange(12)[None] * 7 % 97
PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


def quantized(tied=True, embeddings=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=True).to(dtype).eval()
    config = tq.TurboQuantConfig(4, 2, embeddings={"model.embed_tokens": (4, 2)} if embeddings else None)
    tq.quantize_model(model, config, progress=False)
    return model


@pytest.fixture(scope="module", params=["tied", "untied", "dense embedding"])
def resident(request, tmp_path_factory):
    """A model in memory, and its folder."""
    model = quantized(request.param != "untied", request.param != "dense embedding")
    folder = tmp_path_factory.mktemp("saved") / "model"
    tq.save(model, folder)
    return model, folder


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


# -- spread over processor and disk


@pytest.mark.parametrize("share", [0.7, 0.4, 0.02])
def test_a_part_of_the_model_on_disk(resident, tmp_path, share):
    """``device_map="auto"`` with too little memory: what does not fit is read when it is needed; only speed changes."""
    model, folder = resident
    size = sum(parameter.nbytes for parameter in model.parameters())
    spread = tq.load(folder, device_map="auto", max_memory={"cpu": int(size * share)}, offload_folder=tmp_path / "offload")
    on_disk = [name for name, parameter in spread.named_parameters() if parameter.is_meta and name.endswith(".codes")]
    assert "disk" in spread.hf_device_map.values()
    assert on_disk
    for _ in range(2):  # the second time hooks have loaded and dropped everything once
        assert torch.equal(logits(spread), logits(model))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(spread.generate(TOKENS, **options), model.generate(TOKENS, **options))
    tq.save(spread, tmp_path / "again")
    for name, tensor in tq.load(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_adapters_on_a_model_on_disk_are_an_error(resident, tmp_path):
    """PEFT gives such layers adapters without values, of dense models too; parts in memory can have them."""
    peft = pytest.importorskip("peft")
    model, folder = resident
    spread = tq.load(folder, device_map=_device_map(model__layers="disk"), offload_folder=tmp_path)
    with pytest.raises(tq.ConfigError, match="PEFT would make its adapter without values"):
        peft.get_peft_model(spread, peft.LoraConfig(target_modules=["q_proj"]))
    if isinstance(model.lm_head, tq.TurboQuantLinear):
        spread = tq.load(folder, device_map=_device_map(model__layers="disk"), offload_folder=tmp_path)
        adapted = peft.get_peft_model(spread, peft.LoraConfig(target_modules=["lm_head"]))
        assert torch.equal(logits(adapted), logits(model))


# -- maps that cannot work


def _device_map(**changes):
    return {**dict.fromkeys(PARTS, "cpu"), **{name.replace("__", "."): place for name, place in changes.items()}}


WRONG = {
    "unknown module": (_device_map(model__layer="cpu"), "'model.layer', which is no part of LlamaForCausalLM"),
    "a module without a place": ({"model.layers": "cpu"}, "no place for model.embed_tokens.codes"),
    "unknown device": (_device_map(lm_head="gpu"), "sends 'lm_head' to 'gpu': devices are called like"),
    "absent device": (_device_map(model__layers="cuda:77"), "to cuda:77: PyTorch finds . cuda devices"),
    "absent kind": ({"": "mps"}, "to mps: PyTorch finds 0 mps devices"),
    "one inside the other": ({"": "cpu", "model.layers": "disk"}, "to disk and what it lies in to cpu"),
    "ties torn apart": (_device_map(lm_head="disk"), "sends lm_head to disk and model.embed_tokens to cpu, but they share"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("way", ["load", "on the fly"])
def test_a_wrong_map_is_one_error(tmp_path, case, way):
    device_map, message = WRONG[case]
    if way == "load":
        tq.save(quantized(), tmp_path / "m")
        with pytest.raises(tq.ConfigError, match=message):
            tq.load(tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "offload")
        assert not (tmp_path / "offload").exists()
    elif "disk" not in device_map.values():  # that is an error of its own on the fly
        tiny_llama().save_pretrained(tmp_path / "m")
        config = tq.TurboQuantConfig()
        with pytest.raises(tq.ConfigError, match=message.replace(".codes", ".weight")):
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "m", quantization_config=config, device_map=device_map
            )


def test_other_maps_work(resident, tmp_path):
    model, folder = resident
    tied_apart = {name: place for name, place in _device_map().items() if name != "lm_head"}
    maps = [_device_map(), {"": "cpu"}, {"": "disk"}]
    if model.config.tie_word_embeddings:
        maps.append(tied_apart)  # the head is where its embedding is
    for index, device_map in enumerate(maps):
        loaded = tq.load(folder, device_map=device_map, offload_folder=tmp_path / str(index))
        assert torch.equal(logits(loaded), logits(model))


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", ["to", "method"])
def test_dtypes_change_everything_but_the_planes(dtype, way):
    """Norms, biases and what an embedding answers in follow; planes do not. Transformers refuses ``half()`` and ``float()``
    for quantized models of any kind; of another module they work."""
    model = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    if way == "to":
        model.to(dtype)
    elif name == "half":
        with pytest.raises(ValueError, match="not supported for quantized model"):
            model.half()
        with pytest.raises(ValueError, match="not supported for quantized model"):
            model.float()
        model.model.layers.half()
        model.model.norm.half()
        model.model.embed_tokens.half()
        model.lm_head.half()
    else:
        getattr(model, name)()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[2] in ("codes", "residual", "scales", "exponents"):
            assert torch.equal(tensor, before[key])
        else:
            assert tensor.dtype == dtype
    assert {module.dense_dtype for module in model.modules() if hasattr(module, "dense_dtype")} == {dtype}
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert logits(model).dtype == dtype


# -- Apple GPUs


class NoDoubles(TorchDispatchMode):
    """Fails where a tensor of float64 is made beside the processor's memory, as an Apple GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta:
            assert out.dtype != torch.float64, func
        return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_apple_gpus_the_reference_runs(dtype):
    """There is none here. What can be seen without: the ops have a kernel for MPS, it is the reference, and nothing in it
    needs float64 on the device (the meta device stands in)."""
    for op in ("linear", "linear_inference", "linear_input_gradient", "embedding"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"turboquant_weights::{op}", "MPS")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"turboquant_weights::{op}", "MPS")  # none of its own
    layer = tq.TurboQuantLinear(96, 40, config=tq.TurboQuantConfig(4, 2), device="meta", dtype=dtype)
    x = torch.empty(3, 96, device="meta", dtype=dtype)
    layout = dict(bits=4, residual_bits=2, group_size=128, seed=0)
    with NoDoubles():
        assert reference.linear(x, layer.packed, layer.bias, 96, **layout).shape == (3, 40)
        gradient = x.new_empty(3, 40)
        assert reference.linear_input_gradient(gradient, layer.packed, 96, **layout).shape == (3, 96)
        ids = torch.empty(5, dtype=torch.int64, device="meta")
        assert reference.embedding(ids, layer.packed, 96, **layout, dtype=dtype).shape == (5, 96)
        assert reference.dequantize_weight(layer.packed, 96, **layout, dtype=dtype).shape == (40, 96)


def test_weights_on_apple_gpus_are_quantized_on_the_processor(monkeypatch):
    class OnMps(torch.Tensor):
        device = property(lambda self: torch.device("mps"))

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    plain = torch.randn(8, 64)
    moved = []
    monkeypatch.setattr(reference.PackedWeight, "map", lambda self, function: moved.append(self) or self)
    quantized = reference.quantize_weight(plain.as_subclass(OnMps))
    assert len(moved) == 1  # back to the GPU, which cannot be done here
    expected = reference.quantize_weight(plain)
    assert quantized.error == expected.error
    assert torch.equal(quantized.weight.codes, expected.weight.codes)


# -- what else can be wrong with a checkpoint, through from_pretrained


@pytest.fixture
def sharded(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    return tmp_path / "m"


def _truncate(folder, keep):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
@pytest.mark.parametrize("way", ["from_pretrained", "load"])
def test_a_half_downloaded_shard_is_one_error(sharded, keep, way):
    _truncate(sharded, keep)
    load = tq.load if way == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(tq.FormatError, match="model-00002-of") as caught:
        load(sharded)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("keep", [0, 200, -100])
def test_a_half_downloaded_dense_shard_is_one_error(tmp_path, keep):
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="30KB")
    _truncate(tmp_path / "m", keep)
    with pytest.raises(tq.FormatError, match="model-00002-of"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=tq.TurboQuantConfig())


@pytest.mark.parametrize("way", ["from_pretrained", "load"])
def test_a_shard_that_is_missing_is_one_error(sharded, way):
    shutil.move(sorted(sharded.glob("*.safetensors"))[1], sharded / "elsewhere")
    load = tq.load if way == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises((tq.FormatError, OSError), match="model-00002-of"):
        load(sharded)


@pytest.mark.parametrize("way", ["from_pretrained", "load"])
def test_a_newer_format_version_is_one_error(sharded, way):
    config = sharded / "config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 2'))
    load = tq.load if way == "load" else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(tq.TurboQuantError, match="format_version is 2: this package reads version 1; install a newer"):
        load(sharded)
