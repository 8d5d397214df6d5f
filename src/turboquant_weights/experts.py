"""Stacks of experts: a parameter ``[experts, ., .]`` that holds one matrix per expert, as a module with packed planes.

Models read such a parameter in one way: they index it by expert and multiply. The module that stands in its place keeps the
parameter's name and is read the same way: ``stack[e]`` is an :class:`ExpertMatrix`, and the product of an activation with
one is a call of the module, ``stack(x, e)``, which decodes that expert alone. A product with the whole stack (``torch.bmm``)
goes expert by expert; anything else sees the decoded tensor. So no architecture is known here, and hooks on the module see
what every expert is given.

Which way a matrix lies, ``[out_features, in_features]`` ("out_in", multiplied as ``F.linear(x, w)``) or transposed
("in_out", ``x @ w``), must be known before it is cut into planes, whose rows are always outputs. :func:`find_stacks` tells
it from what the module says about itself, or from how the shapes of the parameters of one module fit together.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops, reference
from .config import LayoutByName, TurboQuantConfig
from .errors import ConfigError, QuantizationError
from .linear import dense_weight
from .planes import LazyWeight, PackedPlanes
from .reference import PackedWeight
from .rotation import is_autocast_enabled


class ExpertStack(nn.Module):
    """``num_experts`` matrices ``[out_features, in_features]``, read as the 3-D parameter that a model expects."""

    num_experts: int
    out_features: int
    in_features: int
    layout: str

    def forward(self, x: Tensor, experts: int | Tensor) -> Tensor:
        """``x`` [..., in_features] times the matrix of one expert; or ``x`` [s, in_features] with the expert of each row,
        integers [s], where rows of experts beyond the last become zeros. Returns [..., out_features]."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The whole parameter."""
        raise NotImplementedError

    def expert(self, index: int) -> Tensor:
        """The matrix of one expert, lying as the parameter's do."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return torch.Size((self.num_experts, *self._lying(self.out_features, self.in_features)))

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _lying(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows, columns) if self.layout == "out_in" else (columns, rows)

    def check_input(self, x: Tensor) -> None:
        """Raises QuantizationError unless ``x`` is a floating-point tensor [..., in_features]."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise QuantizationError(
                f"a stack of {self.num_experts} experts got a {x.dtype} tensor of shape {tuple(x.shape)}: "
                f"a floating-point tensor [..., {self.in_features}] is needed"
            )

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool):
            position = int(index)
            if not -self.num_experts <= position < self.num_experts:
                raise IndexError(f"expert {position} of {self.num_experts}")
            return ExpertMatrix.of(self, position % self.num_experts)
        if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
            used, inverse = index.unique(return_inverse=True)
            return torch.stack([self.expert(e) for e in used.tolist()])[inverse]
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        # What a tensor can do beyond being indexed (views, mostly): on the decoded one.
        if not name.startswith("_") and name not in self.__dict__.get("_parameters", ()) and hasattr(Tensor, name):
            return getattr(self.dense(), name)
        return super().__getattr__(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], ExpertStack) and args[0].dim() == 3:
            x, stack = args
            if stack.layout == "in_out" and x.shape[0] == stack.num_experts:
                return torch.stack([stack(rows, e) for e, rows in enumerate(x)])
        args, kwargs = torch.utils._pytree.tree_map_only(ExpertStack, lambda stack: stack.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"layout={self.layout}"
        )


class ExpertMatrix(LazyWeight):
    """One matrix of a stack, as the model's parameter holds it. Products with it are calls of the stack."""

    _stack: ExpertStack
    _index: int

    @classmethod
    def of(cls, stack: ExpertStack, index: int) -> ExpertMatrix:
        out = cls(lambda: stack.expert(index), stack.shape[1:], stack.dtype, stack.device)
        out._stack, out._index = stack, index
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, bias = (args[0] if args else None), None
        matrix = args[1] if len(args) > 1 else None
        layout = "in_out" if func in _PRODUCTS else None
        if func is functional.linear:
            layout, bias = "out_in", (args[2] if len(args) > 2 else (kwargs or {}).get("bias"))
        if isinstance(matrix, cls) and isinstance(x, Tensor) and not isinstance(x, cls) and matrix._stack.layout == layout:
            product = matrix._stack(x, matrix._index)
            return product if bias is None else product + bias
        return super().__torch_function__(func, types, args, kwargs)


_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}


class DenseExperts(ExpertStack):
    """A stack that is not quantized (yet): lets hooks see what its experts are given."""

    def __init__(self, weight: nn.Parameter, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.num_experts = weight.shape[0]
        self.out_features, self.in_features = weight.shape[1:] if layout == "out_in" else weight.shape[:0:-1]
        self.weight = weight

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def dense(self) -> Tensor:
        return self.weight

    def expert(self, index: int) -> Tensor:
        return self.weight[index]

    def matrix_of(self, index: int) -> Tensor:
        """[out_features, in_features]."""
        return self.weight[index] if self.layout == "out_in" else self.weight[index].T

    def rows(self, parameter: Tensor) -> Tensor:
        """``parameter``, which lies like the stack's, as one matrix [num_experts * out_features, in_features]."""
        return (parameter if self.layout == "out_in" else parameter.transpose(1, 2)).flatten(0, 1)

    def forward(self, x: Tensor, experts: int | Tensor) -> Tensor:
        if isinstance(experts, int):
            return functional.linear(x, self.matrix_of(experts))
        return reference.routed(
            x, experts, self.num_experts, self.out_features, lambda rows, e: functional.linear(rows, self.matrix_of(e))
        )


class TurboQuantExperts(ExpertStack, PackedPlanes):
    """A stack in ``config.bits + config.residual_bits`` bits per weight.

    Parameters as in :class:`TurboQuantLinear`, each with a first dimension more: planes ``[e]`` are those of expert ``e``, a
    matrix [out_features, in_features]. ``weight`` is the decoded parameter as the model would hold it.

    Args:
        num_experts, in_features, out_features: Sizes. layout: How the model's parameter lies, "out_in" or "in_out".
        config: bits, residual bits, group size and seed.
        device, dtype: of the new planes (zeros), and of the decoded weight.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        layout: str = "out_in",
        config: TurboQuantConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self._init_planes(config or TurboQuantConfig(), device, dtype)

    @classmethod
    def from_parameter(
        cls, weight: Tensor, layout: str, config: TurboQuantConfig | None = None, *, name: str = "experts"
    ) -> TurboQuantExperts:
        """Quantizes a parameter [experts, ., .], expert by expert. The relative squared error is left in
        ``quantization_error``.

        Raises:
            QuantizationError: NaN or Inf (with expert and position), or a weight that is not there.
        """
        config = config or TurboQuantConfig()
        if weight.is_meta:
            raise QuantizationError(f"{name}: the weight is on the meta device: load the model before quantizing it")
        rows, columns = weight.shape[1:] if layout == "out_in" else weight.shape[:0:-1]
        # Written where they will stay: collected and stacked, they would be there twice.
        planes = reference.empty_planes(len(weight) * rows, columns, config.bits, config.residual_bits, weight.device).map(
            lambda plane: plane.view(len(weight), rows, *plane.shape[1:])
        )
        squares = errors = 0.0
        for index, matrix in enumerate(weight.detach()):
            matrix = matrix if layout == "out_in" else matrix.T
            quantized = reference.quantize_weight(
                matrix,
                bits=config.bits,
                residual_bits=config.residual_bits,
                group_size=config.group_size,
                seed=config.seed,
                name=f"{name}[{index}]",
            )
            for plane, own in zip(planes, quantized.weight, strict=True):
                if plane is not None and own is not None:
                    plane[index] = own
            energy = reference.squared_norm(matrix)
            squares, errors = squares + energy, errors + energy * quantized.error
        stack = cls.from_packed(planes, columns, layout, config)
        stack.quantization_error = errors / squares if squares else 0.0
        stack.dense_dtype = weight.dtype
        return stack

    @classmethod
    def from_packed(cls, packed: PackedWeight, in_features: int, layout: str, config: TurboQuantConfig) -> TurboQuantExperts:
        """Wraps existing planes without copying them."""
        count, rows = packed.scales.shape[:2]
        stack = cls(count, in_features, rows, layout, config, device="meta")
        stack._set_planes(packed)
        return stack

    @classmethod
    def like(cls, parameter: Tensor, layout: str, config: TurboQuantConfig) -> TurboQuantExperts:
        """A stack for this 3-D parameter, with planes on the meta device."""
        count, *lying = parameter.shape
        rows, columns = lying if layout == "out_in" else lying[::-1]
        return cls(count, columns, rows, layout, config, "meta", parameter.dtype)

    @property
    def matrix(self) -> tuple[int, int]:
        return self.num_experts * self.out_features, self.in_features

    def _stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.num_experts, self.out_features, *shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.dense_dtype

    def forward(self, x: Tensor, experts: int | Tensor) -> Tensor:
        self.check_input(x)
        if is_autocast_enabled(x) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        layout = (self.in_features, self.bits, self.residual_bits, self.group_size, self.seed)
        if isinstance(experts, int):
            return ops.linear(x, *self.packed.map(lambda plane: plane[experts]), None, *layout)
        return ops.experts(x, experts, *self.packed, *layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter; ``dtype`` defaults to that of the dense one it stands for."""
        rows = self._decoded(self.packed.map(lambda plane: plane.flatten(0, 1)), dtype)
        matrices = rows.view(self.num_experts, self.out_features, self.in_features)
        return matrices if self.layout == "out_in" else matrices.transpose(1, 2).contiguous()

    def expert(self, index: int) -> Tensor:
        matrix = self._decoded(self.packed.map(lambda plane: plane[index]))
        return matrix if self.layout == "out_in" else matrix.T

    def _decoded(self, packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        return reference.dequantize_weight(
            packed,
            self.in_features,
            bits=self.bits,
            residual_bits=self.residual_bits,
            group_size=self.group_size,
            seed=self.seed,
            dtype=dtype or self.dense_dtype,
        )

    def dense(self) -> Tensor:
        return self.weight

    @property
    def weight(self) -> Tensor:
        if torch.compiler.is_compiling():
            raise QuantizationError(
                "torch.compile met code that reads a whole stack of quantized experts: call the experts through the model's "
                "own forward, or exclude it with torch.compiler.disable"
            )
        return LazyWeight(self.dequantize, self.shape, self.dense_dtype, self.codes.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.label}, bits_per_weight={self.bits_per_weight:.3f}, seed={self.seed}"


# Called with a model whose parameters were replaced by stacks, or stacks by parameters: some modules must then run another
# forward. The Transformers integration registers itself here.
on_change: list[Callable[[nn.Module], None]] = []


def changed(model: nn.Module) -> None:
    """To be called after stacks came or went."""
    for hook in on_change:
        hook(model)


@contextlib.contextmanager
def dense_stacks(model: nn.Module, stacks: Mapping[str, str]) -> Iterator[None]:
    """Inside, the 3-D parameters ``stacks`` (name -> layout) are modules, :class:`DenseExperts`, so that hooks can be put on
    them. Afterwards those that are still there are parameters again."""
    for name, layout in stacks.items():
        replace_parameter(model, name, DenseExperts(model.get_parameter(name), layout))
    changed(model)
    try:
        yield
    finally:
        for name in stacks:
            stack = model.get_submodule(name)
            if isinstance(stack, DenseExperts):
                replace_parameter(model, name, stack.weight)
        changed(model)


def weight_rows(module: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer, or of all experts of a dense stack one below the other: [rows, in_features]."""
    return module.rows(module.weight) if isinstance(module, DenseExperts) else dense_weight(module, name)


def find_stacks(model: nn.Module, config: TurboQuantConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> layout of every 3-D parameter that is a stack of experts; and name -> why not, of those that might be one.

    Works on the meta device. ``config.experts`` comes before what can be recognised.

    Raises:
        ConfigError: a pattern of ``config.experts`` matches no 3-D parameter.
    """
    told = config.experts
    assert told is None or isinstance(told, LayoutByName)
    stacks: dict[str, str] = {}
    left: dict[str, str] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    candidates = []
    for prefix, module in model.named_modules():
        mine = {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3}
        if not mine or isinstance(module, (PackedPlanes, *_OTHER_KINDS)):
            continue
        layouts = _layouts(module, mine)
        for key, parameter in mine.items():
            name = f"{prefix}.{key}" if prefix else key
            candidates.append(name)
            pattern = told.pattern_for(name) if told is not None else None
            layout = told[pattern] if told is not None and pattern is not None else layouts.get(key)
            reason = _obstacle(parameter, owners[id(parameter)])
            if reason is None and layout is not None:
                stacks[name] = layout
            elif reason is not None and (layout is not None or pattern is not None):
                left[name] = reason
            elif min(parameter.shape) > 1:
                left[name] = (
                    f"a 3-D parameter of {type(module).__name__}; if it holds a matrix per expert, say how they lie: "
                    f"experts={{{name!r}: 'out_in'}}, or 'in_out'"
                )
    for pattern in told or ():
        if not any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in candidates):
            raise ConfigError(
                f"experts pattern {pattern!r} matches no 3-D parameter of {type(model).__name__}: it has "
                + (", ".join(candidates[:3]) or "none at all")
            )
    return stacks, left


# Modules whose parameters with three dimensions are known to be something else.
_OTHER_KINDS = (nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention)


def _obstacle(parameter: nn.Parameter, owners: int) -> str | None:
    """Why a stack cannot be cut into planes."""
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return f"experts in {parameter.dtype}: only float32, float16 and bfloat16 can be quantized"
    if 0 in parameter.shape:
        return f"an empty stack of shape {list(parameter.shape)}"
    if owners > 1:
        return f"{owners} modules share this stack"
    return None


def _layouts(module: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """The layouts that can be told: from the module's attributes, else from how two parameters fit together."""
    transposed = getattr(module, "is_transposed", None)  # Transformers' mark on modules of experts
    if isinstance(transposed, bool):
        return dict.fromkeys(parameters, "in_out" if transposed else "out_in")
    count = next((getattr(module, name) for name in ("num_experts", "groups") if hasattr(module, name)), None)
    for inputs, outputs in (("input_size", "output_size"), ("in_features", "out_features")):
        sizes = getattr(module, outputs, None), getattr(module, inputs, None)
        if count is not None and None not in sizes and sizes[0] != sizes[1]:
            lying: dict[tuple[Any, ...], str] = {(count, *sizes): "out_in", (count, *sizes[::-1]): "in_out"}
            return {key: lying[tuple(p.shape)] for key, p in parameters.items() if tuple(p.shape) in lying}
    if len(parameters) == 2:  # gate and up in one, and down: only one way fits
        (first, up), (second, down) = parameters.items()
        if up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]:
            return {first: "out_in", second: "out_in"}
        if up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]:
            return {first: "in_out", second: "in_out"}
    return {}


def replace_parameter(model: nn.Module, name: str, stack: nn.Module | nn.Parameter) -> None:
    """Puts ``stack`` where the model has the parameter or stack ``name``."""
    path, _, key = name.rpartition(".")
    parent = model.get_submodule(path)
    parent._parameters.pop(key, None)
    parent._modules.pop(key, None)
    setattr(parent, key, stack)
