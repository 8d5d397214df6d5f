"""The operator table: schema, fake kernel, dispatch and gradient of each op, in one place.

Everything above this file calls ``torch.ops.turboquant_weights``; kernels are imported inside the dispatch functions. One
op per forward, so that ``torch.compile`` sees one opaque node and eager mode pays one dispatch.

``residual`` is None for a layer without a residual plane *or* for one that runs its base plane alone; then
``residual_bits`` is 0.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference, transforms
from .cpu import linear as cpu
from .cpu.library import chosen
from .errors import ScheduleError
from .reference import PackedWeight

_LIBRARY = torch.library.Library("turboquant_weights", "DEF")
_WEIGHT = "Tensor codes, Tensor? residual, Tensor scales, Tensor exponents"
_LAYOUT = "int in_features, int bits, int residual_bits, int group_size, int seed"
_OLDEST_TRITON = (3, 6)
# Asked in every call: a name of this module is found faster than one of another.
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracer, _is_profiling = torch._C._get_tracing_state, torch.autograd._profiler_enabled
_is_autocast, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"linear_inference(Tensor x, {_WEIGHT}, Tensor? bias, {_LAYOUT}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"linear_input_gradient(Tensor grad, {_WEIGHT}, {_LAYOUT}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"experts(Tensor x, Tensor experts, {_WEIGHT}, {_LAYOUT}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"experts_input_gradient(Tensor grad, Tensor experts, {_WEIGHT}, {_LAYOUT}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"embedding(Tensor ids, {_WEIGHT}, {_LAYOUT}, ScalarType dtype) -> Tensor", tags=_TAGS)


def _on_planes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives a function with the signature of :func:`reference.linear` the schema of the op."""

    def op(
        x: Tensor,
        codes: Tensor,
        residual: Tensor | None,
        scales: Tensor,
        exponents: Tensor,
        bias: Tensor | None,
        in_features: int,
        bits: int,
        residual_bits: int,
        group_size: int,
        seed: int,
    ) -> Tensor:
        packed = PackedWeight(codes, residual, scales, exponents)
        layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
        return function(x, packed, bias, in_features, **layout)

    return op


_linear = _on_planes(reference.linear)


def _gradient_on_planes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for :func:`reference.linear_input_gradient`."""

    def op(
        grad: Tensor,
        codes: Tensor,
        residual: Tensor | None,
        scales: Tensor,
        exponents: Tensor,
        in_features: int,
        bits: int,
        residual_bits: int,
        group_size: int,
        seed: int,
    ) -> Tensor:
        packed = PackedWeight(codes, residual, scales, exponents)
        layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
        return function(grad, packed, in_features, **layout)

    return op


_linear_input_gradient = _gradient_on_planes(reference.linear_input_gradient)


def _embedding(
    ids: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    exponents: Tensor,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    packed = PackedWeight(codes, residual, scales, exponents)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
    return reference.embedding(ids, packed, in_features, **layout, dtype=dtype)


def _embedding_cpu(
    ids: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    exponents: Tensor,
    in_features: int,
    bits: int,
    residual_bits: int,
    group_size: int,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    layout = bits, residual_bits, group_size, seed
    if chosen() is None or dtype not in cpu.DTYPES:  # as in _linear_cpu
        return _embedding(ids, codes, residual, scales, exponents, in_features, *layout, dtype)
    return cpu.look_up(ids, PackedWeight(codes, residual, scales, exponents), in_features, layout, dtype)


@functools.cache
def has_triton() -> bool:
    """Whether the kernels can run. If not, the user learns once that this GPU computes with the slow reference."""
    installed = ""
    for distribution in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            installed = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if numbers >= _OLDEST_TRITON:
        return True
    found = f"Triton {installed} is" if installed else "Triton is not"
    warnings.warn(
        f"{found} installed: the GPU kernels of turboquant-weights need 3.6 or newer (it comes with torch 2.11). "
        "Quantized layers compute with the PyTorch reference: correct, but many times slower",
        stacklevel=2,
    )
    return False


@functools.cache
def _linear_kernels() -> Callable[..., Tensor]:
    from .kernels.linear import linear

    return linear


@functools.cache
def _gradient_kernels() -> Callable[..., Tensor]:
    from .kernels.linear import linear_input_gradient

    return _gradient_on_planes(linear_input_gradient)


def tune_schedules(
    shapes: list[tuple[int, int]], bits: int, residual_bits: int, tokens: list[int] | None, path: Path
) -> Iterator[str]:
    """Searches kernel schedules on the current GPU, adds them to the file and reports each in a line."""
    if not torch.cuda.is_available() or not has_triton():
        raise ScheduleError("tuning needs a GPU that this PyTorch can use, and Triton 3.6 or newer")
    from .kernels.tune import tune_file

    yield from tune_file(shapes, bits, residual_bits, tokens, path)


def _linear_cuda(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    in_features: int,
    *layout: int,
) -> Tensor:
    # Documented: float64 computes with the reference, and so does a machine without Triton, which says so.
    if x.dtype == torch.float64 or not has_triton():
        return _linear(x, codes, residual, scales, exponents, bias, in_features, *layout)
    return _linear_kernels()(x, PackedWeight(codes, residual, scales, exponents), bias, in_features, *layout)


def _linear_cpu(
    x: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    in_features: int,
    *layout: int,
) -> Tensor:
    # Documented: float64 computes with the reference, and so does an installation without the engine, which says so.
    engine = chosen()
    if engine is None or x.dtype not in cpu.DTYPES:
        return _linear(x, codes, residual, scales, exponents, bias, in_features, *layout)
    # Without names: they cost a microsecond, and a small layer takes five.
    return cpu.multiply(x, PackedWeight(codes, residual, scales, exponents), bias, in_features, layout, engine, None)


def _linear_input_gradient_cuda(grad: Tensor, *arguments: Any) -> Tensor:
    if grad.dtype == torch.float64 or not has_triton():
        return _linear_input_gradient(grad, *arguments)
    return _gradient_kernels()(grad, *arguments)


def _experts_by(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``y[i] = x[i] W[experts[i]]^T`` for a stack of matrices, by one call of a :func:`linear` per expert that is used."""

    def op(
        x: Tensor,
        experts: Tensor,
        codes: Tensor,
        residual: Tensor | None,
        scales: Tensor,
        exponents: Tensor,
        in_features: int,
        *layout: int,
    ) -> Tensor:
        packed = PackedWeight(codes, residual, scales, exponents)

        def multiply(rows: Tensor, expert: int) -> Tensor:
            return linear(rows, *packed.map(lambda plane: plane[expert]), None, in_features, *layout)

        return reference.routed(x, experts, codes.shape[0], codes.shape[1], multiply)

    return op


def _experts_gradient_by(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same for the gradient with respect to ``x``."""

    def op(
        grad: Tensor,
        experts: Tensor,
        codes: Tensor,
        residual: Tensor | None,
        scales: Tensor,
        exponents: Tensor,
        in_features: int,
        *layout: int,
    ) -> Tensor:
        packed = PackedWeight(codes, residual, scales, exponents)

        def multiply(rows: Tensor, expert: int) -> Tensor:
            return gradient(rows, *packed.map(lambda plane: plane[expert]), in_features, *layout)

        return reference.routed(grad, experts, codes.shape[0], in_features, multiply)

    return op


def _experts_cuda(x: Tensor, experts: Tensor, codes: Tensor, residual: Tensor | None, scales: Tensor, exponents: Tensor,
                  *layout: int) -> Tensor:  # fmt: skip
    if x.dtype != torch.float64 and has_triton():
        from .kernels.linear import is_routed_at_once, routed

        packed = PackedWeight(codes, residual, scales, exponents)
        if is_routed_at_once(x, packed, *layout):
            return routed(x, experts, packed, *layout)
    return _experts_loop_cuda(x, experts, codes, residual, scales, exponents, *layout)


_experts_loop_cuda = _experts_by(_linear_cuda)

# The plain-PyTorch reference serves every device but those with kernels of their own.
_LIBRARY.impl("experts", _experts_by(_linear), "CompositeExplicitAutograd")
_LIBRARY.impl("experts", _experts_by(_linear_cpu), "CPU")
_LIBRARY.impl("experts", _experts_cuda, "CUDA")
_LIBRARY.impl("experts_input_gradient", _experts_gradient_by(_linear_input_gradient), "CompositeExplicitAutograd")
_LIBRARY.impl("experts_input_gradient", _experts_gradient_by(_linear_input_gradient_cuda), "CUDA")
# What is_direct asks, for calls in C, which look at the tensors, at gradients and at the level of forward mode themselves.
cpu.watch(
    _dispatch_modes, _function_modes, _tracer, _is_profiling, functools.partial(_is_autocast, "cpu"),
    torch._C._functorch.peek_interpreter_stack,
)  # fmt: skip
_linear_cpu_kernel = cpu.kernel(_linear_cpu)
for _name in ("linear", "linear_inference"):
    _LIBRARY.impl(_name, _linear, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _linear_cpu_kernel, "CPU")
    _LIBRARY.impl(_name, _linear_cuda, "CUDA")
_LIBRARY.impl("linear_input_gradient", _linear_input_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding", _embedding_cpu, "CPU")
_LIBRARY.impl("linear_input_gradient", _linear_input_gradient_cuda, "CUDA")


@torch.library.register_fake("turboquant_weights::linear", lib=_LIBRARY)
@torch.library.register_fake("turboquant_weights::linear_inference", lib=_LIBRARY)
def _(x, codes, residual, scales, exponents, bias, in_features, bits, residual_bits, group_size, seed):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("turboquant_weights::linear_input_gradient", lib=_LIBRARY)
def _(grad, codes, residual, scales, exponents, in_features, bits, residual_bits, group_size, seed):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("turboquant_weights::experts", lib=_LIBRARY)
def _(x, experts, codes, residual, scales, exponents, in_features, bits, residual_bits, group_size, seed):
    return x.new_empty((x.shape[0], codes.shape[1]))


@torch.library.register_fake("turboquant_weights::experts_input_gradient", lib=_LIBRARY)
def _(grad, experts, codes, residual, scales, exponents, in_features, bits, residual_bits, group_size, seed):
    return grad.new_empty((grad.shape[0], in_features))


@torch.library.register_fake("turboquant_weights::embedding", lib=_LIBRARY)
def _(ids, codes, residual, scales, exponents, in_features, bits, residual_bits, group_size, seed, dtype):
    return codes.new_empty((*ids.shape, in_features), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, residual, scales, exponents, bias, *layout = inputs
    ctx.save_for_backward(codes, residual, scales, exponents)
    ctx.layout = layout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.turboquant_weights.linear_input_gradient(grad, *ctx.saved_tensors, *ctx.layout)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, None, grad_bias, *([None] * len(ctx.layout)))


def _gradient_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, residual, scales, exponents, *layout = inputs
    ctx.save_for_backward(codes, residual, scales, exponents)
    ctx.layout = layout


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # grad @ W is linear in grad: its own gradient is the layer without bias.
    again = torch.ops.turboquant_weights.linear(grad, *ctx.saved_tensors, None, *ctx.layout)
    return (again, None, None, None, None, *([None] * len(ctx.layout)))


def _experts_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, experts, codes, residual, scales, exponents, *layout = inputs
    ctx.save_for_backward(experts, codes, residual, scales, exponents)
    ctx.layout = layout


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.turboquant_weights.experts_input_gradient(grad, *ctx.saved_tensors, *ctx.layout)
    return (back, *([None] * (5 + len(ctx.layout))))


def _experts_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    again = torch.ops.turboquant_weights.experts(grad, *ctx.saved_tensors, *ctx.layout)
    return (again, *([None] * (5 + len(ctx.layout))))


torch.library.register_autograd(
    "turboquant_weights::experts", _experts_backward, setup_context=_experts_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "turboquant_weights::experts_input_gradient",
    _experts_gradient_backward,
    setup_context=_experts_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd("turboquant_weights::linear", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(
    "turboquant_weights::linear_input_gradient",
    _gradient_backward,
    setup_context=_gradient_setup_context,
    lib=_LIBRARY,
)

embedding = torch.ops.turboquant_weights.embedding
_differentiable = torch.ops.turboquant_weights.linear.default
_inference = torch.ops.turboquant_weights.linear_inference.default
_input_gradient = torch.ops.turboquant_weights.linear_input_gradient.default
_experts = torch.ops.turboquant_weights.experts.default
_experts_input_gradient = torch.ops.turboquant_weights.experts_input_gradient.default


def linear(x: Tensor, codes: Tensor, residual: Tensor | None, scales: Tensor, exponents: Tensor, bias: Tensor | None,
           *layout: int) -> Tensor:  # fmt: skip
    """The op; without its gradient, whose Python costs several microseconds per call, where none can be asked for, and where
    nobody watches also without the dispatcher, which takes as long as the product of a small layer."""
    differentiable = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling():
        op = _differentiable if differentiable else _inference
        return op(x, codes, residual, scales, exponents, bias, *layout)
    if transforms.is_active() and not transforms.run_over(codes, scales, exponents):
        planes = codes, residual, scales, exponents

        def product(x: Tensor, choice: Tensor | None) -> Tensor:
            return _inference(x, *planes, None, *layout)

        def transposed(grad: Tensor, choice: Tensor | None) -> Tensor:
            return _input_gradient(grad, *planes, *layout)

        out = transforms.apply(product, transposed, x)
        return out if bias is None else out + bias.to(out.dtype)
    if differentiable:
        return _differentiable(x, codes, residual, scales, exponents, bias, *layout)
    if type(x) is Tensor and not _is_watched():
        if x.is_cuda and codes.is_cuda:
            return _linear_cuda(x, codes, residual, scales, exponents, bias, *layout)
        if x.is_cpu and codes.is_cpu:
            return _linear_cpu(x, codes, residual, scales, exponents, bias, *layout)
    return _inference(x, codes, residual, scales, exponents, bias, *layout)


def experts(x: Tensor, experts: Tensor, codes: Tensor, residual: Tensor | None, scales: Tensor, exponents: Tensor,
            *layout: int) -> Tensor:  # fmt: skip
    """The op: ``x`` [s, k] and the expert of each row."""
    if torch.compiler.is_compiling() or not transforms.is_active() or transforms.run_over(codes, scales, exponents):
        return _experts(x, experts, codes, residual, scales, exponents, *layout)
    planes = codes, residual, scales, exponents

    def product(x: Tensor, choice: Tensor | None) -> Tensor:
        assert choice is not None
        rows = _experts(x.reshape(-1, x.shape[-1]), choice.reshape(-1), *planes, *layout)
        return rows.view(*x.shape[:-1], -1)

    def transposed(grad: Tensor, choice: Tensor | None) -> Tensor:
        assert choice is not None
        rows = _experts_input_gradient(grad.reshape(-1, grad.shape[-1]), choice.reshape(-1), *planes, *layout)
        return rows.view(*grad.shape[:-1], -1)

    return transforms.apply(product, transposed, x, experts)


@torch.library.register_vmap("turboquant_weights::embedding", lib=_LIBRARY)
def _(info, in_dims, ids, codes, residual, scales, exponents, *layout):
    if any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError("vmap over the planes of a quantized embedding: run the models one after the other")
    return torch.ops.turboquant_weights.embedding(ids.movedim(in_dims[0], 0), codes, residual, scales, exponents, *layout), 0


def _is_watched() -> bool:
    """Whether a mode, a transform, a tracer or a profiler must see each op; all of them work in the dispatcher."""
    return _dispatch_modes() > 0 or _function_modes() > 0 or _tracer() is not None or _is_profiling()


def is_direct(x: Tensor, parameters: Mapping[str, Any]) -> bool:
    """Whether a layer with these parameters may give ``x`` to the CPU engine without asking the dispatcher: an ordinary
    tensor on a CPU, no gradient wanted, no autocast, nobody watching. Not for ``torch.compile``."""
    if type(x) is not Tensor or not x.is_cpu or "bias" not in parameters:  # it may be parametrized
        return False
    if _is_autocast("cpu") or _is_watched() or transforms.is_active():
        return False
    bias = parameters["bias"]
    return not (_is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
