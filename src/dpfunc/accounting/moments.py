"""Moments of the privacy loss of Gaussian pairs, in the complex plane, by the trapezoid rule.

With x standard normal, a = log of P's density and b = log of Q's over it, the loss is L = a - b and

    M(z) = E_P[e^(z L)] = E[e^((1 + z) a - z b)],            K(z) = sum over pairs of count log M(z).

Everything here is under the tilted law p(x) ~ N(x) e^((1 + theta) a - theta b), theta = Re z >= 0, in
which log M(theta + i t) - log M(theta) = log E_p[e^(i t L)].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dpfunc.accounting.pairs import Array
from dpfunc.accounting.quadrature import UNIT, Nodes, Stack, some

_TOGETHER = 1 << 16
"""Tilts, pairs and nodes, multiplied: of more, what is in between leaves the cache."""
_FURTHEST, _STEEPEST = 37.0, 700.0
"""Up to this x and this power neither N(x) nor e^power leaves the range of float64."""


class Moments(NamedTuple):
    """Of each pair at some tilts: arrays are (tilts, pairs)."""

    log_moment: Array
    rounding: Array
    """Bound on the error of log_moment, all but that of the quadrature."""
    mean: Array
    """Of the loss."""
    variance: Array
    """A guide, not a bound."""

    def at(self, tilts: slice) -> Moments:
        """Some of the tilts."""
        return Moments(*(each[tilts] for each in self))


def log_moments(stack: Stack, at: Nodes, thetas: Array) -> Moments:
    """log M at some tilts.

    The tilt -1 - theta is theta in the other direction, in which the loss is -L.

    E[e^a] = E[e^b] = 1, so M - 1 = E[e^power - 1 - (1 + theta)(e^a - 1) + theta (e^b - 1)]: where a step
    is nearly nothing, this difference is what has the digits. It is nowhere below 0, as e^power is
    convex in (e^a, e^b): so the moduli of the three parts add up to M - 1 and twice `size` at most.
    """
    together = max(1, _TOGETHER // (len(thetas) * at.x.shape[1]))
    if len(stack.noise) > together:
        blocks = [slice(i, i + together) for i in range(0, len(stack.noise), together)]
        parts = [log_moments(*some(stack, at, block), thetas) for block in blocks]
        return Moments(*(np.concatenate(each, 1) for each in zip(*parts, strict=True)))
    theta = thetas[:, None]
    factors = 1 + theta, -theta
    of_p, of_q = np.abs(factors)
    weight = np.exp(at.log_weight)
    power = theta[..., None] * at.known[..., 0]
    power += at.above
    safe = power.max() < _STEEPEST and np.abs(at.x[:, [0, -1]]).max() < _FURTHEST
    if safe:
        p = np.expm1(power, out=power)
        p *= weight
        excess = p.sum(-1)
        p += weight
        total = p.sum(-1)
        log_moment = np.log(total)
    else:
        log_p = power + at.log_weight
        excess = _rise(power, log_p, weight).sum(-1)
        top = log_p.max(-1, keepdims=True)
        log_p -= top
        p = np.exp(log_p, out=log_p)
        total = p.sum(-1)
        log_moment = top[..., 0] + np.log(total)
    mean, square, of_x, of_above, of_below = (p.swapaxes(0, 1) @ at.known).T / total
    wobble = of_p * of_above + of_q * of_below
    edge = ends(at, p) / total
    rounding = UNIT * (40 + of_x + wobble) + edge
    near = log_moment < 0.7
    if near.any():
        size: Any = 0.0
        lost = 2.1 * edge + ends(at, weight)
        for factor, weights, density, rise in (
            (factors[0], stack.above, at.above, at.rise_above),
            (factors[1], stack.below, at.below, at.rise_below),
        ):
            if weights.shape[1] > 1:
                part = rise * weight if safe else _rise(density, density + at.log_weight, weight)
                excess -= factor * part.sum(-1)
                part = np.abs(part, out=part)
                size = size + np.abs(factor) * part.sum(-1)
                lost = lost + np.abs(factor) * ends(at, part)
        excess = np.where(near, excess, 0.0)
        error = UNIT * (wobble + 80 * size + 90 * np.abs(excess)) + lost
        error += (2 + of_p + of_q) * at.error  # of the two further expectations
        log_moment = np.where(near, np.log1p(excess), log_moment)
        rounding = np.where(near, 2 * error, rounding)
    return Moments(log_moment, rounding, mean, square - mean * mean)


def _rise(power: Array, log_whole: Array, weight: Array) -> Array:
    """weight (e^power - 1), where log_whole is that of weight e^power; beyond e^9 less."""
    near = np.expm1(np.minimum(power, 1))
    near *= weight
    return np.where(power < 1, near, np.exp(np.minimum(log_whole, 9)) - weight)


class Tilt(NamedTuple):
    """The tilted laws of each pair."""

    theta: Array
    """(tilts, 1, 1)"""
    p: Array
    """(tilts, pairs, nodes)"""
    mean: Array
    """(tilts, pairs), like the rest: of the loss."""
    log_moment: Array
    rounding: Array
    """Bound on the error of log_moment, all but that of the quadrature."""
    wobble: Array
    """Mean error of the loss at a node, in units in the last place."""


def tilted(stack: Stack, at: Nodes, thetas: Array, known: Moments | None = None) -> Tilt:
    """The law of the loss under e^(theta L) P at some tilts; known: their moments, if they are."""
    if known is None:
        known = log_moments(stack, at, thetas)
    p = law(at, thetas)
    sums = (p.swapaxes(0, 1) @ at.known).T
    wobble = sums[3] + sums[4]
    return Tilt(thetas[:, None, None], p, sums[0], known.log_moment, known.rounding, wobble)


def law(at: Nodes, thetas: Array) -> Array:
    """Its probabilities of the nodes."""
    p = thetas[:, None, None] * at.known[..., 0]
    p += at.above
    p += at.log_weight
    p -= p.max(-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(-1, keepdims=True)
    return p


def ends(at: Nodes, terms: Array) -> Array:
    """What a sum leaves out beyond its ends, where the terms fall by e^-step and more from one to the next."""
    return (terms[..., 0] + terms[..., -1]) / at.step
