"""Huge pages for the planes of layers on a CPU: what is asked for and when, and what the kernel makes of it."""

import ctypes
import errno
import mmap
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from turboquant_weights import TurboQuantConfig, TurboQuantEmbedding, TurboQuantLinear
from turboquant_weights.cpu import linear as cpu_linear
from turboquant_weights.cpu import pages

PAGE = 2 << 20
ROWS, COLUMNS = 4000, 4096  # a plane of 4 bits is 8.2 MB, with two whole pages wherever it begins, one of 2 bits 4.1 MB


@pytest.fixture
def asked(monkeypatch):
    """What a kernel was asked for that refuses everything, as (first byte, bytes, advice)."""
    found = []

    def refuse(*arguments):
        found.append(arguments)
        return -1

    monkeypatch.setattr(pages, "_kernel", lambda: (PAGE, refuse))
    monkeypatch.setattr(pages, "_forked", threading.Event())  # another test may have forked
    return found


def module(rows=ROWS, columns=COLUMNS, bits=4, residual_bits=0):
    """A layer of random planes, since quantizing takes longer than all else here."""
    made = TurboQuantLinear(columns, rows, bias=False, config=TurboQuantConfig(bits, residual_bits))
    generator = torch.Generator().manual_seed(rows)
    for plane in made.packed:
        if plane is not None:
            plane.copy_(torch.randint(0, 100, plane.shape, generator=generator))
    made.exponents.fill_(-20)
    return made


def inner(plane):
    """Whole huge pages in a plane, as it would be asked for them."""
    first, end = -(-plane.data_ptr() // PAGE) * PAGE, (plane.data_ptr() + plane.nbytes) // PAGE * PAGE
    return first, end - first, 25


@pytest.mark.parametrize("m", [1, 40])
def test_a_layer_asks_once_for_planes_of_two_huge_pages_and_more(m, asked):
    layer = module(residual_bits=2)
    x = torch.randn(m, COLUMNS, dtype=torch.bfloat16)
    want = layer(x)
    expected = {inner(plane) for plane in (layer.codes, layer.residual) if inner(plane)[1] >= 2 * PAGE}
    assert inner(layer.codes) in expected  # at least two are whole
    assert set(asked) == expected
    asked.clear()
    for _ in range(3):
        assert torch.equal(layer(x), want)
    assert not asked


def test_nothing_is_asked_for_small_planes(asked):
    layer = module(rows=900)  # 1.8 MB
    layer(torch.randn(1, COLUMNS, dtype=torch.bfloat16))
    assert not asked


def test_nothing_is_asked_for_after_a_fork():
    """Pages are the parent's and the child's until one of them writes, and collapsing writes."""
    program = """if True:
        import os, torch
        from turboquant_weights.cpu import pages
        found = []
        pages._kernel = lambda: (2 << 20, lambda *arguments: found.append(arguments))
        plane = torch.empty(8 << 20, dtype=torch.uint8)
        pages.ask(plane)
        assert len(found) == 1
        child = os.fork()
        pages.ask(plane)
        if not child:
            os._exit(len(found) - 1)
        assert os.waitpid(child, 0)[1] == 0
        assert len(found) == 1
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_whole_pages_inside_a_plane_are_asked_for(asked):
    memory = torch.empty(8 * PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    for offset, length, first, count in [
        (0, 2 * PAGE, 0, 2),
        (0, 3 * PAGE - 1, 0, 2),
        (1, 3 * PAGE - 1, 1, 2),
        (1, 3 * PAGE - 2, None, 0),  # only one is whole
        (0, 2 * PAGE - 1, None, 0),
        (4096, 5 * PAGE, 1, 4),
    ]:
        asked.clear()
        pages.ask(None, memory[start + offset : start + offset + length])
        base = memory.data_ptr() + start
        assert asked == ([(base + first * PAGE, count * PAGE, 25)] if count else [])


def test_other_planes_of_the_same_layer_are_asked_for(asked):
    layer = module()
    x = torch.randn(1, COLUMNS, dtype=torch.bfloat16)
    layer(x)
    asked.clear()
    layer.codes = torch.nn.Parameter(layer.codes.clone(), requires_grad=False)
    layer(x)
    assert set(asked) == {inner(layer.codes)}


def test_an_embedding_asks_too(asked):
    embedding = TurboQuantEmbedding(ROWS, COLUMNS, config=TurboQuantConfig())
    embedding(torch.tensor([1]))
    assert set(asked) == {inner(embedding.codes)}


@pytest.mark.parametrize(
    "files",
    [
        {"enabled": "always madvise [never]\n", "hpage_pmd_size": "2097152\n"},
        {"enabled": "[always] madvise never\n"},
        {"enabled": "[always] madvise never\n", "hpage_pmd_size": "?\n"},
        {},
    ],
    ids=["never", "no size", "bad size", "no such kernel"],
)
def test_no_huge_pages_where_there_are_none_or_none_are_wanted(files, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    assert pages._kernel.__wrapped__() is None


def test_the_size_is_the_kernels(tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "hpage_pmd_size").write_text("33554432\n")
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    assert pages._kernel.__wrapped__()[0] == 32 << 20


# -- the kernel itself


def kernel_collapses():
    """Whether it gives huge pages to memory of this size, asked without the package."""
    if not sys.platform.startswith("linux") or pages._kernel() is None:
        return False
    size = 16 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(size))
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        first = -(-at // PAGE) * PAGE
        refused = libc.madvise(first, size - PAGE, 25)
        assert not refused or ctypes.get_errno() in (errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY)
        return not refused


def huge_bytes(tensor):
    """AnonHugePages of the mappings in which the tensor lies, and Rss of the process."""
    found, start, end = 0, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(value, 16) for value in match.groups())
        elif line.startswith("AnonHugePages:") and start < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end:
            found += int(line.split()[1]) << 10
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return found, resident


def test_planes_are_on_huge_pages_after_the_first_call(monkeypatch):
    if not kernel_collapses():
        pytest.skip("this kernel does not collapse memory (Linux 6.1 and later do, unless huge pages are off)")
    kernel = pages._kernel()
    if kernel[0] != PAGE:
        pytest.skip("huge pages of another size")
    monkeypatch.setattr(pages, "_forked", threading.Event())
    layer = module(rows=12000)  # 24 MB
    x = torch.randn(1, COLUMNS, dtype=torch.bfloat16)
    with monkeypatch.context() as without:
        without.setattr(pages, "_kernel", lambda: None)
        want = cpu_linear.bind(layer._parameters, COLUMNS, (4, 0, 128, 0)).product(x, layer._parameters)
    codes, at = layer.codes.clone(), layer.codes.data_ptr()
    huge, resident = huge_bytes(layer.codes)
    got = layer(x)
    after, resident_after = huge_bytes(layer.codes)
    already = huge >= inner(layer.codes)[1]  # where huge pages are the default
    assert already or after - huge >= inner(layer.codes)[1] - PAGE  # one may have been huge before
    assert resident_after - resident <= PAGE  # of pages for planes none
    assert layer.codes.data_ptr() == at
    assert torch.equal(layer.codes, codes)
    assert torch.equal(got, want)
