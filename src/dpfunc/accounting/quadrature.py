"""Where the integrals of Gaussian pairs are summed, by the trapezoid rule (notation: moments.py).

Shift the line of integration to Im x = +-y. There
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
from dpfunc.accounting.pairs import Array, GaussianPair, densities, log_density

UNIT = 2.0**-53  # half of the spacing of floats at 1
_DEEPEST = 8.6  # e^(y^2 / 2 - 2 pi y / h) is least there for the precision that is wanted
_MOST_NODES = 1_000_000
_MOST_PAIRS = 32


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
    centres: Stack | None = None
    """Of the cells that it stands for: one pair for the steps of each."""
    corners: Stack | None = None
    """And the extreme pairs of each, one after another; counts (cells,)."""

    def interpolation_error(self, values: NDArray[Any]) -> Any:
        """An estimate of the error of sums over pairs of count times values (tilts, pairs, ...)."""
        if self.shape is None:
            return 0.0
        return self.total * residual(values.swapaxes(0, 1), self.shape)


def stacks(pairs: Sequence[tuple[GaussianPair, float]], together: int = _MOST_PAIRS) -> list[Stack]:
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
    rise_above: Array
    """e^a - 1"""
    rise_below: Array
    known: Array
    """(pairs, nodes, 5): the loss, its square, that of x, and what rounding does to a and to b."""
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
    depth = np.minimum(_DEEPEST, (0.6 if falls else 0.9) * math.pi / max(of_p, of_q) * noise)
    if falls:  # where loss / depth, and with it the number of nodes, is nearly least
        depth = np.minimum(depth, np.sqrt(2 * precision / (1 + 0.3 * theta * (falls / noise) ** 2)))
    loss = precision + depth * depth / 2 + t * (of_p + of_q) * depth / noise
    if falls:
        loss = loss - theta * np.log(np.cos(falls * depth / 2 / noise))
    reach = math.sqrt(2 * precision)
    right = of_p * (1 + theta) / noise
    right = right + _settles(stack.below, noise, theta, right)
    left = reach + of_q / noise  # Q, of which `log_moments` takes E[e^b - 1], is centred there
    if both:
        left = left + of_q * theta / noise
        left = left + _settles(stack.above, noise, theta, left - reach)
    width = left + right + reach
    size = math.ceil((width / np.minimum(2 * math.pi * depth / loss, finest)).max()) + 1
    if size * len(noise) > _MOST_NODES:
        raise TooManyNodes
    step = width / (size - 1)
    x = step[:, None] * np.arange(size)
    x -= left[:, None]
    square = x * x
    log_weight = np.log(step / math.sqrt(2 * math.pi))[:, None] - 0.5 * square
    above, rise_above = densities(stack.above, x, stack.noise)
    below, rise_below = densities(stack.below, -x, stack.noise)
    loss = above - below
    known = np.empty((*x.shape, 5))
    known[..., 0], known[..., 1], known[..., 2] = loss, loss * loss, square
    known[..., 3] = _wobble(stack.above, rise_above, x, stack.noise)
    known[..., 4] = _wobble(stack.below, rise_below, x, stack.noise)
    error = 2 * math.exp(-precision)
    return Nodes(x, log_weight, above, below, rise_above, rise_below, known, step, error)


def some(stack: Stack, at: Nodes, rows: slice | NDArray[Any]) -> tuple[Stack, Nodes]:
    """Some of the pairs."""
    *arrays, error = at
    return (
        Stack(stack.noise[rows], stack.above[rows], stack.below[rows], stack.counts[rows]),
        Nodes._make([*(each[rows] for each in arrays), error]),
    )


def _settles(weights: Array, noise: Array, theta: float, start: Array) -> Array | float:
    """How far past `start` the slope of -theta times a log density can still be above the Gaussian's."""
    if weights.shape[1] == 1:
        return 0.0
    noise = noise[:, None]
    first = weights[:, 0]
    if first.min() > 0:  # the probability of a component is at most its odds against the first
        j = np.arange(weights.shape[1])
        odds = weights * np.exp(-j * (start[:, None] + j / (2 * noise)) / noise)
        slope = theta * (odds @ j) / (first * noise[:, 0])
        if slope.max() < 2:
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


def _wobble(weights: Array, rise: Array, x: Array, noise: Array) -> Array | float:
    """Error of a log density at each node, in units in the last place, from e^density - 1.

    log1p(sum of w (e^y - 1)), y = j x / noise - j^2 / (2 noise^2): a few units of each term, and what
    rounding y changes, which is at most its two parts times the weight that the others leave, or 1.
    """
    components = weights.shape[1] - 1
    if not components:
        return 0.0
    parts = 4 * components / noise * (np.abs(x) + components / noise)
    moved = np.abs(np.minimum(rise, 1.0))
    rest = 1 - weights[:, :1]
    terms = moved if components == 1 else moved + rest
    return 40 * terms + parts * (moved + rest)
