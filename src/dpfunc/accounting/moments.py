"""Moments of the privacy loss of Gaussian pairs, in the complex plane, by the trapezoid rule.

With x standard normal, a = log of P's density and b = log of Q's over it, the loss is L = a - b and

    M(z) = E_P[e^(z L)] = E[e^((1 + z) a - z b)],            K(z) = sum over pairs of count log M(z).

Everything here is under the tilted law p(x) ~ N(x) e^((1 + theta) a - theta b), theta = Re z >= 0, in
which log M(theta + i t) - log M(theta) = log E_p[e^(i t L)].

**The quadrature** (`nodes`). Shift the line of integration to Im x = +-y. There
|N(x + iy)| = N(x) e^(y^2 / 2); P's density, a sum of terms of phases in [0, k y / noise], is no larger than
at x, and Q's no smaller than at x times cos(k y / (2 noise)); their arguments, at most k y / noise each, are
raised to the power t. So the trapezoid rule with step h leaves, relative to M(theta), at most

    2 e^(y^2 / 2 + t (k_P + k_Q) y / noise) cos(k_Q y / (2 noise))^-theta / (e^(2 pi y / h) - 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.accounting.interpolation import residual
from dpfunc.accounting.pairs import Array, GaussianPair, log_density

UNIT = 2.0**-53  # half of the spacing of floats at 1
_DEEPEST = 8.6  # e^(y^2 / 2 - 2 pi y / h) is least there for the precision that is wanted
_MOST_NODES = 1_000_000


class TooManyNodes(Exception):
    """The integrals of a log would take too long: another method must serve."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Gaussian pairs of equally many components, and how often each occurs."""

    noise: Array
    """(pairs, 1)"""
    above: Array
    """(pairs, components of P)"""
    below: Array
    """(pairs, components of Q)"""
    counts: Array
    """(pairs,); some are negative where the pairs stand for others (interpolation.py)."""
    shape: tuple[int, int] | None = None
    """Of the grid that the pairs then are."""
    total: float = 0.0
    """How many steps the grid stands for."""

    def interpolation_error(self, values: NDArray[Any]) -> Any:
        """An estimate of the error of sums of count times values (pairs, ...) that are smooth in both."""
        return 0.0 if self.shape is None else self.total * residual(values, self.shape)


def stacks(pairs: Sequence[tuple[GaussianPair, float]]) -> list[Stack]:
    """The pairs, those alike in shape together."""
    shapes: dict[tuple[int, int], list[tuple[GaussianPair, float]]] = {}
    for pair, count in pairs:
        shapes.setdefault((len(pair.above), len(pair.below)), []).append((pair, count))
    return [
        Stack(
            np.array([[pair.noise] for pair, _ in group]),
            np.array([pair.above for pair, _ in group]),
            np.array([pair.below for pair, _ in group]),
            np.array([count for _, count in group], dtype=float),
        )
        for group in shapes.values()
    ]


class Nodes(NamedTuple):
    """Where the integrals of a stack are summed: arrays are (pairs, nodes)."""

    x: Array
    log_weight: Array
    """log of step N(x)."""
    above: Array
    """a, the log density of P over N."""
    below: Array
    """b, that of Q."""
    step: Array
    """(pairs,)"""
    error: float
    """Of any sum, relative to M(theta): what the shift argument leaves."""


def nodes(stack: Stack, theta: float, t: float = 0.0, finest: float = math.inf) -> Nodes:
    """Nodes that serve every tilt in [0, theta] and every |Im z| <= t."""
    noise = stack.noise[:, 0]
    of_p, of_q = stack.above.shape[1] - 1, stack.below.shape[1] - 1
    precision = 38.0 + max(0.0, math.log(np.abs(stack.counts).sum()))
    depth = np.minimum(_DEEPEST, (0.6 if of_q else 0.9) * math.pi * noise / max(of_p, of_q))
    phase = (of_p + of_q) * depth / noise
    loss = precision + depth**2 / 2 + t * phase - theta * np.log(np.cos(of_q * depth / 2 / noise))
    reach = math.sqrt(2 * precision)
    right = of_p * (1 + theta) / noise
    if of_q:
        right = right + _settles(stack, theta, right)
    left = reach + of_q / noise  # Q, of which `tilt` takes E[e^b - 1], is centred there
    width = left + right + reach
    size = math.ceil((width / np.minimum(2 * math.pi * depth / loss, finest)).max()) + 1
    if size * len(noise) > _MOST_NODES:
        raise TooManyNodes
    step = width / (size - 1)
    x = step[:, None] * np.arange(size) - left[:, None]
    log_weight = np.log(step[:, None] / math.sqrt(2 * math.pi)) - x * x / 2
    above = log_density(stack.above, x, stack.noise)
    below = log_density(stack.below, -x, stack.noise)
    return Nodes(x, log_weight, above, below, step, 2 * math.exp(-precision))


def _settles(stack: Stack, theta: float, start: Array) -> Array:
    """How far past `start` the slope of -theta b can still be above that of the Gaussian."""
    steepest = (stack.below.shape[1] - 1) * theta / stack.noise
    slope = theta * _mean_shift(stack.below, -start[:, None], stack.noise)[:, 0]
    if (slope < 2).all():
        return slope
    further = np.linspace(0, 1, 65) ** 3 * steepest
    slope = theta * _mean_shift(stack.below, -(further + start[:, None]), stack.noise)
    return further[np.arange(len(further)), (further >= slope).argmax(1)]


def posterior(weights: Array, x: Array, noise: Array, log_total: Array) -> list[Array]:
    """Probability of each component but the first, given x."""
    with np.errstate(divide="ignore"):
        logs = np.log(weights)
    return [
        np.exp(logs[:, j, None] + j * x / noise - j * j / (2 * noise * noise) - log_total)
        for j in range(1, weights.shape[1])
    ]


def _mean_shift(weights: Array, x: Array, noise: Array) -> Array:
    given = posterior(weights, x, noise, log_density(weights, x, noise))
    return sum((j * share for j, share in enumerate(given, 1)), np.zeros_like(x)) / noise


def _rise(power: Array, whole: Array, weight: Array) -> Array:
    """weight (e^power - 1), where whole = weight e^power or, beyond e^9, less."""
    near = np.expm1(np.minimum(power, 1))
    near *= weight
    return np.where(power < 1, near, whole - weight)


def _rises(weights: Array, density: Array, at: Nodes, weight: Array) -> tuple[Any, Any, Any]:
    """Of weight (e^density - 1): the sum, that of the moduli, and what both leave out at the ends."""
    if weights.shape[1] == 1:
        return 0.0, 0.0, 0.0
    rise = _rise(density, np.exp(np.minimum(density + at.log_weight, 9)), weight)
    size = np.abs(rise)
    return rise.sum(-1), size.sum(-1), ends(at, size)


class Tilt(NamedTuple):
    """The tilted law of each pair."""

    theta: float
    p: Array
    """(pairs, nodes)"""
    mean: Array
    """(pairs,), like the rest."""
    log_moment: Array
    rounding: Array
    """Bound on the error of log_moment."""
    wobble: Array
    """Mean error of the loss at a node, in units in the last place."""


class Moments(NamedTuple):
    """A stack under some tilts: arrays are (tilts, pairs), and p with its nodes."""

    p: Array
    """The tilted law."""
    mean: Array
    """Of the loss."""
    variance: Array
    """A guide, not a bound."""
    log_moment: Array
    """log M"""
    rounding: Array
    """Bound on the error of log_moment, all but that of the quadrature."""
    wobble: Array
    """Mean error of the loss at a node, in units in the last place."""


def tilted(stack: Stack, at: Nodes, thetas: Array) -> Moments:
    """The law of the loss under e^(theta L) P, and its log moment."""
    theta = thetas[:, None]
    loss = at.above - at.below
    power = theta[..., None] * loss
    power += at.above
    p = power + at.log_weight
    top = p.max(-1, keepdims=True)
    p -= top
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    p /= total
    log_moment = (top + np.log(total))[..., 0]
    # The means under p of all that is known of a node, as one product of matrices.
    known = np.empty((*loss.shape, 5))
    known[..., 0], known[..., 1], known[..., 2] = loss, loss * loss, at.x * at.x
    known[..., 3] = _wobble(stack.above, at.above, at.x, stack.noise)
    known[..., 4] = _wobble(stack.below, at.below, at.x, stack.noise)
    mean, square, of_x, of_above, of_below = (p.swapaxes(0, 1) @ known).T
    wobble = (1 + theta) * of_above + theta * of_below
    rounding = UNIT * (40 + of_x + wobble) + ends(at, p)
    near = log_moment < 0.7
    if near.any():
        # E[e^a] = E[e^b] = 1, so M - 1 = E[e^power - 1 - (1 + theta)(e^a - 1) + theta (e^b - 1)]: where
        # a step is nearly nothing, this difference is what has the digits. No node adds less than 0 to
        # it, so the moduli of e^power - 1 add up to no more than it and those of the other two.
        weight = np.exp(at.log_weight)
        above = _rises(stack.above, at.above, at, weight)
        below = _rises(stack.below, at.below, at, weight)
        straight, size, outside = ((1 + theta) * a + s * theta * b for a, b, s in zip(above, below, (-1, 1, 1), strict=True))
        rise = _rise(power, p * (total * np.exp(np.minimum(top, 9))), weight)
        excess = rise.sum(-1) - straight
        error = UNIT * (wobble + 80 * size + 40 * np.abs(excess)) + ends(at, p + weight) + outside
        error += (3 + 2 * theta) * at.error  # of the two further expectations
        log_moment = np.where(near, np.log1p(np.where(near, excess, 0)), log_moment)
        rounding = np.where(near, 2 * error, rounding)
    variance = square - mean * mean
    return Moments(p, mean, variance, log_moment, rounding, of_above + of_below)


def tilt(stack: Stack, at: Nodes, theta: float) -> Tilt:
    """The same under one tilt."""
    every = tilted(stack, at, np.array([theta]))
    return Tilt(
        theta, every.p[0], every.mean[0], every.log_moment[0], every.rounding[0], every.wobble[0]
    )


def ends(at: Nodes, terms: Array) -> Array:
    """What a sum leaves out beyond its ends, where the terms fall by e^-step and more from one to the next."""
    return (terms[..., 0] + terms[..., -1]) / at.step


def _wobble(weights: Array, density: Array, x: Array, noise: Array) -> Array | float:
    """Error of a log density at each node, in units in the last place.

    log1p(sum of w (e^y - 1)), y = j x / noise - j^2 / (2 noise^2): a few units of each term, and what
    rounding y changes, which is at most its two parts times the weight that the others leave, or 1.
    """
    components = weights.shape[1] - 1
    if not components:
        return 0.0
    parts = components * (np.abs(x) + components / noise) / noise
    moved = np.abs(np.expm1(np.minimum(density, math.log(2))))
    rest = 1 - weights[:, :1]
    terms = moved if components == 1 else moved + rest
    return 40 * terms + 4 * parts * (moved + rest)
