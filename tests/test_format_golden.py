"""What the bytes mean, fixed: FORMAT.md's examples, every combination of planes, and a kept checkpoint of each version."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import format_oracle as oracle
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file, save_file

from turboquant_weights import FormatError, TurboQuantConfig, TurboQuantEmbedding, TurboQuantExperts, TurboQuantLinear, load
from turboquant_weights.checkpoint import verify
from turboquant_weights.reference import (
    PackedWeight,
    _decode_rows,
    dequantize_weight,
    packed_shapes,
    quantize_weight,
    scale_values,
)

FIXTURES = Path(__file__).parent / "fixtures"


def decoded_bytes(packed, bits, residual_bits):
    """Q as binary32: every entry is exact, so the bytes are the same everywhere."""
    return bytes(_decode_rows(packed, bits, residual_bits, torch.float32).view(torch.uint8).flatten().tolist())


def worked_example():
    """Section 11: planes, and the printed matrices."""
    planes_text, matrices, base_alone = re.findall(r"```text\n(.*?)```", oracle.DOCUMENT.split("## 11.")[1], re.S)
    rows = re.findall(r"^(codes|residual|scales|exponents) +([0-9a-f ]+)\n +([0-9a-f ]+)$", planes_text, re.M)
    planes = {name: torch.tensor([list(bytes.fromhex(a)), list(bytes.fromhex(b))]).to(torch.uint8) for name, a, b in rows}
    planes["exponents"] = planes["exponents"].view(-1).view(torch.int8)
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in (matrices + base_alone).splitlines()]
    numbers = [row for row in numbers if row]
    return PackedWeight(**planes), *(torch.tensor(numbers[i : i + 2], dtype=torch.float64) for i in (0, 2, 4))


def test_worked_example_of_the_format_document():
    packed, q, w, w_base = worked_example()
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed._asdict().items()} == packed_shapes(2, 3, 4, 1)
    assert torch.equal(_decode_rows(packed, 4, 1, torch.float64)[:, :4], q)
    for residual_bits, expected in ((1, w), (0, w_base)):
        planes = packed if residual_bits else packed._replace(residual=None)
        layout = dict(bits=4, residual_bits=residual_bits, group_size=128, seed=0)
        torch.testing.assert_close(oracle.dequantize(planes, 3, **layout), expected, rtol=1e-6, atol=0)
        ours = dequantize_weight(planes, 3, **layout).double()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_scale_bytes_follow_the_rule():
    assert list(scale_values()) == [oracle.scale_value(byte) for byte in range(256)]
    assert list(scale_values()) == sorted(set(scale_values()))


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_decoding_is_exact(bits, residual_bits):
    packed = tiny_checkpoint.planes(3, 96, bits, residual_bits)
    packed.scales[1, 0], packed.scales[2, 1] = 0, 31
    packed.exponents[:] = torch.tensor([-100, 0, 100])
    expected = [[float(value) for value in row] for row in oracle.decode(packed, bits, residual_bits)]
    assert _decode_rows(packed, bits, residual_bits, torch.float32).double().tolist() == expected
    assert math.isfinite(max(map(max, expected)))


def test_largest_exponent_keeps_everything_finite():
    packed = PackedWeight(
        torch.full((1, 32), 0xFF, dtype=torch.uint8),
        torch.full((1, 64), 0xFF, dtype=torch.uint8),
        torch.full((1, 4), 0xFF, dtype=torch.uint8),
        torch.tensor([100], dtype=torch.int8),
    )
    weight = dequantize_weight(packed, 128, bits=2, residual_bits=4, group_size=128, seed=0)
    assert torch.isfinite(weight).all()


# SHA-256 of Q as binary32 for the planes of tiny_checkpoint.planes(4, 128, ...).
GOLDEN = {
    "2": "e9be9a4f3136935d",
    "2+1": "e7ff57c3e60f6279",
    "2+2": "b871928a3e2a7824",
    "2+3": "984378fcc837d3c1",
    "2+4": "a432d8c2b371abb8",
    "3": "644596c0e11379e2",
    "3+1": "17709bad16eadbac",
    "3+2": "61830a654dd052fd",
    "3+3": "ce0fe17d2ab2aa13",
    "3+4": "bac44b078ed98576",
    "4": "c155c6fcd78f40ed",
    "4+1": "4e88ff826e792d14",
    "4+2": "3b76fe54725e0e40",
    "4+3": "d3346f57cd10691a",
    "4+4": "45d420605ce369bc",
}


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_golden_decoded_bytes(bits, residual_bits):
    packed = tiny_checkpoint.planes(4, 128, bits, residual_bits)
    digest = hashlib.sha256(decoded_bytes(packed, bits, residual_bits)).hexdigest()
    assert digest[:16] == GOLDEN[oracle.label(bits, residual_bits)]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_encoding_finds_the_planes_of_a_representable_weight(bits, residual_bits, group_size):
    # A weight that some planes represent is the one input whose encoding no rounding can change: any other scale is
    # worse by orders of magnitude and every entry lies in the middle of its cell.
    packed = tiny_checkpoint.planes(6, 128, bits, residual_bits)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=3)
    result = quantize_weight(dequantize_weight(packed, 128, **layout), **layout)
    for name, expected in packed._asdict().items():
        assert (expected is None) == (getattr(result.weight, name) is None)
        assert expected is None or torch.equal(getattr(result.weight, name), expected), name
    assert result.error < 1e-11


def test_padding_columns_are_zero_before_the_rotation():
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(weight, (0, 24))
    one = quantize_weight(weight, bits=4, seed=2).weight
    other = quantize_weight(padded, bits=4, seed=2).weight
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_config_bytes():
    config = TurboQuantConfig(bits=4, residual_bits=2, seed=11, skip=("lm_head",), source={"model": "m"})
    assert config.to_json_string() == (
        '{\n  "bits": 4,\n  "format_version": 1,\n  "group_size": 128,\n  "quant_method": "turboquant_weights",\n'
        '  "residual_bits": 2,\n  "seed": 11,\n  "skip": [\n    "lm_head"\n  ],\n  "source": {\n    "model": "m"\n  }\n}\n'
    )
    assert TurboQuantConfig.from_dict(json.loads(config.to_json_string())) == config


@pytest.mark.parametrize("name", ["llama", "mixed", "experts"])
def test_kept_checkpoint_of_version_1_reads_as_it_always_did(name):
    """``fixtures/v1`` was written once by release 0.1.0 and is never written again."""
    folder = FIXTURES / "v1" / name
    result = verify(folder)
    assert result.manifest_checked
    config = result.info.config
    assert (config.format_version, config.label, config.seed) == (1, {"llama": "4+2"}.get(name, "mixed"), 11)
    assert config.skip == {"mixed": ()}.get(name, ("lm_head",))
    stored = load_file(folder / "model.safetensors")
    in_features = {"down_proj": 20 if name == "experts" else 40}
    digests = {}
    for layer in result.info.layers:
        k = in_features.get(layer.name.rpartition(".")[2], 32)
        packed = PackedWeight(*(stored.get(f"{layer.name}.{plane}") for plane in PackedWeight._fields))
        bits, residual_bits = BITS[name].get(layer.name.rpartition(".")[2], BITS[name][""])
        assert layer.label == oracle.label(bits, residual_bits)
        flat = packed.map(lambda plane: plane.flatten(0, 1)) if layer.kind == "experts" else packed
        digests[layer.name] = hashlib.sha256(decoded_bytes(flat, bits, residual_bits)).hexdigest()[:16]
        if layer.kind != "experts":
            expected = oracle.dequantize(packed, k, bits, residual_bits, 128, 11)
        own = TurboQuantConfig(bits, residual_bits, seed=11)
        if layer.kind == "experts":
            assert config.experts[layer.name] == "out_in"
            stack = TurboQuantExperts.from_packed(packed, k, "out_in", own)
            for e in range(layer.experts):
                expected = oracle.dequantize(packed.map(lambda plane, e=e: plane[e]), k, bits, residual_bits, 128, 11)
                torch.testing.assert_close(stack.dequantize()[e].double(), expected, rtol=0, atol=1e-6)
                torch.testing.assert_close(stack(torch.eye(k), e).T.double(), expected, rtol=0, atol=1e-6)
            continue
        if layer.kind == "embedding":
            embedding = TurboQuantEmbedding.from_packed(packed, torch.nn.Embedding(layer.out_features, k), own)
            torch.testing.assert_close(embedding(torch.arange(40)).double(), expected, rtol=0, atol=1e-6)
        else:
            module = TurboQuantLinear.from_packed(packed, k, None, own)
            torch.testing.assert_close(module.dequantize().double(), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(module(torch.eye(k)).T.double(), expected, rtol=0, atol=1e-6)
    assert digests == KEPT_V1[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [0.032704, 0.005248, -0.192325, 0.215485, -0.098238, 0.132412]),
        ("mixed", [-0.211354, -0.071887, 0.053228, 0.086232, -0.016837, -0.060418]),
        ("experts", [-0.377968, 0.050127, 0.331652, 0.217294, -0.520921, -0.432325]),
    ],
)
def test_kept_checkpoint_of_version_1_runs(name, expected):
    pytest.importorskip("transformers")
    model = load(FIXTURES / "v1" / name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 9, 20]])).logits[0, -1, :6]
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=0, atol=2e-5)


def test_loading_refuses_forbidden_exponents(tmp_path):
    pytest.importorskip("transformers")
    shutil.copytree(FIXTURES / "v1" / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("turboquant_weights.json"))
    path = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.exponents"][7] = 127
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"q_proj\.exponents' holds 127"):
        load(tmp_path / "llama")


# Of each kept checkpoint, by the last part of a layer's name.
BITS = {
    "llama": {"": (4, 2)},
    "mixed": {"": (4, 1), "down_proj": (3, 2), "v_proj": (2, 0), "embed_tokens": (4, 2)},
    "experts": {"": (4, 1), "down_proj": (3, 2)},
}
KEPT_V1 = {
    "llama": {
        "model.layers.0.mlp.down_proj": "bd657c9a9ded8238",
        "model.layers.0.mlp.gate_proj": "35876d30b3e30fd0",
        "model.layers.0.mlp.up_proj": "b2b59f37756b4675",
        "model.layers.0.self_attn.k_proj": "71f4be10c65b3e10",
        "model.layers.0.self_attn.o_proj": "d4f8f08b140a1d1a",
        "model.layers.0.self_attn.q_proj": "e11a0ca213520f6c",
        "model.layers.0.self_attn.v_proj": "5afb10df985cf507",
    },
    "mixed": {
        "model.embed_tokens": "25d8dfd43ab5aec3",
        "model.layers.0.mlp.down_proj": "b98f8d6fb35ddd71",
        "model.layers.0.mlp.gate_proj": "01895adbd7c2a48b",
        "model.layers.0.mlp.up_proj": "98b1fe2127cf47f0",
        "model.layers.0.self_attn.k_proj": "4ac090ca90cef723",
        "model.layers.0.self_attn.o_proj": "4d022d4e0709fbef",
        "model.layers.0.self_attn.q_proj": "696c14767fb663bb",
        "model.layers.0.self_attn.v_proj": "baf3ca90e64d573a",
    },
    "experts": {
        "model.layers.0.mlp.experts.down_proj": "feff4e2b22a32754",
        "model.layers.0.mlp.experts.gate_up_proj": "c7433cba3d4a20f0",
        "model.layers.0.self_attn.k_proj": "ee5b9a6b783f908d",
        "model.layers.0.self_attn.o_proj": "2a713b19de6b9b7c",
        "model.layers.0.self_attn.q_proj": "47cd3ddcdaa6f227",
        "model.layers.0.self_attn.v_proj": "896c3463536ca24a",
    },
}
