"""Triton kernels against the float64 oracle: at most twice the error of the eager computation in the same precision.

On a GPU the kernels are compiled; elsewhere Triton's interpreter runs them, with the inline assembly emulated.
"""

import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from format_oracle import dequantize, levels

from turboquant_weights import reference

pytest.importorskip("triton")

import triton.language as tl
import triton.runtime.interpreter as interpreter
from ptx_emulator import SHARED, inline_asm_elementwise, run

from turboquant_weights.errors import QuantizationError, ScheduleError
from turboquant_weights.kernels import decode, few, integer, schedule
from turboquant_weights.kernels import linear as kernels
from turboquant_weights.kernels.schedule import (
    Integer,
    Rotating,
    Rotation,
    Slices,
    SplitK,
    StreamK,
    choose,
    streamk_stages,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float16]
SIZES = [0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 129, 300] + ([2049] if CUDA else [])
COMBINATIONS = [(bits, residual) for bits in (2, 3, 4) for residual in range(5)]
USUAL = [(2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4)]  # what budgets give to layers and grades
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
needs_interpreter = pytest.mark.skipif(CUDA, reason="emulates the assembly that a GPU runs")


@pytest.fixture(autouse=True)
def _working_interpreter(monkeypatch):
    """Triton 3.6's interpreter calls int() on one-element arrays, which NumPy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What a kernel forgets to write is NaN, bytes of a workspace in half precision and in float32: never a lucky zero."""

    def poisoning(allocate):
        def poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(255 if out.dtype == torch.uint8 else 127)

        return poisoned

    with torch.device(
        "cpu"
    ):  # PyTorch notes at the first use, for ever, which functions obey a device context: the true ones
        torch.empty(0)
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))


@pytest.fixture
def assembly_on_cpu(monkeypatch):
    monkeypatch.setattr(tl, "inline_asm_elementwise", inline_asm_elementwise)
    monkeypatch.setattr(kernels, "_capability", lambda device: 80)


@functools.cache
def layer(n: int, k: int, bits: int, residual_bits: int, group_size: int = 128, seed: int = 0):
    """Quantized weight and its float64 matrix."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * torch.logspace(-3, 1, n)[:, None]
    packed = reference.quantize_weight(
        weight, bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed
    ).weight
    exact = dequantize(packed, k, bits, residual_bits, group_size, seed)
    return reference.PackedWeight(*(None if t is None else t.to(DEVICE) for t in packed)), exact.to(DEVICE)


def check(x, bias, n, k, bits, residual_bits, group_size=128, seed=0, function=kernels.linear):
    packed, exact = layer(n, k, bits, residual_bits, group_size, seed)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)
    want = x.double() @ exact.T + (0 if bias is None else bias.double())
    eager = reference.linear(x, packed, bias, k, **layout)
    got = function(x, packed, bias, k, **layout)
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    size = exact.norm(dim=1)  # rows of every magnitude count alike
    error, allowed = (((y.double() - want) / size).norm() for y in (got, eager))
    assert error <= 2 * allowed + 1e-6 * x.double().norm()
    if CUDA:  # the interpreter runs programs one after another, always in the same order
        assert torch.equal(got, function(x, packed, bias, k, **layout)), "not deterministic"


def inputs(m: int, n: int, k: int, dtype=torch.float16, bias=True):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(DEVICE, dtype)
    return x, torch.randn(n, generator=generator).to(DEVICE, dtype) if bias else None


def test_orders_of_columns_are_permutations():
    for column in (decode.physical_column, decode.paired_column, decode.slice_column):
        assert sorted(map(column, range(128))) == list(range(128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SIZES)
def test_any_number_of_tokens(m, dtype):
    check(*inputs(m, 67, 288, dtype, bias=m % 2 == 1), 67, 288, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
@pytest.mark.parametrize("m", [3, 300])
def test_every_pair_of_planes(m, bits, residual_bits, dtype):
    check(*inputs(m, 35, 160, dtype), 35, 160, bits, residual_bits)


@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 1, 128), (33, 31, 128), (64, 128, 32), (65, 100, 64), (130, 512, 128)]
)
@pytest.mark.parametrize("m", [2, 300])
def test_awkward_shapes(m, n, k, group_size):
    check(*inputs(m, n, k), n, k, 4, 0, group_size, seed=7)


@needs_interpreter
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
@pytest.mark.parametrize(("n", "k", "m"), [(67, 288, 5), (130, 384, 33), (40, 64, 300)])
def test_assembly_path(n, k, m, bits, residual_bits, assembly_on_cpu):
    check(*inputs(m, n, k), n, k, bits, residual_bits)


def nibbles(fields):
    """[8, count] -> words."""
    return sum(field << np.uint32(4 * i) for i, field in enumerate(fields)).astype(np.uint32)


def fields(words, bits):
    """Words [count] of each of several columns of words -> the fields [columns * 32 / bits, count] of the bit stream."""
    stream = np.stack([(word >> np.uint32(i)) & 1 for word in words for i in range(32)])
    return sum(stream[i::bits] << np.uint32(i) for i in range(bits)).astype(np.uint32)


@pytest.mark.parametrize("rows_of_a_thread", [1, 2, 4])
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
def test_a_table_in_shared_memory_has_every_word_32_times(bits, residual_bits, rows_of_a_thread):
    words = np.array(decode.lookup_words(bits, residual_bits)).astype(np.uint32)
    start = 128
    shared = np.zeros(start // 4 + decode.TABLE_BYTES // 4 + 32, np.uint32)
    row = np.arange(256, dtype=np.uint32)
    run(decode.FILL_TABLE.value, 1, [words, row, row // rows_of_a_thread, np.full_like(row, start)], shared)
    assert np.array_equal(shared[32:-32].reshape(256, 32), np.repeat(words[:, None], 32, 1))
    assert not shared[:32].any()
    assert not shared[-32:].any()


@needs_interpreter
@pytest.mark.parametrize("looked_up", [0, 1, 2])
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
def test_assembly_decodes_the_codebook_exactly(bits, residual_bits, looked_up):
    random = np.random.default_rng(0)
    above = 4 if residual_bits == 0 else bits  # without a residual anything may stand above a code
    words = [nibbles(random.integers(0, 2**above, (8, 4099), dtype=np.uint32)) for _ in range(2)]
    rests = [random.integers(0, 2**residual_bits, (8, 4099), dtype=np.uint32) for _ in range(2)]
    packed_rests = [nibbles(rest if residual_bits == 4 else 2 * rest) for rest in rests]
    operands = words + (packed_rests if residual_bits else []) + [np.full_like(words[0], 0x3C003C00)] * 2
    order: tuple[int, ...] = (0, 2, 1, 3, 4, 6, 5, 7)
    assembly, shared = decode.assembly(bits, residual_bits), None
    if looked_up:
        assembly = decode.lookup_assembly(bits, residual_bits, looked_up)
        order = order if residual_bits else tuple(range(8))
        lane = (np.arange(words[0].size) % 32).astype(np.uint32)
        own = np.array(decode.lookup_words(bits, residual_bits)).astype(np.uint32)
        shared = np.concatenate([np.full(32, 0xDEAD, np.uint32), np.repeat(own, 32)])
        operands += [128 + 4 * lane] * 2 + [np.full_like(lane, decode.lookup_stride(residual_bits))] * 2
    for table in (decode._HIGH.value,) if residual_bits else decode._base_tables(bits):
        operands += [np.full_like(words[0], table & 0xFFFFFFFF)] * 2
    registers = run(assembly, 8, operands, shared)
    table = np.array([float(level) for level in levels(bits, residual_bits)])
    halves = np.stack([r.view(np.float16).reshape(-1, 2)[:, i] for r in registers for i in (0, 1)]).astype(np.float64)
    for w in (0, 1):
        for position, weight in enumerate(order):
            code = (words[w] >> np.uint32(4 * weight)) & np.uint32(2**bits - 1)
            assert np.array_equal(halves[8 * w + position], table[code << np.uint32(residual_bits) | rests[w][weight]])


def check_widened(got, wanted, kind):
    """Nibbles of eight columns a word: codes with anything above them or, clean, with zeros; those of 3 bits with anything
    below them, those of 2 with zeros; or twice a residual."""
    mask, factor = {"loose": (7, 1), "clean": (15, 1), "top 3": (14, 2), "top 2": (15, 4), "twice": (15, 2)}[kind]
    for i, field in enumerate(wanted):
        nibble = (got[i // 8] >> np.uint32(4 * (i % 8))) & np.uint32(mask)
        assert np.array_equal(nibble, field * np.uint32(factor))


@needs_interpreter
@pytest.mark.parametrize(
    ("assembly", "bits", "kind"),
    [
        (decode._CODES_2, 2, "clean"),
        (decode._CODES_3, 3, "loose"),
        (decode._CLEAN_CODES_3, 3, "clean"),
        (decode._RESIDUAL_1, 1, "twice"),
        (decode._RESIDUAL_2, 2, "twice"),
        (decode._RESIDUAL_3, 3, "twice"),
        (integer._TOP_2, 2, "top 2"),
        (integer._TOP_3, 3, "top 3"),
    ],
)
def test_assembly_widens_a_plane_to_nibbles(assembly, bits, kind):
    count = 3 if bits == 3 else 1
    words = list(np.random.default_rng(0).integers(0, 2**32, (count, 4099), dtype=np.uint32))
    check_widened(run(assembly.value, 2 if bits == 2 else 4, words), fields(words, bits), kind)


@needs_interpreter
@pytest.mark.parametrize(("three", "kind"), zip(decode.THREES, ("loose", "clean", "twice"), strict=True))
def test_lanes_hand_one_another_the_words_of_a_plane_of_three_bits(three, kind):
    """As the copy engine brings them: 12 words of a row and tile, 4 of the next tile's, a fourth in each of four lanes."""
    streamk = pytest.importorskip("turboquant_weights.kernels.streamk")
    tiles = np.random.default_rng(0).integers(0, 2**32, (16, 16), dtype=np.uint32)  # of 64 lanes
    operands = [tiles.reshape(64, 4)[:, i].copy() for i in range(4)] + [np.arange(64, dtype=np.uint32) % 32] * 4
    mine = tiles[:, :12].reshape(64, 3)
    check_widened(run(streamk.realigning(*three), 4, operands), fields([mine[:, i].copy() for i in range(3)], 3), kind)


@needs_interpreter
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_assembly_decodes_the_codebook_exactly(bits):
    """Codes are at the top of a nibble, with anything below them."""
    random = np.random.default_rng(0)
    words = [random.integers(0, 2**32, 4099, dtype=np.uint32) for _ in range(4)]
    tables = [np.full_like(words[0], word & 0xFFFFFFFF) for word in integer.tables(bits) for _ in range(4)]
    registers = [r.view(np.int8).reshape(-1, 4) for r in run(integer.assembly(), 16, words + tables)]
    table = np.array([float(level) for level in levels(bits, 0)])
    for p, word in enumerate(words):
        for half in (0, 1):
            c = registers[4 * p + half].astype(int) + registers[4 * p + 2 + half]
            for i in range(4):
                code = ((word >> np.uint32(16 * half + 4 * i)) & 15) >> np.uint32(4 - bits)
                assert np.array_equal(c[:, i] + 0.5, table[code])


def test_assembly_results_share_no_register_with_operands():
    """Results are written before the last operand is read. The emulator cannot see that two of them share a register."""
    matmuls = decode._BASE_CONSTRAINTS, decode._NESTED_CONSTRAINTS, integer._CONSTRAINTS, few._SMALL_CONSTRAINTS
    lookups = decode._LOOKUP_BASE_CONSTRAINTS, decode._LOOKUP_NESTED_CONSTRAINTS
    for constraints in (*matmuls, *lookups, decode._BFLOAT_BASE_CONSTRAINTS, decode._BFLOAT_NESTED_CONSTRAINTS):
        assert all(c.startswith("=&") for c in constraints.value.split(",") if "=" in c)
    assert inspect.getsource(decode).count('"=r,') == 2  # register and the scales, which write their result last


def scheduled(chosen):
    def fused(x, packed, bias, k, **layout):
        out = torch.full((x.shape[0], packed.codes.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
        kernels.fused(x, packed, bias, out, k, *layout.values(), chosen)
        return out

    return fused


SPLITK_SCHEDULES = [(16, 64, 1, 1, 4), (16, 64, 4, 2, 4), (32, 64, 3, 1, 4), (64, 128, 2, 3, 8), (128, 64, 3, 3, 4)]


@pytest.mark.parametrize("chosen", [SplitK(*entry) for entry in SPLITK_SCHEDULES])
@pytest.mark.parametrize("k", [512, 544])
def test_every_schedule_gives_the_result(chosen, k):
    check(*inputs(37, 130, k), 130, k, 4, 0, function=scheduled(chosen))


@needs_interpreter
@pytest.mark.parametrize(
    ("chosen", "planes"),
    [
        *itertools.product((SplitK(32, 64, 2, 3, 4), Slices(16, 2, 1, 0), Rotating(1)), [*USUAL, (2, 1), (3, 3)]),
        *itertools.product((SplitK(16, 64, 1, 1, 4), Slices(32, 4, 3, 0), Rotating(4)), [(3, 0), (4, 0), (4, 3), (4, 4)]),
        *itertools.product((Slices(16, 4, 1, 1), Slices(32, 2, 2, 2)), [(2, 0), (4, 0), (3, 2), (4, 4)]),
    ],
)
def test_every_schedule_on_the_assembly_path(chosen, planes, assembly_on_cpu):
    tokens = {SplitK: 33, Slices: 7, Rotating: 1}[type(chosen)]
    for n, k in ((67, 1024), (33, 896), (40, 288)):  # whole turns, a missing turn, a missing part of a tile
        check(*inputs(tokens, n, k), n, k, *planes, function=scheduled(chosen))


INTEGERS = [Integer(16, 2, 1, 2), Integer(16, 4, 1, 2), Integer(32, 2, 2, 2), Integer(16, 1, 3, 3)]


@needs_interpreter
@pytest.mark.parametrize("chosen", INTEGERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(67, 1024, 128), (33, 896, 64), (40, 384, 32), (16, 128, 128), (65, 100, 64)]
)
def test_integers(n, k, group_size, bits, chosen, assembly_on_cpu):
    """Whole turns, a missing turn, columns missing in the last tile and in its scales."""
    check(*inputs(1, n, k), n, k, bits, 0, group_size, seed=5, function=scheduled(chosen))


@needs_interpreter
def test_lanes_transpose_words():
    words = np.random.default_rng(0).integers(0, 2**32, (64, 4), dtype=np.uint32)
    got = np.stack(run(few.transposing(), 4, [words[:, i].copy() for i in range(4)]), 1)
    assert np.array_equal(got.reshape(16, 4, 4), words.reshape(16, 4, 4).swapaxes(1, 2))


@needs_interpreter
@pytest.mark.parametrize("bits", [2, 3])
def test_small_codes_become_levels(bits):
    words = [np.random.default_rng(i).integers(0, 2**32, 4099, dtype=np.uint32) for i in range(4)]
    words = [word & np.uint32(0x11111111 * (2**bits - 1)) for word in words]
    entries = [np.full_like(words[0], entry & 0xFFFFFFFF) for entry in few.small_table(bits) for _ in range(4)]
    registers = [r.view(np.int8).reshape(-1, 4) for r in run(few.small_assembly(), 8, words + entries)]
    table = np.array([float(level) for level in levels(bits, 0)])
    for p, i in itertools.product(range(4), range(8)):
        code = (words[p] >> np.uint32(4 * i)) & 15
        assert np.array_equal(registers[2 * p + i // 4][:, i % 4] + 0.5, table[code])


@needs_interpreter
def test_scales_of_a_word():
    got = run(few._SCALES.value, 4, [np.arange(256, dtype=np.uint32) * np.uint32(0x01010101) + np.uint32(0x03020100)])
    for j, scale in enumerate(got):
        byte = ((np.arange(256, dtype=np.uint32) * np.uint32(0x01010101) + np.uint32(0x03020100)) >> np.uint32(8 * j)) & 255
        assert np.array_equal(scale.view(np.float32), (byte << 5).astype(np.uint16).view(np.float16).astype(np.float32))


@needs_interpreter
@pytest.mark.parametrize("chosen", INTEGERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "m"),
    [(67, 1024, 128, 4), (33, 896, 64, 2), (40, 384, 32, 3), (16, 128, 128, 3), (65, 100, 64, 4)],
)
def test_integers_for_few_tokens(n, k, group_size, m, bits, chosen, assembly_on_cpu):
    """Whole turns, a missing turn, columns missing in the last tile and in its scales."""
    check(*inputs(m, n, k), n, k, bits, 0, group_size, seed=5, function=scheduled(chosen))


@needs_interpreter
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_cut_off_adds_no_error_of_its_own(bits, assembly_on_cpu):
    """In float32; without its mean it would add up over the scales, to more than twice as much."""
    packed, exact = layer(67, 2048, bits, 0)
    x, _ = inputs(4, 67, 2048, bias=False)
    got, want = torch.full((4, 67), float("nan"), device=DEVICE), x.double() @ exact.T
    kernels.fused(x, packed, None, got, 2048, bits, 0, 128, 0, Integer(16, 2, 1, 2))
    size = exact.norm(dim=1)
    assert ((got.double() - want) / size).norm() <= 8e-5 * (want / size).norm()


@needs_interpreter
@pytest.mark.parametrize("m", [2, 3, 4])
def test_integers_for_tokens_that_differ_by_any_factor(m, assembly_on_cpu):
    """And lie apart, begin anywhere, and end inside a scale; what is not finite stays with its token."""
    packed, exact = layer(40, 500, 4, 0)
    wide = torch.randn(m, 1100, generator=torch.Generator().manual_seed(m))
    x = wide[:, 300:800] * torch.logspace(-25, 25, m)[torch.randperm(m)][:, None]
    wide[:, 300:800] = x
    x = wide[:, 300:800]
    function, layout = scheduled(Integer(16, 2, 2, 2)), dict(bits=4, residual_bits=0, group_size=128, seed=0)
    want = x.double() @ exact.T
    got = function(x, packed, None, 500, **layout)
    assert ((got.double() - want).norm(dim=1) <= 1e-3 * want.norm(dim=1)).all()
    x[1, 7], x[0] = float("nan") if m % 2 else float("inf"), 0
    bad = function(x, packed, None, 500, **layout)
    assert not bad[1].isfinite().any()
    assert (bad[0] == 0).all()
    assert torch.equal(bad[2:], got[2:])


@needs_interpreter
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 4])
def test_a_ring_copies_the_planes_once_and_nothing_else(m, bits, assembly_on_cpu, monkeypatch):
    """Whatever is beyond the end is multiplied by zero or not stored, so no result tells."""
    n, k = 33, 1152
    packed, _ = layer(n, k, bits, 0)
    guarded = {name: torch.zeros(getattr(packed, name).nbytes + 8192, dtype=torch.uint8) for name in ("codes", "scales")}
    planes = {name: room[4096:-4096].view_as(getattr(packed, name)) for name, room in guarded.items()}
    for name, plane in planes.items():
        plane.copy_(getattr(packed, name))
    send, copied = SHARED.send, {name: np.zeros(room.nbytes, int) for name, room in guarded.items()}

    def watched(place, address, count, live):
        for at in address[live].astype(np.int64):
            name = next(name for name, room in guarded.items() if 0 <= at - room.data_ptr() < room.nbytes)
            copied[name][at - guarded[name].data_ptr() :][:count] += 1
        send(place, address, count, live)

    layout, (x, bias) = dict(bits=bits, residual_bits=0, group_size=128, seed=0), inputs(m, n, k)
    for chosen in (Integer(16, 2, 1, 2), Integer(32, 4, 2, 3), Integer(16, 1, 4, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(SHARED, "send", watched)
            got = scheduled(chosen)(x, packed._replace(**planes), bias, k, **layout)
        assert torch.equal(got, scheduled(chosen)(x, packed, bias, k, **layout))
        for name, times in copied.items():
            assert (times[4096:-4096] == 1).all(), name
            assert not times[:4096].any()
            assert not times[-4096:].any()
            times[:] = 0


@needs_interpreter
@pytest.mark.parametrize("apart", [20, 21])
def test_scales_that_are_no_words_apart_go_through_no_ring(apart, assembly_on_cpu, monkeypatch):
    """A ring copies the four scales of a row and tile at once."""
    monkeypatch.setattr(schedule, "_INTEGER_WEIGHTS", 0)
    n, k = 37, 640
    packed, exact = layer(n, k, 4, 0)
    scales = torch.zeros(n, apart, dtype=torch.uint8)[:, : k // 32]
    scales.copy_(packed.scales)
    x, _ = inputs(3, n, k, bias=False)
    chosen = []

    def recording(*args):
        chosen.append(choose.__wrapped__(*args))
        return chosen[-1]

    monkeypatch.setattr(kernels, "choose", recording)
    kernels._plan.cache_clear()
    try:
        got = kernels.linear(x, packed._replace(scales=scales), None, k, bits=4, residual_bits=0, group_size=128, seed=0)
    finally:
        kernels._plan.cache_clear()
    assert [isinstance(schedule, Integer) for schedule in chosen] == [apart == 20]
    assert (got.double() - x.double() @ exact.T).norm() <= 1e-3 * (x.double() @ exact.T).norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("chosen", [*INTEGERS, Integer(32, 4, 1, 2), Integer(16, 4, 3, 3)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_integers_for_few_tokens_on_a_gpu(dtype, bits, chosen):
    for n, k, m in ((67, 2048, 4), (33, 896, 2), (40, 384, 3), (16, 128, 4), (65, 100, 3), (4608, 3584, 2), (4608, 3584, 4)):
        check(*inputs(m, n, k, dtype), n, k, bits, 0, function=scheduled(chosen))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("chosen", [*INTEGERS, Integer(32, 4, 1, 2), Integer(16, 2, 6, 4)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_integers_on_a_gpu(dtype, bits, chosen):
    for n, k in ((67, 2048), (33, 896), (40, 384), (16, 128), (65, 100), (4608, 3584)):
        check(*inputs(1, n, k, dtype), n, k, bits, 0, function=scheduled(chosen))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("block_m", "groups", "bits", "residual_bits", "dtype"),
    [
        (block_m, groups, 4, 0, torch.bfloat16)
        for block_m, groups in ((16, 2), (32, 3), (64, 2), (128, 2), (128, 3), (256, 2))
    ]
    + [(32, 2, 4, 1, torch.bfloat16), (64, 3, 4, 2, torch.float16), (128, 3, 4, 4, torch.float16)]
    + [(256, 2, 4, 4, torch.bfloat16), (64, 2, 4, 3, torch.bfloat16), (128, 2, 4, 3, torch.bfloat16)]
    + [(32, 3, 3, 0, torch.bfloat16), (64, 2, 3, 0, torch.bfloat16), (128, 3, 3, 0, torch.float16)]
    + [(256, 2, 3, 0, torch.bfloat16), (64, 2, 2, 0, torch.bfloat16), (128, 2, 2, 0, torch.bfloat16)]
    + [(64, 2, 2, 1, torch.bfloat16), (128, 3, 3, 3, torch.bfloat16), (16, 2, 2, 1, torch.bfloat16)],
)
@pytest.mark.parametrize("looks_up", [False, True])
def test_stream_k(block_m, groups, bits, residual_bits, dtype, looks_up, monkeypatch):
    """Few tokens; tiles of several programs; programs of several tiles that fill their buffers more than once; tails."""
    monkeypatch.setattr(StreamK, "wants_table", lambda *_: looks_up and block_m <= 128)  # more leave no room
    kernels._plan.cache_clear()
    chosen = StreamK(block_m, groups, streamk_stages(block_m, groups, 1 << 30, bits, residual_bits))
    for n, k, m in ((67, 512, 5), (130, 4096, 37), (322, 1280, 4100)):
        check(*inputs(m, n, k, dtype), n, k, bits, residual_bits, function=scheduled(chosen))
    kernels._plan.cache_clear()


@pytest.mark.gpu
@needs_hopper
def test_stream_k_reads_rows_that_lie_apart_and_falls_back_where_it_cannot():
    """Members of a fused layer are views; and a view may begin anywhere."""
    packed, exact = layer(130, 512, 4, 0)
    x, _ = inputs(100, 130, 512, bias=False)
    layout = dict(bits=4, residual_bits=0, group_size=128, seed=0)
    want = x.double() @ exact.T
    wide = packed._replace(codes=torch.cat([packed.codes] * 2, 1)[:, :256], scales=torch.cat([packed.scales] * 2, 1)[:, :16])
    odd = packed.codes.new_empty(packed.codes.numel() + 1)[1:].view_as(packed.codes).copy_(packed.codes)
    for planes in (wide, packed._replace(codes=odd)):
        got = kernels.linear(x, planes, None, 512, **layout)
        assert (got.double() - want).norm() < 1e-3 * want.norm()


@needs_interpreter
@pytest.mark.parametrize(("k", "group_size"), [(100, 32), (192, 128), (320, 128), (384, 64), (1000, 128)])
def test_every_rotation_block_inside_the_product(k, group_size, assembly_on_cpu):
    """Blocks of 32, 64 and 128; columns that end inside a tile, a scale and a pair of tiles."""
    for warps in (1, 2):
        check(*inputs(1, 20, k), 20, k, 4, 0, group_size, seed=3, function=scheduled(Rotating(warps)))


@needs_interpreter
@pytest.mark.parametrize("chosen", [Rotating(2), Integer(16, 2, 1, 2)])
@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 300.0, 6e4])
def test_one_token_of_any_magnitude(magnitude, chosen, assembly_on_cpu):
    """Half precision holds 6e4; sixteen of them would not fit. Tiles of one token may differ by any factor."""
    weight = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)) * 1e-3
    packed = reference.quantize_weight(weight).weight
    exact = dequantize(packed, 512, 4, 0, 128, 0)
    signs = torch.sign(torch.randn(1, 512, generator=torch.Generator().manual_seed(1)))
    for factors in (torch.ones(512), torch.ones(512).masked_fill(torch.arange(512) < 256, 1e-3), torch.eye(512)[300]):
        x = (signs * magnitude * factors).half()
        got = scheduled(chosen)(x, packed, None, 512, bits=4, residual_bits=0, group_size=128, seed=0)
        want = x.double() @ exact.T
        tiny = 2.0**-24 * 40**0.5  # the result's own rounding, where it is subnormal
        assert (got.double() - want).norm() <= 1e-3 * want.norm() + tiny
    for value in (0.0, float("inf"), float("nan")):
        x = torch.zeros(1, 512).half()
        x[0, 300] = value
        got = scheduled(chosen)(x, packed, None, 512, bits=4, residual_bits=0, group_size=128, seed=0)
        assert (got == 0).all() if value == 0 else not got.isfinite().any()


def stack(n: int, k: int, bits: int, residual_bits: int):
    """Three matrices as one stack of planes, and their float64 values."""
    packed, _ = layer(n, k, bits, residual_bits)
    members = [
        packed._replace(codes=packed.codes ^ mask, exponents=packed.exponents + i) for i, mask in enumerate((0, 255, 53))
    ]
    exact = [dequantize(member.map(torch.Tensor.cpu), k, bits, residual_bits, 128, 0) for member in members]
    columns = zip(*members, strict=True)
    planes = reference.PackedWeight(*(None if column[0] is None else torch.stack(column) for column in columns))
    return planes, torch.stack(exact).to(DEVICE)


def check_routed(multiply, bits, residual_bits, n, k, dtype, index_dtype=torch.int64):
    packed, exact = stack(n, k, bits, residual_bits)
    experts = torch.tensor([2, 0, 3, -1, 1, 7], device=DEVICE, dtype=index_dtype)  # -1, 3 and 7 are elsewhere
    x = torch.randn(6, k, generator=torch.Generator().manual_seed(k)).to(DEVICE, dtype)
    layout = (k, bits, residual_bits, 128, 0)
    got = multiply(x, experts, packed, layout)
    assert got.shape == (6, n)
    assert got.dtype == dtype
    assert (got[(experts < 0) | (experts >= 3)] == 0).all()
    for row, expert in enumerate(experts.tolist()):
        if 0 <= expert < 3:
            want = x[row].double() @ exact[expert].T
            member = packed.map(lambda plane, e=expert: plane[e])
            eager = reference.linear(x[row], member, None, k, bits=bits, residual_bits=residual_bits, group_size=128, seed=0)
            size = exact[expert].norm(dim=1)
            error, allowed = (((y.double() - want) / size).norm() for y in (got[row], eager))
            assert error <= 2 * allowed + 1e-6 * x[row].double().norm()
    return got


@needs_interpreter
@pytest.mark.parametrize(("bits", "residual_bits"), [*USUAL, (2, 2), (3, 1)])
@pytest.mark.parametrize(("n", "k", "index_dtype"), [(35, 288, torch.int64), (16, 512, torch.int32)])
def test_each_token_by_its_own_expert(n, k, index_dtype, bits, residual_bits, assembly_on_cpu):
    def multiply(x, experts, packed, layout):
        assert kernels.is_routed_at_once(x, packed, *layout)
        assert kernels.routed(x[:0], experts[:0], packed, *layout).shape == (0, n)
        return kernels.routed(x, experts, packed, *layout)

    check_routed(multiply, bits, residual_bits, n, k, torch.float16, index_dtype)


def test_which_tokens_are_routed_at_once(assembly_on_cpu):
    packed, _ = stack(16, 512, 4, 0)
    x = torch.zeros(40_000, 512, dtype=torch.float16, device=DEVICE)
    assert kernels.is_routed_at_once(x[:6], packed, 512, 4, 0, 128, 0)
    assert not kernels.is_routed_at_once(x[:6].float(), packed, 512, 4, 0, 128, 0)
    odd = packed._replace(codes=torch.nn.functional.pad(packed.codes, (0, 4))[..., :-4])  # rows that begin anywhere
    assert not kernels.is_routed_at_once(x[:6], odd, 512, 4, 0, 128, 0)
    apart = packed.codes.new_empty(3, 16 * 256 + 8)[:, :-8].unflatten(1, (16, 256)).copy_(packed.codes)  # and matrices
    assert not kernels.is_routed_at_once(x[:6], packed._replace(codes=apart), 512, 4, 0, 128, 0)
    assert not kernels.is_routed_at_once(torch.cat([x, x]), packed, 512, 4, 0, 128, 0)  # more than a grid's dimension
    assert not kernels.is_routed_at_once(x, packed._replace(codes=packed.codes.repeat(1, 64, 1)), 512, 4, 0, 128, 0)  # many


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("bits", "residual_bits"), USUAL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_on_a_gpu_eagerly_and_captured(dtype, bits, residual_bits):
    op = torch.ops.turboquant_weights.experts

    def multiply(x, experts, packed, layout):
        eager = op(x, experts, *packed, *layout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # nothing of it waits for the number of tokens of an expert
            captured = op(x, experts, *packed, *layout)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)
        assert torch.equal(eager, op(x, experts, *packed, *layout)), "not deterministic"
        return eager

    for n, k in ((35, 288), (64, 2048)):
        check_routed(multiply, bits, residual_bits, n, k, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("bits", "residual_bits"), [*USUAL, (2, 1), (3, 3)])
@pytest.mark.parametrize("chosen", [Rotating(1), Rotating(2), Rotating(8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotating_on_a_gpu(dtype, chosen, bits, residual_bits):
    for n, k in ((67, 2048), (33, 896), (40, 288), (16, 32), (65, 100), (48, 4096)):
        check(*inputs(1, n, k, dtype), n, k, bits, residual_bits, function=scheduled(chosen))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("bits", "residual_bits"), [*USUAL, (2, 1), (3, 3)])
@pytest.mark.parametrize(
    "chosen",
    [
        *(Slices(16, 2, 1, 0), Slices(16, 4, 3, 0), Slices(16, 8, 2, 0), Slices(16, 1, 1, 0), Slices(32, 4, 2, 0)),
        *(Slices(16, 4, 1, 1), Slices(32, 4, 2, 1), Slices(16, 2, 1, 2), Slices(32, 4, 1, 2), Slices(16, 8, 1, 2)),
    ],
)
@pytest.mark.parametrize("m", [1, 2, 7, 8])
def test_slices_on_a_gpu(m, chosen, bits, residual_bits):
    for n, k in ((67, 2048), (33, 896), (40, 288), (16, 32)):
        check(*inputs(m, n, k, torch.bfloat16), n, k, bits, residual_bits, function=scheduled(chosen))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("bits", "residual_bits"), [*USUAL, (2, 1), (3, 3)])
@pytest.mark.parametrize("chosen", [SplitK(*entry) for entry in SPLITK_SCHEDULES])
def test_splitk_on_a_gpu(chosen, bits, residual_bits):
    for n, k, m in ((67, 2048, 37), (130, 544, 9), (40, 288, 130), (16, 32, 16)):
        check(*inputs(m, n, k, torch.bfloat16), n, k, bits, residual_bits, function=scheduled(chosen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "m"), [(67, 288, 5), (130, 100, 70), (16, 512, 0)])
@pytest.mark.parametrize("residual_bits", [0, 4])
def test_gradient_of_the_input(n, k, m, residual_bits, dtype, monkeypatch):
    packed, exact = layer(n, k, 4, residual_bits)
    layout = dict(bits=4, residual_bits=residual_bits, group_size=128, seed=0)
    grad = torch.randn(2, m, n, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)
    want = grad.double() @ exact
    eager = reference.linear_input_gradient(grad, packed, k, **layout)
    got = kernels.linear_input_gradient(grad, packed, k, **layout)
    assert got.shape == (2, m, k)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 2 * (eager.double() - want).norm() + 1e-6 * want.norm()
    monkeypatch.setattr(kernels, "_SCRATCH_BYTES", 1 << 14)  # in parts
    parts = kernels.linear_input_gradient(grad, packed, k, **layout)
    assert (parts.double() - want).norm() <= 2 * (eager.double() - want).norm() + 1e-6 * want.norm()


@pytest.mark.parametrize(("fitting", "step"), [(3, 3), (7, 4), (40, 40), (1000, 66)])
def test_parts_of_rows_begin_where_assembly_can_read(fitting, step, monkeypatch):
    """At multiples of 16 bytes of every plane, of which a row of a single bit and 32 columns has four."""
    packed, _ = layer(66, 32, 4, 1)
    monkeypatch.setattr(kernels, "_SCRATCH_BYTES", fitting * 64 + 5)
    parts = list(kernels._row_parts(packed, 64))
    assert [part.start for part, _ in parts] == list(range(0, 66, step))
    assert torch.equal(torch.cat([planes.residual for _, planes in parts]), packed.residual)


def test_strided_input_and_leading_dimensions():
    packed, exact = layer(67, 288, 4, 0)
    layout = dict(bits=4, residual_bits=0, group_size=128, seed=0)
    wide = torch.randn(2, 3, 2 * 288, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.float16)
    for x in (wide[..., :288], wide[..., ::2], wide[:, :, 288:].transpose(0, 1)):
        got = kernels.linear(x, packed, None, 288, **layout)
        want = x.double() @ exact.T
        assert got.shape == want.shape
        assert (got.double() - want).norm() < 2e-3 * want.norm()
        assert torch.equal(got, kernels.linear(x.contiguous(), packed, None, 288, **layout))


@pytest.mark.parametrize(
    "turn", [Rotation(1, 16, 1024, 8), Rotation(2, 16, 4096, 8), Rotation(3, 16, 1024, 4), Rotation(1, 64, 8192, 8)]
)
@pytest.mark.parametrize("largest", [0, 2047, 4999])
def test_every_division_of_the_rotation(turn, largest, monkeypatch):
    """Also where the largest entry is another program's, and with more tokens than programs."""
    monkeypatch.setattr(kernels, "rotation", lambda tokens, columns: turn)
    monkeypatch.setattr(kernels, "ROTATION_PROGRAMS", 2)
    x, bias = inputs(5, 35, 5000)
    x[:, largest] = 3e4 * torch.arange(1, 6, device=DEVICE) / 5
    kernels._plan.cache_clear()
    try:
        check(x, bias, 35, 5000, 4, 0, function=scheduled(SplitK(16, 64, 2, 1, 4)))
    finally:
        kernels._plan.cache_clear()


@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 1.0, 300.0, 6e4])
def test_activations_of_any_magnitude(magnitude):
    """Half precision holds 6e4; its rotation by itself would not. Weights are small, so the result fits."""
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    packed = reference.quantize_weight(weight).weight
    exact = dequantize(packed, 256, 4, 0, 128, 0)
    moved = reference.PackedWeight(*(None if t is None else t.to(DEVICE) for t in packed))
    x = (torch.sign(torch.randn(3, 256, generator=torch.Generator().manual_seed(1))) * magnitude).half()
    x[1] = 0  # a token of zeros, and one with a single outlier
    x[2, 1:] *= 1e-3
    got = kernels.linear(x.to(DEVICE), moved, None, 256, bits=4, residual_bits=0, group_size=128, seed=0).cpu()
    want = x.double() @ exact.T
    assert (got[1] == 0).all()
    tiny = 2.0**-24 * 40**0.5  # the result's own rounding, where it is subnormal
    assert ((got.double() - want).norm(dim=1) <= 1e-3 * want.norm(dim=1) + tiny).all()


@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_of_any_magnitude_through_scratch(bias):
    """Where cuBLAS multiplies what one kernel rotates."""
    n, k, m = 40, 256, 33
    packed = reference.quantize_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 1e-3, bits=3).weight
    exact = dequantize(packed, k, 3, 0, 128, 0)
    x = (torch.sign(torch.randn(m, k, generator=torch.Generator().manual_seed(1))) * 6e4).half()
    x[1], x[2] = 0, x[2] * 1e-5
    offset = torch.randn(n).half() if bias else None
    moved = packed.map(lambda plane: plane.to(DEVICE))
    layout = dict(bits=3, residual_bits=0, group_size=128, seed=0)
    got = kernels.linear(x.to(DEVICE), moved, None if offset is None else offset.to(DEVICE), k, **layout).cpu().double()
    want = x.double() @ exact.T + (0 if offset is None else offset.double())
    assert ((got - want).norm(dim=1) <= 2e-3 * want.norm(dim=1) + 2.0**-24 * n**0.5).all()


def in_records(plane: torch.Tensor, extra: int) -> torch.Tensor:
    """The same rows with ``extra`` bytes between them."""
    rows, columns = plane.shape
    return torch.zeros(rows, columns + extra, dtype=plane.dtype, device=plane.device)[:, :columns].copy_(plane)


@pytest.mark.parametrize("m", [1, 3, 9, 64])
@pytest.mark.parametrize(("bits", "residual_bits"), [(2, 0), (3, 0), (4, 0), (4, 1), (4, 3), (4, 4)])
def test_planes_and_biases_may_have_gaps(m, bits, residual_bits, assembly_on_cpu):
    n, k = 40, 512
    packed, exact = layer(n, k, bits, residual_bits)
    x, bias = inputs(m, n, k)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=128, seed=0)
    want = x.double() @ exact.T + bias.double()

    def strided(tensor):
        return torch.stack([tensor, tensor + 1], -1)[..., 0]

    changed = [
        (packed._replace(codes=in_records(packed.codes, 6)), bias),
        (packed._replace(codes=in_records(packed.codes, 4 * bits)), bias),
        (packed._replace(scales=in_records(packed.scales, 1)), bias),
        (packed._replace(codes=strided(packed.codes)), bias),
        (packed._replace(scales=strided(packed.scales), exponents=strided(packed.exponents)), strided(bias)),
    ]
    if residual_bits:
        changed.append((packed._replace(residual=in_records(packed.residual, 2)), bias))
    for planes, offset in changed:
        got = kernels.linear(x, planes, offset, k, **layout)
        assert ((got.double() - want).norm(dim=0) < 2e-3 * (exact.norm(dim=1) * x.double().norm() + bias.abs())).all()


def test_tensors_on_several_devices_are_an_error():
    def on(index):
        return SimpleNamespace(get_device=lambda: index, device=f"cuda:{index}")

    planes = reference.PackedWeight(on(0), None, on(0), on(0))
    kernels._check_devices(on(0), planes, on(0), "bias")
    cases = [(on(1), planes, None), (on(0), planes, on(-1))]
    cases += [(on(0), planes._replace(**{plane: on(1)}), on(0)) for plane in planes._fields]
    for x, changed, bias in cases:
        with pytest.raises(QuantizationError, match=r"x is on cuda:.*, but the layer has codes on .*: move"):
            kernels._check_devices(x, changed, bias, "bias")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_a_bias_on_another_device_is_an_error():
    packed, _ = layer(40, 128, 4, 0)
    x, bias = inputs(2, 40, 128)
    for _ in range(3):  # launches by addresses come after the first
        kernels.linear(x, packed, bias, 128, bits=4, residual_bits=0, group_size=128, seed=0)
        with pytest.raises(QuantizationError, match="bias on cpu"):
            kernels.linear(x, packed, bias.cpu(), 128, bits=4, residual_bits=0, group_size=128, seed=0)


ENTRY = dict(gpu="some GPU", rows=4096, columns=4096, bits=4, residual_bits=0, tokens=8)
SLICES_RULE = (
    r"\[rows, warps, split, looked_up\], positive integers; rows one of \(16, 32\); warps .*; looked_up one of \(0, 1, 2\)"
)
KINDS = [Rotating(8), Slices(32, 8, 1, 2), Integer(16, 2, 1, 2), StreamK(64, 2, 2), SplitK(16, 64, 8, 1, 4)]


def written(path, *entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_schedules_are_read_as_they_were_written(tmp_path):
    most = {Rotating: 1, Slices: 8, Integer: 4}
    for chosen in KINDS:
        for tokens in schedule.TOKENS:
            path = written(tmp_path / "schedules.json", ENTRY | dict(tokens=tokens) | schedule.entry_of(chosen))
            if tokens <= most.get(type(chosen), tokens):
                read = schedule.read(path)
                assert read == {"some GPU": {(4096, 4096, 4, 0): {tokens: chosen}}}
            else:
                rule = f"tokens of the kind {type(chosen).__name__.lower()} are at most {most[type(chosen)]}"
                with pytest.raises(ScheduleError, match=f"'tokens': {tokens}, .*{rule}.*turboquant-weights tune"):
                    schedule.read(path)
    assert schedule.entry_of(Slices(16, 8, 1, 0)) == dict(kind="slices", schedule=[16, 8, 1, 0])


def test_the_table_obeys_the_rules_of_files(tmp_path):
    path = tmp_path / "schedules.json"
    names = "rows", "columns", "bits", "residual_bits"
    entries = [
        dict(zip(names, layer, strict=True), gpu=gpu, tokens=tokens) | schedule.entry_of(chosen)
        for gpu, layers in schedule._TABLE.items()
        for layer, by_tokens in layers.items()
        for tokens, chosen in by_tokens.items()
    ]
    assert entries
    assert schedule.read(written(path, *entries)) == schedule._TABLE


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (dict(kind=None), "a kind is one of rotating, slices, integer, streamk, splitk"),
        (dict(kind="slice"), "a kind is one of rotating, slices, integer, streamk, splitk"),
        (dict(kind=["slices"]), "a kind is one of rotating, slices, integer, streamk, splitk"),
        (dict(kind="rotating", tokens=1), r"the kind rotating is \[warps\], positive integers; warps one of .*Write"),
        (dict(kind="splitk"), r"\[block_m, block_n, split, stages, warps\]"),
        *((dict(schedule=fields), SLICES_RULE) for fields in (
            8, [], [8, 1], [16, 8, 1, 0, 1], [0, 8, 1, 0], [8, 8, 1, 0], [16, 0, 1, 0], [16, 8, 0, 0], [16, 8, -1, 0],
            [16, 8, 1, 3], [16, 8, 1, -1], [16, 8, 1.0, 0], [16, 8, True, 0], [16, "8", 1, 0],
        )),
        (dict(kind="integer", schedule=[16, 2, 1, 0], tokens=4), r"a schedule of the kind integer is \["),
        (dict(kind="integer", schedule=[16, 2, 1, 2], tokens=4, residual_bits=4), "integer is for .* without a residual"),
        (dict(kind="integer", schedule=[32, 8, 1, 2], tokens=4), "more than 49152 bytes of shared memory"),
        (dict(kind="integer", schedule=[16, 2, 1, 2], tokens=4, columns=4128), "a multiple of 128 columns"),
        (dict(kind="integer", schedule=[16, 3, 1, 2], tokens=4), r"warps one of \(1, 2, 4, 8\)"),
        (dict(tokens=7), r"tokens are one of \(1, 4, 8"),
        (dict(tokens=16), "tokens of the kind slices are at most 8"),
    ],
)  # fmt: skip
def test_an_entry_that_no_kernel_can_serve_is_refused(changes, rule, tmp_path):
    """With what was got, the rule and the cure."""
    entry = ENTRY | schedule.entry_of(Slices(16, 8, 1, 0))
    schedule.read(written(tmp_path / "schedules.json", entry))
    path = written(tmp_path / "schedules.json", entry | changes)
    with pytest.raises(ScheduleError, match=rf"schedules\.json.*{rule}") as error:
        schedule.read(path)
    assert str(entry | changes) in str(error.value).replace("\\'", "'")
    assert "Write a new one with `turboquant-weights tune`" in str(error.value)


def test_a_file_of_schedules_without_kinds_is_refused(tmp_path):
    from turboquant_weights.kernels import tune

    path = written(tmp_path / "schedules.json", ENTRY | dict(schedule=[8, 1]))
    for read in (schedule.read, lambda path: list(tune.tune_file([(4096, 4096)], 4, 0, None, path))):
        with pytest.raises(ScheduleError, match=r"'schedule': \[8, 1\].*a kind is one of .*Write a new one"):
            read(path)


def test_equal_numbers_of_another_kind_are_another_schedule():
    """Plans are kept by schedule, and both may serve the same layer."""
    slices, integers = Slices(16, 2, 1, 2), Integer(16, 2, 1, 2)
    assert tuple(slices) == tuple(integers)
    assert (slices == integers, slices != integers) == (False, True)
    assert (slices == Slices(16, 2, 1, 2), slices != Slices(16, 2, 1, 2)) == (True, False)
    assert len({slices, integers, Slices(16, 2, 1, 2)}) == 2


def test_extreme_row_exponents():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double()
    rows = (weight * torch.tensor([1e-30, 1e-12, 1.0, 1e25])[:, None]).float()
    packed = reference.quantize_weight(rows).weight
    exact = dequantize(packed, 64, 4, 0, 128, 0)
    moved = reference.PackedWeight(*(None if t is None else t.to(DEVICE) for t in packed))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    got = kernels.linear(x.to(DEVICE), moved, None, 64, bits=4, residual_bits=0, group_size=128, seed=0).cpu()
    want = x.double() @ exact.T
    assert ((got.double() - want).norm(dim=0) <= 1e-5 * want.norm(dim=0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_dequantization_equal_the_reference(dtype):
    from turboquant_weights.rotation import pad_columns, rotate

    x = torch.randn(37, 150, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    want = rotate(pad_columns(x.double(), 160), 32, 5)
    got = kernels.rotate(x, 160, 32, 5).double()
    assert (got - want).norm() <= 0.6 * torch.finfo(dtype).eps * want.norm() + 1e-6
    for bits, residual_bits in ((4, 0), (4, 4), (3, 1)):
        packed, _ = layer(35, 160, bits, residual_bits)
        dense = kernels.dequantize_rotated(packed, bits, residual_bits, dtype).double()
        exact = reference._decode_rows(packed, bits, residual_bits, torch.float64)
        assert (dense - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


BFLOAT_LAYERS = [(35, 160), (6, 1120), (9, 4640)]


def check_bfloat16(n, k, bits, residual_bits, monkeypatch):
    packed, _ = layer(n, k, bits, residual_bits)
    ends = torch.tensor([-128, -120, 90, 112, 127], device=DEVICE)  # as far as exponents go, and what overflows
    packed = packed._replace(exponents=torch.cat([ends.to(torch.int8), packed.exponents[5:]]))
    exact = reference._decode_rows(packed, bits, residual_bits, torch.float64)
    room = torch.full((n + 8, exact.shape[1]), 7.0, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: room[:n])
    dense = kernels.dequantize_rotated(packed, bits, residual_bits, torch.bfloat16)
    assert torch.equal(dense, exact.to(torch.bfloat16))
    assert (room[n:] == 7).all(), "wrote beyond the end"


@needs_interpreter
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
@pytest.mark.parametrize(("n", "k"), BFLOAT_LAYERS)
def test_dequantization_to_bfloat16_rounds_once(n, k, bits, residual_bits, assembly_on_cpu, monkeypatch):
    check_bfloat16(n, k, bits, residual_bits, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
@pytest.mark.parametrize(("n", "k"), BFLOAT_LAYERS)
def test_dequantization_to_bfloat16_on_a_gpu(n, k, bits, residual_bits, monkeypatch):
    check_bfloat16(n, k, bits, residual_bits, monkeypatch)


def test_heuristic_covers_everything():
    for tokens in (1, 2, 4, 8, 16, 17, 64, 65, 256):
        for rows in (1, 100, 4096, 152064):
            for columns in (32, 3584, 18944):
                chosen = choose("none", tokens, rows, columns, 4, 0)
                tiles = max(1, -(-columns // 128))
                if isinstance(chosen, Integer):
                    assert tokens <= 4
                    assert rows * columns >= 1 << (23 if tokens == 1 else 25)
                    assert chosen.split == 1 or 2 * chosen.split * chosen.warps <= tiles
                    assert choose("none", tokens, rows, columns, 3, 0) == chosen
                    assert choose("none", tokens, rows, columns, 4, 4) != chosen  # it has no residual
                elif isinstance(chosen, Rotating):
                    assert tokens == 1
                    assert 1 <= chosen.warps <= max(2, tiles)
                elif isinstance(chosen, Slices):
                    assert tokens <= 8
                    assert 1 <= chosen.split * chosen.warps <= tiles
                else:
                    assert chosen.block_m >= min(tokens, 64)
                    assert 1 <= chosen.split <= tiles


def test_few_rows_are_split_among_programs_of_many_warps():
    for residual_bits in (0, 4):
        assert choose("none", 7, 100, 4096, 4, residual_bits) == Slices(16, 8, 2, 0)


def test_heuristic_for_warp_groups_covers_everything():
    for tokens in (1, 4, 9, 16, 17, 64, 65, 256, 300, 2049, 100_000):
        for columns in (128, 3584, 29568):
            for bits, residual_bits in COMBINATIONS:
                chosen = choose("none", tokens, 4096, columns, bits, residual_bits, True)
                if isinstance(chosen, StreamK):
                    assert chosen.serves(columns)
                    assert 2 <= chosen.stages <= 6
                    assert chosen.block_m >= min(tokens, 64 if tokens <= 256 else 128)
                    if chosen.looks_up(4096 * columns, bits, residual_bits):
                        assert 48 << 10 < chosen.bytes(bits, residual_bits) <= (227 << 10) - decode.TABLE_BYTES
                else:
                    assert tokens <= 256


@pytest.mark.parametrize(
    ("rows", "columns", "one", "few"),
    [
        (18944, 3584, Integer(16, 2, 1, 2), Integer(16, 2, 1, 2)),
        (3584, 18944, Integer(16, 4, 3, 2), Integer(16, 4, 4, 2)),
        (37888, 3584, Integer(16, 4, 1, 2), Integer(16, 4, 1, 2)),
        (8192, 8192, Integer(16, 4, 1, 2), Integer(16, 4, 1, 2)),
        (4608, 3584, Integer(16, 4, 1, 2), Integer(16, 4, 1, 2)),
        (4096, 4096, Rotating(8), Integer(16, 4, 1, 2)),
        (2048, 8192, Rotating(8), Integer(16, 4, 2, 2)),
    ],
)
def test_large_layers_get_integers_for_few_tokens(rows, columns, one, few):
    """Those that were the fastest on an H200, or nearly, whatever else could serve the layer."""
    for bits, warp_groups in itertools.product((2, 3, 4), (False, True)):
        assert choose("none", 1, rows, columns, bits, 0, warp_groups) == one
        assert all(choose("none", tokens, rows, columns, bits, 0, warp_groups) == few for tokens in (2, 3, 4))
        others = (4, 0, rows // 16), (4, None, rows), (4, 4, rows), (5, 0, rows), (8, 0, rows)
        for count, residual_bits, fewer in others:
            assert not isinstance(choose("none", count, fewer, columns, bits, residual_bits, warp_groups), Integer)
        # Rings are for whole tiles, and for scales at multiples of a word.
        for count in (1, 4):
            assert not isinstance(choose("none", count, rows, columns, bits, 0, warp_groups, whole=False), Integer)
            assert not isinstance(choose("none", count, rows, columns + 32, bits, 0, warp_groups), Integer)


def test_tables_of_levels_are_used_where_they_are_faster():
    def chosen(tokens, rows, columns, bits=4, residual_bits=0, warp_groups=True):
        return choose("none", tokens, rows, columns, bits, residual_bits, warp_groups)

    assert chosen(8, 18944, 3584) == Slices(16, 4, 1, 1)
    assert chosen(8, 37888, 3584) == Slices(16, 4, 1, 0)
    assert chosen(8, 8192, 8192) == Slices(32, 4, 2, 1)
    assert chosen(8, 4096, 4096) == Slices(32, 4, 4, 1)
    assert chosen(1, 18944, 3584, 4, 4) == chosen(1, 8192, 8192, 4, 4) == Slices(16, 4, 1, 2)
    assert chosen(1, 37888, 3584, 4, 4) == Slices(32, 4, 1, 2)
    for other in ((9, 18944, 3584), (8, 3584, 18944), (8, 18944, 3584, 3), (8, 18944, 3584, 4, 4), (1, 4096, 4096, 4, 4)):
        assert getattr(chosen(*other), "looked_up", 0) == 0, other
    for layer in ((8, 18944, 3584), (8, 8192, 8192), (1, 18944, 3584, 4, 4)):  # GPUs that were not measured
        assert getattr(chosen(*layer, warp_groups=False), "looked_up", 0) == 0, layer


@pytest.mark.parametrize(("tiles", "steps"), [(1, 1), (1, 74), (132, 28), (133, 28), (148, 28), (1184, 28), (9, 4)])
def test_shares_of_stream_k_cover_every_step(tiles, steps):
    share = StreamK(128, 2, 4).share(tiles, steps, 132)
    programs = -(-tiles * steps // share)
    assert programs <= 132
    assert share * 132 >= tiles * steps
    if share % steps == 0:
        assert share <= 1.05 * -(-tiles * steps // 132)


def test_own_schedules_come_before_the_table(tmp_path, monkeypatch):
    path = tmp_path / "schedules.json"
    entry = ENTRY | schedule.entry_of(Slices(16, 2, 3, 0))
    path.write_text(json.dumps([entry]))
    monkeypatch.setenv(schedule.ENVIRONMENT, str(path))
    schedule._own_table.cache_clear()
    choose.cache_clear()
    assert choose("some GPU", 5, 4096, 4096, 4, 0) == Slices(16, 2, 3, 0)
    assert choose("some GPU", 5, 4096, 4096, 3, 0) == choose("another", 5, 4096, 4096, 3, 0)
    assert choose("some GPU", 9, 4096, 4096, 4, 0) == choose("another", 9, 4096, 4096, 4, 0)
    few, large = entry | dict(tokens=4) | schedule.entry_of(Integer(16, 2, 3, 4)), entry | dict(rows=8192, columns=8192)
    small = entry | dict(rows=2048, columns=2048)
    for entries, schedules in (
        ([small], {2: Slices(16, 2, 3, 0), 4: Slices(16, 2, 3, 0), 8: Slices(16, 2, 3, 0)}),
        ([entry, few], {2: Integer(16, 2, 3, 4), 4: Integer(16, 2, 3, 4), 5: Slices(16, 2, 3, 0)}),
        ([large], {2: Integer(16, 4, 1, 2), 4: Integer(16, 4, 1, 2), 5: Slices(16, 2, 3, 0)}),
        ([large, large | few | dict(rows=8192, columns=8192)], {3: Integer(16, 2, 3, 4), 5: Slices(16, 2, 3, 0)}),
    ):
        path.write_text(json.dumps(entries))
        schedule._own_table.cache_clear()
        choose.cache_clear()
        size = entries[0]["rows"]
        assert {tokens: choose("some GPU", tokens, size, size, 4, 0) for tokens in schedules} == schedules
    for bad in ("{", "[1]", json.dumps([{"rows": 1}]), json.dumps([entry | dict(tokens=7)])):
        path.write_text(bad)
        schedule._own_table.cache_clear()
        choose.cache_clear()
        with pytest.raises(ScheduleError, match="turboquant-weights tune"):
            choose("some GPU", 5, 4096, 4096, 4, 0)
    monkeypatch.delenv(schedule.ENVIRONMENT)
    schedule._own_table.cache_clear()
    choose.cache_clear()


def test_tuning_tries_integers_where_they_serve():
    from turboquant_weights.kernels import tune

    for tokens, residual_bits, serve in ((1, 0, True), (4, 0, True), (8, 0, False), (4, 1, False)):
        integers = [one for one in tune.candidates(tokens, 8192, 8192, 4, residual_bits) if isinstance(one, Integer)]
        assert bool(integers) == serve
        assert all(one.fits(4) for one in integers)
        assert not any(isinstance(one, Integer) for one in tune.candidates(tokens, 8192, 8224, 4, residual_bits))


def test_tuning_writes_what_choosing_reads(tmp_path, monkeypatch):
    """The search itself without a GPU: times are made up."""
    from turboquant_weights.kernels import tune

    path = tmp_path / "schedules.json"
    times = {Slices(16, 4, 2, 0): 1.0, SplitK(32, 64, 2, 1, 4): 2.0}
    monkeypatch.setattr(tune, "schedule_time", lambda x, planes, bits, residual, s, n: times.get(s, 9.0))
    monkeypatch.setattr(tune, "cold_copies", lambda *_: [None])
    monkeypatch.setattr(tune, "gpu_name", lambda device: "made up")
    monkeypatch.setattr(tune.torch, "randn", lambda *shape, **_: torch.zeros(shape))
    monkeypatch.setattr(tune.torch.cuda, "current_device", lambda: 0)
    lines = list(tune.tune_file([(4096, 4096)], 3, 0, [8, 32], path))
    assert len(lines) == 2
    list(tune.tune_file([(4096, 4096)], 3, 0, [8], path))  # again: replaced, not repeated
    assert len(json.loads(path.read_text())) == 2
    assert schedule.read(path) == {"made up": {(4096, 4096, 3, 0): {8: Slices(16, 4, 2, 0), 32: SplitK(32, 64, 2, 1, 4)}}}
    with pytest.raises(ScheduleError, match="residuals of 0 to 4 bits"):
        list(tune.tune_file([(4096, 4096)], 4, 5, None, path))


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_for_every_supported_gpu(capability, tmp_path):
    program = Path(__file__).parent / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program, str(capability)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("m", [1, 16, 300])
def test_module_runs_the_kernels_eagerly_compiled_and_captured(m):
    from turboquant_weights import TurboQuantLinear

    linear = TurboQuantLinear.from_linear(torch.nn.Linear(512, 384)).to("cuda", torch.bfloat16)
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    want = linear(x)
    oracle = x.double() @ linear.dequantize(torch.float64).T + linear.bias.double()
    assert (want.double() - oracle).norm() < 5e-3 * oracle.norm()
    assert torch.equal(want, torch.compile(linear, fullgraph=True)(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(x)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(want, captured)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("m", [3, 100])
def test_split_sums_under_concurrent_streams(m):
    packed, _ = layer(130, 1024, 4, 0)
    layout = dict(bits=4, residual_bits=0, group_size=128, seed=0)
    x, bias = inputs(m, 130, 1024)
    want = kernels.linear(x, packed, bias, 1024, **layout)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outs = []
    for i in range(10_000):
        with torch.cuda.stream(streams[i % 4]):
            outs.append(kernels.linear(x, packed, bias, 1024, **layout))
    torch.cuda.synchronize()
    assert all(torch.equal(want, out) for out in outs)


@pytest.mark.parametrize(("bits", "residual_bits"), [(2, 0), (3, 1), (4, 0), (4, 4)])
def test_feedback_of_a_block_is_that_of_the_reference(bits, residual_bits):
    """Same codes but for ties; losses against the reference, for a number of rows that no tile divides."""
    from turboquant_weights import feedback
    from turboquant_weights.codebook import boundary_tensor, level_tensor
    from turboquant_weights.kernels import feedback as kernel

    x = torch.randn(200, 32)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / 200), upper=True)
    block, scale = torch.randn(70, 32) * 0.3, torch.rand(70, 3) * 0.01 + 0.004
    scale[3] = 0
    wanted = feedback.feed_back(block, scale, factor, bits, residual_bits)
    tables = (boundary_tensor(bits, residual_bits, DEVICE), level_tensor(bits, residual_bits, DEVICE))
    found = [t.cpu() for t in kernel.feed_back(block.to(DEVICE), scale.to(DEVICE), factor.to(DEVICE), *tables)]
    assert (found[0] == wanted[0]).float().mean() > 0.999
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("bits", "residual_bits"), COMBINATIONS)
@pytest.mark.parametrize("words", [False, True])
def test_bytes_are_those_of_the_reference(bits, residual_bits, words, request):
    """Half precision rounds a weight before it becomes an integer, so one in thirty falls to the other side of a half: one
    step apart, and equally far from the truth."""
    if not CUDA and words:
        request.getfixturevalue("assembly_on_cpu")
    m, n, k = 33, 37, 416
    packed, exact = layer(n, k, bits, residual_bits)
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=128, seed=0)
    size = exact.norm(dim=1)
    for dtype in DTYPES[:2]:
        x, bias = inputs(m, n, k, dtype)
        want = reference.linear_in_bytes(x, packed, bias, k, **layout)
        got = torch.full_like(want, torch.nan)
        kernels.through_bytes(x, packed, bias, got, k, *layout.values())
        product = x.double() @ exact.T
        true, signal = product + bias.double(), (product / size).norm()
        error, allowed = (((y.double() - true) / size).norm() / signal for y in (got, want))
        assert 0.004 < allowed < 0.02
        assert error <= 1.1 * allowed
        assert ((got.double() - want.double()) / size).norm() <= 0.6 * allowed * signal


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"), [(1, 1, 1, 128), (5, 33, 31, 128), (300, 130, 512, 128), (130, 20, 8480, 64)]
)
def test_bytes_of_awkward_shapes(m, n, k, group_size):
    """More tokens than a tile, rows of one tile and of more than stay in registers at once, padded columns."""
    packed, _ = layer(n, k, 4, 0, group_size, seed=3)
    layout = dict(bits=4, residual_bits=0, group_size=group_size, seed=3)
    x, _ = inputs(m, n, k)
    x[0] = 0
    want = reference.linear_in_bytes(x, packed, None, k, **layout)
    got = torch.full_like(want, torch.nan)
    kernels.through_bytes(x, packed, None, got, k, *layout.values())
    assert torch.equal(got[0], want[0])
    assert (got.double() - want.double()).norm() <= 0.01 * want.double().norm()


@pytest.mark.parametrize(("bits", "residual_bits"), [(4, 0), (3, 0), (4, 4)])
def test_bytes_in_parts_of_rows(bits, residual_bits, monkeypatch):
    """What a huge output head goes through: each part has its rows of scales and bias, and its columns of the output."""
    m, n, k = 9, 75, 256
    packed, _ = layer(n, k, bits, residual_bits)
    x, bias = inputs(m, n, 2 * k)
    x = x[:, 1 : 1 + k]  # rows that lie apart and begin anywhere
    layout = dict(bits=bits, residual_bits=residual_bits, group_size=128, seed=0)
    whole, parts = (torch.full((m, n), torch.nan, dtype=x.dtype, device=DEVICE) for _ in range(2))
    kernels.through_bytes(x, packed, bias, whole, k, *layout.values())
    monkeypatch.setattr(kernels, "_SCRATCH_BYTES", k * 33)
    kernels.through_bytes(x, packed, bias, parts, k, *layout.values())
    want = reference.linear_in_bytes(x, packed, bias, k, **layout)
    assert torch.equal(parts, whole)
    assert (whole.double() - want.double()).norm() <= 0.01 * want.double().norm()


def test_bytes_keep_what_is_not_finite():
    packed, _ = layer(33, 128, 4, 0)
    x, _ = inputs(4, 33, 128)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    got = torch.zeros(4, 33, dtype=x.dtype, device=DEVICE)
    kernels.through_bytes(x, packed, None, got, 128, 4, 0, 128, 0)
    assert torch.equal(got.isfinite().all(1).cpu(), torch.tensor([True, False, False, True]))


def test_bytes_are_opt_in(monkeypatch):
    packed, exact = layer(33, 128, 4, 0)
    x, _ = inputs(schedule.INT8_TOKENS, 33, 128)
    true = x.double() @ exact.T

    def error(value: str, tokens: int, dtype: torch.dtype = x.dtype) -> float:
        monkeypatch.setenv(kernels.INT8_VARIABLE, value)
        kernels._rounds_activations.cache_clear()
        got = kernels.linear(x[:tokens].to(dtype), packed, None, 128, bits=4, residual_bits=0, group_size=128, seed=0)
        return float((got.double() - true[:tokens]).norm() / true[:tokens].norm())

    try:
        assert error("1", len(x)) > 4e-3
        assert max(error("1", len(x) - 1), error("0", len(x)), error("0", len(x) - 1)) < 2e-3
        assert error("1", len(x), torch.float32) < 1e-5
        with pytest.raises(QuantizationError, match=f"{kernels.INT8_VARIABLE} is 'yes': 0 or 1"):
            error("yes", len(x))
    finally:
        kernels._rounds_activations.cache_clear()
