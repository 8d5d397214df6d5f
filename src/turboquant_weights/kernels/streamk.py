"""The fused matmul of large layers on sm_90, mostly for more than a few tokens: one program per multiprocessor, warps with
roles.

One warp has the copy engine bring activations and planes into a ring of buffers in shared memory, another one copies the
scales; two or three warp groups decode 64 rows each into registers, the left operand of the tensor cores, and share the
activations. Shared memory is the only thing between them: nobody waits for the other, except for full and free buffers.

Decoding and multiplying take turns inside a warp group, so a product of 64 columns is on its way while the next 64 are
decoded. No product may be on its way across a branch: ptxas would give its registers to no other role, run out of them,
and serialize all products (test_kernels_compile_for_every_supported_gpu listens for it).

Shapes in shared memory are powers of two. Of a plane of 3 bits the copy engine brings 16 words for each row and tile, the
last four of which are the next tile's, and threads hand one another what they have read of the others' 12 words.

The steps (of 128 or 256 columns) of all tiles are numbered, and each program takes an equal share, whatever tiles it cuts
(stream-K). Who arrives last at a tile adds the shares in the order of the programs: results do not depend on timing.

Gluon, because Triton can express neither roles nor products that are waited for later. It is experimental, and
``linear.py`` uses this module with a known version of Triton only.
"""

# Triton's tuples may be of any length:
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .decode import (
    FILL_TABLE,
    LOOKUP_STRIDES,
    LOOKUP_TABLE,
    THREES,
    assembly,
    decode_looked_up,
    decode_wide,
    lookup_assembly,
    power_of_two,
    register,
    scale_pairs,
    tables,
    widen_3,
    widen_codes,
    widen_residual,
)
from .nvidia import launch_dependents, wait_for_producer

# Strings cannot be handed to the parts of a warp-specialized kernel.
_ASSEMBLIES, _LOOKUPS = (
    gl.constexpr(tuple(make(bits, residual_bits) for bits in (2, 3, 4) for residual_bits in range(5)))
    for make in (assembly, lookup_assembly)
)


def realigning(up: int, mask: str) -> str:
    """PTX: words 4t to 4t + 3 in $4 to $7 of lane $8 = 4g + t -> the 32 columns of the words 3t to 3t + 2 of its four lanes,
    as ``decode.widen_3`` widens them, in $0 to $3."""
    # Of the words u1, u2, u3 from the lane before and $4, $5, $6 thread t wants three, from the place 3 - t on.
    late = ("u1", "u2", "u3", "$4")
    early = ("u3", "$4", "$5", "$6")
    lines = ["{ .reg .b32 u1, u2, u3, x0, x1, x2, x3, y0, y1, y2, v, w; .reg .pred low, even;"]
    lines += [f"shfl.sync.up.b32 u{i}, ${4 + i}, 1, 0, 0xffffffff;" for i in (1, 2, 3)]
    lines.append("and.b32 v, $8, 2; setp.eq.u32 low, v, 0; and.b32 w, $8, 1; setp.eq.u32 even, w, 0;")
    lines += [f"selp.b32 x{i}, {early[i]}, {late[i]}, low;" for i in range(4)]
    lines += [f"selp.b32 y{i}, x{i + 1}, x{i}, even;" for i in range(3)]
    return " ".join([*lines, widen_3("y0", "y1", "y2", up, mask), "}"])


_CODES_3, _CLEAN_CODES_3, _RESIDUAL_3 = (gl.constexpr(realigning(*three)) for three in THREES)
_G0, _G1, _G2 = (gl.constexpr(group) for group in range(3))


def x_block(tokens: int) -> tuple[list[int], Any]:
    """Shape and layout in shared memory of one step's activations."""
    return [tokens, 128 * _tiles(tokens)], gl.NVMMASharedLayout(128, 16, 2)


def plane_block(tokens: int, groups: int, words: int) -> tuple[list[int], Any]:
    """Shape and layout in shared memory of a copy of a plane with ``words`` words per 32 columns."""
    width = _copy_width(words, _tiles(tokens))
    return [64 * groups // _boxes(groups), width], gl.NVMMASharedLayout(4 * width if width > 4 else 0, 32, 2)


def registers(tokens: int, groups: int) -> int | None:
    """Of a thread at the start, where fewer than fit: the rotation's programs then leave room for this kernel's."""
    return {2: 128 if tokens <= 128 else None, 3: 96 if tokens <= 64 else None}[groups]


@gluon.constexpr_function
def _consumer_registers(tokens, groups):
    """Of a thread that multiplies: what is left beside a warp group of producers."""
    if tokens > 128:
        return 232
    return {2: 168, 3: 112 if tokens <= 64 else 160}[groups]


@gluon.constexpr_function
def _producer_registers(tokens, groups):
    return 48 if tokens <= 64 or (groups == 2 and tokens <= 128) else 32


@gluon.constexpr_function
def _boxes(groups):
    """Copies per step and plane: shapes are powers of two."""
    return 1 if groups == 2 else groups


@gluon.constexpr_function
def _scale_rows(groups):
    return 128 if groups == 2 else 256


@gluon.constexpr_function
def _tiles(block_m):
    """Tiles of 128 columns per step, as in ``schedule.StreamK.step``."""
    return 2 if block_m <= 64 else 1


@gluon.constexpr_function
def _copies(words, tiles):
    """Per step and box: each tile of a plane with three words per 32 columns is one."""
    return tiles if words == 3 else 1


@gluon.constexpr_function
def _copy_width(words, tiles):
    return 16 if words == 3 else 4 * words * tiles


@gluon.constexpr_function
def _plane_layout(words, tiles):
    """A thread (warp, g, t) reads ``words`` words, the 32 columns of scale t, of the rows 16 * warp + 2 * g + (0, 1)."""
    registers = [*[[0, 1], [0, 2]][: words // 2], [1, 0], *[[0, 4 * words]][: tiles - 1]]
    lanes = [[0, words], [0, 2 * words], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, 4 * words * tiles])


@gluon.constexpr_function
def _part_layout(tokens):
    return gl.BlockedLayout([1, tokens // 8, 4], [32, 1, 1], [4, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _out_layout(tokens):
    registers = [[0, 1], [1, 0]] + [[token, 0] for token in (8, 16, 32, 64, 128) if token < tokens]
    lanes = [[2, 0], [4, 0], [0, 2], [0, 4], [0, 8]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16], [0, 32]], [], [tokens, 64])


@gluon.jit
def _fetch_plane(
    plane, ring, barrier, row, step, stage, BOX: gl.constexpr, BOXES: gl.constexpr, TILES: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    COPIES: gl.constexpr = _copies(WORDS, TILES)
    for i in gl.static_range(COPIES):
        column = (step * COPIES + i) * (4 * WORDS * TILES // COPIES)
        slot = ring.index((stage * COPIES + i) * BOXES + BOX)
        tma.async_copy_global_to_shared(plane, [row, column], barrier, slot)


@gluon.jit
def _fetch_planes(
    row_tile, step, stage, codes, residual, code_ring, rest_ring, full,
    GROUPS: gl.constexpr, TILES: gl.constexpr, BITS: gl.constexpr, RESIDUAL_BITS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    barrier = full.index(stage)
    mbarrier.expect(barrier, BYTES)
    BOXES: gl.constexpr = _boxes(GROUPS)
    for box in gl.static_range(BOXES):
        row = row_tile * (64 * GROUPS) + box * (64 * GROUPS // BOXES)
        _fetch_plane(codes, code_ring, barrier, row, step, stage, box, BOXES, TILES, BITS)
        if RESIDUAL_BITS > 0:
            _fetch_plane(residual, rest_ring, barrier, row, step, stage, box, BOXES, TILES, RESIDUAL_BITS)


@gluon.jit
def _fetch_tokens(token_tile, step, stage, x, x_ring, full, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    tma.async_copy_global_to_shared(x, [token_tile * BLOCK_M, step * (128 * TILES)], full.index(stage), x_ring.index(stage))


@gluon.jit
def _next(row_tile, token_tile, step, stage, phase, steps, token_tiles, STAGES: gl.constexpr):
    """Counters of the next step: a division in the loop takes a single warp longer than all the rest."""
    step += 1
    if step == steps:
        step = 0
        token_tile += 1
        if token_tile == token_tiles:
            token_tile = 0
            row_tile += 1
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return row_tile, token_tile, step, stage, phase


@gluon.jit
def _produce(
    x, codes, residual, x_ring, code_ring, rest_ring, full, empty, steps, token_tiles, first, last,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, RESIDUAL_BITS: gl.constexpr,
    BYTES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: keeps ``STAGES`` steps in flight. Planes do not depend on the rotation, so they do not wait for it."""
    TILES: gl.constexpr = _tiles(BLOCK_M)
    tile = first // steps
    step = first - tile * steps
    row_tile = tile // token_tiles
    token_tile = tile - row_tile * token_tiles
    stage = 0
    phase = 0
    filled = gl.minimum(first + STAGES, last)
    start = row_tile, token_tile, step
    for _ in range(first, filled):
        _fetch_planes(
            row_tile, step, stage, codes, residual, code_ring, rest_ring, full, GROUPS, TILES, BITS, RESIDUAL_BITS, BYTES
        )
        row_tile, token_tile, step, stage, phase = _next(
            row_tile, token_tile, step, stage, phase, steps, token_tiles, STAGES
        )
    if PDL:
        wait_for_producer()
        if BLOCK_M <= 64:
            launch_dependents()
    row_tile, token_tile, step = start
    stage = 0
    phase = 0
    for _ in range(first, filled):
        _fetch_tokens(token_tile, step, stage, x, x_ring, full, BLOCK_M, TILES)
        row_tile, token_tile, step, stage, phase = _next(
            row_tile, token_tile, step, stage, phase, steps, token_tiles, STAGES
        )
    stage = 0
    phase = 0
    for _ in range(filled, last):
        mbarrier.wait(empty.index(stage), phase)
        _fetch_planes(
            row_tile, step, stage, codes, residual, code_ring, rest_ring, full, GROUPS, TILES, BITS, RESIDUAL_BITS, BYTES
        )
        _fetch_tokens(token_tile, step, stage, x, x_ring, full, BLOCK_M, TILES)
        row_tile, token_tile, step, stage, phase = _next(
            row_tile, token_tile, step, stage, phase, steps, token_tiles, STAGES
        )


@gluon.jit
def _produce_scales(
    scales, scale_ring, full, empty, rows, steps, token_tiles, scale_stride, first, last,
    GROUPS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Another warp: rows of scales need not be multiples of 16 bytes, as the copy engine wants them."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ROWS: gl.constexpr = _scale_rows(GROUPS)
    tile = first // steps
    step = first - tile * steps
    row_tile = tile // token_tiles
    token_tile = tile - row_tile * token_tiles
    stage = 0
    phase = 1
    words = scales.to(gl.pointer_type(gl.int32))
    row = row_tile * (64 * GROUPS) + gl.arange(0, ROWS, LINE)
    inside = gl.minimum(row, rows - 1) * (scale_stride // 4)
    for _ in range(first, last):
        mbarrier.wait(empty.index(stage), phase)
        for i in gl.static_range(TILES):
            word = step * TILES + i
            async_copy.async_copy_global_to_shared(scale_ring.index(stage * TILES + i), words + word + inside)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        before = row_tile
        row_tile, token_tile, step, stage, phase = _next(
            row_tile, token_tile, step, stage, phase, steps, token_tiles, STAGES
        )
        if row_tile != before:
            row += 64 * GROUPS
            inside = gl.minimum(row, rows - 1) * (scale_stride // 4)


@gluon.jit
def _finish(
    acc, token_scale, exponents, bias, out, first_row, first_token, rows, tokens,
    TOKENS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """``reduction.finish`` for ``acc`` [64, TOKENS]. Its row ``16 * warp + 8 * b + g`` is row ``16 * warp + 2 * g + b``:
    a thread writes pairs."""
    acc = acc.reshape(4, 2, 8, TOKENS).permute(3, 0, 2, 1).reshape(TOKENS, 64)
    OUT: gl.constexpr = _out_layout(TOKENS)
    acc = gl.convert_layout(acc, OUT)
    row = first_row + gl.arange(0, 64, gl.SliceLayout(0, OUT))
    token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, OUT))
    exponent = gl.load(exponents + row, mask=row < rows, other=0).to(gl.int32) + 7
    low = exponent >> 1
    scale = gl.load(token_scale + token, mask=token < tokens, other=0.0)
    acc = acc * gl.expand_dims(power_of_two(low), 0) * gl.expand_dims(scale, 1)
    acc = acc * gl.expand_dims(power_of_two(exponent - low), 0)
    if HAS_BIAS:
        acc += gl.expand_dims(gl.load(bias + row, mask=row < rows, other=0.0).to(gl.float32), 0)
    address = gl.expand_dims(out + token.to(gl.int64) * rows, 1) + gl.expand_dims(row, 0)
    live = gl.expand_dims(row < rows, 0) & gl.expand_dims(token < tokens, 1)
    gl.store(address, acc.to(out.dtype.element_ty), mask=live)


@gluon.jit
def _inside(TOKENS: gl.constexpr):
    """Offsets in the memory of a partial sum [64, TOKENS]: 16 bytes per thread, next to each other."""
    LAYOUT: gl.constexpr = _part_layout(TOKENS)
    WIDE: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    thread = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(1, WIDE)), 1)
    block = gl.expand_dims(gl.arange(0, TOKENS // 8, gl.SliceLayout(0, WIDE)), 0)
    item = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.expand_dims(thread * 4 + block * 512, 2) + gl.expand_dims(gl.expand_dims(item, 0), 1)


@gluon.jit
def _store_part(part, acc, TOKENS: gl.constexpr):
    gl.store(part + _inside(TOKENS), _as_part(acc, TOKENS))


@gluon.jit
def _as_part(acc, TOKENS: gl.constexpr):
    # dims: warp, b, g, j, t, i -> thread, register
    acc = acc.reshape(4, 2, 8, TOKENS // 8, 4, 2).permute(0, 2, 4, 3, 1, 5).reshape(128, TOKENS // 8, 4)
    return gl.convert_layout(acc, _part_layout(TOKENS))


@gluon.jit
def _sum_parts(own, part, mine, count, stride, TOKENS: gl.constexpr):
    """The sum over the ``count`` programs of a tile, in their order. ``own`` is what program ``mine`` has in registers; the
    first one's share is in its second slot, the others' in their first."""
    inside = _inside(TOKENS)
    own = _as_part(own, TOKENS)
    total = gl.load(part + inside, mask=mine != 0, other=0.0, cache_modifier=".cg")
    total = gl.where(mine == 0, own, total)
    part += stride // 2
    if TOKENS <= 32:  # loads in flight together: registers
        for i in range(1, count, 4):
            a = gl.load(part + inside, mask=i != mine, other=0.0, cache_modifier=".cg")
            mask = (i + 1 != mine) & (i + 1 < count)
            b = gl.load(part + stride + inside, mask=mask, other=0.0, cache_modifier=".cg")
            mask = (i + 2 != mine) & (i + 2 < count)
            c = gl.load(part + 2 * stride + inside, mask=mask, other=0.0, cache_modifier=".cg")
            mask = (i + 3 != mine) & (i + 3 < count)
            d = gl.load(part + 3 * stride + inside, mask=mask, other=0.0, cache_modifier=".cg")
            total += gl.where(i == mine, own, a)
            total += gl.where(i + 1 == mine, own, b)
            total += gl.where(i + 2 == mine, own, c)
            total += gl.where(i + 3 == mine, own, d)
            part += 4 * stride
    else:
        for i in range(1, count):
            other = gl.load(part + inside, mask=i != mine, other=0.0, cache_modifier=".cg")
            total += gl.where(i == mine, own, other)
            part += stride
    return total.reshape(4, 8, 4, TOKENS // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, TOKENS)


@gluon.jit
def _halves(tensor, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The columns below and above the middle, which threads hold in different registers."""
    return gl.split(tensor.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))


@gluon.jit
def _word_halves(words):
    """Words [64, 4, 4] of a thread's 32 columns -> [64, 8] of the columns that come first and last in a dot product."""
    low, high = gl.split(words.reshape(64, 4, 2, 2).permute(0, 1, 3, 2))
    return low.reshape(64, 8), high.reshape(64, 8)


@gluon.jit
def _left(
    codes, refined, pairs, words,
    RESIDUAL_BITS: gl.constexpr, ASSEMBLY: gl.constexpr, LOOKUP: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Half a tile [64, 64], decoded, as a left operand."""
    if LOOKUP:
        weight = decode_looked_up(codes, refined, pairs, words, RESIDUAL_BITS, ASSEMBLY)
    else:
        weight = decode_wide(codes, refined, pairs, words, RESIDUAL_BITS, ASSEMBLY)
    # dims: warp, g, b, t, i0, p0, h, i1 -> rows (warp, b, g), columns (p0, h, i1, t, i0)
    weight = weight.reshape(4, 8, 2, 4, 2, 2, 2, 2).permute(0, 2, 1, 5, 6, 7, 3, 4).reshape(64, 64)
    return gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _end_tile(
    acc, tile, token_scale, exponents, bias, out, partial, counters, rows, tokens, steps, token_tiles, share,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, HAS_BIAS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Writes ``acc`` [64, BLOCK_M] out, or to memory, for the last of the programs that share the tile to add up."""
    row_tile = tile // token_tiles
    row = row_tile * (64 * GROUPS) + GROUP * 64
    token = (tile - row_tile * token_tiles) * BLOCK_M
    begin = (tile * steps) // share
    end = ((tile + 1) * steps - 1) // share
    # At most 64 tokens at a time: registers.
    CHUNK: gl.constexpr = BLOCK_M if BLOCK_M <= 64 else 64
    if BLOCK_M <= 64:
        chunks = (acc,)
    elif BLOCK_M == 128:
        chunks = _halves(acc, 64, 128)
    else:
        low, high = _halves(acc, 64, 256)
        chunks = _halves(low, 64, 128) + _halves(high, 64, 128)
    count = end - begin + 1
    done = count == 1
    mine = gl.program_id(0) - begin
    PART: gl.constexpr = 64 * BLOCK_M
    if not done:
        counter = counters + tile * GROUPS + GROUP
        arrived = 0
        if mine == 0:  # its share is its last work: the others may well have arrived, and nobody needs its sums
            arrived = gl.atomic_add(counter, 0, sem="acquire")
        if arrived != count - 1:
            slot = (gl.program_id(0) * 2 + (mine == 0).to(gl.int32)) * GROUPS + GROUP
            part = partial + slot.to(gl.int64) * PART
            for i in gl.static_range(BLOCK_M // CHUNK):
                _store_part(part + i * 64 * CHUNK, chunks[i], CHUNK)
            gl.thread_barrier()
            arrived = gl.atomic_add(counter, 1, sem="acq_rel")
        done = arrived == count - 1
    if done:
        slot = (begin * 2 + 1) * GROUPS + GROUP
        part = partial + slot.to(gl.int64) * PART
        for i in gl.static_range(BLOCK_M // CHUNK):
            chunk = chunks[i]
            if count > 1:
                total = _sum_parts(chunk, part + i * 64 * CHUNK, mine, count, 2 * GROUPS * PART, CHUNK)
                chunk = gl.convert_layout(total, chunk.type.layout)
            _finish(chunk, token_scale, exponents, bias, out, row, token + i * CHUNK, rows, tokens, CHUNK, HAS_BIAS)


@gluon.jit
def _part(ring, copy, GROUP: gl.constexpr, BOXES: gl.constexpr):
    """The rows of a warp group in a copy."""
    return ring.index(copy).slice(GROUP * 64, 64) if BOXES == 1 else ring.index(copy * BOXES + GROUP)


@gluon.jit
def _planes(ring, stage, WORDS: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr, BOXES: gl.constexpr):
    """A thread's words of each tile of a step; of a plane of 3 bits, a fourth of the 16 words that were copied."""
    if WORDS == 3:
        words = (_part(ring, stage * TILES, GROUP, BOXES).load(_plane_layout(4, 1)),)
        if TILES == 2:
            words += (_part(ring, stage * TILES + 1, GROUP, BOXES).load(_plane_layout(4, 1)),)
    else:
        both = _part(ring, stage, GROUP, BOXES).load(_plane_layout(WORDS, TILES))
        words = _halves(both, 64, 8 * WORDS) if TILES == 2 else (both,)
    return words


@gluon.jit
def _three_words(words, lane, ASSEMBLY: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASSEMBLY, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [words, lane], dtype=gl.int32, is_pure=True, pack=4
    )


@gluon.jit
def _codes(words, lane, BITS: gl.constexpr, CLEAN: gl.constexpr):
    """``decode.widen_codes`` of a tile, [64, 4, 4]."""
    if BITS == 3:
        words = _three_words(words, lane, _CLEAN_CODES_3 if CLEAN else _CODES_3)
    else:
        words = widen_codes(words, 64, 4, BITS, CLEAN)
    return words.reshape(64, 4, 4)


@gluon.jit
def _residual(words, lane, RESIDUAL_BITS: gl.constexpr):
    """``decode.widen_residual`` of a tile, [64, 4, 4]."""
    words = _three_words(words, lane, _RESIDUAL_3) if RESIDUAL_BITS == 3 else widen_residual(words, 64, 4, RESIDUAL_BITS)
    return words.reshape(64, 4, 4)


@gluon.jit
def _consume(
    x_ring, code_ring, rest_ring, scale_ring, full, empty, table,
    token_scale, exponents, bias, out, partial, counters,
    tokens, rows, steps, token_tiles, share, first, last,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, RESIDUAL_BITS: gl.constexpr,
    HAS_BIAS: gl.constexpr, LOOKUP: gl.constexpr, PDL: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows. While the tensor cores multiply 64 columns, the next 64 are decoded."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    CODES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [1, 0, 0]], [[0, 1, 0], [0, 2, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [64, 4, 4],
    )  # fmt: skip
    PAIRS: gl.constexpr = gl.SliceLayout(2, CODES)
    LINES: gl.constexpr = gl.SliceLayout(1, PAIRS)
    BOXES: gl.constexpr = _boxes(GROUPS)
    TILES: gl.constexpr = _tiles(BLOCK_M)
    ASSEMBLY: gl.constexpr = (_LOOKUPS if LOOKUP else _ASSEMBLIES)[5 * (BITS - 2) + RESIDUAL_BITS]
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    words = tables(BITS, RESIDUAL_BITS)
    if LOOKUP:
        words = (table + lane * 4, register(LOOKUP_STRIDES[RESIDUAL_BITS])) + words  # noqa: RUF005 Triton knows no stars
    pick = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, PAIRS)), 0)
    if PDL:
        wait_for_producer()
    stage = 0
    phase = 0
    for tile in range(first // steps, (last + steps - 1) // steps):
        acc = gl.zeros((64, BLOCK_M), gl.float32, MMA)
        begin = gl.maximum(first, tile * steps)
        for _ in range(begin, gl.minimum(last, (tile + 1) * steps)):
            mbarrier.wait(full.index(stage), phase)
            codes = _planes(code_ring, stage, BITS, TILES, GROUP, BOXES)
            rests = codes
            if RESIDUAL_BITS > 0:
                rests = _planes(rest_ring, stage, RESIDUAL_BITS, TILES, GROUP, BOXES)
            right = x_ring.index(stage).permute((1, 0))
            for i in gl.static_range(TILES):
                packed = _codes(codes[i], lane, BITS, RESIDUAL_BITS > 0)
                packed = gl.convert_layout(packed, CODES, assert_trivial=True)
                refined = packed
                if RESIDUAL_BITS > 0:
                    refined = _residual(rests[i], lane, RESIDUAL_BITS)
                    refined = gl.convert_layout(refined, CODES, assert_trivial=True)
                scale = scale_ring.index(stage * TILES + i).slice(GROUP * 64, 64).load(LINES)
                pairs = gl.expand_dims(scale_pairs(gl.expand_dims(scale, 1), pick), 2).broadcast_to(64, 4, 4)
                packed_halves = _word_halves(packed)
                refined_halves = _word_halves(refined)
                pair_halves = _word_halves(pairs)
                for half in gl.static_range(2):
                    weight = _left(
                        packed_halves[half], refined_halves[half], pair_halves[half], words,
                        RESIDUAL_BITS, ASSEMBLY, LOOKUP, MMA,
                    )  # fmt: skip
                    acc = warpgroup_mma(weight, right.slice(i * 128 + half * 64, 64), acc, is_async=True)
                    # One in flight, while the next is decoded; none when the block ends, or ptxas waits for each.
                    if i == TILES - 1 and half == 1:
                        acc = warpgroup_mma_wait(0, deps=[acc])
                    else:
                        acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        _end_tile(
            acc, tile, token_scale, exponents, bias, out, partial, counters, rows, tokens, steps, token_tiles, share,
            BLOCK_M, GROUPS, HAS_BIAS, GROUP,
        )  # fmt: skip
    if PDL and BLOCK_M > 64:
        launch_dependents()


@gluon.jit(do_not_specialize=["tokens", "scale_stride", "steps", "token_tiles", "share", "total"])
def streamk_kernel(
    x, token_scale, codes, residual, scales, exponents, bias, levels, out, partial, counters,
    tokens, rows, steps, token_tiles, scale_stride, share, total,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, RESIDUAL_BITS: gl.constexpr,
    HAS_BIAS: gl.constexpr, LOOKUP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    first = gl.program_id(0) * share
    last = gl.minimum(first + share, total)
    REGISTERS: gl.constexpr = _consumer_registers(BLOCK_M, GROUPS)
    FEW: gl.constexpr = _producer_registers(BLOCK_M, GROUPS)
    TILES: gl.constexpr = _tiles(BLOCK_M)
    CODE_WIDTH: gl.constexpr = _copy_width(BITS, TILES)
    REST_WIDTH: gl.constexpr = _copy_width(RESIDUAL_BITS, TILES)
    CODE_COPIES: gl.constexpr = _copies(BITS, TILES)
    REST_COPIES: gl.constexpr = _copies(RESIDUAL_BITS, TILES)
    PLANES: gl.constexpr = GROUPS * 64 * 4 * (CODE_WIDTH * CODE_COPIES + REST_WIDTH * REST_COPIES)
    BYTES: gl.constexpr = PLANES + TILES * BLOCK_M * 256
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BOXES: gl.constexpr = _boxes(GROUPS)
    ROWS: gl.constexpr = 64 * GROUPS // BOXES
    code_ring = gl.allocate_shared_memory(gl.int32, [STAGES * CODE_COPIES * BOXES, ROWS, CODE_WIDTH], codes.layout)
    rest_ring = code_ring
    if RESIDUAL_BITS > 0:
        rest_ring = gl.allocate_shared_memory(gl.int32, [STAGES * REST_COPIES * BOXES, ROWS, REST_WIDTH], residual.layout)
    x_ring = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_M, 128 * TILES], x.layout)
    scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES * TILES, _scale_rows(GROUPS)], ONE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=33)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    table = 0
    if LOOKUP:
        table = gl.inline_asm_elementwise(LOOKUP_TABLE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        row = gl.arange(0, 256, gl.BlockedLayout([2], [32], [4], [0]))
        arguments = [gl.load(levels + row), row, row // 2, table]
        gl.inline_asm_elementwise(FILL_TABLE, "=r,r,r,r,r", arguments, dtype=gl.int32, is_pure=False, pack=1)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    x_ring, code_ring, rest_ring, scale_ring, full, empty, table,
                    token_scale, exponents, bias, out, partial, counters,
                    tokens, rows, steps, token_tiles, share, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, HAS_BIAS, LOOKUP, PDL, _G0,
                )),
                (_consume, (
                    x_ring, code_ring, rest_ring, scale_ring, full, empty, table,
                    token_scale, exponents, bias, out, partial, counters,
                    tokens, rows, steps, token_tiles, share, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, HAS_BIAS, LOOKUP, PDL, _G1,
                )),
                (_produce, (
                    x, codes, residual, x_ring, code_ring, rest_ring, full, empty, steps, token_tiles, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, BYTES, PDL,
                )),
                (_produce_scales, (
                    scales, scale_ring, full, empty, rows, steps, token_tiles, scale_stride, first, last,
                    GROUPS, TILES, STAGES,
                )),
            ],
            [4, 1, 1], [REGISTERS, FEW, FEW],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    x_ring, code_ring, rest_ring, scale_ring, full, empty, table,
                    token_scale, exponents, bias, out, partial, counters,
                    tokens, rows, steps, token_tiles, share, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, HAS_BIAS, LOOKUP, PDL, _G0,
                )),
                (_consume, (
                    x_ring, code_ring, rest_ring, scale_ring, full, empty, table,
                    token_scale, exponents, bias, out, partial, counters,
                    tokens, rows, steps, token_tiles, share, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, HAS_BIAS, LOOKUP, PDL, _G1,
                )),
                (_consume, (
                    x_ring, code_ring, rest_ring, scale_ring, full, empty, table,
                    token_scale, exponents, bias, out, partial, counters,
                    tokens, rows, steps, token_tiles, share, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, HAS_BIAS, LOOKUP, PDL, _G2,
                )),
                (_produce, (
                    x, codes, residual, x_ring, code_ring, rest_ring, full, empty, steps, token_tiles, first, last,
                    BLOCK_M, GROUPS, STAGES, BITS, RESIDUAL_BITS, BYTES, PDL,
                )),
                (_produce_scales, (
                    scales, scale_ring, full, empty, rows, steps, token_tiles, scale_stride, first, last,
                    GROUPS, TILES, STAGES,
                )),
            ],
            [4, 4, 1, 1], [REGISTERS, REGISTERS, FEW, FEW],
        )  # fmt: skip
