"""A device map that cannot work is refused before anything is read, in words about the map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError


def check_device_map(model: Any, device_map: Any) -> None:
    """``device_map`` as a user gave it, for ``model`` with its quantized layers declared; only dictionaries can be wrong.

    Raises:
        ConfigError: a key is no part of the model, a value is no device that this machine has, a parameter has no place, or
            modules that share their planes have two.
    """
    if not isinstance(device_map, Mapping):
        return
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for key, device in device_map.items():
        if key not in modules and key not in parameters:
            raise ConfigError(
                f"device_map has {key!r}, which is no part of {type(model).__name__}: its modules are named like "
                + ", ".join([name for name in sorted(modules, key=lambda name: name.count(".")) if name][:4])
            )
        if device != "disk":
            check_device(device, f"device_map sends {key!r} to", "'cuda:0', 'cpu' or 'disk'")
        outer = None if key == "" else _place(device_map, key.rpartition(".")[0])
        if outer is not None and outer != device and "disk" in (outer, device):
            raise ConfigError(
                f"device_map sends {key} to {device} and what it lies in to {outer}: accelerate cannot do that with a part "
                "on disk. Give places to parts that lie side by side"
            )
    tied = model.all_tied_weights_keys
    for name in parameters:
        if _place(device_map, name) is None and _place(device_map, tied.get(name, name)) is None:
            raise ConfigError(f"device_map has no place for {name}: give one to each part of the model")
    for name, source in tied.items():
        place, other = _place(device_map, name), _place(device_map, source)
        if name.endswith(".codes") and place is not None and place != other:
            raise ConfigError(
                f"device_map sends {name.removesuffix('.codes')} to {place} and {source.removesuffix('.codes')} to {other}, "
                "but they share their planes: send both to one place"
            )


def _place(device_map: Mapping[str, Any], name: str) -> Any:
    """Where the longest key that ``name`` lies under sends it."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return device_map[name]


def check_device(device: Any, where: str, examples: str = "'cuda:0' or 'cpu'") -> None:
    """Raises ConfigError, with ``where`` before the device, unless this machine has it."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"{where} {device!r}: devices are called like 0, {examples}") from None
    backend = getattr(torch, place.type, None)
    count = backend.device_count() if backend is not None and hasattr(backend, "device_count") else 1
    if (place.index or 0) >= count:
        raise ConfigError(f"{where} {place}: PyTorch finds {count} {place.type} devices here")
