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
_TOGETHER = 32
"""Pairs: of more, what is in between leaves the cache."""


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


def stacks(pairs: Sequence[tuple[GaussianPair, float]], together: int = _TOGETHER) -> list[Stack]:
    """The pairs, those alike in shape together, so many at most."""
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
        for alike in shapes.values()
        for group in (alike[i : i + together] for i in range(0, len(alike), together))
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


def nodes(
    stack: Stack,
    theta: float,
    t: float = 0.0,
    finest: float = math.inf,
    *,
    both: bool = False,
) -> Nodes:
    """Nodes that serve every tilt in [0, theta] and every |Im z| <= t; both: in [-1 - theta, -1] too."""
    noise = stack.noise[:, 0]
    of_p, of_q = stack.above.shape[1] - 1, stack.below.shape[1] - 1
    precision = 38.0 + max(0.0, math.log(np.abs(stack.counts).sum()))
    falls = max(of_p, of_q) if both else of_q  # the density with the power -theta
    depth = np.minimum(_DEEPEST, (0.6 if falls else 0.9) * math.pi * noise / max(of_p, of_q))
    loss = precision + depth**2 / 2 + t * (of_p + of_q) * depth / noise
    if falls:
        loss = loss - theta * np.log(np.cos(falls * depth / 2 / noise))
    reach = math.sqrt(2 * precision)
    right = of_p * (1 + theta) / noise
    right = right + _settles(stack.below, noise, theta, right)
    left = reach + of_q / noise  # Q, of which `tilted` takes E[e^b - 1], is centred there
    if both:
        left = left + of_q * theta / noise
        left = left + _settles(stack.above, noise, theta, left - reach)
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


def some(stack: Stack, at: Nodes, rows: slice | NDArray[Any]) -> tuple[Stack, Nodes]:
    """Some of the pairs."""
    x, log_weight, above, below, step, error = at
    return (
        Stack(stack.noise[rows], stack.above[rows], stack.below[rows], stack.counts[rows]),
        Nodes(x[rows], log_weight[rows], above[rows], below[rows], step[rows], error),
    )


def _settles(weights: Array, noise: Array, theta: float, start: Array) -> Array | float:
    """How far past `start` the slope of -theta times a log density can still be above the Gaussian's."""
    if weights.shape[1] == 1:
        return 0.0
    noise = noise[:, None]
    slope = theta * _mean_shift(weights, -start[:, None], noise)[:, 0]
    if (slope < 2).all():
        return slope
    further = np.linspace(0, 1, 65) ** 3 * ((weights.shape[1] - 1) * theta / noise)
    slope = theta * _mean_shift(weights, -(further + start[:, None]), noise)
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


class Tilt(NamedTuple):
    """The tilted law of each pair; all arrays may have an axis of tilts in front."""

    theta: Any
    """A number, or (tilts, 1, 1)."""
    p: Array
    """(pairs, nodes)"""
    mean: Array
    """(pairs,), like the rest: of the loss."""
    variance: Array
    """A guide, not a bound."""
    log_moment: Array
    rounding: Array
    """Bound on the error of log_moment, all but that of the quadrature."""
    wobble: Array
    """Mean error of the loss at a node, in units in the last place."""


def tilted(stack: Stack, at: Nodes, thetas: Array) -> Tilt:
    """The law of the loss under e^(theta L) P, and its log moment, at some tilts.

    The tilt -1 - theta is theta in the other direction, in which the loss is -L.
    """
    if len(stack.noise) > _TOGETHER:
        blocks = [slice(i, i + _TOGETHER) for i in range(0, len(stack.noise), _TOGETHER)]
        parts = [tilted(*some(stack, at, block), thetas) for block in blocks]
        _, *joined = (np.concatenate(each, 1) for each in zip(*parts, strict=True))
        return Tilt(parts[0].theta, *joined)
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
    of_p, of_q = np.abs(1 + theta), np.abs(theta)
    wobble = of_p * of_above + of_q * of_below
    rounding = UNIT * (40 + of_x + wobble) + ends(at, p)
    near = log_moment < 0.7
    if near.any():
        # E[e^a] = E[e^b] = 1, so M - 1 = E[e^power - 1 - (1 + theta)(e^a - 1) + theta (e^b - 1)]: where
        # a step is nearly nothing, this difference is what has the digits.
        weight = np.exp(at.log_weight)
        excess = _rise(power, p * (total * np.exp(np.minimum(top, 9))), weight)
        size, lost = 0.0, ends(at, p + weight)
        for factor, weights, density in (
            (1 + theta, stack.above, at.above),
            (-theta, stack.below, at.below),
        ):
            if weights.shape[1] > 1:
                rise = _rise(density, np.exp(np.minimum(density + at.log_weight, 9)), weight)
                excess -= factor[..., None] * rise
                rise = np.abs(rise, out=rise)
                size = size + np.abs(factor) * rise.sum(-1)
                lost = lost + np.abs(factor) * ends(at, rise)
        error = UNIT * (wobble + 40 * size) + lost
        error += (2 + of_p + of_q) * at.error  # of the two further expectations
        log_moment = np.where(near, np.log1p(np.where(near, excess.sum(-1), 0)), log_moment)
        rounding = np.where(near, 2 * error, rounding)
    return Tilt(
        theta[..., None],
        p,
        mean,
        square - mean * mean,
        log_moment,
        rounding,
        of_above + of_below,
    )


def tilt(stack: Stack, at: Nodes, theta: float) -> Tilt:
    """The same under one tilt."""
    return Tilt(theta, *(array[0] for array in tilted(stack, at, np.array([theta]))[1:]))


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
