"""Finished blocks of a calibrated run on disk, so that a run that was interrupted loses at most the block it was in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import TurboQuantConfig
from .errors import ConfigError
from .reference import PackedWeight, Quantized

_RUN, _LOCK, _WRITING = "run.json", ".lock", ".writing"
_PLANES = PackedWeight._fields
_SAMPLED = 4096  # entries of each weight that enter the fingerprint


class BlockStore:
    """A folder of block files, the fingerprint of the run they belong to, and the settings that the run arrived at.

    It belongs to the run from the first thing that is saved on, so a call that fails before binds no folder. Use it as a
    context: one process at a time.

    Args:
        folder: Created if needed.
        fingerprint: From :func:`fingerprint`.

    Raises:
        ConfigError: the folder belongs to another run, is no folder of this kind, or another process uses it.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run: dict[str, Any] = {"fingerprint": fingerprint}
        run = self.folder / _RUN
        ours = (path.name == _LOCK or path.name.endswith(_WRITING) for path in self.folder.iterdir())
        if not run.exists() and not all(ours):
            raise ConfigError(f"{self.folder} is not empty and no resume folder: choose another")
        self._lock = FileLock(self.folder / _LOCK)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"another process calibrates with {self.folder}: wait for it, or choose another folder"
            ) from None
        if run.exists():
            try:
                known = json.loads(run.read_text(encoding="utf-8"))
                same = known["fingerprint"] == fingerprint
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                self._lock.release()
                raise ConfigError(
                    f"{self.folder} holds the blocks of another run (another model, text, setting or version): "
                    "choose another resume folder, or delete this one"
                )
            self._run = known

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    @property
    def config(self) -> TurboQuantConfig | None:
        """The settings by layer of the run so far: measuring sensitivities again could come out a little different."""
        values = self._run.get("config")
        return None if values is None else TurboQuantConfig.from_dict(values)

    def keep_config(self, config: TurboQuantConfig, expected_kl: float) -> None:
        self._run.update(config=config.to_dict(), expected_kl=expected_kl)
        self._write_run()

    @property
    def expected_kl(self) -> float:
        return float(self._run["expected_kl"])

    def _claim(self) -> None:
        if not (self.folder / _RUN).exists():
            self._write_run()

    def _write_run(self) -> None:
        text = json.dumps(self._run, indent=1) + "\n"
        _write(self.folder / _RUN, lambda path: path.write_text(text, encoding="utf-8"))

    def load(self, index: int | str, layers: Iterable[str]) -> dict[str, Quantized] | None:
        """The layers of a block as :meth:`save` got them; None if it is not finished.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        with _opened(path) as file:
            errors = json.loads(file.metadata()["errors"])
            names = set(file.keys())
            found = {}
            for layer in layers:
                planes = {p: file.get_tensor(f"{layer}.{p}") for p in _PLANES if f"{layer}.{p}" in names}
                found[layer] = Quantized(PackedWeight(**{"residual": None, **planes}), errors[layer])
            return found

    def unreached(self, index: int) -> list[str]:
        """What a finished block was saved with."""
        with _opened(self._path(index)) as file:
            return list(json.loads(file.metadata()["unreached"]))

    def save(self, index: int | str, layers: Mapping[str, Quantized], unreached: Sequence[str] = ()) -> None:
        """Writes a finished block: whole, or not at all. ``unreached``: what of it the text did not reach."""
        self._claim()
        tensors = {
            f"{name}.{plane}": tensor.detach().cpu().contiguous()
            for name, quantized in layers.items()
            for plane, tensor in quantized.weight._asdict().items()
            if tensor is not None
        }
        errors = {name: quantized.error for name, quantized in layers.items()}
        metadata = {"errors": json.dumps(errors), "unreached": json.dumps(list(unreached))}
        _write(self._path(index), lambda path: save_file(tensors, path, metadata=metadata))

    def load_tensors(self, name: str, keys: Iterable[str]) -> dict[str, Tensor] | None:
        """What :meth:`save_tensors` wrote under this name; None if nothing.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        with _opened(path) as file:
            return {key: file.get_tensor(key) for key in keys}

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors that are no planes: whole, or not at all."""
        self._claim()
        _write(self._path(name), lambda path: save_file(dict(tensors), path))

    def _path(self, index: int | str) -> Path:
        return (
            self.folder / f"block-{index:05d}.safetensors"
            if isinstance(index, int)
            else self.folder / f"{index}.safetensors"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it is a ConfigError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it, and the block is done again") from None


def _write(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}{_WRITING}")
    write(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def fingerprint(model: nn.Module, request: Mapping[str, Any], tokens: Tensor) -> str:
    """Of everything that the blocks depend on: what was asked for (JSON-able), the text, a sample of every weight."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode())
    digest.update(f"{tuple(tokens.shape)} {tokens.dtype}".encode())
    digest.update(tokens.cpu().contiguous().numpy().tobytes())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
