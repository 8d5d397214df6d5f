import contextlib
import re

import format_oracle as oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from turboquant_weights.rotation import (
    hadamard,
    pad_columns,
    padded_features,
    rotate,
    rotation_block,
    sign_word,
    signs,
    unrotate,
)


def test_splitmix64_vectors():
    # The generator's published outputs for seed 1234567 and seed 0.
    assert [sign_word(1234567, i) for i in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [f"{sign_word(0, i):016x}" for i in range(3)] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]


def test_sign_vectors_of_the_format_document():
    rows = re.findall(r"^\| (\d+) \| `([0-9a-f]{16})` \| `([0-9a-f]{16})` \| `([-+]{16})` \|$", oracle.DOCUMENT, re.M)
    assert [int(row[0]) for row in rows] == [0, 1, 2**32 - 1]
    for seed, first, second, text in rows:
        assert [f"{sign_word(int(seed), i):016x}" for i in range(2)] == [first, second]
        assert "".join("+" if value > 0 else "-" for value in signs(int(seed), 72)[56:].tolist()) == text


@pytest.mark.parametrize("seed", [0, 1, 77, 2**32 - 1])
def test_signs_depend_on_seed_and_column_only(seed):
    values = signs(seed, 300)
    assert values.tolist() == [oracle.sign(seed, column) for column in range(300)]
    assert torch.equal(signs(seed, 64), values[:64])
    assert abs(float(signs(seed, 4096).mean())) < 0.06  # four standard deviations


@pytest.mark.parametrize("block", [32, 64, 128])
def test_hadamard_is_sylvesters_and_orthogonal(block):
    matrix = hadamard(block, dtype=torch.float64)
    expected = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    assert torch.equal((matrix * block**0.5).round().long(), torch.tensor(expected))
    torch.testing.assert_close(matrix @ matrix, torch.eye(block, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize(("k", "group_size"), [(128, 128), (384, 128), (576, 128), (256, 32), (320, 64)])
def test_rotation_matches_the_document_and_inverts(k, group_size):
    block = rotation_block(k, group_size)
    x = torch.randn(5, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, block, 7)
    torch.testing.assert_close(rotated, x @ oracle.rotation(k, group_size, 7), rtol=0, atol=1e-12)
    torch.testing.assert_close(unrotate(rotated, block, 7), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)


def test_shards_share_the_rotation():
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    whole = rotate(x, 128, 3)
    close = dict(rtol=0, atol=1e-6)  # not bit for bit: a matmul may sum in another order when its shape changes
    torch.testing.assert_close(whole[1:], rotate(x[1:], 128, 3), **close)  # rows
    torch.testing.assert_close(whole[:, :256], rotate(x[:, :256], 128, 3), **close)  # the first columns
    second = x[:, 256:] * signs(3, 512)[256:]  # later columns use the signs of their absolute position
    torch.testing.assert_close(whole[:, 256:], rotate(second * signs(3, 256), 128, 3), **close)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 96, 100, 127, 128, 576, 1000, 3584, 18944])
def test_block_is_the_largest_power_of_two_that_fits(k, group_size):
    columns, block = oracle.columns_and_block(k, group_size)
    assert (padded_features(k), rotation_block(k, group_size)) == (columns, block)


def test_blocks_of_the_format_document():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", oracle.DOCUMENT, re.M)
    assert len(rows) == 5
    for k, columns, block in rows:
        assert (padded_features(int(k)), rotation_block(int(k), 128)) == (int(columns), int(block))


def test_padding_appends_zeros():
    x = torch.ones(2, 3)
    assert pad_columns(x, 3) is x
    assert pad_columns(x, 5).tolist() == [[1, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_thread_that_leaves_a_mode_changes_nothing_for_others(is_inside, monkeypatch):
    """What is cached for ever is real, and what is real is cached."""
    flags = torch.utils._python_dispatch
    with FakeTensorMode() if is_inside else contextlib.nullcontext(), monkeypatch.context() as patch:
        patch.setattr(flags, "_is_in_torch_dispatch_mode", not is_inside)  # one for all threads
        first = signs(987_654, 96)
    again = signs(987_654, 96)
    assert type(again) is torch.Tensor
    assert (again is first) is not is_inside
