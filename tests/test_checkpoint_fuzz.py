"""Thousands of damaged checkpoints: each is rejected with our own error, quickly and in little memory, or is intact.

"Intact" is judged without our code: the safetensors library opens every file, and the planes it finds follow section 8 of
FORMAT.md. With a manifest it means more: the settings and headers are those that were saved, and ``verify`` finds any
changed byte.
"""

import json
import math
import random
import shutil
import struct
import time
import tracemalloc

import pytest
import tiny_checkpoint
from safetensors import safe_open

from turboquant_weights import FormatError
from turboquant_weights.checkpoint import validate, verify, write_manifest

CASES = 1000  # for each of the eight kinds of folder
SECONDS, BYTES = 2.0, 8 << 20  # of processor time and of memory, allowed per case
ODD = [
    None, True, False, 0, 1, -1, 3, 4, 31, 2**31, 2**63, 2**64, 10**400, 0.5, math.nan, math.inf, -math.inf, "", "4", "U8",
    "I8", "F32", "F8_E5M2", "../model.safetensors", "/etc/passwd", "\0", "\ud800", "x" * 10_000, [], [0],
    [1, 2], [[]], {}, {"a": 1}, [0] * 1000, "out_in", {"model.attn": "out_in"},
    "model.experts.up", "model.attn", ["model.attn"], "gptq", [2**62, 4], [0, 2**63],
]  # fmt: skip


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def to_bytes(content, rng):
    """JSON text, now and then with one key written twice."""
    text = json.dumps(content)
    if rng.random() < 0.1 and isinstance(content, dict) and content:
        key = rng.choice(list(content))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice([content[key], *ODD]))}}}"
    return text.encode()


def change_json(content, rng):
    """Replaces, deletes, renames, exchanges or inserts at a random place of a JSON tree."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not places:
            return
        node, key = rng.choice(places)
        action = rng.choice(["replace", "replace", "delete", "rename", "exchange", "insert", "nudge"])
        try:
            if action == "replace":
                node[key] = rng.choice(ODD)
            elif action == "delete":
                del node[key]
            elif action == "rename":
                node[rng.choice(["model.attn.codes", "model.x.scales", "codes", "", "bits", "model.embed", key + "x"])] = (
                    node.pop(key)
                )
            elif action == "exchange":
                other, other_key = rng.choice(places)
                node[key], other[other_key] = other[other_key], node[key]
            elif action == "insert":
                node[rng.choice(["extra", "model.attn.zeros", "model.mlp.codes", "residual_bits"])] = rng.choice(ODD)
            else:
                node[key] += rng.choice([-32, -1, 1, 2, 32])
        except (TypeError, KeyError, IndexError, AttributeError):
            pass  # that place has gone, or does not take this action: the case is a milder one


def flip(data, rng, low, high):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        position = rng.randrange(low, high)
        data[position] = rng.choice(
            [data[position] ^ (1 << rng.randrange(8)), rng.randrange(256), ord(rng.choice('"{}[]:,0-'))]
        )
    return bytes(data)


def damage(name, data, rng):
    """A damaged version of one file's bytes, or None for "remove it"."""
    tensors = name.endswith(".safetensors")
    action = rng.choice(
        ["flip", "flip", "flip", "tree", "tree", "tree", "tree", "truncate", "append", "nest", "length", "remove"]
    )
    if action == "flip":
        end = len(data) - len(header_of(data)[1]) if tensors and rng.random() < 0.9 else len(data)
        return flip(data, rng, 0, end)
    if action == "truncate":
        return data[: rng.randrange(len(data))]
    if action == "append":
        return data + bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 500])))
    if action == "remove":
        return None
    if action == "length" and tensors:
        return (
            struct.pack("<Q", rng.choice([0, 1, 7, 2**20, 10**8, 10**9, 2**62, 2**64 - 1, rng.randrange(3000)])) + data[8:]
        )
    head, rest = header_of(data) if tensors else (data, b"")
    if action == "nest":
        head = rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b'{"seed":' + b"[" * 900 + b"]" * 900 + b"}"])
    else:
        content = json.loads(head)
        change_json(content, rng)
        head = to_bytes(content, rng)
    return struct.pack("<Q", len(head)) + head + rest if tensors else head


def assert_intact(folder, info):
    """An independent reading of section 8, with the safetensors library."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "turboquant_weights"
    assert config["format_version"] == 1
    found = {}
    for name in info.files:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    assert key not in found
                    found[key] = file.get_slice(key)
    planes = ("codes", "residual", "scales", "exponents")
    layers = {key.rpartition(".")[0] for key in found if key.rpartition(".")[2] in planes}
    layer_bits = config.get("layer_bits") or {}
    embeddings = config.get("embeddings") or {}
    experts = config.get("experts") or {}
    for name, grades in list(embeddings.items()):
        if isinstance(grades[0], list):
            del embeddings[name]
            embeddings |= {f"{name}.{i}": bits for i, (_, *bits) in enumerate(grades)}
            assert [found[f"{name}.{i}.scales"].get_shape()[0] for i in range(len(grades))] == [rows for rows, *_ in grades]
            order = found[f"{name}.order"]
            assert (order.get_dtype(), order.get_shape()) == ("I32", [sum(rows for rows, *_ in grades)])
    assert set(layer_bits) | set(embeddings) | set(experts) <= layers
    assert not set(embeddings) & {*layer_bits, *experts}
    assert set(experts.values()) <= {"out_in", "in_out"}
    assert sorted(layers) == [layer.name for layer in info.layers] != []
    for layer in layers:
        assert layer not in config["skip"]
        assert f"{layer}.bias" not in found or layer not in {*embeddings, *experts}
        assert layer not in found or (layer in experts and found[layer].get_shape() == [0])
        bits, residual_bits = {**layer_bits, **embeddings}.get(layer, (config["bits"], config["residual_bits"]))
        widths = {"codes": bits, "residual": residual_bits}
        *rows, blocks = found[f"{layer}.scales"].get_shape()
        assert len(rows) == (2 if layer in experts else 1)
        expected = {"scales": ("U8", [*rows, blocks]), "exponents": ("I8", rows)}
        expected |= {plane: ("U8", [*rows, blocks * 32 * width // 8]) for plane, width in widths.items() if width}
        for plane in planes:
            tensor = found.get(f"{layer}.{plane}")
            assert (tensor and (tensor.get_dtype(), tensor.get_shape())) == expected.get(plane)


def put(path, data):
    """Writes a file, in place where it exists: replacing one takes milliseconds on some file systems."""
    if not path.exists():
        path.write_bytes(b"")
    with path.open("r+b") as stream:
        stream.write(data)
        stream.truncate()


def run_case(folder, saved, manifest, mixed, rng):
    """Damages one or two files, checks the verdict, repairs them. Returns whether the folder was accepted."""
    names = rng.sample(sorted(saved), rng.choice([1, 1, 1, 2]))
    for name in names:
        data = damage(name, saved[name], rng)
        if data is None:
            (folder / name).unlink()
            if rng.random() < 0.3:
                (folder / name).mkdir()
        else:
            put(folder / name, data)
    try:
        info = validate(folder)
    except FormatError as error:
        if len(str(error)) > 2000:
            raise ValueError(f"a message of {len(str(error))} characters") from error
        return False
    else:
        assert_intact(folder, info)
        changed = {name for name in saved if not (folder / name).is_file() or (folder / name).read_bytes() != saved[name]}
        if manifest and info.has_manifest:
            assert info.config == tiny_checkpoint.config(mixed=mixed)
            for name in changed & {name for name in saved if name.endswith(".safetensors")}:
                assert header_of((folder / name).read_bytes())[0] == header_of(saved[name])[0]
            listed = set(json.loads((folder / "turboquant_weights.json").read_bytes())["files"])
            if changed & listed:
                with pytest.raises(FormatError):
                    verify(folder)
        return True
    finally:
        for name in names:
            if (folder / name).is_dir():
                (folder / name).rmdir()
            put(folder / name, saved[name])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("manifest", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_checkpoints_are_rejected_or_intact(tmp_path, sharded, manifest, mixed):
    folder = tiny_checkpoint.write(tmp_path, sharded=sharded, mixed=mixed)
    if manifest:
        write_manifest(folder)
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    validate(folder)
    rejected = 0
    for case in range(CASES):
        rng = random.Random(f"{sharded} {manifest} {mixed} {case}")
        traced = case % 4 == 0  # tracing memory is slow
        if traced:
            tracemalloc.start()
        start = time.process_time()  # whatever else the machine is doing
        try:
            rejected += not run_case(folder, saved, manifest, mixed, rng)
            assert time.process_time() - start < SECONDS
            assert not traced or tracemalloc.get_traced_memory()[1] < BYTES
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        finally:
            tracemalloc.stop()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved
    validate(folder)
    assert CASES / 2 < rejected < CASES  # the damage is real, and not all of it is fatal


def test_a_swapped_pair_of_folders_is_found(tmp_path):
    """Files that are each in order, but not of one checkpoint."""
    first, second = tiny_checkpoint.write(tmp_path / "a", 4, 2), tiny_checkpoint.write(tmp_path / "b", 4, 4)
    shutil.copy(second / "model.safetensors", first / "model.safetensors")
    with pytest.raises(FormatError, match="does not belong to these tensors"):
        validate(first)
