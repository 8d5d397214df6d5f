"""The randomized Hadamard rotation of input columns (FORMAT.md section 4).

What: each block of ``b`` columns (``b`` a power of two, 32 to 128) of a row ``w`` becomes ``(w * s) H_b / sqrt(b)``, with
``s`` a vector of random signs and ``H_b`` Sylvester's Hadamard matrix. The matrix is orthogonal and symmetric, so its own
inverse, and ``W x = rotate(W) rotate(x)``: rotating the activation instead of un-rotating the weight costs O(k log b).

Why: a rotated block of almost any weight looks Gaussian, the distribution for which one fixed codebook is best, and the
quantization error that comes out is spread over the block's columns instead of following outliers. DRIVE (Vargaftik et
al., 2021), QuIP (Chee et al., 2023) and QuaRot (Ashkboos et al., 2024) use the same transform.

The signs depend on (seed, absolute input column) only. Layers that take the same input, shards of one layer and rows of
a fused projection therefore share one rotated activation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

SCALE_BLOCK = 32  # columns that share one scale; the smallest rotation block
SIGN_WORD = 64  # columns whose signs are one number of SplitMix64
_MASK64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64's state


def padded_features(in_features: int) -> int:
    """``in_features`` rounded up to a multiple of 32, the number of columns that are stored."""
    return -(-in_features // SCALE_BLOCK) * SCALE_BLOCK


def rotation_block(in_features: int, group_size: int) -> int:
    """Columns one rotation mixes: the largest power of two, at most ``group_size``, that divides the padded columns.

    >>> rotation_block(3584, 128), rotation_block(576, 128), rotation_block(1000, 128), rotation_block(1, 128)
    (128, 64, 128, 32)
    """
    columns = padded_features(in_features)
    return min(group_size, columns & -columns)


def cached_constant(build: Callable[P, T]) -> Callable[P, T]:
    """Caches a function that makes constant tensors for a device, whatever mode its first caller happens to be in.

    Inference mode, a default device or autocast must not leave their mark on a tensor that outlives them. Under a dispatch
    mode (fake tensors while a model is exported) nothing is cached: what is built there belongs to that mode.
    """

    @functools.lru_cache(maxsize=256)
    def cached(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return build(*args, **kwargs)

    @functools.wraps(build)
    def constant(*args: P.args, **kwargs: P.kwargs) -> T:
        # Not PyTorch's is_in_torch_dispatch_mode: it is one for all threads, and any that leaves a mode resets it.
        if torch._C._len_torch_dispatch_stack():
            with torch.device("cpu"):
                return build(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]  # bits, seeds, devices and dtypes are hashable

    return constant


def sign_word(seed: int, index: int) -> int:
    """The ``index``-th output of SplitMix64 (Steele, Lea, Flood 2014) started at ``seed``: 64 signs."""
    z = (seed + (index + 1) * _STEP) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def seed_from_column(seed: int, column: int) -> int:
    """The seed whose signs of columns 0, 1, ... are those that ``seed`` has from ``column`` on, a multiple of 64: a range of
    columns is rotated as a matrix of its own. SplitMix64's state is a sum, so it can start anywhere. In the range of int64,
    for ops.

    >>> signs(7, 192)[128:].equal(signs(seed_from_column(7, 128), 64))
    True
    """
    assert column % SIGN_WORD == 0, column
    state = (seed + column // SIGN_WORD * _STEP) & _MASK64
    return state - (1 << 64) if state >> 63 else state


@cached_constant
def _signs(seed: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    words = (sign_word(seed, i) for i in range(-(-columns // SIGN_WORD)))
    values = [-1.0 if (word >> bit) & 1 else 1.0 for word in words for bit in range(SIGN_WORD)]
    return torch.tensor(values[:columns], dtype=dtype).to(device)


def signs(seed: int, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs [columns], +1 or -1: bit ``j % 64`` of word ``j // 64`` set means column ``j`` is negated."""
    return _signs(seed, columns, torch.device(device), dtype)


@cached_constant
def _hadamard(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix * block**-0.5).to(device=device, dtype=dtype)


def hadamard(block: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Sylvester's Hadamard matrix [block, block] divided by sqrt(block): orthogonal and symmetric."""
    return _hadamard(block, torch.device(device), dtype)


def keeps_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keeps autocast, which would round float32 operands of a matrix product, out of a function of tensors."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        x = args[0]
        assert isinstance(x, Tensor)
        if not is_autocast_enabled(x):
            return function(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return guarded


def is_autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; devices without autocast (meta) say no."""
    # torch.amp.is_autocast_available would say it, but torch.compile of PyTorch 2.11 cannot trace it.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


@keeps_precision
def rotate(x: Tensor, block: int, seed: int) -> Tensor:
    """Rotates the last dimension, a multiple of ``block``, of a floating-point tensor; same shape and dtype."""
    flipped = x * signs(seed, x.shape[-1], x.device, x.dtype)
    return _blockwise(flipped, block)


@keeps_precision
def unrotate(x: Tensor, block: int, seed: int) -> Tensor:
    """Inverse of :func:`rotate`."""
    return _blockwise(x, block) * signs(seed, x.shape[-1], x.device, x.dtype)


def _blockwise(x: Tensor, block: int) -> Tensor:
    # A matrix product with +-1/sqrt(b): BLAS beats a butterfly of torch calls by far at b <= 128.
    blocks = x.reshape(-1, block)
    return torch.matmul(blocks, hadamard(block, x.device, x.dtype)).view(x.shape)


def pad_columns(x: Tensor, columns: int) -> Tensor:
    """Appends zero columns until the last dimension is ``columns``."""
    missing = columns - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
