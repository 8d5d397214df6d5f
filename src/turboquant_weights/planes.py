"""What a module that stores its weight as packed planes has in common: parameters, decoding, conversion, state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import reference
from .config import TurboQuantConfig
from .reference import PackedWeight, packed_shapes

PLANES = ("codes", "residual", "scales", "exponents")
_SETTINGS = ("bits", "residual_bits", "group_size", "seed")

Self = TypeVar("Self", bound="PackedPlanes")


class PackedPlanes(nn.Module):
    """A module whose weight ``[rows, columns]`` is planes instead of a parameter. See ``reference.py`` for their shapes.

    A subclass says through ``_shape`` how its own attributes call rows and columns. The planes are integer parameters that
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

    @property
    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _init_planes(
        self, config: TurboQuantConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Registers zeroed planes (they decode to zeros) for ``_shape``."""
        self.bits = config.bits
        self.residual_bits = config.residual_bits
        self.group_size = config.group_size
        self.seed = config.seed
        self.quantization_error = None
        self.dense_dtype = dtype or torch.get_default_dtype()
        shapes = packed_shapes(*self._shape, config.bits, config.residual_bits)
        for plane in PLANES:
            if plane in shapes:
                shape, plane_dtype = shapes[plane]
                data = torch.zeros(shape, dtype=plane_dtype, device=device)
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
            self._shape[1],
            bits=self.bits,
            residual_bits=self.residual_bits,
            group_size=self.group_size,
            seed=self.seed,
            dtype=dtype or self.dense_dtype,
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
    def bits_per_weight(self) -> float:
        """Stored bits per weight: planes, scales and exponents over rows * columns."""
        rows, columns = self._shape
        return 8 * self.packed.nbytes / (rows * columns)

    def reset_parameters(self) -> None:
        """Does nothing: the weights are data, and re-initialising a loaded module would destroy them."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.codes.device)).dtype
        return self

    @property
    def _settings(self) -> dict[str, int]:
        """What the planes mean beside their bytes."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]].update(self._settings)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Refuses planes that mean something else here: other settings, or numbers that would be cast to bytes."""
        errors: list[str] = args[-1]
        for name, value in self._settings.items():
            if local_metadata.get(name, value) != value:
                errors.append(f"{prefix[:-1]} was quantized with {name} {local_metadata[name]}, this layer has {value}")
        for plane in PLANES:
            stored, own = state_dict.get(prefix + plane), getattr(self, plane)
            if stored is not None and own is not None and stored.dtype != own.dtype:
                errors.append(f"{prefix}{plane} is {stored.dtype}: it must be {own.dtype}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
