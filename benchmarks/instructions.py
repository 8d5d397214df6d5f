"""Machine instructions per weight of the decoding loops for sm_90, and registers per thread, without a GPU.

    TRITON_INTERPRET=0 python benchmarks/instructions.py

All that is in the loop counts: loads, decoding, the matrix product, and for one token, unless integers are multiplied, the
rotation of the activation.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turboquant_weights.kernels import decode, few, integer, ring, rotating, slices, splitk

WIDTHS = ((2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4))
POINTERS = dict(
    x="*fp16", token_scale="*fp32", codes="*u8", residual="*u8", scales="*u8", exponents="*i8", bias="*bf16", levels="*fp32",
    out="*bf16", partial="*fp32", counters="*i32", sign="*bf16", matrix="*bf16",
)  # fmt: skip
# Kernel, its tile, and the weights that a thread decodes in a turn of its loop.
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "1 token, integers": (integer.integer_kernel, dict(ROWS=16, WARPS=2, AHEAD=2, REDUCE=True), 16 * 128 // 32),
    "2 to 4, integers": (few.few_kernel, dict(ROWS=16, WARPS=2, AHEAD=2, REDUCE=True), 16 * 128 // 32),
    "1 token": (rotating.rotating_kernel, dict(ROWS=16, WARPS=4), 2 * 16 * 128 // 32),
    "2 to 8": (slices.slices_kernel, dict(ROWS=16, WARPS=4, LOOKUP=0, REDUCE=True), 2 * 16 * 128 // 32),
    "2 to 8, half looked up": (slices.slices_kernel, dict(ROWS=16, WARPS=4, LOOKUP=1, REDUCE=True), 2 * 16 * 128 // 32),
    "2 to 8, looked up": (slices.slices_kernel, dict(ROWS=16, WARPS=4, LOOKUP=2, REDUCE=True), 2 * 16 * 128 // 32),
    "9 to 16": (splitk.splitk_kernel, dict(BLOCK_M=16, BLOCK_N=64, STAGES=1, REDUCE=True), 64 * 128 // 128),
}


def machine_code(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> tuple[list[str], int]:
    """Lines of machine code and labels, and registers of a thread."""
    names = kernel.arg_names
    warps = constants.get("WARPS", 4)
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: pointers.get(name, "fp32" if name == "norm" else "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in ("x_stride", "code_stride", "columns")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=1))
    tools = Path(triton.knobs.nvidia.ptxas.path).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        said = [
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        ]
    registers = re.search(r"REG:(\d+)", said[1])
    assert registers is not None
    return said[0].splitlines(), int(registers[1])


def longest_loop(lines: list[str]) -> int:
    """Instructions of the longest loop with a matrix product.

    >>> longest_loop([".L_x_1:", " LDG R1 ;", ".L_x_2:", " HMMA R2 ;", " @P0 BRA `(.L_x_1) ;", " HMMA R3 ;"])
    3
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    loops = [0]
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif ";" in line and not line.strip().startswith((".", "//")):
            code.append(line)
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels and any("MMA" in inner for inner in code[labels[back[1]] :]):
                loops.append(len(code) - labels[back[1]])
    return max(loops)


def main() -> None:
    print("| bits | " + " | ".join(f"{name}: instructions (registers)" for name in KERNELS) + " |")
    print("|---" * (1 + len(KERNELS)) + "|")
    for bits, residual_bits in WIDTHS:
        planes = dict(BITS=bits, RESIDUAL_BITS=residual_bits, ASSEMBLY=decode.assembly(bits, residual_bits))
        cells = [f"{bits}+{residual_bits}" if residual_bits else f"{bits}"]
        for name, (kernel, tile, weights) in KERNELS.items():
            if "integers" in name and residual_bits:
                cells.append("")
                continue
            pointers = POINTERS | dict(x="*bf16") if name == "1 token" else POINTERS
            options = tile | planes | dict(TAIL=False, HAS_BIAS=True, PDL=True)
            if looked_up := tile.get("LOOKUP"):
                pointers = POINTERS | dict(levels="*i32")
                options |= dict(ASSEMBLY=decode.lookup_assembly(bits, residual_bits, looked_up))
            if "integers" in name:
                way = ring.ring(bits, tile["ROWS"], tile["WARPS"], tile["AHEAD"])
                options |= dict(ALLOCATION=way.allocation, COPYING=way.copying, WAITING=way.waiting)
            lines, registers = machine_code(kernel, options, pointers)
            cells.append(f"{longest_loop(lines) / weights:.2f} ({registers})")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
