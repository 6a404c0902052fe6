"""The profile of a product of laws, by FFT under exponential tilting.

What floating point, wrap-around and truncation may have changed is added outward, each where it
arises; docs/accountant.md derives the bounds, in capitals there and here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dpfunc.accounting.lattice.laws import ULP, Law, tails
from dpfunc.accounting.lattice.outline import Tilt, log_sum
from dpfunc.accounting.pairs import Array


class Curve(NamedTuple):
    """A profile, linear in e^epsilon between knots: values[j] at start + j step, `zero` at -inf."""

    start: float
    step: float
    values: Array
    zero: float

    def delta(self, epsilons: Array) -> Array:
        place = (epsilons - self.start) / self.step
        at = np.clip(np.floor(place), 0, len(self.values) - 2).astype(int)
        share = np.expm1(np.clip(place - at, 0.0, 1.0) * self.step) / math.expm1(self.step)
        value = (1 - share) * self.values[at] + share * self.values[at + 1]
        share = np.exp(np.minimum(epsilons - self.start, 0.0))
        return np.where(place < 0, (1 - share) * self.zero + share * self.values[0], value)

    def last_above(self, delta: float) -> float:
        """The last epsilon where the profile is at least delta."""
        above = np.flatnonzero(self.values >= delta)
        return self._solve(int(above[-1]) + 1 if len(above) else 0, delta)

    def first_below(self, delta: float) -> float:
        """The first epsilon where the profile is at most delta."""
        below = np.flatnonzero(self.values <= delta)
        return self._solve(int(below[0]), delta) if len(below) else math.inf

    def _solve(self, end: int, delta: float) -> float:
        """Where the profile is delta, between the knots end - 1 and end."""
        if end == len(self.values):
            return self.start + (end - 1) * self.step
        before = float(self.values[end - 1]) if end else self.zero
        if before <= delta:
            return -math.inf
        share = (before - delta) / (before - float(self.values[end]))
        if end:
            return self.start + (end - 1) * self.step + math.log1p(share * math.expm1(self.step))
        return self.start + math.log(share) if share > 0 else -math.inf


def compose(counts: Array, laws: list[Law], step: float, tilt: Tilt, side: int) -> Curve:
    """The profile of the product of the laws, rounded up (side 1) or down (side -1)."""
    from scipy.fft import next_fast_len

    theta, base = tilt.theta, float(counts @ [law.base for law in laws])
    first = math.floor((tilt.window[0] - base) / step) - 1
    width = math.ceil((tilt.window[1] - tilt.window[0]) / step) + 4
    last = first + int(next_fast_len(width, real=True))  # pyright: ignore
    mid = min(max(math.floor((tilt.epsilon - base) / step), first), last - 1)

    powers = [_powers(law, theta * step, side) for law in laws]
    log_masses = np.array([log_sum(power) for power in powers])
    weights = [np.exp(power - mass) for power, mass in zip(powers, log_masses, strict=True)]
    composed, noise = _convolve(counts, weights, first, last)
    log_total = float(counts @ log_masses)
    log_scale = log_total - theta * step * mid
    moved = _moved(counts, laws) + 16 * ULP * step * max(abs(first), abs(last), last - first)
    lost = max(law.infinite for law in laws) > 1 - 1e-12
    if log_scale > 500.0 or not noise < 1.0 or not moved < 1e9 or lost:  # it tells nothing
        return nothing(side)

    # Relative to e^log_scale at x = 0. Knots whose terms would leave the range of float64 are left
    # out: the noise drowns those to the left, those to the right are below it.
    x = step * np.arange(first - mid, last - mid, dtype=np.float64)
    ends = -min(300.0, 650.0 - log_scale), 300.0
    begin, end = np.searchsorted(max(1.0, theta) * x, ends)
    values, zero = _profile(composed[begin:], x[begin:], end - begin, theta, step)
    fading = np.exp(-theta * x[begin:end])
    # ROUNDING OF SUMS AND SCALE
    ulps = 4 * len(x) + 2000 + 4 * abs(log_total) + 4 * theta * step * abs(mid)
    relative = ULP * (ulps + float(counts @ (120 + 2 * np.abs(log_masses))))
    # NOISE: over l_j > epsilon, |sum of error_j g(l_j)| <= |error| |g| in the 2-norm, where
    # g(l) = e^(-theta l) (1 - e^(epsilon - l)) rises and then falls.
    peak = math.exp(theta * math.log(theta) - (1 + theta) * math.log1p(theta))
    square = 1 / (theta * (2 * theta + 1) * (2 * theta + 2)) / step + peak**2
    error = noise * math.sqrt(square) * (1 + 1e-6)
    zero_error = noise / math.sqrt(-math.expm1(-2 * theta * step))
    # WRAP-AROUND: what lies outside the window appears inside it, which raises the sums, so only
    # the lower bound minds; what lies above it is missing from the upper bound.
    below, above = _outside(counts, powers, log_masses, tilt, step, first, last)
    missing = 0.0
    if side < 0:
        alias = (math.exp(min(0.0, below)) + math.exp(min(0.0, above))) * (1 + relative)
        error, zero_error = error + peak * alias, zero_error + alias
    else:
        log_missing = above + log_total - theta * step * last
        missing = math.exp(min(0.0, log_missing)) * (1 + relative)
    half = math.exp(log_scale / 2)
    values = (values * (1 + side * relative) + side * error * fading) * half * half
    zero = (zero * (1 + side * relative) + side * zero_error * float(fading[0])) * half * half
    # MASS AT INFINITY, and what the drift leaves out
    kept = float(counts @ [math.log1p(-law.infinite) for law in laws])
    beyond = missing + side * tilt.spare - math.expm1(kept)
    values, zero = values + beyond, zero + beyond
    if side > 0 and (begin or first > 0):  # the first knot may not have all
        zero = 1.0
    elif begin:
        zero = float(values[0])
    # ROUNDING OF LOSSES: the whole profile moves by it.
    return Curve(base + step * (first + int(begin)) + side * moved, step, values, zero)


def nothing(side: int) -> Curve:
    """The bound 1 (side 1) or 0 (side -1)."""
    return Curve(0.0, 1.0, np.full(2, max(0.0, side)), max(0.0, side))


def _powers(law: Law, slope: float, side: int) -> Array:
    """log of e^(slope k) mass[k], moved outward by ROUNDING OF THE TILT."""
    k = np.flatnonzero(law.mass)
    powers = np.full(len(law.mass), -np.inf)
    powers[k] = np.log(law.mass[k]) + slope * k
    powers[k] += side * ULP * (16 + 4 * np.abs(powers[k]) + 8 * slope * k)
    return powers


def _convolve(counts: Array, weights: list[Array], first: int, last: int) -> tuple[Array, float]:
    """The product of laws of mass 1 at first..last - 1, wrapped around, and its error's 2-norm."""
    from scipy.fft import irfft, rfft

    size = last - first
    transform = 8 * ULP * math.log2(size)
    log_phi = np.zeros(size // 2 + 1, dtype=np.complex128)
    noise, most, phi_ulps = 0.0, 0.0, np.full(len(log_phi), 8.0)
    for n, weight in zip(counts.tolist(), weights, strict=True):
        folded = np.zeros(math.ceil(len(weight) / size) * size)
        folded[: len(weight)] = weight
        folded = folded.reshape(-1, size).sum(0)
        phi: Any = rfft(folded)
        one: Any = np.log(np.where(phi == 0, 1e-300, phi))
        log_phi += n * one
        phi_ulps += n * (8 + 2 * np.abs(one.real)) * (1 + len(weights) / 2)
        # ROUNDING OF THE TRANSFORMS: |rfft's error| <= transform |rfft| in the 2-norm, and a
        # product of n factors of modulus at most 1 (+ that error) moves by at most n times it.
        norm = float(np.linalg.norm(folded))
        noise += n * transform * norm
        most += n * transform * norm * math.sqrt(size)
    phi = np.exp(log_phi)
    # ROUNDING OF THE POWERS
    moved = math.sqrt(2 / size) * float(np.linalg.norm(ULP * np.abs(phi) * phi_ulps))
    composed: Any = irfft(phi, size)
    noise *= math.exp(min(most, 700.0))
    noise += moved + 2 * transform * float(np.linalg.norm(composed))
    return np.roll(np.maximum(composed, 0.0), -(first % size)), noise


def _profile(
    composed: Array, x: Array, knots: int, theta: float, step: float
) -> tuple[Array, float]:
    """delta at the first x, and at -inf, of the law that has composed e^(-theta x) at x."""
    tails_at = tails(composed * np.exp(-theta * x))
    # delta(x_j) e^(-x_j) is a sum of positive terms, so that no digit cancels.
    terms = -math.expm1(-step) * np.append(tails_at[1:], 0.0) * np.exp(-x)
    return tails(terms)[:knots] * np.exp(x[:knots]), float(tails_at[0])


def _outside(
    counts: Array,
    powers: list[Array],
    log_masses: Array,
    tilt: Tilt,
    step: float,
    first: int,
    last: int,
) -> tuple[float, float]:
    """Chernoff's bounds on the logs of the tilted masses below the window and above it."""
    longest = float(counts @ [len(power) - 1 for power in powers])
    logs = []
    for further, edge, any_there in zip(
        tilt.further, (first - 1, last), (first > 0, longest >= last), strict=True
    ):
        slope = (further - tilt.theta) * step
        rises = [log_sum(power + slope * np.arange(len(power))) for power in powers]
        rise = float(counts @ (np.array(rises) - log_masses))
        logs.append(rise - slope * edge if any_there else -math.inf)
    return logs[0], logs[1]


def _moved(counts: Array, laws: list[Law]) -> float:
    """How far rounding may have moved the loss of the log."""
    shifts = [law.drift + ULP * (4 + 16 * len(laws)) * abs(law.base) for law in laws]
    return float(counts @ shifts)
