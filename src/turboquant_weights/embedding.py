"""``TurboQuantEmbedding``: a drop-in for ``torch.nn.Embedding`` that decodes the rows it is asked for.

A lookup gathers the planes of its rows, decodes them and rotates them back: the work grows with the tokens, not with the
vocabulary. The planes are those of a linear layer with the same weight, so an output head tied to the embedding runs on
the very same parameters.

Models have embeddings of their own that scale or shift what ``nn.Embedding`` returns. Their quantized form keeps their
class: ``quantized_class`` puts :class:`TurboQuantEmbedding` behind it in the method resolution order, where their
``super().forward(ids)`` finds the quantized lookup.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .config import TurboQuantConfig
from .errors import QuantizationError
from .planes import PLANES, PackedPlanes
from .reference import PackedWeight


class TurboQuantEmbedding(PackedPlanes, nn.Embedding):  # type: ignore[override]  # the weight is computed
    """``weight[ids]`` with ``weight`` [num_embeddings, embedding_dim] in ``config.bits + config.residual_bits`` bits.

    Parameters as in :class:`TurboQuantLinear`; there is no bias. The result has the dtype of the dense weight that this
    module stands for (``dense_dtype``, which follows ``.to(dtype)``). ``weight`` decodes everything when it is first used.

    Args:
        num_embeddings: n. embedding_dim: k. padding_idx: kept as an attribute; its row is stored like the others.
        config: bits, residual bits, group size and seed.
        device, dtype: of the new planes (zeros), and of the result.
    """

    # The class that a dense embedding of this kind has.
    dense_class: type[nn.Embedding] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        config: TurboQuantConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would allocate the dense weight
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm: float | None = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._init_planes(config or TurboQuantConfig(), device, dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        config: TurboQuantConfig | None = None,
        *,
        weight: Tensor | None = None,
        name: str = "embedding",
    ) -> TurboQuantEmbedding:
        """Quantizes an ``nn.Embedding`` or a subclass of it, whose class and attributes the result keeps.

        ``weight`` is given if that of ``embedding`` is a placeholder on the meta device. ``name`` is used in errors; the
        relative squared error of the weight is left in ``quantization_error``.

        Raises:
            QuantizationError: the module has ``max_norm`` or replaces what ``nn.Embedding`` computes in a way that the
                quantized one does not follow, or its weight has NaN or Inf (with the position).
        """
        config = config or TurboQuantConfig()
        check_embedding(embedding, name)
        weight = embedding.weight if weight is None else weight
        if weight.is_meta:
            raise QuantizationError(f"{name}: the weight is on the meta device: load the model before quantizing it")
        quantized = reference.quantize_weight(
            weight,
            bits=config.bits,
            residual_bits=config.residual_bits,
            group_size=config.group_size,
            seed=config.seed,
            name=name,
        )
        out = cls.from_packed(quantized.weight, embedding, config)
        out.quantization_error = quantized.error
        check_forward(out, name)
        return out

    @classmethod
    def from_packed(cls, packed: PackedWeight, like: nn.Embedding, config: TurboQuantConfig) -> TurboQuantEmbedding:
        """Wraps existing planes without copying them, in a module with the class and the attributes of ``like``."""
        out = cls.like(like, config)
        out._set_planes(packed)
        return out

    @classmethod
    def like(cls, embedding: nn.Embedding, config: TurboQuantConfig) -> TurboQuantEmbedding:
        """A module with the class and the attributes of ``embedding``, and planes on the meta device."""
        out: TurboQuantEmbedding = without_weight(cls, embedding)
        out._init_planes(config, "meta", embedding.weight.dtype)
        return out

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense module that this one stands for, of the class it was made from."""
        out = as_dense_class(self, *_OWN)
        for plane in PLANES:
            del out._parameters[plane]
        out.weight = nn.Parameter(self.dequantize(dtype))
        return out

    def twin(self, like: nn.Embedding, name: str) -> TurboQuantEmbedding:
        """A module on the same planes with the class and the attributes of ``like``, which is called ``name`` and tied to
        this one."""
        out = self.from_packed(self.packed, like, TurboQuantConfig(**self.settings))
        check_forward(out, name)
        return out

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """``input``: int32 or int64 ids of any shape; returns [*input.shape, embedding_dim] of ``dense_dtype``.

        An id below 0 or above ``num_embeddings - 1`` is an IndexError on the CPU and a device assertion on a GPU, as in
        ``nn.Embedding``.
        """
        check_ids(input)
        return self._lookup(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made by quantized_class have no name that pickle could import.
        return instance_of, (self.dense_class, TurboQuantEmbedding), vars(self)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, bits={self.label}, "
            f"bits_per_weight={self.bits_per_weight:.3f}, seed={self.seed}"
        )


_OWN = ("bits", "residual_bits", "group_size", "seed", "quantization_error", "merge_error", "dense_dtype")


def check_ids(ids: Tensor) -> None:
    """Raises a QuantizationError for ids that are no integers."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise QuantizationError(f"TurboQuantEmbedding got ids of {ids.dtype}: int32 or int64 is needed")


@functools.cache
def quantized_class(dense_class: type[nn.Embedding], base: type[nn.Embedding]) -> type[Any]:
    """The class of the quantized form of ``dense_class``: a subclass of it and of ``base``, one of this package's."""
    if dense_class is nn.Embedding:
        return base
    content = {"dense_class": dense_class, "__module__": __name__, "__doc__": f"``{dense_class.__name__}``, quantized."}
    return type(f"TurboQuant{dense_class.__name__}", (dense_class, base), content)


def without_weight(base: type[nn.Embedding], embedding: nn.Embedding) -> Any:
    """A module of the quantized class of ``embedding``, with its attributes but no weight in any form yet."""
    out = instance_of(type(embedding), base)
    vars(out).update(_state(embedding))
    del out._parameters["weight"]
    return out


def as_dense_class(module: Any, *own: str) -> nn.Embedding:
    """The way back: a module of the dense class with all attributes but the ``own`` ones of the quantized class."""
    out: nn.Embedding = module.dense_class.__new__(module.dense_class)
    vars(out).update({key: value for key, value in _state(module).items() if key not in own})
    return out


def check_embedding(module: nn.Module, name: str) -> None:
    """Raises a QuantizationError if ``module`` is no embedding that can be quantized; its weight is not looked at."""
    if not isinstance(module, nn.Embedding) or isinstance(module, PackedPlanes):
        raise QuantizationError(f"{name} is a {type(module).__name__}: only a dense nn.Embedding can be quantized as one")
    if module.max_norm is not None:
        raise QuantizationError(
            f"{name} has max_norm {module.max_norm}: it changes its weight at every lookup, which packed planes cannot. "
            "Leave it out of embeddings"
        )
    if "forward" in vars(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise QuantizationError(
            f"{name} has a forward or a weight of its own making (hooks that move weights, a parametrization): quantize "
            "before adding these, or leave it out of embeddings"
        )


def instance_of(dense_class: type[nn.Embedding], base: type[nn.Embedding]) -> Any:
    """An object of :func:`quantized_class` without any attribute: what pickle calls."""
    cls: Any = quantized_class(dense_class, base)  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


def _state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module; its registries of parameters, buffers and hooks are copies."""
    return {key: copy.copy(value) if isinstance(value, (dict, set)) else value for key, value in vars(module).items()}


@torch.no_grad()
def check_forward(quantized: Any, name: str) -> None:
    """Compares a few lookups with those of the original class on the decoded weight: it may not call ``super().forward``.

    Raises:
        QuantizationError: they differ, or cannot be computed.
    """
    device = next(quantized.parameters()).device
    if quantized.dense_class is nn.Embedding or device.type == "meta":
        return
    n = quantized.num_embeddings
    rows = {0, n // 2, n - 1, *([] if quantized.padding_idx is None else [quantized.padding_idx])}
    ids = torch.tensor([sorted(rows)], device=device)
    results = []
    try:
        for module in (quantized.to_embedding(), quantized):
            probe = copy.copy(module)
            # While a model loads, buffers (a scale) may not be there yet; what they hold does not matter here.
            probe._buffers = {key: _ones_for_meta(buffer, ids.device) for key, buffer in module._buffers.items()}
            results.append(probe(ids))
        expected, got = results
        # Equal up to the rounding of sums of another order; a factor that one of them lacks is far outside.
        error, norm = (got.float() - expected.float()).norm(), expected.float().norm()
        agrees = got.shape == expected.shape and got.dtype == expected.dtype and bool(error <= 0.02 * norm)
    except Exception as error:
        raise QuantizationError(f"{name}, {_WHICH.format(quantized.dense_class.__name__)} raised {error!r}") from error
    if not agrees:
        raise QuantizationError(f"{name}, {_WHICH.format(quantized.dense_class.__name__)} computes something else")


_WHICH = (
    "a {}, cannot be quantized: only embeddings whose forward takes ids and builds on nn.Embedding's can. Leave it out of "
    "embeddings. With packed planes, it"
)


def _ones_for_meta(buffer: Tensor | None, device: torch.device) -> Tensor | None:
    return torch.ones_like(buffer, device=device) if buffer is not None and buffer.is_meta else buffer
