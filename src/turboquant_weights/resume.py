"""Finished blocks of a calibrated run on disk, so that a run that was interrupted loses at most the block it was in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import TurboQuantConfig
from .errors import ConfigError
from .reference import PackedWeight, Quantized

_RUN = "run.json"
_PLANES = PackedWeight._fields
_SAMPLED = 4096  # entries of each weight that enter the fingerprint


class BlockStore:
    """A folder of block files, the fingerprint of the run they belong to, and the settings that the run arrived at.

    Args:
        folder: Created if needed.
        fingerprint: From :func:`fingerprint`.

    Raises:
        ConfigError: the folder belongs to another run, or is no folder of this kind.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run: dict[str, Any] = {"fingerprint": fingerprint}
        run = self.folder / _RUN
        if run.exists():
            try:
                known = json.loads(run.read_text(encoding="utf-8"))
                same = known["fingerprint"] == fingerprint
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise ConfigError(
                    f"{self.folder} holds the blocks of another run (another model, text, setting or version): "
                    "choose another resume folder, or delete this one"
                )
            self._run = known
        elif any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and no resume folder: choose another")
        else:
            self._write_run()

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

    def save(self, index: int | str, layers: Mapping[str, Quantized]) -> None:
        """Writes a finished block: whole, or not at all."""
        tensors = {
            f"{name}.{plane}": tensor.detach().cpu().contiguous()
            for name, quantized in layers.items()
            for plane, tensor in quantized.weight._asdict().items()
            if tensor is not None
        }
        errors = json.dumps({name: quantized.error for name, quantized in layers.items()})
        _write(self._path(index), lambda path: save_file(tensors, path, metadata={"errors": errors}))

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
    temporary = path.with_name(f".{path.name}.writing")
    write(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def fingerprint(model: nn.Module, request: Mapping[str, Any], tokens: Tensor) -> str:
    """Of everything that the blocks depend on: what was asked for (JSON-able), the text, a sample of every weight."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode())
    digest.update(tokens.cpu().numpy().tobytes())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
