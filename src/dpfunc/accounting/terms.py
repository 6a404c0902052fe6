"""The terms of the contour sum, at one tilt and period, and what they and those left out can be off by."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpfunc.accounting import moments
from dpfunc.accounting.characteristic import decay, log_characteristic
from dpfunc.accounting.moments import Moments, Tilt
from dpfunc.accounting.pairs import Array
from dpfunc.accounting.quadrature import UNIT, Nodes, Stack
from dpfunc.accounting.rows import Laid, Row, Steps, lay


class Contour(NamedTuple):
    """All that the sum needs at any epsilon."""

    planned: float
    """The epsilon that it was planned for."""
    z: NDArray[np.complex128]
    terms: NDArray[np.complex128]
    """e^(K(z) - K(theta) - i t mean) / (z (z + 1)), times 2 / T (1 / T at t = 0)."""
    mean: float
    mean_error: float
    log_scale: float
    """K(theta)."""
    scale_error: float
    error: float
    """Of the sum of terms, all but its rounding."""
    sizes: tuple[float, float]
    """Sums of the moduli of the terms, and of t times those."""
    spacing: float
    row: Row | None = None
    """Around the tilt: for the aliases, and Chernoff's bounds."""
    plan: Row | None = None
    """What the tilt was chosen from: that row, or one of few pairs that stand for many."""
    aliases: tuple[tuple[Array, Array], ...] = ()
    """For those above epsilon and those below: tilts, and log of the bound less tilt times epsilon."""
    reverse: Contour | None = None
    """Of the other direction, at the same tilt and period, where it was asked for."""


class Tilted(NamedTuple):
    """A stack at its nodes, tilted."""

    stack: Stack
    at: Nodes
    tilt: Tilt
    falling: tuple[Stack, Nodes, Array]
    """The stack whose decay bounds this one's: it, or the corners of its cells; and its law."""


def tilted(
    steps: Steps,
    theta: float,
    t: float,
    both: bool = False,
    laid: Laid | None = None,
    index: int = 0,
) -> list[Tilted]:
    """At theta; both: and at -1 - theta, which is theta in the other direction.

    laid: of a row, of whose tilts this is the one at the index.
    """
    thetas = np.array([theta, -1 - theta] if both else [theta])
    serves = laid is not None and laid.t >= t and laid.theta >= theta and laid.both >= both
    found = []
    for i, stack in enumerate(steps.stacks):
        at = laid.nodes[i] if serves and laid is not None else lay(stack, theta, t, both)
        known = None if laid is None else _known(stack, at, laid, i, index, thetas)
        tilt = moments.tilted(stack, at, thetas, known)
        falling = stack, at, tilt.p
        if stack.corners is not None:
            beside = lay(stack.corners, theta, t, both)
            falling = stack.corners, beside, moments.law(beside, thetas)
        found.append(Tilted(stack, at, tilt, falling))
    return found


def _known(stack: Stack, at: Nodes, laid: Laid, i: int, index: int, thetas: Array) -> Moments:
    """The moments of a row's stack at the tilt of this index, and in the other direction."""
    of_row = laid.moments[i]
    own = of_row.at(slice(index, index + 1))
    if len(thetas) == 1:
        return own
    if len(of_row.mean) > laid.tilts:
        return of_row.at(slice(index, None, laid.tilts))
    other = moments.log_moments(stack, at, thetas[1:])
    return Moments(*(np.concatenate(each) for each in zip(own, other, strict=True)))


def log_tail(steps: Steps, laws: list[Tilted], t_last: float) -> Array:
    """log of a bound on what the terms beyond t_last add up to, over e^(K(theta) - theta epsilon)."""
    bound = np.full(len(laws[0].tilt.theta), -((steps.mu * t_last) ** 2) / 2)
    for one in laws:
        bound += decay(*one.falling, one.tilt.theta, t_last)
    # They are (2 / T) sum of e^bound / t_j^2, and the sum of 1 / t_j^2 is at most T / (2 pi t_last).
    return bound - math.log(math.pi * t_last)


def total(
    steps: Steps, theta: float, laws: list[Tilted], spacing: float, size: int, log_tail: Any
) -> Contour:
    """All but what the aliases need, in both directions if the laws have both."""
    t = spacing * np.arange(size)
    z = (theta + 1j * t).astype(np.complex128, copy=False)
    log_scale = steps.mu**2 * (theta**2 + theta) / 2
    mean: Any = 0.0
    mean_error: Any = 0.0
    scale_error: Any = 8 * UNIT * log_scale
    ceiling: Any = -((steps.mu * t) ** 2) / 2
    exponent, error = ceiling + 0j, -8 * UNIT * ceiling
    for stack, at, tilt, _ in laws:
        counts = np.abs(stack.counts)
        summing = UNIT * (8 + len(counts))
        mean = mean + tilt.mean @ stack.counts
        mean_error = mean_error + summing * (np.abs(tilt.mean) @ counts)
        log_scale = log_scale + tilt.log_moment @ stack.counts
        off = tilt.rounding + at.error + summing * np.abs(tilt.log_moment)
        scale_error = scale_error + off @ counts
        if stack.shape is not None:
            scale_error = scale_error + stack.interpolation_error(tilt.log_moment)
        there = log_characteristic(stack, at, tilt, spacing, size)
        exponent, error = exponent + there.value, error + there.error
        ceiling = ceiling + there.ceiling
    # In the other direction the loss is -L.
    exponent[1:], mean[1:] = exponent[1:].conj(), -mean[1:]
    weight = spacing / math.pi / (z * (z + 1))
    weight[0] /= 2
    terms = weight * np.exp(exponent)
    sizes = np.abs(terms)
    off = sizes * np.expm1(np.minimum(error, 700))
    off = np.minimum(off, sizes + np.abs(weight) * np.exp(ceiling))
    error = off.sum(-1) + np.exp(np.minimum(log_tail, 700.0))
    of_mu = steps.mu**2 * (theta + 0.5)
    numbers = (mean + of_mu, mean_error + 8 * UNIT * of_mu, log_scale, scale_error, error)
    rows = np.stack(numbers, -1).tolist()
    moduli = zip(sizes.sum(-1).tolist(), (sizes @ t).tolist(), strict=True)
    own, *other = (
        Contour(math.nan, z, of_one, mean, mean_error, log_scale, scale_error, error, both, spacing)
        for of_one, (mean, mean_error, log_scale, scale_error, error), both in zip(
            terms, rows, moduli, strict=True
        )
    )
    return own._replace(reverse=other[0]) if other else own


def log_delta_bounds(at: Contour, epsilon: float) -> tuple[float, float, float]:
    """log of a lower and an upper bound on delta, and d log delta / d epsilon; -inf for a bound of 0."""
    theta = float(at.z[0].real)
    turned = at.terms * np.exp((at.z - theta) * (at.mean - epsilon))
    total, slope = float(turned.sum().real), -float((turned @ at.z).real)
    phase_error = at.mean_error + 4 * UNIT * (abs(at.mean) + abs(epsilon))
    size, moment = at.sizes
    error = at.error + UNIT * (len(turned) + 16) * size + phase_error * moment
    log_scale = at.log_scale - theta * epsilon
    scale_error = at.scale_error + 4 * UNIT * (abs(at.log_scale) + abs(theta * epsilon))
    alias = sum(
        math.exp(min(float((logs - lambdas * epsilon).min()) - log_scale, 700.0))
        for lambdas, logs in at.aliases
    )
    upper = _log(total + error) + log_scale + scale_error
    lower = _log(total - error - alias) + log_scale - scale_error if at.aliases else -math.inf
    return lower, upper, slope / total if total > 0 else -theta


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
