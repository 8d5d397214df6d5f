"""Embeddings and what is tied to them: one weight under several names becomes one set of planes under the same names.

A tied output head runs on the parameters of the quantized embedding, as a :class:`TurboQuantLinear`. Which modules share a
weight is seen by identity. On the meta device nothing is shared yet: there Transformers' own list, ``all_tied_weights_keys``
(target name -> source name), says what will be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn

from .config import EmbeddingBits, EmbeddingsByName, TurboQuantConfig, is_graded
from .embedding import TurboQuantEmbedding, check_embedding
from .errors import ConfigError
from .graded import GradedEmbedding, GradedHead, check_rows
from .linear import TurboQuantLinear


def plan_embeddings(model: nn.Module, config: TurboQuantConfig) -> dict[str, EmbeddingBits]:
    """Name -> ``(bits, residual_bits)``, or the grades, of each embedding that ``config.embeddings`` asks for. Works on the
    meta device.

    Of embeddings tied to each other one is named: the one whose weight the model's files hold.

    Raises:
        ConfigError: a pattern matches no embedding, tied embeddings get different bits, grades have another number of rows,
            or a weight is also used by a module that cannot read planes.
        QuantizationError: an embedding cannot be quantized.
    """
    if config.embeddings is None:
        return {}
    assert isinstance(config.embeddings, EmbeddingsByName)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for pattern in config.embeddings:
        if pattern not in modules and not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(
                f"embeddings pattern {pattern!r} matches no embedding of {type(model).__name__}: "
                f"it has {', '.join(list(modules)[:5]) or 'none at all'}"
            )
    plan: dict[str, EmbeddingBits] = {}
    for name, embedding in modules.items():
        decisive = config.embeddings.pattern_for(name)
        if decisive is None:
            continue
        sharing = _sharing(model, name)
        for other, module in sharing.items():
            if isinstance(module, nn.Embedding):
                check_embedding(module, other)
            elif type(module) is not nn.Linear:
                raise ConfigError(
                    f"{name} shares its weight with {other}, a {type(module).__name__}, which cannot read packed planes: "
                    "leave it out of embeddings"
                )
        stored = _stored_name(model, [other for other, module in sharing.items() if isinstance(module, nn.Embedding)])
        bits = config.embeddings[decisive]
        if is_graded(bits):
            check_rows(bits, embedding.num_embeddings, name)  # type: ignore[arg-type]
        if plan.setdefault(stored, bits) != bits:
            raise ConfigError(f"{name} and {stored} share one weight, but embeddings gives them {bits} and {plan[stored]}")
    return plan


def tied_heads(model: nn.Module, embeddings: Iterable[str]) -> dict[str, str]:
    """Name of each linear layer that shares its weight with one of these embeddings -> name of that embedding."""
    return {
        name: embedding
        for embedding in embeddings
        for name, module in _sharing(model, embedding).items()
        if isinstance(module, nn.Linear)
    }


def tied_modules(model: nn.Module, embeddings: Iterable[str]) -> dict[str, str]:
    """Name of each module that holds the weight of one of these embeddings, itself included -> name of that embedding."""
    return {name: embedding for embedding in embeddings for name in _sharing(model, embedding)}


def replace_embedding(model: nn.Module, name: str, new: TurboQuantEmbedding | GradedEmbedding) -> list[str]:
    """Puts ``new`` in the place of the embedding ``name``, and modules on the same planes in that of whatever is tied to it.

    Returns:
        The names of the linear layers (output heads) that became a :class:`TurboQuantLinear` or a :class:`GradedHead`.
    """
    heads = []
    for other, module in _sharing(model, name).items():
        replacement: nn.Module
        if other == name:
            replacement = new
        elif isinstance(module, nn.Embedding):
            replacement = new.twin(module, other)
        else:
            assert isinstance(module, nn.Linear)
            replacement = _head(new, module.bias)
            heads.append(other)
        replacement.quantization_error = new.quantization_error  # type: ignore[assignment]
        replacement.dense_dtype = new.dense_dtype  # type: ignore[assignment]
        replace_module(model, other, replacement.train(module.training))
    return heads


def _head(embedding: TurboQuantEmbedding | GradedEmbedding, bias: nn.Parameter | None) -> nn.Module:
    if isinstance(embedding, GradedEmbedding):
        return GradedHead(embedding, bias)
    config = TurboQuantConfig(**embedding.settings)
    return TurboQuantLinear.from_packed(embedding.packed, embedding.embedding_dim, bias, config)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` wherever the module called ``name`` occurs in ``model``, under all of its names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[child_name] = new


def _sharing(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that hold the weight of the embedding ``name``, itself included, by their first names."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    declared: dict[str, str] = (getattr(model, "all_tied_weights_keys", None) or {}) if weight.is_meta else {}
    source = declared.get(f"{name}.weight", f"{name}.weight")
    tied = {source, *(target for target, other in declared.items() if other == source)}
    return {
        other: module
        for other, module in model.named_modules()
        if f"{other}.weight" in tied or any(parameter is weight for parameter in module._parameters.values())
    }


def _stored_name(model: nn.Module, names: list[str]) -> str:
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    return next((name for name in names if f"{name}.weight" not in targets), names[0])
