"""``TurboQuantLinear``: a drop-in for ``torch.nn.Linear`` whose weight is stored as packed planes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .config import TurboQuantConfig
from .errors import QuantizationError
from .reference import PackedWeight, packed_shapes
from .rotation import is_autocast_enabled

PLANES = ("codes", "residual", "scales", "exponents")


class TurboQuantLinear(nn.Linear):
    """``y = x W^T + b`` with ``W`` [out_features, in_features] in ``config.bits + config.residual_bits`` bits per weight.

    Parameters (all ``requires_grad=False`` integers, so ``.half()`` and ``.bfloat16()`` leave them alone): ``codes``,
    ``residual`` (absent without a residual plane), ``scales``, ``exponents``; see ``reference.py`` for shapes. ``bias`` is
    an ordinary float parameter or None. The computation runs in the dtype of the input (or of autocast).

    It subclasses ``nn.Linear`` because adapters and model code ask ``isinstance(module, nn.Linear)``. There is no stored
    ``weight``: reading the attribute dequantizes.

    Args:
        in_features: k. out_features: n. bias: whether a bias parameter exists.
        config: bits, residual bits, group size and seed.
        device, dtype: of the new parameters; ``dtype`` is the bias's. Planes start zeroed (the layer computes zeros).
    """

    codes: nn.Parameter
    residual: nn.Parameter | None
    scales: nn.Parameter
    exponents: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: TurboQuantConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the dense weight
        config = config or TurboQuantConfig()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = config.bits
        self.residual_bits = config.residual_bits
        self.group_size = config.group_size
        self.seed = config.seed
        self.quantization_error: float | None = None  # ||W - W'||^2 / ||W||^2, known where the layer was quantized
        # What ``weight`` answers in; follows .to(dtype), .half(), ... as a dense weight would.
        self.dense_dtype: torch.dtype = dtype or torch.get_default_dtype()
        shapes = packed_shapes(out_features, in_features, config.bits, config.residual_bits)
        for plane in PLANES:
            if plane in shapes:
                shape, plane_dtype = shapes[plane]
                data = torch.zeros(shape, dtype=plane_dtype, device=device)
                self.register_parameter(plane, nn.Parameter(data, requires_grad=False))
            else:
                self.register_parameter(plane, None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: TurboQuantConfig | None = None, *, name: str = "linear"
    ) -> TurboQuantLinear:
        """Quantizes an ``nn.Linear`` or a Transformers ``Conv1D`` (its weight is stored transposed) where it is.

        The bias parameter is shared, not copied. ``name`` is used in errors; the relative squared error of the weight is
        left in ``layer.quantization_error``.

        Raises:
            QuantizationError: the module is neither, or its weight has NaN or Inf (with the position).
        """
        config = config or TurboQuantConfig()
        weight = dense_weight(linear, name)
        if isinstance(linear.bias, Tensor):
            reference.check_finite(linear.bias, f"{name}: bias")
        quantized = reference.quantize_weight(
            weight,
            bits=config.bits,
            residual_bits=config.residual_bits,
            group_size=config.group_size,
            seed=config.seed,
            name=name,
        )
        bias = linear.bias
        assert bias is None or isinstance(bias, Tensor)
        layer = cls.from_packed(quantized.weight, weight.shape[1], bias, config)
        layer.quantization_error = quantized.error
        layer.dense_dtype = weight.dtype
        layer.train(linear.training)
        return layer

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, in_features: int, bias: Tensor | None, config: TurboQuantConfig
    ) -> TurboQuantLinear:
        """Wraps existing planes without copying them."""
        layer = cls(in_features, packed.scales.shape[0], bias=False, config=config, device="meta")
        for plane, tensor in packed._asdict().items():
            if tensor is not None:
                parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                setattr(layer, plane, parameter)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def packed(self) -> PackedWeight:
        """The planes as one tuple."""
        return PackedWeight(self.codes, self.residual, self.scales, self.exponents)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, rebuilt at each access: for code that insists on reading one. Not stored."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out_features, in_features]; ``dtype`` defaults to that of the dense weight it stands for."""
        return reference.dequantize_weight(
            self.packed,
            self.in_features,
            bits=self.bits,
            residual_bits=self.residual_bits,
            group_size=self.group_size,
            seed=self.seed,
            dtype=dtype or self.dense_dtype,
        )

    def base_only_(self) -> TurboQuantLinear:
        """Drops the residual plane in place: the layer runs with ``bits`` bits from now on."""
        self.residual = None
        self.residual_bits = 0
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in_features] of a floating dtype; returns [..., out_features] of the same dtype."""
        if input.shape[-1:] != (self.in_features,) or not input.is_floating_point():
            raise QuantizationError(
                f"TurboQuantLinear got a {input.dtype} tensor of shape {tuple(input.shape)}: "
                f"a floating-point tensor [..., {self.in_features}] is needed"
            )
        if is_autocast_enabled(input) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return ops.linear(
            input,
            self.codes,
            self.residual,
            self.scales,
            self.exponents,
            self.bias,
            self.in_features,
            self.bits,
            self.residual_bits,
            self.group_size,
            self.seed,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TurboQuantLinear:
        super()._apply(fn, recurse)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.codes.device)).dtype
        return self

    @property
    def _settings(self) -> dict[str, int]:
        """What the planes mean beside their bytes."""
        return {name: getattr(self, name) for name in ("bits", "residual_bits", "group_size", "seed")}

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

    def extra_repr(self) -> str:
        bits = f"{self.bits}+{self.residual_bits}" if self.residual_bits else f"{self.bits}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={bits}, bits_per_weight={self.bits_per_weight:.3f}, seed={self.seed}"
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: planes, scales and exponents over out_features * in_features."""
        return 8 * self.packed.nbytes / (self.in_features * self.out_features)

    def reset_parameters(self) -> None:
        """Does nothing: the weights are data, and re-initialising a loaded layer would destroy them."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's ``Conv1D``: a linear layer with weight [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether this package can replace the module: a dense ``nn.Linear`` or a ``Conv1D``, not an exotic subclass."""
    return type(module) is nn.Linear or is_conv1d(module)


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """The weight [out_features, in_features] of an ``nn.Linear`` or ``Conv1D``."""
    if not is_linear(module):
        raise QuantizationError(f"{name} is a {type(module).__name__}: only nn.Linear and Conv1D can be quantized")
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise QuantizationError(f"{name}: the weight is on the meta device: load the model before quantizing it")
    return weight.T if is_conv1d(module) else weight
