"""Loads the compiled engine and declares its C functions."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from ctypes import c_int, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch

from ..errors import QuantizationError
from .build import FOLDER, LIBRARY

# Forces one engine, "reference" included; and float32 arithmetic for half precision too.
ENGINE_VARIABLE = "TURBOQUANT_WEIGHTS_CPU"
EXACT_VARIABLE = "TURBOQUANT_WEIGHTS_CPU_EXACT"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in engine.h


class Layer(ctypes.Structure):
    """``tq_layer`` of engine.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "residual", "scales", "exponents", "bias", "signs", "book")),
        *((name, c_int64) for name in ("rows", "blocks", "in_features")),
        *((name, c_int64) for name in ("codes_stride", "residual_stride", "scales_stride")),
        ("rotation", c_int32),
        ("bias_type", c_int32),
    )


class Call(ctypes.Structure):
    """``tq_call`` of engine.h."""

    _fields_ = (("layer", c_void_p), ("x_stride", c_int64), *((name, c_int32) for name in ("engine", "mode", "type")))


class Feedback(ctypes.Structure):
    """``tq_feedback`` of engine.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("block", "scale", "factor", "boundaries", "level", "codes", "errors", "losses")),
        ("rows", c_int64),
        ("candidates", c_int32),
        ("levels", c_int32),
    )


class Engine(NamedTuple):
    """One engine of the library that this processor can run."""

    number: int
    name: str
    step: int  # columns it decodes at a time
    has_integer: bool
    has_tiled: bool  # a bfloat16 product of many tokens


_FUNCTIONS = {  # name: result, arguments
    "tq_engine_name": (ctypes.c_char_p, (c_int,)),
    "tq_engine_available": (c_int, (c_int,)),
    "tq_engine_has_integer": (c_int, (c_int,)),
    "tq_engine_has_tiled": (c_int, (c_int,)),
    "tq_engine_step": (c_int, (c_int,)),
    "tq_codebook_size": (ctypes.c_size_t, ()),
    "tq_layer_size": (ctypes.c_size_t, ()),
    "tq_call_size": (ctypes.c_size_t, ()),
    "tq_feedback_size": (ctypes.c_size_t, ()),
    "tq_codebook_init": (None, (c_void_p, c_void_p, c_void_p, c_int, c_int)),
    "tq_set_parallel": (None, (c_void_p,)),
    "tq_linear": (c_int, (c_void_p, c_void_p, c_void_p, c_int64, c_int)),
    "tq_look_up": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int)),
    "tq_rotate": (c_int, (c_int, c_void_p, c_void_p, c_int64, c_int, c_int64, c_void_p, c_void_p, c_int)),
    "tq_feed_back": (None, (c_int, c_void_p, c_int)),
    "tq_decode_rows": (None, (c_int, c_void_p, c_int64, c_int64, c_void_p, c_int)),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C library with its functions declared; None, and one warning with the cure, if it was never built."""
    path = FOLDER / LIBRARY
    if not path.exists():
        warnings.warn(
            "The CPU engine of turboquant-weights is not built: on CPUs layers compute with the PyTorch reference, "
            "correct but many times slower. Install a C compiler (gcc or clang) and run "
            "`python -m turboquant_weights.cpu`, or install a wheel",
            stacklevel=2,
        )
        return None
    c = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    sizes = c.tq_layer_size(), c.tq_call_size(), c.tq_feedback_size()
    expected = tuple(map(ctypes.sizeof, (Layer, Call, Feedback)))
    assert sizes == expected, f"{path} does not belong to this version: build it again"
    _share_threads(c)
    return c


def _share_threads(c: ctypes.CDLL) -> None:
    """Lets the engine run on the threads of the OpenMP runtime that PyTorch has loaded; a second runtime would fight it."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        warnings.warn(
            "turboquant-weights found no OpenMP runtime with GOMP_parallel in this process (PyTorch's wheels bring one): "
            "its CPU engine computes with one thread",
            stacklevel=2,
        )
        return
    c.tq_set_parallel(ctypes.cast(parallel, c_void_p))
    # OpenMP's threads do not survive a fork, and waiting for them would last forever: a child computes with one thread.
    os.register_at_fork(after_in_child=lambda: c.tq_set_parallel(None))


@functools.cache
def engines() -> tuple[Engine, ...]:
    """What this processor can run, best first."""
    c = library()
    found = []
    index = 0
    while c is not None and (name := c.tq_engine_name(index)) is not None:
        if c.tq_engine_available(index):
            integer, tiled = bool(c.tq_engine_has_integer(index)), bool(c.tq_engine_has_tiled(index))
            found.append(Engine(index, name.decode(), c.tq_engine_step(index), integer, tiled))
        index += 1
    return tuple(found)


@functools.cache
def chosen() -> Engine | None:
    """The engine to use: the best one, or the one that the environment names. None: the reference."""
    wanted = os.environ.get(ENGINE_VARIABLE, "")
    if wanted == "reference":
        return None
    available = engines()
    if not wanted:
        return available[0] if available else None
    for engine in available:
        if engine.name == wanted:
            return engine
    names = [engine.name for engine in available]
    raise QuantizationError(
        f"{ENGINE_VARIABLE} is {wanted!r}: this machine has {', '.join([*names, 'reference'])}. Name one, or unset it"
    )


@functools.cache
def always_exact() -> bool:
    """Whether half precision computes in float32 as well."""
    value = os.environ.get(EXACT_VARIABLE, "0")
    if value not in ("0", "1"):
        raise QuantizationError(f"{EXACT_VARIABLE} is {value!r}: 0 or 1 is needed")
    return value == "1"
