"""Codebooks against Lloyd-Max quantizers that are derived here, by exact integration of the normal density."""

import functools
import hashlib
import itertools
import math
import struct

import format_oracle as oracle
import pytest
import torch

from turboquant_weights.codebook import HALF_INTEGER_LEVELS, POLYNOMIALS, UNIT, boundary_tensor, level_tensor, levels
from turboquant_weights.reference import quantize_weight

NESTED = [
    (4, 1, 0.002522, 0.0025216),
    (4, 2, 0.000657, 0.00065322),
    (4, 3, 0.000169, 0.00016819),
    (4, 4, 0.0000428, 0.000043155),
]


def density(x):
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def moments(low, high):
    """Integrals of phi, x phi and x^2 phi over [low, high]."""
    mass = (torch.erf(high / math.sqrt(2)) - torch.erf(low / math.sqrt(2))) / 2
    edge = torch.nan_to_num(low, neginf=0) * density(low) - torch.nan_to_num(high, posinf=0) * density(high)
    return mass, density(low) - density(high), mass + edge


def mean_squared_error(boundaries, values):
    """E (x - q(x))^2 for N(0, 1); ``values`` has one entry more than ``boundaries``."""
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    mass, first, second = moments(torch.cat([-infinity, boundaries]), torch.cat([boundaries, infinity]))
    return float((second - 2 * values * first + values**2 * mass).sum())


def midpoints(values):
    return (values[1:] + values[:-1]) / 2


@functools.cache
def lloyd_max(count):
    """The optimal ``count`` levels on N(0, 1): every level the centroid of its cell, every edge a midpoint."""
    values = torch.linspace(-1, 1, count, dtype=torch.float64) * math.sqrt(2 * math.log(count))
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([-infinity, midpoints(values), infinity])
        mass, first, _ = moments(edges[:-1], edges[1:])
        change = float((first / mass - values).abs().max())
        values = first / mass
        if change < 1e-12:
            return values
    raise AssertionError("no convergence")


def lloyd_max_inside(low, high, count):
    """The optimal levels for the part of N(0, 1) between two edges."""
    values = torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1] * (min(high, 4.2) - low) + low
    low, high = (torch.tensor([edge], dtype=torch.float64) for edge in (low, high))
    for _ in range(20_000):
        edges = torch.cat([low, midpoints(values), high])
        mass, first, _ = moments(edges[:-1], edges[1:])
        change = float((first / mass - values).abs().max())
        values = first / mass
        if change < 1e-9:
            return values
    raise AssertionError("no convergence")


def our_levels(bits, residual_bits):
    return torch.tensor(levels(bits, residual_bits), dtype=torch.float64) / UNIT[bits]


def our_error(bits, residual_bits):
    values = our_levels(bits, residual_bits)
    return mean_squared_error(midpoints(values), values)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.117482), (3, 0.034548), (4, 0.009501)])
def test_base_levels_are_lloyd_max_to_a_thousandth(bits, expected):
    optimum = lloyd_max(2**bits)
    best = mean_squared_error(midpoints(optimum), optimum)
    assert best == pytest.approx(expected, abs=6e-7)
    assert best <= our_error(bits, 0) < 1.001 * best


@pytest.mark.parametrize(("bits", "residual_bits", "nested", "expected"), NESTED)
def test_finer_levels_beat_or_match_exact_nesting(bits, residual_bits, nested, expected):
    base = lloyd_max(2**bits)
    edges = [-math.inf, *midpoints(base).tolist(), math.inf]
    upper = [lloyd_max_inside(low, high, 2**residual_bits) for low, high in itertools.pairwise(edges[8:])]
    fine = torch.cat(upper)
    fine = torch.cat([-fine.flip(0), fine])
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    cuts = torch.cat([inner, *(midpoints(part) for part in fine.view(-1, 2**residual_bits))]).sort().values
    assert mean_squared_error(cuts, fine) == pytest.approx(nested, rel=2e-3)
    assert our_error(bits, residual_bits) == pytest.approx(expected, rel=1e-4)
    assert our_error(bits, residual_bits) < 1.01 * nested


@pytest.mark.parametrize(("bits", "residual_bits"), [pair for pair in oracle.COMBINATIONS if pair[1]])
def test_finer_levels_are_near_lloyd_max(bits, residual_bits):
    optimum = {3: 0.034548, 4: 0.009501, 5: 0.002505, 6: 0.000644, 7: 0.000163, 8: 0.0000412}[bits + residual_bits]
    assert 0.99 * optimum < our_error(bits, residual_bits) < 1.05 * optimum


@pytest.mark.parametrize(("bits", "residual_bits"), [pair for pair in oracle.COMBINATIONS if pair[1]])
def test_the_base_plane_alone_costs_at_most_five_percent(bits, residual_bits):
    # The encoder cuts at the fine boundaries; the base field is the index without its low bits.
    fine = our_levels(bits, residual_bits)
    cuts = midpoints(fine)[2**residual_bits - 1 :: 2**residual_bits]
    optimum = lloyd_max(2**bits)
    best = mean_squared_error(midpoints(optimum), optimum)
    assert mean_squared_error(cuts, our_levels(bits, 0)) < (1.05 if bits == 4 else 1.06) * best


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_samples_agree_with_the_integral(bits, residual_bits):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(bits * 8 + residual_bits))
    index = torch.bucketize(x * UNIT[bits], boundary_tensor(bits, residual_bits))
    error = (x - level_tensor(bits, residual_bits)[index] / UNIT[bits]).double().square()
    standard_error = float(error.std()) / len(x) ** 0.5
    assert abs(float(error.mean()) - our_error(bits, residual_bits)) < 4 * standard_error


def test_norm_scaled_groups_of_128_give_the_textbook_error():
    x = torch.randn(8000, 128, generator=torch.Generator().manual_seed(3))
    scale = x.square().mean(1, keepdim=True).sqrt() / UNIT[4]
    rebuilt = level_tensor(4)[torch.bucketize(x / scale, boundary_tensor(4))] * scale
    assert float((x - rebuilt).square().sum() / x.square().sum()) == pytest.approx(0.00932, rel=0.01)


def test_searched_scales_take_a_third_of_that_error():
    # One 8-bit scale per 32 columns, searched: 0.0060 (an ideal scale: 0.0059).
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(4))
    assert quantize_weight(x, bits=4).error == pytest.approx(0.0060, rel=0.03)


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_a_one_hot_group_is_rebuilt(bits, residual_bits):
    # Its rotation has one magnitude only, so a good scale leaves nothing but the rounding of the scale (below 2**-6
    # relative). The norm's scale would leave 3e-3 at 4 bits.
    errors = []
    for magnitude in torch.linspace(1, 2, 17)[:-1]:
        errors.append(quantize_weight(magnitude * torch.eye(1, 128), bits=bits, residual_bits=residual_bits).error)
    assert max(errors) < 2.0**-12
    assert sum(errors) / len(errors) < 6e-5
    if bits == 4 and residual_bits == 0:
        assert errors[0] < 2e-5


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_levels_are_those_of_the_format_document(bits, residual_bits):
    ours = levels(bits, residual_bits)
    assert list(ours) == [float(value) for value in oracle.levels(bits, residual_bits)]
    numbers, digest = oracle.level_table()[oracle.label(bits, residual_bits)]
    assert hashlib.sha256(struct.pack(f"<{len(ours)}e", *ours)).hexdigest() == digest
    assert numbers == list(POLYNOMIALS[bits, residual_bits] if residual_bits else HALF_INTEGER_LEVELS[bits])


def test_the_worked_table_of_the_format_document():
    table = oracle.DOCUMENT.split("the positive levels of 4+1:")[1].split("```")[1].removeprefix("text").split()
    assert [float(number) for number in table] == list(levels(4, 1)[16:])


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_levels_ascend_are_odd_and_exact_in_half_precision(bits, residual_bits):
    tensor = level_tensor(bits, residual_bits, dtype=torch.float64)
    assert len(tensor) == 2 ** (bits + residual_bits)
    assert torch.all(tensor[1:] > tensor[:-1])
    assert torch.equal(tensor, -tensor.flip(0))
    assert torch.equal(tensor.half().double(), tensor)
    if residual_bits == 0:
        assert torch.equal(tensor.bfloat16().double(), tensor)
        assert max(HALF_INTEGER_LEVELS[bits]) < 128  # int8 kernels hold them


@pytest.mark.parametrize(("bits", "residual_bits"), oracle.COMBINATIONS)
def test_boundaries_are_midpoints_of_the_decoded_levels(bits, residual_bits):
    tensor = level_tensor(bits, residual_bits, dtype=torch.float64)
    assert torch.equal(boundary_tensor(bits, residual_bits).double(), midpoints(tensor))
