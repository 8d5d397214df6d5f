"""Instructions that only NVIDIA GPUs have and no result depends on: kernels use them under a constexpr."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def launch_dependents():
    """Programmatic dependent launch (sm_90): lets the next kernel of the stream start its preamble."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_producer():
    """Its counterpart: waits until the kernels before this one have ended and their writes are visible."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch(address):
    """Starts to bring a cache line into L2. It reads no value, so it may run before :func:`wait_for_producer`: here for what
    a program reads last, when nothing is left to hide the way to memory. Any NVIDIA GPU has it."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
