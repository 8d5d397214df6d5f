"""Quantizing a checkpoint that is never loaded: it gives what ``quantize_model`` and ``save`` do, whatever happens."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import snapshot
from tqdm.auto import tqdm

transformers = pytest.importorskip("transformers")

import turboquant_weights as tq  # noqa: E402
from turboquant_weights.checkpoint import read_headers  # noqa: E402
from turboquant_weights.header import read_header  # noqa: E402
from turboquant_weights.integrations.dense import DenseCheckpoint  # noqa: E402
from turboquant_weights.partial import PartialFolder  # noqa: E402
from turboquant_weights.writer import ShardWriter  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)


def _llama(**kwargs):
    settings = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **kwargs}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).bfloat16()


def _qwen():  # biases, an untied head
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)).half()


def _gpt2():  # Conv1D, stored transposed, tied
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def _gemma():  # an embedding of a class of its own, with a scale that no file holds
    config = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16)
    return transformers.Gemma3ForCausalLM(config).bfloat16()


def _albert():  # one block under many names, a decoder tied to the embedding, a bias tied to another
    config = transformers.AlbertConfig(
        vocab_size=96, embedding_size=32, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_hidden_layers=3
    )
    return transformers.AlbertForMaskedLM(config)


def _vit():  # no language model
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def _moe(name, **kwargs):  # experts lie one by one in the file, and in stacks in the model
    settings = dict(num_key_value_heads=2, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, head_dim=16)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings, **kwargs})
    return getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()


def write(folder, model, shard="60KB"):
    torch.manual_seed(1)
    with torch.no_grad():  # random biases and norms: fresh ones are all 0 and 1, which hides mix-ups
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(5)
    return write(tmp_path_factory.mktemp("llama") / "model", _llama())


@pytest.fixture
def log(caplog):
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.utils.logging.disable_propagation()


def in_memory(source, out, config, skip=None, **options):
    """The other way to the same checkpoint."""
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(source, **options)
    report = tq.quantize_model(model, config, skip=skip, progress=False)
    tq.save(model, out)
    return report


def assert_same_checkpoint(a, b):
    """All files, up to the order of entries in a header's metadata and what follows from it."""
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
    for path in a.iterdir():
        other = b / path.name
        if path.suffix == ".safetensors":
            left, right = read_header(path).tensors, read_header(other).tensors
            assert [t._replace(begin=0) for t in left] == [t._replace(begin=0) for t in right]
            assert all(x.begin - left[0].begin == y.begin - right[0].begin for x, y in zip(left, right, strict=True))
            assert path.read_bytes()[left[0].begin :] == other.read_bytes()[right[0].begin :]
        elif path.name != "turboquant_weights.json":
            assert path.read_bytes() == other.read_bytes(), path.name


CASES = {
    "llama": (_llama, dict(bits=3, residual_bits=1), {}),
    "embedding": (_llama, dict(embeddings={"model.embed_tokens": (4, 2)}, layer_bits={"*.down_proj": (4, 4)}), {}),
    "head apart": (_llama, dict(), dict(skip=[])),
    "skips": (_llama, dict(seed=9), dict(skip=["lm_head", "*.0.mlp.*"])),
    "float32": (_llama, dict(), dict(dtype=torch.float32)),
    "qwen2": (_qwen, dict(layer_bits={"lm_head": (4, 2)}), {}),
    "gpt2": (_gpt2, dict(group_size=64), {}),
    "gpt2 embedding": (_gpt2, dict(embeddings={"transformer.wte": (4, 1)}), {}),
    "gemma3": (_gemma, dict(embeddings={"model.embed_tokens": (3, 2)}), {}),
    "albert": (_albert, dict(), {}),
    "qwen3 moe": (lambda: _moe("Qwen3Moe"), dict(layer_bits={"*.down_proj": (4, 2)}), {}),
    "mixtral": (lambda: _moe("Mixtral", num_local_experts=4), dict(bits=3), dict(skip=["*.0.mlp.experts.*", "lm_head"])),
    "gpt-oss": (lambda: _moe("GptOss", num_local_experts=4), {}, {}),  # transposed stacks, in the file too
    "vit": (_vit, dict(residual_bits=2), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_quantize_model_and_save(case, tmp_path):
    build, settings, options = CASES[case]
    torch.manual_seed(3)
    source = write(tmp_path / "dense", build())
    config = tq.TurboQuantConfig(**settings)
    expected = in_memory(source, tmp_path / "a" / "out", config, **options)
    report = tq.quantize_checkpoint(source, tmp_path / "b" / "out", config, progress=False, **options)
    assert_same_checkpoint(tmp_path / "a" / "out", tmp_path / "b" / "out")
    left, right = expected.to_dict(), report.to_dict()
    for values in (left, right, *left["layers"], *right["layers"]):
        del values["seconds"]
    assert left == right
    assert str(report).splitlines()[1:] == str(expected).splitlines()[1:]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["out"]


def test_the_same_call_gives_the_same_bytes_and_several_files(llama, tmp_path):
    for name in ("a", "b"):
        tq.quantize_checkpoint(llama, tmp_path / name / "out", max_shard_size=30_000, progress=False)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    out = tmp_path / "a" / "out"
    info = tq.load(out)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert all(path.stat().st_size < 40_000 for path in out.glob("*.safetensors"))
    tq.quantize_checkpoint(llama, tmp_path / "one", progress=False)
    one = tq.load(tmp_path / "one")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, info.state_dict()[name]), name
    for file, header in read_headers(out).items():
        assert all((tensor.begin % torch.bfloat16.itemsize) == 0 for tensor in header.tensors if tensor.dtype == "BF16"), (
            file
        )


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stored_twice(llama, tmp_path, equal, log):
    """Transformers ties them if they are equal, and else keeps both, with a warning."""
    source = shutil.copytree(llama, tmp_path / "dense")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(source / file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, source / file, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    in_memory(source, tmp_path / "a" / "out", tq.TurboQuantConfig())
    log.clear()
    tq.quantize_checkpoint(source, tmp_path / "b" / "out", progress=False)
    assert_same_checkpoint(tmp_path / "a" / "out", tmp_path / "b" / "out")
    assert ("stored with different weights" in log.text) is not equal


def test_only_the_name_that_is_tied_is_stored(llama, tmp_path):
    """Some files hold the head and leave the embedding to it."""
    source = shutil.copytree(llama, tmp_path / "dense")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.embed_tokens.weight")
    tensors = load_file(source / file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / file, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    config = tq.TurboQuantConfig(embeddings={"*": (4, 2)})
    in_memory(source, tmp_path / "a" / "out", config)
    tq.quantize_checkpoint(source, tmp_path / "b" / "out", config, progress=False)
    assert_same_checkpoint(tmp_path / "a" / "out", tmp_path / "b" / "out")


# -- interruptions

SETTINGS = dict(config=tq.TurboQuantConfig(residual_bits=2), max_shard_size=40_000, progress=False)


@pytest.fixture(scope="module")
def uninterrupted(llama, tmp_path_factory):
    """The files of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    tq.quantize_checkpoint(llama, folder / "out", **SETTINGS)
    return snapshot(folder)


def child(run):
    """Runs ``run`` in a fork; the child ends without any cleaning up. Returns its process id."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the pool's threads did not come along
        # Progress bars share a lock between processes: a child killed while it holds that would stop all others for good.
        for bar in filter(lambda base: hasattr(base, "set_lock"), tqdm.__mro__):  # each class may have one of its own
            bar.set_lock(threading.RLock())
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def killed(pid):
    """Whether it was killed; it must not have failed."""
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def test_killed_at_random_points_it_goes_on(llama, uninterrupted, tmp_path):
    """The process kills itself at some step that reaches the disk, later and later, until one run gets through."""
    out = tmp_path / "out"
    tq.quantize_checkpoint(llama, out, tq.TurboQuantConfig(bits=2), progress=False)
    before = snapshot(tmp_path)
    choose = random.Random(7)
    deaths = 0

    def run():
        left = limit

        def step():
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        for name in ("fsync", "chmod"):
            original = getattr(os, name)
            setattr(os, name, lambda *args, original=original, **more: (step(), original(*args, **more), step())[1])
        tq.quantize_checkpoint(llama, out, **SETTINGS, overwrite=True)

    while limit := choose.randint(1, 4 + 3 * deaths):
        if not killed(child(run)):
            break
        deaths += 1
        if (tmp_path / ".out.quantizing").exists():
            assert {name: data for name, data in snapshot(tmp_path).items() if name.startswith("out/")} == before
    assert deaths > 5
    assert snapshot(tmp_path) == uninterrupted


def test_killed_at_random_times(llama, uninterrupted, tmp_path):
    choose = random.Random(3)
    deaths = 0
    for attempt in range(100):
        pid = child(lambda: tq.quantize_checkpoint(llama, tmp_path / "out", **SETTINGS))
        time.sleep(choose.uniform(0.05, 0.1 + 0.05 * attempt))
        os.kill(pid, signal.SIGKILL)
        deaths += killed(pid)
        if (tmp_path / "out").exists():
            break
    assert deaths > 0
    left_over = snapshot(tmp_path)
    # A kill between the last rename and the removal of the journal leaves the latter.
    assert {name: data for name, data in left_over.items() if not name.startswith("out/.")} == uninterrupted


class Interrupted:
    """Lets a number of parts be written, then raises."""

    def __init__(self, monkeypatch, parts, error):
        self.left, self.original = parts, ShardWriter.write
        self.written = 0
        this = self

        def write(writer, tensors):
            if this.left == 0:
                this.left = -1
                raise error
            this.left -= 1
            this.written += 1
            return this.original(writer, tensors)

        monkeypatch.setattr(ShardWriter, "write", write)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_it_says_so_and_goes_on(llama, uninterrupted, tmp_path, monkeypatch, error, log):
    run = Interrupted(monkeypatch, 6, error)
    with pytest.raises(type(error)):
        tq.quantize_checkpoint(llama, tmp_path / "out", **SETTINGS)
    assert "the same call goes on" in log.text
    assert [path.name for path in tmp_path.iterdir()] == [".out.quantizing"]
    run.written = 0
    tq.quantize_checkpoint(llama, tmp_path / "out", **SETTINGS)
    assert "has 5 finished parts" in log.text
    assert run.written == len(DenseCheckpoint(llama).parts) + 1 - 5  # and the tripwire again
    assert snapshot(tmp_path) == uninterrupted


def test_a_damaged_part_is_done_again(llama, uninterrupted, tmp_path, monkeypatch, log):
    run = Interrupted(monkeypatch, 9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tq.quantize_checkpoint(llama, tmp_path / "out", **SETTINGS)
    partial = tmp_path / ".out.quantizing"
    first = min(partial.glob("*.safetensors"))
    with first.open("r+b") as stream:  # the last tensor of the first file
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 4]))
    with (partial / ".journal.jsonl").open("a") as stream:  # and a line that was cut off
        stream.write('{"part": "model.la')
    run.written = 0
    tq.quantize_checkpoint(llama, tmp_path / "out", **SETTINGS)
    assert "is not on disk as it was written" in log.text
    assert snapshot(tmp_path) == uninterrupted


def test_what_follows_a_line_that_was_cut_off_counts(tmp_path):
    request = {"a": 1}
    for parts in (("one", "two"), ("three", "four"), ()):
        with contextlib.suppress(KeyboardInterrupt), PartialFolder(tmp_path / "out", request, False) as folder:
            found = list(folder.finished)
            for part in parts:
                folder.record(part, part)
            with (folder.path / ".journal.jsonl").open("a") as stream:
                stream.write('{"part": "cut o')
            raise KeyboardInterrupt
    assert found == ["one", "two", "three", "four"]


def test_other_settings_or_inputs_start_anew(llama, tmp_path, monkeypatch, log):
    source = shutil.copytree(llama, tmp_path / "in" / "dense")
    (tmp_path / "work").mkdir()
    for change in ("settings", "inputs"):
        Interrupted(monkeypatch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tq.quantize_checkpoint(source, tmp_path / "work" / "out", progress=False)
        monkeypatch.undo()
        log.clear()
        if change == "inputs":
            file = max(source.glob("*.safetensors"))
            save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        bits = tq.TurboQuantConfig(bits=3 if change == "settings" else 4)
        tq.quantize_checkpoint(source, tmp_path / "work" / "out", bits, progress=False)
        assert "starting anew" in log.text
        tq.quantize_checkpoint(source, tmp_path / "fresh" / "out", bits, progress=False)
        assert snapshot(tmp_path / "work") == snapshot(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "work" / "out")
        shutil.rmtree(tmp_path / "fresh")


def test_two_processes_do_not_share_a_folder(llama, tmp_path, monkeypatch):
    seen = []

    def write(writer, tensors):
        with pytest.raises(tq.ConfigError, match="another process is writing"):
            tq.quantize_checkpoint(llama, tmp_path / "out", progress=False)
        seen.append(1)
        monkeypatch.undo()
        return original(writer, tensors)

    original = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", write)
    tq.quantize_checkpoint(llama, tmp_path / "out", progress=False)
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- what is wrong is said, once, and nothing is left behind


def _truncate(folder):
    file = max(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


def _remove(folder):
    max(folder.glob("*.safetensors")).unlink()


def _half_downloaded(folder):
    file = max(folder.glob("*.safetensors"))
    file.rename(file.with_suffix(".safetensors.incomplete"))


def _lose_a_tensor(folder):
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def _lose_it_from_the_index_too(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(folder / file)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _no_weights(folder):
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()


def _quantized(folder):
    tq.quantize_checkpoint(folder, folder.with_name("q"), progress=False)
    shutil.rmtree(folder)
    folder.with_name("q").rename(folder)


def _quantized_by_others(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def _infinite(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_truncate, tq.FormatError, "fetch it again"),
        (_remove, tq.FormatError, "cannot be read"),
        (_half_downloaded, tq.FormatError, "cannot be read"),
        (_lose_a_tensor, tq.FormatError, "both must agree"),
        (_lose_it_from_the_index_too, tq.FormatError, "model.norm.weight"),
        (_no_weights, tq.FormatError, "neither"),
        (_quantized, tq.ConfigError, "is quantized already, with turboquant_weights"),
        (_quantized_by_others, tq.ConfigError, "is quantized already, with gptq"),
        (_infinite, tq.QuantizationError, r"model.layers.1.mlp.up_proj: weight\[3, 5\] is inf"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
@pytest.mark.parametrize("existing", [False, True])
def test_bad_input(llama, tmp_path, damage, error, words, existing):
    source = shutil.copytree(llama, tmp_path / "dense")
    damage(source)
    if existing:
        shutil.copytree(llama, tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(error, match=words):
        tq.quantize_checkpoint(source, tmp_path / "out", overwrite=existing, progress=False)
    assert snapshot(tmp_path) == before


def test_an_existing_folder_and_wrong_settings(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="allow overwriting"):
        tq.quantize_checkpoint(llama, tmp_path / "out")
    for options, words in (
        (dict(skip=["nothing.*"]), "matches no linear layer"),
        (dict(skip="lm_head"), "must be a list"),
        (dict(config=tq.TurboQuantConfig(embeddings={"x": (4, 0)})), "matches no embedding"),
        (dict(device="gpu"), "device is 'gpu': devices are called like"),
        (dict(device="cuda:77"), "device is cuda:77: PyTorch finds . cuda devices"),
    ):
        with pytest.raises(tq.ConfigError, match=words):
            tq.quantize_checkpoint(llama, tmp_path / "new", **options)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_noticed_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OSError, match=r"0.00 GB free, but 0.05 GB are needed") as info:
        tq.quantize_checkpoint(llama, tmp_path / "out", progress=False)
    assert info.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_and_a_damaged_download(llama, tmp_path):
    """The hub's cache, offline: links to files named after their SHA-256, which is compared."""
    repository = tmp_path / "cache" / "models--some--llama"
    snapshot_folder = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot_folder, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for file in llama.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, repository / "blobs" / name)
        (snapshot_folder / file.name).symlink_to(Path("../../blobs") / name)
    code = (
        "import sys, turboquant_weights as tq\n"
        "tq.quantize_checkpoint('some/llama', sys.argv[1] + '/a', progress=False)\n"
        "blob = max(__import__('pathlib').Path(sys.argv[2]).glob('*.safetensors')).resolve()\n"
        "data = bytearray(blob.read_bytes()); data[-1] ^= 1; blob.write_bytes(data)\n"
        "try: tq.quantize_checkpoint('some/llama', sys.argv[1] + '/b', progress=False)\n"
        "except tq.FormatError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(tmp_path), str(snapshot_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the download is damaged" in done.stdout
    tq.quantize_checkpoint(llama, tmp_path / "c", progress=False)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["source"]["model"] == "some/llama"
    assert not (tmp_path / "b").exists()
