"""``TurboQuantLinear``: a drop-in for ``torch.nn.Linear`` whose weight is stored as packed planes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops, reference
from .config import TurboQuantConfig
from .cpu import linear as cpu
from .errors import QuantizationError
from .planes import PackedPlanes
from .reference import PackedWeight
from .rotation import is_autocast_enabled


class TurboQuantLinear(PackedPlanes, nn.Linear):  # type: ignore[override]  # the weight is computed
    """``y = x W^T + b`` with ``W`` [out_features, in_features] in ``config.bits + config.residual_bits`` bits per weight.

    Parameters (all ``requires_grad=False`` integers, so ``.half()`` and ``.bfloat16()`` leave them alone): ``codes``,
    ``residual`` (absent without a residual plane), ``scales``, ``exponents``; see ``reference.py`` for shapes. ``bias`` is
    an ordinary float parameter or None. The computation runs in the dtype of the input (or of autocast).

    It subclasses ``nn.Linear`` because adapters and model code ask ``isinstance(module, nn.Linear)``. There is no stored
    ``weight``: reading the values of the attribute dequantizes.

    Args:
        in_features: k. out_features: n. bias: whether a bias parameter exists.
        config: bits, residual bits, group size and seed.
        device, dtype: of the new parameters; ``dtype`` is the bias's. Planes start zeroed (the layer computes zeros).
    """

    _bound: cpu.Bound | None = None  # after a call on a CPU

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
        self.in_features = in_features
        self.out_features = out_features
        self._init_planes(config or TurboQuantConfig(), device, dtype)
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
        layer._set_planes(packed)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def like(cls, linear: nn.Module, config: TurboQuantConfig) -> TurboQuantLinear:
        """A layer with the shape and the bias of an ``nn.Linear`` or ``Conv1D``, and planes on the meta device."""
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, nn.Parameter)
        rows, columns = weight.shape[::-1] if is_conv1d(linear) else weight.shape
        layer = cls(columns, rows, bias=False, config=config, device="meta", dtype=weight.dtype)
        layer.bias = bias
        return layer.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in_features] of a floating dtype; returns [..., out_features] of the same dtype."""
        out = self._on_cpu(input)
        if out is not None:
            return out
        parameters = self._parameters  # not attributes: nn.Module needs a microsecond to find one
        self.check_input(input)
        if is_autocast_enabled(input) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return ops.linear(
            input,
            parameters["codes"],  # type: ignore[arg-type]
            parameters["residual"],
            parameters["scales"],  # type: ignore[arg-type]
            parameters["exponents"],  # type: ignore[arg-type]
            parameters["bias"] if "bias" in parameters else self.bias,  # noqa: SIM401  # it may be parametrized
            self.in_features,
            self.bits,
            self.residual_bits,
            self.group_size,
            self.seed,
        )

    def _on_cpu(self, input: Tensor) -> Tensor | None:
        """What the CPU engine makes of ``input``, or None: if it is not for the engine, or the dispatcher must be asked."""
        if torch.compiler.is_compiling():
            return None
        parameters, bound = self._parameters, self._bound
        if bound is not None and (out := bound.at_once(input, parameters)) is not None:
            return out
        if not ops.is_direct(input, parameters):
            return None
        if bound is None:
            layout = self.bits, self.residual_bits, self.group_size, self.seed
            bound = self._bound = cpu.bind(parameters, self.in_features, layout)
        out = None if bound is None else bound.product(input, parameters)
        if out is None:
            self._bound = None
        return out

    def check_input(self, input: Tensor) -> None:
        """Raises QuantizationError unless ``input`` is a floating-point tensor [..., in_features]."""
        if not input.dim() or input.size(-1) != self.in_features or not input.is_floating_point():
            raise QuantizationError(
                f"TurboQuantLinear got a {input.dtype} tensor of shape {tuple(input.shape)}: "
                f"a floating-point tensor [..., {self.in_features}] is needed"
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.label}, bits_per_weight={self.bits_per_weight:.3f}, seed={self.seed}"
        )


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
