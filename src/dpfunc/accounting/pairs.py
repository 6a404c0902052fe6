"""Dominating pairs: for each event the two distributions that are hardest to tell apart.

A release on neighbouring data sets is no easier to tell apart than one outcome of P from one of Q
(Zhu, Dong, Wang 2022, Definition 7), and a log no easier than the product of its pairs (their
Theorem 10). All that an accountant needs of a pair is the law of the privacy loss L = log dP/dQ:

    delta(epsilon) = E_P[(1 - e^(epsilon - L))_+].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Pair(Protocol):
    """What a pair must tell for its privacy loss to be put on a lattice."""

    @property
    def noise(self) -> float:
        """The noise multiplier."""
        ...

    @property
    def support(self) -> tuple[float, float]:
        """Infimum and supremum of the loss, in [-inf, inf]."""
        ...

    def masses(self, losses: Array) -> tuple[Array, Array]:
        """P and Q of the sets {losses[i] < L <= losses[i + 1]}, for non-decreasing losses.

        The ends may be -inf and inf. Each mass has a relative error of a few units in the last
        place of the larger of the two tails whose difference it is.
        """
        ...


@dataclass(frozen=True, slots=True)
class GaussianPair:
    """P = sum over j of above[j] N(j, noise^2) against Q = sum over j of below[j] N(-j, noise^2).

    In units of the noise, with x standard normal, the densities over N(0, 1) are
    sum of above[j] e^(j x / noise - j^2 / (2 noise^2)) and the same of below at -x, so the loss is
    their log ratio and rises with x.
    """

    noise: float
    above: tuple[float, ...]
    below: tuple[float, ...]

    @property
    def support(self) -> tuple[float, float]:
        low, high = -math.inf, math.inf
        if len(self.below) == 1:
            low = _log(self.above[0])
        if len(self.above) == 1:
            high = -_log(self.below[0])
        return low, high

    def losses(self, x: Array) -> Array:
        """The loss at outcomes x, in units of the noise."""
        above, below = np.array(self.above), np.array(self.below)
        return log_density(above, x, self.noise) - log_density(below, -x, self.noise)

    def outcomes(self, losses: Array) -> Array:
        """The x whose loss it is: -inf at or below the infimum, inf at or above the supremum."""
        low, high = self.support
        inside = (losses > low) & (losses < high)
        x = np.where(losses <= low, -np.inf, np.inf)
        x[inside] = _inverse(self, losses[inside])
        return x

    def masses(self, losses: Array) -> tuple[Array, Array]:
        x = self.outcomes(losses)
        return _mixture(self.above, x, self.noise), _mixture(self.below, -x[::-1], self.noise)[::-1]


def log_density(weights: Array, x: Array, noise: float | Array) -> Array:
    """log of sum over j of weights[..., j] e^(j x / noise - j^2 / (2 noise^2)), precise near 0 too.

    Leading axes of weights (..., components), x (..., n) and noise (..., 1) go together.
    """
    return densities(weights, x, noise)[0]


def densities(weights: Array, x: Array, noise: float | Array) -> tuple[Array, Array]:
    """The same, and that sum less 1 up to e^700, which is precise near 0 as well."""
    if weights.shape[-1] == 1:
        nothing = np.zeros_like(x)
        return nothing, nothing
    if weights.shape[-1] == 2 and weights[..., 0].min() >= 0.5:
        y = x / noise
        y -= 0.5 / noise**2
        beyond = 0.0 if y.max(initial=0.0) <= 700 else np.maximum(y - 700.0, 0.0)
        rise = np.expm1(np.minimum(y, 700.0, out=y), out=y)
        rise *= weights[..., 1, None]
        return np.log1p(rise) + beyond, rise
    near, far = np.zeros_like(x), np.full_like(x, -math.inf)
    small = np.ones_like(x, dtype=bool)
    with np.errstate(over="ignore", divide="ignore"):
        logs = np.log(weights)
        for j in range(1, weights.shape[-1]):
            exponent = j * x / noise - j * j / (2 * noise * noise)
            small &= exponent < 1
            near += weights[..., j, None] * np.expm1(np.minimum(exponent, 1.0))
            far = np.logaddexp(far, logs[..., j, None] + exponent)
        far = np.logaddexp(far, logs[..., 0, None])
        small &= near > -0.5
        rise = np.where(small, near, np.expm1(np.minimum(far, 700.0)))
        near = np.log1p(np.maximum(near, -0.5))
    return np.where(small, near, far), rise


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _mixture(weights: tuple[float, ...], x: Array, noise: float) -> Array:
    """Masses between neighbouring x of sum over j of weights[j] N(j / noise, 1)."""
    total, ndtr = np.zeros(len(x) - 1), scipy.special.ndtr
    for shift, weight in enumerate(weights):
        if weight:
            y = x - shift / noise
            # Of the two tails, the difference of the smaller loses fewer digits.
            total += weight * np.where(
                y[:-1] > 0,
                ndtr(-y[:-1]) - ndtr(-y[1:]),
                ndtr(y[1:]) - ndtr(y[:-1]),
            )
    return np.maximum(total, 0.0)


def _inverse(pair: GaussianPair, losses: Array) -> Array:
    if len(pair.above) == 2 and len(pair.below) == 1:
        return _hit(pair.above, pair.noise, losses)
    if len(pair.above) == 1 and len(pair.below) == 2:
        return -_hit(pair.below, pair.noise, -losses)
    low, high = np.full_like(losses, -1.0), np.full_like(losses, 1.0)
    while (pair.losses(low) > losses).any() or (pair.losses(high) < losses).any():
        low, high = 2 * low, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        above = pair.losses(middle) > losses
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def _hit(weights: tuple[float, ...], noise: float, losses: Array) -> Array:
    """Where log(weights[0] + weights[1] e^(x / noise - 1 / (2 noise^2))) has these values."""
    edge, prob = _log(weights[0]), weights[1]
    return noise * (losses + np.log(-np.expm1(edge - losses)) - math.log(prob)) + 0.5 / noise
