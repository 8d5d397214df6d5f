import format_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_weights.packing import pack, packed_columns, unpack


@pytest.mark.parametrize("width", range(1, 9))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_is_one_little_endian_bit_stream(width, data):
    rows = data.draw(st.integers(1, 3))
    columns = 8 * data.draw(st.integers(1, 9))
    cells = st.integers(0, 2**width - 1)
    indices = torch.tensor(data.draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns))).view(rows, columns)
    packed = pack(indices, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, width))
    for row, values in zip(oracle.rows_of(packed), indices.tolist(), strict=True):
        stream = sum(value << (j * width) for j, value in enumerate(values))
        assert row == stream.to_bytes(columns * width // 8, "little")
    assert torch.equal(unpack(packed, width).long(), indices)


@pytest.mark.parametrize("width", range(1, 9))
def test_every_byte_string_survives_unpacking(width):
    packed = (torch.arange(64 * width) * 37 % 256).to(torch.uint8).view(2, -1)
    assert torch.equal(pack(unpack(packed, width), width), packed)


@pytest.mark.parametrize("width", range(1, 9))
def test_planes_can_be_cut_along_rows_and_at_every_32nd_column(width):
    indices = (torch.arange(4 * 96).view(4, 96) * 11) % 2**width
    packed = pack(indices, width)
    left, right = pack(indices[:, :32], width), pack(indices[:, 32:], width)
    assert torch.equal(packed, torch.cat([left, right], 1))
    assert torch.equal(packed[1:3], pack(indices[1:3], width))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("width", [2, 3])
def test_index_dtypes_and_layouts_do_not_matter(width, dtype):
    indices = (torch.arange(64).view(8, 8) % 2**width).to(dtype)
    assert torch.equal(pack(indices.T, width), pack(indices.T.contiguous(), width))
    assert pack(indices[None, :0], width).shape == (1, 0, width)


def test_golden_bytes_of_the_format_document():
    rows = {1: "aa aa aa aa", 2: "e4 " * 8, 3: "88 c6 fa " * 4, 4: "10 32 54 76 98 ba dc fe " * 2}
    for width, text in rows.items():
        assert pack(torch.arange(32) % 2**width, width).tolist() == list(bytes.fromhex(text))
        assert f"| {width} | `{text.strip()}` |" in oracle.DOCUMENT


def test_columns_that_do_not_fill_bytes_are_our_own_mistake():
    with pytest.raises(AssertionError, match="12 columns"):
        pack(torch.zeros(12, dtype=torch.uint8), 4)
