"""What the user calls MODEL: a hub id, a local folder, a GGUF file, or one of our checkpoints."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import check_is_folder_or_hub_id
from ..config import QUANT_METHOD
from ..errors import ConfigError, TurboQuantError


class Dtype(str, enum.Enum):
    """Values of ``--dtype``."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ConversionFormat(str, enum.Enum):
    """Values of ``--to``."""

    BF16 = "bf16"
    INT4 = "int4"


def is_checkpoint(model: str | os.PathLike[str]) -> bool:
    """Whether this is a local folder that this package wrote, damaged or not."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_model(model: str | os.PathLike[str], dtype: Dtype = Dtype.AUTO, device: str | None = None) -> tuple[Any, Any]:
    """The Transformers model on ``device`` (default: the CPU) and its tokenizer, which is None if there is none.

    Raises:
        TurboQuantError: it cannot be loaded; with Transformers' own reason.
    """
    import transformers

    from ..integrations.transformers import load_dense, load_quantized

    if Path(model).suffix != ".gguf":
        check_is_folder_or_hub_id(model)
    kwargs: dict[str, Any] = {"dtype": _torch_dtype(model, dtype), "device_map": device}
    try:
        if is_checkpoint(model):
            return load_quantized(model, **kwargs), transformers.AutoTokenizer.from_pretrained(model)
        if Path(model).suffix == ".gguf" and not Path(model).is_file():
            raise ConfigError("there is no such file")
        return load_dense(model, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise TurboQuantError(f"{model} cannot be loaded: {error}") from error


def open_unloaded(model: str, dtype: Dtype = Dtype.AUTO) -> tuple[Any, Any]:
    """The unquantized checkpoint, of which no weight is read yet, and its tokenizer, which is None if there is none.

    Raises:
        TurboQuantError: as :func:`open_model`.
    """
    from ..integrations.dense import DenseCheckpoint
    from ..integrations.transformers import load_tokenizer

    try:
        return DenseCheckpoint(model, _torch_dtype(model, dtype)), load_tokenizer(model)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, TurboQuantError):
            raise
        raise TurboQuantError(f"{model} cannot be loaded: {error}") from error


def need_tokenizer(tokenizer: Any, model: str) -> Any:
    """The tokenizer, or an error that says it is missing."""
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer: put the files of its tokenizer beside it")
    return tokenizer


def input_embedding(model: Any) -> str:
    """Name of the module that turns token ids into vectors."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def continue_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of ``prompt``, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise ConfigError("the prompt has no tokens: give at least one word")
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def _torch_dtype(model: str | os.PathLike[str], dtype: Dtype) -> torch.dtype | str:
    # A GGUF file stores blocks of integers, so "as stored" says nothing: take what checkpoints usually have.
    if dtype is Dtype.AUTO:
        return torch.bfloat16 if Path(model).suffix == ".gguf" else "auto"
    return getattr(torch, dtype.value)
