"""Tied weights in Transformers' terms. Its list says ``lm_head.weight`` is ``model.embed_tokens.weight``; once these are
planes, it must say the same of each plane, or saving would write them twice and loading would leave the head empty."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..planes import PLANES, PackedPlanes


def tie_planes(model: Any) -> None:
    """Replaces each entry of Transformers' lists of tied weights whose two modules hold the same planes by one per plane."""
    for owner in _owners(model).values():
        by_plane = _by_plane(owner, owner.all_tied_weights_keys)
        if by_plane != owner.all_tied_weights_keys:
            owner.all_tied_weights_keys = by_plane
            owner._tied_weights_keys = dict(by_plane)  # of this instance: what tie_weights() starts from


def untie_planes(model: Any, original: Any) -> None:
    """Puts the lists back as ``original``, a dense model of the same class, has them, and shares the weights again."""
    names = _owners(original)
    for name, owner in _owners(model).items():
        vars(owner).pop("_tied_weights_keys", None)
        owner.all_tied_weights_keys = dict(names[name].all_tied_weights_keys)
    model.tie_weights(recompute_mapping=False)


def stored_modules(model: Any) -> dict[str, PackedPlanes]:
    """Name -> module, of the modules whose planes are stored under that name: all but those tied to another one."""
    tied = model.all_tied_weights_keys
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedPlanes)}
    return {name: module for name, module in modules.items() if f"{name}.codes" not in tied}


def _owners(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_expanded_tied_weights_keys")}


def _by_plane(model: nn.Module, tied: dict[str, str]) -> dict[str, str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    out = {}
    for target, source in tied.items():
        (layer, _, part), (other, _, _) = target.rpartition("."), source.rpartition(".")
        planes, same = modules.get(layer), modules.get(other)
        if part == "weight" and isinstance(planes, PackedPlanes) and isinstance(same, PackedPlanes) and _equal(planes, same):
            out.update({f"{layer}.{p}": f"{other}.{p}" for p in PLANES if getattr(planes, p) is not None})
        else:
            out[target] = source
    return out


def _equal(a: PackedPlanes, b: PackedPlanes) -> bool:
    return a.codes is b.codes and a.settings == b.settings
