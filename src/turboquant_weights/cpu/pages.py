"""Huge pages for planes, once per layer.

With pages of 4 KB a core that reads a large plane spends a part of its time on finding out where the next page lies. Linux
collapses memory that is in use into pages of 2 MB, at the same addresses, when it is asked to (6.1 and later). Only whole
huge pages inside of a plane are asked for, so that no memory is added; none where the system's administrator has ruled huge
pages out; and none after a fork, in the parent or the child, where collapsing would copy what they share. What the kernel
refuses stays as it is: planes in a file that is mapped, for which it chooses pages itself, and planes anywhere but on Linux.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE = 25  # MADV_COLLAPSE
_LEAST = 2  # huge pages of a plane that are worth a call
_forked = threading.Event()  # in a child, too
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forked.set)


@functools.cache
def _kernel() -> tuple[int, Callable[[int, int, int], int]] | None:
    """Bytes of a huge page and ``madvise``; None: there are no huge pages."""
    try:
        if "[never]" in (SETTINGS / "enabled").read_text(encoding="ascii"):
            return None
        size = int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
        advise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):
        return None
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return size, advise


def ask(*planes: Tensor | None) -> None:
    """Asks for huge pages for planes on a CPU without gaps that are large enough for some. Cheap where they have them."""
    kernel = _kernel()
    if kernel is None or _forked.is_set():
        return
    size, advise = kernel
    for plane in planes:
        if plane is None:
            continue
        first, end = -(-plane.data_ptr() // size), (plane.data_ptr() + plane.nbytes) // size
        if end - first >= _LEAST:
            advise(first * size, (end - first) * size, _COLLAPSE)  # it may fail, and then nothing has changed
