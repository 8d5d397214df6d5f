"""Derives the codebooks: Lloyd-Max levels, the half-integer grids and the polynomials of codebook.py, with their errors.

python benchmarks/codebooks.py            # the table in DESIGN.md, from the shipped constants
python benchmarks/codebooks.py --fit      # search the polynomials again (minutes; needs scipy)
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics

from turboquant_weights import codebook

NESTING = 0.3  # weight of the loss of the base plane read alone


def _phi(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi) if math.isfinite(t) else 0.0


def _cdf(t: float) -> float:
    return 0.5 * (1 + math.erf(t / math.sqrt(2)))


def gaussian_mse(levels: list[float], boundaries: list[float] | None = None) -> float:
    """E[(x - q(x))^2] on N(0, 1), exactly; ``boundaries`` default to the midpoints."""
    inner = boundaries or [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    total = 0.0
    for level, a, b in zip(levels, [-math.inf, *inner], [*inner, math.inf], strict=True):
        mass = _cdf(b) - _cdf(a)
        first = _phi(a) - _phi(b)
        second = mass + (a * _phi(a) if math.isfinite(a) else 0.0) - (b * _phi(b) if math.isfinite(b) else 0.0)
        total += second - 2 * level * first + level * level * mass
    return total


def lloyd_max(bits: int) -> list[float]:
    """The optimal quantizer of N(0, 1) by Lloyd's iteration, from the best compander."""
    count = 2**bits
    compander = statistics.NormalDist(0, math.sqrt(3))  # Panter and Dite 1951: density to the power 1/3
    levels = [compander.inv_cdf((2 * i + 1) / (2 * count)) for i in range(count)]
    for _ in range(60 * count):
        inner = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        edges = [-math.inf, *inner, math.inf]
        levels = [(_phi(a) - _phi(b)) / max(_cdf(b) - _cdf(a), 1e-300) for a, b in itertools.pairwise(edges)]
    return levels


def scores(bits: int, residual_bits: int, optimum: dict[int, float]) -> tuple[float, float, float]:
    """MSE, excess over Lloyd-Max of the same total bits, excess of the base plane alone over Lloyd-Max of its bits."""
    unit = codebook.UNIT[bits]
    levels = [level / unit for level in codebook.levels(bits, residual_bits)]
    mse = gaussian_mse(levels)
    boundaries = [(a + b) / 2 for a, b in itertools.pairwise(levels)][2**residual_bits - 1 :: 2**residual_bits]
    base = gaussian_mse([level / unit for level in codebook.levels(bits)], boundaries)
    return mse, mse / optimum[bits + residual_bits] - 1, base / optimum[bits] - 1


def fit(bits: int, residual_bits: int, optimum: dict[int, float], steps: int = 4000) -> tuple[float, ...]:
    """Least squares start, simplex search in float64, then a random search over half-precision coefficients."""
    import numpy as np
    from scipy.optimize import minimize

    total = bits + residual_bits
    unit = codebook.UNIT[bits]
    base = [level / unit for level in codebook.levels(bits)]
    x = (2 * np.arange(2 ** (total - 1)) + 1) / 2 ** (total - 1)
    powers = np.stack([x ** (2 * i + 1) for i in range(4 if residual_bits == 1 else 5)], 1)
    target = np.array(lloyd_max(total)[2 ** (total - 1) :])
    weights = np.exp(-(target**2) / 6)[:, None] + 0.02
    start = np.linalg.lstsq(powers * weights, target * unit * weights[:, 0], rcond=None)[0]

    def loss(positive: list[float]) -> float:
        if any(b <= a for a, b in itertools.pairwise(positive)):
            return 9.0
        levels = [-p / unit for p in reversed(positive)] + [p / unit for p in positive]
        inner = [(a + b) / 2 for a, b in itertools.pairwise(levels)][2**residual_bits - 1 :: 2**residual_bits]
        return gaussian_mse(levels) / optimum[total] - 1 + NESTING * (gaussian_mse(base, inner) / optimum[bits] - 1)

    def exact(coefficients: tuple[float, ...]) -> float:
        return loss([codebook._polynomial(coefficients, float(v)) for v in x])

    for _ in range(4):
        start = minimize(lambda c: loss(list(powers @ c)), start, method="Nelder-Mead", options=dict(maxfev=4000)).x
    best = tuple(codebook._half(float(c)) for c in start)
    best_loss = exact(best)
    generator = random.Random(0)
    for _ in range(steps):
        moved = [codebook._half(c * (1 + generator.choice((0, 0, -1, 1)) * 2.0**-10)) for c in best]
        if exact(tuple(moved)) < best_loss:
            best, best_loss = tuple(moved), exact(tuple(moved))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="search the polynomial coefficients again")
    args = parser.parse_args()
    optimum = {bits: gaussian_mse(lloyd_max(bits)) for bits in range(1, 9)}
    print("| bits | MSE on N(0,1) | over Lloyd-Max | base plane alone |\n|---|---|---|---|")
    for bits, residual_bits in itertools.product((2, 3, 4), range(5)):
        mse, excess, base = scores(bits, residual_bits, optimum)
        print(f"| {bits}+{residual_bits} | {mse:.5g} | {100 * excess:+.3f} % | {100 * base:+.2f} % |")
        if args.fit and residual_bits:
            print(f"  fitted again: {fit(bits, residual_bits, optimum)}", flush=True)


if __name__ == "__main__":
    main()
