"""Closed forms of the profile: of full batches, and of one subsampled Gaussian step.

Their bounds are apart by `MARGIN`, which is well above the error of evaluating them.
"""

from __future__ import annotations

import math

from dpfunc.accounting.gdp import gaussian_delta, gaussian_epsilon
from dpfunc.accounting.pairs import GaussianPair

_OFF = 2.0**-49
MARGIN = 1e-11
"""Relative error of delta, and some."""
_TINY = 1e-321
"""Absolute error where delta is not a normal number, and some."""


def full_batch_delta(mu: float, epsilon: float) -> tuple[float, float]:
    """Of full batches under Gaussian noise: Balle and Wang 2018."""
    # At large mu it is the rounding of mu and of epsilon / mu that counts.
    low, high = (
        float(gaussian_delta(mu * (1 + side), epsilon * (1 - side))) for side in (-_OFF, _OFF)
    )
    return _outward(low, high)


def full_batch_epsilon(mu: float, delta: float) -> tuple[float, float]:
    """The inverse of `full_batch_delta`."""
    low = float(gaussian_epsilon(mu, min(delta * (1 + MARGIN), math.nextafter(1.0, 0.0))))
    high = float(gaussian_epsilon(mu, delta * (1 - MARGIN)))
    return low * (1 - 1e-12), high * (1 + 1e-12)


def one_step_delta(pair: GaussianPair, name: str, epsilon: float) -> tuple[float, float]:
    """Of one step: in the tilted coordinates of the mixture it is the Gaussian's own profile."""
    mu = 1 / pair.noise
    if name == "remove":
        prob = pair.above[1]
        low, high = full_batch_delta(mu, _log_hit(epsilon, prob))
        return _outward(prob * low, prob * high)
    prob = pair.below[1]
    end = -math.log1p(-prob) if prob < 1 else math.inf
    # Near the end its rounding is all that is left: a unit in the last place by log1p, and half a one in
    # adding it here. They are at most 2^-52 and 2^-53 of it; what is subtracted there is exact.
    off = 2.0**-51 * end if prob < 1 else 0.0
    return _added(mu, prob, epsilon + off, end)[0], _added(mu, prob, epsilon - off, end)[1]


def _outward(low: float, high: float) -> tuple[float, float]:
    return max(0.0, low * (1 - MARGIN) - _TINY), min(1.0, high * (1 + MARGIN) + _TINY)


def _added(mu: float, prob: float, epsilon: float, end: float) -> tuple[float, float]:
    if epsilon >= end:
        return 0.0, 0.0
    rest = -math.expm1(epsilon - end)  # 1 - (1 - prob) e^epsilon
    # prob e^epsilon - rest = e^epsilon - 1
    shifted = math.log1p(math.expm1(epsilon) / rest) if epsilon < 700 else epsilon - math.log(rest)
    low, high = full_batch_delta(mu, shifted)
    return _outward(rest * low, rest * high)


def _log_hit(epsilon: float, prob: float) -> float:
    """log(1 + (e^epsilon - 1) / prob), without overflow."""
    if epsilon > 30:
        return epsilon - math.log(prob) + math.log1p(-(1 - prob) * math.exp(-epsilon))
    return math.log1p(math.expm1(epsilon) / prob)


def one_step_epsilon(pair: GaussianPair, name: str, delta: float) -> tuple[float, float]:
    """The inverse of `one_step_delta`."""
    if name == "remove":
        prob = pair.above[1]
        if delta >= prob:
            return 0.0, 0.0
        low, high = full_batch_epsilon(1 / pair.noise, delta / prob)
        return _log_mixed(low, prob) * (1 - 1e-12), _log_mixed(high, prob) * (1 + 1e-12)
    # Delta falls with epsilon, and is 0 from -log(1 - prob) on.
    ends = []
    for side in (0, 1):
        low, high = 0.0, 1.0 if pair.below[1] == 1 else min(1.0, -math.log1p(-pair.below[1]))
        if one_step_delta(pair, name, 0.0)[side] <= delta:
            high = 0.0
        while one_step_delta(pair, name, high)[side] > delta:
            low, high = high, 2 * high
        while low < (middle := (low + high) / 2) < high:
            low, high = (
                (low, middle)
                if one_step_delta(pair, name, middle)[side] <= delta
                else (middle, high)
            )
        ends.append((low, high)[side])
    return ends[0], ends[1]


def _log_mixed(epsilon: float, prob: float) -> float:
    """log(1 + prob (e^epsilon - 1)), without overflow."""
    if epsilon > 700:
        return epsilon + math.log(prob)
    return math.log1p(prob * math.expm1(epsilon))
