"""What a module that stores its weight as packed planes has in common: parameters, decoding, conversion, state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import ops, reference
from .config import TurboQuantConfig
from .errors import QuantizationError
from .reference import PackedWeight, packed_shapes

PLANES = ("codes", "residual", "scales", "exponents")
_SETTINGS = ("bits", "residual_bits", "group_size", "seed")

Self = TypeVar("Self", bound="PackedPlanes")


class PackedPlanes(nn.Module):
    """A module whose weight ``[rows, columns]`` is planes instead of a parameter. See ``reference.py`` for their shapes.

    A subclass says through ``shape`` how its own attributes call rows and columns. The planes are integer parameters that
    need no gradient, so ``.half()`` and ``.bfloat16()`` leave them alone. Two modules may hold the same parameters (a tied
    embedding and output head).
    """

    codes: nn.Parameter
    residual: nn.Parameter | None
    scales: nn.Parameter
    exponents: nn.Parameter
    # What ``weight`` answers in; follows .to(dtype), .half(), ... as a dense weight would.
    dense_dtype: torch.dtype
    # ||W - W'||^2 / ||W||^2, known where the weight was quantized.
    quantization_error: float | None
    # What rounding cost when an adapter was merged in; see ``integrations/merging.py``.
    merge_error: Any = None

    @property
    def shape(self) -> Any:
        """Rows and columns of the weight."""
        raise NotImplementedError

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns that the planes hold: ``shape``, unless the weight is a stack of matrices."""
        return self.shape

    def _stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a plane that has this one for a single matrix."""
        return shape

    def _init_planes(
        self, config: TurboQuantConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Registers zeroed planes (they decode to zeros) for ``shape``."""
        self.bits = config.bits
        self.residual_bits = config.residual_bits
        self.group_size = config.group_size
        self.seed = config.seed
        self.quantization_error = None
        self.dense_dtype = dtype or torch.get_default_dtype()
        shapes = packed_shapes(*self.matrix, config.bits, config.residual_bits)
        for plane in PLANES:
            if plane in shapes:
                shape, plane_dtype = shapes[plane]
                data = torch.zeros(self._stored(shape), dtype=plane_dtype, device=device)
                self.register_parameter(plane, nn.Parameter(data, requires_grad=False))
            else:
                self.register_parameter(plane, None)

    def _set_planes(self, packed: PackedWeight) -> None:
        """Holds these tensors from now on, without a copy; parameters stay the objects that they are."""
        for plane, tensor in packed._asdict().items():
            if tensor is not None:
                parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                setattr(self, plane, parameter)

    @property
    def packed(self) -> PackedWeight:
        """The planes as one tuple."""
        return PackedWeight(self.codes, self.residual, self.scales, self.exponents)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [rows, columns]; ``dtype`` defaults to that of the dense weight it stands for."""
        return reference.dequantize_weight(
            self.packed,
            self.shape[1],
            bits=self.bits,
            residual_bits=self.residual_bits,
            group_size=self.group_size,
            seed=self.seed,
            dtype=dtype or self.dense_dtype,
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, rebuilt when more than its dtype, device or shape is asked for. Not stored: it is for code
        that insists on reading one."""
        if torch.compiler.is_compiling():
            return self._lookup(torch.arange(self.shape[0], device=self.codes.device))
        return LazyWeight(self.dequantize, torch.Size(self.shape), self.dense_dtype, self.codes.device)

    def _lookup(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [*ids.shape, columns]."""
        return ops.embedding(
            ids,
            self.codes,
            self.residual,
            self.scales,
            self.exponents,
            self.shape[1],
            self.bits,
            self.residual_bits,
            self.group_size,
            self.seed,
            self.dense_dtype,
        )

    def base_only_(self: Self) -> Self:
        """Drops the residual plane in place: the module runs with ``bits`` bits from now on."""
        self.residual = None
        self.residual_bits = 0
        return self

    @property
    def label(self) -> str:
        """``4`` or ``4+2``."""
        return f"{self.bits}+{self.residual_bits}" if self.residual_bits else f"{self.bits}"

    @property
    def nbytes(self) -> int:
        """Stored bytes: planes, scales and exponents."""
        return self.packed.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: planes, scales and exponents over rows * columns."""
        rows, columns = self.matrix
        return 8 * self.nbytes / (rows * columns)

    def reset_parameters(self) -> None:
        """Does nothing: the weights are data, and re-initialising a loaded module would destroy them."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.codes.device)).dtype
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What the planes mean beside their bytes."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]].update(self.settings)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Refuses planes that mean something else here: other settings, or numbers that would be cast to bytes."""
        errors: list[str] = args[-1]
        for name, value in self.settings.items():
            if local_metadata.get(name, value) != value:
                errors.append(f"{prefix[:-1]} was quantized with {name} {local_metadata[name]}, this layer has {value}")
        for plane in PLANES:
            stored, own = state_dict.get(prefix + plane), getattr(self, plane)
            if stored is not None and own is not None and stored.dtype != own.dtype:
                errors.append(f"{prefix}{plane} is {stored.dtype}: it must be {own.dtype}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class LazyWeight(Tensor):
    """A weight that is decoded when its values are first needed, and then kept as long as this object lives.

    Model code reads ``weight.dtype`` or ``weight.device`` in every forward, which must not decode a whole vocabulary. To get
    an ordinary tensor, e.g. for an ``nn.Parameter``, call ``dequantize()`` of the module. Writing to it is an error: only a
    copy would change, and whoever merges something into a weight would not learn that nothing happened.
    """

    _is_hf_initialized = True  # Transformers leaves weights with this mark alone
    _decode: Callable[[], Tensor]
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls: type[LazyWeight], decode: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        out._decode, out._dense = decode, None
        return out

    def dense(self) -> Tensor:
        """The ordinary tensor."""
        if self._dense is None:
            self._dense = self._decode()
        return self._dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN_WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = func.__name__
        writes = name in _WRITING or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if writes and isinstance(args[0], cls):
            raise QuantizationError(
                f"{name} on the weight of a quantized module: it is decoded from packed planes and cannot be written to. "
                "Dequantize the model first. (PEFT merges LoRA adapters if turboquant_weights was imported before their "
                "config was made)"
            )
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


_KNOWN_WITHOUT_VALUES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "is_cuda", "requires_grad")),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "__len__")
    ),
}
_WRITING = {
    "__set__",
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
}
