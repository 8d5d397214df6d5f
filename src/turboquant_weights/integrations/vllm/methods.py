"""vLLM's side of a quantized layer: where its tensors are declared, how they are loaded, and the call into ``shards.py``.

A layer gets a :class:`Shards` with the planes of this rank, and, until its weights are there, one empty parameter for every
tensor name that a checkpoint may hold: vLLM finds the names, and their loaders hand the tensors on. ``weight`` is among
them: a checkpoint's tripwire, a dense shard beside quantized ones, or what is quantized while it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ...config import Grades, TurboQuantConfig
from ...errors import ConfigError, FormatError
from ...planes import PLANES
from .shards import GradedShards, Shard, Shards

_QKV = {"q": 0, "k": 1, "v": 2}
_INTEGERS = {"codes": torch.uint8, "residual": torch.uint8, "scales": torch.uint8, "exponents": torch.int8}


class _Loading:
    """Hands tensors of the checkpoint to the shards of a layer."""

    def __init__(self, prefix: str, shards: Shards, full_rows: Sequence[int], rank: int, ranks: int, online: bool) -> None:
        self.prefix = prefix
        self.shards = shards
        self.full_rows = full_rows  # of each shard in the checkpoint
        self.rank, self.ranks = rank, ranks
        self.online = online

    def declare(self, layer: nn.Module, dtype: torch.dtype, shard_id: Any = None) -> None:
        """Registers the empty parameters. ``shard_id``: of the shards that they are for, where vLLM does not tell."""
        for name in ("weight", *PLANES):
            _declare(layer, name, _INTEGERS.get(name, dtype), self._loader(name, shard_id))

    def _loader(self, plane: str, shard_id: Any) -> Any:
        def load(param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = shard_id) -> None:
            indices = self._indices(loaded_shard_id)
            if plane == "weight" and loaded_weight.shape == (0,):
                return  # the tripwire
            sizes = [self.full_rows[index] for index in indices]
            if loaded_weight.shape[0] != sum(sizes):
                raise FormatError(
                    f"{self.shards.shards[indices[0]].name}.{plane} has {loaded_weight.shape[0]} rows: {self.prefix} needs "
                    f"{sum(sizes)}. The checkpoint belongs to another model; fetch it again"
                )
            for index, part in zip(indices, loaded_weight.split(sizes), strict=True):
                self._load(index, plane, part)

        return load

    def _indices(self, shard_id: Any) -> list[int]:
        """The shards that a tensor holds, by what vLLM calls them; several if the checkpoint has them in one layer."""
        count = len(self.full_rows)
        if shard_id is None:
            return list(range(count))
        ids = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        indices: list[Any] = [_QKV.get(one, one) for one in ids]
        if any(index not in range(count) for index in indices):
            raise ConfigError(f"{self.prefix}: vLLM loads its part {shard_id!r}, which this package does not know")
        return indices

    def _load(self, index: int, plane: str, stored: Tensor) -> None:
        shard = self.shards.shards[index]
        row, count = self.rows(index, stored)
        if plane != "weight" or shard.config is None:
            if plane == "residual" and shard.config is not None and not shard.config.residual_bits:
                return  # the base plane alone is wanted: a stored residual that config.json lacks was refused before
            self.shards.put(index, plane, stored, row, count)
        elif self.online:
            self.shards.quantize(index, stored, row, count)
        else:
            raise FormatError(
                f"{shard.name}.weight is a dense matrix, but {shard.name} has planes too: a layer has one or the other. "
                "The checkpoint is damaged; fetch it again"
            )

    def rows(self, index: int, stored: Tensor) -> tuple[int, int]:
        """First row and number of rows of this rank. Heads of keys and values that are fewer than the ranks are shared."""
        count = self.shards.shards[index].rows
        parts = stored.shape[0] // count
        return self.rank * parts // self.ranks * count, count


class _VocabLoading(_Loading):
    """Rows of a vocabulary, which is padded for all ranks together: the last one may get fewer rows than it has room for."""

    def __init__(self, layer: Any, shards: Shards, online: bool) -> None:
        super().__init__(layer.prefix, shards, [layer.org_vocab_size], layer.tp_rank, layer.tp_size, online)
        self.indices = layer.shard_indices

    def rows(self, index: int, stored: Tensor) -> tuple[int, int]:
        start, stop = self.indices.org_vocab_start_index, self.indices.org_vocab_end_index
        return start, stop - start


class _GradedLoading(_Loading):
    """All rows of a graded vocabulary; those of the rank are picked in the end. Grade ``i`` is the module ``<i>`` of the
    layer while it loads."""

    shards: GradedShards

    def __init__(self, layer: Any, shards: GradedShards) -> None:
        super().__init__(layer.prefix, shards, [shard.rows for shard in shards.shards], 0, 1, False)

    def declare(self, layer: nn.Module, dtype: torch.dtype, shard_id: Any = None) -> None:
        for index in range(len(self.shards.shards)):
            grade = nn.Module()
            layer.add_module(str(index), grade)
            super().declare(grade, dtype, index)
        _declare(layer, "weight", dtype, self._loader("weight", shard_id))
        _declare(layer, "order", torch.int32, lambda param, loaded_weight: self.shards.put_order(loaded_weight))


def _declare(module: nn.Module, name: str, dtype: torch.dtype, loader: Any) -> None:
    slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    module.register_parameter(name, slot)
    set_weight_attrs(slot, {"weight_loader": loader})


def _finish(layer: nn.Module) -> None:
    """Removes the empty parameters, and modules of them, once everything is there."""
    shards = layer.turboquant
    assert isinstance(shards, Shards)
    shards.check_complete()
    for name in ("weight", "order", *PLANES):
        layer._parameters.pop(name, None)
    for name in [name for name in layer._modules if name.isdecimal()]:
        del layer._modules[name]


class TurboQuantLinearMethod(LinearMethodBase):
    """Of one linear layer of vLLM.

    Args:
        names: Of the checkpoint's layers inside it; one for all parts if the checkpoint has them in one layer.
        configs: Their own settings; None: stays dense.
        whole: The settings that are common to all layers (rotation).
        online: The checkpoint is dense and quantized while it loads.
    """

    def __init__(
        self, names: Sequence[str], configs: Sequence[TurboQuantConfig | None], whole: TurboQuantConfig, online: bool
    ) -> None:
        self.names = list(names)
        self.configs = list(configs)
        self.whole = whole
        self.online = online

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        parts = len(output_partition_sizes)
        if len(self.names) not in (1, parts):
            raise ConfigError(
                f"{layer.prefix}: vLLM makes {parts} parts out of {len(self.names)} layers ({', '.join(self.names)}); one "
                "layer, or one for each part, is needed"
            )
        names = self.names * (parts if len(self.names) < parts else 1)
        configs = self.configs * (parts if len(self.configs) < parts else 1)
        shards = [Shard(*shard) for shard in zip(names, output_partition_sizes, configs, strict=True)]
        start, stop = 0, input_size
        if input_size_per_partition != input_size:  # row parallel
            start = layer.tp_rank * input_size_per_partition
            stop = start + input_size_per_partition
        layer.turboquant = Shards(
            shards, input_size, self.whole.group_size, self.whole.seed, params_dtype, start=start, stop=stop
        )
        full = _full_rows(layer, output_partition_sizes)
        _Loading(layer.prefix, layer.turboquant, full, layer.tp_rank, layer.tp_size, self.online).declare(
            layer, params_dtype
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        _finish(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.turboquant(x, bias)


def _full_rows(layer: Any, partition: list[int]) -> list[int]:
    """Rows of each part on all ranks together, as the checkpoint holds them."""
    if isinstance(layer, QKVParallelLinear):  # output_sizes counts shared heads of keys and values once per rank
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        sizes = (layer.head_size, layer.head_size, layer.v_head_size)
        return [count * size for count, size in zip(heads, sizes, strict=True)]
    return list(getattr(layer, "output_sizes", None) or [layer.output_size])


class TurboQuantVocabMethod(QuantizeMethodBase):
    """Of an embedding or an output head.

    Args:
        name: In the checkpoint. config: Its own settings. None, both: a head that runs on the planes of the embedding.
        grades: Of a graded embedding, whose bits they hold instead of ``config``.
    """

    def __init__(
        self, name: str | None, config: TurboQuantConfig | None, online: bool, grades: Grades | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.online = online
        self.grades = grades
        self.dtype = torch.get_default_dtype()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.dtype = params_dtype
        if self.name is None or self.config is None:
            layer.turboquant = None
            return
        if self.grades is not None:
            total = sum(grade[0] for grade in self.grades)
            if total != layer.org_vocab_size:
                raise FormatError(
                    f"{self.name} is stored with {total} rows: {layer.prefix or 'the embedding'} of this model has "
                    f"{layer.org_vocab_size}. The checkpoint belongs to another model; fetch it again"
                )
            layer.turboquant = GradedShards(self.name, self.grades, self.config, input_size, params_dtype)
            _GradedLoading(layer, layer.turboquant).declare(layer, params_dtype)
            return
        shard = Shard(self.name, sum(output_partition_sizes), self.config)
        layer.turboquant = Shards([shard], input_size, self.config.group_size, self.config.seed, params_dtype)
        _VocabLoading(layer, layer.turboquant, self.online).declare(layer, params_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Shares the planes of the embedding."""
        planes = getattr(embed_tokens, "turboquant", None)
        if self.name is not None or planes is None:
            raise ConfigError(
                f"{layer.prefix}: this model ties its output head to its embedding, but the checkpoint quantizes only one "
                "of them: set tie_word_embeddings to false in its config.json, or quantize the model again"
            )
        layer.turboquant = planes
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.turboquant is None:
            raise FormatError(
                f"{layer.prefix} has no planes, and this model does not tie it to its embedding: the checkpoint belongs to "
                "another model, or its config.json was changed"
            )
        _finish(layer)
        if self.grades is not None:
            indices = layer.shard_indices
            layer.turboquant.keep(
                indices.org_vocab_start_index, indices.org_vocab_end_index, layer.num_embeddings_per_partition
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.turboquant(x, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return layer.turboquant.lookup(input_, self.dtype)
