"""Tied weights in Transformers' terms. Its list says ``lm_head.weight`` is ``model.embed_tokens.weight``; once these are
planes, it must say the same of each plane, or saving would write them twice and loading would leave the head empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..graded import GRADED
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


def settle_ties(model: Any) -> list[str]:
    """Makes the config say what is true. Modules whose planes are no longer those that they were tied to, because an adapter
    was merged into one of the two, are independent: both are stored from now on. Returns their names.

    Where all are still tied, the config says so again: PEFT compares addresses of weights when it unloads adapters, and
    those of weights that are decoded differ.

    Raises:
        ConfigError: other planes are still tied, and a Transformers config ties all of them or none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = {
        target.removesuffix(".codes"): source.removesuffix(".codes")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".codes")
    }
    released = [name for name, source in tied.items() if _differ(modules[name], modules[source])]
    if not released:
        if tied:
            _set_tied(model, True)
        return []
    if len(released) < len(tied):
        raise ConfigError(
            f"{released[0]} no longer shares the planes of {tied[released[0]]} (an adapter was merged into one of them), "
            f"but {min(tied.keys() - set(released))} shares others: a config ties all of them or none. Unmerge, and keep "
            "the adapter apart"
        )
    names = tuple(f"{name}." for name in released)
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if not k.startswith(names)}
    _set_tied(model, False)
    return released


def _set_tied(model: Any, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


def _differ(a: nn.Module, b: nn.Module) -> bool:
    if not isinstance(a, PackedPlanes) or not isinstance(b, PackedPlanes):
        return False  # inside an adapter: then only that is saved
    if a.settings != b.settings or a.codes is b.codes or a.codes.is_meta or b.codes.is_meta:
        return False  # other settings are an error of their own; what is offloaded cannot have changed
    pairs = zip(a.packed, b.packed, strict=True)
    return any(p is not None and q is not None and not torch.equal(p, q.to(p.device)) for p, q in pairs)


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
        elif part == "weight" and isinstance(planes, GRADED) and isinstance(same, GRADED) and planes.order is same.order:
            out[f"{layer}.order"] = f"{other}.order"
            for i, grade in enumerate(planes.parts):
                out.update({f"{layer}.{i}.{p}": f"{other}.{i}.{p}" for p in PLANES if getattr(grade, p) is not None})
        else:
            out[target] = source
    return out


def _equal(a: PackedPlanes, b: PackedPlanes) -> bool:
    return a.codes is b.codes and a.settings == b.settings
