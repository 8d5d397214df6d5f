"""Tensor parallel parts of a layer: their sum, or their rows side by side, is the whole layer. No engine is needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_weights import FormatError, TurboQuantConfig, TurboQuantLinear
from turboquant_weights.experts import TurboQuantExperts
from turboquant_weights.graded import split_rows
from turboquant_weights.integrations.vllm.shards import GradedShards, Shard, Shards, window
from turboquant_weights.integrations.vllm.stacks import Experts
from turboquant_weights.rotation import rotate, rotation_block, seed_from_column, signs


def layer(rows, columns, config, bias=False, seed=0):
    torch.manual_seed(seed)
    return TurboQuantLinear.from_linear(torch.nn.Linear(columns, rows, bias=bias), config)


def put_rows(shards, index, whole, row, count):
    for plane, tensor in whole.packed._asdict().items():
        if tensor is not None:
            shards.put(index, plane, tensor, row, count)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_signs_from_a_column_on(seed):
    whole = signs(seed, 1024)
    for column in (0, 64, 448, 960):
        start = seed_from_column(seed, column)
        assert -(2**63) <= start < 2**63
        assert torch.equal(signs(start, 1024 - column), whole[column:])
    assert not torch.equal(signs(seed_from_column(seed, 64), 960), whole[:960])


@settings(deadline=None)  # other processes may have the processor
@given(
    columns=st.integers(1, 700),
    group_size=st.sampled_from([32, 64, 128]),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_rotation_block_straddles_ranks(columns, group_size, ranks, seed):
    """A window starts and ends where blocks do, and is rotated as it is in the whole matrix."""
    per_rank = -(-columns // ranks)
    block = rotation_block(columns, group_size)
    stored = -(-columns // 32) * 32
    x = torch.randn(stored, dtype=torch.float64)
    whole = rotate(x, block, seed)
    for rank in range(ranks):
        start, stop = min(columns - 1, rank * per_rank), min(columns, (rank + 1) * per_rank)
        if start >= stop:
            continue
        cut = window(columns, group_size, seed, start, stop)
        assert cut.first <= start
        assert stop <= cut.last <= stored
        assert cut.first % block == cut.last % block == 0
        assert cut.last - cut.first < stop - start + 2 * max(block, 64)
        assert cut.before == start - cut.first
        assert cut.before + stop - start + cut.after == cut.in_features
        assert rotation_block(cut.in_features, cut.group_size) == block
        part = rotate(x[cut.first : cut.last], block, cut.seed)
        assert torch.allclose(part, whole[cut.first : cut.last], atol=1e-12)


@pytest.mark.parametrize(
    ("columns", "ranks"),
    [(k, ranks) for k in (448, 896, 576, 160, 1008, 36) for ranks in (1, 2, 4, 7) if k % ranks == 0],
)
@pytest.mark.parametrize("bits", [(4, 0), (4, 2), (3, 1)])
def test_row_parallel_parts_add_up(columns, ranks, bits):
    """896 columns are 7 blocks of 128: two ranks share one. Nothing is quantized again: the sum is exact up to rounding."""
    config = TurboQuantConfig(*bits, seed=11)
    whole = layer(24, columns, config)
    x = torch.randn(5, columns)
    total = torch.zeros(5, 24)
    size = columns // ranks
    for rank in range(ranks):
        part = Shards([Shard("x", 24, config)], columns, 128, 11, torch.float32, rank * size, (rank + 1) * size)
        put_rows(part, 0, whole, 0, 24)
        part.check_complete()
        total += part(x[:, rank * size : (rank + 1) * size])
    assert torch.allclose(total, whole(x), atol=1e-4)
    if ranks == 2:  # the other half's planes would be seen
        assert not torch.allclose(2 * part(x[:, :size]), whole(x), atol=1e-1)


def test_merged_layers_with_different_bits_and_a_dense_one():
    configs = [TurboQuantConfig(4), TurboQuantConfig(4), TurboQuantConfig(3, 2), None]
    members = [layer(10 + index, 96, config or TurboQuantConfig(), seed=index) for index, config in enumerate(configs)]
    shards = Shards(
        [Shard(f"l{i}", m.out_features // 2, c) for i, (m, c) in enumerate(zip(members, configs, strict=True))],
        96, 128, 0, torch.float32,
    )  # fmt: skip
    x, bias = torch.randn(3, 4, 96), torch.randn(sum(m.out_features // 2 for m in members))
    expected = []
    for index, (member, config) in enumerate(zip(members, configs, strict=True)):
        half = member.out_features // 2
        if config is None:
            shards.put(index, "weight", member.dequantize(), half, half)
        else:
            put_rows(shards, index, member, half, half)
        expected.append(member(x)[..., half : 2 * half])
    assert len(shards.runs) == 3  # the first two are one matrix
    shards.check_complete()
    assert torch.allclose(shards(x, bias), torch.cat(expected, -1) + bias, atol=1e-5)


def test_quantizing_while_loading_gives_the_same_bytes():
    """Rows of one rank, and all columns before they are cut, are what the package would store."""
    config = TurboQuantConfig(4, 2, seed=3)
    torch.manual_seed(1)
    dense = torch.nn.Linear(320, 16, bias=False)
    stored = TurboQuantLinear.from_linear(dense, config)
    for start, stop, row in [(0, 320, 4), (160, 320, 0)]:
        loaded, online = (Shards([Shard("x", 8, config)], 320, 128, 3, torch.float32, start, stop) for _ in range(2))
        put_rows(loaded, 0, stored, row, 8)
        online.quantize(0, dense.weight.detach(), row, 8)
        online.check_complete()
        for a, b in zip(loaded.parameters(), online.parameters(), strict=True):
            assert torch.equal(a, b)


def test_lookup_of_padded_rows():
    config = TurboQuantConfig(4, 2)
    whole = layer(10, 64, config)
    shards = Shards([Shard("e", 16, config)], 64, 128, 0, torch.float32)
    put_rows(shards, 0, whole, 0, 10)
    ids = torch.tensor([[0, 9], [15, 3]])
    rows = shards.lookup(ids, torch.float32)
    torch.testing.assert_close(rows[0], whole.dequantize()[[0, 9]])
    assert not rows[1, 0].any()


GRADES = ((5, 4, 2), (40, 4, 0), (15, 3, 0))


def graded(base_only=False):
    """A loaded embedding of 60 tokens, of which the first ten have no row in the last grade, and its matrix."""
    torch.manual_seed(3)
    config = TurboQuantConfig(seed=8)
    grades = tuple((rows, bits, 0) for rows, bits, _ in GRADES) if base_only else GRADES
    importance = torch.randn(60)
    importance[:10] += 9
    order, rows = split_rows(importance, grades)
    shards, weight = GradedShards("e", grades, config, 96, torch.float32), torch.empty(60, 96)
    for index, (part, grade) in enumerate(zip(rows, grades, strict=True)):
        whole = layer(len(part), 96, config.with_bits(*grade[1:]), seed=index)
        put_rows(shards, index, whole, 0, len(part))
        weight[part] = whole.dequantize()
    shards.put_order(order)
    shards.check_complete()
    return shards, weight


@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize(
    ("start", "stop", "rows", "kept"),
    [
        (0, 60, 60, {0, 1, 2}),
        (0, 60, 64, {0, 1, 2}),
        (5, 39, 34, {0, 1, 2}),
        (0, 10, 10, {0, 1}),
        (0, 10, 12, {0, 1, 2}),
        (10, 60, 64, {1, 2}),
    ],
)
def test_grades_of_the_tokens_of_a_rank(start, stop, rows, kept, base_only):
    shards, weight = graded(base_only)
    shards.keep(start, stop, rows)
    part = torch.zeros(rows, 96)
    part[: stop - start] = weight[start:stop]
    ids = torch.arange(rows).roll(7).reshape(2, -1)
    torch.testing.assert_close(shards.lookup(ids, torch.float32), part[ids])
    x, bias = torch.randn(3, 96), torch.randn(rows)
    torch.testing.assert_close(shards(x, bias), x @ part.T + bias, atol=1e-4, rtol=1e-4)
    assert torch.equal(shards(x), shards(x, torch.zeros(rows)))
    assert len(shards.runs) == len({max(grade, 1) for grade in kept} if base_only else kept)
    # Nothing of the other ranks' tokens stays.
    assert sum(run.codes.shape[0] for run in shards.runs) == rows == len(shards.order)


def test_an_order_that_does_not_fit():
    shards = GradedShards("m.e", GRADES, TurboQuantConfig(), 96, torch.float32)
    order = torch.arange(60, dtype=torch.int32)
    with pytest.raises(FormatError, match=r"m\.e\.order is torch\.int64 \[60\]: it must be torch\.int32 \[60\]"):
        shards.put_order(order.long())
    with pytest.raises(FormatError, match=r"m\.e\.order is torch\.int32 \[59\]"):
        shards.put_order(order[:59])
    with pytest.raises(FormatError, match=r"m\.e\.order does not name every row once"):
        shards.put_order(order.clamp(max=58))
    for index, (rows, *bits) in enumerate(GRADES):
        put_rows(shards, index, layer(rows, 96, TurboQuantConfig(*bits)), 0, rows)
    with pytest.raises(FormatError, match=r"m\.e\.order did not come with the checkpoint"):
        shards.check_complete()
    shards.put_order(order)
    shards.check_complete()


def stacks(config, columns=96, rows=64, count=3):
    torch.manual_seed(2)
    stack = TurboQuantExperts.from_parameter(torch.randn(count, rows, columns), "out_in", config)
    return stack, {plane: tensor for plane, tensor in stack.packed._asdict().items() if tensor is not None}


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_of_experts_add_up(ranks):
    """Gate and up give each rank the same rows of both; 80 columns of down are two and a half blocks of 32."""
    config = TurboQuantConfig(4, 2, seed=4)
    up, up_planes = stacks(config, 96, 320)
    down, down_planes = stacks(TurboQuantConfig(3, seed=4), 160, 96)
    x, experts = torch.randn(7, 96), torch.tensor([0, 2, 2, 1, 0, 2, 3])  # 3: on another rank
    total, size = torch.zeros(7, 96), 160 // ranks
    for rank in range(ranks):
        part = Experts(
            ["up", "down"], [config, TurboQuantConfig(3, seed=4)], range(3), (96, 160), True, rank * size, (rank + 1) * size
        )
        for plane, tensor in up_planes.items():
            part.up.put(plane, tensor)
        for plane, tensor in down_planes.items():
            part.down.put(plane, tensor)
        part.check_complete()
        gate, rest = part.up(x, experts).chunk(2, -1)
        total += part.down(gate * rest, experts)
    gate, rest = up(x, experts).chunk(2, -1)
    expected = down(gate * rest, experts)
    assert torch.allclose(total, expected, atol=1e-4 * float(expected.abs().max()))
    assert not total[-1].any()


def test_experts_of_one_rank_and_their_errors():
    config = TurboQuantConfig(4)
    whole, planes = stacks(config)
    part = Experts(["m.up", "m.down"], [config, config], [2, 0], (96, 32), True, 0, 32)
    with pytest.raises(FormatError, match=r"m\.up\.codes is torch\.uint8 \[3, 64, 16\]: it must be .* rows of 48"):
        part.up.put("codes", planes["codes"][..., :16])
    with pytest.raises(FormatError, match=r"m\.up\.residual is stored, but config\.json gives it no such plane"):
        part.up.put("residual", planes["codes"])
    for plane in ("codes", "scales"):
        part.up.put(plane, planes[plane])
    with pytest.raises(FormatError, match=r"m\.up\.exponents did not come with the checkpoint for expert 2"):
        part.check_complete()
    part.up.put("exponents", planes["exponents"])
    x = torch.randn(4, 96)
    assert torch.equal(part.up(x, torch.tensor([0, 1, 1, 0])), whole(x, torch.tensor([2, 0, 0, 2])))


def test_experts_quantized_while_loading():
    torch.manual_seed(6)
    config = TurboQuantConfig(4, 2)
    up, down = torch.randn(2, 64, 96), torch.randn(2, 96, 32)
    part = Experts(["up", "down"], [config, config], [0, 1], (96, 32), True, 16, 32)
    for expert in range(2):
        part.up.quantize(expert, 0, up[expert, :32], 16)
        part.up.quantize(expert, 1, up[expert, 32:], 16)
        part.down.quantize(expert, 0, down[expert], 0)
    part.check_complete()
    stored = Experts(["up", "down"], [config, config], [0, 1], (96, 32), True, 16, 32)
    for stack, weight in ((stored.up, up), (stored.down, down)):
        for plane, tensor in TurboQuantExperts.from_parameter(weight, "out_in", config).packed._asdict().items():
            stack.put(plane, tensor)
    for a, b in zip(part.parameters(), stored.parameters(), strict=True):
        assert torch.equal(a, b)


def test_errors_name_the_tensor():
    config = TurboQuantConfig(4, 2)
    whole = layer(8, 64, config)
    shards = Shards([Shard("model.q", 8, config), Shard("model.k", 4, config)], 64, 128, 0, torch.float32)
    put_rows(shards, 0, whole, 0, 8)
    with pytest.raises(FormatError, match=r"model\.k\.codes did not come with the checkpoint"):
        shards.check_complete()
    codes = whole.codes.detach()
    with pytest.raises(FormatError, match=r"model\.k\.codes is torch\.int8 \[8, 32\]: it must be torch\.uint8"):
        shards.put(1, "codes", codes.view(torch.int8), 0, 4)
    with pytest.raises(FormatError, match=r"model\.k\.codes is torch\.uint8 \[8, 16\]: it must be .* rows of 32"):
        shards.put(1, "codes", codes[:, :16], 0, 4)
    with pytest.raises(FormatError, match=r"model\.k\.scales .* rows 6 to 9"):
        shards.put(1, "scales", whole.scales, 6, 4)
    with pytest.raises(FormatError, match=r"model\.k\.exponents holds 101"):
        shards.put(1, "exponents", torch.full((8,), 101, dtype=torch.int8), 0, 4)
    with pytest.raises(FormatError, match=r"model\.k\.weight is stored, but config\.json gives model\.k no such tensor"):
        shards.put(1, "weight", torch.ones(4, 64), 0, 4)
    dense = Shards([Shard("model.v", 4, None), Shard("model.k", 4, config)], 64, 128, 0, torch.float32)
    with pytest.raises(FormatError, match=r"model\.v\.weight is torch\.float32 \[4, 32\]: it must be floating point"):
        dense.put(0, "weight", torch.ones(4, 32), 0, 4)
