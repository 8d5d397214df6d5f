"""Embeddings whose rows have bits of their own: few tokens carry most of what an output head and its embedding do.

Token frequencies fall off like a power law, and so does what rounding a row costs: in SmolLM2 a tenth of the rows carries
85 % of it. A graded embedding is several quantized embeddings, its *grades*, behind one another: the rows that matter most
come first and get the most bits. ``order`` says where the row of each token is stored. An output head tied to it runs on
the same grades, one product each, and puts the outputs into the order of the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import Grades, TurboQuantConfig
from .embedding import TurboQuantEmbedding, as_dense_class, check_forward, check_ids, instance_of, without_weight
from .errors import ConfigError
from .linear import TurboQuantLinear
from .planes import LazyWeight
from .reference import PackedWeight


class _Graded(nn.Module):
    """What the embedding and the head have in common: ``order``, int32 [n], and the grades, submodules "0", "1", ..."""

    order: nn.Parameter
    # ||W - W'||^2 / ||W||^2 of all grades together, known where the weight was quantized.
    quantization_error: float | None

    @property
    def parts(self) -> list[Any]:
        """The grades, the one with the rows that matter most first."""
        return [module for name, module in self._modules.items() if name.isdecimal()]

    @property
    def grades(self) -> Grades:
        return tuple((part.shape[0], part.bits, part.residual_bits) for part in self.parts)

    @property
    def dense_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.parts[0].dense_dtype
        return dtype

    @dense_dtype.setter
    def dense_dtype(self, dtype: torch.dtype) -> None:
        for part in self.parts:
            part.dense_dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.order.shape[0], self.parts[0].shape[1]

    @property
    def label(self) -> str:
        return "/".join(dict.fromkeys(part.label for part in self.parts))

    @property
    def nbytes(self) -> int:
        """Stored bytes of all grades and of ``order``."""
        return sum(part.nbytes for part in self.parts) + self.order.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, everything counted."""
        rows, columns = self.shape
        return 8 * self.nbytes / (rows * columns)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [n, k], a row per token."""
        return torch.cat([part.dequantize(dtype) for part in self.parts]).index_select(0, self.order)

    @property
    def weight(self) -> Tensor:
        """As that of other quantized modules: decoded when its values are used."""
        if torch.compiler.is_compiling():
            return self._lookup(torch.arange(self.shape[0], device=self.order.device))
        return LazyWeight(self.dequantize, torch.Size(self.shape), self.dense_dtype, self.order.device)

    def _lookup(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.order, [(part.shape[0], part._lookup) for part in self.parts])

    def base_only_(self) -> Any:
        """Drops the residual planes in place."""
        for part in self.parts:
            part.base_only_()
        return self

    def reset_parameters(self) -> None:
        """Does nothing: the weights are data."""

    def _extra(self) -> str:
        grades = ", ".join(f"{part.shape[0]} rows {part.label}" for part in self.parts)
        return f"bits_per_weight={self.bits_per_weight:.3f}, grades: {grades}"


class GradedEmbedding(_Graded, nn.Embedding):  # type: ignore[override]  # the weight is computed
    """``weight[ids]`` with ``weight`` [num_embeddings, embedding_dim] in grades. Made by a budget; see the module."""

    # The class that a dense embedding of this kind has.
    dense_class: type[nn.Embedding] = nn.Embedding

    @classmethod
    def like(cls, embedding: nn.Embedding, config: TurboQuantConfig, grades: Grades) -> GradedEmbedding:
        """A module with the class and the attributes of ``embedding``, and planes on the meta device.

        Args:
            config: Its ``group_size`` and ``seed`` are used.

        Raises:
            ConfigError: the grades have more or fewer rows than the embedding.
        """
        check_rows(grades, embedding.num_embeddings, "the embedding")
        out: GradedEmbedding = without_weight(cls, embedding)
        out.quantization_error = None
        for i, grade in enumerate(grades):
            own = config.with_bits(*grade[1:])
            out.add_module(
                str(i), TurboQuantEmbedding(grade[0], out.embedding_dim, None, own, "meta", embedding.weight.dtype)
            )
        out.order = nn.Parameter(torch.empty(out.num_embeddings, dtype=torch.int32, device="meta"), requires_grad=False)
        return out

    @classmethod
    def from_packed(
        cls, packed: Sequence[PackedWeight], order: Tensor, like: nn.Embedding, config: TurboQuantConfig, grades: Grades
    ) -> GradedEmbedding:
        """Wraps existing planes, one set per grade, without copying them; ``order`` int32 [n]: stored row of each token."""
        out = cls.like(like, config, grades)
        for part, planes in zip(out.parts, packed, strict=True):
            part._set_planes(planes)
        out.order = order if isinstance(order, nn.Parameter) else nn.Parameter(order, requires_grad=False)
        return out

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense module that this one stands for, of the class it was made from."""
        out = as_dense_class(self, "quantization_error")
        del out._parameters["order"]
        for name in [name for name in out._modules if name.isdecimal()]:
            del out._modules[name]
        out.weight = nn.Parameter(self.dequantize(dtype))
        return out

    def twin(self, like: nn.Embedding, name: str) -> GradedEmbedding:
        """A module on the same planes with the class and the attributes of ``like``, which is called ``name`` and tied to
        this one."""
        out = self.from_packed([part.packed for part in self.parts], self.order, like, _config(self), self.grades)
        check_forward(out, name)
        return out

    def forward(self, input: Tensor) -> Tensor:
        """As ``TurboQuantEmbedding``."""
        check_ids(input)
        return self._lookup(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return instance_of, (self.dense_class, GradedEmbedding), vars(self)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._extra()}"


class GradedHead(_Graded, nn.Linear):  # type: ignore[override]  # the weight is computed
    """``y = x W^T + b`` on the grades of an embedding that the head is tied to."""

    def __init__(self, embedding: GradedEmbedding, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.quantization_error = embedding.quantization_error
        for i, part in enumerate(embedding.parts):
            own = _config(embedding).with_bits(part.bits, part.residual_bits)
            twin = TurboQuantLinear.from_packed(part.packed, self.in_features, None, own)
            twin.dense_dtype = part.dense_dtype
            self.add_module(str(i), twin)
        self.order = embedding.order
        self.bias = bias  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """As ``TurboQuantLinear``."""
        out = torch.cat([part(input) for part in self.parts], -1).index_select(-1, self.order)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._extra()}"


GRADED = (GradedEmbedding, GradedHead)


def lookup(ids: Tensor, order: Tensor, grades: Sequence[tuple[int, Callable[[Tensor], Tensor]]]) -> Tensor:
    """Rows of tokens: ``grades`` are the number of rows of each grade and what looks them up, the first one's first."""
    # As an embedding of its own, so that an id out of range is the error that it is everywhere.
    stored = nn.functional.embedding(ids, order[:, None])[..., 0]
    out: Tensor | None = None
    start = 0
    # Every grade decodes every id, clamped into its rows: a shape that depended on the ids would make a GPU wait.
    for rows, decode in grades:
        found = decode((stored - start).clamp(0, rows - 1))
        out = found if out is None else torch.where((stored >= start)[..., None], found, out)
        start += rows
    assert out is not None
    return out


def grade_names(model: nn.Module) -> dict[str, str]:
    """Name of every grade in ``model`` -> name of the embedding or head that it belongs to."""
    return {
        f"{name}.{i}": name
        for name, module in model.named_modules()
        if isinstance(module, GRADED)
        for i in range(len(module.parts))
    }


def is_order(order: Tensor) -> bool:
    """Whether ``order`` [n] names every row once."""
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))


def _config(module: _Graded) -> TurboQuantConfig:
    return TurboQuantConfig(group_size=module.parts[0].group_size, seed=module.parts[0].seed)


def check_rows(grades: Grades, rows: int, name: str) -> None:
    """Raises a ConfigError unless the grades are those of so many rows."""
    total = sum(grade[0] for grade in grades)
    if total != rows:
        raise ConfigError(f"the grades of {name} have {total} rows: it has {rows}")


def split_rows(importance: Tensor, grades: Grades) -> tuple[Tensor, list[Tensor]]:
    """``order`` int32 [n] and the rows [n_i] int64 of each grade, for the ``importance`` [n] of the rows.

    Rows of a grade keep their own order, so equal importance gives equal bytes.
    """
    ranked = importance.argsort(descending=True, stable=True)
    ends = list(itertools.accumulate(grade[0] for grade in grades))
    rows = [ranked[end - grade[0] : end].sort().values for end, grade in zip(ends, grades, strict=True)]
    order = torch.empty(len(importance), dtype=torch.int32, device=importance.device)
    order[torch.cat(rows)] = torch.arange(len(importance), dtype=torch.int32, device=importance.device)
    return order, rows
