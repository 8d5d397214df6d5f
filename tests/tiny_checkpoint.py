"""A small checkpoint, and planes from integer arithmetic: the same bytes on every platform."""

import hashlib
import json
from pathlib import Path

import format_oracle as oracle
import torch
from safetensors.torch import save_file

from turboquant_weights import TurboQuantConfig
from turboquant_weights.packing import pack
from turboquant_weights.reference import PackedWeight


def snapshot(folder):
    """Relative path -> SHA-256 of every file under a folder. Not the bytes: where two snapshots differ, pytest would search
    them for a difference to show, for hours."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


UNIT = {2: 78.45, 3: 50.9, 4: 41.85}


def planes(rows, columns, bits, residual_bits):
    """Planes [rows, columns] with bell-shaped indices, one octave of scales, the largest of each row in the top octave."""
    count = rows * columns
    mixed = ((torch.arange(count) + 1) * 2654435761 % 2**32) >> 8
    bell = sum((mixed >> (6 * part)) & 63 for part in range(4)).double()  # mean 126, standard deviation 37
    values = torch.tensor([float(level) for level in oracle.levels(bits, residual_bits)], dtype=torch.float64)
    index = torch.bucketize((bell - 126) * (UNIT[bits] / 37), (values[1:] + values[:-1]) / 2).view(rows, columns)
    blocks = torch.arange(rows * columns // 32).view(rows, -1)
    return PackedWeight(
        pack(index >> residual_bits, bits),
        pack(index & (2**residual_bits - 1), residual_bits) if residual_bits else None,
        (0xE0 + blocks * 7 % 32 - 32 * (blocks % (columns // 32) % 2)).to(torch.uint8),
        (torch.arange(rows) * 5 - 17).to(torch.int8),
    )


# What a mixed checkpoint has under layer_bits, embeddings and experts.
MIXED, EMBEDDINGS = {"model.mlp": (3, 1), "model.experts.down": (3, 2)}, {"model.embed": (2, 2)}
GRADES = ((4, 3, 1), (6, 2, 0))  # of model.tokens
ORDER = (9, 3, 0, 4, 8, 1, 2, 7, 5, 6)
EXPERTS = {"model.experts.down": "in_out", "model.experts.up": "out_in"}


def tensors(bits=4, residual_bits=2, mixed=False):
    """Two layers (one with bias and tripwire), an embedding and a norm; if ``mixed``, the embedding is quantized, and there
    are a graded one and two stacks."""
    out = {}
    layers = {"model.attn": (3, 64), "model.mlp": (5, 32)}
    if mixed:
        layers |= {"model.embed": (6, 32), "model.experts.up": (6, 32), "model.experts.down": (8, 64)}
    for layer, (rows, columns) in layers.items():
        own = {**MIXED, **EMBEDDINGS}.get(layer, (bits, residual_bits)) if mixed else (bits, residual_bits)
        for plane, tensor in planes(rows, columns, *own)._asdict().items():
            if tensor is not None:
                out[f"{layer}.{plane}"] = tensor.unflatten(0, (2, -1)) if layer in EXPERTS else tensor
    if mixed:
        for i, (rows, *own) in enumerate(GRADES):
            for plane, tensor in planes(rows, 32, *own)._asdict().items():
                if tensor is not None:
                    out[f"model.tokens.{i}.{plane}"] = tensor
        out["model.tokens.order"] = torch.tensor(ORDER, dtype=torch.int32)
    out["model.attn.weight"] = torch.empty(0)
    out["model.mlp.bias"] = torch.arange(5.0)
    if not mixed:
        out["model.embed.weight"] = torch.arange(12).view(6, 2).bfloat16()
    out["model.norm.weight"] = torch.ones(4, dtype=torch.float16)
    return out


def config(bits=4, residual_bits=2, mixed=False):
    by_name = dict(layer_bits=MIXED, embeddings=EMBEDDINGS | {"model.tokens": GRADES}, experts=EXPERTS) if mixed else {}
    return TurboQuantConfig(bits, residual_bits, **by_name, seed=5, skip=("lm_head",), source={"model": "tiny"})


def write(folder, bits=4, residual_bits=2, sharded=False, mixed=False):
    """Writes the folder with safetensors alone; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"architectures": ["TinyModel"], "quantization_config": config(bits, residual_bits, mixed).to_dict()}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    everything = tensors(bits, residual_bits, mixed)
    if not sharded:
        save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(everything)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: everything[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
