"""Doors to other libraries. Nothing here imports them before the user does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

import wrapt
from torch import nn

from ..config import TurboQuantConfig, with_skip
from ..errors import ConfigError
from ..model import QuantizationReport
from ..modules import load_module, save_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .conversion import ConversionReport

_REGISTRY = "transformers.quantizers.auto"
_MAX_SHARD_SIZE = "50GB"
_LORA = "peft.tuners.lora"


def register_lazily() -> None:
    """Registers the quantizer as soon as Transformers' registry is imported, and the adapters' layers as soon as PEFT's LoRA
    is: at once if they are already.

    So ``import turboquant_weights`` works before and after ``import transformers``, and imports it in neither case.
    """
    wrapt.register_post_import_hook(_register, _REGISTRY)
    wrapt.register_post_import_hook(_register_adapters, _LORA)


def _register(module: ModuleType) -> None:
    from . import transformers

    # Whoever imports that module first triggers this hook in the middle of it; it then registers at its own end.
    if hasattr(transformers, "register"):
        transformers.register()


def _register_adapters(module: ModuleType) -> None:
    from . import peft

    peft.register()


@overload
def load(
    folder: str | os.PathLike[str],
    *,
    base_only: bool = ...,
    device_map: Any = ...,
    dtype: Any = ...,
    model: None = ...,
    **kwargs: Any,
) -> PreTrainedModel: ...


@overload
def load(folder: str | os.PathLike[str], *, base_only: bool = ..., device_map: Any = ..., model: nn.Module) -> nn.Module: ...


def load(
    folder: str | os.PathLike[str],
    *,
    base_only: bool = False,
    device_map: Any = None,
    dtype: Any = None,
    model: nn.Module | None = None,
    **kwargs: Any,
) -> PreTrainedModel | nn.Module:
    """Loads a quantized checkpoint: as a ready Transformers model in evaluation mode, or with the architecture of ``model``.

    Args:
        folder: A folder written by :func:`save` or ``save_pretrained``, or a hub id. A folder is checked completely
            before anything is allocated.
        base_only: Leave the residual planes on disk and run the base planes alone, e.g. 4+4 as 4 bits.
        device_map, dtype: As in ``from_pretrained``; ``dtype`` is that of the parts that are not quantized and of the
            computation (default: the checkpoint's).
        model: For a checkpoint of a model that is none of Transformers': a dense module of the same architecture, of any
            weights, also on the meta device. It is not changed; the result has its dtype. ``device_map`` may name a device.
        kwargs: Passed on to ``from_pretrained``.

    Raises:
        FormatError: the checkpoint breaks a rule of FORMAT.md, or a tensor is missing.
        ConfigError: the model is not quantized by this package, or ``folder`` is a file or a path that leads nowhere.
        ImportError: Transformers is not installed.
    """
    if model is not None:
        if dtype is not None or kwargs or isinstance(device_map, (dict, list)) or device_map == "auto":
            given = ["dtype"] * (dtype is not None) + list(kwargs) or ["device_map"]
            raise ConfigError(f"load(model=...) takes a device as device_map and no {given[0]}: call .to() on the result")
        return load_module(folder, model, base_only=base_only, device=device_map)
    from .transformers import load_quantized

    return load_quantized(folder, base_only=base_only, device_map=device_map, dtype=dtype, **kwargs)


def save(
    model: PreTrainedModel | nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = _MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Writes a quantized model with checksums, and a Transformers model with a model card: completely, or not at all.

    Args:
        model: A model from ``quantize_model``, :func:`load` or ``from_pretrained(quantization_config=...)``; also a module
            that is no Transformers model (see ``model`` of :func:`load`).
        folder: The folder to create. An existing one that is not empty is an error unless ``overwrite`` is true and it
            is a model folder; then it is replaced as a whole once the new one is complete.
        tokenizer: Saved beside the model if given.
        max_shard_size: Of one file, as in ``save_pretrained``.

    Raises:
        ConfigError: the model is not quantized by this package, or an argument is for Transformers models only.
        FileExistsError: ``folder`` exists and must not be replaced.
    """
    if not hasattr(model, "save_pretrained"):
        if tokenizer is not None or max_shard_size != _MAX_SHARD_SIZE:
            raise ConfigError(
                f"{type(model).__name__} is no Transformers model: it is saved in one file, without a tokenizer"
            )
        return save_module(model, folder, overwrite)
    from .transformers import save_quantized

    save_quantized(model, folder, tokenizer=tokenizer, max_shard_size=max_shard_size, overwrite=overwrite)


def quantize_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: TurboQuantConfig | None = None,
    skip: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    dtype: Any = "auto",
    device: str | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """Quantizes a model that need not fit into memory, without data: reads, quantizes and writes one weight at a time.

    The result is that of :func:`quantize_model` and :func:`save`, bit for bit. A run that was interrupted, killed too, goes
    on where it was when the same call is repeated: finished parts are kept in ``.OUT.quantizing`` beside ``out``, with
    checksums that are compared first.

    Args:
        model: A hub id, or a folder with safetensors files of an architecture that Transformers knows.
        out: The folder to create; it appears only when complete. ``overwrite``: as in :func:`save`.
        config, skip: As in :func:`quantize_model`.
        tokenizer: Saved beside the model if given.
        dtype: Of what is not quantized, as in ``from_pretrained``.
        device: Where weights are quantized; default: the CPU.
        max_shard_size: Bytes of one file; a layer is never divided.
        progress: Show a progress bar on stderr.

    Raises:
        FormatError: a file is missing, truncated, or contradicts the index; a weight of the model is in no file.
        ConfigError: as in :func:`quantize_model`; the model is quantized; another process is writing ``out``.
        QuantizationError: as in :func:`quantize_model`. FileExistsError: ``out`` exists and must not be replaced.
        OSError: the disk is too small, which is checked first.
    """
    from .dense import DenseCheckpoint
    from .streaming import quantize_dense

    settings = with_skip(config or TurboQuantConfig(), skip)
    options = dict(tokenizer=tokenizer, device=device, max_shard_size=max_shard_size, overwrite=overwrite)
    return quantize_dense(DenseCheckpoint(model, dtype), out, settings, progress=progress, **options)


def convert_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "bf16",
    *,
    tokenizer: Any = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """Writes a quantized checkpoint in a format that other software reads, one weight at a time.

    Args:
        folder: A checkpoint of this package, folder or hub id.
        out: The folder to create; it appears only when complete. ``overwrite``: as in :func:`save`.
        format: ``"bf16"``: a plain Transformers folder. ``"int4"``: compressed-tensors, pack-quantized, which vLLM and
            Transformers load, in groups of 128 columns, or of 64 or 32 where 128 does not divide them all.
        tokenizer: Saved beside the model if given.
        max_shard_size: Bytes of one file.
        progress: Show a progress bar on stderr.

    Returns:
        The error of the conversion per matrix and in all, against what the planes mean; and what stayed bfloat16.

    Raises:
        ConfigError: the model is not quantized by this package, or has nothing that could be int4.
        FormatError: the checkpoint breaks a rule of FORMAT.md. FileExistsError: ``out`` exists and must not be replaced.
        OSError: the disk is too small, which is checked first.
    """
    from .conversion import convert_quantized

    options = dict(tokenizer=tokenizer, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress)
    return convert_quantized(folder, out, format, **options)
