"""Compiles the kernels for one GPU architecture without having it: ``python compile_kernels.py 90``. Not a test by itself.

Triton's interpreter must be off, so test_kernels.py runs it as a process of its own.
"""

import json
import re
import subprocess
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turboquant_weights.kernels import (
    decode,
    dequantize,
    feedback,
    few,
    integer,
    prefill,
    ring,
    rotate,
    rotating,
    slices,
    splitk,
)
from turboquant_weights.kernels.schedule import _ROTATION_BYTES, StreamK, bytes_tile, streamk_stages

POINTERS = dict(
    x="*fp16", token_scale="*fp32", codes="*u8", residual="*u8", scales="*u8", exponents="*i8", bias="*bf16", levels="*fp32",
    out="*bf16", partial="*fp32", counters="*i32", sign="*bf16", matrix="*bf16",
)  # fmt: skip
LARGE = 1 << 30  # weights of a layer
PAIRS = ((2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4), (3, 3))
DIVISIBLE = ("x_stride", "code_stride", "out_stride", "columns")


def build(kernel, capability, warps, pointers=POINTERS, floats=("norm",), stages=1, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else "fp32" if name in floats else "i32" for name in names}
    signature |= {name: kind for name, kind in pointers.items() if name in names}
    aligned = [i for i, name in enumerate(names) if name in DIVISIBLE or signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )


def build_streamk(block_m, groups, bits, residual_bits):
    from triton.experimental.gluon._runtime import GluonASTSource

    from turboquant_weights.kernels import streamk

    def operand(kind, block):
        return f"tensordesc<{kind}{block[0]},{block[1]!r}>"

    plane, rest = (streamk.plane_block(block_m, groups, words) for words in (bits, residual_bits or bits))
    kinds = POINTERS | dict(x=operand("fp16", streamk.x_block(block_m)), codes=operand("i32", plane), levels="*i32")
    kinds["residual"] = operand("i32", rest)
    schedule = StreamK(block_m, groups, streamk_stages(block_m, groups, LARGE, bits, residual_bits))
    tile = dict(zip(("BLOCK_M", "GROUPS", "STAGES"), schedule, strict=True))
    looks_up = schedule.looks_up(LARGE, bits, residual_bits)
    constants = dict(tile, BITS=bits, RESIDUAL_BITS=residual_bits, HAS_BIAS=True, LOOKUP=looks_up, PDL=True)
    names = streamk.streamk_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "rows"]
    source = GluonASTSource(
        streamk.streamk_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = dict(num_warps=4, maxnreg=streamk.registers(block_m, groups))
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options), looks_up


def check_streamk() -> None:
    tiles = ((32, 2, 4, 1), (64, 2, 4, 2), (128, 2, 4, 0), (128, 3, 4, 4), (256, 2, 4, 4))
    for tile in (*tiles, (64, 2, 2, 0), (64, 2, 3, 0), (128, 3, 4, 3), (256, 2, 3, 3), (16, 2, 2, 1)):
        kernel, looks_up = build_streamk(*tile)
        assert looks_up == (tile != (16, 2, 2, 1) and (tile[0] <= 64 or (tile[0] == 128 and tile[3] == 4)))
        assert not looks_up or kernel.metadata.shared > 48 << 10  # or Triton leaves the driver's limit where it is
        beside = _ROTATION_BYTES if tile[0] <= 32 or (tile[0] == 64 and not tile[3]) else 0  # two steps have precedence
        assert kernel.metadata.shared + decode.TABLE_BYTES * looks_up + beside <= 227 << 10
        # ptxas says, and nobody sees it, if it has every product of a warp group wait for the one before.
        command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", "-o", "/dev/null", "-"]
        said = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True)
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "serialized" not in said.stderr + said.stdout, said.stderr


def check_prefill(capability: int, pdl: bool) -> None:
    pointers = POINTERS | dict(x="*bf16", out="*i8", row_scale="*fp32")
    for bits, residual_bits in ((4, 0), (3, 0), (4, 2)):
        planes = dict(BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decode.assembly(bits, residual_bits))
        options = dict(GROUPS=128, ROWS=prefill.WEIGHT_ROWS, UNITS=4, PDL=pdl)
        build(prefill.round_weights_kernel, capability, 4, pointers, ("largest",), **planes, **options)
    for tiles, chunks, warps in ((32, 1, 8), (64, 3, 16)):
        options = dict(TILES=tiles, TOGETHER=64 // tiles, CHUNKS=chunks, PDL=pdl)
        build(prefill.rotate_round_kernel, capability, warps, pointers, **options)
    block_m, block_n, block_k, warps, stages = bytes_tile(2048, 8192, 132 if capability == 90 else 0)
    operands = dict(x=f"tensordesc<i8[{block_m}, {block_k}]>", weight=f"tensordesc<i8[{block_n}, {block_k}]>", out="*bf16")
    options = dict(HAS_BIAS=True, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k)
    kernel = build(prefill.multiply_bytes_kernel, capability, warps, pointers | operands, stages=stages, **options)
    assert "wgmma.mma_async" in kernel.asm["ptx"] if pdl else "mma.sync" in kernel.asm["ptx"]
    assert "s32.s8.s8" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= (227 if capability == 90 else 99) << 10


def way(bits: int, rows: int, warps: int) -> dict[str, object]:
    strings = ring.ring(bits, rows, warps, 2)
    return dict(AHEAD=2, ALLOCATION=strings.allocation, COPYING=strings.copying, WAITING=strings.waiting)


def bases(layout: str, shape: list[int]) -> dict[str, list[list[int]]]:
    """Of a linear layout, or of a blocked one as a linear one: where each bit of a register, lane or warp leads."""
    names = ("register", "lane", "warp")
    if "linear" in layout:
        return {name: json.loads(re.search(rf"{name} = (\[[\[\], \d]*\])", layout)[1]) for name in names}
    sizes = [json.loads(numbers) for numbers in re.findall(r"\[[^\]]*\]", layout)]  # per thread, of threads, of warps, order
    done, found = [1] * len(shape), {}
    for name, size in zip(names, sizes, strict=False):
        found[name] = []
        for dim in sizes[3]:
            for bit in range(size[dim].bit_length() - 1):
                base = [0] * len(shape)
                base[dim] = done[dim] << bit
                found[name].append(base if base[dim] < shape[dim] else [0] * len(shape))
            done[dim] *= size[dim]
    return found


def check_ring(kernel: Any, warps: int) -> None:
    ttgir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    # Nothing but layouts says that a warp reads what it copied itself, which nobody else waits for.
    touching = re.findall(r"(cp\.async\.c|ld\.shared\.\w+).*-> tensor<([\dx]+)xi32, (#\w+)>", ttgir)
    assert {what for what, _, _ in touching} > {"cp.async.c"}
    for what, sizes, name in touching:
        shape = [int(size) for size in sizes.split("x")]
        words = shape[-1] // (32 * warps) if len(shape) == 2 else 1

        def owner(place: list[int], words: int = words) -> int:
            return place[-1] // (32 * words) % warps

        found = bases(layouts[name], shape)
        assert [owner(place) for place in found["warp"]] == [1 << i for i in range(len(found["warp"]))], (
            what,
            layouts[name],
        )
        assert not any(owner(place) for place in found["lane"] + found["register"]), (what, layouts[name])
        if what == "ld.shared.v2":  # the second word is in the register after the first one
            assert found["register"][0] == [0, 1], layouts[name]
    # In a turn: wait, for the whole warp, then copy into the place that it has read before, then read.
    turn = ptx.index("cp.async.wait_group 1; bar.warp.sync 0xffffffff;")
    assert ptx.count("cp.async.wait_group") == 1
    assert ptx.index("ld.shared.", turn) > ptx.index("cp.async.commit_group", turn)
    assert turn < ptx.index("ld.shared.")


def check_few(capability: int, pdl: bool) -> None:
    for bits, rows in ((4, 16), (4, 32), (3, 16), (2, 32)):
        options = dict(BITS=bits, ROWS=rows, WARPS=2, REDUCE=True, HAS_BIAS=True, PDL=pdl)
        kernel = build(few.few_kernel, capability, 2, **options, **way(bits, rows, 2))
        assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in kernel.asm["ptx"]
        assert "ttg.local_" not in kernel.asm["ttgir"]  # every thread decodes what it copied
        assert kernel.metadata.shared <= 4096
        check_ring(kernel, 2)
        # As above: no byte is taken out of its word.
        assert kernel.asm["ptx"].count("prmt.b32") == {2: 24, 3: 16, 4: 32}[bits] * rows // 16
    pointers = POINTERS | dict(x="*bf16", out="*fp16")
    build(few.rotate_few_kernel, capability, 4, pointers, TILES=few.FEW_TILES, PDL=pdl)


def main(capability: int) -> None:
    if capability == 90:
        check_streamk()
    pdl = capability >= 90
    common = dict(REDUCE=True, HAS_BIAS=True, PDL=pdl)
    portable = dict(BITS=3, RESIDUAL_BITS=2, ASSEMBLY="")
    build(splitk.splitk_kernel, capability, 4, **portable, BLOCK_M=16, BLOCK_N=64, STAGES=1, TAIL=True, **common)
    build(dequantize.dequantize_kernel, capability, 4, **portable, PDL=pdl)
    # 89 compiles the sources of 80: some pairs show that its assembler takes them.
    for bits, residual_bits in ((3, 0), (4, 2)) if capability == 89 else PAIRS:
        planes = dict(BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decode.assembly(bits, residual_bits))
        tails = (True, False) if (bits, residual_bits) in ((3, 0), (4, 0), (4, 4)) else (True,)  # they show the rest
        for tail in tails:
            tile = dict(BLOCK_M=16, BLOCK_N=64, STAGES=1 if tail else 3, TAIL=tail)
            kernel = build(splitk.splitk_kernel, capability, 4, **planes, **tile, **common)
            assert ("wgmma" if pdl else "mma.sync") in kernel.asm["ptx"]
        few = dict(planes, ROWS=16, WARPS=4, TAIL=True)
        for words in (0, 1, 2) if (bits, residual_bits) in ((4, 0), (4, 4), (3, 2)) else (0,):
            decoder = decode.lookup_assembly(bits, residual_bits, words) if words else planes["ASSEMBLY"]
            options = few | dict(ASSEMBLY=decoder, LOOKUP=words > 0)
            kernel = build(slices.slices_kernel, capability, 4, POINTERS | dict(levels="*i32"), **options, **common)
            assert "mma.sync" in kernel.asm["ptx"]
            assert "ttg.local_load" not in kernel.asm["ttgir"]  # every thread loads what it decodes
            assert kernel.metadata.shared <= 4096  # and nothing but sums crosses shared memory
        one = dict(few, PDL=pdl)
        raw = POINTERS | dict(x="*bf16", experts="*i64")
        for function, options in ((rotating.rotating_kernel, dict(HAS_BIAS=True)), (rotating.routed_kernel, {})):
            for tail in tails:
                kernel = build(function, capability, 4, raw, **(one | options | dict(TAIL=tail)))
                assert "ttg.local_" not in kernel.asm["ttgir"]  # what is rotated stays in its thread
                assert kernel.metadata.shared <= 4096
        words = dict(planes, ASSEMBLY=decode.bfloat_assembly(bits, residual_bits), UNITS=4, PDL=pdl)
        kernel = build(dequantize.dequantize_words_kernel, capability, 8, **words)
        assert "ttg.local_" not in kernel.asm["ttgir"]  # a thread writes what it has read
        build(dequantize.dequantize_kernel, capability, 4, **planes, PDL=pdl)
    for bits, tail in ((4, True), (4, False), (3, True), (2, True)):
        options = dict(BITS=bits, ROWS=16, WARPS=2, TAIL=tail, REDUCE=True, HAS_BIAS=True, PDL=pdl)
        kernel = build(integer.integer_kernel, capability, 2, **options, **way(bits, 16, 2))
        assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in kernel.asm["ptx"]
        assert "ttg.local_" not in kernel.asm["ttgir"]  # every thread decodes what it copied
        assert kernel.metadata.shared <= 4096
        check_ring(kernel, 2)
        # A tile of eight words, four lookups each: no byte is taken out of its word. Two bits are widened by one more.
        assert kernel.asm["ptx"].count("prmt.b32") == (40 if bits == 2 else 32)
    check_few(capability, pdl)
    activations = POINTERS | dict(x="*bf16")
    build(integer.rotate_bytes_kernel, capability, 4, activations | dict(out="*fp16"), TILES=16, PDL=pdl)
    build(rotate.rotate_scaled_kernel, capability, 8, activations | dict(out="*fp16"), TILES=16, CHUNK=4096, PDL=pdl)
    build(rotate.rotate_kernel, capability, 4, activations, TILES=64, INVERSE=True, PDL=pdl)
    check_prefill(capability, pdl)
    floats = dict.fromkeys(("block", "scale", "factor", "boundaries", "levels", "errors", "losses"), "*fp32")
    for log_levels in (2, 4, 8):
        build(feedback.feed_back_kernel, capability, 4, floats | dict(codes="*u8"), LOG_LEVELS=log_levels, ROWS=32)


main(int(sys.argv[1]))
