"""The specification against a float64 oracle that follows FORMAT.md and shares no code with it."""

import weakref

import format_oracle as oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turboquant_weights import QuantizationError, reference
from turboquant_weights.reference import (
    MAX_EXPONENT,
    PackedWeight,
    dequantize_weight,
    linear,
    linear_input_gradient,
    packed_shapes,
    quantize_weight,
)

SIZES = [1, 31, 32, 33, 100, 127, 128, 576, 1000]
ROWS = 5
# Relative squared error of a Gaussian matrix by total bits: that of Lloyd-Max, which searched scales must beat.
LLOYD_MAX = {2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505, 6: 0.000644, 7: 0.000163, 8: 0.0000412}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, seed=0):
    """With blocks of 64 columns (H / 8) their rotation is exact in float32, so no BLAS can round it differently."""
    return (gaussian(*shape, seed=seed) * 64).round()


def layout(bits=4, residual_bits=0, group_size=128, seed=9):
    return dict(bits=bits, residual_bits=residual_bits, group_size=group_size, seed=seed)


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).square().sum() / expected.double().square().sum())


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_every_size_and_combination(k, bits, residual_bits):
    weight = gaussian(ROWS, k, seed=k)
    settings = layout(bits, residual_bits)
    packed, error = quantize_weight(weight, **settings)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in packed._asdict().items() if t is not None}
    assert shapes == packed_shapes(ROWS, k, bits, residual_bits)
    expected = oracle.dequantize(packed, k, **settings)
    actual = dequantize_weight(packed, k, **settings)
    assert actual.shape == (ROWS, k)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)
    # What falls on the padding is dropped, so it is no error.
    assert error == pytest.approx(relative_error(expected, weight), rel=1e-3, abs=1e-9)
    if k >= 100:
        assert error < LLOYD_MAX[bits + residual_bits]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_and_gradient_at_most_double_the_rounding_of_eager(dtype, group_size):
    # The rule for kernels, applied to the specification: against float64, at most twice the error of the plain
    # low-precision computation with the same weights.
    k, n, settings = 576, 33, layout(4, 4, group_size)
    weight = gaussian(n, k) * 0.05
    packed = quantize_weight(weight, **settings).weight
    exact = oracle.dequantize(packed, k, **settings)
    x, grad, bias = gaussian(7, k, seed=1).to(dtype), gaussian(7, n, seed=2).to(dtype), gaussian(n, seed=3).to(dtype)
    eager_weight = exact.to(dtype)
    for ours, eager, expected in (
        (linear(x, packed, bias, k, **settings), x @ eager_weight.T + bias, x.double() @ exact.T + bias.double()),
        (linear_input_gradient(grad, packed, k, **settings), grad @ eager_weight, grad.double() @ exact),
    ):
        assert ours.dtype == dtype
        assert relative_error(ours, expected) <= 4 * relative_error(eager, expected)  # squared: twice the error


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("residual_bits", [0, 2])
def test_linear_of_every_size(k, residual_bits):
    settings = layout(3, residual_bits)
    packed = quantize_weight(gaussian(ROWS, k, seed=k), **settings).weight
    exact = oracle.dequantize(packed, k, **settings)
    x, grad = gaussian(2, 3, k, seed=1), gaussian(2, 3, ROWS, seed=2)
    out = linear(x, packed, None, k, **settings)
    assert out.shape == (2, 3, ROWS)
    torch.testing.assert_close(out.double(), x.double() @ exact.T, rtol=1e-4, atol=1e-4)
    back = linear_input_gradient(grad, packed, k, **settings)
    assert back.shape == x.shape
    torch.testing.assert_close(back.double(), grad.double() @ exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 100), (2, 0, 100), (100,), (1, 1, 1, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_and_unusual_batches(shape, dtype):
    settings = layout(4, 1)
    packed = quantize_weight(gaussian(ROWS, 100), **settings).weight
    x = torch.ones(shape, dtype=dtype)
    out = linear(x, packed, torch.ones(ROWS), 100, **settings)
    assert (out.shape, out.dtype) == ((*shape[:-1], ROWS), dtype)
    back = linear_input_gradient(out, packed, 100, **settings)
    assert (back.shape, back.dtype) == (shape, dtype)


def test_noncontiguous_inputs_give_the_same_result():
    settings = layout(4, 2)
    weight = gaussian(64, 96)
    packed = quantize_weight(weight, **settings).weight
    transposed = quantize_weight(weight.T.contiguous().T, **settings).weight
    strided = quantize_weight(gaussian(64, 96).repeat_interleave(2, 1)[:, ::2], **settings).weight
    for other in (transposed, strided):
        assert all(torch.equal(a, b) for a, b in zip(packed, other, strict=True))
    x = gaussian(96, 8, seed=1).T
    assert torch.equal(linear(x, packed, None, 96, **settings), linear(x.contiguous(), packed, None, 96, **settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_taken_as_they_are(dtype):
    weight = gaussian(9, 160).to(dtype)
    low, exact = quantize_weight(weight, **layout(4, 4)), quantize_weight(weight.float(), **layout(4, 4))
    assert low.error == exact.error
    assert all(torch.equal(a, b) for a, b in zip(low.weight, exact.weight, strict=True))


@pytest.mark.parametrize(("bits", "residual_bits"), [(2, 0), (4, 0), (4, 4)])
def test_zero_rows_stay_zero(bits, residual_bits):
    weight = gaussian(4, 128)
    weight[1] = 0
    settings = layout(bits, residual_bits)
    packed, error = quantize_weight(weight, **settings)
    assert packed.scales[1].tolist() == [0] * 4
    assert packed.exponents[1] == 0
    assert dequantize_weight(packed, 128, **settings)[1].tolist() == [0.0] * 128
    assert error < LLOYD_MAX[bits + residual_bits]
    nothing = quantize_weight(torch.zeros(3, 40), **settings)
    assert nothing.error == 0
    assert not dequantize_weight(nothing.weight, 40, **settings).any()


@pytest.mark.parametrize("value", [1.0, -0.37, 1e30, 1e-30])
def test_constant_rows(value):
    # Rotated with random signs, a constant row is no special case.
    weight = torch.full((3, 256), value)
    packed, error = quantize_weight(weight, **layout(4, 4))
    assert error < 1e-4
    assert relative_error(dequantize_weight(packed, 256, **layout(4, 4)), weight) < 1e-4


@pytest.mark.parametrize("power", [-99, -60, -14, 0, 15, 60, 99])
def test_magnitude_moves_the_exponents_only(power):
    weight = gaussian(3, 192)
    base = quantize_weight(weight, **layout(4, 2))
    moved = quantize_weight(torch.ldexp(weight, torch.tensor(power)), **layout(4, 2))
    assert torch.equal(moved.weight.codes, base.weight.codes)
    assert torch.equal(moved.weight.residual, base.weight.residual)
    assert torch.equal(moved.weight.scales, base.weight.scales)
    assert torch.equal(moved.weight.exponents, base.weight.exponents + power)
    assert moved.error == pytest.approx(base.error, rel=1e-6)


def test_rows_of_any_magnitude_share_a_matrix():
    scale = torch.tensor([1e-30, 1e-12, 1.0, 1e12, 1e30])
    packed = quantize_weight(gaussian(5, 256) * scale[:, None], **layout(4, 4)).weight
    rebuilt = dequantize_weight(packed, 256, **layout(4, 4)) / scale[:, None]
    for row, expected in zip(rebuilt, gaussian(5, 256), strict=True):
        assert relative_error(row, expected) < 1e-4


def test_rows_below_the_range_become_zero_and_count_as_lost():
    weight = gaussian(4, 128) * 1e-36
    packed, error = quantize_weight(weight, **layout())
    assert error == pytest.approx(1)
    assert not packed.scales.any()
    assert not dequantize_weight(packed, 128, **layout()).any()


def test_values_above_the_range_are_an_error():
    quantize_weight(torch.full((2, 64), 1e34), **layout())
    with pytest.raises(QuantizationError, match=r"mlp: entries up to 3e\+37 are too large"):
        quantize_weight(torch.full((2, 64), 3e37), **layout(), name="mlp")
    assert quantize_weight(torch.full((2, 64), 1e34), **layout()).weight.exponents.max() <= MAX_EXPONENT


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_are_named_with_their_position(value, dtype):
    weight = gaussian(6, 50).to(dtype)
    weight[4, 33] = value
    weight[5, 0] = value
    with pytest.raises(QuantizationError, match=rf"model\.up: weight\[4, 33\] is {value}.*skip"):
        quantize_weight(weight, **layout(), name="model.up")


def test_opposite_infinities_are_found_too():
    weight = torch.zeros(2, 40)
    weight[0, 1], weight[1, 2] = float("inf"), -float("inf")
    with pytest.raises(QuantizationError, match=r"weight\[0, 1\] is inf"):
        quantize_weight(weight, **layout())


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(2, 3, 4), torch.ones(2, 2).int()]
)
def test_only_matrices_can_be_quantized(weight):
    with pytest.raises(
        QuantizationError, match=r"head: got a torch\.\w+ tensor of shape \(.*non-empty floating-point matrix"
    ):
        quantize_weight(weight, **layout(), name="head")


def test_rows_are_independent_of_one_another():
    weight = integers(64, 320)
    whole = quantize_weight(weight, **layout(4, 2)).weight
    parts = [quantize_weight(rows, **layout(4, 2)).weight for rows in weight.split(16)]
    for name in PackedWeight._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_chunks_of_rows_give_the_same_planes_and_results(monkeypatch):
    settings = layout(4, 2)
    weight, x, grad = integers(37, 192), gaussian(3, 192, seed=1), gaussian(3, 37, seed=2)
    whole = quantize_weight(weight, **settings)
    monkeypatch.setattr(reference, "_CPU_CHUNK", 2000)
    chunked = quantize_weight(weight, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.weight, chunked.weight, strict=True))
    assert chunked.error == pytest.approx(whole.error, rel=1e-6)

    def small_chunks(packed, elements=0):
        return [PackedWeight(*parts) for parts in zip(*(t.split(10) for t in packed), strict=True)]

    expected = linear(x, whole.weight, None, 192, **settings), linear_input_gradient(grad, whole.weight, 192, **settings)
    decoded = dequantize_weight(whole.weight, 192, **settings)
    monkeypatch.setattr(reference, "_row_chunks", small_chunks)
    torch.testing.assert_close(linear(x, whole.weight, None, 192, **settings), expected[0], rtol=1e-5, atol=1e-3)
    back = linear_input_gradient(grad, whole.weight, 192, **settings)
    torch.testing.assert_close(back, expected[1], rtol=1e-5, atol=1e-3)  # of sums of products near 300
    torch.testing.assert_close(dequantize_weight(whole.weight, 192, **settings), decoded)


def test_seed_and_group_size_change_the_planes():
    weight = gaussian(4, 256)
    planes = [quantize_weight(weight, **layout(group_size=g, seed=s)).weight.codes for g in (32, 64, 128) for s in (0, 1)]
    assert len({bytes(plane.flatten().tolist()) for plane in planes}) == 6


def test_the_base_plane_alone_is_a_usable_weight():
    weight = gaussian(32, 512)
    packed = quantize_weight(weight, **layout(4, 2)).weight._replace(residual=None)
    error = relative_error(dequantize_weight(packed, 512, **layout(4, 0)), weight)
    assert 0.005 < error < 1.35 * LLOYD_MAX[4]  # scales searched for six bits clip too much for four


def test_search_beats_every_representable_scale_nearby():
    # Exhaustive oracle for single blocks: no scale byte of the row's exponent does much better.
    weight = gaussian(24, 32, seed=8)
    packed, _ = quantize_weight(weight, **layout(4, 0))
    rotated = weight.double() @ oracle.rotation(32, 128, 9)
    levels = torch.tensor([float(level) for level in oracle.levels(4, 0)], dtype=torch.float64)
    found = torch.tensor([[float(v) for v in row] for row in oracle.decode(packed, 4, 0)], dtype=torch.float64)
    ours = (rotated - found).square().sum(1)
    scales = torch.tensor([float(oracle.scale_value(b)) for b in range(1, 256)], dtype=torch.float64)
    scales = scales[None, :] * torch.exp2(packed.exponents.double())[:, None]
    ratio = rotated[:, None, :] / scales[:, :, None]
    nearest = levels[torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)] * scales[:, :, None]
    best = (rotated[:, None, :] - nearest).square().sum(2).min(1).values
    assert float(ours.sum() / best.sum()) < 1.01


# -- memory


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations made, and of the copy that a CPU makes inside a sum of another dtype."""

    def __init__(self, *given):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        hidden = 0
        if function is torch.ops.aten.sum.default and (kwargs or {}).get("dtype", args[0].dtype) != args[0].dtype:
            hidden = args[0].numel() * kwargs["dtype"].itemsize
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.bytes + hidden)
        return out

    def _forget(self, key):
        self.bytes -= self.sizes.pop(key)


@pytest.mark.parametrize(
    ("chunk", "k", "bits", "residual_bits", "limit"),
    [
        (reference._CPU_CHUNK, 2048, 4, 4, 10e6),
        (reference._GPU_CHUNK[0], 2048, 4, 0, 20e6),
        (reference._GPU_CHUNK[0], 5608, 3, 2, 20e6),
    ],
)
def test_working_space_is_bounded(chunk, k, bits, residual_bits, limit, monkeypatch):
    """Loading promises the quantized model plus one layer: what quantizing takes besides must not grow with the layer."""
    monkeypatch.setattr(reference, "_CPU_CHUNK", chunk)
    weight = gaussian(4 * chunk // k, k).bfloat16()
    with LiveStorages(weight) as live:
        planes = quantize_weight(weight, bits=bits, residual_bits=residual_bits).weight
    assert live.peak - planes.nbytes < limit


@pytest.mark.parametrize("rows", [1, 500, 5000, 20000, 200000])
def test_a_gpu_takes_chunks_that_grow_with_the_matrix(rows):
    """Beyond 20 MB the working space is less than the matrix in bf16, and 80 MB at most."""
    weight = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
    needed = 36 * reference._chunk(weight)
    assert needed <= min(max(20e6, 1.15 * weight.nbytes), 80e6)
    assert reference._chunk(weight) == 1 << 21 or rows < 8192  # a large layer must not wait for launches


def test_a_check_makes_no_copy_of_the_weight():
    weight = torch.ones(8 << 10, 1 << 10, dtype=torch.bfloat16)
    with LiveStorages(weight) as live:
        reference.check_matrix(weight, "weight")
    assert live.peak < 5e6


def test_the_position_of_what_is_not_finite_is_found_in_any_part(monkeypatch):
    monkeypatch.setattr(reference, "_CHECK_CHUNK", 100)
    weight = torch.ones(9, 30)
    weight[7, 3] = torch.inf
    with pytest.raises(QuantizationError, match=r"layer: weight\[7, 3\] is inf"):
        quantize_weight(weight, name="layer")
    weight[7, 3] = weight[2, 1] = 3e38  # their sum is infinite, they are not
    reference.check_matrix(weight, "layer")
