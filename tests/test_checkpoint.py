"""Checkpoint folders: written whole or not at all; every broken rule of FORMAT.md is found and named."""

import hashlib
import json
import math
import re
import struct

import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file, save_file

from turboquant_weights import FormatError, TurboQuantConfig
from turboquant_weights.checkpoint import atomic_folder, check_values, validate, verify, write_manifest
from turboquant_weights.header import read_header

SINGLE, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "turboquant_weights.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint.write(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path):
    return tiny_checkpoint.write(tmp_path / "checkpoint", sharded=True)


def rejects(folder, *texts):
    with pytest.raises(FormatError) as caught:
        validate(folder)
    for text in texts:
        assert text in str(caught.value)


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder, edit):
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def edit_header(path, edit):
    """Changes the JSON header as text and corrects its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


# -- a good checkpoint


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("bits", "residual_bits"), [(2, 0), (3, 1), (4, 0), (4, 4)])
def test_info_of_a_good_checkpoint(tmp_path, bits, residual_bits, sharded):
    folder = tiny_checkpoint.write(tmp_path, bits, residual_bits, sharded)
    info = validate(folder)
    total = bits + residual_bits
    assert info.config == tiny_checkpoint.config(bits, residual_bits)
    assert info.architecture == "TinyModel"
    assert [(layer.name, layer.out_features, layer.columns) for layer in info.layers] == [
        ("model.attn", 3, 64),
        ("model.mlp", 5, 32),
    ]
    label = f"{bits}+{residual_bits}" if residual_bits else str(bits)
    assert {layer.label for layer in info.layers} == {label}
    attn, mlp = 3 * 64 * total // 8 + 3 * 2 + 3, 5 * 32 * total // 8 + 5 + 5 + 20
    assert [layer.nbytes for layer in info.layers] == [attn, mlp]
    assert info.quantized_bytes == attn + mlp
    assert info.bits_per_weight == 8 * (attn + mlp) / (3 * 64 + 5 * 32)
    assert {tensor.name: tensor.nbytes for tensor in info.others} == {"model.embed.weight": 24, "model.norm.weight": 8}
    assert info.other_bytes == 32
    assert info.total_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert not info.has_manifest


@pytest.mark.parametrize("sharded", [False, True])
def test_info_of_a_mixed_checkpoint(tmp_path, sharded):
    info = validate(tiny_checkpoint.write(tmp_path, sharded=sharded, mixed=True))
    assert info.config == tiny_checkpoint.config(mixed=True)
    assert {layer.name: (layer.kind, layer.label) for layer in info.layers} == {
        "model.attn": ("linear", "4+2"),
        "model.embed": ("embedding", "2+2"),
        "model.experts.down": ("experts", "3+2"),
        "model.experts.up": ("experts", "4+2"),
        "model.mlp": ("linear", "3+1"),
        "model.tokens.0": ("embedding", "3+1"),
        "model.tokens.1": ("embedding", "2"),
    }
    assert info.layers[5].nbytes == 4 * (16 + 1 + 1) + 4 * 10  # with the order of all rows
    assert info.layers[1].nbytes == 6 * (16 + 1 + 1)
    down = info.layers[2]
    assert (down.experts, down.out_features, down.columns, down.weights) == (2, 4, 64, 512)
    assert down.nbytes == 8 * (64 * 5 // 8 + 2 + 1)
    assert [tensor.name for tensor in info.others] == ["model.norm.weight"]
    write_manifest(tmp_path)
    verify(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c["quantization_config"]["layer_bits"].pop("model.mlp"))
    rejects(tmp_path, "model.mlp.codes", "with 4+2 bits")


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (lambda c: c.pop("embeddings"), ("model.embed.codes", "with 4+2 bits")),
        (lambda c: c["embeddings"].update({"model.embed": [2, 1]}), ("model.embed.residual", "with 2+1 bits")),
        (lambda c: c["embeddings"].update({"model.*": [2, 2]}), ("embeddings has 'model.*'", "only exact names")),
        (lambda c: c["embeddings"].update({"model.mlp": [3, 1]}), ("'model.mlp'", "under layer_bits and under embeddings")),
        (
            lambda c: c["embeddings"].update({"model.mlp": [3, 1]}) or c["layer_bits"].pop("model.mlp"),
            ("model.mlp.bias", "has no bias"),
        ),
        (lambda c: c["embeddings"].update({"model.tokens.0": [3, 1]}), ("'model.tokens.0'", "a grade of 'model.tokens'")),
        (lambda c: c["layer_bits"].update({"model.tokens.1": [2, 0]}), ("'model.tokens.1'", "a grade of 'model.tokens'")),
        (lambda c: c["embeddings"].update({"model.embed": 4}), ("embeddings['model.embed'] is 4",)),
        (lambda c: c.update(skip=["model.embed"]), ("'model.embed'", "one or the other")),
    ],
)
def test_rules_for_embeddings(tmp_path, edit, texts):
    tiny_checkpoint.write(tmp_path, mixed=True)
    edit_json(tmp_path / "config.json", lambda c: edit(c["quantization_config"]))
    rejects(tmp_path, *texts)


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (lambda c: c.pop("experts"), ("model.experts.down.scales", "matrix [out_features, columns / 32]")),
        (
            lambda c: c["experts"].update({"model.mlp": "out_in"}),
            ("'model.mlp.bias'", "a stack of experts has no such tensor"),
        ),
        (lambda c: c["experts"].update({"model.*": "out_in"}), ("experts has 'model.*'", "only exact names")),
        (lambda c: c["experts"].update({"model.embed": "out_in"}), ("'model.embed'", "under experts and under embeddings")),
        (lambda c: c["experts"].update({"model.experts.up": "up"}), ("experts['model.experts.up'] is 'up'",)),
        (lambda c: c.update(skip=["model.experts.up"]), ("'model.experts.up'", "one or the other")),
        (lambda c: c["layer_bits"].pop("model.experts.down"), ("model.experts.down.codes", "with 4+2 bits")),
        (
            lambda c: c.update(experts=dict.fromkeys(["model.experts.up", "model.experts.down", "model.attn"], "in_out")),
            ("'model.attn.weight'", "a stack of experts has no such tensor"),
        ),
    ],
)
def test_rules_for_experts(tmp_path, edit, texts):
    tiny_checkpoint.write(tmp_path, mixed=True)
    edit_json(tmp_path / "config.json", lambda c: edit(c["quantization_config"]))
    rejects(tmp_path, *texts)


def test_tripwire_of_a_stack(tmp_path):
    """It has the name of the parameter itself, and nothing else may."""
    for shape, dtype, ok in [((0,), torch.float16, True), ((2, 3, 32), torch.float16, False), ((0,), torch.int8, False)]:
        tensors = {**tiny_checkpoint.tensors(mixed=True), "model.experts.up": torch.zeros(shape, dtype=dtype)}
        tiny_checkpoint.write(tmp_path, mixed=True)
        save_file(tensors, tmp_path / SINGLE)
        if ok:
            assert "model.experts.up" not in [tensor.name for tensor in validate(tmp_path).others]
        else:
            rejects(tmp_path, "model.experts.up", "of shape [0]")


def test_header_offsets_are_where_the_bytes_are(folder):
    data = (folder / SINGLE).read_bytes()
    tensors = load_file(folder / SINGLE)
    header = read_header(folder / SINGLE)
    assert {tensor.name for tensor in header.tensors} == set(tensors)
    for tensor in header.tensors:
        expected = tensors[tensor.name].view(torch.uint8).flatten().tolist() if tensor.nbytes else []
        assert list(data[tensor.begin : tensor.begin + tensor.nbytes]) == expected


def test_nonfinite_numbers_are_allowed_in_the_models_own_settings(folder):
    edit_json(folder / "config.json", lambda c: c.update(time_step_limit=[0.0, math.inf]))
    validate(folder)


def test_files_may_be_links_as_in_a_download_cache(folder, tmp_path):
    (folder / SINGLE).rename(tmp_path / "blob")
    (folder / SINGLE).symlink_to(tmp_path / "blob")
    validate(folder)


# -- verify and the manifest


@pytest.mark.parametrize("sharded", [False, True])
def test_verify_with_a_manifest_finds_any_changed_byte(tmp_path, sharded):
    folder = tiny_checkpoint.write(tmp_path, sharded=sharded)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("card")
    write_manifest(folder)
    result = verify(folder)
    assert result.manifest_checked
    listed = {path.name for path in folder.iterdir()} - {MANIFEST, "README.md"}
    assert set(result.checksums) == listed
    for name in listed:
        content = (folder / name).read_bytes()
        assert result.checksums[name] == hashlib.sha256(content).hexdigest()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(FormatError, match=re.escape(name)):
            verify(folder)
        (folder / name).unlink()
        with pytest.raises(FormatError, match=re.escape(name) if name != SINGLE else "neither"):
            verify(folder)
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("another card")
    (folder / "notes.txt").write_text("not listed")
    verify(folder)


def test_verify_without_a_manifest_says_so(folder):
    result = verify(folder)
    assert not result.manifest_checked
    assert set(result.checksums) == {"config.json", SINGLE}


def test_manifest_is_compared_before_loading(folder):
    write_manifest(folder)
    original = (folder / "config.json").read_text()
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(source=None))
    edit_json(folder / "config.json", lambda c: c.update(use_cache=False))
    validate(folder)  # neither changes what the bytes mean
    for key, value in (("seed", 6), ("group_size", 64), ("skip", [])):
        edit_json(folder / "config.json", lambda c, key=key, value=value: c["quantization_config"].update({key: value}))
        rejects(folder, "config.json", f"{key} is", "was saved")
        (folder / "config.json").write_text(original)
    # The same bytes under exchanged names: consistent in themselves, but other weights.
    edit_header(folder / SINGLE, lambda text: text.replace('"model.norm.weight"', '"model.form.weight"'))
    rejects(folder, SINGLE, "header", MANIFEST)


def test_stale_manifest_names_the_cure(folder):
    write_manifest(folder)
    edit_tensors(folder, lambda t: t.update({"model.extra": torch.ones(3)}))
    rejects(folder, SINGLE, f"delete {MANIFEST}")
    (folder / MANIFEST).unlink()
    validate(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("files"),
        lambda m: m.update(quantization_config=3),
        lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"].update({"x" * 5000: {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"].update({"\ud800": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"]["config.json"].pop("sha256"),
        lambda m: m["files"][SINGLE].pop("header_sha256"),
        lambda m: m["files"].pop(SINGLE),
    ],
)
def test_damaged_manifest(folder, edit):
    write_manifest(folder)
    edit_json(folder / MANIFEST, edit)
    rejects(folder, MANIFEST)


def test_forbidden_exponents_are_found_when_values_are_read(folder):
    edit_tensors(folder, lambda t: t["model.mlp.exponents"].__setitem__(3, 101))
    info = validate(folder)
    for check in (lambda: check_values(info), lambda: verify(folder)):
        with pytest.raises(FormatError, match=r"'model.mlp.exponents' holds 101: exponents must be -128 to 100"):
            check()
    edit_tensors(folder, lambda t: t["model.mlp.exponents"].copy_(torch.tensor([100, -128, -1, 0, 100])))
    verify(folder)


# -- config.json


def test_not_a_folder(tmp_path):
    rejects(tmp_path / "missing", "not a folder")
    rejects(tmp_path, "config.json", "cannot be read")


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (lambda c: c.pop("quantization_config"), ("quantization_config is None", "not a quantized model")),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), ("'gptq'",)),
        (lambda c: c["quantization_config"].update(format_version=2), ("format_version is 2", "newer")),
        (lambda c: c["quantization_config"].update(format_version=True), ("format_version",)),
        (lambda c: c["quantization_config"].update(codec="trellis"), ("unknown keys ['codec']",)),
        (lambda c: c["quantization_config"].update(bits=5), ("bits is 5", "2, 3, 4")),
        (lambda c: c["quantization_config"].update(seed=-1), ("seed is -1",)),
        (lambda c: c["quantization_config"].update(skip=None), ("skip is null",)),
        (lambda c: c["quantization_config"].update(skip=7), ("skip is 7",)),
        (lambda c: c["quantization_config"].update(skip=["model.attn"]), ("'model.attn'", "one or the other")),
        (
            lambda c: c["quantization_config"].update(layer_bits={"model.mlp": [5, 0]}),
            ("layer_bits['model.mlp']: bits is 5",),
        ),
        (lambda c: c["quantization_config"].update(layer_bits={"model.*": [4, 2]}), ("'model.*'", "only exact names")),
        (lambda c: c["quantization_config"].update(source=[1]), ("source",)),
        *(
            (lambda c, key=key: c["quantization_config"].pop(key), (f"no {key!r}",))
            for key in ("quant_method", "format_version", "bits", "residual_bits", "group_size", "seed")
        ),
    ],
)
def test_config_rules(folder, edit, texts):
    edit_json(folder / "config.json", edit)
    rejects(folder, "config.json", *texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 10_000, "not valid JSON"),
        ('{"a": "\xff"}', "not valid JSON"),
    ],
)
def test_config_must_be_a_json_object(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    rejects(folder, "config.json", message)


# -- files


def test_exactly_one_of_file_and_index(folder, sharded, tmp_path):
    (sharded / SINGLE).write_bytes(b"")
    rejects(sharded, "both")
    (sharded / SINGLE).unlink()
    (sharded / INDEX).unlink()
    rejects(sharded, "neither")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", ".safetensors", "model.bin", "", "a\0"],
)
def test_index_cannot_leave_the_folder(sharded, name):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    rejects(sharded, INDEX, "model.norm.weight", "in this folder")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": None}, "x"])
def test_index_needs_a_weight_map(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    rejects(sharded, INDEX)


def test_index_and_shards_must_agree(sharded):
    original = (sharded / INDEX).read_text()
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    rejects(sharded, SECOND, "model.norm.weight", "not for this file by model.safetensors.index.json")
    (sharded / INDEX).write_text(original)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(more=SECOND))
    rejects(sharded, SECOND, "'more'", f"not for this file by {SECOND}")
    (sharded / INDEX).write_text(original)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": FIRST}))
    rejects(sharded, "model.norm.weight", "both must agree")
    (sharded / INDEX).write_text(original)
    save_file({**load_file(sharded / FIRST), "model.norm.weight": torch.ones(4)}, sharded / FIRST)
    rejects(sharded, FIRST, "model.norm.weight")  # the same tensor in two shards
    (sharded / FIRST).unlink()
    rejects(sharded, FIRST, "cannot be read")


# -- safetensors headers


def test_truncation_anywhere_is_found(folder):
    content = (folder / SINGLE).read_bytes()
    for size in (0, 3, 8, 9, 100, len(content) // 2, len(content) - 1):
        (folder / SINGLE).write_bytes(content[:size])
        rejects(folder, SINGLE)
    (folder / SINGLE).write_bytes(content + b"\0")
    rejects(folder, SINGLE, f"{len(content) + 1} bytes", f"describes {len(content)}")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_header_length_is_not_believed(folder, length):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + content[8:])
    rejects(folder, SINGLE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"dtype":"U8"', '"dtype":"I8"', "it must be U8"),
        ('"dtype":"U8"', '"dtype":"U7"', "known are"),
        ('"dtype":"U8"', '"dtype":8', "known are"),
        ('"dtype":"U8"', '"DTYPE":"U8"', "dtype, shape and data_offsets are needed"),
        ('"shape":[3,32]', '"shape":[32,3]', "must be U8 [3, 32]"),
        ('"shape":[3,32]', '"shape":[3,33]', "need 99"),
        ('"shape":[3,32]', '"shape":[-3,-32]', "list of at most"),
        ('"shape":[3,32]', '"shape":[3,32.0]', "list of at most"),
        ('"shape":[3,32]', '"shape":[3,NaN]', "NaN is no JSON number"),
        ('"shape":[3,32]', f'"shape":[{2**70},1]', "list of at most"),
        ('"shape":[3,32]', f'"shape":[{"1," * 9}96]', "list of at most"),
        ('"shape":[3,32]', '"shape":"3,32"', "list of at most"),
        ('"data_offsets":[', '"data_offsets":[0,', "[begin, end]"),
        ('"model.norm.weight":', '"model.embed.weight":', "occurs twice"),
        ('"format":"pt"', '"format":1', "__metadata__"),
        ('"model.norm.weight":', '"model.norm.codes":', "'model.norm.scales' is missing"),
        ('"model.norm.weight":', '"codes":', "<layer>.codes"),
        ('"model.norm.weight":', '"model.attn.zeros":', "no such tensor"),
        ('"model.norm.weight":', '"model.attn.inner.weight":', "no such tensor"),
        ('"model.norm.weight":', '"model.mlp.weight":', "one of F16, BF16, F32 and of shape [0]"),
    ],
)
def test_header_rules(folder, old, new, message):
    edit_header(folder / SINGLE, lambda text: text.replace(old, new, 1))
    rejects(folder, message)


def test_gaps_and_overlaps(folder):
    def move(text):
        header = json.loads(text)
        begin, end = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [begin - 8, end - 8]
        return json.dumps(header)

    edit_header(folder / SINGLE, move)
    rejects(folder, SINGLE, "gap or overlap")


# -- layers


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (lambda t: t.pop("model.attn.codes"), ("'model.attn.codes' is absent", "U8 [3, 32]")),
        (lambda t: t.pop("model.attn.residual"), ("'model.attn.residual' is absent", "U8 [3, 16]")),
        (lambda t: t.pop("model.attn.scales"), ("'model.attn.scales' is missing",)),
        (lambda t: t.pop("model.attn.exponents"), ("'model.attn.exponents' is absent", "I8 [3]")),
        (lambda t: t.update({"model.attn.scales": torch.zeros(3, 0, dtype=torch.uint8)}), ("[3, 0]", "uint8 matrix")),
        (lambda t: t.update({"model.attn.scales": torch.zeros(3, 2, dtype=torch.int8)}), ("I8 [3, 2]",)),
        (lambda t: t.update({"model.attn.codes": torch.zeros(3, 31, dtype=torch.uint8)}), ("U8 [3, 31]", "U8 [3, 32]")),
        (lambda t: t.update({"model.attn.exponents": torch.zeros(4, dtype=torch.int8)}), ("I8 [4]",)),
        (lambda t: t.update({"model.attn.exponents": torch.zeros(3, dtype=torch.uint8)}), ("U8 [3]",)),
        (lambda t: t.update({"model.mlp.bias": torch.zeros(4)}), ("'model.mlp.bias' is F32 [4]", "[5]")),
        (lambda t: t.update({"model.mlp.bias": torch.zeros(5).long()}), ("I64 [5]",)),
        (lambda t: t.update({"model.attn.weight": torch.zeros(3, 64)}), ("'model.attn.weight'", "[0]")),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(("model.attn", "model.mlp"))],
            ("no quantized layer",),
        ),
    ],
)
def test_layer_rules(folder, edit, texts):
    edit_tensors(folder, edit)
    rejects(folder, *texts)


@pytest.mark.parametrize(("bits", "residual_bits", "name"), [(4, 0, "residual"), (3, 2, "codes"), (4, 3, "residual")])
def test_config_and_planes_must_agree(folder, bits, residual_bits, name):
    update = {"bits": bits, "residual_bits": residual_bits}
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(update))
    rejects(folder, f"model.attn.{name}", "config does not belong to these tensors")


# -- atomic_folder


def listing(path):
    return sorted(child.name for child in path.iterdir())


def test_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "new" / "model"
    with atomic_folder(target) as temporary:
        (temporary / "config.json").write_text("{}")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert listing(tmp_path / "new") == ["model"]
    assert (target / "config.json").read_text() == "{}"
    assert target.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_files_can_be_read_by_whoever_may_read_others(tmp_path):
    with atomic_folder(tmp_path / "model") as temporary:
        save_file({"a": torch.ones(1)}, temporary / "a.safetensors")
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "model" / "a.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device"), ValueError])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_behind_after_an_error(folder, error, existing):
    parent = folder.parent
    target = folder if existing else parent / "other"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = listing(parent)

    def interrupted():
        with atomic_folder(target, overwrite=True) as temporary:
            (temporary / "half").write_text("written")
            raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        interrupted()
    assert listing(parent) == names
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_overwriting_must_be_allowed_and_replaces_everything(folder):
    with pytest.raises(FileExistsError, match="allow overwriting"), atomic_folder(folder):
        pytest.fail("the block must not run")
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
        assert SINGLE in listing(folder)
    assert listing(folder) == ["config.json"]
    assert listing(folder.parent) == [folder.name]


def test_only_model_folders_are_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match="not a model folder"), atomic_folder(tmp_path / name, overwrite=True):
            pytest.fail("the block must not run")
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as temporary:
        (temporary / "a").write_text("x")
    assert listing(tmp_path / "empty") == ["a"]


def test_a_failing_swap_puts_the_old_folder_back(folder, monkeypatch):
    original = type(folder).rename

    def rename(self, target):
        if ".writing-" in self.name:
            raise OSError("device is gone")
        return original(self, target)

    monkeypatch.setattr(type(folder), "rename", rename)
    with pytest.raises(OSError, match="device is gone"), atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert listing(folder.parent) == [folder.name]
    validate(folder)


def test_a_link_keeps_pointing_to_the_replaced_folder(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    with atomic_folder(link, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert link.is_symlink()
    assert listing(folder) == ["config.json"]


def test_write_manifest_refuses_a_bad_checkpoint(folder):
    (folder / SINGLE).write_bytes(b"")
    with pytest.raises(FormatError):
        write_manifest(folder)
    assert not (folder / MANIFEST).exists()


def test_written_config_is_what_is_read(folder):
    config = TurboQuantConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert validate(folder).config == config
