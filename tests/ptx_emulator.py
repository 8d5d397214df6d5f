"""Just enough PTX to run this package's inline assembly on the CPU, one register at a time, inside Triton's interpreter."""

import ctypes
import re

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def _half(word):
    return np.ascontiguousarray(word).view(np.float16).astype(np.float64).reshape(*word.shape, 2)


def _word(pair):
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(pair.astype(np.float16)).view(np.uint32).reshape(pair.shape[:-1])


def _prmt(a, b, selector):
    pool = np.stack([(source >> (8 * i)) & 0xFF for source in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> (4 * i)) & 15
        byte = np.take_along_axis(pool, (pick & 7)[None].astype(np.int64), 0)[0]
        byte = np.where(pick & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * i)
    return out


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if (int(table.flat[0]) >> i) & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _bfloat(word):
    return np.stack([word << np.uint32(16), word & np.uint32(0xFFFF0000)], -1).view(np.float32).astype(np.float64)


def _bfloat_word(pair):
    """Rounds to nearest even by way of float32, which holds every product of two bfloat16 numbers."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(pair.astype(np.float32)).view(np.uint32).astype(np.uint64)
    bits = np.where(bits & 0x7F800000 == 0x7F800000, bits, bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return (bits[..., 0] | bits[..., 1] << 16).astype(np.uint32)


def _float(word):
    return word.view(np.float32)


class _Shared:
    """Static shared memory of the program that runs, as `cp.async` sees it: copies are there once they were waited for."""

    def __init__(self):
        self.data = np.zeros(0, np.uint8)
        self.groups = [[]]

    def allocate(self, size):
        self.data = np.full(size, 0xA5, np.uint8)
        self.groups = [[]]

    def send(self, place, address, count, live):
        for i in np.flatnonzero(live):
            self.data[int(place[i]) :][:count] = 0xA5  # who has not read what was there is late
            self.groups[-1].append((int(place[i]), ctypes.string_at(int(address[i]), count)))

    def wait(self, pending):
        """The last group is open."""
        keep = len(self.groups) - 1 - pending
        for group in self.groups[: max(keep, 0)]:
            for place, content in group:
                self.data[place : place + len(content)] = np.frombuffer(content, np.uint8)
        self.groups = self.groups[max(keep, 0) :]

    def load(self, address, count):
        return self.data[address[:, None].astype(np.int64) + np.arange(count)]


SHARED = _Shared()


def _copy(statement, registers):
    """Of the ring: ``@p cp.async.cg.shared.global [$1 + 16], [a + 0], 16``."""
    predicate, place, offset, address, more, count = re.fullmatch(
        r"@(\w+) cp\.async\.c[ag]\.shared\.global \[(\$\d+)(?: \+ (\d+))?\], \[(\$?\w+)(?: \+ (\d+))?\], (\d+)", statement
    ).groups()
    place, address = registers[place] + np.uint32(offset or 0), registers[address] + np.uint64(more or 0)
    SHARED.send(place, address, int(count), registers[predicate])


def _load(statement, registers):
    kind, targets, address = re.fullmatch(r"ld\.shared\.(v2\.b32|b32|u8) ([^\[]*), \[(\$?\w+)\]", statement).groups()
    targets = [target.strip() for target in targets.split(",")]
    width = 1 if kind == "u8" else 4
    data = SHARED.load(registers[address], width * len(targets))
    for i, target in enumerate(targets):
        part = np.ascontiguousarray(data[:, width * i : width * (i + 1)])
        registers[target] = part.view(np.uint8 if width == 1 else np.uint32)[:, 0].astype(np.uint32)


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "mul.lo": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "bfe": lambda a, start, length: (a >> start) & ((np.uint32(1) << length) - np.uint32(1)),
    "lop3": _lop3,
    "shf.r.wrap": lambda low, high, shift: ((low | high.astype(np.uint64) << 32) >> (shift & 31)).astype(np.uint32),
    "shfl.sync.up": lambda a, by, clamp, mask: np.where(np.arange(len(a)) % 32 < by, a, np.roll(a, int(by[0]))),
    "shfl.sync.bfly": lambda a, mask, clamp, members: a[np.arange(len(a)) ^ mask],
    "add.s64": lambda a, b: a + b,
    "setp.eq": lambda a, b: a == b,
    "setp.gt.s32": lambda a, b: a.astype(np.int32) > b.astype(np.int32),
    "selp": lambda a, b, predicate: np.where(predicate, a, b),
    "prmt": _prmt,
    "add.rn.f16x2": lambda a, b: _word(_half(a) + _half(b)),
    "mul.rn.f16x2": lambda a, b: _word(_half(a) * _half(b)),
    "fma.rn.f16x2": lambda a, b, c: _word(_half(a) * _half(b) + _half(c)),  # exact in double precision, rounded once
    "fma.rn.bf16x2": lambda a, b, c: _bfloat_word(_bfloat(a) * _bfloat(b) + _bfloat(c)),  # c is -0 here
    "mul.rn.f32": lambda a, b: (_float(a) * _float(b)).view(np.uint32),
    "cvt.f32.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
    "cvt.rn.bf16x2.f32": lambda high, low: _bfloat_word(np.stack([_float(low), _float(high)], -1)),
}

NUMPY_TYPES = {tl.float16: np.float16, tl.float32: np.float32, tl.uint8: np.uint8, tl.int8: np.int8, tl.int32: np.int32}


def run(assembly: str, results: int, operands: list[np.ndarray], shared: np.ndarray | None = None) -> list[np.ndarray]:
    """Executes ``assembly`` with uint32 ``operands`` as $results, ...; returns $0 .. $results-1. ``shared``: the words of
    shared memory."""
    registers = {f"${results + i}": operand for i, operand in enumerate(operands)}
    lanes = operands[0].size if operands else 1
    registers["%laneid"] = (np.arange(lanes) % 32).astype(np.uint32)
    text = re.sub(r"//[^\n]*|[{}]", "", assembly)
    for statement in text.split(";"):
        words = statement.strip().replace(",", " ").split()
        if not words or words[0] == ".reg" or words[0].startswith("prefetch"):
            continue
        if words[0] == "mov.b32" and len(words) == 4:  # {low, high}, pair
            registers[words[1]], registers[words[2]] = registers[words[3]] & 0xFFFF, registers[words[3]] >> 16
            continue
        if words[0] == ".shared":
            name, size = re.search(r"(\w+)\[(\d+)\]", statement).groups()
            SHARED.allocate(int(size))
            registers[name] = np.zeros(1, np.uint32)
            continue
        if words[0] == "@p":
            _copy(statement.strip(), registers)
            continue
        if words[0] == "cp.async.commit_group":
            SHARED.groups.append([])
            continue
        if words[0] == "cp.async.wait_group":
            SHARED.wait(int(words[1]))
            continue
        if words[0] == "bar.warp.sync":
            continue
        if words[0].startswith("ld.shared") and shared is None:
            _load(statement.strip(), registers)
            continue
        if words[0].startswith(("ld.shared.b32", "st.shared.v4.b32")):
            shared = SHARED.data.view(np.uint32) if shared is None else shared
            address, offset = re.search(r"\[(\w+)(?: \+ (\d+))?\]", statement).groups()
            at = (registers[address] + np.uint32(offset or 0)) // 4
            if words[0].startswith("ld"):
                registers[words[1]] = shared[at]
            else:
                for i, word in enumerate(words[-4:]):
                    shared[at + i] = registers[word]
            continue
        name = next(known for known in OPERATIONS if words[0].startswith(known))
        arguments = [registers[w] if w in registers else np.full(lanes, int(w, 0), np.uint32) for w in words[2:]]
        registers[words[1]] = OPERATIONS[name](*arguments)
    return [registers[f"${i}"] for i in range(results)]


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, **_):
    """Stands in for ``tl.inline_asm_elementwise`` in the interpreter."""
    asm, constraints = (getattr(value, "value", value) for value in (asm, constraints))
    shape = next((a.handle.data.shape for a in args if isinstance(a, tl.tensor) and a.handle.data.size > 1), ())
    operands = []
    kinds = [kind for kind in constraints.split(",") if "=" not in kind]
    for argument in args:
        data = np.asarray(argument.handle.data if isinstance(argument, tl.tensor) else argument)
        data = np.broadcast_to(data, shape) if shape else data
        data = np.ascontiguousarray(data).reshape(-1)
        if data.dtype.itemsize == 1:
            operands.append(data.view(np.uint32))
        elif kinds[len(operands)] == "l":
            operands.append(data.astype(np.int64).view(np.uint64))
        else:
            words = data.astype(np.int64).astype(np.uint32).reshape(-1, pack)
            operands += [words[:, i] for i in range(pack)]
    results = constraints.count("=")
    registers = run(asm, results, operands)
    types = dtype if isinstance(dtype, tuple) else (dtype,)
    outs = []
    for i, element in enumerate(types):
        mine = np.stack(registers[i * results // len(types) : (i + 1) * results // len(types)], -1)
        numpy_type = NUMPY_TYPES[element]
        data = np.ascontiguousarray(mine).view(numpy_type).reshape(shape if shape else (1,))
        kind = tl.block_type(element, list(shape)) if shape else element
        outs.append(tl.tensor(interpreter.TensorHandle(data, element), kind))
    return tuple(outs) if isinstance(dtype, tuple) else outs[0]
